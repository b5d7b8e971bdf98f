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


def test_the_policy_begins_in_the_middle():
    """In units of the range, so that it is 0 with the same deviation for each component, also of a matrix."""
    space = Box(
        np.array([[-1, 0, -np.inf], [5, 0, 1]]), np.array([[1, 1000, np.inf], [np.inf, 0, 3]]), dtype=np.float64
    )
    agent = make_agent(space)
    torch.testing.assert_close(agent.log_std.exp(), torch.full((6,), 0.5))
    means = agent.act(torch.randn(100, INPUTS), greedy=True)
    assert means.shape == (100, 6)
    torch.testing.assert_close(means, torch.zeros(100, 6), rtol=0, atol=0.1)
    assert means.std() > 1e-4, "they depend on the observation"


@pytest.mark.parametrize(
    ("low", "high", "dtype", "actions"),  # for the deviations -2, -1, -0.5, 0, 0.5, 1 and 2
    [
        (-1, 1, "float32", [-1, -1, -0.5, 0, 0.5, 1, 1]),
        (-2000, 2000, "float32", [-2000, -2000, -1000, 0, 1000, 2000, 2000]),
        (-0.001, 0.001, "float32", [-0.001, -0.001, -0.0005, 0, 0.0005, 0.001, 0.001]),
        (0, 2e6, "float32", [0, 0, 5e5, 1e6, 1.5e6, 2e6, 2e6]),
        (5, np.inf, "float32", [5, 5, 5.5, 6, 6.5, 7, 8]),
        (-np.inf, -3, "float32", [-6, -5, -4.5, -4, -3.5, -3, -3]),
        (5, np.finfo(np.float32).max, "float32", [5, 5, 5.5, 6, 6.5, 7, 8]),
        (-np.inf, np.inf, "float32", [-2, -1, -0.5, 0, 0.5, 1, 2]),
        (np.finfo(np.float32).min, np.finfo(np.float32).max, "float32", [-2, -1, -0.5, 0, 0.5, 1, 2]),
        (np.finfo(np.float64).min, np.finfo(np.float64).max, "float64", [-2, -1, -0.5, 0, 0.5, 1, 2]),
        (3, 3, "float32", [3, 3, 3, 3, 3, 3, 3]),
        (-0.1, 0.1, "float64", [-0.1, -0.1, -0.05, 0, 0.05, 0.1, 0.1]),
        (10, 20, "int64", [10, 10, 12, 15, 18, 20, 20]),  # 12.5 and 17.5 are rounded to the even number
        (200, 255, "uint8", [200, 200, 214, 228, 241, 255, 255]),
        (-128, 127, "int8", [-128, -128, -64, 0, 63, 127, 127]),
        (np.iinfo(np.int64).min, np.iinfo(np.int64).max, "int64", [-2, -1, 0, 0, 0, 1, 2]),
    ],
)
def test_actions_are_in_units_of_the_range(low, high, dtype, actions):
    """Center plus u half ranges, clipped, of the space's type. Beside one bound the range is 2, without any [-1, 1]."""
    space = Box(low, high, (1,), dtype)
    u = np.array([[-2], [-1], [-0.5], [0], [0.5], [1], [2]], np.float32)
    converted = ppo.from_units(space, u)
    assert converted.dtype == space.dtype
    np.testing.assert_array_equal(converted, np.array(actions, dtype)[:, None])
    assert all(action in space for action in converted)


def test_components_have_ranges_of_their_own():
    """In the order of the rows of a matrix; a space without shape has one component."""
    space = Box(
        np.array([[-1, 0, -np.inf], [5, 2, 1]]), np.array([[1, 1000, np.inf], [np.inf, 2, 3]]), dtype=np.float64
    )
    u = np.array([[0.5, -0.5, 3.0, -1.5, 1.0, 0.0], [0.0, 1.0, -1.0, 0.0, 0.0, 2.0]], np.float32)
    expected = [[[0.5, 250, 3], [5, 2, 2]], [[0, 1000, -1], [6, 2, 3]]]
    assert ppo.from_units(space, u).tolist() == expected
    assert ppo.from_units(Box(0, 10, ()), np.array([[0.5], [-3]], np.float32)).tolist() == [7.5, 0]


