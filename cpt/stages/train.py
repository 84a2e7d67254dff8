"""A stage that trains: its parent's weights in, a checkpoint at its end. What one rank does.

1. join the other ranks, build the engine in the stage's layout
2. take weights and whatever else is kept: from the stage's own newest checkpoint, else from its parent
3. `engine.loop` until the end, a stop, a guard or a rollback (then back to 2, leaving out the samples that led there)
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt.base import pulse
from cpt.base.errors import DONE, GUARD, SAVED, StageFailed
from cpt.base.events import EventLog
from cpt.base.files import read_json, write_json
from cpt.base.lock import Fence
from cpt.launch.heartbeat import collective_seconds, hang_after
from cpt.plan.types import Job, RunPlan, StagePlan, Train
from cpt.stages import STAGES, StageKind

if TYPE_CHECKING:
    from cpt.checkpoint.store import StageStore
    from cpt.engine.ports import Engine, Progress, Reporter
    from cpt.engine.signals import StopFlag

SKIPS = "skip_steps.json"  # of a stage: steps (from 0) whose samples are left out, and the step of the spike behind


@STAGES.add("train")
@dataclass(frozen=True, kw_only=True)
class TrainStage(StageKind):
    """Continue pretraining on a mixture of sources."""

    @classmethod
    def work(cls, plan: RunPlan, job: Job) -> int:
        """Train on this rank; 0 done, 75 saved with more to do, 4 ended by a guard."""
        from cpt.engine import distributed
        from cpt.engine.signals import StopFlag
        from cpt.stages.attempt import stop_asked

        stage = plan.stages[job.stage]
        assert stage.train is not None and plan.model_of(stage) is not None
        stop = StopFlag(stop_at=job.stop_at, watch=lambda: stop_asked(Path(job.run_dir)))
        stop.install()
        rank, world_size, local_rank = distributed.place()
        wait = collective_seconds(hang_after(os.environ))
        layout, seed = stage.train.parallel, stage.train.seed
        distributed.init(layout, rank, world_size, local_rank, seed=seed, collective_s=wait)
        try:
            return _Rank(plan, job, stage, stage.train, rank, stop).run()
        finally:
            distributed.shutdown()


class _Rank:
    """One rank's part of an attempt."""

    def __init__(self, plan: RunPlan, job: Job, stage: StagePlan, train: Train, rank: int, stop: StopFlag) -> None:
        from cpt.data.corpus import Corpus

        self.plan, self.job, self.stage, self.train, self.rank, self.stop = plan, job, stage, train, rank, stop
        self.stage_dir = Path(job.run_dir) / "stages" / job.stage
        self.report = reporter(self.stage_dir / f"attempt_{job.attempt}" / "events.jsonl", rank)
        self.corpora = {name: Corpus.open(folder) for name, folder in job.corpora.items()}
        self.store = self._open_store()
        self.skips = _read_skips(self.stage_dir)

    def run(self) -> int:
        """Train until something ends it."""
        outcome = self._loop(self.job.resume, first=True)
        while outcome == "rollback":
            newest = self.store.newest_whole()  # all that are newer than where it goes back to are gone
            outcome = self._loop(str(newest) if newest else None, first=False)
        return {"done": DONE, "saved": SAVED, "guard": GUARD}[outcome]

    def _open_store(self) -> StageStore:
        from cpt.checkpoint.manifest import Origin
        from cpt.checkpoint.store import StageStore

        parent = {"path": self.job.parent, "identity": _identity(self.plan, self.job)} if self.job.parent else None
        origin = Origin(
            stage=self.job.stage,
            fingerprint=self.stage.fingerprint,
            plan_id=self.plan.id,
            tokenizer_hash=self.plan.tokenizer.hash,
            parent=parent,
            attempt=self.job.attempt,
        )
        return StageStore(
            self.stage_dir,
            self.train.saving,
            origin=origin,
            keep_steps=self.stage.keep_steps,
            fence=Fence(self.stage_dir, self.job.fence) if self.job.fence is not None else None,
            warn=lambda text: self.report("warning", text=text, step=0),
        )

    def _loop(self, resume: str | None, *, first: bool) -> str:
        """Build, load and train; on a rollback prepare the next turn."""
        from cpt import schedules
        from cpt.checkpoint.ranks import Ranks
        from cpt.data.stream import Stream
        from cpt.engine import distributed, megatron
        from cpt.engine.loop import Loop

        train = self.train
        model = self.plan.model_of(self.stage)
        assert model is not None
        engine = megatron.build(
            model,
            train.parallel,
            precision=train.precision,
            optimizer=train.optimizer,
            recompute=train.recompute,
            seed=train.seed,
        )
        progress = self._load(engine, resume)
        methods = _make_methods(train, progress)
        for method in methods:
            method.start(engine, train)
        if first:
            self._report_start(progress, resume is not None)
        loop = Loop(
            engine=engine,
            train=train,
            stream=Stream(train, self.plan.data, self.corpora, progress.cursors or None),
            valid=valid_sets(self.corpora, train.evaluate.sources, train.seq_length, train.evaluate.tokens, self.plan),
            progress=progress,
            curve=schedules.curve(train.lr),
            saver=self.store,
            report=self.report,
            stop=self.stop,
            dp_rank=distributed.dp_rank(),
            methods=methods,
            skip_steps=self.skips,
            keep_steps=self.stage.keep_steps,
            imported=self._is_imported() and resume is None,
        )
        started = self.report.clock()
        outcome = loop.run()
        if outcome == "rollback":
            step, why = loop.rollback_step, loop.rollback_reason
            self.skips = Ranks().on_first(lambda: self._roll_back(step, why))
        elif outcome == "done":
            self.report(
                "stage_end",
                step=progress.step,
                tokens=progress.tokens,
                seconds=round(self.report.clock() - started, 3),
            )
        # A rollback builds anew: this engine must be gone by then.
        del loop, engine
        gc.collect()
        return outcome

    def _roll_back(self, step: int, reason: str) -> dict[int, int]:
        """Steps that are left out from now on; checkpoints with weights that are not wanted are removed.

        Args:
            step: whose loss is a spike, counted from 0.
        """
        from cpt.checkpoint import store
        from cpt.engine import anomalies

        rules, skips = self.train.anomalies, dict(self.skips)
        times = len(set(skips.values()))
        if times >= rules.max_skips:
            raise StageFailed(
                f"step {step + 1}: {reason}; the run was rolled back {times} times already",
                "a lower lr, or a look at the data around these steps, is the usual cure",
            )
        there = dict(store.steps(self.stage_dir / "checkpoints"))
        whole = [s for s, folder in there.items() if store.is_whole(folder)]
        back, first = anomalies.roll_back(step, whole, skips, rules.window)
        if self.job.fence is not None:
            Fence(self.stage_dir, self.job.fence).check()
        # First these: whoever is killed here goes on from the same checkpoint, meets the same spike and does the same.
        for newer in sorted((s for s in there if s > back), reverse=True):
            store.remove(there[newer])
        skips = dict.fromkeys(range(first, step + 1), step + 1) | skips
        write_json(self.stage_dir / SKIPS, {str(s): spike for s, spike in sorted(skips.items())})
        samples = f"step {step + 1}" if first == step else f"steps {first + 1} to {step + 1}"
        text = f"step {step + 1}: {reason}; back to step {back}, without the samples of {samples}"
        self.report("warning", step=step + 1, text=text)
        return skips

    def _is_imported(self) -> bool:
        """Whether the weights came from another program's checkpoint, as it was or converted."""
        parent = self.job.parent
        if self.job.start == "hf" or parent is None:
            return self.job.start == "hf"
        return any(Path(parent).is_relative_to(folder) for folder in self.plan.conversions)

    def _load(self, engine: Engine, resume: str | None) -> Progress:
        """Weights and the rest of the state, and how far the stage is."""
        from cpt.checkpoint import native
        from cpt.engine.ports import Progress

        def warn(text: str) -> None:
            self.report("warning", text=text, step=0)

        pulse.current.say(pulse.LOAD, int(Path(resume).name.removeprefix("iter_")) if resume is not None else 0)
        if resume is not None:
            return native.load(engine, resume, warn=warn)
        if self.job.start == "scratch":
            return Progress()
        assert self.job.parent is not None
        if self.job.start == "hf":
            from cpt.checkpoint import hf

            hf.load(engine, self.job.parent)
            return Progress()
        return begin(native.load(engine, self.job.parent, keep=self.stage.keep, warn=warn), self.stage.keep)

    def _report_start(self, progress: Progress, resumed: bool) -> None:
        layout = self.train.parallel
        self.report(
            "stage_start",
            stage=self.job.stage,
            attempt=self.job.attempt,
            step=progress.step,
            tokens=self.train.tokens,
            steps=self.train.steps,
            world_size=layout.world_size,
            tp=layout.tp,
            pp=layout.pp,
            dp=layout.dp,
            parent=self.job.parent,
            resumed=resumed,
        )


