"""ppo_continuous_action.py between environment and agent: units of actions, normalization, spaces, evaluation.

train() runs on environments whose every observation and reward is known beforehand, with functions wrapped so that
their inputs and outputs can be compared with an independent computation.
"""

import copy
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import PendulumEnv
from helpers import assert_refused, curves, load, same_weights, train
from probe_envs import ContinuousNumbered, Spaces
from torch.distributions import Normal

import ppo_continuous_action as ppo

N, T, GAMMA, LAMBDA = 3, 40, 0.5, 0.95
ITERATIONS = 5  # 3 of a run, then 2 of the same run resumed
FLAGS = {
    "env_id": "probe_envs:ContinuousNumbered-v0",
    "num_envs": N,
    "num_steps": T,
    "num_minibatches": 4,
    "update_epochs": 2,
    "gamma": GAMMA,
    "gae_lambda": LAMBDA,
    "norm_adv": False,
    "learning_rate": 1e-30,  # changes no weight, so that the outputs of the networks can be computed here
}
LOG_STD = torch.tensor([-0.5, 0.2])


def reward_of(who, episode, count, reward):
    """The reward of ContinuousNumbered; in one of three environments two are far larger, at the end of an episode."""
    length, _, _ = ContinuousNumbered.episode(who, episode)
    return {1: 1e4, 20: -1e4}.get(episode, reward) if who % 3 == 0 and count == length else reward


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A run of 3 iterations, resumed for 2 more: the data that goes through train(), and what is expected.

    `rollouts`: for each iteration, arrays [T, N, ...] of observations, next observations, rewards, terminations,
    truncations and discounted returns so far in the episode, computed without the script. `noises`: of each step.
    `old_policies`, `gae`: of each iteration. `taken`: the actions that reach the environments in training.
    """
    record = SimpleNamespace(noises=[], old_policies=[], gae=[])
    randn_like, evaluate_actions, gae = torch.randn_like, ppo.Agent.evaluate_actions, ppo.compute_gae
    reset, step, initialize = ContinuousNumbered.reset, ContinuousNumbered.step, ppo.Agent.__init__
    seeds, steps = [], []

    def recorded_noise(means):
        record.noises.append(randn_like(means))
        return record.noises[-1]

    def recorded_evaluation(self, batch):
        outputs = evaluate_actions(self, batch)
        if batch["observations"].dim() == 3:  # the whole rollout, not a minibatch
            data = (batch["observations"], batch["actions"], outputs[0])
            record.old_policies.append([x.double().numpy().copy() for x in data])
        return outputs

    def recorded_gae(*inputs):
        record.gae.append(copy.deepcopy(inputs))
        return gae(*inputs)

    def recorded_reset(self, *, seed=None, options=None):
        seeds.extend([] if seed is None else [seed])
        return reset(self, seed=seed, options=options)

    def recorded_step(self, action):
        assert self.action_space.contains(action)  # in evaluation as well
        steps.append(action.copy())
        observation, reward, *ends = step(self, action)
        return observation, reward_of(self.me, self.number, self.count, reward), *ends

    def initialize_far_from_0(self, envs):
        """Means and standard deviations beyond the bounds, which depend on the observation."""
        initialize(self, envs)
        with torch.no_grad():
            self.actor[-1].weight.mul_(100)
            self.log_std.copy_(LOG_STD)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("recorded"))
        patch.setattr(torch, "randn_like", recorded_noise)
        patch.setattr(ppo.Agent, "evaluate_actions", recorded_evaluation)
        patch.setattr(ppo.Agent, "__init__", initialize_far_from_0)
        patch.setattr(ppo, "compute_gae", recorded_gae)
        patch.setattr(ContinuousNumbered, "reset", recorded_reset)
        patch.setattr(ContinuousNumbered, "step", recorded_step)
        record.run_dir = train(ppo, **FLAGS, total_timesteps=3 * N * T).resolve()
        record.first_checkpoint, first_seeds, first_steps = load(record.run_dir), seeds[:N], steps[:]
        seeds.clear()
        steps.clear()
        train(ppo, **FLAGS, total_timesteps=ITERATIONS * N * T, resume=str(record.run_dir))
        record.checkpoint = load(record.run_dir)
    record.taken = first_steps[: 3 * N * T] + steps[: 2 * N * T]
    record.rollouts = play(first_seeds, 3) + play(seeds[:N], 2)
    return record


def play(seeds, iterations):
    """The rollouts of environments reset with these seeds."""
    simulated = []
    for seed in seeds:
        rows, episode = [], []
        for before, after, reward, *ends in ContinuousNumbered.simulate(ContinuousNumbered.who(seed), iterations * T):
            episode.append(reward_of(*after, reward))
            discounted_return = sum(GAMMA**k * x for k, x in enumerate(reversed(episode)))
            rows.append((before, after, episode[-1], *ends, discounted_return))
            episode = [] if any(ends) else episode
        simulated.append(rows)
    columns = [np.array([[rows[t][i] for rows in simulated] for t in range(iterations * T)]) for i in range(6)]
    return [[column[i * T : (i + 1) * T] for column in columns] for i in range(iterations)]


def data_until(record, iterations, index):
    """One of the columns of `rollouts` of the first so many iterations, as rows."""
    data = [rollout[index].reshape(T * N, *rollout[index].shape[2:]) for rollout in record.rollouts[:iterations]]
    return np.concatenate(data).astype(float)


def network(checkpoint, name, x, mean, std):
    """Outputs of the actor or the critic of a checkpoint for the observations x, normalized by `mean` and `std`."""
    weights = {name: x.double().numpy() for name, x in checkpoint["agent"].items()}
    x = ((x - mean) / std).clip(-10, 10)
    for layer in (0, 2, 4):
        x = x @ weights[f"{name}.{layer}.weight"].T + weights[f"{name}.{layer}.bias"]
        x = np.tanh(x) if layer < 4 else x
    return x


def policy_and_value(record, iterations):
    """The normal policy and the value function with the statistics of the first so many iterations."""
    seen = data_until(record, iterations, 0) if iterations else np.array([[-1, -1, -1], [1, 1, 1]])
    mean, std = seen.mean(0), seen.std(0)

    def policy(x):
        return Normal(torch.tensor(network(record.checkpoint, "actor", x, mean, std)), torch.exp(LOG_STD))

    return policy, lambda x: network(record.checkpoint, "critic", x, mean, std)[..., 0]


def test_actions_are_stored_in_units_of_the_range_and_environments_get_their_values(record):
    """Actions are sampled with the statistics before the iteration's update, and so are their log-probabilities."""
    space, taken = ContinuousNumbered.action_space, np.array(record.taken).reshape(ITERATIONS, T, N, 2)
    noises = torch.stack(record.noises).numpy().reshape(ITERATIONS, T, N, 2)
    for i, (observations, actions, old_logprobs) in enumerate(record.old_policies):
        np.testing.assert_array_equal(observations, record.rollouts[i][0])
        before, after = (policy_and_value(record, iterations)[0](observations) for iterations in (i, i + 1))
        np.testing.assert_allclose(
            actions, before.mean.numpy() + noises[i] * before.stddev.numpy(), rtol=1e-4, atol=1e-4
        )
        assert 0.1 < (np.abs(actions) > 1).mean() < 0.9
        values = (space.low + space.high) / 2 + actions * (space.high - space.low) / 2
        np.testing.assert_allclose(taken[i], values.clip(space.low, space.high), rtol=0, atol=1e-6)
        assert all(action in space for action in taken[i].reshape(-1, 2))

        expected, later = (policy.log_prob(torch.tensor(actions)).sum(-1).numpy() for policy in (before, after))
        np.testing.assert_allclose(old_logprobs, expected, rtol=1e-3, atol=1e-3)
        assert np.abs(old_logprobs - later).max() > 0.01, "the test can tell old statistics from updated ones"


