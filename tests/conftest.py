"""Fixtures. Every test runs in an empty folder of its own, so that none writes to the repository's runs/."""

import contextlib
import os
import signal
import sys
from pathlib import Path

import pygame
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts

from helpers import Result, descendants, spawn

import ppo


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """The current folder of the test."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def command_line(monkeypatch, capfd):
    """Runs main() of ppo.py, or of another script, in this process, with the given flags."""

    def call(*flags: object, script=ppo) -> Result:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        code = 0
        try:
            script.main()
        except SystemExit as error:
            code = error.code
        return Result(code, *capfd.readouterr())

    return call


@pytest.fixture
def window(monkeypatch):
    """The pictures [width, height, 3] that are shown in pygame's window, which needs no display."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    shown, flip = [], pygame.display.flip

    def recording_flip():
        shown.append(pygame.surfarray.array3d(pygame.display.get_surface()))
        flip()

    monkeypatch.setattr(pygame.display, "flip", recording_flip)
    return shown


@pytest.fixture
def start():
    """Starts a script in a process of its own; it and its children are killed when the test ends."""
    started = []

    def call(*flags: object, **options):
        started.append(spawn(*flags, **options))
        return started[-1]

    yield call
    for process in started:
        children = descendants(process.pid)  # those of torchrun and of --async-envs have their own process groups
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        process.communicate()
