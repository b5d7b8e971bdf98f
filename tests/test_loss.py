"""The loss, its gradient and the steps taken with it: those of the real train(), against independent ones.

Of ppo.py; the gradient also of ppo_continuous_action.py, whose agent is another. train() is run with functions of
torch and of the script wrapped, so that what goes in and out can be looked at; the functions still do the work.
"""

import copy
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import LOSSES, curves, load, the_run, train
from hypothesis import given, settings
from hypothesis import strategies as st

import ppo
import ppo_continuous_action

TINY = {"num_envs": 4, "num_steps": 32, "total_timesteps": 256}  # 2 iterations of 16 minibatches of 32
# One iteration of as many minibatches, so that the statistics at its end are those that it learned with.
HOPPER = {"env_id": "Hopper-v5", "total_timesteps": 128, "num_minibatches": 4, "update_epochs": 4}


@pytest.fixture
def recorded(monkeypatch):
    """Trains; returns every minibatch, the loss and gradient on it, the weights before it and those at the end."""

    def call(script=ppo, **flags):
        record = SimpleNamespace(minibatches=[], losses=[], gradients=[], weights=[])

        def minibatches(args, batch):
            for minibatch in original_minibatches(args, batch):
                record.minibatches.append([x.clone() for x in minibatch])
                yield minibatch

        def grad(loss, inputs, *rest, **more):
            inputs = list(inputs)
            record.losses.append(loss.item())
            record.weights.append([x.detach().clone() for x in inputs])
            gradients = original_grad(loss, inputs, *rest, **more)
            record.gradients.append([x.clone() for x in gradients])
            return gradients

        original_minibatches, original_grad = script.minibatches, torch.autograd.grad
        with monkeypatch.context() as patch:
            patch.setattr(script, "minibatches", minibatches)
            patch.setattr(torch.autograd, "grad", grad)
            record.args = script.Args(**{**TINY, "eval_episodes": 1, **flags})
            record.agent = script.train(record.args)
        record.weights.append([x.detach().clone() for x in record.agent.parameters()])
        assert len(record.minibatches) == len(record.gradients) > 0
        return record

    return call


@pytest.fixture
def loss_gradient(monkeypatch):
    """Trains; returns the agent and the function that --compile compiles, as minibatch -> loss, gradients."""

    def call(**flags):
        functions, original_grad = [], torch.autograd.grad
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", lambda function, **_: functions.append(function) or function)
            patch.setenv("CXX", sys.executable)  # any program will do, nothing is compiled
            agent = ppo.train(ppo.Args(**{**TINY, "eval_episodes": 1, **flags}, compile=True))
        (function,) = functions

        def observed(*minibatch):
            seen = []

            def grad(loss, *rest):
                seen.append((loss.item(), original_grad(loss, *rest)))
                return seen[0][1]

            with monkeypatch.context() as patch:
                patch.setattr(torch.autograd, "grad", grad)
                function(*minibatch)
            return seen[0]

        return agent, observed

    return call


def numpy_loss(weights, minibatch, args):
    """The PPO loss and its parts (in the order of LOSSES), in float64 and from the formulas of the papers.

    `weights` are those of actor and critic in the order of their layers.
    """
    observations, actions, old_logprobs, old_values, advantages, returns = minibatch

    def network(x, W1, b1, W2, b2, W3, b3):
        return np.tanh(np.tanh(x @ W1.T + b1) @ W2.T + b2) @ W3.T + b3

    logits, values = network(observations, *weights[:6]), network(observations, *weights[6:])[:, 0]
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    entropy = np.mean([-sum(np.exp(p) * p for p in row) for row in logprobs])
    if args.norm_adv:
        advantages = (advantages - np.mean(advantages)) / (np.std(advantages, ddof=1) + 1e-8)
    ratios = np.exp(logprobs[np.arange(len(actions)), actions] - old_logprobs)

    low, high = 1 - args.clip_coef, 1 + args.clip_coef
    gains = [min(r * a, min(max(r, low), high) * a) for r, a in zip(ratios, advantages, strict=True)]
    errors = (values - returns) ** 2
    if args.clip_vloss:
        near = old_values + np.clip(values - old_values, -args.clip_coef, args.clip_coef)
        errors = np.maximum(errors, (near - returns) ** 2)
    policy_loss, value_loss = -np.mean(gains), np.mean(errors) / 2
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    k1, k3 = np.mean(-np.log(ratios)), np.mean(ratios - 1 - np.log(ratios))
    clipfrac = np.mean((ratios < low) | (ratios > high))
    return loss, [policy_loss, value_loss, entropy, k1, k3, clipfrac]


