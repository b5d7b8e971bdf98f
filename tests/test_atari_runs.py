"""Runs of ppo_atari.py: alone and to the bit, stopped and resumed, compiled, watched, and learning.

On real games with a limit of 200 frames, except for learning, which uses a toy game with a known answer.
"""

import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from helpers import (
    LOSSES,
    ROOT,
    as_flags,
    assert_refused,
    curves,
    frames,
    load,
    next_second,
    run,
    same_weights,
    the_run,
    train,
)

import ppo_atari

SHORT = {"env_kwargs": ("max_num_frames_per_episode=200",), "eval_episodes": 1}  # games of 50 steps
PONG = {"env_id": "ALE/Pong-v5", "num_envs": 2, "num_steps": 16, **SHORT}  # 32 steps per iteration
BREAKOUT = {"env_id": "ALE/Breakout-v5", "num_envs": 4, "num_steps": 16, **SHORT}  # 64 steps per iteration
# 4 iterations of 4 updates
SHARED = BREAKOUT | {"total_timesteps": 256, "num_minibatches": 2, "update_epochs": 2}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """In this process and in those that it starts."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------- one process


def test_alone_in_an_empty_folder(command_line):
    """A copy of ppo_atari.py needs nothing else of the repository. The same seed gives the same bits elsewhere."""
    shutil.copy(ROOT / "ppo_atari.py", "ppo_atari.py")
    code, out, err = run(sys.executable, "ppo_atari.py", *as_flags(**PONG, total_timesteps=100), PYTHONPATH="")
    assert (code, err) == (0, "")
    run_dir = the_run()
    assert re.fullmatch(r"ALE-Pong-v5__ppo_atari__1__\d{10}", run_dir.name)
    assert load(run_dir)["global_step"] == 128
    curve = curves(run_dir)
    charts = ("learning_rate", "episodes", "episodic_return", "episodic_length")
    losses = {f"losses/{name}" for name in (*LOSSES, "explained_variance")}
    assert curve.keys() == losses | {f"charts/{name}" for name in charts} | {"eval/episodic_return"}

    again = train(ppo_atari, **PONG, total_timesteps=100)
    assert curves(again) == curve
    assert same_weights(load(again), load(run_dir))
    evaluation = command_line("--evaluate", run_dir, script=ppo_atari)
    assert evaluation.code == 0
    assert evaluation.out.splitlines()[-1] == out.splitlines()[-1]
    assert curves(run_dir)["eval/episodic_return"] == curve["eval/episodic_return"] * 2


def test_a_stopped_run_is_resumed(command_line, monkeypatch):
    """The iteration is finished and saved. After that come other games, and curves without gap or duplicate."""
    calls, compute_gae, seeds, reset = [], ppo_atari.compute_gae, [], ppo_atari.AtariVectorEnv.reset

    def stopping(*inputs):  # in the third iteration
        calls.append(signal.raise_signal(signal.SIGTERM) if len(calls) == 2 else None)
        return compute_gae(*inputs)

    def noted(self, *, seed):
        seeds.extend(range(seed, seed + self.num_envs))
        return reset(self, seed=seed)

    monkeypatch.setattr(ppo_atari, "compute_gae", stopping)
    monkeypatch.setattr(ppo_atari.AtariVectorEnv, "reset", noted)
    stopped = command_line(*as_flags(**BREAKOUT, total_timesteps=320), script=ppo_atari)
    assert stopped.code == 128 + signal.SIGTERM
    run_dir = the_run()
    assert load(run_dir)["global_step"] == 192
    next_second()
    resumed = command_line(*shlex.split(re.search(r"python \S+ (--resume .+)", stopped.out)[1]), script=ppo_atari)
    assert (resumed.code, resumed.err) == (0, "")
    checkpoint, curve = load(run_dir), curves(run_dir)
    assert checkpoint["global_step"] == 320
    assert checkpoint["optimizer"]["state"][0]["step"] == 5 * 16
    rates = [(64 * (i + 1), pytest.approx(2.5e-4 * (1 - i / 5))) for i in range(5)]
    assert curve["charts/learning_rate"] == rates
    assert all([step for step, _ in curve[f"losses/{name}"]] == [64, 128, 192, 256, 320] for name in LOSSES)
    assert len(seeds) == len(set(seeds)) == 4 + 4 + 1


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="no C++ compiler")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_compiled_runs_compute_the_same(device):
    """Up to rounding, over several updates in float32."""
    flags = PONG | {"total_timesteps": 64, "bfloat16": False, "device": device}
    runs = [train(ppo_atari, **flags, **x) for x in ({"compile": True}, {}, {"learning_rate": 1e-30})]
    compiled, eager, initial = (torch.cat([x.flatten() for x in load(run)["agent"].values()]) for run in runs)
    assert (eager - initial).norm() > 0.1
    tolerance = 1e-3 if device == "cpu" else 0.25  # TF32; bfloat16 instead of float32 makes 0.4 on a CPU
    assert (compiled - eager).norm() < tolerance * (eager - initial).norm()


@GPU
@pytest.mark.parametrize("compile", [False, True])
def test_training_and_resuming_on_a_gpu(compile):
    """A run moves to the CPU and back, with all of the optimizer's state."""
    run_dir = train(ppo_atari, **SHARED, device="cuda", compile=compile)
    for total_timesteps, device in ((512, "cpu"), (768, "cuda")):
        flags = SHARED | {"total_timesteps": total_timesteps, "device": device, "compile": compile}
        train(ppo_atari, **flags, resume=str(run_dir))
        assert load(run_dir)["optimizer"]["state"][0]["step"] == total_timesteps / 64 * 4
    assert not next(ppo_atari.load_agent(run_dir).parameters()).is_cuda


