"""Toy environments with known answers, for the tests: `--env-id probe_envs:Constant-v0` and so on."""

import os
import signal
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Sequence, Tuple


class Constant(gym.Env):
    """One step, reward 1: the value is 1."""

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation = self.first_observation()
        return self.observation, {}

    def step(self, action):
        return self.observation.copy(), self.reward(action), True, False, {}

    def first_observation(self):
        return np.ones(1, np.float32)

    def reward(self, action):
        return 1.0


class ByObservation(Constant):
    """One step, observation -1 or 1, and that is the reward, too: the value is the observation."""

    def first_observation(self):
        return np.array([self.np_random.choice([-1, 1])], np.float32)

    def reward(self, action):
        return float(self.observation[0])


class ByAction(Constant):
    """One step, action 1 pays 1 and action 0 costs 1."""

    def reward(self, action):
        return 1.0 if action == 1 else -1.0


class ByBoth(ByObservation):
    """One step: action 1 is right for observation 1, action 0 for observation -1."""

    def reward(self, action):
        return 1.0 if (action == 1) == (self.observation[0] > 0) else -1.0


class Chain(gym.Env):
    """`length` steps, the observation says which one it is (one-hot); then the episode ends as `end` says.

    The reward is 1 in the last step, and 1 in all the others too if `every_step`.
    """

    action_space = Discrete(2)

    def __init__(self, length=2, end="termination", every_step=False):
        self.length, self.end, self.every_step = length, end, every_step
        self.observation_space = Box(0, 1, (length,), np.float32)

    def observe(self):
        return np.eye(self.length, dtype=np.float32)[self.count % self.length]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.observe(), {}

    def step(self, action):
        self.count += 1
        ended = self.count == self.length
        reward = 1.0 if ended or self.every_step else 0.0
        return self.observe(), reward, ended and self.end == "termination", ended and self.end == "truncation", {}


class Numbered(gym.Env):
    """Every observation is unique: (who, episode, step), where `who` comes from the first seed.

    Episodes have 2 to 5 steps, and end by termination, truncation or both at once: see `episode`.
    With `reuse`, every observation is the same array, overwritten in place.
    """

    observation_space = Box(0, 1000, (3,), np.float32)
    action_space = Discrete(3)

    def __init__(self, reuse=False):
        self.reuse, self.number, self.array = reuse, -1, np.zeros(3, np.float32)

    @staticmethod
    def who(seed):
        return seed % 1000

    @staticmethod
    def episode(who, number):
        """Its length, and whether it is terminated and truncated."""
        kind = (who + number) % 3
        return 2 + (who + number) % 4, kind in (0, 2), kind in (1, 2)

    @classmethod
    def simulate(cls, who, num_steps):
        """What happens where it is reset as soon as an episode ends: row by row observation, next observation,
        reward, termination, truncation."""
        rows, number, count = [], 0, 0
        for _ in range(num_steps):
            length, terminated, truncated = cls.episode(who, number)
            ended = count + 1 == length
            before, after = (who, number, count), (who, number, count + 1)
            rows.append((before, after, 10 * number + count + 1, ended and terminated, ended and truncated))
            number, count = (number + 1, 0) if ended else (number, count + 1)
        return rows

    def observe(self):
        self.array[:] = self.me, self.number, self.count
        return self.array if self.reuse else self.array.copy()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.me = self.who(seed)
        self.number, self.count = self.number + 1, 0
        return self.observe(), {}

    def step(self, action):
        self.count += 1
        length, terminated, truncated = self.episode(self.me, self.number)
        ended = self.count == length
        return self.observe(), 10.0 * self.number + self.count, ended and terminated, ended and truncated, {}


class ContinuousNumbered(Numbered):
    """The same for any two numbers within these bounds, which it ignores."""

    action_space = Box(np.array([-0.5, 0.1], np.float32), np.array([0.25, 2.0], np.float32))


class ContinuousChain(Chain):
    """The same for any number from -1 to 1, which it ignores."""

    action_space = Box(-1, 1, (1,), np.float32)


class Target(ByObservation):
    """One step: the reward is 1 where the action is right, and less by the square of what it is off.

    Right is 0.4; with `follow`, half the observation, which is -1 or 1.
    """

    action_space = Box(-1, 1, (1,), np.float32)

    def __init__(self, follow=False):
        self.follow = follow

    def reward(self, action):
        right = 0.5 * self.observation[0] if self.follow else 0.4
        return float(1 - (action[0] - right) ** 2)


