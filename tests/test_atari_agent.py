"""The Atari agent: the network against the Nature-CNN written out, how it starts, how it chooses, what it stores."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import ppo_atari

SEQUENCE = ("trunk.0", "trunk.2", "trunk.4", "trunk.7")  # the layers with weights: three convolutions, one Linear


def make_agent(bfloat16=False, **flags):
    """An agent as training starts with."""
    torch.manual_seed(1)
    envs = ppo_atari.make_envs(ppo_atari.Args(**flags), 1)
    agent = ppo_atari.Agent(envs, bfloat16)
    envs.close()
    return agent


def opinionated(agent):
    """The agent with a clear preference, observation by observation, and with biases that matter."""
    with torch.no_grad():
        for name, parameter in agent.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.1, 0.1)
        agent.actor.weight.mul_(300)
    return agent


def channels_last(frames):
    """Observations as the agent takes them, [N, height, width, stack], of frames [N, stack, height, width]."""
    return frames.permute(0, 2, 3, 1)


def random_frames(num, shape=(4, 84, 84), seed=2):
    """What the environments return: bytes, [num, stack, height, width]; each image is darker than the last."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(256, (num, *shape), generator=generator)
    return (frames * torch.linspace(1, 0.2, num).view(-1, 1, 1, 1)).byte()


def nature_cnn(agent, frames):
    """Features, logits and values by the network of the DQN paper, from frames [N, stack, height, width]."""
    weights = agent.state_dict()
    x = frames.float() / 255
    for name, stride in zip(SEQUENCE[:3], (4, 2, 1), strict=True):
        x = F.relu(F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=stride))
    features = F.relu(F.linear(x.flatten(1), weights["trunk.7.weight"], weights["trunk.7.bias"]))
    logits = F.linear(features, weights["actor.weight"], weights["actor.bias"])
    values = F.linear(features, weights["critic.weight"], weights["critic.bias"])
    return features, logits, values[:, 0]


# ----------------------------------------------------------------------------------- the network


def test_layers_are_those_of_the_nature_cnn():
    """Shapes and number of weights; Breakout has 4 actions."""
    shapes = {name: tuple(parameter.shape) for name, parameter in make_agent().named_parameters()}
    assert shapes == {
        "trunk.0.weight": (32, 4, 8, 8),
        "trunk.0.bias": (32,),
        "trunk.2.weight": (64, 32, 4, 4),
        "trunk.2.bias": (64,),
        "trunk.4.weight": (64, 64, 3, 3),
        "trunk.4.bias": (64,),
        "trunk.7.weight": (512, 3136),
        "trunk.7.bias": (512,),
        "actor.weight": (4, 512),
        "actor.bias": (4,),
        "critic.weight": (1, 512),
        "critic.bias": (1,),
    }
    assert sum(map(math.prod, shapes.values())) == 1_686_693


