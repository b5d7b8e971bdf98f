"""Training speed of a script against Stable-Baselines3's PPO with the same hyperparameters.

    python benchmark/throughput.py                  # takes about ten minutes on an otherwise idle machine
    python benchmark/throughput.py --scenario ppo_atari --repeats 3 --total-timesteps 10240
    python benchmark/throughput.py --scenario ppo_continuous_action
    python benchmark/throughput.py --scenario ppo_lstm  # against sb3-contrib's RecurrentPPO
    python benchmark/throughput.py --cleanrl ../cleanrl  # also CleanRL: a clone with its requirements in .venv

Each measurement runs in its own process. All are taken once in each round, one after the other, and ratios are
those of the same round, so that slow changes of the machine's speed cancel. All runs log with TensorBoard.
Steps per second exclude the first tenth of a run and thus start-up and compilation.

Requirements: pip install -r requirements.txt -r benchmark/requirements.txt
"""

import importlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import tyro
from learning import ROOT, describe_machine, results_path
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Only the workers import torch: Linux counts the memory of a process at the time it starts a child as the child's, so
# that a large process here would hide the peak memory of a small one.

# Spelled out, so that a change of a script's defaults does not change what is measured.
COMMON_FLAGS = "--anneal-lr --norm-adv --clip-vloss --gamma 0.99 --gae-lambda 0.95 --vf-coef 0.5 --max-grad-norm 0.5"


@dataclass
class Scenario:
    """Hyperparameters of a script, and what to measure with them."""

    flags: str
    num_envs: int
    num_steps: int
    num_minibatches: int
    variants: tuple[str, ...]  # flags of the variants to compare
    threads: int = 1  # of torch, and of ALE
    dtypes: tuple[str, ...] = ()  # number formats in which the arithmetic of the network alone is measured

    def arguments(self, variant: str, total_timesteps: int, seed: int) -> list[str]:
        """Command-line arguments of the script."""
        sizes = f"--num-envs {self.num_envs} --num-steps {self.num_steps} --num-minibatches {self.num_minibatches}"
        run = f"--total-timesteps {total_timesteps} --seed {seed} --eval-episodes 1"
        return shlex.split(f"{COMMON_FLAGS} {self.flags} {sizes} {run} {variant}")

    def cleanrl_arguments(self, total_timesteps: int, seed: int) -> list[str]:
        """The same arguments for CleanRL, whose gymnasium has earlier versions of the environments."""
        earlier = {"ALE/Breakout-v5": "ale_py:BreakoutNoFrameskip-v4", "HalfCheetah-v5": "HalfCheetah-v4"}
        *arguments, _, _ = self.arguments("", total_timesteps, seed)  # without --eval-episodes
        return [earlier.get(argument, argument) for argument in arguments]


SCENARIOS = {
    "ppo": Scenario(
        flags="--env-id CartPole-v1 --update-epochs 4 --learning-rate 2.5e-4 --clip-coef 0.2 --ent-coef 0.01",
        num_envs=4,
        num_steps=128,
        num_minibatches=4,
        variants=("", "--compile"),
    ),
    "ppo_atari": Scenario(
        flags="--env-id ALE/Breakout-v5 --update-epochs 4 --learning-rate 2.5e-4 --clip-coef 0.1 --ent-coef 0.01",
        num_envs=8,
        num_steps=128,
        num_minibatches=4,
        variants=("", "--compile", "--no-bfloat16"),
        threads=2,
        dtypes=("bfloat16", "float32"),
    ),
    "ppo_continuous_action": Scenario(
        flags="--env-id HalfCheetah-v5 --update-epochs 10 --learning-rate 3e-4 --clip-coef 0.2 --ent-coef 0",
        num_envs=1,
        num_steps=2048,
        num_minibatches=32,
        variants=("", "--compile"),
    ),
    "ppo_lstm": Scenario(
        flags="--env-id CartPole-v1 --update-epochs 4 --learning-rate 1e-3 --clip-coef 0.2 --ent-coef 0",
        num_envs=8,
        num_steps=128,
        num_minibatches=4,
        variants=("",),
    ),
}


@dataclass
class Args:
    scenario: Literal["ppo", "ppo_atari", "ppo_continuous_action", "ppo_lstm"] = "ppo"  # name of the script
    repeats: int = 5  # number of rounds
    num_envs: int | None = None  # number of environments instead of the scenario's
    total_timesteps: int = 100_000  # steps of each run
    cleanrl: Path | None = None  # clone of CleanRL to measure as well, with its requirements installed in .venv
    record: bool = False  # write benchmark/results/speed/<scenario>.md instead of runs/benchmark-speed/...


