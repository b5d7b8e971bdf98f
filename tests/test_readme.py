"""Every command, diff, piece of code and link in the README and in docs/ works as it stands there, only shorter.

The commands and diffs of docs/forks.md are tested in test_forks_gallery.py.
"""

import contextlib
import functools
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).parent.parent
NAMES = ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
PAGES = {name: (ROOT / name).read_text() for name in NAMES}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND_PAGES = [name for name in NAMES if name != "docs/forks.md"]
OUTSIDE = {name: FENCE.sub("", text) for name, text in PAGES.items()}  # the pages without their fenced blocks
GAMES = ["--num-envs", "2", "--num-steps", "32", "--env-kwargs", "max_num_frames_per_episode=600"]  # short
SHORT = {  # each training script, and flags of a short run
    "ppo.py": [],
    "ppo_lstm.py": ["--observe", "0", "2"],
    "ppo_continuous_action.py": ["--env-id", "Pendulum-v1", "--num-steps", "256"],
    "ppo_vector.py": ["--num-envs", "16"],
    "ppo_atari.py": ["--env-id", "ALE/Pong-v5", *GAMES],
    "ppo_atari_multigpu.py": ["--env-id", "ALE/Pong-v5", *GAMES],
}


def blocks(language: str) -> list[str]:
    """The fenced blocks in a language, each once."""
    found = [block for page in COMMAND_PAGES for kind, block in FENCE.findall(PAGES[page]) if kind == language]
    return list(dict.fromkeys(found))


