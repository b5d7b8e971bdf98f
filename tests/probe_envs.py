"""Small environments with known answers, for the tests, e.g. `--env-id probe_envs:Constant-v0`."""

import os
import random
import signal
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiBinary, MultiDiscrete, Sequence, Tuple


class OneStep(gym.Env):
    """Episodes of one step: an observation drawn from `observations`, and the reward reward(observation, action)."""

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Discrete(2)

    def __init__(self, observations, reward):
        self.observations, self.reward = observations, reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation = self.first_observation()
        return self.observation, {}

    def first_observation(self):
        return np.array([self.np_random.choice(self.observations)], np.float32)

    def step(self, action):
        return self.observation.copy(), float(self.reward(self.observation[0], action)), True, False, {}


ONE_STEP = {
    "Constant": ([1], lambda observation, action: 1),
    "ByObservation": ([-1, 1], lambda observation, action: observation),
    "ByAction": ([1], lambda observation, action: 2 * action - 1),
    "ByBoth": ([-1, 1], lambda observation, action: observation * (2 * action - 1)),
}


class Target(OneStep):
    """The reward is 1 less the squared distance of the action from 0.4; with `follow`, from half the observation."""

    action_space = Box(-1, 1, (1,), np.float32)

    def __init__(self, follow=False):
        self.observations, self.follow = [-1, 1], follow

    def reward(self, observation, action):
        return 1 - (action[0] - (0.5 * observation if self.follow else 0.4)) ** 2


class Chain(gym.Env):
    """`length` steps, the observation is the number of the step, one-hot; the episode ends by `end`.

    The reward is 1 in the last step, with `every_step` in all steps.
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


class Recall(gym.Env):
    """The first observation names the action, 0 or 1, that has reward 1 instead of -1 in the last of `length` steps."""

    observation_space = Box(-1, 1, (2,), np.float32)
    action_space = Discrete(2)

    def __init__(self, length=20):
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.answer = 0, int(self.np_random.integers(2))
        return np.array([2 * self.answer - 1, 0], np.float32), {}

    def step(self, action):
        self.count += 1
        ended = self.count == self.length
        reward = (1.0 if action == self.answer else -1.0) if ended else 0.0
        return np.array([0, self.count == self.length - 1], np.float32), reward, ended, False, {}


class Numbered(gym.Env):
    """Every observation is unique: (who, episode, step), where `who` comes from the first seed.

    Episodes have 2 to 5 steps and end by termination, truncation or both at once.
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
        """The length of an episode, and whether it ends by termination and by truncation."""
        kind = (who + number) % 3
        return 2 + (who + number) % 4, kind in (0, 2), kind in (1, 2)

    @classmethod
    def simulate(cls, who, num_steps):
        """Rows (observation, next observation, reward, termination, truncation) if reset at once after each end."""
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
    """The same with two continuous actions, which have no effect."""

    action_space = Box(np.array([-0.5, 0.1], np.float32), np.array([0.25, 2.0], np.float32))


class ContinuousChain(Chain):
    """The same with a continuous action, which has no effect."""

    action_space = Box(-1, 1, (1,), np.float32)


class Faulty(gym.Env):
    """Episodes of 10 steps with reward 1; in its `at`-th step it does `what`.

    With `seed`, only the one of several environments whose first reset has this seed.
    """

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Discrete(2)
    steps = 0

    def __init__(self, what, at, seed=None):
        self.what, self.at, self.seed = what, at, seed

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        if None not in (seed, self.seed) and seed != self.seed:
            self.at = np.inf
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.count += 1
        self.steps += 1
        now = self.steps == self.at
        if now and self.what == "exception":
            raise ZeroDivisionError("the environment has a bug")
        if now and self.what == "hang":
            Path(f"hangs-{os.getpid()}").touch()
            time.sleep(10**6)
        if now and self.what == "death":  # as when the system runs out of memory
            os.kill(os.getpid(), signal.SIGKILL)
        bad = self.what if now else ""
        observation = np.full(2, np.nan if "observation" in bad else 0, np.float32)
        reward = {"reward": np.nan, "infinite reward": np.inf}.get(bad, 1.0)
        return observation, reward, False, self.count == 10 or bad == "last observation", {}


class Text(gym.Space):
    """A space that gymnasium does not know, like the mission of MiniGrid."""

    def sample(self, mask=None, probability=None):
        return "go to the green door"

    def contains(self, x):
        return isinstance(x, str)

    @property
    def is_np_flattenable(self):
        raise NotImplementedError


class Spaces(gym.Env):
    """Random observations from one of the spaces below; a render_mode has no effect."""

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
        "text in dict": Dict(mission=Text(), speed=Box(-1, 1, (2,), np.float32)),
        "graph in dict": Dict(graph=Graph(Box(-1, 1, (2,)), None), speed=Box(-1, 1, (2,), np.float32)),
        "nested": Dict(inner=Dict(list=Sequence(Discrete(2)), door=Discrete(3)), speed=Box(-1, 1, (2,), np.float32)),
        "nested whole": Dict(inner=Dict(list=Sequence(Discrete(2))), speed=Box(-1, 1, (2,), np.float32)),
        "nothing left": Dict(inner=Dict(list=Sequence(Discrete(2)))),
        "text in tuple": Tuple((Discrete(2), Text())),
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


