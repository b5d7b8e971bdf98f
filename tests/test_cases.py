"""Environments of the kinds that people bring, and habits of theirs. Each once failed."""

import numpy as np
import pytest
from helpers import as_flags, curves, load, same_weights, train

import ppo

SHORT = {"num_envs": 3, "num_steps": 32, "num_minibatches": 4, "total_timesteps": 192}  # 2 iterations


def case(name, **env_kwargs):
    """Flags of a short run in an environment of probe_envs."""
    texts = tuple(f"{key}={value}" for key, value in env_kwargs.items())
    return {"env_id": f"probe_envs:{name}-v0", "env_kwargs": texts, **SHORT}


@pytest.mark.parametrize("kind", ["shape", "number", "array", "dict", "type", "keys"])
def test_infos_that_differ_between_copies_and_steps(kind):
    """Vector environments cannot merge them."""
    assert load(train(**case("Info", kind=kind)))["global_step"] == 192


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_the_last_observation_of_a_terminated_episode_is_not_used(value):
    """The run is the one of an environment that returns 0 instead."""
    run_dir, usual = train(**case("BadEnd", value=value)), train(**case("BadEnd", value=0))
    assert curves(run_dir) == curves(usual)
    assert same_weights(load(run_dir), load(usual))


def test_each_copy_has_a_list_of_its_own():
    """The rewards of an episode are 2 + 3 + ... + 11 = 65."""
    curve = curves(train(**case("Prices", prices=[1])))
    assert {value for _, value in curve["charts/episodic_return"] + curve["eval/episodic_return"]} == {65}


def test_environments_that_use_autograd():
    curve = curves(train(**case("Torch")))
    assert {value for _, value in curve["charts/episodic_return"] + curve["eval/episodic_return"]} == {20}


@pytest.mark.filterwarnings("ignore")
def test_boards_rewards_of_one_number_and_a_default_render_mode():
    run_dir = train(**case("Board"))
    assert {value for _, value in curves(run_dir)["charts/episodic_return"]} == {5}
    assert load(run_dir)["agent"]["actor.0.weight"].shape == (64, 32)


@pytest.mark.parametrize(
    ("observations", "part", "async_envs"),
    [
        ("text in dict", "mission, a Text", False),
        ("text in tuple", "observation, a Text", False),
        ("graph in dict", "graph, a Graph", False),
        ("nested", "list, a Sequence", True),
        ("nested whole", "list, a Sequence", False),
    ],
)
def test_a_part_that_cannot_be_flattened_is_left_out_with_one_line(observations, part, async_envs, command_line):
    """For all copies, processes and the evaluation together."""
    ppo.print_once.cache_clear()
    flags = as_flags(**case("Spaces", observations=observations))
    result = command_line(*flags, "--async-envs" if async_envs else "--no-async-envs")
    assert result.code == 0
    lines = [line for line in result.out.splitlines() if "left out" in line]
    assert lines == [f"left out of the observations: {part}"]


# ------------------------------------------------------------------------------- random numbers


@pytest.mark.parametrize(
    ("source", "async_envs"), [("random", False), ("random", True), ("numpy", False), ("state", True)]
)
def test_environments_that_draw_from_global_generators(source, async_envs):
    """Training, evaluation and resumption are the same each time, for a large seed, too."""
    flags = {**case("Global", source=source), "async_envs": async_envs, "seed": 20_240_101, "eval_episodes": 3}
    one, other = train(**flags), train(**flags)
    assert curves(one) == curves(other)
    assert same_weights(load(one), load(other))
    resumed = [train(**flags | {"total_timesteps": 384}, resume=str(run_dir)) for run_dir in (one, other)]
    assert curves(resumed[0]) == curves(resumed[1])
    assert curves(resumed[0])["charts/episodic_return"][-1][0] == 384

    returns = [ppo.evaluate(ppo.load_checkpoint(one)["args"], one) for _ in range(2)]
    assert returns[0].tolist() == returns[1].tolist()
    assert len(set(returns[0])) == 3
    assert curves(one)["eval/episodic_return"][-2][1] == pytest.approx(returns[0].mean())


@pytest.mark.parametrize("source", ["random", "numpy", "state"])
def test_processes_of_async_envs_draw_different_numbers(source):
    goals = []
    for _ in range(2):
        envs = ppo.make_envs(ppo.Args(**{**case("Global", source=source), "async_envs": True}), 6)
        observations, _ = envs.reset(seed=ppo.make_seed("training", 1, 0))
        goals.append(observations[:, 1].tolist())
        envs.close()
    assert goals[0] == goals[1]
    assert len(set(goals[0])) == 6


@pytest.mark.parametrize("seed", [0, -1, 2**31, 20_240_101 * 10**4])
def test_seeds_of_environments_are_small(seed):
    """RandomState takes at most 32 bits."""
    assert load(train(**case("Global", source="state"), seed=seed))["args"]["seed"] == seed


# --------------------------------------------------------------------------------------- habits


def test_numbers_of_numpy_in_args(command_line):
    """They become Python's, so that the checkpoint can be loaded."""
    values = {
        "learning_rate": np.logspace(-4, -2, 5)[0],
        "total_timesteps": np.int64(512),
        "anneal_lr": np.bool_(False),
    }
    values |= {"target_kl": np.float32(0.5), "exp_name": np.str_("numpy")}
    run_dir = train(**values)
    args = ppo.load_checkpoint(run_dir)["args"]
    assert [type(getattr(args, name)) for name in values] == [float, int, bool, float, str]
    assert [getattr(args, name) for name in values] == list(values.values())
    assert command_line("--resume", run_dir, "--total-timesteps", 1024).code == 0


def test_an_error_in_close_is_shown_and_the_run_evaluated_all_the_same(capfd):
    run_dir = train(**case("Endless", close=True, max_episode_steps=10))
    assert curves(run_dir)["eval/episodic_return"] == [(192, 10)]
    err = capfd.readouterr().err
    assert "Traceback" in err
    assert "ZeroDivisionError: close() has a bug" in err
