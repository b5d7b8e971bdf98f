"""The agent of ppo.py: initial weights, actions, log-probabilities and entropies."""

import math

import pytest
import torch

import ppo


@pytest.fixture
def agent():
    """An untrained agent for CartPole."""
    torch.manual_seed(1)
    envs = ppo.make_envs(ppo.Args(), 1)
    yield ppo.Agent(envs)
    envs.close()


@pytest.fixture
def decided(agent):
    """An agent whose probabilities are far from 1/2 and depend on the observation."""
    with torch.no_grad():
        agent.actor[-1].weight.mul_(300)
    return agent


@pytest.mark.parametrize("network", ["actor", "critic"])
def test_orthogonal_initialization(agent, network):
    """W W^T = gain^2 I (of the shorter side), zero biases: gains sqrt 2, sqrt 2, then 0.01 or 1."""
    layers = [layer for layer in getattr(agent, network) if isinstance(layer, torch.nn.Linear)]
    gains = [math.sqrt(2), math.sqrt(2), 0.01 if network == "actor" else 1.0]
    assert [layer.out_features for layer in layers] == [64, 64, 2 if network == "actor" else 1]
    for layer, gain in zip(layers, gains, strict=True):
        W = layer.weight.detach()
        gram = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
        torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram)), rtol=0, atol=1e-5 * gain**2)
        assert not layer.bias.any()


def test_actions_are_sampled_from_the_softmax_of_the_logits(decided):
    """Frequencies of 100,000 samples for each of 3 observations, within 5 standard errors; no sample tells another."""
    draws, observations = 100_000, torch.tensor([[1.0, 0, 0, 0], [-0.5, -1.0, 0, 0.5], [0, 0, 2.0, -1.0]])
    with torch.no_grad():
        expected = decided.actor(observations).softmax(-1)[:, 1]
        actions = decided.act(observations.repeat(draws, 1)).view(draws, 3)
    assert actions.dtype == torch.int64
    errors = (expected * (1 - expected) / draws).sqrt()
    assert ((actions.double().mean(0) - expected).abs() < 5 * errors).all()
    assert ((expected - 0.5).abs() > 20 * errors).all(), "uniform actions would pass"
    neighbours = torch.cat([actions[1:], actions[:-1]], dim=1).T.double()
    assert (torch.corrcoef(neighbours) - torch.eye(6)).abs().max() < 5 / math.sqrt(draws)


def test_samples_depend_on_the_seed_of_torch_alone(agent):
    observations, samples = torch.zeros(100, 4), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(agent.act(observations))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_agrees_with_torch_distributions(decided):
    """Log-probabilities, entropies and values of a rollout [T, N], and the greedy actions."""
    observations, actions = torch.randn(50, 3, 4), torch.randint(2, (50, 3))
    logprobs, entropies, values = decided.evaluate_actions({"observations": observations, "actions": actions})
    distribution = torch.distributions.Categorical(logits=decided.actor(observations))
    torch.testing.assert_close(logprobs, distribution.log_prob(actions))
    torch.testing.assert_close(entropies, distribution.entropy())
    torch.testing.assert_close(values, decided.critic(observations)[..., 0])
    torch.testing.assert_close(values, decided.value(observations))
    assert values.shape == (50, 3)
    assert torch.equal(decided.act(observations, greedy=True), distribution.mode)
    assert len(distribution.mode.unique()) == 2
