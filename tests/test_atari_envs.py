"""The Atari environments, on the real games: what they return, what training makes of it, evaluation and film.

The reference is one plain emulator per environment, with the same seed and the same actions. The emulator decides
what happens; that 4 frames make a step, what is seen of them, and when a game ends is written out here once more.
"""

from collections import Counter, deque
from pathlib import Path
from types import SimpleNamespace

import ale_py
import cv2
import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from ale_py.vector_env import AtariVectorEnv
from helpers import curves

import ppo_atari
from ppo_atari import Args, UsageError

GAMES = sorted(env_id for env_id in gym.registry if env_id.startswith("ALE/"))
FOREVER = 10**9  # frames
TINY = {"num_envs": 2, "num_steps": 8, "total_timesteps": 16, "eval_episodes": 1}


class Emulator:
    """One game in an emulator of its own, played and seen as the environments should play and see it."""

    def __init__(self, env_id: str, seed: int, limit: int = FOREVER, sticky: float = 0.0):
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self.ale, self.limit = ale_py.ALEInterface(), limit
        self.ale.setInt("random_seed", int(seed))
        self.ale.setFloat("repeat_action_probability", sticky)
        self.ale.loadROM(ale_py.roms.get_rom_path(gym.spec(env_id).kwargs["game"]))
        self.actions = self.ale.getMinimalActionSet()

    def start(self, frame_number: int):
        """Begin a game and wait for this frame. How many no-ops that takes is ALE's secret; that they are is not."""
        self.ale.reset_game()
        if ale_py.Action.FIRE in self.actions:
            self.ale.act(ale_py.Action.FIRE)
        while self.ale.getEpisodeFrameNumber() < frame_number:
            self.ale.act(ale_py.Action.NOOP)
        assert self.ale.getEpisodeFrameNumber() == frame_number
        self.num_frames, self.seen = 0, self.ale.getScreenGrayscale()
        self.stack = deque([np.zeros((84, 84), np.uint8)] * 3 + [self.small()], maxlen=4)

    def small(self):
        """What was seen last, as small as the agent gets it."""
        return cv2.resize(self.seen, (84, 84), interpolation=cv2.INTER_AREA)

    def step(self, action: int) -> SimpleNamespace:
        """Play up to 4 frames; fewer where the game ends or reaches its limit."""
        self.colours, self.screens = [], []
        reward, lives = 0, self.ale.lives()
        over = at_limit = False
        while len(self.screens) < 4 and not (over or at_limit):
            reward += self.ale.act(self.actions[action])
            self.num_frames += 1
            over, at_limit = self.ale.game_over(), self.num_frames >= self.limit
            self.screens.append(self.ale.getScreenGrayscale())
            self.colours.append(self.ale.getScreenRGB())
        if not (over or at_limit):
            self.seen = np.maximum(*self.screens[2:])
        elif len(self.screens) == 4:
            # A trap: ALE does not look at the very last frame of a game. What it shows in its place is old:
            self.seen = np.maximum(self.screens[2], self.seen)
        self.stack.append(self.small())
        lost, gained = 0 < self.ale.lives() < lives, self.ale.lives() > lives
        return SimpleNamespace(reward=reward, over=over, at_limit=at_limit, lost=lost, gained=gained)


class Recorded(AtariVectorEnv):
    """ALE's environments, which here remember what they were told and what they returned."""

    made: list  # all that were made since the recording began

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.made.append(self)
        self.actions, self.steps = [], []

    def reset(self, *, seed, options=None):
        self.seeds, self.first = seed, super().reset(seed=seed, options=options)
        return self.first

    def step(self, actions):
        self.actions.append(actions.copy())
        self.steps.append(super().step(actions))
        return self.steps[-1]

    def column(self, i):
        """What step() returned as its i-th value, [num_steps, num_envs, ...]."""
        return np.stack([step[i] for step in self.steps])

    def numbers(self):
        """The number of the frame within its game before the first step and after each: [num_steps + 1, num_envs]."""
        return np.stack([infos["episode_frame_number"] for infos in (self.first[1], *(step[4] for step in self.steps))])


def record(monkeypatch):
    """From now on, ppo_atari's environments are recorded in the list that this returns."""
    monkeypatch.setattr(Recorded, "made", [], raising=False)
    monkeypatch.setattr(ppo_atari, "AtariVectorEnv", Recorded)
    return Recorded.made


