"""Runs of ppo_atari.py: they repeat, log, stop, get killed, go on, run out of disk space, and learn from pixels.

On real games, cut to 200 frames, but for learning: that is a toy game with a known answer.
"""

import contextlib
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from helpers import (
    LOSSES,
    ROOT,
    alive,
    assert_refused,
    curves,
    descendants,
    finish,
    load,
    next_second,
    read_events,
    run,
    same_weights,
    spawn,
    the_run,
    train,
    wait_for_training,
    wait_until,
)

import ppo_atari

SHORT = ("max_num_frames_per_episode=200",)  # games of 50 steps
TINY = {"env_id": "ALE/Pong-v5", "num_envs": 2, "num_steps": 16, "eval_episodes": 1, "env_kwargs": SHORT}  # 32 steps
BREAKOUT = TINY | {"env_id": "ALE/Breakout-v5", "num_envs": 4}  # 64 steps per iteration
UPDATES = 16  # per iteration: 4 epochs of 4 minibatches


def as_flags(**values):
    """The same for a command line."""
    flags = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags += [f"--{flag}" if value else f"--no-{flag}"]
        else:
            flags += [f"--{flag}", *(value if isinstance(value, tuple) else [value])]
    return flags


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """In this process and in those that it starts."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of 6 iterations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("finished"))
        return train(ppo_atari, **BREAKOUT, total_timesteps=384).resolve()


@pytest.fixture
def copied(finished):
    """A copy of it that may be changed."""
    return shutil.copytree(finished, Path("copied"))


def num_frames(path):
    """The frames of a video that can be decoded."""
    reader = imageio_ffmpeg.read_frames(str(path))
    next(reader)
    return sum(1 for _ in reader)


# ------------------------------------------------------------------------ alone, and to the bit


def test_alone_in_an_empty_folder_and_the_commands_that_it_prints():
    """ppo_atari.py, copied, needs nothing else of the repository, and what it says at the end can be done."""
    shutil.copy(ROOT / "ppo_atari.py", "ppo_atari.py")
    flags = as_flags(**TINY, total_timesteps=100)
    code, out, err = run(sys.executable, "ppo_atari.py", *flags, PYTHONPATH="")
    assert (code, err) == (0, "")
    run_dir = the_run()
    assert re.fullmatch(r"ALE-Pong-v5__ppo_atari__1__\d{10}", run_dir.name)
    assert sorted(path.name.split(".")[0] for path in run_dir.iterdir()) == ["checkpoint", "events", "events"]
    assert load(run_dir)["global_step"] == 128

    lines = out.splitlines()
    assert lines[0] == f"{run_dir}: steps 0 to 128 (100 in whole iterations), 32 per iteration"
    assert re.fullmatch("2 environments on cpu, network in (bfloat16|float32)", lines[1])
    assert "\r" not in out, "line-based when not in a terminal"
    returns = load(run_dir)["recent_returns"]
    assert f"last {len(returns)} training episodes: return {np.mean(returns):.2f}" in lines
    ((step, score),) = curves(run_dir)["eval/episodic_return"]
    assert step == 128
    result = f"return {score:.2f} +- 0.00 (min {score:.2f}, max {score:.2f}) over 1 games"
    assert f"evaluation at step 128: {result}" in lines
    assert f"curves:   tensorboard --logdir {run_dir}" in lines
    assert not (run_dir / "videos").exists()

    (watch,) = (line for line in lines if line.startswith("watch it: python "))
    code, out, err = run(sys.executable, *shlex.split(watch)[3:], PYTHONPATH="")
    assert (code, err) == (0, "")
    assert curves(run_dir)["eval/episodic_return"] == [(128, score)] * 2, "the same games again"
    (video,) = (run_dir / "videos").iterdir()
    assert video.suffix == ".mp4"
    assert num_frames(video) > 150

    (go_on,) = (line for line in lines if line.startswith("go on: "))
    code, out, err = run(sys.executable, *shlex.split(go_on)[3:], PYTHONPATH="")
    assert (code, err) == (0, "")
    assert f"{run_dir}: steps 128 to 256, 32 per iteration" in out
    assert load(run_dir)["global_step"] == 256


@pytest.mark.parametrize(("bfloat16", "threads"), [(True, 1), (False, 1), (True, 2)])
def test_the_same_seed_gives_the_same_bits_in_another_process(start, monkeypatch, bfloat16, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    flags = as_flags(**BREAKOUT, total_timesteps=192, bfloat16=bfloat16)
    processes = [start(*flags, "--exp-name", name, script="ppo_atari") for name in ("one", "other")]
    assert [finish(process).code for process in processes] == [0, 0]
    one, other = (next(Path("runs").glob(f"*__{name}__*")) for name in ("one", "other"))
    assert curves(one) == curves(other)
    assert same_weights(load(one), load(other))
    assert torch.equal(load(one)["rng_state"], load(other)["rng_state"])


def test_other_seeds_give_other_runs(finished):
    other = train(ppo_atari, **BREAKOUT, total_timesteps=64, seed=2)
    assert curves(other)["losses/policy_loss"][0] != curves(finished)["losses/policy_loss"][0]
    assert not same_weights(load(other), load(finished))


def test_bfloat16_is_used_where_the_device_has_it_and_where_it_is_asked_for(capsys):
    """It computes nearly, but not exactly, what float32 does; the weights are float32 either way."""
    capabilities = torch.cpu.get_capabilities()
    one, other = (train(ppo_atari, **BREAKOUT, total_timesteps=64, bfloat16=x, exp_name=str(x)) for x in (True, False))
    said = re.findall(r"network in (\w+)", capsys.readouterr().out)
    if not any("bf16" in name and has is True for name, has in capabilities.items()):
        assert said == ["float32", "float32"]
        pytest.skip("no bfloat16 in this processor")
    assert said == ["bfloat16", "float32"]
    assert not same_weights(load(one), load(other))
    for name in LOSSES:
        (_, first), (_, second) = (curves(x)[f"losses/{name}"][0] for x in (one, other))
        assert first == pytest.approx(second, abs=0.02), name
    assert all(weight.dtype == torch.float32 for weight in load(one)["agent"].values())


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="no C++ compiler")
def test_compiled_runs_compute_what_eager_ones_do(tmp_path):
    """But for rounding: the losses of the first iteration agree."""
    flags = TINY | {"total_timesteps": 32, "bfloat16": False}
    command = (sys.executable, ROOT / "ppo_atari.py", "--compile", *as_flags(**flags, exp_name="compiled"))
    code, out, _ = run(*command, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert code == 0
    assert "C++ compiler" not in out
    assert list((tmp_path / "cache").iterdir()), "it compiled"
    (compiled,) = Path("runs").iterdir()
    eager = train(ppo_atari, **flags, exp_name="eager")
    for name in LOSSES:
        first, expected = (curves(x)[f"losses/{name}"][0][1] for x in (compiled, eager))
        assert first == pytest.approx(expected, rel=1e-3, abs=1e-5), name


# ----------------------------------------------------------------------------- what is logged


def test_events_hold_all_documented_curves(finished):
    """Those that README.md names: a finite value for every iteration; those of episodes, wherever one ended."""
    documented = set(re.findall(r"^\| `([a-z]+/\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    with_episodes = {f"charts/{name}" for name in ("episodic_return", "episodic_length", "episodes")}
    events = read_events(finished)
    assert documented == set(events.Tags()["scalars"])
    assert len(documented) == 14
    for tag in documented - with_episodes - {"eval/episodic_return"}:
        assert [event.step for event in events.Scalars(tag)] == list(range(64, 385, 64)), tag
        assert all(math.isfinite(event.value) for event in events.Scalars(tag)), tag
    for tag in with_episodes:  # games of 50 steps in iterations of 16
        assert [event.step for event in events.Scalars(tag)] == [256], tag
    curve = curves(finished)
    assert [value for _, value in curve["charts/episodes"]] == [4]
    assert 48 - 30 / 4 < curve["charts/episodic_length"][0][1] <= 50
    assert all(0 < value <= math.log(4) + 1e-6 for _, value in curve["losses/entropy"])
    (event,) = events.Tensors("hyperparameters/text_summary")
    lines = event.tensor_proto.string_val[0].decode().splitlines()
    assert "|env_id|ALE/Breakout-v5|" in lines
    assert len(lines) == 2 + len(ppo_atari.Args.__dataclass_fields__)


def test_episode_statistics_are_of_whole_raw_games(monkeypatch):
    """Rewards are summed as the game gives them, over lives and iterations, and each game counts once."""
    played, step = [], ppo_atari.AtariVectorEnv.step

    def noted(self, actions):
        frames, rewards, terminations, truncations, infos = step(self, actions)
        rewards = rewards * 7  # so that a sign would show
        played.append((rewards, infos["episode_frame_number"].copy()))
        return frames, rewards, terminations, truncations, infos

    monkeypatch.setattr(ppo_atari.AtariVectorEnv, "step", noted)
    run_dir = train(ppo_atari, **BREAKOUT | {"num_envs": 8}, total_timesteps=2 * 8 * 64)
    returns, lengths, totals, counts, before = [], [], np.zeros(8), np.zeros(8), np.zeros(8)
    for rewards, frame_numbers in played[: 2 * 64]:
        totals, counts = totals + rewards, counts + 1
        ended, before = frame_numbers < before, frame_numbers
        returns.extend(totals[ended])
        lengths.extend(counts[ended])
        totals[ended] = counts[ended] = 0
    assert len(returns) == 16
    assert max(returns) >= 7
    assert load(run_dir)["recent_returns"] == returns
    assert load(run_dir)["num_episodes"] == len(returns)
    curve = curves(run_dir)
    steps, episodes = zip(*curve["charts/episodes"], strict=True)
    assert episodes[-1] == len(returns)
    counts = np.diff([0, *episodes])
    for name, values in (("episodic_return", returns), ("episodic_length", lengths)):
        means = [np.mean(part) for part in np.split(values, np.cumsum(counts)[:-1].astype(int))]
        assert curve[f"charts/{name}"] == [(s, pytest.approx(x)) for s, x in zip(steps, means, strict=True)]


def test_losses_are_means_over_all_minibatches(monkeypatch):
    """Of the values that the loss had in each, by the PPO paper's formulas, computed here from the agent's outputs."""
    values, forward, minibatches = [], ppo_atari.Agent.forward, ppo_atari.minibatches
    batch = []

    def noted_minibatches(args, tensors):
        for minibatch in minibatches(args, tensors):
            batch[:] = minibatch
            yield minibatch
            batch.clear()

    def noted_forward(self, observations, actions):
        outputs = forward(self, observations, actions)
        if batch:
            returns = batch[5]
            logprobs, entropies, new_values = (x.detach() for x in outputs)
            value_loss = 0.5 * (new_values - returns).square().mean()
            kl = (batch[2] - logprobs).mean()
            values.append([entropies.mean().item(), value_loss.item(), kl.item()])
        return outputs

    monkeypatch.setattr(ppo_atari, "minibatches", noted_minibatches)
    monkeypatch.setattr(ppo_atari.Agent, "forward", noted_forward)
    run_dir = train(ppo_atari, **TINY, total_timesteps=64, clip_vloss=False, learning_rate=1e-3)
    values = np.array(values).reshape(2, UPDATES, 3).mean(1)
    for i, name in enumerate(("entropy", "value_loss", "old_approx_kl")):
        logged = [value for _, value in curves(run_dir)[f"losses/{name}"]]
        assert logged == pytest.approx(values[:, i].tolist(), rel=1e-4, abs=1e-6), name


def test_the_learning_rate_falls_in_a_line_to_near_zero(finished):
    rates = [2.5e-4 * (1 - i / 6) for i in range(6)]
    logged = [value for _, value in curves(finished)["charts/learning_rate"]]
    assert logged == pytest.approx(rates, rel=1e-6)
    constant = train(ppo_atari, **TINY, total_timesteps=64, anneal_lr=False)
    assert [value for _, value in curves(constant)["charts/learning_rate"]] == pytest.approx([2.5e-4] * 2)


def test_target_kl_ends_the_updates_early():
    """As soon as the policy has moved too far: the update that would follow is not made."""
    flags = TINY | {"total_timesteps": 96, "learning_rate": 0.003}
    run_dir = train(ppo_atari, **flags, target_kl=1e-4)
    epochs = [value for _, value in curves(run_dir)["charts/update_epochs"]]
    assert all(1 / 4 <= value < 4 for value in epochs)
    assert load(run_dir)["optimizer"]["state"][0]["step"] == 4 * sum(epochs)
    whole = train(ppo_atari, **flags, target_kl=1e6, exp_name="whole")
    assert [value for _, value in curves(whole)["charts/update_epochs"]] == [4, 4, 4]


# --------------------------------------------------------------------------- stopping, going on

# An iteration takes 50 ms longer, so that the run is not over before the signal comes, however fast the machine is.
SLOWER = "import time\ngae = ppo_atari.compute_gae\nppo_atari.compute_gae = lambda *x: time.sleep(0.05) or gae(*x)\n"
LONG = {"total_timesteps": 60 * 32}


def assert_whole(run_dir, steps):
    """Curves without gap or duplicate, a learning rate on one line, and as many gradient steps as there should be."""
    curve, checkpoint = curves(run_dir), load(run_dir)
    iterations = len(steps)
    assert checkpoint["global_step"] == steps[-1]
    assert checkpoint["iteration"] == iterations
    assert checkpoint["optimizer"]["state"][0]["step"] == iterations * UPDATES
    rates = [2.5e-4 * (1 - i / iterations) for i in range(iterations)]
    assert curve["charts/learning_rate"] == [(s, pytest.approx(r)) for s, r in zip(steps, rates, strict=True)]
    for name in LOSSES:
        assert [step for step, _ in curve[f"losses/{name}"]] == steps
    steps, episodes = zip(*curve["charts/episodes"], strict=True)
    assert list(steps) == sorted(set(steps))
    assert list(episodes) == sorted(set(episodes))
    assert episodes[-1] == checkpoint["num_episodes"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopping_and_the_command_to_go_on(start, signum):
    """Exit code 130 or 143, the iteration finished and saved; the very command that is printed ends the run."""
    process = start(*as_flags(**TINY, **LONG), setup=SLOWER, script="ppo_atari")
    wait_for_training(process)
    time.sleep(1.5)
    process.send_signal(signum)
    code, out, err = finish(process)
    assert code == 128 + signum
    assert err == "\nstopping after this iteration; once more stops at once\n"
    run_dir = the_run()
    saved = load(run_dir)
    stopped, episodes = saved["global_step"], saved["num_episodes"]
    assert 0 < stopped < LONG["total_timesteps"]
    assert saved["iteration"] * 32 == stopped
    assert saved["optimizer"]["state"][0]["step"] == saved["iteration"] * UPDATES
    assert f"stopped at step {stopped:,}" in out
    assert "evaluation" not in out
    assert curves(run_dir)["charts/learning_rate"][-1][0] == stopped

    command = shlex.split(re.search(r"to go on: python (.* --resume .*)", out)[1])
    result = run(sys.executable, *command)
    assert (result.code, result.err) == (0, "")
    assert f"steps {stopped:,} to 1,920" in result.out
    assert_whole(run_dir, list(range(32, 1921, 32)))
    assert load(run_dir)["num_episodes"] > episodes


def test_a_second_ctrl_c_stops_at_once(start):
    slow = SLOWER.replace("0.05", "60")
    process = start(*as_flags(**TINY), setup=slow, script="ppo_atari")
    wait_for_training(process)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert any("once more stops at once" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert "Traceback" not in err
    assert not (the_run() / "checkpoint.pt").exists()


def test_resuming_takes_up_what_was_saved(monkeypatch, copied):
    """Before the first gradient step, weights, Adam's moments and the random numbers are those of the file."""
    saved, steps, random_states = load(copied), [], []
    step, sample_noise = torch.optim.Adam.step, ppo_atari.Agent.sample_noise

    def noted_step(self, *args):
        (weights,) = self.param_groups[0]["params"]
        steps.append({"weights": weights.clone(), **{name: x.clone() for name, x in self.state[weights].items()}})
        return step(self, *args)

    def noted_noise(self, *shape):
        random_states.append(torch.get_rng_state())
        return sample_noise(self, *shape)

    monkeypatch.setattr(torch.optim.Adam, "step", noted_step)
    monkeypatch.setattr(ppo_atari.Agent, "sample_noise", noted_noise)
    ppo_atari.train(ppo_atari.load_args(str(copied), resume=str(copied), total_timesteps=448))
    expected = saved["optimizer"]["state"][0]
    expected["weights"] = torch.cat([x.flatten() for x in saved["agent"].values()])
    assert steps[0].keys() == expected.keys()
    assert all(torch.equal(steps[0][name], expected[name]) for name in expected)
    assert torch.equal(random_states[0], saved["rng_state"])
    assert load(copied)["num_episodes"] >= saved["num_episodes"]
    assert load(copied)["recent_returns"][:4] == saved["recent_returns"]


