"""The loss and the gradient step of every script: formulas, clipping, Adam, --compile, and the minibatches.

The check functions take a module, so that tests/test_mutations.py can run them on changed scripts. Whole updates are
observed in copies of the scripts with one more line, which hands update() to the test.
"""

import contextlib
import copy
import importlib
import itertools
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from helpers import LOSSES, curves, fork, load
from test_atari_agent import nature_cnn
from test_lstm import step_by_step
from torch.optim.optimizer import register_optimizer_step_pre_hook

SCRIPTS = ("ppo", "ppo_continuous_action", "ppo_lstm", "ppo_atari", "ppo_atari_multigpu")
every_script = pytest.mark.parametrize("script", SCRIPTS)
TINY = {"num_envs": 4, "num_steps": 32, "num_minibatches": 4, "update_epochs": 4, "total_timesteps": 256}
PER_ITERATION = 16  # minibatches, of 32 samples
OPTIONS = {"clip_vloss": False, "norm_adv": False, "vf_coef": 0.1, "ent_coef": 0.1, "anneal_lr": False}
CLIPPED = {"clip_vloss": True}


# ------------------------------------------------------------------------------- the formulas, by themselves


def formulas(args, batch, logprobs, entropies, values):
    """The loss, and the metrics in the order of LOSSES without the gradient's norm; each written out anew."""
    advantages = batch["advantages"]
    if args.norm_adv:
        deviations = advantages - advantages.sum() / advantages.numel()
        advantages = deviations / ((deviations**2).sum() / (advantages.numel() - 1) + 1e-16).sqrt()
    ratios = (logprobs - batch["old_logprobs"]).exp()
    # Clipping as in figure 1 of the PPO paper: no gain beyond 1 + eps, no smaller loss below 1 - eps.
    limits = torch.where(advantages > 0, 1 + args.clip_coef, 1 - args.clip_coef)
    gains = torch.where(advantages > 0, torch.minimum(ratios, limits), torch.maximum(ratios, limits)) * advantages
    errors = (values - batch["returns"]) ** 2
    if args.clip_vloss:
        low, high = batch["old_values"] - args.clip_coef, batch["old_values"] + args.clip_coef
        clipped = torch.minimum(torch.maximum(values, low), high)
        errors = torch.maximum(errors, (clipped - batch["returns"]) ** 2)
    policy_loss, value_loss, entropy = -gains.mean(), errors.mean() / 2, entropies.mean()
    approx_kl = (ratios - 1 - ratios.log()).mean()
    clipfrac = ((ratios - 1).abs() > args.clip_coef).double().mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    return loss, [x.item() for x in (policy_loss, value_loss, entropy, approx_kl, clipfrac)]


def check_loss(module):
    """ppo_loss(): loss, gradients and metrics for given outputs of an agent, with each combination of the options."""
    generator = torch.Generator().manual_seed(1)
    names = ("old_logprobs", "old_values", "advantages", "returns", "logprobs", "entropies", "values")
    batch = {name: torch.randn(40, generator=generator, dtype=torch.float64) for name in names}
    batch["advantages"] = 3 * batch["advantages"] + 1
    batch["logprobs"] = batch["old_logprobs"] + 0.3 * batch["logprobs"]
    outputs = [batch.pop(name).requires_grad_() for name in ("logprobs", "entropies", "values")]
    agent = SimpleNamespace(evaluate_actions=lambda given: outputs if given is batch else None)
    for norm_adv, clip_vloss, ent_coef in itertools.product((True, False), (True, False), (0.3, 0.0)):
        options = {"norm_adv": norm_adv, "clip_vloss": clip_vloss, "ent_coef": ent_coef, "vf_coef": 0.7}
        args = module.Args(**options, clip_coef=0.15)
        loss, metrics = module.ppo_loss(agent, args, batch)
        expected, expected_metrics = formulas(args, batch, *outputs)
        torch.testing.assert_close(loss, expected)
        gradients, expected_gradients = (torch.autograd.grad(x, outputs) for x in (loss, expected))
        torch.testing.assert_close(gradients, expected_gradients)
        assert [metrics[f"losses/{name}"].item() for name in LOSSES[:5]] == pytest.approx(expected_metrics, rel=1e-6)
        assert len(metrics) == 5
        assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.quick
