"""Proximal Policy Optimization (PPO) for Atari games from pixels, in one file.

    python ppo_atari.py                                      # ALE/Breakout-v5, 10M steps
    python ppo_atari.py --env-id ALE/Pong-v5                 # or any other: Pong averages 18 in about an hour
    python ppo_atari.py --resume runs/RUN                    # goes on where RUN was stopped
    python ppo_atari.py --evaluate runs/RUN --capture-video  # plays whole games and films the first
    torchrun --standalone --nproc-per-node 2 ppo_atari.py    # two processes (GPUs, say) train one agent
    tensorboard --logdir runs                                # the learning curves, while it runs or later

The flags default to those of the published results over 10M steps; README.md has returns, times and recipes.

Papers: PPO (Schulman et al., 2017, arXiv:1707.06347), GAE (Schulman et al., 2016, arXiv:1506.02438) and the
network, DQN (Mnih et al., 2015, Nature 518). "Detail n" is the n-th of The 37 Implementation Details of PPO
(Huang et al., ICLR blog track, 2022).
"""

import argparse
import ast
import copy
import dataclasses
import difflib
import io
import math
import os
import random
import shlex
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.spaces import Discrete
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:
    import ale_py
    from ale_py.vector_env import AtariVectorEnv
except ImportError as error:
    print(
        f"{Path(__file__).name}: error: the games are missing ({error}): pip install 'gymnasium[atari]'",
        file=sys.stderr,
    )
    sys.exit(2)

# Large tensors in huge pages, which take less time to get: 1.15 times as fast on one thread of the CPU.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it when it makes the first one
CHECKPOINT_SECONDS = 60  # a kill or a power cut costs at most about this much work


class UsageError(Exception):
    """What the user can put right: the command line prints it as one line and exits with code 2."""


def warn(message: str) -> None:
    """Print it on stderr. Where that goes to a full disk, it is lost: a warning must not end a run."""
    with suppress(OSError):
        tqdm.write(f"warning: {message}", file=sys.stderr)


@dataclass
class Args:
    env_id: str = "ALE/Breakout-v5"
    """the game; `ALE/Breakout-v5`, `BreakoutNoFrameskip-v4` and the like all mean the same here"""
    env_kwargs: tuple[str, ...] = ()
    """arguments for ALE's vector environment, as in `--env-kwargs full_action_space=True noop_max=0`"""
    sticky_actions: bool = False
    """with probability 0.25 a frame repeats the last action instead (Machado et al., 2018)"""
    exp_name: str = Path(__file__).stem
    """part of the run folder's name: runs/<env_id>__<exp_name>__<seed>__<unix time>"""
    seed: int = 1
    """seed of everything random: same seed, flags and machine, same result (on the CPU to the bit)"""
    total_timesteps: int = 10_000_000
    """steps to train for, over all environments; rounded up to whole iterations"""
    num_envs: int = 8
    """environments that are stepped together, over all processes of a torchrun"""
    num_steps: int = 128
    """steps that each environment takes per iteration"""
    learning_rate: float = 2.5e-4
    """Adam's learning rate"""
    anneal_lr: bool = True
    """lower the learning rate linearly to zero over the run"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation: 0 trusts the critic, 1 the sampled returns"""
    num_minibatches: int = 4
    """minibatches in which the num_envs * num_steps samples of an iteration are learned"""
    update_epochs: int = 4
    """how many times each sample is learned from"""
    norm_adv: bool = True
    """normalize advantages to mean 0 and standard deviation 1 in each minibatch"""
    clip_coef: float = 0.1
    """epsilon of the clipped objective: no gain from moving a probability ratio further than this from 1"""
    clip_vloss: bool = True
    """no gain either from moving a value further than clip_coef from its old estimate"""
    ent_coef: float = 0.01
    """weight of the entropy bonus, which keeps the policy exploring"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """longer gradients are scaled down to this norm"""
    target_kl: float | None = None
    """end the updates of an iteration once the policy's KL divergence from its old self exceeds this"""
    device: str = "cpu"
    """where the network and the rollout live: `cpu`, `cuda`, `cuda:1`, ..."""
    bfloat16: bool = True
    """compute all but the two heads in bfloat16 if the device has it in hardware: 1.7 times as fast on the CPU"""
    compile: bool = False
    """compile acting, the loss and its gradient with torch.compile: for GPUs, the CPU gains nothing"""
    capture_video: bool = False
    """film the first game of each evaluation into the run's videos/"""
    eval_episodes: int = 10
    """whole games to play after training, or with `--evaluate`"""
    resume: str | None = None
    """go on with this run, a folder under runs/; a larger `--total-timesteps` extends it"""
    evaluate: str | None = None
    """play whole games with the policy of this run, a folder under runs/, instead of training"""

    @property
    def batch_size(self) -> int:
        """Samples per iteration."""
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        """Samples per gradient step."""
        return self.batch_size // self.num_minibatches

    @property
    def num_iterations(self) -> int:
        """The fewest iterations that reach total_timesteps."""
        return math.ceil(self.total_timesteps / self.batch_size)

    def __post_init__(self) -> None:
        """Refuse what cannot run. Raises UsageError."""
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if name in ("gamma", "gae_lambda"):
                good, rule = 0 <= value <= 1, "between 0 and 1"
            elif name in ("ent_coef", "vf_coef", "seed"):
                good, rule = 0 <= value < 2**32, "0 or more, and below 2**32"
            else:
                good, rule = 0 < value < math.inf, "above 0, and finite"
            if not good:
                raise UsageError(f"--{name.replace('_', '-')} must be {rule}, not {value}")
        if self.batch_size % self.num_minibatches and (self.batch_size > 1 or not self.norm_adv):
            samples, asked = self.batch_size, min(self.num_minibatches, self.batch_size)
            near = (n for distance in range(asked) for n in (asked - distance, asked + distance))
            works = next(n for n in near if samples % n == 0 and (samples > n or not self.norm_adv))
            split = f"{self.num_envs} environments x {self.num_steps} steps = {samples} samples do not split evenly"
            raise UsageError(f"{split} into {self.num_minibatches} minibatches; --num-minibatches {works} would work")
        if self.norm_adv and self.minibatch_size <= 1:
            raise UsageError("a minibatch of one sample cannot be normalized: fewer minibatches, or --no-norm-adv")
        for text in self.env_kwargs:
            if "=" not in text or not text.partition("=")[0].isidentifier():
                raise UsageError(f"--env-kwargs takes name=value, not {text}")
        if self.resume and self.evaluate:
            raise UsageError("--resume and --evaluate exclude each other")
        if "" in (self.resume, self.evaluate):
            raise UsageError("--resume and --evaluate take the folder of a run under runs/, and it is empty")