def test_a_resumed_run_plays_other_games(monkeypatch, copied):
    """Their seeds are neither those that the run began with nor those of its evaluation."""
    seeds, reset = [], ppo_atari.AtariVectorEnv.reset

    def noted(self, *, seed=None, **options):
        seeds.append(set(seed.tolist()))
        return reset(self, seed=seed, **options)

    monkeypatch.setattr(ppo_atari.AtariVectorEnv, "reset", noted)
    train(ppo_atari, **BREAKOUT, total_timesteps=64)
    ppo_atari.train(ppo_atari.load_args(str(copied), resume=str(copied), total_timesteps=448))
    first, evaluation, resumed, evaluation_again = seeds
    assert len(first) == len(resumed) == 4
    assert not first & resumed
    assert not evaluation & (first | resumed)
    assert evaluation == evaluation_again


def test_killed_at_random_moments_and_resumed(start):
    """kill -9 leaves a checkpoint that can be loaded and resumed, and in the end curves without gap or duplicate."""
    flags = as_flags(**TINY, **LONG)
    kills = []
    for _ in range(2):
        # without a pause between saves, which take about as long as the rest, many a kill comes in the middle of one
        process = start(*flags, setup=f"ppo_atari.CHECKPOINT_SECONDS = 0\n{SLOWER}", script="ppo_atari")
        wait_for_training(process)
        path = the_run() / "checkpoint.pt"
        old = path.stat().st_mtime_ns if path.exists() else None
        wait_until(lambda path=path, old=old: path.exists() and path.stat().st_mtime_ns != old, "a checkpoint is saved")
        time.sleep(random.uniform(0, 0.5))
        process.kill()
        finish(process)
        kills.append(load(the_run())["global_step"])
        flags = ["--resume", the_run()]
        next_second()
    assert 0 < kills[0] < kills[1] < LONG["total_timesteps"]
    run_dir = the_run()
    assert finish(start("--resume", run_dir, script="ppo_atari")).code == 0
    assert_whole(run_dir, list(range(32, 1921, 32)))


