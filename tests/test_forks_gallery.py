"""Every diff of docs/forks.md applies to the script as it is, and the fork trains, resumes and evaluates.

Forks that need tests/requirements-forks.txt, and sections 13 and higher, run with `pytest -m forks`.
"""

import importlib
import math
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.toy_text.taxi import TaxiEnv
from gymnasium.spaces import Box, Dict
from helpers import ROOT, curves, load, load_module, run, same_weights, the_run, train
from torch.distributions import Categorical, Normal, TanhTransform, TransformedDistribution

import ppo
import ppo_vector

TEXT = (ROOT / "docs" / "forks.md").read_text()
PARTS = re.split(r"^## \d+\. (.*)\n", TEXT, flags=re.MULTILINE)
SECTIONS = dict(zip(PARTS[1::2], PARTS[2::2], strict=True))
SHORT = ["--total-timesteps", "1", "--num-envs", "2", "--num-steps", "32", "--num-minibatches", "2"]


def blocks(title: str, language: str) -> list[str]:
    """The contents of a section's fenced blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", SECTIONS[title], re.DOTALL | re.MULTILINE)


def fork(title: str):
    """The script of a section, patched in the current folder, as a module."""
    script = re.search(r"^python (ppo\w*)\.py", SECTIONS[title], re.MULTILINE)[1]
    shutil.copy(ROOT / f"{script}.py", ".")
    for diff in blocks(title, "diff"):
        command = ["git", "apply", "--verbose", "-"]
        said = subprocess.run(command, input=diff, capture_output=True, text=True, check=True).stderr
        assert "Applied" in said and "offset" not in said, said
        assert 1 <= len(re.findall(r"^\+(?!\+\+ )", diff, re.MULTILINE)) <= 40
    return load_module(f"fork_{script}", Path(f"{script}.py"))


def marks(title: str):
    number = [*SECTIONS].index(title) + 1
    return pytest.mark.forks if number >= 13 or "requirements-forks.txt" in SECTIONS[title] else ()


@pytest.mark.parametrize("title", filter(marks, SECTIONS))
def test_diffs_apply(title):
    """Of the sections that only `-m forks` runs."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, ".")
    for diff in blocks(title, "diff"):
        done = subprocess.run(["git", "apply", "--verbose", "-"], input=diff, capture_output=True, text=True)
        assert done.returncode == 0 and "offset" not in done.stderr, done.stderr


@pytest.mark.parametrize("title", [pytest.param(title, marks=marks(title)) for title in SECTIONS])
def test_fork(title, command_line, monkeypatch):
    """Each command, shortened to one iteration; then one more by --resume, and the agent of the run."""
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.setenv("WANDB_MODE", "offline")
    module = fork(title)
    (commands,) = blocks(title, "bash")
    for command in commands.replace("\\\n", " ").splitlines():
        words = shlex.split(command)
        if words[1] == "export_onnx.py":
            done = run(sys.executable, words[1], the_run())
            assert done.code == 0 and "differ by at most" in done.out, done
            continue
        if "--evaluate" in words:  # a checkpoint that a short run does not have
            assert words[-1] == "runs/RUN/best"  # see test_best_checkpoint
            continue
        if words[1] != "ppo_vector.py":
            env_id = words[words.index("--env-id") + 1]
            gym.make(env_id).close()  # imports its module
            monkeypatch.setattr(gym.spec(env_id.rpartition(":")[2]), "max_episode_steps", 40)
        script = module if words[1] == f"{module.__name__[5:]}.py" else __import__(words[1][:-3])
        done = command_line(*words[2:], *SHORT, "--eval-episodes", "1", script=script)
        assert done.code == 0 and "evaluation at step 64" in done.out, done
        path = max(Path("runs").iterdir(), key=lambda path: path.stat().st_mtime)
        done = command_line("--resume", path, "--total-timesteps", "65", script=script)
        assert done.code == 0 and "steps 64 to 128" in done.out and "evaluation at step 128" in done.out, done
        assert all(math.isfinite(value) for curve in curves(path).values() for _, value in curve)
        script.load_agent(path)
    if title.startswith("Weights"):
        files = list(path.glob("wandb/offline-run-*/*.wandb"))
        assert len(files) == 2  # before and after resuming
        assert all(b"eval/episodic_return" in file.read_bytes() for file in files)