def test_a_saved_policy_is_played(command_line, monkeypatch):
    """By --evaluate and by load_agent(), here a policy that always takes the same action."""
    run_dir = train(ppo_atari, **PONG, total_timesteps=32)
    checkpoint = load(run_dir)
    checkpoint["agent"]["actor.bias"][2] = 1e6
    torch.save(checkpoint, run_dir / "checkpoint.pt")
    before, actions, step = (run_dir / "checkpoint.pt").read_bytes(), [], ppo_atari.AtariVectorEnv.step

    def noted(self, action):
        actions.append(action.tolist())
        return step(self, action)

    monkeypatch.setattr(ppo_atari.AtariVectorEnv, "step", noted)
    assert command_line("--evaluate", run_dir, "--eval-episodes", 3, script=ppo_atari).code == 0
    assert actions == [[2, 2, 2]] * 50
    assert (run_dir / "checkpoint.pt").read_bytes() == before

    agent = ppo_atari.load_agent(run_dir)
    assert all(torch.equal(weight, checkpoint["agent"][name]) for name, weight in agent.state_dict().items())
    observations = torch.randint(256, (5, 84, 84, 4), dtype=torch.uint8)
    assert agent.act(agent.features(observations)).tolist() == [2] * 5


def test_a_game_is_watched(command_line, window):
    """The window shows the frames of the film three times as large; a film is lossy."""
    run_dir = train(ppo_atari, **PONG, total_timesteps=32)
    short = ("--env-kwargs", "max_num_frames_per_episode=40")
    result = command_line("--evaluate", run_dir, "--render", "--capture-video", *short, script=ppo_atari)
    assert result.code == 0
    path = run_dir / "videos" / "eval-at-32.mp4"
    assert f"film: {path}" in result.out
    film = frames(path)
    assert len(film) == len(window) == 41
    for picture, frame in zip(window, film, strict=True):
        assert frame.shape == (210, 160, 3) and picture.shape == (480, 630, 3)
        small = picture[::3, ::3]
        assert np.array_equal(small.repeat(3, 0).repeat(3, 1), picture)
        assert np.abs(small.swapaxes(0, 1).astype(int) - frame).mean() < 10
    assert any((window[0] != picture).any() for picture in window)


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "flags",
    [
        ("--env-id", "ALE/Pon-v5"),
        ("--env-id", "CartPole-v1"),
        ("--env-kwargs", "nonsense=1"),
        ("--env-kwargs", "frameskip=0"),
        ("--env-kwargs", "repeat_action_probability=0.25"),  # --sticky-actions sets it
        ("--num-minibatches", 5),
        ("--device", "cud"),
        ("--resume", "no_such_run"),
    ],
)
def test_input_that_is_refused(command_line, flags):
    assert_refused(ppo_atari, command_line(*flags, script=ppo_atari))
    assert not list(Path().glob("runs/*"))


