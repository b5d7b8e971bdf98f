"""PPO learns five toy environments whose answers are known (an idea of the ARENA course), and both kinds of end.

Each fails for a different reason: a critic that does not learn, one that does not see, discounting, a policy
that does not learn, one that does not see.
"""

import numpy as np
import pytest
import torch

import ppo

FLAGS = {"total_timesteps": 8192, "num_envs": 8, "num_steps": 32, "learning_rate": 0.005, "eval_episodes": 1}


def learn(env_id, **flags):
    """A trained agent's values and probabilities of action 1, as functions of an observation."""
    agent = ppo.train(ppo.Args(f"probe_envs:{env_id}", **FLAGS, **flags))

    @torch.no_grad()
    def value(*observation):
        return agent.value(torch.tensor(observation, dtype=torch.float32)).item()

    @torch.no_grad()
    def policy(*observation):
        return agent.actor(torch.tensor(observation, dtype=torch.float32)).softmax(-1)[1].item()

    return value, policy


def test_1_value_of_a_constant_reward():
    value, _ = learn("Constant-v0")
    assert value(1) == pytest.approx(1, abs=0.01)


def test_2_value_follows_the_observation():
    value, _ = learn("ByObservation-v0")
    assert (value(-1), value(1)) == pytest.approx((-1, 1), abs=0.01)


def test_3_value_is_discounted():
    """The reward comes one step later, so the first step is worth gamma times as much."""
    value, _ = learn("Chain-v0", gamma=0.7)
    assert (value(1, 0), value(0, 1)) == pytest.approx((0.7, 1), abs=0.01)


def test_4_policy_takes_the_action_that_pays():
    value, policy = learn("ByAction-v0")
    assert policy(1) > 0.99
    assert value(1) == pytest.approx(1, abs=0.01)


def test_5_policy_and_value_follow_the_observation():
    value, policy = learn("ByBoth-v0")
    assert policy(-1) < 0.01
    assert policy(1) > 0.99
    assert (value(-1), value(1)) == pytest.approx((1, 1), abs=0.01)


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_truncation_leaves_the_value_of_going_on(gamma):
    """Reward 1 for ever, merely cut into pieces of 3 steps: 1 + gamma + gamma^2 + ... = 1 / (1 - gamma)."""
    value, _ = learn("Chain-v0", env_kwargs=("length=3", "every_step=True", "end=truncation"), gamma=gamma)
    values = [value(*row) for row in np.eye(3)]
    assert values == pytest.approx([1 / (1 - gamma)] * 3, rel=0.01)


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_termination_leaves_nothing(gamma):
    """Reward 1 in each of 3 steps, then death."""
    value, _ = learn("Chain-v0", env_kwargs=("length=3", "every_step=True", "end=termination"), gamma=gamma)
    values = [value(*row) for row in np.eye(3)]
    assert values == pytest.approx([1 + gamma + gamma**2, 1 + gamma, 1], rel=0.01)
