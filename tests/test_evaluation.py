"""Evaluation, load_agent and films, which are decoded."""

import errno
import sys
from pathlib import Path
from unittest.mock import Mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import assert_refused, curves, frames, load, same_weights, train

import ppo


def greedy(weights, observation):
    """The most probable action, computed with NumPy from the weights of the actor in a checkpoint."""
    x = observation.astype(np.float32)
    for layer in (0, 3, 6):
        x = weights[f"actor.{layer}.weight"].numpy() @ x + weights[f"actor.{layer}.bias"].numpy()
        if layer < 6:  # layer normalization and tanh
            x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
            x = np.tanh(weights[f"actor.{layer + 1}.weight"].numpy() * x + weights[f"actor.{layer + 1}.bias"].numpy())
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
    """Those of an evaluation are always the same. All seeds fit into 31 bits, that of the run may be larger."""
    run_dir = train(total_timesteps=512, seed=20_240_101, eval_episodes=3)
    train(total_timesteps=1024, seed=20_240_101, eval_episodes=3, resume=str(run_dir))
    start, *evaluation = seeds[:4]
    resumption, *again = seeds[4:]
    assert evaluation == again
    different = [*start, *resumption, *(seed for (seed,) in evaluation)]
    assert len(set(different)) == len(different) == 4 + 4 + 3
    assert max(different) < 2**31


def test_evaluation_plays_whole_greedy_episodes(command_line, seeds):
    """At the end of training, by --evaluate and from Python: the returns are those of a plain loop.

    So are those of the agent that load_agent gives.
    """
    run_dir = train(total_timesteps=4096, seed=3, eval_episodes=5)
    weights, before = load(run_dir)["agent"], (run_dir / "checkpoint.pt").read_bytes()
    returns = ppo.evaluate(ppo.Args(seed=3, eval_episodes=8), run_dir)
    played = [seed for (seed,) in seeds[-8:]]
    expected = play(lambda observation: greedy(weights, observation), played)
    np.testing.assert_array_equal(returns, expected)
    agent = ppo.load_agent(str(run_dir))
    with torch.inference_mode():
        by_agent = play(lambda observation: agent.act(torch.as_tensor(observation), greedy=True).item(), played)
    np.testing.assert_array_equal(by_agent, expected)
    assert len(set(expected[:5])) > 2, "too equal to tell episodes apart"

    result = command_line("--evaluate", run_dir)
    assert "playing 5 greedy episodes of CartPole-v1\n" in result.out
    assert f"evaluation at step 4,096: return {expected[:5].mean():.2f} +- {expected[:5].std():.2f}\n" in result.out
    assert command_line("--evaluate", run_dir, "--eval-episodes", 6, "--async-envs").code == 0
    assert command_line("--evaluate", run_dir, "--seed", 4).code == 0
    *means, other_seed = [value for _, value in curves(run_dir)["eval/episodic_return"]]
    assert means == [np.float32(expected[:n].mean()) for n in (5, 8, 5, 6)]
    assert other_seed != means[0]
    assert (run_dir / "checkpoint.pt").read_bytes() == before
    assert list(Path("runs").iterdir()) == [run_dir]


def test_no_evaluation(command_line):
    run_dir = train(total_timesteps=512, eval_episodes=0)
    assert "eval/episodic_return" not in curves(run_dir)
    assert_refused(ppo, command_line("--evaluate", run_dir, "--eval-episodes", 0), "eval_episodes must be positive")


def test_an_evaluation_that_ends_early(command_line, monkeypatch):
    """Ctrl-C shows no traceback; where nothing can be written, the result is printed."""
    run_dir = train(total_timesteps=512)
    with monkeypatch.context() as patch:
        patch.setattr(gym.vector.SyncVectorEnv, "step", Mock(side_effect=KeyboardInterrupt))
        result = command_line("--evaluate", run_dir)
        patch.undo()
        patch.setattr(ppo, "evaluate", Mock(side_effect=KeyboardInterrupt))
        trained = command_line("--total-timesteps", 512, "--seed", 2)
        patch.setattr(ppo, "make_gym_env", Mock(side_effect=KeyboardInterrupt))
        begun = command_line("--seed", 3)
    assert result.code == trained.code == begun.code == 130 and result.err == trained.err == begun.err == ""
    assert len(list(Path("runs").iterdir())) == 2, "a run that has not begun leaves no folder"
    monkeypatch.setattr(ppo, "SummaryWriter", Mock(side_effect=OSError(errno.EROFS, "read-only")))
    result = command_line("--evaluate", run_dir)
    assert_refused(ppo, result, "read-only")
    assert "evaluation at step 512: return" in result.out


def test_load_agent_starts_no_process(monkeypatch):
    run_dir = train(total_timesteps=512, async_envs=True, eval_episodes=0)
    monkeypatch.delattr(gym.vector, "AsyncVectorEnv")
    assert same_weights({"agent": ppo.load_agent(run_dir).state_dict()}, load(run_dir))


