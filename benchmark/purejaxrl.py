"""PureJaxRL on CartPole, as solved.py runs it: one line of JSON, with times, returns and speed.

    python benchmark/purejaxrl.py --clone ../purejaxrl --num-envs 256

The hyperparameters are PureJaxRL's own with its own 4 copies, and those of ppo_vector.py with others. All iterations
of a training are one compiled program; each is taken to last equally long.

Requirements: a clone of PureJaxRL, and pip install jax flax optax distrax gymnax==0.0.8 tyro, without torch
"""

import json
import sys
import time
from unittest.mock import MagicMock

import jax
import numpy as np
import tyro

jax.tree_map = jax.tree_util.tree_map  # gymnax 0.0.8 uses the old name
for name in ("brax", "brax.envs", "brax.envs.wrappers", "brax.envs.wrappers.training", "navix"):
    sys.modules[name] = MagicMock()  # imported for other environments

OWN = {"LR": 2.5e-4, "NUM_STEPS": 128, "UPDATE_EPOCHS": 4, "NUM_MINIBATCHES": 4, "GAE_LAMBDA": 0.95, "ENT_COEF": 0.01}
VECTOR = {"LR": 3e-3, "NUM_STEPS": 32, "UPDATE_EPOCHS": 4, "NUM_MINIBATCHES": 8, "GAE_LAMBDA": 0.98, "ENT_COEF": 0.0}
BOTH = {"GAMMA": 0.99, "CLIP_EPS": 0.2, "VF_COEF": 0.5, "MAX_GRAD_NORM": 0.5, "ACTIVATION": "tanh", "ANNEAL_LR": True}


def main(clone: str, num_envs: int = 4, total_timesteps: int = 500_000, seed: int = 1) -> None:
    """Train once and print the result."""
    sys.path.insert(0, f"{clone}/purejaxrl")
    from ppo import make_train

    config = BOTH | (OWN if num_envs == 4 else VECTOR)
    config |= {"NUM_ENVS": num_envs, "TOTAL_TIMESTEPS": total_timesteps, "ENV_NAME": "CartPole-v1", "DEBUG": False}
    start = time.time()
    train = jax.jit(make_train(config)).lower(jax.random.PRNGKey(seed)).compile()
    compiled = time.time()
    metrics = jax.block_until_ready(train(jax.random.PRNGKey(seed)))["metrics"]
    end = time.time()
    ended = np.asarray(metrics["returned_episode"])  # [iterations, steps, copies]
    returns = np.asarray(metrics["returned_episode_returns"])
    events = []  # of each iteration: when, mean return, episodes
    for i, (over, x) in enumerate(zip(ended, returns, strict=True)):
        if over.any():
            when = compiled + (end - compiled) * (i + 1) / len(ended)
            events.append((when, float(x[over].mean()), int(over.sum())))
    speed = ended.size / (end - compiled)
    print(json.dumps({"compiling": compiled - start, "steps/s": speed, "events": events}))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
