"""Each ablation removes the detail of its name, learning.py resumes, same_bits.py tells equal weights from others."""

import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import ROOT, curves, load, load_module, train, wait_until

sys.path.append(str(ROOT / "benchmark"))
import ablations
import learning
import same_bits

import ppo


class Spikes(gym.Env):
    """Random observations and rewards, a few of them a thousand times as large as the others."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    steps = 0

    def __init__(self, continuous):
        self.action_space = gym.spaces.Box(-1, 1, (2,)) if continuous else gym.spaces.Discrete(2)

    def observe(self):
        size = self.np_random.choice([1, 1000], p=[0.995, 0.005])
        return (size * self.np_random.normal(size=3)).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        reward = 1000.0 if self.steps == 120 else self.np_random.normal()
        return self.observe(), reward, False, False, {}


gym.register("Spikes-v0", Spikes, max_episode_steps=20)


DETAILS = {  # the field of Args, or the name in measure(), that a variant changes, and its value then
    "advantages_not_normalized": ("norm_adv", False),
    "entropy_0.01": ("ent_coef", 0.01),
    "lambda_1": ("gae_lambda", 1.0),
    "no_annealing": ("anneal_lr", False),
    "no_gradient_clipping": ("max_grad_norm", 1e9),
    "no_ratio_clipping": ("clip_coef", 1e9),
    "one_epoch": ("update_epochs", 1),
    "value_clipping": ("clip_vloss", True),
    "adam_epsilon_1e-8": ("epsilon", 1e-8),
    "default_initialization": ("biases are zero", False),
    "shared_network": ("networks are separate", False),
    "time_limit_as_termination": ("terminations", 12),  # 128 steps of 2 environments, episodes of 20 steps
    "initial_std_1": ("initial deviation", 1.0),
    "observations_not_clipped": ("normalized", [1.0, 499.0]),
    "observations_not_normalized": ("normalized", [4.0, 1000.0]),
    "rewards_not_clipped": ("rewards", None),
    "rewards_not_scaled": ("rewards", None),
}


def measure(module, checkpoint: dict, rollouts: list) -> dict:
    """The flags and the details of a run; `rollouts` are the arguments of compute_gae in each iteration."""
    flags = {name: value for name, value in checkpoint["args"].items() if name != "exp_name"}
    agent = module.Agent(module.make_envs(module.Args(**flags), 1))
    found = {
        "epsilon": checkpoint["optimizer"]["param_groups"][0]["eps"],
        "biases are zero": not any(x.any() for name, x in agent.named_parameters() if name.endswith("bias")),
        "networks are separate": agent.actor[0] is not agent.critic[0],
        "terminations": sum(int(rollout[3].sum()) for rollout in rollouts),
        "rewards": rollouts[-1][0].tolist(),  # those of Spikes are the same for all actions
    }
    if hasattr(agent, "log_std"):
        agent.observation_statistics.mean[:] = agent.observation_statistics.std[:] = 2
        normalized = agent.normalize(torch.tensor([4.0, 1000, 0]))[:2].tolist()
        found |= {"initial deviation": agent.log_std.exp()[0].item(), "normalized": normalized}
    return flags | found


@pytest.mark.parametrize("question", ["details", "screen"])
@pytest.mark.parametrize("script", sorted({script for script, _ in ablations.SUITES.values()}))
def test_variants(script, question, tmp_path):
    """Each trains to other weights than the default. Without a detail, that of its name alone differs."""
    variants = ablations.make_variants(script, question, tmp_path / "scripts")
    assert len(variants) >= 6
    weights, measured = {}, {}
    for name, (path, flags) in variants.items():
        module = load_module(path.stem, path)
        rollouts, compute_gae = [], module.compute_gae
        module.compute_gae = lambda *x, seen=rollouts, original=compute_gae: seen.append(x) or original(*x)
        changes = vars(ppo.tyro.cli(module.Args, args=flags))
        changes |= {"env_id": "Spikes-v0", "env_kwargs": (f"continuous={script != 'ppo'}",), "exp_name": name}
        changes |= {"num_envs": 2, "num_steps": 64, "num_minibatches": 2, "total_timesteps": 256, "eval_episodes": 0}
        if question == "screen":
            changes["learning_rate"] = 0.003  # large enough for ratios to be clipped
        checkpoint = load(train(module, **changes))
        weights[name] = torch.cat([x.flatten() for x in checkpoint["agent"].values()])
        if question == "details":
            measured[name] = measure(module, checkpoint, rollouts)
    assert [name for name in weights if torch.equal(weights[name], weights["default"])] == ["default"]
    if question == "screen":
        return
    default = measured.pop("default")
    for name, found in measured.items():
        detail, value = DETAILS[name]
        assert [x for x in found if found[x] != default[x]] == [detail], name
        assert value is None or found[detail] == value, name
    if script == "ppo_continuous_action":
        names = ("default", "rewards_not_clipped", "rewards_not_scaled")
        both, scaled, clipped = (np.array((measured | {"default": default})[name]["rewards"]) for name in names)
        assert np.array_equal(scaled.clip(-10, 10), both) and abs(scaled).max() > 10 == abs(clipped).max()
        ratios = (clipped / scaled)[abs(clipped) < 10]
        assert ratios.min() > 1 and ratios == pytest.approx(ratios[0]), "all are scaled by one number"


@pytest.mark.parametrize("diff", sorted(ROOT.glob("benchmark/ablations/*/*/*.diff")), ids=lambda diff: diff.stem)
def test_diffs_are_those_of_the_present_scripts(diff):
    command = ["patch", "--dry-run", "-F0", ROOT / f"{diff.parent.name}.py", diff]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0 and "offset" not in said.stdout, said.stdout


def test_learning_continues_after_an_interruption(monkeypatch):
    """The interrupted run is resumed, its curve has no gap and no step twice."""
    monkeypatch.setattr(learning, "ROOT", Path.cwd())
    monkeypatch.setattr(learning, "RESULTS", Path("results").absolute())
    own = ["--script", str(ROOT / "ppo.py"), "--seeds", "3", "--record"]
    flags = ["--num-envs", "4", "--num-steps", "128", "--num-minibatches", "4", "--update-epochs", "1"]
    flags += ["--total-timesteps", "40960", "--eval-episodes", "1"]
    (job,) = learning.make_jobs(learning.Args(ROOT / "ppo.py", seeds=(3,)), flags)
    process = learning.start(job, {**os.environ, "OMP_NUM_THREADS": "1"})
    (checkpoint,) = wait_until(lambda: list(job.folder.glob("runs/*/checkpoint.pt")), "a checkpoint is saved")
    process.terminate()
    assert process.wait() == 128 + 15 and not job.finished.exists()
    monkeypatch.setattr(sys, "argv", ["learning.py", *own, "--", *flags])
    with pytest.raises(SystemExit) as end:
        learning.main()
    assert end.value.code == 0
    first, second = re.findall(r"runs/\S+: steps ([\d,]+) to", (job.folder / "output.txt").read_text())
    assert first == "0" != second
    assert job.finished.is_file() and list(job.folder.glob("runs/*/checkpoint.pt")) == [checkpoint]
    run = learning.read_run("CartPole-v1", 3, job.folder)
    steps = [step for step, _ in curves(checkpoint.parent)["losses/entropy"]]
    assert steps == list(range(512, 40961, 512)) and run.steps == 40960 and run.eval_return > 0
    assert "CartPole-v1,3,40960," in Path("results/learning.csv").read_text()


def test_published_numbers_are_those_at_the_same_number_of_steps():
    assert list(learning.published("CartPole-v1", 501_760)) == ["CleanRL", "openai/baselines"]
    assert list(learning.published("ALE/Pong-v5", 10_000_000)) == list(
        learning.published("PongNoFrameskip-v4", 9_999_360)
    )
    assert learning.published("LunarLander-v3", 2_000_000) == learning.published("mine:Own-v0", 100) == {}
    assert learning.published("Taxi-v4", 100) == {"optimum": (7.93, None)}


def test_steps_to_a_mean_of_100_episodes_and_cells():
    episodes = np.array([60, 30, 20, 5])
    run = ablations.learning.Run("", 1, np.arange(1, 5) * 10, np.array([0.0, 475, 500, 500]), episodes, 50, 0, 0, None)
    assert ablations.steps_to(run, 0) == 30  # the first 90 episodes are too few
    assert ablations.steps_to(run, 242.5) == 30  # 50 episodes at 0, 30 at 475, 20 at 500
    assert ablations.steps_to(run, 245) == 40  # 45 episodes at 0, 30 at 475, 25 at 500: 267.5
    assert ablations.steps_to(run, 300) == 50  # never reached: the last step
    values = {"default": [0.0, 1, 2, 3], "a": [0.0, 1, 2, 3], "b": [100.0, 101, 102, 104], "c": [1.0, 1, 2, 2]}
    cells = ablations.compare(values)
    assert cells["default"] == "1.5 ± 1.3" and cells["a"] == "1.5 ± 1.3 (+0.0, p 1)"
    p_value = float(cells["b"].rpartition(" p ")[2].rstrip(")"))
    assert p_value == pytest.approx(
        3 * ablations.ttest_ind(values["default"], values["b"], equal_var=False).pvalue, rel=0.05
    )


def test_same_bits():
    flags = ["--num-envs", "2", "--num-steps", "32"]
    first, same, other = [same_bits.train(ROOT / "ppo.py", [*flags, *more]) for more in ([], [], ["--gamma", "0.98"])]
    assert first == same and first != other and first.keys() == other.keys()
