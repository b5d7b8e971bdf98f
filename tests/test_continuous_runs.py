"""Runs of ppo_continuous_action.py: learning, repeating, compiling, resuming, refusing and filming."""

import ctypes.util
import shutil
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from helpers import ROOT, as_flags, curves, frames, load, run, same_weights, the_run, train

import ppo_continuous_action as ppo

SHORT = {"num_envs": 2, "num_steps": 64, "num_minibatches": 4, "total_timesteps": 512}
ONE_ITERATION = {**SHORT, "update_epochs": 1, "total_timesteps": 128}
EGL = ctypes.util.find_library("EGL")
needs_egl = pytest.mark.skipif(not EGL, reason="MuJoCo needs EGL without a display")
PENDULUM = {"env_id": "InvertedPendulum-v5", **SHORT, "total_timesteps": 256}


class Follow(gym.Env):
    """Ten steps, in which the action, in units of its range, must be 0.8 x. `unit` x is observed, beside a constant.

    The best return is 10, and the best of a constant action 7.87. Ends by truncation; with `last`, which is then
    observed at the end, by termination.
    """

    observation_space = Box(-np.inf, np.inf, (2,), np.float64)

    def __init__(self, low=-1.0, high=1.0, dtype="float32", unit=1.0, last=None):
        self.action_space = Box(low, high, (1,), dtype)
        self.low, self.high = low, min(high, low + 2) if high == np.inf else high
        self.unit, self.last = unit, last and float(last)

    def observe(self):
        self.x = self.np_random.uniform(-1, 1)
        at_end = self.count == 10 and self.last is not None
        return np.array([self.last if at_end else self.unit * self.x, 1e6])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        u = 2 * (action[0] - self.low) / (self.high - self.low) - 1
        reward = 1 - (u - 0.8 * self.x) ** 2
        self.count += 1
        ended = self.count == 10
        return self.observe(), reward, ended and self.last is not None, ended and self.last is None, {}


gym.register("Follow-v0", Follow)


@pytest.mark.parametrize(
    "env_kwargs",
    [
        "low=-2000 high=2000",
        "low=-0.001 high=0.001",
        "low=0 high=2000000.0",
        "low=5 high=1e400",  # no bound above
        "low=0 high=100 dtype=int64",
        "unit=1e-8",
    ],
)
def test_ranges_of_actions_and_scales_of_observations_make_no_difference(env_kwargs):
    """With seeds 1 to 3, the returns are 9.96 to 10.0."""
    task = {"num_envs": 8, "num_steps": 64, "num_minibatches": 8, "total_timesteps": 4096, "eval_episodes": 10}
    flags = {"env_id": "Follow-v0", "env_kwargs": tuple(env_kwargs.split()), "gamma": 0.0, "learning_rate": 0.005}
    ((_, evaluated),) = curves(train(ppo, **task, **flags))["eval/episodic_return"]
    assert evaluated > 9.9


@pytest.mark.parametrize("last", ["nan", "inf"])
def test_the_last_observation_of_a_terminated_episode_is_not_used(last):
    """The run is the same to the bit as with another one."""
    flags = {"env_id": "Follow-v0", **SHORT, "eval_episodes": 3}
    one, other = (train(ppo, **flags, env_kwargs=(f"last={x}",)) for x in (last, "5.0"))
    assert curves(one) == curves(other)
    assert same_weights(load(one), load(other))


def learn(env_id, **flags):
    """Train on a probe. Returns greedy action and value, in the unit of the rewards, as functions of an observation."""
    task = {"num_envs": 8, "num_steps": 32, "num_minibatches": 4, "update_epochs": 4, "total_timesteps": 8192}
    agent = ppo.load_agent(train(ppo, env_id=f"probe_envs:{env_id}", learning_rate=0.005, **task, **flags))
    std = agent.return_statistics.std.item()
    return lambda *x: agent.act(
        torch.Tensor([x]), greedy=True
    ).item(), lambda *x: agent.value(torch.Tensor([x])).item() * std


def test_the_policy_follows_the_observation():
    """The best action is half of it. The value is the reward of 1 less the cost of the remaining noise."""
    policy, value = learn("Target-v0", env_kwargs=("follow=True",))
    assert (policy(-1), policy(1)) == pytest.approx((-0.5, 0.5), abs=0.06)
    assert 0.85 < min(value(-1), value(1)) < 1


@pytest.mark.parametrize(("end", "values"), [("truncation", [10, 10, 10]), ("termination", [2.71, 1.9, 1])])
def test_values_at_the_two_kinds_of_end(end, values):
    """Reward 1 in each of 3 steps: after a truncation it would go on, to 1 / (1 - gamma); after a termination not."""
    _, value = learn("ContinuousChain-v0", env_kwargs=("length=3", "every_step=True", f"end={end}"), gamma=0.9)
    assert [value(*row) for row in np.eye(3)] == pytest.approx(values, rel=0.01)