def begin(parent: Progress, keep: tuple[str, ...]) -> Progress:
    """How far a new stage is, given its parent's progress and what is kept of it."""
    from cpt.data import stream
    from cpt.engine.ports import Progress

    return Progress(
        run_step=parent.run_step if "lr" in keep else 0,
        run_tokens=parent.run_tokens,
        cursors=stream.carry(parent.cursors) if "cursor" in keep else {},
        lr=parent.lr if "lr" in keep else {},
    )


def reporter(path: Path, rank: int) -> Reporter:
    """Writes events on rank 0 and nothing on the others."""
    return _Reporter(EventLog(path) if rank == 0 else None)


class _Reporter:
    def __init__(self, log: EventLog | None) -> None:
        import time

        self.log = log
        self.clock = time.time

    def __call__(self, kind: str, **fields: Any) -> None:
        if self.log is not None:
            self.log.write(kind, **fields)


def valid_sets(
    corpora: Mapping[str, Any], sources: tuple[str, ...], seq_length: int, tokens: int, plan: RunPlan
) -> dict[str, Any]:
    """The held-out set of each source that is measured."""
    from cpt.data.validation import ValidSet

    return {name: ValidSet(corpora[name], seq_length, tokens, plan.data) for name in sources}


def _identity(plan: RunPlan, job: Job) -> str:
    """Content identity of what the stage starts from."""
    from cpt.checkpoint import manifest

    if job.start == "native" and job.parent is not None and (Path(job.parent) / manifest.NAME).is_file():
        return manifest.read(job.parent).identity
    return plan.base.identity


def _make_methods(train: Train, progress: Progress) -> list[Any]:
    """The stage's methods in the plan's order, with their saved state."""
    from cpt.methods import METHODS

    methods = [METHODS.get(name)(**options) for name, options in train.methods.items()]
    for method in methods:
        method.load_state(progress.methods.get(type(method).__name__, {}))
    return methods


def _read_skips(stage_dir: Path) -> dict[int, int]:
    try:
        return {int(step): int(spike) for step, spike in read_json(stage_dir / SKIPS).items()}
    except FileNotFoundError:
        return {}
