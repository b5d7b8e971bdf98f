"""ppo_vector.py: vector environments whose episodes end in each way, in NumPy and torch."""

import contextlib
import io
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from gymnasium.vector import AutoresetMode
from helpers import as_flags, assert_refused, curves, load, next_second, same_weights
from torch.distributions import Categorical, Normal
from torch.utils._python_dispatch import TorchDispatchMode

import ppo_vector
from ppo_vector import Args, Simulator

KINDS = ["next step", "same step", "same step, no last observation", "disabled"]
SMALL = {"num_envs": 6, "num_steps": 16, "num_minibatches": 4, "update_epochs": 2, "total_timesteps": 192}
SMALL |= {"eval_episodes": 4, "env_id": "test_vector:make_episodes"}  # 2 iterations of 96 steps


class Episodes:
    """Copy i plays episodes of 1 + (i + e) % 4 steps, e = 0, 1, ...; those with an even e are terminated.

    The observation after k steps is (e, k, i), the reward of a step 10 * e + k. The last observation of a terminated
    episode is NaN if `nan`, and so is the reward of a step that begins one.
    """

    def __init__(self, num_envs, kind="next step", use_torch=True, groups=False, box=False, nan=False):
        self.kind, self.use_torch, self.groups, self.nan = kind, use_torch, groups, nan
        modes = {"next step": AutoresetMode.NEXT_STEP, "disabled": AutoresetMode.DISABLED}
        self.metadata = {"autoreset_mode": modes.get(kind, AutoresetMode.SAME_STEP)}
        self.single_action_space = Box(-2, 6, (2,), np.float32) if box else Discrete(3)
        self.copies = torch.arange(num_envs)
        self.closed, self.actions, self.buffer = False, [], None

    def out(self, x):
        return x if self.use_torch else x.numpy()

    def observe(self):
        return torch.stack([self.episodes, self.steps, self.copies], 1).float()

    def returned(self, x):
        if self.groups == "tuple":
            return self.out(x[:, :2].clone()), self.out(x[:, 2:].clone())
        if self.groups:
            return {"policy": self.out(x[:, :2].clone()), "critic": self.out(x.clone())}
        return self.out(x)

    def reset(self, *, seed=None, options=None):
        if options is not None:  # of the mode "disabled"
            mask = torch.as_tensor(options["reset_mask"])
            self.episodes += mask
            self.steps[mask] = 0
        else:
            self.episodes = torch.zeros_like(self.copies)
            self.steps, self.over = self.episodes.clone(), torch.zeros_like(self.copies).bool()
        return self.returned(self.observe()), {}

    def step(self, actions):
        self.actions.append(actions)
        begin = self.over if self.kind == "next step" else torch.zeros_like(self.over)
        self.episodes += begin
        self.steps = torch.where(begin, 0, self.steps + 1)
        rewards = torch.where(begin, -1000.0, 10.0 * self.episodes + self.steps)
        self.over = (self.steps > (self.copies + self.episodes) % 4) & ~begin
        terminations = self.over & (self.episodes % 2 == 0)
        truncations = self.over & ~terminations
        last = self.observe()
        if self.nan:
            last[terminations] = rewards[begin] = float("nan")
        info = {}
        if self.kind.startswith("same step"):
            if "no" not in self.kind:
                info = {"final_obs": self.returned(last)}
            self.episodes += self.over
            self.steps = torch.where(self.over, 0, self.steps)
            last = self.observe()
        if self.buffer is None or self.groups:
            self.buffer = self.returned(last)
        else:  # the same memory in each step, as in some simulators
            self.buffer[:] = self.returned(last)
        return (self.buffer, *map(self.out, (rewards, terminations, truncations)), info)

    def close(self):
        self.closed = True


def make_episodes(num_envs, device, seed, **kwargs):
    return Episodes(num_envs, **{name: value for name, value in kwargs.items() if name != "render_mode"})


def samples_of(num_envs, kind, stand_in=False):
    """What copy i experiences, in order: observation, next observation, reward, terminated, truncated."""
    samples = []
    for i in range(num_envs):
        samples.append([])
        for e in range(40):
            length = 1 + (i + e) % 4
            for k in range(length):
                over = k + 1 == length
                after = (e, k if stand_in and over else k + 1, i)
                samples[i].append(((e, k, i), after, 10 * e + k + 1, over and e % 2 == 0, over and e % 2 == 1))
    return samples


