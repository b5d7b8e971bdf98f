"""tune.py on real processes, event files and databases. Most tests tune a small script that trains nothing."""

import itertools
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import optuna
import pytest
from helpers import ROOT, alive, curves, descendants, finish, load, train, wait_until
from matplotlib.image import imread
from optuna.trial import TrialState

import ppo
import tune

# It logs ten events of 200 episodes each, without TensorBoard, which takes long to import. The last return is
# 100 * skill + seed.
TOY = """
import argparse, math, os, signal, struct, subprocess, sys, time

parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
flags = {"env-id": "Toy-v0", "seed": 1, "total-timesteps": 1000, "skill": 0.5, "delay": 0.0, "fail": "no"}
for flag, default in flags.items():
    parser.add_argument(f"--{flag}", type=type(default), default=default, help="explained")
args = parser.parse_args()

def checksum(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

def varint(number):
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)

def block(key, data):
    return bytes([key]) + varint(len(data)) + data

def log(step, **values):
    values = [block(10, f"charts/{x}".encode()) + bytes([21]) + struct.pack("<f", y) for x, y in values.items()]
    summary = b"".join(block(10, value) for value in values)
    event = bytes([9]) + struct.pack("<d", time.time()) + bytes([16]) + varint(step) + block(42, summary)
    header = struct.pack("<Q", len(event))
    file.write(header + checksum(header) + event + checksum(event))
    file.flush()

if args.fail == "silent":
    sys.exit()
os.makedirs(f"runs/{args.env_id}")
file = open(f"runs/{args.env_id}/events.out.tfevents.1.toy", "wb")
for tenth in range(1, 11):
    skill = math.nan if args.fail == "nan" else args.skill
    log(tenth * args.total_timesteps // 10, episodic_return=skill * 10 * tenth + args.seed, episodes=200)
    if tenth == 5 and args.fail == "exit":
        sys.exit("RuntimeError: lost the thread")
    if tenth == 5 and args.fail == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "1000"])
        open("pids", "w").write(f"{os.getpid()} {child.pid}")
        time.sleep(1000)
    time.sleep(args.delay)
"""
FAST = "tune.HEARTBEAT, tune.POLL_SECONDS, tune.MIN_OTHERS, tune.TERM_SECONDS = 1, 0.05, 99, 0.5"
URL = "sqlite:///studies/optuna.db"
PICTURES, PYPLOT = tune.pictures, tune.pyplot
SKILL = ["--space", "skill=float:0:1"]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """The current folder has the toy, nothing waits for long, and nothing is drawn unless a test asks for it."""
    Path("toy.py").write_text(TOY)
    constants = {"HEARTBEAT": 1, "POLL_SECONDS": 0.05, "MIN_OTHERS": 99, "TERM_SECONDS": 0.5}
    for name, value in {**constants, "pictures": MagicMock(), "pyplot": MagicMock()}.items():
        monkeypatch.setattr(tune, name, value)


def trials_of(name: str, counted: bool = True) -> list:
    """All trials of a study, or those that have finished and count."""
    study = optuna.load_study(study_name=name, storage=URL)
    return tune.tally(study)[0] if counted else study.trials


def toy(*flags) -> list:
    return ["--script", "toy.py", "--seeds", 1, "--confirm", 0, *flags]


# ------------------------------------------------------------------------------------ whole studies
def test_a_study_of_ppo_end_to_end(command_line):
    """Values are those of the event files, and the best line does the same when pasted."""
    flags = ["--script", ROOT / "ppo.py", "--n-trials", 2, "--seeds", 2, "--confirm", 0]
    flags += ["--space", "learning_rate=log:1e-3:1e-2", "ent_coef"]
    fixed = ["--", "--total-timesteps", 1024, "--eval-episodes", 1]
    code, out, err = command_line(*flags, *fixed, script=tune)
    assert code == 0, err
    folder = Path("studies", "ppo__CartPole-v1")

    trials = trials_of("ppo__CartPole-v1")
    assert trials[0].user_attrs["flags"] == "" and trials[0].params == {"learning_rate": 1.5e-3, "ent_coef": 0.0}
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2
    for trial in trials:
        (run,) = (folder / f"trial-{trial.number}" / "CartPole-v1__seed-2" / "runs").iterdir()
        made_with = load(run)["args"]
        assert made_with["seed"] == 2 and made_with["total_timesteps"] == 1024
        for name, value in trial.params.items():
            assert made_with[name] == pytest.approx(value, rel=1e-3), "rounded to four digits"
        logged, episodes = curves(run), []
        number = dict(logged["charts/episodes"])
        for step, mean in logged["charts/episodic_return"]:
            episodes += [mean] * int(number[step])
        assert trial.value == pytest.approx(np.mean(episodes[-100:]))
        assert trial.user_attrs["scores"] == [trial.value] and trial.intermediate_values[1024] == trial.value

    best = max(trials, key=lambda trial: trial.value)
    line = next(line for line in out.splitlines() if line.startswith("    python "))
    subprocess.run([sys.executable, *shlex.split(line)[1:], "--seed", "2"], check=True, capture_output=True)
    (pasted,) = Path("runs").glob("CartPole-v1__ppo__2__*")
    (trained,) = (folder / f"trial-{best.number}" / "CartPole-v1__seed-2" / "runs").iterdir()
    assert curves(pasted) == curves(trained)
    assert f"The best flags, trial {best.number}" in out and line in (folder / "report.md").read_text()


