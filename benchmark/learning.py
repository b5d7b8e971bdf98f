"""Learning curves of a training script over environments and seeds: a CSV, a picture and a table.

    python benchmark/learning.py --env-ids CartPole-v1 Acrobot-v1 --seeds 1 2 3 --jobs 2 --name classic
    python benchmark/learning.py --script my_fork.py --name my_fork -- --total-timesteps 100000 --ent-coef 0
    python benchmark/learning.py --name pong --runs runs/ALE-Pong-v5__*  # existing runs, finished or not

The results are beside the runs, in runs/benchmark-<name>/; with --record, they are in benchmark/results/.

Flags after `--` are passed to the script. After an interruption, the same command continues: finished runs are
kept, runs with a checkpoint are resumed. The script takes --env-id and --seed and logs `charts/SPS` and
`charts/episodic_return` with TensorBoard under runs/, as the scripts of this repository and those of CleanRL do.

Requirements: pip install -r requirements.txt -r benchmark/requirements.txt
"""

import csv
import hashlib
import itertools
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results"
CURVE_POINTS = 200  # per run, in the CSV and the picture

# Published mean, standard deviation and number of steps by the environment's name without its version. CleanRL, and
# openai/baselines (runs of Huang et al., 2022, quoted by CleanRL): training return, 3 seeds. RL-Zoo: evaluation of one
# agent, standard deviation over its episodes. Tianshou: best evaluation so far, 10 seeds. MuJoCo: version 4, RL-Zoo's
# and Tianshou's 3; LunarLander: version 2.
C, B, Z, T = "CleanRL", "openai/baselines", "RL-Zoo evaluated", "Tianshou, best"
STYLES = {C: ("tab:orange", "--"), B: ("tab:purple", "--"), Z: ("tab:green", "-."), T: ("tab:red", ":")}
PUBLISHED = {
    "CartPole": {C: (490.0, 6.1, 5e5), B: (497.5, 4.0, 5e5), Z: (500.0, 0.0, 1e5)},
    "Acrobot": {C: (-86.4, 1.3, 5e5), B: (-81.8, 5.6, 5e5), Z: (-73.5, 18.2, 1e6)},
    "LunarLander": {Z: (242.1, 31.8, 1e6)},
    "FrozenLake": {"optimum, 4x4": (0.74, None, None)},
    "Taxi": {"optimum": (7.93, None, None)},
    "Breakout": {C: (414.7, 28.1, 1e7), B: (406.6, 31.6, 1e7), Z: (398.0, 33.3, 1e7)},
    "Pong": {C: (20.4, 0.2, 1e7), B: (20.5, 0.5, 1e7), Z: (21.0, 0.1, 1e7)},
    "BeamRider": {C: (1915.9, 484.6, 1e7), B: (2643.0, 670.4, 1e7), Z: (3397.0, 1662.0, 1e7)},
    "HalfCheetah": {C: (1442.6, 46.0, 1e6), Z: (5819.0, 664.0, 1e6), T: (5784.0, 1244.0, 1e6)},
    "Walker2d": {C: (2288.0, 571.8, 1e6), Z: (3479.0, 822.0, 1e6), T: (3589.0, 757.0, 1e6)},
    "Hopper": {C: (2382.9, 271.7, 1e6), Z: (2410.0, 10.0, 1e6), T: (2609.0, 701.0, 1e6)},
    "InvertedPendulum": {C: (963.1, 22.2, 1e6)},
    "Ant": {Z: (1327.0, 452.0, 1e6), T: (3258.0, 1079.0, 1e6)},
    "Humanoid": {C: (716.1, 49.1, 1e6), T: (787.0, 194.0, 1e6)},
    "Pendulum": {Z: (-172.2, 104.2, 1e5)},
    "BipedalWalker": {Z: (287.9, 2.4, 5e6)},
}


@dataclass
class Args:
    script: Path = Path("ppo.py")  # training script
    env_ids: tuple[str, ...] = ("CartPole-v1",)  # environments to train in
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # seeds to train with, in each environment
    jobs: int = 1  # number of runs at the same time
    name: str = "learning"  # name of the results, and of the folder of the runs, runs/benchmark-<name>
    record: bool = False  # write the results to benchmark/results/<name>.* instead of the folder of the runs
    runs: tuple[Path, ...] = ()  # existing run folders, <env_id>__<exp_name>__<seed>__<unix time>, instead of training


