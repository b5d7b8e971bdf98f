"""tune.py on the real thing: processes, event files, databases. Most tests tune a small script that trains nothing."""

import itertools
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
from helpers import ROOT, alive, curves, descendants, finish, load, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from optuna.trial import TrialState
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

import ppo
import tune

# A script in the manner of old forks: argparse, one event per tenth of the run. What it reaches is 100 * skill + seed.
TOY = """
import argparse, os, signal, subprocess, sys, time
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
flags = {"env-id": "Toy-v0", "seed": 1, "total-timesteps": 1000, "skill": 0.5, "delay": 0.0, "fail": "no"}
for flag, default in flags.items():
    parser.add_argument(f"--{flag}", type=type(default), default=default, help="explained")
args = parser.parse_args()
if args.fail == "silent":
    sys.exit()
writer = EventFileWriter(f"runs/{args.env_id}__toy__{args.seed}__1")
for tenth in range(1, 11):
    values = {"charts/episodic_return": args.skill * 10 * tenth + args.seed, "charts/episodes": 200 * tenth}
    if args.fail == "nan":
        values["charts/episodic_return"] = float("nan")
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
    writer.add_event(Event(step=tenth * args.total_timesteps // 10, wall_time=time.time(), summary=summary))
    writer.flush()
    if tenth == 5:
        if args.fail == "exit":
            sys.exit("RuntimeError: lost the thread")
        if args.fail == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if args.fail == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            child = subprocess.Popen(["sleep", "1000"])
            open("pids", "w").write(f"{os.getpid()} {child.pid}")
            time.sleep(1000)
    time.sleep(args.delay)
writer.close()
"""
FAST = "tune.HEARTBEAT, tune.POLL_SECONDS, tune.STARTUP, tune.draw = 1, 0.05, 99, lambda *args: []"
URL = "sqlite:///runs/optuna.db"
DRAW = tune.draw


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """The current folder has the toy; nothing waits for long, and nothing is drawn unless a test asks for it."""
    Path("toy.py").write_text(TOY)
    monkeypatch.setattr(tune, "HEARTBEAT", 1)
    monkeypatch.setattr(tune, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(tune, "draw", lambda *args: [])


def trials_of(name: str, url: str = URL) -> list:
    return optuna.load_study(study_name=name, storage=url).trials


def counted(name: str, url: str = URL) -> list:
    """The finished trials that count."""
    return tune.tally(optuna.load_study(study_name=name, storage=url))[0]


# ------------------------------------------------------------------------------------ whole studies


def test_a_study_of_ppo_end_to_end(command_line, monkeypatch):
    """Values are those of the event files, the best line does the same when pasted, and the pictures are pictures."""
    monkeypatch.setattr(tune, "draw", DRAW)
    flags = ["--script", ROOT / "ppo.py", "--n-trials", 3, "--seeds", 1, 2, "--confirm", 0]
    flags += ["--space", "learning_rate=log:1e-3:1e-2", "num_steps=choice:64,128"]
    fixed = ["--total-timesteps", 1024, "--eval-episodes", 1]
    code, out, err = command_line(*flags, "--", *fixed, script=tune)
    assert code == 0, err
    folder = Path("runs", "ppo__CartPole-v1")

    trials = counted("ppo__CartPole-v1")
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    assert trials[0].user_attrs["defaults"] and trials[0].params == {"learning_rate": 1e-3, "num_steps": 128}
    for trial in trials:
        returns = []
        for seed in (1, 2):
            (run,) = (folder / f"trial-{trial.number}" / f"seed-{seed}" / "runs").iterdir()
            made_with = load(run)["args"]
            assert made_with["seed"] == seed and made_with["total_timesteps"] == 1024
            assert {name: made_with[name] for name in trial.params} == trial.params
            logged = curves(run)
            episodes, before = [], 0
            for (_, mean), (_, number) in zip(logged["charts/episodic_return"], logged["charts/episodes"], strict=True):
                episodes += [mean] * int(number - before)
                before = number
            returns.append(np.mean(episodes[-100:]))
        assert trial.user_attrs["returns"] == pytest.approx(returns)
        assert trial.value == pytest.approx(np.mean(returns))
        assert trial.intermediate_values[2048] == trial.value
        assert trial.user_attrs["steps"] == 2048

    best = max(trials, key=lambda trial: trial.value)
    assert f"{best.value:.2f} ± {np.std(best.user_attrs['returns']):.2f} over seeds 1, 2" in out
    assert "3 complete" in out and "saved 0%" in out
    line = next(line for line in out.splitlines() if line.startswith("    python "))
    subprocess.run([sys.executable, *shlex.split(line)[1:], "--seed", "1"], check=True, capture_output=True)
    (pasted,) = Path("runs").glob("CartPole-v1__ppo__1__*")
    (trained,) = (folder / f"trial-{best.number}" / "seed-1" / "runs").iterdir()
    assert curves(pasted) == curves(trained)

    for name in ("history", "intermediate", "importances", "slices", "contour"):
        picture = imread(folder / f"{name}.png")
        assert min(picture.shape[:2]) > 150 and picture.std() > 0.02, "it shows something"
    report = (folder / "report.md").read_text()
    assert "contour.png" in report and line in report

    monkeypatch.setattr(tune, "draw", lambda *args: [])  # once is enough
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("events.*")}
    assert command_line(*flags, "--", *fixed, script=tune).code == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("events.*")} == before, "nothing was run again"


