"""ppo_lstm.py: states in learning and in the rollout, values at the ends of episodes, memory, resuming, evaluation."""

import copy
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.spaces import Box, Discrete
from helpers import assert_refused, curves, fork, load, next_second, same_weights, train
from probe_envs import Numbered

import ppo
import ppo_lstm

T, N, INPUTS = 24, 4, 3
TINY = {"num_envs": 4, "num_steps": 32, "num_minibatches": 2, "update_epochs": 2, "total_timesteps": 256}
NUMBERED = {"env_id": "probe_envs:Numbered-v0", **TINY}  # episodes of 2 to 5 steps


@pytest.fixture
def agent():
    """An agent with 3 inputs and 3 actions, whose outputs depend on observation and state."""
    torch.manual_seed(1)
    envs = SimpleNamespace(single_observation_space=Box(-1, 1, (INPUTS,)), single_action_space=Discrete(3))
    agent = ppo_lstm.Agent(envs)
    with torch.no_grad():
        agent.actor.head.weight.mul_(100)
    agent.observation_statistics.mean[:], agent.observation_statistics.std[:] = 0.5, 0.8
    return agent


def normalized(observations):
    """As the agent above does it."""
    return (observations - 0.5) / 0.8


def step_by_step(network, observations, ended, state):
    """Outputs [T, N, ...] with torch's LSTMCell."""
    cell = torch.nn.LSTMCell(64, 64, dtype=observations.dtype)
    cell.weight_ih, cell.weight_hh = network.lstm.weight_ih_l0, network.lstm.weight_hh_l0
    cell.bias_ih, cell.bias_hh = network.lstm.bias_ih_l0, network.lstm.bias_hh_l0
    outputs, (h, c) = [], state
    for t in range(len(observations)):
        h, c = cell(network.encoder(observations[t]), (h, c))
        outputs.append(network.head(h))
        h, c = (x.where(~ended[t][:, None], 0.0) for x in (h, c))
    return torch.stack(outputs)


