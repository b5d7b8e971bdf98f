"""Wrong input, damaged checkpoints, faulty environments and full disks: no run is harmed.

What is wrong on the command line or in a file is one line, with exit code 2; exceptions of an environment are shown.
"""

import io
import math
import os
import pickle
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import SMALL_FLAGS, assert_refused, curves, finish, load, the_run, train

import ppo
import ppo_continuous_action
import ppo_lstm

CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--env-id", "CartPol-v1"), "CartPol-v1"),
        (("--env-id", "CartPole-v9"), "CartPole-v9"),
        (("--env-id", ""), "cannot make"),
        (("--env-id", "no_such_module:Env-v0"), "no_such_module"),
        (("--env-id", "probe_envs:NoSuchEnv-v0"), "NoSuchEnv-v0"),
        (("--env-id", "Pendulum-v1"), "ppo_continuous_action.py"),
        (("--env-id", "ALE/Pong-v5"), "ppo_atari.py"),
        (("--env-id", "Pong-v5"), "ppo_atari.py"),
        (("--env-id", "CarRacing-v3", "--env-kwargs", "continuous=False"), "docs/forks.md"),
        (("--env-kwargs", "no_such_argument=1"), "no_such_argument"),
        (("--env-kwargs", "is_slippery"), "env_kwargs must be name=value"),
        (("--env-id", "FrozenLake-v1", "--env-kwargs", "is_slippery=False,map_name=8x8"), "separated by spaces"),
        (("--num-minibatches", 5), "num_minibatches must divide"),
        (("--num-envs", 0), "must be positive"),
        (("--device", "cud"), "cud"),
        pytest.param(("--device", "cuda"), "cuda", marks=CUDA),
        (("--resume", "no_such_run"), "no_such_run"),
        (("--evaluate", "no_such_run"), "no_such_run"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(command_line, flags, words, monkeypatch):
    """And leave no folder."""
    games = [name for name, spec in gym.registry.items() if str(spec.entry_point).startswith("ale_py")]
    for name in games:  # known if another test has imported ale_py
        monkeypatch.delitem(gym.registry, name)
    assert_refused(ppo, command_line(*flags), words)
    assert not list(Path("runs").glob("*"))


@pytest.mark.parametrize("flags", [("--num-envs", "four"), ("--total-timesteps", "1e6"), ("--no-such-flag",), ("x",)])
def test_flags_that_cannot_be_parsed_are_refused(command_line, flags):
    """By tyro."""
    code, out, err = command_line(*flags)
    assert code == 2
    assert flags[0] in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["total_timesteps", "num_envs", "num_steps", "num_minibatches", "update_epochs"])
def test_numbers_that_must_be_positive(name, value):
    with pytest.raises(ppo.UsageError, match="must be positive"):
        ppo.Args(**{name: value})


def test_zero_and_one_are_allowed_where_they_have_a_meaning():
    train(seed=0, gamma=0, gae_lambda=0, ent_coef=0, vf_coef=0, total_timesteps=512)
    train(gamma=1, gae_lambda=1, total_timesteps=512)
    train(num_envs=1, num_steps=4, num_minibatches=2, total_timesteps=8)