# ---------------------------------------------------------------------------------- evaluation


def test_evaluation_plays_the_saved_policy(command_line, monkeypatch, copied):
    """Here one that was made to press one and the same button."""
    checkpoint = load(copied)
    checkpoint["agent"]["actor.bias"][2] = 1e6
    torch.save(checkpoint, copied / "checkpoint.pt")
    before = (copied / "checkpoint.pt").read_bytes()
    played, step = [], ppo_atari.AtariVectorEnv.step

    def noted(self, actions):
        played.append(actions.tolist())
        return step(self, actions)

    monkeypatch.setattr(ppo_atari.AtariVectorEnv, "step", noted)
    code, out, err = command_line("--evaluate", copied, "--eval-episodes", 3, script=ppo_atari)
    assert (code, err) == (0, "")
    assert "evaluation at step 384: return " in out
    assert "over 3 games" in out
    assert len(played) > 40
    assert all(actions == [2, 2, 2] for actions in played)
    assert [step for step, _ in curves(copied)["eval/episodic_return"]] == [384, 384]
    assert (copied / "checkpoint.pt").read_bytes() == before
    assert not Path("runs").exists()


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--env-id", "ALE/Pon-v5"), ["ALE/Pon-v5", "ALE/Pong-v5"]),
        (("--env-id", "Brekout-v5"), ["Brekout-v5", "Breakout-v5"]),
        (("--env-id", ""), []),
        (("--env-id", "CartPole-v1"), ["CartPole-v1", "ppo.py"]),
        (("--env-kwargs", "nonsense=1"), ["ALE/Breakout-v5", "nonsense"]),
        (("--env-kwargs", "nonsense"), ["name=value", "nonsense"]),
        (("--env-kwargs", "frameskip=0"), ["ALE/Breakout-v5", "frameskip"]),
        (("--env-kwargs", "continuous=True"), ["Discrete"]),
        (("--num-envs", 0), ["--num-envs", "0"]),
        (("--learning-rate", "nan"), ["--learning-rate", "nan"]),
        (("--num-minibatches", 5), ["1024", "5 minibatches", "--num-minibatches 4 would work"]),
        (("--device", "cud"), ["--device cud"]),
        (("--resume", "a", "--evaluate", "b"), ["--resume", "--evaluate"]),
        (("--resume", "no_such_run"), ["no_such_run", "checkpoint.pt"]),
        (("--evaluate", "no_such_run"), ["no_such_run", "checkpoint.pt"]),
    ],
)
def test_bad_flags_are_refused_in_one_line(command_line, flags, words):
    assert_refused(ppo_atari, command_line(*flags, script=ppo_atari), *words)


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("grayscale=False", "grayscale"),
        ("autoreset_mode=NextStep", "autoreset_mode"),
        ("batch_size=1", "batch_size"),
        ("img_height=20", "20x84"),
    ],
)
def test_settings_that_the_network_or_the_loop_cannot_take_are_refused(command_line, setting, word):
    """ALE's vector environment would take these."""
    flags = as_flags(**TINY | {"env_kwargs": (setting,)}, total_timesteps=32)
    assert_refused(ppo_atari, command_line(*flags, script=ppo_atari), word)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_refused(command_line):
    assert_refused(ppo_atari, command_line("--device", "cuda", script=ppo_atari), "--device cuda cannot be used")


