"""While ranks work: their events to the display, stop requests to the ranks, signs of life to the locks."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from cpt.base.errors import EnvironmentProblem
from cpt.base.events import Event
from cpt.base.lock import Lock
from cpt.launch import Ranks
from cpt.stages.attempt import stop_asked

_POLL_SECONDS = 0.1
_BEAT_SECONDS = 10.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """Stop requests of a person: one saves and stops, a second Ctrl-C stops at once. Use as a context manager.

    Until `gentle` is set a request raises KeyboardInterrupt: nothing runs yet that would have to be saved.
    """

    def __init__(self) -> None:
        self.asked = False
        self.now = False
        self.gentle = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in _SIGNALS:
            if signal.getsignal(number) is signal.SIG_IGN:  # under nohup a closed terminal stops nothing
                continue
            with contextlib.suppress(ValueError):  # only the main thread has signals
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if not self.gentle:
            raise KeyboardInterrupt
        self.now |= self.asked and number == signal.SIGINT
        self.asked = True


class Tail:
    """New whole lines of a growing `.jsonl` file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._rest = b""

    def new(self) -> Iterator[Event]:
        """Events that were written since the last call."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def follow(
    ranks: Ranks,
    events: Path,
    locks: tuple[Lock, ...],
    run_dir: Path,
    stop: Stop,
    tell: Callable[[Event], None],
    note: Callable[[str], None],
) -> tuple[int, bool]:
    """Wait for the ranks of one attempt.

    Args:
        events: the attempt's event file; each new event is told.
        locks: kept alive meanwhile.

    Returns:
        (the launcher's exit code, whether the ranks were killed on request).

    Raises:
        EnvironmentProblem: a lock was taken over by another process; the ranks are ended first.
    """
    tail = Tail(events)
    told = False
    seconds = {"step": 0.0, "save": 0.0}
    last_beat = time.monotonic()
    try:
        while True:
            code = ranks.poll()
            for event in tail.new():
                _measure(event, seconds)
                tell(event)
            if code is not None:
                return code, False
            if stop.now:
                ranks.kill()
                return -signal.SIGKILL, True
            stop.asked = stop.asked or stop_asked(run_dir)
            if stop.asked and not told:
                told = True
                ranks.stop()
                note(_goodbye(seconds))
            if time.monotonic() - last_beat > _BEAT_SECONDS:
                last_beat = time.monotonic()
                for lock in locks:
                    if not lock.is_ours():
                        raise EnvironmentProblem(f"another process took over `{lock.path.parent}`; this one stops")
                    lock.beat()
            time.sleep(_POLL_SECONDS)
    finally:
        if ranks.poll() is None:
            ranks.kill()


def _measure(event: Event, seconds: dict[str, float]) -> None:
    """Keep how long the last step and save took."""
    kind = event.get("kind")
    value = event.get("step_s") if kind == "step" else event.get("seconds") if kind == "save" else None
    if isinstance(kind, str) and isinstance(value, int | float):
        seconds[kind] = float(value)


def _goodbye(seconds: dict[str, float]) -> str:
    about = seconds["step"] + seconds["save"]
    how_long = f"about {about:.0f} s" if about >= 1 else "a few seconds"
    return f"stopping: the step under way is finished and saved ({how_long}); Ctrl-C again stops at once"