def test_a_fork_with_a_flag_of_its_own(command_line):
    """The flag is found in its --help and reaches its network; what it lacks is not tuned by default."""
    text = (ROOT / "ppo.py").read_text()
    text = text.replace("    device: str", '    hidden: int = 64\n    """width"""\n    device: str', 1)
    text = text.replace("Agent(envs)", "Agent(envs, args.hidden)")
    text = text.replace("envs: gym.vector.VectorEnv) -> None:", "envs: gym.vector.VectorEnv, H: int = 64) -> None:")
    Path("fork.py").write_text(text.replace(", 64)", ", H)").replace("Linear(64,", "Linear(H,"))
    flags = ["--script", "fork.py", "--n-trials", 2, "--seeds", 3, "--confirm", 0, "--space", "hidden=int:7:9"]
    result = command_line(*flags, "--", "--total-timesteps", 512, "--eval-episodes", 1, script=tune)
    assert result.code == 0, result.err
    default, other = counted("fork__CartPole-v1")
    assert default.params == {}, "64 is outside of 7 to 9, so Optuna is not told, but it is run all the same"
    for trial, width in ((default, 64), (other, other.params["hidden"])):
        (run,) = Path("runs", "fork__CartPole-v1", f"trial-{trial.number}", "seed-3", "runs").iterdir()
        assert load(run)["agent"]["actor.0.weight"].shape == (width, 4)


def test_a_hopeless_trial_is_ended_with_all_its_processes(command_line, monkeypatch):
    """Also one that ignores SIGTERM. All trials are worse than the defaults, and hang at half of their steps."""
    monkeypatch.setattr(tune, "STARTUP", 1)
    monkeypatch.setattr(tune, "TERM_SECONDS", 0.5)
    flags = ["--script", "toy.py", "--n-trials", 3, "--seeds", 1, 2, "--confirm", 0]
    flags += ["--space", "skill=float:0:0.1", "fail=choice:hang"]
    Path("toy.py").write_text(TOY.replace('args.fail == "hang"', "args.skill < 0.5"))
    result = command_line(*flags, script=tune)
    assert result.code == 0, result.err
    default, *others = counted("toy__Toy-v0")
    assert default.state == TrialState.COMPLETE and default.value == 50 + 1.5
    for trial in others:
        assert trial.state == TrialState.PRUNED
        assert trial.user_attrs["steps"] == 500, "of 2 x 1000"
        pids = Path("runs", "toy__Toy-v0", f"trial-{trial.number}", "seed-1", "pids")
        if pids.exists():  # else it was stopped before it hung
            assert not any(alive(int(pid)) for pid in pids.read_text().split())
        assert not Path("runs", "toy__Toy-v0", f"trial-{trial.number}", "seed-2").exists()
    assert "saved 50% of the steps (3,000 of 6,000)" in result.out
    assert "2 pruned" in result.out


