"""Learning curves of a training script over environments and seeds: a table, a picture and a CSV.

    python benchmark/learning.py --env-ids CartPole-v1 Acrobot-v1 --seeds 1 2 3 --jobs 2 --name classic
    python benchmark/learning.py --script my_fork.py --name my_fork -- --total-timesteps 100000 --ent-coef 0
    python benchmark/learning.py --name classic --plot-only
    python benchmark/learning.py --name pong --runs runs/ALE-Pong-v5__*  # of runs made without it, finished or not

Flags after `--` go to the script. Interrupted, it goes on where it was when the same command is repeated: runs
that left a checkpoint are resumed, others are made anew.
It runs any script that takes --env-id and --seed and logs `charts/episodic_return` with TensorBoard under
runs/, be it one of this repository, a fork of one, or one of CleanRL's. Setting up:

    pip install -r requirements.txt -r benchmark/requirements.txt
"""

import csv
import hashlib
import itertools
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results"
CURVE_POINTS = 200  # per run, in the CSV and the picture

# Mean and standard deviation, by the environment's name without its version. CleanRL's and openai/baselines'
# are training returns over 3 seeds; RL-Zoo's are of tuned agents, evaluated. 500k steps for classic control,
# 10M for Atari and 1M for MuJoCo (v4, RL-Zoo: v3) unless said.
PUBLISHED = {
    "CartPole": {"CleanRL": (490.0, 6.1), "openai/baselines": (497.5, 4.0), "RL-Zoo evaluated": (500.0, 0.0)},
    "Acrobot": {"CleanRL": (-86.4, 1.3), "openai/baselines": (-81.8, 5.6), "RL-Zoo evaluated (1M)": (-73.5, 18.2)},
    "LunarLander": {"RL-Zoo evaluated (v2, 1M)": (242.1, 31.8)},
    "FrozenLake": {"optimum, 4x4": (0.74, None)},
    "Taxi": {"optimum": (7.9, None)},
    "Breakout": {"CleanRL": (414.7, 28.1), "openai/baselines": (406.6, 31.6), "RL-Zoo evaluated": (398.0, 33.3)},
    "Pong": {"CleanRL": (20.4, 0.2), "openai/baselines": (20.5, 0.5), "RL-Zoo evaluated": (21.0, 0.1)},
    "BeamRider": {
        "CleanRL": (1915.9, 484.6),
        "openai/baselines": (2643.0, 671.0),
        "RL-Zoo evaluated": (3397.0, 1662.0),
    },
    "HalfCheetah": {"CleanRL": (1442.6, 46.0), "RL-Zoo evaluated": (5819.0, 664.0)},
    "Walker2d": {"CleanRL": (2288.0, 571.8), "RL-Zoo evaluated": (3479.0, 822.0)},
    "Hopper": {"CleanRL": (2382.9, 271.7), "RL-Zoo evaluated": (2410.0, 10.0)},
    "InvertedPendulum": {"CleanRL": (963.1, 22.2)},
    "Humanoid": {"CleanRL": (716.1, 49.1)},
}


class UsageError(Exception):
    """What the user can put right: the command line prints it as one line and exits with code 2."""