# ---------------------------------------------------------------------------------- environments


def make_envs(args: Args, num_envs: int, **changes) -> AtariVectorEnv:
    """Make `num_envs` copies of the game, stepped together by ALE's own threads (detail 1).

    ALE itself presses FIRE and waits for up to 30 frames at the start of a game (details 14 and 17), repeats each
    action for 4 frames and shows the maximum of the last two (15), in 84x84 grey pixels (18), the last 4 of these
    (20). A lost life is reported as a termination, but the game goes on (16). Where a game ends or reaches 108,000
    frames (half an hour), the next one starts at once, and infos["final_obs"] holds what was seen last.

    `changes` override the arguments of ALE's vector environment.
    Raises UsageError where the environment cannot be made or is not one for this script.
    """
    env_kwargs = {}
    for name, _, value in (text.partition("=") for text in args.env_kwargs):
        try:
            env_kwargs[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # not a Python literal: a string
            env_kwargs[name] = value
        own = "num_envs batch_size autoreset_mode life_loss_info episodic_life reward_clipping grayscale"
        if name in own.split():
            raise UsageError(f"cannot make {args.env_id} with {name}={value}: the script itself decides on that")

    games = {}  # by id, as in {"ALE/Breakout-v5": "breakout", "BreakoutNoFrameskip-v4": "breakout", ...}
    for env_id, spec in gym.registry.items():
        if str(spec.entry_point).startswith("ale_py"):
            games[env_id] = spec.kwargs["game"]
    if args.env_id not in games:
        if args.env_id in gym.registry:
            other = "ppo.py, or ppo_continuous_action.py where actions are continuous"
            raise UsageError(f"{args.env_id} is not an Atari game: use {other}")
        near = difflib.get_close_matches(args.env_id, games, n=3, cutoff=0.5)
        raise UsageError(f"there is no game {args.env_id}; near it: {', '.join(near) or 'none'}")
    try:
        options = {
            "autoreset_mode": gym.vector.AutoresetMode.SAME_STEP,
            "life_loss_info": True,
            "reward_clipping": False,  # the raw score is logged; train() clips what is learned from
            "repeat_action_probability": 0.25 if args.sticky_actions else 0.0,
            "num_threads": torch.get_num_threads(),
        }
        envs = AtariVectorEnv(games[args.env_id], num_envs, **options | env_kwargs | changes)
    except (TypeError, ValueError, gym.error.Error) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"cannot make {args.env_id} with {' '.join(args.env_kwargs)}: {reason}") from error
    if not isinstance(envs.single_action_space, Discrete):
        raise UsageError("continuous=True gives continuous actions; supported: Discrete")
    stack, height, width = envs.single_observation_space.shape[:3]
    if stack < 1 or min(height, width) < 36:
        raise UsageError(f"the network needs at least 1 frame of 36x36 pixels, not {stack} of {height}x{width}")
    return envs


