"""Runs: they learn, repeat to the bit, log, stop, get killed, go on, and run out of disk space."""

import ast
import math
import os
import pty
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import (
    LOSSES,
    ROOT,
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

import ppo

STEPS = 25_000  # of CartPole: seeds 1 to 12 reach 216 +- 6, mean of the last 100 episodes; 1 to 2 s each
TOTAL = 49 * 512  # which that is in whole iterations


def recent_return(run_dir):
    """Mean return of the last 100 training episodes."""
    returns = load(run_dir)["recent_returns"]
    assert len(returns) == 100
    return np.mean(returns)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folders of uninterrupted runs with seeds 1 to 3."""
    folder = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("unbroken"))
    run_dirs = {seed: train(total_timesteps=STEPS, seed=seed).resolve() for seed in (1, 2, 3)}
    os.chdir(folder)
    return run_dirs


def stop_in_iteration(number, monkeypatch, signum=signal.SIGTERM):
    """Have this process get a signal in the middle of the n-th iteration from now."""
    compute_gae, calls = ppo.compute_gae, []

    def signalling(*inputs):
        calls.append(None)
        if len(calls) == number:
            signal.raise_signal(signum)
        return compute_gae(*inputs)

    monkeypatch.setattr(ppo, "compute_gae", signalling)


# ----------------------------------------------------------------------------------- learning


def test_cartpole_learns(unbroken):
    """Each seed ends at more than 5 times the return of random play, and rises on the way."""
    env, returns = gym.make("CartPole-v1"), []
    env.action_space.seed(1)
    for seed in range(200):
        env.reset(seed=seed)
        ended, length = False, 0
        while not ended:
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            ended, length = terminated or truncated, length + 1
        returns.append(length)
    for run_dir in unbroken.values():
        assert recent_return(run_dir) > 5 * np.mean(returns)
        first = curves(run_dir)["charts/episodic_return"][0][1]
        assert first < 2 * np.mean(returns)


# ------------------------------------------------------------------------ alone, and to the bit


def test_alone_in_an_empty_folder_and_to_the_bit(unbroken):
    """ppo.py, copied, needs nothing else of the repository; the same seed gives the same bits in another process."""
    shutil.copy(ROOT / "ppo.py", "ppo.py")
    result = run(sys.executable, "ppo.py", "--total-timesteps", STEPS, "--eval-episodes", 1, PYTHONPATH="")
    assert result.code == 0
    assert result.err == ""
    run_dir = the_run()
    assert re.fullmatch(r"CartPole-v1__ppo__1__\d{10}", run_dir.name)
    assert curves(run_dir) == curves(unbroken[1])
    assert same_weights(load(run_dir), load(unbroken[1]))
    assert torch.equal(load(run_dir)["rng_state"], load(unbroken[1])["rng_state"])

    # what it says: the result, where the run is, and what to do next
    assert f"{run_dir}: steps 0 to {TOTAL:,} ({STEPS:,} in whole iterations), 512 per iteration" in result.out
    printed = float(re.search(r"last 100 training episodes: return (\S+)", result.out)[1])
    assert printed == pytest.approx(recent_return(run_dir), abs=0.06)
    assert f"tensorboard --logdir {run_dir}" in result.out
    assert f"python ppo.py --evaluate {run_dir} --capture-video" in result.out
    assert f"python ppo.py --resume {run_dir} --total-timesteps {2 * TOTAL}" in result.out
    assert "\r" not in result.out, "line-based when not in a terminal"


def test_other_seeds_give_other_runs(unbroken):
    assert curves(unbroken[1])["losses/policy_loss"] != curves(unbroken[2])["losses/policy_loss"]
    assert not same_weights(load(unbroken[1]), load(unbroken[2]))


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_000_000.5)
    folders = [train(total_timesteps=512).name for _ in range(3)]
    assert folders == [f"CartPole-v1__ppo__1__{second}" for second in (1_000_000, 1_000_001, 1_000_002)]


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="no C++ compiler")
def test_compiled_runs_repeat_to_the_bit(tmp_path):
    """And compute what eager ones do, but for rounding: the losses of the first iteration agree."""
    flags = ("--total-timesteps", 1024, "--eval-episodes", 1)
    for name in ("one", "other"):
        command = (sys.executable, ROOT / "ppo.py", "--compile", "--exp-name", name, *flags)
        assert run(*command, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache")).code == 0
    one, other = (next(Path("runs").glob(f"*__{name}__*")) for name in ("one", "other"))
    assert curves(one) == curves(other)
    assert same_weights(load(one), load(other))
    eager = curves(train(total_timesteps=1024, exp_name="eager"))
    for name in LOSSES:
        first, expected = (curve[f"losses/{name}"][0][1] for curve in (curves(one), eager))
        assert first == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_from_a_script_of_ones_own():
    """from ppo import Args, train."""
    shutil.copy(ROOT / "ppo.py", "ppo.py")
    Path("mine.py").write_text(
        "from ppo import Args, train\n"
        'agent = train(Args(env_id="Acrobot-v1", total_timesteps=512, eval_episodes=1))\n'
        "print(type(agent).__name__, agent.num_actions)\n"
    )
    result = run(sys.executable, "mine.py", PYTHONPATH="")
    assert result.code == 0
    assert result.out.endswith("Agent 3\n")


def test_help_names_every_flag_with_its_text():
    """The text of each flag is the docstring of its field."""
    result = run(sys.executable, ROOT / "ppo.py", "--help", COLUMNS="200")
    assert result.code == 0
    shown = " ".join(re.sub(r"[│─╭╮╰╯]", " ", result.out).split())
    (args_class,) = (x for x in ast.parse((ROOT / "ppo.py").read_text()).body if getattr(x, "name", "") == "Args")
    fields = [i for i, node in enumerate(args_class.body) if isinstance(node, ast.AnnAssign)]
    assert len(fields) > 20
    for i in fields:
        flag = "--" + args_class.body[i].target.id.replace("_", "-")
        text = args_class.body[i + 1].value.value
        assert flag in shown
        assert " ".join(text.replace("`", "").split()) in shown.replace("`", "")


# ----------------------------------------------------------------------------- what is logged


def test_events_hold_all_documented_curves(unbroken):
    """Every curve has a finite value for every iteration; those of episodes, wherever one ended."""
    events = read_events(unbroken[1])
    losses = {f"losses/{name}" for name in (*LOSSES, "explained_variance")}
    every_time = losses | {f"charts/{name}" for name in ("SPS", "learning_rate", "update_epochs")}
    with_episodes = {f"charts/{name}" for name in ("episodic_return", "episodic_length", "episodes")}
    assert every_time | with_episodes | {"eval/episodic_return"} <= set(events.Tags()["scalars"])
    for tag in every_time:
        assert [event.step for event in events.Scalars(tag)] == list(range(512, TOTAL + 1, 512)), tag
        assert all(math.isfinite(event.value) for event in events.Scalars(tag)), tag
    for tag in with_episodes:
        steps = [event.step for event in events.Scalars(tag)]
        assert len(steps) > 40
        assert steps == sorted(set(steps)) == [event.step for event in events.Scalars("charts/episodes")]
    assert all(event.value > 0 for event in events.Scalars("charts/SPS"))
    assert [event.step for event in events.Scalars("eval/episodic_return")] == [TOTAL]


def test_hyperparameters_are_logged_as_a_table(unbroken):
    (event,) = read_events(unbroken[2]).Tensors("hyperparameters/text_summary")
    (text,) = event.tensor_proto.string_val
    lines = text.decode().splitlines()
    assert lines[:2] == ["|argument|value|", "|-|-|"]
    assert "|seed|2|" in lines
    assert len(lines) == 2 + len(ppo.Args.__dataclass_fields__)


def test_episode_statistics_are_of_whole_raw_episodes():
    """An environment keeps a diary of its returns and lengths; an episode may span iterations."""
    run_dir = train(env_id="probe_envs:Diary-v0", num_steps=16, num_minibatches=1, total_timesteps=3200)
    diary = [tuple(map(float, line.split())) for line in Path("diary.txt").read_text().splitlines()]
    curve = curves(run_dir)
    before = 0
    for i, (step, episodes) in enumerate(curve["charts/episodes"]):
        finished = diary[before : int(episodes)]
        assert finished
        expected = np.mean(finished, axis=0)
        assert curve["charts/episodic_return"][i] == (step, pytest.approx(expected[0]))
        assert curve["charts/episodic_length"][i] == (step, pytest.approx(expected[1]))
        before = int(episodes)
    assert before > 50
    recent = load(run_dir)["recent_returns"]
    assert recent == [total for total, _ in diary[:before]][-100:]
    assert load(run_dir)["num_episodes"] == before


def test_explained_variance_nears_1_where_the_critic_can_know():
    """The return is the observation."""
    curve = curves(train(env_id="probe_envs:ByObservation-v0", total_timesteps=8192, learning_rate=0.005))
    values = [value for _, value in curve["losses/explained_variance"]]
    assert values[0] < 0.9
    assert 0.99 < values[-1] <= 1


@pytest.mark.parametrize(("asked", "played"), [(1, 512), (512, 512), (513, 1024)])
def test_incomplete_iterations_are_completed_and_said_so(asked, played, capsys):
    run_dir = train(total_timesteps=asked)
    assert load(run_dir)["global_step"] == played
    out = capsys.readouterr().out
    assert f"steps 0 to {played:,}" in out
    assert (f"({asked:,} in whole iterations)" in out) == (asked != played)


def test_progress_bar_in_a_terminal():
    """One line that is drawn again and again, with the share done, the recent return, the speed and the time left."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 120))
    flags = ["--total-timesteps", "20000", "--eval-episodes", "1"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "ppo.py", *flags], env=environment(), stdout=subprocess.DEVNULL, stderr=slave
    )
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 10_000):
            shown += chunk
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(master)
    assert process.wait() == 0
    updates = shown.decode().strip("\r\n").split("\r")
    assert all(re.fullmatch(r" *\d+%\|.*\| [\d.]+k?/20.5k \[\d\d:\d\d<.*steps/s.*\] *", x) for x in updates), updates
    assert len(updates) > 2
    assert updates[0].startswith("  0%")
    assert updates[-1].startswith("100%")
    assert re.search(r"return \d+\.\d", updates[-1])


