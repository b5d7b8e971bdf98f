"""Search for better flags of a training script with Optuna: ppo.py, its siblings, or a fork of one.

    python tune.py --script ppo.py --env-id LunarLander-v3 --n-trials 50     # run it again to continue
    python tune.py --env-ids CartPole-v1@500000 Acrobot-v1@500000 LunarLander-v3@1000000=-200:250
    python tune.py --n-jobs 2 --space learning_rate=log:1e-4:1e-2 gamma -- --total-timesteps 100000
    python tune.py --report ppo__LunarLander-v3                              # at any time: best flags, table, pictures

A trial is one choice of flags; those after `--` are the same in all. It trains with each of --seeds, and its value is
the mean return of the last 100 training episodes. With --env-ids it trains in several environments, and its value is
the mean of a normalized score: 0 for random actions, 1 for a good result. The first trial has the script's defaults.
A trial below the median of the others is stopped early. At the end, the best one and the defaults run on new seeds.

The script needs the flags --env-id, --seed and --total-timesteps, and logs `charts/episodic_return` with TensorBoard.
"""

import ast
import hashlib
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

try:
    import optuna
    import sqlalchemy
    from matplotlib import pyplot
    from optuna.storages import RetryHeartbeatStaleTrialCallback
    from optuna.trial import FrozenTrial, TrialState
    from optuna.visualization import matplotlib as pictures
    from scipy.stats import permutation_test
except ModuleNotFoundError as error:
    print(f"tune.py: error: {error}; see requirements-tune.txt", file=sys.stderr)
    sys.exit(2)

# What is tuned without --space: those of these flags that the script has. The syntax is that of --space.
SPACE = """
    learning_rate=log:1e-4:1e-2                 vf_coef=float:0.2:1.0
    num_envs=choice:4,8,16,32                   num_steps=choice:128,256,512,1024
    num_minibatches=choice:1,2,4,8,16,32        update_epochs=choice:1,2,4,8,16
    gamma=choice:0.9,0.95,0.98,0.99,0.995,0.999 gae_lambda=choice:0.8,0.9,0.95,0.98,0.99,1.0
    clip_coef=choice:0.1,0.2,0.3,0.4            clip_vloss=choice:True,False
    ent_coef=choice:0.0,0.001,0.003,0.01,0.03,0.1   max_grad_norm=choice:0.3,0.5,1.0,2.0,5.0
"""
# Reference scores for --env-ids: about the return of random actions, which scores 0, and a good result, which scores 1.
REFERENCES = """
    CartPole-v1=22:500      Acrobot-v1=-500:-80     LunarLander-v3=-200:250     FrozenLake-v1=0:0.74    Taxi-v4=-775:7.9
    Pendulum-v1=-1250:-150  Hopper-v5=18:2600       BipedalWalker-v3=-105:300   Walker2d-v5=2:4150      Ant-v5=-55:3250
    Humanoid-v5=112:1000    HalfCheetah-v5=-280:5800    InvertedPendulum-v5=5:1000
"""
CLIP = (-0.5, 1.1)  # range that scores are clipped to, so that no environment outweighs the others
REPORTS = 20  # how often per run the mean so far is reported and compared with other trials
WARMUP = 5  # a trial can be stopped from this report on, in its first run in the last of the environments
MIN_OTHERS = 5  # number of other trials that must have reported the same step
POLL_SECONDS = 0.3
TERM_SECONDS = 10  # time for a run to end after SIGTERM, before SIGKILL
HEARTBEAT = 20  # seconds; the trials of a worker that is silent for three times as long are run again


class UsageError(Exception):
    """An error in the user's input, printed as one line with exit code 2."""


