"""Proximal Policy Optimization (PPO) for Atari games from pixels, in one file.

    python ppo_atari.py                                      # ALE/Breakout-v5, 10M steps
    python ppo_atari.py --env-id ALE/Pong-v5                 # Pong: reaches a return of 18 in about an hour
    python ppo_atari.py --resume runs/RUN                    # continue a stopped run
    python ppo_atari.py --evaluate runs/RUN --capture-video  # play games and film the first
    torchrun --standalone --nproc-per-node 2 ppo_atari.py    # one agent in two processes; on GPUs with --device cuda
    tensorboard --logdir runs  # learning curves

Papers: PPO (Schulman et al., 2017, arXiv:1707.06347), GAE (Schulman et al., 2016, arXiv:1506.02438) and the
network, DQN (Mnih et al., 2015, Nature 518). "Detail n" is the n-th of The 37 Implementation Details of PPO
(Huang et al., ICLR blog track, 2022).
"""

import ast
import math
import os
import shutil
import signal
import sys
import time
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
from ale_py.vector_env import AtariVectorEnv
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# Memory in huge pages: 1.15 times as fast on one CPU thread. torch reads this when it makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class UsageError(Exception):
    """An error that is printed as one line, with exit code 2."""


@dataclass
class Args:
    env_id: str = "ALE/Breakout-v5"  # the game; `ALE/Breakout-v5` and `BreakoutNoFrameskip-v4` mean the same here
    env_kwargs: tuple[str, ...] = ()  # arguments of AtariVectorEnv that the script does not set, e.g. `noop_max=0`
    sticky_actions: bool = False  # repeat the last action with probability 0.25 in each frame (Machado et al., 2018)
    exp_name: str = Path(__file__).stem  # part of the run's name: runs/<env_id>__<exp_name>__<seed>__<unix time>
    seed: int = 1  # seed of all random numbers; on one machine's CPU, the same seed gives bitwise identical results
    total_timesteps: int = 10_000_000  # steps to train for, over all environments; rounded up to whole iterations
    num_envs: int = 8  # number of environments stepped together, over all processes of torchrun
    num_steps: int = 128  # steps of each environment per iteration
    learning_rate: float = 2.5e-4  # learning rate of Adam
    anneal_lr: bool = True  # anneal the learning rate linearly to zero
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalized advantage estimation
    num_minibatches: int = 4  # minibatches per epoch
    update_epochs: int = 4  # epochs per iteration
    norm_adv: bool = True  # normalize advantages in each minibatch
    clip_coef: float = 0.1  # clip range of the probability ratio
    clip_vloss: bool = True  # clip the value loss, with the range clip_coef
    ent_coef: float = 0.01  # coefficient of the entropy bonus
    vf_coef: float = 0.5  # coefficient of the value loss
    max_grad_norm: float = 0.5  # a gradient with a larger norm is scaled down to this norm
    target_kl: float | None = None  # stop the epochs when the approximate KL divergence exceeds this
    device: str = "cpu"  # device for training: `cpu`, `cuda`, ...; with torchrun, `cuda` is one GPU per process
    bfloat16: bool = True  # compute all but the two heads in bfloat16, if the device has it in hardware
    compile: bool = False  # torch.compile of the gradient step, on a GPU of acting as well; needs a C++ compiler
    capture_video: bool = False  # film the first game of each evaluation into RUN/videos/
    eval_episodes: int = 10  # number of games played after training and by `--evaluate`
    resume: str | None = None  # resume this run, e.g. `runs/RUN`; a larger `--total-timesteps` extends it
    evaluate: str | None = None  # evaluate the policy of this run, e.g. `runs/RUN`, instead of training

    def __post_init__(self) -> None:
        """Validate the arguments. Raises UsageError."""
        counts = ("total_timesteps", "num_envs", "num_steps", "num_minibatches", "update_epochs", "eval_episodes")
        for name in (*counts, "learning_rate", "clip_coef", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"--{name.replace('_', '-')} must be positive and finite")
        if not (0 <= self.seed < 2**32 and 0 <= self.gamma <= 1 and 0 <= self.gae_lambda <= 1):
            raise UsageError("--seed must be between 0 and 2**32 - 1, --gamma and --gae-lambda between 0 and 1")
        if (n := self.num_envs * self.num_steps) % self.num_minibatches or n == self.num_minibatches:
            raise UsageError("--num-minibatches must divide num_envs * num_steps into minibatches of 2 samples or more")
        if not all("=" in text for text in self.env_kwargs):
            raise UsageError("--env-kwargs takes name=value")


