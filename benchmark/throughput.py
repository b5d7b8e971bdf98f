"""Speed of a training script against Stable-Baselines3's PPO with the same hyperparameters.

    python benchmark/throughput.py                  # about ten minutes; leave the machine alone meanwhile
    python benchmark/throughput.py --scenario ppo_atari --repeats 3 --total-timesteps 10240 --name throughput_atari
    python benchmark/throughput.py --scenario ppo_continuous_action --name throughput_continuous_action
    python benchmark/throughput.py --repeats 1 --total-timesteps 20000 --name trial

Everything is measured in a process of its own, alternating over several rounds, so that ratios compare
neighbours in time. The script runs as its users run it: with TensorBoard, checkpoints
and, on a terminal, the progress bar. Steps per second are those after the first tenth of a run, so they have
neither start-up nor compilation in them; these are given in seconds of their own. Setting up:

    pip install -r requirements.txt -r benchmark/requirements.txt
"""

import importlib.util
import json
import os
import pty
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import tyro
from learning import RESULTS, ROOT, UsageError, describe_machine
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

# torch and stable_baselines3 are imported in the workers alone: Linux counts the memory that a process
# had when it started a child as the child's, too, so this one stays small.

# ------------------------------------------------------------------------------------- scenarios


def sb3_cartpole(seed: int):
    """Stable-Baselines3's PPO with the hyperparameters of the scenario `ppo`.

    Its defaults have the rest: separate 64x64 tanh networks, Adam's epsilon 1e-5, normalized advantages.
    """
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    return PPO(
        "MlpPolicy",
        make_vec_env("CartPole-v1", 4, seed=seed),
        learning_rate=lambda remaining: 2.5e-4 * remaining,
        n_steps=128,
        batch_size=128,
        n_epochs=4,
        gamma=0.99,
        gae_lambda=0.95,
        clip_range=0.2,
        clip_range_vf=0.2,
        ent_coef=0.01,
        vf_coef=0.5,
        max_grad_norm=0.5,
        seed=seed,
        device="cpu",
    )


def sb3_breakout(seed: int):
    """Stable-Baselines3's PPO with the hyperparameters of the scenario `ppo_atari`, and its own Atari wrappers."""
    import ale_py
    import gymnasium
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    gymnasium.register_envs(ale_py)
    return PPO(
        "CnnPolicy",
        VecFrameStack(make_atari_env("BreakoutNoFrameskip-v4", 8, seed=seed), 4),
        learning_rate=lambda remaining: 2.5e-4 * remaining,
        n_steps=128,
        batch_size=256,
        n_epochs=4,
        gamma=0.99,
        gae_lambda=0.95,
        clip_range=0.1,
        clip_range_vf=0.1,
        ent_coef=0.01,
        vf_coef=0.5,
        max_grad_norm=0.5,
        seed=seed,
        device="cpu",
    )


def sb3_halfcheetah(seed: int):
    """Stable-Baselines3's PPO with the hyperparameters of the scenario `ppo_continuous_action`, and its normalizer."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    return PPO(
        "MlpPolicy",
        VecNormalize(make_vec_env("HalfCheetah-v5", 1, seed=seed), gamma=0.99),
        learning_rate=lambda remaining: 3e-4 * remaining,
        n_steps=2048,
        batch_size=64,
        n_epochs=10,
        gamma=0.99,
        gae_lambda=0.95,
        clip_range=0.2,
        clip_range_vf=0.2,
        ent_coef=0.0,
        vf_coef=0.5,
        max_grad_norm=0.5,
        seed=seed,
        device="cpu",
    )


@dataclass
class Scenario:
    """What to run, and its equal in Stable-Baselines3."""

    script: Path
    flags: str  # hyperparameters spelled out, so that a change of the script's defaults changes nothing here
    variants: dict[str, str]  # names of what is compared, and the flags that make them
    threads: int  # of torch, and of ALE
    num_envs: int
    num_steps: int
    num_minibatches: int
    more_envs: dict[int, tuple[str, ...]]  # other numbers of environments, and the variants to measure with them
    more_iterations: int  # at least as many for each of these
    sb3: Callable  # makes Stable-Baselines3's model for a seed
    arithmetic: tuple[str, ...] = ()  # number formats in which the network's arithmetic alone is a limit, too

    def arguments(self, num_envs: int) -> list[str]:
        """The script's command line, but for the seed and the steps."""
        sizes = f"--num-envs {num_envs} --num-steps {self.num_steps} --num-minibatches {self.num_minibatches}"
        return shlex.split(f"{self.flags} {sizes}")


