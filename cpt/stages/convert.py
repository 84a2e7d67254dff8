"""A stage that turns its parent into another format: for other programs, or a Hugging Face folder into one of ours.

{kind: convert, from: anneal, to: hf}                 stages/<stage>/hf: for AutoModelForCausalLM and AutoTokenizer
{kind: convert, from: base, to: native}               stages/<stage>/checkpoints/iter_0000000
{kind: convert, from: anneal, to: megatron, tp: 2}    stages/<stage>/megatron: Megatron's files for each rank
{kind: convert, from: anneal, to: atom}               stages/<stage>/atom: each tensor by itself

What `cpt convert-ckpt` can do besides is done with it: `cpt convert-ckpt RUN/stages/<stage> OUT --to ...`.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cpt.base.errors import DONE, UsageError
from cpt.base.events import EventLog
from cpt.base.files import fsync_folder
from cpt.base.lock import Fence
from cpt.plan.types import Job, RunPlan
from cpt.stages import STAGES, StageKind

FORMATS = ("hf", "native", "megatron", "atom")


@STAGES.add("convert")
@dataclass(frozen=True, kw_only=True)
class Convert(StageKind):
    """Write the parent checkpoint in another format.

    Args:
        to: `hf`, `native`, `megatron` or `atom`.
        dtype: `fp32`, `bf16` or `fp16` for a Hugging Face folder; `auto` is that of the base, or fp32.
        tp: tensor ranks of `megatron`, 1 by default.
        pp: pipeline ranks of `megatron`, 1 by default.
        weights_only: `megatron` and `atom` are written without Adam's state.
    """

    modules: ClassVar[tuple[str, ...]] = ()  # one rank, and an export needs no Megatron

    to: str = "hf"
    dtype: str = "auto"
    tp: int | None = None
    pp: int | None = None
    weights_only: bool = False

    def __post_init__(self) -> None:
        from cpt.base.registry import unknown

        if self.to not in FORMATS:
            raise unknown("format", self.to, FORMATS)
        if self.dtype not in ("auto", "fp32", "bf16", "fp16"):
            raise unknown("dtype", self.dtype, ("auto", "fp32", "bf16", "fp16"))
        if self.to != "megatron" and (self.tp, self.pp) != (None, None):
            raise UsageError(f"`tp` and `pp` are ranks of `to: megatron`, and this is `to: {self.to}`")
        if self.to != "hf" and self.dtype != "auto":
            raise UsageError(f"`dtype` is of `to: hf`, and this is `to: {self.to}`")
        for name, ranks in (("tp", self.tp), ("pp", self.pp)):
            if ranks is not None and ranks < 1:
                raise UsageError(f"`{name}` is {ranks}, wanted at least 1")

    @classmethod
    def work(cls, plan: RunPlan, job: Job) -> int:
        """Convert on one rank. The result appears whole or not at all."""
        stage = plan.stages[job.stage]
        options = cls(**stage.options)
        stage_dir = Path(job.run_dir) / "stages" / job.stage
        log = EventLog(stage_dir / f"attempt_{job.attempt}" / "events.jsonl")
        start = log.clock()
        log.write(
            "stage_start", stage=job.stage, attempt=job.attempt, step=0, steps=0, parent=job.parent, resumed=False
        )
        if job.parent is None:
            raise UsageError(f"stage `{job.stage}` has nothing to convert: the run starts from scratch")
        if options.to == "hf":
            path = _to_hf(plan, job, stage_dir, options.dtype)
        elif options.to == "native":
            path = _to_native(plan, job, stage_dir)
        else:
            path = _to_other(job, stage_dir, options)
        log.write("save", step=0, path=str(path), seconds=round(log.clock() - start, 3), phase="end")
        log.write("stage_end", step=0, tokens=0, seconds=round(log.clock() - start, 3))
        return DONE


def _to_hf(plan: RunPlan, job: Job, stage_dir: Path, dtype: str) -> Path:
    target, half_done = stage_dir / "hf", stage_dir / ".hf.writing"
    shutil.rmtree(half_done, ignore_errors=True)
    assert job.parent is not None
    from cpt.checkpoint import export

    export.to_hf(job.parent, half_done, dtype=dtype, tokenizer=job.tokenizer)
    if target.exists():  # of an earlier attempt that was killed just before it was recorded
        shutil.rmtree(target)
    os.rename(half_done, target)
    fsync_folder(stage_dir)
    return target


def _to_other(job: Job, stage_dir: Path, options: Convert) -> Path:
    """Killed, the next attempt goes on with it."""
    from cpt.checkpoint.content import Layout
    from cpt.checkpoint.formats import Writing
    from cpt.checkpoint.job import place
    from cpt.checkpoint.job.convert import convert
    from cpt.checkpoint.job.planning import Request, Running, plan

    assert job.parent is not None
    layout = Layout(tp=options.tp or 1, pp=options.pp or 1)
    writing = Writing(layout=layout, optimizer="none" if options.weights_only else None)
    out = stage_dir / options.to
    request = Request(source=Path(job.parent), out=out, to=options.to, writing=writing)
    made = plan(request)
    place.clear_other(made)  # of an attempt with other options
    convert(made, Running(), command=f"stage {job.stage}")
    return out


def _to_native(plan: RunPlan, job: Job, stage_dir: Path) -> Path:
    from cpt.checkpoint import hf
    from cpt.checkpoint.manifest import Origin
    from cpt.checkpoint.store import StageStore
    from cpt.engine import distributed, megatron
    from cpt.engine.ports import Progress
    from cpt.plan.model import Parallel
    from cpt.plan.types import Saving

    if job.start != "hf":
        raise UsageError(f"stage `{job.stage}` converts to native, but `{job.parent}` is native already")
    model = plan.model_of(plan.stages[job.stage])
    assert model is not None and job.parent is not None
    layout = Parallel(distributed_optimizer=False)
    distributed.init(layout, int(os.environ.get("RANK", "0")), 1)
    try:
        engine = megatron.build(model, layout, precision="fp32", optimizer=None, seed=0)
        hf.load(engine, job.parent)
        origin = Origin(
            stage=job.stage,
            fingerprint=plan.stages[job.stage].fingerprint,
            plan_id=plan.id,
            tokenizer_hash=plan.tokenizer.hash,
            parent={"path": job.parent, "identity": plan.base.identity},
            attempt=job.attempt,
        )
        fence = Fence(stage_dir, job.fence) if job.fence is not None else None
        saver = StageStore(stage_dir, Saving(), origin=origin, fence=fence)
        return saver.save(engine, Progress(), phase="end")
    finally:
        distributed.shutdown()
