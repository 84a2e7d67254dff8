"""Workers: processes by fork that each do a list of tasks and tell this one how it goes. One worker is this process.

Workers hold no torch and touch no file but their own. They end with their parent, however it ends; the journal has one
writer, the parent. What is told goes through a pipe, one JSON line at a time.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import selectors
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from cpt.base import processes
from cpt.base.errors import CptError, EnvironmentProblem, StageFailed, UsageError
from cpt.checkpoint.job.work import Task, Tell

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TELL_SECONDS = 0.1  # a worker says how far it is no more often [s]
_KNOWN = {c.__name__: c for c in (UsageError, EnvironmentProblem, StageFailed, CptError)}


class Stopped(Exception):
    """A person asked to stop; raised after a block."""


@dataclass
class Stop:
    """Whether a stop was asked for; set by signals."""

    asked: int = 0

    def check(self) -> None:
        """Stop here, if that was asked for."""
        if self.asked:
            raise Stopped


@dataclass
class Told:
    """What a crew reports while it works; every field is called in the parent.

    Args:
        progress: bytes done since the last call, tensor.
        result: a task and what it gave.
        tick: about twice a second.
    """

    progress: Callable[[int, str], None]
    result: Callable[[Task, dict[str, Any]], None]
    tick: Callable[[], None] = lambda: None
    peaks: list[int] = field(default_factory=list)  # anonymous memory of each worker at its highest [bytes]


@contextlib.contextmanager
def signals(stop: Stop) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP ask for a stop; a second SIGINT interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop.asked += 1
        if stop.asked > 1 and number == signal.SIGINT:
            raise KeyboardInterrupt

    before = {n: signal.getsignal(n) for n in _SIGNALS}
    for number, old in before.items():
        if old is not signal.SIG_IGN:  # under nohup a closed terminal stops nothing
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def share_out(tasks: Sequence[Task], workers: int) -> list[list[Task]]:
    """Tasks of each worker: the largest first, each to the one that has least; the same for the same tasks."""
    lists: list[list[Task]] = [[] for _ in range(max(1, min(workers, len(tasks))))]
    loads = [0] * len(lists)
    for task in sorted(tasks, key=lambda t: (-t.size, t.kind, t.number)):
        least = loads.index(min(loads))
        lists[least].append(task)
        loads[least] += max(1, task.size)
    return lists


def run(
    tasks: Sequence[Task], workers: int, do: Callable[[Task, Tell], dict[str, Any]], told: Told, stop: Stop
) -> None:
    """Do all tasks.

    Raises:
        Stopped: a stop was asked for.
        CptError, OSError: what a task raised; others are stopped after their block.
    """
    if not tasks:
        return
    lists = share_out(tasks, workers)
    if len(lists) == 1:
        _alone(lists[0], do, told, stop)
    else:
        _Crew(lists, do, told, stop).work()


def anonymous_memory() -> int:
    """Memory of this process that no file backs [bytes]; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def _alone(tasks: Sequence[Task], do: Callable[[Task, Tell], dict[str, Any]], told: Told, stop: Stop) -> None:
    peak = 0
    last = 0.0

    def tell(size: int, label: str) -> None:
        nonlocal peak, last
        told.progress(size, label)
        if time.monotonic() - last > 0.5:
            last = time.monotonic()
            peak = max(peak, anonymous_memory())
            told.tick()
        stop.check()

    try:
        for task in tasks:
            stop.check()
            told.result(task, do(task, tell))
            peak = max(peak, anonymous_memory())
    finally:
        told.peaks.append(peak)


