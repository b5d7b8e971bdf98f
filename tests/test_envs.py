"""Environments: which ones run, what enters the batch, and their processes."""

import os
import signal

import pytest
import torch
from helpers import (
    alive,
    curves,
    descendants,
    finish,
    load,
    same_weights,
    the_run,
    train,
    wait_for_training,
    wait_until,
)
from probe_envs import Numbered, Spaces

import ppo

TINY = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "total_timesteps": 64}

# ------------------------------------------------------------------------------- which ones run


@pytest.mark.parametrize(
    ("env_id", "num_inputs"),
    [
        ("CartPole-v1", 4),
        ("FrozenLake-v1", 16),  # Discrete(16), one-hot
        ("Taxi-v4", 500),  # Discrete(500)
        ("Blackjack-v1", 32 + 11 + 2),  # Tuple of three Discrete
        ("LunarLander-v3", 8),
    ],
)
@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")  # Box2D's own
def test_gymnasium_environments_run(env_id, num_inputs):
    agent = ppo.train(ppo.Args(env_id, **TINY, eval_episodes=1))
    assert agent.actor[0].in_features == num_inputs


@pytest.mark.parametrize(
    ("observations", "num_inputs"),
    [
        ("float64", 3),
        ("int", 3),
        ("bytes", 128),
        ("matrix", 6),
        ("number", 1),
        ("discrete", 4),
        ("multidiscrete", 3 + 2),
        ("multibinary", 4),
        ("dict", 3 + 2),
        ("tuple", 2 + 3),
    ],
)
def test_every_flat_observation_space_runs(observations, num_inputs):
    agent = ppo.train(
        ppo.Args("probe_envs:Spaces-v0", env_kwargs=(f"observations={observations}",), **TINY, eval_episodes=1)
    )
    assert agent.actor[0].in_features == agent.critic[0].in_features == num_inputs


@pytest.mark.parametrize("async_envs", [False, True])
@pytest.mark.parametrize(("actions", "allowed"), [("shifted", {5, 6, 7}), ("negative", {-1, 0, 1}), ("single", {0})])
def test_actions_start_where_the_space_does(actions, allowed, async_envs, monkeypatch):
    """The environment itself refuses others. Both training and evaluation take all of them, and no others."""
    taken, step = set(), Spaces.step

    def noted(self, action):
        taken.add(int(action))
        return step(self, action)

    monkeypatch.setattr(Spaces, "step", noted)
    train(env_id="probe_envs:Spaces-v0", env_kwargs=(f"actions={actions}",), async_envs=async_envs, **TINY)
    # what processes of their own take is not seen here, but there, too, a wrong action fails
    assert taken <= allowed
    assert async_envs or taken == allowed


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"env_kwargs": ("observations=image",)}, ["(84, 84, 3)", "ppo_atari.py"]),
        ({"env_kwargs": ("observations=grey image",)}, ["(84, 84)", "ppo_atari.py"]),
        ({"env_kwargs": ("observations=sequence",)}, ["Sequence", "supported: Box, Discrete, MultiDiscrete"]),
        ({"env_kwargs": ("actions=continuous",)}, ["ppo_continuous_action.py"]),
        ({"env_kwargs": ("actions=multidiscrete",)}, ["MultiDiscrete([2 3])", "supported: Discrete"]),
        ({"env_id": "Pendulum-v1"}, ["Pendulum-v1", "ppo_continuous_action.py"]),
    ],
)
@pytest.mark.parametrize("async_envs", [False, True])
def test_other_spaces_are_refused(flags, words, async_envs):
    """The message names the script that is for them, or says what is supported."""
    with pytest.raises(ppo.UsageError) as error:
        train(**{"env_id": "probe_envs:Spaces-v0", **flags}, async_envs=async_envs)
    assert all(word in str(error.value) for word in words)


def test_env_kwargs_reach_the_environment():
    """Python literals as such, anything else as a string."""
    flags = {"num_envs": 1, "num_steps": 8, "num_minibatches": 1, "total_timesteps": 8}
    agent = ppo.train(
        ppo.Args("FrozenLake-v1", env_kwargs=("map_name=8x8", "is_slippery=False"), **flags, eval_episodes=1)
    )
    assert agent.actor[0].in_features == 64
    envs = ppo.make_envs(ppo.Args("FrozenLake-v1", env_kwargs=("map_name=8x8", "is_slippery=False")), 1)
    assert envs.envs[0].spec.kwargs == {"map_name": "8x8", "is_slippery": False}


# ---------------------------------------------------------------------- what enters the batch