def env_seeds(num_envs: int, *key: int) -> list[int]:
    """Seeds for `num_envs` environments, unrelated to those of any other key."""
    return np.random.SeedSequence(key).generate_state(num_envs).tolist()


# ----------------------------------------------------------------------------------------- agent


def layer_init(layer: nn.Module, std: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights, zero biases (detail 2)."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """The policy (actor) and the value function (critic), as two heads of one Nature-CNN (details 13 and 21)."""

    def __init__(self, envs: gym.vector.VectorEnv, bfloat16: bool = False) -> None:
        super().__init__()
        self.bfloat16 = bfloat16
        self.num_actions = int(envs.single_action_space.n)
        stack, height, width = envs.single_observation_space.shape
        convolutions = nn.Sequential(
            layer_init(nn.Conv2d(stack, 32, kernel_size=8, stride=4)),
            nn.ReLU(inplace=True),
            layer_init(nn.Conv2d(32, 64, kernel_size=4, stride=2)),
            nn.ReLU(inplace=True),
            layer_init(nn.Conv2d(64, 64, kernel_size=3, stride=1)),
            nn.ReLU(inplace=True),
            nn.Flatten(),
        )
        num_features = convolutions(torch.zeros(1, stack, height, width)).shape[1]  # 3136 for 84x84
        self.trunk = nn.Sequential(*convolutions, layer_init(nn.Linear(num_features, 512)), nn.ReLU(inplace=True))
        self.actor = layer_init(nn.Linear(512, self.num_actions), std=0.01)  # every action starts equally likely
        self.critic = layer_init(nn.Linear(512, 1), std=1.0)

    def features(self, observations: torch.Tensor) -> torch.Tensor:
        """What both heads see, float32 [N, 512], for observations, uint8 [N, height, width, stack]."""
        pixels = observations.to(torch.bfloat16 if self.bfloat16 else torch.float32).mul_(1 / 255)  # detail 22
        with torch.autocast(observations.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.trunk(pixels.permute(0, 3, 1, 2)).float()

    def sample_noise(self, num_steps: int, num_envs: int) -> torch.Tensor:
        """The randomness of a whole rollout: standard Gumbel, [num_steps, num_envs, num_actions]."""
        return -torch.empty(num_steps, num_envs, self.num_actions).exponential_().log()

    def act(self, observations: torch.Tensor, noise: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions, int64 [N], for observations [N, height, width, stack], and the features behind them.

        argmax(logits + Gumbel noise) is distributed as softmax(logits), and quicker to have than a sample
        from a distribution object; noise 0 gives the greedy actions.
        """
        features = self.features(observations)
        return (self.actor(features) + noise).argmax(-1), features

    def value(self, observations: torch.Tensor) -> torch.Tensor:
        """Estimated returns [N] for observations [N, height, width, stack]."""
        return self.critic(self.features(observations)).squeeze(-1)

    def heads(self, features: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Log-probabilities of the actions, entropies of the policy (in nats) and values, each [N]."""
        logprobs = self.actor(features).log_softmax(-1)
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        values = self.critic(features).squeeze(-1)
        return logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), entropies, values

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What heads() says of observations [N, height, width, stack]."""
        return self.heads(self.features(observations), actions)


# -------------------------------------------------------------------- advantages and minibatches


def compute_gae(rewards, values, next_values, terminations, truncations, gamma: float, gae_lambda: float):
    """Advantages by generalized advantage estimation (detail 5; GAE paper, equations 11 to 16).

        delta_t = r_t + gamma * V(s'_t) * (1 - terminated_t) - V(s_t)
        A_t     = delta_t + gamma * lambda * (1 - ended_t) * A_{t+1}

    s'_t is the TRUE next observation, also where an episode ended and the next row starts another one.
    A terminated episode has no future, so V(s') does not count; a truncated one (by a time limit, say)
    has a future that was merely not played, so V(s') does. Either end cuts the recursion.

    All tensors are [num_steps, num_envs], the two flags boolean; so is the result, A.
    """
    deltas = rewards + gamma * next_values * ~terminations - values
    decays = gamma * gae_lambda * ~(terminations | truncations)
    advantages, advantage = [], torch.zeros_like(deltas[0])
    for delta, decay in zip(reversed(deltas.unbind()), reversed(decays.unbind()), strict=True):
        advantage = delta + decay * advantage
        advantages.append(advantage)
    return torch.stack(advantages[::-1])


def approx_kl(log_ratio: torch.Tensor) -> torch.Tensor:
    """KL(old || new policy) from log(new / old) of old actions: k3 of joschu.net/blog/kl-approx.html."""
    return (log_ratio.exp() - 1 - log_ratio).mean()


def minibatches(args: Args, batch: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    """The minibatches of all epochs: each epoch has every sample once, freshly shuffled (detail 6)."""
    for _ in range(args.update_epochs):
        order = torch.randperm(args.batch_size).to(batch[0].device)
        for indices in order.split(args.minibatch_size):
            yield tuple(x.index_select(0, indices) for x in batch)


# --------------------------------------------------------------------- checkpoint and evaluation


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write the checkpoint whole or not at all: a crash or a full disk leaves the old one in place."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # on the disk, before it replaces the old one
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        warn(f"checkpoint not saved, training goes on: {error}")


def load_checkpoint(run: str, args: Args | None = None) -> tuple[Path, dict]:
    """The folder and the checkpoint of a run, given as `runs/NAME` or `NAME`.

    Raises UsageError where there is none, it cannot be read, or `args` contradict those it was made with.
    """
    run_dir = Path(run) if Path(run).is_dir() else Path("runs", run)
    path = run_dir / "checkpoint.pt"
    if not path.is_file():
        raise UsageError(f"{run} has no checkpoint.pt: give the folder of a run under runs/")
    try:
        with warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no code from the file
        saved_args = vars(Args(**checkpoint["args"]))
        needed = {"agent", "optimizer", "iteration", "global_step", "num_episodes", "recent_returns", "rng_state"}
        if missing := needed - checkpoint.keys():
            raise KeyError(f"it has no {', '.join(sorted(missing))}")
    except Exception as error:  # a damaged file can raise nearly anything
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{path} is damaged or not from {Path(__file__).name}: {reason}") from error
    if args:
        free = {"resume", "evaluate", "device", "bfloat16", "compile", "capture_video", "eval_episodes"}
        free.add("seed" if args.evaluate else "total_timesteps")
        for name in saved_args.keys() - free:
            value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
            if value != saved_args[name]:
                raise UsageError(f"{flag} {value} contradicts {path}, which was made with {saved_args[name]}")
    return run_dir, checkpoint


def load_args(run: str, **changes) -> Args:
    """The arguments of a run with `changes` applied, as in `train(load_args(run, resume=run))`."""
    return Args(**load_checkpoint(run)[1]["args"] | changes)


def restore(args: Args, checkpoint: dict, agent: Agent, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put the agent, and with an optimizer the training, in the state of the checkpoint.

    Raises UsageError where it does not fit.
    """
    try:
        agent.load_state_dict(checkpoint["agent"])
        if optimizer:
            optimizer.load_state_dict(checkpoint["optimizer"])
            torch.set_rng_state(checkpoint["rng_state"])
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"the checkpoint does not fit {args.env_id} and {Path(__file__).name}: {reason}") from error


def evaluate(args: Args, run_dir: Path, checkpoint: dict) -> np.ndarray:
    """Play one whole game in each of eval_episodes fresh environments, and film the first with capture_video.

    Actions are sampled, as in training: in a game without chance, a greedy agent that once comes back to
    where it was goes round in circles until the time limit (in Breakout, say, without ever pressing FIRE).

    Returns the scores, [eval_episodes], and logs their mean as `eval/episodic_return`.
    """
    step = checkpoint["global_step"]
    envs = make_envs(args, args.eval_episodes, life_loss_info=False)
    agent = Agent(envs)
    restore(args, checkpoint, agent)
    torch.manual_seed(args.seed)
    returns, ended = np.zeros(args.eval_episodes), np.zeros(args.eval_episodes, bool)
    seeds = np.array(env_seeds(args.eval_episodes, args.seed, 1)) >> 1  # ALE takes 31 bits
    frames, _ = envs.reset(seed=seeds)
    game = []  # the first one: each action, and the number of the frame that it led to
    while not ended.all():
        with torch.inference_mode():
            noise = agent.sample_noise(1, args.eval_episodes)[0]
            actions = agent.act(torch.as_tensor(frames.transpose(0, 2, 3, 1)), noise)[0].numpy()
        frames, rewards, terminations, truncations, infos = envs.step(actions)
        returns += np.where(ended, 0.0, rewards)  # the first game of each environment counts
        ends = terminations | truncations
        if not ended[0]:
            game.append((actions[0], math.inf if ends[0] else infos["episode_frame_number"][0]))
        ended |= ends
    envs.close()
    print(
        f"evaluation at step {step:,}: return {returns.mean():.2f} +- {returns.std():.2f} "
        f"(min {returns.min():.2f}, max {returns.max():.2f}) over {len(returns)} games"
    )
    try:
        with SummaryWriter(run_dir) as writer:
            writer.add_scalar("eval/episodic_return", returns.mean(), step)
    except OSError as error:
        warn(f"evaluation not logged: {error}")
    if args.capture_video:
        path = run_dir / "videos" / f"eval-at-{step}-episode-0.mp4"
        try:
            film(args, path, seeds[0], game)
        except (OSError, RuntimeError) as error:
            path.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or "ffmpeg failed; is the disk full?"
            warn(f"{path} not filmed: {reason}")
    return returns


def film(args: Args, path: Path, seed: int, game: list[tuple[int, float]]) -> None:
    """Film a game in colour, at its own resolution and 60 frames per second.

    The agent's environments show it grey, small and every fourth frame only. But seed and actions determine a
    game: here it is played again, frame by frame, from `game`, its actions and the frame number each led to.
    """
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    emulator = ale_py.ALEInterface()
    emulator.loadROM(ale_py.roms.get_rom_path(gym.registry[args.env_id].kwargs["game"]))
    height, width = emulator.getScreenDims()
    shape = {"grayscale": False, "img_height": height, "img_width": width, "stack_num": 1}
    camera = make_envs(args, 1, life_loss_info=False, frameskip=1, maxpool=False, **shape)
    frame, infos = camera.reset(seed=np.array([seed]))
    path.parent.mkdir(exist_ok=True)
    video = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=60, macro_block_size=2, ffmpeg_log_level="quiet"
    )
    video.send(None)
    video.send(frame)
    ended = False
    for action, frame_number in game:
        while not ended and infos["episode_frame_number"][0] < frame_number:
            frame, _, terminations, truncations, infos = camera.step(np.array([action]))
            ended = terminations[0] | truncations[0]
            video.send(infos["final_obs"] if ended else frame)
    video.close()
    camera.close()
    imageio_ffmpeg.count_frames_and_secs(str(path))  # raises RuntimeError where the film cannot be read


# -------------------------------------------------------------------------------------- training


def train(args: Args) -> Agent:
    """Train an agent, in a new run folder or in that of the run to resume, and return it.

    Raises UsageError, and SystemExit(128 + signal) after Ctrl-C or SIGTERM, the iteration being saved.
    """
    rank, world_size, device_name = 0, 1, args.device
    if dist.is_torchelastic_launched():  # by torchrun: each process plays its share of the environments
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if args.num_envs % world_size:
            raise UsageError(f"--num-envs {args.num_envs} does not divide among {world_size} processes")
        if args.device == "cuda":
            device_name = f"cuda:{os.environ['LOCAL_RANK']}"
        elif args.device != "cpu" and world_size > 1:
            raise UsageError(f"torchrun's processes need a GPU each: --device cuda, not {args.device}")
    local_args = dataclasses.replace(args, num_envs=args.num_envs // world_size)  # of this process
    try:
        device = torch.device(device_name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # which is where NCCL gathers
        to_device = partial(torch.as_tensor, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from error
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiled = args.compile and shutil.which(compiler.split()[0]) is not None
    if args.compile and not compiled:
        print(f"--compile needs a C++ compiler and finds no {compiler}: training without it, only slower")
    if device.type == "cuda":
        bfloat16 = args.bfloat16 and torch.cuda.is_bf16_supported(including_emulation=False)
        torch.set_float32_matmul_precision("high")  # TF32
    else:
        has_bfloat16 = any("bf16" in name for name, has in torch.cpu.get_capabilities().items() if has is True)
        bfloat16 = args.bfloat16 and device.type == "cpu" and has_bfloat16
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)

    first_iteration, num_episodes, recent_returns = 0, 0, deque(maxlen=100)
    if args.resume:
        run_dir, saved = load_checkpoint(args.resume, args)
        first_iteration, num_episodes = saved["iteration"], saved["num_episodes"]
        recent_returns.extend(saved["recent_returns"])
        if first_iteration >= args.num_iterations:
            done = f"{run_dir} has all its {saved['global_step']:,} steps"
            raise UsageError(f"{done}: a larger --total-timesteps would extend it")
    else:
        name, started = f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}", int(time.time())
        while (run_dir := Path("runs", f"{name}__{started}")).exists():
            started += 1  # a run of this name has just begun
        try:
            if rank == 0:
                run_dir.mkdir(parents=True)
        except OSError as error:
            raise UsageError(f"cannot make the run's folder: {error}") from error
    first_step = global_step = first_iteration * args.batch_size
    total_steps = args.num_iterations * args.batch_size

    try:
        envs = make_envs(args, local_args.num_envs)
    except UsageError:
        if not args.resume and rank == 0:
            run_dir.rmdir()
        raise
    agent = Agent(envs, bfloat16).to(device)
    # One vector holds all weights, and the agent's parameters become views of it: clipping and Adam
    # then cost one operation each instead of one per layer, and torchrun's processes average one tensor.
    parameters = list(agent.parameters())
    weights = nn.utils.parameters_to_vector(parameters).detach()
    nn.utils.vector_to_parameters(weights, parameters)
    optimizer = torch.optim.Adam([weights], lr=args.learning_rate, eps=1e-5, fused=True)  # detail 3
    if args.resume:
        restore(args, saved, agent, optimizer)
    if world_size > 1:  # other processors may have rounded the first weights in another way
        dist.broadcast(weights, 0)

    def checkpoint() -> dict:
        """All that the run needs to go on, between two iterations."""
        return {
            "args": dataclasses.asdict(dataclasses.replace(args, resume=None)),
            "agent": agent.state_dict(),
            "optimizer": optimizer.state_dict(),
            "iteration": global_step // args.batch_size,
            "global_step": global_step,
            "num_episodes": num_episodes,
            "recent_returns": [float(x) for x in recent_returns],
            "rng_state": torch.get_rng_state(),
        }

    def loss_gradient(observations, actions, old_logprobs, old_values, advantages, returns):
        """The gradient of the PPO loss (PPO paper, equation 9) on one minibatch, and the loss's parts."""
        logprobs, entropies, values = agent(observations, actions)
        log_ratio = logprobs - old_logprobs
        ratio = log_ratio.exp()

        if args.norm_adv:  # detail 7
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages).mean()  # detail 8, equation 7

        squared_errors = (values - returns).square()
        if args.clip_vloss:  # detail 9
            clipped_values = old_values + (values - old_values).clamp(-args.clip_coef, args.clip_coef)
            squared_errors = torch.max(squared_errors, (clipped_values - returns).square())
        value_loss = 0.5 * squared_errors.mean()

        entropy = entropies.mean()
        loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy  # detail 10
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        return gradient, torch.stack((policy_loss, value_loss, entropy)).detach(), log_ratio.detach()

    # The rollout's own copy of the agent: in bfloat16 its weights are then converted once per rollout.
    player = copy.deepcopy(agent).requires_grad_(False)
    if bfloat16:
        player.trunk.bfloat16()
    act = player.act
    if compiled:
        torch._dynamo.config.trace_autograd_ops = True  # lets one graph hold the gradient, too
        mode = "reduce-overhead" if device.type == "cuda" else None  # CUDA graphs: one launch for all kernels
        loss_gradient = torch.compile(loss_gradient, fullgraph=True, mode=mode)
        act = torch.compile(act, fullgraph=True, mode=mode)

    def average(x: torch.Tensor) -> torch.Tensor:
        """The mean of x over all processes, in place."""
        if world_size > 1:
            dist.all_reduce(x)
            x /= world_size
        return x

    # The rollout. observations[t + 1] is what followed observations[t], unless a game ended there.
    T, N = args.num_steps, local_args.num_envs
    # Frames are kept as uint8 and with the channels last, where convolutions are faster.
    stack, height, width = envs.single_observation_space.shape
    observations = torch.zeros((T + 1, N, height, width, stack), dtype=torch.uint8, device=device)
    host_frames = torch.zeros_like(observations[0], device="cpu", pin_memory=device.type == "cuda")
    features = torch.zeros((T, N, agent.critic.in_features), device=device)  # of observations, in the rollout
    actions = torch.zeros((T, N), dtype=torch.int64, device=device)
    rewards = np.zeros((T, N), np.float32)
    terminations = np.zeros((T, N), bool)
    truncations = np.zeros((T, N), bool)
    episode_returns, episode_lengths = np.zeros(N), np.zeros(N, np.int64)  # so far, of the current games
    seeds = np.array(env_seeds(args.num_envs, args.seed, 0, first_iteration)) >> 1  # ALE takes 31 bits
    frames, infos = envs.reset(seed=seeds[rank * N : (rank + 1) * N])
    observations[T] = to_device(frames.transpose(0, 2, 3, 1))
    if rank > 0:  # every process draws its own actions and minibatches
        torch.manual_seed(seeds[rank * N])

    # What an interrupted run logged after its last checkpoint is purged: it will be played anew.
    writer = None
    if rank == 0:
        try:
            writer = SummaryWriter(run_dir, purge_step=global_step + 1 if args.resume else None)
        except OSError as error:
            raise UsageError(f"cannot log to {run_dir}: {error}") from error
        table = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
        writer.add_text("hyperparameters", f"|argument|value|\n|-|-|\n{table}", global_step)

    stop_signal = None

    def request_stop(signum, frame):
        nonlocal stop_signal
        stop_signal = signum
        signal.signal(signum, old_handlers[signum])  # a second one stops at once
        with suppress(OSError):
            os.write(2, b"\nstopping after this iteration; once more stops at once\n")

    old_handlers = {signum: signal.signal(signum, request_stop) for signum in (signal.SIGINT, signal.SIGTERM)}

    asked = "" if total_steps == args.total_timesteps else f" ({args.total_timesteps:,} in whole iterations)"
    if rank == 0:
        print(f"{run_dir}: steps {global_step:,} to {total_steps:,}{asked}, {args.batch_size:,} per iteration")
        where = f"{world_size} processes x {N} environments" if world_size > 1 else f"{N} environments"
        print(f"{where} on {device}, network in {'bfloat16' if bfloat16 else 'float32'}", flush=True)
    progress = tqdm(total=total_steps, initial=global_step, unit=" steps", unit_scale=True, disable=rank > 0 or None)
    start_time = iteration_time = save_time = print_time = time.monotonic()
    try:
        for iteration in range(first_iteration, args.num_iterations):
            # ------------------------------ (a) roll out: play num_steps steps in every environment
            finished_returns, finished_lengths, final_frames = [], [], []
            noise = agent.sample_noise(T, N).to(device)
            player.load_state_dict(agent.state_dict())
            observations[0] = observations[T]
            with torch.inference_mode():
                for t in range(T):
                    actions[t], features[t] = act(observations[t], noise[t])
                    frame_numbers = infos["episode_frame_number"]
                    frames, reward, terminations[t], truncations[t], infos = envs.step(actions[t].cpu().numpy())
                    host_frames.numpy()[:] = frames.transpose(0, 2, 3, 1)
                    observations[t + 1].copy_(host_frames, non_blocking=True)
                    rewards[t] = np.sign(reward)  # detail 19
                    episode_returns += reward
                    episode_lengths += 1
                    # A life lost is a termination, too, but only a new game counts its frames from the start.
                    ended = truncations[t] | (terminations[t] & (infos["episode_frame_number"] < frame_numbers))
                    if ended.any():
                        finished_returns.extend(episode_returns[ended])
                        finished_lengths.extend(episode_lengths[ended])
                        episode_returns[ended] = episode_lengths[ended] = 0
                        final_frames.append(infos["final_obs"][truncations[t]])

            # ----------------- (b) estimate advantages: how much better than expected was each action?
            with torch.no_grad():
                old_logprobs, _, values = agent.heads(features, actions)
                next_values = torch.cat((values[1:], agent.value(observations[T]).view(1, N)))
                if truncations.any():  # what followed there is not the next row: it belongs to the next game
                    final_observations = to_device(np.concatenate(final_frames).transpose(0, 2, 3, 1))
                    next_values[to_device(truncations)] = agent.value(final_observations)
                ends = to_device(terminations), to_device(truncations)
                advantages = compute_gae(to_device(rewards), values, next_values, *ends, args.gamma, args.gae_lambda)
                returns = advantages + values
            batch = [actions, old_logprobs, values, advantages, returns]  # each [num_steps, num_envs]
            batch = [observations[:T].flatten(0, 1), *(x.flatten() for x in batch)]

            # --------------------------------- (c) learn: update_epochs passes over shuffled minibatches
            remaining = 1 - iteration / args.num_iterations
            learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)  # detail 4
            optimizer.param_groups[0]["lr"] = learning_rate
            all_losses, log_ratios, num_updates = [], [], 0
            for minibatch in minibatches(local_args, batch):
                gradient, losses, log_ratio = loss_gradient(*minibatch)
                all_losses.append(losses.clone())  # the next replay of a CUDA graph overwrites them
                log_ratios.append(log_ratio.clone())
                if args.target_kl is not None and average(approx_kl(log_ratio)) > args.target_kl:
                    break
                gradient = average(gradient)
                weights.grad = gradient * (args.max_grad_norm / (gradient.norm() + 1e-6)).clamp(max=1)  # detail 11
                optimizer.step()
                num_updates += 1
            global_step += args.batch_size
            if not torch.isfinite(weights).all():
                raise UsageError(f"the weights became NaN by step {global_step}: try a lower --learning-rate")

            # ------------------------------------------------------------------------ (d) log and save
            stop = stop_signal  # from here on, a signal counts in the next iteration: all stop in the same one
            if world_size > 1:  # the games of all processes, and whether one of them was asked to stop
                everyone = [None] * world_size
                dist.all_gather_object(everyone, (finished_returns, finished_lengths, stop))
                finished_returns = [x for games, _, _ in everyone for x in games]
                finished_lengths = [x for _, games, _ in everyone for x in games]
                stop = next((signum for _, _, signum in everyone if signum is not None), None)
            if rank > 0:  # the first process logs and saves for all
                if stop is not None:
                    break
                continue
            now = time.monotonic()
            policy_loss, value_loss, entropy = torch.stack(all_losses).mean(0).tolist()  # waits for the device
            log_ratio = torch.stack(log_ratios)  # [minibatches, minibatch_size]
            metrics = {  # detail 12; all losses are means over the minibatches
                "losses/policy_loss": policy_loss,
                "losses/value_loss": value_loss,
                "losses/entropy": entropy,
                "losses/approx_kl": approx_kl(log_ratio).item(),
                "losses/old_approx_kl": -log_ratio.mean().item(),
                "losses/clipfrac": ((log_ratio.exp() - 1).abs() > args.clip_coef).float().mean().item(),
                "losses/explained_variance": 1 - ((returns - values).var() / returns.var()).item(),
                "charts/learning_rate": learning_rate,
                "charts/update_epochs": num_updates / args.num_minibatches,
                "charts/SPS": args.batch_size / (now - iteration_time),
            }
            iteration_time = now
            if finished_returns:
                num_episodes += len(finished_returns)
                recent_returns.extend(finished_returns)
                metrics["charts/episodes"] = num_episodes
                metrics["charts/episodic_return"] = np.mean(finished_returns)
                metrics["charts/episodic_length"] = np.mean(finished_lengths)
            last = iteration + 1 == args.num_iterations or stop is not None
            save = last or now - save_time > CHECKPOINT_SECONDS
            try:
                if writer is None and save:  # the disk was full: perhaps it has room again
                    writer = SummaryWriter(run_dir)
                if writer is not None:
                    # one event with all values: a tenth of the cost of one add_scalar for each
                    summary = Summary(value=[Summary.Value(tag=tag, simple_value=metrics[tag]) for tag in metrics])
                    writer.file_writer.add_summary(summary, global_step)
                    if save:
                        writer.flush()  # so that no curve is shorter than its checkpoint
            except OSError as error:
                writer = None
                warn(f"nothing logged for a minute, training goes on: {error}")
            if save:
                save_time = now
                save_checkpoint(run_dir / "checkpoint.pt", checkpoint())
            recent = f"return {np.mean(recent_returns):.2f}" if recent_returns else "no episode has ended"
            progress.set_postfix_str(recent, refresh=False)
            progress.update(args.batch_size)
            if progress.disable and (last or now - print_time > 5):  # not a terminal: a line now and then
                print_time, elapsed = now, now - start_time
                shown = {"unit": " steps", "unit_scale": True, "ncols": 0, "postfix": recent}
                with suppress(OSError):  # it may go to a file on a full disk
                    print(tqdm.format_meter(global_step, total_steps, elapsed, initial=first_step, **shown), flush=True)
            if last:
                break
    finally:
        for signum, handler in old_handlers.items():
            signal.signal(signum, handler)
        progress.close()
        envs.close()
        if writer is not None:
            with suppress(OSError):
                writer.close()

    command = f"python {shlex.quote(os.path.relpath(__file__))}"
    run = shlex.quote(str(run_dir))
    if world_size > 1:
        dist.destroy_process_group()
        if rank > 0:
            return agent
    if stop is not None:
        extend = f" --total-timesteps {2 * total_steps}" if global_step == total_steps else ""
        print(f"stopped at step {global_step:,}; to go on: {command} --resume {run}{extend}", flush=True)
        raise SystemExit(128 + stop)
    print(f"last {len(recent_returns)} training episodes: {recent}")
    evaluate(args, run_dir, checkpoint())
    print(f"curves:   tensorboard --logdir {run}")
    print(f"watch it: {command} --evaluate {run} --capture-video")
    print(f"go on:    {command} --resume {run} --total-timesteps {2 * total_steps}")
    return agent


def main() -> None:
    """The command line."""
    # Read before all else, since the arguments of that run are the defaults of the flags.
    which_run = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    which_run.add_argument("--resume")
    which_run.add_argument("--evaluate")
    given, _ = which_run.parse_known_args()
    # TensorBoard's thread would print a traceback of a full disk, of which train() makes one line.
    threading.excepthook = lambda error: issubclass(error.exc_type, OSError) or threading.__excepthook__(error)
    try:
        default = Args()
        runs = [run for run in (given.resume, given.evaluate) if run]
        if len(runs) == 1:
            default = load_args(runs[0])
            default.capture_video &= given.evaluate is None
        args = tyro.cli(Args, description=__doc__, default=default)
        if args.evaluate:
            evaluate(args, *load_checkpoint(args.evaluate, args))
        else:
            train(args)
    except (UsageError, MemoryError) as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