@pytest.mark.parametrize(
    ("fail", "words"),
    [("exit", "exit code 1: RuntimeError: lost the thread"), ("nan", "its return is nan"), ("kill", "SIGKILL")],
)
def test_what_fails_is_a_trial_not_the_study(command_line, fail, words):
    flags = ["--script", "toy.py", "--n-trials", 5, "--seeds", 1, "--confirm", 0, "--space", f"fail=choice:{fail}"]
    result = command_line(*flags, script=tune)
    assert result.code == 0, result.err
    trials = counted("toy__Toy-v0")
    assert len(trials) == 5
    for trial in trials:
        failed = trial.params["fail"] == fail
        assert trial.state == (TrialState.FAIL if failed else TrialState.COMPLETE)
        assert not failed or words in trial.user_attrs["reason"]
    assert trials[0].user_attrs["defaults"] and trials[0].params["fail"] != fail


def test_defaults_that_diverge_are_a_trial_like_any_other(command_line):
    Path("toy.py").write_text(TOY.replace('args.fail == "nan"', "args.skill == 0.5"))
    flags = ["--script", "toy.py", "--n-trials", 3, "--seeds", 1, "--confirm", 0, "--space", "skill=float:0.6:1"]
    result = command_line(*flags, script=tune)
    assert result.code == 0, result.err
    default, *others = counted("toy__Toy-v0")
    assert default.user_attrs["reason"] == "seed 1: its return is nan"
    assert [trial.state for trial in others] == [TrialState.COMPLETE] * 2
    assert "failed, seed 1: its return is nan" in result.out


def test_what_failed_is_put_right_and_the_same_study_goes_on(command_line):
    """No trial of it counts yet: another version of the script, or other flags, take it over."""
    flags = ["--script", "toy.py", "--n-trials", 2, "--seeds", 1, "--confirm", 0, "--space", "skill=float:0:1"]
    assert command_line(*flags, "--", "--fail", "silent", script=tune).code == 2
    result = command_line(*flags, script=tune)
    assert result.code == 0, result.err
    assert [trial.state for trial in trials_of("toy__Toy-v0")] == [TrialState.COMPLETE] * 2
    assert command_line(*flags, "--", "--delay", 0.1, script=tune).code == 2, "from now on they count"


def test_the_report_is_printed_whatever_becomes_of_its_pictures(command_line, monkeypatch):
    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tune, "draw", no_space)
    flags = ["--script", "toy.py", "--n-trials", 1, "--seeds", 1, "--confirm", 0, "--space", "skill=float:0:1"]
    code, out, err = command_line(*flags, script=tune)
    assert code == 2 and "python toy.py --env-id Toy-v0" in out
    assert err.splitlines()[-1] == "tune.py: error: [Errno 28] No space left on device"


def test_the_best_is_confirmed_on_fresh_seeds(command_line):
    """Both on seeds that the study had not, and only once; the toy's returns are 100 * skill + seed."""
    flags = ["--script", "toy.py", "--n-trials", 2, "--seeds", 1, 2, "--space", "skill=float:0.8:1"]
    result = command_line(*flags, "--confirm", 4, "--n-jobs", 2, script=tune)
    assert result.code == 0, result.err
    best = max(counted("toy__Toy-v0"), key=lambda trial: trial.value)
    assert "| the script's defaults | 54.50 | 1.12 | 53.00, 54.00, 55.00, 56.00 |" in result.out
    assert f"Trial 1 is significantly better than the defaults: +{best.params['skill'] * 100 - 50:.2f}" in result.out
    assert "p = 0.029" in result.out, "2 of 70 ways to deal out 8 returns are as extreme"
    assert len(list(Path("runs", "toy__Toy-v0").glob("confirm*/*"))) == 8
    again = command_line("--report", "toy__Toy-v0", script=tune)
    assert again.code == 0 and result.out.partition("# toy")[2] == again.out.partition("# toy")[2]


# ------------------------------------------------------------------------- interrupted, and many workers


def slow_study(n_trials: int, *more) -> list:
    flags = ["--script", "toy.py", "--n-trials", n_trials, "--seeds", 1, "--confirm", 0, *more]
    return [*flags, "--space", "skill=float:0:1", "--", "--delay"]