# ---------------------------------------------------------------- workers, each in its own process


def load_script(name: str, total_timesteps: int, seed: int):
    """Import the script. Returns the module and its Args."""
    sys.path.insert(0, str(ROOT))
    script, scenario = importlib.import_module(name), SCENARIOS[name]
    return script, tyro.cli(script.Args, args=scenario.arguments("", total_timesteps, seed))


def work_envs(scenario: str, total_timesteps: int, seed: int) -> dict:
    """Step the environments of the script with random actions, without training."""
    script, args = load_script(scenario, total_timesteps, seed)
    envs = script.make_envs(args, args.num_envs)
    envs.reset(seed=seed)
    envs.action_space.seed(seed)
    actions = [envs.action_space.sample() for _ in range(1000)]  # sampled before the clock starts
    manual_reset = envs.metadata["autoreset_mode"].name == "DISABLED"
    start = time.perf_counter()
    for t in range(total_timesteps // args.num_envs):
        _, _, terminations, truncations, _ = envs.step(actions[t % len(actions)])
        if manual_reset and (ended := terminations | truncations).any():
            envs.reset(options={"reset_mask": ended})
    return {"steps_per_second": total_timesteps / (time.perf_counter() - start)}


def work_arithmetic(scenario: str, total_timesteps: int, seed: int, dtype: str) -> dict:
    """Compute the steps per second if the network's multiplications ran as fast as those of a large matrix product.

    Each step takes one forward pass to act, and a forward and a backward pass in each epoch to learn.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    script, args = load_script(scenario, total_timesteps, seed)
    agent = script.Agent(script.make_envs(args, 1))
    observations, actions = torch.zeros(1, 84, 84, 4, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as forward:
        logprobs, _, values = agent.evaluate_actions({"observations": observations, "actions": actions})
    with FlopCounterMode(display=False) as backward:
        (logprobs + values).sum().backward()
    forward_flops, backward_flops = forward.get_total_flops(), backward.get_total_flops()
    flops_per_step = forward_flops + args.update_epochs * (forward_flops + backward_flops)

    matrix = torch.ones(1024, 1024, dtype=getattr(torch, dtype))
    matrix @ matrix  # warm-up
    start, products, seconds = time.perf_counter(), 0, 0.0
    while products < 100 and seconds < 5:  # without hardware for bfloat16, one takes seconds
        matrix @ matrix
        products, seconds = products + 1, time.perf_counter() - start
    flops = products * 2 * 1024**3 / seconds
    return {"steps_per_second": flops / flops_per_step, "flops": flops}


WORKERS = {"envs": work_envs}
WORKERS |= {dtype: partial(work_arithmetic, dtype=dtype) for dtype in ("bfloat16", "float32")}


# ---------------------------------------------------------------------------------------- measurement


def measure(command: list[str], cache_dir: str, threads: int) -> dict:
    """Run a command in an empty folder. Returns its `seconds`, its peak `memory` in MB and what it measured itself.

    The latter is the JSON that a worker prints, and `steps` and `steps_per_second` from the events of a training.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_CACHE_DIR": cache_dir}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)  # unlike process.wait(), returns the peak memory
        process.returncode = os.waitstatus_to_exitcode(status)
        result = {"seconds": time.perf_counter() - start, "memory": usage.ru_maxrss / 1024}  # Linux counts KiB
        output.seek(0)
        lines = output.read().splitlines()
        if process.returncode != 0:
            sys.exit("\n".join([f"{shlex.join(command)} failed with {process.returncode}:", *lines[-10:]]))
        if "worker" in command:
            return result | json.loads(lines[-1])
        for run_dir in Path(folder).glob("runs/*"):  # one
            events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})  # 0: all
            series = events.Reload().Scalars("charts/SPS")
            first, last = next(event for event in series if event.step >= series[-1].step / 10), series[-1]
            result["steps"] = last.step
            result["steps_per_second"] = (last.step - first.step) / (last.wall_time - first.wall_time)
        return result