@pytest.mark.quick
@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_outputs_and_gradients_agree_with_a_computation_step_by_step(agent, probability):
    """With episodes that end anywhere, and from any state."""
    observations, actions, state = torch.randn(T, N, INPUTS), torch.randint(3, (T, N)), torch.randn(4, N, 64)
    ended = torch.rand(T, N) < probability
    batch = {"observations": observations, "actions": actions, "ended": ended, "first_state": state}
    outputs = agent.evaluate_actions(batch)
    replica = copy.deepcopy(agent).double()
    logits = step_by_step(replica.actor, normalized(observations.double()), ended, state[:2].double())
    policy = torch.distributions.Categorical(logits=logits)
    values = step_by_step(replica.critic, normalized(observations.double()), ended, state[2:].double())[..., 0]
    expected = policy.log_prob(actions), policy.entropy(), values
    for output, x in zip(outputs, expected, strict=True):
        assert output.shape == (T, N)
        torch.testing.assert_close(output.double(), x, rtol=1e-4, atol=1e-5)
    weights = torch.randn(3, T, N)
    (weights * torch.stack(outputs)).sum().backward()
    (weights * torch.stack(expected)).sum().backward()
    for (name, parameter), other in zip(agent.named_parameters(), replica.parameters(), strict=True):
        assert other.grad.any()
        torch.testing.assert_close(parameter.grad.double(), other.grad, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.quick
def test_initial_weights(agent):
    """Detail 32: the LSTM's weights are orthogonal with gain 1 and its biases zero."""
    for lstm in (agent.actor.lstm, agent.critic.lstm):
        for weight in (lstm.weight_ih_l0, lstm.weight_hh_l0):
            torch.testing.assert_close(weight.T @ weight, torch.eye(64), rtol=0, atol=1e-5)
        assert not lstm.bias_ih_l0.any()
        assert not lstm.bias_hh_l0.any()


@pytest.mark.quick
def test_actions_follow_the_states_and_are_sampled(agent):
    """Greedy ones are the most probable of a computation step by step; frequencies are within 5 standard errors."""
    observations, state, draws = torch.randn(T, N, INPUTS), torch.randn(4, N, 64), 20_000
    with torch.no_grad():
        agent.actor.head.weight.mul_(10)
        ended = torch.zeros(T, N, dtype=torch.bool)
        logits = step_by_step(agent.actor, normalized(observations), ended, state[:2])
        samples, _ = agent.act(observations[0].repeat(draws, 1), state.repeat(1, draws, 1))
        without_memory, _ = agent.act(observations.flatten(0, 1), agent.initial_state(T * N), greedy=True)
        for t in range(T):
            actions, state = agent.act(observations[t], state, greedy=True)
            assert torch.equal(actions, logits[t].argmax(-1))
    assert (without_memory.view(T, N) != logits.argmax(-1)).float().mean() > 0.1
    expected = logits[0].softmax(-1)
    shares = torch.nn.functional.one_hot(samples.view(draws, N), 3).double().mean(0)
    assert ((shares - expected).abs() < 5 * (expected * (1 - expected) / draws).sqrt()).all()
    assert (expected - 1 / 3).abs().max() > 0.1, "uniform actions would pass"


@pytest.mark.quick
def test_values_follow_whole_episodes(monkeypatch):
    """Those of all steps and of all next observations, in two iterations, against episodes played one by one.

    Episodes go on from one iteration to the next, and end by termination, truncation or both.
    """
    recorded, compute_gae = [], ppo_lstm.compute_gae
    monkeypatch.setattr(ppo_lstm, "compute_gae", lambda *x: recorded.append(x[1:3]) or compute_gae(*x))
    monkeypatch.setattr(ppo_lstm, "make_seed", lambda *parts: 0)  # the environments are called 0 to 3
    monkeypatch.setattr(ppo_lstm.RunningStatistics, "update", lambda self, x: None)  # nor does the normalization change
    agent = ppo_lstm.load_agent(train(ppo_lstm, **NUMBERED, learning_rate=1e-30))  # the weights stay as they are
    expected = np.zeros((2, 64, 4))
    for n in range(4):
        state = agent.initial_state(1)
        for t, (observation, next_observation, _, terminated, truncated) in enumerate(Numbered.simulate(n, 64)):
            with torch.no_grad():
                expected[0, t, n] = agent.value(torch.Tensor([observation]), state)
                _, state = agent.act(torch.Tensor([observation]), state)
                expected[1, t, n] = agent.value(torch.Tensor([next_observation]), state)
            if terminated or truncated:
                state = agent.initial_state(1)
    actual = [np.concatenate(x) for x in zip(*recorded, strict=True)]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.01


@pytest.mark.quick
def test_observations_are_normalized_by_those_of_the_earlier_iterations(monkeypatch):
    """A rollout enters the statistics after learning; a checkpoint holds them."""
    recorded, update = [], ppo_lstm.RunningStatistics.update
    monkeypatch.setattr(
        ppo_lstm.RunningStatistics, "update", lambda self, x: recorded.append(x.clone()) or update(self, x)
    )
    run = train(ppo_lstm, **NUMBERED)
    statistics = ppo_lstm.load_agent(run).observation_statistics
    data = torch.cat(recorded).double()
    assert data.shape == (256, 3)
    torch.testing.assert_close(statistics.mean.double(), data.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        statistics.std.double(), data.std(0, correction=0).clamp(min=1e-12), rtol=1e-4, atol=1e-5
    )


@pytest.mark.quick
def test_minibatches():
    """Whole environments in time order, each once in an epoch; in the first update of an iteration the ratio is 1."""
    minibatches, metrics = [], []

    def observe(update):
        def observed(minibatch):
            minibatches.append(minibatch["observations"].int())
            metrics.append({name: value.item() for name, value in update(minibatch).items()})
            return {name: torch.tensor(value) for name, value in metrics[-1].items()}

        return observed

    line = f"    # {'-' * 72} set-up: the rollout"
    module = fork("observed", (line, f"    update = observe(update)\n{line}"), script="ppo_lstm")
    module.observe, module.make_seed = observe, lambda *parts: 0  # the environments are called 0 to 3
    module.train(module.Args(**NUMBERED, eval_episodes=1, learning_rate=0.01))
    orders = []
    for epoch in range(4):
        columns = torch.cat(minibatches[2 * epoch : 2 * epoch + 2], 1)  # [num_steps, num_envs, 3]
        orders.append(columns[0, :, 0].tolist())
        assert sorted(orders[-1]) == [0, 1, 2, 3]
        for n, name in enumerate(orders[-1]):
            rows = Numbered.simulate(name, 64)[32 * (epoch // 2) :][:32]
            assert columns[:, n].tolist() == [list(row[0]) for row in rows]
    assert len(set(map(tuple, orders))) > 1
    for i in (0, 4):
        assert metrics[i]["losses/approx_kl"] == pytest.approx(0, abs=1e-6)
        assert metrics[i]["losses/clipfrac"] == 0
    assert max(x["losses/approx_kl"] for x in metrics) > 1e-5


def test_memory():
    """The first observation names the action that is rewarded at the end: with memory it is learned, without not."""
    flags = {"env_id": "probe_envs:Recall-v0", "env_kwargs": ("length=5",), "num_envs": 16, "num_steps": 32}
    flags |= {"learning_rate": 0.003, "total_timesteps": 20_480, "eval_episodes": 20, "num_minibatches": 4}
    flags["update_epochs"] = 4
    for script, low, high in ((ppo_lstm, 1, 1), (ppo, -0.7, 0.7)):
        ((_, evaluation),) = curves(train(script, **flags))["eval/episodic_return"]
        assert low <= evaluation <= high


def test_the_same_seed_gives_the_same_bits_and_a_resumed_run_goes_on():
    flags = {"num_envs": 4, "num_steps": 32, "num_minibatches": 2, "update_epochs": 2}
    one, other = (train(ppo_lstm, **flags, total_timesteps=512) for _ in range(2))
    assert curves(one) == curves(other)
    assert same_weights(load(one), load(other))
    next_second()
    train(ppo_lstm, **flags, total_timesteps=1024, resume=str(one))
    assert load(one)["global_step"] == 1024
    rates = [value for _, value in curves(one)["charts/learning_rate"]]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4, 5e-4, 3.75e-4, 2.5e-4, 1.25e-4])


def test_evaluation_carries_the_state_within_an_episode_and_resets_it_between_two(monkeypatch):
    """The returns are those of the loaded agent in one episode after the other."""
    run = train(ppo_lstm, observe=(0, 2), total_timesteps=8192, num_envs=8, num_steps=64, update_epochs=4)
    seeds, reset = [], CartPoleEnv.reset

    def recorded_reset(self, *, seed=None, options=None):
        seeds.append(seed)
        return reset(self, seed=seed, options=options)

    with monkeypatch.context() as patch:
        patch.setattr(CartPoleEnv, "reset", recorded_reset)
        returns = ppo_lstm.evaluate(ppo_lstm.Args(observe=(0, 2), eval_episodes=5), run)
    agent, env, expected = ppo_lstm.load_agent(run), gym.make("CartPole-v1"), []
    for seed in seeds:
        observation, _ = env.reset(seed=seed)
        state, ended = agent.initial_state(1), False
        expected.append(0)
        while not ended:
            with torch.no_grad():
                actions, state = agent.act(torch.as_tensor(observation[None, [0, 2]]), state, greedy=True)
            observation, reward, terminated, truncated, _ = env.step(actions.item())
            expected[-1] += reward
            ended = terminated or truncated
    assert returns.tolist() == expected
    assert len(set(seeds)) == 5
    assert len(set(expected)) > 1


@pytest.mark.quick
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_the_last_observation_of_a_terminated_episode_is_not_used(value):
    """The run is the same to the bit as with another one: neither values nor states depend on it."""
    flags = {"env_id": "probe_envs:BadEnd-v0", **TINY}
    one, other = (train(ppo_lstm, **flags, env_kwargs=(f"value={x}",)) for x in (value, 5))
    assert curves(one) == curves(other)
    assert same_weights(load(one), load(other))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--observe", 4), "observe must be between 0 and 3"),
        (("--observe", -1), "observe must be between 0 and 3"),
        (("--num-minibatches", 3), "num_minibatches must divide num_envs"),
    ],
)
def test_wrong_flags_are_refused(command_line, flags, words):
    assert_refused(ppo_lstm, command_line(*flags, script=ppo_lstm), words)