@pytest.mark.parametrize("async_envs", [False, True])
@pytest.mark.parametrize(
    ("env_id", "env_kwargs", "error"),
    [
        ("Faulty", ("what=exception", "at=3"), ZeroDivisionError),  # in step()
        ("BadEnd", ("value=none",), TypeError),  # in the constructor
        ("BadEnd", ("value=x",), ValueError),
        ("Info", ("kind=x",), KeyError),  # in reset()
        ("WrongShape", (), ValueError),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_exceptions_of_an_environment_keep_their_traceback(command_line, async_envs, env_id, env_kwargs, error):
    """Also the kinds with which gymnasium refuses arguments. An observation of the wrong shape is one of them."""
    flags = (*SMALL_FLAGS, "--env-id", f"probe_envs:{env_id}-v0", "--async-envs" if async_envs else "--no-async-envs")
    with pytest.raises(error):
        command_line(*flags, *(("--env-kwargs", *env_kwargs) if env_kwargs else ()))


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
    changes = [{"args": Malicious()}, {"args": None}, {"args": {**args, "bfloat16": True}}]
    changes += [{"args": {**args, "num_envs": 0}}, {"args": {**args, "env_id": "Acrobot-v1"}}]
    changes += [{"agent": None}, {"agent": {**agent, "critic.4.bias": torch.ones(7)}}]
    older = {name: value for name, value in checkpoint.items() if name != "script"}
    files = [b"", whole[:100], whole[: len(whole) // 2], whole[:-20], pickle.dumps(Malicious(), protocol=2)]
    for saved in [agent, older, *({**checkpoint, **change} for change in changes)]:
        torch.save(saved, buffer := io.BytesIO())
        files.append(buffer.getvalue())
    for file in files:
        (run_dir / "checkpoint.pt").write_bytes(file)
        before = contents(run_dir)
        assert_refused(ppo, command_line(flag, run_dir), f"cannot load {run_dir / 'checkpoint.pt'}")
        assert contents(run_dir) == before
    assert not Path("harmed").exists()


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_runs_of_another_script_are_refused(command_line, finished, flag):
    """Where Args are the same, the action space tells."""
    continuous = train(ppo_continuous_action, env_id="Pendulum-v1", num_steps=64, total_timesteps=64)
    before = contents(continuous), contents(finished)
    assert_refused(ppo, command_line(flag, continuous), "ppo_continuous_action.py")
    assert_refused(ppo_continuous_action, command_line(flag, finished, script=ppo_continuous_action), "ppo.py")
    assert_refused(ppo_lstm, command_line(flag, finished, script=ppo_lstm), "made by ppo.py", "compile")
    assert (contents(continuous), contents(finished)) == before


def test_weights_that_do_not_fit_are_all_named(command_line, finished):
    before = contents(finished)
    result = command_line("--resume", finished, "--env-id", "Acrobot-v1", "--total-timesteps", 1024)
    names = ("actor.0.weight", "actor.6.weight", "actor.6.bias", "critic.0.weight")
    assert_refused(ppo, result, "made by ppo.py", *(f"size mismatch for {name}" for name in names))
    assert contents(finished) == before


def test_changed_flags_are_named_and_used(command_line):
    """The flags of the run are the defaults. The optimizer's options are those of the command."""
    run_dir = train(num_envs=3, num_steps=4, num_minibatches=6, learning_rate=1e-3, total_timesteps=60)
    flags = ("--total-timesteps", 120, "--learning-rate", 0.004, "--num-minibatches", 2, "--no-norm-adv")
    result = command_line("--resume", run_dir, *flags, "--env-kwargs", "max_episode_steps=9", "--num-envs", 3)
    assert result.code == 0
    assert result.out.splitlines()[:5] == [
        "env_kwargs: ('max_episode_steps=9',) instead of ()",
        "total_timesteps: 120 instead of 60",
        "learning_rate: 0.004 instead of 0.001",
        "num_minibatches: 2 instead of 6",
        "norm_adv: False instead of True",
    ]
    assert "instead of" not in "".join(result.out.splitlines()[5:])
    checkpoint = load(run_dir)
    assert checkpoint["global_step"] == 120
    assert [checkpoint["args"][name] for name in ("learning_rate", "num_minibatches", "num_envs")] == [0.004, 2, 3]
    (group,) = checkpoint["optimizer"]["param_groups"]
    assert group["initial_lr"] == 0.004
    assert float(group["lr"]) == pytest.approx(0.004 / 10)  # in the last of ten iterations
    curve = curves(run_dir)
    assert curve["charts/learning_rate"][-5:] == [(12 * i, np.float32(0.004 * (11 - i) / 10)) for i in range(6, 11)]
    assert max(value for step, value in curve["charts/episodic_length"] if step > 72) <= 9


@pytest.mark.parametrize(
    ("what", "at", "name"),
    [
        ("observation", 301, "observation"),
        ("last observation", 300, "next observation"),
        ("reward", 300, "reward"),
        ("infinite reward", 300, "reward"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_stops_the_run_and_keeps_the_last_checkpoint(command_line, what, at, name, monkeypatch):
    """In a step of both environments that is in the third iteration. What came first is named."""
    monkeypatch.setattr(ppo, "time", SimpleNamespace(time=time.time, monotonic=lambda: 1e6 * time.monotonic()))
    flags = ("--env-id", "probe_envs:Faulty-v0", "--env-kwargs", f"what={what}", f"at={at}", "--num-envs", 2)
    flags += ("--num-steps", 128, "--update-epochs", 1)
    result = command_line(*flags, "--total-timesteps", 2048)
    assert_refused(ppo, result, f"NaN or infinite {name} before step 768")
    checkpoint = load(the_run())
    assert checkpoint["global_step"] == 512
    assert all(weight.isfinite().all() for weight in checkpoint["agent"].values())
    losses = [(step, math.isfinite(value)) for step, value in curves(the_run())["losses/value_loss"]]
    assert losses == [(256, True), (512, True)]


@pytest.mark.parametrize(
    ("flags", "what"), [(("--clip-coef", "nan"), "losses/policy_loss"), (("--vf-coef", 1e39), "losses/grad_norm")]
)
def test_the_first_number_that_is_not_finite_is_named(command_line, flags, what):
    """float32 holds a loss, but not 1e39 times its gradient."""
    result = command_line(*SMALL_FLAGS, "--num-minibatches", 1, "--update-epochs", 1, *flags)
    assert_refused(ppo, result, f"NaN or infinite {what} before step 512")


def test_a_full_disk_is_one_line(command_line):
    """The checkpoint before stays."""
    run_dir = train(total_timesteps=512)
    before = (run_dir / "checkpoint.pt").read_bytes()
    (run_dir / "checkpoint.tmp").symlink_to("/dev/full")
    assert_refused(ppo, command_line("--resume", run_dir, "--total-timesteps", 1024), "No space left on device")
    assert (run_dir / "checkpoint.pt").read_bytes() == before


def test_a_folder_that_cannot_be_written_to_is_one_line(start):
    """root may write everywhere: the process gives this up."""
    setup = "import os; os.mkdir('runs', 0o555); os.getuid() or os.setuid(65534)"
    result = finish(start("--total-timesteps", 2048, setup=setup))
    assert_refused(ppo, result, "Permission denied", "runs/CartPole-v1__ppo__1__")
