# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[classic-control,box2d,mujoco]>=1.4,<1.5",
#     "mujoco>=3.1,<3.16",
#     "numpy>=2.0,<3",
#     "tensorboard>=2.20,<3",
#     "tyro>=1.0,<2",
#     "moviepy>=2.1,<3",
# ]
# ///
"""Proximal Policy Optimization (PPO) for continuous actions, in one file.

    python ppo_continuous_action.py                              # HalfCheetah-v5: 5000 in 1M steps
    python ppo_continuous_action.py --env-id Hopper-v5 --seed 2  # another environment and seed
    python ppo_continuous_action.py --resume runs/RUN            # continue a stopped run
    python ppo_continuous_action.py --evaluate runs/RUN --render # watch greedy episodes in a window
    python ppo_continuous_action.py --evaluate runs/RUN --capture-video  # film greedy episodes
    tensorboard --logdir runs                                    # learning curves

Differs from ppo.py in the policy, a normal distribution in units of the range of actions, and in
normalizing observations and rewards.

PPO itself is what stands from layer_init() to the end of train(); the rest supports it.
In a notebook or debugger: `from ppo_continuous_action import Args, train; run = train(Args())`.
For a loop of one's own: make_envs, Agent, compute_gae, ppo_loss, load_agent, evaluate.
To cut it down, begin with --resume, --compile, videos, signals, checks and target_kl.

    T, N       num_steps, of each environment in an iteration, and num_envs
    batch      the T * N samples of an iteration, split into num_minibatches in each epoch
    detail n   of The 37 Implementation Details of Proximal Policy Optimization (Huang et al.),
               https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/

Papers: PPO (Schulman et al., 2017, arXiv:1707.06347), GAE (Schulman et al., arXiv:1506.02438).
"""

import ast
import errno
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium import spaces
from torch import nn
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    # The run

    env_id: str = "HalfCheetah-v5"  # a Gymnasium id; `module:Name-v0` imports `module` first
    env_kwargs: tuple[str, ...] = ()  # arguments of the environment, e.g. `max_episode_steps=200`
    exp_name: str = Path(__file__).stem  # in the run's name, <env_id>__<exp_name>__<seed>__<time>
    seed: int = 1  # of all random numbers; the same on one CPU gives bitwise the same results
    device: str = "cpu"  # `cpu` (faster for networks this small), `cuda`, `cuda:1`, ...
    compile: bool = False  # compile the gradient step with torch.compile; needs a C++ compiler
    async_envs: bool = False  # a process per environment; pays off if a step takes over 0.2 ms
    capture_video: bool = False  # film 2000 frames from the start of episode 0, 1, 8, 27, ...

    # PPO; the defaults are those that do best in HalfCheetah, Hopper and Walker2d together

    total_timesteps: int = 1_000_000  # steps over all environments, rounded up to whole iterations
    num_envs: int = 16  # environments stepped together; more make a batch larger and more varied
    num_steps: int = 128  # steps of each environment per iteration; more see later rewards
    learning_rate: float = 3e-4  # of Adam; larger learns faster, and less stably
    anneal_lr: bool = True  # reduce the learning rate linearly to zero over the run
    gamma: float = 0.99  # discount factor; closer to 1 looks further ahead
    gae_lambda: float = 0.95  # lambda of GAE: 0 is one-step TD, 1 Monte Carlo, with more variance
    num_minibatches: int = 32  # per epoch; more take more, and noisier, gradient steps
    update_epochs: int = 10  # passes over each batch; more use each sample more often
    norm_adv: bool = True  # normalize advantages in each minibatch
    clip_coef: float = 0.2  # clip range of the probability ratio; larger allows larger changes
    clip_vloss: bool = True  # clip the change of values in the value loss, by clip_coef
    ent_coef: float = 0.0  # coefficient of the entropy bonus; larger explores more
    vf_coef: float = 0.5  # coefficient of the value loss
    max_grad_norm: float = 0.5  # a gradient with a larger norm is scaled down to this norm
    target_kl: float | None = None  # end the epochs once the approximate KL divergence is larger
    max_kl: float = 0.03  # lower the learning rate after iterations with a larger KL divergence

    # Evaluation and earlier runs

    eval_episodes: int = 10  # greedy episodes after training and by `--evaluate`; 0: none
    render: bool = False  # show the episodes of an evaluation in a window
    resume: str | None = None  # resume a run, e.g. `runs/RUN`; larger total_timesteps extend it
    evaluate: str | None = None  # evaluate the policy of a run, e.g. `runs/RUN`

    def __post_init__(self):
        """Check the values; numbers of NumPy become Python's. Raises UsageError."""
        for name, value in vars(self).items():
            if isinstance(value, np.generic):  # a checkpoint with it could not be loaded
                setattr(self, name, value.item())
        sizes = (self.total_timesteps, self.num_envs, self.num_steps, self.num_minibatches)
        if min(*sizes, self.update_epochs) < 1:
            raise UsageError("timesteps, envs, steps, minibatches and epochs must be positive")
        if not all(text.count("=") == 1 for text in self.env_kwargs):
            raise UsageError("env_kwargs must be name=value, separated by spaces")
        displays = {"DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"}
        if self.render and sys.platform == "linux" and not displays & os.environ.keys():
            raise UsageError("render needs a display; --capture-video films instead")


