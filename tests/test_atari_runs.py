"""Runs of ppo_atari.py: alone and to the bit, stopped and resumed, compiled, in several processes, and learning.

On real games with a limit of 200 frames, except for learning, which uses a toy game with a known answer.
"""

import re
import shlex
import shutil
import signal
import sys

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
    run,
    same_weights,
    spawn,
    the_run,
    train,
)

import ppo_atari

SHORT = {"env_kwargs": ("max_num_frames_per_episode=200",), "eval_episodes": 1}  # games of 50 steps
PONG = {"env_id": "ALE/Pong-v5", "num_envs": 2, "num_steps": 16, **SHORT}  # 32 steps per iteration
BREAKOUT = {"env_id": "ALE/Breakout-v5", "num_envs": 4, "num_steps": 16, **SHORT}  # 64 steps per iteration
# 4 iterations of 4 updates
SHARED = BREAKOUT | {"total_timesteps": 256, "num_minibatches": 2, "update_epochs": 2}


def as_flags(**values):
    """The same for a command line."""
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in values.items()]
    return [x for flag, value in pairs for x in (flag, *(value if isinstance(value, tuple) else (value,)))]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """In this process and in those that it starts."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------- one process


def test_alone_in_an_empty_folder(command_line):
    """A copy of ppo_atari.py needs nothing else of the repository. The same seed gives the same bits elsewhere."""
    shutil.copy(ROOT / "ppo_atari.py", "ppo_atari.py")
    code, out, err = run(sys.executable, "ppo_atari.py", *as_flags(**PONG, total_timesteps=100), PYTHONPATH="")
    assert (code, err) == (0, "")
    run_dir = the_run()
    assert re.fullmatch(r"ALE-Pong-v5__ppo_atari__1__\d{10}", run_dir.name)
    assert load(run_dir)["global_step"] == 128
    curve = curves(run_dir)
    charts = ("learning_rate", "episodes", "episodic_return", "episodic_length")
    losses = {f"losses/{name}" for name in (*LOSSES, "explained_variance")}
    assert curve.keys() == losses | {f"charts/{name}" for name in charts} | {"eval/episodic_return"}

    again = train(ppo_atari, **PONG, total_timesteps=100)
    assert curves(again) == curve
    assert same_weights(load(again), load(run_dir))
    film = shlex.split(re.search(r"python ppo_atari\.py (--evaluate .+)", out)[1])
    assert command_line(*film, script=ppo_atari).code == 0
    assert (run_dir / "videos" / "eval-at-128.mp4").stat().st_size > 0
    assert curves(run_dir)["eval/episodic_return"] == curve["eval/episodic_return"] * 2


def test_a_stopped_run_is_resumed(command_line, monkeypatch):
    """The iteration is finished and saved. After that come other games, and curves without gap or duplicate."""
    calls, compute_gae, seeds, reset = [], ppo_atari.compute_gae, [], ppo_atari.AtariVectorEnv.reset

    def stopping(*inputs):
        calls.append(signal.raise_signal(signal.SIGTERM) if len(calls) == 2 else None)
        return compute_gae(*inputs)

    def noted(self, *, seed):
        seeds.extend(range(seed, seed + self.num_envs))
        return reset(self, seed=seed)

    monkeypatch.setattr(ppo_atari, "compute_gae", stopping)
    monkeypatch.setattr(ppo_atari.AtariVectorEnv, "reset", noted)
    stopped = command_line(*as_flags(**BREAKOUT, total_timesteps=320), script=ppo_atari)
    assert stopped.code == 128 + signal.SIGTERM
    run_dir = the_run()
    assert load(run_dir)["global_step"] == 192
    next_second()
    resumed = command_line(*shlex.split(re.search(r"python \S+ (--resume .+)", stopped.out)[1]), script=ppo_atari)
    assert (resumed.code, resumed.err) == (0, "")
    checkpoint, curve = load(run_dir), curves(run_dir)
    assert checkpoint["global_step"] == 320
    assert checkpoint["optimizer"]["state"][0]["step"] == 5 * 16
    rates = [(64 * (i + 1), pytest.approx(2.5e-4 * (1 - i / 5))) for i in range(5)]
    assert curve["charts/learning_rate"] == rates
    assert all([step for step, _ in curve[f"losses/{name}"]] == [64, 128, 192, 256, 320] for name in LOSSES)
    assert len(seeds) == len(set(seeds)) == 4 + 4 + 1


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="no C++ compiler")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_compiled_runs_compute_the_same(device):
    """Up to rounding, over several updates in float32."""
    flags = PONG | {"total_timesteps": 64, "bfloat16": False, "device": device}
    runs = [train(ppo_atari, **flags, **x) for x in ({"compile": True}, {}, {"learning_rate": 1e-30})]
    compiled, eager, initial = (torch.cat([x.flatten() for x in load(run)["agent"].values()]) for run in runs)
    assert (eager - initial).norm() > 0.1
    tolerance = 1e-3 if device == "cpu" else 0.25  # TF32; bfloat16 instead of float32 makes 0.4 on a CPU
    assert (compiled - eager).norm() < tolerance * (eager - initial).norm()


@GPU
@pytest.mark.parametrize("compile", [False, True])
def test_training_and_resuming_on_a_gpu(compile):
    """A run moves to the CPU and back, with all of the optimizer's state."""
    run_dir = train(ppo_atari, **SHARED, device="cuda", compile=compile)
    for total_timesteps, device in ((512, "cpu"), (768, "cuda")):
        flags = SHARED | {"total_timesteps": total_timesteps, "device": device, "compile": compile}
        train(ppo_atari, **flags, resume=str(run_dir))
        assert load(run_dir)["optimizer"]["state"][0]["step"] == total_timesteps / 64 * 4
    assert not next(ppo_atari.load_agent(run_dir).parameters()).is_cuda


