"""Training speed of ppo_vector.py on a GPU, with a simulator in torch: 4,096 cart poles.

    python benchmark/gpu.py                # takes about three minutes on a GPU
    python benchmark/gpu.py --device cpu --num-envs 256 --iterations 10

For each of: the simulator alone with random actions, training, training with --compile. Steps per second are the
median over the iterations after the first tenth, which excludes compilation. Synchronizations are those that
torch.cuda.set_sync_debug_mode() reports in one iteration; it does not know the reading of results for the log.

Requirements: pip install -r requirements.txt, with a torch for the GPU
"""

import contextlib
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from gymnasium.spaces import Box, Discrete
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path += [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]


class CartPoles:
    """CartPole-v1 on a device, all copies at once: Gymnasium's equations, constants, rewards and limits."""

    def __init__(self, num_envs, device, seed):
        self.num_envs, self.device = num_envs, device
        self.metadata = {"autoreset_mode": "SameStep"}
        self.single_observation_space = Box(-math.inf, math.inf, (4,))
        self.single_action_space = Discrete(2)

    def begin(self):
        return torch.rand(self.num_envs, 4, device=self.device) * 0.1 - 0.05

    def reset(self, *, seed=None, options=None):
        self.states = self.begin()
        self.lengths = torch.zeros(self.num_envs, device=self.device)
        return self.states, {}

    def step(self, actions):
        _, velocity, angle, turning = self.states.unbind(1)
        force = actions * 20.0 - 10.0
        cosine, sine = angle.cos(), angle.sin()
        pushed = (force + 0.05 * turning.square() * sine) / 1.1
        angular = (9.8 * sine - cosine * pushed) / (0.5 * (4 / 3 - 0.1 * cosine.square() / 1.1))
        acceleration = pushed - 0.05 * angular * cosine / 1.1
        changes = torch.stack([velocity, acceleration, turning, angular], 1)
        last = self.states + 0.02 * changes
        self.lengths += 1
        terminated = (last[:, 0].abs() > 2.4) | (last[:, 2].abs() > math.radians(12))
        truncated = self.lengths >= 500
        ended = terminated | truncated
        self.states = torch.where(ended.unsqueeze(1), self.begin(), last)
        self.lengths *= ~ended
        return self.states, torch.ones_like(self.lengths), terminated, truncated, {"final_obs": last}

    def close(self):
        pass


@dataclass
class Options:
    device: str = "cuda"  # of simulator and training
    num_envs: int = 4096  # copies
    num_steps: int = 32  # steps of each copy per iteration
    iterations: int = 40  # of each training
    modes: tuple[str, ...] = ("simulator", "eager", "compile")  # what to measure


def simulate(options: Options) -> dict:
    """Steps per second of the simulator alone."""
    envs = CartPoles(options.num_envs, options.device, 0)
    envs.reset()
    wait = torch.cuda.synchronize if options.device != "cpu" else lambda: None
    actions = torch.randint(0, 2, (options.num_steps, options.num_envs), device=options.device)
    speeds = []
    for _ in range(options.iterations):
        wait()
        start = time.perf_counter()
        for action in actions:
            envs.step(action)
        wait()
        speeds.append(actions.numel() / (time.perf_counter() - start))
    return {"steps/s": statistics.median(speeds[options.iterations // 10 :])}


def train(options: Options, compiled: bool) -> dict:
    """Speed, returns and synchronizations of a training run."""
    import ppo_vector

    batch_size = options.num_envs * options.num_steps
    args = ppo_vector.Args(
        env_id="gpu:CartPoles",
        device=options.device,
        num_envs=options.num_envs,
        num_steps=options.num_steps,
        total_timesteps=options.iterations * batch_size,
        compile=compiled,
        eval_episodes=options.num_envs,
    )
    start = time.perf_counter()
    run = ppo_vector.train(args)
    seconds = time.perf_counter() - start
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    curve = {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    speeds = curve["charts/SPS"][options.iterations // 10 :]
    result = {"steps/s": statistics.median(speeds), "seconds": seconds, "evaluated": curve["eval/episodic_return"][-1]}
    if options.device != "cpu":
        counts = []
        for iterations in (2, 4):
            args.total_timesteps, args.eval_episodes = iterations * batch_size, 0
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                ppo_vector.train(args)
            torch.cuda.set_sync_debug_mode("default")
            counts.append(sum("synchronizing" in str(warning.message) for warning in caught))
        result["synchronizations per iteration"] = (counts[1] - counts[0]) / 2
        result["memory, MB"] = torch.cuda.max_memory_allocated() / 1e6
    return result


def work(options: Options, mode: str) -> str:
    """Measure in an empty folder. Returns a line."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        result = simulate(options) if mode == "simulator" else train(options, compiled=mode == "compile")
    return f"{mode}: {', '.join(f'{name} {value:,.1f}' for name, value in result.items())}"


def main():
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if options.device != 'cpu' else 'cpu'}")
    for mode in options.modes:  # each in a process of its own
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                print(pool.submit(work, options, mode).result(), flush=True)
            except Exception:
                print(f"{mode}: failed\n{traceback.format_exc()[-6000:]}", flush=True)


if __name__ == "__main__":
    main()