def test_network():
    """The actor is wider and has ReLU; the critic is as before."""
    module = fork("Another network")
    agent = module.Agent(module.make_envs(module.Args(), 1))
    assert [tuple(p.shape) for p in agent.actor.parameters()] == [(256, 4), (256,), (2, 256), (2,)]
    assert isinstance(agent.actor[1], torch.nn.ReLU) and agent.critic[0].out_features == 64


def test_reward_wrapper():
    """CartPole's returns are a tenth of the lengths of episodes."""
    scalars = curves(train(fork("A reward wrapper"), num_envs=4, num_steps=64, num_minibatches=4, total_timesteps=1024))
    lengths, returns = scalars["charts/episodic_length"], scalars["charts/episodic_return"]
    assert len(returns) == 4
    assert [value for _, value in returns] == pytest.approx([0.1 * value for _, value in lengths])


def test_auxiliary_loss():
    """The head has its own learning rate, and its loss falls."""
    module = fork("An auxiliary loss")
    path = train(module, num_steps=32, learning_rate=1e-3, total_timesteps=1280, num_envs=4, num_minibatches=4)
    rates = [group["lr"] for group in load(path)["optimizer"]["param_groups"]]
    assert rates == pytest.approx([1e-4, 3e-4])  # annealed to the tenth of ten iterations
    losses = [value for _, value in curves(path)["losses/dynamics_loss"]]
    assert losses[-1] < 0.5 * losses[0]


class Switches(gym.Env):
    """An action of two components, neither of which starts at 0; the best is (7, -1)."""

    observation_space = gym.spaces.Box(0, 1, (2,))
    action_space = gym.spaces.MultiDiscrete([3, 2], start=[5, -1])

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action))
        return np.zeros(2, np.float32), float(action[0] == 7) + float(action[1] == -1), True, False, {}


def test_multidiscrete():
    """`start` is added, the components are sampled independently, and the best values are found."""
    gym.register("Switches-v0", Switches)
    module = fork("MultiDiscrete actions")
    flags = {"num_steps": 64, "learning_rate": 1e-2, "num_envs": 4, "num_minibatches": 4}
    path = train(module, env_id="Switches-v0", total_timesteps=5120, **flags)
    assert curves(path)["eval/episodic_return"][0][1] == 2
    agent = module.Agent(module.make_envs(module.Args(env_id="Switches-v0"), 1))
    agent.actor[-1].bias.data = torch.tensor([0.0, 1, 2, 0, 1])
    x = torch.zeros(20_000, 2)
    assert agent.act(x[:1], greedy=True).tolist() == [[2, 1]]
    actions = agent.act(x)
    heads = [Categorical(logits=torch.tensor(logits)) for logits in ([0.0, 1, 2], [0.0, 1])]
    frequencies = torch.histogramdd(actions.float(), [3, 2], [-0.5, 2.5, -0.5, 1.5]).hist / 20_000
    assert torch.allclose(frequencies, torch.outer(heads[0].probs, heads[1].probs), atol=0.02)
    logprobs, entropies, _ = agent.evaluate_actions({"observations": x, "actions": actions})
    torch.testing.assert_close(logprobs, heads[0].log_prob(actions[:, 0]) + heads[1].log_prob(actions[:, 1]))
    torch.testing.assert_close(entropies[0], heads[0].entropy() + heads[1].entropy())