def test_a_saved_policy_is_played(command_line, monkeypatch):
    """By --evaluate and by load_agent(), here a policy that always takes the same action."""
    run_dir = train(ppo_atari, **PONG, total_timesteps=32)
    checkpoint = load(run_dir)
    checkpoint["agent"]["actor.bias"][2] = 1e6
    torch.save(checkpoint, run_dir / "checkpoint.pt")
    before, actions, step = (run_dir / "checkpoint.pt").read_bytes(), [], ppo_atari.AtariVectorEnv.step

    def noted(self, action):
        actions.append(action.tolist())
        return step(self, action)

    monkeypatch.setattr(ppo_atari.AtariVectorEnv, "step", noted)
    assert command_line("--evaluate", run_dir, "--eval-episodes", 3, script=ppo_atari).code == 0
    assert actions == [[2, 2, 2]] * 50
    assert (run_dir / "checkpoint.pt").read_bytes() == before

    agent = ppo_atari.load_agent(run_dir)
    assert all(torch.equal(weight, checkpoint["agent"][name]) for name, weight in agent.state_dict().items())
    observations = torch.randint(256, (5, 84, 84, 4), dtype=torch.uint8)
    assert agent.act(agent.features(observations)).tolist() == [2] * 5

    for flag, value in (("--env-id", "ALE/Breakout-v5"), ("--num-envs", 4), ("--exp-name", "other")):
        assert_refused(ppo_atari, command_line("--resume", run_dir, flag, value, script=ppo_atari), flag)


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "flags",
    [
        ("--env-id", "ALE/Pon-v5"),
        ("--env-id", "CartPole-v1"),
        ("--env-kwargs", "nonsense=1"),
        ("--env-kwargs", "frameskip=0"),
        ("--num-minibatches", 5),
        ("--device", "cud"),
        ("--resume", "no_such_run"),
    ],
)
def test_input_that_is_refused(command_line, flags):
    assert_refused(ppo_atari, command_line(*flags, script=ppo_atari))


def test_the_largest_seed():
    """It is not refused, although the seeds of ALE have 31 bits."""
    train(ppo_atari, **PONG, total_timesteps=32, seed=2**32 - 1)


