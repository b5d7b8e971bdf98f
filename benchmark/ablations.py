"""What a detail, or a proposal of a paper, is worth: training without or with it, beside the default.

    python benchmark/ablations.py details --jobs 2                        # all runs
    python benchmark/ablations.py details --jobs 2 --env-ids CartPole-v1  # one environment
    python benchmark/ablations.py screen --jobs 2     # all proposals with two seeds
    python benchmark/ablations.py proposals --jobs 2  # the chosen ones with five others

A variant is a file in benchmark/ablations/{details,proposals}/<script>: flags or a diff of the script. The same command
continues after an interruption. Results: runs/benchmark-details/<question>/results.{csv,md,png}; with --record,
benchmark/results/details/<question>.{csv,md,png}.

Requirements: pip install -r requirements.txt -r benchmark/requirements.txt
"""

import csv
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import learning
import numpy as np
import tyro
from matplotlib.figure import Figure
from scipy.stats import ttest_ind

SUITES = {  # environment: script and flags of all its runs
    "CartPole-v1": ("ppo", []),
    "LunarLander-v3": ("ppo", ["--total-timesteps", "1000000", "--compile"]),
    "HalfCheetah-v5": ("ppo_continuous_action", ["--compile"]),
    "Hopper-v5": ("ppo_continuous_action", ["--compile"]),
    "Ant-v5": ("ppo_continuous_action", ["--compile"]),
}
QUESTIONS = {  # folder of the variants, environments, seeds of the default, seeds of a variant
    "details": ("details", ("CartPole-v1", "LunarLander-v3", "HalfCheetah-v5"), range(1, 11), range(1, 6)),
    "screen": ("proposals", ("LunarLander-v3", "HalfCheetah-v5", "Hopper-v5"), (201, 202), (201, 202)),
    "proposals": ("proposals", ("LunarLander-v3", "HalfCheetah-v5", "Hopper-v5", "Ant-v5"), range(1, 6), range(1, 6)),
}
FINALISTS = ("gradients_clipped_apart", "spo_loss", "layer_norm", "advantages_each_epoch", "critic_256_silu")


