"""Proximal Policy Optimization (PPO) for discrete actions, in one file.

    python ppo.py                                      # CartPole-v1: reaches a return of 500 in 100k steps
    python ppo.py --env-id Acrobot-v1 --seed 2         # another environment, another seed
    python ppo.py --resume runs/RUN                    # continue a stopped run
    python ppo.py --evaluate runs/RUN --capture-video  # play greedy episodes and film the first
    tensorboard --logdir runs  # learning curves

Papers: PPO (Schulman et al., 2017, arXiv:1707.06347) and GAE (Schulman et al., 2016, arXiv:1506.02438).
"Detail n" is the n-th of The 37 Implementation Details of PPO (Huang et al., ICLR blog track, 2022).
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
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class UsageError(Exception):
    """An error that is printed as one line, with exit code 2."""


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # Gymnasium id of the environment; `module:Name-v0` imports `module` first
    env_kwargs: tuple[str, ...] = ()  # arguments of the environment, e.g. `is_slippery=False map_name=8x8`
    exp_name: str = Path(__file__).stem  # part of the run's name: runs/<env_id>__<exp_name>__<seed>__<unix time>
    seed: int = 1  # seed of all random numbers; on one machine's CPU, the same seed gives bitwise identical results
    total_timesteps: int = 500_000  # steps to train for, over all environments; rounded up to whole iterations
    num_envs: int = 8  # number of environments stepped together
    num_steps: int = 256  # steps of each environment per iteration
    learning_rate: float = 1e-3  # learning rate of Adam
    anneal_lr: bool = True  # anneal the learning rate linearly to zero
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.98  # lambda of generalized advantage estimation
    num_minibatches: int = 16  # minibatches per epoch
    update_epochs: int = 10  # epochs per iteration
    norm_adv: bool = True  # normalize advantages in each minibatch
    clip_coef: float = 0.2  # clip range of the probability ratio
    clip_vloss: bool = False  # clip the value loss, with the range clip_coef
    ent_coef: float = 0.0  # coefficient of the entropy bonus
    vf_coef: float = 0.5  # coefficient of the value loss
    max_grad_norm: float = 0.5  # a gradient with a larger norm is scaled down to this norm
    target_kl: float | None = None  # stop the epochs when the approximate KL divergence exceeds this
    device: str = "cpu"  # device for training: `cpu` (faster for networks this small), `cuda`, `cuda:1`, ...
    compile: bool = False  # compile the gradient step with torch.compile; needs a C++ compiler
    async_envs: bool = False  # step each environment in its own process; pays off if a step takes over 0.2 ms
    capture_video: bool = False  # film episodes 0, 1, 8, 27, ..., 1000, 2000, ... and the first of each evaluation
    eval_episodes: int = 10  # number of greedy episodes played after training and by `--evaluate`
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


def make_envs(args: Args, num_envs: int, video: dict | None = None) -> gym.vector.VectorEnv:
    """Make `num_envs` copies of the environment, stepped together (detail 1). Raises UsageError.

    Observations are flattened to vectors. `video` holds arguments of RecordVideo, which films the first copy.
    Autoreset is off: step() returns the last observation of an episode, and the caller resets the environment.
    """
    main_process = os.getpid()
    env_kwargs = dict(text.split("=", 1) for text in args.env_kwargs)
    for name, value in env_kwargs.items():
        with suppress(ValueError, SyntaxError):  # a value that is not a Python literal stays a string
            env_kwargs[name] = ast.literal_eval(value)

    def make_env(index: int) -> gym.Env:
        if os.getpid() != main_process and hasattr(os, "setpgrp"):
            os.setpgrp()  # in a worker of --async-envs: only the main process gets Ctrl-C
        film = video is not None and index == 0
        env = gym.make(args.env_id, **env_kwargs, **({"render_mode": "rgb_array"} if film else {}))
        space = env.observation_space
        if not isinstance(env.action_space, Discrete):
            hint = "use ppo_continuous_action.py" if isinstance(env.action_space, Box) else "only Discrete is supported"
            raise UsageError(f"{args.env_id} has the action space {env.action_space}: {hint}")
        if isinstance(space, Box) and space.dtype == np.uint8 and len(space.shape) > 1:
            raise UsageError(f"{args.env_id} has images as observations: use ppo_atari.py or see docs/forks.md")
        if isinstance(space, Dict):  # leave out other entries, such as MiniGrid's mission
            kinds = (Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple)
            names = [name for name in space if isinstance(space[name], kinds)]
            if index == 0 and len(names) < len(space):
                print(f"entries left out of the observations: {', '.join(space.keys() - set(names))}")
            env = gym.wrappers.FilterObservation(env, names)
        if not isinstance(space, Box) or len(space.shape) != 1:
            env = gym.wrappers.FlattenObservation(env)
        return gym.wrappers.RecordVideo(env, **video) if film else env

    try:
        vector_class = gym.vector.AsyncVectorEnv if args.async_envs else gym.vector.SyncVectorEnv
        env_fns = [partial(make_env, index) for index in range(num_envs)]
        return vector_class(env_fns, copy=False, autoreset_mode=gym.vector.AutoresetMode.DISABLED)
    except (gym.error.Error, AssertionError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"cannot make {args.env_id}: {type(error).__name__}: {error}") from error


def layer_init(layer: nn.Module, std: float = math.sqrt(2)) -> nn.Module:
    """Initialize with orthogonal weights and zero biases (detail 2)."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """The policy (actor) and the value function (critic), two separate networks (detail 13)."""

    def __init__(self, envs: gym.vector.VectorEnv) -> None:
        super().__init__()
        num_inputs = envs.single_observation_space.shape[0]
        self.num_actions = int(envs.single_action_space.n)
        self.actor = nn.Sequential(
            layer_init(nn.Linear(num_inputs, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, self.num_actions), std=0.01),  # at first, actions hardly depend on the observation
        )
        self.critic = nn.Sequential(
            layer_init(nn.Linear(num_inputs, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 1), std=1.0),
        )

    def sample_noise(self, num_steps: int, num_envs: int) -> torch.Tensor:
        """Standard Gumbel noise for the actions of a rollout, [num_steps, num_envs, num_actions]."""
        return -torch.empty(num_steps, num_envs, self.num_actions).exponential_().log()

    def act(self, observations: torch.Tensor, noise: torch.Tensor | float = 0.0) -> torch.Tensor:
        """Actions, int64 [N], for observations [N, num_inputs]; without noise, the greedy actions."""
        return (self.actor(observations) + noise).argmax(-1)  # with Gumbel noise, a sample from softmax(logits)

    def value(self, observations: torch.Tensor) -> torch.Tensor:
        """Values [...] of observations [..., num_inputs]."""
        return self.critic(observations).squeeze(-1)

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Log-probabilities of the actions, entropies of the policy (in nats) and values, each shaped as actions."""
        logprobs = self.actor(observations).log_softmax(-1)
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), entropies, self.value(observations)


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
    T, N, batch_size = args.num_steps, args.num_envs, args.num_steps * args.num_envs
    num_iterations = math.ceil(args.total_timesteps / batch_size)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the fastest for small batches; with 64 environments, two are faster
    try:
        device = torch.zeros(1, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {args.device} is not available: {str(error).splitlines()[0]}") from error
    to_device = partial(torch.as_tensor, device=device)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)

    if args.resume:
        run_dir = Path(args.resume)
    else:
        name, timestamp = f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}", int(time.time())
        while (run_dir := Path("runs", f"{name}__{timestamp}")).exists():
            timestamp += 1
        run_dir.mkdir(parents=True)
    video = {"video_folder": f"{run_dir}/videos/train-{int(time.time())}"}
    envs = make_envs(args, N, video if args.capture_video else None)
    agent = Agent(envs).to(device)
    learning_rate = torch.tensor(args.learning_rate) if args.compile else args.learning_rate  # a float would recompile
    parameters = list(agent.parameters())
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, eps=1e-5, fused=not args.compile)  # detail 3
    initial_learning_rates = [group["lr"] for group in optimizer.param_groups]
    global_step = load_checkpoint(run_dir, agent, optimizer)["global_step"] if args.resume else 0

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
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)  # detail 11
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

    if args.compile:
        if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
            raise UsageError("--compile needs a C++ compiler")
        torch._dynamo.config.trace_autograd_ops = True  # compile backward() as well
        update = torch.compile(update)

    # The rollout, in NumPy arrays. next_observations[t] is what followed observations[t]; at the end of an
    # episode it is the true last observation, and observations[t + 1] the first one of the next episode.
    observations = np.zeros((T, N, *envs.single_observation_space.shape), np.float32)
    next_observations = np.zeros_like(observations)
    actions = np.zeros((T, N), np.int64)
    rewards = np.zeros((T, N), np.float32)
    terminations = np.zeros((T, N), bool)
    truncations = np.zeros((T, N), bool)
    episode_returns, episode_lengths = np.zeros(N), np.zeros(N, np.int64)  # of the current episodes
    recent_returns, stop_signal = [], None
    observation, _ = envs.reset(seed=10_000 * args.seed + global_step)

    writer = SummaryWriter(run_dir, purge_step=global_step + 1)  # hides what was logged after the checkpoint
    writer.add_text("hyperparameters", "\n".join(f"    {name}: {value}" for name, value in vars(args).items()))

    def request_stop(signum, frame):
        nonlocal stop_signal
        stop_signal = signum
        signal.signal(signum, signal.SIG_DFL)
        os.write(2, b"\nstopping after this iteration; a second signal stops at once\n")  # print() is not reentrant

    old_handlers = {signum: signal.signal(signum, request_stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    total_steps = num_iterations * batch_size
    print(f"{run_dir}: steps {global_step:,} to {total_steps:,}, {batch_size:,} per iteration", flush=True)
    progress = tqdm(total=total_steps, initial=global_step, unit=" steps", unit_scale=True, disable=None)
    iteration_time = save_time = time.monotonic()

    for iteration in range(global_step // batch_size, num_iterations):
        # ---------------------------------------- (a) roll out: num_steps steps in every environment
        finished_returns, finished_lengths = [], []
        noise = agent.sample_noise(T, N).to(device)
        with torch.inference_mode():
            for t in range(T):
                observations[t] = observation
                actions[t] = agent.act(to_device(observations[t]), noise[t]).cpu().numpy()
                env_actions = actions[t] + envs.single_action_space.start
                observation, rewards[t], terminations[t], truncations[t], _ = envs.step(env_actions)
                next_observations[t] = observation
                episode_returns += rewards[t]
                episode_lengths += 1
                if (ended := terminations[t] | truncations[t]).any():
                    finished_returns.extend(episode_returns[ended])
                    finished_lengths.extend(episode_lengths[ended])
                    episode_returns[ended] = episode_lengths[ended] = 0
                    observation, _ = envs.reset(options={"reset_mask": ended})

        # ------------------------------------------------------------------------- (b) advantages
        device_observations, device_actions = to_device(observations), to_device(actions)
        with torch.no_grad():  # one pass over the rollout is faster than one at every step
            old_logprobs, _, values = agent(device_observations, device_actions)
            next_values = agent.value(to_device(next_observations))
        gae_inputs = values.cpu().numpy(), next_values.cpu().numpy(), terminations, truncations
        advantages = to_device(compute_gae(rewards, *gae_inputs, args.gamma, args.gae_lambda))
        returns = advantages + values
        batch = (device_observations, device_actions, old_logprobs, values, advantages, returns)
        batch = [x.flatten(0, 1) for x in batch]  # each [num_steps * num_envs, ...]

        # ---------------------------------------- (c) learn: epochs over shuffled minibatches (detail 6)
        fraction = 1 - iteration / num_iterations if args.anneal_lr else 1.0
        for group, initial_learning_rate in zip(optimizer.param_groups, initial_learning_rates, strict=True):
            group["lr"] = fraction * initial_learning_rate  # detail 4
        updates = []
        for _ in range(args.update_epochs):
            for indices in torch.randperm(batch_size).to(device).split(batch_size // args.num_minibatches):
                updates.append(update(*(x.index_select(0, indices) for x in batch)))
            if args.target_kl is not None and updates[-1]["losses/approx_kl"] > args.target_kl:
                break
        global_step += batch_size

        # ------------------------------------------------------------------------ (d) log and save
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
        last = iteration + 1 == num_iterations or stop_signal is not None
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

    for closing in (progress, envs, writer):
        closing.close()
    for signum, handler in old_handlers.items():
        signal.signal(signum, handler)
    if stop_signal is not None:
        print(f"stopped at step {global_step:,}; to resume: python {os.path.relpath(__file__)} --resume {run_dir}")
        raise SystemExit(128 + stop_signal)
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
    """Load the agent of a run, e.g. `runs/RUN`; agent.act(observations) gives greedy actions. Raises UsageError."""
    envs = make_envs(Args(**load_checkpoint(run)["args"]), num_envs=1)
    agent = Agent(envs)
    envs.close()
    load_checkpoint(run, agent)
    return agent


def evaluate(args: Args, run: str | Path) -> np.ndarray:
    """Play greedy episodes and log their mean return. Returns the returns, [eval_episodes]. Raises UsageError."""
    agent, step = load_agent(run), load_checkpoint(run)["global_step"]
    video = {"video_folder": f"{run}/videos/eval-at-{step}", "episode_trigger": lambda episode: episode == 0}
    envs = make_envs(args, args.eval_episodes, video if args.capture_video else None)
    returns, ended = np.zeros(args.eval_episodes), np.zeros(args.eval_episodes, bool)
    observations, _ = envs.reset(seed=10_000 * args.seed + 5_000)  # other seeds than in training
    while not ended.all():
        with torch.inference_mode():
            actions = agent.act(torch.as_tensor(observations, dtype=torch.float32)).numpy()
        observations, rewards, terminations, truncations, _ = envs.step(actions + envs.single_action_space.start)
        returns += np.where(ended, 0.0, rewards)  # the first episode of each environment counts
        if (ends := terminations | truncations).any():
            ended |= ends
            observations, _ = envs.reset(options={"reset_mask": ends})
    envs.close()
    with SummaryWriter(run) as writer:
        writer.add_scalar("eval/episodic_return", returns.mean(), step)
    print(f"evaluation at step {step:,}: return {returns.mean():.2f} +- {returns.std():.2f}, {len(returns)} episodes")
    return returns


def main() -> None:
    """The command line."""
    try:
        args = tyro.cli(Args, description=__doc__)
        if run := args.evaluate or args.resume:  # the run's own flags become the defaults
            saved = load_checkpoint(run)["args"]
            args = tyro.cli(Args, description=__doc__, default=Args(**saved))
            allowed = {"seed", "total_timesteps", "device", "compile", "async_envs", "capture_video", "eval_episodes"}
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
