"""ppo_continuous_action.py's agent: how it starts, acts and judges, and the statistics that it keeps."""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from helpers import load, train
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, Normal

import ppo_continuous_action as ppo

INPUTS, ACTIONS = 5, 3


@pytest.fixture
def agent():
    """An agent with 5 inputs and 3 actions, as training starts with."""
    torch.manual_seed(1)
    return make_agent()


def make_agent(actions=(ACTIONS,)):
    class Spaces:
        single_observation_space = Box(-np.inf, np.inf, (INPUTS,), np.float32)
        single_action_space = Box(-1, 1, actions, np.float32)

    return ppo.Agent(Spaces)


def opinionated(agent):
    """The agent with means far from 0, standard deviations far from 1 and statistics of all inputs of their own."""
    with torch.no_grad():
        agent.actor[-1].weight.mul_(300)
        agent.log_std.copy_(torch.tensor([-1.5, 0.3, 1.2]))
    agent.observation_statistics.update(torch.randn(100, INPUTS) * torch.arange(1, 6) + torch.arange(5))
    agent.return_statistics.update(4 * torch.randn(100))
    return agent


# ----------------------------------------------------------------------------------- the networks


@pytest.mark.parametrize("network", ["actor", "critic"])
def test_orthogonal_initialisation(agent, network):
    """W W^T = gain^2 I (of the shorter side), zero biases: gains sqrt 2, sqrt 2, then 0.01 or 1."""
    layers = [layer for layer in getattr(agent, network) if isinstance(layer, torch.nn.Linear)]
    gains = [math.sqrt(2), math.sqrt(2), 0.01 if network == "actor" else 1.0]
    assert [layer.out_features for layer in layers] == [64, 64, ACTIONS if network == "actor" else 1]
    for layer, gain in zip(layers, gains, strict=True):
        W = layer.weight.detach()
        gram = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
        torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram)), rtol=0, atol=1e-5 * gain**2)
        assert not layer.bias.any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_first_standard_deviation_is_a_quarter_of_the_range(dtype):
    """Of each component on its own; 0.5 where a range is infinite, as good as that, or nothing."""
    most = np.finfo(dtype).max
    low = np.array([[-1, -2, 0], [-np.inf, 0, -np.inf], [3, -0.4, -most]], dtype)
    high = np.array([[1, 2, 1], [np.inf, np.inf, 5], [3, 0.4, most]], dtype)

    class Spaces:
        single_observation_space = Box(-np.inf, np.inf, (INPUTS,), np.float32)
        single_action_space = Box(low, high, dtype=dtype)

    agent = ppo.Agent(Spaces)
    expected = torch.tensor([0.5, 1, 0.25, 0.5, 0.5, 0.5, 0.5, 0.2, 0.5])
    torch.testing.assert_close(agent.log_std.exp(), expected)
    assert agent.actor[-1].bias.tolist() == [0, 0, 0.5, 0, 0, 0, 0, 0, 0], "the mean starts in the middle"


def test_it_starts_without_statistics(agent):
    """Normalizing changes nothing then, but for what is beyond 10."""
    observations = torch.randn(20, INPUTS)
    assert torch.equal(agent.normalize(observations), observations)
    assert torch.equal(agent.scale_rewards(observations), observations)
    assert agent.observation_statistics.count == agent.return_statistics.count == 0


def test_what_is_learned_and_what_is_kept(agent):
    """The weights and log_std are parameters; the statistics are buffers: saved with them, but not learned."""
    parameters, buffers = dict(agent.named_parameters()), dict(agent.named_buffers())
    assert {name.split(".")[0] for name in parameters} == {"actor", "critic", "log_std"}
    kept = {f"{of}_statistics.{name}" for of in ("observation", "return") for name in ("count", "mean", "std")}
    assert buffers.keys() == kept
    assert agent.state_dict().keys() == parameters.keys() | buffers.keys()
    assert buffers["observation_statistics.mean"].shape == (INPUTS,)
    assert buffers["return_statistics.std"].shape == ()


@pytest.mark.parametrize(("shape", "number"), [((), 1), ((1,), 1), ((2, 3), 6)])
def test_actions_of_any_shape_are_rows_of_numbers(shape, number):
    """The agent knows of no shape: there is a mean and a standard deviation for each number."""
    agent = make_agent(shape)
    assert agent.num_actions == len(agent.log_std) == number
    assert agent.sample_noise(7, 4).shape == (7, 4, number)
    assert agent.act(torch.randn(4, INPUTS), agent.sample_noise(1, 4)[0]).shape == (4, number)


