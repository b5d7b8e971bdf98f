"""The ablations train, each to other weights than the default, and same_bits.py tells the same weights from others."""

import importlib.util
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import ROOT, load, train

sys.path.append(str(ROOT / "benchmark"))
import ablations
import same_bits

import ppo


class Spikes(gym.Env):
    """Random observations and rewards, a few of them a hundred times as large as the others."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))

    def __init__(self, continuous):
        self.action_space = gym.spaces.Box(-1, 1, (2,)) if continuous else gym.spaces.Discrete(2)

    def observe(self):
        size = self.np_random.choice([1, 1000], p=[0.995, 0.005])
        return (size * self.np_random.normal(size=3)).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action):
        return self.observe(), self.observe()[0], False, False, {}


gym.register("Spikes-v0", Spikes, max_episode_steps=20)


@pytest.mark.parametrize("script", sorted({script for script, _ in ablations.SUITES.values()}))
def test_variants(script, tmp_path):
    variants = ablations.make_variants(script, tmp_path / "scripts")
    assert len(variants) >= 6
    weights = {}
    for name, (path, flags) in variants.items():
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        changes = vars(ppo.tyro.cli(module.Args, args=flags))
        changes |= {"env_id": "Spikes-v0", "env_kwargs": (f"continuous={script != 'ppo'}",), "exp_name": name}
        changes |= {"num_envs": 2, "num_steps": 64, "num_minibatches": 2, "total_timesteps": 256, "eval_episodes": 1}
        weights[name] = torch.cat([x.flatten() for x in load(train(module, **changes))["agent"].values()])
    equal = [name for name in weights if torch.equal(weights[name], weights["default"])]
    assert equal == ["default"]


def test_steps_to_a_mean_of_100_episodes_and_cells():
    episodes = np.array([60, 30, 20, 5])
    run = ablations.learning.Run("", 1, np.arange(1, 5) * 10, np.array([0.0, 475, 500, 500]), episodes, 50, 0, 0, None)
    assert ablations.steps_to(run, 0) == 30  # the first 90 episodes are too few
    assert ablations.steps_to(run, 242.5) == 30  # 50 episodes at 0, 30 at 475, 20 at 500
    assert ablations.steps_to(run, 245) == 40  # 45 episodes at 0, 30 at 475, 25 at 500: 267.5
    assert ablations.steps_to(run, 300) == 50  # never reached: the last step
    values = {"default": [0.0, 1, 2, 3], "a": [0.0, 1, 2, 3], "b": [100.0, 101, 102, 104], "c": [1.0, 1, 2, 2]}
    cells = ablations.compare(values)
    assert cells["default"] == "1.5 ± 1.1" and cells["a"] == "1.5 ± 1.1 (+0.0, p 1)"
    p_value = float(cells["b"].rpartition(" p ")[2].rstrip(")"))
    assert p_value == pytest.approx(
        3 * ablations.ttest_ind(values["default"], values["b"], equal_var=False).pvalue, rel=0.05
    )


def test_same_bits():
    flags = ["--num-envs", "2", "--num-steps", "32"]
    weights = [same_bits.train(ROOT / "ppo.py", [*flags, *more]) for more in ([], [], ["--gamma", "0.98"])]
    equal = [all(torch.equal(weights[0][name], x[name]) for name in x) for x in weights]
    assert equal == [True, True, False]