class Ten(gym.Env):
    """Ten steps. The observation is the share of the steps that are done, and 1; the reward is the action.

    reset() takes no options.
    """

    observation_space = Box(-1, 1, (2,), np.float32)
    action_space = Discrete(2)

    def observe(self):
        return np.array([self.count / 10, 1], np.float32)

    def reward(self, action):
        return float(action)

    def info(self):
        return {}

    def reset(self, *, seed=None, options=None):
        assert options is None
        super().reset(seed=seed)
        self.count = 0
        return self.observe(), self.info()

    def step(self, action):
        self.count += 1
        return self.observe(), self.reward(action), self.count == 10, False, self.info()


class Info(Ten):
    """`kind` says what differs between the infos of two copies, and of two steps."""

    def __init__(self, kind):
        self.kind = kind

    def info(self):
        n = int(self.np_random.integers(1, 5))
        return {
            "shape": {"moves": np.arange(n)},
            "number": {"target": None if n < 3 else n},
            "array": {"target": n if n < 3 else np.zeros(n)},
            "dict": {"target": {"x": n} if n < 3 else None},
            "type": {"target": "left" if n < 3 else n},
            "keys": {str(n): n},
        }[self.kind]


class BadEnd(Ten):
    """The last observation of an episode holds `value`."""

    def __init__(self, value):
        self.value = float(value)

    def observe(self):
        return np.array([self.value if self.count == 10 else 0, 1], np.float32)


class Prices(Ten):
    """A copy changes the list that it is given: with prices=[1], the rewards of an episode are 2, 3, ..., 11."""

    def __init__(self, prices):
        self.prices = prices

    def reset(self, **kwargs):
        self.prices[0] = 1
        return super().reset(**kwargs)

    def reward(self, action):
        self.prices[0] += 1
        return float(self.prices[0])


class Global(Ten):
    """Observes a number of a global generator, `random` or `numpy`; or of a RandomState with the seed, `state`."""

    draw = staticmethod(random.random)

    def __init__(self, source):
        self.source = source

    def reset(self, *, seed=None, options=None):
        if self.source == "numpy":
            self.draw = np.random.random
        elif self.source == "state" and seed is not None:
            self.draw = np.random.RandomState(seed).random
        self.goal = self.draw()
        return super().reset(seed=seed, options=options)

    def observe(self):
        return np.array([self.count / 10, self.goal], np.float32)

    def reward(self, action):
        return self.draw()


class Torch(Ten):
    """The reward, 2, is a gradient."""

    def reward(self, action):
        x = torch.ones(1, requires_grad=True)
        (2 * x).backward()
        return x.grad.item()


class WrongShape(Ten):
    """Observations of a shape that the space does not have."""

    observation_space = Box(-1, 1, (3,), np.float32)

    def observe(self):
        return np.array([self.count / 10], np.float32)


class Endless(Ten):
    """Never ends. The brightness of a frame is a tenth of the number of steps. close() fails, if `close` is set."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012

    def __init__(self, close=False, render_mode=None):
        self.fails, self.render_mode = close, render_mode

    def step(self, action):
        self.count += 1
        return np.ones(2, np.float32), 1.0, False, False, {}

    def render(self):
        return np.full((16, 16, 3), self.count // 10 % 256, np.uint8)

    def close(self):
        if self.fails:
            raise ZeroDivisionError("close() has a bug")


class Diary(CartPoleEnv):
    """CartPole that appends the return and the length of each episode to diary.txt."""

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


class Board(gym.Env):
    """A board of bytes that is no image, rewards of shape (1,), and a render_mode that nobody has asked for."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012
    observation_space, action_space = Box(0, 1, (4, 4, 2), np.uint8), Discrete(2)

    def __init__(self, render_mode="rgb_array"):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        self.count = 0
        return np.zeros((4, 4, 2), np.uint8), {}

    def step(self, action):
        self.count += 1
        return np.full((4, 4, 2), self.count % 2, np.uint8), np.ones(1), self.count == 5, False, {}


for name, (observations, reward) in ONE_STEP.items():
    gym.register(f"{name}-v0", OneStep, kwargs={"observations": observations, "reward": reward})
ENVIRONMENTS = (Target, Chain, Recall, ContinuousChain, Numbered, ContinuousNumbered, Faulty, Spaces, Diary)
ENVIRONMENTS += (Ten, Info, BadEnd, Prices, Global, Torch, WrongShape, Endless, Board)
for env in ENVIRONMENTS:
    gym.register(f"{env.__name__}-v0", env)