@dataclass
class Args:
    script: Path = Path("ppo.py")  # the training script
    env_id: str | None = None  # environment to train in; the script's default if not given
    env_ids: tuple[str, ...] = ()  # several environments, ENV@STEPS[=LOW:HIGH]; LOW scores 0, HIGH scores 1
    n_trials: int = 50  # number of trials in the study, including those of earlier calls and of other workers
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds that each trial trains with
    n_jobs: int = 1  # number of trials run side by side, each on one thread
    space: tuple[str, ...] = ()  # flags to tune, e.g. `gamma clip_coef=float:0.1:0.3 n=int:1:8`; see docs/tune.md
    confirm: int = 5  # number of new seeds to compare the best trial with the defaults on, at least 4; 0 for none
    study: str | None = None  # name of the study and of its folder in studies/; <script>__<environments> if not given
    storage: str = "sqlite:///studies/optuna.db"  # URL of the database; workers that share it work on the same study
    report: str | None = None  # write the report on this study and run nothing

    def __post_init__(self) -> None:
        """Validate the arguments. Raises UsageError."""
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UsageError("--seeds needs at least one seed, none negative and none twice")
        if min(self.n_trials, self.n_jobs) < 1 or self.confirm < 0 or 0 < self.confirm < 4:
            raise UsageError("--n-trials and --n-jobs must be positive, --confirm 0 or at least 4")


# ------------------------------------------------------------------- the script and its environments
def read_value(text: str) -> object:
    """The Python value of `text`, such as 0.5, 128, True or None; a string if it is none of these."""
    with suppress(ValueError, SyntaxError):
        return ast.literal_eval(text.strip())
    return text.strip()


def last_line(output: str) -> str:
    return output.rstrip("╰─╯│ \n").rpartition("\n")[2].strip("│ ")  # tyro draws boxes


@dataclass
class Task:
    """An environment to train in. Without `low` and `high`, the returns that score 0 and 1, the score is the return."""

    env_id: str
    steps: int
    low: float | None = None
    high: float | None = None

    def score(self, mean_return: float) -> float:
        if self.low is None:
            return mean_return
        return float(np.clip((mean_return - self.low) / (self.high - self.low), *CLIP))


class Script:
    """The training script: its flags, as --help shows them, and those that are the same in all runs."""

    def __init__(self, path: Path, fixed_flags: list[str]) -> None:
        """Raises UsageError if the script cannot be tuned or has no such flags."""
        self.path, self.fixed_flags = path, fixed_flags
        wide = {**os.environ, "COLUMNS": "200"}  # narrow help is broken within flags
        shown = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, env=wide)
        if shown.returncode != 0:
            raise UsageError(f"{path} --help fails: {last_line(shown.stdout + shown.stderr)}")
        self.flags, self.switches, self.defaults, self.fixed = {}, {}, {}, {}  # by name; a switch is --no-NAME
        # argparse, and tyro in a box of its own, print a flag at the left and its description to the right and below.
        parts = re.split(r"^[│|]? {0,4}(?:-\w[^-\n]*)?(--\w[\w.-]*)", shown.stdout, flags=re.MULTILINE)
        for flag, text in zip(parts[1::2], parts[2::2], strict=True):
            name, text = flag.strip("-").replace("-", "_"), " ".join(text.replace("│", " ").split())
            self.flags[name] = flag
            if switch := re.match(r"[,/| ]*(--no[\w.-]+)", text):
                self.switches[name] = switch[1]
            if default := re.findall(r"\(default: ?(.*?)\)", text):
                self.defaults[name] = read_value(default[-1])
        for word, following in zip(fixed_flags, [*fixed_flags[1:], ""], strict=False):
            if word.startswith("--"):
                flag, _, value = word.partition("=")
                name = flag.strip("-").replace("-", "_")
                self.fixed[name if name in self.flags else name.removeprefix("no_")] = read_value(value or following)
        if missing := ({"env_id", "seed", "total_timesteps"} | self.fixed.keys()) - self.flags.keys():
            raise UsageError(f"{path} --help shows no flags {', '.join(missing)}")
        if {"env_id", "seed"} & self.fixed.keys():
            raise UsageError("--env-id and --seeds are flags of tune.py and come before the --")

    def words(self, params: dict) -> list[str]:
        """These parameters as flags."""
        words = []
        for name, value in params.items():
            flag, values = self.flags[name], str(value).split()
            if name in self.switches:
                words.append(flag if value else self.switches[name])
            else:  # some flags have several values, or none
                words += [f"{flag}={value}"] if len(values) == 1 else [flag, *values]
        return words

    def command(self, task: Task) -> list[str]:
        """The command line of a run, but for the tuned flags and the seed."""
        steps = [] if task.low is None else [self.flags["total_timesteps"], str(task.steps)]
        return ["python", str(self.path), self.flags["env_id"], task.env_id, *steps, *self.fixed_flags]

    def can_run(self, params: dict, steps: int) -> bool:
        """Whether the batch splits into minibatches of at least two samples, and is at most a quarter of `steps`."""
        names = ["num_envs", "num_steps", "num_minibatches"]
        sizes = [{**self.defaults, **self.fixed, **params}.get(name) for name in names]
        if params.keys().isdisjoint(names) or not all(isinstance(size, int) for size in sizes):
            return True  # none of them is tuned, or the script has other flags
        batch_size, num_minibatches = sizes[0] * sizes[1], sizes[2]
        return batch_size % num_minibatches == 0 and 2 * num_minibatches <= batch_size <= steps / 4


