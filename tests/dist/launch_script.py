"""Run as its own process by `test_launcher.py`: the parent of real ranks whose work is chosen by name."""

from __future__ import annotations

import datetime
import os
import signal
import sys
import time
from pathlib import Path

from cpt.base import processes
from cpt.launch import outcome
from cpt.launch.fork import run_ranks

folder = Path(sys.argv[1])
num_ranks = int(sys.argv[2])
what = sys.argv[3]


def rank() -> int:
    return int(os.environ["RANK"])


def meet() -> None:
    import torch
    import torch.distributed as dist

    os.environ.setdefault(
        "GLOO_SOCKET_IFNAME", "lo"
    )  # as `engine.distributed` does: the name of a host may lead nowhere
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    value = torch.ones(1) * rank()
    dist.all_reduce(value)
    print("sum", int(value), "threads", torch.get_num_threads(), flush=True)


def say_ready() -> None:
    (folder / f"ready_{rank()}").write_text(str(os.getpid()))


def work() -> int:
    processes.bind_children()
    meet()
    say_ready()
    if what == "meet":
        return 0
    if what == "one_raises":
        return fails_on(2)
    if what == "save_on_stop":
        return saves_on_stop()
    if what == "ignores_stop":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (folder / f"deaf_{rank()}").write_text("")
        time.sleep(600)
    if what == "helpers":
        has_helpers()
    import torch
    import torch.distributed as dist

    while True:  # as a training loop does
        dist.all_reduce(torch.ones(1))
        time.sleep(0.01)


def fails_on(which: int) -> int:
    import torch
    import torch.distributed as dist

    try:
        if rank() == which:
            raise ValueError("the first error")
        dist.all_reduce(torch.ones(1))  # the others lose touch with it
        dist.all_reduce(torch.ones(1))
    except BaseException as error:
        from cpt.launch.explain import explain

        outcome.write_record(folder, rank(), 1, explain(error))
        raise
    return 0


def saves_on_stop() -> int:
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    (folder / f"listening_{rank()}").write_text("")
    while not stopped:
        time.sleep(0.01)
    outcome.write_record(folder, rank(), 75)
    return 75


def has_helpers() -> None:
    """A manager process and a forked writer, as a checkpoint save starts them."""
    import multiprocessing

    child = os.fork()
    if child == 0:
        time.sleep(600)
    manager = multiprocessing.get_context("spawn").Manager()
    manager.Queue().put(1)
    (folder / f"helpers_{rank()}").write_text(f"{child} {manager._process.pid}")  # type: ignore[attr-defined]


if __name__ == "__mp_main__":
    processes.die_with_parent(os.getppid())

if __name__ == "__main__":
    # A lock that another thread holds at a fork stays taken in the rank for ever.
    os.register_at_fork(
        before=lambda: (folder / f"threads_{time.monotonic_ns()}").write_text(str(len(os.listdir("/proc/self/task"))))
    )
    modules = ["torch.distributed"] + (["megatron.core.models.gpt"] if what == "meet" else [])
    sys.exit(run_ranks(num_ranks, folder, work, modules))