def test_a_trial_ends_although_its_evaluation_never_would(command_line):
    """The greedy policy walks against a wall of CliffWalking-v1, which has no time limit."""
    flags = ["--script", ROOT / "ppo.py", "--env-id", "CliffWalking-v1", "--space", "gamma"]
    flags += ["--n-trials", 1, "--seeds", 1, "--confirm", 0, "--", "--total-timesteps", 16384]
    result = command_line(*flags, "--learning-rate", 1e-5, "--update-epochs", 1, "--eval-episodes", 1, script=tune)
    assert result.code == 0, result.err
    assert [trial.state for trial in trials_of("ppo__CliffWalking-v1")] == [TrialState.COMPLETE]
    (output,) = Path("studies/ppo__CliffWalking-v1/trial-0").glob("*/output.txt")
    assert "stopped after 20,000 steps" in output.read_text()


def test_pictures(command_line, monkeypatch):
    monkeypatch.setattr(tune, "pictures", PICTURES)
    monkeypatch.setattr(tune, "pyplot", PYPLOT)
    flags = toy("--n-trials", 4, *SKILL, "delay=float:0:0.01")
    assert command_line(*flags, script=tune).code == 0
    report = Path("studies/toy__Toy-v0/report.md").read_text()
    for name in ("history", "intermediate", "importances", "slices", "contour"):
        picture = imread(f"studies/toy__Toy-v0/{name}.png")
        assert min(picture.shape[:2]) > 150 and picture.std() > 0.02, "it shows something"
        assert f"{name}.png" in report


def test_several_environments(command_line):
    """A trial's value is the mean of the clipped scores; steps and reference scores belong to each environment."""
    tasks = ["--env-ids", "A-v0@1000=0:200", "ns/B-v0@500=40:50"]
    flags = ["--script", "toy.py", "--n-trials", 2, "--seeds", 1, 3, "--space", "skill=float:0.8:0.9", *tasks]
    result = command_line(*flags, "--confirm", 4, script=tune)
    assert result.code == 0, result.err
    name = "toy__A-v0+ns-B-v0"
    for trial in trials_of(name):
        a, b = trial.user_attrs["returns"]["A-v0"], trial.user_attrs["returns"]["ns/B-v0"]
        assert a == b == pytest.approx([100 * trial.params.get("skill", 0.5) + seed for seed in (1, 3)], rel=1e-3)
        scores = [np.mean([np.clip(x / 200, -0.5, 1.1), np.clip((x - 40) / 10, -0.5, 1.1)]) for x in a]
        assert trial.user_attrs["scores"] == pytest.approx(scores) and trial.value == pytest.approx(np.mean(scores))
        steps = {100, 500, 1000, 1050, 1500, 1600, 2500, 3000}
        assert steps <= trial.intermediate_values.keys() and max(trial.intermediate_values) == 3000
        assert trial.intermediate_values[1000] == pytest.approx(a[0] / 200), "at first, of one environment alone"
    assert "| A-v0 | ns/B-v0 |" in result.out, "a column for each"
    lines = [shlex.split(line) for line in result.out.splitlines() if line.startswith("    python ")]
    assert lines[0][3:6] == ["A-v0", "--total-timesteps", "1000"] and lines[1][3:6:2] == ["ns/B-v0", "500"]
    assert len(list(Path("studies", name).glob("confirm*/*/A-v0__seed-*"))) == 8
    assert command_line(*flags[:-1], "ns/B-v0@500=40:60", script=tune).code == 2, "that makes another study"


