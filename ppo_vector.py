# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[classic-control]>=1.4,<1.5",
#     "numpy>=2.0,<3",
#     "tensorboard>=2.20,<3",
#     "tyro>=1.0,<2",
#     "moviepy>=2.1,<3",
# ]
# ///
"""Proximal Policy Optimization (PPO) for simulators that step many environments, in one file.

    python ppo_vector.py                                         # CartPole-v1: solved in seconds
    python ppo_vector.py --env-id envpool/HalfCheetah-v5         # EnvPool (pip install envpool)
    python ppo_vector.py --env-id mjlab/Mjlab-Cartpole-Balance --device cuda  # pip install mjlab
    python ppo_vector.py --env-id my_module:make_simulator       # a function, see make_envs()
    python ppo_vector.py --resume runs/RUN                       # continue a stopped run
    python ppo_vector.py --evaluate runs/RUN --capture-video     # film a greedy episode
    tensorboard --logdir runs                                    # learning curves

Differs from ppo.py in that the environments are one vector environment, in NumPy or torch, with
discrete or continuous actions, and that all that is learned from are tensors on one device. The
host reads them once in an iteration, and in mode DISABLED once in each step. Policy and
normalization of continuous actions are those of ppo_continuous_action.py. How episodes end is the
main thing to get right, see Simulator.

PPO itself is what stands from Agent to the end of train(); the rest supports it.
In a notebook or debugger: `from ppo_vector import Args, train; run = train(Args())`.
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
import importlib
import inspect
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
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode
from torch import nn
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    # The run

    env_id: str = "CartPole-v1"  # Gymnasium's id, `envpool/ID`, `mjlab/TASK` or `module:function`
    env_kwargs: tuple[str, ...] = ()  # arguments of the environment, e.g. `max_episode_steps=200`
    exp_name: str = Path(__file__).stem  # in the run's name, <env_id>__<exp_name>__<seed>__<time>
    seed: int = 1  # of all random numbers; the same on one CPU gives bitwise the same results
    device: str = "cpu"  # `cpu`, `cuda`, `cuda:1`, ...; a simulator may need the same
    compile: bool = False  # compile acting and learning with torch.compile; needs a C++ compiler
    capture_video: bool = False  # film one greedy episode in each evaluation

    # PPO; the defaults are those that solve CartPole soonest

    total_timesteps: int = 500_000  # steps over all environments, rounded up to whole iterations
    num_envs: int = 256  # environments stepped together; more make a batch larger and more varied
    num_steps: int = 32  # steps of each environment per iteration; more see later rewards
    learning_rate: float = 3e-3  # of Adam; larger learns faster, and less stably
    anneal_lr: bool = True  # reduce the learning rate linearly to zero over the run
    desired_kl: float | None = None  # instead, adapt it to this KL divergence, e.g. 0.01 (rsl_rl)
    gamma: float = 0.99  # discount factor; closer to 1 looks further ahead
    gae_lambda: float = 0.98  # lambda of GAE: 0 is one-step TD, 1 Monte Carlo, with more variance
    num_minibatches: int = 8  # per epoch; more take more, and noisier, gradient steps
    update_epochs: int = 4  # passes over each batch; more use each sample more often
    norm_adv: bool = True  # normalize advantages in each minibatch
    clip_coef: float = 0.2  # clip range of the probability ratio; larger allows larger changes
    clip_vloss: bool = False  # clip the change of values in the value loss, by clip_coef
    ent_coef: float = 0.0  # coefficient of the entropy bonus; larger explores more
    vf_coef: float = 0.5  # coefficient of the value loss
    max_grad_norm: float = 0.5  # a gradient with a larger norm is scaled down to this norm
    target_kl: float | None = None  # end the epochs once the approximate KL divergence is larger
    hidden_sizes: tuple[int, ...] = (64, 64)  # of the hidden layers of both networks
    activation: Literal["Tanh", "ReLU", "ELU", "SiLU"] = "Tanh"  # between the layers
    normalize: bool = True  # normalize observations and rewards, if actions are continuous
    init_std: float = 0.5  # of continuous actions, in halves of their range; 1 is usual in robotics

    # Evaluation and earlier runs

    eval_episodes: int = 256  # greedy episodes, each in an environment of its own; 0: none
    render: bool = False  # show one episode of an evaluation in a window
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


def make_envs(args, num_envs, seed=0, render_mode=None):
    """Make a vector environment of `num_envs` copies, in NumPy or torch. Raises UsageError.

    Its metadata["autoreset_mode"] says how episodes end, see Simulator. A fork makes its simulator
    here, or `--env-id module:function` calls function(num_envs=..., device=..., seed=...).
    """
    kwargs = {"render_mode": render_mode} if render_mode else {}
    words = {"true": True, "false": False, "none": None}
    for name, value in (text.split("=") for text in args.env_kwargs):
        try:
            kwargs[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[name] = words.get(value.lower(), value)
    library, _, name = args.env_id.partition("/")
    if library == "ALE":
        raise UsageError(f"{args.env_id}: ppo_atari.py is for Atari games")
    try:
        if library == "envpool":
            envpool = importlib.import_module("envpool")
            warnings.filterwarnings("ignore", "EnvPool seeds")  # given here, ignored by reset()
            return envpool.make_gymnasium(name, num_envs=num_envs, seed=seed, **kwargs)
        if library == "mjlab":
            return make_mjlab(name, num_envs, args.device, seed, **kwargs)
        if re.fullmatch(r"[\w.]+:\w+", args.env_id):
            module, name = args.env_id.split(":")
            function = getattr(importlib.import_module(module), name, None)
            if function is None:
                raise UsageError(f"{module} has no {name}")
            return function(num_envs=num_envs, device=args.device, seed=seed, **kwargs)
        return gym.make_vec(args.env_id, num_envs, "vector_entry_point", **kwargs)
    except (ModuleNotFoundError, TypeError) as error:
        if isinstance(error, TypeError) and "unexpected keyword" not in str(error):
            raise  # a fault of the simulator's own
        raise UsageError(f"cannot make {args.env_id}: {error}") from error
    except gym.error.Error as error:
        hint = f"ppo.py takes any id of Gymnasium; here, envpool/{args.env_id} may exist"
        raise UsageError(f"cannot make {args.env_id}: {error} ({hint})") from error


def make_mjlab(task, num_envs, device, seed, **kwargs):
    """A task of mjlab. Its time limits are truncations; train() resets the environments."""
    cfg = importlib.import_module("mjlab.tasks.registry").load_env_cfg(task)
    cfg.scene.num_envs, cfg.seed, cfg.auto_reset = num_envs, seed, False
    envs = importlib.import_module("mjlab.envs").ManagerBasedRlEnv(cfg, device=device, **kwargs)
    envs.metadata = {**envs.metadata, "autoreset_mode": AutoresetMode.DISABLED}
    return envs


class Simulator:
    """A vector environment in torch: what step() returns are tensors on the device.

    `autoreset_mode` in its metadata says what follows the end of an episode:

        NEXT_STEP  (Gymnasium, EnvPool) the next step() ignores the action and returns the first
                   observation. It is no sample: `valid` is False there, and nothing learns from it.
        SAME_STEP  (Isaac Lab, ManiSkill) step() returns the first observation of the next episode.
                   info["final_obs"] or ["final_observation"] has the last one. Without it, the
                   observation before stands in for it at a time limit, as in rsl_rl.
        DISABLED   (mjlab) step() returns the last observation, and reset() follows.

    Observations are a dict of float32 [N, size]: "actor" for the policy and "critic" for the value
    function, from the groups `actor` (or `policy`) and `critic` of a Dict. Without the first, the
    policy gets all groups but `critic`; without `critic`, the value function what the policy gets.
    """

    def __init__(self, envs, num_envs, device):
        self.envs, self.num_envs, self.device = envs, num_envs, device
        try:
            self.mode = AutoresetMode(envs.metadata["autoreset_mode"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            known = [mode.value for mode in AutoresetMode]
            raise UsageError(f"metadata['autoreset_mode'] must be one of {known}") from error
        space = envs.single_action_space
        self.is_continuous = hasattr(space, "low")
        if self.is_continuous:  # in units of the range, as in ppo_continuous_action.py
            self.num_actions = math.prod(space.shape)
            lowest, highest = (np.broadcast_to(x, space.shape) for x in (space.low, space.high))
            low = np.where(lowest > -1e12, lowest, np.where(highest < 1e12, highest - 2, -1.0))
            high = np.where(highest < 1e12, highest, low + 2)
            bounds = (lowest, highest, (low + high) / 2, (high - low) / 2)
            self.bounds = [torch.tensor(x, dtype=torch.float32, device=device) for x in bounds]
        elif hasattr(space, "n") and hasattr(space, "start"):
            self.num_actions, self.action_start = int(space.n), int(space.start)
        else:
            raise UsageError(f"{space} is neither Discrete nor Box")
        self.ended = torch.zeros(num_envs, dtype=torch.bool, device=device)

    def tensor(self, x, dtype):
        return torch.as_tensor(x, device=self.device).to(dtype).reshape(self.num_envs, -1)

    def groups(self, observations):
        if isinstance(observations, tuple):
            observations = dict(enumerate(observations))
        if not isinstance(observations, dict):
            return dict.fromkeys(("actor", "critic"), self.tensor(observations, torch.float32))
        groups = {name: self.tensor(x, torch.float32) for name, x in observations.items()}
        actor = groups.get("actor", groups.get("policy"))
        if actor is None:
            actor = torch.cat([x for name, x in groups.items() if name != "critic"], 1)
        return {"actor": actor, "critic": groups.get("critic", actor)}

    def reset(self, seed):
        """Begin new episodes. Returns observations."""
        observations, _ = self.envs.reset(seed=seed)
        some = observations  # a tensor or array, or a dict or tuple of them
        if isinstance(some, (dict, tuple)):
            some = next(iter(some.values() if isinstance(some, dict) else some))
        self.use_torch = isinstance(some, torch.Tensor)
        self.ended = torch.zeros_like(self.ended)
        self.observations = self.groups(observations)
        return self.observations

    def step(self, actions):
        """Take a step. Returns observations, the next observation of the critic, and four [N].

        These are rewards, terminations, truncations (both bool) and valid (bool).
        """
        valid = ~self.ended if self.mode == AutoresetMode.NEXT_STEP else torch.ones_like(self.ended)
        if self.is_continuous:
            lowest, highest, center, half_range = self.bounds
            actions = center + half_range * actions.reshape(-1, *center.shape)
            actions = actions.clamp(lowest, highest)
        else:
            actions = actions + self.action_start
        before = self.observations["critic"].clone()  # a simulator may overwrite it
        step = self.envs.step(actions if self.use_torch else actions.cpu().numpy())
        observations, rewards, terminations, truncations, self.info = step
        rewards = self.tensor(rewards, torch.float32).squeeze(1)
        terminations = self.tensor(terminations, torch.bool).squeeze(1) & valid
        truncations = self.tensor(truncations, torch.bool).squeeze(1) & valid
        self.ended = terminations | truncations
        groups = self.groups(observations)
        next_observations = groups["critic"]
        if self.mode == AutoresetMode.SAME_STEP:
            last = self.info.get("final_obs", self.info.get("final_observation"))
            if isinstance(last, np.ndarray) and last.dtype == object:  # Gymnasium: None for others
                last = [x if x is not None else y for x, y in zip(last, observations, strict=True)]
                last = np.stack(last)
            last = before if last is None else self.groups(last)["critic"]
            next_observations = torch.where(self.ended.unsqueeze(1), last, next_observations)
        elif self.mode == AutoresetMode.DISABLED:
            next_observations = next_observations.clone()
            if self.ended.any():
                groups = self.groups(self.reset_ended())
        self.observations = groups
        return groups, next_observations, rewards, terminations, truncations, valid

    def reset_ended(self):
        """Begin new episodes where they have ended. Returns the observations of all copies."""
        if "env_ids" in inspect.signature(self.envs.reset).parameters:
            return self.envs.reset(env_ids=self.ended.nonzero().squeeze(1))[0]
        mask = self.ended if self.use_torch else self.ended.cpu().numpy()
        return self.envs.reset(options={"reset_mask": mask})[0]


class RunningStatistics(nn.Module):
    """Mean and standard deviation of all data so far, saved with the agent's weights."""

    def __init__(self, *shape):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def update(self, x, valid):
        """Add the data x, [M, *shape], where valid, [M], by the algorithm of Chan et al. (1979)."""
        valid = valid.reshape(-1, *[1] * self.mean.dim())
        x = torch.where(valid, x, 0.0).double()  # what is not valid may be NaN
        count = valid.sum()
        mean = x.sum(0) / count
        new_variance = torch.where(valid, x - mean, 0.0).square().sum(0) / count
        old = self.count / (self.count + count)  # the share of the earlier data
        difference = mean - self.mean
        variance = old * self.std.double().square() + (1 - old) * new_variance
        variance += old * (1 - old) * difference.square()
        self.count += count
        self.mean += (1 - old) * difference
        # The rounding of float32 must not pass for the deviation of a constant.
        self.std.copy_(variance.sqrt().clamp(min=1e-6 * self.mean.abs() + 1e-12))


