"""Kinds of stages, and the order in which a run does them. New kind = one file here + its import below.

A kind says how many ranks it needs and what a rank does. Its options are a frozen dataclass; heavy imports are inside
`work`, so that listing the kinds is free.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from cpt.base.registry import Registry
from cpt.plan.types import Job, RunPlan, StagePlan


class StageKind(ABC):
    """One kind of stage."""

    # What its ranks import; the parent of forked ranks imports it once for all of them.
    modules: ClassVar[tuple[str, ...]] = (
        "cpt.engine.megatron",
        "cpt.engine.loop",
        "cpt.checkpoint.native",
        "cpt.data.stream",
        "megatron.core.dist_checkpointing",
        "megatron.core.pipeline_parallel",
    )

    @classmethod
    def num_ranks(cls, stage: StagePlan) -> int:
        """Processes that do the work."""
        return stage.train.parallel.world_size if stage.train else 1

    @classmethod
    @abstractmethod
    def work(cls, plan: RunPlan, job: Job) -> int:
        """What one rank does; gives 0 done, 75 saved with more to do, 4 ended by a guard. An exception is a failure."""


STAGES: Registry[type[StageKind]] = Registry("stage kind")


# A kind registers itself when its file is read.
from cpt.stages import convert, evaluate, law, merged, train  # noqa: E402

__all__ = ["STAGES", "StageKind", "convert", "evaluate", "law", "merged", "train"]
