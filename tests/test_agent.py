"""The networks: how they start, how they choose, what they say about a choice."""

import math

import numpy as np
import pytest
import torch

import ppo


@pytest.fixture
def agent():
    """An agent for CartPole, as training starts with."""
    torch.manual_seed(1)
    envs = ppo.make_envs(ppo.Args(), 1)
    yield ppo.Agent(envs)
    envs.close()


def opinionated(agent):
    """The agent with a clear preference, observation by observation."""
    with torch.no_grad():
        agent.actor[-1].weight.mul_(300)
    return agent


@pytest.mark.parametrize("network", ["actor", "critic"])
def test_orthogonal_initialisation(agent, network):
    """W W^T = gain^2 I (of the shorter side), zero biases: gains sqrt 2, sqrt 2, then 0.01 or 1."""
    layers = [layer for layer in getattr(agent, network) if isinstance(layer, torch.nn.Linear)]
    gains = [math.sqrt(2), math.sqrt(2), 0.01 if network == "actor" else 1.0]
    assert [layer.out_features for layer in layers] == [64, 64, 2 if network == "actor" else 1]
    for layer, gain in zip(layers, gains, strict=True):
        W = layer.weight.detach()
        gram = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
        torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram)), rtol=0, atol=1e-5 * gain**2)
        assert not layer.bias.any()


def test_actor_and_critic_share_nothing(agent):
    """The value does not change with the actor's weights, nor the policy with the critic's."""
    observation = torch.randn(1, 4)
    assert {id(p) for p in agent.actor.parameters()}.isdisjoint(id(p) for p in agent.critic.parameters())
    assert len(list(agent.parameters())) == len(list(agent.actor.parameters())) + len(list(agent.critic.parameters()))
    value = agent.value(observation)
    with torch.no_grad():
        for p in agent.actor.parameters():
            p.add_(1.0)
    assert torch.equal(agent.value(observation), value)


def test_actions_are_drawn_from_the_softmax_of_the_logits(agent):
    """Frequencies of 100,000 draws for each of 3 observations, within 5 standard errors."""
    draws, observations = 100_000, torch.tensor([[1.0, 0, 0, 0], [-0.5, -1.0, 0, 0.5], [0, 0, 2.0, -1.0]])
    noise = agent.sample_noise(draws, 3)
    assert noise.shape == (draws, 3, 2)
    with torch.no_grad():
        expected = opinionated(agent).actor(observations).softmax(-1)[:, 1]
        actions = agent.act(observations, noise)
    assert actions.dtype == torch.int64
    errors = (expected * (1 - expected) / draws).sqrt()
    assert ((actions.double().mean(0) - expected).abs() < 5 * errors).all()
    assert ((expected - 0.5).abs() > 20 * errors).all(), "this could not see a policy that ignores the logits"


def test_noise_is_standard_gumbel_and_new_for_every_action(agent):
    """Its mean is Euler's constant and its variance pi^2 / 6; no two columns go together."""
    noise = agent.sample_noise(50_000, 2).flatten(1).double()
    assert noise.isfinite().all()
    assert noise.mean(0) == pytest.approx(np.full(4, 0.5772), abs=5 * math.sqrt(math.pi**2 / 6 / 50_000))
    assert noise.var(0) == pytest.approx(np.full(4, math.pi**2 / 6), rel=0.05)
    assert (torch.corrcoef(noise.T) - torch.eye(4)).abs().max() < 5 / math.sqrt(50_000)


def test_without_noise_the_likeliest_action_is_taken(agent):
    observations = torch.randn(1000, 4)
    likeliest = opinionated(agent).actor(observations).argmax(-1)
    assert torch.equal(agent.act(observations, 0.0), likeliest)
    assert len(likeliest.unique()) == 2


def test_forward_agrees_with_torch_distributions(agent):
    """Log-probability and entropy, also of a rollout [T, N] at once."""
    observations, actions = torch.randn(5, 3, 4), torch.randint(2, (5, 3))
    logprobs, entropies, values = opinionated(agent)(observations, actions)
    distribution = torch.distributions.Categorical(logits=agent.actor(observations))
    torch.testing.assert_close(logprobs, distribution.log_prob(actions))
    torch.testing.assert_close(entropies, distribution.entropy())
    torch.testing.assert_close(values, agent.critic(observations)[..., 0])
    assert values.shape == (5, 3)


def test_entropy_is_finite_where_the_policy_is_certain(agent):
    """0 log 0 is 0."""
    with torch.no_grad():
        agent.actor[-1].bias[0] = 1e4
    _, entropies, _ = agent(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))
    assert entropies.tolist() == [0]
