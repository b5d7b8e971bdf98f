"""Training speed of a script against Stable-Baselines3's PPO with the same hyperparameters.

    python benchmark/throughput.py                  # takes about ten minutes on an otherwise idle machine
    python benchmark/throughput.py --scenario ppo_atari --repeats 3 --total-timesteps 10240 --name throughput_atari
    python benchmark/throughput.py --scenario ppo_continuous_action --name throughput_continuous_action
    python benchmark/throughput.py --scenario ppo_lstm --name throughput_lstm  # against sb3-contrib's RecurrentPPO
    python benchmark/throughput.py --cleanrl ../cleanrl  # also CleanRL: a clone with its requirements in .venv

Each measurement runs in its own process. All are taken once in each round, one after the other, and ratios are
those of the same round, so that slow changes of the machine's speed cancel. The script runs as usual, with
TensorBoard and checkpoints. Steps per second exclude the first tenth of a run and thus start-up and compilation.

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
from learning import RESULTS, ROOT, describe_machine
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Only the workers import torch and stable_baselines3: Linux counts the memory of a process at the time it starts
# a child as the child's, so that a large process here would hide the peak memory of a small one.

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
    more_envs: tuple[int, ...]  # further numbers of environments
    more_variants: tuple[str, ...]  # variants to measure with these
    more_iterations: int  # minimum number of iterations with these
    threads: int = 1  # of torch, and of ALE
    dtypes: tuple[str, ...] = ()  # number formats in which the arithmetic of the network alone is measured

    def arguments(self, variant: str, num_envs: int, total_timesteps: int, seed: int) -> list[str]:
        """Command-line arguments of the script."""
        sizes = f"--num-envs {num_envs} --num-steps {self.num_steps} --num-minibatches {self.num_minibatches}"
        run = f"--total-timesteps {total_timesteps} --seed {seed} --eval-episodes 1"
        return shlex.split(f"{COMMON_FLAGS} {self.flags} {sizes} {run} {variant}")

    def cleanrl_arguments(self, total_timesteps: int, seed: int) -> list[str]:
        """The same arguments for CleanRL, whose gymnasium has earlier versions of the environments."""
        earlier = {"ALE/Breakout-v5": "ale_py:BreakoutNoFrameskip-v4", "HalfCheetah-v5": "HalfCheetah-v4"}
        *arguments, _, _ = self.arguments("", self.num_envs, total_timesteps, seed)  # without --eval-episodes
        return [earlier.get(argument, argument) for argument in arguments]


SCENARIOS = {
    "ppo": Scenario(
        flags="--env-id CartPole-v1 --update-epochs 4 --learning-rate 2.5e-4 --clip-coef 0.2 --ent-coef 0.01",
        num_envs=4,
        num_steps=128,
        num_minibatches=4,
        variants=("", "--compile"),
        more_envs=(16, 64),
        more_variants=("", "--compile"),
        more_iterations=50,
    ),
    "ppo_atari": Scenario(
        flags="--env-id ALE/Breakout-v5 --update-epochs 4 --learning-rate 2.5e-4 --clip-coef 0.1 --ent-coef 0.01",
        num_envs=8,
        num_steps=128,
        num_minibatches=4,
        variants=("", "--compile", "--no-bfloat16"),
        more_envs=(32, 128),
        more_variants=("",),
        more_iterations=5,
        threads=2,
        dtypes=("bfloat16", "float32"),
    ),
    "ppo_continuous_action": Scenario(
        flags="--env-id HalfCheetah-v5 --update-epochs 10 --learning-rate 3e-4 --clip-coef 0.2 --ent-coef 0",
        num_envs=1,
        num_steps=2048,
        num_minibatches=32,
        variants=("", "--compile"),
        more_envs=(8,),
        more_variants=("", "--compile"),
        more_iterations=10,
    ),
    "ppo_lstm": Scenario(
        flags="--env-id CartPole-v1 --update-epochs 4 --learning-rate 1e-3 --clip-coef 0.2 --ent-coef 0",
        num_envs=8,
        num_steps=128,
        num_minibatches=4,
        variants=("",),
        more_envs=(16, 64),
        more_variants=("",),
        more_iterations=10,
    ),
}


@dataclass
class Args:
    scenario: Literal["ppo", "ppo_atari", "ppo_continuous_action", "ppo_lstm"] = "ppo"  # name of the script
    repeats: int = 5  # number of rounds
    total_timesteps: int = 100_000  # steps of each run; more with many environments, see Scenario.more_iterations
    more_envs: tuple[int, ...] | None = None  # further numbers of environments; by default those of the scenario
    cleanrl: Path | None = None  # clone of CleanRL to measure as well, with its requirements installed in .venv
    name: str = "throughput"  # name of the result, benchmark/results/<name>.md


# ---------------------------------------------------------------- workers, each in its own process


def load_script(name: str, total_timesteps: int, seed: int):
    """Import the script. Returns the module and its Args."""
    sys.path.insert(0, str(ROOT))
    script, scenario = importlib.import_module(name), SCENARIOS[name]
    return script, tyro.cli(script.Args, args=scenario.arguments("", scenario.num_envs, total_timesteps, seed))


def work_sb3(scenario: str, total_timesteps: int, seed: int) -> dict:
    """Train with Stable-Baselines3, with the script's hyperparameters and environment wrappers.

    What is not given has the same value by default: networks, Adam's epsilon, normalized advantages. The recurrent
    networks are smaller than the script's: they lack the layer before the LSTM.
    """
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

    _, args = load_script(scenario, total_timesteps, seed)
    policy, options = "CnnPolicy" if scenario == "ppo_atari" else "MlpPolicy", {}
    if scenario == "ppo_lstm":
        from sb3_contrib import RecurrentPPO as PPO

        policy, options = "MlpLstmPolicy", {"policy_kwargs": {"lstm_hidden_size": 64, "net_arch": []}}
    if scenario == "ppo_atari":  # the script has imported ale_py, which registers the game
        envs = VecFrameStack(make_atari_env("BreakoutNoFrameskip-v4", args.num_envs, seed=seed), 4)
    else:
        envs = make_vec_env(args.env_id, args.num_envs, seed=seed)
    if scenario == "ppo_continuous_action":
        envs = VecNormalize(envs, gamma=args.gamma)
    model = PPO(
        policy,
        envs,
        learning_rate=lambda remaining: args.learning_rate * remaining,
        n_steps=args.num_steps,
        batch_size=args.num_envs * args.num_steps // args.num_minibatches,
        n_epochs=args.update_epochs,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        clip_range=args.clip_coef,
        clip_range_vf=args.clip_coef,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm,
        seed=seed,
        device="cpu",
        **options,
    )
    model.learn(total_timesteps // 10)
    warm_up_steps, start = model.num_timesteps, time.perf_counter()
    model.learn(total_timesteps - warm_up_steps, reset_num_timesteps=False)
    return {"steps_per_second": (model.num_timesteps - warm_up_steps) / (time.perf_counter() - start)}


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

    matrix = torch.ones(2048, 2048, dtype=getattr(torch, dtype))
    matrix @ matrix  # warm-up
    start = time.perf_counter()
    for _ in range(20):
        matrix @ matrix
    flops = 20 * 2 * 2048**3 / (time.perf_counter() - start)
    return {"steps_per_second": flops / flops_per_step, "flops": flops}


WORKERS = {"sb3": work_sb3, "envs": work_envs}
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
        for run_dir in Path(folder).glob("runs/*"):  # one, or none after --help
            events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})  # 0: all
            series = events.Reload().Scalars("charts/SPS")
            first, last = next(event for event in series if event.step >= series[-1].step / 10), series[-1]
            result["steps"] = last.step
            result["steps_per_second"] = (last.step - first.step) / (last.wall_time - first.wall_time)
        return result


def measure_all(args: Args, scenario: Scenario, cache_dir: str) -> dict[str | tuple[str, int], list[dict]]:
    """Measure everything once per round. Returns the results of each worker and of each variant and num_envs."""
    script = [sys.executable, str(ROOT / f"{args.scenario}.py")]
    worker = [sys.executable, str(Path(__file__).resolve()), "worker", args.scenario]
    results = {}
    for seed in range(1, args.repeats + 1):
        commands, num_envs = {}, scenario.num_envs
        for variant in scenario.variants:
            commands[variant, num_envs] = [*script, *scenario.arguments(variant, num_envs, args.total_timesteps, seed)]
        for name in ("sb3", "envs", *scenario.dtypes):  # next to the runs that they are compared with
            commands[name] = [*worker, name, str(args.total_timesteps), str(seed)]
        if args.cleanrl is not None:
            folder = args.cleanrl.resolve()
            python = ["env", f"PYTHONPATH={folder}", f"{folder}/.venv/bin/python"]
            cleanrl_arguments = scenario.cleanrl_arguments(args.total_timesteps, seed)
            commands["cleanrl"] = [*python, f"{folder}/cleanrl/{args.scenario}.py", *cleanrl_arguments]
        for num_envs in scenario.more_envs:
            total_timesteps = max(args.total_timesteps, scenario.more_iterations * num_envs * scenario.num_steps)
            for variant in scenario.more_variants:
                commands[variant, num_envs] = [*script, *scenario.arguments(variant, num_envs, total_timesteps, seed)]
        commands["help"] = [*script, "--help"]
        print(f"round {seed} of {args.repeats}", flush=True)
        for key, command in commands.items():
            results.setdefault(key, []).append(measure(command, cache_dir, scenario.threads))
    return results


def spread(values: list[float], form: str = ",.0f") -> str:
    """Return the median and the range of some values."""
    median = f"{statistics.median(values):{form}}"
    return median if min(values) == max(values) else f"{median} ({min(values):{form}} to {max(values):{form}})"


def make_report(args: Args, scenario: Scenario, results: dict[str | tuple[str, int], list[dict]]) -> str:
    """Return two tables and a list, in Markdown."""
    speeds = {key: [x["steps_per_second"] for x in xs] for key, xs in results.items() if key != "help"}
    names = {variant: f"`{f'{args.scenario}.py {variant}'.strip()}`" for variant in scenario.variants}
    labels = {(variant, scenario.num_envs): name for variant, name in names.items()}
    labels["sb3"] = f"Stable-Baselines3 {version('stable-baselines3')}"
    if args.cleanrl is not None:
        labels["cleanrl"] = "CleanRL"
    labels["envs"] = "the limit"
    for dtype in scenario.dtypes:
        rate = statistics.median(x["flops"] for x in results[dtype]) / 1e9
        labels[dtype] = f"the network's arithmetic alone, {dtype}, at {rate:,.0f} GFLOP/s"
    lines = ["| | steps/s | times Stable-Baselines3 | share of the limit |", "|---|---|---|---|"]
    for key, label in labels.items():
        ratios = [speed / sb3 for speed, sb3 in zip(speeds[key], speeds["sb3"], strict=True)]
        shares = [speed / envs for speed, envs in zip(speeds[key], speeds["envs"], strict=True)]
        share = "" if key in scenario.dtypes else spread(shares, ".1%")
        lines.append(f"| {label} | {spread(speeds[key])} | {spread(ratios, '.2f')} | {share} |")

    lines += ["", "| | environments | minibatch | steps/s | µs per step | peak memory |", "|---|---|---|---|---|---|"]
    for variant, num_envs in [key for key in results if isinstance(key, tuple)]:
        values = speeds[variant, num_envs]
        memory = max(x["memory"] for x in results[variant, num_envs])
        lines.append(
            f"| {names[variant]} | {num_envs} | {num_envs * scenario.num_steps // scenario.num_minibatches} "
            f"| {spread(values)} | {1e6 / statistics.median(values):,.1f} | {memory:,.0f} MB |"
        )

    lines.append("")
    for variant, name in names.items():  # the first run starts with an empty compilation cache
        runs = results[variant, scenario.num_envs]
        first, *later = [x["seconds"] - x["steps"] / x["steps_per_second"] for x in runs]
        again = f", then {statistics.median(later):.1f} s" if later else ""
        lines.append(f"- {name}: start-up, compilation and evaluation take {first:.1f} s at first{again}")
    lines.append(f"- Stable-Baselines3's peak memory: {max(x['memory'] for x in results['sb3']):,.0f} MB")
    lines.append(f"- `{args.scenario}.py --help`: {spread([x['seconds'] for x in results['help']], '.2f')} s")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    args = tyro.cli(Args, description=__doc__)
    scenario = SCENARIOS[args.scenario]
    if args.more_envs is not None:
        scenario = replace(scenario, more_envs=args.more_envs)
    machine = describe_machine(ROOT / f"{args.scenario}.py", 1)
    with tempfile.TemporaryDirectory() as cache_dir:
        report = make_report(args, scenario, measure_all(args, scenario, cache_dir))
    notes = (
        f"Median (and range) over {args.repeats} rounds; steps per run: {args.total_timesteps:,}; torch threads: "
        f"{scenario.threads}. The script logs and saves checkpoints, Stable-Baselines3 only trains. The limit: the "
        "same environments, stepped with random actions."
    )
    origin = f"- {machine}\n- `{shlex.join(['python', 'benchmark/throughput.py', *sys.argv[1:]])}`"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.md").write_text(f"{report}\n\n{notes}\n\n{origin}\n")
    print(f"{report}\n\n{notes}\n\n{origin}\n\nwritten: benchmark/results/{args.name}.md")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        _, _, scenario, worker, steps, seed = sys.argv
        print(json.dumps(WORKERS[worker](scenario, int(steps), int(seed))))
    else:
        main()