class Faulty(gym.Env):
    """Episodes of 10 steps with reward 1, until its `at`-th step: then it does `what`.

    With `seed`, only the one of several environments does that whose first reset has this seed.
    """

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Discrete(2)
    steps = 0

    def __init__(self, what, at, seed=None, delay=0.0):
        self.what, self.at, self.seed, self.delay = what, at, seed, delay

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        if None not in (seed, self.seed) and seed != self.seed:
            self.at = np.inf
        return np.zeros(2, np.float32), {}

    def step(self, action):
        time.sleep(self.delay)
        self.count += 1
        self.steps += 1
        now = self.steps == self.at
        if now and self.what == "exception":
            raise ZeroDivisionError("the environment has a bug")
        if now and self.what == "death":  # as by the system when memory runs out
            os.kill(os.getpid(), signal.SIGKILL)
        bad = self.what if now else ""
        observation = np.full(2, np.nan if "observation" in bad else 0, np.float32)
        reward = {"reward": np.nan, "infinite reward": np.inf}.get(bad, 1.0)
        return observation, reward, False, self.count == 10 or bad == "last observation", {}


class Spaces(gym.Env):
    """Random observations from one of the spaces below; it takes, but ignores, a render_mode."""

    observation_spaces = {  # noqa: RUF012
        "float64": Box(-1, 1, (3,), np.float64),
        "int": Box(-5, 5, (3,), np.int64),
        "bytes": Box(0, 255, (128,), np.uint8),
        "matrix": Box(-1, 1, (2, 3), np.float32),
        "number": Box(-1, 1, (), np.float32),
        "discrete": Discrete(4, start=-1),
        "multidiscrete": MultiDiscrete([3, 2]),
        "multibinary": MultiBinary([2, 2]),
        "dict": Dict(where=Discrete(3), speed=Box(-1, 1, (2,), np.float32)),
        "tuple": Tuple((Discrete(2), Dict(a=MultiBinary(3)))),
        "image": Box(0, 255, (84, 84, 3), np.uint8),
        "grey image": Box(0, 255, (84, 84), np.uint8),
        "sequence": Sequence(Discrete(2)),
    }
    action_spaces = {  # noqa: RUF012
        "discrete": Discrete(3),
        "shifted": Discrete(3, start=5),
        "negative": Discrete(3, start=-1),
        "single": Discrete(1),
        "continuous": Box(-1, 1, (2,), np.float32),
        "multidiscrete": MultiDiscrete([2, 3]),
        "number": Box(-1, 1, (), np.float32),
        "matrix": Box(-1, 1, (2, 3), np.float32),
        "unbounded": Box(-np.inf, np.inf, (2,), np.float32),
        "half-bounded": Box(np.array([0.1, -np.inf], np.float32), np.array([np.inf, -0.1], np.float32)),
        "asymmetric": Box(np.array([-0.1, 0.5], np.float32), np.array([0.3, 2.0], np.float32)),
        "float64": Box(-0.1, 0.1, (2,), np.float64),
        "integers": Box(-1, 1, (2,), np.int64),
        "multibinary": MultiBinary(3),
        "tuple": Tuple((Box(-1, 1, (2,), np.float32), Discrete(2))),
        "dict": Dict(force=Box(-1, 1, (2,), np.float32)),
    }

    def __init__(self, observations="float64", actions="discrete", render_mode=None):
        self.observation_space = self.observation_spaces[observations]
        self.action_space = self.action_spaces[actions]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.count, self.taken = 0, set()
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action} is not in {self.action_space}"
        self.count += 1
        return self.observation_space.sample(), 1.0, self.count == 10, False, {}


class Diary(CartPoleEnv):
    """CartPole that writes the return and the length of each episode to diary.txt when it ends."""

    def reset(self, **kwargs):
        self.total, self.count = 0.0, 0
        return super().reset(**kwargs)

    def step(self, action):
        observation, reward, terminated, _, info = super().step(action)
        reward = 3 * reward - 1  # so that the return is not the length
        self.total += reward
        self.count += 1
        truncated = self.count == 500
        if terminated or truncated:
            with Path("diary.txt").open("a") as file:
                file.write(f"{self.total} {self.count}\n")
        return observation, reward, terminated, truncated, info


CONTINUOUS = (ContinuousNumbered, ContinuousChain, Target)
for env in (Constant, ByObservation, ByAction, ByBoth, Chain, Numbered, Faulty, Spaces, Diary, *CONTINUOUS):
    gym.register(f"{env.__name__}-v0", env)