@pytest.mark.parametrize("fail", ["exit", "nan"])
def test_what_fails_is_a_trial_not_the_study(command_line, fail):
    """As one that is stopped early, which the sampler learns from, unlike a failed one."""
    result = command_line(*toy("--n-trials", 5, "--space", f"fail=choice:{fail}"), script=tune)
    assert result.code == 0, result.err
    trials = trials_of("toy__Toy-v0")
    assert len(trials) == 5
    for trial in trials:
        failed = trial.params["fail"] == fail
        assert trial.state == (TrialState.PRUNED if failed else TrialState.COMPLETE)
        assert failed == ("reason" in trial.user_attrs)


def test_defaults_that_diverge_are_a_trial_like_any_other(command_line):
    Path("toy.py").write_text(TOY.replace('args.fail == "nan"', "args.skill == 0.5"))
    result = command_line(*toy("--n-trials", 3, "--space", "skill=float:0.6:1"), script=tune)
    assert result.code == 0, result.err
    assert [trial.state for trial in trials_of("toy__Toy-v0")] == [TrialState.PRUNED] + [TrialState.COMPLETE] * 2


def test_a_relative_pythonpath_is_that_of_the_current_folder(command_line, monkeypatch):
    Path("beside.py").touch()
    Path("toy.py").write_text(f"import beside\n{TOY}")
    monkeypatch.setenv("PYTHONPATH", ".")
    result = command_line(*toy("--n-trials", 1, *SKILL), script=tune)
    assert result.code == 0, result.err


def test_what_failed_at_once_is_corrected_and_the_same_study_goes_on(command_line):
    flags = toy("--n-trials", 2, *SKILL)
    assert command_line(*flags, "--", "--fail", "silent", script=tune).code == 2
    result = command_line(*flags, script=tune)
    assert result.code == 0, result.err
    assert [trial.state for trial in trials_of("toy__Toy-v0", counted=False)] == [TrialState.COMPLETE] * 2
    for other in ([*flags, "--", "--delay", 0.1], [*flags, "--seeds", 2]):
        assert command_line(*other, script=tune).code == 2, "from now on, the trials count"


def test_sizes_that_cannot_run_are_not_run(command_line):
    sizes = '"num-envs": 2, "num-steps": 50, "num-minibatches": 4, "skill"'
    Path("toy.py").write_text(TOY.replace('"skill"', sizes, 1))
    space = ["--space", "num_envs=choice:2", "num_steps=choice:50,51,500", "num_minibatches=choice:3,4,100"]
    result = command_line(*toy("--n-trials", 12, *space), script=tune)
    assert result.code == 0, result.err
    trials = trials_of("toy__Toy-v0")
    assert len(trials) == 12
    for trial in trials:
        batch_size, num_minibatches = 2 * trial.params["num_steps"], trial.params["num_minibatches"]
        fits = batch_size % num_minibatches == 0 and batch_size >= 2 * num_minibatches and batch_size <= 250
        assert trial.state == (TrialState.COMPLETE if fits else TrialState.PRUNED)
        assert Path("studies", "toy__Toy-v0", f"trial-{trial.number}").exists() == fits


VERDICTS = [(0.9, "is significantly better", "0.029"), (0.53, "is not significantly better", "0.057")]


@pytest.mark.parametrize(("skill", "words", "p_value"), [*VERDICTS, (0.49, "No trial was better", "")])
def test_the_best_is_confirmed_on_new_seeds(command_line, monkeypatch, skill, words, p_value):
    """The toy's return is 100 * skill + seed: 2 or 4 of the 70 ways to divide the 8 returns are as extreme.

    These runs are not stopped early, whatever the others are.
    """
    monkeypatch.setattr(tune, "MIN_OTHERS", 1)
    flags = ["--script", "toy.py", "--n-trials", 2, "--seeds", 1, 2, "--space", f"skill=float:{skill - 0.001}:{skill}"]
    result = command_line(*flags, "--confirm", 4, "--n-jobs", 2, script=tune)
    assert result.code == 0, result.err
    assert words in result.out and (f"p = {p_value}." in result.out) == bool(p_value)
    seeds = {path.name for path in Path("studies", "toy__Toy-v0").glob("confirm*/*/*")}
    assert seeds == ({f"Toy-v0__seed-{seed}" for seed in (3, 4, 5, 6)} if p_value else set())
    assert len(list(Path("studies", "toy__Toy-v0").glob("confirm*/*/*"))) == 2 * len(seeds)
    again = command_line("--report", "toy__Toy-v0", script=tune)
    assert again.code == 0 and result.out.partition("# toy")[2] == again.out.partition("# toy")[2]
    assert command_line(*flags, "--confirm", 4, script=tune).out == again.out, "nothing has run again"