class Agent(nn.Module):
    """The policy (actor) and the value function (critic), two separate networks (detail 13).

    Actions are Discrete, or continuous with a normal distribution (detail 23). In shapes, [...]
    stands for [N], [T, N] or [minibatch_size].
    """

    def __init__(self, args, simulator):
        super().__init__()
        self.is_continuous = simulator.is_continuous
        sizes = {name: x.shape[1] for name, x in simulator.observations.items()}
        self.statistics = nn.ModuleDict()
        if args.normalize and self.is_continuous:
            self.statistics.update({name: RunningStatistics(n) for name, n in sizes.items()})
            self.statistics["returns"] = RunningStatistics()
        mlp = partial(make_mlp, args.hidden_sizes, getattr(nn, args.activation))
        # Another network goes here, and an auxiliary head, whose loss is added in ppo_loss().
        self.actor = mlp(sizes["actor"], simulator.num_actions)
        self.critic = mlp(sizes["critic"], 1)
        if self.is_continuous:
            log_std = torch.full((simulator.num_actions,), math.log(args.init_std))
            self.log_std = nn.Parameter(log_std)

    def normalize(self, x, name):
        """Observations of mean 0 and variance 1, clipped to [-10, 10] (details 28 and 29)."""
        if name not in self.statistics:
            return x
        statistics = self.statistics[name]
        return ((x - statistics.mean) / statistics.std).clamp(-10, 10)

    def act(self, observations, greedy=False):
        """Actions for observations of the actor [N, size]: int64 [N], or float32 [N, num_actions].

        They are samples, or the most probable ones.
        """
        outputs = self.actor(self.normalize(observations, "actor"))
        if self.is_continuous:
            return outputs if greedy else outputs + self.log_std.exp() * torch.randn_like(outputs)
        if not greedy:
            # Gumbel-max: the argmax of logits plus Gumbel noise, -log(exponential noise), samples
            # from softmax(logits).
            outputs = outputs - torch.empty_like(outputs).exponential_().log()
        return outputs.argmax(-1)

    def value(self, observations):
        """Values [...] of observations of the critic [..., size]."""
        return self.critic(self.normalize(observations, "critic")).squeeze(-1)

    def evaluate_actions(self, batch):
        """Log-probabilities of batch["actions"], entropies (in nats) and values, each [...].

        tests/test_vector.py compares the formulas with torch.distributions.
        """
        outputs = self.actor(self.normalize(batch["observations"], "actor"))
        values = self.value(batch["critic_observations"])
        if self.is_continuous:
            deviations = (batch["actions"] - outputs) * (-self.log_std).exp()
            logprobs = -0.5 * deviations.square() - self.log_std - 0.5 * math.log(2 * math.pi)
            entropies = self.log_std + 0.5 * math.log(2 * math.pi * math.e)
            logprobs = logprobs.sum(-1)  # independent components (detail 25)
            return logprobs, entropies.sum().expand_as(logprobs), values
        logprobs = outputs.log_softmax(-1)
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, batch["actions"].unsqueeze(-1)).squeeze(-1), entropies, values


