"""Environments: supported spaces, the contents of the batch, and the processes of --async-envs."""

import os
import signal
from pathlib import Path

import gymnasium as gym
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
        (spaces(observations="nested"), 3 + 2),
    ],
)
def test_supported_observation_spaces(flags, num_inputs):
    """Each is flattened, trained on, saved and loaded again."""
    agent = ppo.load_agent(train(**flags, **TINY))
    assert agent.actor[0].in_features == agent.critic[0].in_features == num_inputs


def test_an_observation_is_the_vector_of_gymnasium():
    """Of float32, with the parts in gymnasium's order, and without the part that has no vector."""
    env, parts = ppo.make_envs(ppo.Args(**spaces(observations="nested")), 1), []
    observe = Spaces.observation_spaces["nested"].sample
    Spaces.observation_spaces["nested"].seed(1)
    for _ in range(10):
        parts.append(observe())
    (first,), _ = env.reset(seed=1)
    rows = [first.copy(), *(env.step(np.array([0]))[0][0].copy() for _ in range(9))]
    for row, part in zip(rows, parts, strict=True):
        assert row.dtype == np.float32
        np.testing.assert_array_equal(row, [*np.eye(3)[part["inner"]["door"]], *part["speed"]])


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
        (spaces(observations="image"), "docs/forks.md"),
        (spaces(observations="grey image"), "docs/forks.md"),
        (spaces(observations="sequence"), "are not numbers"),
        (spaces(observations="nothing left"), "are not numbers"),
        (spaces(actions="multidiscrete"), "MultiDiscrete"),
        ({"env_id": "Pendulum-v1"}, "ppo_continuous_action.py"),
    ],
)
@pytest.mark.parametrize("async_envs", [False, True])
def test_unsupported_spaces_are_refused_and_leave_no_folder(flags, word, async_envs):
    with pytest.raises(ppo.UsageError, match=word):
        train(**flags, async_envs=async_envs)
    assert not list(Path("runs").glob("*"))


def test_env_kwargs_reach_the_environment():
    """Python literals as such, true, false and none in any case, anything else as a string."""
    values = {"8x8": "8x8", "False": False, "true": True, "FALSE": False, "none": None, "None": None, "": ""}
    values |= {"1e-3": 0.001, "'true'": "true", "[1,2]": [1, 2], "1,2": (1, 2), "{'a':1}": {"a": 1}, "a,b": "a,b"}
    for text, value in values.items():
        envs = ppo.make_envs(ppo.Args("probe_envs:Info-v0", env_kwargs=(f"kind={text}",)), 1)
        assert envs.envs[0].spec.kwargs == {"kind": value}