# ------------------------------------------------------------------------------------------- pruning
def test_a_hopeless_trial_is_ended_with_all_its_processes(command_line, monkeypatch):
    """Also one that ignores SIGTERM: all trials but the defaults hang at half of their steps."""
    monkeypatch.setattr(tune, "MIN_OTHERS", 1)
    Path("toy.py").write_text(TOY.replace('args.fail == "hang"', "args.skill < 0.5"))
    flags = ["--script", "toy.py", "--n-trials", 3, "--seeds", 1, 2, "--confirm", 0, "--space", "skill=float:0:0.1"]
    result = command_line(*flags, script=tune)
    assert result.code == 0, result.err
    default, *others = trials_of("toy__Toy-v0")
    assert default.state == TrialState.COMPLETE and default.value == 50 + 1.5
    assert [trial.state for trial in others] == [TrialState.PRUNED] * 2
    for pids in Path("studies", "toy__Toy-v0").rglob("pids"):
        assert not any(alive(int(pid)) for pid in pids.read_text().split())
    assert not list(Path("studies", "toy__Toy-v0").glob("trial-[12]/*seed-2"))


def test_a_trial_below_the_median_of_the_others_is_stopped(command_line, monkeypatch):
    """Once enough of them are there. Each value is the mean of the last 100 episodes, here of two events and a half."""
    monkeypatch.setattr(tune, "MIN_OTHERS", 3)
    skills = [0.5, 5.0, 0.1, 0.7, 0.2, 0.6]
    toy_py = TOY.replace("episodes=200", "episodes=40").replace("else args.skill", f"else {skills}[trial]")
    trial = "trial = int(os.getcwd().partition('/trial-')[2].partition('/')[0])\n"
    Path("toy.py").write_text(toy_py.replace("for tenth in", f"{trial}for tenth in"))
    result = command_line(*toy("--n-trials", 6, *SKILL), script=tune)
    assert result.code == 0, result.err
    trials = trials_of("toy__Toy-v0")
    stopped = [trial.number for trial in trials if trial.state == TrialState.PRUNED]
    assert stopped == [4], "0.7 is above the median of 0.5, 5, 0.1 and itself, 0.2 is below, 0.6 again above"
    for trial, skill in zip(trials, skills, strict=True):
        means = {250: 15 * skill + 1, 500: (4 * 50 + 4 * 40 + 2 * 30) * skill / 10 + 1, 1000: 92 * skill + 1}
        seen = {step: value for step, value in trial.intermediate_values.items() if step in means}
        assert seen == pytest.approx({250: means[250]} if trial.number == 4 else means)
        assert trial.number == 4 or trial.value == seen[1000]


def test_the_defaults_are_never_stopped(command_line, monkeypatch):
    """They are compared with a trial that was better at every step: it ran while they waited."""
    monkeypatch.setattr(tune, "MIN_OTHERS", 1)
    wait = "while args.skill == 0.5 and not os.path.exists('../../trial-2'):\n    time.sleep(0.01)\n"
    Path("toy.py").write_text(TOY.replace("for tenth in", f"{wait}for tenth in"))
    result = command_line(*toy("--n-trials", 3, "--n-jobs", 2, "--space", "skill=float:0.6:1"), script=tune)
    assert result.code == 0, result.err
    default, other, _ = trials_of("toy__Toy-v0")
    assert "defaults" in default.user_attrs and default.value < other.value
    assert default.state == TrialState.COMPLETE


@pytest.mark.parametrize("num_tasks", [1, 2])
def test_trials_are_compared_at_the_same_step(command_line, monkeypatch, num_tasks):
    """A good first seed does not protect a trial; none is stopped before it has been in all environments."""
    monkeypatch.setattr(tune, "MIN_OTHERS", 1)
    bad = "args.skill > 0.5 and " + ("args.seed == 2" if num_tasks == 1 else "args.env_id == 'A-v0'")
    Path("toy.py").write_text(TOY.replace("    skill = math.nan", f"    skill = -9 if {bad} else math.nan"))
    tasks = ["--env-ids", "A-v0@1000=0:100", "B-v0@1000=0:100"] if num_tasks == 2 else []
    seeds = ["--seeds", 1, 2] if num_tasks == 1 else []
    flags = [*toy("--n-trials", 2, "--space", "skill=float:0.6:0.7"), *seeds, *tasks]
    result = command_line(*flags, "--", "--delay", 0.1, script=tune)
    assert result.code == 0, result.err
    default, other = trials_of("toy__A-v0+B-v0" if tasks else "toy__Toy-v0")
    assert default.state == TrialState.COMPLETE
    assert other.state == TrialState.PRUNED and 1250 <= other.last_step < 2000
    assert (other.intermediate_values[1000] > default.intermediate_values[1000]) == (num_tasks == 1)