@pytest.mark.parametrize(
    "env_kwargs", [(), ("stack_num=2", "img_height=105", "img_width=80", "full_action_space=True")]
)
def test_outputs_are_those_of_the_network_written_out(env_kwargs):
    """Features, logits and values, in float32 up to rounding; also of other images and more actions."""
    agent = opinionated(make_agent(env_kwargs=env_kwargs))
    shape = (2, 105, 80) if env_kwargs else (4, 84, 84)
    frames = random_frames(5, shape)
    with torch.no_grad():
        features, logits, values = nature_cnn(agent, frames)
        observations = channels_last(frames)
        assert features.shape == (5, 512)
        assert logits.shape == (5, 18 if env_kwargs else 4)
        assert features.std(0).mean() > 0.01 and values.std() > 0.01, "observations would not matter"
        torch.testing.assert_close(agent.features(observations), features, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(agent.actor(agent.features(observations)), logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(agent.value(observations), values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_pixels_are_scaled(bfloat16):
    """Every byte k becomes k / 255: up to one rounding in float32, within two of bfloat16's 8 bits there."""
    observations = torch.arange(2 * 84 * 84 * 4).view(2, 84, 84, 4).remainder(256).byte()
    before, seen = observations.clone(), []
    agent = make_agent(bfloat16)
    agent.trunk.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    agent.features(observations)
    (pixels,) = seen
    assert torch.equal(observations, before)
    assert pixels.shape == (2, 4, 84, 84)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert pixels.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
    expected = observations.double().permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(pixels.double(), expected, rtol=2**-7 if bfloat16 else 2**-23, atol=0)
    assert (pixels.min(), pixels.max()) == (0, 1)


def test_orthogonal_initialisation():
    """W W^T = gain^2 I, zero biases: gain sqrt 2 in the trunk, 0.01 for the actor and 1 for the critic."""
    agent = make_agent()
    gains = {**dict.fromkeys(SEQUENCE, math.sqrt(2)), "actor": 0.01, "critic": 1.0}
    weights = agent.state_dict()
    assert weights.keys() == {f"{name}.{kind}" for name in gains for kind in ("weight", "bias")}
    for name, gain in gains.items():
        W = weights[f"{name}.weight"].flatten(1)
        torch.testing.assert_close(W @ W.T, gain**2 * torch.eye(len(W)), rtol=0, atol=2e-5 * gain**2)
        assert not weights[f"{name}.bias"].any()


def test_actor_and_critic_share_the_trunk_and_nothing_else():
    """Each output has a gradient for the trunk and its own head; the other head it does not know."""
    agent = make_agent()
    observations, actions = channels_last(random_frames(2)), torch.tensor([0, 1])
    assert {name.split(".")[0] for name, _ in agent.named_parameters()} == {"trunk", "actor", "critic"}
    for output, own, other in ((0, "actor", "critic"), (1, "actor", "critic"), (2, "critic", "actor")):
        agent.zero_grad()
        agent(observations, actions)[output].sum().backward()
        touched = {name for name, p in agent.named_parameters() if p.grad is not None and p.grad.any()}
        expected = {name for name, _ in agent.named_parameters() if not name.startswith(other)}
        assert touched == expected, own


# ------------------------------------------------------------------------------------ what it does


def test_actions_are_drawn_from_the_softmax_of_the_logits():
    """Frequencies of 50,000 draws for each of 3 observations, within 5 standard errors."""
    draws, agent, frames = 50_000, opinionated(make_agent()), random_frames(3)
    noise = agent.sample_noise(draws, 3)
    assert noise.shape == (draws, 3, 4)
    with torch.no_grad():
        expected = nature_cnn(agent, frames)[1].softmax(-1)
        actions, features = agent.act(channels_last(frames), noise)
    assert actions.dtype == torch.int64
    torch.testing.assert_close(features, nature_cnn(agent, frames)[0], rtol=1e-4, atol=1e-5)
    frequencies = F.one_hot(actions, 4).double().mean(0)
    errors = (expected * (1 - expected) / draws).sqrt()
    assert ((frequencies - expected).abs() < 5 * errors + 1e-6).all()
    assert ((expected - 0.25).abs() > 20 * errors).any(-1).all(), "this could not see a policy that ignores the logits"


def test_without_noise_the_likeliest_action_is_taken():
    agent, frames = opinionated(make_agent()), torch.cat([random_frames(20), random_frames(20, seed=3)])
    with torch.no_grad():
        agent.actor.bias.sub_(nature_cnn(agent, frames)[1].mean(0))  # so that each action is the likeliest somewhere
        likeliest = nature_cnn(agent, frames)[1].argmax(-1)
        assert torch.equal(agent.act(channels_last(frames), 0.0)[0], likeliest)
    assert len(likeliest.unique()) > 1


def test_forward_agrees_with_torch_distributions():
    """Log-probabilities, entropies and values."""
    agent, frames, actions = opinionated(make_agent()), random_frames(8), torch.arange(8) % 4
    with torch.no_grad():
        logprobs, entropies, values = agent(channels_last(frames), actions)
        _, logits, expected_values = nature_cnn(agent, frames)
    distribution = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(logprobs, distribution.log_prob(actions), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropies, distribution.entropy(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values, expected_values, rtol=1e-4, atol=1e-5)
    assert distribution.entropy().std() > 1e-3


def test_entropy_is_finite_where_the_policy_is_certain():
    """0 log 0 is 0."""
    agent = make_agent()
    with torch.no_grad():
        agent.actor.bias[0] = 1e4
        _, entropies, _ = agent(channels_last(random_frames(1)), torch.zeros(1, dtype=torch.int64))
    assert entropies.tolist() == [0]


# ---------------------------------------------------------------------------------------- bfloat16


def test_bfloat16_is_close_to_float32():
    """Within 2 % of the largest feature, and with heads, outputs, weights and gradients that stay float32.

    bfloat16 has 8 bits of precision, each of four layers rounds to 0.4 %.
    """
    agents = [opinionated(make_agent(bfloat16)) for bfloat16 in (False, True)]
    agents[1].load_state_dict(agents[0].state_dict())
    frames, actions = random_frames(8), torch.arange(8) % 4
    features = [agent.features(channels_last(frames)) for agent in agents]
    assert features[1].dtype == torch.float32
    error = (features[1] - features[0]).abs().max() / features[0].abs().max()
    assert 1e-5 < error < 0.02, "either not bfloat16 at all, or wrong"
    exact, rounded = (agent(channels_last(frames), actions) for agent in agents)
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(b, a, rtol=0.05, atol=0.05)
    sum(x.sum() for x in rounded).backward()
    assert {x.dtype for p in agents[1].parameters() for x in (p, p.grad)} == {torch.float32}
    # the heads compute in float32: from the very same features, the outputs are the same to the bit
    with torch.no_grad():
        assert torch.equal(agents[1].value(channels_last(frames)), agents[0].critic(features[1]).squeeze(-1))


def test_a_copy_with_a_bfloat16_trunk_computes_the_same():
    """Converting the weights once, as train() does for the rollout, is what autocast does each time."""
    agent = opinionated(make_agent(bfloat16=True))
    player = copy.deepcopy(agent).requires_grad_(False)
    player.trunk.bfloat16()
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    player.load_state_dict(agent.state_dict())
    assert player.trunk[0].weight.dtype == torch.bfloat16
    assert player.actor.weight.dtype == player.critic.weight.dtype == torch.float32
    observations, noise = channels_last(random_frames(16)), agent.sample_noise(1, 16)[0]
    with torch.inference_mode():
        features = agent.features(observations)
        assert torch.equal(player.features(observations), features)
        assert torch.equal(player.value(observations), agent.value(observations))
        for ours, theirs in zip(player.act(observations, noise), agent.act(observations, noise), strict=True):
            assert torch.equal(ours, theirs)
    assert features.std() > 0.01


TINY = {"num_envs": 2, "num_steps": 16, "num_minibatches": 1, "update_epochs": 2, "total_timesteps": 96}
SHORT = {"env_kwargs": ("max_num_frames_per_episode=40",), "eval_episodes": 1}


@pytest.mark.parametrize("bfloat16", [False, True])
def test_rollouts_are_played_by_the_agent_as_it_is_then(bfloat16, monkeypatch):
    """In every iteration each action is the one that the agent itself, with its latest weights, would take."""
    agents, noises, calls = [], [], []
    sample_noise, act = ppo_atari.Agent.sample_noise, ppo_atari.Agent.act

    def noted_noise(self, num_steps, num_envs):
        noise = sample_noise(self, num_steps, num_envs)
        if num_steps == TINY["num_steps"]:  # not in the evaluation
            agents.append(copy.deepcopy(self))
            noises.append(noise)
        return noise

    def noted_act(self, observations, noise):
        actions, features = act(self, observations, noise)
        if len(observations) == TINY["num_envs"]:
            calls.append((observations.clone(), actions.clone()))
        return actions, features

    monkeypatch.setattr(ppo_atari.Agent, "sample_noise", noted_noise)
    monkeypatch.setattr(ppo_atari.Agent, "act", noted_act)
    # the high rate makes the agent's opinions after an update differ from those before
    ppo_atari.train(ppo_atari.Args(**TINY, **SHORT, bfloat16=bfloat16, learning_rate=0.02, anneal_lr=False))
    assert len(agents) == 3
    assert len(calls) == 3 * 16
    outdated = 0
    with torch.no_grad():
        for i, (observations, actions) in enumerate(calls):
            noise = noises[i // 16][i % 16]
            assert torch.equal(act(agents[i // 16], observations, noise)[0], actions)
            outdated += not torch.equal(act(agents[0], observations, noise)[0], actions)
    assert outdated > 0, "the first agent would have done the same: this could not see weights that are never renewed"


def test_rollouts_are_stored_as_bytes(monkeypatch):
    """One byte a pixel, a quarter of float32, for one observation more than steps."""
    inputs, features = [], ppo_atari.Agent.features

    def noted(self, observations):
        inputs.append((observations.dtype, tuple(observations.shape), observations.untyped_storage().nbytes()))
        return features(self, observations)

    monkeypatch.setattr(ppo_atari.Agent, "features", noted)
    ppo_atari.train(ppo_atari.Args(**TINY, **SHORT))
    size = (16 + 1) * 2 * 84 * 84 * 4
    assert {dtype for dtype, _, _ in inputs} == {torch.uint8}
    # 16 steps and the value of what follows them, in each of 3 iterations: views into the same storage
    assert inputs.count((torch.uint8, (2, 84, 84, 4), size)) == 3 * (16 + 1)
    minibatch = 16 * 2 * 84 * 84 * 4
    assert inputs.count((torch.uint8, (32, 84, 84, 4), minibatch)) == 3 * 2, "and no more per minibatch"
