"""Runs: learning, reproducibility, logging, stopping, kills and resumption."""

import itertools
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    LOSSES,
    PATIENCE,
    ROOT,
    SMALL_FLAGS,
    curves,
    environment,
    finish,
    load,
    next_second,
    read_events,
    run,
    same_weights,
    the_run,
    train,
    wait_for_training,
    wait_until,
)
from tensorboard.summary.writer.record_writer import RecordWriter

import ppo

ONE_EPISODE = (*SMALL_FLAGS, "--eval-episodes", 1)
TOTAL = 40 * 512  # steps of CartPole, 1 to 2 s; the returns of the last 100 episodes then reach about 200


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of an uninterrupted run of CartPole."""
    folder = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("unbroken"))
    run_dir = train(total_timesteps=TOTAL - 100).resolve()  # rounded up to whole iterations
    os.chdir(folder)
    return run_dir


def recent_return(run_dir):
    """Mean return of the last 10 iterations with a finished episode."""
    return np.mean([value for _, value in curves(run_dir)["charts/episodic_return"][-10:]])


def signal_in_iteration(number, signum, monkeypatch, times=1):
    """This process gets a signal, or several, in the middle of the n-th iteration from now."""
    compute_gae, iterations = ppo.compute_gae, itertools.count(1)

    def signalling(*inputs):
        if next(iterations) == number:
            for _ in range(times):
                signal.raise_signal(signum)
        return compute_gae(*inputs)

    monkeypatch.setattr(ppo, "compute_gae", signalling)


@pytest.mark.quick
def test_cartpole_learns(unbroken):
    """From about the return of random actions, 22, to several times that."""
    assert curves(unbroken)["charts/episodic_return"][0][1] < 40
    assert recent_return(unbroken) > 120


def test_the_script_alone_repeats_a_run_to_the_bit(unbroken):
    """A copy of ppo.py, with nothing else of the repository, in another process. Without a terminal it prints lines."""
    shutil.copy(ROOT / "ppo.py", "ppo.py")
    result = run(sys.executable, "ppo.py", "--total-timesteps", TOTAL - 100, *ONE_EPISODE, PYTHONPATH="")
    assert result.code == 0
    assert result.err == ""
    run_dir = the_run()
    assert re.fullmatch(r"CartPole-v1__ppo__1__\d{10}", run_dir.name)
    assert curves(run_dir) == curves(unbroken)
    assert same_weights(load(run_dir), load(unbroken))

    header, *lines, playing, evaluation = result.out.splitlines()
    assert header == f"{run_dir}: steps 0 to {TOTAL:,} by 512"
    assert 1 <= len(lines) <= 10
    assert all(re.fullmatch(r"step [\d,]+  [\d,]+ steps/s  return \d+\.\d\d", line) for line in lines)
    assert lines[-1].startswith(f"step {TOTAL:,}  ")
    assert playing == "playing 1 greedy episodes of CartPole-v1"
    ((step, value),) = curves(run_dir)["eval/episodic_return"]
    assert evaluation == f"evaluation at step {step:,}: return {value:.2f} +- 0.00"


def test_folders_of_runs_that_begin_at_once(monkeypatch):
    """None is given to two runs. No name holds a folder, or a character that Windows forbids."""
    monkeypatch.setattr(time, "time", lambda: 1_000_000.5)
    args = ppo.Args("probe_envs:Ten-v0", exp_name="a/b\\c")
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(lambda _: ppo.make_run_dir(args), range(64)))
    assert len(set(folders)) == len(list(Path("runs").iterdir())) == 64
    assert all(re.fullmatch(r"runs/probe_envs-Ten-v0__a-b-c__1__10000\d\d", str(folder)) for folder in folders)


def test_seeds():
    """The same seed gives the same curves and weights, another seed others."""
    one, same, other = (train(total_timesteps=512, seed=seed) for seed in (1, 1, 2))
    assert one != same
    assert curves(one) == curves(same)
    assert same_weights(load(one), load(same))
    assert curves(one)["charts/episodic_return"] != curves(other)["charts/episodic_return"]
    assert not same_weights(load(one), load(other))


@pytest.mark.parametrize("variable", [None, "2"])
def test_number_of_threads(variable, monkeypatch):
    """That of OMP_NUM_THREADS, which torch reads when it is imported, or else 1."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    with pytest.raises(ppo.UsageError):
        train(env_id="NoSuchEnv-v0")
    assert torch.get_num_threads() == int(variable or 1)
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------ logging