def torch_loss(agent, minibatch, args):
    """The PPO loss once more, with torch's own distributions, for backward()."""
    observations, actions, old_logprobs, old_values, advantages, returns = minibatch
    if isinstance(agent, ppo_continuous_action.Agent):
        statistics = agent.observation_statistics
        observations = ((observations - statistics.mean) / statistics.std).clip(-10, 10)
        components = torch.distributions.Normal(agent.actor(observations), agent.log_std.exp())
        policy = torch.distributions.Independent(components, 1)
    else:
        policy = torch.distributions.Categorical(logits=agent.actor(observations))
    values = agent.critic(observations)[:, 0]
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    ratios = (policy.log_prob(actions) - old_logprobs).exp()
    # clipping, written as in the paper's figure 1: no more gain beyond 1 + eps, no less loss below 1 - eps
    limits = torch.where(advantages > 0, 1 + args.clip_coef, 1 - args.clip_coef)
    gains = torch.where(advantages > 0, torch.minimum(ratios, limits), torch.maximum(ratios, limits)) * advantages
    errors = (values - returns) ** 2
    if args.clip_vloss:
        low, high = old_values - args.clip_coef, old_values + args.clip_coef
        errors = torch.maximum(errors, (torch.minimum(torch.maximum(values, low), high) - returns) ** 2)
    return -gains.mean() + args.vf_coef * errors.mean() / 2 - args.ent_coef * policy.entropy().mean()


def to_numpy(tensors):
    """Floats as float64."""
    return [x.detach().double().numpy() if x.is_floating_point() else x.numpy() for x in tensors]


def random_minibatch(agent, size=64):
    """One on which much is clipped, of policies, advantages and values, on either side."""
    torch.manual_seed(2)
    observations, actions = torch.randn(size, 4), torch.randint(2, (size,))
    with torch.no_grad():
        logprobs, _, values = agent(observations, actions)
    old_logprobs = logprobs + 0.3 * torch.randn(size)
    old_values, returns = values + 0.3 * torch.randn(size), values + torch.randn(size)
    return observations, actions, old_logprobs, old_values, torch.randn(size), returns


