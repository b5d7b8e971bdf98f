"""Every command, diff and piece of code in the README runs as it stands there, only shorter."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The contents of the README's fenced blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """The README's shell commands, comments cut off, in order."""
    return [
        line.split("  #")[0].strip() for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()
    ]


INSTALL = [command for command in commands() if "pip install" in command]
TRAIN = [command for command in commands() if command.startswith("python ppo.py")]
ATARI = [command for command in commands() if command.startswith(("python ppo_atari.py", "torchrun "))]
CONTINUOUS = [command for command in commands() if command.startswith("python ppo_continuous_action.py")]
TUNE = [command for command in commands() if command.startswith("python tune.py")]
QUICK = [command for command in commands() if command.startswith("python -m pytest")]
BENCHMARK = [command for command in commands() if command.startswith("python benchmark/")]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the repository's files, with the environment of the README's diff and one short run."""
    folder = tmp_path_factory.mktemp("clone")
    for path in [*ROOT.glob("*.py"), ROOT / "benchmark"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    for diff in blocks("diff"):
        if "/dev/null" in diff:
            patch(folder, diff)
    run(folder, [sys.executable, "ppo.py", "--total-timesteps", "1", "--eval-episodes", "1"])
    return folder


def run(folder: Path, command: list[str]) -> str:
    """Run a command that must succeed; its output."""
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def patch(folder: Path, diff: str) -> None:
    """Apply one of the README's diffs."""
    command = ["git", "apply", "--verbose", "--recount", "-"]
    said = subprocess.run(command, cwd=folder, input=diff, capture_output=True, text=True, check=True).stderr
    assert "offset" not in said, "its line numbers are those of the script"


def test_the_readme_is_complete():
    """The extraction finds every command."""
    assert len(INSTALL) == 2 and len(TRAIN) >= 8 and len(BENCHMARK) >= 2 and len(blocks("diff")) == 3
    assert len(ATARI) >= 4 and len(CONTINUOUS) >= 4 and len(TUNE) == 3
    known = INSTALL + TRAIN + ATARI + CONTINUOUS + TUNE + QUICK + BENCHMARK + ["tensorboard --logdir runs"]
    assert set(commands()) == set(known), "a command of a new kind needs a test of its own"


def test_quick_command():
    """The quick subset is not empty."""
    (command,) = QUICK
    words = [sys.executable, *shlex.split(command)[1:], "--collect-only", "-q", "-p", "no:cacheprovider"]
    assert run(ROOT, words).count("::") >= 20


def global_step(folder: Path, run_name: str) -> int:
    """The step of a run's checkpoint."""
    return torch.load(folder / "runs" / run_name / "checkpoint.pt", weights_only=True)["global_step"]


@pytest.mark.parametrize("command", TRAIN)
def test_ppo_command(clone, command):
    """Each training, resuming and evaluating command, with one iteration or one more."""
    name = max(path.name for path in (clone / "runs").glob("CartPole-v1__ppo__1__*"))
    words = shlex.split(command.replace("RUN", name))
    words[0] = sys.executable
    if "--resume" in words:
        words += ["--total-timesteps", str(global_step(clone, name) + 1)]
    elif "--evaluate" not in words:
        words += ["--total-timesteps", "1"]
    if "--eval-episodes" not in words:
        words += ["--eval-episodes", "1"]
    assert "evaluation at step" in run(clone, words)
    if "--capture-video" in words:
        assert list(clone.glob("runs/*/videos/*/*.mp4"))


@pytest.fixture(scope="module")
def pong(clone) -> str:
    """A short run of Pong, as the commands want it: its name."""
    sizes = ["--num-envs", "2", "--num-steps", "32", "--total-timesteps", "64", "--eval-episodes", "1"]
    run(clone, [sys.executable, "ppo_atari.py", "--env-id", "ALE/Pong-v5", *sizes])
    return next((clone / "runs").glob("ALE-Pong-v5__*__1__*")).name


@pytest.mark.parametrize("command", ATARI)
def test_ppo_atari_command(clone, pong, command):
    """Each training and evaluating command, and torchrun's, twice where it is for two machines."""
    words = shlex.split(command.replace("RUN", pong))
    words[:1] = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "torch.distributed.run"]
    if "--evaluate" not in words:
        words += ["--total-timesteps", "100000" if "--resume" in words else "1"]
    words += ["--eval-episodes", "1"]
    if "--resume" in words:  # one iteration more
        words[words.index("100000")] = str(global_step(clone, pong) + 1)
    machines = int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
    with ThreadPoolExecutor(machines) as pool:
        outputs = "".join(pool.map(lambda _: run(clone, words), range(machines)))
    assert outputs.count("evaluation at step") == 1
    if "--capture-video" in words:
        assert list(clone.glob(f"runs/{pong}/videos/*.mp4"))


