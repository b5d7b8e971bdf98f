"""Shared by the tests: running a script in this process or in one of its own, and reading what it wrote."""

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import imageio_ffmpeg
import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

import ppo

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
LOSSES = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "grad_norm")  # logged as losses/...
SMALL = {"num_envs": 4, "num_steps": 128, "num_minibatches": 4, "update_epochs": 4}  # iterations of 512 steps
SMALL_FLAGS = ("--num-envs", 4, "--num-steps", 128, "--num-minibatches", 4, "--update-epochs", 4)
PATIENCE = 180  # seconds after which something counts as hanging

# TensorBoard reads event files in the order of their names. Within a second, those of a process differ in a number at
# the end, which begins at 0: the 10th would come before the 9th.
event_file_writer._global_uid = event_file_writer.AtomicCounter(10**6)


class Result(NamedTuple):
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str


def environment(**changes) -> dict[str, str]:
    """The environment variables for a process that imports the scripts and probe_envs."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return {**variables, "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", **changes}


def spawn(*flags: object, setup: str = "", script: str = "ppo", processes: int = 1) -> subprocess.Popen:
    """Start a script with these flags in its own process group, after running the code `setup`.

    More than one process is started by torchrun, from job.py in the current folder.
    Tests use the fixture `start` instead, which kills what is left when the test ends.
    """
    # A background process of a shell ignores Ctrl-C, and its children inherit that.
    signals = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{signals}\nimport {script}\n{setup}\n{script}.main()\n"
    command = [sys.executable, "-c", code]
    if processes > 1:
        Path("job.py").write_text(code)
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, "-m", *torchrun, "job.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *map(str, flags)], env=environment(), start_new_session=True, **pipes)


def finish(process: subprocess.Popen) -> Result:
    """Wait for the end of a process."""
    out, err = process.communicate(timeout=PATIENCE)
    return Result(process.returncode, out, err)


def run(*command: object, **changes) -> Result:
    """Run a command to its end; `changes` are to the environment variables."""
    options = {"env": environment(**changes), "capture_output": True, "text": True, "timeout": PATIENCE}
    done = subprocess.run([*map(str, command)], **options)
    return Result(done.returncode, done.stdout, done.stderr)


def assert_refused(script, result: Result, *words: str) -> None:
    """Exit code 2 and one line on stderr that starts with the script's name and holds these words."""
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert line.startswith(f"{script.__name__}.py: error: ")
    for word in words:
        assert word in line


def wait_until(condition, why: str):
    """Wait for a true value of condition() and return it."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {PATIENCE} s until {why}"
        time.sleep(0.02)
    return value


def wait_for_training(process: subprocess.Popen) -> None:
    """Wait for the line that is printed when training begins."""
    for line in process.stdout:
        if ": steps " in line:
            return
    raise AssertionError(f"ended before training: {process.stderr.read()}")


def train(script=ppo, **flags) -> Path:
    """Train in this process, with ppo or another script (a module). Returns the run's folder.

    Iterations of ppo are small ones by default.
    """
    return script.train(script.Args(**{"eval_episodes": 1, **(SMALL if script is ppo else {}), **flags}))


def fork(name: str, *replacements: tuple[str, str], script: str = "ppo") -> ModuleType:
    """Import a copy of a script as module `name`, with texts replaced. Each text occurs once in the script."""
    source = (ROOT / f"{script}.py").read_text()
    for old, new in replacements:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    path = Path(f"{name}.py").resolve()
    path.write_text(source)
    return load_module(name, path)


def load_module(name: str, path: Path) -> ModuleType:
    """Import a file as module `name`, anew each time."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_flags(**values) -> list:
    """Fields of Args as a command line."""
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in values.items()]
    return [x for flag, value in pairs for x in (flag, *(value if isinstance(value, tuple) else (value,)))]


def frames(path: Path) -> list[np.ndarray]:
    """The frames of a film, each [height, width, 3]."""
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]


def the_run() -> Path:
    """The only run in runs/."""
    (run_dir,) = Path("runs").iterdir()
    return run_dir


def load(run_dir: Path) -> dict:
    """The checkpoint of a run."""
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def read_events(run_dir: Path) -> EventAccumulator:
    """Everything in the event files of a run, by TensorBoard's own reader."""
    accumulator = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve as (step, value), except the speed."""
    events = read_events(run_dir)
    tags = set(events.Tags()["scalars"]) - {"charts/SPS"}
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in sorted(tags)}


def same_weights(a: dict, b: dict) -> bool:
    """Whether two checkpoints hold the same agent, to the bit."""
    assert a["agent"].keys() == b["agent"].keys()
    return all(torch.equal(a["agent"][name], b["agent"][name]) for name in a["agent"])


def next_second() -> None:
    """Wait: TensorBoard reads event files in the order of their names, which hold the second of their creation."""
    time.sleep(1.01 - time.time() % 1)


def descendants(pid: int) -> set[int]:
    """The children of process `pid`, their children, and so on."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, new = set(), {pid}
    while new := {child for child, parent in parents.items() if parent in new}:
        found |= new
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