# ------------------------------------------------------------------------------- the loss function


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"vf_coef": 0, "ent_coef": 0}, 0.6 / 4),
        ({"vf_coef": 0, "ent_coef": 1}, 0.6 / 4 - math.log(2)),
        ({"vf_coef": 1, "ent_coef": 0}, 0.6 / 4 + (1.8**2 + 0.8**2 + 0 + 2**2) / 4 / 2),
        ({"vf_coef": 1, "ent_coef": 0, "clip_vloss": False}, 0.6 / 4 + (1 + 0 + 0 + 2**2) / 4 / 2),
        ({"vf_coef": 0.5, "ent_coef": 0.01}, 0.6 / 4 + 7.88 / 16 - 0.01 * math.log(2)),
    ],
)
def test_loss_by_hand(loss_gradient, flags, expected):
    """Actor and critic are made constant: both actions have probability 1/2, and the value is 1 everywhere.

    Four samples with the ratios 3/2, 3/2, 1/2, 1/2 and the advantages 1, -1, 1, -1, epsilon 0.2. The objective
    takes the worse of clipped and not: 1.2 (clipped), -1.5, 0.5, -0.8 (clipped): the mean is -0.6 / 4.
    Old values 0, 2, 1.1, 0.9 clip the value 1 to 0.2, 1.8, 1, 1; for returns 2, 1, 1, 3 the worse squared errors
    are 1.8^2 (rather than 1), 0.8^2 (rather than 0), 0, 2^2. The entropy is ln 2.
    """
    agent, function = loss_gradient(**{"norm_adv": False, "clip_vloss": True, "clip_coef": 0.2, **flags})
    with torch.no_grad():
        for p in agent.parameters():
            p.zero_()
        agent.critic[-1].bias.fill_(1)
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5])
    loss, _ = function(
        torch.randn(4, 4),
        torch.tensor([0, 1, 1, 0]),
        -math.log(2) - ratios.log(),
        torch.tensor([0, 2, 1.1, 0.9]),
        torch.tensor([1.0, -1, 1, -1]),
        torch.tensor([2.0, 1, 1, 3]),
    )
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("clip_vloss", [True, False])
@pytest.mark.parametrize("norm_adv", [True, False])
def test_loss_and_gradient_against_numpy(loss_gradient, clip_vloss, norm_adv):
    """The loss, and the gradient by central differences along random directions in each layer."""
    flags = {"clip_vloss": clip_vloss, "norm_adv": norm_adv, "ent_coef": 0.03, "vf_coef": 0.7, "clip_coef": 0.15}
    agent, function = loss_gradient(**flags)
    args, minibatch = ppo.Args(**flags), random_minibatch(agent)
    loss, gradients = function(*minibatch)

    weights, arrays = to_numpy(agent.parameters()), to_numpy(minibatch)
    expected, parts = numpy_loss(weights, arrays, args)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert 0.2 < parts[-1] < 0.9, "some, but not all, should be clipped"

    rng, h = np.random.default_rng(3), 1e-6
    for i, (weight, gradient) in enumerate(zip(weights, to_numpy(gradients), strict=True)):
        for _ in range(3):
            direction = rng.standard_normal(weight.shape) / math.sqrt(weight.size)
            ahead, behind = (
                numpy_loss([*weights[:i], weight + x * direction, *weights[i + 1 :]], arrays, args)[0] for x in (h, -h)
            )
            slope = (ahead - behind) / (2 * h)
            assert (gradient * direction).sum() == pytest.approx(slope, rel=1e-3, abs=1e-6)


# ------------------------------------------------------------------------ in the course of training


@pytest.mark.parametrize("flags", [{}, {"clip_vloss": False, "norm_adv": False, "vf_coef": 1.0, "ent_coef": 0.1}])
@pytest.mark.parametrize(("script", "task"), [(ppo, {}), (ppo_continuous_action, HOPPER)])
def test_gradients_of_training_are_those_of_backward(recorded, script, task, flags):
    """On every minibatch, loss and gradient are what backward() makes of the loss with torch's distributions."""
    record = recorded(script, **task, **flags)
    assert len(record.minibatches) == (32 if script is ppo else 16)
    replica = copy.deepcopy(record.agent).double()
    for weights, minibatch, loss, gradients in zip(
        record.weights, record.minibatches, record.losses, record.gradients, strict=False
    ):
        for parameter, weight in zip(replica.parameters(), weights, strict=True):
            parameter.data, parameter.grad = weight.double(), None
        expected = torch_loss(replica, [x.double() if x.is_floating_point() else x for x in minibatch], record.args)
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
        for parameter, gradient in zip(replica.parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient.double(), parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_steps_are_those_of_clip_grad_norm_and_adam(recorded, anneal_lr):
    """Training takes the very steps of torch's clip_grad_norm_ and Adam(eps=1e-5) on separate parameters."""
    record = recorded(max_grad_norm=3.0, learning_rate=1e-3, anneal_lr=anneal_lr)
    replica = copy.deepcopy(record.agent)
    parameters = [torch.nn.Parameter(x.clone()) for x in record.weights[0]]
    for (name, _), parameter in zip(list(replica.named_parameters()), parameters, strict=True):
        replica.get_submodule(name.rpartition(".")[0]).register_parameter(name.rpartition(".")[2], parameter)
    optimizer = torch.optim.Adam(replica.parameters(), eps=1e-5)
    per_iteration, norms = len(record.minibatches) // 2, []
    for i, minibatch in enumerate(record.minibatches):
        for parameter, weight in zip(parameters, record.weights[i], strict=True):
            torch.testing.assert_close(parameter.detach(), weight, rtol=0, atol=1e-6)
        optimizer.param_groups[0]["lr"] = 1e-3 * (0.5 if anneal_lr and i >= per_iteration else 1)
        optimizer.zero_grad()
        torch_loss(replica, minibatch, record.args).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 3.0).item())
        optimizer.step()
    for parameter, weight in zip(parameters, record.weights[-1], strict=True):
        torch.testing.assert_close(parameter.detach(), weight, rtol=0, atol=1e-6)
    assert min(norms) < 3.0 < max(norms), "both long and short gradients should be among them"