def test_observations_and_rewards_are_normalized_for_advantages_and_losses(record):
    """By the statistics of all data up to and including this iteration; also the true last observations.

    Rewards are divided by the standard deviation of discounted returns and clipped at 10 (details 28 to 31). With
    unchanged weights the value loss is half the mean square of the advantages; the ratio is that of the policies
    with the updated statistics and with those of acting.
    """
    curve, scaled_rewards = curves(record.run_dir), []
    for i, (observations, next_observations, rewards, terminations, truncations, _) in enumerate(record.rollouts):
        policy, value = policy_and_value(record, i + 1)
        scaled = (rewards / data_until(record, i + 1, 5).std()).clip(-10, 10)
        scaled_rewards.append(scaled)
        values, next_values = value(observations), value(next_observations)
        for ours, theirs in zip(record.gae[i][:3], (scaled, values, next_values), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)

        deltas = scaled + GAMMA * next_values * ~terminations - values
        advantages = np.zeros((T, N))
        for t, n in np.ndindex(T, N):
            for k in range(t, T):
                advantages[t, n] += (GAMMA * LAMBDA) ** (k - t) * deltas[k, n]
                if terminations[k, n] or truncations[k, n]:
                    break
        actions, old_logprobs = record.old_policies[i][1:]
        ratios = np.exp(policy(observations).log_prob(torch.tensor(actions)).sum(-1).numpy() - old_logprobs)
        gains = np.minimum(ratios * advantages, ratios.clip(0.8, 1.2) * advantages)
        assert curve["losses/policy_loss"][i] == ((i + 1) * T * N, pytest.approx(-gains.mean(), rel=1e-3, abs=1e-3))
        assert curve["losses/value_loss"][i][1] == pytest.approx(np.mean(advantages**2) / 2, rel=1e-3)
        assert curve["losses/approx_kl"][i][1] == pytest.approx(np.mean(ratios - 1 - np.log(ratios)), rel=1e-2)
    assert (np.min(scaled_rewards), np.max(scaled_rewards)) == (-10, 10)


