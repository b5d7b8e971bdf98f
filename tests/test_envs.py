"""Environments: supported spaces, the contents of the batch, and the processes of --async-envs."""

import os
import signal
from pathlib import Path

import numpy as np
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


def spaces(**kwargs):
    """Flags of the environment with these spaces."""
    return {"env_id": "probe_envs:Spaces-v0", "env_kwargs": tuple(f"{name}={x}" for name, x in kwargs.items())}


@pytest.mark.parametrize(
    ("flags", "num_inputs"),
    [
        ({"env_id": "FrozenLake-v1", "env_kwargs": ("map_name=8x8", "is_slippery=False")}, 64),  # Discrete(64)
        ({"env_id": "Blackjack-v1"}, 32 + 11 + 2),  # Tuple of three Discrete
        (spaces(observations="float64"), 3),
        (spaces(observations="bytes"), 128),
        (spaces(observations="matrix"), 6),
        (spaces(observations="number"), 1),
        (spaces(observations="discrete"), 4),
        (spaces(observations="multidiscrete"), 3 + 2),
        (spaces(observations="multibinary"), 4),
        (spaces(observations="dict"), 3 + 2),
        (spaces(observations="tuple"), 2 + 3),
        (spaces(observations="text in dict"), 2),
        (spaces(observations="graph in dict"), 2),
    ],
)
def test_supported_observation_spaces(flags, num_inputs):
    """Each is flattened, trained on, saved and loaded again."""
    agent = ppo.load_agent(train(**flags, **TINY))
    assert agent.actor[0].in_features == agent.critic[0].in_features == num_inputs


@pytest.mark.parametrize(("observations", "entry"), [("text in dict", "mission"), ("graph in dict", "graph")])
def test_entries_that_cannot_be_flattened_are_named_in_one_line(observations, entry, capsys):
    assert ppo.make_envs(ppo.Args(**spaces(observations=observations)), 3).single_observation_space.shape == (2,)
    (line,) = capsys.readouterr().out.splitlines()
    assert entry in line
    assert "speed" not in line


@pytest.mark.parametrize(("actions", "allowed"), [("shifted", {5, 6, 7}), ("negative", {-1, 0, 1}), ("single", {0})])
def test_actions_start_where_the_space_does(actions, allowed, monkeypatch):
    """In training and evaluation. The environment itself refuses other actions."""
    taken, step = set(), Spaces.step

    def recording_step(self, action):
        taken.add(int(action))
        return step(self, action)

    monkeypatch.setattr(Spaces, "step", recording_step)
    train(**spaces(actions=actions), **TINY)
    assert taken == allowed


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (spaces(observations="image"), "ppo_atari.py"),
        (spaces(observations="grey image"), "ppo_atari.py"),
        (spaces(actions="multidiscrete"), "MultiDiscrete"),
        ({"env_id": "Pendulum-v1"}, "ppo_continuous_action.py"),
    ],
)
@pytest.mark.parametrize("async_envs", [False, True])
def test_unsupported_spaces_are_refused(flags, word, async_envs):
    with pytest.raises(ppo.UsageError, match=word):
        train(**flags, async_envs=async_envs)


def test_env_kwargs_reach_the_environment():
    """Python literals as such, anything else as a string."""
    args = ppo.Args("FrozenLake-v1", env_kwargs=("map_name=8x8", "is_slippery=False"))
    assert ppo.make_envs(args, 1).envs[0].spec.kwargs == {"map_name": "8x8", "is_slippery": False}


