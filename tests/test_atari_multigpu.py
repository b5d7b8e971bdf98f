"""ppo_atari_multigpu.py: one agent trained by two processes of torchrun, stopped and resumed; alone as ppo_atari.py.

On real games with a limit of 200 frames.
"""

import signal
from pathlib import Path

import pytest
import torch
from helpers import (
    alive,
    as_flags,
    assert_refused,
    curves,
    descendants,
    finish,
    load,
    next_second,
    same_weights,
    spawn,
    the_run,
    train,
)
from test_atari_runs import SHARED

import ppo_atari
import ppo_atari_multigpu


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """In the processes that are started, too."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_alone_it_is_ppo_atari(monkeypatch):
    """One process without torchrun computes the same bits, if the games have the same seeds."""
    runs = []
    for script in (ppo_atari, ppo_atari_multigpu):
        monkeypatch.setattr(script, "make_seed", lambda *parts: 7)
        runs.append(train(script, **SHARED))
    assert curves(runs[0]) == curves(runs[1])
    assert same_weights(*map(load, runs))


@pytest.mark.parametrize(("num_envs", "num_minibatches"), [(3, 1), (4, 3)])
def test_what_cannot_be_shared_by_processes(command_line, monkeypatch, num_envs, num_minibatches):
    """Environments that do not divide among the processes of torchrun, and steps not among minibatches."""
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    flags = as_flags(**SHARED | {"num_envs": num_envs, "num_minibatches": num_minibatches})
    assert_refused(ppo_atari_multigpu, command_line(*flags, script=ppo_atari_multigpu), "num_envs")
    assert not Path("runs").exists()


# Each process notes the sums and tensors of its first update, digests of the weights, its seeds, actions and games.
NOTES = """
import atexit, hashlib, os, torch
import torch.distributed as dist

notes = {name: [] for name in ("gradients", "clipped", "weights", "seeds", "actions", "ended", "kl")}
atexit.register(lambda: torch.save(notes, f"notes-{os.environ['RANK']}.pt"))
all_reduce, adam_step = dist.all_reduce, torch.optim.Adam.step
reset, step = ppo_atari_multigpu.AtariVectorEnv.reset, ppo_atari_multigpu.AtariVectorEnv.step

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
ppo_atari_multigpu.AtariVectorEnv.reset, ppo_atari_multigpu.AtariVectorEnv.step = noted_reset, noted_step
"""
TARGET_KL = 2e-5


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A training with two processes: the folder, what was printed, and the notes of each process."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("together")
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        process = spawn(*as_flags(**SHARED, target_kl=TARGET_KL), setup=NOTES, script="ppo_atari_multigpu", processes=2)
        result = finish(process)
    assert (result.code, result.err) == (0, "")
    return folder, result.out, [torch.load(folder / f"notes-{rank}.pt") for rank in (0, 1)]


def test_two_processes_share_one_run(together):
    """One folder, one checkpoint, one set of curves. Each plays its own half of the games, and all are counted."""
    folder, out, (a, b) = together
    (run_dir,) = (folder / "runs").iterdir()
    assert sorted(path.name.split(".")[0] for path in run_dir.iterdir()) == ["checkpoint", "events", "events"]
    assert out.count("steps 0 to 256 by 64") == out.count("evaluation at step 256") == 1
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
    run_dir = train(ppo_atari_multigpu, **SHARED | {"total_timesteps": 64})
    next_second()
    flags = ("--resume", run_dir, "--total-timesteps", 64 * 1000)
    process = start(*flags, script="ppo_atari_multigpu", processes=2)
    assert any(line.startswith("step ") for line in process.stdout), process.stderr.read()
    workers = descendants(process.pid)
    assert len(workers) == 2
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    assert result.code != 0
    assert not any(map(alive, workers))
    saved = load(run_dir)["global_step"]
    assert 64 < saved < 64 * 1000
    assert f"to resume: torchrun --standalone --nproc-per-node 2 job.py --resume {run_dir}" in result.out

    next_second()
    assert command_line("--resume", run_dir, "--total-timesteps", saved + 64, script=ppo_atari_multigpu).code == 0
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
    process = start(
        *as_flags(**SHARED | {"total_timesteps": 64 * 6}), setup=setup, script="ppo_atari_multigpu", processes=2
    )
    result = finish(process)
    assert load(the_run())["global_step"] == 4 * 64
    assert "to resume: torchrun --standalone --nproc-per-node 2 job.py --resume runs/ALE-Breakout-v5__" in result.out
    assert "Connection" not in result.err
