"""Bad input and faults: one clear line, exit code 2, nothing lost."""

import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    assert_refused,
    curves,
    environment,
    finish,
    load,
    next_second,
    run,
    the_run,
    train,
    wait_for_training,
    wait_until,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

import ppo

TINY = ("--total-timesteps", 1024, "--eval-episodes", 1)


# ----------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--env-id", "CartPol-v1"), ["CartPol", "Did you mean: `CartPole`?"]),
        (("--env-id", "CartPole-v9"), ["CartPole-v9", "v1"]),
        (("--env-id", ""), []),
        (("--env-id", "no_such_module:Env-v0"), ["no_such_module"]),
        (("--env-id", "probe_envs:NoSuchEnv-v0"), ["NoSuchEnv"]),
        (("--env-kwargs", "no_such_argument=1"), ["CartPole-v1", "no_such_argument"]),
        (("--env-kwargs", "is_slippery"), ["name=value", "is_slippery"]),
        (("--env-kwargs", "1x=2"), ["name=value", "1x=2"]),
        (("--env-id", "Pendulum-v1"), ["ppo_continuous_action.py"]),
        (("--num-minibatches", 5), ["512", "5 minibatches", "--num-minibatches 4 would work"]),
        (("--num-envs", 3, "--num-steps", 7, "--num-minibatches", 4), ["21", "--num-minibatches 3 would work"]),
        (("--num-minibatches", 10_000), ["10000 minibatches", "--num-minibatches"]),
        (("--num-minibatches", 512), ["one sample", "--no-norm-adv"]),
        (("--learning-rate", "nan"), ["--learning-rate", "nan"]),
        (("--gamma", 1.01), ["--gamma", "1.01"]),
        (("--total-timesteps", 0), ["--total-timesteps", "0"]),
        (("--seed", -1), ["--seed", "-1"]),
        (("--device", "cud"), ["--device cud"]),
        (("--resume", "a", "--evaluate", "b"), ["--resume", "--evaluate"]),
        (("--resume", ""), ["--resume", "empty"]),
        (("--evaluate=",), ["--evaluate", "empty"]),
        (("--resume", "no_such_run"), ["no_such_run", "checkpoint.pt"]),
        (("--evaluate", "no_such_run"), ["no_such_run", "checkpoint.pt"]),
    ],
)
def test_bad_flags_are_refused_in_one_line(command_line, flags, words):
    assert_refused(ppo, command_line(*flags), *words)


def test_what_does_not_fit_in_memory_is_refused(command_line):
    code, _, err = command_line("--num-steps", 10**12)
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("ppo.py: error: Unable to allocate 58.2 TiB")


@pytest.mark.parametrize("flags", [("--num-envs", "four"), ("--no-such-flag",), ("--seed",), ("stray",)])
def test_what_the_command_line_cannot_read_is_refused(command_line, flags):
    """By tyro, in a box of its own that shows the flag."""
    code, out, err = command_line(*flags)
    assert code == 2
    assert flags[0] in err
    assert "Traceback" not in out + err
    assert not Path("runs").exists()


def test_the_refusal_of_a_real_process():
    """What a shell sees is what main() does in the tests above."""
    assert_refused(ppo, run(sys.executable, ROOT / "ppo.py", "--env-id", "CartPol-v1"), "Did you mean: `CartPole`?")


BELOW_ONE = ("gamma", "gae_lambda")
MAY_BE_ZERO = (*BELOW_ONE, "ent_coef", "vf_coef", "seed")
NUMBERS = [name for name, field in ppo.Args.__dataclass_fields__.items() if field.type in (int, float, float | None)]


def test_every_number_is_among_those_tested():
    assert len(NUMBERS) == 15


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_make_no_sense_are_refused(name):
    """NaN, infinities, negative ones, 0 where nothing can come of it, and more than 1 for discounts."""
    bad = [math.nan, math.inf, -math.inf, -1, -1e-9]
    bad += [] if name in MAY_BE_ZERO else [0]
    bad += [1 + 1e-9, 2] if name in BELOW_ONE else []
    for value in bad:
        with pytest.raises(ppo.UsageError) as error:
            ppo.Args(**{name: value})
        assert f"--{name.replace('_', '-')} must be" in str(error.value)
        assert str(value) in str(error.value)