def test_first_ratio_of_an_iteration_is_1(recorded):
    """The first minibatch of each iteration is seen with the very weights that played it."""
    record = recorded(total_timesteps=512)
    replica = copy.deepcopy(record.agent)
    for i in range(0, len(record.minibatches), 16):
        torch.nn.utils.vector_to_parameters(torch.cat([w.flatten() for w in record.weights[i]]), replica.parameters())
        observations, actions, old_logprobs, old_values, _, _ = record.minibatches[i]
        with torch.no_grad():
            logprobs, _, values = replica(observations, actions)
        torch.testing.assert_close((logprobs - old_logprobs).exp(), torch.ones(32), rtol=0, atol=1e-6)
        torch.testing.assert_close(values, old_values, rtol=0, atol=1e-5)


def test_no_divergence_with_one_update_per_iteration():
    """What the event file says when each sample is learned from once, in one minibatch."""
    curve = curves(train(**TINY, update_epochs=1, num_minibatches=1, learning_rate=0.01))
    assert len(curve["losses/approx_kl"]) == 2
    assert [value for _, value in curve["losses/clipfrac"]] == [0, 0]
    for tag in ("losses/approx_kl", "losses/old_approx_kl"):
        assert [value for _, value in curve[tag]] == pytest.approx([0, 0], abs=1e-6)


def test_a2c_is_a_special_case(recorded):
    """One epoch, one minibatch and nothing clipped: the plain policy gradient, -mean(A grad log pi)."""
    flags = {"update_epochs": 1, "num_minibatches": 1, "norm_adv": False, "clip_vloss": False, "clip_coef": 1e9}
    record = recorded(**flags, vf_coef=0.0, ent_coef=0.0)
    replica = copy.deepcopy(record.agent)
    for i, (observations, actions, _, _, advantages, _) in enumerate(record.minibatches):
        torch.nn.utils.vector_to_parameters(torch.cat([w.flatten() for w in record.weights[i]]), replica.parameters())
        replica.zero_grad()
        for observation, action, advantage in zip(observations, actions, advantages, strict=True):
            logprob = replica.actor(observation).log_softmax(-1)[action]
            (-advantage * logprob / len(actions)).backward()
        names = [name for name, _ in replica.named_parameters()]
        for name, parameter, gradient in zip(names, replica.parameters(), record.gradients[i], strict=True):
            expected = torch.zeros_like(gradient) if name.startswith("critic") else parameter.grad
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_losses_logged_are_means_over_all_minibatches(recorded):
    """Each logged part of the loss is the mean of the 16 minibatches of its iteration."""
    record = recorded()
    curve = curves(the_run())
    for iteration in range(2):
        parts = [
            numpy_loss(to_numpy(record.weights[i]), to_numpy(record.minibatches[i]), record.args)[1]
            for i in range(16 * iteration, 16 * (iteration + 1))
        ]
        logged = [curve[f"losses/{name}"][iteration][1] for name in LOSSES]
        assert logged == pytest.approx(np.mean(parts, axis=0), rel=1e-3, abs=1e-6)