def test_actions_are_sampled_from_the_normal_distribution(trained):
    """Moments, independence and shares within 1 and 2 standard deviations, each within 5 standard errors."""
    draws, observations = 100_000, torch.randn(2, INPUTS)
    with torch.no_grad():
        means = trained.actor(normalized(trained, observations).float())
        actions = trained.act(observations.repeat(draws, 1)).view(draws, 2, ACTIONS)
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
    outputs = trained.evaluate_actions({"observations": observations, "actions": actions})
    for output, x in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.double(), x, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(trained.act(observations, greedy=True).double(), policy.mean, rtol=1e-4, atol=1e-3)
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
    offset, scale = draw(st.floats(-1000, 1000)), 10 ** draw(st.floats(-9, 4))
    drawn = []
    for i, size in enumerate(draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))):
        x = rng.standard_normal((size, 4)) * [0, 0, 1, scale] + [offset, i, offset, 0]
        drawn.append(torch.tensor(x, dtype=torch.float32))
    return drawn


@given(chunks())
@settings(deadline=None)
def test_statistics_are_those_of_all_chunks(drawn):
    """Mean and standard deviation (the population's) of the union, computed in float64.

    The standard deviation is at least a millionth of the mean, some units in the last place of float32.
    """
    statistics = ppo.RunningStatistics(4)
    for x in drawn:
        statistics.update(x)
    data = torch.cat(drawn).double().numpy()
    size, expected = np.abs(data).max(0), data.std(0)
    assert statistics.count == len(data)
    assert (np.abs(statistics.mean.numpy() - data.mean(0)) <= 1e-6 * size + 1e-13).all()
    error = 1e-5 * expected + 1e-6 * size
    floor = 1e-6 * np.abs(data.mean(0)) + 1e-12
    assert (statistics.std.numpy() >= np.maximum(expected - error, 0.99 * floor)).all()
    # what an early chunk was raised by remains part of the later ones
    assert (statistics.std.numpy() <= np.hypot(expected, 1e-6 * size + 1e-12) + error).all()


def test_observations_are_normalized_and_clipped_at_10(agent):
    """(x - mean) / std of each component, then clipped; actions, log-probabilities and values see nothing else."""
    data = torch.randn(200, INPUTS) * torch.tensor([1e-8, 0.1, 1, 10, 100]) + torch.tensor([0, 1, -2, 50, 0])
    agent.observation_statistics.update(data)
    mean, std = data.double().mean(0), data.double().std(0, correction=0)
    torch.testing.assert_close(agent.normalize(data).double(), (data - mean) / std, rtol=1e-4, atol=1e-3)
    deviations = torch.tensor([[-1000.0], [-10.5], [-9.9], [9.9], [10.5], [1000]])
    observations = (mean + deviations * std).float()
    expected = deviations.clip(-10, 10).expand(6, INPUTS)
    torch.testing.assert_close(agent.normalize(observations), expected, rtol=1e-3, atol=0)

    beyond, far_beyond, action = observations[4:5], observations[5:], torch.randn(1, ACTIONS)
    assert torch.equal(agent.act(beyond, greedy=True), agent.act(far_beyond, greedy=True))
    assert torch.equal(agent.value(beyond), agent.value(far_beyond))
    outputs = (agent.evaluate_actions({"observations": x, "actions": action}) for x in (beyond, far_beyond))
    assert all(map(torch.equal, *outputs))


@pytest.mark.parametrize("constant", [0.0, 7.3, -1e-8, 1e6, -1e6])
def test_a_constant_is_harmless(constant):
    """It becomes 0 in each of many updates, and its rounding to float32 stays far below 1."""
    exact = torch.full((50, INPUTS), constant)
    rounded = exact.clone()
    rounded[::2] = torch.nextafter(exact[::2], torch.tensor(np.inf))
    for data in (exact, rounded):
        agent = make_agent()
        for size in (1, 7, 20, 50, 50):
            agent.observation_statistics.update(data[:size])
        assert agent.normalize(data).abs().max() < (0.2 if data is rounded else 1e-6)
