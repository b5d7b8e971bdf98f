"""The Atari agent: the network against the Nature-CNN written out, bfloat16, and what a rollout stores."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import curves, load, same_weights, train

import ppo_atari

torch.set_num_threads(1)  # tests run in parallel
SEQUENCE = ("trunk.0", "trunk.2", "trunk.4", "trunk.7")  # the layers with weights: three convolutions, one Linear
HAS_BFLOAT16 = any("bf16" in name and has is True for name, has in torch.cpu.get_capabilities().items())
needs_bfloat16 = pytest.mark.skipif(not HAS_BFLOAT16, reason="no bfloat16 in this processor")
# 3 iterations of 32 steps; the high learning rate makes the policy change a lot from one to the next
TINY = {"num_envs": 2, "num_steps": 16, "total_timesteps": 96, "learning_rate": 0.02, "anneal_lr": False}
TINY |= {"env_kwargs": ("max_num_frames_per_episode=40",)}


def make_agent(bfloat16=False, **flags):
    """An agent as at the start of training."""
    torch.manual_seed(1)
    envs = ppo_atari.make_envs(ppo_atari.Args(**flags), 1)
    agent = ppo_atari.Agent(envs, bfloat16)
    envs.close()
    return agent


def with_preferences(agent):
    """The agent with clear preferences that depend on the observation, and with biases other than zero."""
    with torch.no_grad():
        for name, parameter in agent.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.1, 0.1)
        agent.actor.weight.mul_(300)
    return agent


def channels_last(frames):
    """Observations as the agent takes them, [N, height, width, stack], of frames [N, stack, height, width]."""
    return frames.permute(0, 2, 3, 1)


def random_frames(num, shape=(4, 84, 84)):
    """Frames as the environments return them, [num, stack, height, width]; each is darker than the one before."""
    frames = torch.randint(256, (num, *shape), generator=torch.Generator().manual_seed(2))
    return (frames * torch.linspace(1, 0.2, num).view(-1, 1, 1, 1)).byte()


def nature_cnn(agent, frames):
    """Features, logits and values by the network of the DQN paper, from frames [N, stack, height, width]."""
    weights = dict(agent.named_parameters())
    x = frames.to(agent.critic.weight.dtype) / 255
    for name, stride in zip(SEQUENCE[:3], (4, 2, 1), strict=True):
        x = F.relu(F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=stride))
    features = F.relu(F.linear(x.flatten(1), weights["trunk.7.weight"], weights["trunk.7.bias"]))
    logits = F.linear(features, weights["actor.weight"], weights["actor.bias"])
    values = F.linear(features, weights["critic.weight"], weights["critic.bias"])
    return features, logits, values[:, 0]


# ----------------------------------------------------------------------------------- the network


def test_shapes_and_initial_weights():
    """Nature-CNN; orthogonal weights (W W^T = gain^2 I) with gain sqrt 2, actor 0.01, critic 1; zero biases."""
    weights = make_agent().state_dict()
    shapes = {
        "trunk.0": (32, 4, 8, 8),
        "trunk.2": (64, 32, 4, 4),
        "trunk.4": (64, 64, 3, 3),
        "trunk.7": (512, 3136),
        "actor": (4, 512),  # the actions of Breakout
        "critic": (1, 512),
    }
    assert weights.keys() == {f"{name}.{kind}" for name in shapes for kind in ("weight", "bias")}
    gains = {**dict.fromkeys(SEQUENCE, math.sqrt(2)), "actor": 0.01, "critic": 1.0}
    for name, gain in gains.items():
        assert weights[f"{name}.weight"].shape == shapes[name]
        W = weights[f"{name}.weight"].flatten(1)
        torch.testing.assert_close(W @ W.T, gain**2 * torch.eye(len(W)), rtol=0, atol=2e-5 * gain**2)
        assert torch.equal(weights[f"{name}.bias"], torch.zeros(shapes[name][0]))


@pytest.mark.parametrize(
    "env_kwargs", [(), ("stack_num=2", "img_height=105", "img_width=80", "full_action_space=True")]
)
def test_outputs_are_those_of_the_network_written_out(env_kwargs):
    """Features, actions, values, log-probabilities and entropies, also for other images and more actions."""
    agent = with_preferences(make_agent(env_kwargs=env_kwargs))
    frames, actions = random_frames(8, (2, 105, 80) if env_kwargs else (4, 84, 84)), torch.arange(8) % 4
    batch, draws = {"observations": channels_last(frames), "actions": actions}, 2000
    with torch.no_grad():
        features, logits, values = nature_cnn(agent, frames)
        outputs = agent.features(batch["observations"])
        logprobs, entropies, agent_values = agent.evaluate_actions(batch)
        given = agent.evaluate_actions({"features": outputs, "actions": actions})  # without observations
        assert all(map(torch.equal, given, (logprobs, entropies, agent_values)))
        assert torch.equal(agent.value(outputs), agent_values)
        greedy_actions = agent.act(outputs, greedy=True)
        samples = agent.act(outputs.repeat(draws, 1)).view(draws, 8)
    assert torch.equal(greedy_actions, logits.argmax(-1))
    shares, expected = F.one_hot(samples, logits.shape[1]).double().mean(0), logits.softmax(-1)
    assert ((shares - expected).abs() < 5 * (expected * (1 - expected) / draws).sqrt() + 1e-3).all()
    assert (expected - 1 / logits.shape[1]).abs().max() > 0.1, "uniform actions would pass"
    distribution = torch.distributions.Categorical(logits=logits)
    assert logits.shape == (8, 18 if env_kwargs else 4)
    torch.testing.assert_close(outputs, features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(agent_values, values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logprobs, distribution.log_prob(actions), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropies, distribution.entropy(), rtol=1e-4, atol=1e-4)
    assert features.std(0).mean() > 0.01 and values.std() > 0.01, "the observations make no difference"
    assert distribution.entropy().std() > 1e-3


@pytest.mark.parametrize("bfloat16", [False, True])
def test_pixels_are_scaled(bfloat16):
    """Each byte k becomes k / 255, up to one rounding in float32 and within two of the 8 bits of bfloat16."""
    observations = torch.arange(2 * 84 * 84 * 4).view(2, 84, 84, 4).remainder(256).byte()
    before, inputs = observations.clone(), []
    agent = make_agent(bfloat16)
    agent.trunk.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    agent.features(observations)
    (pixels,) = inputs
    assert torch.equal(observations, before)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert pixels.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
    expected = observations.double().permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(pixels.double(), expected, rtol=2**-7 if bfloat16 else 2**-23, atol=0)


# ---------------------------------------------------------------------------------------- bfloat16


def test_bfloat16_is_close_to_float32():
    """Features within 2 % of the largest one; heads, outputs, weights and gradients stay float32."""
    agents = [with_preferences(make_agent(bfloat16)) for bfloat16 in (False, True)]
    agents[1].load_state_dict(agents[0].state_dict())
    observations, actions = channels_last(random_frames(8)), torch.arange(8) % 4
    features = [agent.features(observations) for agent in agents]
    assert features[1].dtype == torch.float32
    error = (features[1] - features[0]).abs().max() / features[0].abs().max()
    assert 1e-5 < error < 0.02
    batch = {"observations": observations, "actions": actions}
    exact, rounded = (agent.evaluate_actions(batch) for agent in agents)
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(b, a, rtol=0.05, atol=0.05)
    sum(x.sum() for x in rounded).backward()
    assert {x.dtype for p in agents[1].parameters() for x in (p, p.grad)} == {torch.float32}
    batch = {"features": features[1].detach(), "actions": actions}  # the heads of both agents compute the same
    assert all(map(torch.equal, *(agent.evaluate_actions(batch) for agent in agents)))


@needs_bfloat16
def test_bfloat16_is_a_choice():
    """A run in bfloat16 has nearly, but not exactly, the losses of one in float32. Both save float32 weights."""
    flags = TINY | {"total_timesteps": 32, "learning_rate": 2.5e-4}
    runs = [train(ppo_atari, **flags, bfloat16=x) for x in (True, False)]
    assert not same_weights(*map(load, runs))
    for name in ("policy_loss", "value_loss", "entropy"):
        first, second = (curves(run_dir)[f"losses/{name}"][0][1] for run_dir in runs)
        assert first == pytest.approx(second, abs=0.05), name
    assert all(weight.dtype == torch.float32 for weight in load(runs[0])["agent"].values())


# ------------------------------------------------------------------------------------- the rollout


@pytest.mark.parametrize("bfloat16", [False, pytest.param(True, marks=needs_bfloat16)])
def test_the_features_of_the_rollout_are_those_of_learning(bfloat16, monkeypatch):
    """The first update of an iteration finds the probability ratio 1 and the values of the rollout."""
    dtypes, outputs = set(), []
    features, evaluate_actions = ppo_atari.Agent.features, ppo_atari.Agent.evaluate_actions

    def noted_features(self, observations):
        dtypes.add(observations.dtype)
        return features(self, observations)

    def noted_evaluation(self, batch):
        result = evaluate_actions(self, batch)
        outputs.append([x.detach().flatten().sort().values for x in result])  # in learning, steps are shuffled
        return result

    monkeypatch.setattr(ppo_atari.Agent, "features", noted_features)
    monkeypatch.setattr(ppo_atari.Agent, "evaluate_actions", noted_evaluation)
    train(ppo_atari, **TINY, num_minibatches=1, update_epochs=2, bfloat16=bfloat16)
    assert dtypes == {torch.uint8}, "one byte for each pixel"
    assert len(outputs) == 3 * (1 + 2)
    tolerance = {"rtol": 0.02, "atol": 0.02} if bfloat16 else {"rtol": 1e-3, "atol": 1e-4}
    for rollout, first, second in zip(outputs[::3], outputs[1::3], outputs[2::3], strict=True):
        for a, b, c in zip(rollout, first, second, strict=True):
            torch.testing.assert_close(a, b, **tolerance)
            assert (a - c).abs().max() > (a - b).abs().max(), "after the first update, they differ"