def test_saved_statistics_are_those_of_all_data_so_far(record):
    """Over all environments and episodes, and after resuming also over both runs."""
    for iterations, checkpoint in ((3, record.first_checkpoint), (ITERATIONS, record.checkpoint)):
        for name, column in (("observation", 0), ("return", 5)):
            data = data_until(record, iterations, column)
            count, mean, std = (checkpoint["agent"][f"{name}_statistics.{x}"] for x in ("count", "mean", "std"))
            assert count == len(data) == iterations * N * T
            np.testing.assert_allclose(mean, data.mean(0), rtol=1e-5)
            np.testing.assert_allclose(std, data.std(0), rtol=1e-5)


TINY = {"env_id": "probe_envs:Spaces-v0", "num_envs": 2, "num_minibatches": 2, "update_epochs": 1}


@pytest.mark.filterwarnings("ignore:.*Casting input x:UserWarning")  # gymnasium's, of an action without shape
@pytest.mark.parametrize(
    ("actions", "observations", "num_inputs"),
    [
        ("number", "float64", 3),
        ("continuous", "dict", 5),
        ("matrix", "matrix", 6),
        ("unbounded", "int", 3),
        ("half-bounded", "bytes", 128),
        ("asymmetric", "tuple", 5),
        ("float64", "number", 1),
    ],
)
def test_spaces_are_trained_on_within_their_bounds(actions, observations, num_inputs, monkeypatch):
    """Actions have the space's shape, type and bounds, to the bit; each finite bound is met."""
    taken, step, space = [], Spaces.step, Spaces.action_spaces[actions]

    def recorded(self, action):
        taken.append(np.array(action))
        return step(self, action)

    monkeypatch.setattr(Spaces, "step", recorded)
    env_kwargs = (f"actions={actions}", f"observations={observations}")
    run_dir = train(ppo, **TINY, env_kwargs=env_kwargs, num_steps=256, total_timesteps=512)
    agent = load(run_dir)["agent"]
    assert agent["observation_statistics.mean"].shape == (num_inputs,)
    assert agent["log_std"].shape == (math.prod(space.shape),)
    assert all(x.shape == space.shape and x.dtype == space.dtype and space.contains(x) for x in taken)
    taken = np.array(taken)
    for bound in (space.low, space.high):
        assert ((taken == bound).any(0) == np.isfinite(bound)).all()
    inside = taken[(taken > space.low) & (taken < space.high)]
    assert len(np.unique(inside)) > 0.9 * len(inside) > 0, "each component is sampled on its own"


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--env-id", "CartPole-v1"), "ppo.py"),
        (("--env-kwargs", "actions=multidiscrete"), "Box"),
        (("--env-kwargs", "actions=dict"), "Box"),
        (("--env-kwargs", "actions=continuous", "observations=image"), "docs/forks.md"),
        (("--env-id", "HalfCheeta-v5"), "HalfCheeta"),
    ],
)
def test_other_spaces_are_refused(command_line, flags, word):
    """The line names the script for them, or the supported space."""
    assert_refused(ppo, command_line("--env-id", TINY["env_id"], *flags, script=ppo), word)


def test_evaluation_uses_the_saved_statistics_and_leaves_them(monkeypatch):
    """Raw returns of clipped greedy actions in [-2, 2], as from a plain loop; load_agent() gives this agent.

    The policy is made to depend strongly on the observation, and to be noisy if it is not greedy.
    """
    flags = {"num_envs": 4, "num_steps": 256, "num_minibatches": 8, "total_timesteps": 1024}
    args = ppo.Args("Pendulum-v1", seed=3, learning_rate=0.003, **flags, eval_episodes=3)
    run_dir = ppo.train(args)
    saved = load(run_dir)
    saved["agent"]["actor.4.weight"] *= 5
    saved["agent"]["log_std"] += 1
    torch.save(saved, run_dir / "checkpoint.pt")
    seeds, reset = [], PendulumEnv.reset

    def recorded_reset(self, *, seed=None, options=None):
        seeds.extend([] if seed is None else [seed])
        return reset(self, seed=seed, options=options)

    with monkeypatch.context() as patch:
        patch.setattr(PendulumEnv, "reset", recorded_reset)
        returns = ppo.evaluate(args, run_dir)

    def play(env, seed, mean, std):
        (observation, _), ended, total = env.reset(seed=seed), False, 0.0
        while not ended:
            action = (2 * network(saved, "actor", observation, mean, std)).clip(-2, 2)
            observation, reward, terminated, truncated, _ = env.step(action)
            ended, total = terminated or truncated, total + reward
        return total

    mean, std = (saved["agent"][f"observation_statistics.{name}"].numpy() for name in ("mean", "std"))
    env = gym.make("Pendulum-v1")
    assert returns == pytest.approx([play(env, seed, mean, std) for seed in seeds], rel=1e-3)
    assert returns != pytest.approx([play(env, seed, 0, 1) for seed in seeds], rel=0.01)
    assert ppo.evaluate(args, run_dir).tolist() == returns.tolist()
    assert same_weights(load(run_dir), saved)
    assert same_weights({"agent": ppo.load_agent(run_dir).state_dict()}, saved)