def test_what_cannot_be_shared_by_processes(command_line, monkeypatch):
    """Environments that do not divide among the processes of torchrun."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused(ppo_atari, command_line(*as_flags(**PONG | {"num_envs": 3}), script=ppo_atari), "--num-envs")


# --------------------------------------------------------------------------- learning from pixels


class BrightSquare:
    """A game of 4 steps: the right action is the place of a bright square in one of the four stacked frames.

    A random policy gets 4/3. In every second environment games are truncated, in the others terminated.
    """

    single_observation_space = Box(0, 255, (4, 84, 84), np.uint8)
    single_action_space = Discrete(3)

    def __init__(self, num_envs):
        self.num_envs = num_envs

    def reset(self, *, seed):
        self.rng = np.random.default_rng(seed)
        self.count = np.zeros(self.num_envs, int)
        return self.draw(), {"episode_frame_number": 4 * self.count}

    def draw(self):
        self.places = self.rng.integers(3, size=self.num_envs)
        frames = np.zeros((self.num_envs, 4, 84, 84), np.uint8)
        for i, place in enumerate(self.places):
            y, x = ((10, 10), (10, 60), (60, 35))[place]
            frames[i, self.rng.integers(4), y : y + 12, x : x + 12] = 255
        return frames

    def step(self, actions):
        rewards, frames = (actions == self.places).astype(np.int32), self.draw()
        self.count = (self.count + 1) % 4
        ended = self.count == 0
        truncations = ended & (np.arange(self.num_envs) % 2 == 1)
        infos = {"episode_frame_number": 4 * self.count, "final_obs": frames.copy()}
        return frames, rewards, ended & ~truncations, truncations, infos

    def close(self):
        pass


def test_it_learns_from_pixels(monkeypatch):
    """The best return is 4, and 2 for a policy that sees one of the four frames only. Seeds 1 to 3 reach 3.7 to 4."""
    monkeypatch.setattr(ppo_atari, "make_envs", lambda args, num_envs, **options: BrightSquare(num_envs))
    run_dir = train(ppo_atari, num_envs=8, num_steps=16, learning_rate=1e-3, total_timesteps=2048)
    assert curves(run_dir)["charts/episodic_return"][-1][1] > 3.3


# ------------------------------------------------------------------------------ several processes

# Each process notes the sums and tensors of its first update, digests of the weights, its seeds, actions and games.
NOTES = """
import atexit, hashlib, os, torch
import torch.distributed as dist

notes = {name: [] for name in ("gradients", "clipped", "weights", "seeds", "actions", "ended", "kl")}
atexit.register(lambda: torch.save(notes, f"notes-{os.environ['RANK']}.pt"))
all_reduce, adam_step = dist.all_reduce, torch.optim.Adam.step
reset, step = ppo_atari.AtariVectorEnv.reset, ppo_atari.AtariVectorEnv.step

def noted_all_reduce(x):
    before = x.clone()
    all_reduce(x)
    if x.dim() == 0:
        notes["kl"].append([before.item(), x.item()])
    elif not notes["weights"]:
        notes["gradients"].append(before)

def noted_adam_step(self, *args):
    parameters = self.param_groups[0]["params"]
    if not notes["weights"]:
        notes["clipped"] = [x.grad.clone() for x in parameters]
    result = adam_step(self, *args)
    digest = hashlib.sha256()
    for x in parameters:
        digest.update(x.detach().numpy().tobytes())
    notes["weights"].append(digest.hexdigest())
    return result

def noted_reset(self, *, seed, **options):
    notes["seeds"].append(list(range(seed, seed + self.num_envs)))
    frames, infos = reset(self, seed=seed, **options)
    self.numbers = infos["episode_frame_number"].copy()
    return frames, infos

def noted_step(self, actions):
    result = step(self, actions)
    numbers = result[4]["episode_frame_number"]
    notes["actions"].append(actions.tolist())
    notes["ended"].append(int((numbers < self.numbers).sum()))
    self.numbers = numbers.copy()
    return result