SCENARIOS = {
    "ppo": Scenario(
        script=ROOT / "ppo.py",
        flags="--env-id CartPole-v1 --update-epochs 4 --learning-rate 2.5e-4 --anneal-lr --gamma 0.99 "
        "--gae-lambda 0.95 --clip-coef 0.2 --clip-vloss --norm-adv --ent-coef 0.01 --vf-coef 0.5 --max-grad-norm 0.5",
        variants={"ppo.py": "", "ppo.py --compile": "--compile"},
        threads=1,
        num_envs=4,
        num_steps=128,
        num_minibatches=4,
        more_envs={n: ("ppo.py", "ppo.py --compile") for n in (16, 64)},
        more_iterations=50,
        sb3=sb3_cartpole,
    ),
    "ppo_atari": Scenario(
        script=ROOT / "ppo_atari.py",
        flags="--env-id ALE/Breakout-v5 --update-epochs 4 --learning-rate 2.5e-4 --anneal-lr --gamma 0.99 "
        "--gae-lambda 0.95 --clip-coef 0.1 --clip-vloss --norm-adv --ent-coef 0.01 --vf-coef 0.5 --max-grad-norm 0.5 "
        "--eval-episodes 1",
        variants={
            "ppo_atari.py": "",
            "ppo_atari.py --compile": "--compile",
            "ppo_atari.py --no-bfloat16": "--no-bfloat16",
        },
        threads=2,
        num_envs=8,
        num_steps=128,
        num_minibatches=4,
        more_envs={n: ("ppo_atari.py",) for n in (32, 128)},
        more_iterations=5,
        sb3=sb3_breakout,
        arithmetic=("bfloat16", "float32"),
    ),
    "ppo_continuous_action": Scenario(
        script=ROOT / "ppo_continuous_action.py",
        flags="--env-id HalfCheetah-v5 --update-epochs 10 --learning-rate 3e-4 --anneal-lr --gamma 0.99 "
        "--gae-lambda 0.95 --clip-coef 0.2 --clip-vloss --norm-adv --ent-coef 0 --vf-coef 0.5 --max-grad-norm 0.5",
        variants={"ppo_continuous_action.py": "", "ppo_continuous_action.py --compile": "--compile"},
        threads=1,
        num_envs=1,
        num_steps=2048,
        num_minibatches=32,
        more_envs={8: ("ppo_continuous_action.py", "ppo_continuous_action.py --compile")},
        more_iterations=10,
        sb3=sb3_halfcheetah,
    ),
}


@dataclass
class Args:
    scenario: str = "ppo"
    """what to measure, one of SCENARIOS"""
    repeats: int = 5
    """rounds, in each of which everything is measured once"""
    total_timesteps: int = 100_000
    """steps of each run; with more environments at least 50 iterations"""
    name: str = "throughput"
    """what to call the result: benchmark/results/<name>.md"""

    def __post_init__(self) -> None:
        """Refuse what cannot run. Raises UsageError."""
        if self.scenario not in SCENARIOS:
            raise UsageError(f"--scenario must be one of {', '.join(SCENARIOS)}, not {self.scenario}")
        if self.repeats < 1:
            raise UsageError(f"--repeats must be at least 1, not {self.repeats}")
        if self.total_timesteps < 10_000:
            raise UsageError(f"--total-timesteps must be at least 10000, not {self.total_timesteps}")
        if not self.name or Path(self.name).name != self.name:
            raise UsageError(f"--name becomes the name of a file, which {self.name!r} cannot be")


# --------------------------------------------------------------------------------------- workers
# Each runs in a process of its own, as `throughput.py worker SCENARIO NAME STEPS SEED`, and prints JSON.


def load_script(scenario: Scenario):
    """The training script as a module, and its arguments in this scenario."""
    spec = importlib.util.spec_from_file_location(scenario.script.stem, scenario.script)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, tyro.cli(module.Args, args=scenario.arguments(scenario.num_envs))