# --------------------------------------------------------------------------- stopping, going on


def test_checkpoint_holds_what_is_documented(unbroken):
    """It loads without running code, and another agent can take its weights."""
    checkpoint = load(unbroken[3])
    assert {"args", "agent", "optimizer", "iteration", "global_step", "rng_state"} <= checkpoint.keys()
    assert checkpoint["args"]["seed"] == 3
    assert (checkpoint["iteration"], checkpoint["global_step"]) == (49, TOTAL)
    assert checkpoint["agent"].keys() == ppo.Agent(ppo.make_envs(ppo.Args(), 1)).state_dict().keys()
    (adam,) = checkpoint["optimizer"]["state"].values()
    assert adam["step"] == 49 * 16
    assert sorted(path.name.split(".")[0] for path in unbroken[3].iterdir()) == ["checkpoint", "events", "events"]


@pytest.mark.parametrize(("signum", "send"), [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)])
def test_stopping_and_the_command_to_go_on(start, signum, send):
    """Exit code 130 or 143, the iteration finished and saved; the very command that is printed ends the run."""
    process = start("--total-timesteps", 15_000, "--eval-episodes", 1)
    wait_for_training(process)
    send(process.pid, signum)
    code, out, err = finish(process)
    assert code == 128 + signum
    assert "Traceback" not in err
    run_dir = the_run()
    stopped = load(run_dir)["global_step"]
    assert 512 <= stopped < 15_000
    assert f"stopped at step {stopped:,}" in out
    assert curves(run_dir)["charts/learning_rate"][-1][0] == stopped

    command = shlex.split(re.search(r"python .* --resume .*", out)[0])
    assert command[0] == "python"
    result = run(sys.executable, *command[1:])
    assert result.code == 0
    assert f"steps {stopped:,} to 15,360" in result.out
    assert [step for step, _ in curves(run_dir)["charts/learning_rate"]] == list(range(512, 15_361, 512))


