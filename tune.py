"""Search for better flags of a training script with Optuna: ppo.py, its siblings, or a fork of one.

    python tune.py --script ppo.py --env-id LunarLander-v3 --n-trials 50    # the same line again goes on
    python tune.py --env-id Acrobot-v1 --n-jobs 2 -- --total-timesteps 100000
    python tune.py --space learning_rate=log:1e-4:1e-2 num_steps=choice:128,256,512 gamma
    python tune.py --storage postgresql+psycopg://user@host/optuna          # on each of many machines
    python tune.py --report ppo__LunarLander-v3                             # at any time: best flags, table, pictures

Flags after `--` go to the script, and are not tuned. A trial is one choice of the others; its value is the mean over
--seeds of the return of the last 100 training episodes. The seeds run one after the other, each in a process of its
own, and a trial that falls behind the others is stopped. The script's defaults are the first trial. At the end they
and the best trial run once more, on seeds that the search has not seen: the best of many trials is partly the luckiest.

It tunes any script that takes --env-id, --seed and --total-timesteps, tells its flags and their defaults in --help and
logs `charts/episodic_return` with TensorBoard under runs/. Setting up:

    pip install -r requirements.txt -r requirements-tune.txt
"""

import ast
import ctypes
import hashlib
import itertools
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
import tyro
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

# What is tuned unless --space says otherwise: of these, what the script has as flags. The syntax is that of --space.
SPACE = {
    "learning_rate": "log:1e-4:1e-2",
    "num_envs": "choice:4,8,16,32",
    "num_steps": "choice:128,256,512,1024",
    "num_minibatches": "choice:1,2,4,8,16,32",
    "update_epochs": "choice:1,2,4,8,16",
    "gamma": "choice:0.9,0.95,0.98,0.99,0.995,0.999",
    "gae_lambda": "choice:0.8,0.9,0.95,0.98,0.99,1.0",
    "clip_coef": "choice:0.1,0.2,0.3,0.4",
    "clip_vloss": "choice:True,False",
    "ent_coef": "choice:0.0,0.001,0.003,0.01,0.03,0.1",
    "vf_coef": "float:0.2:1.0",
    "max_grad_norm": "choice:0.3,0.5,1.0,2.0,5.0",
}
SIZES = ("num_envs", "num_steps", "num_minibatches")  # which must fit each other: see Script.can_run
REPORTS = 20  # how often in a run its return is compared with those of the other trials
WARMUP = 5  # of these, how many pass in a trial's first run before it can be stopped
STARTUP = 5  # other trials must have come as far before one can be stopped; and if the first five fail, all stops
HEARTBEAT = 20  # seconds: a worker silent for three times as long is taken for dead, and its trials run anew
ATTEMPTS = 3  # so often; then the trial is taken for what kills the worker
POLL_SECONDS = 0.3
TERM_SECONDS = 10  # what a stopped run has to end by itself
PATIENCE = 10  # seconds that another worker has to complete a new study


class UsageError(Exception):
    """What the user can put right: the command line prints it as one line and exits with code 2."""


@dataclass
class Args:
    script: Path = Path("ppo.py")
    """the training script"""
    env_id: str | None = None
    """environment to train in; the script's default if not given"""
    n_trials: int = 50
    """trials that the study is to have in the end, those of earlier calls and other workers included"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds to train with in each trial"""
    n_jobs: int = 1
    """processes side by side, one thread each"""
    space: tuple[str, ...] = ()
    """what to tune: NAME=log:LOW:HIGH, NAME=float:LOW:HIGH, NAME=int:LOW:HIGH or NAME=choice:A,B,C; a NAME alone has
    the range in tune.py's SPACE; also files with one of these per line. Default: all of SPACE"""
    confirm: int = 5
    """fresh seeds on which to compare the best trial with the script's defaults, in the end; 0 for none"""
    study: str | None = None
    """name of the study and of its folder under runs/; <script>__<env_id> if not given"""
    storage: str = "sqlite:///runs/optuna.db"
    """the database, as a URL; workers that share it, on any number of machines, work on the same study"""
    report: str | None = None
    """run nothing: write the best flags, the table and the pictures of this study"""

    def __post_init__(self) -> None:
        """Refuse what cannot run. Raises UsageError."""
        for name in (self.study, self.report):
            if name is not None and (Path(name).name != name or name in ("", "..", "optuna.db")):
                raise UsageError(f"a study's name becomes the name of a folder, which {name!r} cannot be")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UsageError("--seeds needs at least one seed, 0 or more, and none twice")
        for flag, value in (("n-trials", self.n_trials), ("n-jobs", self.n_jobs)):
            if value < 1:
                raise UsageError(f"--{flag} must be at least 1, not {value}")
        if self.confirm != 0 and self.confirm < 4:
            raise UsageError(
                f"--confirm needs 4 seeds or more (or 0 to skip it): {self.confirm} could not show anything"
            )
        if self.report is None and not self.script.is_file():
            raise UsageError(f"there is no script {self.script}")


# ------------------------------------------------------------------------------------ the script


