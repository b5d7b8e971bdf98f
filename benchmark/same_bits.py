"""Check that results still hold: does each script compute the same bits as at the commits of its result?

    python benchmark/same_bits.py returns/ppo_cartpole returns/ppo_lunarlander
    PYTHONPATH=benchmark:tests python benchmark/same_bits.py  # all results; needs tests/requirements-forks.txt

Both versions train for three iterations with the flags and the first seed of the result, in each of its environments.
Exits with code 1 if any weight differs. Requirements: pip install -r requirements.txt -r benchmark/requirements.txt
"""

import contextlib
import importlib.util
import io
import itertools
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import learning
import torch
import tyro


def train(script: Path, flags: list[str]) -> dict[str, bytes]:
    """Train for three iterations in a temporary folder. Returns the bits of the weights."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module
    spec.loader.exec_module(module)
    args = tyro.cli(module.Args, args=flags)
    args.total_timesteps, args.eval_episodes = 3 * args.num_envs * args.num_steps, 1
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        with contextlib.redirect_stdout(io.StringIO()):
            module.train(args)
        (path,) = Path(folder).glob("runs/*/checkpoint.pt")
        return {name: x.numpy().tobytes() for name, x in torch.load(path, weights_only=True)["agent"].items()}


def main(names: tyro.conf.Positional[tuple[str, ...]] = ()) -> None:
    """Compare the scripts of these results, or of all."""
    different = 0
    for path in [learning.RESULTS / f"{name}.md" for name in names] or sorted(learning.RESULTS.rglob("*.md")):
        found = dict.fromkeys(re.findall(r"(\w+\.py) of commit (\w+)", path.read_text()))
        command = re.search(r"`python benchmark/learning.py ((?!.*--runs).*)`", path.read_text())
        if command is None:
            continue
        words = shlex.split(command[1])
        split = words.index("--") if "--" in words else len(words)
        args, flags = tyro.cli(learning.Args, args=words[:split]), words[split + 1 :]
        for (script, commit), env_id in itertools.product(found, args.env_ids):
            if not Path(learning.ROOT, script).is_file():  # such as sb3.py, a peer
                continue
            show = ["git", "show", f"{commit}:{script}"]
            old_source = subprocess.run(show, cwd=learning.ROOT, capture_output=True, check=True).stdout
            with tempfile.TemporaryDirectory() as folder:
                old_script = Path(folder, script)
                old_script.write_bytes(old_source)
                run_flags = ["--env-id", env_id, "--seed", str(args.seeds[0]), *flags]
                with ProcessPoolExecutor(1, max_tasks_per_child=1) as pool:  # each in a process of its own
                    old, new = pool.map(train, (old_script, learning.ROOT / script), (run_flags, run_flags))
            different += old != new
            print(f"{path.stem}: {env_id}, {commit}: {'same bits' if old == new else 'DIFFERENT'}", flush=True)
    sys.exit(different > 0)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
