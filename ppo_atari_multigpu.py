# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[atari]>=1.4,<1.5",
#     "numpy>=2.0,<3",
#     "tensorboard>=2.20,<3",
#     "tyro>=1.0,<2",
#     "imageio-ffmpeg>=0.6,<1",
#     "pygame-ce>=2.5",
# ]
# ///
"""Proximal Policy Optimization (PPO) for Atari games on several GPUs or machines, in one file.

    torchrun --standalone --nproc-per-node 2 ppo_atari_multigpu.py --device cuda  # two GPUs
    torchrun --standalone --nproc-per-node 2 ppo_atari_multigpu.py --resume runs/RUN
    python ppo_atari_multigpu.py --evaluate runs/RUN --capture-video              # film a game

Differs from ppo_atari.py in that W processes share the games (N is num_envs / W in each), learn
from minibatches of their own and take the mean of their gradients. Process 0 logs and saves.

PPO itself is what stands from layer_init() to the end of train(); the rest supports it.
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
import signal
import sys
import threading
import time
import traceback
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pygame
import torch
import torch.distributed as dist
import tyro
from ale_py.vector_env import AtariVectorEnv
from torch import nn
from torch.utils.tensorboard import SummaryWriter

# Memory in huge pages: 1.15 times as fast on one CPU thread. torch reads this at its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@dataclass
class Args:
    # The run

    env_id: str = "ALE/Breakout-v5"  # `ALE/Breakout-v5` and `BreakoutNoFrameskip-v4` mean the same
    env_kwargs: tuple[str, ...] = ()  # further arguments of AtariVectorEnv, e.g. `noop_max=0`
    sticky_actions: bool = False  # repeat actions with probability 0.25 (Machado et al., 2018)
    exp_name: str = Path(__file__).stem  # in the run's name, <env_id>__<exp_name>__<seed>__<time>
    seed: int = 1  # of all random numbers; the same on one CPU gives bitwise the same results
    device: str = "cpu"  # `cpu`, or `cuda` for one GPU per process
    bfloat16: bool = True  # compute all but the heads in bfloat16, if the device has it in hardware
    compile: bool = False  # compile the gradient step, on a GPU acting as well; needs a compiler
    capture_video: bool = False  # film the first game of each evaluation

    # PPO; the defaults are those of the PPO paper and of openai/baselines

    total_timesteps: int = 10_000_000  # steps over all environments, rounded up to whole iterations
    num_envs: int = 8  # environments stepped together; more make a batch larger and more varied
    num_steps: int = 128  # steps of each environment per iteration; more see later rewards
    learning_rate: float = 2.5e-4  # of Adam; larger learns faster, and less stably
    anneal_lr: bool = True  # reduce the learning rate linearly to zero over the run
    gamma: float = 0.99  # discount factor; closer to 1 looks further ahead
    gae_lambda: float = 0.95  # lambda of GAE: 0 is one-step TD, 1 Monte Carlo, with more variance
    num_minibatches: int = 4  # per epoch; more take more, and noisier, gradient steps
    update_epochs: int = 4  # passes over each batch; more use each sample more often
    norm_adv: bool = True  # normalize advantages in each minibatch
    clip_coef: float = 0.1  # clip range of the probability ratio; larger allows larger changes
    clip_vloss: bool = True  # clip the change of values in the value loss, by clip_coef
    ent_coef: float = 0.01  # coefficient of the entropy bonus; larger explores more
    vf_coef: float = 0.5  # coefficient of the value loss
    max_grad_norm: float = 0.5  # a gradient with a larger norm is scaled down to this norm
    target_kl: float | None = None  # end the epochs once the approximate KL divergence is larger

    # Evaluation and earlier runs

    eval_episodes: int = 10  # games after training and by `--evaluate`; 0: none
    render: bool = False  # show the first game of an evaluation in a window
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


def make_envs(args, num_envs, **options):
    """Make `num_envs` copies of the game, stepped by threads of ALE (detail 1). Raises UsageError.

    At the start of a game ALE presses FIRE and waits for up to 30 frames (details 14 and 17). It
    repeats each action for 4 frames, takes the maximum of the last two (15) and returns the last 4
    of these (20) in 84x84 grey pixels (18). A lost life is a termination, but the game goes on
    (16). At its end, or after 108,000 frames (half an hour), the next game starts in the same step.
    `options` are further arguments of AtariVectorEnv.
    """
    spec = gym.registry.get(args.env_id)
    if spec is None or not str(spec.entry_point).startswith("ale_py"):
        raise UsageError(f"{args.env_id} is not an Atari game, such as ALE/Breakout-v5")
    kwargs = {}
    words = {"true": True, "false": False, "none": None}
    for name, value in (text.split("=") for text in args.env_kwargs):
        try:
            kwargs[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[name] = words.get(value.lower(), value)
    script_options = {
        "autoreset_mode": gym.vector.AutoresetMode.SAME_STEP,
        "life_loss_info": True,
        "reward_clipping": False,  # the score is logged; train() clips the rewards
        "repeat_action_probability": 0.25 if args.sticky_actions else 0.0,
        "num_threads": torch.get_num_threads(),
    }
    if taken := kwargs.keys() & script_options.keys():
        raise UsageError(f"env_kwargs: the script sets {', '.join(sorted(taken))}")
    try:
        return AtariVectorEnv(spec.kwargs["game"], num_envs, **kwargs | script_options | options)
    except (TypeError, ValueError, gym.error.Error) as error:
        raise UsageError(f"cannot make {args.env_id}: {error}") from error


def layer_init(layer, std=2**0.5):
    """Initialize with orthogonal weights and zero biases (detail 2)."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """The policy (actor) and the value function (critic), two heads of one CNN (details 13, 21)."""

    def __init__(self, envs, bfloat16=False):
        super().__init__()
        self.bfloat16 = bfloat16
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
        dense = layer_init(nn.Linear(num_features, 512))
        self.trunk = nn.Sequential(*convolutions, dense, nn.ReLU(inplace=True))
        num_actions = int(envs.single_action_space.n)
        # An auxiliary head goes here; its loss is added in ppo_loss().
        self.actor = layer_init(nn.Linear(512, num_actions), std=0.01)  # about equally probable
        self.critic = layer_init(nn.Linear(512, 1), std=1.0)

    def features(self, observations):
        """The heads' input, float32 [N, 512], for observations, uint8 [N, height, width, stack]."""
        pixels = observations.to(torch.bfloat16 if self.bfloat16 else torch.float32)
        pixels = pixels.mul_(1 / 255).permute(0, 3, 1, 2)  # detail 22
        with torch.autocast(observations.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.trunk(pixels).float()

    def act(self, features, greedy=False):
        """Actions, int64 [N], for features [N, 512]: samples, or the most probable."""
        logits = self.actor(features)
        if not greedy:
            # Gumbel-max: the argmax of logits plus Gumbel noise, -log(exponential noise), samples
            # from softmax(logits). torch.multinomial() takes twice as long, Categorical
            # ten times as long.
            logits = logits - torch.empty_like(logits).exponential_().log()
        return logits.argmax(-1)

    def value(self, features):
        """Values [...] of features [..., 512]."""
        return self.critic(features).squeeze(-1)

    def evaluate_actions(self, batch):
        """Log-probabilities of batch["actions"], entropies (in nats) and values, each [...].

        Computes the features of batch["observations"], unless the batch holds "features".
        tests/test_atari_agent.py compares the formulas with torch.distributions.
        """
        features = batch.get("features")
        if features is None:
            features = self.features(batch["observations"])
        logprobs = self.actor(features).log_softmax(-1)
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        logprobs = logprobs.gather(-1, batch["actions"].unsqueeze(-1)).squeeze(-1)
        return logprobs, entropies, self.value(features)


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
    rank, W = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun
    T, N, batch_size = args.num_steps, args.num_envs // W, args.num_steps * args.num_envs
    if args.num_envs % W or N * T % args.num_minibatches:
        raise UsageError(f"{W} must divide num_envs, num_minibatches num_envs * num_steps / {W}")

    # ---------------------------------------------- set-up: device, environments, agent, optimizer
    device = get_device(args.device.replace("cuda", f"cuda:{os.environ.get('LOCAL_RANK', 0)}"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
        bfloat16 = args.bfloat16 and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        supported = [name for name, has in capabilities.items() if has is True and "bf16" in name]
        bfloat16 = args.bfloat16 and bool(supported)
    to_device = partial(torch.as_tensor, device=device)
    if W > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    # What is random: the weights (seeded here), actions and minibatches (seeded in each iteration),
    # and the games (seeded by envs.reset() below).
    torch.manual_seed(args.seed)
    envs = make_envs(args, N)
    agent = Agent(envs, bfloat16).to(device)
    run_dir = Path(args.resume) if args.resume else make_run_dir(args) if rank == 0 else None
    parameters = list(agent.parameters())
    optimizer = torch.optim.Adam(
        # A dict for each learning rate: a fork may give agent.critic one of its own.
        [{"params": parameters, "initial_lr": args.learning_rate}],
        lr=to_device(args.learning_rate),
        eps=1e-5,  # Adam's epsilon (detail 3)
        fused=not args.compile,  # one kernel; torch.compile makes its own
        capturable=args.compile and device.type == "cuda",  # in a CUDA graph
    )
    global_step = 0
    if args.resume:
        checkpoint = load_checkpoint(run_dir, agent)
        # Adam's moments and step count: learning rate and other options are those of this command.
        state = {"state": checkpoint["optimizer"]["state"]}
        optimizer.load_state_dict(optimizer.state_dict() | state)
        global_step = checkpoint["global_step"]

    # ------------------------------------------------------------------ set-up: the gradient step
    def update(minibatch):
        """Take one gradient step. Returns metrics."""
        optimizer.zero_grad()
        loss, metrics = ppo_loss(agent, args, minibatch)
        loss.backward()
        for parameter in parameters if W > 1 else []:  # the mean of the gradients of all processes
            dist.all_reduce(parameter.grad)
            parameter.grad /= W
        # Detail 11. On a GPU, torch 2.11 fails to compile clipping with foreach.
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm, foreach=False)
        optimizer.step()
        return metrics | {"losses/grad_norm": grad_norm}

    def act(observations):
        """Features [N, 512] of observations [N, height, width, stack], and sampled actions [N]."""
        features = agent.features(observations)
        return features, agent.act(features)

    if args.compile:
        torch.compiler.reset()  # or only eight runs of a process would be compiled
        torch._dynamo.config.trace_autograd_ops = True  # compile backward() as well
        if device.type == "cuda" and W == 1:  # as CUDA graphs: all kernels are launched at once
            act = torch.compile(act, mode="reduce-overhead")
            update = torch.compile(update, mode="reduce-overhead")
        else:
            update = torch.compile(update)

    # ------------------------------------------------------------------------ set-up: the rollout
    # observations[t + 1] is what followed observations[t], unless a game ended there. Frames are
    # stored as uint8 and channels last, the faster layout for convolutions.
    stack, height, width = envs.single_observation_space.shape
    observations = torch.zeros((T + 1, N, height, width, stack), dtype=torch.uint8, device=device)
    features = torch.zeros((T, N, agent.critic.in_features), device=device)
    actions = torch.zeros((T, N), dtype=torch.int64, device=device)
    rewards = np.zeros((T, N), np.float32)
    terminations = np.zeros((T, N), bool)
    truncations = np.zeros((T, N), bool)
    episode_returns = np.zeros(N)  # of the current games, up to now
    episode_lengths = np.zeros(N, np.int64)
    recent_returns = []  # of the last 100 games that ended
    frames, infos = envs.reset(seed=make_seed("training", args.seed, global_step, rank))
    observations[T] = to_device(frames).permute(0, 2, 3, 1)

    # ----------------------------------------------------------------------------- set-up: logging
    num_iterations = math.ceil((args.total_timesteps - global_step) / batch_size)  # to go
    total_steps = global_step + num_iterations * batch_size
    if rank == 0:
        writer = SummaryWriter(run_dir, purge_step=global_step + 1)  # hides what is later
        flags = [f"    {name}: {value}" for name, value in vars(args).items()]
        writer.add_text("hyperparameters", "\n".join(flags))
        print(f"{run_dir}: steps {global_step:,} to {total_steps:,} by {batch_size:,}", flush=True)
        if global_step >= total_steps:
            print("this run is finished; a larger --total-timesteps extends it, at a higher rate")
    last_save = last_print = -math.inf

    with delayed_signals() as received, writer if rank == 0 else nullcontext(), closing(envs):
        while global_step < total_steps:
            # --------------------------------- (a) roll out: num_steps steps in every environment
            iteration_start = time.monotonic()
            # A seed for each iteration: a resumed run begins new episodes, but draws the same noise
            # and minibatches as one that has not been stopped.
            torch.manual_seed(make_seed("iteration", args.seed, global_step // batch_size, rank))
            finished_returns, finished_lengths, final_frames = [], [], []
            observations[0] = observations[T]
            for t in range(T):
                with torch.no_grad():  # (b) computes the log-probabilities
                    features[t], actions[t] = act(observations[t])
                frame_numbers = infos["episode_frame_number"]
                transition = envs.step(actions[t].cpu().numpy())
                frames, scores, terminations[t], truncations[t], infos = transition
                observations[t + 1] = to_device(frames).permute(0, 2, 3, 1)
                rewards[t] = np.sign(scores)  # detail 19
                episode_returns += scores
                episode_lengths += 1
                # A lost life is a termination, too. Only in a new game is the frame number smaller.
                new_game = infos["episode_frame_number"] < frame_numbers
                ended = truncations[t] | (terminations[t] & new_game)
                if ended.any():
                    finished_returns.extend(episode_returns[ended])
                    finished_lengths.extend(episode_lengths[ended])
                    episode_returns[ended] = episode_lengths[ended] = 0
                    final_frames.append(infos["final_obs"][truncations[t]])

            # -------------------------------------------------------------------- (b) advantages
            # An intrinsic reward would be added to `rewards` here; returns are logged without it. A
            # further tensor in the batch, [T, N, ...], reaches ppo_loss() by itself.
            batch = {"observations": observations[:T], "actions": actions, "features": features}
            with torch.no_grad():
                # Not kept while acting: one pass over the rollout is faster than one for each step.
                # The weights are still the same (with dropout, the log-probabilities would not be).
                batch["old_logprobs"], _, batch["old_values"] = agent.evaluate_actions(batch)
                last_values = agent.value(agent.features(observations[T]))
                next_values = torch.cat([batch["old_values"][1:], last_values.unsqueeze(0)])
                if truncations.any():  # there the next row belongs to the next game
                    final = to_device(np.concatenate(final_frames)).permute(0, 2, 3, 1).contiguous()
                    next_values[to_device(truncations)] = agent.value(agent.features(final))
            del batch["features"]  # these are of the old weights
            values, next_values = batch["old_values"].cpu().numpy(), next_values.cpu().numpy()
            advantages = compute_gae(
                rewards, values, next_values, terminations, truncations, args.gamma, args.gae_lambda
            )
            batch["advantages"] = to_device(advantages)
            batch["returns"] = batch["advantages"] + batch["old_values"]
            batch = {name: x.flatten(0, 1) for name, x in batch.items()}  # each [batch_size, ...]

            # ---------------------------- (c) learn: epochs over shuffled minibatches (detail 6)
            fraction = 1 - global_step / total_steps if args.anneal_lr else 1.0
            for group in optimizer.param_groups:
                # Detail 4. A number instead of a tensor would make --compile compile again.
                group["lr"] = to_device(fraction * group["initial_lr"])
            updates = []  # the metrics of each update
            for _ in range(args.update_epochs):
                permutation = torch.randperm(N * T).to(device)
                for indices in permutation.split(N * T // args.num_minibatches):
                    # Of frames, index_select() takes a third of the time of x[indices].
                    minibatch = {name: x.index_select(0, indices) for name, x in batch.items()}
                    values = update(minibatch)
                    # A copy: CUDA graphs write into the same memory again.
                    updates.append({name: value.clone() for name, value in values.items()})
                last_kl = updates[-1]["losses/approx_kl"]
                if W > 1:
                    last_kl = last_kl.clone()  # what is logged stays that of this process
                    dist.all_reduce(last_kl)
                    last_kl /= W
                if args.target_kl is not None and last_kl > args.target_kl:
                    break
            global_step += batch_size

            # ------------------------------------------------------------------ (d) log and save
            # The games of all processes, and a signal that any of them has received
            results = [(finished_returns, finished_lengths, list(received))] * W
            if W > 1:
                dist.all_gather_object(results, results[0])
            finished_returns = [x for returns, _, _ in results for x in returns]
            finished_lengths = [x for _, lengths, _ in results for x in lengths]
            signum = next((signum for _, _, signums in results for signum in signums), None)
            if rank > 0:
                if signum:
                    break
                continue
            metrics = {}  # means over the updates
            for name in updates[0]:
                metrics[name] = torch.stack([x[name] for x in updates]).mean().item()
            check_finite({"reward": rewards} | metrics, global_step)
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
            if signum:
                received.append(signum)
                break

    if W > 1:
        dist.destroy_process_group()
    if rank > 0:
        return None
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
    envs = make_envs(load_checkpoint(run)["args"], num_envs=1)
    with closing(envs):
        agent = Agent(envs)
    load_checkpoint(run, agent)
    return agent


def evaluate(args, run):
    """Play games with sampled actions and log their mean score. Raises UsageError.

    Returns the scores, [eval_episodes].
    """
    if args.eval_episodes < 1:
        raise UsageError("eval_episodes must be positive")
    envs = make_envs(args, args.eval_episodes, life_loss_info=False)
    agent = Agent(envs)
    step = load_checkpoint(run, agent)["global_step"]
    print(f"playing {args.eval_episodes} games of {args.env_id}", flush=True)
    returns = np.zeros(args.eval_episodes)
    ended = np.zeros(args.eval_episodes, bool)
    seed = make_seed("evaluation", args.seed)
    torch.manual_seed(seed)
    frames, _ = envs.reset(seed=seed)
    game = []  # the first one: each action, and the number of the frame after it
    with closing(envs):
        while not ended.all():
            with torch.no_grad():
                features = agent.features(torch.as_tensor(frames).permute(0, 2, 3, 1).contiguous())
                actions = agent.act(features).numpy()
            frames, rewards, terminations, truncations, infos = envs.step(actions)
            returns += np.where(ended, 0.0, rewards)  # the first game of each environment counts
            ends = terminations | truncations
            if not ended[0]:
                game.append((actions[0], math.inf if ends[0] else infos["episode_frame_number"][0]))
            ended |= ends
    print(f"evaluation at step {step:,}: return {returns.mean():.2f} +- {returns.std():.2f}")
    with SummaryWriter(run) as writer:
        writer.add_scalar("eval/episodic_return", returns.mean(), step)
    if args.render:
        show(replay(args, seed, game))
    if args.capture_video:
        film(replay(args, seed, game), Path(run, "videos", f"eval-at-{step}.mp4"))
    return returns


def replay(args, seed, game):
    """Play a game again and yield its frames in colour, uint8 [210, 160, 3], 60 for each second.

    The agent sees small grey pictures of every fourth frame. Seed and actions determine a game.
    `game` holds each action and the number of the frame after it.
    """
    shape = {"grayscale": False, "img_height": 210, "img_width": 160, "stack_num": 1}
    envs = make_envs(args, 1, life_loss_info=False, frameskip=1, maxpool=False, **shape)
    frame, infos = envs.reset(seed=seed)
    yield frame.reshape(210, 160, 3)
    ended = False
    for action, frame_number in game:
        while not ended and infos["episode_frame_number"][0] < frame_number:
            frame, _, terminations, truncations, infos = envs.step(np.array([action]))
            ended = terminations[0] | truncations[0]
            frame = infos["final_obs"] if ended else frame
            yield frame.reshape(210, 160, 3)
    envs.close()


def film(frames, path):
    """Write frames into an MP4 file."""
    path.parent.mkdir(exist_ok=True)
    options = {"fps": 60, "macro_block_size": 2, "ffmpeg_log_level": "quiet"}
    video = imageio_ffmpeg.write_frames(str(path), (160, 210), **options)
    video.send(None)
    for frame in frames:
        video.send(np.ascontiguousarray(frame))
    video.close()
    print(f"film: {path}")


def show(frames):
    """Show frames in a window, three times as large."""
    pygame.display.init()
    window = pygame.display.set_mode((480, 630))
    clock = pygame.time.Clock()
    for frame in frames:
        picture = pygame.surfarray.make_surface(frame.swapaxes(0, 1))
        window.blit(pygame.transform.scale(picture, window.get_size()), (0, 0))
        pygame.display.flip()
        pygame.event.pump()
        clock.tick(60)
    pygame.quit()


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
        W = os.environ.get("WORLD_SIZE", "1")
        launcher = ["torchrun", "--standalone", "--nproc-per-node", W] if W != "1" else ["python"]
        print("to resume:", shlex.join([*launcher, sys.argv[0], "--resume", str(run_dir)]))
        sys.exit(128 + signum)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
