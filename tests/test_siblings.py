"""The scripts are siblings: what they share is the same to the letter and in the same order."""

import ast
import re
import subprocess

import pytest
from helpers import ROOT

# What a script and the one beside it both have and that differs on purpose: functions, methods, classes without their
# methods, and sections of train().
NETWORKS = {"Agent", "Agent.__init__", "Agent.act", "Agent.value", "Agent.evaluate_actions"}
DATA = {"train: set-up: the rollout", "train: (a) roll out", "train: (b) advantages"}
LEARNING = {"train: set-up: the gradient step", "train: (c) learn"}
SET_UP = "train: set-up: device, environments, agent, optimizer"
DIFFERENT = {
    ("ppo_continuous_action", "ppo"): NETWORKS
    | DATA
    | {"mlp", "make_envs.make_env", "evaluate"}
    | {SET_UP, "train: (c) learn"},
    ("ppo_lstm", "ppo"): NETWORKS | DATA | LEARNING | {"make_envs.make_env", "train", "evaluate", SET_UP},
    ("ppo_atari", "ppo"): NETWORKS | DATA | LEARNING | {"train: (d) log and save"},
    ("ppo_atari_multigpu", "ppo_atari"): LEARNING | {"train", "train.update", "train: (d) log and save", SET_UP},
}
DIFFERENT["ppo_atari", "ppo"] |= {"make_envs", "load_agent", "evaluate", SET_UP, "train: set-up: logging"}
DIFFERENT["ppo_atari_multigpu", "ppo_atari"] |= {
    "train: set-up: the rollout",
    "train: set-up: logging",
    "train: (a) roll out",
    "main",
}
LACKING = {  # what only the second one has
    ("ppo_lstm", "ppo"): {"mlp"},
    ("ppo_atari", "ppo"): {"mlp", "make_envs.make_env", "make_gym_env", "numbers_in"}
    | {f"Environment{method}" for method in ("", ".__init__", ".vector", ".reset", ".step")}
    | {"closing_envs"},
}
PAIRS = list(DIFFERENT)
BANNER = re.compile(r"^ *# -{10,} (.+)$", re.MULTILINE)


def source(script):
    return (ROOT / f"{script}.py").read_text()


def definitions(text, parent=None, prefix=""):
    """The source of each function, without those inside it, of each class, without its methods, and of train()'s parts.

    The order is that of the file. The fields of Args are left out.
    """
    found = {}
    for node in (parent or ast.parse(text)).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        name = prefix + node.name
        inner = definitions(text, node, f"{name}.")
        whole = ast.get_source_segment(text, node)
        for child in node.body:
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                whole = whole.replace(ast.get_source_segment(text, child), "")
        if name == "train":
            whole, *rest = BANNER.split(whole)
            for banner, section in zip(rest[::2], rest[1::2], strict=True):
                title = banner if banner.startswith("set-up") else banner.partition(":")[0]
                found[f"train: {title}"] = section
        if name != "Args":
            found[name] = whole
        found |= inner
    return found


def fields(script):
    """The flags and their types."""
    (args,) = (node for node in ast.parse(source(script)).body if getattr(node, "name", None) == "Args")
    return {node.target.id: ast.unparse(node.annotation) for node in args.body if isinstance(node, ast.AnnAssign)}


@pytest.mark.parametrize(("script", "other"), PAIRS)
def test_shared_definitions_are_the_same_to_the_letter_and_in_the_same_order(script, other):
    ours, theirs = definitions(source(other)), definitions(source(script))
    shared = [name for name in ours if name in theirs]
    assert {name for name in shared if ours[name] != theirs[name]} == DIFFERENT[script, other]
    assert ours.keys() - theirs.keys() == LACKING.get((script, other), set())
    assert [name for name in theirs if name in ours] == shared


@pytest.mark.parametrize("script", ["ppo", *(script for script, _ in PAIRS)])
def test_the_loss_and_the_saving_are_the_same_in_all_scripts(script):
    """To the letter; but for Atari, the gradient step, too. All of it is found where a reader expects it."""
    ours, theirs = definitions(source("ppo")), definitions(source(script))
    same = {"Args.__post_init__", "layer_init", "compute_gae", "ppo_loss", "delayed_signals", "save_checkpoint"}
    same |= {"load_checkpoint", "make_seed"} | (set() if "atari" in script else {"train.update"})
    same |= set() if script == "ppo_atari_multigpu" else {"main"}  # there, the command to resume names torchrun
    assert {name for name in same if ours[name] == theirs[name]} == same


def test_the_scripts_that_normalize_observations_do_it_alike():
    ours, theirs = definitions(source("ppo_continuous_action")), definitions(source("ppo_lstm"))
    same = {"RunningStatistics", "RunningStatistics.__init__", "RunningStatistics.update", "Agent.normalize"}
    assert {name for name in same if ours[name] == theirs[name]} == same


def test_what_the_script_for_simulators_shares_is_the_same_to_the_letter():
    """It has sections and flags in the same order, and functions of its own for all that is a tensor on the device."""
    ours, theirs = definitions(source("ppo")), definitions(source("ppo_vector"))
    same = {"ppo_loss", "train.update", "UsageError", "Stopped", "delayed_signals", "get_device"}
    same |= {"check_finite", "make_seed", "make_run_dir", "save_checkpoint", "load_checkpoint", "main"}
    same |= {"Args.__post_init__"}
    assert {name for name in same if ours[name] == theirs[name]} == same
    assert BANNER.findall(source("ppo")) == BANNER.findall(source("ppo_vector"))
    shared = [name for name in fields("ppo") if name in fields("ppo_vector")]
    assert [name for name in fields("ppo_vector") if name in fields("ppo")] == shared
    assert fields("ppo").keys() - fields("ppo_vector").keys() == {"async_envs"}


@pytest.mark.parametrize(("script", "other"), PAIRS)
def test_sections_and_shared_flags_are_in_the_same_order(script, other):
    """The flags have the same types, too."""
    assert BANNER.findall(source(script)) == BANNER.findall(source(other))
    assert len(BANNER.findall(source(script))) >= 7
    ours, theirs = fields(other), fields(script)
    shared = [(name, kind) for name, kind in ours.items() if name in theirs]
    assert [(name, kind) for name, kind in theirs.items() if name in ours] == shared
    lacking = {"ppo_lstm": {"compile"}, "ppo_atari": {"async_envs"}}
    assert ours.keys() - theirs.keys() == lacking.get(script, set())


@pytest.mark.parametrize(
    ("script", "other", "most"),
    [
        ("ppo_continuous_action", "ppo", 178),
        ("ppo_lstm", "ppo", 218),
        ("ppo_atari", "ppo", 501),
        ("ppo_atari_multigpu", "ppo_atari", 93),
    ],
)
def test_siblings_are_small_diffs(script, other, most):
    files = [ROOT / f"{name}.py" for name in (other, script)]
    diff = subprocess.run(["diff", *files], capture_output=True, text=True)
    changed = re.findall(r"^[<>]", diff.stdout, re.MULTILINE)
    assert 0 < len(changed) <= most