def make_mlp(hidden_sizes, activation, num_inputs, num_outputs):
    """A network with these hidden layers, initialized by torch.

    Orthogonal weights with zero biases (detail 2) solve CartPole a little sooner, but in mjlab's
    Cartpole-Balance, with ELU, they made 8 to 23 instead of 49 of 50.
    """
    layers = []
    for size in hidden_sizes:
        layers += [nn.Linear(num_inputs, size), activation()]
        num_inputs = size
    return nn.Sequential(*layers, nn.Linear(num_inputs, num_outputs))


def compute_gae(rewards, values, next_values, terminations, truncations, gamma, gae_lambda):
    """Advantages by generalized advantage estimation (detail 5; GAE paper, equations 11 to 16).

        delta_t = r_t + gamma * V(s'_t) * (1 - terminated_t) - V(s_t)
        A_t     = delta_t + gamma * lambda * (1 - ended_t) * A_{t+1}

    s'_t is the true next observation, also at the end of an episode. After a termination there is
    no further reward and V(s'_t) is left out; a truncated episode (e.g. by a time limit) would go
    on, and V(s'_t) is kept. All tensors are [num_steps, num_envs], terminations and truncations
    bool. Returns the advantages.
    """
    next_values = torch.where(terminations, 0.0, next_values)  # the last observation may be NaN
    deltas = rewards + gamma * next_values - values
    ended = terminations | truncations
    advantages, advantage = torch.zeros_like(deltas), torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        # A row after an end may be no sample, and NaN.
        advantage = deltas[t] + torch.where(ended[t], 0.0, gamma * gae_lambda * advantage)
        advantages[t] = advantage
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
    device = get_device(args.device)
    to_device = partial(torch.as_tensor, device=device)
    torch.manual_seed(args.seed)  # the weights; actions and minibatches: in each iteration
    run_dir = Path(args.resume) if args.resume else make_run_dir(args)
    global_step = load_checkpoint(run_dir)["global_step"] if args.resume else 0
    seed = make_seed("training", args.seed, global_step)
    try:
        simulator = Simulator(make_envs(args, N, seed), N, device)
        observations = simulator.reset(seed)
    except BaseException:  # Ctrl-C as well
        if not args.resume:
            shutil.rmtree(run_dir)
        raise
    agent = Agent(args, simulator).to(device)
    parameters = list(agent.parameters())
    optimizer = torch.optim.Adam(
        # A dict for each learning rate: a fork may give agent.critic one of its own.
        [{"params": parameters, "initial_lr": args.learning_rate}],
        lr=to_device(args.learning_rate),
        eps=1e-5,  # Adam's epsilon (detail 3)
        fused=not args.compile,  # one kernel; torch.compile makes its own
        capturable=args.compile and device.type == "cuda",  # in a CUDA graph
    )
    if args.resume:
        checkpoint = load_checkpoint(run_dir, agent)
        # Adam's moments and step count: learning rate and other options are those of this command.
        state = {"state": checkpoint["optimizer"]["state"]}
        optimizer.load_state_dict(optimizer.state_dict() | state)
        if args.desired_kl is not None:
            optimizer.param_groups[0]["lr"] = to_device(
                checkpoint["optimizer"]["param_groups"][0]["lr"]
            )

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

    act = agent.act
    if args.compile:
        torch.compiler.reset()  # or only eight runs of a process would be compiled
        torch._dynamo.config.trace_autograd_ops = True  # compile backward() as well
        # On a GPU as CUDA graphs, which launch all kernels of a function at once
        mode = "reduce-overhead" if device.type == "cuda" else None
        act, update = torch.compile(act, mode=mode), torch.compile(update, mode=mode)

    # ------------------------------------------------------------------------ set-up: the rollout
    # A row of the rollout is what happened in a step. next_observations[t] is the true observation
    # after it, also at the end of an episode. A row is no sample where valid is False.
    sizes = {name: x.shape[1] for name, x in observations.items()}
    actor_observations = torch.zeros((T, N, sizes["actor"]), device=device)
    critic_observations = torch.zeros((T, N, sizes["critic"]), device=device)
    next_observations = torch.zeros_like(critic_observations)  # of the critic
    shape, dtype = (
        ((simulator.num_actions,), None) if simulator.is_continuous else ((), torch.int64)
    )
    actions = torch.zeros((T, N, *shape), dtype=dtype, device=device)
    rewards = torch.zeros((T, N), device=device)
    terminations, truncations, valid = torch.zeros((3, T, N), dtype=torch.bool, device=device)
    # Discounted return, return and length of the episode up to each step, and now
    totals, total = torch.zeros((T, 3, N), device=device), torch.zeros((3, N), device=device)
    discounts = torch.tensor([[args.gamma], [1.0], [1.0]], device=device)
    ones = torch.ones(N, device=device)
    recent_returns = []  # of the last 100 episodes that ended
    if hasattr(simulator.envs, "episode_length_buf"):  # so that not all episodes end at once
        buffer = simulator.envs.episode_length_buf
        limit = int(simulator.envs.max_episode_length)
        simulator.envs.episode_length_buf = torch.randint_like(buffer, limit)

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

    with delayed_signals() as received, writer, closing_envs(simulator.envs):
        while global_step < total_steps:
            # --------------------------------- (a) roll out: num_steps steps in every environment
            iteration_start = time.monotonic()
            # A seed for each iteration: a resumed run begins new episodes, but draws the same noise
            # and minibatches as one that has not been stopped.
            torch.manual_seed(make_seed("iteration", args.seed, global_step // batch_size))
            logs = []
            for t in range(T):
                actor_observations[t] = observations["actor"]
                critic_observations[t] = observations["critic"]
                with torch.no_grad():  # (b) computes the log-probabilities
                    actions[t] = act(actor_observations[t])
                step = simulator.step(actions[t])
                observations, next_observations[t], rewards[t], *ends, valid[t] = step
                terminations[t], truncations[t] = ends
                added = torch.stack([rewards[t], rewards[t], ones]).where(valid[t], 0.0)
                total = discounts * total + added
                totals[t] = total
                total = total * ~simulator.ended
                logs.append(simulator.info.get("log", {}) if simulator.info else {})

            # -------------------------------------------------------------------- (b) advantages
            # An intrinsic reward would be added to `rewards` here; returns are logged without it. A
            # further tensor in the batch, [T, N, ...], reaches ppo_loss() by itself.
            batch = {"observations": actor_observations, "actions": actions}
            batch["critic_observations"] = critic_observations
            scaled_rewards = rewards
            with torch.no_grad():
                # Not kept while acting: one pass over the rollout is faster than one for each step.
                # The weights are still the same (with dropout, the log-probabilities would not be).
                batch["old_logprobs"], _, batch["old_values"] = agent.evaluate_actions(batch)
                if agent.statistics:
                    # From here on, observations and rewards are normalized with this rollout's.
                    data = {"actor": actor_observations, "critic": critic_observations}
                    data["returns"] = totals[:, 0]
                    for name, statistics in agent.statistics.items():
                        statistics.update(data[name].flatten(0, 1), valid.flatten())
                    scale = agent.statistics["returns"].std
                    scaled_rewards = (rewards / scale).clamp(-10, 10)  # details 30 and 31
                    batch["old_values"] = agent.value(critic_observations)
                next_values = agent.value(next_observations)
                batch["advantages"] = compute_gae(
                    scaled_rewards,
                    batch["old_values"],
                    next_values,
                    terminations,
                    truncations,
                    args.gamma,
                    args.gae_lambda,
                )
            batch["returns"] = batch["advantages"] + batch["old_values"]
            batch = {name: x.flatten(0, 1) for name, x in batch.items()}  # each [batch_size, ...]

            # ---------------------------- (c) learn: epochs over shuffled minibatches (detail 6)
            fraction = 1 - global_step / total_steps if args.anneal_lr else 1.0
            if args.desired_kl is None:
                for group in optimizer.param_groups:
                    # Detail 4. A number instead of a tensor would make --compile compile again.
                    group["lr"] = to_device(fraction * group["initial_lr"])
            updates = []  # the metrics of each update, one tensor
            # The samples come first, in random order. Rows that are none are replaced by samples
            # that are drawn again, so that all minibatches have one size, which the host knows.
            places = torch.arange(batch_size, device=device) % valid.sum().clamp(min=1)
            for _ in range(args.update_epochs):
                keys = torch.rand(batch_size, device=device) + ~valid.flatten()
                permutation = keys.argsort()[places]
                for indices in permutation.split(batch_size // args.num_minibatches):
                    # index_select() takes half the time of x[indices].
                    minibatch = {name: x.index_select(0, indices) for name, x in batch.items()}
                    metrics = update(minibatch)
                    updates.append(torch.stack(list(metrics.values())))
                    if args.desired_kl is not None:
                        adapt(optimizer, metrics["losses/approx_kl"], args.desired_kl)
                # The host waits for the device here.
                if args.target_kl is not None and metrics["losses/approx_kl"] > args.target_kl:
                    break
            global_step += batch_size

            # ------------------------------------------------------------------ (d) log and save
            metrics = dict(zip(metrics, torch.stack(updates).mean(0).tolist(), strict=True))
            samples = valid.flatten()
            inputs = {"observation": actor_observations[valid], "reward": rewards[valid]}
            # The sum is finite if and only if all numbers are.
            inputs = {name: x.double().abs().sum().item() for name, x in inputs.items()}
            check_finite(inputs | metrics, global_step)
            # An advantage is the difference of return and value.
            unexplained = batch["advantages"][samples].var() / batch["returns"][samples].var()
            metrics["losses/explained_variance"] = 1 - unexplained.item()
            metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"].item()
            now = time.monotonic()
            metrics["charts/SPS"] = batch_size / (now - iteration_start)
            ended = terminations | truncations
            _, finished_returns, finished_lengths = totals.transpose(1, 2)[ended].T.tolist()
            metrics["charts/episodes"] = len(finished_returns)
            if finished_returns:
                metrics["charts/episodic_return"] = np.mean(finished_returns)
                metrics["charts/episodic_length"] = np.mean(finished_lengths)
                recent_returns = (recent_returns + finished_returns)[-100:]
            for name in {name: None for log in logs for name in log}:  # of the simulator, in order
                values = [to_device(log[name]).float().mean() for log in logs if name in log]
                metrics[name] = torch.stack(values).mean().item()
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
# This is the end of PPO. The rest: errors, checkpoints, evaluation and the command line.


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
    """Close environments at the end. Their errors are shown."""
    try:
        yield
    finally:
        try:
            envs.close()
        except (EOFError, ConnectionError):
            pass  # processes of the simulator have been ended by a signal
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


def adapt(optimizer, kl, desired_kl):
    """Reduce the learning rate if the KL divergence is too large, and raise it if too small."""
    factor = torch.where(kl > 2 * desired_kl, 1 / 1.5, 1.0)
    factor = torch.where((kl < desired_kl / 2) & (kl > 0), 1.5, factor)
    for group in optimizer.param_groups:
        group["lr"] = (group["lr"] * factor).clamp(1e-5, 1e-2)


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
    args = load_checkpoint(run)["args"]
    simulator = Simulator(make_envs(args, 1), 1, get_device(args.device))
    with closing_envs(simulator.envs):
        simulator.reset(seed=0)
        agent = Agent(args, simulator)
    load_checkpoint(run, agent)
    return agent


def evaluate(args, run, max_steps=20_000):
    """Play greedy episodes and log their mean return. Returns the returns, [eval_episodes].

    Each is the first one of an environment. One that does not end is stopped after max_steps steps.
    Raises UsageError.
    """
    if args.eval_episodes < 1:
        raise UsageError("eval_episodes must be positive")
    print(f"playing {args.eval_episodes} greedy episodes of {args.env_id}", flush=True)
    returns, num_stopped, step, *_ = play(args, run, args.eval_episodes, max_steps)
    print(f"evaluation at step {step:,}: return {returns.mean():.2f} +- {returns.std():.2f}")
    with SummaryWriter(run) as writer:
        writer.add_scalar("eval/episodic_return", returns.mean(), step)
    if num_stopped:
        hint = "--env-kwargs max_episode_steps=1000 sets a time limit"
        print(f"{num_stopped} episodes were stopped after {max_steps:,} steps; {hint}")
    if args.render:
        play(args, run, 1, 2000, "human")
    if args.capture_video:
        *_, frames, fps = play(args, run, 1, 2000, "rgb_array")
        from gymnasium.utils.save_video import save_video  # importing it takes 0.05 s

        videos = f"{run}/videos"
        save_video(
            frames, videos, episode_trigger=lambda _: True, fps=fps, name_prefix=f"eval-{step}"
        )
        print(f"film: {videos}")
    return returns


def play(args, run, num_envs, max_steps, render_mode=None):
    """Play the first greedy episode of each environment, for at most max_steps steps.

    Returns the returns, [num_envs], the number of episodes that have not ended, the step of the
    checkpoint, the frames of the first environment, if render_mode is "rgb_array", and the number
    of these in a second.
    """
    device = get_device(args.device)
    seed = make_seed("evaluation", args.seed)
    envs = make_envs(args, num_envs, seed, render_mode)
    if render_mode and render_mode not in envs.metadata.get("render_modes", ()):
        raise UsageError(f"{args.env_id} cannot be rendered as {render_mode}")
    frames = []
    with closing_envs(envs):
        simulator = Simulator(envs, num_envs, device)
        observations = simulator.reset(seed)
        agent = Agent(args, simulator).to(device)
        step = load_checkpoint(run, agent)["global_step"]
        returns = torch.zeros(num_envs, dtype=torch.float64, device=device)
        playing = torch.ones(num_envs, dtype=torch.bool, device=device)
        for _ in range(max_steps):
            if render_mode == "rgb_array":
                frame = envs.render()
                frames.append(np.asarray(frame[0] if isinstance(frame, tuple | list) else frame))
            with torch.no_grad():
                actions = agent.act(observations["actor"], greedy=True)
            observations, _, rewards, *_ = simulator.step(actions)
            returns += torch.where(playing, rewards, 0.0)
            playing &= ~simulator.ended
            if not playing.any():
                break
    fps = envs.metadata.get("render_fps", 30)
    return returns.cpu().numpy(), int(playing.sum()), step, frames, fps


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