def work_sb3(scenario: Scenario, total_steps: int, seed: int) -> dict:
    """Train with Stable-Baselines3. Nothing is logged to disk, drawn or saved, which is in its favour."""
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    class Clock(BaseCallback):
        """Notes the time after the first tenth, between two iterations."""

        start = None

        def _on_rollout_start(self) -> None:
            if self.start is None and self.num_timesteps >= total_steps / 10:
                self.start = self.num_timesteps, time.perf_counter()

        def _on_step(self) -> bool:
            return True

    torch.set_num_threads(scenario.threads)
    model, clock = scenario.sb3(seed), Clock()
    model.learn(total_steps, callback=clock)
    steps, seconds = model.num_timesteps - clock.start[0], time.perf_counter() - clock.start[1]
    return {"steps": model.num_timesteps, "steps_per_second": steps / seconds}


def work_limit(scenario: Scenario, total_steps: int, seed: int) -> dict:
    """Step the script's vector environment with random actions: no training can be faster."""
    script, args = load_script(scenario)
    envs = script.make_envs(args, args.num_envs)
    envs.reset(seed=seed)
    envs.action_space.seed(seed)
    actions = [envs.action_space.sample() for _ in range(1000)]  # beforehand: drawing them takes time, too
    manual_reset = envs.metadata["autoreset_mode"].name == "DISABLED"
    start = time.perf_counter()
    for t in range(total_steps // args.num_envs):
        _, _, terminations, truncations, _ = envs.step(actions[t % len(actions)])
        if manual_reset and (ended := terminations | truncations).any():
            envs.reset(options={"reset_mask": ended})
    return {"steps": total_steps, "steps_per_second": total_steps / (time.perf_counter() - start)}


def work_logging(scenario: Scenario, total_steps: int, seed: int) -> dict:
    """Log made-up metrics a thousand times, as section (d) of the script's loop does, into a real event file."""
    import numpy as np
    import torch

    torch.set_num_threads(scenario.threads)
    script, args = load_script(scenario)
    minibatches = args.num_minibatches * args.update_epochs
    all_losses, log_ratios = list(torch.rand(minibatches, 3)), list(torch.rand(minibatches, args.minibatch_size))
    returns, values = torch.rand(2, args.num_steps, args.num_envs)
    finished = list(np.random.default_rng(seed).uniform(0, 500, args.num_envs))
    with script.SummaryWriter("events") as writer:
        start = time.perf_counter()
        for step in range(1000):
            policy_loss, value_loss, entropy = torch.stack(all_losses).mean(0).tolist()
            log_ratio = torch.stack(log_ratios)
            metrics = {
                "losses/policy_loss": policy_loss,
                "losses/value_loss": value_loss,
                "losses/entropy": entropy,
                "losses/approx_kl": script.approx_kl(log_ratio).item(),
                "losses/old_approx_kl": -log_ratio.mean().item(),
                "losses/clipfrac": ((log_ratio.exp() - 1).abs() > args.clip_coef).float().mean().item(),
                "losses/explained_variance": 1 - ((returns - values).var() / returns.var()).item(),
            }
            for name in ("learning_rate", "update_epochs", "SPS", "episodes"):
                metrics[f"charts/{name}"] = step
            metrics["charts/episodic_return"] = np.mean(finished)
            metrics["charts/episodic_length"] = np.mean(finished)
            summary = script.Summary(value=[script.Summary.Value(tag=t, simple_value=metrics[t]) for t in metrics])
            writer.file_writer.add_summary(summary, step)
        writer.flush()  # the writer's thread has written all of it now
        seconds = time.perf_counter() - start
    return {"seconds_per_iteration": seconds / 1000, "batch_size": args.batch_size}


def work_arithmetic(scenario: Scenario, total_steps: int, seed: int, dtype: str) -> dict:
    """The steps per second of a processor that only did the network's multiplications, and those at full speed.

    Full speed is that of a large matrix product. Each step is acted on once and learned from
    update_epochs times.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(scenario.threads)
    script, args = load_script(scenario)
    agent = script.Agent(script.make_envs(args, 1))
    observations, actions = torch.zeros(1, 84, 84, 4, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as forward:
        logprobs, _, values = agent(observations, actions)
    with FlopCounterMode(display=False) as backward:
        (logprobs + values).sum().backward()
    forward, backward = forward.get_total_flops(), backward.get_total_flops()
    per_step = forward + args.update_epochs * (forward + backward)

    a = torch.ones(2048, 2048, dtype=getattr(torch, dtype))
    a @ a
    start = time.perf_counter()
    for _ in range(20):
        a @ a
    per_second = 20 * 2 * 2048**3 / (time.perf_counter() - start)
    return {"steps": total_steps, "steps_per_second": per_second / per_step, "flops": per_second, "per_step": per_step}


WORKERS = {
    "sb3": work_sb3,
    "limit": work_limit,
    "logging": work_logging,
    "bfloat16": partial(work_arithmetic, dtype="bfloat16"),
    "float32": partial(work_arithmetic, dtype="float32"),
}


# ------------------------------------------------------------------------------------- measuring


def measure(command: list[str], cache_dir: str, threads: int) -> dict:
    """Run a command to its end, on a terminal, in an empty folder. Raises RuntimeError where it fails.

    Returns its `seconds` and its peak `memory` in MB. To these a worker adds what it prints, and a script
    that trained the `steps` and `steps_per_second` that it logged.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": cache_dir,  # empty at first, so that the first compilation is a cold one
    }
    with tempfile.TemporaryDirectory() as folder:
        terminal, other_end = pty.openpty()
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=other_end, stderr=other_end)
        os.close(other_end)
        output = b""
        try:
            while chunk := os.read(terminal, 65536):
                output += chunk
        except OSError:  # how Linux says that the other end was closed
            pass
        except KeyboardInterrupt:
            process.kill()
            raise
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)  # else Popen would wait for it once more
        os.close(terminal)
        lines = output.decode(errors="replace").splitlines()
        if process.returncode != 0:
            last = "\n".join(lines[-10:])
            raise RuntimeError(f"{shlex.join(command)} ended with exit code {process.returncode}:\n{last}")
        if "--compile" in command and any("C++ compiler" in line for line in lines):
            raise RuntimeError("there is no C++ compiler, so --compile cannot be measured")

        result = {"seconds": seconds, "memory": usage.ru_maxrss / 1024}  # Linux counts KiB
        if "worker" in command:
            result |= json.loads(lines[-1])
        elif Path(folder, "runs").is_dir():
            (run_dir,) = Path(folder, "runs").iterdir()
            events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})  # 0: all of them
            events.Reload()
            series = events.Scalars("charts/SPS")
            first, last = next(event for event in series if event.step >= series[-1].step / 10), series[-1]
            speed = (last.step - first.step) / (last.wall_time - first.wall_time)
            result |= {"steps": last.step, "steps_per_second": speed}
        return result