def read_value(text: str) -> object:
    """A value as Python knows it: 0.5, 128, True, None, or else a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


class Script:
    """The training script's command line, as its own --help tells it, and the flags that are the same in all runs."""

    def __init__(self, path: Path, env_id: str | None, fixed_flags: list[str]) -> None:
        """Raises UsageError where this is no script to tune, or it has no such flags."""
        self.path, self.fixed_flags = path, fixed_flags
        wide = {**os.environ, "COLUMNS": "200"}  # narrow help breaks words and flags apart
        told = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, env=wide)
        if told.returncode != 0:
            raise UsageError(f"{path} --help fails: {last_line(told.stdout + told.stderr)}")
        # tyro draws boxes, argparse does not; in both a flag stands at the left, and what explains it to the right.
        lines = [line.strip("│|").rstrip() for line in told.stdout.splitlines()]
        starts = [i for i, line in enumerate(lines) if re.match(r" {0,4}(-\w[^-]*)?--\w", line)] + [len(lines)]
        self.flags, self.switches, self.defaults = {}, {}, {}  # by name; a switch is --no-NAME
        for start, end in itertools.pairwise(starts):
            text = " ".join(line.strip() for line in lines[start:end])
            flag, *others = re.findall(r"(?<![\w-])--[\w.-]+", re.split(r"\s{2,}", lines[start].strip())[0])
            name = flag.strip("-").replace("-", "_")
            self.flags[name] = flag
            if others and others[-1].startswith("--no"):
                self.switches[name] = others[-1]
            if default := re.findall(r"\(default: (.*?)\)", text):
                self.defaults[name] = read_value(default[-1])
        for name in ("env_id", "seed", "total_timesteps"):
            if name not in self.flags:
                raise UsageError(f"{path} has no flag --{name.replace('_', '-')}, which tune.py needs")

        self.fixed = {}
        for i, word in enumerate(fixed_flags):
            if not word.startswith("--"):
                continue
            flag, _, value = word.partition("=")
            name = flag.strip("-").replace("-", "_")
            if f"--{name.replace('_', '-')}" in self.switches.values():
                name = name.removeprefix("no_")
            if name not in self.flags:
                raise UsageError(f"{path} has no flag {flag}")
            if name in ("env_id", "seed"):
                raise UsageError(f"{flag} is tune.py's own: give {'--seeds' if name == 'seed' else flag} before the --")
            self.fixed[name] = read_value(value or (fixed_flags[i + 1] if i + 1 < len(fixed_flags) else ""))
        self.env_id = env_id or self.defaults.get("env_id")
        if not self.env_id:
            raise UsageError(f"{path} --help tells no default environment: choose one with --env-id")
        self.total_timesteps = {**self.defaults, **self.fixed}.get("total_timesteps")
        if not isinstance(self.total_timesteps, int) or self.total_timesteps < 1:
            raise UsageError(f"-- --total-timesteps must be a whole number above 0, not {self.total_timesteps}")

    def command(self) -> list[str]:
        """The command line of all runs, before what is tuned and the seed."""
        return ["python", str(self.path), self.flags["env_id"], self.env_id, *self.fixed_flags]

    def words(self, params: dict) -> list[str]:
        """These parameters as flags."""
        words = []
        for name, value in params.items():
            if isinstance(value, bool) and name in self.switches:
                words.append(self.flags[name] if value else self.switches[name])
            else:
                word = str(value)  # argparse takes -1e-05 for a flag
                words += [f"{self.flags[name]}={word}"] if word.startswith("-") else [self.flags[name], word]
        return words

    def can_run(self, params: dict) -> bool:
        """Whether the batch splits evenly into minibatches of at least two samples, and is small enough.

        Steps are rounded up to whole iterations: with four or more, by less than a third.
        """
        values = {**self.defaults, **self.fixed, **params}
        sizes = [values.get(name) for name in SIZES]
        if not any(name in params for name in SIZES) or not all(isinstance(size, int) and size > 0 for size in sizes):
            return True  # it is not for the search to decide, or a script with other flags and rules of its own
        num_envs, num_steps, num_minibatches = sizes
        batch = num_envs * num_steps
        return batch % num_minibatches == 0 and batch >= 2 * num_minibatches and 4 * batch <= self.total_timesteps


# ------------------------------------------------------------------------------ the search space


def read_space(items: tuple[str, ...], script: Script) -> dict[str, BaseDistribution]:
    """The parameters to tune and what they can be. Raises UsageError."""
    lines = []
    for item in items:
        if "=" not in item and item not in SPACE and Path(item).is_file():
            text = Path(item).read_text("utf-8-sig", errors="replace")
            lines += [line.partition("#")[0].strip() for line in text.splitlines()]
        else:
            lines.append(item)
    specs = {}
    for line in filter(None, lines):
        name, separator, spec = (part.strip() for part in line.partition("="))
        name = name.strip("-").replace("-", "_")
        if not separator and name not in SPACE:
            raise UsageError(f"--space: {name} needs a range, as in {name}=choice:1,2,3 (and is no file)")
        if name not in script.flags:
            raise UsageError(f"--space: {script.path} has no flag --{name.replace('_', '-')}")
        if name in ("env_id", "seed", "total_timesteps") or name in script.fixed:
            raise UsageError(f"--space: {name} is the same in all runs of a study, so it cannot be tuned")
        specs[name] = spec or SPACE[name]
    if not items:
        specs = {name: spec for name, spec in SPACE.items() if name in script.flags and name not in script.fixed}
    space = {name: read_distribution(name, spec, script.defaults) for name, spec in specs.items()}
    if not space:
        raise UsageError("there is nothing to tune: name flags of the script with --space")

    options = {
        name: getattr(space[name], "choices", None) or range(int(space[name].low), int(space[name].high) + 1)
        for name in SIZES
        if name in space
    }
    draw = random.Random(0).choice
    if not any(script.can_run({name: draw(values) for name, values in options.items()}) for _ in range(10_000)):
        rule = "num_envs * num_steps must split evenly into minibatches of at least two samples"
        raise UsageError(f"--space: {rule}, and fit four times into {script.total_timesteps:,} steps: hardly any does")
    return space


