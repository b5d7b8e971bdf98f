"""What ppo_continuous_action.py's train() and evaluate() do to observations, actions and rewards.

Training is run on environments whose every observation and reward is known beforehand, with functions wrapped
so that what goes in and out can be looked at; the functions themselves still do the work.
"""

import copy
import dataclasses
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import curves, load, train
from probe_envs import ContinuousNumbered, Spaces

import ppo_continuous_action as ppo

N, T = 3, 20
FLAGS = {
    "env_id": "probe_envs:ContinuousNumbered-v0",
    "num_envs": N,
    "num_steps": T,
    "num_minibatches": 4,
    "update_epochs": 2,
    "gamma": 0.9,
    "learning_rate": 1e-30,  # leaves the weights as they are, so that their outputs can be computed here, too
    "eval_episodes": 1,
}
ITERATIONS = 5  # 3 of a run, then 2 of the same run resumed
TINY = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "total_timesteps": 16, "eval_episodes": 1}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of 3 iterations that is resumed for 2 more: what went through train(), and what should have.

    `rows`: for each iteration, [T][N] of (observation, next observation, reward, termination, truncation), computed
    without the script. `noises`, `batches`, `gae`: of each iteration. `taken`: the actions that reached the
    environments. `before`: the agent that training began with.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("recorded"))
        record = SimpleNamespace(noises=[], batches=[], gae=[], taken=[])
        sample_noise, minibatches, gae = ppo.Agent.sample_noise, ppo.minibatches, ppo.compute_gae
        step, initialise = ContinuousNumbered.step, ppo.Agent.__init__

        def noted_noise(self, *shape):
            record.noises.append(sample_noise(self, *shape))
            return record.noises[-1]

        def noted_minibatches(args, batch):
            record.batches.append([x.clone() for x in batch])
            return minibatches(args, batch)

        def noted_gae(*inputs):
            record.gae.append([x.clone() if isinstance(x, torch.Tensor) else x for x in inputs])
            return gae(*inputs)

        def noted_step(self, action):
            record.taken.append((self.me, action.copy()))
            return step(self, action)

        def opinionated(self, envs):
            """Means and standard deviations that depend on what is observed, and lie beyond the bounds, too."""
            initialise(self, envs)
            with torch.no_grad():
                self.actor[-1].weight.mul_(100)
                self.log_std.copy_(torch.tensor([-0.5, 0.2]))

        patch.setattr(ppo.Agent, "sample_noise", noted_noise)
        patch.setattr(ppo, "minibatches", noted_minibatches)
        patch.setattr(ppo, "compute_gae", noted_gae)
        patch.setattr(ContinuousNumbered, "step", noted_step)
        patch.setattr(ppo.Agent, "__init__", opinionated)
        torch.manual_seed(1)
        record.before = ppo.Agent(ppo.make_envs(ppo.Args(**FLAGS), 1))
        run_dir = train(ppo, **FLAGS, total_timesteps=3 * N * T).resolve()
        record.first_run = load(run_dir)
        record.num_taken = 3 * N * T  # the rest is the evaluation
        record.agent = ppo.train(ppo.load_args(str(run_dir), resume=str(run_dir), total_timesteps=ITERATIONS * N * T))
        record.run_dir, record.saved = run_dir, load(run_dir)

    def play(iterations, first_iteration):
        seeds = ppo.env_seeds(N, 1, 0, first_iteration)
        played = [ContinuousNumbered.simulate(ContinuousNumbered.who(seed), iterations * T) for seed in seeds]
        return [[[rows[i * T + t] for rows in played] for t in range(T)] for i in range(iterations)]

    record.runs = [play(3, 0), play(2, 3)]
    record.rows = record.runs[0] + record.runs[1]
    return record


def column(rows, index):
    """One of an iteration's columns as float64 [T, N, ...]."""
    return np.array([[row[index] for row in step] for step in rows], float)


def observations_until(record, iterations):
    """All that the agent acted on in the first so many iterations, over all environments."""
    return np.concatenate([column(rows, 0).reshape(T * N, 3) for rows in record.rows[:iterations]])