def measure_all(args: Args, cache_dir: str) -> dict[str, list[dict]]:
    """Measure everything in each round. Returns the measurements, [repeats], by what was measured."""
    scenario, results = SCENARIOS[args.scenario], {}
    script = [sys.executable, str(scenario.script)]
    worker = [sys.executable, str(Path(__file__).resolve()), "worker", args.scenario]
    progress = None
    for seed in range(1, args.repeats + 1):

        def training(variant: str, num_envs: int, steps: int, seed: int = seed) -> list[str]:
            flags = [*scenario.arguments(num_envs), *shlex.split(scenario.variants[variant])]
            return [*script, *flags, "--seed", str(seed), "--total-timesteps", str(steps)]

        commands = {name: training(name, scenario.num_envs, args.total_timesteps) for name in scenario.variants}
        for name in ("sb3", "limit", *scenario.arithmetic, "logging"):  # right after these
            commands[name] = [*worker, name, str(args.total_timesteps), str(seed)]
        for num_envs, variants in scenario.more_envs.items():
            steps = max(args.total_timesteps, scenario.more_iterations * num_envs * scenario.num_steps)
            commands |= {f"{name} {num_envs}": training(name, num_envs, steps) for name in variants}
        commands["help"] = [*script, "--help"]
        progress = progress or tqdm(total=args.repeats * len(commands), unit=" runs", disable=None)
        for name, command in commands.items():
            progress.set_postfix_str(f"round {seed}: {name}")
            results.setdefault(name, []).append(measure(command, cache_dir, scenario.threads))
            progress.update()
    progress.close()
    return results


# --------------------------------------------------------------------------------------- writing


def spread(values: list[float], form: str = ",.0f") -> str:
    """The median of some values, and their range where there is one."""
    median = f"{statistics.median(values):{form}}"
    return median if min(values) == max(values) else f"{median} ({min(values):{form}} to {max(values):{form}})"