def test_events_hold_all_curves(unbroken):
    """With a finite value for every iteration; returns and lengths wherever an episode ended."""
    events = read_events(unbroken)
    tags = {f"losses/{name}" for name in (*LOSSES, "explained_variance")}
    tags |= {f"charts/{name}" for name in ("SPS", "learning_rate", "episodes")}
    for tag in tags:
        assert [event.step for event in events.Scalars(tag)] == list(range(512, TOTAL + 1, 512)), tag
        assert all(math.isfinite(event.value) for event in events.Scalars(tag)), tag
    ended = [event.step for event in events.Scalars("charts/episodes") if event.value > 0]
    for tag in ("charts/episodic_return", "charts/episodic_length"):
        assert [event.step for event in events.Scalars(tag)] == ended
    assert all(event.value > 0 for event in events.Scalars("charts/SPS"))
    assert [event.step for event in events.Scalars("eval/episodic_return")] == [TOTAL]
    (text,) = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val
    assert all(name in text.decode() for name in ppo.Args.__dataclass_fields__)


def test_episode_statistics_are_of_whole_episodes():
    """Compared with what the environment itself writes down. Episodes may span iterations."""
    run_dir = train(env_id="probe_envs:Diary-v0", num_steps=16, num_minibatches=1, total_timesteps=2048)
    diary = [tuple(map(float, line.split())) for line in Path("diary.txt").read_text().splitlines()]
    curve = curves(run_dir)
    returns, lengths = dict(curve["charts/episodic_return"]), dict(curve["charts/episodic_length"])
    before = 0
    for step, episodes in curve["charts/episodes"]:
        if episodes:
            expected = np.mean(diary[before : before + int(episodes)], axis=0)
            assert (returns[step], lengths[step]) == pytest.approx(tuple(expected))
            before += int(episodes)
    assert before > 20


def test_explained_variance(monkeypatch):
    """The share of the variance of the returns, advantages + values, that the values explain."""
    expected, compute_gae = [], ppo.compute_gae

    def recording_gae(rewards, values, *inputs):
        advantages = compute_gae(rewards, values, *inputs)
        expected.append(1 - np.var(advantages.astype(float)) / np.var(advantages.astype(float) + values))
        return advantages

    monkeypatch.setattr(ppo, "compute_gae", recording_gae)
    curve = curves(train(total_timesteps=10 * 512, eval_episodes=0))["losses/explained_variance"]
    assert [value for _, value in curve] == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert max(expected) - min(expected) > 0.05