def test_inverted_pendulum_is_learned_and_its_agent_can_be_loaded():
    """The return starts at about 8, and the greedy policy keeps the pole up, but not without its statistics.

    The logged return is not normalized: 1 a step, but 0 for the step at which the pole falls.
    """
    flags = {"num_envs": 4, "num_steps": 128, "num_minibatches": 8, "update_epochs": 5, "total_timesteps": 16_384}
    args = ppo.Args("InvertedPendulum-v5", learning_rate=0.003, gamma=0.95, eval_episodes=3, **flags)
    run_dir = ppo.train(args)
    curve = curves(run_dir)
    returns, lengths = (np.array(curve[f"charts/episodic_{name}"])[:, 1] for name in ("return", "length"))
    assert returns[0] < 20 < 50 < returns[-1]
    assert ((lengths - 1.001 < returns) & (returns <= lengths)).all()
    ((_, evaluated),) = curve["eval/episodic_return"]
    assert evaluated > 500
    assert ppo.evaluate(args, run_dir).mean() == pytest.approx(evaluated)

    checkpoint = load(run_dir)
    checkpoint["agent"]["observation_statistics.std"].fill_(1)
    torch.save(checkpoint, run_dir / "checkpoint.pt")
    assert ppo.evaluate(args, run_dir).mean() < 500


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    """A run by a copy of the script in an empty folder, without a display; filmed if EGL is available."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("filmed"))
        for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY", "WAYLAND_DISPLAY"):
            patch.delenv(name, raising=False)
        shutil.copy(ROOT / "ppo_continuous_action.py", "ppo_continuous_action.py")
        flags = [*as_flags(**PENDULUM, eval_episodes=1), *(["--capture-video"] if EGL else [])]
        result = run(sys.executable, "ppo_continuous_action.py", *flags, PYTHONPATH="")
        assert result.code == 0, result.err
        return the_run().resolve()


def test_the_same_seed_gives_the_same_bits_in_another_process(filmed):
    """Filmed or not; another seed gives another run."""
    one, another = (train(ppo, **PENDULUM, seed=seed) for seed in (1, 2))
    assert curves(one) == curves(filmed)
    assert same_weights(load(one), load(filmed))
    assert not same_weights(load(one), load(another))


@needs_egl
def test_mujoco_is_filmed_without_a_display(filmed):
    """The first episodes of training, and one of the evaluation."""
    ((_, length),) = curves(filmed)["eval/episodic_return"]  # 1 a step, and 0 for the step at which the pole falls
    (path,) = filmed.glob("videos/eval-at-256/*.mp4")
    film = frames(path)
    assert len(film) == length + 2
    assert all(frame.std() > 5 for frame in film), "no frame is of one colour"
    assert any((film[0] != frame).any() for frame in film)
    assert list(filmed.glob("videos/train-*/*episode-0.mp4"))


def test_a_resumed_run_ends_where_an_unbroken_one_does(monkeypatch):
    """To the bit, in an environment of one-step episodes without randomness: statistics, noise, weights and Adam."""
    monkeypatch.setattr("probe_envs.Target.first_observation", lambda self: np.ones(1, np.float32))
    flags = {"env_id": "probe_envs:Target-v0", **SHORT, "anneal_lr": False}
    whole = train(ppo, **flags, exp_name="whole")
    broken = train(ppo, **{**flags, "total_timesteps": 256}, exp_name="broken")
    train(ppo, **flags, exp_name="broken", resume=str(broken))
    assert same_weights(load(whole), load(broken))
    assert len({value for _, value in curves(whole)["charts/episodic_return"]}) == 4, "noise changes the returns"


def test_the_learning_rate_follows_the_kl_divergence():
    """Lower after an iteration whose mean divergence is above max_kl, up to 1 again after others; also when resumed."""
    flags = {"env_id": "probe_envs:Target-v0", **SHORT, "learning_rate": 0.01, "max_kl": 0.03}
    run = train(ppo, **{**flags, "total_timesteps": 256})
    train(ppo, **{**flags, "total_timesteps": 256}, resume=str(run))  # only evaluates
    train(ppo, **flags, resume=str(run))
    curve = curves(run)
    rates, kls = ([value for _, value in curve[name]] for name in ("charts/learning_rate", "losses/approx_kl"))
    scale, expected = 1.0, []
    for iteration, kl in enumerate(kls):
        num_iterations = 2 if iteration < 2 else len(kls)  # the resumed run has more
        expected.append(0.01 * scale * (1 - iteration / num_iterations))
        scale = scale / 1.25 if kl > 0.03 else min(1.0, 1.25 * scale)
    assert rates == pytest.approx(expected, rel=1e-5)
    assert kls[1] > 0.03 > kls[2], "the rate is lowered before the run is resumed, and raised afterwards"


@pytest.mark.parametrize(
    ("env_id", "num_inputs", "num_actions"),
    [("BipedalWalker-v3", 24, 4), ("LunarLander-v3", 8, 2), ("Ant-v5", 105, 8), ("Humanoid-v5", 348, 17)],
)
@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")  # Box2D's own
def test_gymnasium_environments_run(env_id, num_inputs, num_actions):
    """One iteration, without the evaluation."""
    env_kwargs = ("continuous=True",) if env_id == "LunarLander-v3" else ()
    agent = load(train(ppo, env_id=env_id, env_kwargs=env_kwargs, **ONE_ITERATION, eval_episodes=0))["agent"]
    assert agent["observation_statistics.mean"].shape == (num_inputs,)
    assert agent["log_std"].shape == (num_actions,)


@needs_egl
def test_the_camera_follows_the_cheetah(monkeypatch):
    """30 m away, it fills about as many pixels as at the start."""
    monkeypatch.setenv("MUJOCO_GL", "egl")
    envs = ppo.make_envs(ppo.Args("HalfCheetah-v5"), 1, video_folder="videos")
    envs.reset(seed=1)
    env, pixels = envs.envs[0].unwrapped, []
    for distance in (0, 30):
        position = env.data.qpos.copy()
        position[0] = distance
        env.set_state(position, env.data.qvel)
        picture = env.render().astype(int)
        pixels.append((picture[..., 0] > picture[..., 2] + 40).sum())  # brown, unlike floor and sky
    envs.close()
    assert pixels[0] > 1000
    assert pixels[1] > 0.8 * pixels[0]