def read_distribution(name: str, spec: str, defaults: dict) -> BaseDistribution:
    """What a parameter can be; the script's default is added to choices. Raises UsageError."""
    kind, _, rest = spec.partition(":")
    try:
        if kind == "choice":
            choices = [read_value(text.strip()) for text in rest.split(",")]
            if "" in choices or any(re.search(r"\s\w+=", str(choice)) for choice in choices):
                raise ValueError("an empty choice, or two entries in one")
            choices = list(dict.fromkeys([*choices, defaults.get(name, choices[0])]))
            if all(type(choice) in (int, float) for choice in choices):
                choices.sort()
            return CategoricalDistribution(choices)
        low, high = (float(text) for text in rest.split(":"))
        if not (np.isfinite([low, high]).all() and low < high):
            raise ValueError("LOW must be below HIGH")
        if kind != "int" and type(defaults.get(name)) is int:
            raise ValueError(f"the script's default is {defaults[name]}, a whole number")
        if kind == "int" and not (low.is_integer() and high.is_integer()):
            raise ValueError("LOW and HIGH must be whole numbers")
        if kind == "int":
            return IntDistribution(int(low), int(high))
        return FloatDistribution(low, high, log={"float": False, "log": True}[kind])
    except (ValueError, KeyError, TypeError) as error:
        syntax = "log:LOW:HIGH, float:LOW:HIGH, int:LOW:HIGH or choice:A,B,C"
        raise UsageError(f"--space: {name}={spec} is not {name}={syntax} ({error})") from error


class Sampler(optuna.samplers.TPESampler):
    """Optuna's TPE, which draws again until the script can run it; floats are rounded to three digits, to be read."""

    def __init__(self, script: Script, space: dict[str, BaseDistribution], storage: optuna.storages.RDBStorage) -> None:
        super().__init__(multivariate=True)
        self.script, self.space, self.storage = script, space, storage
        self.uniform = optuna.samplers.RandomSampler()

    def before_trial(self, study, trial):
        super().before_trial(study, trial)
        self.storage.record_heartbeat(trial._trial_id)  # at once: who dies from now on can be told from who lives

    def infer_relative_search_space(self, study, trial):
        """All of it, from the first trial on: what is drawn together can be refused together."""
        return {name: kind for name, kind in self.space.items() if not kind.single()}

    def sample_relative(self, study, trial, search_space):
        constants = {  # what has one value only is not in search_space
            name: kind.choices[0] if isinstance(kind, CategoricalDistribution) else kind.low
            for name, kind in self.space.items()
            if kind.single()
        }
        for attempt in itertools.count() if search_space else ():
            params = super().sample_relative(study, trial, search_space) if attempt < 10 else {}
            if not params:  # there are too few trials to learn from, or TPE insists on what cannot run
                for name, kind in search_space.items():
                    params[name] = self.uniform.sample_independent(study, trial, name, kind)
            for name, kind in search_space.items():
                if isinstance(kind, FloatDistribution):
                    params[name] = min(max(float(f"{params[name]:.3g}"), kind.low), kind.high)
            if self.script.can_run({**constants, **params}):
                return params
        return {}


class Pruner(optuna.pruners.BasePruner):
    """Stops a trial whose mean return is below the median of what the other trials had at the same step.

    Optuna's MedianPruner compares the best that the trial has ever had instead. With one seed after the other
    that would be the end of a lucky first seed, which no later seed could undo.
    """

    def __init__(self, total_timesteps: int) -> None:
        self.first_step = total_timesteps * WARMUP // REPORTS

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        step = trial.last_step
        if step is None or step < self.first_step or trial.user_attrs.get("defaults"):
            return False
        others = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        values = [other.intermediate_values[step] for other in others if step in other.intermediate_values]
        return len(values) >= STARTUP and trial.intermediate_values[step] < np.nanmedian(values)


# --------------------------------------------------------------------------------------- one run


def last_line(output: str) -> str:
    """The last line that says something."""
    return next((line.strip("│ ") for line in reversed(output.splitlines()) if re.search(r"\w", line)), "no output")


