"""Runs of ppo_continuous_action.py: they learn, repeat, are killed and go on, are evaluated elsewhere, and filmed."""

import ctypes.util
import re
import shutil
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from helpers import (
    LOSSES,
    ROOT,
    assert_refused,
    curves,
    finish,
    load,
    next_second,
    read_events,
    run,
    same_weights,
    the_run,
    train,
    wait_for_training,
    wait_until,
)

import ppo_continuous_action as ppo

RESULT = r"greedy evaluation at step ([\d,]+): return (\S+) \+- (\S+) \(min (\S+), max (\S+)\) over (\d+) episodes"
LEARN = {
    "num_envs": 8,
    "num_steps": 32,
    "num_minibatches": 4,
    "update_epochs": 4,
    "learning_rate": 0.005,
    "total_timesteps": 8192,
    "eval_episodes": 1,
}
ONE_ITERATION = {"num_envs": 2, "num_steps": 32, "num_minibatches": 2, "total_timesteps": 64, "eval_episodes": 1}
SHORT = ("--num-envs", 2, "--num-steps", 64, "--num-minibatches", 4, "--total-timesteps", 512, "--eval-episodes", 1)


# --------------------------------------------------------------------------------------- learning


def learn(env_id, **flags):
    """A trained agent's greedy action and its value in units of reward, as functions of an observation."""
    agent = ppo.train(ppo.Args(f"probe_envs:{env_id}", **{**LEARN, **flags}))

    @torch.no_grad()
    def policy(*observation):
        return agent.act(torch.tensor([observation], dtype=torch.float32), 0.0).item()

    @torch.no_grad()
    def value(*observation):
        scaled = agent.value(torch.tensor(observation, dtype=torch.float32))
        return (scaled * agent.return_statistics.std).item()

    return policy, value


def test_the_policy_finds_the_best_action():
    """That is 0.4: seeds 1 to 3 get within 0.03. The value is what the noise left over leaves of the reward of 1."""
    policy, value = learn("Target-v0")
    assert policy(1) == pytest.approx(0.4, abs=0.06)
    assert 0.85 < value(1) < 1


def test_the_policy_follows_the_observation():
    """The best action is half of it: seeds 1 to 3 get within 0.03."""
    policy, value = learn("Target-v0", env_kwargs=("follow=True",))
    assert (policy(-1), policy(1)) == pytest.approx((-0.5, 0.5), abs=0.06)
    assert 0.85 < min(value(-1), value(1)) < 1


def test_truncation_leaves_the_value_of_going_on():
    """Reward 1 for ever, merely cut into pieces of 3 steps: 1 / (1 - gamma), in units of reward."""
    _, value = learn("ContinuousChain-v0", env_kwargs=("length=3", "every_step=True", "end=truncation"), gamma=0.9)
    assert [value(*row) for row in np.eye(3)] == pytest.approx([10] * 3, rel=0.01)


def test_termination_leaves_nothing():
    """Reward 1 in each of 3 steps, then death."""
    _, value = learn("ContinuousChain-v0", env_kwargs=("length=3", "every_step=True", "end=termination"), gamma=0.9)
    assert [value(*row) for row in np.eye(3)] == pytest.approx([2.71, 1.9, 1], rel=0.01)