AMID_A_TRANSACTION = """
from sqlalchemy import Engine, event

@event.listens_for(Engine, "after_cursor_execute")
def interrupt(connection, cursor, statement, *rest):
    if statement.startswith(("INSERT", "UPDATE")) and os.path.exists("now"):
        os.remove("now")
        os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize("amid_a_transaction", [False, True])
def test_ctrl_c_ends_the_runs_and_the_same_line_goes_on(start, command_line, amid_a_transaction):
    setup = f"import os\n{AMID_A_TRANSACTION}\n{FAST}" if amid_a_transaction else FAST
    process = start(*slow_study(4, "--n-jobs", 2), 100, script="tune", setup=setup)
    wait_until(lambda: len(list(Path("runs").glob("*/*/*/runs/*/events*"))) == 2, "two trials run")
    pids = descendants(process.pid)
    if amid_a_transaction:  # an exception there would leave the database locked
        Path("now").touch()
    else:
        process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130 and "the same command goes on" in err
    assert len(pids) >= 2 and not any(alive(pid) for pid in pids)
    stopped = [trial for trial in trials_of("toy__Toy-v0") if trial.state == TrialState.FAIL]
    assert [trial.user_attrs["reason"] for trial in stopped] == ["interrupted"] * 2

    Path("toy.py").write_text(TOY.replace("time.sleep(args.delay)", ""))
    assert command_line(*slow_study(4), 100, script=tune).code == 2, "that is another version of the script"
    Path("toy.py").write_text(TOY)
    study = optuna.load_study(study_name="toy__Toy-v0", storage=URL)
    study.set_user_attr("made_with", study.user_attrs["made_with"] | {"flags": "--delay 0"})  # not to wait so long
    result = command_line(*slow_study(4), 0, script=tune)
    assert result.code == 0, result.err
    trials = counted("toy__Toy-v0")
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 4
    assert [trial.user_attrs.get("instead_of") for trial in trials] == [0, 1, None, None]
    assert trials[0].user_attrs["defaults"] and trials[1].params == stopped[1].params


def test_a_second_ctrl_c_leaves_nothing_behind(start):
    """The runs ignore SIGTERM, so that ending them takes a while."""
    flags = ["--script", "toy.py", "--seeds", 1, "--confirm", 0, "--n-jobs", 2, "--space", "skill=float:0:1"]
    process = start(*flags, "--", "--fail", "hang", script="tune", setup=f"{FAST}\ntune.TERM_SECONDS = 1.5")
    found = wait_until(lambda: len(found := list(Path("runs").glob("*/*/*/pids"))) == 2 and found, "two trials hang")
    process.send_signal(signal.SIGINT)
    time.sleep(1)  # it is waiting for them
    process.send_signal(signal.SIGINT)
    assert finish(process).code == 130
    assert not any(alive(int(pid)) for path in found for pid in path.read_text().split())
    states = [trial.state for trial in trials_of("toy__Toy-v0")]
    assert states == [TrialState.FAIL] * 2 + [TrialState.WAITING] * 2


@pytest.mark.parametrize("written", [0, 3])
def test_a_study_whose_making_was_interrupted_is_completed(command_line, monkeypatch, written):
    """By a kill before its `written`-th trial is in the queue, that is: of the confirmation's eight."""
    flags = ["--script", "toy.py", "--n-trials", 2, "--seeds", 1, "--confirm", 4, "--space", "skill=float:0.6:1"]
    enqueue_trial, left = optuna.Study.enqueue_trial, [1 + written]

    def enqueue(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        enqueue_trial(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "enqueue_trial", enqueue)
        assert command_line(*flags, script=tune).code == 130
    monkeypatch.setattr(tune, "PATIENCE", 0.2)
    result = command_line(*flags, script=tune)
    assert result.code == 0, result.err
    assert "| the script's defaults | 53.50 | 1.12 | 52.00, 53.00, 54.00, 55.00 |" in result.out
    assert len(list(Path("runs", "toy__Toy-v0").glob("confirm*/*"))) == 8


# With the database open, a stopped process would keep it from all others.
STOPS_BETWEEN_TRANSACTIONS = """
import os, signal, time
sleep = time.sleep

def stop_and_sleep(seconds):
    if os.path.exists("now"):
        os.remove("now")
        os.kill(os.getpid(), signal.SIGSTOP)
    sleep(seconds)

time.sleep = stop_and_sleep
"""


def test_a_worker_that_was_stopped_for_long_lets_go_of_its_trial(start):
    """As with Ctrl-Z: another worker takes it for dead and runs its trial anew."""
    flags = (*slow_study(3), 0.2)
    stopped = start(*flags, script="tune", setup=STOPS_BETWEEN_TRANSACTIONS + FAST)
    wait_until(lambda: list(Path("runs").glob("*/trial-0/seed-1/runs/*/events*")), "its first trial runs")
    Path("now").touch()
    wait_until(lambda: not Path("now").exists(), "it stops")
    other = start(*flags, script="tune", setup=FAST)
    wait_until(lambda: any(t.user_attrs.get("instead_of") == 0 for t in trials_of("toy__Toy-v0")), "it is given up")
    stopped.send_signal(signal.SIGCONT)
    results = [finish(worker) for worker in (stopped, other)]
    assert [result.code for result in results] == [0, 0], results
    assert [trial.state for trial in counted("toy__Toy-v0")] == [TrialState.COMPLETE] * 3


def test_trials_of_a_killed_worker_are_run_again(start, command_line):
    process = start(*slow_study(3), 0.2, script="tune", setup=FAST)
    wait_until(lambda: list(Path("runs").glob("*/trial-1/seed-1/runs/*/events*")), "the second trial runs")
    pids = descendants(process.pid)
    process.kill()
    process.wait()
    if sys.platform == "linux":
        wait_until(lambda: not any(alive(pid) for pid in pids), "its run has ended, too")
    assert trials_of("toy__Toy-v0")[1].state == TrialState.RUNNING
    result = command_line(*slow_study(3), 0.2, script=tune)
    assert result.code == 0, result.err
    first, lost, *others = trials_of("toy__Toy-v0")
    assert first.state == TrialState.COMPLETE and lost.state == TrialState.FAIL
    (again,) = (trial for trial in others if trial.user_attrs.get("instead_of") == 1)
    assert again.state == TrialState.COMPLETE and again.params == lost.params
    assert len(counted("toy__Toy-v0")) == 3


@pytest.fixture
def postgresql():
    """The URL of a database of its own, in a server that is started for it."""
    found = shutil.which("initdb") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), None)
    if found is None:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg", reason="psycopg, Python's PostgreSQL driver, is not installed")
    bin_folder, user = Path(found).resolve().parent, {}
    folder = Path(tempfile.mkdtemp())
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        import pwd

        try:
            user = {"user": pwd.getpwnam("postgres").pw_uid, "cwd": "/"}
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        os.chown(folder, user["user"], -1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def call(program: str, *flags: str) -> None:
        output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
        subprocess.run([bin_folder / program, "-D", folder / "data", *flags], check=True, timeout=120, **output, **user)

    call("initdb", "-A", "trust", "-U", "tuner", "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
    call("pg_ctl", "-w", "-l", str(folder / "log"), "-o", options, "start")
    yield f"postgresql+psycopg://tuner@127.0.0.1:{port}/postgres"
    call("pg_ctl", "-m", "immediate", "stop")
    shutil.rmtree(folder)


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_two_workers_on_one_study(start, database, request):
    """Started at once on an empty database, they make the study once and share its trials."""
    url = URL if database == "sqlite" else request.getfixturevalue("postgresql")
    workers = [start("--storage", url, *slow_study(6), 0.1, script="tune", setup=FAST) for _ in range(2)]
    results = [finish(worker) for worker in workers]
    assert [result.code for result in results] == [0, 0], results
    trials = counted("toy__Toy-v0", url)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 6
    assert [trial.user_attrs.get("defaults", False) for trial in trials] == [True] + [False] * 5
    said = [{line.split()[1] for line in out.splitlines() if line.startswith("trial ")} for _, out, _ in results]
    assert said[0] and said[1] and not said[0] & said[1]
    assert said[0] | said[1] == {f"{trial.number}:" for trial in trials}


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--script", "no.py"], ["no.py"]),
        (["--script", "broken.py"], ["broken.py --help", "SyntaxError"]),
        (["--script", "stranger.py"], ["--env-id"]),
        (["--", "--no-such-flag", 1], ["--no-such-flag"]),
        (["--", "--seed", 1], ["--seeds"]),
        (["--", "--total-timesteps", "few"], ["--total-timesteps", "few"]),
        (["--space", "no_such_flag=choice:1,2"], ["--no-such-flag"]),
        (["--space", "skill"], ["skill", "choice"]),
        (["--space", "learning_rate"], ["--learning-rate"]),
        (["--space", "skill=1:2"], ["skill=1:2", "log:LOW:HIGH"]),
        (["--space", "skill=log:0:1"], ["skill=log:0:1"]),
        (["--space", "skill=float:2:1"], ["LOW must be below HIGH"]),
        (["--space", "seed=int:1:5"], ["seed"]),
        (["--space", "skill=float:0:1", "--", "--skill", 1], ["skill"]),
        ([], ["nothing to tune"]),
        (["--seeds", 1, 1], ["--seeds"]),
        (["--confirm", 3], ["--confirm", "4"]),
        (["--n-trials", 0], ["--n-trials"]),
        (["--study", "a/b"], ["a/b"]),
        (["--space", "skill=float:0:1", "--storage", "nonsense"], ["--storage nonsense"]),
        (["--space", "skill=float:0:1", "--storage", "sqlite:////no/such/folder/x.db"], ["unable to open"]),
        (
            ["--space", "skill=float:0:1", "--storage", "postgresql+psycopg://u:secret@127.0.0.1:1/x"],
            ["u:***@127.0.0.1"],
        ),
        (["--report", "no_such_study"], ["no_such_study", "does not exist"]),
        (["--report", "no_such_study", "--storage", "sqlite:///empty.db"], ["no_such_study", "sqlite:///empty.db"]),
        (["--space", "skill=float:0:1", "--", "--fail", "silent"], ["charts/episodic_return", "defaults"]),
        (["--space", "skill=float:0:1", "--", "--fail", "exit"], ["all 5 trials so far failed", "lost the thread"]),
        (["--space", "skill=float:0:1", "--space", "delay=float:0:1"], ["--space A B"]),
        (["--space", "skill=choice:1,"], ["empty choice"]),
        (["--space", "two.txt"], ["two entries"]),
        (["--space", "skill=int:0.2:0.9"], ["whole numbers"]),
        (["--space", "total=float:1:9"], ["--total"]),
        (["--script", "sizes.py", "--space", "num_steps=int:200000:40000000"], ["four times into 1,000 steps"]),
        (["--script", "sizes.py", "--space", "num_steps=log:1:100"], ["num_steps", "a whole number"]),
        (["--script", "sizes.py", "--", "--env-id", "x"], ["--env-id"]),
        (["--script", "homeless.py", "--space", "seed"], ["--env-id"]),
        (["--study", ".."], ["'..'"]),
        (["--space", "skill=float:0:1", "--storage", "sqlite:///file:runs/x.db?mode=ro&uri=true"], ["unable to open"]),
        (["--space", "skill=float:0:1", "--study", "taken"], ["taken"]),
    ],
)
def test_bad_input_gets_one_line(command_line, flags, words):
    Path("broken.py").write_text("1 +")
    Path("stranger.py").write_text("import argparse\nargparse.ArgumentParser().parse_args()")
    Path("homeless.py").write_text(TOY.replace("formatter_class=argparse.ArgumentDefaultsHelpFormatter", ""))
    sizes = '"skill": 0.5, "num-envs": 4, "num-steps": 64, "num-minibatches": 4'
    Path("sizes.py").write_text(TOY.replace('"skill": 0.5', sizes))
    Path("two.txt").write_text("\ufefffail=choice:no,exit skill=float:0:1")
    Path("runs").mkdir()
    Path("runs/taken").touch()
    script = [] if "--script" in flags else ["--script", "toy.py"]
    code, out, err = command_line(*script, *flags, script=tune)
    lines = [line for line in err.splitlines() if "%|" not in line]  # not the progress bar
    assert code == 2 and len(lines) == 1, err
    assert lines[0].startswith("tune.py: error: ")
    for word in words:
        assert word in lines[0]
    assert "secret" not in err and "Traceback" not in out + err
    assert "--report" not in flags or not Path("runs/optuna.db").exists()  # nothing is made by looking


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([["--space", "skill=float:0:0.9"]], "another --space"),
        ([["--seeds", 2]], "seeds [1], not [2]"),
        ([["--env-id", "Other-v0"]], "env_id 'Toy-v0', not 'Other-v0'"),
        ([["--", "--delay", 0.1]], "flags"),
    ],
)
def test_a_study_made_with_other_parameters_says_so(command_line, changes, words):
    flags = {"--space": ["skill=float:0:1"], "--seeds": [1], "--env-id": ["Toy-v0"], "--": []}
    line = ["--script", "toy.py", "--study", "mine", "--n-trials", 1, "--confirm", 0]
    assert command_line(*line, *itertools.chain(*([k, *v] for k, v in flags.items())), script=tune).code == 0
    flags |= {change[0]: change[1:] for change in changes}
    result = command_line(*line, *itertools.chain(*([k, *v] for k, v in flags.items())), script=tune)
    assert result.code == 2 and words in result.err and "mine" in result.err


