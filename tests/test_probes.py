"""Learning: small environments whose values and policies are known, and CartPole.

Each probe (an idea of the ARENA course) fails for another fault: in the critic, its input, discounting, the policy
or its input.
"""

import numpy as np
import pytest
import torch
from helpers import curves, train

import ppo

pytestmark = pytest.mark.quick
THREE = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
PROBES = {  # environment, its arguments, gamma, and the value and the better action (or None) of each observation
    "constant reward": ("Constant", "", 0.99, {(1,): (1, None)}),
    "value by observation": ("ByObservation", "", 0.99, {(-1,): (-1, None), (1,): (1, None)}),
    "reward after two steps": ("Chain", "", 0.7, {(1, 0): (0.7, None), (0, 1): (1, None)}),
    "reward by action": ("ByAction", "", 0.99, {(1,): (1, 1)}),
    "action by observation": ("ByBoth", "", 0.99, {(-1,): (1, 0), (1,): (1, 1)}),
    # Reward 1 in each of 3 steps: 1 + gamma + gamma^2 = 2.71. After a time limit rewards go on: 1 / (1 - gamma) = 10.
    "termination": (
        "Chain",
        "length=3 every_step=True",
        0.9,
        {(1, 0, 0): (2.71, None), (0, 1, 0): (1.9, None), (0, 0, 1): (1, None)},
    ),
    "truncation": ("Chain", "length=3 every_step=True end=truncation", 0.9, dict.fromkeys(THREE, (10, None))),
}


@pytest.mark.parametrize("name", PROBES)
def test_probe(name):
    env_id, env_kwargs, gamma, answers = PROBES[name]
    flags = {"total_timesteps": 8192, "num_envs": 8, "num_steps": 32, "learning_rate": 0.005, "gamma": gamma}
    run = train(env_id=f"probe_envs:{env_id}-v0", env_kwargs=tuple(env_kwargs.split()), **flags)
    agent, observations = ppo.load_agent(run), torch.tensor(list(answers), dtype=torch.float32)
    with torch.no_grad():
        values, policies = agent.value(observations), agent.actor(observations).softmax(-1)
    for value, policy, (expected, action) in zip(values, policies, answers.values(), strict=True):
        assert value.item() == pytest.approx(expected, rel=0.01)
        assert action is None or policy[action] > 0.99


def test_cartpole():
    """A tenth of the default run solves CartPole-v0, whose threshold is 195."""
    run = train(total_timesteps=50_000, eval_episodes=10)
    ((_, evaluation),) = curves(run)["eval/episodic_return"]
    assert evaluation > 195
    returns = [value for _, value in curves(run)["charts/episodic_return"]]
    assert np.mean(returns[-10:]) > 100 > 50 > np.mean(returns[:3])