@pytest.mark.parametrize("async_envs", [False, True])
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.filterwarnings("ignore:.*share an object.*")
def test_batches_hold_the_transitions(reuse, async_envs, monkeypatch):
    """In 3 iterations: no row of a reset, none missing, no observation of another time.

    After the last step of an episode the next observation is the true last one, not the first of the next episode.
    """
    gae_inputs, batches = [], []
    compute_gae, index_select = ppo.compute_gae, torch.Tensor.index_select

    def recording_gae(*inputs):
        gae_inputs.append([np.copy(x) for x in inputs])
        return compute_gae(*inputs)

    def recording_index_select(x, dim, indices):
        batches.append(x.clone())
        return index_select(x, dim, indices)

    monkeypatch.setattr(ppo, "compute_gae", recording_gae)
    monkeypatch.setattr(torch.Tensor, "index_select", recording_index_select)
    flags = {"num_envs": 3, "num_steps": 20, "total_timesteps": 180, "num_minibatches": 1, "update_epochs": 1}
    flags["learning_rate"] = 1e-30  # the weights stay as they are
    env_kwargs = (f"reuse={reuse}",)
    run_dir = train(env_id="probe_envs:Numbered-v0", env_kwargs=env_kwargs, async_envs=async_envs, **flags)
    agent, args = ppo.load_agent(run_dir), ppo.Args()
    assert len(gae_inputs) == 3
    assert len(batches) == 3 * 6
    names = batches[0][:3, 0].int().tolist()
    assert len(set(names)) == 3, "each environment has its own seed"
    played = [Numbered.simulate(name, 60) for name in names]
    for iteration in range(3):
        rows = [[played[n][t] for n in range(3)] for t in range(20 * iteration, 20 * (iteration + 1))]
        expected = [torch.tensor([[row[i] for row in step] for step in rows]) for i in range(5)]
        observations, next_observations, rewards, terminations, truncations = expected
        assert terminations.any() and truncations.any() and (terminations & truncations).any()
        with torch.no_grad():
            values, next_values = agent.value(observations.float()), agent.value(next_observations.float())
        expected = rewards, values, next_values, terminations, truncations, args.gamma, args.gae_lambda
        for actual, x in zip(gae_inputs[iteration], expected, strict=True):
            np.testing.assert_allclose(actual, np.asarray(x), rtol=1e-5, atol=1e-5)

        b_observations, b_actions, *batch = batches[6 * iteration : 6 * (iteration + 1)]
        assert torch.equal(b_observations, observations.float().flatten(0, 1))
        logits = agent.actor(b_observations).detach()
        logprobs = torch.distributions.Categorical(logits=logits).log_prob(b_actions)
        advantages = torch.as_tensor(compute_gae(*gae_inputs[iteration])).flatten()
        expected = logprobs, values.flatten(), advantages, advantages + values.flatten()
        for actual, x in zip(batch, expected, strict=True):
            np.testing.assert_allclose(actual, x, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- processes of --async-envs

linux = pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="processes are looked up in /proc")
ENDLESS = ("--async-envs", "--num-envs", 2, "--num-steps", 64, "--total-timesteps", 10**9)


def workers(process):
    """The processes of the environments, once training has begun."""
    wait_for_training(process)
    pids = descendants(process.pid)
    assert len(pids) >= 2
    return pids


def test_async_envs_give_the_same_curves_and_weights():
    """To the bit."""
    flags = {"num_envs": 3, "num_steps": 64, "num_minibatches": 3, "total_timesteps": 768}
    one, other = (train(async_envs=async_envs, **flags) for async_envs in (False, True))
    assert curves(one) == curves(other)
    assert "charts/episodic_return" in curves(one)
    assert same_weights(load(one), load(other))


@linux
def test_ctrl_c_with_async_envs(start):
    """A terminal sends it to the whole process group: the iteration is finished and saved, and no process is left."""
    process = start(*ENDLESS)
    pids = workers(process)
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert "Traceback" not in err
    assert load(the_run())["global_step"] > 0
    assert not any(map(alive, pids))


@linux
def test_a_second_ctrl_c_stops_at_once(start):
    """In the middle of an iteration, which would take 256 s here. No process is left."""
    slow = ("--env-id", "probe_envs:Faulty-v0", "--env-kwargs", "what=nothing", "at=0", "delay=4.0")
    process = start(*ENDLESS, *slow)
    pids = workers(process)

    def interrupted():
        os.killpg(process.pid, signal.SIGINT)
        return process.poll() is not None

    wait_until(interrupted, "the process ends")
    assert process.returncode == -signal.SIGINT
    assert not list(Path("runs").glob("*/checkpoint.pt"))
    wait_until(lambda: not any(map(alive, pids)), "the processes of the environments end")


@linux
@pytest.mark.parametrize(("what", "message"), [("exception", "the environment has a bug"), ("death", "Error")])
def test_a_crash_of_an_environment_ends_the_run(start, what, message):
    """The second environment raises an exception, or its process is killed. No process is left."""
    fault = ("--env-kwargs", f"what={what}", "at=500", "seed=10001")
    process = start("--env-id", "probe_envs:Faulty-v0", *fault, *ENDLESS)
    pids = workers(process)
    code, _, err = finish(process)
    assert code == 1
    assert message in err
    assert not any(map(alive, pids))