@dataclass
class Args:
    script: Path = Path("ppo.py")
    """the training script"""
    env_ids: tuple[str, ...] = ("CartPole-v1",)
    """environments to train in"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """seeds to train with, in each environment"""
    jobs: int = 1
    """runs at once"""
    name: str = "learning"
    """what to call the results: benchmark/results/<name>.csv, .md and .png; runs are in runs/benchmark-<name>"""
    plot_only: bool = False
    """run nothing: write the results of the runs that `--name` has finished"""
    runs: tuple[Path, ...] = ()
    """run nothing: write the results of these run folders, <env_id>__<exp_name>__<seed>__<unix time>"""

    def __post_init__(self) -> None:
        """Refuse what cannot run. Raises UsageError."""
        if not self.name or Path(self.name).name != self.name:
            raise UsageError(f"--name becomes the name of a file, which {self.name!r} cannot be")
        for run in self.runs:
            if not run.is_dir() or len(run.name.split("__")) != 4:
                raise UsageError(f"{run} is not the folder of a run, <env_id>__<exp_name>__<seed>__<unix time>")
        if self.plot_only or self.runs:
            return
        if not self.script.is_file():
            raise UsageError(f"there is no script {self.script}")
        if not self.env_ids or not self.seeds:
            raise UsageError("--env-ids and --seeds each need at least one value")
        if self.jobs < 1:
            raise UsageError(f"--jobs must be at least 1, not {self.jobs}")


@dataclass(frozen=True)
class Job:
    """One run to make. It is made anew when any of this has changed since it was finished."""

    env_id: str
    seed: int
    command: str
    script_sha256: str

    def folder(self, name: str) -> Path:
        """The run's working directory, so that what is in its runs/ can only be its own."""
        return ROOT / "runs" / f"benchmark-{name}" / f"{self.env_id.replace('/', '-')}__{self.seed}"

    def noted(self, name: str, file: str = "finished.json") -> dict | None:
        """What run_jobs noted when the run ended well (or began), or None if it did not, or was another one."""
        try:
            note = json.loads((self.folder(name) / file).read_text())
        except (OSError, ValueError):  # there is none, or a power cut left half of it
            return None
        return note if note["job"] == asdict(self) else None


@dataclass
class Run:
    """What a finished run logged."""

    env_id: str
    seed: int
    curve_steps: np.ndarray  # [points]
    curve_returns: np.ndarray  # [points], mean return of the episodes of a point
    curve_episodes: np.ndarray  # [points], how many those were
    steps: int
    seconds: float
    last_return: float  # mean over the last 100 training episodes, or over all if there were fewer
    eval_return: float | None  # mean over the episodes of the evaluation after training, where the script plays any


# --------------------------------------------------------------------------------------- running


def sha256(path: str | Path) -> str:
    """The fingerprint of a file: results of one version of a script are never mixed with those of another."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def describe_machine(script: Path, runs_at_once: int) -> str:
    """One line on where results come from: hardware, versions, commit."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")
        cpu += "".join(f", {gpu.strip()}" for gpu in gpus if gpu)

    def git(*arguments: str) -> str:
        try:
            return subprocess.check_output(["git", *arguments], cwd=script.parent, text=True, stderr=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError):  # no git here, or no repository
            return ""

    commit = git("rev-parse", "--short", "HEAD").strip() or "none"
    dirty = "-dirty" if git("status", "--porcelain", "--", script.name) else ""
    return (
        f"{cpu}, {os.cpu_count()} cores, {runs_at_once} run{'s' * (runs_at_once > 1)} at once; "
        f"Python {platform.python_version()}, torch {version('torch')}, gymnasium {version('gymnasium')}; "
        f"{script.name} of commit {commit}{dirty}"
    )