def read_tasks(args: Args, script: Script) -> list[Task]:
    """The environments to train in. Raises UsageError."""
    if not args.env_ids:
        task = Task(args.env_id or script.defaults.get("env_id"), (script.defaults | script.fixed)["total_timesteps"])
        if not isinstance(task.env_id, str) or not isinstance(task.steps, int) or task.steps < 1:
            raise UsageError(f"--env-id {task.env_id} or --total-timesteps {task.steps} is not possible")
        return [task]
    if args.env_id or "total_timesteps" in script.fixed:
        raise UsageError("--env-ids excludes --env-id and --total-timesteps")
    tasks, references = [], dict(entry.split("=") for entry in REFERENCES.split())
    for text in args.env_ids:
        try:
            env_id, steps, scores = re.fullmatch(r"(.+)@(\d+)(?:=(.+))?", text).groups()
            low, high = map(float, (scores or references[env_id]).split(":"))
            if int(steps) < 1 or not low < high or env_id in [task.env_id for task in tasks]:
                raise ValueError
            tasks.append(Task(env_id, int(steps), low, high))
        except (AttributeError, ValueError, KeyError) as error:
            rules = f"LOW below HIGH, each environment once; LOW:HIGH is known for {', '.join(references)}"
            raise UsageError(f"--env-ids: {text} is not ENV@STEPS=LOW:HIGH ({rules})") from error
    return tasks


def read_space(items: tuple[str, ...], script: Script) -> dict[str, tuple[str, dict]]:
    """The parameters to tune: by name, the kind of Trial.suggest_<kind> and its arguments. Raises UsageError."""
    space, ranges = {}, dict(entry.split("=") for entry in SPACE.split())
    for item in items or [name for name in ranges if name in script.flags and name not in script.fixed]:
        name, _, spec = item.partition("=")
        name = name.strip("-").replace("-", "_")
        if name not in script.flags or name in ("env_id", "seed", "total_timesteps", *script.fixed):
            raise UsageError(f"--space: {name} is not a flag of {script.path}, or is the same in all trials")
        kind, _, values = (spec or ranges.get(name, "")).partition(":")
        try:
            if kind == "choice":
                choices = [read_value(text) for text in values.split(",")]
                choices = list(dict.fromkeys([*choices, script.defaults.get(name, choices[0])]))
                space[name] = "categorical", {"choices": choices}
            else:
                low, high = map({"int": int, "float": float, "log": float}[kind], values.split(":"))
                optuna.distributions.FloatDistribution(low, high, log=kind == "log")  # raises ValueError
                space[name] = type(low).__name__, {"low": low, "high": high, "log": kind == "log"}
        except (ValueError, KeyError) as error:
            syntax = "log:LOW:HIGH, float:LOW:HIGH, int:LOW:HIGH or choice:A,B,C"
            raise UsageError(f"--space: {item} is not {name}={syntax}, with LOW below HIGH") from error
    if not space:
        raise UsageError("there is nothing to tune: name flags of the script with --space")
    return space


# ------------------------------------------------------------------------------ runs and trials
class RunFailed(Exception):
    """A run failed or was interrupted."""