@every_script
def test_loss_gradients_and_metrics(script):
    check_loss(importlib.import_module(script))


# --------------------------------------------------------------------------------- one iteration of train()


class Rewarded(gym.Env):
    """Episodes of 4 steps with the rewards below; they end by termination."""

    REWARDS = (7.0, -3.0, 0.0, 20.0)
    observation_space = Box(-1, 1, (2,), np.float32)

    def __init__(self, actions):
        self.action_space = {"discrete": Discrete(2), "continuous": Box(-1, 1, (1,), np.float32)}[actions]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return np.full(2, 0.1, np.float32), {}

    def step(self, action):
        self.count += 1
        observation = np.full(2, self.count / 4, np.float32)
        return observation, self.REWARDS[self.count - 1], self.count == 4, False, {}


gym.register("Rewarded-v0", Rewarded)


class RewardedGame:
    """The same with the interface of AtariVectorEnv, for any number of games side by side."""

    single_observation_space = Box(0, 255, (4, 36, 36), np.uint8)
    single_action_space = Discrete(2)

    def __init__(self, num_envs):
        self.num_envs, self.count = num_envs, 0

    def observe(self):
        frames = np.full((self.num_envs, 4, 36, 36), 60 * self.count, np.uint8)
        return frames, {"episode_frame_number": np.full(self.num_envs, 4 * self.count), "final_obs": frames}

    def reset(self, *, seed):
        return self.observe()

    def step(self, actions):
        reward, self.count = Rewarded.REWARDS[self.count], (self.count + 1) % 4
        frames, infos = self.observe()
        ended = np.full(self.num_envs, self.count == 0)
        return frames, np.full(self.num_envs, reward), ended, np.zeros_like(ended), infos

    def close(self):
        pass


STEPS = 8  # of 2 environments


def train_once(module, **flags):
    """One iteration on Rewarded. Returns its run, and what the functions of the module and Adam were given."""
    record = SimpleNamespace(rewards=[], losses=[], norms=[])
    compute_gae, ppo_loss = module.compute_gae, module.ppo_loss

    def recorded_gae(rewards, *others):
        record.rewards.append(rewards.copy())
        return compute_gae(rewards, *others)

    def recorded_loss(*inputs):
        loss, metrics = ppo_loss(*inputs)
        record.losses.append(metrics)
        if record.kls:
            metrics["losses/approx_kl"] = torch.tensor(record.kls[len(record.losses) - 1])
        return loss, metrics

    def before_step(optimizer, *_):
        gradients = [x.grad.flatten() for group in optimizer.param_groups for x in group["params"]]
        record.norms.append(torch.cat(gradients).norm().item())

    record.kls = flags.pop("kls", None)
    flags = {"num_envs": 2, "num_steps": STEPS, "num_minibatches": 2, "update_epochs": 1, "eval_episodes": 0} | flags
    if not hasattr(module, "AtariVectorEnv"):
        actions = "continuous" if hasattr(module, "from_units") else "discrete"
        flags |= {"env_id": "Rewarded-v0", "env_kwargs": (f"actions={actions}",)}
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        stack.callback(register_optimizer_step_pre_hook(before_step).remove)
        patch.setattr(module, "compute_gae", recorded_gae)
        patch.setattr(module, "ppo_loss", recorded_loss)
        if hasattr(module, "AtariVectorEnv"):
            flags["bfloat16"] = False
            patch.setattr(module, "make_envs", lambda args, num_envs, **options: RewardedGame(num_envs))
        record.run = module.train(module.Args(**flags, total_timesteps=2 * STEPS))
    return record