def run_jobs(jobs: list[Job], name: str, at_once: int, machine: str) -> int:
    """Run the jobs, `at_once` at a time, and note those that end well. Returns how many did not."""
    environment = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // at_once)), **os.environ}  # share the cores
    waiting, running, failures = list(jobs), {}, 0
    progress = tqdm(total=len(jobs), unit=" runs", disable=None)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                folder, command = job.folder(name), shlex.split(job.command)
                checkpoints = list(folder.glob("runs/*/checkpoint.pt"))
                if job.noted(name, "started.json") and len(checkpoints) == 1:  # it was interrupted: go on
                    command += ["--resume", str(checkpoints[0].parent)]
                else:
                    shutil.rmtree(folder, ignore_errors=True)  # what another command left
                    folder.mkdir(parents=True)
                    (folder / "started.json").write_text(json.dumps({"job": asdict(job)}))
                with open(folder / "output.txt", "ab") as output:
                    running[job] = subprocess.Popen(
                        command,
                        cwd=folder,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # a group of its own, to be ended with all its own children
                    )
            time.sleep(0.2)
            progress.refresh()
            for job in [job for job, process in running.items() if process.poll() is not None]:
                process, folder = running.pop(job), job.folder(name)
                try:
                    if process.returncode != 0:
                        raise ValueError(f"exit code {process.returncode}")
                    if sha256(shlex.split(job.command)[1]) != job.script_sha256:
                        raise ValueError("the script was changed since the benchmark began")
                    run = read_run(job.env_id, job.seed, folder)
                    (folder / "finished.json").write_text(json.dumps({"job": asdict(job), "machine": machine}))
                    tqdm.write(f"{job.env_id}, seed {job.seed}: {run.last_return:.2f} in {run.seconds:.0f} s")
                except ValueError as error:
                    failures += 1
                    lines = (folder / "output.txt").read_text(errors="replace").splitlines()[-10:]
                    tqdm.write(f"{job.env_id}, seed {job.seed}: FAILED, {error}. The last lines of its output:")
                    tqdm.write(textwrap.indent("\n".join(lines), "    "))
                progress.update()
    finally:
        progress.close()
        for process in running.values():  # after Ctrl-C: ask them to end, and after ten seconds make them
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return failures


# --------------------------------------------------------------------------------------- reading


def read_run(env_id: str, seed: int, folder: Path) -> Run:
    """Read what a run logged below this folder. Raises ValueError where that is not as expected."""
    for events_dir in sorted({path.parent for path in folder.glob("**/events.out.tfevents.*")}):
        events = EventAccumulator(str(events_dir), size_guidance={"scalars": 0})  # 0: all of them
        events.Reload()
        tags = events.Tags()["scalars"]
        if "charts/episodic_return" in tags:
            break
    else:
        raise ValueError(f"no charts/episodic_return was logged under {os.path.relpath(folder)}")
    charts = {tag: events.Scalars(tag) for tag in tags if tag.startswith("charts/")}
    evaluations = events.Scalars("eval/episodic_return") if "eval/episodic_return" in tags else []

    steps = np.array([event.step for event in charts["charts/episodic_return"]])
    returns = np.array([event.value for event in charts["charts/episodic_return"]])
    if "charts/episodes" in charts:  # an event is the mean of the episodes that ended since the last one
        if [event.step for event in charts["charts/episodes"]] != steps.tolist():
            raise ValueError("charts/episodes and charts/episodic_return were logged at different steps")
        counts = np.diff([event.value for event in charts["charts/episodes"]], prepend=0)
        if (counts <= 0).any():
            raise ValueError("charts/episodes, the number of episodes so far, did not grow")
    else:  # as CleanRL has it, an event for each episode
        counts = np.ones(len(steps))

    # The last 100 episodes, going backwards: of the event in which the hundredth lies, a part.
    seen = np.cumsum(counts[::-1])
    last_counts = (counts[::-1] - (seen - 100).clip(min=0)).clip(min=0)

    last_step = max(series[-1].step for series in charts.values())
    bins = np.ceil(steps * CURVE_POINTS / last_step)
    starts = np.flatnonzero(np.diff(bins, prepend=-1))  # of each bin, its first event
    bin_counts = np.add.reduceat(counts, starts)
    return Run(
        env_id=env_id,
        seed=seed,
        curve_steps=np.append(steps[starts[1:] - 1], steps[-1]),  # of each bin, its last event's
        curve_returns=np.add.reduceat(counts * returns, starts) / bin_counts,
        curve_episodes=bin_counts.astype(int),
        steps=last_step,
        seconds=max(series[-1].wall_time for series in charts.values()) - events.FirstEventTimestamp(),
        last_return=float(np.average(returns[::-1], weights=last_counts)),
        eval_return=evaluations[-1].value if evaluations else None,
    )


def published(env_id: str) -> dict[str, tuple[float, float | None]]:
    """The published numbers for an environment of any version: ALE/Pong-v5 and PongNoFrameskip-v4 are Pong."""
    name = env_id.split(":")[-1].split("/")[-1].rpartition("-v")[0]
    return PUBLISHED.get(name.removesuffix("NoFrameskip"), {})


