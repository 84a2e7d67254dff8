"""Runs a function on real gloo ranks. torch and Megatron-core are imported once per test session, in a process that the
ranks are forked from, so that four ranks start in about a second.

    run_ranks(4, function, *args)                     environment of a rank is set (RANK, WORLD_SIZE, MASTER_ADDR, ...)
    run_ranks(Parallel(tp=2, pp=2), function, *args)  the engine's process groups are up as well

gives the list of what `function(*args)` returned on each rank. The function lives at the top level of a module that can
be imported, arguments and results can be pickled. Every call forks fresh ranks: nothing leaks from test to test, and
every call may have another layout. When a rank fails, the others are ended and `RankFailed` shows its traceback.
No process is left: ranks end their children, and all of them die with the process that called, however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import multiprocessing
import multiprocessing.connection
import multiprocessing.managers
import os
import pickle
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from cpt.plan.model import Parallel

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.dist.preload"])
_PR_SET_PDEATHSIG = 1


class RankFailed(Exception):
    """A rank raised, died or did not end in time. The message holds its traceback."""


def run_ranks(
    layout: int | Parallel, function: Callable[..., Any], *args: Any, timeout: float = 300.0, seed: int = 1234
) -> list[Any]:
    """What `function(*args)` returns on each rank, by rank.

    Args:
        layout: number of ranks, or a layout whose process groups are to be set up around the call.
        timeout: for all ranks together [s].
        seed: of the ranks' random states.

    Raises:
        RankFailed: with the traceback of the first rank that failed.
    """
    ranks = layout if isinstance(layout, int) else layout.world_size
    port = free_port()
    children, pipes = [], []
    for rank in range(ranks):
        ours, theirs = _context.Pipe(duplex=False)
        # Pickled here, so that a function that cannot be found fails in the rank with its traceback.
        call = pickle.dumps((function, args))
        child = _context.Process(target=_rank, args=(theirs, rank, ranks, port, layout, seed, call, sys.path))
        child.start()
        theirs.close()
        children.append(child)
        pipes.append(ours)
    results: dict[int, Any] = {}
    try:
        deadline = time.monotonic() + timeout
        while len(results) < ranks:
            waiting = [pipes[r] for r in range(ranks) if r not in results]
            ready = multiprocessing.connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = [r for r in range(ranks) if r not in results]
                raise RankFailed(f"ranks {late} did not end within {timeout:.0f} s")
            for pipe in ready:
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    done, value = pickle.loads(pipes[rank].recv_bytes())  # noqa: S301 - our own child
                except EOFError:
                    children[rank].join(5)
                    raise RankFailed(f"rank {rank} died, exit code {children[rank].exitcode}") from None
                if not done:
                    raise RankFailed(f"rank {rank} of {ranks}:\n{value}")
                results[rank] = value
        for child in children:
            child.join(10)
        return [results[r] for r in range(ranks)]
    finally:
        for child in children:
            if child.is_alive():
                child.kill()
            child.join()
        for pipe in pipes:
            pipe.close()


def free_port() -> int:
    """A port that nobody listens on just now, below those that the kernel gives to outgoing connections.

    One of the kernel's own choice would often be taken by somebody's connection before rank 0 listens on it.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, so that no rank outlives a broken test run."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _die_with_caller() -> None:
    """End this rank when the process that called `run_ranks` ends.

    The kernel's own signal comes from the server that ranks are forked from, and that lives as long as any rank does.
    """
    caller = multiprocessing.parent_process()
    assert caller is not None

    def wait() -> None:
        multiprocessing.connection.wait([caller.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def end_children() -> None:
    """Kill this process's own children: megatron-core never ends the manager through which its writers answer."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join()


def _managers_die_with_parent() -> None:
    """Let managers that this process starts end with it, even where it is killed and cannot end them itself."""
    start: Any = multiprocessing.managers.BaseManager.start
    bound: Any = functools.partialmethod(start, initializer=die_with_parent)
    multiprocessing.managers.BaseManager.start = bound  # type: ignore[method-assign]


def _rank(
    pipe: Any, rank: int, ranks: int, port: int, layout: int | Parallel, seed: int, call: bytes, path: list[str]
) -> None:
    die_with_parent()
    _die_with_caller()
    _managers_die_with_parent()
    sys.path[:] = path
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    try:
        import torch

        torch.set_num_threads(1)
        function, args = pickle.loads(call)  # noqa: S301 - our own parent
        if isinstance(layout, Parallel):
            from cpt.engine import distributed

            distributed.init(layout, rank, ranks, rank, seed=seed, timeout_s=120)
            result = function(*args)
            distributed.shutdown()
        else:
            result = function(*args)
        answer = (True, result)
    except BaseException:
        answer = (False, traceback.format_exc())
    end_children()
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()
    # A rank whose test failed may hold threads in a collective that never ends.
    os._exit(0 if answer[0] else 1)