def test_without_the_games_it_says_what_to_install():
    """In a real process, whose ale_py cannot be imported."""
    Path("ale_py").mkdir()
    Path("ale_py/__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'ale_py'\")\n")
    result = run(sys.executable, ROOT / "ppo_atari.py", PYTHONPATH=str(Path.cwd()))
    assert_refused(ppo_atari, result, "No module named 'ale_py'", "pip install", "gymnasium[atari]")


def test_another_game_contradicts_the_checkpoint(command_line, finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    for way in ("--resume", "--evaluate"):
        result = command_line(way, finished, "--env-id", "ALE/Pong-v5", script=ppo_atari)
        assert_refused(ppo_atari, result, "--env-id ALE/Pong-v5 contradicts", "made with ALE/Breakout-v5")
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_finished_run_is_not_resumed_without_more_timesteps(command_line, finished):
    assert_refused(
        ppo_atari, command_line("--resume", finished, script=ppo_atari), "all its 384 steps", "--total-timesteps"
    )


def test_runs_of_another_script_are_refused(command_line, copied):
    """Those of ppo.py, say, which have other flags."""
    checkpoint = load(copied)
    checkpoint["args"]["async_envs"] = True
    torch.save(checkpoint, copied / "checkpoint.pt")
    assert_refused(
        ppo_atari, command_line("--resume", copied, script=ppo_atari), "damaged or not from ppo_atari.py", "async_envs"
    )


# ------------------------------------------------------------------------------------ a full disk

full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, the device that is always full")


@full_device
def test_full_disk_leaves_the_old_checkpoint(capfd, copied):
    """The temporary file leads to a device that is full: the old checkpoint stays as it is, to the byte."""
    old = (copied / "checkpoint.pt").read_bytes()
    (copied / "checkpoint.tmp").symlink_to("/dev/full")
    capfd.readouterr()
    ppo_atari.train(ppo_atari.load_args(str(copied), resume=str(copied), total_timesteps=448))
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("warning: checkpoint not saved")
    assert "No space left on device" in line
    assert "evaluation at step 448" in out
    assert (copied / "checkpoint.pt").read_bytes() == old


@pytest.fixture
def small_disk(monkeypatch):
    """The current folder is on a disk of its own, with room for two checkpoints."""
    Path("disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", "disk"]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    disk = Path("disk").resolve()
    monkeypatch.chdir(disk)
    yield
    monkeypatch.chdir(disk.parent)
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill_the_disk(done=lambda: True):
    """To the last byte, and again what is freed until it is done."""
    with Path("filler").open("ab", buffering=0) as file:
        while True:
            for size in (1 << 20, 4096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))
            if done():
                break
            time.sleep(0.002)