# --------------------------------------------------------------------------------------- writing


def write_csv(path: Path, runs: list[Run]) -> None:
    """Write every curve, one line for each point."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["env_id", "seed", "step", "episodic_return", "episodes"])
        for run in runs:
            for step, mean, episodes in zip(run.curve_steps, run.curve_returns, run.curve_episodes, strict=True):
                writer.writerow([run.env_id, run.seed, step, f"{mean:.6g}", episodes])


def draw(path: Path, by_env: dict[str, list[Run]], title: str) -> None:
    """Draw one panel for each environment: every run, their mean, and one standard deviation to each side."""
    columns = min(len(by_env), 3)
    rows = -(-len(by_env) // columns)
    figure = Figure(figsize=(7 * columns, 4.5 * rows + 0.5), layout="constrained")
    figure.suptitle(textwrap.fill(title, 75 * columns, break_on_hyphens=False))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, (env_id, runs) in zip(panels, by_env.items(), strict=False):
        grid = np.linspace(0, max(run.steps for run in runs), CURVE_POINTS + 1)
        curves = []
        for run in runs:
            panel.plot(run.curve_steps, run.curve_returns, color="tab:blue", linewidth=0.6, alpha=0.35)
            curves.append(np.interp(grid, run.curve_steps, run.curve_returns, left=np.nan))
        mean, std = np.mean(curves, 0), np.std(curves, 0)  # NaN, so not drawn, until all runs have an episode
        seeds = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
        panel.fill_between(grid, mean - std, mean + std, color="tab:blue", alpha=0.2, linewidth=0)
        panel.plot(grid, mean, color="tab:blue", linewidth=2, label=f"mean ± std of {seeds}; each seed thin")
        styles = (("tab:orange", "--"), ("tab:green", "-."), ("tab:red", ":"))
        for (source, (value, _)), (color, style) in zip(published(env_id).items(), styles, strict=False):
            panel.axhline(value, color=color, linestyle=style, linewidth=1.5, label=f"{source}: {value:g}")
        panel.set(title=env_id, xlabel="environment steps", ylabel="return of training episodes")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right", fontsize="small")
    for panel in panels[len(by_env) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=110)


def make_table(by_env: dict[str, list[Run]]) -> str:
    """The README's table, and the numbers of each seed below it."""
    lines = [
        "| environment | steps | seeds | last 100 training episodes | worst seed "
        "| evaluation | worst seed | seconds per run | published |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    seed_lines = []
    for env_id, runs in by_env.items():
        finals = np.array([run.last_return for run in runs])
        evals = np.array([run.eval_return for run in runs if run.eval_return is not None])
        digits = 1 if abs(finals).max() >= 20 else 3

        def spread(values: np.ndarray, digits: int = digits) -> str:
            if len(values) == 0:
                return "not played | not played"
            return f"{values.mean():.{digits}f} ± {values.std():.{digits}f} | {values.min():.{digits}f}"

        references = [
            f"{source} {mean:g}" + ("" if std is None else f" ± {std:g}")
            for source, (mean, std) in published(env_id).items()
        ]
        steps = " to ".join(f"{steps:,}" for steps in sorted({min(r.steps for r in runs), max(r.steps for r in runs)}))
        seconds = np.mean([run.seconds for run in runs])
        lines.append(
            f"| {env_id} | {steps} | {len(runs)} | {spread(finals)} | {spread(evals)} "
            f"| {seconds:.0f} | {'; '.join(references) or 'none'} |"
        )
        seeds = ", ".join(str(run.seed) for run in runs)
        values = ", ".join(f"{value:.{digits}f}" for value in finals)
        seed_lines.append(f"- {env_id}, last 100 training episodes of seeds {seeds}: {values}.")
    return "\n".join(lines) + "\n\n" + "\n".join(seed_lines)


def write_results_of_runs(args: Args) -> None:
    """Write the results of --runs. Raises UsageError."""
    runs = []
    for folder in args.runs:
        env_id, exp_name, seed, _ = folder.name.split("__")
        try:
            runs.append(read_run(env_id.replace("ALE-", "ALE/"), int(seed), folder))
        except ValueError as error:
            raise UsageError(str(error)) from error
    write(
        args.name, runs, f"{exp_name}.py", "", [f"`{shlex.join(['python', 'benchmark/learning.py', *sys.argv[1:]])}`"]
    )


def write_results(name: str) -> None:
    """Write the results of those runs of `name` that are finished. Raises UsageError."""
    path = ROOT / "runs" / f"benchmark-{name}" / "benchmark.json"
    if not path.is_file():
        raise UsageError(f"there are no runs of --name {name}")
    plan = json.loads(path.read_text())
    jobs = [Job(**job) for job in plan["jobs"]]
    notes = {job: job.noted(name) for job in jobs}
    runs = [read_run(job.env_id, job.seed, job.folder(name)) for job in jobs if notes[job]]
    if not runs:
        raise UsageError(f"no run of --name {name} is finished")
    machines = dict.fromkeys(note["machine"] for note in notes.values() if note)  # usually one
    missing = f"\n\n{len(jobs) - len(runs)} of {len(jobs)} runs are missing." if len(runs) < len(jobs) else ""
    write(name, runs, plan["title"], missing, [*machines, f"`{plan['made_with']}`"])


def write(name: str, runs: list[Run], title: str, missing: str, origins: list[str]) -> None:
    """Write the CSV, the picture and the table of these runs."""
    by_env = {env_id: [run for run in runs if run.env_id == env_id] for env_id in dict.fromkeys(r.env_id for r in runs)}
    RESULTS.mkdir(exist_ok=True)
    write_csv(RESULTS / f"{name}.csv", runs)
    draw(RESULTS / f"{name}.png", by_env, title)
    table = make_table(by_env)
    origin = "\n".join(f"- {line}" for line in origins)
    note = "± is the standard deviation over the seeds; published numbers: see PUBLISHED in benchmark/learning.py."
    (RESULTS / f"{name}.md").write_text(f"{table}{missing}\n\n{note}\n\n{origin}\n")
    print(f"{table}{missing}\n\nwritten: {', '.join(f'benchmark/results/{name}.{x}' for x in ('csv', 'png', 'md'))}")


def main() -> None:
    """The command line."""
    own, separator, flags = sys.argv[1:], [], []
    if "--" in own:
        split = own.index("--")
        own, separator, flags = own[:split], ["--"], own[split + 1 :]
    failures = 0
    try:
        args = tyro.cli(Args, description=__doc__, args=own)
        if args.runs:
            write_results_of_runs(args)
            sys.exit(0)
        if not args.plot_only:
            script = args.script.resolve()
            fingerprint, jobs = sha256(script), []
            for env_id, seed in dict.fromkeys(itertools.product(args.env_ids, args.seeds)):
                command = [sys.executable, str(script), "--env-id", env_id, "--seed", str(seed), *flags]
                jobs.append(Job(env_id, seed, shlex.join(command), fingerprint))
            plan = {
                "made_with": shlex.join(["python", "benchmark/learning.py", *own, *separator, *flags]),
                "title": shlex.join([script.name, *flags]),
                "jobs": [asdict(job) for job in jobs],
            }
            folder = ROOT / "runs" / f"benchmark-{args.name}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "benchmark.json").write_text(json.dumps(plan, indent=1))
            todo = [job for job in jobs if not job.noted(args.name)]
            print(f"{len(todo)} runs to make, {len(jobs) - len(todo)} finished before, in {os.path.relpath(folder)}")
            failures = run_jobs(todo, args.name, args.jobs, describe_machine(script, args.jobs))
        write_results(args.name)
    except UsageError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(1 if failures else 2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    for signum in (signal.SIGINT, signal.SIGTERM):  # on either, end the runs (see run_jobs)
        signal.signal(signum, signal.default_int_handler)
    main()
