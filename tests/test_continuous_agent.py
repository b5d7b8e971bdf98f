"""The agent of ppo_continuous_action.py: its initial policy, distribution, normalization and statistics."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, Normal

import ppo_continuous_action as ppo

INPUTS, ACTIONS = 5, 3


def make_agent(action_space=None):
    """A new agent with 5 inputs, by default with 3 actions in [-1, 1]."""
    observation_space = Box(-np.inf, np.inf, (INPUTS,), np.float32)
    action_space = action_space or Box(-1, 1, (ACTIONS,), np.float32)
    return ppo.Agent(SimpleNamespace(single_observation_space=observation_space, single_action_space=action_space))


@pytest.fixture
def agent():
    torch.manual_seed(1)
    return make_agent()


@pytest.fixture
def trained(agent):
    """An agent with means far from 0, standard deviations far from 1 and different statistics of each input."""
    with torch.no_grad():
        agent.actor[-1].weight.mul_(300)
        agent.log_std.copy_(torch.tensor([-2.0, 0.3, 2.0]))
    agent.observation_statistics.update(torch.randn(100, INPUTS) * torch.arange(1, 6) + torch.arange(5))
    agent.return_statistics.update(4 * torch.randn(100))
    return agent


def normalized(agent, observations):
    """Details 28 and 29, in float64."""
    mean, std = agent.observation_statistics.mean.double(), agent.observation_statistics.std.double()
    return ((observations.double() - mean) / std).clip(-10, 10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_initial_mean_and_standard_deviation_follow_the_range(dtype):
    """The middle and a quarter of each component's range; 0 and 0.5 if it is infinite, as good as that, or empty."""
    most, inf = np.finfo(dtype).max, np.inf
    low = np.array([[-1, -2, 0], [-inf, 0, -inf], [3, -0.4, -most]], dtype)
    high = np.array([[1, 2, 1], [inf, inf, 5], [3, 0.4, most]], dtype)
    agent = make_agent(Box(low, high, dtype=dtype))
    expected = torch.tensor([0.5, 1, 0.25, 0.5, 0.5, 0.5, 0.5, 0.2, 0.5])
    torch.testing.assert_close(agent.log_std.exp(), expected)
    middle = torch.tensor([0, 0, 0.5, 0, 0, 0, 0, 0, 0]).expand(100, -1)
    torch.testing.assert_close(agent.act(torch.randn(100, INPUTS)), middle, rtol=0, atol=0.1)


def test_actions_are_sampled_from_the_normal_distribution(trained):
    """Moments, independence and shares within 1 and 2 standard deviations, each within 5 standard errors."""
    draws, observations = 100_000, torch.randn(2, INPUTS)
    with torch.no_grad():
        means = trained.actor(normalized(trained, observations).float())
        actions = trained.act(observations, trained.sample_noise(draws, 2))
        z = ((actions - means) / trained.log_std.exp()).double().flatten(1)
    assert (means[0] - means[1]).abs().max() > 0.1, "the policy depends on the observation"
    assert z.mean(0).abs().max() < 5 / math.sqrt(draws)
    assert (z.std(0) - 1).abs().max() < 5 / math.sqrt(2 * draws)
    assert (torch.corrcoef(z.T) - torch.eye(2 * ACTIONS)).abs().max() < 5 / math.sqrt(draws)
    assert torch.corrcoef(torch.stack([z[1:, 0], z[:-1, 0]]))[0, 1].abs() < 5 / math.sqrt(draws)
    for width in (1, 2):
        share, expected = (z.abs() < width).double().mean(0), math.erf(width / math.sqrt(2))
        assert ((share - expected).abs() < 5 * math.sqrt(expected * (1 - expected) / draws)).all()