@pytest.mark.parametrize(
    ("seconds", "saved", "printed"),
    [
        (25.0, [1, 4, 7, 10, 12], [*range(1, 13)]),  # more than 60 s and 2 s after the last
        (0.75, [1, 12], [1, 4, 7, 10, 12]),
        (3600.0, [*range(1, 13), 12], [*range(1, 13)]),
    ],
)
def test_speed_checkpoints_and_lines_by_the_clock(seconds, saved, printed, monkeypatch, capsys):
    """12 iterations of 512 steps, each of so many seconds. At each save, the curves are in the file up to there.

    The disk is slow: without a flush they would still be in memory. The printed return is the mean of the last 100
    episodes, as Diary writes them down.
    """
    times = (seconds * ((i + 1) // 2) for i in itertools.count())  # an iteration starts where the one before ends
    monkeypatch.setattr(ppo, "time", SimpleNamespace(time=time.time, monotonic=lambda: next(times)))
    saves, save_checkpoint, write = [], ppo.save_checkpoint, RecordWriter.write

    def slow_write(self, data):
        time.sleep(0.002)
        write(self, data)

    def recording_save(run_dir, args, agent, optimizer, global_step):
        steps = [step for step, _ in curves(run_dir).get("charts/episodes", [])]
        assert steps == [*range(512, global_step + 1, 512)]
        save_checkpoint(run_dir, args, agent, optimizer, global_step)
        assert load(run_dir)["global_step"] == global_step
        saves.append(global_step // 512)

    monkeypatch.setattr(RecordWriter, "write", slow_write)
    monkeypatch.setattr(ppo, "save_checkpoint", recording_save)
    run_dir = train(env_id="probe_envs:Diary-v0", total_timesteps=12 * 512, update_epochs=1, eval_episodes=0)
    assert saves == saved
    speeds = [event.value for event in read_events(run_dir).Scalars("charts/SPS")]
    assert speeds == pytest.approx([512 / seconds] * 12)

    lines = re.findall(r"^step ([\d,]+)  ([\d,]+) steps/s  return (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert [int(step.replace(",", "")) // 512 for step, _, _ in lines] == printed
    assert {speed for _, speed, _ in lines} == {f"{512 / seconds:,.0f}"}
    returns = [float(line.split()[0]) for line in Path("diary.txt").read_text().splitlines()]
    assert len(returns) > 110
    assert lines[-1][2] == f"{np.mean(returns[-100:]):.2f}"


# ----------------------------------------------------------------------- stopping and resuming


def test_checkpoint_contents(unbroken):
    checkpoint = load(unbroken)
    assert checkpoint.keys() == {"script", "args", "agent", "optimizer", "global_step"}
    assert checkpoint["script"] == "ppo.py"
    assert checkpoint["args"].keys() == ppo.Args.__dataclass_fields__.keys()
    assert checkpoint["global_step"] == TOTAL
    assert {state["step"].item() for state in checkpoint["optimizer"]["state"].values()} == {40 * 16}
    assert sorted(path.name.split(".")[0] for path in unbroken.iterdir()) == ["checkpoint", "events", "events"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopping_and_the_printed_command(command_line, signum, monkeypatch):
    """The iteration is finished and saved, the exit code is 130 or 143; the printed command finishes the run."""
    with monkeypatch.context() as patch:
        signal_in_iteration(3, signum, patch)
        code, out, err = command_line("--total-timesteps", 2560, *ONE_EPISODE, "--exp-name", "my run")
    assert code == 128 + signum
    assert err == "\nstopping after this iteration; a second signal stops at once\n"
    run_dir = the_run()
    command = shlex.split(out.splitlines()[-1].removeprefix("to resume: "))
    assert command == ["python", "ppo.py", "--resume", str(run_dir)]
    assert load(run_dir)["global_step"] == 3 * 512
    assert curves(run_dir)["losses/policy_loss"][-1][0] == 3 * 512
    next_second()
    assert command_line(*command[2:]).code == 0
    for tag in ("losses/policy_loss", "charts/learning_rate", "charts/episodic_return"):
        assert [step for step, _ in curves(run_dir)[tag]] == list(range(512, 2561, 512)), tag
    assert load(run_dir)["global_step"] == 2560


@pytest.mark.quick
def test_a_resumed_run_ends_like_an_uninterrupted_one(monkeypatch):
    """To the bit, in an environment without randomness and with episodes of one step.

    This covers weights, Adam's moments, learning rate, noise, shuffling and curves.
    """
    flags = {"env_id": "probe_envs:ByAction-v0", "num_steps": 32, "total_timesteps": 1024, "learning_rate": 0.003}
    whole = train(**flags, exp_name="whole")
    with monkeypatch.context() as patch:
        signal_in_iteration(3, signal.SIGTERM, patch)
        with pytest.raises(ppo.Stopped) as stopped:
            train(**flags, exp_name="broken")
    broken, signum = stopped.value.args
    assert signum == signal.SIGTERM
    assert [broken] == list(Path("runs").glob("*__broken__*"))
    assert load(broken)["global_step"] == 3 * 128
    next_second()
    train(**flags, exp_name="broken", resume=str(broken))

    a, b = load(whole), load(broken)
    assert same_weights(a, b)
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][i][name]) for name, value in state.items())
    np.testing.assert_equal(curves(broken), curves(whole))  # takes NaN for equal to NaN


def test_more_timesteps_extend_a_finished_run(command_line):
    """The learning rate is annealed over the new total. Without more timesteps, a finished run is only evaluated."""
    run_dir = train(total_timesteps=1024, learning_rate=1e-3)
    before = load(run_dir)
    for flags in [(), ("--total-timesteps", 2048)]:
        assert same_weights(load(run_dir), before)
        next_second()
        result = command_line("--resume", run_dir, "--eval-episodes", 1, *flags)
        assert result.code == 0
        message = "this run is finished; a larger --total-timesteps extends it, at a higher rate"
        assert (message in result.out.splitlines()) == (not flags)
    curve = curves(run_dir)
    rates = [1, 1 / 2, 1 / 2, 1 / 4]  # of 2 iterations, then those after 2 of 4
    assert curve["charts/learning_rate"] == [(512 * (i + 1), np.float32(1e-3 * r)) for i, r in enumerate(rates)]
    assert [step for step, _ in curve["eval/episodic_return"]] == [1024, 1024, 2048]
    assert load(run_dir)["args"]["total_timesteps"] == 2048
    next_second()
    result = command_line("--resume", run_dir, "--num-envs", 3, "--num-steps", 100, "--total-timesteps", 2500)
    assert "steps 2,048 to 2,648 by 300" in result.out, "whole iterations of another size"
    rates = curves(run_dir)["charts/learning_rate"][4:]
    assert rates == [(2348, np.float32(1e-3 * (1 - 2048 / 2648))), (2648, np.float32(1e-3 * (1 - 2348 / 2648)))]
    assert list(Path("runs").iterdir()) == [run_dir]


OFTEN_AND_SLOWLY = """
import io, time, torch, types
ppo.time = types.SimpleNamespace(time=time.time, monotonic=lambda: 1e6 * time.monotonic())
save = torch.save
def slow_save(checkpoint, file):
    save(checkpoint, buffer := io.BytesIO())
    half = len(buffer.getvalue()) // 2
    with file if hasattr(file, "write") else open(file, "wb") as file:
        file.write(buffer.getvalue()[:half])
        file.flush()
        time.sleep(1)
        file.write(buffer.getvalue()[half:])
torch.save = slow_save
"""  # a save after every iteration, which takes many times as long


def test_kill_9_and_resume(start, command_line, unbroken):
    """At a random moment, most of which are in the middle of a save. The checkpoint is whole.

    The curves of the resumed run have no gap and no duplicate step.
    """
    process = start("--total-timesteps", TOTAL, *ONE_EPISODE, setup=OFTEN_AND_SLOWLY)
    wait_for_training(process)
    wait_until(lambda: list(Path("runs").glob("*/checkpoint.pt")), "a checkpoint is saved")
    time.sleep(random.uniform(0.2, 1.2))
    process.kill()
    finish(process)
    run_dir = the_run()
    assert 0 < load(run_dir)["global_step"] < TOTAL
    next_second()
    assert command_line("--resume", run_dir).code == 0

    curve, whole = curves(run_dir), curves(unbroken)
    assert curve["charts/learning_rate"] == whole["charts/learning_rate"]
    for tag in whole.keys() - {"charts/episodic_return", "charts/episodic_length"}:
        assert [step for step, _ in curve[tag]] == [step for step, _ in whole[tag]], tag
    assert recent_return(run_dir) > 100


# ------------------------------------------------------------------ from Python, and in notebooks


def handlers():
    return [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]


def test_signal_handlers_are_restored(monkeypatch):
    """After a run, after one that a signal has ended, after an exception, and after a second signal.

    Training works again each time.
    """
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores Ctrl-C
    before = handlers()
    during, compute_gae = [], ppo.compute_gae

    def recording_gae(*inputs):
        during.extend(handlers())
        return compute_gae(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "compute_gae", recording_gae)
        train(total_timesteps=512, eval_episodes=0)
    assert not set(during) & set(before)
    assert handlers() == before
    for signum in (signal.SIGINT, signal.SIGTERM):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as stopped:
            signal_in_iteration(1, signum, patch)
            train(total_timesteps=1024)
        assert stopped.value.args[1] == signum
        assert handlers() == before
    with pytest.raises(ZeroDivisionError):
        train(env_id="probe_envs:Faulty-v0", env_kwargs=("what=exception", "at=9"))
    assert handlers() == before
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as interrupted:
        signal_in_iteration(1, signal.SIGINT, patch, times=2)
        train(total_timesteps=1024)
    assert interrupted.type is KeyboardInterrupt
    assert handlers() == before
    assert load(train(total_timesteps=512))["global_step"] == 512
    signal.signal(signal.SIGINT, usual)


def test_every_run_of_a_process_is_compiled(monkeypatch):
    """torch compiles a function for eight runs at most, here for one."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    for seed in (1, 2):
        train(total_timesteps=512, seed=seed, compile=True, eval_episodes=0)


def test_training_in_a_thread():
    """It gets no signals, and leaves the handlers alone."""
    before = handlers()
    with ThreadPoolExecutor(1) as pool:
        run_dir = pool.submit(train, total_timesteps=1024).result(timeout=PATIENCE)
    assert handlers() == before
    whole = train(total_timesteps=1024)
    assert same_weights(load(run_dir), load(whole))
    assert curves(run_dir) == curves(whole)


def test_an_interpreter_survives_ctrl_c():
    """In `python -i`: the run is saved, a KeyboardInterrupt is shown, and the next lines are run."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-i", "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"]
    with subprocess.Popen(command, env=environment(), start_new_session=True, **pipes) as process:
        process.stdin.write("import ppo\nppo.train(ppo.Args(num_steps=64))\n")
        process.stdin.flush()
        wait_for_training(process)
        wait_until(lambda: list(Path("runs").glob("*/checkpoint.pt")), "a checkpoint is saved")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate("print(6 * 7)\n", timeout=PATIENCE)
    assert process.returncode == 0
    assert out.splitlines()[-1] == "42"
    assert "ppo.Stopped" in err
    assert load(the_run())["global_step"] == curves(the_run())["losses/value_loss"][-1][0]


def test_a_second_ctrl_c_shows_where_it_hangs(start):
    """Here in the first step() of the environment. The line of the run is in the pipe by then."""
    process = start("--env-id", "probe_envs:Faulty-v0", "--env-kwargs", "what=hang", "at=1")
    wait_until(lambda: list(Path().glob("hangs-*")), "the environment hangs")
    os.set_blocking(process.stdout.fileno(), False)
    assert b": steps 0 to 501,760" in os.read(process.stdout.fileno(), 10_000)
    os.set_blocking(process.stdout.fileno(), True)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert "stopping after this iteration" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert "time.sleep(10**6)" in err
    assert err.rstrip().endswith("KeyboardInterrupt")