def check_clipping(module):
    """A gradient with a larger norm than max_grad_norm is scaled to it before Adam's step, another stays as it is.

    The norm that is logged is the one before.
    """
    for max_grad_norm in (1e-3, 1e3):
        record = train_once(module, max_grad_norm=max_grad_norm, num_minibatches=1)
        ((_, logged),) = curves(record.run)["losses/grad_norm"]
        assert 1e-2 < logged < 1e3
        assert record.norms == [pytest.approx(min(max_grad_norm, logged), rel=1e-3)]


def check_rewards(module):
    """The rewards that advantages are computed from: as they are, or scaled as the docstring of the script says."""
    (actual,) = train_once(module, gamma=0.9).rewards
    rewards = np.tile(Rewarded.REWARDS, STEPS // 4)
    returns = [sum(0.9 ** (t - k) * rewards[k] for k in range(t - t % 4, t + 1)) for t in range(STEPS)]
    expected = {
        "ppo": rewards,
        "ppo_continuous_action": (rewards / np.std(returns)).clip(-10, 10),
        "ppo_lstm": rewards / STEPS,  # 1/8 is more than 1 - gamma
        "ppo_atari": np.sign(rewards),
        "ppo_atari_multigpu": np.sign(rewards),
    }[module.__name__]
    np.testing.assert_allclose(actual, np.stack([expected, expected], 1), rtol=1e-5)


def check_target_kl(module):
    """The epochs end after one whose last minibatch has an approximate KL divergence above target_kl.

    In the first epoch only the mean of the minibatches is above it, in the second only the last one.
    """
    record = train_once(module, target_kl=1.0, update_epochs=4, kls=[9.0, 0.5, 0.0, 1.1, 0.0, 0.0, 0.0, 0.0])
    assert len(record.losses) == len(record.norms) == 4


@pytest.mark.quick
@pytest.mark.parametrize("check", [check_clipping, check_rewards, check_target_kl])
@every_script
def test_one_iteration(script, check):
    check(importlib.import_module(script))


# ------------------------------------------------------------------------------------------- whole updates


def recorded(script="ppo", change=None, **flags):
    """Train; return what went into and came out of each update. `change` is made to the arguments after iteration 1."""
    torch.compiler.reset()
    record = SimpleNamespace(minibatches=[], agents=[], learning_rates=[], gradients=[], metrics=[])

    def observe(update, agent, optimizer):
        def observed(minibatch):
            if change and len(record.agents) == PER_ITERATION:
                vars(record.args).update(change)
            record.minibatches.append(minibatch)
            record.agents.append(copy.deepcopy(agent))
            record.learning_rates.append([float(group["lr"]) for group in optimizer.param_groups])
            record.metrics.append(update(minibatch))
            record.gradients.append([parameter.grad.clone() for parameter in agent.parameters()])
            return record.metrics[-1]

        record.agent, record.update = agent, update
        return observed

    line = f"    # {'-' * 72} set-up: the rollout"
    module = fork("observed", (line, f"    update = observe(update, agent, optimizer)\n{line}"), script=script)
    module.observe = observe
    record.args = module.Args(**{**TINY, "eval_episodes": 0, "exp_name": script, **flags})
    record.run = module.train(record.args)
    record.agents.append(record.agent)
    return record


def weights(agent):
    return torch.cat([parameter.detach().flatten() for parameter in agent.parameters()])


def independent_outputs(script, agent, batch):
    """Log-probabilities, entropies and values, by torch's distributions and, with memory or pixels, other networks."""
    observations = batch["observations"]
    if script in ("ppo_lstm", "ppo_continuous_action"):
        statistics = agent.observation_statistics
        observations = ((observations - statistics.mean) / statistics.std).clip(-10, 10)
    if script == "ppo_lstm":
        state, ended = batch["first_state"], batch["ended"]
        logits = step_by_step(agent.actor, observations, ended, state[:2])
        values = step_by_step(agent.critic, observations, ended, state[2:])[..., 0]
    elif script == "ppo_atari":
        _, logits, values = nature_cnn(agent, observations.permute(0, 3, 1, 2))
    elif script == "ppo_continuous_action":
        components = torch.distributions.Normal(agent.actor(observations), agent.log_std.exp())
        policy = torch.distributions.Independent(components, 1)
        values = agent.critic(observations)[:, 0]
    else:
        logits, values = agent.actor(observations), agent.critic(observations)[:, 0]
    if script != "ppo_continuous_action":
        policy = torch.distributions.Categorical(logits=logits)
    return policy.log_prob(batch["actions"]), policy.entropy(), values


ATARI = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "total_timesteps": 64, "bfloat16": False}
TASKS = {  # the flags for two iterations; some gradients are longer than max_grad_norm, and some ratios are clipped
    "ppo": {"env_id": "CartPole-v1", "learning_rate": 5e-3, "max_grad_norm": 6.0},
    "ppo_continuous_action": {"env_id": "Hopper-v5", "learning_rate": 1e-3, "max_grad_norm": 2.0},
    "ppo_lstm": {"env_id": "CartPole-v1", "learning_rate": 1e-2, "max_grad_norm": 0.05},
    "ppo_atari": {"env_id": "ALE/Breakout-v5", **ATARI, "learning_rate": 3e-3, "max_grad_norm": 1.0},
}