@pytest.fixture(scope="module")
def balanced(tmp_path_factory):
    """The folder of a run of InvertedPendulum, and what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("balanced"))
        flags = "--num-envs 4 --num-steps 128 --num-minibatches 8 --update-epochs 5 --learning-rate 0.003 --gamma 0.95"
        more = ("--env-id", "InvertedPendulum-v5", "--total-timesteps", 16_000, "--eval-episodes", 5)
        result = run(sys.executable, ROOT / "ppo_continuous_action.py", *flags.split(), *more)
        assert result.code == 0, result.err
        return the_run().resolve(), result


def test_a_loaded_policy_is_as_good_as_the_trained_one(balanced):
    """In a new process: the very numbers of the evaluation after training, and no worse than the training was.

    Training ends at about 130 of 1000; greedy, the pole never falls. With noise, or without the statistics, it does.
    """
    run_dir, trained = balanced
    loaded = run(sys.executable, ROOT / "ppo_continuous_action.py", "--evaluate", run_dir)
    assert (loaded.code, loaded.err) == (0, "")
    assert re.search(RESULT, loaded.out)[0] == re.search(RESULT, trained.out)[0]
    assert curves(run_dir)["eval/episodic_return"][0] == curves(run_dir)["eval/episodic_return"][1]
    step, mean, *_, count = re.search(RESULT, loaded.out).groups()
    returns = load(run_dir)["recent_returns"]
    assert (step, count, len(returns)) == ("16,384", "5", 100)
    assert float(mean) >= np.mean(returns) - np.std(returns)
    assert np.mean(returns) > 50, "it starts at about 8"
    assert float(mean) > 500


def test_without_its_statistics_a_loaded_policy_is_worse(balanced):
    """So the test above would see it if they were lost."""
    run_dir, checkpoint = ppo.load_checkpoint(str(balanced[0]))
    args = ppo.load_args(str(run_dir))
    copied = shutil.copytree(run_dir, Path("copied"))
    state = checkpoint["agent"]
    state["observation_statistics.std"] = torch.ones_like(state["observation_statistics.std"])
    assert ppo.evaluate(args, copied, checkpoint).mean() < 500


# ------------------------------------------------------------------- alone, to the bit, what is logged


def test_alone_in_an_empty_folder_and_to_the_bit():
    """Copied, it needs nothing else of the repository; the same seed gives the same bits in another process."""
    shutil.copy(ROOT / "ppo_continuous_action.py", "ppo_continuous_action.py")
    flags = ("--env-id", "Hopper-v5", *SHORT, "--exp-name", "one")
    result = run(sys.executable, "ppo_continuous_action.py", *flags, PYTHONPATH="")
    assert (result.code, result.err) == (0, "")
    one = the_run()
    assert re.fullmatch(r"Hopper-v5__one__1__\d{10}", one.name)
    assert f"{one}: steps 0 to 512, 128 per iteration" in result.out
    assert f"go on:    python ppo_continuous_action.py --resume {one} --total-timesteps 1024" in result.out
    assert sorted(path.name.split(".")[0] for path in one.iterdir()) == ["checkpoint", "events", "events"]

    flags = {"env_id": "Hopper-v5", "num_envs": 2, "num_steps": 64, "num_minibatches": 4, "total_timesteps": 512}
    other = train(ppo, **flags, exp_name="other")
    assert curves(one) == curves(other)
    assert same_weights(load(one), load(other))
    assert torch.equal(load(one)["rng_state"], load(other)["rng_state"])
    another = train(ppo, **flags, exp_name="another", seed=2)
    assert not same_weights(load(one), load(another))


def test_events_hold_all_curves_with_plausible_values():
    """Those of ppo.py. The entropy starts at that of standard deviations of 0.5, and each logged loss is finite."""
    run_dir = train(ppo, env_id="Hopper-v5", num_envs=2, num_steps=64, num_minibatches=4, total_timesteps=512)
    tags = {f"losses/{name}" for name in (*LOSSES, "explained_variance")}
    charts = ("SPS", "learning_rate", "update_epochs", "episodic_return", "episodic_length", "episodes")
    tags |= {f"charts/{name}" for name in charts} | {"eval/episodic_return"}
    assert set(read_events(run_dir).Tags()["scalars"]) == tags
    curve = curves(run_dir)
    for name in (*LOSSES, "explained_variance"):
        assert [step for step, _ in curve[f"losses/{name}"]] == [128, 256, 384, 512]
        assert np.isfinite([value for _, value in curve[f"losses/{name}"]]).all()
    (_, entropy), *_ = curve["losses/entropy"]
    assert entropy == pytest.approx(3 * np.log(0.5 * np.sqrt(2 * np.pi * np.e)), abs=0.05)  # 3 actions
    rates = [3e-4 * x for x in (1, 3 / 4, 1 / 2, 1 / 4)]
    assert [rate for _, rate in curve["charts/learning_rate"]] == pytest.approx(rates)


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="no C++ compiler")
def test_compiled_runs_compute_what_eager_ones_do(tmp_path):
    """But for rounding: the losses of 2 iterations agree, between which the statistics have changed."""
    flags = ("--env-id", "Pendulum-v1", *SHORT[:-4], "--total-timesteps", 256, "--eval-episodes", 1)
    command = (sys.executable, ROOT / "ppo_continuous_action.py", "--compile", "--exp-name", "compiled", *flags)
    code, _, err = run(*command, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert (code, err) == (0, "")
    assert list((tmp_path / "cache").iterdir()), "it compiled"
    (compiled,) = Path("runs").iterdir()
    flags = {"num_envs": 2, "num_steps": 64, "num_minibatches": 4, "total_timesteps": 256}
    eager = train(ppo, env_id="Pendulum-v1", **flags, exp_name="eager")
    for name in LOSSES:
        ours, theirs = (np.array(curves(x)[f"losses/{name}"]) for x in (compiled, eager))
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5, err_msg=name)


# ---------------------------------------------------------------------------------------- going on


def test_killed_and_resumed(start):
    """kill -9 leaves a checkpoint with the statistics of all its steps; a resumed run goes on from them."""
    gae = "gae = ppo_continuous_action.compute_gae"
    slower = f"import time\n{gae}\nppo_continuous_action.compute_gae = lambda *x: time.sleep(0.05) or gae(*x)"
    setup = f"ppo_continuous_action.CHECKPOINT_SECONDS = 0\n{slower}"
    flags = ("--env-id", "Pendulum-v1", *SHORT, "--total-timesteps", 128 * 100)
    process = start(*flags, setup=setup, script="ppo_continuous_action")
    wait_for_training(process)
    path = wait_until(lambda: [*Path("runs").glob("*/checkpoint.pt")], "a checkpoint is saved")[0]
    old = path.stat().st_mtime_ns
    wait_until(lambda: path.stat().st_mtime_ns != old, "another one is saved")
    process.kill()
    finish(process)
    run_dir, killed = the_run(), load(the_run())
    done = killed["global_step"]
    assert 128 < done < 128 * 100
    assert killed["agent"]["observation_statistics.count"] == killed["agent"]["return_statistics.count"] == done

    # in this process, for 2 more iterations of the shortened run, and noting what it began with
    next_second()
    killed["args"]["total_timesteps"] = done + 256
    torch.save(killed, path)
    loaded, sample_noise = [], ppo.Agent.sample_noise

    def noted(self, *shape):
        loaded.append({name: x.clone() for name, x in self.state_dict().items()})
        return sample_noise(self, *shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo.Agent, "sample_noise", noted)
        ppo.train(ppo.load_args(str(run_dir), resume=str(run_dir)))
    assert len(loaded) == 2
    assert same_weights({"agent": loaded[0]}, killed), "the statistics are among them"
    resumed = load(run_dir)["agent"]
    assert resumed["observation_statistics.count"] == resumed["return_statistics.count"] == done + 256
    steps = list(range(128, done + 257, 128))
    assert [step for step, _ in curves(run_dir)["losses/entropy"]] == steps


def test_resumed_run_ends_bit_for_bit_where_an_unbroken_one_does():
    """In an environment of one-step episodes without randomness, where nothing is lost when episodes begin anew.

    So the statistics and the noise go on where they were, as do weights and Adam's moments.
    """
    flags = {"env_id": "probe_envs:Target-v0", "num_envs": 2, "num_steps": 64, "num_minibatches": 4}
    flags |= {"anneal_lr": False, "eval_episodes": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("probe_envs.Target.first_observation", lambda self: np.ones(1, np.float32))
        whole = train(ppo, **flags, exp_name="whole", total_timesteps=512)
        broken = train(ppo, **flags, exp_name="broken", total_timesteps=256)
        next_second()
        ppo.train(ppo.load_args(str(broken), resume=str(broken), total_timesteps=512))
    assert same_weights(load(whole), load(broken))
    assert load(whole)["recent_returns"] == load(broken)["recent_returns"]
    assert len({*load(whole)["recent_returns"]}) > 50, "there is noise"


@pytest.mark.parametrize("way", ["--resume", "--evaluate"])
def test_checkpoints_without_statistics_or_with_others_are_refused(command_line, way):
    """As an agent of an environment with other observations, or a fork without the normalization, would leave them."""
    run_dir = train(ppo, env_id="Pendulum-v1", **ONE_ITERATION).rename("copied")
    saved = load(run_dir)
    more = () if way == "--evaluate" else ("--total-timesteps", 128)
    for name in ("observation_statistics.mean", "return_statistics.std", "log_std"):
        for wrong in (None, torch.zeros(7)):
            agent = {key: x for key, x in saved["agent"].items() if key != name}
            torch.save(
                {**saved, "agent": agent if wrong is None else {**agent, name: wrong}}, run_dir / "checkpoint.pt"
            )
            result = command_line(way, run_dir, *more, script=ppo)
            assert_refused(ppo, result, "does not fit Pendulum-v1", name)


# ----------------------------------------------------------------------------------------- errors


SPACES = ("--env-id", "probe_envs:Spaces-v0", "--env-kwargs")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--env-id", "CartPole-v1"), ["CartPole-v1 has discrete actions: use ppo.py"]),
        (("--env-id", "LunarLander-v3"), ["LunarLander-v3 has discrete actions: use ppo.py"]),
        ((*SPACES, "actions=integers"), ["int64", "supported: Box of floating-point numbers"]),
        ((*SPACES, "actions=multibinary"), ["MultiBinary(3)"]),
        ((*SPACES, "actions=continuous", "observations=image"), ["images of shape (84, 84, 3): use ppo_atari.py"]),
        (("--env-id", "CarRacing-v3"), ["images of shape (96, 96, 3): use ppo_atari.py"]),
        (("--env-id", "HalfCheeta-v5"), ["Did you mean: `HalfCheetah`?"]),
        (("--env-id", "Pendulum-v1", "--env-kwargs", "continuous=True"), ["continuous"]),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Box2D's own
def test_what_is_not_for_this_script_is_refused_in_one_line(command_line, flags, words):
    assert_refused(ppo, command_line(*flags, script=ppo), *words)


def test_atari_games_are_for_the_other_sibling():
    """In a process of its own, since here another test may have made gymnasium know them."""
    script = ROOT / "ppo_continuous_action.py"
    assert_refused(ppo, run(sys.executable, script, "--env-id", "ALE/Pong-v5"), "for Atari games use ppo_atari.py")


@pytest.mark.parametrize("what", ["observation", "last observation", "reward"])
def test_nan_reaches_neither_weights_nor_statistics(command_line, what, monkeypatch):
    """It stops the run; what was learned in the 2 iterations before is saved, statistics and all."""
    space = ppo.Box(-1, 1, (1,), np.float32)
    monkeypatch.setattr("probe_envs.Faulty.action_space", space)
    flags = ("--env-id", "probe_envs:Faulty-v0", "--env-kwargs", f"what={what}", "at=150")
    code, _, err = command_line(*flags, *SHORT, "--num-envs", 1, script=ppo)
    assert code == 2
    message = "ppo_continuous_action.py: error: environment 0 returned NaN or infinity at step 150"
    assert err.splitlines()[-1] == message
    checkpoint = load(the_run())
    assert checkpoint["global_step"] == checkpoint["agent"]["observation_statistics.count"] == 128
    assert all(x.isfinite().all() for x in checkpoint["agent"].values())


# ------------------------------------------------------------------------------ real environments


@pytest.mark.parametrize(
    ("env_id", "num_inputs", "num_actions"),
    [
        ("Pendulum-v1", 3, 1),
        ("MountainCarContinuous-v0", 2, 1),
        ("BipedalWalker-v3", 24, 4),
        ("LunarLander-v3", 8, 2),
        ("Ant-v5", 105, 8),
        ("HalfCheetah-v5", 17, 6),
        ("Hopper-v5", 11, 3),
        ("Humanoid-v5", 348, 17),
        ("HumanoidStandup-v5", 348, 17),
        ("InvertedDoublePendulum-v5", 9, 1),
        ("InvertedPendulum-v5", 4, 1),
        ("Pusher-v5", 23, 7),
        ("Reacher-v5", 10, 2),
        ("Swimmer-v5", 8, 2),
        ("Walker2d-v5", 17, 6),
    ],
)
@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")  # Box2D's own
def test_gymnasium_environments_run(env_id, num_inputs, num_actions, monkeypatch):
    """One iteration. LunarLander has continuous actions when asked for them. Evaluation is cut short."""
    monkeypatch.setattr(ppo, "evaluate", lambda *_: None)
    env_kwargs = ("continuous=True",) if env_id == "LunarLander-v3" else ()
    agent = ppo.train(ppo.Args(env_id, env_kwargs=env_kwargs, **ONE_ITERATION))
    assert agent.actor[0].in_features == len(agent.observation_statistics.mean) == num_inputs
    assert agent.actor[-1].out_features == len(agent.log_std) == num_actions
    assert agent.observation_statistics.count == 64


# ------------------------------------------------------------------------------------------ videos


def frames(path):
    """The frames of a video as arrays [height, width, 3]."""
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]


def film(monkeypatch, **variables):
    """Film a run of one iteration of InvertedPendulum in a process without a display."""
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    flags = ("--env-id", "InvertedPendulum-v5", *SHORT, "--total-timesteps", 128, "--capture-video")
    return run(sys.executable, ROOT / "ppo_continuous_action.py", *flags, **variables)


@pytest.mark.skipif(not ctypes.util.find_library("EGL"), reason="no EGL, with which MuJoCo draws without a display")
def test_mujoco_is_filmed_without_a_display(monkeypatch):
    """With no setting at all: an MP4 of the evaluation, and of the first episodes of training."""
    code, out, err = film(monkeypatch)
    assert (code, err) == (0, "")
    length = float(re.search(RESULT, out)[2])  # InvertedPendulum pays 1 a step, and 0 for the last when the pole falls
    (path,) = (the_run() / "videos").glob("eval-at-128-*.mp4")
    video = frames(path)
    assert len(video) == length + 2
    assert {frame.shape for frame in video} == {(480, 480, 3)}
    assert all(frame.std() > 5 for frame in video), "none is black, or all one colour"
    assert any((video[0] != frame).any() for frame in video[1:])
    assert len(list((the_run() / "videos").glob("train-from-0-episode-0.mp4"))) == 1


RUN_AWAY = """
import numpy as np
from ppo_continuous_action import Args, make_envs

