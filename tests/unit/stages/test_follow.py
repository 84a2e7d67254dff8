"""While ranks work: events are told as they come, one stop request saves, a second one ends, a lost lock ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from cpt.base import lock
from cpt.base.errors import SAVED, EnvironmentProblem
from cpt.base.events import EventLog
from cpt.launch import Ranks
from cpt.stages import attempt, follow
from cpt.stages.follow import Stop, Tail


class Scripted(Ranks):
    """Ranks that live until they are asked to stop (or for ever), and note what was asked."""

    def __init__(self, polls: int = 10**6, listens: bool = True, on_poll: Any = lambda n: None) -> None:
        self.polls, self.listens, self.on_poll = polls, listens, on_poll
        self.asked: list[str] = []
        self.count = 0
        self.code: int | None = None

    def poll(self) -> int | None:
        self.count += 1
        self.on_poll(self.count)
        return 0 if self.code is None and self.count > self.polls else self.code

    def stop(self) -> None:
        self.asked.append("stop")
        if self.listens:
            self.code = SAVED

    def kill(self) -> None:
        self.asked.append("kill")
        self.code = -9


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(follow, "_BEAT_SECONDS", 0.0)


def watch(
    ranks: Scripted, folder: Path, stop: Stop, locks: tuple[lock.Lock, ...] = ()
) -> tuple[Any, list[Any], list[str]]:
    told: list[Any] = []
    notes: list[str] = []
    result = follow.follow(ranks, folder / "events.jsonl", locks, folder, stop, told.append, notes.append)
    return result, told, notes


def test_events_are_told_once_and_the_last_ones_too(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    ranks = Scripted(polls=5, on_poll=lambda n: log.write("step", step=n))
    result, told, _ = watch(ranks, tmp_path, Stop())
    assert result == (0, False)
    assert [e["step"] for e in told] == [1, 2, 3, 4, 5, 6]


def test_half_a_line_is_told_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = Tail(path)
    assert list(tail.new()) == []
    path.write_bytes(b'{"kind": "st')
    assert list(tail.new()) == []
    with open(path, "ab") as file:
        file.write(b'ep"}\n{"kind"')
    assert list(tail.new()) == [{"kind": "step"}]


def test_ctrl_c_once_saves_and_twice_ends_at_once(tmp_path: Path) -> None:
    def press(times: int) -> Any:
        return lambda n: os.kill(os.getpid(), signal.SIGINT) if n in range(2, 2 + times) else None

    with Stop() as stop:
        stop.gentle = True
        once = Scripted(on_poll=press(1))
        result, _, notes = watch(once, tmp_path, stop)
    assert result == (SAVED, False) and once.asked == ["stop"]
    assert "Ctrl-C again stops at once" in notes[0]
    with Stop() as stop:
        stop.gentle = True
        twice = Scripted(listens=False, on_poll=press(2))
        result, _, _ = watch(twice, tmp_path, stop)
    assert result == (-9, True) and twice.asked == ["stop", "kill"]


def test_sigterm_any_number_of_times_only_saves(tmp_path: Path) -> None:
    with Stop() as stop:
        stop.gentle = True
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked and not stop.now


def test_before_anything_runs_a_stop_ends_the_command() -> None:
    with Stop(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_that_the_shell_ignores_stays_ignored() -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, old)


def test_a_stop_file_asks_for_a_save(tmp_path: Path) -> None:
    (tmp_path / attempt.STOP_FILE).write_text("")
    ranks = Scripted()
    assert watch(ranks, tmp_path, Stop())[0] == (SAVED, False)


def test_ranks_are_ended_when_somebody_took_the_lock_over(tmp_path: Path) -> None:
    held, _ = lock.take(tmp_path, lock.holder_of(os.getpid(), "me"))
    (tmp_path / lock.NAME).unlink()
    ranks = Scripted()
    with pytest.raises(EnvironmentProblem, match="took over"):
        watch(ranks, tmp_path, Stop(), (held,))
    assert ranks.asked == ["kill"]