def test_a_small_target_kl_ends_the_updates_before_the_step(recorded):
    """The first step is taken (KL 0 before it); the second minibatch shows a KL above the target: no step with it."""
    record = recorded(total_timesteps=128, target_kl=1e-6, learning_rate=0.01)
    assert len(record.minibatches) == 2
    first, second, last = (torch.cat([x.flatten() for x in weights]) for weights in record.weights)
    assert not torch.equal(first, second)
    assert torch.equal(second, last)
    assert curves(the_run())["charts/update_epochs"] == [(128, 1 / 4)]


def test_a_large_target_kl_ends_nothing():
    assert curves(train(**TINY, target_kl=100.0))["charts/update_epochs"] == [(128, 4), (256, 4)]


# ------------------------------------------------------------------------------ minibatches, annealing


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
@settings(deadline=None)
def test_minibatches_hold_every_sample_once_per_epoch(num_envs, size, num_minibatches, update_epochs):
    """And what belongs together stays together."""
    num_steps = size * num_minibatches
    flags = {"num_envs": num_envs, "num_steps": num_steps, "num_minibatches": num_minibatches}
    args = ppo.Args(**flags, update_epochs=update_epochs, norm_adv=False)
    samples = torch.arange(num_envs * num_steps)
    chunks = list(ppo.minibatches(args, [samples, 10 * samples.double(), torch.stack([samples, -samples], 1)]))
    assert len(chunks) == num_minibatches * update_epochs
    assert {len(chunk[0]) for chunk in chunks} == {num_envs * size}
    for numbers, tens, pairs in chunks:
        assert torch.equal(tens, 10.0 * numbers)
        assert torch.equal(pairs, torch.stack([numbers, -numbers], 1))
    for epoch in range(update_epochs):
        epoch_chunks = chunks[epoch * num_minibatches : (epoch + 1) * num_minibatches]
        assert torch.cat([chunk[0] for chunk in epoch_chunks]).sort().values.equal(samples)


def test_each_epoch_is_shuffled_anew():
    args, samples = ppo.Args(num_envs=1, num_steps=512, num_minibatches=1, update_epochs=5), torch.arange(512)
    orders = [tuple(chunk[0].tolist()) for chunk in ppo.minibatches(args, [samples])]
    assert len({*orders, tuple(range(512))}) == 6


def test_learning_rate_is_annealed_linearly_and_exactly():
    """Over 8 iterations: the whole learning rate in the first, an eighth of it in the last."""
    run_dir = train(num_envs=4, num_steps=32, total_timesteps=1000, learning_rate=3e-4)
    curve = curves(run_dir)["charts/learning_rate"]
    assert curve == [(128 * (i + 1), np.float32(3e-4 * (8 - i) / 8)) for i in range(8)]
    (optimizer_state,) = load(run_dir)["optimizer"]["param_groups"]
    assert optimizer_state["lr"] == pytest.approx(3e-4 / 8, rel=1e-12)
    assert optimizer_state["eps"] == 1e-5


def test_learning_rate_is_constant_without_annealing():
    curve = curves(train(**TINY, learning_rate=3e-4, anneal_lr=False))["charts/learning_rate"]
    assert curve == [(128, np.float32(3e-4)), (256, np.float32(3e-4))]


@pytest.mark.parametrize(("env_id", "num_actions"), [("CartPole-v1", 2), ("Acrobot-v1", 3), ("Taxi-v4", 6)])
def test_entropy_lies_between_0_and_that_of_chance(env_id, num_actions):
    """It starts at nearly ln(n): every action is equally likely."""
    values = [value for _, value in curves(train(env_id=env_id, total_timesteps=2048))["losses/entropy"]]
    assert len(values) == 4
    assert all(0 < value <= math.log(num_actions) * (1 + 1e-6) for value in values)
    assert values[0] > 0.98 * math.log(num_actions)
