"""CartPole and LunarLander without velocities, for scripts that have no `--observe`.

    PYTHONPATH=benchmark python ppo.py --env-id masked_envs:CartPoleNoVelocity-v1
    PYTHONPATH=$PWD/benchmark python benchmark/learning.py --env-ids masked_envs:CartPoleNoVelocity-v1

The observations are those of `ppo_lstm.py --observe 0 2` and `--observe 0 1 4 6 7`.
"""

import gymnasium as gym
from gymnasium.spaces import Box


def make(env_id: str, kept: tuple[int, ...], **kwargs) -> gym.Env:
    """Make an environment that shows the components `kept` of its observations."""
    env, kept = gym.make(env_id, **kwargs), list(kept)
    space = Box(env.observation_space.low[kept], env.observation_space.high[kept])
    return gym.wrappers.TransformObservation(env, lambda observation: observation[kept], space)


for name, env_id, kept in (
    ("CartPoleNoVelocity-v1", "CartPole-v1", (0, 2)),
    ("LunarLanderNoVelocity-v3", "LunarLander-v3", (0, 1, 4, 6, 7)),
):
    gym.register(name, make, kwargs={"env_id": env_id, "kept": kept})