@pytest.mark.parametrize("async_envs", [False, True])
def test_action_masking(async_envs, monkeypatch):
    """No masked action is taken, in training or evaluation; gradients are finite."""
    step = TaxiEnv.step

    def checked_step(self, action):
        assert self.action_mask(self.s)[action], "a masked action"
        return step(self, action)

    monkeypatch.setattr(TaxiEnv, "step", checked_step)  # also in the workers, which are forked
    monkeypatch.setattr(gym.spec("Taxi-v4"), "max_episode_steps", 7)
    module = fork("Action masking")
    flags = {"num_steps": 64, "num_envs": 4, "num_minibatches": 4, "ent_coef": 0.1, "eval_episodes": 3}
    path = train(module, env_id="Taxi-v4", total_timesteps=1024, async_envs=async_envs, **flags)
    assert all(math.isfinite(value) for _, value in curves(path)["losses/grad_norm"])
    agent = module.load_agent(path)
    masks = torch.rand(9, 6) < 0.5
    masks[:, 0] = True
    x = torch.cat([torch.eye(500)[:9], masks], -1)
    actions = torch.stack([agent.act(x) for _ in range(2000)])
    counts = torch.nn.functional.one_hot(actions, 6).sum(0)
    assert torch.equal(counts > 0, masks)
    policy = Categorical(probs=agent.actor(x).exp() * masks)
    torch.testing.assert_close(counts / 2000, policy.probs, atol=0.06, rtol=0)
    assert torch.equal(agent.act(x, greedy=True), policy.probs.argmax(-1))
    logprobs, entropies, _ = agent.evaluate_actions({"observations": x, "actions": actions[0]})
    torch.testing.assert_close(logprobs, policy.log_prob(actions[0]))
    torch.testing.assert_close(entropies, policy.entropy(), atol=1e-5, rtol=1e-5)
    (logprobs + entropies).sum().backward()
    assert all(p.grad.isfinite().all() for p in agent.actor.parameters())


@pytest.mark.forks
@pytest.mark.parametrize("actions", ["half-bounded", "matrix", "asymmetric"])
def test_onnx(actions):
    """The ranges and shapes of actions are those of the environment, which checks each action."""
    (diff,) = blocks("Export to ONNX", "diff")
    subprocess.run(["git", "apply", "-"], input=diff, text=True, check=True)
    script = importlib.import_module("ppo_continuous_action")
    env_kwargs = ("observations=dict", f"actions={actions}")
    path = train(script, env_id="probe_envs:Spaces-v0", env_kwargs=env_kwargs, num_steps=64, total_timesteps=4096)
    done = run(sys.executable, "export_onnx.py", path)
    assert done.code == 0 and "differ by at most" in done.out, done


@pytest.mark.forks
def test_export_of_ppo_vector():
    """The greedy policy of load_agent() holds the normalization, too."""
    import onnxruntime

    args = ppo_vector.Args("test_vector:make_episodes", env_kwargs=("box=True",), num_envs=6, num_steps=16)
    agent = ppo_vector.load_agent(ppo_vector.train(replace(args, total_timesteps=192, eval_episodes=2)))

    class Policy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.agent = agent

        def forward(self, observations):
            return self.agent.act(observations, greedy=True)

    x = 5 * torch.randn(50, 3)
    torch.onnx.export(Policy().eval(), (x,), "policy.onnx", external_data=False, dynamic_shapes=[{0: "N"}])
    (actions,) = onnxruntime.InferenceSession("policy.onnx").run(None, {"observations": x.numpy()})
    assert agent.statistics["actor"].mean.abs().max() > 0.1
    np.testing.assert_allclose(actions, agent.act(x, greedy=True).detach(), atol=1e-5)


def test_tanh():
    """Log-probabilities and entropies are those of the squashed distribution."""
    module = fork("Actions bounded by tanh")
    envs = module.make_envs(module.Args(env_id="Hopper-v5"), 4)
    agent, x = module.Agent(envs), torch.randn(11).expand(50_000, 11)
    policy = TransformedDistribution(Normal(agent.actor(agent.normalize(x)), agent.log_std.exp()), TanhTransform())
    raw = agent.act(x).detach()
    logprobs, entropies, _ = agent.evaluate_actions({"observations": x, "actions": raw})
    torch.testing.assert_close(logprobs, policy.log_prob(raw.tanh()).sum(-1), atol=1e-3, rtol=1e-3)
    assert entropies.mean().item() == pytest.approx(-logprobs.mean().item(), abs=0.03)
    actions = module.from_units(envs.single_action_space, 100 * raw[:4].numpy())
    assert envs.action_space.contains(actions) and np.abs(actions).max() > 0.99
    space = gym.spaces.Box(np.array([1, -3], np.float32), np.array([5, -2], np.float32))
    np.testing.assert_allclose(
        module.from_units(space, np.array([[-0.5, 0.5]])),
        [[3 - 2 * math.tanh(0.5), -2.5 + 0.5 * math.tanh(0.5)]],
        rtol=1e-6,
    )
    with pytest.raises(module.UsageError):
        module.make_envs(module.Args(env_id="probe_envs:Spaces-v0", env_kwargs=("actions=half-bounded",)), 1)