def discounted_returns_until(record, iterations):
    """The discounted sum of the rewards so far, in every step of every episode, from its definition.

    An episode begins where the one before ended, by whatever end, and where a run begins or is resumed.
    """
    returns, left = [], iterations
    for run in record.runs:
        steps = [step for rows in run[:left] for step in rows]
        left -= len(steps) // T
        for n in range(N):
            rewards = []
            for _, _, reward, terminated, truncated in (step[n] for step in steps):
                rewards.append(reward)
                returns.append(sum(0.9**k * r for k, r in enumerate(reversed(rewards))))
                if terminated or truncated:
                    rewards = []
    assert len(returns) == iterations * T * N
    return np.array(returns)


def numpy_agent(record, iterations):
    """The agent with the statistics of the first so many iterations, computed here: mean actions and values."""
    seen = observations_until(record, iterations) if iterations else None
    mean, std = (seen.mean(0), seen.std(0)) if iterations else (np.zeros(3), np.ones(3))
    weights = {name: x.detach().double().numpy() for name, x in record.before.named_parameters()}

    def network(name, observations):
        x = ((observations - mean) / std).clip(-10, 10)
        for layer in (0, 2, 4):
            x = x @ weights[f"{name}.{layer}.weight"].T + weights[f"{name}.{layer}.bias"]
            x = np.tanh(x) if layer < 4 else x
        return x

    return lambda x: network("actor", x), lambda x: network("critic", x)[..., 0], np.exp(weights["log_std"])


# ------------------------------------------------------------------------------- through train()


def test_the_record_is_not_trivial(recorded):
    """All kinds of ends are in it, in both runs, and episodes that span iterations; the weights stayed the same."""
    for run in recorded.runs:
        kinds = {(terminated, truncated) for rows in run for step in rows for _, _, _, terminated, truncated in step}
        assert kinds == {(False, False), (True, False), (False, True), (True, True)}
    assert any(not (row[3] or row[4]) for row in recorded.rows[0][-1])
    assert len({row[0][0] for row in recorded.rows[0][0]}) == N
    assert len(recorded.batches) == len(recorded.gae) == len(recorded.noises) == ITERATIONS
    for name, parameter in recorded.before.named_parameters():
        torch.testing.assert_close(parameter.detach(), recorded.saved["agent"][name])


@pytest.mark.parametrize("iteration", range(ITERATIONS))
def test_observations_and_actions_are_stored_as_they_were(recorded, iteration):
    """Observations raw; actions as sampled, beyond the bounds, with the statistics before this iteration's update."""
    observations, actions = recorded.batches[iteration][:2]
    expected = column(recorded.rows[iteration], 0)
    np.testing.assert_array_equal(observations.numpy(), expected.reshape(-1, 3))
    means, _, std = numpy_agent(recorded, iteration)
    sampled = means(expected) + recorded.noises[iteration].numpy() * std
    np.testing.assert_allclose(actions.numpy().reshape(T, N, 2), sampled, rtol=1e-4, atol=1e-4)
    space = ContinuousNumbered.action_space
    outside = (actions.numpy() < space.low) | (actions.numpy() > space.high)
    assert 0.1 < outside.mean() < 0.9


def test_environments_get_the_stored_actions_clipped_to_their_bounds(recorded):
    """Each environment its own, as an array of the space's type."""
    space = ContinuousNumbered.action_space
    taken = recorded.taken[: recorded.num_taken]
    stored = torch.cat([recorded.batches[i][1] for i in range(3)]).numpy()
    who = [row[0][0] for rows in recorded.rows[:3] for step in rows for row in step]
    assert [me for me, _ in taken] == who
    assert all(action.dtype == np.float32 and action.shape == (2,) for _, action in recorded.taken)
    np.testing.assert_array_equal([action for _, action in taken], np.clip(stored, space.low, space.high))
    assert all(space.contains(action) for _, action in recorded.taken), "in evaluation, too"