# ------------------------------------------------------------------------- interrupted, and many workers
def test_ctrl_c_ends_the_runs_and_the_same_line_goes_on(start, command_line):
    """Also runs that ignore SIGTERM, and their children."""
    flags = toy("--n-trials", 4, *SKILL, "--n-jobs", 2)
    Path("toy.py").write_text(TOY.replace('args.fail == "hang"', "not os.path.exists('../../../../go')"))
    process = start(*flags, script="tune", setup=FAST)
    wait_until(lambda: len(list(Path("studies").rglob("pids"))) == 2, "two trials run")
    pids = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    assert finish(process).code == 130
    assert len(pids) >= 4 and not any(alive(pid) for pid in pids)
    stopped = trials_of("toy__Toy-v0", counted=False)
    assert [trial.state for trial in stopped] == [TrialState.FAIL] * 2 + [TrialState.WAITING] * 2
    Path("go").touch()
    result = command_line(*flags, script=tune)
    assert result.code == 0, result.err
    trials = trials_of("toy__Toy-v0")
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 4
    assert all(trial.params in [other.params for other in trials] for trial in stopped[:2])
    assert sum("defaults" in trial.user_attrs for trial in trials) == 1


def test_trials_of_a_killed_worker_run_again(start, command_line):
    flags = [*toy("--n-trials", 3, *SKILL), "--", "--delay", 0.2]
    process = start(*flags, script="tune", setup=FAST)
    wait_until(lambda: list(Path("studies").glob("*/trial-1/*/runs/*/events*")), "the second trial runs")
    process.kill()
    process.wait()
    assert trials_of("toy__Toy-v0", counted=False)[1].state == TrialState.RUNNING
    result = command_line(*flags, script=tune)
    assert result.code == 0, result.err
    first, lost, *_ = trials_of("toy__Toy-v0", counted=False)
    assert first.state == TrialState.COMPLETE and lost.state == TrialState.FAIL
    trials = trials_of("toy__Toy-v0")
    assert len(trials) == 3 and lost.params in [trial.params for trial in trials]


def test_two_workers_on_one_study(start):
    """They make the study once, and share its trials."""
    optuna.storages.RDBStorage("sqlite:///shared.db")
    flags = [*toy("--n-trials", 6, *SKILL), "--storage", "sqlite:///shared.db", "--", "--delay", 0.1]
    workers = [start(*flags, script="tune", setup=FAST) for _ in range(2)]
    results = [finish(worker) for worker in workers]
    assert [result.code for result in results] == [0, 0], results
    study = optuna.load_study(study_name="toy__Toy-v0", storage="sqlite:///shared.db")
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE} and 6 <= len(study.trials) <= 8
    said = [{line.split()[1] for line in out.splitlines() if line.startswith("trial ")} for _, out, _ in results]
    assert said[0] and said[1] and not said[0] & said[1]


# ------------------------------------------------------------------------------------------- bad input
BAD = [
    ["--script", "no.py"],
    ["--script", "broken.py"],
    ["--script", "stranger.py"],
    [*SKILL, "--", "--seed", 1],
    ["--space", "no_such_flag=choice:1,2"],
    ["--space", "skill=float:2:1"],
    [*SKILL, "--", "--skill", 1],
    [],
    [*SKILL, "--seeds", 1, 1],
    [*SKILL, "--n-trials", 0],
    [*SKILL, "--storage", "nonsense"],
    ["--report", "no_such_study"],
    [*SKILL, "--", "--fail", "silent"],
    [*SKILL, "--env-ids", "A-v0@100"],
    [*SKILL, "--env-ids", "CartPole-v1"],
    [*SKILL, "--env-ids", "A-v0@9=2:1"],
    [*SKILL, "--env-ids", "A-v0@9=1:2", "A-v0@8=1:2"],
    [*SKILL, "--env-ids", "A-v0@9=1:2", "--env-id", "A-v0"],
    [*SKILL, "--env-ids", "A-v0@9=1:2", "--", "--total-timesteps", 9],
]