def test_images():
    """The features of a rollout are those of its images, one by one."""
    module = fork("Images that are not Atari's")
    envs = module.make_envs(module.Args(env_id="CarRacing-v3", env_kwargs=("continuous=False",)), 1)
    agent, x = module.Agent(envs), torch.randint(256, (2, 3, 96, 96, 3), dtype=torch.uint8)
    features = agent.features(x)
    image = x[1, 2].float() / 255
    torch.testing.assert_close(features[1, 2], agent.trunk(image.permute(2, 0, 1).unsqueeze(0))[0])
    batch = {"observations": x, "actions": torch.zeros(2, 3, dtype=torch.int64)}
    torch.testing.assert_close(agent.value(x), agent.evaluate_actions(batch)[2])
    with pytest.raises(module.UsageError):
        module.make_envs(module.Args(), 1)


def test_memory_and_continuous_actions():
    """Log-probabilities and entropies are those of a normal distribution; actions are in the environment's range."""
    module = fork("Continuous actions with memory")
    envs = module.make_envs(module.Args(env_id="Pendulum-v1", observe=(0, 1)), 4)
    agent, x = module.Agent(envs), torch.randn(8, 4, 2)
    batch = {"observations": x, "ended": torch.zeros(8, 4, dtype=torch.bool), "first_state": agent.initial_state(4)}
    state, means = agent.initial_state(4), []
    for t in range(8):
        action, state = agent.act(x[t], state, greedy=True)
        means.append(action)
    policy = Normal(torch.stack(means), 0.5)
    batch["actions"] = policy.sample()
    logprobs, entropies, _ = agent.evaluate_actions(batch)
    torch.testing.assert_close(logprobs, policy.log_prob(batch["actions"]).sum(-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(entropies, policy.entropy().sum(-1))
    assert envs.action_space.contains(module.from_units(envs.single_action_space, 3 * batch["actions"][0].numpy()))


@pytest.mark.forks
def test_tracking(monkeypatch):
    """Off by default, when wandb need not be there; else its values and steps are those of TensorBoard."""
    module = fork("Weights & Biases")
    monkeypatch.setitem(sys.modules, "wandb", None)  # its import fails
    train(module, total_timesteps=512)
    begun, logged, ended = [], [], []
    log = lambda metrics, step: logged.extend((name, step, x) for name, x in metrics.items())  # noqa: E731
    wandb = SimpleNamespace(init=lambda **options: begun.append(options), log=log, finish=lambda: ended.append(1))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    path = train(module, total_timesteps=1024, track=True, wandb_project_name="mine")
    assert (begun[0]["project"], begun[0]["id"], ended) == ("mine", path.name, [1])
    logged = [x for x in logged if x[0] != "charts/SPS"]
    written = [(name, step, value) for name, curve in curves(path).items() for step, value in curve]
    assert sorted(x[:2] for x in logged) == sorted(x[:2] for x in written)
    np.testing.assert_allclose([x[2] for x in sorted(logged)], [x[2] for x in sorted(written)], rtol=1e-6)


@pytest.mark.forks
def test_beta():
    """Samples, log-probabilities and entropies are those of the density; no action is outside its range."""
    module = fork("Actions from a beta distribution")
    envs = module.make_envs(module.Args(env_id="Hopper-v5"), 4)
    agent, x = module.Agent(envs), torch.randn(11).expand(50_000, 11)
    agent.actor[-1].bias.data = torch.tensor([3.0, -2, 0, 1, 2, -3])
    alpha, beta = (1 + agent.actor(agent.normalize(x[:1]))[0].exp().log1p()).double().chunk(2)
    u = agent.act(x)
    logprobs, entropies, _ = agent.evaluate_actions({"observations": x, "actions": u})
    parts = (u.double() + 1) / 2
    densities = (alpha - 1) * parts.log() + (beta - 1) * (1 - parts).log()
    densities += (alpha + beta).lgamma() - alpha.lgamma() - beta.lgamma()
    torch.testing.assert_close(logprobs.double(), densities.sum(-1), atol=1e-3, rtol=1e-3)
    assert entropies.mean().item() == pytest.approx(-logprobs.mean().item(), abs=0.03)
    torch.testing.assert_close(parts.mean(0), alpha / (alpha + beta), atol=0.01, rtol=0)
    greedy = 2 * alpha / (alpha + beta) - 1
    torch.testing.assert_close(agent.act(x[:1], greedy=True)[0].double(), greedy, atol=1e-5, rtol=0)
    for bias in (-200.0, 200.0):  # nearly all actions are at a bound
        agent.actor[-1].bias.data = torch.tensor([bias] * 3 + [-bias] * 3)
        batch = {"observations": x[:100], "actions": agent.act(x[:100])}
        logprobs, entropies, _ = agent.evaluate_actions(batch)
        (logprobs + entropies).sum().backward()
        assert all(p.grad.isfinite().all() for p in agent.actor.parameters())
        assert envs.action_space.contains(module.from_units(envs.single_action_space, batch["actions"][:4].numpy()))
    with pytest.raises(module.UsageError):
        module.make_envs(module.Args(env_id="probe_envs:Spaces-v0", env_kwargs=("actions=half-bounded",)), 1)


@pytest.mark.forks
def test_random_network_distillation(monkeypatch):
    """The intrinsic reward falls where the agent has been often, and not elsewhere; returns are logged without it."""
    module = fork("Random network distillation")
    rewards, compute_gae = [], module.compute_gae
    monkeypatch.setattr(module, "compute_gae", lambda *args: rewards.append(args[0]) or compute_gae(*args))
    flags = {"num_envs": 4, "num_steps": 128, "num_minibatches": 4, "rnd_coef": 0.5}
    path = train(module, total_timesteps=5120, **flags)
    scalars = curves(path)
    assert scalars["charts/episodic_return"] == scalars["charts/episodic_length"]
    for (_, mean), total in zip(scalars["charts/intrinsic_reward"], rewards, strict=True):
        assert (total - 1).mean() == pytest.approx(0.5 * mean, rel=1e-3)  # CartPole's own reward is 1
    assert (rewards[0] - 1).std() == pytest.approx(0.5, rel=1e-3)
    assert scalars["charts/intrinsic_reward"][-1][1] < 0.5 * scalars["charts/intrinsic_reward"][0][1]

    envs = module.make_envs(module.Args(), 1)
    torch.manual_seed(1)  # that of the run
    first, agent = module.Agent(envs), module.load_agent(path)
    first.input_statistics.load_state_dict(agent.input_statistics.state_dict())
    assert torch.equal(agent.target[0].weight, first.target[0].weight)
    often = torch.tensor(np.stack([envs.reset(seed=seed)[0][0].copy() for seed in range(100)]))
    seldom = torch.tensor([[2.4, 0, 0, 0], [0, -3, 0.2, 0], [-2.4, 2, -0.2, 2.0]])
    shares = [(agent.prediction_errors(x) / first.prediction_errors(x)).mean().item() for x in (often, seldom)]
    assert shares[0] < 0.05 and shares[1] > 4 * shares[0], shares


class Chart(gym.Env):
    """An oblong image with one channel, and a vector that stands before it."""

    observation_space = Dict(vector=Box(-1, 1, (3,)), image=Box(0, 255, (12, 20, 1), np.uint8))
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}


@pytest.mark.forks
def test_image_beside_vector(monkeypatch):
    """The networks get the image and the vector of the Dict, whichever is first; the best return is 10."""
    monkeypatch.syspath_prepend(Path.cwd())
    module = fork("Images beside vectors")
    gym.register("Chart-v0", Chart)
    envs = module.make_envs(module.Args(env_id="Chart-v0"), 1)
    agent, samples = module.Agent(envs), [envs.envs[0].space.sample() for _ in range(6)]
    rows = torch.tensor(np.stack([envs.envs[0].vector(sample) for sample in samples]))
    features = agent.features(rows.reshape(2, 3, -1)).flatten(0, 1)
    for row, sample in zip(features, samples, strict=True):
        image = torch.tensor(sample["image"]).permute(2, 0, 1).unsqueeze(0) / 255
        torch.testing.assert_close(row[:64], agent.trunk(image)[0])
        assert row[64:].tolist() == sample["vector"].tolist()
    batch = {"observations": rows, "actions": torch.zeros(6, dtype=torch.int64)}
    torch.testing.assert_close(agent.value(rows), agent.evaluate_actions(batch)[2])

    env, total, ended = gym.make("squares:Squares-v0"), 0, False
    observation, _ = env.reset(seed=1)
    while not ended:
        assert env.observation_space.contains(observation)
        right_half = observation["image"][:, 8:].any()
        observation, reward, ended, _, _ = env.step(int(right_half == (observation["vector"][0] == 1)))
        total += reward
    assert total == 10


@pytest.mark.forks
def test_hybrid_actions(monkeypatch):
    """Choice and number are independent: log-probabilities and entropies add up; the best return is 10."""
    monkeypatch.syspath_prepend(Path.cwd())
    module = fork("Hybrid actions")
    space = gym.spaces.Tuple([gym.spaces.Discrete(3, start=5), Box(np.array([0, -2], np.float32), 2)])
    envs = SimpleNamespace(single_action_space=space, single_observation_space=Box(-1, 1, (4,)))
    agent, x = module.Agent(envs), torch.randn(4).expand(20_000, 4)
    agent.actor[-1].bias.data = torch.tensor([0.0, 1, 2, -0.3, 0.3])
    outputs = agent.actor(agent.normalize(x[:1]))[0]
    choice, number = Categorical(logits=outputs[:3]), Normal(outputs[3:], 0.5)
    actions = agent.act(x).detach()
    torch.testing.assert_close(actions[:, 0].long().bincount() / 20_000, choice.probs, atol=0.02, rtol=0)
    torch.testing.assert_close(actions[:, 1:].mean(0), outputs[3:], atol=0.02, rtol=0)
    logprobs, entropies, _ = agent.evaluate_actions({"observations": x, "actions": actions})
    torch.testing.assert_close(logprobs, choice.log_prob(actions[:, 0]) + number.log_prob(actions[:, 1:]).sum(-1))
    torch.testing.assert_close(entropies[0], choice.entropy() + number.entropy().sum())
    assert agent.act(x[:1], greedy=True)[0].tolist() == [2, *outputs[3:].tolist()]
    choices, numbers = module.from_units(space, np.array([[2, 0.5, 0.5], [0, -1, 3]]))
    assert choices.tolist() == [7, 5] and numbers.tolist() == [[1.5, 1], [0, 2]]
    assert all(space.contains(action) for action in zip(choices, numbers, strict=True))
    with pytest.raises(module.UsageError):
        module.make_envs(module.Args(env_id="Hopper-v5"), 1)

    env, total, ended = gym.make("golf:Golf-v0"), 0, False
    (distance,), _ = env.reset(seed=1)
    while not ended:
        club = int(distance > 1)
        (distance,), reward, ended, _, _ = env.step((club, np.array([distance - club])))
        total += reward
    assert total == pytest.approx(10, abs=1e-5)


@pytest.mark.forks
def test_schedules(monkeypatch):
    """The coefficients fall linearly, the same if resumed; as tensors; without final values all is as in ppo.py."""
    module = fork("Schedules of the entropy bonus and the clip range")
    used, ppo_loss = [], module.ppo_loss

    def recorded_loss(agent, args, batch):
        used.append((batch["clip_coef"], batch["ent_coef"]))
        return ppo_loss(agent, args, batch)

    constant = {"ent_coef": 0.02, "clip_coef": 0.3, "clip_vloss": True, "total_timesteps": 1024}
    ours, theirs = (
        load(train(script, **flags))
        for script, flags in [
            (module, {"num_envs": 4, "num_steps": 128, "num_minibatches": 4, "update_epochs": 4, **constant}),
            (ppo, constant),
        ]
    )
    for name, weights in ours["agent"].items():
        torch.testing.assert_close(weights, theirs["agent"][name], atol=1e-5, rtol=1e-4)

    monkeypatch.setattr(module, "ppo_loss", recorded_loss)
    flags = {"num_envs": 2, "num_steps": 32, "num_minibatches": 1, "update_epochs": 1}
    flags |= {"clip_coef": 0.3, "final_clip_coef": 0.1, "ent_coef": 0.04, "final_ent_coef": 0.0}
    train(module, total_timesteps=256, **flags)
    whole = list(used)
    expected = torch.tensor([[0.3, 0.04], [0.25, 0.03], [0.2, 0.02], [0.15, 0.01]])
    torch.testing.assert_close(torch.tensor(whole), expected)
    assert all(isinstance(x, torch.Tensor) for pair in whole for x in pair)
    path = train(module, total_timesteps=128, **flags)
    used.clear()
    saved = module.load_checkpoint(path)["args"]
    module.train(replace(saved, resume=str(path), total_timesteps=256))
    assert used == whole[2:]
    assert [x for _, x in curves(path)["charts/ent_coef"]][2:] == pytest.approx([0.02, 0.01])


@pytest.mark.forks
def test_best_checkpoint(command_line):
    """It has the weights that made the largest mean, that mean, and the step; training stops; resuming keeps it."""
    module = fork("The best checkpoint, and when to stop")
    flags = {"env_id": "probe_envs:Ten-v0", "num_envs": 4, "num_steps": 250, "num_minibatches": 4}
    flags |= {"update_epochs": 2, "anneal_lr": False, "eval_episodes": 0}  # 100 episodes in an iteration
    path = train(module, stop_return=8.0, total_timesteps=50_000, **flags)
    steps, returns = zip(*curves(path)["charts/episodic_return"], strict=True)
    best, last = load(path / "best"), load(path)
    assert max(returns[:-1]) < 8 <= returns[-1] and last["global_step"] == steps[-1]
    assert best["mean_return"] == pytest.approx(returns[-1]) and best["global_step"] == steps[-2]
    until = load(train(module, total_timesteps=best["global_step"], **flags))
    assert same_weights(best, until) and not same_weights(best, last)
    module.load_agent(path / "best")
    done = command_line("--evaluate", path / "best", "--eval-episodes", "1", script=module)
    assert f"evaluation at step {best['global_step']:,}" in done.out, done

    torch.save(best | {"mean_return": 9.9}, path / "best" / "checkpoint.pt")
    args = replace(module.load_checkpoint(path)["args"], resume=str(path), stop_return=math.inf)
    module.train(replace(args, total_timesteps=steps[-1] + 2000))
    assert load(path / "best")["mean_return"] == 9.9
    module.train(replace(args, total_timesteps=steps[-1] + 20_000))
    returns = [value for _, value in curves(path)["charts/episodic_return"]]
    assert load(path / "best")["mean_return"] == pytest.approx(max(returns)) and max(returns) > 9.9


@pytest.mark.forks
def test_torch_environment(monkeypatch):
    """Observations, rewards and ends are those of Gymnasium's Pendulum-v1."""
    monkeypatch.syspath_prepend(Path.cwd())
    fork("An environment in torch")
    envs = importlib.import_module("pendulums").Pendulums(num_envs=3, device="cpu", seed=1)
    observations, _ = envs.reset(seed=1)
    theirs = [gym.make("Pendulum-v1") for _ in range(3)]
    for env in theirs:
        env.reset()
    for t in range(200):
        for env, state in zip(theirs, envs.states, strict=True):  # the same again before each step
            env.unwrapped.state = state.double().numpy()
        actions = torch.rand(3, 1) * 4 - 2
        observations, rewards, terminations, truncations, info = envs.step(actions)
        for i, env in enumerate(theirs):
            last, reward, _, truncated, _ = env.step(actions[i].numpy())
            np.testing.assert_allclose(info["final_obs"][i], last, atol=1e-4)
            assert rewards[i] == pytest.approx(reward, abs=1e-3)
            assert truncations[i] == truncated == (t == 199) and not terminations[i]
    assert not torch.allclose(observations, info["final_obs"])
    first, _ = envs.reset(seed=2)
    again, _ = envs.reset(seed=2)
    assert torch.equal(first, again) and observations.abs().max() <= 1
    assert not envs.step(actions)[3].any()
