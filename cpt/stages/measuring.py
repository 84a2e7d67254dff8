"""What the stages that only measure share: ranks, an engine without optimizer, the log, stops."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt.base import pulse
from cpt.launch.heartbeat import collective_seconds, hang_after
from cpt.plan.model import ModelConfig, Parallel
from cpt.plan.types import Job

if TYPE_CHECKING:
    from cpt.data.validation import ValidSet
    from cpt.engine.megatron import Engine
    from cpt.engine.ports import Reporter


@dataclass(frozen=True)
class Measuring:
    """One rank of a stage that measures.

    Args:
        engine: the model; its weights are not loaded yet.
        report: writes events, on rank 0 alone.
        start: when the stage began [unix seconds].
        stopped: whether the ranks have agreed to stop. Collective.
        dp_rank: of this rank.
    """

    engine: Engine
    report: Reporter
    start: float
    stopped: Callable[[], bool]
    dp_rank: int

    def measure(self, sets: Mapping[str, ValidSet], micro_batch_size: int, **fields: Any) -> bool:
        """Losses of the loaded weights as an `eval` event with these fields; False after a stop. Collective."""
        from cpt.engine.evaluate import validation_losses

        pulse.current.say(pulse.EVAL, 0)
        begun = self.report.clock()
        found = validation_losses(
            self.engine, sets, micro_batch_size=micro_batch_size, dp_rank=self.dp_rank, stopped=self.stopped
        )
        if found is None:
            self.report("stop", reason="a stop was asked for during an evaluation", step=0)
            return False
        self.report("eval", **fields, losses=found, seconds=round(self.report.clock() - begun, 3))
        return True

    def end(self) -> None:
        """Write that the stage is done."""
        self.report("stage_end", step=0, tokens=0, seconds=round(self.report.clock() - self.start, 3))


@contextmanager
def measuring(job: Job, model: ModelConfig, layout: Parallel, precision: str) -> Iterator[Measuring]:
    """Join the ranks, begin the log, build the model; leave the ranks at the end."""
    from cpt.engine import distributed, megatron
    from cpt.engine.signals import StopFlag
    from cpt.stages.attempt import stop_asked
    from cpt.stages.train import reporter

    stop = StopFlag(stop_at=job.stop_at, watch=lambda: stop_asked(Path(job.run_dir)))
    stop.install()
    rank, world_size, local_rank = distributed.place()
    wait = collective_seconds(hang_after(os.environ))
    distributed.init(layout, rank, world_size, local_rank, collective_s=wait)
    try:
        attempt = Path(job.run_dir) / "stages" / job.stage / f"attempt_{job.attempt}"
        report = reporter(attempt / "events.jsonl", rank)
        start = report.clock()
        report(
            "stage_start",
            stage=job.stage,
            attempt=job.attempt,
            step=0,
            tokens=0,
            steps=0,
            world_size=world_size,
            tp=layout.tp,
            pp=layout.pp,
            dp=layout.dp,
            parent=job.parent,
            resumed=False,
        )
        engine = megatron.build(model, layout, precision=precision, optimizer=None)
        yield Measuring(engine, report, start, stop.agreed, distributed.dp_rank())
    finally:
        distributed.shutdown()