class Environment(gym.Wrapper):
    """An environment as train() needs it: its observations are vectors, float32.

    Leaves out the options of reset(), and info: vector environments merge the infos of all copies,
    which fails where these differ in shape or type. A fork that needs an entry returns it here, for
    train() to use.
    """

    def __init__(self, env):
        super().__init__(env)
        space = self.space = env.observation_space
        self.num_inputs = len(numbers_in(space, space.sample()))
        if self.num_inputs == 0:
            raise UsageError(f"observations are not numbers: {space}")
        if space.dtype == np.uint8 and len(space.shape) > 1 and space.high.max() > 99:  # an image
            raise UsageError(f"for images see docs/forks.md: {space}")
        self.observation_space = spaces.Box(-np.inf, np.inf, (self.num_inputs,))

    def vector(self, observation):
        """An observation, which may be a torch tensor (on a GPU, add .cpu() here), as a vector."""
        return np.asarray(numbers_in(self.space, observation), np.float32).reshape(self.num_inputs)

    def reset(self, *, seed=None, options=None):
        if seed is not None:  # for environments that draw from the global generators
            random.seed(seed)
            np.random.seed(seed)
        observation, _ = self.env.reset(seed=seed)
        return self.vector(observation), {}

    def step(self, action):
        observation, reward, terminated, truncated, _ = self.env.step(action)
        reward = reward.item() if isinstance(reward, np.ndarray) else float(reward)
        return self.vector(observation), reward, terminated, truncated, {}


def make_envs(args, num_envs, render_mode=None, video_folder=None):
    """Make `num_envs` copies of the environment, stepped together (detail 1). Raises UsageError.

    Autoreset is off: step() returns the last observation of an episode, and the caller resets the
    environment. With a `video_folder`, episodes of the first copy are filmed.
    """
    main_process = os.getpid()

    def make_env(index):
        if os.getpid() != main_process:  # a process of --async-envs, which Ctrl-C must not end
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        film = video_folder and index == 0
        if film and sys.platform == "linux" and "DISPLAY" not in os.environ:
            os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo then renders without a display
        env = make_gym_env(args, "rgb_array" if film else render_mode)
        # A fork adds its wrappers here, for training and evaluation. Rewards and returns are those
        # of the outermost one; what a wrapper has learned, e.g. a mean, is not in the checkpoint.
        if not isinstance(env.action_space, spaces.Box):
            raise UsageError(f"{env.action_space} is not Box; see ppo.py for Discrete")
        env = Environment(env)
        renderer = getattr(env.unwrapped, "mujoco_renderer", None)
        if film and renderer and renderer.camera_id == -1 and renderer.model.ncam:
            renderer.camera_id = 0  # the camera that follows the robot
        return gym.wrappers.RecordVideo(env, video_folder, video_length=2000) if film else env

    vector_class = gym.vector.AsyncVectorEnv if args.async_envs else gym.vector.SyncVectorEnv
    env_fns = [partial(make_env, index) for index in range(num_envs)]
    # What step() returns is overwritten by the next step: train() copies it.
    return vector_class(env_fns, copy=False, autoreset_mode=gym.vector.AutoresetMode.DISABLED)