@pytest.mark.parametrize("async_envs", [False, True])
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.filterwarnings("ignore:.*share an object.*")
def test_batches_hold_exactly_what_happened(reuse, async_envs, monkeypatch):
    """Over 3 iterations: no row of a reset, none missing, no observation of an earlier or later time, and after
    the last step of an episode the next observation is the true last one, not the first of the next episode.
    """
    gae_inputs, batches = [], []
    compute_gae, minibatches = ppo.compute_gae, ppo.minibatches

    def noted_gae(*inputs):
        gae_inputs.append([x.clone() if isinstance(x, torch.Tensor) else x for x in inputs])
        return compute_gae(*inputs)

    def noted_minibatches(args, batch):
        batches.append([x.clone() for x in batch])
        return minibatches(args, batch)

    monkeypatch.setattr(ppo, "compute_gae", noted_gae)
    monkeypatch.setattr(ppo, "minibatches", noted_minibatches)
    args = ppo.Args(
        "probe_envs:Numbered-v0",
        env_kwargs=(f"reuse={reuse}",),
        num_envs=3,
        num_steps=20,
        total_timesteps=180,
        learning_rate=1e-30,  # leaves the weights as they are, so that the values can be computed here, too
        async_envs=async_envs,
        eval_episodes=1,
    )
    agent = ppo.train(args)

    played = [Numbered.simulate(Numbered.who(seed), 60) for seed in ppo.env_seeds(3, args.seed, 0, 0)]
    assert len({rows[0][0][0] for rows in played}) == 3, "every environment has a seed of its own"
    assert len(gae_inputs) == len(batches) == 3
    for iteration in range(3):
        rows = [[played[n][t] for n in range(3)] for t in range(20 * iteration, 20 * (iteration + 1))]
        observations, next_observations, rewards, terminations, truncations = (
            torch.tensor([[row[i] for row in step] for step in rows]) for i in range(5)
        )
        assert terminations.any() and truncations.any() and (terminations & truncations).any()
        in_rewards, values, next_values, in_terminations, in_truncations, gamma, gae_lambda = gae_inputs[iteration]
        assert torch.equal(batches[iteration][0], observations.float().flatten(0, 1))
        assert torch.equal(in_rewards, rewards.float())
        assert torch.equal(in_terminations, terminations)
        assert torch.equal(in_truncations, truncations)
        assert (gamma, gae_lambda) == (args.gamma, args.gae_lambda)
        with torch.no_grad():
            torch.testing.assert_close(values, agent.value(observations.float()))
            torch.testing.assert_close(next_values, agent.value(next_observations.float()))
        advantages, returns = batches[iteration][4:]
        assert torch.equal(advantages, compute_gae(*gae_inputs[iteration]).flatten())
        torch.testing.assert_close(returns, advantages + values.flatten())


def test_seeds_of_different_purposes_do_not_meet():
    """Training, resumed training and evaluation play different episodes, and so do different seeds."""
    keys = [(seed, purpose, iteration) for seed in (1, 2) for purpose in (0, 1) for iteration in (0, 1)]
    seeds = [x for key in keys for x in ppo.env_seeds(10, *key)]
    assert len(set(seeds)) == len(seeds) == 80
    assert ppo.env_seeds(10, 1, 0, 0) == ppo.env_seeds(10, 1, 0, 0)


# ------------------------------------------------------------------------------- processes

linux = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are looked up in /proc")
ENDLESS = ("--async-envs", "--num-envs", 3, "--total-timesteps", 10**9)


def test_async_envs_give_the_same_curves_and_weights():
    """To the bit."""
    flags = {"num_envs": 3, "num_steps": 128, "total_timesteps": 1500}
    one, other = (train(exp_name=str(flag), async_envs=flag, **flags) for flag in (False, True))
    assert curves(one) == curves(other)
    assert "charts/episodic_return" in curves(one)
    assert same_weights(load(one), load(other))


def workers(process):
    """The processes of its environments."""
    wait_for_training(process)
    pids = descendants(process.pid)
    assert len(pids) >= 3
    return pids


@linux
@pytest.mark.parametrize(
    ("signum", "send"),
    [
        (signal.SIGINT, os.killpg),  # Ctrl-C: a terminal tells the whole process group
        (signal.SIGTERM, os.kill),  # kill: the main process alone
        (signal.SIGTERM, os.killpg),  # timeout, systemd, Slurm: all processes
    ],
)
def test_async_envs_leave_no_process_behind_when_stopped(start, signum, send):
    """And the iteration is finished and saved as without them."""
    process = start(*ENDLESS)
    pids = workers(process)
    send(process.pid, signum)
    code, _, err = finish(process)
    assert code == 128 + signum
    assert "Traceback" not in err
    assert load(the_run())["iteration"] >= 1
    assert not any(map(alive, pids))


@linux
def test_async_envs_leave_no_process_behind_when_killed(start):
    process = start(*ENDLESS)
    pids = workers(process)
    process.kill()
    finish(process)
    wait_until(lambda: not any(map(alive, pids)), "the environments' processes end")


@linux
@pytest.mark.parametrize(("what", "index"), [("exception", 1), ("death", 0), ("death", 2)])
def test_async_envs_leave_no_process_behind_when_an_environment_crashes(start, what, index):
    """One of three raises an exception, or its process is killed, as the system does when memory runs out."""
    seed = ppo.env_seeds(3, 1, 0, 0)[index]
    fault = ("--env-kwargs", f"what={what}", "at=500", f"seed={seed}")
    process = start("--env-id", "probe_envs:Faulty-v0", *fault, *ENDLESS)
    pids = workers(process)
    code, _, err = finish(process)
    assert code == 1
    assert ("the environment has a bug" if what == "exception" else "Error") in err
    assert not any(map(alive, pids))