def test_outputs_and_gradients_agree_with_torch_distributions(trained):
    """Log-probabilities, entropies and values of a rollout [T, N], and the gradient of a random sum of them."""
    observations, actions = torch.randn(50, 3, INPUTS), torch.randn(50, 3, ACTIONS)
    replica = copy.deepcopy(trained).double()
    inputs = normalized(trained, observations)
    policy = Independent(Normal(replica.actor(inputs), replica.log_std.exp()), 1)
    expected = policy.log_prob(actions.double()), policy.entropy(), replica.critic(inputs)[..., 0]
    outputs = trained(observations, actions)
    for output, x in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.double(), x, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(trained.act(observations).double(), policy.mean, rtol=1e-4, atol=1e-3)  # greedy
    assert torch.equal(outputs[2], trained.value(observations))

    weights = torch.randn(3, 50, 3)
    (weights * torch.stack(outputs)).sum().backward()
    (weights * torch.stack(expected)).sum().backward()
    for (name, parameter), other in zip(trained.named_parameters(), replica.parameters(), strict=True):
        largest = other.grad.abs().max().item()
        assert largest > 0
        torch.testing.assert_close(parameter.grad.double(), other.grad, rtol=1e-3, atol=1e-3 * largest, msg=name)


@st.composite
def chunks(draw):
    """Chunks [N, 4] of a constant, a component that changes between chunks only, one offset and one scaled."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    offset, scale = draw(st.floats(-1000, 1000)), 10 ** draw(st.floats(-2, 4))
    drawn = []
    for i, size in enumerate(draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))):
        x = rng.standard_normal((size, 4)) * [0, 0, 1, scale] + [offset, i, offset, 0]
        drawn.append(torch.tensor(x, dtype=torch.float32))
    return drawn


@given(chunks())
@settings(deadline=None)
def test_statistics_are_those_of_all_chunks(drawn):
    """Mean and standard deviation (the population's, at least 1e-4) of the union, computed in float64."""
    statistics = ppo.RunningStatistics(4)
    for x in drawn:
        statistics.update(x)
    data = torch.cat(drawn).double().numpy()
    size, expected = np.abs(data).max(0), data.std(0)
    assert statistics.count == len(data)
    assert (np.abs(statistics.mean.numpy() - data.mean(0)) <= 1e-6 * size + 1e-12).all()
    error = 1e-5 * expected + 1e-6 * size
    assert (statistics.std.numpy() >= np.maximum(expected - error, 0.9999e-4)).all()
    # a standard deviation raised to 1e-4 by the early chunks remains part of the later ones
    assert (statistics.std.numpy() <= np.hypot(expected, 1e-4) + error).all()


def test_observations_are_normalized_and_clipped_at_10(agent):
    """(x - mean) / std of each component, then clipped; actions, log-probabilities and values see nothing else.

    A component that never changes becomes 0.
    """
    data = torch.randn(200, INPUTS) * torch.tensor([0.01, 0.1, 1, 10, 100]) + torch.tensor([0, 1, -2, 50, 0])
    agent.observation_statistics.update(data)
    mean, std = data.double().mean(0), data.double().std(0, correction=0)
    torch.testing.assert_close(agent.normalize(data).double(), (data - mean) / std, rtol=1e-4, atol=1e-3)
    deviations = torch.tensor([[-1000.0], [-10.5], [-9.9], [9.9], [10.5], [1000]])
    observations = (mean + deviations * std).float()
    expected = deviations.clip(-10, 10).expand(6, INPUTS)
    torch.testing.assert_close(agent.normalize(observations), expected, rtol=1e-3, atol=0)
    constant = make_agent()
    constant.observation_statistics.update(torch.full((50, INPUTS), 7.3))
    assert not constant.normalize(torch.full((1, INPUTS), 7.3)).any()

    beyond, far_beyond = observations[4:5], observations[5:]
    action = torch.randn(1, ACTIONS)
    assert torch.equal(agent.act(beyond), agent.act(far_beyond))
    assert torch.equal(agent.value(beyond), agent.value(far_beyond))
    assert all(map(torch.equal, agent(beyond, action), agent(far_beyond, action)))