@pytest.mark.parametrize("name", MAY_BE_ZERO)
def test_zero_is_allowed_where_it_means_something(name):
    assert train(**{name: 0}, total_timesteps=512).is_dir()


small = st.integers(1, 20)


@given(small, small, st.integers(1, 500), st.booleans())
@example(num_envs=1, num_steps=1, num_minibatches=2, norm_adv=True)
@settings(deadline=None)
def test_the_number_of_minibatches_works_or_another_is_named_that_does(num_envs, num_steps, num_minibatches, norm_adv):
    """Unless there is but one sample to normalize, for which no number would do."""
    flags = {"num_envs": num_envs, "num_steps": num_steps, "norm_adv": norm_adv}
    try:
        args = ppo.Args(**flags, num_minibatches=num_minibatches)
        assert args.minibatch_size * num_minibatches == num_envs * num_steps
        assert args.minibatch_size > 1 or not norm_adv
    except ppo.UsageError as error:
        if named := re.search(r"--num-minibatches (\d+) would work", str(error)):
            ppo.Args(**flags, num_minibatches=int(named[1]))
        else:
            assert norm_adv
            assert num_minibatches >= num_envs * num_steps
            assert "--no-norm-adv" in str(error)


def test_a_minibatch_of_one_sample_works_without_normalization():
    assert train(num_envs=1, num_steps=4, num_minibatches=4, norm_adv=False, total_timesteps=8).is_dir()


def test_runs_that_cannot_be_written_to_are_refused(command_line):
    Path("runs").write_text("a file")
    assert_refused(ppo, command_line(*TINY), "cannot make the run's folder")
    assert Path("runs").read_text() == "a file"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_refused(command_line):
    assert_refused(ppo, command_line("--device", "cuda", *TINY), "--device cuda cannot be used")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_used():
    agent = ppo.train(ppo.Args(device="cuda", total_timesteps=1024, eval_episodes=1))
    assert next(agent.parameters()).is_cuda
    assert all(not x.is_cuda for x in load(the_run())["agent"].values())


def test_without_a_compiler_it_runs_eagerly_and_says_so(command_line, monkeypatch):
    """The same curves as without --compile."""
    eager = train(total_timesteps=1024, exp_name="eager")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    result = command_line("--compile", *TINY, "--exp-name", "compiled")
    assert result.code == 0
    assert "C++ compiler" in result.out + result.err
    (run_dir,) = Path("runs").glob("*__compiled__*")
    assert curves(run_dir) == curves(eager)
    assert load(run_dir)["args"]["compile"], "it is resumed with --compile, perhaps where there is a compiler"


# ------------------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a short run of CartPole."""
    folder = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("finished"))
    run_dir = train(total_timesteps=512).resolve()
    os.chdir(folder)
    return run_dir


@pytest.fixture
def copied(finished):
    """A copy of it that may be damaged."""
    return shutil.copytree(finished, Path("copied"))


def contents(run_dir):
    """Every file, to the byte."""
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


ways_to_load = pytest.mark.parametrize("way", ["--resume", "--evaluate"])


@ways_to_load
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_truncated_checkpoints_are_refused(command_line, copied, way, share):
    path = copied / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    before = contents(copied)
    assert_refused(ppo, command_line(way, copied), "checkpoint.pt is damaged or not from ppo.py")
    assert contents(copied) == before