# ------------------------------------------------------------------------------------------- the parts


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> dict[str, tune.Script]:
    toy = tmp_path_factory.mktemp("scripts") / "toy.py"
    toy.write_text(TOY)
    return {"ppo": tune.Script(ROOT / "ppo.py", None, ["--total-timesteps", "9999"]), "toy": tune.Script(toy, "E", [])}


def test_flags_and_defaults_are_read_from_the_help(scripts):
    """Of tyro's boxes, and of argparse's."""
    known = {name: value for name, value in vars(ppo.Args()).items() if name != "env_kwargs"}
    assert {name: scripts["ppo"].defaults[name] for name in known} == known
    assert scripts["ppo"].words({"clip_vloss": False, "gamma": 0.9, "target_kl": None, "anneal_lr": True}) == (
        ["--no-clip-vloss", "--gamma", "0.9", "--target-kl", "None", "--anneal-lr"]
    )
    fixed = tune.Script(ROOT / "ppo.py", None, ["--no_anneal-lr", "--gamma=0.9", "--total_timesteps", "1_000"])
    assert fixed.fixed.keys() == {"anneal_lr", "gamma", "total_timesteps"} and fixed.total_timesteps == 1000
    toy = {"env_id": "Toy-v0", "seed": 1, "total_timesteps": 1000, "skill": 0.5, "delay": 0.0, "fail": "no"}
    assert scripts["toy"].defaults == toy