@dataclass(frozen=True)
class Job:
    """A training run to make."""

    env_id: str
    seed: int
    command: str
    folder: Path  # working directory of the run

    @property
    def finished(self) -> Path:
        """File that exists once the run has finished. It holds a line about the machine."""
        return self.folder / "finished.txt"


@dataclass
class Run:
    """The data of a run. A point of the curve holds the episodes that ended in 1/CURVE_POINTS of the run."""

    env_id: str
    seed: int
    curve_steps: np.ndarray  # [points], the last step of each point
    curve_returns: np.ndarray  # [points], mean return of the episodes
    curve_episodes: np.ndarray  # [points], number of episodes
    steps: int
    seconds: float  # wall-clock time of training; includes the pause of an interrupted run
    last_return: float  # mean over the last 100 training episodes
    eval_return: float | None  # mean over the episodes of the evaluation, if the script has one


def results_path(name: str, record: bool) -> Path:
    """Return the path of results without its extension, in benchmark/results/ or beside the runs."""
    path = RESULTS / name if record else ROOT / "runs" / f"benchmark-{name}" / "results"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def describe_machine(script: Path, jobs: int) -> str:
    """Return a line with hardware, versions and the commit of the script."""
    hardware = [platform.processor() or platform.machine()]
    if Path("/proc/cpuinfo").is_file():  # Linux, where platform.processor() does not return the model
        hardware = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[:1] or hardware
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        hardware += subprocess.run(query, capture_output=True, text=True).stdout.splitlines()

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=script.parent, capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "none"
    dirty = "-dirty" if git("status", "--porcelain", "--", script.name) else ""
    return (
        f"{', '.join(hardware)}, {os.cpu_count()} cores, {jobs} run{'s' * (jobs > 1)} at once; Python "
        f"{platform.python_version()}, torch {version('torch')}, gymnasium {version('gymnasium')}; "
        f"{script.name} of commit {commit}{dirty}"
    )


def make_jobs(args: Args, flags: list[str]) -> list[Job]:
    """Return one job for each environment and seed."""
    script = args.script.resolve()
    # Results of different versions or flags of a script are not mixed: each version has its own folders.
    fingerprint = hashlib.sha256(script.read_bytes() + shlex.join(flags).encode()).hexdigest()[:8]
    jobs = []
    for env_id, seed in itertools.product(args.env_ids, args.seeds):
        command = [sys.executable, str(script), "--env-id", env_id, "--seed", str(seed), *flags]
        folder = Path(f"benchmark-{args.name}", f"{env_id.replace('/', '-')}__{seed}__{fingerprint}")
        jobs.append(Job(env_id, seed, shlex.join(command), ROOT / "runs" / folder))
    return jobs


def start(job: Job, environment: dict[str, str]) -> subprocess.Popen:
    """Start a run, or resume it if it has a checkpoint."""
    command = shlex.split(job.command)
    if checkpoints := list(job.folder.glob("runs/*/checkpoint.pt")):
        command += ["--resume", str(checkpoints[0].parent)]
    else:
        shutil.rmtree(job.folder, ignore_errors=True)
        job.folder.mkdir(parents=True)
    # In a session of its own, so that Ctrl-C reaches this process only, which then stops the runs.
    options = {"cwd": job.folder, "env": environment, "start_new_session": True}
    with open(job.folder / "output.txt", "a") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)


