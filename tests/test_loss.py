"""update() in training: loss, gradient, clipping, Adam's steps, --compile, and the minibatches it is called with.

The scripts run with one more line, which hands update() to the test.
"""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import LOSSES, curves, fork, load

pytestmark = pytest.mark.quick
TINY = {"num_envs": 4, "num_steps": 32, "num_minibatches": 4, "update_epochs": 4, "total_timesteps": 256}
PER_ITERATION = 16  # minibatches, of 32 samples
OPTIONS = {"clip_vloss": False, "norm_adv": False, "vf_coef": 0.1, "ent_coef": 0.1, "anneal_lr": False}
CLIPPED = {"clip_vloss": True}


def recorded(script="ppo", change=None, **flags):
    """Train; return what went into and came out of each update. `change` is made to the arguments after iteration 1."""
    torch.compiler.reset()
    record = SimpleNamespace(minibatches=[], agents=[], learning_rates=[], gradients=[], metrics=[])

    def observe(update, agent, optimizer):
        def observed(*minibatch):
            if change and len(record.agents) == PER_ITERATION:
                vars(record.args).update(change)
            record.minibatches.append(minibatch)
            record.agents.append(copy.deepcopy(agent))
            record.learning_rates.append([float(group["lr"]) for group in optimizer.param_groups])
            record.metrics.append(update(*minibatch))
            record.gradients.append([parameter.grad.clone() for parameter in agent.parameters()])
            return record.metrics[-1]

        record.agent, record.update = agent, update
        return observed

    line = "    def request_stop"
    module = fork("observed", (line, f"    update = observe(update, agent, optimizer)\n{line}"), script=script)
    module.observe = observe
    record.args = module.Args(**{**TINY, "eval_episodes": 1, "exp_name": script, **flags})
    record.run = module.train(record.args)
    record.agents.append(record.agent)
    return record


def weights(agent):
    return torch.cat([parameter.detach().flatten() for parameter in agent.parameters()])


def independent_loss(agent, minibatch, args):
    """The loss with torch's distributions, and the metrics in the order of LOSSES, without the gradient's norm."""
    observations, actions, old_logprobs, old_values, advantages, returns = minibatch
    if hasattr(agent, "log_std"):  # of ppo_continuous_action.py
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
    # Clipping as in figure 1 of the PPO paper: no gain beyond 1 + eps, no smaller loss below 1 - eps.
    limits = torch.where(advantages > 0, 1 + args.clip_coef, 1 - args.clip_coef)
    gains = torch.where(advantages > 0, torch.minimum(ratios, limits), torch.maximum(ratios, limits)) * advantages
    errors = (values - returns) ** 2
    if args.clip_vloss:
        low, high = old_values - args.clip_coef, old_values + args.clip_coef
        errors = torch.maximum(errors, (torch.minimum(torch.maximum(values, low), high) - returns) ** 2)
    policy_loss, value_loss, entropy = -gains.mean(), errors.mean() / 2, policy.entropy().mean()
    approx_kl = (ratios - 1 - ratios.log()).mean()
    clipfrac = ((ratios - 1).abs() > args.clip_coef).double().mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    return loss, [x.item() for x in (policy_loss, value_loss, entropy, approx_kl, clipfrac)]


@pytest.mark.parametrize("flags", [CLIPPED, OPTIONS])
@pytest.mark.parametrize(("script", "env_id"), [("ppo", "CartPole-v1"), ("ppo_continuous_action", "Hopper-v5")])
def test_every_update_is_a_step_of_ppo_and_adam(script, env_id, flags):
    """Metrics, clipped gradient and new weights, from independent formulas in float64; the curves hold the means."""
    record = recorded(script, env_id=env_id, learning_rate=1e-3, max_grad_norm=2.0, **flags)
    assert len(record.minibatches) == 2 * PER_ITERATION
    moments = [(np.zeros(p.shape), np.zeros(p.shape)) for p in record.agent.parameters()]
    parts, norms = [], []
    for i, (minibatch, gradients) in enumerate(zip(record.minibatches, record.gradients, strict=True)):
        replica = copy.deepcopy(record.agents[i]).double()
        replica.zero_grad()
        minibatch = [x.double() if x.is_floating_point() else x for x in minibatch]
        loss, metrics = independent_loss(replica, minibatch, record.args)
        loss.backward()
        norms.append(math.sqrt(sum(parameter.grad.square().sum().item() for parameter in replica.parameters())))
        parts.append([*metrics, norms[-1]])
        logged = [record.metrics[i][f"losses/{name}"].item() for name in LOSSES]
        assert logged == pytest.approx(parts[-1], rel=1e-3, abs=1e-5)

        scale = min(1, record.args.max_grad_norm / norms[-1])
        learning_rate = 1e-3 * (0.5 if record.args.anneal_lr and i >= PER_ITERATION else 1)
        new = record.agents[i + 1].parameters()
        for j, (old, parameter, gradient) in enumerate(zip(replica.parameters(), new, gradients, strict=True)):
            torch.testing.assert_close(gradient.double(), scale * old.grad, rtol=1e-3, atol=1e-5)
            g = gradient.double().numpy()
            moments[j] = m, v = 0.9 * moments[j][0] + 0.1 * g, 0.999 * moments[j][1] + 0.001 * g**2
            step = m / (1 - 0.9 ** (i + 1)) / (np.sqrt(v / (1 - 0.999 ** (i + 1))) + 1e-5)
            expected = old.detach() - learning_rate * torch.from_numpy(step)
            torch.testing.assert_close(parameter.detach().double(), expected, rtol=0, atol=1e-6)
    assert min(norms) < record.args.max_grad_norm < max(norms), "some, but not all gradients should be clipped"
    assert max(part[LOSSES.index("clipfrac")] for part in parts) > 0
    curve = curves(record.run)
    for iteration in range(2):
        logged = [curve[f"losses/{name}"][iteration][1] for name in LOSSES]
        means = np.mean(parts[iteration * PER_ITERATION : (iteration + 1) * PER_ITERATION], axis=0)
        assert logged == pytest.approx(means, rel=1e-3, abs=1e-5)