def test_actor_and_critic_share_nothing(agent):
    """The value does not change with the actor's weights or log_std, nor the policy with the critic's."""
    opinionated(agent)
    observation, action = torch.randn(1, INPUTS), torch.randn(1, ACTIONS)
    _, _, value = agent(observation, action)
    with torch.no_grad():
        for p in [*agent.actor.parameters(), agent.log_std]:
            p.add_(1.0)
    logprob, entropy, new_value = agent(observation, action)
    assert torch.equal(new_value, value)
    assert torch.equal(agent.value(observation), value)
    with torch.no_grad():
        for p in agent.critic.parameters():
            p.add_(1.0)
    assert not torch.equal(agent.value(observation), value)
    assert torch.equal(agent(observation, action)[0], logprob)
    assert torch.equal(agent(observation, action)[1], entropy)


# ------------------------------------------------------------------------------------- the policy


def test_actions_are_drawn_from_the_normal_distribution(agent):
    """Mean, standard deviation and correlations of 100,000 draws for each of 2 observations, in 5 standard errors.

    And the shares within 1 and 2 standard deviations, which tell a normal distribution from others.
    """
    draws, observations = 100_000, torch.randn(2, INPUTS)
    with torch.no_grad():
        means = opinionated(agent).actor(agent.normalize(observations)).double()
        noise = agent.sample_noise(draws, 2)
        actions = agent.act(observations, noise).double()
    assert noise.shape == actions.shape == (draws, 2, ACTIONS)
    stds = agent.log_std.detach().double().exp().expand(2, ACTIONS)
    assert ((actions.mean(0) - means).abs() < 5 * stds / math.sqrt(draws)).all()
    assert ((actions.std(0) - stds).abs() < 5 * stds / math.sqrt(2 * draws)).all()
    assert (torch.corrcoef(actions.flatten(1).T) - torch.eye(2 * ACTIONS)).abs().max() < 5 / math.sqrt(draws)
    successive = torch.stack([actions[1:, 0, 0], actions[:-1, 0, 0]])
    assert torch.corrcoef(successive)[0, 1].abs() < 5 / math.sqrt(draws)
    for width in (1, 2):
        share, expected = ((actions - means).abs() < width * stds).double().mean(0), math.erf(width / math.sqrt(2))
        assert ((share - expected).abs() < 5 * math.sqrt(expected * (1 - expected) / draws)).all()
    assert (means[0] - means[1]).abs().min() > 0.1, "this could not see a policy that ignores the observation"


def test_without_noise_the_mean_is_taken(agent):
    observations = torch.randn(1000, INPUTS)
    means = opinionated(agent).actor(agent.normalize(observations))
    assert torch.equal(agent.act(observations, 0.0), means)
    assert (means.std(0) > 0.1).all()


def test_forward_agrees_with_torch_distributions(agent):
    """Log-probability and entropy, also of a rollout [T, N] at once; the value sees the same normalized inputs."""
    observations, actions = torch.randn(50, 3, INPUTS), torch.randn(50, 3, ACTIONS)
    logprobs, entropies, values = opinionated(agent)(observations, actions)
    assert logprobs.shape == entropies.shape == values.shape == (50, 3)
    statistics = agent.observation_statistics
    normalized = (observations - statistics.mean) / statistics.std
    distribution = Independent(Normal(agent.actor(normalized), agent.log_std.exp()), 1)
    torch.testing.assert_close(logprobs, distribution.log_prob(actions), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropies, distribution.entropy())
    torch.testing.assert_close(values, agent.critic(normalized)[..., 0])
    assert torch.equal(values, agent.value(observations))


@given(st.lists(st.floats(-12, 8), min_size=ACTIONS, max_size=ACTIONS), st.integers(0, 2**31))
@settings(deadline=None)
def test_density_and_entropy_in_closed_form(log_stds, seed):
    """-sum((a - m)^2 / 2 s^2 + ln s + ln(2 pi) / 2) and sum(ln s + (1 + ln(2 pi)) / 2), for tiny and huge s, too."""
    torch.manual_seed(seed)
    agent, observation, noise = make_agent(), torch.randn(1, INPUTS), 3 * torch.randn(1, ACTIONS)
    with torch.no_grad():
        agent.actor[-1].weight.zero_()  # a mean of 0: otherwise its rounding would hide small deviations from it
        agent.log_std.copy_(torch.tensor(log_stds))
        action = agent.act(observation, noise)
        logprobs, entropies, _ = agent(observation, action)
    stds = [math.exp(x) for x in agent.log_std.tolist()]
    logprob = sum(
        -((a / s) ** 2) / 2 - math.log(s * math.sqrt(2 * math.pi))
        for a, s in zip(action[0].tolist(), stds, strict=True)
    )
    entropy = sum((1 + math.log(2 * math.pi * s**2)) / 2 for s in stds)
    assert logprobs.item() == pytest.approx(logprob, rel=1e-5, abs=1e-4)
    assert entropies.item() == pytest.approx(entropy, rel=1e-5, abs=1e-4)