def test_the_search_space(scripts):
    """The default one, from a file, by name, and with the script's default among the choices."""
    everything = tune.read_space((), scripts["ppo"])
    assert list(everything) == list(tune.SPACE)
    for name, kind in everything.items():
        assert kind._contains(kind.to_internal_repr(scripts["ppo"].defaults[name])), f"the default of {name}"
    Path("space.txt").write_text("# mine\ngamma=choice:0.9, 0.8\n\nlearning_rate  # as it is\n")
    assert tune.read_space(("space.txt", "num-steps=int:1:9"), scripts["ppo"]) == {
        "gamma": optuna.distributions.CategoricalDistribution((0.8, 0.9, 0.99)),
        "learning_rate": everything["learning_rate"],
        "num_steps": optuna.distributions.IntDistribution(1, 9),
    }
    with pytest.raises(tune.UsageError, match="split evenly"):
        tune.read_space(("num_steps=int:1:3", "num_minibatches=int:13:20"), scripts["ppo"])


def test_flags_reach_other_command_lines(tmp_path):
    """A negative number, which argparse could take for a flag, and the names of tyro's nested dataclasses."""
    path = tmp_path / "fork.py"
    path.write_text(TOY.replace('"skill": 0.5', '"shift": 0.5, "opt.lr": 0.1').replace("args.skill", "args.shift"))
    script = tune.Script(path, None, ["--opt.lr", "0.2"])
    assert script.defaults["opt.lr"] == 0.1 and script.fixed["opt.lr"] == 0.2
    words = script.words({"shift": -1e-05, "opt.lr": 0.3})
    assert words == ["--shift=-1e-05", "--opt.lr", "0.3"]
    subprocess.run([sys.executable, path, *words], check=True)