def test_a_disk_that_fills_up_stops_nothing(start, small_disk):
    """Neither checkpoints nor events nor the film can be written any more: it warns, and goes on to its end."""
    flags = as_flags(**TINY, total_timesteps=960, capture_video=True)
    process = start(*flags, setup=f"ppo_atari.CHECKPOINT_SECONDS = 0.4\n{SLOWER}", script="ppo_atari")
    wait_for_training(process)
    wait_until(lambda: (the_run() / "checkpoint.pt").exists(), "a checkpoint is saved")
    keep_full = threading.Thread(target=fill_the_disk, args=(lambda: process.poll() is not None,))
    keep_full.start()
    code, out, err = finish(process)
    keep_full.join()
    assert code == 0
    assert "warning: checkpoint not saved" in err
    assert "evaluation at step 960" in out
    assert "warning: evaluation not logged" in err
    assert re.search("warning: .*mp4 not filmed", err)
    run_dir = the_run()
    assert 0 < load(run_dir)["global_step"] < 960

    Path("filler").unlink()
    next_second()
    assert finish(start("--resume", run_dir, script="ppo_atari")).code == 0
    assert_whole(run_dir, list(range(32, 961, 32)))


@full_device
def test_a_film_on_a_full_disk_costs_one_line(command_line, copied):
    """The evaluation itself is printed and logged."""
    (copied / "videos").mkdir()
    (copied / "videos" / "eval-at-384-episode-0.mp4").symlink_to("/dev/full")
    code, out, err = command_line("--evaluate", copied, "--capture-video", script=ppo_atari)
    assert code == 0
    assert "evaluation at step 384: return " in out
    assert [step for step, _ in curves(copied)["eval/episodic_return"]] == [384, 384]
    (line,) = err.splitlines()
    assert re.search("^warning: .*mp4 not filmed", line)