def test_density_integrates_to_1(agent):
    """Over a fine grid of actions, two components held at their means: what is left is one normal density."""
    opinionated(agent)
    observation = torch.randn(1, INPUTS)
    with torch.no_grad():
        mean = agent.act(observation, 0.0)
        others = agent(observation, mean)[0] + agent.log_std[0] + 0.5 * math.log(2 * math.pi)
        grid = mean.repeat(20_001, 1)
        grid[:, 0] += torch.linspace(-2, 2, 20_001)
        density = (agent(observation.expand(20_001, -1), grid)[0].double() - others).exp()
    assert torch.trapezoid(density, grid[:, 0].double()).item() == pytest.approx(1, abs=1e-4)


def test_gradients_agree_with_torch_distributions(agent):
    """Of log-probabilities, entropies and values together, with respect to every parameter."""
    opinionated(agent)
    observations, actions = torch.randn(64, INPUTS), torch.randn(64, ACTIONS)
    weights = torch.randn(3, 64)
    sum((w * x).sum() for w, x in zip(weights, agent(observations, actions), strict=True)).backward()
    replica = copy.deepcopy(agent).double()
    replica.zero_grad()
    normalized = replica.normalize(observations.double())
    policy = Independent(Normal(replica.actor(normalized), replica.log_std.exp()), 1)
    outputs = policy.log_prob(actions.double()), policy.entropy(), replica.critic(normalized)[:, 0]
    sum((w * x).sum() for w, x in zip(weights, outputs, strict=True)).backward()
    for (name, parameter), expected in zip(agent.named_parameters(), replica.parameters(), strict=True):
        assert expected.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad.double(), expected.grad, rtol=1e-3, atol=1e-3, msg=name)


# --------------------------------------------------------------------------------- the statistics