@pytest.mark.parametrize("counter", ["of each iteration", "from zero"])
def test_returns_are_weighted_only_by_counts_that_are_theirs(tmp_path, counter):
    """A fork that logs each of 200 episodes has no use for a count per iteration, or for one that begins at 0."""
    events = []
    for episode in range(1, 201):
        values = {"charts/episodic_return": float(episode)}
        if counter == "from zero":
            values["charts/episodes"] = 3 * (episode - 1)
        elif episode % 20 == 0:
            values["charts/episodes"] = episode
        events.append((10 * episode, values))
    writer = EventFileWriter(str(tmp_path / "runs" / "x"))
    for step, values in events:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        writer.add_event(Event(step=step, summary=summary))
    writer.close()
    run = tune.Run.__new__(tune.Run)
    run.folder, run.readers = tmp_path, {}
    last_step, _, returns, counts = run.read()
    assert last_step == 2000
    assert tune.mean_of_last(returns, counts) == np.mean(range(101, 201))


small = st.integers(1, 40)


@given(small, small, small)
@settings(deadline=None)
def test_what_can_run_runs(scripts, num_envs, num_steps, num_minibatches):
    sizes = {"num_envs": num_envs, "num_steps": num_steps, "num_minibatches": num_minibatches}
    fits = 4 * num_envs * num_steps <= 9999
    try:
        good = ppo.Args(**sizes).minibatch_size > 1
    except ppo.UsageError:
        good = False
    assert scripts["ppo"].can_run(sizes) == (good and fits)


