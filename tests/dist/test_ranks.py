"""The harness itself: real ranks, reported failures, nothing left behind."""

from __future__ import annotations

import os
import time

import pytest

from cpt.plan.types import Parallel
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