def make_report(scenario: Scenario, results: dict[str, list[dict]]) -> str:
    """Two tables and some single numbers. Ratios are of measurements of the same round."""
    speeds = {name: [m["steps_per_second"] for m in ms] for name, ms in results.items() if "steps" in ms[0]}
    labels = {name: f"`{name}`" for name in scenario.variants}
    labels |= {"sb3": f"Stable-Baselines3 {version('stable-baselines3')}", "limit": "the limit"}
    lines = ["| | steps/s | times Stable-Baselines3 | share of the limit |", "|---|---|---|---|"]
    for name, label in labels.items():
        ratios = [own / sb3 for own, sb3 in zip(speeds[name], speeds["sb3"], strict=True)]
        shares = [own / limit for own, limit in zip(speeds[name], speeds["limit"], strict=True)]
        lines.append(f"| {label} | {spread(speeds[name])} | {spread(ratios, '.2f')} | {spread(shares, '.1%')} |")
    for name in scenario.arithmetic:
        rate = statistics.median(m["flops"] for m in results[name]) / 1e9
        label = f"the network's arithmetic alone, {name}, at {rate:,.0f} GFLOP/s"
        ratios = [limit / sb3 for limit, sb3 in zip(speeds[name], speeds["sb3"], strict=True)]
        lines.append(f"| {label} | {spread(speeds[name])} | {spread(ratios, '.2f')} | |")

    lines += ["", "| | environments | minibatch | steps/s | µs per step | peak memory |", "|---|---|---|---|---|---|"]
    for name in scenario.variants:
        for num_envs in (scenario.num_envs, *scenario.more_envs):
            key = name if num_envs == scenario.num_envs else f"{name} {num_envs}"
            if key in speeds:
                minibatch = num_envs * scenario.num_steps // scenario.num_minibatches
                cost, memory = 1e6 / statistics.median(speeds[key]), max(m["memory"] for m in results[key])
                lines.append(f"| {labels[name]} | {num_envs} | {minibatch} | {spread(speeds[key])} ")
                lines[-1] += f"| {cost:,.1f} | {memory:,.0f} MB |"

    lines.append("")
    logging = statistics.median(m["seconds_per_iteration"] for m in results["logging"])
    for name in scenario.variants:
        first, *later = [m["seconds"] - m["steps"] / m["steps_per_second"] for m in results[name]]
        again = f", then {statistics.median(later):.1f} s" if later else ""
        share = logging * statistics.median(speeds[name]) / (scenario.num_envs * scenario.num_steps)
        lines.append(
            f"- {labels[name]}: start-up, compilation and final evaluation take {first:.1f} s the first time{again}; "
            f"logging takes {share:.1%} of the time ({1e3 * logging:.2f} ms per iteration)"
        )
    memory = max(m["memory"] for m in results["sb3"])
    lines.append(f"- Stable-Baselines3's peak memory: {memory:,.0f} MB")
    lines.append(f"- `{scenario.script.name} --help`: {spread([m['seconds'] for m in results['help']], '.2f')} s")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    try:
        args = tyro.cli(Args, description=__doc__)
        scenario = SCENARIOS[args.scenario]
        machine = describe_machine(scenario.script, 1)
        with tempfile.TemporaryDirectory() as cache_dir:
            report = make_report(scenario, measure_all(args, cache_dir))
    except (UsageError, RuntimeError) as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    rounds = f"{args.repeats} rounds" if args.repeats > 1 else "1 round"
    threads = "one torch thread" if scenario.threads == 1 else f"{scenario.threads} torch threads"
    notes = (
        f"Median of {rounds} (and range), of {args.total_timesteps:,} steps each, {threads}. The script logs, "
        "shows its progress and saves checkpoints; Stable-Baselines3 only trains. The limit: the same vector "
        "environment, stepped with random actions and reset, and no training."
    )
    origin = f"- {machine}\n- `{shlex.join(['python', 'benchmark/throughput.py', *sys.argv[1:]])}`"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.md").write_text(f"{report}\n\n{notes}\n\n{origin}\n")
    print(f"{report}\n\n{notes}\n\n{origin}\n\nwritten: benchmark/results/{args.name}.md")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        scenario, worker, steps, seed = sys.argv[2:]
        print(json.dumps(WORKERS[worker](SCENARIOS[scenario], int(steps), int(seed))))
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # end what is running, as on Ctrl-C
        main()
