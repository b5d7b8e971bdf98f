"""Runs: learning, reproducibility, logging, stopping, kills and resumption."""

import itertools
import math
import os
import pty
import random
import re
import shlex
import shutil
import signal
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    LOSSES,
    ROOT,
    SMALL_FLAGS,
    curves,
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


def signal_in_iteration(number, signum, monkeypatch):
    """This process gets a signal in the middle of the n-th iteration from now."""
    compute_gae, iterations = ppo.compute_gae, itertools.count(1)

    def signalling(*inputs):
        if next(iterations) == number:
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
    assert torch.equal(load(run_dir)["rng_state"], load(unbroken)["rng_state"])

    assert "\r" not in result.out
    lines = [line for line in result.out.splitlines() if re.match(r"step [\d,]+ .* steps/s .*return \d", line)]
    assert 2 <= len(lines) <= 10
    assert f"tensorboard --logdir {run_dir}" in result.out
    assert f"python ppo.py --evaluate {run_dir} --capture-video" in result.out
    assert f"python ppo.py --resume {run_dir} --total-timesteps {2 * TOTAL}" in result.out


def test_seeds_and_runs_that_begin_in_the_same_second(monkeypatch):
    """Each has its own folder. The same seed gives the same curves and weights, another seed others."""
    monkeypatch.setattr(time, "time", lambda: 1_000_000.5)
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
        train(env_id="NoSuchEnv-v0")  # ends as soon as the number is set
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
    assert before > 50


def test_explained_variance_approaches_1_where_the_return_is_known():
    """The return is the observation."""
    curve = curves(train(env_id="probe_envs:ByObservation-v0", total_timesteps=8192, learning_rate=0.005))
    values = [value for _, value in curve["losses/explained_variance"]]
    assert values[0] < 0.9
    assert 0.99 < values[-1] <= 1


def test_progress_bar_in_a_terminal(monkeypatch, capsys):
    """With the share done, the recent return and the speed, and without lines for the steps."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    with open(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        train(total_timesteps=1024)
        shown = os.read(master, 100_000).decode()
    os.close(master)
    assert re.search(r"\r100%.* 1.02k/1.02k .*steps/s, return \d+\.\d", shown)
    assert "\nstep " not in capsys.readouterr().out


# ----------------------------------------------------------------------- stopping and resuming


def test_checkpoint_contents(unbroken):
    checkpoint = load(unbroken)
    assert checkpoint.keys() == {"args", "agent", "optimizer", "global_step", "rng_state"}
    assert checkpoint["args"].keys() == ppo.Args.__dataclass_fields__.keys() - {"resume", "evaluate"}
    assert checkpoint["global_step"] == TOTAL
    assert {state["step"].item() for state in checkpoint["optimizer"]["state"].values()} == {40 * 16}
    assert sorted(path.name.split(".")[0] for path in unbroken.iterdir()) == ["checkpoint", "events", "events"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopping_and_the_printed_command(command_line, signum, monkeypatch):
    """The iteration is finished and saved, the exit code is 130 or 143; the printed command finishes the run."""
    with monkeypatch.context() as patch:
        signal_in_iteration(3, signum, patch)
        code, out, err = command_line("--total-timesteps", 2560, *ONE_EPISODE)
    assert code == 128 + signum
    assert err == "\nstopping after this iteration; a second signal stops at once\n"
    run_dir = the_run()
    assert load(run_dir)["global_step"] == 3 * 512
    assert curves(run_dir)["losses/policy_loss"][-1][0] == 3 * 512
    next_second()
    python, _script, *flags = shlex.split(re.search(r"python .* --resume .*", out)[0])
    assert python == "python"
    assert command_line(*flags).code == 0
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
        with pytest.raises(SystemExit):
            train(**flags, exp_name="broken")
    (broken,) = Path("runs").glob("*__broken__*")
    assert load(broken)["global_step"] == 3 * 128
    next_second()
    train(**flags, exp_name="broken", resume=str(broken))

    a, b = load(whole), load(broken)
    assert same_weights(a, b)
    assert torch.equal(a["rng_state"], b["rng_state"])
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
        assert command_line("--resume", run_dir, "--eval-episodes", 1, *flags).code == 0
    curve = curves(run_dir)
    rates = [1, 1 / 2, 1 / 2, 1 / 4]  # of 2 iterations, then those after 2 of 4
    assert curve["charts/learning_rate"] == [(512 * (i + 1), np.float32(1e-3 * r)) for i, r in enumerate(rates)]
    assert [step for step, _ in curve["eval/episodic_return"]] == [1024, 1024, 2048]
    assert load(run_dir)["args"]["total_timesteps"] == 2048
    assert list(Path("runs").iterdir()) == [run_dir]


OFTEN_AND_SLOWLY = """
import io, time, torch, types
ppo.time = types.SimpleNamespace(time=time.time, monotonic=lambda: 1e6 * time.monotonic())
save = torch.save
def slow_save(checkpoint, file):
    save(checkpoint, buffer := io.BytesIO())
    half = len(buffer.getvalue()) // 2
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