class Malicious:
    """Leaves a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("harmed"),)


def foreign_checkpoints():
    """By name, what someone might take for a checkpoint."""
    layer = torch.nn.Linear(2, 2)
    return {
        "weights alone": layer.state_dict(),
        "whole module": layer,
        "a list": [1, 2],
        "other keys": {"model": layer.state_dict(), "step": 3},
        "code": {"args": Malicious()},
    }


@ways_to_load
@pytest.mark.parametrize("name", foreign_checkpoints())
def test_foreign_checkpoints_are_refused(command_line, copied, way, name):
    """And none of the code in them runs."""
    torch.save(foreign_checkpoints()[name], copied / "checkpoint.pt")
    assert_refused(ppo, command_line(way, copied), "checkpoint.pt is damaged or not from ppo.py")
    assert not Path("harmed").exists()


@ways_to_load
def test_a_plain_pickle_is_refused_unread(command_line, copied, way):
    (copied / "checkpoint.pt").write_bytes(pickle.dumps(Malicious()))
    assert_refused(ppo, command_line(way, copied), "checkpoint.pt is damaged or not from ppo.py")
    assert not Path("harmed").exists()


@ways_to_load
def test_incomplete_checkpoints_are_refused(command_line, copied, way):
    """Each of the things that it should hold is missing in turn."""
    complete = load(copied)
    needed = complete.keys() if way == "--resume" else ("args", "agent", "global_step")
    for key in needed:
        torch.save({other: complete[other] for other in complete if other != key}, copied / "checkpoint.pt")
        more = () if way == "--evaluate" else ("--total-timesteps", 1024)
        assert_refused(ppo, command_line(way, copied, *more), "checkpoint.pt is damaged or not from ppo.py", key)


@ways_to_load
@pytest.mark.parametrize("layer", ["actor.0.weight", "critic.4.bias"])
def test_checkpoints_of_another_network_are_refused(command_line, copied, way, layer):
    """A layer of another shape, as a fork with another network would leave it."""
    checkpoint = load(copied)
    checkpoint["agent"][layer] = torch.zeros(7)
    torch.save(checkpoint, copied / "checkpoint.pt")
    before = contents(copied)
    more = () if way == "--evaluate" else ("--total-timesteps", 1024)
    assert_refused(ppo, command_line(way, copied, *more), "does not fit CartPole-v1", layer)
    assert contents(copied) == before


def test_checkpoints_with_another_optimizer_are_refused(command_line, copied):
    """As a fork would leave that optimizes each layer on its own."""
    checkpoint = load(copied)
    layers = [torch.nn.Parameter(weight) for weight in checkpoint["agent"].values()]
    checkpoint["optimizer"] = torch.optim.Adam(layers).state_dict()
    torch.save(checkpoint, copied / "checkpoint.pt")
    before = contents(copied)
    assert_refused(ppo, command_line("--resume", copied, "--total-timesteps", 1024), "fit")
    assert contents(copied) == before


@ways_to_load
@pytest.mark.parametrize(
    "flags",
    [
        ("--env-id", "Acrobot-v1"),
        ("--env-kwargs", "sutton_barto_reward=True"),
        ("--num-envs", 8),
        ("--gamma", 0.9),
        ("--no-norm-adv",),
        ("--learning-rate", 0.123),
        ("--target-kl", 0.02),
    ],
)
def test_flags_that_contradict_the_checkpoint_are_refused(command_line, finished, way, flags):
    before = contents(finished)
    more = () if way == "--evaluate" else ("--total-timesteps", 1024)
    assert_refused(ppo, command_line(way, finished, *more, *flags), flags[0].replace("no-", ""), "contradicts")
    assert contents(finished) == before


def test_flags_that_agree_with_the_checkpoint_are_taken(command_line):
    """Also where they do not fit the script's defaults, 4 x 128 steps."""
    run_dir = train(num_envs=3, num_steps=4, num_minibatches=6, total_timesteps=120)
    again = ("--num-minibatches", 6, "--total-timesteps", 240, "--eval-episodes", 1)
    assert command_line("--resume", run_dir, *again).code == 0
    assert load(run_dir)["global_step"] == 240


def test_another_seed_is_for_evaluation_alone(command_line, finished):
    result = command_line("--resume", finished, "--total-timesteps", 1024, "--seed", 5)
    assert_refused(ppo, result, "--seed 5 contradicts", "made with 1")


@pytest.mark.parametrize("flags", [(), ("--total-timesteps", 100)])
def test_a_finished_run_is_not_resumed_without_more_timesteps(command_line, finished, flags):
    before = contents(finished)
    assert_refused(ppo, command_line("--resume", finished, *flags), "512", "--total-timesteps")
    assert contents(finished) == before


# ------------------------------------------------------------------- environments that go wrong