@pytest.fixture
def recorded(monkeypatch):
    """The environments that the test makes."""
    return record(monkeypatch)


def limited(frames):
    """The argument for games of at most so many frames."""
    return (f"max_num_frames_per_episode={frames}",)


def compare(args, seeds, num_steps, limit=FOREVER, sticky=0.0):
    """Play random actions in the environments and in emulators; all must be the same. Returns what happened."""
    envs, happened = ppo_atari.make_envs(args, len(seeds)), Counter()
    emulators = [Emulator(args.env_id, seed, limit, sticky) for seed in seeds]
    assert [len(emulator.actions) for emulator in emulators] == [envs.single_action_space.n] * len(seeds)
    observations, infos = envs.reset(seed=np.array(seeds))
    for emulator, observation, number in zip(emulators, observations, infos["episode_frame_number"], strict=True):
        emulator.start(number)
        assert np.array_equal(observation, emulator.stack)
    rng = np.random.default_rng(1)
    for _ in range(num_steps):
        actions = rng.integers(envs.single_action_space.n, size=len(seeds))
        observations, rewards, terminations, truncations, infos = envs.step(actions)
        for i, emulator in enumerate(emulators):
            step = emulator.step(actions[i])
            assert rewards[i] == step.reward
            assert terminations[i] == (step.over or step.lost)
            assert truncations[i] == (step.at_limit and not terminations[i])
            if step.over or step.at_limit:
                assert np.array_equal(infos["final_obs"][i], emulator.stack)
                emulator.start(infos["episode_frame_number"][i])
            assert np.array_equal(observations[i], emulator.stack)
            assert infos["episode_frame_number"][i] == emulator.ale.getEpisodeFrameNumber()
            assert infos["lives"][i] == emulator.ale.lives()
            happened.update(name for name, value in vars(step).items() if value)
            happened[f"reward {step.reward}"] += 1
    envs.close()
    return happened


# ------------------------------------------------------------------------- what the games return


@pytest.mark.parametrize(
    ("env_id", "seeds", "num_steps", "what"),
    [
        ("ALE/Breakout-v5", (1, 2), 260, {"over", "lost", "reward 1"}),
        ("ALE/Pong-v5", (4,), 800, {"over", "reward -1"}),
        ("ALE/MsPacman-v5", (1,), 400, {"over", "lost", "reward 10"}),
        # in Atlantis, chance alone gains a life (in MsPacman, it would have to make 10,000 points)
        ("ALE/Atlantis-v5", (2,), 650, {"lost", "gained", "reward 200"}),
    ],
)
def test_everything_is_as_in_the_emulator(env_id, seeds, num_steps, what):
    """To the bit and beyond the end of a game: observations (details 14, 15, 17, 18 and 20), raw rewards, ends.

    A lost life is a termination, but the game and its score go on (16); a life gained is nothing at all.
    """
    happened = compare(Args(env_id), seeds, num_steps)
    assert what <= happened.keys(), happened


@pytest.mark.parametrize("limit", [400, 401, 402, 403])
def test_time_limit(limit):
    """A truncation after exactly so many frames, no-ops not counted; the last step may be a short one."""
    happened = compare(Args("ALE/Pong-v5", env_kwargs=limited(limit)), (1, 2), 230, limit=limit)
    assert happened["at_limit"] == 4
    assert happened["over"] == 0


def test_time_limit_is_half_an_hour():
    """108,000 frames at 60 a second, unless asked otherwise. Without FIRE, Breakout waits for ever for a new ball."""
    envs = ppo_atari.make_envs(Args(env_kwargs=("frameskip=12_000",)), 1)
    envs.reset(seed=np.array([1]))
    steps = [envs.step(np.array([0])) for _ in range(9)]
    assert [step[3][0] for step in steps] == [False] * 8 + [True]
    assert not any(step[2][0] for step in steps[1:])  # the ball was lost in the first
    envs.close()