@pytest.mark.parametrize("async_envs", [False, True])
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.filterwarnings("ignore:.*share an object.*")
def test_batches_hold_the_transitions(reuse, async_envs, monkeypatch):
    """In 3 iterations: no row of a reset, none missing, no observation of another time.

    After the last step of an episode the next observation is the true last one, not the first of the next episode.
    """
    gae_inputs, batches, taken = [], [], []
    compute_gae, ppo_loss = ppo.compute_gae, ppo.ppo_loss
    vector_class = gym.vector.AsyncVectorEnv if async_envs else gym.vector.SyncVectorEnv
    step = vector_class.step

    def recording_gae(*inputs):
        gae_inputs.append([np.copy(x) for x in inputs])
        return compute_gae(*inputs)

    def recording_loss(agent, args, batch):
        batches.append({name: x.clone() for name, x in batch.items()})
        return ppo_loss(agent, args, batch)

    def recording_step(self, actions):
        taken.append(np.copy(actions))
        return step(self, actions)

    monkeypatch.setattr(vector_class, "step", recording_step)
    monkeypatch.setattr(ppo, "compute_gae", recording_gae)
    monkeypatch.setattr(ppo, "ppo_loss", recording_loss)
    monkeypatch.setattr(torch, "randperm", torch.arange)  # the only minibatch is the batch in its order
    flags = {"num_envs": 3, "num_steps": 20, "total_timesteps": 180, "num_minibatches": 1, "update_epochs": 1}
    flags["learning_rate"] = 1e-30  # the weights stay as they are
    env_kwargs = (f"reuse={reuse}",)
    run_dir = train(
        env_id="probe_envs:Numbered-v0", env_kwargs=env_kwargs, async_envs=async_envs, **flags, eval_episodes=0
    )
    agent, args = ppo.load_agent(run_dir), ppo.Args()
    assert len(gae_inputs) == 3
    assert len(batches) == 3
    names = batches[0]["observations"][:3, 0].int().tolist()
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

        batch = batches[iteration]
        logits = agent.actor(observations.float().flatten(0, 1)).detach()
        advantages = torch.as_tensor(compute_gae(*gae_inputs[iteration])).flatten()
        expected = {
            "observations": observations.float().flatten(0, 1),
            "actions": np.concatenate(taken[20 * iteration : 20 * (iteration + 1)]),
            "old_logprobs": torch.distributions.Categorical(logits=logits).log_prob(batch["actions"]),
            "old_values": values.flatten(),
            "advantages": advantages,
            "returns": advantages + values.flatten(),
        }
        assert batch.keys() == expected.keys()
        for name, x in expected.items():
            np.testing.assert_allclose(batch[name], x, rtol=1e-5, atol=1e-5, err_msg=name)


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
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_main_process_and_those_of_async_envs(start, command_line, signum, code):
    """Ctrl-C in a terminal, or SIGTERM by Slurm or systemd, which ends the processes of the environments.

    The last whole iteration is saved, and the run can be resumed. No process is left.
    """
    process = start(*ENDLESS)
    pids = workers(process)
    wait_until(lambda: list(Path("runs").glob("*/checkpoint.pt")), "a checkpoint is saved")
    os.killpg(process.pid, signum)
    result = finish(process)
    assert result.code == code
    assert f"--resume {the_run()}" in result.out
    assert signum == signal.SIGTERM or "Traceback" not in result.err
    assert not any(map(alive, pids))
    step = load(the_run())["global_step"]
    assert curves(the_run())["losses/policy_loss"][-1][0] == step > 0
    flags = ("--total-timesteps", step + 128, "--eval-episodes", 0, "--no-async-envs")
    assert command_line("--resume", the_run(), *flags).code == 0
    assert load(the_run())["global_step"] == step + 128


@linux
def test_a_second_ctrl_c_ends_hanging_environments(start):
    """The first one waits for the end of an iteration that never comes."""
    process = start(*ENDLESS, "--env-id", "probe_envs:Faulty-v0", "--env-kwargs", "what=hang", "at=200")
    pids = workers(process)
    wait_until(lambda: list(Path().glob("hangs-*")), "an environment hangs")
    os.killpg(process.pid, signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert "stopping after this iteration" in process.stderr.readline()
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert err.rstrip().endswith("KeyboardInterrupt")
    wait_until(lambda: not any(map(alive, pids)), "the processes of the environments end")


@linux
def test_no_process_is_left_when_the_main_process_is_killed(start):
    process = start(*ENDLESS)
    pids = workers(process)
    process.kill()
    finish(process)
    wait_until(lambda: not any(map(alive, pids)), "the processes of the environments end")


@linux
@pytest.mark.parametrize(("what", "message"), [("exception", "the environment has a bug"), ("death", "Error")])
def test_a_crash_of_an_environment_ends_the_run(start, what, message):
    """The second environment raises an exception, or its process is killed. No process is left."""
    fault = ("--env-kwargs", f"what={what}", "at=500", f"seed={ppo.make_seed('training', 1, 0) + 1}")
    process = start("--env-id", "probe_envs:Faulty-v0", *fault, *ENDLESS)
    pids = workers(process)
    code, _, err = finish(process)
    assert code == 1
    assert "Traceback" in err
    assert message in err
    assert not any(map(alive, pids))
