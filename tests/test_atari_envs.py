"""The Atari environments on real games: what they return, what training makes of it, evaluation and film.

The reference is one plain emulator per environment with the same seed and actions; the rest is written out here.
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
from ppo_atari import Args

torch.set_num_threads(1)  # tests run in parallel
NO_LIMIT = 10**9  # frames


class Emulator:
    """One game in an emulator of its own, played and seen as the environments should play and see it."""

    def __init__(self, env_id: str, seed: int, limit: int = NO_LIMIT, sticky: bool = False):
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self.ale, self.limit = ale_py.ALEInterface(), limit
        self.ale.setInt("random_seed", int(seed))
        self.ale.setFloat("repeat_action_probability", 0.25 if sticky else 0.0)
        self.ale.loadROM(ale_py.roms.get_rom_path(gym.spec(env_id).kwargs["game"]))
        self.actions = self.ale.getMinimalActionSet()

    def start(self, frame_number: int):
        """Begin a game and wait until this frame; ALE draws the number of no-ops from random numbers of its own."""
        self.ale.reset_game()
        if ale_py.Action.FIRE in self.actions:
            self.ale.act(ale_py.Action.FIRE)
        while self.ale.getEpisodeFrameNumber() < frame_number:
            self.ale.act(ale_py.Action.NOOP)
        assert self.ale.getEpisodeFrameNumber() == frame_number
        self.num_frames, self.seen = 0, self.ale.getScreenGrayscale()
        self.stack = deque([np.zeros((84, 84), np.uint8)] * 3 + [self.small()], maxlen=4)

    def small(self):
        """What was seen last, in the size that the agent gets."""
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
        elif len(self.screens) == 4:  # ALE does not render the very last frame of a game, but uses an older one
            self.seen = np.maximum(self.screens[2], self.seen)
        self.stack.append(self.small())
        return SimpleNamespace(reward=reward, over=over, at_limit=at_limit, lost=0 < self.ale.lives() < lives)


class Recorded(AtariVectorEnv):
    """ALE's environments, which record their inputs and outputs."""

    made: list  # all that were made since the recording began

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.made.append(self)
        self.actions, self.steps = [], []

    def reset(self, *, seed, options=None):
        self.seed, self.first = seed, super().reset(seed=seed, options=options)
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
    """From now on, the environments of ppo_atari are recorded in the list that this returns."""
    monkeypatch.setattr(Recorded, "made", [], raising=False)
    monkeypatch.setattr(ppo_atari, "AtariVectorEnv", Recorded)
    return Recorded.made


def limited(frames):
    """The argument for games of at most so many frames."""
    return (f"max_num_frames_per_episode={frames}",)


def limit_of(args):
    """The same limit read from Args."""
    return int(args.env_kwargs[0].partition("=")[2]) if args.env_kwargs else NO_LIMIT


# ------------------------------------------------------------------------- what the games return


@pytest.mark.parametrize(
    ("args", "seeds", "num_steps", "expected"),
    [
        (Args(), (1, 2), 230, {"over", "lost", "reward 1"}),
        (Args(sticky_actions=True), (3,), 100, {"lost"}),
        (Args("ALE/Pong-v5", env_kwargs=limited(400)), (1, 2), 110, {"at_limit", "reward -1"}),
        (Args("ALE/Pong-v5", env_kwargs=limited(402)), (1, 2), 110, {"at_limit", "reward -1"}),  # a short last step
        (Args("ALE/MsPacman-v5"), (1,), 200, {"reward 10"}),
    ],
    ids=["Breakout", "sticky", "400 frames", "402 frames", "MsPacman"],
)
def test_everything_is_as_in_the_emulator(args, seeds, num_steps, expected):
    """Observations (details 14, 15, 17, 18 and 20), raw rewards and ends of games, to the bit, over several games.

    A lost life is a termination, but the game goes on (16).
    """
    envs, happened = ppo_atari.make_envs(args, len(seeds)), Counter()
    emulators = [Emulator(args.env_id, seed, limit_of(args), args.sticky_actions) for seed in seeds]
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
            happened.update(name for name, value in vars(step).items() if value)
            happened[f"reward {step.reward}"] += 1
    envs.close()
    assert expected <= happened.keys()


def play(args):
    """100 random steps in two environments: observations, rewards, terminations and truncations."""
    envs, rng = ppo_atari.make_envs(args, 2), np.random.default_rng(1)
    envs.reset(seed=1)
    steps = [envs.step(rng.integers(4, size=2))[:4] for _ in range(100)]
    envs.close()
    return [np.stack(x) for x in zip(*steps, strict=True)]


