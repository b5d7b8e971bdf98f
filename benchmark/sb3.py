"""Stable-Baselines3 as a training script: hyperparameters, flags, folders and tags of a script of this repository.

    python benchmark/sb3.py --hyperparameters ppo --env-id CartPole-v1 --seed 2   # those of ppo.py
    python benchmark/learning.py --script benchmark/sb3.py --env-ids CartPole-v1 --name sb3 -- --hyperparameters zoo

What is not given has the same value by default: networks, Adam's epsilon, normalized advantages. The recurrent networks
of sb3-contrib lack the layer before the LSTM. `zoo` is RL-Zoo's choice for CartPole, with a clip range that decays.

Requirements: pip install -r requirements.txt -r benchmark/requirements.txt
"""

import importlib
import sys
import time
from pathlib import Path

import torch
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
ZOO = "--num-envs 8 --num-steps 32 --num-minibatches 1 --update-epochs 20 --gamma 0.98 --gae-lambda 0.8"


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


def main() -> None:
    """The command line."""
    flags = sys.argv[1:]
    at = flags.index("--hyperparameters")
    name, flags = flags[at + 1], flags[:at] + flags[at + 2 :]
    script = importlib.import_module("ppo" if name == "zoo" else name)
    args = tyro.cli(script.Args, args=(ZOO.split() if name == "zoo" else []) + flags)
    torch.set_num_threads(torch.get_num_threads() if name == "ppo_atari" else 1)  # as the scripts, and the fastest

    model_class, policy, options = PPO, "MlpPolicy", {}
    if name == "ppo_lstm":
        from sb3_contrib import RecurrentPPO as model_class

        policy, options = "MlpLstmPolicy", {"policy_kwargs": {"lstm_hidden_size": 64, "net_arch": []}}
    if name == "ppo_atari":  # the script has imported ale_py, which registers the games
        game = args.env_id.removeprefix("ALE/").partition("-")[0]
        policy = "CnnPolicy"
        envs = VecFrameStack(make_atari_env(f"{game}NoFrameskip-v4", args.num_envs, seed=args.seed), 4)
    else:
        envs = make_vec_env(args.env_id, args.num_envs, seed=args.seed)
    if name == "ppo_continuous_action":
        envs = VecNormalize(envs, gamma=args.gamma)
    run = f"{args.env_id.replace('/', '-')}__sb3_{name}__{args.seed}__{int(time.time())}"
    with SummaryWriter(Path("runs", run)) as writer:
        model = model_class(
            policy,
            envs,
            learning_rate=lambda remaining: args.learning_rate * remaining,
            n_steps=args.num_steps,
            batch_size=args.num_envs * args.num_steps // args.num_minibatches,
            n_epochs=args.update_epochs,
            gamma=args.gamma,
            gae_lambda=args.gae_lambda,
            clip_range=(lambda remaining: args.clip_coef * remaining) if name == "zoo" else args.clip_coef,
            clip_range_vf=args.clip_coef if args.clip_vloss else None,
            ent_coef=args.ent_coef,
            vf_coef=args.vf_coef,
            max_grad_norm=args.max_grad_norm,
            seed=args.seed,
            device="cpu",
            **options,
        )
        model.learn(args.total_timesteps, callback=Log(writer))


if __name__ == "__main__":
    main()