@pytest.mark.parametrize("flags", BAD, ids=lambda flags: " ".join(map(str, flags)) or "nothing")
def test_bad_input_gets_one_line(command_line, flags):
    Path("broken.py").write_text("1 +")
    Path("stranger.py").write_text("import argparse\nargparse.ArgumentParser().parse_args()")
    script = [] if "--script" in flags else ["--script", "toy.py"]
    code, out, err = command_line(*script, *flags, script=tune)
    assert code == 2 and len(err.splitlines()) == 1, err
    assert err.startswith("tune.py: error: ") and "Traceback" not in out + err
    assert "--report" not in flags or not Path("studies/optuna.db").exists(), "nothing is made by looking"


# ------------------------------------------------------------------------------------------- the parts
@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> dict[str, tune.Script]:
    path = tmp_path_factory.mktemp("scripts") / "toy.py"
    path.write_text(TOY)
    return {"ppo": tune.Script(ROOT / "ppo.py", ["--total-timesteps", "9999"]), "toy": tune.Script(path, [])}


def test_flags_and_defaults_are_read_from_the_help(scripts):
    """Of tyro's boxes, and of argparse's."""
    known = {name: value for name, value in vars(ppo.Args()).items() if name != "env_kwargs"}
    assert {name: scripts["ppo"].defaults[name] for name in known} == known
    words = scripts["ppo"].words({"clip_vloss": False, "gamma": 0.9, "target_kl": None, "anneal_lr": True})
    assert words == ["--no-clip-vloss", "--gamma=0.9", "--target-kl=None", "--anneal-lr"]
    assert scripts["ppo"].words({"env_kwargs": "a=1 b=2"}) == ["--env-kwargs", "a=1", "b=2"]
    assert scripts["ppo"].words({"env_kwargs": ""}) == ["--env-kwargs"]
    toy = {"env_id": "Toy-v0", "seed": 1, "total_timesteps": 1000, "skill": 0.5, "delay": 0.0, "fail": "no"}
    assert scripts["toy"].defaults == toy
    text = (ROOT / "ppo.py").read_text().replace("    device: str", "    my_width: int = 64  # new\n    device: str", 1)
    Path("fork.py").write_text(text)
    fork = tune.Script(Path("fork.py"), ["--no_anneal-lr", "--gamma=0.9", "--total_timesteps", "1_000"])
    assert fork.fixed.keys() == {"anneal_lr", "gamma", "total_timesteps"} and fork.fixed["total_timesteps"] == 1000
    assert fork.flags["my_width"] == "--my-width" and fork.defaults["my_width"] == 64


def test_the_search_space(scripts):
    """Without --space it is all of SPACE, and holds the defaults of ppo.py; a name alone has its range there."""
    everything = tune.read_space((), scripts["ppo"])
    assert len(everything) == len(tune.SPACE.split())
    for name, (_, x) in everything.items():
        default = scripts["ppo"].defaults[name]
        assert default in x["choices"] if "choices" in x else x["low"] <= default <= x["high"], name
    space = tune.read_space(("gamma=choice:0.9,0.8", "learning_rate", "num-steps=int:1:9"), scripts["ppo"])
    assert space["gamma"] == ("categorical", {"choices": [0.9, 0.8, 0.99]}), "with the default"
    assert space["learning_rate"] == everything["learning_rate"]
    assert space["num_steps"] == ("int", {"low": 1, "high": 9, "log": False})


@pytest.mark.parametrize("sizes", list(itertools.product((1, 8), (5, 64), (1, 4, 15))))
def test_what_can_run_runs(scripts, sizes):
    sizes = dict(zip(("num_envs", "num_steps", "num_minibatches"), sizes, strict=True))
    try:
        good = train(**sizes, total_timesteps=1, update_epochs=1, eval_episodes=0).is_dir()
    except ppo.UsageError:
        good = False
    assert scripts["ppo"].can_run(sizes, 9999) == good


def test_reference_scores(scripts):
    """All of them are known, and 0 is below 1."""
    args = tune.Args(env_ids=tuple(f"{entry.partition('=')[0]}@10" for entry in tune.REFERENCES.split()))
    tasks = tune.read_tasks(args, scripts["toy"])
    assert len(tasks) == 13 and all(task.score(task.low) == 0 and task.score(task.high) == 1 for task in tasks)
    assert all(task.score(-1e9) == -0.5 and task.score(1e9) == 1.1 for task in tasks)