def make_envs(args: Args, num_envs: int, **options) -> AtariVectorEnv:
    """Make `num_envs` copies of the game, stepped together by the threads of ALE (detail 1). Raises UsageError.

    At the start of a game ALE presses FIRE and waits for up to 30 frames (details 14 and 17). It repeats each action
    for 4 frames, takes the maximum of the last two (15) and returns the last 4 of these (20) in 84x84 grey pixels
    (18). A lost life is a termination, but the game goes on (16). At its end, or after 108,000 frames (half an hour),
    the next game starts in the same step. `options` are further arguments of AtariVectorEnv.
    """
    env_kwargs = dict(text.split("=", 1) for text in args.env_kwargs)
    for name, value in env_kwargs.items():
        with suppress(ValueError, SyntaxError):  # a value that is not a Python literal stays a string
            env_kwargs[name] = ast.literal_eval(value)
    spec = gym.registry.get(args.env_id)
    if spec is None or not str(spec.entry_point).startswith("ale_py"):
        raise UsageError(f"{args.env_id} is not an Atari game; those are named like ALE/Breakout-v5")
    script_options = {
        "autoreset_mode": gym.vector.AutoresetMode.SAME_STEP,
        "life_loss_info": True,
        "reward_clipping": False,  # the raw score is logged; train() clips the rewards
        "repeat_action_probability": 0.25 if args.sticky_actions else 0.0,
        "num_threads": torch.get_num_threads(),
    }
    try:
        return AtariVectorEnv(spec.kwargs["game"], num_envs, **env_kwargs | script_options | options)
    except (TypeError, ValueError, gym.error.Error) as error:
        raise UsageError(f"cannot make {args.env_id}: {' '.join(str(error).split())}") from error