@contextmanager
def start(command: list[str], folder: Path):
    """Start a process group in an empty folder, and end it on exit."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    if paths := os.environ.get("PYTHONPATH"):  # which may be relative to the current folder
        environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, paths.split(os.pathsep)))
    options = {"cwd": folder, "env": environment, "start_new_session": True}
    with open(folder / "output.txt", "wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **options)
    try:
        yield process
    finally:
        for signum, timeout in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, None)):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signum)
                process.wait(timeout)


def read_events(folder: Path, readers: dict) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """The last step, and for each logged return its step, the return and the number of episodes."""
    for path in folder.glob("**/events.out.tfevents.*"):
        reader = readers.setdefault(path.parent, EventAccumulator(str(path.parent), size_guidance={"scalars": 0}))
        reader.Reload()  # reads what is new
        charts = {tag: reader.Scalars(tag) for tag in reader.Tags()["scalars"] if tag.startswith("charts/")}
        # A return is the mean of the charts/episodes of its step; CleanRL logs each episode, and no number.
        counts = {event.step: event.value for event in charts.get("charts/episodes", ())}
        if returns := charts.get("charts/episodic_return"):
            rows = [(event.step, event.value, max(1, counts.get(event.step, 1))) for event in returns]
            return max(series[-1].step for series in charts.values()), *np.array(rows).T
    return 0, *np.zeros((3, 0))


def train(trial, command: list[str], folder: Path, tasks: list[Task], scores: list[float], errors: list) -> float:
    """Run the script after the runs with these scores. Returns its mean return. Raises RunFailed and TrialPruned."""
    task, previous = tasks[len(scores) % len(tasks)], [tasks[i % len(tasks)] for i in range(len(scores))]
    can_be_stopped = len(scores) >= len(tasks) - 1 and not trial.user_attrs.keys() & {"defaults", "seeds"}
    reported, readers = 0, {}
    with start(command, folder) as process:
        while not errors:
            code = process.poll()  # before the events are read, so that none is missed
            last_step, steps, returns, counts = read_events(folder, readers)
            reason = "no charts/episodic_return was logged" if code == 0 and len(returns) == 0 else ""
            if not np.isfinite(returns).all():
                reason = "a return is not finite"
            if code:
                reason = f"exit code {code}: {last_line((folder / 'output.txt').read_text(errors='replace'))}"
            if reason and last_step == 0 and "defaults" in trial.user_attrs:
                errors.append(UsageError(f"the script fails with its defaults: {reason} ({folder})"))
                raise RunFailed(reason)
            if reason:
                trial.set_user_attr("reason", f"{folder.name}: {reason}")
                raise optuna.TrialPruned  # unlike a failed trial, a bad one that the sampler learns from
            due = REPORTS if code == 0 else min(last_step * REPORTS // task.steps, REPORTS - 1)
            for report in range(reported + 1, due + 1):
                step = task.steps * report // REPORTS
                so_far = steps <= (step if report < REPORTS else last_step)  # the last iteration can go beyond
                if not so_far.any():
                    continue
                mean_return = float(np.repeat(returns[so_far], counts[so_far].astype(int))[-100:].mean())
                value, step = float(np.mean([*scores, task.score(mean_return)])), step + sum(t.steps for t in previous)
                trial.report(value, step)
                # Optuna's MedianPruner compares the best value at any step: a lucky first seed would protect a trial.
                trials = [t for t in trial.study.get_trials(deepcopy=False) if t.state != TrialState.FAIL]
                values = [t.intermediate_values[step] for t in trials if step in t.intermediate_values]  # and its own
                behind = len(values) > MIN_OTHERS and value < np.median(values)
                if behind and can_be_stopped and WARMUP <= report < REPORTS:
                    raise optuna.TrialPruned
            reported = due
            if code == 0:
                return mean_return
            time.sleep(POLL_SECONDS)
    raise RunFailed("interrupted")


def tally(study: optuna.Study) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
    """The finished and the running trials. Failed trials without a reason were interrupted, and do not count."""
    trials = study.get_trials(deepcopy=False)
    finished = [t for t in trials if t.state.is_finished() and (t.state != TrialState.FAIL or "reason" in t.user_attrs)]
    return finished, [t for t in trials if t.state == TrialState.RUNNING]


def run_trial(trial: optuna.Trial, args: Args, script: Script, tasks: list[Task], space: dict, errors: list) -> float:
    """Train with each seed in each environment. Returns the mean score. Raises RunFailed and TrialPruned."""
    attrs = trial.user_attrs
    if "flags" not in attrs:  # else the trial runs again, or confirms
        params = {}
        for name in attrs.get("defaults", space):
            kind, arguments = space[name]
            params[name] = getattr(trial, f"suggest_{kind}")(name, **arguments)
            if kind == "float":  # four digits are easier to read
                params[name] = min(max(float(f"{params[name]:.4g}"), arguments["low"]), arguments["high"])
        trial.set_user_attr("flags", "" if "defaults" in attrs else shlex.join(script.words(params)))
        if "defaults" not in attrs and not (params and script.can_run(params, min(task.steps for task in tasks))):
            raise optuna.TrialPruned
        print(f"trial {trial.number} begins: {trial.user_attrs['flags'] or 'defaults'}", flush=True)
    scores, returns = [], {task.env_id: [] for task in tasks}
    for seed, task in itertools.product(attrs.get("seeds", args.seeds), tasks):
        words = [*script.command(task)[2:], *shlex.split(trial.user_attrs["flags"]), f"{script.flags['seed']}={seed}"]
        folder = Path("studies", trial.study.study_name, f"trial-{trial.number}", f"{task.env_id}__seed-{seed}")
        command = [sys.executable, str(script.path.resolve()), *words]
        returns[task.env_id].append(train(trial, command, folder, tasks, scores, errors))
        scores.append(task.score(returns[task.env_id][-1]))
        trial.set_user_attr("returns", returns)
    trial.set_user_attr("scores", np.reshape(scores, (-1, len(tasks))).mean(1).tolist())  # one for each seed
    return float(np.mean(scores))


def search(study: optuna.Study, n_trials: int, args: Args, script: Script, tasks: list[Task], space: dict) -> None:
    """Run trials until the study has n_trials finished ones. Raises UsageError and KeyboardInterrupt."""
    errors: list[BaseException] = []  # why to stop

    def after_trial(study: optuna.Study, trial: FrozenTrial) -> None:
        if trial.state == TrialState.FAIL and "reason" not in trial.user_attrs:
            RetryHeartbeatStaleTrialCallback()(study, trial)  # back into the queue
        else:
            print(f"trial {trial.number}: {describe(trial)}, {trial.user_attrs['flags'] or 'defaults'}", flush=True)
        if errors or sum(map(len, tally(study))) >= n_trials:
            study.stop()

    options = {"n_jobs": args.n_jobs, "catch": (RunFailed,), "callbacks": [after_trial]}
    old_handlers = {x: signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for signum in [x for x in old_handlers if old_handlers[x] != signal.SIG_IGN]:  # not raised within a transaction
        signal.signal(signum, lambda *_: errors.append(KeyboardInterrupt()))
    try:
        while not errors:
            optuna.storages.fail_stale_trials(study)
            finished, running = tally(study)
            if len(finished) >= n_trials:
                return
            if (missing := n_trials - len(finished) - len(running)) > 0:
                print(f"study {study.study_name}: {missing} trials, in studies/{study.study_name}", flush=True)
                study.optimize(lambda trial: run_trial(trial, args, script, tasks, space, errors), missing, **options)
            time.sleep(POLL_SECONDS)  # while other workers finish theirs
        raise errors[0]
    finally:
        for signum, handler in old_handlers.items():
            signal.signal(signum, handler)


def open_storage(url: str) -> optuna.storages.RDBStorage:
    """Connect to the database."""
    retry, is_sqlite = RetryHeartbeatStaleTrialCallback(), url.startswith("sqlite")
    options = {"heartbeat_interval": HEARTBEAT, "grace_period": 3 * HEARTBEAT, "heartbeat_stale_trial_callback": retry}
    storage = optuna.storages.RDBStorage(url, {"connect_args": {"timeout": 60}} if is_sqlite else {}, **options)
    if is_sqlite:  # locked from the first read on, so that no two transactions take the same trial from the queue
        sqlalchemy.event.listen(storage.engine, "begin", lambda x: x.exec_driver_sql("BEGIN IMMEDIATE"))
    return storage


def open_study(args: Args, script: Script, tasks: list[Task], space: dict) -> optuna.Study:
    """Create the study, with the script's defaults as its first trial, or load it. Raises UsageError."""
    name = args.study or f"{script.path.stem}__{'+'.join(task.env_id for task in tasks)}".replace("/", "-")
    made_with = {"environments": [list(vars(task).values()) for task in tasks], "seeds": list(args.seeds)}
    made_with["commands"] = [shlex.join(script.command(task)) for task in tasks]
    made_with["space"] = {key: list(entry) for key, entry in space.items()}
    made_with["version of the script"] = hashlib.sha256(script.path.read_bytes()).hexdigest()
    options = {"study_name": name, "storage": open_storage(args.storage), "direction": "maximize"}
    study = optuna.create_study(**options, load_if_exists=True)
    theirs = study.user_attrs.get("made_with", {})
    if theirs == made_with:
        return study
    if any(tally(study)):
        different = ", ".join(key for key in made_with if made_with[key] != theirs.get(key))
        raise UsageError(f"the study {name} differs in {different}: use another --study")
    if study.get_trials(deepcopy=False):  # all interrupted, or failed at once
        optuna.delete_study(study_name=name, storage=options["storage"])
        study = optuna.create_study(**options)
    study.set_user_attr("made_with", made_with)
    defaults = {key: script.defaults[key] for key in space if key in script.defaults}
    for key, (_, x) in space.items():  # Optuna takes those in the search space
        if "low" in x and not (isinstance(defaults.get(key), int | float) and x["low"] <= defaults[key] <= x["high"]):
            defaults.pop(key, None)
    study.enqueue_trial(defaults, user_attrs={"defaults": list(defaults)}, skip_if_exists=True)
    return study


