"""Common changes to a copy of ppo.py: each trains, and is resumed once.

The changes are those that a user would make by hand.
"""

import pytest
import torch
from helpers import SMALL, curves, fork, load, next_second, train

import ppo

TINY = {**SMALL, "num_steps": 32, "learning_rate": 1e-3, "total_timesteps": 384}  # 3 iterations
AGENT = "        self.critic = nn.Sequential(\n"  # in Agent.__init__
OPTIMIZER = "    optimizer = torch.optim.Adam(parameters, lr=learning_rate,"
LOSS = "        loss.backward()\n"
METRICS = '                "losses/entropy": entropy.detach(),\n'

# The critic learns three times as fast.
TWO_RATES = [
    (
        OPTIMIZER,
        "    critic = {'params': agent.critic.parameters(), 'lr': 3 * learning_rate}\n"
        "    groups = [{'params': agent.actor.parameters()}, critic]\n"
        "    optimizer = torch.optim.Adam(groups, lr=learning_rate,",
    ),
]
# The critic's features also have to predict the observation.
AUXILIARY_HEAD = [
    (AGENT, f"        self.auxiliary = layer_init(nn.Linear(64, num_inputs))\n{AGENT}"),
    (
        LOSS,
        "        predictions = agent.auxiliary(agent.critic[:-1](observations))\n"
        "        auxiliary_loss = (predictions - observations).square().mean()\n"
        f"        loss = loss + 0.1 * auxiliary_loss\n{LOSS}",
    ),
    (METRICS, f'{METRICS}                "losses/auxiliary_loss": auxiliary_loss.detach(),\n'),
]
# A parameter has no gradient.
UNUSED_PARAMETER = [(AGENT, f"        self.unused = nn.Parameter(torch.ones(3))\n{AGENT}")]


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


def test_an_auxiliary_head_with_its_own_loss():
    run, first, last = train_and_resume(AUXILIARY_HEAD)
    losses = [value for _, value in curves(run)["losses/auxiliary_loss"]]
    assert len(losses) == 6
    assert losses[3] < losses[0], "learning goes on where it stopped"
    assert change(first, last, "auxiliary") > 1e-4
    assert change(first, last, "actor") > 1e-4


@pytest.mark.parametrize("compile", [False, True])
def test_a_parameter_that_the_loss_does_not_use(compile):
    """It does not change, and the others do."""
    run, first, last = train_and_resume(UNUSED_PARAMETER, compile)
    assert last["agent"]["unused"].tolist() == [1, 1, 1]
    assert len(last["optimizer"]["state"]) == len(last["agent"]) - 1
    assert min(change(first, last, "actor"), change(first, last, "critic")) > 1e-4
    with pytest.raises(ppo.UsageError):
        ppo.load_agent(run)  # ppo.py itself has no such parameter