class _Crew:
    """Several workers and what comes through their pipes."""

    def __init__(
        self, lists: list[list[Task]], do: Callable[[Task, Tell], dict[str, Any]], told: Told, stop: Stop
    ) -> None:
        self.lists, self.do, self.told, self.stop = lists, do, told, stop
        self.pids: dict[int, int] = {}  # pipe → worker
        self.rest: dict[int, bytes] = {}
        self.ended: set[int] = set()  # pipes whose worker said that it is done
        self.error: BaseException | None = None
        self.asked = False

    def work(self) -> None:
        gc.freeze()  # the collector would touch, and so copy, every page in every worker
        try:
            with selectors.DefaultSelector() as selector:
                for tasks in self.lists:
                    self._fork(tasks)
                for pipe in self.pids:
                    selector.register(pipe, selectors.EVENT_READ)
                self._listen(selector)
        finally:
            gc.unfreeze()
            self._end_all()
        if self.error is not None:
            raise self.error
        if self.stop.asked:
            raise Stopped

    def _fork(self, tasks: list[Task]) -> None:
        parent = os.getpid()
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal between fork and the worker's own handlers must not run the parent's handler in the worker.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                for pipe in (reading, *self.pids):
                    os.close(pipe)
                _worker(parent, writing, tasks, self.do)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.close(writing)
        self.pids[reading] = pid
        self.rest[reading] = b""

    def _listen(self, selector: selectors.BaseSelector) -> None:
        while selector.get_map():
            for key, _ in selector.select(timeout=0.5):
                pipe = key.fd
                data = os.read(pipe, 1 << 16)
                if data:
                    self._take(pipe, data)
                else:
                    selector.unregister(pipe)
                    self._gone(pipe)
            self.told.tick()
            if (self.stop.asked or self.error is not None) and not self.asked:
                self.asked = True
                for pid in self.pids.values():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)

    def _take(self, pipe: int, data: bytes) -> None:
        *lines, self.rest[pipe] = (self.rest[pipe] + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "progress" in message:
                self.told.progress(message["progress"], message["label"])
            elif "task" in message:
                self.told.result(Task(*message["task"]), message["result"])
            elif "error" in message:
                self.error = self.error or _error(message["error"])
            else:
                self.ended.add(pipe)
                self.told.peaks.append(message["peak"])

    def _gone(self, pipe: int) -> None:
        """A worker's pipe is closed: it has ended, well or not."""
        _, status = os.waitpid(self.pids[pipe], 0)
        os.close(pipe)
        del self.pids[pipe]
        if pipe not in self.ended and self.error is None:
            code = os.waitstatus_to_exitcode(status)
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            hints = (
                ["the kernel kills so when memory runs out: try fewer `--workers`"] if code == -signal.SIGKILL else []
            )
            self.error = StageFailed(f"a worker {how}", *hints, "the same command goes on with what is finished")

    def _end_all(self) -> None:
        for pipe, pid in list(self.pids.items()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
            os.close(pipe)
        self.pids.clear()


def _worker(parent: int, pipe: int, tasks: list[Task], do: Callable[[Task, Tell], dict[str, Any]]) -> NoReturn:
    code = 1
    try:
        processes.die_with_parent(parent)
        stop = Stop()

        def handle(number: int, frame: FrameType | None) -> None:
            stop.asked += 1

        signal.signal(signal.SIGTERM, handle)
        for number in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to all; the parent decides
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        code = _tasks(pipe, tasks, do, stop)
    except BaseException:
        with contextlib.suppress(BaseException):
            _say(pipe, {"error": {"bug": traceback.format_exc()}})
    finally:
        os._exit(code)  # not sys.exit: that would run the parent's exit handlers a second time


def _tasks(pipe: int, tasks: list[Task], do: Callable[[Task, Tell], dict[str, Any]], stop: Stop) -> int:
    peak = waiting = 0
    last = 0.0

    def tell(size: int, label: str) -> None:
        nonlocal peak, waiting, last
        waiting += size
        now = time.monotonic()
        if now - last > _TELL_SECONDS:
            peak = max(peak, anonymous_memory())
            _say(pipe, {"progress": waiting, "label": label})
            waiting, last = 0, now
        stop.check()

    try:
        for task in tasks:
            stop.check()
            result = do(task, tell)
            peak = max(peak, anonymous_memory())
            _say(pipe, {"progress": waiting, "label": ""})
            waiting = 0
            _say(pipe, {"task": [task.kind, task.number, task.size], "result": result})
    except Stopped:
        pass
    except (CptError, OSError) as error:
        _say(pipe, {"error": _error_json(error)})
    _say(pipe, {"peak": peak})
    return 0


def _say(pipe: int, value: Any) -> None:
    data = memoryview(json.dumps(value).encode() + b"\n")
    while len(data):
        data = data[os.write(pipe, data) :]


def _error_json(error: CptError | OSError) -> dict[str, Any]:
    if isinstance(error, OSError):
        return {"errno": error.errno, "text": error.strerror, "file": str(error.filename)}
    return {
        "class": type(error).__name__,
        "message": error.message,
        "hints": list(error.hints),
        "more": [_error_json(e) for e in error.more],
    }


def _error(value: dict[str, Any]) -> BaseException:
    if "bug" in value:
        return RuntimeError(f"in a worker:\n{value['bug']}")
    if "errno" in value:
        return OSError(value["errno"], value["text"], value["file"])
    more = tuple(e for e in map(_error, value["more"]) if isinstance(e, CptError))
    return _KNOWN.get(value["class"], CptError)(value["message"], *value["hints"], more=more)