def confirm(args: Args, script: Script, tasks: list[Task], study: optuna.Study) -> None:
    """Compare the best trial with the defaults on new seeds, as the trials of a second study. Raises as search()."""
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    if not args.confirm or not complete or "defaults" in study.best_trial.user_attrs:
        return
    best, seeds = study.best_trial, [max(args.seeds) + 1 + i for i in range(args.confirm)]
    name = f"{study.study_name}/confirm-trial-{best.number}-on-{args.confirm}-seeds"
    new = optuna.create_study(study_name=name, storage=study._storage, direction="maximize", load_if_exists=True)
    queue = [{"flags": flags, "seeds": [seed]} for seed in seeds for flags in ("", best.user_attrs["flags"])]
    known = [{key: trial.user_attrs.get(key) for key in ("flags", "seeds")} for trial in new.get_trials()]
    for attrs in [attrs for attrs in queue if attrs not in known]:
        new.enqueue_trial({}, user_attrs=attrs)
    search(new, len(queue), args, script, tasks, {})

    lines, values = [f"On the new seeds {', '.join(map(str, seeds))}:\n"], []
    complete = new.get_trials(states=(TrialState.COMPLETE,))
    for label, flags in (("the script's defaults", ""), (f"trial {best.number}", best.user_attrs["flags"])):
        group = {trial.user_attrs["seeds"][0]: trial for trial in complete if trial.user_attrs["flags"] == flags}
        values.append([group[seed].value for seed in seeds if seed in group])
        lines.append(f"- {label}: {show(values[-1])} ({', '.join(f'{x:.5g}' for x in values[-1])})")
        for task in tasks if len(tasks) > 1 else ():
            lines[-1] += f"; {task.env_id} {show([x.user_attrs['returns'][task.env_id][0] for x in group.values()])}"
    if min(map(len, values)) < len(seeds):
        lines.append("\nSome of these runs failed: no verdict.")
    else:  # p is the share of the ways to divide these values into two groups that differ as much
        p = permutation_test(values, lambda a, b, axis: b.mean(axis) - a.mean(axis), n_resamples=200_000).pvalue
        difference = np.mean(values[1]) - np.mean(values[0])
        verdict = f"{'' if p < 0.05 else 'not '}significantly {'better' if difference > 0 else 'worse'}"
        lines.append(f"\nTrial {best.number} is {verdict} than the defaults: {difference:+.5g}, p = {p:.3f}.")
    study.set_user_attr(f"verdict on trial {best.number}", "\n".join(lines))