@pytest.mark.parametrize("what", ["observation", "last observation", "reward", "infinite reward"])
@pytest.mark.parametrize("async_envs", [False, True])
def test_nan_from_an_environment_stops_the_run_and_loses_nothing(command_line, what, async_envs):
    """In the third iteration, in the 300th step of the first of 2 environments: that is step 599 of the run.

    What was learned in the 2 iterations of 256 steps before is saved.
    """
    seed = ppo.env_seeds(2, 1, 0, 0)[0]
    flags = ("--env-id", "probe_envs:Faulty-v0", "--env-kwargs", f"what={what}", "at=300", f"seed={seed}")
    flags += ("--async-envs",) if async_envs else ()
    code, _, err = command_line(*flags, "--num-envs", 2, *TINY)
    assert code == 2
    assert err.splitlines()[-1] == "ppo.py: error: environment 0 returned NaN or infinity at step 599"
    assert "Traceback" not in err
    checkpoint = load(the_run())
    assert checkpoint["global_step"] == 512
    assert all(weight.isfinite().all() for weight in checkpoint["agent"].values())
    assert [step for step, _ in curves(the_run())["charts/learning_rate"]] == [256, 512]


def test_weights_that_become_nan_stop_the_run(command_line, monkeypatch):
    """By a learning rate beyond all reason. The checkpoint before stays."""
    monkeypatch.setattr(ppo, "CHECKPOINT_SECONDS", 0)
    run_dir = train(total_timesteps=512)
    checkpoint = load(run_dir)
    checkpoint["args"]["learning_rate"] = 4e9
    checkpoint["args"]["max_grad_norm"] = 4e9
    checkpoint["optimizer"]["state"][0]["exp_avg"].fill_(1e38)
    torch.save(checkpoint, run_dir / "checkpoint.pt")
    before = (run_dir / "checkpoint.pt").read_bytes()
    code, _, err = command_line("--resume", run_dir, "--total-timesteps", 1024)
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("ppo.py: error: the weights became NaN")
    assert "1024" in line
    assert (run_dir / "checkpoint.pt").read_bytes() == before


def test_a_bug_in_an_environment_shows_its_traceback():
    """That is for the environment's author, not for a line."""
    with pytest.raises(ZeroDivisionError, match="the environment has a bug"):
        train(env_id="probe_envs:Faulty-v0", env_kwargs=("what=exception", "at=5"))


# ------------------------------------------------------------------------------ a full disk