@pytest.mark.parametrize("iteration", range(ITERATIONS))
def test_rewards_values_and_ends_as_they_enter_the_advantages(recorded, iteration):
    """Rewards scaled, and observations normalized, by the statistics of all up to and including this iteration.

    So are the true last observations of episodes, whose values stand in for what a time limit cut off.
    """
    rewards, values, next_values, terminations, truncations, gamma, gae_lambda = recorded.gae[iteration]
    rows = recorded.rows[iteration]
    std = discounted_returns_until(recorded, iteration + 1).std()
    scaled = (column(rows, 2) / std).clip(-10, 10)
    np.testing.assert_allclose(rewards.numpy(), scaled, rtol=1e-4)
    _, value, _ = numpy_agent(recorded, iteration + 1)
    np.testing.assert_allclose(values.numpy(), value(column(rows, 0)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(next_values.numpy(), value(column(rows, 1)), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(terminations.numpy(), column(rows, 3))
    np.testing.assert_array_equal(truncations.numpy(), column(rows, 4))
    assert (gamma, gae_lambda) == (0.9, 0.95)
    # this could see whether the statistics are those before the update
    earlier = numpy_agent(recorded, iteration)[1](column(rows, 1))
    assert np.abs(earlier - value(column(rows, 1))).max() > 0.01


@pytest.mark.parametrize("iteration", range(ITERATIONS))
def test_the_old_policy_is_that_of_the_updated_statistics(recorded, iteration):
    """Log-probabilities are computed after the statistics have taken in the rollout, and so before the first update.

    The policy that played had the statistics before. With the old log-probabilities of the new ones, ratios begin
    at exactly 1: what is learned is how far the weights, not the statistics, have moved the policy.
    """
    observations, actions, old_logprobs = (x.double().numpy() for x in recorded.batches[iteration][:3])

    def logprobs(iterations):
        means, _, std = numpy_agent(recorded, iterations)
        density = np.exp(-(((actions - means(observations)) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))
        return np.log(density).sum(1)

    np.testing.assert_allclose(old_logprobs, logprobs(iteration + 1), rtol=1e-3, atol=1e-3)
    assert np.abs(old_logprobs - logprobs(iteration)).max() > 0.01


@pytest.mark.parametrize(("which", "iterations"), [("first_run", 3), ("saved", ITERATIONS)])
def test_saved_statistics_are_those_of_everything_so_far(recorded, which, iterations):
    """Of all observations that were acted on and of all discounted returns, over all environments, ends and runs."""
    state = getattr(recorded, which)["agent"]
    seen, returns = observations_until(recorded, iterations), discounted_returns_until(recorded, iterations)
    assert state["observation_statistics.count"] == state["return_statistics.count"] == iterations * N * T
    np.testing.assert_allclose(state["observation_statistics.mean"], seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(state["observation_statistics.std"], seen.std(0), rtol=1e-5)
    assert state["return_statistics.mean"].item() == pytest.approx(returns.mean(), rel=1e-5)
    assert state["return_statistics.std"].item() == pytest.approx(returns.std(), rel=1e-5)


def test_logged_returns_are_raw(recorded):
    """Undiscounted sums of the rewards as the environments gave them."""
    returns, lengths = [], []
    for run in recorded.runs:
        totals, counts, means = np.zeros(N), np.zeros(N), []
        for rows in run:
            finished = []
            for step in rows:
                for n, (_, _, reward, terminated, truncated) in enumerate(step):
                    totals[n] += reward
                    counts[n] += 1
                    if terminated or truncated:
                        finished.append((totals[n], counts[n]))
                        totals[n] = counts[n] = 0
            means.append(np.mean(finished, axis=0))
            returns.extend(total for total, _ in finished)
        lengths.extend(means)
    assert recorded.saved["recent_returns"] == returns[-100:]
    curve = curves(recorded.run_dir)
    steps = [T * N * (i + 1) for i in range(ITERATIONS)]
    for i, name in enumerate(("episodic_return", "episodic_length")):
        expected = [(step, pytest.approx(mean[i])) for step, mean in zip(steps, lengths, strict=True)]
        assert curve[f"charts/{name}"] == expected


def test_environments_in_processes_of_their_own_give_the_same():
    """With --async-envs: the same curves, weights and statistics, to the bit."""
    flags = {**FLAGS, "learning_rate": 1e-3, "total_timesteps": 2 * N * T}
    one, other = (train(ppo, **flags, async_envs=x, exp_name=str(x)) for x in (False, True))
    assert curves(one) == curves(other)
    for name, x in load(one)["agent"].items():
        assert torch.equal(x, load(other)["agent"][name]), name


# --------------------------------------------------------------------------------- action spaces


@pytest.mark.filterwarnings("ignore:.*Casting input x:UserWarning")  # gymnasium's own, of an action without shape
@pytest.mark.parametrize(
    "actions", ["number", "continuous", "matrix", "unbounded", "half-bounded", "asymmetric", "float64"]
)
def test_every_action_space_of_real_numbers_runs(actions, monkeypatch):
    """The environments get what is within the bounds, to the bit, and both bounds are met where there are such."""
    taken, step, space = [], Spaces.step, Spaces.action_spaces[actions]

    def noted(self, action):
        taken.append(np.asarray(action))
        return step(self, action)

    monkeypatch.setattr(Spaces, "step", noted)
    flags = {**TINY, "num_steps": 256, "total_timesteps": 512}  # bounds are two standard deviations away
    agent = ppo.train(ppo.Args("probe_envs:Spaces-v0", env_kwargs=(f"actions={actions}",), **flags))
    assert agent.num_actions == math.prod(space.shape)
    assert all(x.shape == space.shape and x.dtype == space.dtype and space.contains(x) for x in taken)
    taken = np.array(taken)
    for bound in (space.low, space.high):
        finite = np.isfinite(bound)
        assert ((taken == bound).any(0) == finite).all()
    inside = (taken > space.low) & (taken < space.high)
    assert inside.any(0).all()
    if actions == "matrix":
        assert len(np.unique(taken[inside])) == inside.sum(), "each number of the matrix is drawn on its own"


@pytest.mark.filterwarnings("ignore:.*Casting input x:UserWarning")
@pytest.mark.parametrize("actions", ["number", "matrix", "float64"])
def test_action_spaces_run_in_processes_of_their_own(actions):
    """The environment itself refuses what is not in its space."""
    train(ppo, env_id="probe_envs:Spaces-v0", env_kwargs=(f"actions={actions}",), **TINY, async_envs=True)


def test_actions_go_to_their_places():
    """The k-th number of a row is the k-th of the action, row by row; each environment gets its own row."""
    args = ppo.Args("probe_envs:Spaces-v0", env_kwargs=("actions=matrix",))
    envs = ppo.make_envs(args, 2)
    actions = np.linspace(-0.5, 0.6, 12, dtype=np.float32).reshape(2, 6)
    bounded = ppo.within_bounds(actions, envs)
    np.testing.assert_array_equal(bounded, actions.reshape(2, 2, 3))
    np.testing.assert_array_equal(ppo.within_bounds(actions * 10, envs), (10 * bounded).clip(-1, 1))


@pytest.mark.parametrize(("observations", "num_inputs"), [("float64", 3), ("matrix", 6), ("int", 3), ("dict", 5)])
def test_observations_of_every_kind_are_vectors_of_float32(observations, num_inputs):
    """As in ppo.py, and the statistics have a component for each of their numbers."""
    flags = {"env_kwargs": (f"observations={observations}", "actions=continuous"), **TINY}
    agent = ppo.train(ppo.Args("probe_envs:Spaces-v0", **flags))
    assert agent.actor[0].in_features == agent.critic[0].in_features == num_inputs
    assert agent.observation_statistics.mean.shape == (num_inputs,)
    assert agent.observation_statistics.mean.dtype == torch.float32


@pytest.mark.parametrize("async_envs", [False, True])
@pytest.mark.parametrize(
    ("env_kwargs", "words"),
    [
        (("actions=discrete",), ["discrete actions", "use ppo.py"]),
        (("actions=integers",), ["int64", "supported: Box of floating-point numbers"]),
        (("actions=multidiscrete",), ["MultiDiscrete([2 3])", "supported: Box of floating-point numbers"]),
        (("actions=multibinary",), ["MultiBinary(3)", "supported: Box of floating-point numbers"]),
        (("actions=tuple",), ["Tuple", "supported: Box of floating-point numbers"]),
        (("actions=dict",), ["Dict", "supported: Box of floating-point numbers"]),
        (("actions=continuous", "observations=image"), ["(84, 84, 3)", "ppo_atari.py"]),
        (("actions=continuous", "observations=grey image"), ["(84, 84)", "ppo_atari.py"]),
        (("actions=continuous", "observations=sequence"), ["Sequence", "supported: Box, Discrete, MultiDiscrete"]),
    ],
)
def test_other_spaces_are_refused(env_kwargs, words, async_envs):
    """The message names the script that is for them, or says what is supported."""
    with pytest.raises(ppo.UsageError) as error:
        ppo.make_envs(ppo.Args("probe_envs:Spaces-v0", env_kwargs=env_kwargs, async_envs=async_envs), 2)
    assert all(word in str(error.value) for word in words)


# ------------------------------------------------------------------------------------ evaluation


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory):
    """A run of Pendulum, and its checkpoint with a policy that follows the observation closely."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("pendulum"))
        flags = {"num_envs": 2, "num_steps": 250, "num_minibatches": 4, "total_timesteps": 500, "eval_episodes": 1}
        run_dir = train(ppo, env_id="Pendulum-v1", **flags, seed=3).resolve()
        checkpoint = load(run_dir)
        checkpoint["agent"]["actor.4.weight"] *= 100
        checkpoint["agent"]["log_std"] += 1  # noise would show
        torch.save(checkpoint, run_dir / "checkpoint.pt")
        return run_dir


def play(checkpoint, num_episodes, mean, std):
    """The returns of greedy episodes of Pendulum, one after the other, observations normalized with these."""
    weights = {name: x.numpy() for name, x in checkpoint["agent"].items()}
    returns, env = [], gym.make("Pendulum-v1")
    for seed in ppo.env_seeds(num_episodes, 3, 1):
        observation, _ = env.reset(seed=seed)
        ended, total = False, 0.0
        while not ended:
            x = ((observation - mean) / std).clip(-10, 10)
            for layer in (0, 2, 4):
                x = weights[f"actor.{layer}.weight"] @ x + weights[f"actor.{layer}.bias"]
                x = np.tanh(x) if layer < 4 else x
            observation, reward, terminated, truncated, _ = env.step(x.clip(-2, 2))
            ended, total = terminated or truncated, total + reward
        returns.append(total)
    return returns


def test_evaluation_plays_raw_greedy_episodes_with_the_loaded_statistics(pendulum):
    """What a plain loop gets that normalizes with the numbers in the checkpoint; they stay as they are."""
    args, (run_dir, checkpoint) = ppo.load_args(str(pendulum), eval_episodes=3), ppo.load_checkpoint(str(pendulum))
    state = copy.deepcopy(checkpoint["agent"])
    returns = ppo.evaluate(args, run_dir, checkpoint)
    mean, std = (state[f"observation_statistics.{name}"].numpy() for name in ("mean", "std"))
    assert returns == pytest.approx(play(checkpoint, 3, mean, std), rel=1e-3)
    assert returns != pytest.approx(play(checkpoint, 3, np.zeros(3), np.ones(3)), rel=0.01)
    assert ppo.evaluate(args, run_dir, checkpoint).tolist() == returns.tolist()
    assert checkpoint["agent"].keys() == state.keys()
    assert all(torch.equal(x, checkpoint["agent"][name]) for name, x in state.items())


def test_statistics_are_frozen_in_evaluation(pendulum, monkeypatch):
    """The agent that plays has, at the end, the very state that was loaded."""
    agents, act = [], ppo.Agent.act

    def noted(self, *inputs, **options):
        agents.append(self)
        return act(self, *inputs, **options)

    monkeypatch.setattr(ppo.Agent, "act", noted)
    run_dir, checkpoint = ppo.load_checkpoint(str(pendulum))
    ppo.evaluate(dataclasses.replace(ppo.load_args(str(pendulum)), eval_episodes=2), run_dir, checkpoint)
    assert len(agents) == 200
    state = agents[-1].state_dict()
    assert all(torch.equal(x, state[name]) for name, x in load(pendulum)["agent"].items())


def test_what_training_evaluates_is_what_is_saved():
    """The evaluation after training and one of the checkpoint are of the same agent, statistics and all."""
    run_dir = train(ppo, env_id="Pendulum-v1", num_envs=2, num_steps=128, total_timesteps=512, eval_episodes=2)
    ppo.evaluate(ppo.load_args(str(run_dir)), *ppo.load_checkpoint(str(run_dir)))
    (_, first), (_, second) = curves(run_dir)["eval/episodic_return"]
    assert first == second