def layer_init(layer: nn.Module, std: float = math.sqrt(2)) -> nn.Module:
    """Initialize with orthogonal weights and zero biases (detail 2)."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """The policy (actor) and the value function (critic), two heads of one Nature-CNN (details 13 and 21)."""

    def __init__(self, envs: AtariVectorEnv, bfloat16: bool = False) -> None:
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
        self.actor = layer_init(nn.Linear(512, self.num_actions), std=0.01)  # at first, about equal probabilities
        self.critic = layer_init(nn.Linear(512, 1), std=1.0)

    def features(self, observations: torch.Tensor) -> torch.Tensor:
        """The input of both heads, float32 [N, 512], for observations, uint8 [N, height, width, stack]."""
        pixels = observations.to(torch.bfloat16 if self.bfloat16 else torch.float32).mul_(1 / 255)  # detail 22
        with torch.autocast(observations.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.trunk(pixels.permute(0, 3, 1, 2)).float()

    def sample_noise(self, num_steps: int, num_envs: int) -> torch.Tensor:
        """Standard Gumbel noise for the actions of a rollout, [num_steps, num_envs, num_actions]."""
        return -torch.empty(num_steps, num_envs, self.num_actions).exponential_().log()

    def act(self, features: torch.Tensor, noise: torch.Tensor | float = 0.0) -> torch.Tensor:
        """Actions, int64 [N], for features [N, 512]; without noise, the greedy actions."""
        return (self.actor(features) + noise).argmax(-1)  # with Gumbel noise, a sample from softmax(logits)

    def value(self, features: torch.Tensor) -> torch.Tensor:
        """Values [...] of features [..., 512]."""
        return self.critic(features).squeeze(-1)

    def heads(self, features: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Log-probabilities of the actions, entropies of the policy (in nats) and values, each [...]."""
        logprobs = self.actor(features).log_softmax(-1)
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), entropies, self.value(features)

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same for observations [N, height, width, stack]."""
        return self.heads(self.features(observations), actions)


def compute_gae(rewards, values, next_values, terminations, truncations, gamma: float, gae_lambda: float):
    """Advantages by generalized advantage estimation (detail 5; GAE paper, equations 11 to 16).

        delta_t = r_t + gamma * V(s'_t) * (1 - terminated_t) - V(s_t)
        A_t     = delta_t + gamma * lambda * (1 - ended_t) * A_{t+1}

    s'_t is the true next observation, also at the end of an episode. After a termination there is no further
    reward and V(s'_t) is left out; a truncated episode (e.g. by a time limit) would go on, and V(s'_t) is kept.
    All arrays are [num_steps, num_envs], terminations and truncations boolean. Returns the advantages.
    """
    deltas = rewards + gamma * next_values * ~terminations - values
    decays = gamma * gae_lambda * ~(terminations | truncations)
    advantages, advantage = np.zeros_like(deltas), 0.0
    for t in reversed(range(len(deltas))):
        advantages[t] = advantage = deltas[t] + decays[t] * advantage
    return advantages


def train(args: Args) -> Path:
    """Train an agent and evaluate it. Returns the run's folder. Raises UsageError, and SystemExit on a signal."""
    rank, world_size, device_name = 0, 1, args.device
    if dist.is_torchelastic_launched():  # by torchrun: each process plays its share of the environments
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        device_name = args.device.replace("cuda", f"cuda:{os.environ['LOCAL_RANK']}")
        if args.num_envs % world_size or args.num_steps * args.num_envs // world_size % args.num_minibatches:
            raise UsageError(f"--num-envs does not split evenly over {world_size} processes and their minibatches")
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    T, N, batch_size = args.num_steps, args.num_envs // world_size, args.num_steps * args.num_envs
    num_iterations = math.ceil(args.total_timesteps / batch_size)
    try:
        device = torch.zeros(1, device=device_name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {args.device} is not available: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
        bfloat16 = args.bfloat16 and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        bfloat16 = args.bfloat16 and any("bf16" in name and has is True for name, has in capabilities.items())
    to_device = partial(torch.as_tensor, device=device)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)

    if args.resume:
        run_dir = Path(args.resume)
    else:
        name, timestamp = f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}", int(time.time())
        while (run_dir := Path("runs", f"{name}__{timestamp}")).exists():
            timestamp += 1
        if rank == 0:
            run_dir.mkdir(parents=True)
    envs = make_envs(args, N)
    agent = Agent(envs, bfloat16).to(device)
    learning_rate = to_device(args.learning_rate) if args.compile else args.learning_rate  # a float would recompile
    parameters = list(agent.parameters())
    options = {"capturable": device.type == "cuda", "foreach": False} if args.compile else {"fused": True}
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, eps=1e-5, **options)  # detail 3
    initial_learning_rates = [group["lr"] for group in optimizer.param_groups]
    global_step = load_checkpoint(run_dir, agent, optimizer)["global_step"] if args.resume else 0
    if rank > 0:  # other actions and minibatches in each process
        torch.manual_seed(10_000 * args.seed + global_step + rank)

    def update(observations, actions, old_logprobs, old_values, advantages, returns) -> dict[str, torch.Tensor]:
        """Take one gradient step on a minibatch, tensors [minibatch_size, ...]. Returns metrics (detail 12)."""
        optimizer.zero_grad()
        logprobs, entropies, values = agent(observations, actions)
        log_ratio = logprobs - old_logprobs
        ratio = log_ratio.exp()

        if args.norm_adv:  # detail 7
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages).mean()  # detail 8, PPO equation 7

        squared_errors = (values - returns).square()
        if args.clip_vloss:  # detail 9
            clipped_values = values.clamp(old_values - args.clip_coef, old_values + args.clip_coef)
            squared_errors = torch.max(squared_errors, (clipped_values - returns).square())
        value_loss = 0.5 * squared_errors.mean()
        entropy = entropies.mean()
        loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy  # detail 10, PPO equation 9
        loss.backward()
        if world_size > 1:  # average the gradient over the processes
            for gradient in [parameter.grad for parameter in parameters if parameter.grad is not None]:
                dist.all_reduce(gradient)
                gradient /= world_size
        # Detail 11. On a GPU, torch 2.11 fails to compile clipping of all parameters at once (foreach).
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm, foreach=False)
        with torch.no_grad():
            metrics = {
                "losses/policy_loss": policy_loss.detach(),
                "losses/value_loss": value_loss.detach(),
                "losses/entropy": entropy.detach(),
                "losses/approx_kl": (ratio - 1 - log_ratio).mean(),  # k3 of joschu.net/blog/kl-approx.html
                "losses/clipfrac": (ratio != clipped_ratio).float().mean(),
                "losses/grad_norm": grad_norm,
            }
        optimizer.step()
        return metrics

    def act(observations, noise) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [N, 512] of observations [N, height, width, stack], and the actions [N]."""
        features = agent.features(observations)
        return features, agent.act(features, noise)

    if args.compile:
        if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
            raise UsageError("--compile needs a C++ compiler")
        torch._dynamo.config.trace_autograd_ops = True  # compile backward() as well
        if device.type == "cuda" and world_size == 1:  # as CUDA graphs, which launch all kernels of a function at once
            act, update = (torch.compile(function, mode="reduce-overhead") for function in (act, update))
        else:
            update = torch.compile(update)

    # The rollout. observations[t + 1] is what followed observations[t], unless a game ended there. Frames are stored
    # as uint8 and channels last, the faster layout for convolutions.
    stack, height, width = envs.single_observation_space.shape
    observations = torch.zeros((T + 1, N, height, width, stack), dtype=torch.uint8, device=device)
    features = torch.zeros((T, N, agent.critic.in_features), device=device)  # of observations, by the policy that acts
    actions = torch.zeros((T, N), dtype=torch.int64, device=device)
    rewards = np.zeros((T, N), np.float32)
    terminations = np.zeros((T, N), bool)
    truncations = np.zeros((T, N), bool)
    episode_returns, episode_lengths = np.zeros(N), np.zeros(N, np.int64)  # of the current games
    recent_returns, stop_signal = [], None
    frames, infos = envs.reset(seed=(10_000 * args.seed + global_step + rank * N) % 2**31)  # ALE takes 31 bits
    observations[T] = to_device(frames).permute(0, 2, 3, 1)

    if rank == 0:  # the first process logs and saves for all
        writer = SummaryWriter(run_dir, purge_step=global_step + 1)  # hides what was logged after the checkpoint
        writer.add_text("hyperparameters", "\n".join(f"    {name}: {value}" for name, value in vars(args).items()))

    def request_stop(signum, frame):
        nonlocal stop_signal
        stop_signal = signum
        signal.signal(signum, signal.SIG_DFL)
        os.write(2, b"\nstopping after this iteration; a second signal stops at once\n")  # print() is not reentrant

    old_handlers = {signum: signal.signal(signum, request_stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    total_steps = num_iterations * batch_size
    if rank == 0:
        print(f"{run_dir}: steps {global_step:,} to {total_steps:,}, {batch_size:,} per iteration", flush=True)
    progress = tqdm(total=total_steps, initial=global_step, unit=" steps", unit_scale=True, disable=rank > 0 or None)
    iteration_time = save_time = time.monotonic()

    for iteration in range(global_step // batch_size, num_iterations):
        # ---------------------------------------- (a) roll out: num_steps steps in every environment
        finished_returns, finished_lengths, final_frames = [], [], []
        noise = agent.sample_noise(T, N).to(device)
        observations[0] = observations[T]
        # The outer autocast computes nothing; it keeps the weights that the inner one has converted to bfloat16.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for t in range(T):
                features[t], actions[t] = act(observations[t], noise[t])
                frame_numbers = infos["episode_frame_number"]
                frames, reward, terminations[t], truncations[t], infos = envs.step(actions[t].cpu().numpy())
                observations[t + 1] = to_device(frames).permute(0, 2, 3, 1)
                rewards[t] = np.sign(reward)  # detail 19
                episode_returns += reward
                episode_lengths += 1
                # A lost life is a termination, too, but only a new game starts to count its frames again.
                ended = truncations[t] | (terminations[t] & (infos["episode_frame_number"] < frame_numbers))
                if ended.any():
                    finished_returns.extend(episode_returns[ended])
                    finished_lengths.extend(episode_lengths[ended])
                    episode_returns[ended] = episode_lengths[ended] = 0
                    final_frames.append(infos["final_obs"][truncations[t]])

        # ------------------------------------------------------------------------- (b) advantages
        with torch.no_grad():
            old_logprobs, _, values = agent.heads(features, actions)
            next_values = torch.cat((values[1:], agent.value(agent.features(observations[T])).view(1, N)))
            if truncations.any():  # there the next row belongs to the next game
                final_observations = to_device(np.concatenate(final_frames)).permute(0, 2, 3, 1).contiguous()
                next_values[to_device(truncations)] = agent.value(agent.features(final_observations))
        gae_inputs = values.cpu().numpy(), next_values.cpu().numpy(), terminations, truncations
        advantages = to_device(compute_gae(rewards, *gae_inputs, args.gamma, args.gae_lambda))
        returns = advantages + values
        batch = (observations[:T], actions, old_logprobs, values, advantages, returns)
        batch = [x.flatten(0, 1) for x in batch]  # each [num_steps * num_envs, ...]

        # ---------------------------------------- (c) learn: epochs over shuffled minibatches (detail 6)
        fraction = 1 - iteration / num_iterations if args.anneal_lr else 1.0
        for group, initial_learning_rate in zip(optimizer.param_groups, initial_learning_rates, strict=True):
            group["lr"] = fraction * initial_learning_rate  # detail 4
        updates = []
        for _ in range(args.update_epochs):
            for indices in torch.randperm(T * N).to(device).split(T * N // args.num_minibatches):
                metrics = update(*(x.index_select(0, indices) for x in batch))
                updates.append({name: value.clone() for name, value in metrics.items()})  # CUDA graphs reuse memory
            if args.target_kl is not None:
                approx_kl = updates[-1]["losses/approx_kl"].clone()
                if world_size > 1:
                    dist.all_reduce(approx_kl)
                if approx_kl / world_size > args.target_kl:
                    break
        global_step += batch_size

        # ------------------------------------------------------------------------ (d) log and save
        stopping = stop_signal
        if world_size > 1:  # the games of all processes, and the signal that one of them has received
            results = [None] * world_size
            dist.all_gather_object(results, (finished_returns, finished_lengths, stopping))
            finished_returns = [x for returns, _, _ in results for x in returns]
            finished_lengths = [x for _, lengths, _ in results for x in lengths]
            stopping = next((x for _, _, x in results if x is not None), None)
        last = iteration + 1 == num_iterations or stopping is not None
        if rank > 0:
            if last:
                break
            continue
        metrics = {name: torch.stack([x[name] for x in updates]).mean().item() for name in updates[0]}
        now = time.monotonic()
        metrics["losses/explained_variance"] = 1 - ((returns - values).var() / returns.var()).item()
        metrics["charts/learning_rate"] = fraction * args.learning_rate
        metrics["charts/SPS"] = batch_size / (now - iteration_time)
        metrics["charts/episodes"] = len(finished_returns)
        iteration_time = now
        if finished_returns:
            metrics["charts/episodic_return"] = np.mean(finished_returns)
            metrics["charts/episodic_length"] = np.mean(finished_lengths)
            recent_returns = (recent_returns + finished_returns)[-100:]
        # One event with all values takes a tenth of the time of add_scalar() for each.
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()])
        writer.file_writer.add_summary(summary, global_step)
        if not math.isfinite(metrics["losses/grad_norm"]):
            progress.close()
            writer.close()
            raise UsageError(f"NaN or infinite gradient before step {global_step:,}; any earlier checkpoint is kept")
        if last or now - save_time > 60:  # seconds between two checkpoints
            save_time = now
            writer.flush()
            save_checkpoint(run_dir, args, agent, optimizer, global_step)
        progress.set_postfix_str(f"return {np.mean(recent_returns):.2f}" if recent_returns else "", refresh=False)
        progress.update(batch_size)
        if progress.disable and (last or iteration % 10 == 9):  # no terminal, no progress bar
            print(f"step {global_step:,}  {metrics['charts/SPS']:,.0f} steps/s  {progress.postfix or ''}", flush=True)
        if last:
            break

    for closing in (progress, envs, writer) if rank == 0 else (progress, envs):
        closing.close()
    for signum, handler in old_handlers.items():
        signal.signal(signum, handler)
    if world_size > 1:
        dist.destroy_process_group()
    if rank > 0:
        return run_dir
    if stopping is not None:
        print(f"stopped at step {global_step:,}; to resume: python {os.path.relpath(__file__)} --resume {run_dir}")
        raise SystemExit(128 + stopping)
    evaluate(args, run_dir)
    print(f"learning curves: tensorboard --logdir {run_dir}")
    print(f"film:            python {os.path.relpath(__file__)} --evaluate {run_dir} --capture-video")
    print(f"train longer:    python {os.path.relpath(__file__)} --resume {run_dir} --total-timesteps {2 * total_steps}")
    return run_dir


def save_checkpoint(run_dir: Path, args: Args, agent: Agent, optimizer: torch.optim.Adam, global_step: int) -> None:
    """Replace the run's checkpoint atomically: if interrupted, the previous one stays."""
    checkpoint = {
        "args": {name: value for name, value in vars(args).items() if name not in ("resume", "evaluate")},
        "agent": agent.state_dict(),
        "optimizer": optimizer.state_dict(),
        "global_step": global_step,
        "rng_state": torch.get_rng_state(),
    }
    with open(run_dir / "checkpoint.tmp", "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt")


