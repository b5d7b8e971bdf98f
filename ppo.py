"""Proximal Policy Optimization (PPO) for discrete actions, in one file.

    python ppo.py                                      # CartPole-v1: return 500 in about half a minute
    python ppo.py --env-id Acrobot-v1 --seed 2         # any environment with vectors, any seed
    python ppo.py --resume runs/RUN                    # goes on where RUN was stopped
    python ppo.py --evaluate runs/RUN --capture-video  # plays greedy episodes and films the first
    tensorboard --logdir runs                          # the learning curves, while it runs or later

The flags default to CartPole's; README.md has recipes for other environments.

Papers: PPO (Schulman et al., 2017, arXiv:1707.06347) and GAE (Schulman et al., 2016, arXiv:1506.02438).
"Detail n" is the n-th of The 37 Implementation Details of PPO (Huang et al., ICLR blog track, 2022).
"""

import argparse
import ast
import dataclasses
import io
import math
import multiprocessing
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
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

CHECKPOINT_SECONDS = 60  # a kill or a power cut costs at most about this much work
EVALUATION_STEPS = 100_000  # of an episode at most: without a time limit, a greedy policy may go round in circles


class UsageError(Exception):
    """What the user can put right: the command line prints it as one line and exits with code 2."""


def warn(message: str) -> None:
    """Print it on stderr. Where that goes to a full disk, it is lost: a warning must not end a run."""
    with suppress(OSError):
        tqdm.write(f"warning: {message}", file=sys.stderr)


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    """gymnasium id of the environment; `module:Name-v0` imports `module` first"""
    env_kwargs: tuple[str, ...] = ()
    """arguments for the environment, as in `--env-kwargs is_slippery=False map_name=8x8`"""
    exp_name: str = Path(__file__).stem
    """part of the run folder's name: runs/<env_id>__<exp_name>__<seed>__<unix time>"""
    seed: int = 1
    """seed of everything random: same seed, flags and machine, same result (on the CPU to the bit)"""
    total_timesteps: int = 500_000
    """steps to train for, over all environments; rounded up to whole iterations"""
    num_envs: int = 4
    """environments that are stepped together"""
    num_steps: int = 128
    """steps that each environment takes per iteration"""
    learning_rate: float = 1e-3
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
    clip_coef: float = 0.2
    """epsilon of the clipped objective: no gain from moving a probability ratio further than this from 1"""
    clip_vloss: bool = True
    """no gain either from moving a value further than clip_coef from its old estimate"""
    ent_coef: float = 0.0
    """weight of the entropy bonus, which keeps the policy exploring"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """longer gradients are scaled down to this norm"""
    target_kl: float | None = None
    """end the updates of an iteration once the policy's KL divergence from its old self exceeds this"""
    device: str = "cpu"
    """where the networks learn: `cpu` (faster for ones this small), `cuda`, `cuda:1`, ..."""
    compile: bool = False
    """compile the loss and its gradient with torch.compile: starts slower, then runs faster"""
    async_envs: bool = False
    """step each environment in a process of its own: pays where one step costs more than about 0.2 ms"""
    capture_video: bool = False
    """film environment 0 into the run's videos/ (episodes 0, 1, 8, 27, ..., 1000, 2000, ...)"""
    eval_episodes: int = 10
    """greedy episodes to play after training, or with `--evaluate`"""
    resume: str | None = None
    """go on with this run, a folder under runs/; a larger `--total-timesteps` extends it"""
    evaluate: str | None = None
    """play greedy episodes with the policy of this run, a folder under runs/, instead of training"""

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


class Film(gym.wrappers.RecordVideo):
    """gymnasium's films; one that cannot be written costs a warning, not the run."""

    def stop_recording(self) -> None:
        try:
            super().stop_recording()
        except OSError:  # its text is all that ffmpeg has to say
            self.recording, self.recorded_frames = False, []
            warn(f"{self._video_name}.mp4 not filmed: ffmpeg failed; is the disk full?")


