"""Common changes to a copy of ppo.py, as a user would make them by hand; more are in test_forks_gallery.py."""

import pytest
import torch
from helpers import SMALL, curves, fork, load, next_second, train

import ppo

TINY = {**SMALL, "num_steps": 32, "learning_rate": 1e-3, "total_timesteps": 384}  # 3 iterations
AGENT = "        self.critic = mlp(num_inputs, 1, std=1.0)\n"  # in Agent.__init__
GROUPS = '[{"params": parameters, "initial_lr": args.learning_rate}]'
BATCH = '            batch = {"observations": to_device(observations), "actions": to_device(actions)}\n'
INFO = "reward, terminated, truncated, {}\n"
STEP = "                observation, rewards[t], terminations[t], truncations[t], _ = transition\n"
EPISODES = '            metrics["charts/episodes"] = len(finished_returns)\n'

# The critic learns three times as fast.
TWO_RATES = [
    (
        GROUPS,
        """[
            {"params": agent.actor.parameters(), "initial_lr": args.learning_rate},
            {"params": agent.critic.parameters(), "initial_lr": 3 * args.learning_rate},
        ]""",
    ),
]
# A parameter has no gradient.
UNUSED_PARAMETER = [(AGENT, f"{AGENT}        self.unused = nn.Parameter(torch.ones(3))\n")]
# An entry of info reaches the rollout: here, the distance of the cart from the middle.
INFO_ENTRY = [
    (INFO, INFO.replace("{}", '{"distance": abs(observation[0])}')),
    (STEP, f'{STEP.replace("], _ =", "], infos =")}                distances[t] = infos["distance"]\n'),
    ("    episode_returns = np.zeros(N)", "    distances = np.zeros((T, N))\n    episode_returns = np.zeros(N)"),
    (
        EPISODES,
        f"""{EPISODES}
            metrics["charts/distance"] = distances.mean()
            metrics["charts/distance_observed"] = np.abs(next_observations[..., 0]).mean()
""",
    ),
]
# Ten more for each step.
INTRINSIC_REWARD = [(BATCH, f"            rewards += 10\n{BATCH}")]


def train_and_resume(replacements, compile=False):
    """Train a fork, then resume it for as many iterations. Returns the run, and both checkpoints."""
    torch.compiler.reset()
    module = fork("ppo_fork", *replacements)
    run = train(module, compile=compile, **TINY)
    first = load(run)
    next_second()
    train(module, compile=compile, **{**TINY, "total_timesteps": 768}, resume=str(run))
    return run, first, load(run)


def change(first, last, prefix):
    """The largest change of a weight whose name starts with `prefix`."""
    names = [name for name in first["agent"] if name.startswith(prefix)]
    return max((last["agent"][name] - first["agent"][name]).abs().max().item() for name in names)


@pytest.mark.parametrize("compile", [False, True])
def test_a_second_parameter_group_with_its_own_learning_rate(compile):
    """Both learning rates are annealed, also after resuming."""
    run, first, last = train_and_resume(TWO_RATES, compile)
    for checkpoint, fraction in ((first, 1 / 3), (last, 1 / 6)):
        rates = [float(group["lr"]) for group in checkpoint["optimizer"]["param_groups"]]
        assert rates == pytest.approx([1e-3 * fraction, 3e-3 * fraction])
    assert change(first, last, "critic") > 1.5 * change(first, last, "actor") > 0
    rates = [value for _, value in curves(run)["charts/learning_rate"]]
    assert rates == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3, 5e-4, 1e-3 / 3, 1e-3 / 6])


@pytest.mark.parametrize("async_envs", [False, True])
def test_an_entry_of_info(async_envs):
    run = train(fork("ppo_fork", *INFO_ENTRY), async_envs=async_envs, **TINY)
    distances, observed = curves(run)["charts/distance"], curves(run)["charts/distance_observed"]
    assert len(distances) == 3 and distances[0][1] > 0
    assert [value for _, value in distances] == pytest.approx([value for _, value in observed])


def test_an_intrinsic_reward():
    """The value function learns it, and the returns are logged without it."""
    run, plain = train(fork("ppo_fork", *INTRINSIC_REWARD), **TINY), train(**TINY)
    scalars = curves(run)
    assert scalars["charts/episodic_return"] == scalars["charts/episodic_length"]
    assert scalars["losses/value_loss"][0][1] > 50 * curves(plain)["losses/value_loss"][0][1]


@pytest.mark.parametrize("compile", [False, True])
def test_a_parameter_that_the_loss_does_not_use(compile):
    """It does not change, and the others do."""
    run, first, last = train_and_resume(UNUSED_PARAMETER, compile)
    assert last["agent"]["unused"].tolist() == [1, 1, 1]
    assert len(last["optimizer"]["state"]) == len(last["agent"]) - 1
    assert min(change(first, last, "actor"), change(first, last, "critic")) > 1e-4
    with pytest.raises(ppo.UsageError, match=r"(?s)ppo_fork\.py.*unused"):
        ppo.load_agent(run)  # ppo.py itself has no such parameter