@pytest.mark.parametrize("flags", [CLIPPED, OPTIONS], ids=["clipped", "options"])
@pytest.mark.parametrize("script", TASKS)
def test_every_update_is_a_step_of_ppo_and_adam(script, flags):
    """Metrics, clipped gradient and new weights, from independent formulas in float64; the curves hold the means."""
    record = recorded(script, **TASKS[script], **flags)
    per_iteration = len(record.minibatches) // 2
    assert per_iteration == 4 * record.args.num_minibatches
    moments = [(np.zeros(p.shape), np.zeros(p.shape)) for p in record.agent.parameters()]
    parts, norms = [], []
    for i, (minibatch, gradients) in enumerate(zip(record.minibatches, record.gradients, strict=True)):
        replica = copy.deepcopy(record.agents[i]).double()
        replica.zero_grad()
        minibatch = {name: x.double() if x.is_floating_point() else x for name, x in minibatch.items()}
        loss, metrics = formulas(record.args, minibatch, *independent_outputs(script, replica, minibatch))
        loss.backward()
        norms.append(math.sqrt(sum(parameter.grad.square().sum().item() for parameter in replica.parameters())))
        parts.append([*metrics, norms[-1]])
        logged = [record.metrics[i][f"losses/{name}"].item() for name in LOSSES]
        assert logged == pytest.approx(parts[-1], rel=1e-3, abs=1e-5)

        scale = min(1, record.args.max_grad_norm / norms[-1])
        learning_rate = record.args.learning_rate * (0.5 if record.args.anneal_lr and i >= per_iteration else 1)
        new = record.agents[i + 1].parameters()
        for j, (old, parameter, gradient) in enumerate(zip(replica.parameters(), new, gradients, strict=True)):
            torch.testing.assert_close(gradient.double(), scale * old.grad, rtol=1e-3, atol=1e-5)
            g = gradient.double().numpy()
            moments[j] = m, v = 0.9 * moments[j][0] + 0.1 * g, 0.999 * moments[j][1] + 0.001 * g**2
            step = m / (1 - 0.9 ** (i + 1)) / (np.sqrt(v / (1 - 0.999 ** (i + 1))) + 1e-5)
            expected = old.detach() - learning_rate * torch.from_numpy(step)
            torch.testing.assert_close(parameter.detach().double(), expected, rtol=0, atol=1e-3 * learning_rate)
    assert min(norms) < record.args.max_grad_norm < max(norms), "some, but not all gradients should be clipped"
    assert max(part[LOSSES.index("clipfrac")] for part in parts) > 0
    curve = curves(record.run)
    for iteration in range(2):
        logged = [curve[f"losses/{name}"][iteration][1] for name in LOSSES]
        means = np.mean(parts[iteration * per_iteration : (iteration + 1) * per_iteration], axis=0)
        assert logged == pytest.approx(means, rel=1e-3, abs=1e-5)