# ------------------------------------------------------------------------------------ the report
def show(values: list[float]) -> str:
    """Mean and sample standard deviation, or the values if these are at most two."""
    if len(values or ()) < 3:
        return " and ".join(f"{value:.5g}" for value in values or ())
    return f"{np.mean(values):.5g} ± {np.std(values, ddof=1):.3g}"


def describe(trial: FrozenTrial) -> str:
    """The value of a finished trial, with the standard deviation over the seeds, or what became of it."""
    if "reason" in trial.user_attrs:
        return f"failed, {trial.user_attrs['reason']}"
    if trial.value is None:
        return "not run: batch size"
    return f"stopped at {trial.value:.5g}" if trial.state == TrialState.PRUNED else show(trial.user_attrs["scores"])


def write_report(study: optuna.Study) -> None:
    """Print the report, and write it and Optuna's pictures to the study's folder. Raises UsageError."""
    made_with, folder = study.user_attrs.get("made_with", {}), Path("studies", study.study_name)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if "commands" not in made_with or not complete:
        raise UsageError(f"no trial of {study.study_name} is complete, or it is not a study of this tune.py")
    trials, best, tasks = tally(study)[0], study.best_trial, [Task(*task) for task in made_with["environments"]]
    env_ids = [task.env_id for task in tasks if len(tasks) > 1]
    target = "mean return" if tasks[0].low is None else "mean score"
    table = [["trial", target, *env_ids, "flags"], ["---"] * (3 + len(env_ids))]
    for trial in sorted(trials, key=lambda t: (t in complete, t.values or [-np.inf]), reverse=True):
        means = [show(trial.user_attrs.get("returns", {}).get(env_id)) for env_id in env_ids]
        flags = "the script's defaults" if "defaults" in trial.user_attrs else f"`{trial.user_attrs['flags']}`"
        table.append([str(trial.number), describe(trial), *means, flags])
    verdict = f"Trial {best.number} was chosen on these seeds and not confirmed on new ones (see --confirm)."
    if "defaults" in best.user_attrs:
        verdict = "No trial was better than the script's defaults."
    parts = [
        f"# {study.study_name}",
        f"{len(trials)} trials: {len(complete)} complete, the others stopped early, failed or not run.",
        "\n".join(f"| {' | '.join(row)} |" for row in table),
        study.user_attrs.get(f"verdict on trial {best.number}", verdict),
        f"The best flags, trial {best.number}, {target} {describe(best)} over the seeds {made_with['seeds']}:",
        "\n".join(f"    {command} {best.user_attrs['flags']}".rstrip() for command in made_with["commands"]),
    ]
    print("\n\n".join(parts))
    plots = {"history": pictures.plot_optimization_history, "intermediate": pictures.plot_intermediate_values}
    if len({trial.value for trial in complete if trial.params}) > 1:
        ranked = list(optuna.importance.get_param_importances(study))
        plots |= {
            "importances": pictures.plot_param_importances,
            "slices": lambda x: pictures.plot_slice(x, ranked[:6]),
        }
        if len(ranked) > 1:
            plots["contour"] = lambda x: pictures.plot_contour(x, ranked[:2])
    pyplot.switch_backend("agg")  # needs no display
    folder.mkdir(parents=True, exist_ok=True)
    for name, plot in plots.items():
        plot(study)
        if name == "intermediate" and (legend := pyplot.gca().get_legend()):
            legend.remove()  # of 30 trials, it is larger than the picture
        pyplot.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
        pyplot.close("all")
        parts.append(f"![{name}]({name}.png)")
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")
    print(f"\nwritten to {folder}: report.md, {', '.join(f'{name}.png' for name in plots)}")


def main() -> None:
    """The command line."""
    split = [*sys.argv, "--"].index("--")
    own, flags = sys.argv[1:split], sys.argv[split + 1 :]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    try:
        try:
            args = tyro.cli(Args, description=__doc__, args=own)
        except SystemExit as stop:
            if stop.code:
                print("flags of the script go after --, e.g. `-- --total-timesteps 100000`", file=sys.stderr)
            raise
        if args.report:
            is_missing = args.storage.startswith("sqlite:///") and not Path(args.storage[10:]).exists()
            if is_missing or args.report not in optuna.get_all_study_names(args.storage):
                raise UsageError(f"there is no study {args.report} in {args.storage}")
            study = optuna.load_study(study_name=args.report, storage=args.storage)
        else:
            script = Script(args.script, flags)
            tasks, space = read_tasks(args, script), read_space(args.space, script)
            Path("studies").mkdir(exist_ok=True)
            study = open_study(args, script, tasks, space)
            search(study, args.n_trials, args, script, tasks, space)
            confirm(args, script, tasks, study)
        write_report(study)
    except (UsageError, OSError, ImportError, optuna.exceptions.OptunaError, sqlalchemy.exc.SQLAlchemyError) as error:
        print(f"{Path(__file__).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues the study", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
