"""Evaluation, load_agent and films, which are decoded."""

from pathlib import Path

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from helpers import assert_refused, curves, load, train

import ppo


def greedy(weights, observation):
    """The most probable action, computed with NumPy from the weights of the actor in a checkpoint."""
    x = observation.astype(np.float32)
    for layer in (0, 2, 4):
        x = weights[f"actor.{layer}.weight"].numpy() @ x + weights[f"actor.{layer}.bias"].numpy()
        x = np.tanh(x) if layer < 4 else x
    return int(x.argmax())


@pytest.fixture
def seeds(monkeypatch):
    """Collects the seeds of the environments each time they are reset with a seed, as a range."""
    collected, reset = [], gym.vector.SyncVectorEnv.reset

    def recording_reset(self, *, seed=None, options=None):
        if seed is not None:
            collected.append(range(seed, seed + self.num_envs))
        return reset(self, seed=seed, options=options)

    monkeypatch.setattr(gym.vector.SyncVectorEnv, "reset", recording_reset)
    return collected


def play(policy, seeds):
    """The returns of CartPole's episodes with these seeds, one after the other."""
    returns, env = [], gym.make("CartPole-v1")
    for seed in seeds:
        observation, _ = env.reset(seed=seed)
        returns.append(0.0)
        ended = False
        while not ended:
            observation, reward, terminated, truncated, _ = env.step(policy(observation))
            returns[-1] += reward
            ended = terminated or truncated
    return np.array(returns)


def test_training_resuming_and_evaluating_play_different_episodes(seeds):
    run_dir = train(total_timesteps=512)
    train(total_timesteps=1024, resume=str(run_dir))
    start, evaluation, resumption, again = map(set, seeds)
    assert evaluation == again
    assert not start & evaluation
    assert not resumption & (start | evaluation)


def test_evaluation_plays_whole_greedy_episodes(command_line, seeds):
    """At the end of training, by --evaluate and from Python: the returns are those of a plain loop.

    So are those of the agent that load_agent gives.
    """
    run_dir = train(total_timesteps=4096, seed=3, eval_episodes=5)
    weights, before = load(run_dir)["agent"], (run_dir / "checkpoint.pt").read_bytes()
    returns = ppo.evaluate(ppo.Args(seed=3, eval_episodes=8), run_dir)
    expected = play(lambda observation: greedy(weights, observation), seeds[-1])
    np.testing.assert_array_equal(returns, expected)
    agent = ppo.load_agent(str(run_dir))
    with torch.inference_mode():
        by_agent = play(lambda observation: agent.act(torch.as_tensor(observation)).item(), seeds[-1])
    np.testing.assert_array_equal(by_agent, expected)
    assert len(set(expected[:5])) > 2, "too equal to tell episodes apart"

    assert command_line("--evaluate", run_dir).code == 0
    assert command_line("--evaluate", run_dir, "--eval-episodes", 6, "--async-envs").code == 0
    assert command_line("--evaluate", run_dir, "--seed", 4).code == 0
    *means, other_seed = [value for _, value in curves(run_dir)["eval/episodic_return"]]
    assert means == [np.float32(expected[:n].mean()) for n in (5, 8, 5, 6)]
    assert other_seed != means[0]
    assert (run_dir / "checkpoint.pt").read_bytes() == before
    assert list(Path("runs").iterdir()) == [run_dir]


def frames(path):
    """The frames of a film, each [height, width, 3]."""
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]


def assert_shows_movement(film):
    assert film[0].std() > 5
    assert any((film[0] != frame).any() for frame in film[1:])


def test_the_film_of_an_evaluation(command_line):
    """The first episode, with one frame for the first observation and one for each step."""
    run_dir = train(total_timesteps=2048)
    length = ppo.evaluate(ppo.Args(eval_episodes=1), run_dir)[0]  # the reward is 1 in each step
    assert command_line("--evaluate", run_dir, "--capture-video", "--eval-episodes", 3).code == 0
    (path,) = run_dir.glob("videos/eval-at-2048/*.mp4")
    film = frames(path)
    assert len(film) == length + 1
    assert_shows_movement(film)


def test_films_of_training_and_of_a_resumed_run(command_line):
    """Episodes 0, 1, 8, ... of environment 0, whose lengths Diary writes down. A resumed run keeps earlier films."""
    flags = {"env_id": "probe_envs:Diary-v0", "num_envs": 1, "num_steps": 256}
    plain = train(**flags, total_timesteps=512)
    Path("diary.txt").unlink()
    run_dir = train(**flags, total_timesteps=512, capture_video=True)
    assert curves(run_dir) == curves(plain), "filming changes nothing else"
    lengths = [float(line.split()[1]) for line in Path("diary.txt").read_text().splitlines()]
    films = {int(path.stem.rpartition("-")[2]): path for path in run_dir.glob("videos/train-*/*.mp4")}
    assert {0, 1, 8} <= films.keys() <= {0, 1, 8, 27}
    for episode in (0, 1, 8):
        film = frames(films[episode])
        assert len(film) == lengths[episode] + 1
        assert_shows_movement(film)

    before = {path: path.read_bytes() for path in run_dir.rglob("*.mp4")}
    assert command_line("--resume", run_dir, "--total-timesteps", 1024, "--eval-episodes", 1).code == 0
    after = {path: path.read_bytes() for path in run_dir.rglob("*.mp4")}
    assert before.items() < after.items()


@pytest.mark.parametrize("env_id", ["Constant", "Spaces"])
@pytest.mark.filterwarnings("ignore:.*render_mode.*")
def test_filming_an_environment_that_cannot_draw_is_refused(command_line, env_id):
    """Constant takes no render_mode, Spaces does not use it."""
    assert_refused(ppo, command_line("--env-id", f"probe_envs:{env_id}-v0", "--capture-video"), env_id)