def measure_all(args: Args, scenario: Scenario, cache_dir: str) -> dict[str, list[dict]]:
    """Measure everything once per round. Returns the results of each variant, peer and worker."""
    script = [sys.executable, str(ROOT / f"{args.scenario}.py")]
    sb3 = [sys.executable, str(ROOT / "benchmark" / "sb3.py"), "--hyperparameters", args.scenario]
    worker = [sys.executable, str(Path(__file__).resolve()), "worker", args.scenario]
    results = {}
    for seed in range(1, args.repeats + 1):
        commands = {x: [*script, *scenario.arguments(x, args.total_timesteps, seed)] for x in scenario.variants}
        commands["sb3"] = [*sb3, *scenario.arguments("", args.total_timesteps, seed)]
        if args.cleanrl is not None:
            folder = args.cleanrl.resolve()
            python = ["env", f"PYTHONPATH={folder}", f"{folder}/.venv/bin/python"]
            cleanrl_arguments = scenario.cleanrl_arguments(args.total_timesteps, seed)
            commands["cleanrl"] = [*python, f"{folder}/cleanrl/{args.scenario}.py", *cleanrl_arguments]
        for name in ("envs", *scenario.dtypes):
            commands[name] = [*worker, name, str(args.total_timesteps), str(seed)]
        print(f"round {seed} of {args.repeats}", flush=True)
        for key, command in commands.items():
            results.setdefault(key, []).append(measure(command, cache_dir, scenario.threads))
    return results


def spread(values: list[float], form: str = ",.0f") -> str:
    """Return the median and the range of some values."""
    median = f"{statistics.median(values):{form}}"
    return median if min(values) == max(values) else f"{median} ({min(values):{form}} to {max(values):{form}})"


def make_report(args: Args, scenario: Scenario, results: dict[str, list[dict]]) -> str:
    """Return a table and a list, in Markdown."""
    speeds = {key: [x["steps_per_second"] for x in xs] for key, xs in results.items()}
    labels = {variant: f"`{f'{args.scenario}.py {variant}'.strip()}`" for variant in scenario.variants}
    labels |= {"sb3": f"Stable-Baselines3 {version('stable-baselines3')}", "cleanrl": "CleanRL", "envs": "the limit"}
    for dtype in scenario.dtypes:
        rate = statistics.median(x["flops"] for x in results[dtype]) / 1e9
        labels[dtype] = f"the network's arithmetic alone, {dtype}, at {rate:,.0f} GFLOP/s"
    lines = ["| | steps/s | times Stable-Baselines3 | share of the limit | peak memory |", "|---|---|---|---|---|"]
    for key, values in speeds.items():
        ratios = [speed / sb3 for speed, sb3 in zip(values, speeds["sb3"], strict=True)]
        shares = [speed / envs for speed, envs in zip(values, speeds["envs"], strict=True)]
        share = "" if key in scenario.dtypes else spread(shares, ".1%")
        memory = f"{max(x['memory'] for x in results[key]):,.0f} MB"
        lines.append(f"| {labels[key]} | {spread(values)} | {spread(ratios, '.2f')} | {share} | {memory} |")
    lines.append("")
    for variant in scenario.variants:  # the first run starts with an empty compilation cache
        first, *later = [x["seconds"] - x["steps"] / x["steps_per_second"] for x in results[variant]]
        again = f", then {statistics.median(later):.1f} s" if later else ""
        lines.append(f"- {labels[variant]}: start-up, compilation and evaluation take {first:.1f} s at first{again}")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    args = tyro.cli(Args, description=__doc__)
    scenario = SCENARIOS[args.scenario]
    if args.num_envs is not None:
        scenario = replace(scenario, num_envs=args.num_envs)
    machine = describe_machine(ROOT / f"{args.scenario}.py", 1)
    with tempfile.TemporaryDirectory() as cache_dir:
        report = make_report(args, scenario, measure_all(args, scenario, cache_dir))
    notes = (
        f"Median (and range) over {args.repeats} rounds; steps per run: {args.total_timesteps:,}; torch threads: "
        f"{scenario.threads}; environments: {scenario.num_envs}. All log, the scripts save checkpoints as well. The "
        "limit: the same environments, stepped with random actions."
    )
    origin = f"- {machine}\n- `{shlex.join(['python', 'benchmark/throughput.py', *sys.argv[1:]])}`"
    path = results_path(f"speed/{args.scenario}", args.record).with_suffix(".md")
    path.write_text(f"{report}\n\n{notes}\n\n{origin}\n")
    print(f"{report}\n\n{notes}\n\n{origin}\n\nwritten: {path}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        _, _, scenario, worker, steps, seed = sys.argv
        print(json.dumps(WORKERS[worker](scenario, int(steps), int(seed))))
    else:
        main()
