"""The inline metadata (PEP 723) that `uv run` reads, the same versions as in requirements.txt."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT, load, the_run
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SCRIPTS = sorted(path.name for path in ROOT.glob("ppo*.py"))
BLOCK = re.compile(r"^# /// script\n((?:#(?: .*)?\n)+)# ///$", re.MULTILINE)
UV = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
SOURCES = {"UV_FIND_LINKS", "UV_INDEX", "UV_EXTRA_INDEX_URL"}  # where a CPU build may come from


def metadata(script):
    """The only block of a script, read as TOML."""
    (block,) = BLOCK.findall((ROOT / script).read_text())
    return tomllib.loads(re.sub(r"^# ?", "", block, flags=re.MULTILINE))


def by_name(lines):
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def brought_along(requirement):
    """The packages that one needs with the extras that are asked for, and itself."""
    names = {canonicalize_name(requirement.name)}
    for line in importlib.metadata.requires(requirement.name) or []:
        needed = Requirement(line)
        extras = requirement.extras or {""}
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
            names.add(canonicalize_name(needed.name))
    return names


@pytest.mark.quick
@pytest.mark.parametrize("script", SCRIPTS)
def test_versions_are_those_of_requirements(script):
    """Each dependency has the bounds of requirements.txt; of its extras there may be fewer."""
    text = re.sub(r"#.*", "", (ROOT / "requirements.txt").read_text())
    required, found = by_name(text.split()), metadata(script)
    assert found.keys() == {"requires-python", "dependencies"}
    assert found["requires-python"] == ">=3.11"
    assert len(by_name(found["dependencies"])) == len(found["dependencies"]) > 0
    for name, requirement in by_name(found["dependencies"]).items():
        assert requirement.specifier == required[name].specifier, name
        assert requirement.extras <= required[name].extras, name


@pytest.mark.quick
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_import_is_a_dependency(script):
    """Or comes with an extra of one, as ale-py does with gymnasium[atari]."""
    modules = set()
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        modules |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        modules |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    third_party = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names
    assert {"torch", "numpy", "gymnasium", "tyro"} <= third_party
    covered = set().union(*map(brought_along, by_name(metadata(script)["dependencies"]).values()))
    distributions = importlib.metadata.packages_distributions()
    for module in third_party:
        assert {canonicalize_name(name) for name in distributions[module]} & covered, module


@pytest.mark.skipif(not UV, reason="uv is not installed")
@pytest.mark.skipif(
    not SOURCES & os.environ.keys(),
    reason=f"uv would fetch torch with CUDA; one of {sorted(SOURCES)} gives a CPU build",
)
def test_a_copy_of_the_script_runs_by_uv_alone():
    """In an empty folder, in an environment that uv makes from the metadata, which takes minutes the first time."""
    shutil.copy(ROOT / "ppo.py", "ppo.py")
    env = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")}
    command = [UV, "run", "ppo.py", "--total-timesteps", "2048", "--eval-episodes", "1"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr
    assert "evaluation at step 2,048: return " in result.stdout
    assert load(the_run())["global_step"] == 2048
