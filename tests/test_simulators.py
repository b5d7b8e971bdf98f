"""ppo_vector.py with EnvPool and mjlab, which tests/requirements-vector.txt installs: `pytest -m vector`."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from helpers import curves, load

import ppo_vector
from ppo_vector import Args, Simulator

pytestmark = pytest.mark.vector


def test_envpool_returns_the_last_observation_of_an_episode():
    """Its step after an end returns a first observation, as NEXT_STEP says; physics are those of Gymnasium."""
    envs = ppo_vector.make_envs(Args("envpool/CartPole-v1"), 4, seed=1)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    simulator, alone = Simulator(envs, 4, torch.device("cpu")), gym.make("CartPole-v1").unwrapped
    before, seen = simulator.reset(1)["actor"].clone(), 0
    for _ in range(100):
        _, after, _, terminations, _, valid = simulator.step(torch.ones(4, dtype=torch.int64))
        for i in range(4):
            if valid[i]:  # the last observation of an episode follows from the one before, too
                alone.reset()
                alone.state, alone.steps_beyond_terminated = before[i].double().numpy(), None
                expected, _, terminated, _, _ = alone.step(1)
                np.testing.assert_allclose(after[i], expected, atol=1e-5)
                assert terminations[i] == terminated
            else:
                assert after[i].abs().max() <= 0.05 and not terminations[i]
                seen += 1
        before = after.clone()
    assert seen > 20


@pytest.mark.parametrize("env_id", ["envpool/HalfCheetah-v5", "envpool/LunarLander-v3"])
def test_envpool_trains_and_resumes(env_id):
    args = Args(env_id, num_envs=16, num_steps=64, total_timesteps=2048, eval_episodes=2)
    run = ppo_vector.train(args)
    ppo_vector.train(replace(args, resume=run, total_timesteps=4096))
    assert load(run)["global_step"] == 4096
    steps = [step for step, _ in curves(run)["losses/value_loss"]]
    assert steps == [1024, 2048, 3072, 4096]


def test_mjlab():
    """Both groups of observations, ends, logs, random lengths at the beginning, and a critic with its own inputs."""
    args = Args("mjlab/Mjlab-Cartpole-Balance", num_envs=16, num_steps=32, total_timesteps=2048, eval_episodes=2)
    envs = ppo_vector.make_envs(args, 16, seed=1)
    simulator = Simulator(envs, 16, torch.device("cpu"))
    simulator.reset(1)
    envs.episode_length_buf = torch.full_like(envs.episode_length_buf, int(envs.max_episode_length) - 2)
    ends = [simulator.step(torch.zeros(16, simulator.num_actions))[3:5] for _ in range(3)]
    assert any(truncations.all() for _, truncations in ends)  # a time limit is no termination
    assert not any(terminations.any() for terminations, _ in ends)
    envs.close()
    run = ppo_vector.train(args)
    assert all(x.isfinite().all() for x in load(run)["agent"].values())
    assert [step for step, _ in curves(run)["losses/value_loss"]] == [512, 1024, 1536, 2048]