def test_a_film_that_fills_the_disk_at_its_end_costs_one_line(command_line, small_disk, finished):
    """There is room to begin it, but not for its last bytes: what is left is not passed off as a film."""
    run_dir = shutil.copytree(finished, Path("copied"))
    (run_dir / "videos").mkdir()
    fill_the_disk()
    with Path("filler").open("ab") as file:
        file.truncate(file.tell() - 2 * 4096)  # the event file takes one block, the film more
    code, out, err = command_line("--evaluate", run_dir, "--capture-video", script=ppo_atari)
    assert code == 0
    assert "evaluation at step 384: return " in out
    assert [step for step, _ in curves(run_dir)["eval/episodic_return"]] == [384, 384]
    (line,) = err.splitlines()
    assert re.search("^warning: .*mp4 not filmed", line)


# --------------------------------------------------------------------------- learning from pixels


class OneFrameSignal:
    """A game as AtariVectorEnv gives it, of 4 steps: press the button that belongs to the place of a bright square.

    It is at one of three places, in one of the four stacked frames only; random play gets 4/3. Every second
    environment truncates its games, the others terminate theirs.
    """

    single_observation_space = Box(0, 255, (4, 84, 84), np.uint8)
    single_action_space = Discrete(3)

    def __init__(self, num_envs):
        self.num_envs = num_envs

    def reset(self, *, seed=None, options=None):
        self.rng = np.random.default_rng(seed)
        self.count = np.zeros(self.num_envs, int)
        return self.draw(), self.infos()

    def infos(self):
        return {"episode_frame_number": 4 * self.count, "lives": np.ones(self.num_envs, int)}

    def draw(self):
        self.places = self.rng.integers(3, size=self.num_envs)
        frames = np.zeros((self.num_envs, 4, 84, 84), np.uint8)
        for i, place in enumerate(self.places):
            y, x = ((10, 10), (10, 60), (60, 35))[place]
            frames[i, self.rng.integers(4), y : y + 12, x : x + 12] = 255
        return frames

    def step(self, actions):
        rewards = (actions == self.places).astype(np.int32)
        frames = self.draw()
        self.count = (self.count + 1) % 4
        ended = self.count == 0
        truncations = ended & (np.arange(self.num_envs) % 2 == 1)
        infos = self.infos() | ({"final_obs": frames.copy()} if ended.any() else {})
        return frames, rewards, ended & ~truncations, truncations, infos

    def close(self):
        pass


@pytest.fixture
def learn(monkeypatch):
    """Trains an agent in that game and returns its mean return in the last 100 games."""
    monkeypatch.setattr(ppo_atari, "make_envs", lambda args, num_envs, **changes: OneFrameSignal(num_envs))

    def call(**flags):
        flags = {"num_envs": 8, "num_steps": 32, "learning_rate": 1e-3, "total_timesteps": 4096} | flags
        returns = load(train(ppo_atari, **flags))["recent_returns"]
        assert len(returns) == 100
        return np.mean(returns)

    return call


@pytest.mark.parametrize(("seed", "bfloat16"), [(1, True), (2, True), (3, False)])
def test_it_learns_from_pixels(learn, seed, bfloat16):
    """The best is 4; the seeds reach 3.87, 3.90 and 3.79, whether in bfloat16 or not."""
    assert learn(seed=seed, bfloat16=bfloat16) > 3.5


def test_without_pixels_it_learns_nothing(learn, monkeypatch):
    """So the test above is about them. Seeds 1 to 3 reach 1.26 to 1.37; chance is 1.33."""
    features = ppo_atari.Agent.features
    monkeypatch.setattr(ppo_atari.Agent, "features", lambda self, frames: features(self, frames * 0))
    assert learn() < 1.8


def test_with_one_frame_of_the_stack_it_learns_little(learn, monkeypatch):
    """So it needs all four. Seeds 1 and 2 reach 1.89 and 2.03; 2 is the best without the other three."""
    features = ppo_atari.Agent.features
    monkeypatch.setattr(ppo_atari.Agent, "features", lambda self, frames: features(self, frames[..., [0, 0, 0, 0]]))
    assert learn() < 2.6


# ------------------------------------------------------------------------------ several processes

