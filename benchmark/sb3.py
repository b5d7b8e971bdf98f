"""Stable-Baselines3 as a training script that learning.py can run: same flags, folders and tags as ppo.py.

    python benchmark/learning.py --script benchmark/sb3.py --env-ids CartPole-v1 --name sb3 -- --hyperparameters zoo

Requirements: pip install -r requirements.txt -r benchmark/requirements.txt
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo
import ppo_lstm


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # Gymnasium id of the environment
    seed: int = 1  # seed of all random numbers
    total_timesteps: int = 500_000  # steps to train for, over all environments
    hyperparameters: Literal["ppo", "ppo_lstm", "zoo"] = "ppo"  # those of this script, or of RL-Zoo for CartPole


class Log(BaseCallback):
    """Logs the returns of each rollout, as ppo.py does."""

    def __init__(self, writer: SummaryWriter) -> None:
        super().__init__()
        self.writer, self.episodes, self.time = writer, [], time.monotonic()

    def _on_step(self) -> bool:
        self.episodes += [info["episode"] for info in self.locals["infos"] if "episode" in info]
        return True

    def _on_rollout_end(self) -> None:
        metrics = {"charts/SPS": self.model.n_steps * self.training_env.num_envs / (time.monotonic() - self.time)}
        if self.episodes:
            metrics["charts/episodic_return"] = sum(episode["r"] for episode in self.episodes) / len(self.episodes)
            metrics["charts/episodes"] = len(self.episodes)
        for tag, value in metrics.items():
            self.writer.add_scalar(tag, value, self.num_timesteps)
        self.writer.flush()  # solved.py stops the run
        self.episodes, self.time = [], time.monotonic()


def hyperparameters(name: str) -> tuple[int, dict]:
    """Return the number of environments and the arguments of the model."""
    if name == "zoo":  # hyperparams/ppo.yml of RL-Zoo
        options = {"n_steps": 32, "batch_size": 256, "n_epochs": 20, "gamma": 0.98, "gae_lambda": 0.8}
        decay = {"learning_rate": lambda remaining: 0.001 * remaining, "clip_range": lambda remaining: 0.2 * remaining}
        return 8, {"policy": "MlpPolicy", **options, **decay}
    args = (ppo if name == "ppo" else ppo_lstm).Args()
    options = {name: getattr(args, name) for name in ("gamma", "gae_lambda", "ent_coef", "vf_coef", "max_grad_norm")}
    if name == "ppo_lstm":  # the networks lack the layer before the LSTM
        options["policy_kwargs"] = {"lstm_hidden_size": 64, "net_arch": []}
    return args.num_envs, {
        "policy": "MlpPolicy" if name == "ppo" else "MlpLstmPolicy",
        "learning_rate": lambda remaining: args.learning_rate * remaining,
        "n_steps": args.num_steps,
        "batch_size": args.num_envs * args.num_steps // args.num_minibatches,
        "n_epochs": args.update_epochs,
        "clip_range": args.clip_coef,
        "clip_range_vf": args.clip_coef if args.clip_vloss else None,
        **options,
    }


def main() -> None:
    """The command line."""
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)  # as the scripts, and the fastest
    num_envs, options = hyperparameters(args.hyperparameters)
    envs = make_vec_env(args.env_id, num_envs, seed=args.seed)
    name = f"{args.env_id.replace('/', '-')}__sb3_{args.hyperparameters}__{args.seed}__{int(time.time())}"
    with SummaryWriter(Path("runs", name)) as writer:
        model_class = RecurrentPPO if args.hyperparameters == "ppo_lstm" else PPO
        model = model_class(env=envs, seed=args.seed, device="cpu", **options)
        model.learn(args.total_timesteps, callback=Log(writer))


if __name__ == "__main__":
    main()