def test_seeds_of_games_have_31_bits(monkeypatch):
    """ALE takes no larger ones. Training, a resumed run and the evaluation get different ones."""
    seed, seeds, reset = 2**32 - 1, [], ppo_atari.AtariVectorEnv.reset

    def noted(self, *, seed):
        seeds.extend(range(seed, seed + self.num_envs))
        return reset(self, seed=seed)

    monkeypatch.setattr(ppo_atari.AtariVectorEnv, "reset", noted)
    run_dir = train(ppo_atari, **PONG, total_timesteps=32, seed=seed)
    train(ppo_atari, **PONG, total_timesteps=64, seed=seed, resume=str(run_dir))
    assert len(seeds) == 2 * (2 + 1)
    assert seeds[2] == seeds[5]  # both evaluations play the same games
    assert len(set(seeds)) == 5
    seeds += [ppo_atari.make_seed("training", seed, step) for seed in (0, 20240101, 10**30) for step in range(1000)]
    assert 0 <= min(seeds) <= max(seeds) < 2**31


# --------------------------------------------------------------------------- learning from pixels


class BrightSquare:
    """A game of 4 steps: the right action is the place of a bright square in one of the four stacked frames.

    A random policy gets 4/3. In every second environment games are truncated, in the others terminated.
    """

    single_observation_space = Box(0, 255, (4, 84, 84), np.uint8)
    single_action_space = Discrete(3)

    def __init__(self, num_envs):
        self.num_envs = num_envs

    def reset(self, *, seed):
        self.rng = np.random.default_rng(seed)
        self.count = np.zeros(self.num_envs, int)
        return self.draw(), {"episode_frame_number": 4 * self.count}

    def draw(self):
        self.places = self.rng.integers(3, size=self.num_envs)
        frames = np.zeros((self.num_envs, 4, 84, 84), np.uint8)
        for i, place in enumerate(self.places):
            y, x = ((10, 10), (10, 60), (60, 35))[place]
            frames[i, self.rng.integers(4), y : y + 12, x : x + 12] = 255
        return frames

    def step(self, actions):
        rewards, frames = (actions == self.places).astype(np.int32), self.draw()
        self.count = (self.count + 1) % 4
        ended = self.count == 0
        truncations = ended & (np.arange(self.num_envs) % 2 == 1)
        infos = {"episode_frame_number": 4 * self.count, "final_obs": frames.copy()}
        return frames, rewards, ended & ~truncations, truncations, infos

    def close(self):
        pass


def test_it_learns_from_pixels(monkeypatch):
    """The best return is 4, and 2 for a policy that sees one of the four frames only. Seeds 1 to 3 reach 3.7 to 4."""
    monkeypatch.setattr(ppo_atari, "make_envs", lambda args, num_envs, **options: BrightSquare(num_envs))
    run_dir = train(ppo_atari, num_envs=8, num_steps=16, learning_rate=1e-3, total_timesteps=2048)
    assert curves(run_dir)["charts/episodic_return"][-1][1] > 3.3