def make_variants(script: str, question: str, folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """Return the path of the script, copied to `folder` and patched, and the flags of each variant."""
    folder.mkdir(parents=True, exist_ok=True)
    variants = {"default": (learning.ROOT / f"{script}.py", [])}
    for file in sorted(Path(learning.ROOT, "benchmark", "ablations", QUESTIONS[question][0], script).iterdir()):
        if question == "proposals" and file.stem not in FINALISTS:
            continue
        if file.suffix == ".diff":
            path = folder / f"{script}__{file.stem}.py"
            subprocess.run(["patch", "--silent", "-F0", "--output", path, variants["default"][0], file], check=True)
            variants[file.stem] = (path, [])
        else:
            variants[file.stem] = (variants["default"][0], file.read_text().split())
    return variants


def steps_to(run: learning.Run, threshold: float) -> int:
    """Return the step at which the mean of the last 100 episodes first reaches the threshold, or the last step."""
    for end in range(1, len(run.curve_steps) + 1):
        counts, returns = run.curve_episodes[:end][::-1], run.curve_returns[:end][::-1]
        weights = np.clip(100 - (np.cumsum(counts) - counts), 0, counts)
        if weights.sum() == 100 and weights @ returns >= 100 * threshold:
            return run.curve_steps[end - 1]
    return run.steps


def compare(values: dict[str, list[float]]) -> dict[str, str]:
    """Return a table cell per variant: mean, standard deviation, difference to the default, Welch's p (Holm, 1979).

    With two seeds, both values instead of the standard deviation and p.
    """
    if len(values["default"]) < 3:
        return {name: learning.spread(x) for name, x in values.items()}
    default, names = values["default"], [name for name in values if name != "default"]
    p_values = np.array([ttest_ind(default, values[name], equal_var=False).pvalue for name in names])
    p_values = np.nan_to_num(p_values, nan=1.0)  # NaN: all runs have the same value
    order = np.argsort(p_values)
    p_values[order] = np.maximum.accumulate(p_values[order] * np.arange(len(names), 0, -1)).clip(max=1)
    cells = {name: learning.spread(x) for name, x in values.items()}
    for name, p_value in zip(names, p_values, strict=True):
        cells[name] += f" ({np.mean(values[name]) - np.mean(default):+,.1f}, p {p_value:.2g})"
    return cells


def write_results(path: Path, seeds: range, values: dict[str, dict[str, list[float]]], machines: list[str]) -> None:
    """Write the values[result][variant], one per seed, as a table, a CSV and a picture."""
    columns = {result: compare(x) for result, x in values.items()}
    lines = [f"| variant | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in dict.fromkeys(name for x in values.values() for name in x):
        lines.append(f"| {name} | {' | '.join(cells.get(name, '') for cells in columns.values())} |")
    lines += ["", "In brackets: difference to default; p of Welch's test with Holm's correction.", "", *machines, ""]
    path.with_suffix(".md").write_text("\n".join(lines))
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        rows = [[result, name, *x] for result, variants in values.items() for name, x in variants.items()]
        csv.writer(file, lineterminator="\n").writerows([["result", "variant", *seeds], *rows])
    figure = Figure(figsize=(12, 8), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    for panel in panels[len(values) :]:
        panel.set_axis_off()
    for panel, (result, x) in zip(panels, values.items(), strict=False):
        panel.axvspan(min(x["default"]), max(x["default"]), color="tab:blue", alpha=0.2, linewidth=0)
        for row, points in enumerate(x.values()):
            panel.plot(points, [row] * len(points), ".", color="tab:orange" if row else "tab:blue")
            panel.plot(np.mean(points), row, "|", color="black", markersize=16)
        panel.set_yticks(range(len(x)), [name.replace("_", " ") for name in x])
        panel.invert_yaxis()
        panel.set_xlabel(result)
    figure.savefig(path.with_suffix(".png"), dpi=110)


def main(
    question: tyro.conf.Positional[Literal["details", "screen", "proposals"]],
    env_ids: tuple[str, ...] = (),
    jobs: int = 1,
    record: bool = False,
) -> None:
    """Train for this question in these environments (none: all), with this number of runs at the same time."""
    _, all_env_ids, default_seeds, variant_seeds = QUESTIONS[question]
    values, machines = {}, {}
    for env_id in all_env_ids:
        script, flags = SUITES[env_id]
        variants = make_variants(script, question, learning.ROOT / "runs" / "ablations")
        groups = {}
        for name, (path, variant_flags) in variants.items():
            seeds = tuple(default_seeds if name == "default" else variant_seeds)
            job_args = learning.Args(path, (env_id,), seeds, name=f"ablations/{name}")
            groups[name] = learning.make_jobs(job_args, flags + variant_flags)
        if env_id in (env_ids or all_env_ids):
            todo = [job for group in groups.values() for job in group if not job.finished.is_file()]
            machine = learning.describe_machine(learning.ROOT / f"{script}.py", jobs)
            learning.run_jobs(sorted(todo, key=lambda job: job.seed), jobs, machine)
        for name, group in groups.items():
            done = [job for job in group if job.finished.is_file()]
            runs = [learning.read_run(env_id, job.seed, job.folder) for job in done]
            machines |= dict.fromkeys(job.finished.read_text() for job in done)
            if runs:
                result = f"{env_id}, return of the last 100 episodes"
                values.setdefault(result, {})[name] = [run.last_return for run in runs]
            if runs and env_id == "CartPole-v1":  # most variants end at 500
                values.setdefault(f"{env_id}, steps to 475", {})[name] = [steps_to(run, 475) for run in runs]
    path = learning.results_path(f"details/{question}", record)
    write_results(path, default_seeds, values, list(machines))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the runs, as after Ctrl-C
    try:
        tyro.cli(main, description=__doc__)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")