def test_a_second_ctrl_c_stops_at_once(start):
    """In the middle of an iteration, which would take 50 s here."""
    slow = ("--env-id", "probe_envs:Faulty-v0", "--env-kwargs", "what=nothing", "at=0", "delay=0.1")
    process = start(*slow)
    wait_for_training(process)
    os.killpg(process.pid, signal.SIGINT)
    assert any("once more stops at once" in line for line in process.stderr)
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert "Traceback" not in err
    assert not (the_run() / "checkpoint.pt").exists()


def test_resumed_run_ends_bit_for_bit_where_an_unbroken_one_does(monkeypatch):
    """In an environment without randomness and with one-step episodes, nothing is lost when episodes begin anew.

    So whatever is not restored shows: weights, Adam's moments, learning rate, noise, shuffling, statistics.
    """
    flags = {"env_id": "probe_envs:ByAction-v0", "num_steps": 32, "total_timesteps": 1024, "learning_rate": 0.003}
    whole = train(**flags, exp_name="whole")
    with monkeypatch.context() as patch:
        stop_in_iteration(3, patch)
        with pytest.raises(SystemExit) as stop:
            train(**flags, exp_name="broken")
    assert stop.value.code == 143
    (broken,) = Path("runs").glob("*__broken__*")
    assert load(broken)["global_step"] == 3 * 128
    next_second()
    ppo.train(ppo.load_args(str(broken), resume=str(broken)))

    a, b = load(whole), load(broken)
    assert same_weights(a, b)
    assert torch.equal(a["rng_state"], b["rng_state"])
    for moment in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(a["optimizer"]["state"][0][moment], b["optimizer"]["state"][0][moment])
    assert {key: a[key] for key in ("iteration", "global_step", "num_episodes", "recent_returns")} == {
        key: b[key] for key in ("iteration", "global_step", "num_episodes", "recent_returns")
    }
    # "equal" here takes NaN for equal to NaN: returns that are all the same have no variance to explain
    np.testing.assert_equal(curves(broken), curves(whole))


