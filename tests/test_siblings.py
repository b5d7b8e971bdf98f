"""The scripts are siblings: what they share is the same to the letter and in the same order."""

import ast
import re
import subprocess

import pytest
from helpers import ROOT

# Functions, methods and sections of train() that both scripts have and that differ on purpose.
AGENT = {"Agent.__init__", "Agent.act", "Agent.value", "Agent.forward"}
TRAIN = {"train: set-up", "train: (a) roll out", "train: (b) advantages"}
DIFFERENT = {
    "ppo_continuous_action.py": AGENT | TRAIN | {"make_envs.make_env", "Agent.sample_noise", "evaluate"},
    "ppo_atari.py": AGENT | TRAIN | {"make_envs", "load_agent", "evaluate", "main"},
}
DIFFERENT["ppo_lstm.py"] = (
    AGENT | TRAIN | {"Args.__post_init__", "make_envs.make_env", "train.update", "train: (c) learn"}
)
DIFFERENT["ppo_lstm.py"] |= {"load_agent", "evaluate", "main"}
DIFFERENT["ppo_atari.py"] |= {"train.update", "train: (c) learn", "train: (d) log and save"}
LACKING = {"ppo_atari.py": {"make_envs.make_env"}}  # in ppo.py only
BANNER = re.compile(r"^ *# -{10,} (.+)$", re.MULTILINE)
SIBLINGS = sorted(DIFFERENT)


def source(script):
    return (ROOT / script).read_text()


def definitions(text, parent=None, prefix=""):
    """The source of every function, without those inside it, of the methods of every class, and of train()'s sections.

    The order is that of the file.
    """
    found = {}
    for node in (parent or ast.parse(text)).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        inner = definitions(text, node, f"{prefix}{node.name}.")
        whole = ast.get_source_segment(text, node)
        for child in node.body:
            if isinstance(child, ast.FunctionDef):
                whole = whole.replace(ast.get_source_segment(text, child), "")
        if node.name == "train":
            names = ["set-up", *(banner.partition(":")[0] for banner in BANNER.findall(whole))]
            parts = BANNER.split(whole)[::2]
            found |= {f"train: {name}": part for name, part in zip(names, parts, strict=True)}
        elif isinstance(node, ast.FunctionDef) or not inner:
            found[prefix + node.name] = whole
        found |= inner
    return found


@pytest.mark.parametrize("script", SIBLINGS)
def test_shared_definitions_are_the_same_to_the_letter_and_in_the_same_order(script):
    ours, theirs = definitions(source("ppo.py")), definitions(source(script))
    shared = [name for name in ours if name in theirs]
    assert {"UsageError", "Args.__post_init__", "compute_gae", "save_checkpoint", "train.request_stop"} < set(shared)
    assert {name for name in shared if ours[name] != theirs[name]} == DIFFERENT[script]
    assert ours.keys() - theirs.keys() == LACKING.get(script, set())
    assert [name for name in theirs if name in ours] == shared


@pytest.mark.parametrize("script", SIBLINGS)
def test_sections_and_shared_flags_are_in_the_same_order(script):
    """The flags have the same types, too."""

    def fields(text):
        (args,) = (node for node in ast.parse(text).body if getattr(node, "name", None) == "Args")
        return {node.target.id: ast.unparse(node.annotation) for node in args.body if isinstance(node, ast.AnnAssign)}

    assert BANNER.findall(source(script)) == BANNER.findall(source("ppo.py"))
    assert len(BANNER.findall(source(script))) == 4
    ours, theirs = fields(source("ppo.py")), fields(source(script))
    shared = [(name, kind) for name, kind in ours.items() if name in theirs]
    assert [(name, kind) for name, kind in theirs.items() if name in ours] == shared
    assert ours.keys() - theirs.keys() <= {"async_envs", "compile"}


@pytest.mark.parametrize(("script", "most"), [("ppo_continuous_action.py", 120), ("ppo_lstm.py", 190)])
def test_siblings_are_small_diffs(script, most):
    diff = subprocess.run(["diff", ROOT / "ppo.py", ROOT / script], capture_output=True, text=True)
    changed = re.findall(r"^[<>]", diff.stdout, re.MULTILINE)
    assert 0 < len(changed) <= most