video = {"video_folder": "videos", "name_prefix": "away", "episode_trigger": lambda n: False}
envs = make_envs(Args(env_id="HalfCheetah-v5"), 1, video)
envs.reset(seed=[1])
env = envs.envs[0].unwrapped
for distance in (0, 30):
    position = env.data.qpos.copy()
    position[0] = distance
    env.set_state(position, env.data.qvel)
    picture = env.render().astype(int)
    print("brown", (picture[..., 0] > picture[..., 2] + 40).sum())  # the cheetah is, floor and sky are not
"""


@pytest.mark.skipif(not ctypes.util.find_library("EGL"), reason="no EGL, with which MuJoCo draws without a display")
def test_the_camera_follows_the_cheetah():
    """gymnasium 1.4 would leave it behind, and film the floor."""
    code, out, err = run(sys.executable, "-c", RUN_AWAY)
    assert code == 0, err
    at_the_start, far_away = (int(line.split()[1]) for line in out.splitlines() if line.startswith("brown"))
    assert at_the_start > 1000
    assert far_away > 0.8 * at_the_start


MISSING = [
    {"MUJOCO_GL": "glfw"},  # asks for a display
    {"MUJOCO_GL": "no such thing"},
    pytest.param(
        {"MUJOCO_GL": "osmesa"},
        marks=pytest.mark.skipif(bool(ctypes.util.find_library("OSMesa")), reason="it is there"),
    ),
]


@pytest.mark.parametrize("variables", MISSING)
def test_what_mujoco_cannot_draw_with_costs_one_line(monkeypatch, variables):
    """The line says what to do."""
    code, out, err = film(monkeypatch, **variables)
    assert code == 2
    assert "Traceback" not in out + err
    line = [line for line in err.splitlines() if "error: " in line][-1]
    assert line == err.splitlines()[-1]
    assert line.startswith("ppo_continuous_action.py: error: InvertedPendulum-v5 cannot be filmed: ")
    assert "MUJOCO_GL=egl or MUJOCO_GL=osmesa" in line
    assert not list(Path("runs").iterdir())


@pytest.mark.skipif(not ctypes.util.find_library("EGL"), reason="no EGL, with which MuJoCo draws without a display")
def test_filming_does_not_change_the_run(monkeypatch):
    """The same curves and evaluation with and without a camera."""
    monkeypatch.setenv("MUJOCO_GL", "egl")
    flags = {"env_id": "InvertedPendulum-v5", **ONE_ITERATION}
    one, other = (train(ppo, **flags, capture_video=x, exp_name=str(x)) for x in (False, True))
    assert curves(one) == curves(other)
    assert list((other / "videos").glob("*.mp4"))