def from_units(space, u):
    """Actions in the shape and dtype of `space`, for `u` in units of its range, [N, num_actions].

    A component is center + u * half range, clipped to its bounds (detail 27). With only one bound,
    the range is that of 2 beside it; with none, it is [-1, 1].
    """
    # A bound of 1e12 or more, such as the largest float32, is none.
    lowest, highest = space.low.astype(float), space.high.astype(float)
    low = np.where(lowest > -1e12, lowest, np.where(highest < 1e12, highest - 2, -1.0))
    high = np.where(highest < 1e12, highest, low + 2)
    actions = (low + high) / 2 + u.reshape(-1, *space.shape) * (high - low) / 2
    if np.issubdtype(space.dtype, np.integer):
        actions = actions.round()
    return actions.clip(lowest, highest).astype(space.dtype)


def layer_init(layer, std=2**0.5):
    """Initialize with orthogonal weights and zero biases (detail 2)."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(num_inputs, num_outputs, std):
    """A network of two hidden layers. `std` scales the weights of its last layer."""
    return nn.Sequential(
        layer_init(nn.Linear(num_inputs, 64)),
        nn.Tanh(),
        layer_init(nn.Linear(64, 64)),
        nn.Tanh(),
        layer_init(nn.Linear(64, num_outputs), std),
    )


class RunningStatistics(nn.Module):
    """Mean and standard deviation of all data so far, saved with the agent's weights."""

    def __init__(self, *shape):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def update(self, x):
        """Add the data x, [N, *shape], by the parallel algorithm of Chan et al. (1979)."""
        x = x.double()
        old = self.count / (self.count + len(x))  # the share of the earlier data
        difference = x.mean(0) - self.mean
        variance = old * self.std.double().square() + (1 - old) * x.var(0, correction=0)
        variance += old * (1 - old) * difference.square()
        self.count += len(x)
        self.mean += (1 - old) * difference
        # The rounding of float32 must not pass for the deviation of a constant.
        self.std.copy_(variance.sqrt().clamp(min=1e-6 * self.mean.abs() + 1e-12))


class Agent(nn.Module):
    """The policy (a normal distribution, detail 23) and the value function (detail 26).

    In shapes, [...] stands for [N], [T, N] or [minibatch_size].
    """

    def __init__(self, envs):
        super().__init__()
        num_inputs = envs.single_observation_space.shape[0]
        num_actions = math.prod(envs.single_action_space.shape)
        self.observation_statistics = RunningStatistics(num_inputs)
        self.return_statistics = RunningStatistics()
        # Another network goes here, and an auxiliary head, whose loss is added in ppo_loss().
        self.actor = mlp(num_inputs, num_actions, std=0.01)  # actions begin in the middle
        self.critic = mlp(num_inputs, 1, std=1.0)
        # The same deviation for all observations (detail 24), at first a quarter of the range. From
        # half of it, HalfCheetah reached 3173 instead of 5435 (five and ten seeds).
        self.log_std = nn.Parameter(torch.full((num_actions,), math.log(0.5)))

    def normalize(self, observations):
        """Observations of mean 0 and variance 1, clipped to [-10, 10] (details 28 and 29)."""
        statistics = self.observation_statistics
        return ((observations - statistics.mean) / statistics.std).clamp(-10, 10)

    def act(self, observations, greedy=False):
        """Actions [N, num_actions] for observations [N, num_inputs]: samples, or the means."""
        means = self.actor(self.normalize(observations))
        if greedy:
            return means
        return means + self.log_std.exp() * torch.randn_like(means)

    def value(self, observations):
        """Values [...] of observations [..., num_inputs]."""
        return self.critic(self.normalize(observations)).squeeze(-1)

    def evaluate_actions(self, batch):
        """Log-probabilities of batch["actions"], entropies (in nats) and values, each [...].

        tests/test_continuous_agent.py compares the formulas with torch.distributions.
        """
        observations = self.normalize(batch["observations"])
        means = self.actor(observations)
        deviations = (batch["actions"] - means) * (-self.log_std).exp()
        log_densities = -0.5 * deviations.square() - self.log_std - 0.5 * math.log(2 * math.pi)
        logprobs = log_densities.sum(-1)  # independent components (detail 25)
        entropies = (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand_as(logprobs)
        return logprobs, entropies, self.critic(observations).squeeze(-1)


def compute_gae(rewards, values, next_values, terminations, truncations, gamma, gae_lambda):
    """Advantages by generalized advantage estimation (detail 5; GAE paper, equations 11 to 16).

        delta_t = r_t + gamma * V(s'_t) * (1 - terminated_t) - V(s_t)
        A_t     = delta_t + gamma * lambda * (1 - ended_t) * A_{t+1}

    s'_t is the true next observation, also at the end of an episode. After a termination there is
    no further reward and V(s'_t) is left out; a truncated episode (e.g. by a time limit) would go
    on, and V(s'_t) is kept. All are NumPy arrays [num_steps, num_envs], terminations and
    truncations boolean. Returns the advantages.
    """
    next_values = np.where(terminations, 0.0, next_values)  # the last observation may be NaN
    deltas = rewards + gamma * next_values - values
    decays = gamma * gae_lambda * ~(terminations | truncations)
    advantages, advantage = np.zeros_like(deltas), 0.0
    for t in reversed(range(len(deltas))):
        advantages[t] = advantage = deltas[t] + decays[t] * advantage
    return advantages


def ppo_loss(agent, args, batch):
    """The loss of a minibatch and its metrics (detail 12).

    `batch` is a dict of tensors [minibatch_size, ...]: observations, actions, old_logprobs,
    old_values, advantages and returns. An auxiliary loss is added here; train() puts what it needs
    besides into the batch.
    """
    logprobs, entropies, values = agent.evaluate_actions(batch)
    log_ratio = logprobs - batch["old_logprobs"]
    ratio = log_ratio.exp()

    # Policy loss: the clipped surrogate objective (detail 8, PPO equation 7)
    advantages = batch["advantages"]
    if args.norm_adv:  # detail 7
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages).mean()

    # Value loss
    squared_errors = (values - batch["returns"]).square()
    if args.clip_vloss:  # detail 9
        old_values = batch["old_values"]
        clipped_values = values.clamp(old_values - args.clip_coef, old_values + args.clip_coef)
        squared_errors = torch.max(squared_errors, (clipped_values - batch["returns"]).square())
    value_loss = 0.5 * squared_errors.mean()

    # Entropy bonus, and the sum (detail 10, PPO equation 9)
    entropy = entropies.mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy

    with torch.no_grad():
        metrics = {
            "losses/policy_loss": policy_loss.detach(),
            "losses/value_loss": value_loss.detach(),
            "losses/entropy": entropy.detach(),
            "losses/approx_kl": (ratio - 1 - log_ratio).mean(),  # k3 of joschu.net/blog/kl-approx
            "losses/clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
        }
    return loss, metrics


