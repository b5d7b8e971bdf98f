"""Wrong input, damaged checkpoints and faulty environments: one line, exit code 2, and no run is harmed."""

import io
import math
import os
import pickle
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_refused, curves, load, the_run, train

import ppo
import ppo_continuous_action


@pytest.mark.parametrize(
    "flags",
    [
        ("--env-id", "a:b:c"),
        ("--env-id", "CartPol-v1"),
        ("--env-id", "CartPole-v9"),
        ("--env-id", ""),
        ("--env-id", "no_such_module:Env-v0"),
        ("--env-id", "probe_envs:NoSuchEnv-v0"),
        ("--env-id", "Pendulum-v1"),
        ("--env-id", "FrozenLake-v1", "--env-kwargs", "map_name=no_such_map"),
        ("--env-kwargs", "no_such_argument=1"),
        ("--env-kwargs", "is_slippery"),
        ("--num-minibatches", 5),
        ("--num-minibatches", 2048),  # of one sample each
        ("--device", "cud"),
        pytest.param(("--device", "cuda"), marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")),
        ("--resume", "no_such_run"),
        ("--evaluate", "no_such_run"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(command_line, flags):
    """The line names what was given; where it does not fit another flag, the flag."""
    words = {"map_name=no_such_map": "no_such_map", "no_such_argument=1": "no_such_argument"}
    named = flags[0] if flags[0] in ("--num-minibatches", "--env-kwargs") else flags[1]
    assert_refused(ppo, command_line(*flags), words.get(flags[-1], named))


@pytest.mark.parametrize("flags", [("--num-envs", "four"), ("--total-timesteps", "1e6"), ("--no-such-flag",), ("x",)])
def test_flags_that_cannot_be_parsed_are_refused(command_line, flags):
    """By tyro."""
    code, out, err = command_line(*flags)
    assert code == 2
    assert flags[0] in err
    assert "Traceback" not in out + err


POSITIVE = ("total_timesteps", "num_envs", "num_steps", "num_minibatches", "update_epochs", "eval_episodes")
POSITIVE += ("learning_rate", "clip_coef", "max_grad_norm")


@pytest.mark.parametrize("name", [*POSITIVE, "gamma", "gae_lambda", "seed"])
def test_numbers_out_of_range_are_refused(name):
    for value in {"seed": [-1, 2**32]}.get(name, [-1, -1e-9, math.nan, math.inf, 0 if name in POSITIVE else 1.01]):
        with pytest.raises(ppo.UsageError, match=f"--{name.replace('_', '-')}"):
            ppo.Args(**{name: value})


def test_zero_and_one_are_allowed_where_they_have_a_meaning():
    train(seed=0, gamma=0, gae_lambda=0, ent_coef=0, vf_coef=0, total_timesteps=512)
    train(gamma=1, gae_lambda=1, total_timesteps=512)
    train(num_envs=1, num_steps=4, num_minibatches=2, total_timesteps=8)


def test_compile_without_a_compiler_is_refused(command_line, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert_refused(ppo, command_line("--compile"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_training_and_resuming_on_a_gpu(command_line):
    """The checkpoint is loaded without one, too."""
    run_dir = train(device="cuda", total_timesteps=512)
    assert command_line("--resume", run_dir, "--total-timesteps", 1024, "--eval-episodes", 1).code == 0
    assert load(run_dir)["global_step"] == 1024
    assert not next(ppo.load_agent(run_dir).parameters()).is_cuda


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a short run of CartPole."""
    folder = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("finished"))
    run_dir = train(total_timesteps=512).resolve()
    os.chdir(folder)
    return run_dir


def contents(run_dir):
    """Every file of a run, to the byte."""
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


class Malicious:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("harmed"),)


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_damaged_foreign_and_older_checkpoints_are_refused(command_line, finished, flag):
    """None of the code in them is run, and no file of the run is changed."""
    run_dir = shutil.copytree(finished, Path("copied"))
    whole, checkpoint = (run_dir / "checkpoint.pt").read_bytes(), load(run_dir)
    args, agent = checkpoint["args"], checkpoint["agent"]
    changes = [{"args": Malicious()}, {"args": None}, {"agent": None}]
    changes += [{"args": {**args, "bfloat16": True}}, {"args": {**args, "env_id": "Acrobot-v1"}}]
    changes += [{"agent": {**agent, "critic.4.bias": torch.ones(7)}}]
    if flag == "--resume":
        weights = torch.nn.Parameter(torch.cat([x.flatten() for x in agent.values()]))  # as in an earlier version
        changes += [{"optimizer": torch.optim.Adam([weights]).state_dict()}, {"optimizer": None}, {"rng_state": None}]
    files = [b"", whole[:100], whole[: len(whole) // 2], whole[:-20], pickle.dumps(Malicious(), protocol=2)]
    for saved in [agent, *({**checkpoint, **change} for change in changes)]:
        torch.save(saved, buffer := io.BytesIO())
        files.append(buffer.getvalue())
    for file in files:
        (run_dir / "checkpoint.pt").write_bytes(file)
        before = contents(run_dir)
        assert_refused(ppo, command_line(flag, run_dir), "checkpoint.pt")
        assert contents(run_dir) == before
    assert not Path("harmed").exists()


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_runs_of_another_script_are_refused(command_line, finished, flag):
    continuous = train(ppo_continuous_action, env_id="Pendulum-v1", num_steps=64, total_timesteps=64)
    before = contents(continuous), contents(finished)
    assert_refused(ppo, command_line(flag, continuous), "ppo_continuous_action.py")
    assert_refused(ppo_continuous_action, command_line(flag, finished, script=ppo_continuous_action), "ppo.py")
    assert (contents(continuous), contents(finished)) == before


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize(
    "changed",
    [
        ("--env-id", "Acrobot-v1"),
        ("--env-kwargs", "sutton_barto_reward=True"),
        ("--num-envs", 8),
        ("--no-norm-adv",),
        ("--learning-rate", 0.123, "--target-kl", 0.02),
    ],
)
def test_flags_that_differ_from_those_of_the_run_are_refused(command_line, finished, flag, changed):
    before = contents(finished)
    names = [str(x).replace("--no-", "--") for x in changed if str(x).startswith("--")]
    assert_refused(ppo, command_line(flag, finished, *changed), *names)
    assert contents(finished) == before


def test_flags_that_may_differ(command_line):
    """Those of the run are the defaults; giving them again is no difference."""
    run_dir = train(num_envs=3, num_steps=4, num_minibatches=6, total_timesteps=60)
    flags = ("--num-envs", 3, "--num-minibatches", 6, "--total-timesteps", 120)
    flags += ("--async-envs", "--capture-video", "--eval-episodes", 2, "--device", "cpu", "--seed", 5)
    assert command_line("--resume", run_dir, *flags).code == 0
    checkpoint = load(run_dir)
    assert checkpoint["global_step"] == 120
    assert [checkpoint["args"][name] for name in ("num_envs", "seed", "eval_episodes")] == [3, 5, 2]


@pytest.mark.parametrize("what", ["observation", "last observation", "reward"])
def test_nan_stops_the_run_and_keeps_the_last_checkpoint(command_line, what, monkeypatch):
    """In the 300th step of both environments, which is in the third iteration."""
    monkeypatch.setattr(ppo, "time", SimpleNamespace(time=time.time, monotonic=lambda: 1e6 * time.monotonic()))
    flags = ("--env-id", "probe_envs:Faulty-v0", "--env-kwargs", f"what={what}", "at=300", "--num-envs", 2)
    flags += ("--num-steps", 128)
    assert_refused(ppo, command_line(*flags, "--total-timesteps", 2048))
    checkpoint = load(the_run())
    assert checkpoint["global_step"] == 512
    assert all(weight.isfinite().all() for weight in checkpoint["agent"].values())
    losses = [(step, math.isfinite(value)) for step, value in curves(the_run())["losses/value_loss"]]
    assert losses[:2] == [(256, True), (512, True)]
    assert not any(finite for _, finite in losses[2:])