def test_resumed_run_goes_on_with_fresh_episodes(monkeypatch):
    """The noise goes on where it stopped; the episodes are others than those that began the run."""
    noises, first_observations = [], []
    sample_noise, minibatches = ppo.Agent.sample_noise, ppo.minibatches

    def noted_noise(self, *shape):
        noises.append(sample_noise(self, *shape))
        return noises[-1]

    def noted_minibatches(args, batch):
        first_observations.append(batch[0][: args.num_envs].clone())
        return minibatches(args, batch)

    monkeypatch.setattr(ppo.Agent, "sample_noise", noted_noise)
    monkeypatch.setattr(ppo, "minibatches", noted_minibatches)
    train(total_timesteps=2048, exp_name="whole")
    with monkeypatch.context() as patch:
        stop_in_iteration(2, patch)
        with pytest.raises(SystemExit):
            train(total_timesteps=2048, exp_name="broken")
    (broken,) = Path("runs").glob("*__broken__*")
    ppo.train(ppo.load_args(str(broken), resume=str(broken)))
    assert len(noises) == len(first_observations) == 4 + 2 + 2
    assert all(map(torch.equal, noises[:4], noises[4:]))
    assert torch.equal(first_observations[0], first_observations[4]), "the same seed begins with the same episodes"
    assert not (first_observations[0] == first_observations[6]).any(), "and goes on with others"