def commands() -> list[str]:
    """The shell commands, each once: the lines of blocks without comments, and those within tables and sentences."""
    lines = [line.split("  #")[0] for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [code for name in COMMAND_PAGES for code in re.findall(r"`((?:python|torchrun) [^`]+)`", OUTSIDE[name])]
    return list(dict.fromkeys(" ".join(line.split()) for line in lines))


def starting_with(*words: str) -> list[str]:
    return [command for command in commands() if command.startswith(words)]


def script_of(command: str) -> str:
    """The training script of a command, if it has one."""
    return next((word for word in command.split() if word in SHORT and "--script" not in command), "")


def first_of_each_script() -> list[str]:
    """The first command of each script that needs no run: the one that is tested in a process of its own."""
    return [*{script_of(command): command for command in reversed(TRAIN) if "RUN" not in command}.values()]


INSTALL = [command for command in commands() if "pip install" in command]
TRAIN = [command for command in commands() if command not in INSTALL and script_of(command)]
TUNE = starting_with("python tune.py")
QUICK = starting_with("python -m pytest")
BENCHMARK = starting_with("python benchmark/")


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the repository's files."""
    folder = tmp_path_factory.mktemp("clone")
    for path in [*ROOT.glob("*.py"), ROOT / "agents", ROOT / "benchmark"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def short_run(clone):
    """Makes a short run of a script, when it is first asked for: its name."""

    @functools.cache
    def make(script: str) -> str:
        words = [script, *SHORT[script], "--total-timesteps", "1", "--eval-episodes", "1"]
        several_processes = script == "ppo_atari_multigpu.py"
        said = run(clone, [sys.executable, *words]) if several_processes else run_here(clone, words)
        return re.search(r"^runs/(\S+): steps", said, re.MULTILINE)[1]

    return make


def run(folder: Path, command: list[str], **variables: str) -> str:
    """Run a command that must succeed; its output."""
    options = {"cwd": folder, "env": {**os.environ, **variables}, "capture_output": True, "text": True}
    result = subprocess.run(command, timeout=600, **options)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def run_here(folder: Path, words: list[str], **variables: str) -> str:
    """Run a script's command line in this process, which has imported torch already; its output."""
    script = importlib.import_module(words[0].removesuffix(".py"))
    environment, argv = mock.patch.dict(os.environ, variables), mock.patch.object(sys, "argv", words)
    with contextlib.chdir(folder), environment, argv, contextlib.redirect_stdout(io.StringIO()) as output:
        script.main()
    return output.getvalue()


def test_every_command_is_known():
    """The extraction finds every command."""
    assert len(INSTALL) >= 2 and len(TUNE) >= 3 and len(BENCHMARK) >= 2
    assert {script_of(command) for command in TRAIN} == set(SHORT)
    assert [command for command in TUNE if "--report" in command] == ["python tune.py --report ppo__LunarLander-v3"]
    known = INSTALL + TRAIN + TUNE + QUICK + BENCHMARK + ["tensorboard --logdir runs"]
    assert set(commands()) == set(known), "a command of a new kind needs a test of its own"
    for path in re.findall(r"-r (\S+)", " ".join(INSTALL)):
        assert (ROOT / path).is_file()


def test_quick_command():
    """The quick subset is not empty."""
    (command,) = QUICK
    words = [sys.executable, *shlex.split(command)[1:], "-n", "0", "--collect-only", "-q", "-p", "no:cacheprovider"]
    assert run(ROOT, words).count("::") >= 20


def slug(heading: str) -> str:
    """The anchor of a heading on GitHub."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files(page):
    """Every link, picture and anchor leads somewhere, every file that is named exists, and docs/ opens with a line."""
    folder = (ROOT / page).parent
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", OUTSIDE[page]):
        path = (folder / target).resolve() if target else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", OUTSIDE[str(path.relative_to(ROOT))], re.MULTILINE)
            assert anchor in map(slug, headings), f"{target}#{anchor}"
    made = {"checkpoint.pt", *re.findall(r"^\+\+\+ b/(.+)$", PAGES["docs/forks.md"], re.MULTILINE)}
    for name in re.findall(r"`([\w./-]+\.(?:py|pt|md|txt|csv|png|gif|toml))`", OUTSIDE[page]):
        assert name in made or any((base / name).exists() for base in (ROOT, ROOT / "benchmark" / "results")), name
    if page == "README.md":
        assert PAGES[page].count("\n") <= 150
        assert all(f"({name})" in OUTSIDE[page] for name in PAGES if name != page), "it links to every page"
    else:
        assert re.match(r"# .+\n\n.+\.\n\n", PAGES[page]), "a title and one line on what the page answers"


def test_details():
    """The page names each detail once, where a script has it."""
    rows = re.findall(r"^\| (\d+) \|.*?(?:\| (`.+) )?\|$", PAGES["docs/details.md"], re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 38))
    sources = "\n".join((ROOT / script).read_text() for script in SHORT)
    for name in re.findall(r"\w+(?=[\w.]*`)", " ".join(where for _, where in rows)):
        assert re.search(rf"(def|class) {name}\b", sources), name


def global_step(folder: Path, run_name: str) -> int:
    """The step of a run's checkpoint."""
    return torch.load(folder / "runs" / run_name / "checkpoint.pt", weights_only=True)["global_step"]


def marks(command: str):
    """Simulators that need tests/requirements-vector.txt are tried by `pytest -m vector`."""
    return pytest.mark.vector if "envpool/" in command or "mjlab/" in command else ()


@pytest.mark.parametrize("command", [pytest.param(command, marks=marks(command)) for command in TRAIN])
def test_training_script(clone, short_run, command):
    """Each training, resuming and evaluating command, with one iteration or one more; twice if for two machines."""
    alone = command in first_of_each_script() or not command.startswith("python ")
    *variables, command = re.fullmatch(r"(?:(\w+)=(\S+) )?(.+)", command).groups()
    name = short_run(script_of(command)) if "RUN" in command else ""
    words = shlex.split(command.replace("RUN", name))
    words[:1] = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "torch.distributed.run"]
    if "--resume" in words:
        words += ["--total-timesteps", str(global_step(clone, name) + 1)]
    elif "--evaluate" not in words:
        words += ["--total-timesteps", "1", *(GAMES if "ppo_atari" in command else ())]
        words += ["--num-steps", "16"] if "--num-steps" in command else []
    words += [] if "--eval-episodes" in words else ["--eval-episodes", "1"]
    films = set(clone.rglob("*.mp4"))
    machines = int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
    with ThreadPoolExecutor(machines) as pool:
        environment = {"SDL_VIDEODRIVER": "dummy"}  # for --render
        environment |= {variables[0]: variables[1]} if variables[0] else {}
        if alone:
            outputs = "".join(pool.map(lambda _: run(clone, words, **environment), range(machines)))
        else:
            outputs = run_here(clone, words[1:], **environment)
    assert outputs.count("evaluation at step") == 1
    assert (set(clone.rglob("*.mp4")) > films) == ("--capture-video" in words)


@pytest.mark.parametrize("command", [command for command in TUNE if "--report" not in command])
def test_tune_command(clone, command):
    """A study of two short trials, and the reports on it."""
    words = shlex.split(re.sub(r"@\d+", "@8192", command.partition(" -- ")[0]))
    words += ["--seeds", "1", "--n-trials", "2", "--confirm", "0", "--", "--eval-episodes", "1"]
    words += [] if "--env-ids" in words else ["--total-timesteps", "8192"]
    said = run(clone, [sys.executable, *words[1:]])
    assert "The best flags, trial " in said
    study = re.search(r"^# (\S+)$", said, re.MULTILINE)[1]
    assert (clone / "studies" / study / "report.md").is_file()
    if (report := f"python tune.py --report {study}") in TUNE:
        assert "The best flags, trial " in run(clone, [sys.executable, *shlex.split(report)[1:]])


def test_tensorboard_command(clone, short_run):
    """TensorBoard starts on the runs and serves its page."""
    short_run("ppo.py")
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
    """The benchmarks, on one seed and few steps. Without --record, no record changes."""
    records = {path: path.stat().st_mtime_ns for path in clone.glob("benchmark/results/*/*")}
    words = shlex.split(command)
    words[0] = sys.executable
    if "learning.py" in command:
        ours, _, theirs = command.partition(" -- ")
        words = [sys.executable, *shlex.split(ours)[1:], "--seeds", "1", "--", *shlex.split(theirs)]
        words += ["--total-timesteps", "6000", "--eval-episodes", "1"]
    else:
        words += ["--repeats", "1", "--num-envs", "1", "--total-timesteps", "256" if "ppo_atari" in command else "4096"]
    run(clone, words, TORCH_COMPILE_DISABLE="1")  # compiled runs are tested elsewhere
    after = {path: path.stat().st_mtime_ns for path in clone.glob("benchmark/results/*/*")}
    assert (after == records) == ("--record" not in command)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_code(clone, short_run, code):
    """The Python examples, in the folder of the scripts."""
    script = re.search(r"from (ppo\w*)", code)[1] + ".py"
    with contextlib.chdir(clone):
        exec(code.replace("RUN", short_run(script)), {})


def test_fork(tmp_path):
    """The diff applies to a copy of ppo.py alone, and the fork runs."""
    (diff,) = blocks("diff")
    shutil.copy(ROOT / "ppo.py", tmp_path)
    command = ["git", "apply", "--verbose", "--recount", "-"]
    said = subprocess.run(command, cwd=tmp_path, input=diff, capture_output=True, text=True, check=True).stderr
    assert "offset" not in said, "its line numbers are those of the script"
    assert (tmp_path / "ppo.py").read_text() != (ROOT / "ppo.py").read_text()
    words = [sys.executable, "ppo.py", "--total-timesteps", "1", "--eval-episodes", "1"]
    assert "evaluation at step" in run(tmp_path, words)


def test_continuous_integration_runs_the_readmes_test_command():
    """`.ci/run` takes its command out of the README."""
    script = (ROOT / ".ci" / "run").read_text()
    extract = next(line for line in script.splitlines() if line.startswith("test_command="))
    shown = subprocess.run(
        ["bash", "-c", f'{extract}; echo "$test_command"'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (command,) = (command for command in INSTALL if "-m pytest" in command)
    assert shown.stdout.strip() == command and os.access(ROOT / ".ci" / "run", os.X_OK)