def load_checkpoint(run: str | Path, agent: Agent | None = None, optimizer: torch.optim.Adam | None = None) -> dict:
    """Load a run's checkpoint, e.g. of `runs/RUN`, also into the agent and the optimizer. Raises UsageError."""
    path = Path(run, "checkpoint.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        Args(**checkpoint["args"])
        if agent is not None:
            agent.load_state_dict(checkpoint["agent"])
        if optimizer is not None:
            for saved, group in zip(checkpoint["optimizer"]["param_groups"], optimizer.param_groups, strict=True):
                saved |= {name: group[name] for name in group if name != "params"}  # the options of this process
            optimizer.load_state_dict(checkpoint["optimizer"])
            torch.set_rng_state(checkpoint["rng_state"])
    except Exception as error:  # a damaged file can raise almost any exception
        raise UsageError(f"cannot load {path}: {' '.join(str(error).split())[:200]}") from error
    return checkpoint


def load_agent(run: str | Path) -> Agent:
    """Load the agent of a run, e.g. `runs/RUN`; act(features(observations)) gives greedy actions. Raises UsageError."""
    envs = make_envs(Args(**load_checkpoint(run)["args"]), num_envs=1)
    agent = Agent(envs)
    envs.close()
    load_checkpoint(run, agent)
    return agent


def evaluate(args: Args, run: str | Path) -> np.ndarray:
    """Play games and log their mean score. Returns the scores, [eval_episodes]. Raises UsageError.

    Actions are sampled, as in training: greedy actions can repeat the same states until the time limit.
    """
    agent, step = load_agent(run), load_checkpoint(run)["global_step"]
    envs = make_envs(args, args.eval_episodes, life_loss_info=False)
    returns, ended = np.zeros(args.eval_episodes), np.zeros(args.eval_episodes, bool)
    seed = (10_000 * args.seed + 5_000) % 2**31  # other seeds than in training
    torch.manual_seed(seed)
    frames, _ = envs.reset(seed=seed)
    game = []  # the first one: each action, and the number of the frame after it
    while not ended.all():
        with torch.inference_mode():
            features = agent.features(torch.as_tensor(frames).permute(0, 2, 3, 1).contiguous())
            actions = agent.act(features, agent.sample_noise(1, args.eval_episodes)[0]).numpy()
        frames, rewards, terminations, truncations, infos = envs.step(actions)
        returns += np.where(ended, 0.0, rewards)  # the first game of each environment counts
        ends = terminations | truncations
        if not ended[0]:
            game.append((actions[0], math.inf if ends[0] else infos["episode_frame_number"][0]))
        ended |= ends
    envs.close()
    with SummaryWriter(run) as writer:
        writer.add_scalar("eval/episodic_return", returns.mean(), step)
    print(f"evaluation at step {step:,}: return {returns.mean():.2f} +- {returns.std():.2f}, {len(returns)} games")
    if args.capture_video:
        film(args, Path(run, "videos", f"eval-at-{step}.mp4"), seed, game)
    return returns


def film(args: Args, path: Path, seed: int, game: list[tuple[int, float]]) -> None:
    """Film a game in colour with 60 frames per second.

    The agent sees small grey pictures of every fourth frame. Seed and actions determine a game, so that it can be
    played again frame by frame. `game` holds each action and the number of the frame after it.
    """
    shape = {"grayscale": False, "img_height": 210, "img_width": 160, "stack_num": 1}
    envs = make_envs(args, 1, life_loss_info=False, frameskip=1, maxpool=False, **shape)
    frame, infos = envs.reset(seed=seed)
    path.parent.mkdir(exist_ok=True)
    video = imageio_ffmpeg.write_frames(str(path), (160, 210), fps=60, macro_block_size=2, ffmpeg_log_level="quiet")
    video.send(None)
    video.send(frame)
    ended = False
    for action, frame_number in game:
        while not ended and infos["episode_frame_number"][0] < frame_number:
            frame, _, terminations, truncations, infos = envs.step(np.array([action]))
            ended = terminations[0] | truncations[0]
            video.send(infos["final_obs"] if ended else frame)
    video.close()
    envs.close()


def main() -> None:
    """The command line."""
    try:
        args = tyro.cli(Args, description=__doc__)
        if run := args.evaluate or args.resume:  # the run's own flags become the defaults
            saved = load_checkpoint(run)["args"]
            args = tyro.cli(Args, description=__doc__, default=Args(**saved))
            allowed = {"seed", "total_timesteps", "device", "bfloat16", "compile", "capture_video", "eval_episodes"}
            changed = [f"--{x.replace('_', '-')}" for x in saved.keys() - allowed if getattr(args, x) != saved[x]]
            if changed:
                raise UsageError(f"{run} was made with other values of {', '.join(changed)}")
        if args.evaluate:
            evaluate(args, args.evaluate)
        else:
            train(args)
    except UsageError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