# Each process notes what it does: of long vectors, the first of each iteration and the sums of the others.
# One of them comes a good second late to the making of the run's folder.
NOTES = """
import atexit, hashlib, os, time
import torch
import torch.distributed as dist

rank = int(os.environ["RANK"])
notes = {name: [] for name in ("weights", "gradients", "reductions", "num_envs", "actions", "seeds", "ended", "saves")}
atexit.register(lambda: torch.save(notes, f"notes-{rank}.pt"))
init, all_reduce, adam_step = dist.init_process_group, dist.all_reduce, torch.optim.Adam.step
minibatches, save_checkpoint = ppo_atari.minibatches, ppo_atari.save_checkpoint
reset, step = ppo_atari.AtariVectorEnv.reset, ppo_atari.AtariVectorEnv.step

def late_init(*args, **options):
    init(*args, **options)
    time.sleep(1.2 if rank == LATE else 0)

def digest(x):
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()

def noted_all_reduce(x):
    notes["reductions"].append(x.clone() if len(notes["reductions"]) % 4 == 0 else digest(x))
    all_reduce(x)

def noted_adam_step(self, *args):
    (weights,) = self.param_groups[0]["params"]
    notes["gradients"].append(weights.grad.clone() if len(notes["gradients"]) % 4 == 0 else digest(weights.grad))
    notes["weights"].append(digest(weights))
    adam_step(self, *args)
    notes["weights_after"] = weights

def noted_minibatches(args, batch):
    notes["num_envs"].append(args.num_envs)
    notes["actions"].append(batch[1].clone())
    return minibatches(args, batch)

def noted_save(*args):
    notes["saves"].append(args[1]["global_step"])
    save_checkpoint(*args)

def noted_reset(self, *, seed, **options):
    notes["seeds"].append(seed.tolist())
    frames, infos = reset(self, seed=seed, **options)
    self.numbers = infos["episode_frame_number"].copy()
    return frames, infos

def noted_step(self, actions):
    result = step(self, actions)
    numbers = result[4]["episode_frame_number"]
    notes["ended"].append(int((numbers < self.numbers).sum()))
    self.numbers = numbers.copy()
    return result

dist.init_process_group, dist.all_reduce, torch.optim.Adam.step = late_init, noted_all_reduce, noted_adam_step
ppo_atari.minibatches, ppo_atari.save_checkpoint = noted_minibatches, noted_save
ppo_atari.AtariVectorEnv.reset, ppo_atari.AtariVectorEnv.step = noted_reset, noted_step
"""
# 4 iterations, in each of which 2 processes play 32 steps each and make 4 updates together
SHARED = BREAKOUT | {"total_timesteps": 256, "num_minibatches": 2, "update_epochs": 2}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Trains with two processes, one of them late. Returns the folder, what was printed, and each process's notes."""
    done = {}

    def call(late):
        if late not in done:
            with pytest.MonkeyPatch.context() as patch:
                folder = tmp_path_factory.mktemp("together")
                patch.chdir(folder)
                setup = NOTES.replace("LATE", str(late))
                result = finish(spawn(*as_flags(**SHARED), setup=setup, script="ppo_atari", processes=2))
                notes = [torch.load(f"notes-{rank}.pt") for rank in (0, 1)] if result.code == 0 else []
                done[late] = folder, result, notes
        return done[late]

    return call


@pytest.mark.parametrize("late", [0, 1])
def test_two_processes_leave_one_run(together, late):
    """Whichever comes first: one folder, one checkpoint, one set of curves, and one voice."""
    folder, (code, out, err), _ = together(late)
    assert (code, err) == (0, "")
    (run_dir,) = (folder / "runs").iterdir()
    assert sorted(path.name.split(".")[0] for path in run_dir.iterdir()) == ["checkpoint", "events", "events"]
    lines = [line for line in out.splitlines() if not re.match(" +[0-9]+%", line)]  # some progress on slow machines
    assert len(lines) == len(set(lines)) == 8
    assert lines[0] == f"runs/{run_dir.name}: steps 0 to 256, 64 per iteration"
    assert lines[1].startswith("2 processes x 2 environments on cpu, ")
    assert load(run_dir)["global_step"] == 256
    assert load(run_dir)["args"]["num_envs"] == 4
    assert [step for step, _ in curves(run_dir)["losses/entropy"]] == [64, 128, 192, 256]


def test_two_processes_repeat_to_the_bit(together):
    """Whichever comes first."""
    (one,), (other,) = (list((together(late)[0] / "runs").iterdir()) for late in (0, 1))
    assert curves(one) == curves(other)
    assert same_weights(load(one), load(other))


def test_two_processes_train_one_agent_with_the_mean_of_their_gradients(together):
    """Their weights are the same, to the bit, before every gradient step and at the end, which is what is saved."""
    folder, _, (a, b) = together(1)
    assert a["weights"] == b["weights"]
    assert len(set(a["weights"])) == 16
    assert torch.equal(a["weights_after"], b["weights_after"])
    (run_dir,) = (folder / "runs").iterdir()
    saved = load(run_dir)["agent"].values()
    assert torch.equal(torch.cat([x.flatten() for x in saved]), a["weights_after"])

    assert len(a["reductions"]) == len(b["reductions"]) == 16
    assert a["gradients"][1:4] == b["gradients"][1:4]
    for i in range(0, 16, 4):
        mine, other = a["reductions"][i], b["reductions"][i]
        assert not torch.equal(mine, other)
        mean = (mine + other) / 2
        clipped = mean * min(1, 0.5 / mean.norm().item())
        torch.testing.assert_close(a["gradients"][i], clipped, rtol=1e-4, atol=1e-8)
        assert torch.equal(a["gradients"][i], b["gradients"][i])


def test_two_processes_play_and_act_on_their_own(together):
    """Each has its share of the environments, with seeds and actions of its own; only the first one saves."""
    _, _, (a, b) = together(1)
    assert a["num_envs"] == b["num_envs"] == [2] * 4
    assert len(set(a["seeds"][0] + b["seeds"][0])) == 4
    assert [len(x) for x in a["actions"]] == [len(x) for x in b["actions"]] == [32] * 4
    assert not any(map(torch.equal, a["actions"], b["actions"]))
    assert a["saves"] == [256]
    assert b["saves"] == []