@pytest.mark.filterwarnings("ignore:Argument ``heartbeat", "ignore:Heartbeat of storage")
def test_only_what_can_run_is_drawn(scripts):
    """By chance at first, by TPE later; most combinations of this space do not split evenly."""
    items = ("num_envs=int:1:9", "num_steps=int:20:50", "num_minibatches=int:2:9", "learning_rate=log:1e-5:1e-1")
    space = tune.read_space(items, scripts["ppo"])
    Path("runs").mkdir()
    sampler = tune.Sampler(scripts["ppo"], space, tune.open_storage("sqlite://"))
    study = optuna.create_study(sampler=sampler, storage=sampler.storage, direction="maximize")
    for _ in range(30):
        trial = tune.next_trial(study, 100)
        assert scripts["ppo"].can_run(trial.params)
        assert float(f"{trial.params['learning_rate']:.3g}") == trial.params["learning_rate"]
        study.tell(trial, trial.params["num_steps"])


@given(st.lists(st.tuples(st.floats(-500, 500), st.integers(1, 60)), min_size=1, max_size=20))
def test_the_mean_of_the_last_episodes(events):
    """Against every episode written out, with the mean of its event."""
    episodes = [mean for mean, count in events for _ in range(count)]
    expected = np.mean(episodes[-100:])
    returns, counts = (np.array(column, float) for column in zip(*events, strict=True))
    assert tune.mean_of_last(returns, counts) == pytest.approx(expected, abs=1e-6)


def test_a_lucky_first_seed_does_not_protect_a_trial():
    """The pruner compares the latest values, at the same step, and never stops the defaults."""
    pruner = tune.Pruner(total_timesteps=100)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    for _ in range(tune.STARTUP):
        study.add_trial(optuna.trial.create_trial(value=10, intermediate_values={10: 9, 50: 9, 100: 9, 150: 9}))
    trial = study.ask()
    decisions = []
    for step, value in ((10, 0), (50, 99), (100, 99), (120, 0), (150, 8)):
        trial.report(value, step)
        decisions.append(trial.should_prune())
    assert decisions == [False, False, False, False, True]
    trial.set_user_attr("defaults", True)
    assert not trial.should_prune()


def verdict(new, old) -> str:
    both = {"trial": 7, "best": dict(enumerate(new)), "defaults": dict(enumerate(old))}
    both = {key: {str(k): v for k, v in value.items()} if key != "trial" else value for key, value in both.items()}
    study = SimpleNamespace(user_attrs={"confirmed": both})
    return tune.make_verdict(study, SimpleNamespace(number=7, user_attrs={})).splitlines()[-1]


def test_the_verdict():
    """Exact shares of the 252 ways to deal out ten returns."""
    assert "significantly better than the defaults: +5.00, p = 0.008" in verdict([6, 7, 8, 9, 10], [1, 2, 3, 4, 5])
    assert "not significantly better" in verdict([5, 6, 7, 8, 1], [2, 3, 4, 5, 6])
    assert "significantly worse" in verdict([1, 2, 3, 4, 5], [6, 7, 8, 9, 10])
    assert "p = 1.000" in verdict([500] * 5, [500] * 5)
    assert "no verdict" in verdict([1, None], [2, 3])