def test_minibatches():
    """Each epoch has every sample once, in a new order; in the first update the ratio is 1.

    All observations, (environment, episode, step), are different. With gamma 0 the return is the reward.
    """
    record = recorded(env_id="probe_envs:Numbered-v0", gamma=0.0)
    epochs = [
        [torch.cat(parts) for parts in zip(*record.minibatches[i : i + 4], strict=True)]
        for i in range(0, 2 * PER_ITERATION, 4)
    ]
    orders = []
    for i, (observations, actions, old_logprobs, old_values, advantages, returns) in enumerate(epochs):
        orders.append([tuple(row) for row in observations.int().tolist()])
        assert len(set(orders[-1])) == 128
        assert set(orders[-1]) == set(orders[i // 4 * 4])
        with torch.no_grad():
            logprobs, _, values = record.agents[i // 4 * PER_ITERATION](observations, actions)
        torch.testing.assert_close(logprobs, old_logprobs, rtol=0, atol=1e-5)
        torch.testing.assert_close(values, old_values, rtol=0, atol=1e-4)
        torch.testing.assert_close(returns, 10 * observations[:, 1] + observations[:, 2] + 1)
        torch.testing.assert_close(advantages, returns - old_values)
    assert len(set(map(tuple, orders))) == 8
    for i in (0, PER_ITERATION):
        assert record.metrics[i]["losses/approx_kl"].item() == pytest.approx(0, abs=1e-6)
        assert record.metrics[i]["losses/clipfrac"].item() == 0


@pytest.mark.parametrize(("target_kl", "epochs"), [(1e-6, 1), (100.0, 4)])
def test_target_kl_ends_the_epochs_of_an_iteration(target_kl, epochs):
    assert len(recorded(target_kl=target_kl, learning_rate=0.01).minibatches) == 2 * 4 * epochs


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_learning_rate_is_annealed_linearly(anneal_lr):
    """Over 8 iterations: the whole learning rate in the first, an eighth of it in the last."""
    record = recorded(total_timesteps=1000, learning_rate=3e-4, anneal_lr=anneal_lr)
    expected = [3e-4 * (8 - i) / 8 if anneal_lr else 3e-4 for i in range(8)]
    curve = curves(record.run)["charts/learning_rate"]
    assert [step for step, _ in curve] == [128 * (i + 1) for i in range(8)]
    assert [value for _, value in curve] == pytest.approx(expected)
    assert record.learning_rates[::PER_ITERATION] == [pytest.approx([x], rel=1e-12) for x in expected]
    assert load(record.run)["optimizer"]["param_groups"][0]["lr"] == pytest.approx(expected[-1], rel=1e-12)


# ------------------------------------------------------------------------------------- --compile


def test_compiled_updates_take_the_steps_of_eager_ones():
    """Also after a coefficient has changed between two iterations."""
    change = {"ent_coef": 5.0}
    eager, compiled = (recorded(change=change, compile=compile) for compile in (False, True))
    unchanged = recorded()
    for i in (1, PER_ITERATION, PER_ITERATION + 1, 2 * PER_ITERATION):
        torch.testing.assert_close(weights(compiled.agents[i]), weights(eager.agents[i]), rtol=0, atol=2e-5)
    distances = [
        (weights(eager.agents[i]) - weights(other)).abs().max()
        for i, other in ((PER_ITERATION, eager.agents[0]), (-1, eager.agents[PER_ITERATION]), (-1, unchanged.agent))
    ]
    assert min(distances) > 1e-3


def test_annealing_goes_on_after_a_compiled_run_is_resumed():
    """The weights are those of an eager run: Adam uses the annealed learning rate."""
    final = {}
    for name, flags in (("eager", {}), ("compiled", {"compile": True}), ("constant", {"anneal_lr": False})):
        first = recorded(**flags)
        last = recorded(**flags, total_timesteps=512, resume=str(first.run))
        final[name] = weights(last.agent)
        expected = [1e-3, 1e-3] if name == "constant" else [5e-4, 2.5e-4]
        assert last.learning_rates[::PER_ITERATION] == [pytest.approx([x]) for x in expected]
        assert torch.equal(weights(last.agents[0]), weights(first.agent))
        assert load(last.run)["global_step"] == 512
    torch.testing.assert_close(final["compiled"], final["eager"], rtol=0, atol=2e-5)
    assert (final["constant"] - final["eager"]).abs().max() > 1e-3