def run_jobs(jobs: list[Job], at_once: int, machine: str) -> None:
    """Run the jobs, `at_once` at the same time."""
    environment = dict(os.environ)
    if at_once > 1:  # share the cores
        environment.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // at_once)))
    waiting, running = list(jobs), {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                running[job] = start(job, environment)
            time.sleep(0.2)
            for job in [job for job, process in running.items() if process.poll() is not None]:
                if running.pop(job).returncode == 0:
                    job.finished.write_text(machine)
                    print(f"{job.folder.name} finished, {len(waiting) + len(running)} to go", flush=True)
                else:
                    output = (job.folder / "output.txt").read_text().splitlines()
                    print("\n    ".join([f"{job.command} failed:", *output[-10:]]), flush=True)
    finally:
        for process in running.values():  # the scripts of this repository save a checkpoint before they exit
            process.terminate()
        for process in running.values():
            process.wait()


def read_run(env_id: str, seed: int, folder: Path) -> Run:
    """Read the events of the run in this folder or below."""
    paths = sorted(folder.glob("**/events.out.tfevents.*"))
    events = EventAccumulator(str(paths[0].parent if paths else folder), size_guidance={"scalars": 0})  # 0: all
    events.Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    if "charts/episodic_return" not in scalars:
        sys.exit(f"{folder} has no events with charts/episodic_return")
    steps = np.array([event.step for event in scalars["charts/episodic_return"]])
    returns = np.array([event.value for event in scalars["charts/episodic_return"]])
    # Each event is a mean over this number of episodes. CleanRL logs every episode and has no charts/episodes.
    num_episodes = {event.step: event.value for event in scalars.get("charts/episodes", [])}
    counts = np.array([num_episodes.get(step, 1) for step in steps])
    evaluations, last = scalars.get("eval/episodic_return"), scalars["charts/SPS"][-1]

    later = np.cumsum(counts[::-1])[::-1] - counts  # episodes after those of each event
    last_counts = np.clip(100 - later, 0, counts)  # those among the last 100 episodes
    points = np.ceil(steps * CURVE_POINTS / last.step).astype(int)
    point_counts = np.bincount(points, counts)
    filled = np.flatnonzero(point_counts)
    return Run(
        env_id=env_id,
        seed=seed,
        curve_steps=filled * last.step // CURVE_POINTS,
        curve_returns=np.bincount(points, counts * returns)[filled] / point_counts[filled],
        curve_episodes=point_counts[filled].astype(int),
        steps=last.step,
        seconds=last.wall_time - events.FirstEventTimestamp(),
        last_return=float(np.average(returns, weights=last_counts)),
        eval_return=evaluations[-1].value if evaluations else None,
    )


def published(env_id: str, steps: int) -> dict[str, tuple[float, float | None]]:
    """Return the published numbers of an environment at about this number of steps. ALE/Pong-v5 is Pong."""
    name = env_id.split(":")[-1].split("/")[-1].rpartition("-v")[0].removesuffix("NoFrameskip")
    numbers = PUBLISHED.get(name, {}).items()
    return {source: (mean, std) for source, (mean, std, at) in numbers if at is None or abs(steps / at - 1) < 0.05}


def write_csv(path: Path, runs: list[Run]) -> None:
    """Write the curves, one line per point."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["env_id", "seed", "step", "episodic_return", "episodes"])
        for run in runs:
            for step, mean, episodes in zip(run.curve_steps, run.curve_returns, run.curve_episodes, strict=True):
                writer.writerow([run.env_id, run.seed, step, f"{mean:.6g}", episodes])


def draw(path: Path, by_env: dict[str, list[Run]], title: str) -> None:
    """Draw the curves, one panel per environment."""
    columns = min(len(by_env), 3)
    rows = -(-len(by_env) // columns)
    figure = Figure(figsize=(7 * columns, 4.5 * rows + 0.5), layout="constrained")
    figure.suptitle(textwrap.fill(title, 75 * columns, break_on_hyphens=False))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(by_env) :]:
        panel.set_axis_off()
    for panel, (env_id, runs) in zip(panels, by_env.items(), strict=False):
        grid = np.linspace(0, max(run.steps for run in runs), CURVE_POINTS + 1)
        curves = []
        for run in runs:
            panel.plot(run.curve_steps, run.curve_returns, color="tab:blue", linewidth=0.6, alpha=0.35)
            curves.append(np.interp(grid, run.curve_steps, run.curve_returns, left=np.nan))
        # NaN, thus not drawn, until all runs have an episode
        mean, std = np.mean(curves, 0), np.std(curves, 0, ddof=int(len(curves) > 1))
        label = f"mean ± std of {len(runs)} seed{'s' * (len(runs) > 1)}; each seed thin"
        panel.fill_between(grid, mean - std, mean + std, color="tab:blue", alpha=0.2, linewidth=0)
        panel.plot(grid, mean, color="tab:blue", linewidth=2, label=label)
        references = published(env_id, max(run.steps for run in runs))
        for source, (value, _) in references.items():
            color, style = STYLES.get(source, ("black", "--"))
            panel.axhline(value, color=color, linestyle=style, linewidth=1.5, label=f"{source}: {value:g}")
        panel.set(title=env_id, xlabel="environment steps", ylabel="return of training episodes")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.grid(alpha=0.3)
        panel.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2, frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


def spread(values: list[float], digits: int = 1) -> str:
    """Return mean and sample standard deviation, or the values if these are at most two."""
    if len(values) < 3:
        return " and ".join(f"{value:.{digits}f}" for value in values) or "none"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def make_table(by_env: dict[str, list[Run]]) -> str:
    """Return a Markdown table with one row per environment, and below it the numbers of each seed."""
    columns = ("environment", "steps", "seeds", "last 100 training episodes", "worst seed", "evaluation", "worst seed")
    columns = (*columns, "seconds per run", "published")
    lines, seed_lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"], []
    for env_id, runs in by_env.items():
        lasts = np.array([run.last_return for run in runs])
        evals = np.array([run.eval_return for run in runs if run.eval_return is not None])
        digits = 1 if abs(lasts).max() >= 20 else 3
        steps = sorted(run.steps for run in runs)
        cells = [env_id, " to ".join(f"{x:,}" for x in sorted({steps[0], steps[-1]})), str(len(runs))]
        for values in (lasts, evals):
            cells += [spread(values, digits)]
            cells += [f"{values.min():.{digits}f}" if len(values) else "none"]
        cells.append(f"{np.mean([run.seconds for run in runs]):.0f}")
        references = [
            f"{source} {mean:g}" + ("" if std is None else f" ± {std:g}")
            for source, (mean, std) in published(env_id, steps[-1]).items()
        ]
        cells.append("; ".join(references) or "none")
        lines.append(f"| {' | '.join(cells)} |")
        values = ", ".join(f"{run.last_return:.{digits}f} (seed {run.seed})" for run in runs)
        seed_lines.append(f"- {env_id}, last 100 training episodes: {values}")
    return "\n".join([*lines, "", *seed_lines])


def write_results(args: Args, runs: list[Run], title: str, origins: list[str]) -> None:
    """Write the CSV, the picture and the table of these runs. `origins` is listed below the table."""
    path = results_path(args.name, args.record)
    by_env = {env_id: [run for run in runs if run.env_id == env_id] for env_id in dict.fromkeys(r.env_id for r in runs)}
    write_csv(Path(f"{path}.csv"), runs)
    draw(Path(f"{path}.png"), by_env, title)
    note = "± is the sample standard deviation over the seeds; published numbers: PUBLISHED in benchmark/learning.py."
    report = "\n".join([make_table(by_env), "", note, "", *(f"- {line}" for line in origins)])
    Path(f"{path}.md").write_text(f"{report}\n")
    print(f"{report}\n\nwritten: {path}.csv, .png, .md")


def main() -> None:
    """The command line."""
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    flags = sys.argv[split + 1 :]
    args = tyro.cli(Args, description=__doc__, args=sys.argv[1:split])
    command = f"`{shlex.join(['python', 'benchmark/learning.py', *sys.argv[1:]])}`"

    if args.runs:
        runs = []
        for folder in args.runs:
            env_id, exp_name, seed, _ = folder.name.split("__")
            runs.append(read_run(env_id.replace("ALE-", "ALE/"), int(seed), folder))
        write_results(args, runs, f"{exp_name}.py", [command])
        return

    jobs = make_jobs(args, flags)
    todo = [job for job in jobs if not job.finished.is_file()]
    print(f"{len(todo)} runs to make, {len(jobs) - len(todo)} finished before, in {jobs[0].folder.parent}")
    try:
        run_jobs(todo, args.jobs, describe_machine(args.script.resolve(), args.jobs))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")
    done = [job for job in jobs if job.finished.is_file()]
    if done:
        origins = [*dict.fromkeys(job.finished.read_text() for job in done), command]
        if len(done) < len(jobs):
            origins.append(f"{len(jobs) - len(done)} of {len(jobs)} runs are missing")
        runs = [read_run(job.env_id, job.seed, job.folder) for job in done]
        write_results(args, runs, shlex.join([args.script.name, *flags]), origins)
    sys.exit(len(done) < len(jobs))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the runs, as after Ctrl-C
    main()
