"""Greedy evaluation, and videos: the MP4s are decoded and their frames counted."""

import re
import shlex
import sys
from pathlib import Path

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from helpers import ROOT, curves, load, run, the_run, train

import ppo

RESULT = r"greedy evaluation at step ([\d,]+): return (\S+) \+- (\S+) \(min (\S+), max (\S+)\) over (\d+) episodes"


def frames(path):
    """The frames of a video as arrays [height, width, 3]."""
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]


def assert_shows_something(video):
    """It is not all one colour, and it moves."""
    assert video[0].std() > 5
    assert any((video[0] != frame).any() for frame in video[1:])


def play(run_dir, num_episodes, seed):
    """The returns of greedy episodes, one after the other: what the evaluation should say."""
    envs = ppo.make_envs(ppo.Args(), 1)
    agent = ppo.Agent(envs)
    agent.load_state_dict(load(run_dir)["agent"])
    returns, env = [], gym.make("CartPole-v1")
    for episode_seed in ppo.env_seeds(num_episodes, seed, 1):
        observation, _ = env.reset(seed=episode_seed)
        ended, total = False, 0.0
        while not ended:
            with torch.no_grad():
                action = agent.actor(torch.as_tensor(observation)).argmax().item()
            observation, reward, terminated, truncated, _ = env.step(action)
            ended, total = terminated or truncated, total + reward
        returns.append(total)
    return np.array(returns)


def test_evaluation_plays_whole_greedy_episodes(command_line):
    """It prints and logs what a plain loop over the same seeds gets, at the end of training and later, too."""
    assert command_line("--total-timesteps", 4096, "--eval-episodes", 5, "--seed", 3).code == 0
    run_dir = the_run()
    expected = play(run_dir, 5, seed=3)
    assert expected.std() > 0, "all the same: this would not tell seeds apart"
    weights = (run_dir / "checkpoint.pt").read_bytes()

    result = command_line("--evaluate", run_dir)
    assert result.code == 0
    step, *numbers, count = re.search(RESULT, result.out).groups()
    assert (step, count) == ("4,096", "5")
    assert [float(x) for x in numbers] == pytest.approx(
        [expected.mean(), expected.std(), expected.min(), expected.max()], abs=0.05
    )
    logged = [np.float32(expected.mean())] * 2  # at the end of training, and by --evaluate: the same
    assert curves(run_dir)["eval/episodic_return"] == [(4096, value) for value in logged]
    assert (run_dir / "checkpoint.pt").read_bytes() == weights
    assert list(Path("runs").iterdir()) == [run_dir]


def test_evaluation_with_another_seed_and_more_episodes(command_line):
    """Other episodes, but the same policy."""
    run_dir = train(total_timesteps=4096, seed=3)
    result = command_line("--evaluate", run_dir, "--seed", 9, "--eval-episodes", 20)
    assert result.code == 0
    numbers = [float(x) for x in re.search(RESULT, result.out).groups()[1:]]
    expected = play(run_dir, 20, seed=9)
    assert numbers == pytest.approx([expected.mean(), expected.std(), expected.min(), expected.max(), 20], abs=0.05)
    assert play(run_dir, 20, seed=3).tolist() != expected.tolist()


@pytest.mark.parametrize("env_id", ["CliffWalking-v1", "CartPole-v1"])
def test_evaluation_ends_where_episodes_do_not(env_id, capfd, monkeypatch):
    """CliffWalking has no time limit, and who walks against its border never arrives: a return of -1 a step."""
    monkeypatch.setattr(ppo, "EVALUATION_STEPS", 1000)
    train(env_id=env_id, total_timesteps=512, eval_episodes=2)
    out = capfd.readouterr().out
    mean = float(re.search(RESULT, out)[2])
    assert ("2 of them did not end within 1,000 steps" in out) == (env_id == "CliffWalking-v1") == (mean <= -1000)


def test_the_printed_command_films_the_agent():
    """`watch it: ...` of a run's last lines leaves an MP4 with one frame for each step and the first observation."""
    flags = ("--total-timesteps", 2048, "--eval-episodes", 1)
    result = run(sys.executable, ROOT / "ppo.py", *flags)
    command = shlex.split(re.search(r"watch it: python (.*)", result.out)[1])
    result = run(sys.executable, *command)
    assert result.code == 0
    length = float(re.search(RESULT, result.out)[2])  # CartPole pays 1 a step
    (path,) = (the_run() / "videos").glob("eval-*.mp4")
    video = frames(path)
    assert len(video) == length + 1
    assert_shows_something(video)


def test_training_films_environment_0_on_gymnasiums_schedule():
    """Episodes 0, 1, 8, 27, ...: their lengths are in the diary that the environment keeps."""
    flags = {"env_id": "probe_envs:Diary-v0", "num_envs": 1, "num_steps": 256, "total_timesteps": 768}
    run_dir = train(**flags, capture_video=True)
    lengths = [float(line.split()[1]) for line in Path("diary.txt").read_text().splitlines()]
    finished = load(run_dir)["num_episodes"]
    assert 8 < finished < 64
    filmed = {int(re.search(r"(\d+)\.mp4", path.name)[1]): path for path in (run_dir / "videos").glob("train-*.mp4")}
    assert {0, 1, 8} <= filmed.keys() <= {0, 1, 8, 27}
    for episode in filmed.keys() & set(range(finished)):
        video = frames(filmed[episode])
        assert len(video) == lengths[episode] + 1
        assert_shows_something(video)
    assert len(list((run_dir / "videos").glob("eval-*.mp4"))) == 1


def test_filming_does_not_change_the_run():
    """The same curves and evaluation with and without a camera."""
    one, other = (train(total_timesteps=1024, capture_video=flag, exp_name=str(flag)) for flag in (False, True))
    assert curves(one) == curves(other)


@pytest.mark.parametrize("env_id", ["Constant", "Spaces"])
@pytest.mark.filterwarnings("ignore:.*render_mode.*")
def test_an_environment_that_draws_nothing_cannot_be_filmed(command_line, env_id):
    """It says so, whether the environment knows of no render_mode at all or does nothing with it."""
    code, _, err = command_line("--env-id", f"probe_envs:{env_id}-v0", "--capture-video")
    assert code == 2
    assert err.splitlines()[-1].startswith(f"ppo.py: error: probe_envs:{env_id}-v0 cannot be filmed")
    assert "Traceback" not in err
    assert not list(Path("runs").iterdir())