@pytest.mark.parametrize("groups", [False, True, "tuple"])
@pytest.mark.parametrize("use_torch", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_what_happened(kind, use_torch, groups):
    """In all kinds of ends, the rows that are samples are the same, in the same order; none is lost or made up."""
    envs = Episodes(5, kind, use_torch, groups)
    simulator, rows = Simulator(envs, 5, torch.device("cpu")), [[] for _ in range(5)]
    observations = simulator.reset(seed=1)
    assert [x.shape[1] for x in observations.values()] == ([2, 3] if groups is True else [3, 3])
    for _ in range(30):
        before = {name: x.clone() for name, x in observations.items()}
        step = simulator.step(torch.zeros(5, dtype=torch.int64))
        observations, after, rewards, terminations, truncations, valid = step
        for i in valid.nonzero().squeeze(1).tolist():
            row = (tuple(x[i].tolist()) for x in (before["critic"], after))
            rows[i].append((*row, rewards[i].item(), terminations[i].item(), truncations[i].item()))
            assert before["actor"][i].tolist() == before["critic"][i, : before["actor"].shape[1]].tolist()
    expected = samples_of(5, kind, stand_in="no" in kind)
    for got, right in zip(rows, expected, strict=True):
        assert len(got) >= 15
        assert got == right[: len(got)]
    assert isinstance(envs.actions[0], torch.Tensor if use_torch else np.ndarray)


@pytest.mark.parametrize("metadata", [{}, {"autoreset_mode": "guess"}, None])
def test_a_simulator_that_names_no_kind_is_refused(metadata):
    envs = Episodes(2)
    envs.metadata = metadata
    with pytest.raises(ppo_vector.UsageError, match=r"NextStep.*SameStep.*Disabled"):
        Simulator(envs, 2, "cpu")


def test_gymnasiums_own_vector_environments():
    """With SameStep, its last observations are an array of objects, None where no episode has ended."""
    modes = {"autoreset_mode": AutoresetMode.SAME_STEP}
    simulator = Simulator(gym.make_vec("CartPole-v1", 4, "sync", vector_kwargs=modes), 4, "cpu")
    simulator.reset(seed=1)
    for _ in range(100):
        observations, after, _, terminations, *_ = simulator.step(torch.ones(4, dtype=torch.int64))
        assert torch.equal(terminations, after[:, 2].abs() > 0.2095)  # 12 degrees
        assert observations["critic"][:, 2].abs().max() < 0.2095


def test_groups_of_observations():
    simulator = Simulator(Episodes(3), 3, "cpu")
    one, two = np.arange(3), np.arange(6).reshape(3, 2)
    assert simulator.groups((one, two))["actor"].tolist() == [[0, 0, 1], [1, 2, 3], [2, 4, 5]]
    groups = simulator.groups({"obs": two, "critic": one})
    assert groups["actor"].tolist() == two.tolist() and groups["critic"].tolist() == [[0], [1], [2]]


def make_faulty(num_envs, device, seed, space=None):
    envs = Episodes(num_envs)
    envs.single_action_space = MultiDiscrete([2, 3])
    return envs if space else envs.no_such_name


def test_faults_of_a_simulator(command_line):
    """An action space that is not supported is refused; an exception keeps its traceback."""
    flags = ("--env-id", "test_vector:make_faulty", "--env-kwargs")
    assert_refused(ppo_vector, command_line(*flags, "space=True", script=ppo_vector), "MultiDiscrete")
    with pytest.raises(AttributeError, match="no_such_name"):
        command_line(*flags, script=ppo_vector)


def test_actions_in_units_of_the_range():
    envs = Episodes(3, box=True)
    simulator = Simulator(envs, 3, "cpu")
    simulator.reset(seed=1)
    simulator.step(torch.tensor([[0.0, 0.5], [-1.0, 1.0], [-3.0, 3.0]]))
    torch.testing.assert_close(envs.actions[0], torch.tensor([[2.0, 4.0], [-2.0, 6.0], [-2.0, 6.0]]))


def test_gae_by_brute_force():
    """Sums over the samples of each episode; rows that are no samples are NaN."""
    rng, gamma, gae_lambda = np.random.default_rng(1), 0.9, 0.7
    T, N = 40, 3
    ended = rng.random((T, N)) < 0.2
    terminations = ended & (rng.random((T, N)) < 0.5)
    rewards, values, next_values = rng.normal(size=(3, T, N))
    valid = np.ones((T, N), bool)
    valid[1:] = ~ended[:-1]
    ended, terminations = ended & valid, terminations & valid
    valid[1:] = ~ended[:-1]
    for x in (rewards, values, next_values):
        x[~valid] = np.nan
    tensors = [torch.tensor(x) for x in (rewards, values, next_values, terminations, ended & ~terminations)]
    advantages = ppo_vector.compute_gae(*tensors, gamma, gae_lambda).numpy()
    for i in range(N):
        for t in np.flatnonzero(valid[:, i]):
            total, k = 0.0, t
            while True:
                bootstrap = 0.0 if terminations[k, i] else next_values[k, i]
                total += (gamma * gae_lambda) ** (k - t) * (rewards[k, i] + gamma * bootstrap - values[k, i])
                if ended[k, i] or k == T - 1:
                    break
                k += 1
            assert advantages[t, i] == pytest.approx(total)


def test_statistics_of_samples_only():
    rng = np.random.default_rng(1)
    data, valid = rng.normal(3, 2, (2, 50, 4)).astype(np.float32), rng.random((2, 50)) < 0.7
    data[~valid] = np.nan
    statistics = ppo_vector.RunningStatistics(4)
    for x, which in zip(data, valid, strict=True):
        statistics.update(torch.tensor(x), torch.tensor(which))
    np.testing.assert_allclose(statistics.mean, data[valid].mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics.std, data[valid].std(0), rtol=1e-5)
    assert statistics.count == valid.sum()


@pytest.mark.parametrize("box", [False, True])
def test_log_probabilities_and_entropies(box):
    simulator = Simulator(Episodes(4, box=box), 4, "cpu")
    observations = simulator.reset(seed=1)
    agent = ppo_vector.Agent(Args(activation="ELU", hidden_sizes=(8, 4)), simulator)
    actions = agent.act(observations["actor"])
    batch = {"observations": observations["actor"], "critic_observations": observations["critic"], "actions": actions}
    logprobs, entropies, values = agent.evaluate_actions(batch)
    outputs = agent.actor(observations["actor"])
    policy = Normal(outputs, agent.log_std.exp()) if box else Categorical(logits=outputs)
    expected, entropy = policy.log_prob(actions), policy.entropy()
    torch.testing.assert_close(logprobs, expected.sum(-1) if box else expected)
    torch.testing.assert_close(entropies, entropy.sum(-1) if box else entropy)
    torch.testing.assert_close(values, agent.critic(observations["critic"]).squeeze(-1))
    assert [type(layer).__name__ for layer in agent.actor] == ["Linear", "ELU", "Linear", "ELU", "Linear"]


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_learned_from_rows_that_are_no_samples(kind, box, command_line):
    """The last observations of terminated episodes are NaN: with the next step, they are in the rollout."""
    kwargs = ("--env-kwargs", f"kind='{kind}'", f"box={box}", "nan=True")
    result = command_line(*as_flags(**SMALL), *kwargs, script=ppo_vector)
    assert result.code == 0, result.err
    (run_dir,) = Path("runs").iterdir()
    assert all(x.isfinite().all() for x in load(run_dir)["agent"].values())
    curve = curves(run_dir)
    episodes = sum(value for _, value in curve["charts/episodes"])
    returns = [[0.0] for _ in range(6)]
    rows = [0] * 6
    expected = []
    for i, samples in enumerate(samples_of(6, kind)):
        for _, _, reward, terminated, truncated in samples:
            rows[i] += 1
            returns[i][-1] += reward
            if rows[i] > 32:
                break
            if terminated or truncated:
                expected.append(returns[i][-1])
                returns[i].append(0.0)
                rows[i] += kind == "next step"
    logged = sum(
        a * b for (_, a), (_, b) in zip(curve["charts/episodic_return"], curve["charts/episodes"], strict=True)
    )
    assert episodes == len(expected)
    assert logged == pytest.approx(sum(expected))
    greedy = [sum(range(1, 2 + i % 4)) for i in range(4)]  # the first episode of each copy
    assert curve["eval/episodic_return"] == [(192, np.mean(greedy))]


class Synchronizations(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers that are read, shapes that depend on data, copies."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        boolean = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        self.count += boolean or name in ("_local_scalar_dense", "nonzero", "masked_select")
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("box", [False, True])
def test_the_host_reads_a_constant_number_of_times(kind, box, monkeypatch):
    """However many steps and updates an iteration has."""
    counts = []
    for num_steps, update_epochs in [(8, 1), (8, 6), (32, 1)]:
        sizes = {"num_steps": num_steps, "update_epochs": update_epochs, "num_envs": 4, "num_minibatches": 2}
        kwargs = {"env_kwargs": (f"kind='{kind}'", f"box={box}"), "eval_episodes": 0}
        args = Args("test_vector:make_episodes", **sizes, **kwargs, total_timesteps=2 * 4 * num_steps)
        with Synchronizations() as mode, contextlib.redirect_stdout(io.StringIO()):
            ppo_vector.train(args)
        counts.append(mode.count)
    assert 5 < counts[0] < 25
    assert len(set(counts)) == 1


# --------------------------------------------------------------------------------------- runs


@pytest.fixture
def cartpole():
    return Args(num_envs=16, num_steps=16, total_timesteps=512, eval_episodes=8)


def test_seeds_and_resumption(cartpole, command_line):
    """The same seed gives the same bits; a run is resumed and extended; its agent can be loaded."""
    one, same = (ppo_vector.train(cartpole) for _ in range(2))
    assert curves(one) == curves(same)
    assert same_weights(load(one), load(same))
    next_second()
    assert command_line("--resume", one, "--total-timesteps", 1024, script=ppo_vector).code == 0
    assert load(one)["global_step"] == 1024
    assert not same_weights(load(one), load(same))
    steps = [step for step, _ in curves(one)["charts/learning_rate"]]
    assert steps == [256, 512, 768, 1024]
    weights = ppo_vector.load_agent(one).state_dict()
    assert all(torch.equal(x, load(one)["agent"][name]) for name, x in weights.items())


@pytest.mark.quick
def test_cartpole_is_solved():
    """In 250,000 steps, a few seconds."""
    run_dir = ppo_vector.train(Args(total_timesteps=250_000))
    curve = curves(run_dir)
    assert np.mean([value for _, value in curve["charts/episodic_return"][-3:]]) > 450
    assert curve["eval/episodic_return"][-1][1] > 475


def test_the_learning_rate_follows_the_kl_divergence(cartpole):
    rates = {}
    for desired_kl in (1e-9, 10.0):
        cartpole.desired_kl = desired_kl
        curve = curves(ppo_vector.train(cartpole))
        rates[desired_kl] = [value for _, value in curve["charts/learning_rate"]]
    assert rates[1e-9][-1] == pytest.approx(1e-5)
    assert rates[10.0][-1] == pytest.approx(1e-2)


def test_a_film_of_an_episode(cartpole, command_line):
    run_dir = ppo_vector.train(cartpole)
    assert command_line("--evaluate", run_dir, "--capture-video", script=ppo_vector).code == 0
    (path,) = run_dir.glob("videos/*.mp4")
    assert path.stat().st_size > 2000


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("Acrobot-v1", "ppo.py"),
        ("NoSuchEnv-v0", "NoSuchEnv"),
        ("ALE/Pong-v5", "ppo_atari.py"),
        ("envpool/CartPole-v1", "envpool"),
        ("mjlab/Mjlab-Cartpole-Balance", "mjlab"),
        ("test_vector:no_such_function", "no_such_function"),
        ("test_vector:make_faulty --env-kwargs render_mode=human", "unexpected keyword argument 'render_mode'"),
    ],
)
def test_wrong_ids_are_refused_in_one_line(env_id, words, command_line, monkeypatch):
    for name in ("envpool", "mjlab", "mjlab.tasks.registry"):
        monkeypatch.setitem(sys.modules, name, None)
    code, _, err = command_line("--env-id", *env_id.split(), script=ppo_vector)
    assert code == 2
    assert words in err
    assert len(err.splitlines()) == 1
    assert not list(Path("runs").glob("*"))