@pytest.mark.parametrize(
    "args",
    [
        Args("BreakoutNoFrameskip-v4"),
        Args("Breakout-v4"),
    ],
    ids=["NoFrameskip", "v4"],
)
def test_all_ids_of_a_game_mean_the_same(args):
    expected = play(Args())
    assert expected[1].any() and expected[2].any()
    assert all(map(np.array_equal, expected, play(args)))


# --------------------------------------------------------------------------- what training makes of it

# a learning rate that leaves the weights as they are, so that the test can compute the values
FROZEN = {"learning_rate": 1e-30, "num_minibatches": 2, "update_epochs": 1, "bfloat16": False, "eval_episodes": 1}
RUNS = {
    # random games of Breakout take 130 to 210 steps, some of them less than this limit of 150
    "Breakout": Args(num_envs=3, num_steps=100, env_kwargs=limited(600), seed=2, **FROZEN),
    # rewards of 10
    "Frostbite": Args("ALE/Frostbite-v5", num_envs=3, num_steps=80, env_kwargs=limited(280), **FROZEN),
}


def train(args, monkeypatch):
    """Train for two iterations with recorded environments. Returns all that the tests need."""
    made, gae_inputs, compute_gae = record(monkeypatch), [], ppo_atari.compute_gae

    def noted(*inputs):
        gae_inputs.append([x.copy() if isinstance(x, np.ndarray) else x for x in inputs])
        return compute_gae(*inputs)

    monkeypatch.setattr(ppo_atari, "compute_gae", noted)
    args = Args(**vars(args) | {"total_timesteps": 2 * args.num_envs * args.num_steps})
    run_dir = ppo_atari.train(args)
    envs = next(envs for envs in made if envs.steps)
    return SimpleNamespace(
        args=args,
        agent=ppo_atari.load_agent(run_dir),
        envs=envs,
        gae_inputs=gae_inputs,
        curves=curves(run_dir),
        terminations=envs.column(2),
        truncations=envs.column(3),
    )


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    """A short training on each of RUNS."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tmp_path_factory.mktemp("run"))
        return train(RUNS[request.param], monkeypatch)


def emulated(run):
    """What happens in emulators with the actions of a run: [num_steps][num_envs]."""
    seeds = range(run.envs.seed, run.envs.seed + run.args.num_envs)
    emulators = [Emulator(run.args.env_id, seed, limit_of(run.args)) for seed in seeds]
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


def check_curves(run, steps):
    """Returns, lengths and numbers of games are logged for whole games with raw scores. Returns the number of games."""
    T, N = run.args.num_steps, run.args.num_envs
    score, length = np.zeros(N), np.zeros(N)
    expected = {"charts/episodic_return": [], "charts/episodic_length": [], "charts/episodes": []}
    for iteration in range(2):
        scores, lengths = [], []
        for row in steps[iteration * T : (iteration + 1) * T]:
            score += [step.reward for step in row]
            length += 1
            for i, step in enumerate(row):
                if step.over or step.at_limit:
                    scores.append(score[i])
                    lengths.append(length[i])
                    score[i] = length[i] = 0
        step = (iteration + 1) * T * N
        expected["charts/episodes"].append((step, len(scores)))
        if scores:
            expected["charts/episodic_return"].append((step, np.float32(np.mean(scores))))
            expected["charts/episodic_length"].append((step, np.float32(np.mean(lengths))))
    assert {name: run.curves[name] for name in expected} == expected
    return sum(value for _, value in expected["charts/episodes"])


def test_training_logs_whole_games_and_raw_scores(run):
    """Not cut at lost lives, not clipped, whether they reach the limit or are over before."""
    steps = emulated(run)
    assert check_curves(run, steps) > 0
    happened = {name for row in steps for step in row for name, value in vars(step).items() if value}
    assert {"lost", "at_limit"} <= happened
    assert "over" in happened or max(value for _, value in run.curves["charts/episodic_return"]) > 5


@pytest.mark.parametrize("run", ["Breakout"], indirect=True)
def test_a_life_lost_in_the_last_step_before_the_limit(run, monkeypatch):
    """ALE reports a termination, as if the game went on; but it has ended and is counted."""
    t = np.flatnonzero(run.terminations.sum(1) == 1)[0]  # a limit at this very step changes nothing before it
    i = run.terminations[t].argmax()
    at_limit = train(Args(**vars(run.args) | {"env_kwargs": limited(4 * (t + 1))}), monkeypatch)
    steps = emulated(at_limit)
    assert steps[t][i].lost and steps[t][i].at_limit and not steps[t][i].over
    assert at_limit.terminations[t, i] and not at_limit.truncations[t, i]
    assert at_limit.truncations[t].sum() == 2, "the other two reach the limit in the same step"
    assert check_curves(at_limit, steps) == 3 * (200 // (t + 1))


def test_what_is_learned_from(run):
    """Signs of rewards (detail 19), lost lives as terminations, and the time limit as the only truncation.

    The value after a truncation is that of the true last observation, not of the first one of the next game.
    """
    T, N = run.args.num_steps, run.args.num_envs
    observations = np.concatenate([run.envs.first[0][None], run.envs.column(0)])
    steps = emulated(run)

    def value(frames):
        with torch.no_grad():
            return run.agent.value(run.agent.features(torch.as_tensor(frames).permute(0, 2, 3, 1))).numpy()

    assert len(run.gae_inputs) == 2
    for iteration, (rewards, values, next_values, terminations, truncations, *discounts) in enumerate(run.gae_inputs):
        first = iteration * T
        raw = np.array([[step.reward for step in row] for row in steps[first : first + T]])
        lost_or_over = np.array([[step.lost or step.over for step in row] for row in steps[first : first + T]])
        at_limit = np.array([[step.at_limit for step in row] for row in steps[first : first + T]])
        assert np.array_equal(rewards, np.sign(raw))
        assert np.array_equal(terminations, lost_or_over)
        assert np.array_equal(truncations, at_limit & ~lost_or_over)
        assert discounts == [run.args.gamma, run.args.gae_lambda]

        expected = value(observations[first : first + T].reshape(-1, 4, 84, 84)).reshape(T, N)
        following = np.concatenate([expected[1:], value(observations[first + T])[None]])
        for t, i in np.argwhere(truncations):
            last = value(run.envs.steps[first + t][4]["final_obs"][i : i + 1])[0]
            assert abs(last - following[t, i]) > 1e-3, "the next game has the same value"
            following[t, i] = last
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(next_values, following, rtol=1e-4, atol=1e-5)
    assert run.truncations.any() and run.terminations.any() and run.envs.column(1).any()


# --------------------------------------------------------------------------- evaluation and film


@pytest.fixture
def filmed(monkeypatch):
    """The frames that are written to a film, before compression."""
    frames, write_frames = [], imageio_ffmpeg.write_frames

    def noted(path, size, **options):
        video = write_frames(path, size, **options)
        video.send(None)
        try:
            while True:
                frame = yield
                frames.append(np.array(frame).reshape(size[1], size[0], 3))
                video.send(frame)
        finally:
            video.close()

    monkeypatch.setattr(imageio_ffmpeg, "write_frames", noted)
    return frames


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (Args(sticky_actions=True, seed=3), {"over", "lost", "reward"}),
        # a screen of 160x250, and a short last step
        (Args("ALE/AirRaid-v5", env_kwargs=limited(402)), {"at_limit", "reward"}),
    ],
    ids=["Breakout", "AirRaid"],
)
def test_evaluation_and_film(args, expected, filmed, monkeypatch):
    """Each environment plays one whole game for its raw score, with sampled actions; the film shows the first."""
    args, recorded = Args(**vars(args) | {"eval_episodes": 2, "capture_video": True}), record(monkeypatch)
    agent = ppo_atari.Agent(ppo_atari.make_envs(args, 1))
    Path("run").mkdir()
    ppo_atari.save_checkpoint(Path("run"), args, agent, torch.optim.Adam(agent.parameters()), 0)
    scores = ppo_atari.evaluate(args, "run")
    envs, _ = (envs for envs in recorded if envs.steps)  # of the games and of the film
    actions, first_number = np.stack(envs.actions), envs.numbers()[0]
    assert set(actions.flatten().tolist()) == set(range(envs.single_action_space.n))

    pictures, lengths, happened = [], [], set()
    for i in range(2):  # the next game in the same environment does not count
        emulator = Emulator(args.env_id, envs.seed + i, limit_of(args), args.sticky_actions)
        emulator.start(first_number[i])
        pictures.append([emulator.ale.getScreenRGB()])
        steps = []
        while not steps or not (steps[-1].over or steps[-1].at_limit):
            steps.append(emulator.step(actions[len(steps), i]))
            pictures[i].extend(emulator.colours)
            happened.update(name for name, value in vars(steps[-1]).items() if value)
        assert scores[i] == sum(step.reward for step in steps)
        lengths.append(len(steps))
    assert len(actions) == max(lengths)
    assert expected <= happened
    pictures = [cv2.resize(picture, (160, 210), interpolation=cv2.INTER_AREA) for picture in pictures[0]]
    pictures[-1] = pictures[-2]  # ALE does not render the very last frame
    assert np.array_equal(filmed, pictures)

    reader = imageio_ffmpeg.read_frames("run/videos/eval-at-0.mp4")
    info = next(reader)
    assert (info["size"], info["fps"]) == ((160, 210), 60)
    video = [np.frombuffer(frame, np.uint8).reshape(210, 160, 3) for frame in reader]
    assert len(video) == len(filmed)
    assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(video, filmed, strict=True)) < 10  # it is compressed