def test_a_checkpoint_is_whole_on_the_disk_before_it_takes_the_place_of_the_old_one(monkeypatch):
    """Every byte is written and synchronized (so that not even a power cut gets between) before the renaming."""
    calls, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        calls.append(("fsync", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def noted_replace(source, target):
        calls.append(("replace", Path(source).stat().st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    path = train(total_timesteps=512) / "checkpoint.pt"
    size = path.stat().st_size
    assert calls == [("fsync", size), ("replace", size)]
    assert size > 50_000


full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, the device that is always full")


@full_device
def test_full_disk_leaves_the_old_checkpoint(capfd):
    """The temporary file leads to a device that is full: the old checkpoint stays as it is, to the byte."""
    run_dir = train(total_timesteps=512)
    old = (run_dir / "checkpoint.pt").read_bytes()
    (run_dir / "checkpoint.tmp").symlink_to("/dev/full")
    capfd.readouterr()
    ppo.train(ppo.load_args(str(run_dir), resume=str(run_dir), total_timesteps=1024))
    out, err = capfd.readouterr()
    assert "warning: checkpoint not saved" in err
    assert "No space left on device" in err
    assert "greedy evaluation at step 1,024" in out
    assert (run_dir / "checkpoint.pt").read_bytes() == old


@full_device
def test_training_goes_on_and_saves_again_when_there_is_room(capfd, monkeypatch):
    """Only the first of four saves fails."""
    run_dir = train(total_timesteps=512)
    (run_dir / "checkpoint.tmp").symlink_to("/dev/full")
    monkeypatch.setattr(ppo, "CHECKPOINT_SECONDS", 0)
    ppo.train(ppo.load_args(str(run_dir), resume=str(run_dir), total_timesteps=2560))
    assert capfd.readouterr().err.count("warning: checkpoint not saved") == 1
    assert load(run_dir)["global_step"] == 2560
    assert not (run_dir / "checkpoint.tmp").exists()


@pytest.fixture
def small_disk(monkeypatch):
    """The current folder is on a disk of 1 MB of its own."""
    Path("disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "disk"]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    disk = Path("disk").resolve()
    monkeypatch.chdir(disk)
    yield
    monkeypatch.chdir(disk.parent)
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill_the_disk(done=lambda: True):
    """Fill the current folder's disk to the last byte, and again what is freed, until done()."""
    with Path("filler").open("ab", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                if done():
                    return
                time.sleep(0.001)


def test_no_run_begins_on_a_full_disk(command_line, small_disk):
    run_dir = train(total_timesteps=512)
    before = (run_dir / "checkpoint.pt").read_bytes()
    fill_the_disk()
    for flags in [("--total-timesteps", 512), ("--resume", run_dir, "--total-timesteps", 1024)]:
        code, _, err = command_line(*flags)
        assert code == 2
        (line,) = err.splitlines()
        assert line.startswith("ppo.py: error: cannot ")
        assert "No space left on device" in line
    assert (run_dir / "checkpoint.pt").read_bytes() == before


def test_a_log_on_the_disk_that_fills_up_stops_nothing(small_disk):
    """As with nohup: what the run prints goes there, too, warnings included."""
    code = "import ppo; ppo.CHECKPOINT_SECONDS = 0.1; ppo.main()"
    command = [sys.executable, "-c", code, "--total-timesteps", "20000", "--eval-episodes", "1"]
    with Path("log").open("wb", buffering=0) as log:
        log.write(bytes(4000))  # of a block of 4096
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment())
        wait_until(lambda: Path("runs").is_dir() and (the_run() / "checkpoint.pt").exists(), "a checkpoint is saved")
        fill_the_disk(done=lambda: process.poll() is not None)
    assert process.returncode in (0, 120), "120: all was done, but when Python ended, not all could be printed"
    assert 0 < load(the_run())["global_step"] < 20_480


@full_device
@pytest.mark.parametrize("when", ["training", "evaluation"])
def test_a_film_that_cannot_be_written_costs_one_line(command_line, when):
    run_dir = train(total_timesteps=512)
    (run_dir / "videos").mkdir()
    name = "train-from-512-episode-0" if when == "training" else "eval-at-512-episode-0"
    (run_dir / "videos" / f"{name}.mp4").symlink_to("/dev/full")
    flags = ("--resume", run_dir, "--total-timesteps", 1024) if when == "training" else ("--evaluate", run_dir)
    code, out, err = command_line(*flags, "--capture-video", "--eval-episodes", 1)
    assert code == 0
    assert "greedy evaluation at step " in out
    (line,) = err.splitlines()
    assert line == f"warning: {name}.mp4 not filmed: ffmpeg failed; is the disk full?"


def test_a_disk_that_fills_up_stops_nothing(start, small_disk):
    """Neither checkpoints nor events can be written any more: the run goes on to its end and warns."""
    process = start("--total-timesteps", 20_000, "--eval-episodes", 1, setup="ppo.CHECKPOINT_SECONDS = 0.1")
    wait_for_training(process)
    wait_until(lambda: (the_run() / "checkpoint.pt").exists(), "a checkpoint is saved")
    fill_the_disk(done=lambda: process.poll() is not None)
    code, out, err = finish(process)
    assert code == 0
    assert "warning: checkpoint not saved" in err
    assert all(line.startswith("warning: ") for line in err.splitlines())
    assert "greedy evaluation at step 20,480" in out
    run_dir = the_run()
    saved = load(run_dir)["global_step"]
    assert 0 < saved < 20_480
    assert curves(run_dir)["charts/learning_rate"][0][0] == 512

    Path("filler").unlink()
    next_second()
    assert finish(start("--resume", run_dir)).code == 0
    assert load(run_dir)["global_step"] == 20_480
    assert [step for step, _ in curves(run_dir)["charts/learning_rate"]] == list(range(512, 20_481, 512))
