"""Tokenising processes and the order of their answers.

Each process is a fresh interpreter (no fork: the caller may hold threads or a GPU; no `spawn`: that would import the
caller's main file again). It holds one piece at a time and is replaced when it grew too large. Answers come in the
order of the pieces, whatever the number of processes.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path

from cpt.base.errors import CptError, EnvironmentProblem
from cpt.data.pieces import Piece
from cpt.data.worker import Encoded, Task, Tokeniser

Work = tuple[Piece, bool, bool | None]

_START = "import sys; sys.path.append({root!r}); from cpt.data.worker import main; main(int(sys.argv[1]))"


def encode_pieces(task: Task, work: Iterable[Work], workers: int) -> Iterator[Encoded]:
    """Encode pieces, in order. With `workers` 0 in this process."""
    if workers < 1:
        tokeniser = Tokeniser(task)
        for piece, first, held_out in work:
            yield tokeniser.encode(piece, first, held_out)
        return
    with contextlib.closing(_Pool(task, workers)) as pool:
        yield from pool.run(iter(work))


class _Process:
    def __init__(self, task: Task) -> None:
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).resolve().parents[2])
        command = [sys.executable, "-c", _START.format(root=root), str(theirs.fileno())]
        env = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with theirs:
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=env
            )
        self.connection = Connection(ours.detach())
        self.number: int | None = None  # of the piece that it is at
        self.connection.send(task)

    def end(self, kill: bool = False) -> None:
        self.connection.close()
        if kill:
            self.process.kill()
        self.process.wait()


class _Pool:
    def __init__(self, task: Task, workers: int) -> None:
        self._task = task
        self._size = workers
        self._processes: list[_Process] = []

    def run(self, work: Iterator[Work]) -> Iterator[Encoded]:
        done: dict[int, Encoded] = {}
        sent = given = 0
        more = True
        while True:
            # The window bounds what waits for a slow piece before it.
            while more and sent - given < 3 * self._size and (process := self._idle()):
                item = next(work, None)
                if item is None:
                    more = False
                else:
                    process.number = sent
                    sent += 1
                    self._send(process, item)
            while given in done:
                yield done.pop(given)
                given += 1
            if not more and given == sent:
                return
            if any(process.number is not None for process in self._processes):
                self._receive(done)

    def _idle(self) -> _Process | None:
        """A process without a piece; a new one while there are fewer than wanted."""
        for process in self._processes:
            if process.number is None:
                return process
        if len(self._processes) < self._size:
            self._processes.append(_Process(self._task))
            return self._processes[-1]
        return None

    def _send(self, process: _Process, item: Work) -> None:
        try:
            process.connection.send(item)
        except OSError:
            raise self._died(process) from None

    def _receive(self, done: dict[int, Encoded]) -> None:
        """Take in the answers that are there, at least one."""
        busy = {p.connection: p for p in self._processes if p.number is not None}
        for connection in wait(list(busy)):
            process = busy[connection]  # type: ignore[index]
            try:
                answer, leaves = process.connection.recv()
            except (EOFError, OSError):
                raise self._died(process) from None
            if isinstance(answer, CptError):
                raise answer
            assert process.number is not None
            done[process.number] = answer
            process.number = None
            if leaves:
                self._processes.remove(process)
                process.end()

    def _died(self, process: _Process) -> EnvironmentProblem:
        code = process.process.wait()
        why = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        hint = "the machine may be out of memory; fewer `workers` need less"
        return EnvironmentProblem(f"a tokenising process died ({why})", hint)

    def close(self) -> None:
        for process in self._processes:
            process.end(kill=True)
        self._processes.clear()
