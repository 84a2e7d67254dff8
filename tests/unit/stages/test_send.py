"""What of a chain stays in the queue when it cannot be sent as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cpt.base.errors import CptError, EnvironmentProblem, UsageError
from cpt.launch import Work, batch
from cpt.launch.batch import JobState, Order
from cpt.launch.slurm.options import Slurm
from cpt.stages import send
from cpt.stages.attempt import work_of
from tests.unit.stages import plans


@dataclass(frozen=True, kw_only=True)
class Queue(Slurm):
    """Slurm's options and scripts, with a queue that stops answering after some jobs."""

    error: CptError = field(default_factory=lambda: UsageError("refused"))
    takes: int = 3
    there: list[str] = field(default_factory=list)

    def submit(self, order: Order) -> str:
        if len(self.there) >= self.takes:
            raise self.error
        self.there.append(str(len(self.there) + 1))
        return self.there[-1]

    def cancel(self, ids: Sequence[str]) -> None:
        for id in ids:
            self.there.remove(id)


def test_a_proxy_that_is_done_leaves_the_successors_of_the_others_in_the_queue(tmp_path: Path) -> None:
    plan = plans.plan(plans.stage("a"), plans.stage("b"), plans.stage("c", "b"), runs=str(tmp_path))
    for stage, ids in {"a": ("1_0", "2_0"), "b": ("1_1", "2_1"), "c": ("3", "4")}.items():
        for id in ids:
            batch.note_sent(tmp_path, stage, batch.Sent(id=id, token=f"{stage}{id}", script="", log=""))
    queue = Queue(there=["2_0", "2_1", "3", "4"])
    send.cancel_useless(plan, tmp_path, "a", "1_0", queue, is_done=True)
    assert queue.there == ["2_1", "3", "4"]
    send.cancel_useless(plan, tmp_path, "b", "1_1", queue, is_done=False)
    assert queue.there == []


@pytest.mark.parametrize("takes", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("error", [UsageError("refused"), EnvironmentProblem("no answer")])
def test_a_chain_with_successors_is_taken_back_as_a_whole(tmp_path: Path, takes: int, error: CptError) -> None:
    stages = [plans.stage("a"), plans.stage("b", "a")]
    plan = plans.plan(*stages, runs=str(tmp_path))
    works: dict[str, Work] = {s.name: work_of(s, tmp_path / "it", tmp_path) for s in stages}
    for work in works.values():
        (work.run_dir / "stages" / work.stage).mkdir(parents=True)
    queue = Queue(requeue=False, successors=2, takes=takes, error=error)
    with pytest.raises(type(error)):
        send.send(plan, queue, works, lambda kind, **fields: None)
    assert queue.there == []
    unanswered = [job for jobs in batch.read_sent(tmp_path / "it").values() for job in jobs if not job.id]
    assert len(unanswered) == (0 if isinstance(error, UsageError) else 1), "it may be there all the same"


@pytest.mark.parametrize(
    ("others", "holds"),
    [
        ([], True),
        ([JobState(id="2", state=batch.PENDING, reason="Dependency")], True),
        ([JobState(id="2", state=batch.DONE)], True),
        ([JobState(id="2", state=batch.RUNNING)], False),
        ([JobState(id="2", state=batch.PENDING, reason="BeginTime")], False),
        ([JobState(id="2", state=batch.PENDING, reason="Resources")], False),
        ([JobState(id="2", state=batch.UNKNOWN)], False),
    ],
)
def test_a_wait_ends_when_no_job_that_is_left_can_start(others: list[JobState], holds: bool) -> None:
    stuck = JobState(id="1", state=batch.PENDING, reason="PartitionTimeLimit", stuck=True)
    found = send.what_holds_all({job.id: job for job in [*others, stuck]})
    assert (found == stuck) is holds
    assert send.what_holds_all({job.id: job for job in others}) is None