def train(args):
    """Train an agent and evaluate it. Returns the run's folder, a Path.

    A run is resumed with its own flags by train(replace(load_checkpoint(run)["args"], resume=run)).
    Raises UsageError, and Stopped, a KeyboardInterrupt, when a signal has ended training.
    """
    T, N, batch_size = args.num_steps, args.num_envs, args.num_steps * args.num_envs
    if batch_size % args.num_minibatches:
        raise UsageError("num_minibatches must divide num_envs * num_steps")

    # ---------------------------------------------- set-up: device, environments, agent, optimizer
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # for small batches faster than more threads
    device = get_device(args.device)
    to_device = partial(torch.as_tensor, device=device)
    # What is random: the weights (seeded here), actions and minibatches (seeded in each iteration),
    # environments and the global generators of `random` and NumPy (seeded by envs.reset() below).
    torch.manual_seed(args.seed)
    run_dir = Path(args.resume) if args.resume else make_run_dir(args)
    videos = f"{run_dir}/videos/train-{int(time.time())}" if args.capture_video else None
    try:
        envs = make_envs(args, N, video_folder=videos)
    except BaseException:  # Ctrl-C as well
        if not args.resume:
            shutil.rmtree(run_dir)
        raise
    agent = Agent(envs).to(device)
    parameters = list(agent.parameters())
    optimizer = torch.optim.Adam(
        # A dict for each learning rate: a fork may give agent.critic one of its own.
        [{"params": parameters, "initial_lr": args.learning_rate, "lr_scale": 1.0}],
        lr=to_device(args.learning_rate),
        eps=1e-5,  # Adam's epsilon (detail 3)
        fused=not args.compile,  # one kernel, 0.05 ms instead of 0.2; torch.compile makes its own
        capturable=args.compile and device.type == "cuda",  # Adam's step count on the GPU
    )
    global_step = 0
    if args.resume:
        checkpoint = load_checkpoint(run_dir, agent)
        # Adam's moments and step count: learning rate and other options are those of this command.
        state = {"state": checkpoint["optimizer"]["state"]}
        optimizer.load_state_dict(optimizer.state_dict() | state)
        old_group = checkpoint["optimizer"]["param_groups"][0]
        optimizer.param_groups[0]["lr_scale"] = old_group.get("lr_scale", 1.0)
        global_step = checkpoint["global_step"]

    # ------------------------------------------------------------------ set-up: the gradient step
    def update(minibatch):
        """Take one gradient step. Returns metrics."""
        optimizer.zero_grad()
        loss, metrics = ppo_loss(agent, args, minibatch)
        loss.backward()
        # Detail 11. On a GPU, torch 2.11 fails to compile clipping with foreach.
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm, foreach=False)
        optimizer.step()
        return metrics | {"losses/grad_norm": grad_norm}

    if args.compile:
        torch.compiler.reset()  # or only eight runs of a process would be compiled
        torch._dynamo.config.trace_autograd_ops = True  # compile backward() as well
        update = torch.compile(update)

    # ------------------------------------------------------------------------ set-up: the rollout
    # next_observations[t] is what followed observations[t]. At the end of an episode it is the true
    # last observation, and observations[t + 1] is the first one of the next episode. The arrays are
    # NumPy's, as are those of the vector environment; ppo_vector.py is for those that use torch.
    space = envs.single_observation_space
    observations = np.zeros((T, N, *space.shape), space.dtype)
    next_observations = np.zeros_like(observations)
    action_space = envs.single_action_space
    actions = np.zeros((T, N, math.prod(action_space.shape)), np.float32)  # in units of the range
    rewards = np.zeros((T, N), np.float32)
    terminations = np.zeros((T, N), bool)
    truncations = np.zeros((T, N), bool)
    discounted_returns = np.zeros((T, N))  # of each episode, up to each step
    discounted_return = np.zeros(N)
    episode_returns = np.zeros(N)  # of the current episodes, up to now
    episode_lengths = np.zeros(N, np.int64)
    recent_returns = []  # of the last 100 episodes that ended
    observation, _ = envs.reset(seed=make_seed("training", args.seed, global_step))

    # ----------------------------------------------------------------------------- set-up: logging
    writer = SummaryWriter(run_dir, purge_step=global_step + 1)  # hides steps after the checkpoint
    flags = [f"    {name}: {value}" for name, value in vars(args).items()]
    writer.add_text("hyperparameters", "\n".join(flags))
    num_iterations = math.ceil((args.total_timesteps - global_step) / batch_size)  # to go
    total_steps = global_step + num_iterations * batch_size
    print(f"{run_dir}: steps {global_step:,} to {total_steps:,} by {batch_size:,}", flush=True)
    if global_step >= total_steps:
        print("this run is finished; a larger --total-timesteps extends it, at a higher rate")
    last_save = last_print = -math.inf

    with delayed_signals() as received, writer, closing_envs(envs):
        while global_step < total_steps:
            # --------------------------------- (a) roll out: num_steps steps in every environment
            iteration_start = time.monotonic()
            # A seed for each iteration: a resumed run begins new episodes, but draws the same noise
            # and minibatches as one that has not been stopped.
            torch.manual_seed(make_seed("iteration", args.seed, global_step // batch_size))
            finished_returns, finished_lengths = [], []
            for t in range(T):
                observations[t] = observation
                with torch.no_grad():  # (b) computes the log-probabilities
                    actions[t] = agent.act(to_device(observations[t])).cpu().numpy()
                transition = envs.step(from_units(action_space, actions[t]))
                observation, rewards[t], terminations[t], truncations[t], _ = transition
                next_observations[t] = observation
                discounted_return = args.gamma * discounted_return + rewards[t]
                discounted_returns[t] = discounted_return
                episode_returns += rewards[t]
                episode_lengths += 1
                ended = terminations[t] | truncations[t]
                if ended.any():
                    finished_returns.extend(episode_returns[ended])
                    finished_lengths.extend(episode_lengths[ended])
                    episode_returns[ended] = episode_lengths[ended] = discounted_return[ended] = 0
                    observation, _ = envs.reset(options={"reset_mask": ended})

            # -------------------------------------------------------------------- (b) advantages
            # An intrinsic reward would be added to `rewards` here; returns are logged without it. A
            # further tensor in the batch, [T, N, ...], reaches ppo_loss() by itself.
            batch = {"observations": to_device(observations), "actions": to_device(actions)}
            with torch.no_grad():
                # Not kept while acting: one pass over the rollout is faster than one for each step.
                # The weights are still the same (with dropout, the log-probabilities would not be).
                batch["old_logprobs"], _, _ = agent.evaluate_actions(batch)
                # From here on, observations and rewards are normalized with this rollout's as well.
                agent.observation_statistics.update(batch["observations"].flatten(0, 1))
                agent.return_statistics.update(to_device(discounted_returns).flatten())
                batch["old_values"] = agent.value(batch["observations"])
                next_values = agent.value(to_device(next_observations))
            # Rewards are divided by the deviation of returns, and clipped (details 30 and 31).
            scaled = (rewards / agent.return_statistics.std.item()).clip(-10, 10)
            values, next_values = batch["old_values"].cpu().numpy(), next_values.cpu().numpy()
            advantages = compute_gae(
                scaled, values, next_values, terminations, truncations, args.gamma, args.gae_lambda
            )
            batch["advantages"] = to_device(advantages)
            batch["returns"] = batch["advantages"] + batch["old_values"]
            batch = {name: x.flatten(0, 1) for name, x in batch.items()}  # each [batch_size, ...]

            # ---------------------------- (c) learn: epochs over shuffled minibatches (detail 6)
            fraction = 1 - global_step / total_steps if args.anneal_lr else 1.0
            for group in optimizer.param_groups:
                # Detail 4. A number instead of a tensor would make --compile compile again.
                group["lr"] = to_device(fraction * group["lr_scale"] * group["initial_lr"])
            updates = []  # the metrics of each update
            for _ in range(args.update_epochs):
                permutation = torch.randperm(batch_size).to(device)
                for indices in permutation.split(batch_size // args.num_minibatches):
                    # index_select() takes half the time of x[indices], a fiftieth of a run.
                    minibatch = {name: x.index_select(0, indices) for name, x in batch.items()}
                    updates.append(update(minibatch))
                last_kl = updates[-1]["losses/approx_kl"]
                if args.target_kl is not None and last_kl > args.target_kl:
                    break
            # The more joints, the more a step changes the policy. Without this, the divergence is
            # 0.02 in HalfCheetah and above 0.1 in Humanoid, which ends at 840 instead of 1380.
            kl = torch.stack([x["losses/approx_kl"] for x in updates]).mean()
            for group in optimizer.param_groups:
                raised = min(1.25 * group["lr_scale"], 1.0)
                group["lr_scale"] = group["lr_scale"] / 1.25 if kl > args.max_kl else raised
            global_step += batch_size

            # ------------------------------------------------------------------ (d) log and save
            metrics = {}  # means over the updates
            for name in updates[0]:
                metrics[name] = torch.stack([x[name] for x in updates]).mean().item()
            # The last observation of a terminated episode is not used, and may be NaN.
            next_used = next_observations[~terminations]
            inputs = {"observation": observations, "next observation": next_used, "reward": rewards}
            check_finite(inputs | metrics, global_step)
            # An advantage is the difference of return and value.
            unexplained = (batch["advantages"].var() / batch["returns"].var()).item()
            metrics["losses/explained_variance"] = 1 - unexplained
            metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"].item()
            now = time.monotonic()
            metrics["charts/SPS"] = batch_size / (now - iteration_start)
            metrics["charts/episodes"] = len(finished_returns)
            if finished_returns:
                metrics["charts/episodic_return"] = np.mean(finished_returns)
                metrics["charts/episodic_length"] = np.mean(finished_lengths)
                recent_returns = (recent_returns + finished_returns)[-100:]
            for name, value in metrics.items():
                writer.add_scalar(name, value, global_step)

            if now - last_save > 60:  # seconds
                last_save = now
                writer.flush()
                save_checkpoint(run_dir, args, agent, optimizer, global_step)
            if now - last_print > 2 or global_step >= total_steps:
                last_print = now
                speed = f"{metrics['charts/SPS']:,.0f} steps/s"
                mean = f"{np.mean(recent_returns):.2f}" if recent_returns else "not yet"
                print(f"step {global_step:,}  {speed}  return {mean}", flush=True)
            if received:
                break

    save_checkpoint(run_dir, args, agent, optimizer, global_step)
    if received:
        raise Stopped(run_dir, received[0])
    if args.eval_episodes > 0:
        evaluate(args, run_dir)
    return run_dir


# --------------------------------------------------------------------------------------------------
# This is the end of PPO. The rest: errors, spaces, checkpoints, evaluation and the command line.


class UsageError(Exception):
    """An error that main() prints as one line, with exit code 2."""


class Stopped(KeyboardInterrupt):
    """A signal has ended training, and the run is saved. `args`: the run's folder, the signal."""


@contextmanager
def delayed_signals():
    """Yield a list that receives Ctrl-C and SIGTERM. A second one has its usual effect."""
    received, old_handlers = [], {}

    def handle(signum, frame):
        received.append(signum)
        signal.signal(signum, old_handlers[signum])
        # Not print(), which may have been interrupted itself.
        os.write(2, b"\nstopping after this iteration; a second signal stops at once\n")

    try:
        if threading.current_thread() is threading.main_thread():  # others get no signals
            for signum in (signal.SIGINT, signal.SIGTERM):
                old_handlers[signum] = signal.signal(signum, handle)
        yield received
    except (EOFError, OSError):  # SIGTERM may have ended processes of environments as well
        if not received:
            raise
    except KeyboardInterrupt:
        traceback.print_exc()  # after a second signal: where training hangs
        raise
    finally:
        for signum, handler in old_handlers.items():
            signal.signal(signum, handler)


@contextmanager
def closing_envs(envs):
    """Close environments at the end. Their errors are shown, and processes that hang are ended."""
    try:
        yield
    finally:
        try:
            envs.close(timeout=0)
        except (EOFError, ConnectionError):
            pass  # the processes of --async-envs have been ended by a signal
        except Exception:
            traceback.print_exc()


def get_device(name):
    """The torch.device of this name. Raises UsageError."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name}: {error}") from error


def check_finite(numbers, step):
    """Raise UsageError if one of these numbers or arrays, a dict, is NaN or infinite."""
    for name, x in numbers.items():
        if not np.isfinite(x).all():
            raise UsageError(f"NaN or infinite {name} before step {step:,}")


print_once = cache(print)  # each message once


def numbers_in(space, x, name="observation"):
    """All numbers in x, of this space, as one vector. Parts without a fixed length are left out."""
    if isinstance(space, spaces.Box):
        return np.ravel(x)
    if isinstance(space, spaces.Dict):
        return np.concatenate([numbers_in(space[key], x[key], key) for key in space])
    if isinstance(space, spaces.Tuple):
        return np.concatenate([numbers_in(*pair) for pair in zip(space, x, strict=True)])
    if isinstance(space, (spaces.Discrete, spaces.MultiBinary, spaces.MultiDiscrete)):
        return spaces.flatten(space, x)  # one-hot
    print_once(f"left out of the observations: {name}, a {type(space).__name__}")
    return np.zeros(0)


def make_gym_env(args, render_mode):
    """Make one environment by gymnasium. Raises UsageError."""
    kwargs = {"render_mode": render_mode} if render_mode else {}
    words = {"true": True, "false": False, "none": None}
    for name, value in (text.split("=") for text in args.env_kwargs):
        try:
            kwargs[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[name] = words.get(value.lower(), value)
    try:
        env = gym.make(args.env_id, **kwargs)
    except (gym.error.Error, ModuleNotFoundError, TypeError) as error:
        if isinstance(error, TypeError) and "unexpected keyword" not in str(error):
            raise  # a fault of the environment's own
        hint = "; Atari: ppo_atari.py" if isinstance(error, gym.error.UnregisteredEnv) else ""
        raise UsageError(f"cannot make {args.env_id}: {error}{hint}") from error
    if render_mode and env.render_mode != render_mode:
        raise UsageError(f"{args.env_id} cannot be rendered as {render_mode}")
    return env


def make_seed(*parts):
    """A seed from all parts, below 2**30. Vector environments take it and the numbers after it."""
    return random.Random(repr(parts)).getrandbits(30)


def make_run_dir(args):
    """Make the folder of a new run. Returns its Path."""
    name = re.sub(r"[/:\\]", "-", f"{args.env_id}__{args.exp_name}__{args.seed}")
    timestamp = int(time.time())
    while True:
        run_dir = Path("runs", f"{name}__{timestamp}")
        try:
            run_dir.mkdir(parents=True)
            return run_dir
        except FileExistsError:  # another run began in this second
            timestamp += 1


def save_checkpoint(run_dir, args, agent, optimizer, global_step):
    """Replace the run's checkpoint in one step: a kill leaves the old one or the new one."""
    checkpoint = {
        "script": Path(__file__).name,
        "args": vars(args) | {"resume": None, "render": False},
        "agent": agent.state_dict(),
        "optimizer": optimizer.state_dict(),
        "global_step": global_step,
    }
    with open(run_dir / "checkpoint.tmp", "wb") as file:  # raises OSError if the disk is full
        torch.save(checkpoint, file)
    os.replace(run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt")


def load_checkpoint(run, agent=None):
    """Load a run's checkpoint, e.g. of `runs/RUN`, and its weights into an agent, if one is given.

    Its "args" are Args. Raises UsageError.
    """
    path, maker = Path(run, "checkpoint.pt"), ""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        maker = f", made by {checkpoint['script']}"
        checkpoint["args"] = Args(**checkpoint["args"])
        if agent is not None:
            agent.load_state_dict(checkpoint["agent"])
        return checkpoint
    except Exception as error:  # a damaged file can raise almost any exception
        raise UsageError(f"cannot load {path}{maker}: {error!r}") from error


def load_agent(run):
    """The agent of a run, e.g. `runs/RUN`. Raises UsageError."""
    envs = make_envs(replace(load_checkpoint(run)["args"], async_envs=False), num_envs=1)
    with closing_envs(envs):
        agent = Agent(envs)
    load_checkpoint(run, agent)
    return agent


def evaluate(args, run, max_steps=20_000):
    """Play greedy episodes and log their mean return. Returns the returns, [eval_episodes].

    An episode that does not end is stopped after max_steps steps. Raises UsageError.
    """
    if args.eval_episodes < 1:
        raise UsageError("eval_episodes must be positive")
    step = load_checkpoint(run)["global_step"]
    videos = f"{run}/videos/eval-at-{step}" if args.capture_video and not args.render else None
    envs = make_envs(args, 1, "human" if args.render else None, videos)
    agent = Agent(envs)
    load_checkpoint(run, agent)
    print(f"playing {args.eval_episodes} greedy episodes of {args.env_id}", flush=True)
    returns = np.zeros(args.eval_episodes)
    num_stopped = 0
    with closing_envs(envs):
        for episode in range(args.eval_episodes):
            observation, _ = envs.reset(seed=make_seed("evaluation", args.seed, episode))
            for _ in range(max_steps):
                with torch.no_grad():
                    action = agent.act(torch.as_tensor(observation), greedy=True).numpy()
                action = from_units(envs.single_action_space, action)
                observation, reward, termination, truncation, _ = envs.step(action)
                returns[episode] += reward[0]
                if termination[0] or truncation[0]:
                    break
            else:
                num_stopped += 1
    print(f"evaluation at step {step:,}: return {returns.mean():.2f} +- {returns.std():.2f}")
    with SummaryWriter(run) as writer:
        writer.add_scalar("eval/episodic_return", returns.mean(), step)
    if num_stopped:
        hint = "--env-kwargs max_episode_steps=1000 sets a time limit"
        print(f"{num_stopped} episodes were stopped after {max_steps:,} steps; {hint}")
    if videos:
        print(f"films: {videos}")
    return returns


def main():
    """The command line."""
    try:
        args = tyro.cli(Args, description=__doc__)
        run = args.evaluate or args.resume
        if run:  # parse again, with its flags as the defaults
            saved = load_checkpoint(run)["args"]
            args = tyro.cli(Args, description=__doc__, default=saved)
            for name, value in vars(args).items():
                if value != getattr(saved, name) and name not in ("resume", "evaluate"):
                    print(f"{name}: {value} instead of {getattr(saved, name)}")
        if args.evaluate:
            evaluate(args, run)
        else:
            train(args)
    except (UsageError, OSError, torch.OutOfMemoryError) as error:
        disk = (errno.ENOSPC, errno.EACCES, errno.EROFS)  # full, or not to be written to
        if isinstance(error, OSError) and error.errno not in disk:
            raise
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        run_dir, signum = stopped.args
        print("to resume:", shlex.join(["python", sys.argv[0], "--resume", str(run_dir)]))
        sys.exit(128 + signum)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
