"""Seconds from the start of the command to a solved CartPole, beside its peers: a table and a picture.

    python benchmark/solved.py
    python benchmark/solved.py --cleanrl ../cleanrl  # also CleanRL: a clone with its requirements in .venv
    python benchmark/solved.py --purejaxrl ../purejaxrl --jax-python ../purejaxrl/.venv/bin/python  # also PureJaxRL

Solved means a mean return of 475 over 100 episodes. The commands run alternately, one at a time, on an
otherwise idle machine. Imports count, and the cache of torch.compile is warm. PureJaxRL's compilation counts;
"without compiling" is the same runs less the seconds that it took.
Results: runs/benchmark-speed/solved/results.{md,png}; with --record, benchmark/results/speed/solved.{md,png}.

Requirements: pip install -r requirements.txt -r benchmark/requirements.txt
"""

import json
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
    "ppo_vector.py": "ppo_vector.py",
    "Stable-Baselines3, hyperparameters of ppo.py": "benchmark/sb3.py --hyperparameters ppo",
    "Stable-Baselines3, hyperparameters of RL-Zoo": "benchmark/sb3.py --hyperparameters zoo --total-timesteps 100000",
}


def last_100(episodes: list[tuple[float, float, int]], start: float) -> tuple[np.ndarray, np.ndarray]:
    """Seconds since `start` and the mean of the last 100 episodes then, for (time, mean return, episodes) of each."""
    returns = [np.full(count, mean) for _, mean, count in episodes]  # each has the mean of its iteration
    means = [np.concatenate(returns[: i + 1])[-100:].mean() for i in range(len(returns))]
    return np.array([when - start for when, _, _ in episodes]), np.array(means)


def train_purejaxrl(clone: str, python: str, num_envs: int, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """As train(), and the seconds of compiling."""
    script = learning.ROOT / "benchmark" / "purejaxrl.py"
    command = [python, script, "--clone", clone, "--num-envs", str(num_envs), "--seed", str(seed)]
    start = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    return *last_100(result["events"], start), result["compiling"]


def train(command: str, seed: int, limit: float, python: str = sys.executable) -> tuple[np.ndarray, np.ndarray]:
    """Run a command, at most for `limit` seconds. Returns seconds and the mean return of the last 100 episodes then."""
    script, *flags = shlex.split(command)
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        options = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([python, learning.ROOT / script, *flags, "--seed", str(seed)], **options)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        events = EventAccumulator(str(next(learning.Path(folder, "runs").iterdir())), size_guidance={"scalars": 0})
        events.Reload()
        returns = events.Scalars("charts/episodic_return")
        logged = events.Scalars("charts/episodes") if "charts/episodes" in events.Tags()["scalars"] else []
        counts = {event.step: int(event.value) for event in logged}  # CleanRL logs each episode
    return last_100([(event.wall_time, event.value, counts.get(event.step, 1)) for event in returns], start)


def main(
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5),
    limit: float = 90,
    cleanrl: learning.Path | None = None,
    purejaxrl: str | None = None,
    jax_python: str = sys.executable,
    record: bool = False,
) -> None:
    """Run each command with these seeds, at most for `limit` seconds each, and write the results.

    Args:
        seeds: Of the runs.
        limit: Seconds for a run.
        cleanrl: A clone of CleanRL, to run it as well.
        purejaxrl: A clone of PureJaxRL, to run it as well.
        jax_python: The interpreter for it, with the requirements of purejaxrl.py.
        record: Write the results to benchmark/results/speed.
    """
    train("ppo.py --compile --total-timesteps 5000", 1, limit)  # fills the cache
    commands = {label: (command, sys.executable) for label, command in COMMANDS.items()}
    if cleanrl:
        folder = cleanrl.resolve()
        commands["CleanRL"] = (str(folder / "cleanrl" / "ppo.py"), str(folder / ".venv" / "bin" / "python"))
    curves = {label: [] for label in commands}
    for seed in seeds:
        for label, (command, python) in commands.items():
            curves[label].append(train(command, seed, limit, python))
            print(f"seed {seed}, {label}: {curves[label][-1][1].max():.1f}", flush=True)
        for num_envs in (4, 256) if purejaxrl else ():
            label = f"PureJaxRL, {num_envs} copies"
            x, means, compiling = train_purejaxrl(purejaxrl, jax_python, num_envs, seed)
            curves.setdefault(label, []).append((x, means))
            curves.setdefault(f"{label}, without compiling", []).append((x - compiling, means))
            print(f"seed {seed}, {label}: {means.max():.1f}", flush=True)
    seconds = {
        label: np.array([min(x[means >= 475], default=np.inf) for x, means in runs]) for label, runs in curves.items()
    }
    lines = [
        "| command | seeds | solved after, median | fastest | slowest | times ppo.py |",
        "|---|---|---|---|---|---|",
    ]
    for label, x in seconds.items():
        ratio = np.median(x / seconds["ppo.py"])
        row = f"| {label} | {len(x)} | {np.median(x):.1f} s | {x.min():.1f} s | {x.max():.1f} s | {ratio:.2f} |"
        lines.append(row.replace("inf s", "not solved"))
    lines += ["", f"- {learning.describe_machine(learning.ROOT / 'ppo.py', 1)}", ""]
    path = learning.results_path("speed/solved", record)
    path.with_suffix(".md").write_text("\n".join(lines))
    print("\n".join(lines))

    figure = Figure(figsize=(8, 5), layout="constrained")
    panel = figure.subplots()
    shown = {label: runs for label, runs in curves.items() if "without" not in label}
    colors = ("tab:blue", "tab:cyan", "tab:green", "tab:orange", "tab:red", "tab:purple", "tab:brown", "tab:pink")
    for (label, runs), color in zip(shown.items(), colors, strict=False):
        for index, (x, means) in enumerate(runs):
            panel.plot(x, means, color=color, alpha=0.7, label=None if index else label)
    panel.axhline(475, color="gray", linestyle=":", label="solved")
    panel.set(title="CartPole-v1", xlabel="seconds since the start of the command", ylabel="mean of 100 episodes")
    panel.grid(alpha=0.3)
    panel.legend(loc="lower right", fontsize="small")
    figure.savefig(path.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