def end_with_parent() -> None:
    """In the new process: on Linux, it is told to end when tune.py is killed. Elsewhere it would go on to its end."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Run:
    """A process of the script, in a folder of its own, and what it has logged so far."""

    def __init__(self, script: Script, params: dict, seed: int, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed process left
        folder.mkdir(parents=True)
        self.folder, self.readers = folder, {}
        command = [sys.executable, str(script.path.resolve()), *script.command()[2:], *script.words(params)]
        with open(folder / "output.txt", "wb") as output:
            self.process = subprocess.Popen(
                [*command, script.flags["seed"], str(seed)],
                cwd=folder,
                env={"OMP_NUM_THREADS": "1", **os.environ},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, to be ended with all its own children
                preexec_fn=end_with_parent,
            )

    def read(self) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """The last step, and of every event its step, its mean return and its number of episodes."""
        with suppress(FileNotFoundError):  # a folder that the script has just removed
            for path in self.folder.glob("**/events.out.tfevents.*"):
                if path.parent not in self.readers:
                    self.readers[path.parent] = EventAccumulator(str(path.parent), size_guidance={"scalars": 0})  # all
        for events in self.readers.values():
            events.Reload()  # reads on from where it was
            charts = [tag for tag in events.Tags()["scalars"] if tag.startswith("charts/")]
            if "charts/episodic_return" in charts:
                break
        else:
            return 0, np.array([]), np.array([]), np.array([])
        series = {tag: events.Scalars(tag) for tag in charts}
        steps = np.array([event.step for event in series["charts/episodic_return"]])
        returns = np.array([event.value for event in series["charts/episodic_return"]])
        counts = np.ones(len(steps))  # as CleanRL has it, an event for each episode
        known = min(len(series.get("charts/episodes", ())), len(steps))  # the last event may be half written
        episodes = series["charts/episodes"][:known] if known else []
        if known >= len(steps) - 1 > 0 and [event.step for event in episodes] == steps[:known].tolist():
            more = np.diff([event.value for event in episodes], prepend=0)
            if (more > 0).all():  # then an event is the mean of the episodes that ended since the last one
                steps, returns, counts = steps[:known], returns[:known], more
        return max(events[-1].step for events in series.values()), steps, returns, counts

    def ask_to_end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)

    def end(self) -> None:
        """Ask it to end, and make it end after a while."""
        self.ask_to_end()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=TERM_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def result(self) -> float:
        """What a finished run reached: the mean return of its last 100 episodes. Raises ValueError if it failed."""
        code = self.process.returncode
        if code < 0:
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            raise ValueError(f"killed by {signal.Signals(-code).name}{hint}")
        if code > 0:
            raise ValueError(f"exit code {code}: {last_line((self.folder / 'output.txt').read_text(errors='replace'))}")
        _, _, returns, counts = self.read()
        if len(returns) == 0:
            raise ValueError("it never logged charts/episodic_return: no episode ended, or it logs something else")
        value = mean_of_last(returns, counts)
        if not np.isfinite(value):
            raise ValueError(f"its return is {value}")
        return value


def mean_of_last(returns: np.ndarray, counts: np.ndarray, episodes: int = 100) -> float:
    """Mean return of the last episodes. Of the event in which the first of these lies, a part counts."""
    seen = np.cumsum(counts[::-1])
    weights = (counts[::-1] - (seen - episodes).clip(min=0)).clip(min=0)
    return float(np.average(returns[::-1], weights=weights))


class RunningTrial:
    """A trial, its seeds run one after the other."""

    def __init__(self, trial: optuna.Trial, script: Script, seeds: tuple[int, ...], folder: Path) -> None:
        self.trial, self.script, self.folder = trial, script, folder / f"trial-{trial.number}"
        self.seeds = trial.user_attrs.get("seeds", seeds)
        self.params = trial.user_attrs.get("params", trial.params)
        trial.set_user_attr("flags", shlex.join(script.words(self.params)))
        self.returns, self.steps, self.started = [], 0, time.monotonic()
        self.start_next_seed()

    def start_next_seed(self) -> None:
        seed = self.seeds[len(self.returns)]
        self.run = Run(self.script, self.params, seed, self.folder / f"seed-{seed}")
        self.next_report = 1

    def poll(self) -> TrialState | None:
        """See how far it is; stop it or start the next seed. The trial's state if it has ended."""
        ended = self.run.process.poll() is not None  # asked before the events are read, so that none is missed
        crashed = ended and self.run.process.returncode != 0
        total, before = self.script.total_timesteps, self.script.total_timesteps * len(self.returns)
        last_step, steps, returns, counts = self.run.read()
        while not crashed and self.next_report < REPORTS and last_step >= (step := total * self.next_report // REPORTS):
            self.next_report += 1
            so_far = steps <= step
            if so_far.any():
                value = mean_of_last(returns[so_far], counts[so_far])
                if self.should_stop([*self.returns, value], before + step):
                    self.end()
                    return TrialState.PRUNED
        if not ended:
            return None
        self.end()  # what it may have left in its group
        try:
            self.returns.append(self.run.result())
        except ValueError as error:
            self.trial.set_user_attr("reason", f"seed {self.seeds[len(self.returns)]}: {error}")
            return TrialState.FAIL
        stop = self.should_stop(self.returns, before + total)
        if len(self.returns) == len(self.seeds):
            return TrialState.COMPLETE
        if stop:
            return TrialState.PRUNED
        self.start_next_seed()
        return None

    def should_stop(self, returns: list[float], step: int) -> bool:
        """Report the mean over the seeds so far, at a step counted over all of them, and ask the pruner."""
        self.trial.report(float(np.mean(returns)), step)
        return self.trial.should_prune()

    def end(self) -> None:
        """End its run, and count its steps."""
        self.run.end()
        self.steps += self.run.read()[0]

    def tell(self, study: optuna.Study, state: TrialState) -> None:
        """Write down how it ended."""
        self.trial.set_user_attr("returns", self.returns)
        self.trial.set_user_attr("steps", self.steps)
        self.trial.set_user_attr("seconds", time.monotonic() - self.started)
        value = float(np.mean(self.returns)) if state == TrialState.COMPLETE else None
        study.tell(self.trial, value, state, skip_if_finished=True)  # by another worker, just now


# ------------------------------------------------------------------------------------- the study


def open_storage(url: str) -> optuna.storages.RDBStorage:
    """Connect to the database. Raises UsageError."""
    if url == Args.storage:
        Path("runs").mkdir(exist_ok=True)
    for attempt in range(10):
        try:
            return optuna.storages.RDBStorage(
                url,
                engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {},  # others may write
                heartbeat_interval=HEARTBEAT,
                grace_period=3 * HEARTBEAT,
                heartbeat_stale_trial_callback=run_again_if_its_worker_died,
            )
        except Exception as error:  # a database's driver can raise nearly anything
            reason = " ".join(str(error).split("(Background")[0].split()) or type(error).__name__
            if re.search("already exists|unique", reason, re.IGNORECASE) and attempt < 9:
                time.sleep(0.5)  # another worker, started at the same time, is making the tables
                continue
            shown = re.sub(r"(//[^:@/]*):[^@/]*@", r"\1:***@", url)  # without the password
            raise UsageError(f"--storage {shown} cannot be used: {reason}") from error


def open_study(args: Args, script: Script, space: dict[str, BaseDistribution]) -> optuna.Study:
    """The study, made if there is none, with the script's defaults as its first trial. Raises UsageError."""
    name = args.study or re.sub("[/:]", "-", f"{script.path.stem}__{script.env_id}")
    made_with = {  # what all its trials have in common: without it their values could not be compared
        "script": script.path.name,
        "env_id": script.env_id,
        "flags": shlex.join(script.fixed_flags),
        "seeds": list(args.seeds),
        "total_timesteps": script.total_timesteps,
        "space": {key: str(kind) for key, kind in space.items()},
        "version": hashlib.sha256(script.path.read_bytes()).hexdigest(),
    }
    first = [(fitting_defaults(script, space), {"defaults": True, "params": {}})]
    tools = Sampler(script, space, open_storage(args.storage)), Pruner(script.total_timesteps)
    attrs = {"command": shlex.join(script.command()), "made_with": made_with}
    study = make_or_load(name, *tools, first, attrs)
    theirs = study.user_attrs.get("made_with", {"script": "something else"})
    trials = study.get_trials(deepcopy=False)
    only_failures = all(trial.state in (TrialState.FAIL, TrialState.WAITING) for trial in trials)
    reasons = {trial.user_attrs.get("reason") for trial in trials} - {None, "interrupted"}
    if only_failures and reasons and theirs != made_with:  # the user has put right what failed
        optuna.delete_study(study_name=name, storage=study.sampler.storage)
        study = make_or_load(name, *tools, first, attrs)
        theirs = made_with
    for key, ours in made_with.items():
        if theirs[key] != ours:
            asked = {"space": "another --space", "version": f"another version of {script.path.name}"}
            difference = asked.get(key, f"{key} {theirs[key]!r}, not {ours!r}")
            raise UsageError(f"the study {name} was made with {difference}: choose another name with --study")
    return study


def make_or_load(name: str, sampler: Sampler, pruner, queue: list[tuple[dict, dict]], attrs: dict) -> optuna.Study:
    """A study with these first trials (parameters and attributes) in its queue. One worker makes it."""
    tools = {"storage": sampler.storage, "study_name": name, "sampler": sampler, "pruner": pruner}
    try:
        study = optuna.create_study(direction="maximize", **tools)
        for key, value in attrs.items():
            study.set_user_attr(key, value)
        study.set_user_attr("ready", False)
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(**tools)
        end = time.monotonic() + PATIENCE
        while not study.user_attrs.get("ready") and time.monotonic() < end:
            time.sleep(0.1)
        if study.user_attrs.get("ready"):
            return study
        if "ready" not in study.user_attrs:
            return study  # not one of tune.py's
    there = [trial.user_attrs for trial in study.get_trials(deepcopy=False)]
    for params, trial_attrs in queue:
        if not any(trial_attrs.items() <= attrs.items() for attrs in there):
            study.enqueue_trial(params, trial_attrs)
    study.set_user_attr("ready", True)
    return study


def fitting_defaults(script: Script, space: dict[str, BaseDistribution]) -> dict:
    """The script's defaults, as far as they lie within the search space: of others Optuna cannot be told."""
    fitting = {}
    for name, default in script.defaults.items():
        kind = space.get(name)
        if isinstance(kind, CategoricalDistribution) or (
            kind is not None and type(default) in (int, float) and kind.low <= default <= kind.high
        ):
            fitting[name] = default
    return fitting


def run_again(study: optuna.Study, trial: optuna.Trial | FrozenTrial, attempt: int = 1) -> None:
    """Put an interrupted trial back in the queue. It gets a new number, and the old one counts no longer."""
    attrs = {key: trial.user_attrs[key] for key in ("defaults", "params", "seeds") if key in trial.user_attrs}
    drawn = "defaults" in attrs or study.sampler.space.keys() <= trial.params.keys()  # or its worker died at that
    study.enqueue_trial(trial.params if drawn else {}, {**attrs, "instead_of": trial.number, "attempt": attempt})


def run_again_if_its_worker_died(study: optuna.Study, trial: FrozenTrial) -> None:
    attempt = trial.user_attrs.get("attempt", 1)
    if attempt < ATTEMPTS:
        run_again(study, trial, attempt + 1)


def tally(study: optuna.Study) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
    """The trials that are finished and those that are running, in both cases without those put back in the queue."""
    trials = study.get_trials(deepcopy=False)
    put_back = {trial.user_attrs.get("instead_of") for trial in trials}
    trials = [trial for trial in trials if trial.number not in put_back and not trial.user_attrs.get("surplus")]
    return [t for t in trials if t.state.is_finished()], [t for t in trials if t.state == TrialState.RUNNING]


def next_trial(study: optuna.Study, n_trials: int) -> optuna.Trial | None:
    """The next trial: one from the queue, or a new one. None if another worker took the last one meanwhile."""
    trial, space = study.ask(), study.sampler.space
    if trial.user_attrs.get("defaults"):
        space = {name: space[name] for name in fitting_defaults(study.sampler.script, space)}
    for name, kind in space.items():
        if isinstance(kind, CategoricalDistribution):
            trial.suggest_categorical(name, kind.choices)
        elif isinstance(kind, IntDistribution):
            trial.suggest_int(name, kind.low, kind.high)
        else:
            trial.suggest_float(name, kind.low, kind.high, log=kind.log)
    finished, running = tally(study)
    if len(finished) + len(running) > n_trials and trial.number == max(other.number for other in running):
        trial.set_user_attr("surplus", True)
        study.tell(trial, state=TrialState.FAIL)
        return None
    return trial


def search(args: Args, script: Script, study: optuna.Study, n_trials: int, folder: Path) -> None:
    """Run trials until the study has n_trials finished ones. Raises UsageError if the script's defaults fail."""
    slots: list[RunningTrial] = []
    last_beat, stop_requested = -np.inf, False

    def request_stop(signum, frame) -> None:
        nonlocal stop_requested
        stop_requested = True  # and no exception here: amid a transaction it would leave the database locked
        signal.signal(signum, old_handlers[signum])  # a second one stops at once

    old_handlers = {signum: signal.signal(signum, request_stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    progress = tqdm(total=n_trials, desc=folder.name, unit=" trials", disable=None)
    try:
        while True:
            if stop_requested:
                raise KeyboardInterrupt
            if time.monotonic() - last_beat > HEARTBEAT:
                last_beat = time.monotonic()
                for slot in slots:
                    study.sampler.storage.record_heartbeat(slot.trial._trial_id)
                optuna.storages.fail_stale_trials(study)
            finished, running = tally(study)
            progress.n = min(len(finished), n_trials)
            if best := best_of(finished):
                progress.set_postfix_str(f"best {show(best)}, trial {best.number}", refresh=False)
            progress.refresh()
            if len(finished) >= n_trials and not slots:
                break
            while len(slots) < args.n_jobs and len(finished) + len(running) < n_trials:
                if trial := next_trial(study, n_trials):
                    slots.append(RunningTrial(trial, script, args.seeds, folder))
                finished, running = tally(study)

            time.sleep(POLL_SECONDS)
            for slot in list(slots):
                try:
                    if state := slot.poll():
                        slot.tell(study, state)
                except optuna.exceptions.UpdateFinishedTrialError:
                    slot.end()  # this machine slept, and another worker has put the trial back in the queue
                    slots.remove(slot)
                    continue
                if state:
                    slots.remove(slot)
                    trial = study.get_trials(deepcopy=False)[slot.trial.number]
                    seeds = "" if slot.seeds == args.seeds else f", seed {slot.seeds[0]}"
                    flags = trial.user_attrs["flags"] or "the defaults"
                    tqdm.write(f"trial {trial.number}{seeds}: {show(trial)} with {flags}")
                    if state != TrialState.FAIL:
                        continue
                    why = f"{trial.user_attrs['reason']} (see {slot.folder})"
                    if trial.user_attrs.get("defaults") and slot.steps == 0:
                        run_again(study, trial)  # by the next call, when the user has put it right
                        raise UsageError(f"{script.path} fails with its defaults before it logs anything, {why}")
                    finished = tally(study)[0]
                    if len(finished) >= STARTUP and all(t.state == TrialState.FAIL for t in finished):
                        raise UsageError(f"all {len(finished)} trials so far failed, the last one by {why}")
    finally:  # after Ctrl-C, for one
        for signum in old_handlers:
            signal.signal(signum, signal.SIG_IGN)  # this takes TERM_SECONDS at most
        progress.close()
        for slot in slots:
            slot.run.ask_to_end()
        for slot in slots:
            slot.end()
            with suppress(optuna.exceptions.UpdateFinishedTrialError):  # another worker has put it in the queue
                slot.trial.set_user_attr("reason", "interrupted")
                slot.tell(study, TrialState.FAIL)
                run_again(study, slot.trial)
        for signum, handler in old_handlers.items():
            signal.signal(signum, handler)


# ------------------------------------------------------------- is the best better than the defaults?


def confirm(args: Args, script: Script, study: optuna.Study) -> None:
    """Run the defaults and the best trial on seeds that the search has not seen, in a study beside the first one."""
    best = best_of(tally(study)[0])
    if best is None or best.user_attrs.get("defaults"):
        return
    first_seed = max(args.seeds) + 1
    queue = [
        ({}, {"params": params, "seeds": [seed]})
        for seed in range(first_seed, first_seed + args.confirm)
        for params in ({}, best.params)
    ]
    name = f"confirm-trial-{best.number}-on-{args.confirm}-seeds"
    sampler = Sampler(script, {}, study.sampler.storage)
    fresh = make_or_load(f"{study.study_name}/{name}", sampler, optuna.pruners.NopPruner(), queue, {})
    search(args, script, fresh, len(queue), Path("runs", study.study_name, name))
    results = {"defaults": {}, "best": {}}  # by seed, None for a run that failed
    for trial in tally(fresh)[0]:
        attrs = trial.user_attrs
        results["best" if attrs["params"] else "defaults"][attrs["seeds"][0]] = trial.value
    study.set_user_attr("confirmed", {"trial": best.number, **results})


def make_verdict(study: optuna.Study, best: FrozenTrial) -> str:
    """Whether the best trial is better than the defaults, on fresh seeds."""
    if best.user_attrs.get("defaults"):
        return "Nothing was better than the script's defaults."
    confirmed = study.user_attrs.get("confirmed", {"trial": None})
    if confirmed["trial"] != best.number:
        return (
            f"Not confirmed on fresh seeds: trial {best.number} was the best of many on the same few seeds, so its "
            "value is partly luck. --confirm 5 compares it with the defaults."
        )
    seeds = sorted(confirmed["best"], key=int)
    new, old = ([confirmed[name][seed] for seed in seeds] for name in ("best", "defaults"))
    lines = [f"| on the fresh seeds {', '.join(seeds)} | mean return | ± | each seed |", "|---|---|---|---|"]
    for name, values in (("the script's defaults", old), (f"trial {best.number}", new)):
        good = [value for value in values if value is not None] or [np.nan]
        each = ", ".join("failed" if value is None else f"{value:.2f}" for value in values)
        lines.append(f"| {name} | {np.mean(good):.2f} | {np.std(good):.2f} | {each} |")
    if None in new + old:
        return "\n".join([*lines, "", "Some of these runs failed, so there is no verdict."])

    from scipy.stats import permutation_test  # here, because it takes a second to import

    # Of all ways to deal out these returns in two groups, the share with as large a difference. Up to ten seeds all
    # ways are tried, and no normal distribution is assumed: returns seldom have one.
    p = permutation_test((new, old), lambda a, b, axis: a.mean(axis) - b.mean(axis), n_resamples=200_000).pvalue
    difference = np.mean(new) - np.mean(old)
    verdict = f"{'' if p < 0.05 else 'not '}significantly {'better' if difference > 0 else 'worse'}"
    test = f"two-sided permutation test of {len(new)} + {len(old)} runs"
    lines += ["", f"Trial {best.number} is {verdict} than the defaults: {difference:+.2f}, p = {p:.3f} ({test})."]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ the report


def best_of(trials: list[FrozenTrial]) -> FrozenTrial | None:
    """The complete trial with the highest value, if any is complete."""
    return max((t for t in trials if t.state == TrialState.COMPLETE), key=lambda trial: trial.value, default=None)


def show(trial: FrozenTrial) -> str:
    """Its value and the spread over its seeds, or what else became of it."""
    if trial.state == TrialState.COMPLETE:
        return f"{trial.value:.2f} ± {np.std(trial.user_attrs['returns']):.2f}"
    if trial.state == TrialState.PRUNED:
        return f"stopped at {trial.value:.2f} after {trial.user_attrs['steps']:,} steps"
    return f"failed, {trial.user_attrs.get('reason', 'with its worker')}"


def make_table(trials: list[FrozenTrial], rows: int = 10) -> str:
    """The top trials, and the defaults wherever they are."""
    order = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    ranked = sorted(trials, key=lambda t: (order.index(t.state), -(t.value or 0)))
    lines = ["| rank | trial | mean return | ± | steps | state | flags |", "|---|---|---|---|---|---|---|"]
    for rank, trial in enumerate(ranked, 1):
        attrs = trial.user_attrs
        if rank <= rows or attrs.get("defaults"):
            mean = "" if trial.value is None else f"{trial.value:.2f}"
            spread = f"{np.std(attrs['returns']):.2f}" if trial.state == TrialState.COMPLETE else ""
            state = show(trial) if trial.state == TrialState.FAIL else trial.state.name.lower()
            flags = "the script's defaults" if attrs.get("defaults") else f"`{attrs.get('flags', '')}`"
            steps = f"{attrs.get('steps', 0):,}"
            lines.append(f"| {rank} | {trial.number} | {mean} | {spread} | {steps} | {state} | {flags} |")
    return "\n".join(lines)


def draw(study: optuna.Study, trials: list[FrozenTrial], best: FrozenTrial, folder: Path) -> list[str]:
    """Draw the pictures that there are enough trials for. Returns their names."""
    import matplotlib  # here, because it takes a second to import

    matplotlib.use("Agg")  # needs no display
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter
    from optuna.visualization import matplotlib as pictures

    seeds, names = study.user_attrs["made_with"]["seeds"], []
    value = f"mean return of {len(seeds)} seed{'s' * (len(seeds) > 1)}"

    def save(name: str, title: str, width: float, height: float) -> None:
        figure = pyplot.gcf()
        for axes in figure.axes:
            axes.set_title("")
            axes.set_title("", loc="left")
            for axis in (axes.xaxis, axes.yaxis):
                if axis.get_scale() == "log":  # else their labels overlap
                    axis.set_major_locator(LogLocator(subs=(1, 3)))
                    axis.set_major_formatter("{x:g}")
                    axis.set_minor_formatter(NullFormatter())
        figure.suptitle(f"{study.study_name}: {title}")
        figure.set_size_inches(width, height)
        figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
        pyplot.close(figure)
        names.append(f"{name}.png")

    axes = pictures.plot_optimization_history(study, target_name=value)
    axes.legend(loc="lower right")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    save("history", "value of each complete trial, and the best so far", 9, 5)

    with pyplot.style.context("default"):
        _, axes = pyplot.subplots()
        colors = {TrialState.COMPLETE: "tab:blue", TrialState.PRUNED: "tab:red", TrialState.FAIL: "tab:gray"}
        for trial in trials:
            style = {"color": colors[trial.state], "alpha": 0.4, "linewidth": 1, "label": trial.state.name.lower()}
            if trial.user_attrs.get("defaults"):
                style = {"color": "black", "linestyle": "--", "linewidth": 2, "label": "the script's defaults"}
            elif trial.number == best.number:
                style = {"color": "tab:orange", "linewidth": 2.5, "label": f"best, trial {best.number}", "zorder": 3}
            curve = sorted(trial.intermediate_values.items())
            axes.plot([step for step, _ in curve], [mean for _, mean in curve], **style)
        legend = {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        axes.legend(legend.values(), legend.keys())
        axes.set(xlabel="environment steps, one seed after the other", ylabel="mean return of the seeds so far")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
        save("intermediate", "returns while the trials ran", 9, 5)

    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.params]
    if len({trial.value for trial in complete}) > 1:
        ranked = list(optuna.importance.get_param_importances(study))
        pictures.plot_param_importances(study, target_name=value).get_legend().remove()
        save("importances", f"importance of the flags, {len(complete)} complete trials", 9, 2 + 0.35 * len(ranked))
        pictures.plot_slice(study, params=ranked[:6], target_name=value)
        save("slices", "complete trials along the most important flags", 4 * min(len(ranked), 6), 4)
        if len(ranked) > 1:
            pictures.plot_contour(study, params=ranked[:2], target_name=value)
            save("contour", "the two most important flags", 8, 6)
    return names


def write_report(study: optuna.Study) -> None:
    """Print the report, and write it and the pictures to the study's folder. Raises UsageError."""
    trials, running = tally(study)
    made_with, folder = study.user_attrs.get("made_with"), Path("runs", study.study_name)
    best = best_of(trials) if made_with else None
    if best is None:
        raise UsageError(f"no trial of tune.py in the study {study.study_name} is complete")
    folder.mkdir(parents=True, exist_ok=True)
    states = [trial.state.name.lower() for trial in trials] + ["running"] * len(running)
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))
    known = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    planned = made_with["total_timesteps"] * len(made_with["seeds"])
    saved = sum(planned - trial.user_attrs["steps"] for trial in known if trial.state == TrialState.PRUNED)
    share = f"{saved / planned / len(known):.0%} of the steps ({saved:,} of {planned * len(known):,})"
    seeds = ", ".join(map(str, made_with["seeds"]))
    parts = [
        f"# {study.study_name}",
        f"Trials: {counts}. Stopping hopeless ones early saved {share}.",
        make_table(trials),
        make_verdict(study, best),
        f"The best flags, trial {best.number}, {show(best)} over seed{'s' * (',' in seeds)} {seeds}:",
        f"    {study.user_attrs['command']} {best.user_attrs['flags']}".rstrip(),
    ]
    text = "\n\n".join(parts)
    print(text)  # before anything that can fail
    names = draw(study, trials, best, folder)
    pictures = "\n".join(f"![{name}]({name})" for name in names)
    (folder / "report.md").write_text(f"{text}\n\n{pictures}\n")
    print(f"\nwritten: {', '.join(str(folder / name) for name in ('report.md', *names))}")


def main() -> None:
    """The command line."""
    own, flags = sys.argv[1:], []
    if "--" in own:
        split = own.index("--")
        own, flags = own[:split], own[split + 1 :]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", "Heartbeat of storage")  # search() records it, as study.optimize would
    try:
        if sum(word.partition("=")[0] == "--space" for word in own) > 1:
            raise UsageError("--space takes all its entries at once: --space A B C")
        args = tyro.cli(Args, description=__doc__, args=own)
        if args.report:
            if args.storage == Args.storage and not Path(args.storage.removeprefix("sqlite:///")).exists():
                raise UsageError(f"there is no study {args.report}: {args.storage} does not exist")
            try:
                study = optuna.load_study(study_name=args.report, storage=open_storage(args.storage))
            except KeyError as error:
                raise UsageError(f"there is no study {args.report} in {args.storage}") from error
        else:
            script = Script(args.script, args.env_id, flags)
            study = open_study(args, script, read_space(args.space, script))
            search(args, script, study, args.n_trials, Path("runs", study.study_name))
            if args.confirm:
                confirm(args, script, study)
        write_report(study)
    except (UsageError, OSError, optuna.exceptions.StorageInternalError) as error:
        lost = isinstance(error, optuna.exceptions.StorageInternalError)
        reason = " ".join(str(error.__cause__ if lost else error).split("(Background")[0].split())
        print(f"{Path(__file__).name}: error: {reason}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    for signum in (signal.SIGINT, signal.SIGTERM):  # on either, end the runs (see search)
        signal.signal(signum, signal.default_int_handler)
    main()
