"""What the tests share: running a script in this process or in one of its own, and reading what it left."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
LOSSES = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")  # logged as losses/...
PATIENCE = 180  # seconds to wait for what should happen at once: only a hang takes this long


class Result(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def environment(**changes) -> dict[str, str]:
    """The environment variables for a process that can import ppo and probe_envs."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", **changes}


def spawn(*flags: object, setup: str = "", script: str = "ppo", processes: int = 1) -> subprocess.Popen:
    """Start ppo.py (or another script) with these flags in a process (and process group) of its own, after `setup`.

    With more than one process, torchrun starts them, and the current folder holds what they run, job.py.
    Tests call it as `start`, a fixture that lets no process outlive the test.
    """
    # A shell makes what it runs in the background deaf to Ctrl-C, and that is inherited: not from here on.
    hearing = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{hearing}\nimport {script}\n{setup}\n{script}.main()\n"
    if processes == 1:
        command = [sys.executable, "-c", code, *map(str, flags)]
    else:
        Path("job.py").write_text(code)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [*torchrun, "job.py", *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(), start_new_session=True, **pipes)


def finish(process: subprocess.Popen) -> Result:
    """Wait for its end."""
    out, err = process.communicate(timeout=PATIENCE)
    return Result(process.returncode, out, err)


def run(*command: object, **changes) -> Result:
    """Run a command to its end; `changes` are to the environment variables."""
    done = subprocess.run(
        list(map(str, command)), env=environment(**changes), capture_output=True, text=True, timeout=PATIENCE
    )
    return Result(done.returncode, done.stdout, done.stderr)


def assert_refused(script, result: Result, *words: str) -> None:
    """Exit code 2, one line of this script's (the module) with these words, and no empty run left behind."""
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert line.startswith(f"{script.__name__}.py: error: ")
    for word in words:
        assert word in line
    assert "Traceback" not in result.out
    assert not Path("runs").is_dir() or not list(Path("runs").iterdir())


def wait_until(condition, why: str):
    """Wait for a true value of condition() and return it."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {PATIENCE} s in vain until {why}"
        time.sleep(0.02)
    return value


def wait_for_training(process: subprocess.Popen) -> None:
    """Wait for the line that is printed when the loop begins."""
    for line in process.stdout:
        if ": steps " in line:
            return
    raise AssertionError(f"ended before it trained: {process.stderr.read()}")


def train(script=ppo, **flags) -> Path:
    """Train in this process, with ppo or another of the scripts, and return the run's folder."""
    before = set(Path("runs").glob("*"))
    script.train(script.Args(**{"eval_episodes": 1, **flags}))
    if "resume" in flags:
        return Path(flags["resume"])
    (run_dir,) = set(Path("runs").glob("*")) - before
    return run_dir


def the_run() -> Path:
    """The only run in runs/."""
    (run_dir,) = Path("runs").iterdir()
    return run_dir


def load(run_dir: Path) -> dict:
    """Its checkpoint."""
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def read_events(run_dir: Path) -> EventAccumulator:
    """Everything in its event files, by TensorBoard's own reader."""
    accumulator = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve as (step, value), but for the one of the speed."""
    events = read_events(run_dir)
    tags = set(events.Tags()["scalars"]) - {"charts/SPS"}
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in sorted(tags)}


def same_weights(a: dict, b: dict) -> bool:
    """Whether two checkpoints hold the same agent, to the bit."""
    assert a["agent"].keys() == b["agent"].keys()
    return all(torch.equal(a["agent"][name], b["agent"][name]) for name in a["agent"])


def next_second() -> None:
    """TensorBoard reads event files in the order of their names, which hold the second they were made in."""
    time.sleep(1.01 - time.time() % 1)


def descendants(pid: int) -> set[int]:
    """The processes that process `pid` has started, those that they have started, and so on."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, new = set(), {pid}
    while new := {child for child, parent in parents.items() if parent in new}:
        found |= new
    return found


def alive(pid: int) -> bool:
    """Whether a process still runs; a zombie, which its parent has not yet asked about, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
