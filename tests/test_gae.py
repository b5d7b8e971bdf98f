"""compute_gae() against the sums that define GAE."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import ppo

pytestmark = pytest.mark.quick
numbers = st.floats(-10, 10, width=32)
fractions = st.floats(0, 1)
ATOL = 1e-3  # the rounding of float32 in sums of up to 12 errors of up to 30 each


@st.composite
def rollouts(draw):
    """Rewards, values, next values, terminations and truncations, [T, N]; both flags may be set at once."""
    shape = draw(st.tuples(st.integers(1, 12), st.integers(1, 3)))
    floats = [draw(arrays(np.float32, shape, elements=numbers)) for _ in range(3)]
    flags = [draw(arrays(bool, shape)) for _ in range(2)]
    return [*floats, *flags]


@given(rollouts(), fractions, fractions)
@settings(deadline=None, max_examples=200)
def test_equals_the_brute_force_sum(rollout, gamma, gae_lambda):
    """A_t is the sum over k of (gamma lambda)^k delta_{t+k}, up to the end of the episode or of the rollout.

    The values of the last observations of terminated episodes are not used: here they are NaN.
    """
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
    next_values[terminations] = np.nan
    advantages = ppo.compute_gae(*rollout, gamma, gae_lambda)
    assert advantages.dtype == np.float32
    np.testing.assert_allclose(advantages, expected, rtol=0, atol=ATOL)


def test_by_hand():
    """gamma = lambda = 1/2, reward 1, value 4, next value 8: delta is 1 + 4 - 4 = 1, at a termination 1 - 4 = -3.

    In the middle row environment 0 does not end, 1 is truncated, 2 is terminated, 3 both at once.
    """
    ones = np.ones((3, 4), np.float32)
    terminations, truncations = np.zeros((3, 4), bool), np.zeros((3, 4), bool)
    terminations[1, [2, 3]] = True
    truncations[1, [1, 3]] = True
    advantages = ppo.compute_gae(ones, 4 * ones, 8 * ones, terminations, truncations, 0.5, 0.5)
    last = [1, 1, 1, 1]
    middle = [1 + 1 / 4, 1, -3, -3]
    first = [1 + 1 / 4 + 1 / 16, 1 + 1 / 4, 1 - 3 / 4, 1 - 3 / 4]
    assert advantages.tolist() == [first, middle, last]
