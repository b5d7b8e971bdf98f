"""compute_gae against what the GAE paper defines, written down here as sums."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import ppo

numbers = st.floats(-10, 10, width=32)
fractions = st.floats(0, 1)
ATOL = 1e-3  # what float32 loses on sums of up to 12 errors of up to 30 each is less


@st.composite
def rollouts(draw):
    """Any rewards, values, next values, terminations and truncations, [T, N]; both flags may be set at once."""
    shape = draw(st.tuples(st.integers(1, 12), st.integers(1, 3)))
    floats = [draw(arrays(np.float64, shape, elements=numbers)) for _ in range(3)]
    flags = [draw(arrays(bool, shape)) for _ in range(2)]
    return [*floats, *flags]


def gae(rollout, gamma, gae_lambda):
    """What compute_gae makes of it, in float32 as in training."""
    floats, flags = rollout[:3], rollout[3:]
    tensors = [*(torch.as_tensor(x, dtype=torch.float32) for x in floats), *map(torch.from_numpy, flags)]
    return ppo.compute_gae(*tensors, gamma, gae_lambda).numpy()


@given(rollouts(), fractions, fractions)
@settings(deadline=None, max_examples=300)
def test_is_the_brute_force_sum(rollout, gamma, gae_lambda):
    """A_t is the sum over k of (gamma lambda)^k delta_{t+k}, up to the end of the episode or of the rollout."""
    rewards, values, next_values, terminations, truncations = rollout
    T, N = rewards.shape
    expected = np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            for k in range(T - t):
                future = 0.0 if terminations[t + k, n] else gamma * next_values[t + k, n]
                delta = rewards[t + k, n] + future - values[t + k, n]
                expected[t, n] += (gamma * gae_lambda) ** k * delta
                if terminations[t + k, n] or truncations[t + k, n]:
                    break
    np.testing.assert_allclose(gae(rollout, gamma, gae_lambda), expected, rtol=0, atol=ATOL)


@given(rollouts(), fractions)
@settings(deadline=None)
def test_lambda_0_is_the_one_step_error(rollout, gamma):
    rewards, values, next_values, terminations, _ = rollout
    expected = rewards + np.where(terminations, 0, gamma * next_values) - values
    np.testing.assert_allclose(gae(rollout, gamma, 0.0), expected, rtol=0, atol=ATOL)


@given(rollouts(), fractions)
@settings(deadline=None)
def test_lambda_1_is_the_discounted_return_less_the_value(rollout, gamma):
    """Within an episode the next value is the value of the next row: then all values but two cancel out."""
    rewards, values, next_values, terminations, truncations = rollout
    ended = terminations | truncations
    next_values[:-1] = np.where(ended[:-1], next_values[:-1], values[1:])

    T, N = rewards.shape
    expected = np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            last = next((k for k in range(t, T) if ended[k, n]), T - 1)
            discounted = sum(gamma ** (k - t) * rewards[k, n] for k in range(t, last + 1))
            bootstrap = 0.0 if terminations[last, n] else gamma ** (last - t + 1) * next_values[last, n]
            expected[t, n] = discounted + bootstrap - values[t, n]
    np.testing.assert_allclose(gae(rollout, gamma, 1.0), expected, rtol=0, atol=ATOL)


def test_by_hand():
    """gamma = lambda = 1/2, reward 1, value 4 and next value 8 everywhere: delta is 1 + 4 - 4 = 1, or -3 at a death.

    Environment 0 plays on, 1 is truncated in the middle, 2 terminated in the middle, 3 both at once.
    """
    ones = torch.ones(3, 4)
    terminations, truncations = torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)
    terminations[1, [2, 3]] = True
    truncations[1, [1, 3]] = True
    advantages = ppo.compute_gae(ones, 4 * ones, 8 * ones, terminations, truncations, 0.5, 0.5)
    last = [1, 1, 1, 1]
    middle = [1 + 1 / 4, 1, -3, -3]
    first = [1 + 1 / 4 + 1 / 16, 1 + 1 / 4, 1 - 3 / 4, 1 - 3 / 4]
    assert advantages.tolist() == [first, middle, last]


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 1)])
def test_keeps_shape_and_type(shape):
    floats, flags = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    advantages = ppo.compute_gae(floats, floats, floats, flags, flags, 0.99, 0.95)
    assert advantages.shape == shape
    assert advantages.dtype == torch.float32