def test_more_timesteps_extend_a_finished_run(command_line):
    """The curves go on without gap or overlap, and the learning rate is annealed over the new total."""
    run_dir = train(total_timesteps=1024, learning_rate=1e-3)
    next_second()
    assert command_line("--resume", run_dir, "--total-timesteps", 2048).code == 0
    curve = curves(run_dir)
    rates = [1, 1 / 2, 1 / 2, 1 / 4]  # of 2 iterations, then those after 2 of 4
    assert curve["charts/learning_rate"] == [(512 * (i + 1), np.float32(1e-3 * r)) for i, r in enumerate(rates)]
    episodes = [value for _, value in curve["charts/episodes"]]
    assert episodes == sorted(set(episodes))
    assert [step for step, _ in curve["eval/episodic_return"]] == [1024, 2048]
    assert len(list(Path("runs").iterdir())) == 1
    assert load(run_dir)["args"]["total_timesteps"] == 2048
    assert load(run_dir)["optimizer"]["state"][0]["step"] == 4 * 16


def test_flags_that_do_not_contradict_may_change_on_resuming(command_line):
    """Where and how fast it runs, what is filmed and evaluated; a run can be named without its folder."""
    run_dir = train(total_timesteps=512)
    flags = ("--async-envs", "--capture-video", "--eval-episodes", 2, "--device", "cpu")
    assert command_line("--resume", run_dir.name, "--total-timesteps", 1024, *flags).code == 0
    assert load(run_dir)["global_step"] == 1024


def test_killed_at_random_moments_and_resumed(start, unbroken):
    """kill -9 leaves a run that can be resumed, and whose curves end where and how those of unbroken runs do."""
    # An iteration takes 30 ms longer, so that it is not over before the last kill, however fast the machine is.
    slower = "import time\ngae = ppo.compute_gae\nppo.compute_gae = lambda *x: time.sleep(0.03) or gae(*x)"
    flags = ("--total-timesteps", STEPS, "--eval-episodes", 1)
    kills, seconds = [], 0.1
    while len(kills) < 3:
        process = start(*flags, setup=f"ppo.CHECKPOINT_SECONDS = {seconds}\n{slower}")
        wait_for_training(process)
        path = the_run() / "checkpoint.pt"
        old = path.stat().st_mtime_ns if path.exists() else None
        wait_until(lambda path=path, old=old: path.exists() and path.stat().st_mtime_ns != old, "a checkpoint is saved")
        time.sleep(random.uniform(0, 0.15))
        process.kill()
        finish(process)
        kills.append(load(the_run())["global_step"])
        flags = ("--resume", the_run())
        seconds = 0.1 - seconds  # 0.1 or 0: without a pause between saves, many a kill comes in the middle of one
    run_dir = the_run()
    assert kills == sorted(set(kills)), "each time it came further"
    assert kills[-1] < TOTAL, "it was over before the last kill"
    assert finish(start("--resume", run_dir)).code == 0

    curve, whole = curves(run_dir), curves(unbroken[1])
    assert curve.keys() == whole.keys()
    for tag in curve.keys() - {"charts/episodic_return", "charts/episodic_length", "charts/episodes"}:
        assert [step for step, _ in curve[tag]] == [step for step, _ in whole[tag]], tag
    assert curve["charts/learning_rate"] == whole["charts/learning_rate"]
    steps, episodes = zip(*curve["charts/episodes"], strict=True)
    assert list(steps) == sorted(set(steps))
    assert list(episodes) == sorted(set(episodes))
    assert episodes[-1] == load(run_dir)["num_episodes"]
    # Seeds differ by a standard deviation of 3 % of the mean; a resumed run also begins new episodes in between.
    expected = np.mean([recent_return(other) for other in unbroken.values()])
    assert recent_return(run_dir) == pytest.approx(expected, rel=0.2)