@pytest.mark.parametrize("env_id", GAMES)
def test_every_game_runs(env_id, monkeypatch):
    """An agent for it can be made, and plays."""
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda weight, gain: weight)  # which takes most of the time
    envs = ppo_atari.make_envs(Args(env_id), 1)
    agent = ppo_atari.Agent(envs)
    frames, _ = envs.reset(seed=np.array([1]))
    for noise in agent.sample_noise(3, 1):
        with torch.no_grad():
            actions = agent.act(torch.as_tensor(frames).permute(0, 2, 3, 1), noise)[0]
        frames, _, terminations, truncations, _ = envs.step(actions.numpy())
        assert frames.shape == (1, 4, 84, 84)
        assert not terminations.any() | truncations.any()
    assert agent.num_actions == len(Emulator(env_id, 1).actions)
    envs.close()


def test_all_games_are_there():
    """The Arcade Learning Environment has more than a hundred."""
    assert len(GAMES) == len({spec.kwargs["game"] for spec in gym.registry.values() if "game" in spec.kwargs}) > 100


# ----------------------------------------------------------------------------- what one can ask for


def play(args, num_steps=100, seeds=(1, 2), **changes):
    """Every step of random actions, and the environments, closed."""
    envs, rng = ppo_atari.make_envs(args, len(seeds), **changes), np.random.default_rng(1)
    envs.reset(seed=np.array(seeds))
    steps = [envs.step(rng.integers(envs.single_action_space.n, size=len(seeds))) for _ in range(num_steps)]
    envs.close()
    return steps, envs


def same(some, other):
    """Whether the steps are the same in all that the environments returned, but for infos."""
    pairs = (
        pair for steps in zip(some, other, strict=True) for pair in zip(*(step[:4] for step in steps), strict=True)
    )
    return all(np.array_equal(a, b) for a, b in pairs)