def make_envs(args: Args, num_envs: int, video: dict | None = None) -> gym.vector.VectorEnv:
    """Make `num_envs` copies of the environment, stepped together (detail 1).

    `video`, if given, holds gymnasium's RecordVideo arguments, and the first copy is filmed.

    Observations that are not vectors are flattened by gymnasium (a Discrete one becomes one-hot).
    Autoreset is off: the caller sees each episode's true last observation and resets what has ended.
    Raises UsageError where the environment cannot be made or is not one for this script.
    """
    env_kwargs = {}
    for name, _, value in (text.partition("=") for text in args.env_kwargs):
        try:
            env_kwargs[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # not a Python literal: a string, as in map_name=8x8
            env_kwargs[name] = value

    def make_env(index: int) -> gym.Env:
        if multiprocessing.parent_process() and hasattr(os, "setpgrp"):
            os.setpgrp()  # with --async-envs, Ctrl-C and the like are for the main process alone
        film = video is not None and index == 0
        try:
            env = gym.make(args.env_id, **env_kwargs | ({"render_mode": "rgb_array"} if film else {}))
        except Exception as error:
            if film and "'render_mode'" in str(error):
                raise UsageError(f"{args.env_id} cannot be filmed: it takes no render_mode") from error
            if not (env_kwargs or isinstance(error, gym.error.Error | ImportError)):
                raise  # a bug in the environment: its author needs the traceback
            hint = "; for Atari games use ppo_atari.py" if "ALE/" in args.env_id else ""
            raise UsageError(f"cannot make {args.env_id}: {' '.join(str(error).split())}{hint}") from error

        if isinstance(env.action_space, Box):
            raise UsageError(f"{args.env_id} has continuous actions: use ppo_continuous_action.py")
        if not isinstance(env.action_space, Discrete):
            raise UsageError(f"{args.env_id} has actions {env.action_space}; supported: Discrete")
        space = env.observation_space
        if isinstance(space, Box) and space.dtype == np.uint8 and len(space.shape) in (2, 3):
            raise UsageError(f"{args.env_id} observes images of shape {space.shape}: use ppo_atari.py for Atari games")
        flat = Box | Discrete | MultiDiscrete | MultiBinary | Dict | Tuple
        if not (isinstance(space, flat) and space.is_np_flattenable):
            names = "Box, Discrete, MultiDiscrete, MultiBinary, and Dict and Tuple of these"
            raise UsageError(f"{args.env_id} has observations {space}; supported: {names}")
        if not isinstance(space, Box) or len(space.shape) != 1:
            env = gym.wrappers.FlattenObservation(env)
        if film:
            if env.render_mode != "rgb_array":
                raise UsageError(f"{args.env_id} cannot be filmed: it does not render to rgb_array")
            os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame needs no display then
            warnings.filterwarnings("ignore", ".*Overwriting existing videos")  # the names differ
            env = Film(env, **video)
        return env

    vector_env = gym.vector.AsyncVectorEnv if args.async_envs else gym.vector.SyncVectorEnv
    env_fns = [lambda index=index: make_env(index) for index in range(num_envs)]
    return vector_env(env_fns, copy=False, autoreset_mode=gym.vector.AutoresetMode.DISABLED)


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
    """The policy (actor) and the value function (critic), as two networks that share nothing (detail 13)."""

    def __init__(self, envs: gym.vector.VectorEnv) -> None:
        super().__init__()
        num_inputs = envs.single_observation_space.shape[0]
        self.num_actions = int(envs.single_action_space.n)
        self.actor = nn.Sequential(
            layer_init(nn.Linear(num_inputs, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, self.num_actions), std=0.01),  # so that every action starts equally likely
        )
        self.critic = nn.Sequential(
            layer_init(nn.Linear(num_inputs, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 1), std=1.0),
        )

    def sample_noise(self, num_steps: int, num_envs: int) -> torch.Tensor:
        """The randomness of a whole rollout: standard Gumbel, [num_steps, num_envs, num_actions]."""
        return -torch.empty(num_steps, num_envs, self.num_actions).exponential_().log()

    def act(self, observations: torch.Tensor, noise: torch.Tensor | float) -> torch.Tensor:
        """Actions, int64 [N], for observations [N, num_inputs]; noise 0 gives the greedy ones.

        argmax(logits + Gumbel noise) is distributed as softmax(logits), and quicker to have than a sample
        from a distribution object.
        """
        return (self.actor(observations) + noise).argmax(-1)

    def value(self, observations: torch.Tensor) -> torch.Tensor:
        """Estimated returns [...] for observations [..., num_inputs]."""
        return self.critic(observations).squeeze(-1)

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Log-probabilities of the actions, entropies of the policy (in nats) and values, each [...]."""
        logprobs = self.actor(observations).log_softmax(-1)
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), entropies, self.value(observations)


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
        free = {"resume", "evaluate", "device", "compile", "async_envs", "capture_video", "eval_episodes"}
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
    """Play one greedy episode in each of eval_episodes fresh environments.

    Returns the returns, [eval_episodes], and logs their mean as `eval/episodic_return`.
    """
    step = checkpoint["global_step"]
    video = {"video_folder": f"{run_dir}/videos", "name_prefix": f"eval-at-{step}", "episode_trigger": lambda n: n == 0}
    args = dataclasses.replace(args, async_envs=False)
    envs = make_envs(args, args.eval_episodes, video if args.capture_video else None)
    agent = Agent(envs)
    restore(args, checkpoint, agent)
    returns, ended = np.zeros(args.eval_episodes), np.zeros(args.eval_episodes, bool)
    observations, _ = envs.reset(seed=env_seeds(args.eval_episodes, args.seed, 1))
    for _ in range(EVALUATION_STEPS):
        if ended.all():
            break
        with torch.inference_mode():
            actions = agent.act(torch.as_tensor(observations, dtype=torch.float32), noise=0.0).numpy()
        observations, rewards, terminations, truncations, _ = envs.step(actions + envs.single_action_space.start)
        returns += np.where(ended, 0.0, rewards)  # the first episode of each environment counts
        ends = terminations | truncations
        ended |= ends
        if ends.any():
            observations, _ = envs.reset(options={"reset_mask": ends})
    envs.close()
    print(
        f"greedy evaluation at step {step:,}: return {returns.mean():.2f} +- {returns.std():.2f} "
        f"(min {returns.min():.2f}, max {returns.max():.2f}) over {len(returns)} episodes"
    )
    if not ended.all():
        print(f"{(~ended).sum()} of them did not end within {EVALUATION_STEPS:,} steps: their returns are up to there")
    try:
        with SummaryWriter(run_dir) as writer:
            writer.add_scalar("eval/episodic_return", returns.mean(), step)
    except OSError as error:
        warn(f"evaluation not logged: {error}")
    return returns


# -------------------------------------------------------------------------------------- training


def train(args: Args) -> Agent:
    """Train an agent, in a new run folder or in that of the run to resume, and return it.

    Raises UsageError, and SystemExit(128 + signal) after Ctrl-C or SIGTERM, the iteration being saved.
    """
    torch.set_num_threads(1)  # for networks this small, more threads are slower
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device).item()
        to_device = partial(torch.as_tensor, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from error
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiled = args.compile and shutil.which(compiler.split()[0]) is not None
    if args.compile and not compiled:
        print(f"--compile needs a C++ compiler and finds no {compiler}: training without it, only slower")
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
            run_dir.mkdir(parents=True)
        except OSError as error:
            raise UsageError(f"cannot make the run's folder: {error}") from error
    first_step = global_step = first_iteration * args.batch_size
    total_steps = args.num_iterations * args.batch_size

    try:
        video = {"video_folder": f"{run_dir}/videos", "name_prefix": f"train-from-{first_step}"}
        envs = make_envs(args, args.num_envs, video if args.capture_video else None)
    except UsageError:
        if not args.resume:
            run_dir.rmdir()
        raise
    agent = Agent(envs).to(device)
    # One vector holds all weights, and the agent's parameters become views of it: clipping and Adam
    # then cost one operation each instead of one per layer, which saves 5 % of the run time.
    parameters = list(agent.parameters())
    weights = nn.utils.parameters_to_vector(parameters).detach()
    nn.utils.vector_to_parameters(weights, parameters)
    optimizer = torch.optim.Adam([weights], lr=args.learning_rate, eps=1e-5, fused=True)  # detail 3
    if args.resume:
        restore(args, saved, agent, optimizer)

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

    if compiled:
        torch._dynamo.config.trace_autograd_ops = True  # lets one graph hold the gradient, too
        loss_gradient = torch.compile(loss_gradient, fullgraph=True)

    # The rollout, in host memory. next_observations[t] is what followed observations[t], even where an
    # episode ended there; observations[t + 1] is then the first one of the next episode.
    T, N = args.num_steps, args.num_envs
    observations = np.zeros((T, N, *envs.single_observation_space.shape), np.float32)
    next_observations = np.zeros_like(observations)
    actions = np.zeros((T, N), np.int64)
    rewards = np.zeros((T, N), np.float32)
    terminations = np.zeros((T, N), bool)
    truncations = np.zeros((T, N), bool)
    episode_returns, episode_lengths = np.zeros(N), np.zeros(N, np.int64)  # so far, of the current episodes
    first_action = envs.single_action_space.start
    observation, _ = envs.reset(seed=env_seeds(N, args.seed, 0, first_iteration))

    # What an interrupted run logged after its last checkpoint is purged: it will be played anew.
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
    print(f"{run_dir}: steps {global_step:,} to {total_steps:,}{asked}, {args.batch_size:,} per iteration", flush=True)
    progress = tqdm(total=total_steps, initial=global_step, unit=" steps", unit_scale=True, disable=None)
    start_time = iteration_time = save_time = print_time = time.monotonic()
    try:
        for iteration in range(first_iteration, args.num_iterations):
            # ------------------------------ (a) roll out: play num_steps steps in every environment
            finished_returns, finished_lengths = [], []
            noise = agent.sample_noise(T, N).to(device)
            with torch.inference_mode():
                for t in range(T):
                    observations[t] = observation
                    actions[t] = agent.act(to_device(observations[t]), noise[t]).cpu().numpy()
                    observation, reward, terminations[t], truncations[t], _ = envs.step(actions[t] + first_action)
                    next_observations[t], rewards[t] = observation, reward
                    episode_returns += reward
                    episode_lengths += 1
                    ended = terminations[t] | truncations[t]
                    if ended.any():
                        finished_returns.extend(episode_returns[ended])
                        finished_lengths.extend(episode_lengths[ended])
                        episode_returns[ended] = episode_lengths[ended] = 0
                        observation, _ = envs.reset(options={"reset_mask": ended})
            finite = np.isfinite(observations).all(-1) & np.isfinite(next_observations).all(-1) & np.isfinite(rewards)
            if not finite.all():
                save_checkpoint(run_dir / "checkpoint.pt", checkpoint())  # so far, all was well
                t, n = np.argwhere(~finite)[0]
                raise UsageError(f"environment {n} returned NaN or infinity at step {global_step + t * N + n + 1}")

            # ----------------- (b) estimate advantages: how much better than expected was each action?
            b_observations, b_actions = to_device(observations), to_device(actions)
            with torch.no_grad():
                old_logprobs, _, values = agent(b_observations, b_actions)
                next_values = agent.value(to_device(next_observations))
                ends = to_device(terminations), to_device(truncations)
                advantages = compute_gae(to_device(rewards), values, next_values, *ends, args.gamma, args.gae_lambda)
                returns = advantages + values
            batch = (b_observations, b_actions, old_logprobs, values, advantages, returns)
            batch = [x.flatten(0, 1) for x in batch]  # each [num_steps * num_envs, ...]

            # --------------------------------- (c) learn: update_epochs passes over shuffled minibatches
            remaining = 1 - iteration / args.num_iterations
            learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)  # detail 4
            optimizer.param_groups[0]["lr"] = learning_rate
            all_losses, log_ratios, num_updates = [], [], 0
            for minibatch in minibatches(args, batch):
                gradient, losses, log_ratio = loss_gradient(*minibatch)
                all_losses.append(losses)
                log_ratios.append(log_ratio)
                if args.target_kl is not None and approx_kl(log_ratio) > args.target_kl:
                    break
                weights.grad = gradient * (args.max_grad_norm / (gradient.norm() + 1e-6)).clamp(max=1)  # detail 11
                optimizer.step()
                num_updates += 1
            global_step += args.batch_size
            if not torch.isfinite(weights).all():
                raise UsageError(f"the weights became NaN by step {global_step}: try a lower --learning-rate")

            # ------------------------------------------------------------------------ (d) log and save
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
            last = iteration + 1 == args.num_iterations or stop_signal is not None
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
    except BaseException:
        for process in getattr(envs, "processes", ()):  # of --async-envs: one may be stuck, and close() would wait
            process.kill()
        raise
    finally:
        for signum, handler in old_handlers.items():
            signal.signal(signum, handler)
        progress.close()
        with suppress(EOFError, OSError):
            envs.close()
        if writer is not None:
            with suppress(OSError):
                writer.close()

    command = f"python {shlex.quote(os.path.relpath(__file__))}"
    run = shlex.quote(str(run_dir))
    if stop_signal is not None:
        extend = f" --total-timesteps {2 * total_steps}" if global_step == total_steps else ""
        print(f"stopped at step {global_step:,}; to go on: {command} --resume {run}{extend}", flush=True)
        raise SystemExit(128 + stop_signal)
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