dist.all_reduce, torch.optim.Adam.step = noted_all_reduce, noted_adam_step
ppo_atari.AtariVectorEnv.reset, ppo_atari.AtariVectorEnv.step = noted_reset, noted_step
"""
TARGET_KL = 2e-5


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A training with two processes: the folder, what was printed, and the notes of each process."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("together")
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        process = spawn(*as_flags(**SHARED, target_kl=TARGET_KL), setup=NOTES, script="ppo_atari", processes=2)
        result = finish(process)
    assert (result.code, result.err) == (0, "")
    return folder, result.out, [torch.load(folder / f"notes-{rank}.pt") for rank in (0, 1)]


def test_two_processes_share_one_run(together):
    """One folder, one checkpoint, one set of curves. Each plays its own half of the games, and all are counted."""
    folder, out, (a, b) = together
    (run_dir,) = (folder / "runs").iterdir()
    assert sorted(path.name.split(".")[0] for path in run_dir.iterdir()) == ["checkpoint", "events", "events"]
    assert out.count("steps 0 to 256, 64 per iteration") == out.count("evaluation at step 256") == 1
    curve = curves(run_dir)
    assert [step for step, _ in curve["losses/entropy"]] == [64, 128, 192, 256]
    games = [sum(notes["ended"][: 4 * 16]) for notes in (a, b)]  # without those of the evaluation
    assert min(games) >= 2
    assert sum(value for _, value in curve["charts/episodes"]) == sum(games)
    assert len(b["ended"]) == 4 * 16, "only the first process evaluates"
    assert [len(seeds) for seeds in (*a["seeds"], *b["seeds"])] == [2, 1, 2]  # the second is of the evaluation
    assert len({seed for seeds in (*a["seeds"], *b["seeds"]) for seed in seeds}) == 5
    assert a["actions"][:16] != b["actions"][:16]


def test_two_processes_train_one_agent_with_the_mean_of_their_gradients(together):
    """Their weights are the same bits after each update, and both stop the epochs at the mean KL divergence."""
    _, _, (a, b) = together
    assert a["weights"] == b["weights"]
    assert len(set(a["weights"])) == len(a["weights"]) > 4
    means = [(mine + other) / 2 for mine, other in zip(a["gradients"], b["gradients"], strict=True)]
    norm = torch.cat([mean.flatten() for mean in means]).norm().item()
    for i, mean in enumerate(means):
        assert not torch.equal(a["gradients"][i], b["gradients"][i])
        torch.testing.assert_close(a["clipped"][i], mean * min(1, 0.5 / norm), rtol=1e-4, atol=1e-8)
        assert torch.equal(a["clipped"][i], b["clipped"][i])

    epochs = [0]  # of each iteration
    for (mine, total), (other, same_total) in zip(a["kl"], b["kl"], strict=True):
        assert total == same_total == pytest.approx(mine + other, rel=1e-4, abs=1e-7)
        epochs[-1] += 1
        if total / 2 > TARGET_KL or epochs[-1] == 2:
            epochs.append(0)
    assert len(epochs) == 4 + 1 and 1 in epochs
    assert len(a["weights"]) == 2 * sum(epochs)


def test_a_signal_to_torchrun_stops_and_any_number_of_processes_resumes(start, command_line):
    """A run of one process goes on with two, stops and saves, and goes on with one."""
    run_dir = train(ppo_atari, **SHARED | {"total_timesteps": 64})
    next_second()
    flags = ("--resume", run_dir, "--total-timesteps", 64 * 1000)
    process = start(*flags, script="ppo_atari", processes=2)
    assert any(line.startswith("step ") for line in process.stdout), process.stderr.read()
    workers = descendants(process.pid)
    assert len(workers) == 2
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    assert result.code != 0
    assert not any(map(alive, workers))
    saved = load(run_dir)["global_step"]
    assert 64 < saved < 64 * 1000
    assert f"stopped at step {saved:,}" in result.out

    next_second()
    assert command_line("--resume", run_dir, "--total-timesteps", saved + 64, script=ppo_atari).code == 0
    checkpoint, curve = load(run_dir), curves(run_dir)
    assert checkpoint["global_step"] == saved + 64
    assert checkpoint["optimizer"]["state"][0]["step"] == (saved // 64 + 1) * 4
    assert [step for step, _ in curve["losses/entropy"]] == list(range(64, saved + 65, 64))


def test_a_signal_to_one_process_stops_all(start):
    """Also while it waits for the others at the end of an iteration: the next iteration is saved."""
    setup = """
import os, signal
import torch.distributed as dist
calls, gather = [], dist.all_gather_object

def noted_gather(*args):
    gather(*args)
    calls.append(args)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        signal.raise_signal(signal.SIGINT)

dist.all_gather_object = noted_gather
"""
    process = start(*as_flags(**SHARED | {"total_timesteps": 64 * 6}), setup=setup, script="ppo_atari", processes=2)
    result = finish(process)
    assert load(the_run())["global_step"] == 4 * 64
    assert "stopped at step 256" in result.out
    assert "Connection" not in result.err
