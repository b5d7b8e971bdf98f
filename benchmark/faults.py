"""Environments with one fault each: the measurements of docs/not-learning.md.

    PYTHONPATH=benchmark python ppo.py --env-id faults:Scaled-v0 --env-kwargs env_id=CartPole-v1 reward=1e4
    PYTHONPATH=benchmark python ppo.py --env-id faults:UnitObservations-v0 --env-kwargs env_id=MountainCar-v0

What cures a fault is here as well.
"""

import gymnasium as gym
import numpy as np
from gymnasium import wrappers
from gymnasium.spaces import Box


def scaled(env_id: str, reward: float = 1.0, observation: float = 1.0, shift: float = 0.0, **kwargs) -> gym.Env:
    """Multiply rewards and observations, and add `shift` to the observations."""
    env = wrappers.TransformReward(gym.make(env_id, **kwargs), lambda x: reward * x)
    space = Box(-np.inf, np.inf, env.observation_space.shape)
    return wrappers.TransformObservation(env, lambda x: np.float32(observation * x + shift), space)


def unit_observations(env_id: str, **kwargs) -> gym.Env:
    """Map observations from their bounds, which must be finite, to [-1, 1]."""
    return wrappers.RescaleObservation(gym.make(env_id, **kwargs), -1.0, 1.0)


def stacked(env_id: str, size: int, **kwargs) -> gym.Env:
    """Show the last `size` observations."""
    return wrappers.FrameStackObservation(gym.make(env_id, **kwargs), size)


def as_number(env_id: str, **kwargs) -> gym.Env:
    """Show a category as one number; the scripts make a Discrete observation one-hot."""
    env = gym.make(env_id, **kwargs)
    space = Box(0, int(env.observation_space.n) - 1, (1,))
    return wrappers.TransformObservation(env, lambda x: np.array([x], np.float32), space)


class ShapedMountainCar(gym.Wrapper):
    """MountainCar with the gain in energy as a further reward, which keeps the best policy (Ng et al., 1999)."""

    def __init__(self, gamma: float = 0.99, **kwargs):
        super().__init__(gym.make("MountainCar-v0", **kwargs))
        self.gamma = gamma

    def potential(self, observation) -> float:
        position, velocity = map(float, observation)
        return 1e4 * (0.5 * velocity**2 + 0.0025 / 3 * np.sin(3 * position)) - 33  # at most 0, as at the end

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        self.before = self.potential(observation)
        return observation, info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        after = 0.0 if terminated else self.potential(observation)
        reward, self.before = reward + self.gamma * after - self.before, after
        return observation, reward, terminated, truncated, info


for name, make in {
    "Scaled": scaled,
    "UnitObservations": unit_observations,
    "Stacked": stacked,
    "AsNumber": as_number,
    "ShapedMountainCar": ShapedMountainCar,
}.items():
    gym.register(f"{name}-v0", make)