def test_episodes_that_do_not_end_are_stopped(command_line, capfd):
    """After 20,000 steps; a time limit for the evaluation may be given."""
    run_dir = train(env_id="CliffWalking-v1", total_timesteps=512, num_steps=128, eval_episodes=1)
    ((step, value),) = curves(run_dir)["eval/episodic_return"]
    assert (step, value) == (512, -20_000)  # -1 a step
    *_, line = capfd.readouterr().out.splitlines()
    assert line.startswith("1 episodes were stopped after 20,000 steps; --env-kwargs max_episode_steps=")

    endless = train(env_id="probe_envs:Endless-v0", total_timesteps=512, eval_episodes=0)
    returns = ppo.evaluate(ppo.Args("probe_envs:Endless-v0", eval_episodes=3), endless, max_steps=7)
    np.testing.assert_array_equal(returns, 7)
    assert "3 episodes were stopped after 7 steps" in capfd.readouterr().out

    result = command_line("--evaluate", run_dir, "--env-kwargs", "max_episode_steps=50")
    assert "evaluation at step 512: return -50.00 +- 0.00" in result.out
    assert "stopped" not in result.out


def assert_length(film, expected):
    """moviepy may leave out the last frame, for the rounding of its time."""
    assert len(film) in (expected - 1, expected)


def assert_shows_movement(film):
    assert film[0].std() > 5
    assert any((film[0] != frame).any() for frame in film[1:])


def test_films_of_an_evaluation(command_line):
    """Of episode 0, and of episodes 1 to 3: one frame for each first observation and one for each step."""
    run_dir = train(total_timesteps=2048)
    lengths = ppo.evaluate(ppo.Args(eval_episodes=4), run_dir)  # the reward is 1 in each step
    result = command_line("--evaluate", run_dir, "--capture-video", "--eval-episodes", 4)
    assert result.out.splitlines()[-1] == f"films: {run_dir}/videos/eval-at-2048"
    one, other = sorted(run_dir.glob("videos/eval-at-2048/*.mp4"))
    assert_length(frames(one), lengths[0] + 1)
    assert_length(frames(other), lengths[1:].sum() + 3)
    assert_shows_movement(frames(one))


def test_films_of_training_and_of_a_resumed_run(command_line):
    """From episodes 0, 1 and 8 of environment 0 on, up to the next film; Diary writes down the lengths of episodes.

    A resumed run keeps earlier films.
    """
    flags = {"env_id": "probe_envs:Diary-v0", "num_envs": 1, "num_steps": 256, "eval_episodes": 0}
    plain = train(**flags, total_timesteps=512)
    Path("diary.txt").unlink()
    run_dir = train(**flags, total_timesteps=512, capture_video=True)
    assert curves(run_dir) == curves(plain), "filming changes nothing else"
    lengths = [int(line.split()[1]) for line in Path("diary.txt").read_text().splitlines()]
    assert 8 < len(lengths) < 27
    films = {int(path.stem.rpartition("-")[2]): path for path in run_dir.glob("videos/train-*/*.mp4")}
    rest = 512 - sum(lengths[:8]) + len(lengths[8:]) + 1
    expected = {0: lengths[0] + 1, 1: sum(lengths[1:8]) + 7, 8: rest}
    assert films.keys() == expected.keys()
    for episode, length in expected.items():
        assert_length(frames(films[episode]), length)
    assert_shows_movement(frames(films[8]))

    before = {path: path.read_bytes() for path in run_dir.rglob("*.mp4")}
    assert command_line("--resume", run_dir, "--total-timesteps", 1024, "--eval-episodes", 1).code == 0
    after = {path: path.read_bytes() for path in run_dir.rglob("*.mp4")}
    assert before.items() < after.items()


def test_films_are_bounded():
    """The first frames of an episode that does not end, whose frames show the number of the step."""
    flags = {"num_envs": 1, "num_steps": 256, "total_timesteps": 2560, "num_minibatches": 1, "update_epochs": 1}
    run_dir = train(env_id="probe_envs:Endless-v0", **flags, eval_episodes=0, capture_video=True)
    (path,) = run_dir.glob("videos/train-*/*.mp4")
    film = frames(path)
    assert_length(film, 2001)
    np.testing.assert_allclose(np.mean(film, axis=(1, 2, 3)), np.arange(len(film)) // 10, atol=4)


@pytest.mark.parametrize("env_id", ["Constant", "Spaces"])
@pytest.mark.filterwarnings("ignore:.*render_mode.*")
def test_filming_an_environment_that_cannot_draw_is_refused(command_line, env_id):
    """Constant takes no render_mode, Spaces does not use it."""
    assert_refused(ppo, command_line("--env-id", f"probe_envs:{env_id}-v0", "--capture-video"), env_id)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems always have a display")
def test_watching_an_evaluation(command_line, window, monkeypatch):
    """Each episode is shown in pygame's window, frame by frame. Without a display, films are recommended."""
    run_dir = train(total_timesteps=512, eval_episodes=0)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    assert_refused(ppo, command_line("--evaluate", run_dir, "--render"), "--capture-video")
    with pytest.raises(ppo.UsageError, match="--capture-video"):
        ppo.Args(render=True)
    assert "eval/episodic_return" not in curves(run_dir)

    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    assert command_line("--evaluate", run_dir, "--render", "--capture-video", "--eval-episodes", 2).code == 0
    ((_, value),) = curves(run_dir)["eval/episodic_return"]
    assert len(window) == 2 * value + 2
    assert_shows_movement(window)
    assert not load(run_dir)["args"]["render"] and not Path(run_dir, "videos").exists()