def test_two_processes_count_the_games_of_both(together):
    folder, _, (a, b) = together(1)
    games = [sum(notes["ended"][: 4 * 16]) for notes in (a, b)]  # what follows is the evaluation
    assert min(games) >= 2
    (run_dir,) = (folder / "runs").iterdir()
    checkpoint = load(run_dir)
    assert checkpoint["num_episodes"] == len(checkpoint["recent_returns"]) == sum(games)
    assert curves(run_dir)["charts/episodes"][-1][1] == sum(games)
    assert len(b["ended"]) == 4 * 16, "only the first one evaluates"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--num-envs", 3), "--num-envs 3 does not divide among 2 processes"),
        (("--env-id", "CartPole-v1"), "CartPole-v1"),
        (("--device", "cuda:0"), "--device cuda, not cuda:0"),
        pytest.param(
            *(("--device", "cuda"), "cannot be used"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_two_processes_cannot_run_is_refused(start, flags, words):
    """In one line before torchrun's own report, and without a run left behind, whichever comes first."""
    setup = NOTES.replace("LATE", "1")
    code, out, err = finish(start(*as_flags(**SHARED), *flags, setup=setup, script="ppo_atari", processes=2))
    assert code != 0
    said = [line for line in err.splitlines() if line.startswith("ppo_atari.py: error: ")]
    assert set(said) == {said[0]}
    assert words in said[0]
    assert err.count("Traceback") <= 1, "torchrun's own"
    assert out == ""
    assert not Path("runs").is_dir() or not list(Path("runs").iterdir())


def rank_of(pid):
    """Which of torchrun's processes this is."""
    return int(re.search(r"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_text())[1])


@pytest.mark.parametrize(("rank", "processes"), [(0, [1]), (1, [2, 4])])
def test_the_death_of_one_process_ends_all_and_any_number_goes_on(start, rank, processes):
    """As by the system when memory runs out. A plain process can go on, too."""
    setup = f"ppo_atari.CHECKPOINT_SECONDS = 0\n{SLOWER}"
    flags = as_flags(**SHARED | {"total_timesteps": 64 * 1000})
    process = start(*flags, setup=setup, script="ppo_atari", processes=2)
    wait_for_training(process)
    wait_until(lambda: (the_run() / "checkpoint.pt").exists(), "a checkpoint is saved")
    workers = {rank_of(pid): pid for pid in descendants(process.pid)}
    assert sorted(workers) == [0, 1]
    killed = time.monotonic()
    os.kill(workers[rank], signal.SIGKILL)
    code, _, err = finish(process)
    assert code != 0
    assert time.monotonic() - killed < 30
    assert not any(alive(pid) for pid in workers.values())
    assert re.search(rf"rank +: {rank} .*\n.*exitcode +: -9", err), "torchrun tells which one died"
    run_dir = the_run()

    for number in processes:
        done = load(run_dir)["global_step"]
        assert done > 0
        next_second()
        more = ("--resume", run_dir, "--num-envs", 4, "--total-timesteps", done + 128)
        result = finish(start(*more, script="ppo_atari", processes=number))
        assert (result.code, result.err) == (0, "")
        assert f"steps {done:,} to {done + 128:,}, 64 per iteration" in result.out
        said = f"{number} processes x {4 // number} environments" if number > 1 else "4 environments"
        assert f"{said} on cpu" in result.out
        assert load(run_dir)["global_step"] == done + 128
        assert load(run_dir)["optimizer"]["state"][0]["step"] == (done // 64 + 2) * 4
        steps = [step for step, _ in curves(run_dir)["losses/entropy"]]
        assert steps == list(range(64, done + 129, 64))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_stops_and_saves(start, signum):
    """Which passes it on to all, as torchrun does itself with Ctrl-C."""
    flags = as_flags(**SHARED | {"total_timesteps": 64 * 1000})
    setup = f"ppo_atari.CHECKPOINT_SECONDS = 0\n{SLOWER}"
    process = start(*flags, setup=setup, script="ppo_atari", processes=2)
    wait_for_training(process)
    wait_until(lambda: (the_run() / "checkpoint.pt").exists(), "all of them train")
    workers = descendants(process.pid)
    assert len(workers) == 2
    process.send_signal(signum)
    code, out, err = finish(process)
    assert code != 0
    assert not any(alive(pid) for pid in workers)
    assert err.count("Traceback") <= 1, "torchrun's own"
    assert "Connection" not in err
    saved = load(the_run())["global_step"]
    assert 0 < saved < 64 * 1000
    assert f"stopped at step {saved:,}; to go on: python " in out
    assert curves(the_run())["losses/entropy"][-1][0] == saved


# One process gets a signal in the third of six iterations, at a moment of our choice.
MOMENTS = {
    "while it computes": "ppo_atari.compute_gae = lambda *x: calls.append(0) or at(3) or gae(*x)",
    "while it tells the others": "dist.all_gather_object = lambda *x: calls.append(0) or gather(*x) or at(3)",
    "while it logs": "ppo_atari.approx_kl = lambda x: calls.append(0) or at(3) or kl(x)",
}


@pytest.mark.parametrize(
    ("moment", "rank"), [(x, rank) for x in MOMENTS for rank in (0, 1) if (x[9:], rank) != ("logs", 1)]
)
def test_a_signal_to_one_process_stops_all(start, moment, rank):
    """At whatever moment it comes: none is left alone, and the iteration, or the next one, is saved."""
    setup = (
        "import os, signal\nimport torch.distributed as dist\n"
        "calls, gae, kl, gather = [], ppo_atari.compute_gae, ppo_atari.approx_kl, dist.all_gather_object\n"
        f"mine = os.environ['RANK'] == '{rank}'\n"
        "at = lambda n: signal.raise_signal(signal.SIGTERM) if mine and len(calls) == n else None\n"
    )
    flags = as_flags(**SHARED | {"total_timesteps": 64 * 6})
    process = start(*flags, setup=setup + MOMENTS[moment], script="ppo_atari", processes=2)
    _, out, err = finish(process)
    assert err.count("stopping after this iteration") == 1
    assert "Connection" not in err
    assert err.count("Traceback") <= 1, "torchrun's own"
    saved = load(the_run())["global_step"]
    assert saved in ([192] if moment == "while it computes" else [192, 256])
    assert f"stopped at step {saved:,}" in out
