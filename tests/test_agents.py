"""The agents in agents/ are what their table says: made by its command, and as good."""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
import tyro
from helpers import ROOT, load

ROW = r"^\| \[`([\w-]+)`\]\(\1\) \| `python (\w+)\.py ?([^`]*)` \| (\S+) ± (\S+) \|$"
ROWS = re.findall(ROW, (ROOT / "agents" / "README.md").read_text(), re.MULTILINE)
EPISODES, RECORDED = 5, 100  # of this evaluation, and of the table's


def test_every_agent_has_a_row_and_every_named_one_exists():
    agents = {path.parent.name for path in (ROOT / "agents").glob("*/checkpoint.pt")}
    assert {row[0] for row in ROWS} == agents
    pages = "".join((ROOT / page).read_text() for page in ("README.md", "agents/README.md"))
    assert set(re.findall(r"agents/([\w-]+)(?![\w.-])", pages)) <= agents


@pytest.mark.parametrize(("name", "script", "flags", "mean", "std"), ROWS, ids=[row[0] for row in ROWS])
def test_agent(name, script, flags, mean, std, command_line):
    """The flags of the checkpoint are those of the command; the return is within three standard errors."""
    shutil.copytree(ROOT / "agents" / name, name)
    script = importlib.import_module(script)
    saved = script.Args(**load(Path(name))["args"])  # a flag that is newer than the checkpoint has its default
    assert saved == tyro.cli(script.Args, args=shlex.split(flags))
    done = command_line("--evaluate", name, "--eval-episodes", EPISODES, script=script)
    found = float(re.search(r"return (\S+) \+-", done.out)[1])
    error = float(std) * (1 / EPISODES + 1 / RECORDED) ** 0.5
    assert abs(found - float(mean)) <= 3 * error + 0.01
