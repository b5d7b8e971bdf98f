"""Seconds from the start of the command to a solved CartPole, beside Stable-Baselines3: a table and a picture.

    python benchmark/solved.py

Solved means a mean return of 475 over 100 episodes. The commands run alternately, one at a time, on an
otherwise idle machine. Imports count, and the cache of torch.compile is warm.
Results: benchmark/results/solved.{md,png}.

Requirements: pip install -r requirements.txt -r benchmark/requirements.txt
"""

import shlex
import subprocess
import sys
import tempfile
import time

import learning
import numpy as np
import tyro
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COMMANDS = {
    "ppo.py": "ppo.py",
    "ppo.py --compile": "ppo.py --compile",
    "Stable-Baselines3, hyperparameters of ppo.py": "benchmark/sb3.py --hyperparameters ppo",
    "Stable-Baselines3, hyperparameters of RL-Zoo": "benchmark/sb3.py --hyperparameters zoo --total-timesteps 100000",
}


def train(command: str, seed: int, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Run a command, at most for `limit` seconds. Returns seconds and the mean return of the last 100 episodes then."""
    script, *flags = shlex.split(command)
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        options = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([sys.executable, learning.ROOT / script, *flags, "--seed", str(seed)], **options)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        events = EventAccumulator(str(next(learning.Path(folder, "runs").iterdir())), size_guidance={"scalars": 0})
        events.Reload()
        returns = events.Scalars("charts/episodic_return")
        counts = {event.step: int(event.value) for event in events.Scalars("charts/episodes")}
    episodes = [np.full(counts[event.step], event.value) for event in returns]  # each has the mean of its iteration
    means = [np.concatenate(episodes[: i + 1])[-100:].mean() for i in range(len(episodes))]
    return np.array([event.wall_time - start for event in returns]), np.array(means)


def main(seeds: tuple[int, ...] = (1, 2, 3, 4, 5), limit: float = 90) -> None:
    """Run each command with these seeds, at most for `limit` seconds each, and write the results."""
    train("ppo.py --compile --total-timesteps 5000", 1, limit)  # fills the cache
    curves = {label: [] for label in COMMANDS}
    for seed in seeds:
        for label, command in COMMANDS.items():
            curves[label].append(train(command, seed, limit))
            print(f"seed {seed}, {label}: {curves[label][-1][1].max():.1f}", flush=True)
    seconds = {
        label: np.array([min(x[means >= 475], default=np.inf) for x, means in runs]) for label, runs in curves.items()
    }
    lines = [
        "| command | seeds | solved after, median | fastest | slowest | times ppo.py |",
        "|---|---|---|---|---|---|",
    ]
    for label, x in seconds.items():
        ratio = np.median(x / seconds["ppo.py"])
        lines.append(f"| {label} | {len(x)} | {np.median(x):.1f} s | {x.min():.1f} s | {x.max():.1f} s | {ratio:.2f} |")
    lines += ["", f"- {learning.describe_machine(learning.ROOT / 'ppo.py', 1)}", ""]
    (learning.RESULTS / "solved.md").write_text("\n".join(lines))
    print("\n".join(lines))

    figure = Figure(figsize=(8, 5), layout="constrained")
    panel = figure.subplots()
    for (label, runs), color in zip(curves.items(), ("tab:blue", "tab:cyan", "tab:orange", "tab:red"), strict=True):
        for index, (x, means) in enumerate(runs):
            panel.plot(x, means, color=color, alpha=0.7, label=None if index else label)
    panel.axhline(475, color="gray", linestyle=":", label="solved")
    panel.set(title="CartPole-v1", xlabel="seconds since the start of the command", ylabel="mean of 100 episodes")
    panel.grid(alpha=0.3)
    panel.legend(loc="lower right", fontsize="small")
    figure.savefig(learning.RESULTS / "solved.png", dpi=110)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
