"""The harness itself: real ranks, reported failures, nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cpt.base import processes
from cpt.plan.model import Parallel
from tests.dist.ranks import RankFailed, run_ranks


def total_of_ranks() -> tuple[int, float]:
    import torch
    import torch.distributed as dist

    value = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(value)
    return os.getpid(), value.item()


def groups() -> tuple[int, int, int]:
    from megatron.core import parallel_state as ps

    return (
        ps.get_tensor_model_parallel_rank(),
        ps.get_pipeline_model_parallel_rank(),
        ps.get_data_parallel_rank(),
    )


def fail_on_rank(rank: int) -> None:
    import torch.distributed as dist

    if int(os.environ["RANK"]) == rank:
        raise ValueError("the third rank is out of luck")
    dist.barrier()


def report_pid_and_wait(folder: str) -> None:
    rank = os.environ["RANK"]
    with open(os.path.join(folder, rank), "w") as file:
        file.write(str(os.getpid()))
    if rank == "0":
        time.sleep(0.5)
        os.kill(os.getpid(), 9)
    time.sleep(600)


def with_manager(folder: str, then: str) -> None:
    """As megatron-core does when it saves: a manager that nobody ends."""
    manager = multiprocessing.get_context("spawn").Manager()
    manager.Queue().put(1)
    pid = manager._process.pid  # type: ignore[attr-defined]
    with open(os.path.join(folder, f"manager_{os.environ['RANK']}"), "w") as file:
        file.write(f"{pid} {os.getpid()}")
    if then == "fail":
        raise ValueError("this rank fails")
    if then == "wait":
        time.sleep(600)


def written(folder: Path, ranks: int) -> list[int]:
    """Process ids that ranks wrote."""
    return [int(n) for rank in range(ranks) for n in (folder / f"manager_{rank}").read_text().split()]


def alive(pids: list[int]) -> list[int]:
    return [p for p in pids if processes.start_time(p) is not None]


def test_four_ranks_reduce_over_gloo() -> None:
    results = run_ranks(Parallel(dp=4), total_of_ranks)
    assert [value for _, value in results] == [6.0] * 4
    assert len({pid for pid, _ in results}) == 4


def test_every_call_may_have_another_layout() -> None:
    assert run_ranks(Parallel(tp=2, pp=2), groups) == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert run_ranks(Parallel(tp=1, pp=1, dp=3), groups) == [(0, 0, 0), (0, 0, 1), (0, 0, 2)]


def test_a_failing_rank_is_reported_with_its_traceback() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed, match=r"rank 2 of 3:(.|\n)*the third rank is out of luck"):
        run_ranks(Parallel(dp=3), fail_on_rank, 2)
    assert time.monotonic() - start < 60


def test_a_killed_rank_ends_the_others(tmp_path) -> None:
    with pytest.raises(RankFailed, match="rank 0 died"):
        run_ranks(2, report_pid_and_wait, str(tmp_path))
    assert not any(os.path.exists(f"/proc/{(tmp_path / rank).read_text()}") for rank in ("0", "1"))


def test_ranks_that_hang_are_ended_after_the_time_limit() -> None:
    with pytest.raises(RankFailed, match="did not end within 2 s"):
        run_ranks(1, time.sleep, 600, timeout=2)


@pytest.mark.parametrize("then", ["end", "fail"])
def test_managers_end_with_their_rank(then: str, tmp_path: Path) -> None:
    if then == "fail":
        with pytest.raises(RankFailed, match="this rank fails"):
            run_ranks(1, with_manager, str(tmp_path), then)
    else:
        run_ranks(2, with_manager, str(tmp_path), then)
    assert alive(written(tmp_path, 1 if then == "fail" else 2)) == []


def test_nothing_outlives_a_caller_that_is_killed(tmp_path: Path) -> None:
    call = f"ranks.run_ranks(2, test_ranks.with_manager, {str(tmp_path)!r}, 'wait')"
    code = f"from tests.dist import ranks, test_ranks; {call}"
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.iterdir())) < 2 or not all(p.read_text() for p in tmp_path.iterdir()):
            assert time.monotonic() < deadline and caller.poll() is None
            time.sleep(0.1)
        pids = [*written(tmp_path, 2), *(p.pid for p in psutil.Process(caller.pid).children(recursive=True))]
        assert len(alive(pids)) == len(pids) >= 4
    finally:
        caller.send_signal(signal.SIGKILL)
        caller.wait()
    deadline = time.monotonic() + 60
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive(pids) == []