def test_all_ids_of_a_game_mean_the_same():
    """Whatever gymnasium makes of them: frame skipping and sticky actions are the script's business."""
    ids = ("ALE/Breakout-v5", "BreakoutNoFrameskip-v4", "Breakout-v4")
    first, *others = (play(Args(env_id))[0] for env_id in ids)
    assert sum(step[1].sum() for step in first) > 0
    assert all(same(first, other) for other in others)
    assert not same(first, play(Args("ALE/Breakout-v5"), seeds=(1, 3))[0]), "seeds would not matter"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"env_id": "ALE/Breakuot-v5"}, ["no game ALE/Breakuot-v5", "ALE/Breakout-v5"]),
        ({"env_id": "breakout"}, ["no game breakout", "Breakout-v"]),
        ({"env_id": "xyz"}, ["no game xyz"]),
        ({"env_id": "CartPole-v1"}, ["CartPole-v1", "ppo.py", "ppo_continuous_action.py"]),
        ({"env_id": "Pendulum-v1"}, ["Pendulum-v1", "ppo.py", "ppo_continuous_action.py"]),
        ({"env_kwargs": ("nonsense=1",)}, ["ALE/Breakout-v5", "nonsense"]),
        ({"env_kwargs": ("frameskip=0",)}, ["ALE/Breakout-v5", "frameskip"]),
        ({"env_kwargs": ("noop_max=many",)}, ["ALE/Breakout-v5", "noop_max"]),
        ({"env_kwargs": ("num_envs=3",)}, ["ALE/Breakout-v5", "num_envs"]),
        ({"env_kwargs": ("autoreset_mode=never",)}, ["ALE/Breakout-v5", "never"]),
        ({"env_kwargs": ("continuous=True",)}, ["continuous", "Discrete"]),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused(flags, words):
    """In one line, which names what is wrong; and no empty run folder is left behind."""
    with pytest.raises(UsageError) as error:
        ppo_atari.train(Args(**TINY | flags))
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)
    assert not list(Path("runs").iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "grayscale=False",
        "img_height=10",
        "stack_num=0",
        "batch_size=1",
        "autoreset_mode=NextStep",
        "reward_clipping=True",
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_only_ale_can_make_is_refused(text):
    """ALE makes these environments without complaint, but the script cannot learn from them, or would learn wrongly."""
    with pytest.raises(UsageError) as error:
        ppo_atari.train(Args(env_kwargs=(text,), **TINY))
    assert "\n" not in str(error.value)
    assert not list(Path("runs").iterdir())


def test_env_kwargs_reach_the_games():
    """Python literals as such: all 18 actions, two images, no no-ops."""
    envs = ppo_atari.make_envs(Args(env_kwargs=("full_action_space=True", "stack_num=2", "noop_max=0")), 2)
    observations, infos = envs.reset(seed=np.array([1, 2]))
    assert envs.single_action_space.n == 18
    assert observations.shape == (2, 2, 84, 84)
    assert infos["episode_frame_number"].tolist() == [1, 1]  # FIRE
    envs.close()


def test_sticky_actions_are_off_unless_asked_for():
    """Without the flag games go as in emulators without, with it as in those that repeat 25 % of the actions."""
    for flag, sticky in ((False, 0.0), (True, 0.25)):
        compare(Args(sticky_actions=flag), (1,), 40, sticky=sticky)
        with pytest.raises(AssertionError):
            compare(Args(sticky_actions=flag), (1,), 40, sticky=0.25 - sticky)


# ------------------------------------------------- traps: where an upgrade of ALE could change them


def test_reward_clipping_would_lose_the_score():
    """What ALE does unless told otherwise."""
    raw, clipped = (
        np.stack([step[1] for step in play(Args("ALE/MsPacman-v5"), **changes)[0]])
        for changes in ({}, {"reward_clipping": True})
    )
    assert raw.max() >= 10
    assert np.array_equal(clipped, np.sign(raw))


def test_episodic_life_would_restart_the_game_at_a_lost_life():
    """Lives and frame numbers begin anew, so that the agent would never see the second life. life_loss_info goes on."""
    for changes, restarts in ({"episodic_life": True}, True), ({}, False):
        steps, _ = play(Args(), **changes)
        first = next(t for t, step in enumerate(steps) if step[2][0])
        infos = steps[first][4]
        assert (infos["episode_frame_number"][0] < steps[first - 1][4]["episode_frame_number"][0]) == restarts
        assert infos["lives"][0] == (5 if restarts else 4)


def test_lives_are_those_of_the_next_game_where_one_ends():
    """So that lives == 0 is never seen, and tells nothing about the end of a game."""
    steps, _ = play(Args(), 260)
    lives = np.stack([step[4]["lives"] for step in steps])
    numbers = np.stack([step[4]["episode_frame_number"] for step in steps])
    new_game = numbers[1:] < numbers[:-1]
    assert new_game.any()
    assert (lives[1:][new_game] == 5).all()
    assert (lives[:-1][new_game] == 1).all()
    assert lives.min() == 1


def test_games_begin_anew_in_the_step_that_ended_the_last():
    """Also after other environments were made: the mode in ALE's metadata is then theirs, for all."""
    envs = ppo_atari.make_envs(Args("ALE/Pong-v5", env_kwargs=limited(40)), 1)
    other = AtariVectorEnv("pong", 1, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP)
    assert envs.autoreset_mode == gym.vector.AutoresetMode.SAME_STEP
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP
    envs.reset(seed=np.array([1]))
    for t in range(1, 41):
        observations, _, _, truncations, infos = envs.step(np.array([0]))
        ended = t % 10 == 0
        assert truncations[0] == ended
        assert ended == ("final_obs" in infos)
        assert ended == (not observations[0, :3].any())  # a first observation has one image only
        assert observations[0, 3].any()
        assert not ended or infos["final_obs"][0].any((1, 2)).all()
    envs.close()
    other.close()


def test_observations_are_not_overwritten_by_later_steps():
    envs = ppo_atari.make_envs(Args(env_kwargs=limited(40)), 2)
    kept = [envs.reset(seed=np.array([1, 2]))[0]]
    copies = [kept[0].copy()]
    for t in range(50):
        observations, *_, infos = envs.step(np.array([t % 4, 1]))
        for new in (observations, infos.get("final_obs", observations)):
            kept.append(new)
            copies.append(new.copy())
    assert all(map(np.array_equal, kept, copies))
    envs.close()


# --------------------------------------------------------------------------- what training makes of it

RUNS = {
    # random games of Breakout take 130 to 210 steps: some end before this limit of 150
    "Breakout": Args(num_envs=3, num_steps=100, total_timesteps=900, env_kwargs=limited(600)),
    # a fish is 10 points
    "Frostbite": Args("ALE/Frostbite-v5", num_envs=3, num_steps=100, total_timesteps=600, env_kwargs=limited(280)),
    # goals against count -1
    "Pong": Args("ALE/Pong-v5", num_envs=2, num_steps=150, total_timesteps=300, env_kwargs=limited(402)),
}
# leaves the weights as they are, so that the values can be computed here, too
FROZEN = {"learning_rate": 1e-30, "num_minibatches": 2, "update_epochs": 1, "bfloat16": False, "eval_episodes": 1}


def train(args, monkeypatch):
    """Train, and return all there is to know about it; its environments are recorded."""
    made, gae_inputs = record(monkeypatch), []
    compute_gae = ppo_atari.compute_gae

    def noted(*inputs):
        gae_inputs.append([x.clone() if isinstance(x, torch.Tensor) else x for x in inputs])
        return compute_gae(*inputs)

    monkeypatch.setattr(ppo_atari, "compute_gae", noted)
    before = set(Path("runs").glob("*"))
    agent = ppo_atari.train(args)
    (run_dir,) = set(Path("runs").glob("*")) - before
    envs, limit = made[0], int(args.env_kwargs[0].partition("=")[2])
    names = ("rewards", "terminations", "truncations")
    recorded = {name: envs.column(i) for i, name in enumerate(names, start=1)}
    return SimpleNamespace(
        args=args, agent=agent, envs=envs, limit=limit, gae_inputs=gae_inputs, curves=curves(run_dir), **recorded
    )


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    """A short training on each of RUNS."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tmp_path_factory.mktemp("run"))
        args = Args(**vars(RUNS[request.param]) | FROZEN)
        return train(args, monkeypatch)


def emulated(run):
    """What the emulators say about the actions of a run: [num_steps][num_envs]."""
    seeds = [seed >> 1 for seed in ppo_atari.env_seeds(run.args.num_envs, run.args.seed, 0, 0)]  # ALE takes 31 bits
    emulators = [Emulator(run.args.env_id, seed, run.limit) for seed in seeds]
    numbers = run.envs.numbers()
    for emulator, number in zip(emulators, numbers[0], strict=True):
        emulator.start(number)
    steps = []
    for actions, after in zip(run.envs.actions, numbers[1:], strict=True):
        steps.append([emulator.step(action) for emulator, action in zip(emulators, actions, strict=True)])
        for emulator, step, number in zip(emulators, steps[-1], after, strict=True):
            if step.over or step.at_limit:
                emulator.start(number)
    return steps


def check_curves(run):
    """Return, length and number of games as logged are those of whole games, and their scores are the raw ones."""
    score, length, finished = np.zeros(run.args.num_envs), np.zeros(run.args.num_envs), 0
    expected = {"charts/episodic_return": [], "charts/episodic_length": [], "charts/episodes": []}
    steps = emulated(run)
    for iteration in range(run.args.num_iterations):
        scores, lengths = [], []
        for row in steps[iteration * run.args.num_steps :][: run.args.num_steps]:
            score += [step.reward for step in row]
            length += 1
            for i, step in enumerate(row):
                if step.over or step.at_limit:
                    scores.append(score[i])
                    lengths.append(length[i])
                    score[i] = length[i] = 0
        finished += len(scores)
        if scores:
            for name, value in zip(expected, (np.mean(scores), np.mean(lengths), finished), strict=True):
                expected[name].append(((iteration + 1) * run.args.batch_size, np.float32(value)))
    assert finished > 0
    assert {name: run.curves[name] for name in expected} == expected
    return finished


def test_training_logs_whole_games_and_raw_scores(run):
    """Not cut at lost lives, not clipped; those that reached the limit, and those that were over before it."""
    check_curves(run)
    happened = Counter(name for row in emulated(run) for step in row for name, value in vars(step).items() if value)
    assert happened["at_limit"] > 0
    if run.args.env_id == "ALE/Breakout-v5":
        assert happened["over"] > 0
    if run.args.env_id != "ALE/Pong-v5":
        assert happened["lost"] > 0
    if run.args.env_id == "ALE/Frostbite-v5":
        assert run.curves["charts/episodic_return"][0][1] >= 10


def test_training_seeds_its_environments_from_the_seed(run):
    assert run.envs.seeds.tolist() == [x >> 1 for x in ppo_atari.env_seeds(run.args.num_envs, run.args.seed, 0, 0)]
    assert len(set(run.envs.seeds.tolist())) == run.args.num_envs


@pytest.mark.parametrize("run", ["Breakout"], indirect=True)
def test_a_life_lost_in_the_last_step_before_the_limit(run, monkeypatch):
    """ALE calls that a termination, as if the game went on; but it has ended, and must be counted."""
    t, i = np.argwhere(run.terminations)[0]  # the same seed plays the same game up to a limit set right here
    assert t < 100
    assert run.envs.numbers()[t + 1, i] > run.envs.numbers()[t, i]
    at_limit = train(Args(**vars(run.args) | {"env_kwargs": limited(4 * (t + 1)), "total_timesteps": 300}), monkeypatch)
    step = emulated(at_limit)[t][i]
    assert step.lost and step.at_limit and not step.over
    assert at_limit.terminations[t, i] and not at_limit.truncations[t, i]
    assert at_limit.truncations[t].sum() == 2, "the other two reach the limit in the same step"
    assert check_curves(at_limit) == 3 * (100 // (t + 1))


def test_what_is_learned_from(run):
    """Signs of rewards (detail 19); lost lives as terminations; and the limit, nothing else, as a truncation: there
    the future is worth what the agent makes of the last observation of the game, not of the first of the next."""
    T, N = run.args.num_steps, run.args.num_envs
    observations = np.concatenate([run.envs.first[0][None], run.envs.column(0)])
    steps = emulated(run)

    def value(frames):
        with torch.no_grad():
            return run.agent.value(torch.as_tensor(frames).permute(0, 2, 3, 1))

    assert len(run.gae_inputs) == run.args.num_iterations
    for iteration, (rewards, values, next_values, terminations, truncations, *discounts) in enumerate(run.gae_inputs):
        rows = slice(iteration * T, (iteration + 1) * T)
        raw = np.array([[step.reward for step in row] for row in steps[rows]])
        lost_or_over = np.array([[step.lost or step.over for step in row] for row in steps[rows]])
        at_limit = np.array([[step.at_limit for step in row] for row in steps[rows]])
        assert rewards.dtype == torch.float32
        assert np.array_equal(rewards, np.sign(raw))
        assert np.array_equal(terminations, lost_or_over)
        assert np.array_equal(truncations, at_limit & ~lost_or_over)
        assert discounts == [run.args.gamma, run.args.gae_lambda]

        expected = value(observations[rows].reshape(-1, 4, 84, 84)).view(T, N)
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
        following = torch.cat([values[1:], next_values[-1:]])
        assert torch.equal(next_values[~truncations], following[~truncations])
        after = value(observations[(iteration + 1) * T])
        inside = ~truncations[-1]
        torch.testing.assert_close(next_values[-1][inside], after[inside], rtol=1e-4, atol=1e-5)
        for t, i in np.argwhere(truncations.numpy()):
            last = value(run.envs.steps[iteration * T + t][4]["final_obs"][i : i + 1])[0]
            torch.testing.assert_close(next_values[t, i], last, rtol=1e-4, atol=1e-5)
            assert (last - value(run.envs.steps[iteration * T + t][0][i : i + 1])[0]).abs() > 1e-3, "no difference"
    rewards, _, _, terminations, truncations = (torch.cat(x) for x in list(zip(*run.gae_inputs, strict=True))[:5])
    pong = run.args.env_id == "ALE/Pong-v5"
    assert truncations.any()
    assert terminations.any() != pong
    assert (-1 if pong else 1) in rewards


# --------------------------------------------------------------------------- evaluation and film


def untrained(args):
    """A checkpoint as evaluate() needs it."""
    torch.manual_seed(1)
    envs = ppo_atari.make_envs(args, 1)
    agent = ppo_atari.Agent(envs)
    envs.close()
    return {"global_step": 0, "agent": agent.state_dict()}


def evaluate(args):
    """The scores of untrained agents."""
    return ppo_atari.evaluate(args, Path("runs", "run"), untrained(args))


@pytest.mark.parametrize(
    "args",
    [Args(eval_episodes=3), Args("ALE/Frostbite-v5", eval_episodes=2, env_kwargs=limited(800), sticky_actions=True)],
    ids=lambda args: args.env_id,
)
def test_evaluation_plays_whole_games_for_raw_scores(args, recorded):
    """One in each environment: not ended by a lost life, and the next game there does not count."""
    scores = evaluate(args)
    envs = recorded[-1]
    limit = int(args.env_kwargs[0].partition("=")[2]) if args.env_kwargs else FOREVER
    expected, lost, lengths = [], 0, []
    for i, seed in enumerate(ppo_atari.env_seeds(args.eval_episodes, args.seed, 1)):
        emulator = Emulator(args.env_id, seed >> 1, limit, sticky=0.25 if args.sticky_actions else 0.0)
        emulator.start(envs.numbers()[0, i])
        steps = []
        while not steps or not (steps[-1].over or steps[-1].at_limit):
            steps.append(emulator.step(envs.actions[len(steps)][i]))
        expected.append(sum(step.reward for step in steps))
        lost += sum(step.lost for step in steps)
        lengths.append(len(steps))
    assert scores.tolist() == expected
    assert lost > 0
    assert len(envs.actions) == max(lengths), "it is over when the last game is"
    assert max(scores) > 0
    assert set(np.concatenate(envs.actions).tolist()) == set(range(envs.single_action_space.n)), "not sampled"


def test_evaluation_is_repeatable():
    """The same scores from the same seed, whatever was drawn before; other games with another seed."""
    args = Args("ALE/MsPacman-v5", eval_episodes=3, env_kwargs=limited(300))
    checkpoint = untrained(args)
    scores = []
    for seed in (1, 1, 2):
        torch.rand(7)
        args.seed = seed
        scores.append(ppo_atari.evaluate(args, Path("runs", "run"), checkpoint).tolist())
    assert scores[0] == scores[1] != scores[2]
    assert len(set(scores[0])) > 1, "all the same: this would not tell seeds apart"
    assert [value for _, value in curves(Path("runs", "run"))["eval/episodic_return"]] == pytest.approx(
        [np.mean(x) for x in scores]
    )


class Camera:
    """An mp4 in the making, which keeps the frames as they were before they were compressed."""

    frames: list

    def __init__(self, path, size, **options):
        self.size, self.video = size, self.write_frames(path, size, **options)

    write_frames = staticmethod(imageio_ffmpeg.write_frames)

    def send(self, frame):
        if frame is not None:
            self.frames.append(np.array(frame).reshape(self.size[1], self.size[0], 3))
        self.video.send(frame)

    def close(self):
        self.video.close()


@pytest.mark.parametrize(
    ("args", "limit", "height"),
    [
        (Args(), FOREVER, 210),
        (Args(sticky_actions=True), FOREVER, 210),
        (Args("ALE/AirRaid-v5", env_kwargs=limited(402)), 402, 250),
        (Args("BreakoutNoFrameskip-v4", env_kwargs=limited(400)), 400, 210),
    ],
    ids=["Breakout", "sticky", "AirRaid", "NoFrameskip"],
)
def test_the_film_shows_the_game_that_was_evaluated(args, limit, height, recorded, monkeypatch):
    """Frame by frame what the emulator draws where it shows the agent what it saw, at 60 frames per second."""
    monkeypatch.setattr(Camera, "frames", [], raising=False)
    monkeypatch.setattr(imageio_ffmpeg, "write_frames", Camera)
    args = Args(**vars(args) | {"eval_episodes": 2, "capture_video": True, "seed": 3})
    scores = evaluate(args)
    envs, camera = recorded[1:]  # the first was for the agent
    film = Camera.frames

    emulator = Emulator(args.env_id, envs.seeds[0], limit, sticky=0.25 if args.sticky_actions else 0.0)
    emulator.start(envs.numbers()[0, 0])
    assert np.array_equal(film[0], emulator.ale.getScreenRGB())
    score, num_frames, ended = 0, 1, False
    for t, actions in enumerate(envs.actions):
        step = emulator.step(actions[0])
        score += step.reward
        ended = step.over or step.at_limit
        shown = np.array(film[num_frames : num_frames + len(emulator.colours)])
        if ended:
            # The trap again: the very last frame is never looked at, and the one before is shown twice.
            emulator.colours[-1] = film[num_frames + len(emulator.colours) - 2]
        num_frames += len(emulator.colours)
        assert np.array_equal(shown, emulator.colours)
        if ended:
            break
        assert np.array_equal(envs.steps[t][0][0], emulator.stack)
    assert ended
    assert len(film) == num_frames
    assert score == scores[0] == camera.column(1).sum()

    (path,) = Path("runs", "run", "videos").iterdir()
    reader = imageio_ffmpeg.read_frames(str(path))
    info = next(reader)
    assert (info["size"], info["fps"]) == ((160, height), 60)
    video = [np.frombuffer(frame, np.uint8).reshape(height, 160, 3) for frame in reader]
    assert len(video) == len(film)
    assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(video, film, strict=True)) < 10  # it is compressed
