"""The scripts are siblings: what they share is the same to the letter, and in the same order."""

import ast
import difflib
import re

import pytest
from helpers import ROOT

# Defined in more than one script, and different: this is what the siblings are there for.
DIFFERENT = {
    "ppo_atari.py": {"Args", "make_envs", "Agent", "load_checkpoint", "evaluate", "train"},
    "ppo_continuous_action.py": {"Args", "make_envs", "Agent", "evaluate", "train"},
}
SAME_METHODS = {
    "ppo_atari.py": {
        "Args": {"batch_size", "minibatch_size", "num_iterations", "__post_init__"},
        "Agent": {"sample_noise"},
    },
    "ppo_continuous_action.py": {"Args": {"batch_size", "minibatch_size", "num_iterations", "__post_init__"}},
}
SAME_IN_TRAIN = {"checkpoint", "loss_gradient", "request_stop"}

# The lines of ppo.py's sections that a sibling writes in its own way; all others it has, too, in the same order.
OWN_LINES = {
    "ppo_atari.py": {
        "load_checkpoint": {
            'free = {"resume", "evaluate", "device", "compile", "async_envs", "capture_video", "eval_episodes"}',
        },
        "(c) learn": {
            "for minibatch in minibatches(args, batch):",
            "all_losses.append(losses)",
            "log_ratios.append(log_ratio)",
            "if args.target_kl is not None and approx_kl(log_ratio) > args.target_kl:",
        },
        "(d) log and save": {
            "except BaseException:",
            'for process in getattr(envs, "processes", ()):  '
            "# of --async-envs: one may be stuck, and close() would wait",
            "process.kill()",
            "raise",
            "with suppress(EOFError, OSError):",
            "last = iteration + 1 == args.num_iterations or stop_signal is not None",
            "if stop_signal is not None:",
            "raise SystemExit(128 + stop_signal)",
        },
    },
    "ppo_continuous_action.py": {"load_checkpoint": set(), "(c) learn": set(), "(d) log and save": set()},
}
SIBLINGS = sorted(OWN_LINES)


def source(script):
    return (ROOT / script).read_text()


def definitions(text, inside=None):
    """The source of every function and class at the top level, or directly inside the class or function `inside`."""
    nodes = ast.parse(text).body
    if inside:
        (nodes,) = (node.body for node in nodes if getattr(node, "name", None) == inside)
    named = (node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef))
    found = {}
    for node in named:
        decorators = "".join(ast.unparse(decorator) + "\n" for decorator in node.decorator_list)
        found[node.name] = decorators + ast.get_source_segment(text, node)
    return found


def sections(script):
    """The lines, stripped, of train()'s sections (c) and (d), comments included, and of load_checkpoint."""
    text = definitions(source(script))
    learn, log = re.search(r"# -+ \(c\) learn(.*?)# -+ \(d\) log and save(.*)", text["train"], re.DOTALL).groups()
    parts = {"(c) learn": learn, "(d) log and save": log, "load_checkpoint": text["load_checkpoint"]}
    return {name: [line.strip() for line in part.splitlines() if line.strip()] for name, part in parts.items()}


@pytest.mark.parametrize("script", SIBLINGS)
def test_shared_definitions_are_the_same_to_the_letter_and_in_the_same_order(script):
    ours, theirs = definitions(source("ppo.py")), definitions(source(script))
    assert {name for name in ours if name in theirs and ours[name] != theirs[name]} == DIFFERENT[script]
    lacking = {"Film"} if script == "ppo_atari.py" else set()  # it has film() instead
    assert set(ours) - set(theirs) == lacking, "ppo.py has nothing else that a sibling lacks"
    assert [name for name in theirs if name in ours] == [name for name in ours if name in theirs]
    for container, names in [*SAME_METHODS[script].items(), ("train", SAME_IN_TRAIN)]:
        own, other = definitions(source("ppo.py"), container), definitions(source(script), container)
        assert {name: own[name] for name in names} == {name: other[name] for name in names}


@pytest.mark.parametrize("script", SIBLINGS)
def test_shared_lines_of_the_loop(script):
    """A sibling adds lines to these sections, and writes the listed ones in its own way; it changes nothing else."""
    ours, theirs = sections("ppo.py"), sections(script)
    for name, lines in ours.items():
        own_lines = OWN_LINES[script][name]
        assert own_lines <= set(lines), "the list is up to date"
        position = 0
        for line in lines:
            if line in own_lines:
                continue
            assert line in theirs[name][position:], f"{script}, section {name}, lacks: {line}"
            position = theirs[name].index(line, position) + 1


@pytest.mark.parametrize("script", SIBLINGS)
def test_the_same_sections_in_the_same_order(script):
    """The banners, and the flags that both have with the same types; the help of most is the same, too."""

    def banners(text):
        return re.findall(r"^ *# -{10,} (.+)$", text, re.MULTILINE)

    def fields(text):
        (args,) = (node for node in ast.parse(text).body if getattr(node, "name", None) == "Args")
        types = {node.target.id: ast.unparse(node.annotation) for node in args.body if isinstance(node, ast.AnnAssign)}
        helps = re.findall(r'^    (\w+): .+\n    """(.+)"""$', text, re.MULTILINE)
        return types, dict(helps)

    assert banners(source("ppo.py")) == banners(source(script))
    (own_types, own_helps), (types, helps) = fields(source("ppo.py")), fields(source(script))
    shared = [name for name in own_types if name in types]
    assert [name for name in types if name in own_types] == shared
    assert all(own_types[name] == types[name] for name in shared)
    assert own_types.keys() - types.keys() <= {"async_envs"}, "flags that only ppo.py has"
    reworded = {name for name in shared if own_helps[name] != helps[name]}
    own = {"env_id", "env_kwargs", "num_envs", "device", "compile", "capture_video", "eval_episodes", "evaluate"}
    assert reworded <= own


# The lines of ppo.py outside its docstring, its Args and its Agent that ppo_continuous_action.py lacks.
REPLACED = """
            if isinstance(env.action_space, Box):
                raise UsageError(f"{args.env_id} has continuous actions: use ppo_continuous_action.py")
            if not isinstance(env.action_space, Discrete):
                raise UsageError(f"{args.env_id} has actions {env.action_space}; supported: Discrete")
        observations, rewards, terminations, truncations, _ = envs.step(actions + envs.single_action_space.start)
    actions = np.zeros((T, N), np.int64)
    first_action = envs.single_action_space.start
                    observation, reward, terminations[t], truncations[t], _ = envs.step(actions[t] + first_action)
                        episode_returns[ended] = episode_lengths[ended] = 0
                advantages = compute_gae(to_device(rewards), values, next_values, *ends, args.gamma, args.gae_lambda)
"""


def test_the_continuous_sibling_is_a_small_diff():
    """Of all that ppo.py does, only these lines are written in another way; new ones are few."""

    def body(script):
        text = source(script)
        found = definitions(text)
        for name in ("Args", "Agent"):
            text = text.replace(found[name], "")
        return [line.strip() for line in text.partition('"""\n\nimport ')[2].splitlines() if line.strip()]

    diff = list(difflib.ndiff(body("ppo.py"), body("ppo_continuous_action.py")))
    lost = [line[2:] for line in diff if line.startswith("- ")]
    assert lost == [line.strip() for line in REPLACED.splitlines() if line]
    assert len([line for line in diff if line.startswith("+ ")]) < 60