@st.composite
def chunks(draw):
    """What is seen chunk by chunk, [N, 4] each: a constant component, a changing one, an offset, any scale."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    offset, scale = draw(st.floats(-1000, 1000)), 10 ** draw(st.floats(-2, 4))
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    drawn = []
    for i, size in enumerate(sizes):
        x = rng.standard_normal((size, 4))
        x[:, 0] = offset  # never changes
        x[:, 1] = i  # changes from chunk to chunk alone
        x[:, 2] += offset
        x[:, 3] *= scale
        drawn.append(torch.tensor(x, dtype=torch.float32))
    return drawn


@given(chunks())
@settings(deadline=None)
def test_statistics_are_those_of_all_that_was_seen(drawn):
    """Whatever the chunks: mean and standard deviation (the population's) of their union, computed in float64.

    The latter is at least 1e-4.
    """
    statistics = ppo.RunningStatistics(4)
    for x in drawn:
        statistics.update(x)
    seen = torch.cat(drawn).double().numpy()
    assert statistics.count == len(seen)
    size = np.abs(seen).max(0)
    assert (np.abs(statistics.mean.numpy() - seen.mean(0)) <= 1e-6 * size + 1e-12).all()
    expected = seen.std(0)
    raised = np.hypot(expected, 1e-4)  # what was raised to 1e-4 while nothing changed counts for ever, by its share
    error = 1e-5 * expected + 1e-6 * size
    assert (statistics.std.numpy() >= np.maximum(expected - error, 0.9999e-4)).all()
    assert (statistics.std.numpy() <= raised + error).all()


@given(st.floats(-1e5, 1e5), st.integers(0, 2**31))
@settings(deadline=None)
def test_statistics_far_from_zero(offset, seed):
    """A standard deviation of 1 around a large number is still seen: variances are not differences of squares."""
    rng = np.random.default_rng(seed)
    statistics = ppo.RunningStatistics(1)
    drawn = [torch.tensor(offset + rng.standard_normal((100, 1)), dtype=torch.float64) for _ in range(20)]
    for x in drawn:
        statistics.update(x)
    seen = torch.cat(drawn).numpy()
    assert statistics.mean.item() == pytest.approx(seen.mean(), rel=1e-7, abs=0.02)
    assert statistics.std.item() == pytest.approx(seen.std(), rel=0.002)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=30), st.integers(1, 29))
@settings(deadline=None)
def test_statistics_of_single_numbers(values, cut):
    """As for returns: a scalar mean and standard deviation, the first chunk perhaps a single number."""
    assume(cut < len(values))
    statistics = ppo.RunningStatistics()
    statistics.update(torch.tensor(values[:cut]))
    statistics.update(torch.tensor(values[cut:], dtype=torch.float64))
    assert statistics.mean.shape == statistics.std.shape == ()
    assert statistics.mean.item() == pytest.approx(np.mean(values), rel=1e-5, abs=1e-4)
    assert statistics.std.item() == pytest.approx(max(np.std(values), 1e-4), rel=1e-4, abs=1e-3)


def test_statistics_do_not_forget_and_do_not_tire():
    """After 2000 small chunks, the first has the weight of the last."""
    torch.manual_seed(1)
    drawn = torch.randn(2000, 8, 2) * torch.tensor([1.0, 50.0]) + torch.linspace(-3, 3, 2000)[:, None, None]
    statistics = ppo.RunningStatistics(2)
    for x in drawn:
        statistics.update(x)
    seen = drawn.flatten(0, 1).double()
    torch.testing.assert_close(statistics.mean.double(), seen.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics.std.double(), seen.std(0, correction=0), rtol=1e-4, atol=0)


def test_what_never_changes_is_seen_as_zero():
    """And once it does change, by more than can have been noise, as the largest input there is."""
    agent = make_agent()
    agent.observation_statistics.update(torch.full((50, INPUTS), 7.3))
    assert torch.equal(agent.normalize(torch.full((1, INPUTS), 7.3)), torch.zeros(1, INPUTS))
    assert torch.equal(agent.normalize(torch.full((1, INPUTS), 7.4)), torch.full((1, INPUTS), 10.0))


def test_observations_are_normalized_and_clipped_at_10(agent):
    """(x - mean) / std, component by component; the clipping comes after the division."""
    seen = torch.randn(200, INPUTS) * torch.tensor([0.01, 0.1, 1, 10, 100]) + torch.tensor([0, 1, -2, 50, 0])
    agent.observation_statistics.update(seen)
    mean, std = seen.double().mean(0), seen.double().std(0, correction=0)
    torch.testing.assert_close(agent.normalize(seen).double(), (seen - mean) / std, rtol=1e-4, atol=1e-3)
    deviations = torch.tensor([[-1000.0], [-10.5], [-9.9], [9.9], [10.5], [1000]])
    expected = torch.tensor([[-10], [-10], [-9.9], [9.9], [10], [10]]).expand(6, INPUTS)
    observations = (mean + deviations * std).float()
    torch.testing.assert_close(agent.normalize(observations), expected, rtol=1e-3, atol=0)
    # all that sees observations sees them so: what lies beyond the clipping makes no difference
    near, far = ((mean + x * std).float()[None] for x in (10.5, 1000))
    action = torch.randn(1, ACTIONS)
    with torch.no_grad():
        agent.actor[-1].weight.mul_(300)
        assert torch.equal(agent.act(near, 0.0), agent.act(far, 0.0))
        assert torch.equal(agent.value(near), agent.value(far))
        assert all(map(torch.equal, agent(near, action), agent(far, action)))


def test_rewards_are_divided_by_the_standard_deviation_of_returns_and_clipped_at_10(agent):
    """Not centred: a reward of 0 stays 0, and each keeps its sign."""
    returns = 5 + 4 * torch.randn(300)
    agent.return_statistics.update(returns)
    std = returns.double().std(correction=0).item()
    rewards = torch.tensor([[0.0, 1.0, -1.0], [9.9 * std, 10.1 * std, -1000 * std]])
    expected = torch.tensor([[0, 1 / std, -1 / std], [9.9, 10, -10]])
    torch.testing.assert_close(agent.scale_rewards(rewards), expected, rtol=1e-5, atol=0)


def test_statistics_are_loaded_with_the_weights(agent):
    """A fresh agent that loads the state sees, acts and values as the one that was saved."""
    opinionated(agent)
    other, observations, noise = make_agent(), torch.randn(10, INPUTS), torch.randn(10, ACTIONS)
    other.load_state_dict(agent.state_dict())
    assert torch.equal(other.act(observations, noise), agent.act(observations, noise))
    assert torch.equal(other.value(observations), agent.value(observations))
    assert torch.equal(other.scale_rewards(observations), agent.scale_rewards(observations))
    for of in ("observation", "return"):
        own, loaded = (getattr(x, f"{of}_statistics") for x in (agent, other))
        assert own.count == loaded.count == 100
        for x in (own, loaded):
            x.update(torch.ones(7, *x.mean.shape))
        assert torch.equal(own.mean, loaded.mean)
        assert torch.equal(own.std, loaded.std)


def test_training_learns_the_parameters_and_nothing_else():
    """Every parameter has moved, log_std, too; Adam knows of as many numbers as there are in the parameters."""
    flags = {"env_id": "Pendulum-v1", "num_steps": 64, "num_minibatches": 4, "total_timesteps": 64}
    run_dir = train(ppo, **flags)
    torch.manual_seed(1)
    envs = gym.make_vec("Pendulum-v1", 1)
    before, after = ppo.Agent(envs), load(run_dir)["agent"]
    assert all(not torch.equal(x, after[name]) for name, x in before.named_parameters())
    assert after["log_std"].abs().max() > 1e-4
    (state,) = load(run_dir)["optimizer"]["state"].values()
    assert state["exp_avg"].numel() == sum(x.numel() for x in before.parameters())