@pytest.fixture(scope="module")
def pendulum(clone) -> str:
    """A short run of Pendulum, as the commands want it: its name."""
    flags = ["--env-id", "Pendulum-v1", "--num-steps", "256", "--total-timesteps", "1", "--eval-episodes", "1"]
    run(clone, [sys.executable, "ppo_continuous_action.py", *flags])
    return next((clone / "runs").glob("Pendulum-v1__*__1__*")).name


@pytest.mark.parametrize("command", CONTINUOUS)
def test_ppo_continuous_action_command(clone, pendulum, command):
    """Each training and evaluating command, with one iteration."""
    words = shlex.split(command.replace("RUN", pendulum))
    words[0] = sys.executable
    if "--evaluate" not in words:
        words += ["--total-timesteps", "1"]
    assert "evaluation at step" in run(clone, [*words, "--eval-episodes", "1"])
    if "--capture-video" in words:
        assert list(clone.glob(f"runs/{pendulum}/videos/*/*.mp4"))


@pytest.mark.parametrize("command", TUNE)
def test_tune_command(clone, command):
    """A study of two short trials, and its report."""
    words = shlex.split(command.partition(" -- ")[0])
    words[0] = sys.executable
    if "--report" not in words:
        words += ["--seeds", "1", "--n-trials", "2", "--confirm", "0"]
        words += ["--", "--total-timesteps", "2048", "--eval-episodes", "1"]
    assert "The best flags, trial " in run(clone, words)
    study = next(word for word in words if "LunarLander-v3" in word or "Acrobot-v1" in word).removeprefix("ppo__")
    assert (clone / "runs" / f"ppo__{study}" / "report.md").is_file()


def test_tensorboard_command(clone):
    """TensorBoard starts on the runs and serves its page."""
    assert "tensorboard --logdir runs" in commands()
    words = [sys.executable, "-m", "tensorboard.main", "--logdir", "runs", "--port", "0"]
    with subprocess.Popen(words, cwd=clone, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = next(found[0] for line in process.stderr if (found := re.findall(r"http://\S+", line)))
            url = re.sub(r"//[^:/]+:", "//localhost:", url)
            assert b"<title>TensorBoard</title>" in urllib.request.urlopen(url, timeout=30).read()
        finally:
            process.kill()


@pytest.mark.parametrize("command", BENCHMARK)
def test_benchmark_command(clone, command):
    """The benchmarks, on one seed and few steps."""
    words = shlex.split(command)
    words[0] = sys.executable
    if "learning.py" in command:
        ours, _, theirs = command.partition(" -- ")
        words = [sys.executable, *shlex.split(ours)[1:], "--seeds", "1", "--", *shlex.split(theirs)]
        words += ["--total-timesteps", "1000", "--eval-episodes", "1"]
    else:
        words += ["--repeats", "1", "--total-timesteps", "2048" if "ppo_atari" in command else "8192", "--more-envs"]
    run(clone, words)


@pytest.mark.parametrize("diff", blocks("diff"), ids=["network", "reward", "environment"])
def test_fork(clone, diff, tmp_path):
    """Each diff applies to a copy of ppo.py alone, and the fork runs."""
    shutil.copy(ROOT / "ppo.py", tmp_path)
    before = (tmp_path / "ppo.py").read_text()
    patch(tmp_path, diff)
    assert (tmp_path / "ppo.py").read_text() != before or (tmp_path / "corridor.py").exists()
    env_id = "corridor:Corridor-v0" if "/dev/null" in diff else "CartPole-v1"
    words = [sys.executable, "ppo.py", "--env-id", env_id, "--total-timesteps", "1", "--eval-episodes", "1"]
    assert "evaluation at step" in run(tmp_path, words)


@pytest.mark.parametrize("code", blocks("python"), ids=["policy", "train"])
def test_python_code(clone, code):
    """The Python examples, as scripts beside ppo.py."""
    name = max(path.name for path in (clone / "runs").glob("CartPole-v1__ppo__1__*"))
    run(clone, [sys.executable, "-c", code.replace("RUN", name)])


def test_continuous_integration_runs_the_readmes_test_command():
    """`.ci/run` takes its command out of the README: what it would run is the second install command."""
    script = (ROOT / ".ci" / "run").read_text()
    extract = next(line for line in script.splitlines() if line.startswith("test_command="))
    shown = subprocess.run(
        ["bash", "-c", f'{extract}; echo "$test_command"'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == INSTALL[1]
    assert "-m pytest" in INSTALL[1] and os.access(ROOT / ".ci" / "run", os.X_OK)