@pytest.mark.quick
def test_minibatches():
    """Each epoch has every sample once, in a new order; in the first update the ratio is 1.

    All observations, (environment, episode, step), are different. With gamma 0 the return is the reward.
    """
    record = recorded(env_id="probe_envs:Numbered-v0", gamma=0.0)
    orders = []
    for i in range(8):  # epochs
        minibatches = record.minibatches[4 * i : 4 * i + 4]
        assert [len(minibatch["actions"]) for minibatch in minibatches] == [32] * 4
        epoch = {name: torch.cat([minibatch[name] for minibatch in minibatches]) for name in minibatches[0]}
        orders.append([tuple(row) for row in epoch["observations"].int().tolist()])
        assert len(set(orders[-1])) == 128
        assert set(orders[-1]) == set(orders[i // 4 * 4])
        with torch.no_grad():
            logprobs, _, values = record.agents[i // 4 * PER_ITERATION].evaluate_actions(epoch)
        torch.testing.assert_close(logprobs, epoch["old_logprobs"], rtol=0, atol=1e-5)
        torch.testing.assert_close(values, epoch["old_values"], rtol=0, atol=1e-4)
        torch.testing.assert_close(epoch["returns"], 10 * epoch["observations"][:, 1] + epoch["observations"][:, 2] + 1)
        torch.testing.assert_close(epoch["advantages"], epoch["returns"] - epoch["old_values"])
    assert len(set(map(tuple, orders))) == 8
    for i in (0, PER_ITERATION):
        assert record.metrics[i]["losses/approx_kl"].item() == pytest.approx(0, abs=1e-6)
        assert record.metrics[i]["losses/clipfrac"].item() == 0


@pytest.mark.quick
@pytest.mark.parametrize("anneal_lr", [True, False])
def test_learning_rate_is_annealed_linearly(anneal_lr):
    """Over 8 iterations: the whole learning rate in the first, an eighth of it in the last."""
    record = recorded(total_timesteps=1000, learning_rate=3e-4, anneal_lr=anneal_lr)
    expected = [3e-4 * (8 - i) / 8 if anneal_lr else 3e-4 for i in range(8)]
    curve = curves(record.run)["charts/learning_rate"]
    assert [step for step, _ in curve] == [128 * (i + 1) for i in range(8)]
    assert [value for _, value in curve] == pytest.approx(expected)
    assert record.learning_rates[::PER_ITERATION] == [pytest.approx([x], rel=1e-6) for x in expected]
    assert load(record.run)["optimizer"]["param_groups"][0]["lr"] == pytest.approx(expected[-1], rel=1e-6)


# ----------------------------------------------------------------------------------------------- --compile


def test_compiled_updates_take_the_steps_of_eager_ones():
    """Also after a coefficient has changed between two iterations, and with the annealed rate of a resumed run."""
    change, runs = {"ent_coef": 5.0}, {}
    for compile in (False, True):
        first = recorded(change=change, compile=compile)
        last = recorded(compile=compile, total_timesteps=512, resume=str(first.run))
        assert last.learning_rates[::PER_ITERATION] == [pytest.approx([x]) for x in (7.5e-4, 3.75e-4)]
        assert load(last.run)["global_step"] == 512
        runs[compile] = [*map(weights, first.agents), *map(weights, last.agents)]
        assert torch.equal(weights(first.agent), weights(last.agents[0]))
    for i in (1, PER_ITERATION, PER_ITERATION + 1, 2 * PER_ITERATION, -PER_ITERATION, -1):
        torch.testing.assert_close(runs[True][i], runs[False][i], rtol=0, atol=2e-5)

    first = recorded()
    last = recorded(total_timesteps=512, resume=str(first.run), anneal_lr=False)
    others = (runs[False][0], weights(first.agent), weights(last.agent))  # before, without change or annealing
    for i, other in zip((PER_ITERATION, 2 * PER_ITERATION, -1), others, strict=True):
        assert (runs[False][i] - other).abs().max() > 1e-3
