"""One run from start to end: prepare data, make the final plan, then every stage that is not done, in order.

    plan ─▶ prepare tokenizer and corpora ─▶ the plan again, by content hashes ─▶ run folder, lock
        ─▶ for each stage: decide (keep, re-use, run, refuse) ─▶ attempt ─▶ ranks ─▶ state
           │                                                 └─ with a queue: a script, sent as a job (`send`)
           └─ behind a law: the plan again, with the values that the law gives

A second call does only what is not done, and says why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt.base import lock
from cpt.base.errors import DONE, GUARD, SAVED, CptError, EnvironmentProblem, GuardStop, StoppedAndSaved, UsageError
from cpt.base.events import Event, stage_events
from cpt.base.files import read_json, write_json
from cpt.launch import Direct, Launch, Work, launcher_of
from cpt.launch.batch import Batch, Sent, read_sent
from cpt.plan.types import RunPlan, StagePlan
from cpt.stages import again, decide, law_values, parents, record, reuse, send, state
from cpt.stages import attempt as attempts
from cpt.stages.decide import Decision
from cpt.stages.follow import Stop, follow
from cpt.stages.guard import guard_text
from cpt.stages.prepare import Prepared, prepare

# Makes the plan again: with the laws of these folders, by law stage; None = with those that lie among the runs.
Rebuild = Callable[[Mapping[str, Path] | None], RunPlan]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the command behaves, apart from what the recipe says.

    Args:
        command: as typed, for records and for the hint that goes on.
        cwd: where it was typed.
        environ: the environment that ranks get.
        fresh: start again in a new folder.
        accept_changes: go on with unfinished stages under a changed plan.
        wait: the caller waits for jobs, so that those of this very plan that are in the queue already will do.
    """

    command: Sequence[str]
    cwd: Path
    environ: Mapping[str, str]
    fresh: bool = False
    accept_changes: bool = False
    wait: bool = False
    clock: Callable[[], float] = time.time


@dataclass
class Result:
    """How a run ended. `error` is what the command ends with, None when everything is done.

    Args:
        sent: jobs by stage, where a queue does the work.
    """

    run_dir: Path
    plan: RunPlan
    decisions: list[Decision] = field(default_factory=list)
    error: CptError | None = None
    sent: dict[str, tuple[Sent, ...]] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        return self.error.exit_code if self.error else DONE


def run(
    plan: RunPlan,
    rebuild: Rebuild,
    settings: Settings,
    tell: Callable[[Event], None],
    started: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Do what is not done yet.

    Args:
        plan: may hold estimates of corpora that are not prepared yet.
        rebuild: makes the plan again once data is prepared, and once a law is there.
        tell: takes every event: the run's own, and those of stages with `stage` added. Its errors never stop a run.
        started: called once the run folder is known and locked.

    Raises:
        CptError: before anything ran: wrong input, a folder that holds another plan, a lock that is held.
    """
    with Stop() as stop:
        diary = _Diary(settings, tell)
        _ask_queue(plan, settings)
        try:
            plan, prepared = _prepare(plan, rebuild, diary)
        except KeyboardInterrupt:
            raise StoppedAndSaved(
                "stopped while preparing data", f"`{shlex.join(settings.command)}` goes on with what is missing"
            ) from None
        plan, run_dir = choose_folder(plan, settings)
        is_new = not (run_dir / "plan.json").exists()
        held, dead = lock.take(run_dir, lock.holder_of(os.getpid(), shlex.join(settings.command)))
        stop.gentle = True
        works_here = False
        try:
            # Looked at again under the lock: another process may have made the folder meanwhile.
            _refuse_other_plan(plan, run_dir, settings)
            if settings.wait and _has_jobs_of(plan, run_dir):
                diary.note(f"jobs of `{run_dir}` are in the queue; this waits for them")
                return Result(run_dir, plan, sent=read_sent(run_dir))
            send.refuse_active(run_dir)
            works_here = True
            (run_dir / attempts.STOP_FILE).unlink(missing_ok=True)
            environment = record.environment(settings.cwd, settings.environ, settings.clock())
            changes = reuse.changes_by_stage(plan, run_dir)
            _write_records(plan, run_dir, prepared, settings, environment)
            diary.open(run_dir)
            diary.write("run_start", command=shlex.join(settings.command), plan_id=plan.id, run=str(run_dir))
            if dead is not None:
                diary.note(f"took over the run from {dead.text()}, which is gone")
            result = Result(run_dir, plan)
            started(result)
            try:
                _Stages(result, rebuild, settings, diary, stop, held, environment, changes).all()
            except CptError as error:
                result.error = error
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                result.error = _disk_full(run_dir, settings)
            diary.write("run_end", exit_code=result.exit_code, reason=result.error.message if result.error else "done")
            if is_new and result.error is not None and _is_for_nothing(result):
                shutil.rmtree(run_dir)
                raise result.error
            return result
        finally:
            if works_here:  # else it may tell the jobs that are in the queue to stop
                (run_dir / attempts.STOP_FILE).unlink(missing_ok=True)
            held.release()


def _ask_queue(plan: RunPlan, settings: Settings) -> None:
    """Whether a queue would take the jobs of the stages that are not done, before anything is prepared or written."""
    launcher = launcher_of(plan.launcher)
    if not isinstance(launcher, Batch):
        return
    run_dir = Path(plan.runs) / plan.name
    if not settings.fresh and send.is_in_queue(run_dir):
        return  # there is an answer for that
    asked: dict[int, Work] = {}  # one stage of each size
    for name, stage in plan.stages.items():
        if settings.fresh or state.read(attempts.stage_dir(run_dir, name)).status != state.DONE:
            work = attempts.work_of(stage, run_dir, settings.cwd)
            asked.setdefault(work.world_size, work)
    for work in asked.values():
        launcher.check(work)


def _has_jobs_of(plan: RunPlan, run_dir: Path) -> bool:
    """Whether a queue has jobs of a run that were sent for this very plan."""
    return send.is_in_queue(run_dir) and attempts.read_plan(run_dir).id == plan.id


def _is_for_nothing(result: Result) -> bool:
    """Whether a new run has reached no queue: its folder holds nothing but copies of what was typed."""
    return (
        isinstance(launcher_of(result.plan.launcher), Batch)
        and result.plan.tracking.get("wandb", "off") == "off"  # whose process may write there still
        and not read_sent(result.run_dir)
        and not any(attempts.attempts(attempts.stage_dir(result.run_dir, name)) for name in result.plan.stages)
    )


def _disk_full(run_dir: Path, settings: Settings) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"no space left on the disk of `{run_dir}`",
        f"checkpoints saved before are whole; free some space, then `{shlex.join(settings.command)}` goes on",
    )


def _prepare(plan: RunPlan, rebuild: Rebuild, diary: _Diary) -> tuple[RunPlan, Prepared]:
    prepared = prepare(plan, diary.write)
    plan = rebuild(None)
    unpinned = [n for n, s in plan.sources.items() if n in prepared.corpora and (s.facts is None or s.facts.estimated)]
    assert not unpinned, f"prepared sources are not known to the plan: {unpinned}"
    return plan, prepared


def choose_folder(plan: RunPlan, settings: Settings) -> tuple[RunPlan, Path]:
    """The run folder of a plan; with `fresh` a new one, numbered.

    Raises:
        UsageError: the folder holds another plan and `accept_changes` is not set, or is no run folder at all.
    """
    folder = Path(plan.runs) / plan.name
    if settings.fresh and folder.exists():
        number = 2
        while (Path(plan.runs) / f"{plan.name}-{number}").exists():
            number += 1
        plan = dataclasses.replace(plan, name=f"{plan.name}-{number}")
        return plan, Path(plan.runs) / plan.name
    # Empty folders do not count: a rank of a run that was deleted may still have made them.
    files = (p.name for p in folder.rglob("*") if not p.is_dir())
    if not (folder / "plan.json").exists() and any(name not in (lock.NAME, f".{lock.NAME}") for name in files):
        raise UsageError(f"`{folder}` exists and is not a run folder", "choose another `name`")
    _refuse_other_plan(plan, folder, settings)
    return plan, folder


def _refuse_other_plan(plan: RunPlan, run_dir: Path, settings: Settings) -> None:
    """The folder's finished stages must agree with the plan, and its unfinished ones unless changes are accepted."""
    if not (run_dir / "plan.json").exists():
        return
    old = attempts.read_plan(run_dir)
    if old.id == plan.id:
        return
    changes = decide.changes(old, plan)[:20]
    done = [n for n in old.stages if state.read(attempts.stage_dir(run_dir, n)).status == state.DONE]
    broken = [n for n in done if n not in plan.stages or plan.stages[n].fingerprint != old.stages[n].fingerprint]
    if broken:
        raise UsageError(
            f"`{run_dir}` holds another plan, under which {_names(broken)} finished",
            *changes,
            "choose another `name`, or `--fresh` to start again in a new folder",
        )
    if not settings.accept_changes:
        raise UsageError(
            f"`{run_dir}` holds another plan",
            *changes,
            "`--accept-changes` goes on with the new one in unfinished stages, `--fresh` starts again in a new folder",
        )


def _refuse_too_far(stage: StagePlan, folder: Path) -> None:
    """A changed plan may end a stage before where it already is."""
    newest, _ = parents.store.newest_whole(folder / "checkpoints")
    step = int(newest.name.removeprefix("iter_")) if newest else 0
    train = stage.train
    if train is not None and step > train.steps:
        raise UsageError(
            f"stage `{stage.name}` is saved at step {step:,}, and the new plan ends it at step {train.steps:,}",
            f"`stages.{stage.name}.tokens` of at least {step * train.global_batch_size * train.seq_length:,} goes on, "
            "`--fresh` starts again in a new folder",
        )


def _names(names: Sequence[str]) -> str:
    return ("stage " if len(names) == 1 else "stages ") + ", ".join(f"`{n}`" for n in names)


def _write_records(
    plan: RunPlan, run_dir: Path, prepared: Prepared, settings: Settings, environment: Mapping[str, Any]
) -> None:
    record.write_plan(run_dir, plan)
    record.write_command(run_dir, settings.command, settings.clock())
    record.write_environment(run_dir, environment)
    attempts.write_prepared(run_dir, prepared.corpora, prepared.tokenizer)


def plan_with_laws(plan: RunPlan, run_dir: Path, rebuild: Rebuild, laws: Mapping[str, Path], command: str) -> RunPlan:
    """Make the plan again with what laws give, and write it.

    Args:
        laws: folders of law stages that are done, by stage.

    Raises:
        UsageError: what the plan is made from has changed meanwhile.
    """
    made = rebuild(laws)
    if made.id != plan.id:
        raise UsageError(
            "the data or the base checkpoint have changed since the run began", f"`{command}` says what differs"
        )
    made = dataclasses.replace(made, name=plan.name)
    record.write_plan(run_dir, made)
    return made


class _Diary:
    """The run's own events: to the display at once, to `events.jsonl` as soon as there is a run folder."""

    def __init__(self, settings: Settings, tell: Callable[[Event], None]) -> None:
        self._clock = settings.clock
        self._tell = tell
        self._run_dir: Path | None = None
        self._early: list[Event] = []

    def open(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        for event in self._early:
            record.write_event(run_dir, event)
        self._early.clear()

    def write(self, kind: str, **fields: Any) -> None:
        event: Event = {"t": round(self._clock(), 3), "kind": kind, **fields}
        if self._run_dir is not None:
            # A full disk is told where it stops the work, not by the diary.
            with contextlib.suppress(OSError):
                record.write_event(self._run_dir, event)
        elif kind != "data" or fields.get("done"):  # progress of a preparation is for the display alone
            self._early.append(event)
        self.tell(event)

    def note(self, text: str) -> None:
        self.write("note", text=text)

    def tell(self, event: Event) -> None:
        """Show an event. A display that fails (a closed terminal) is left alone: the run goes on."""
        try:
            self._tell(event)
        except Exception as error:
            self._tell = lambda event: None
            if self._run_dir is not None:
                text = f"the display failed and is off: {type(error).__name__}: {error}"
                self.write("warning", text=text)


class _Stages:
    """The stages of one run, one after the other."""

    def __init__(
        self,
        result: Result,
        rebuild: Rebuild,
        settings: Settings,
        diary: _Diary,
        stop: Stop,
        held: lock.Lock,
        environment: Mapping[str, Any],
        changes: Mapping[str, Sequence[str]],
    ) -> None:
        self.result = result
        self.plan, self.run_dir = result.plan, result.run_dir
        self.rebuild = rebuild
        self.laws: dict[str, Path] = {}  # folders of the law stages that are done
        self.settings, self.diary, self.stop, self.held = settings, diary, stop, held
        self.environment = environment
        self.changes = changes
        self.launcher = launcher_of(self.plan.launcher)
        self.to_send: list[StagePlan] = []
        self.is_fresh = settings.fresh or record.is_fresh(self.run_dir)
        self.first: dict[str, int] = {}  # by stage the first attempt of this command
        self.again = shlex.join(settings.command)
        self.latest: dict[str, Any] = {
            "run": self.plan.name,
            "plan_id": self.plan.id,
            "status": "running",
            "reason": "",
            "stage": None,
            "attempt": None,
            "stages": {},
            "step": None,
        }
        self._written = 0.0

    def all(self) -> None:
        """Raises a `CptError` for every end but "all done"."""
        try:
            for name in list(self.plan.stages):
                self._one(self.plan.stages[name])
                if self.plan.stages[name].kind == "law" and not self.to_send:
                    self._take_law(name)
            if self.to_send:
                self._send()
                return
        except CptError as error:
            self._snapshot(status={SAVED: "saved", GUARD: "guard"}.get(error.exit_code, "failed"), reason=error.message)
            raise
        except BaseException as error:
            self._snapshot(status="failed", reason=f"{type(error).__name__}: {error}")
            raise
        self._snapshot(status="done")

    def _one(self, stage: StagePlan) -> None:
        folder = attempts.stage_dir(self.run_dir, stage.name)
        if stage.assumed and not self.to_send:
            raise law_values.refusal(self.plan, stage, self.run_dir)
        decision = self._decide(stage, folder)
        self.result.decisions.append(decision)
        if decision.action == decide.REFUSE:
            raise self._refusal(stage, decision)
        if decision.action == decide.REUSE and decision.reference is not None:
            reused = attempts.with_reference(state.read(folder), stage.fingerprint, decision.reference, decision.why)
            state.write(folder, reused)
        if decision.action != decide.RUN:
            self._mark(stage, state.DONE, decision.why)
            return
        _refuse_too_far(stage, folder)
        if self.stop.asked:
            raise StoppedAndSaved(f"stopped before stage `{stage.name}`", f"`{self.again}` goes on")
        state_before = state.read(folder)
        if state_before.status == state.DONE:  # its result is gone
            state.write(folder, dataclasses.replace(state_before, status=state.PENDING, reference=None))
        if isinstance(self.launcher, Batch):
            self._mark(stage, state.PENDING, decision.why)
            self.to_send.append(stage)
            return
        self._mark(stage, state.RUNNING, decision.why)
        while not self._attempt(stage):
            pass

    def _send(self) -> None:
        """Hand what is to be done to the queue."""
        assert isinstance(self.launcher, Batch)
        works = {stage.name: self._work(stage) for stage in self.to_send}
        self.result.sent = send.send(self.plan, self.launcher, works, self.diary.write)
        self._snapshot(status="sent")

    def _take_law(self, law: str) -> None:
        """Make and write the plan again with what a law gives; one that must not be used leaves it as it is."""
        self.laws[law] = state.home(attempts.stage_dir(self.run_dir, law))
        if not law_values.users(self.plan, law):
            return
        self.plan = self.result.plan = plan_with_laws(self.plan, self.run_dir, self.rebuild, self.laws, self.again)
        values, _ = law_values.result(self.laws[law])
        if values:
            self.diary.note(law_values.taken(self.plan, law, values))

    def _decide(self, stage: StagePlan, folder: Path) -> Decision:
        found = state.read(folder)
        newest, _ = parents.store.newest_whole(folder / "checkpoints")
        done_home = state.home(folder)
        own = found.status == state.DONE or self.is_fresh
        alike = None if own else reuse.find(self.plan, stage, self.run_dir)
        nearest = reuse.Nearest(changed=tuple(self.changes.get(stage.name, ())))
        if found.status == state.PENDING and not nearest.changed and alike is None:
            nearest = reuse.nearest_run(self.plan, stage, self.run_dir)
        return decide.decide(
            stage,
            decide.Found(
                state=found,
                missing=parents.missing_result(stage, done_home, deep=self._is_wanted(stage))
                if found.status == state.DONE
                else None,
                step=int(newest.name.removeprefix("iter_")) if newest else None,
                alike=alike,
                changed=nearest.changed,
                than=nearest.run,
                parent_changed=nearest.parent_changed,
            ),
        )

    def _is_wanted(self, stage: StagePlan) -> bool:
        """Whether another stage is still to start from the end of this one."""
        for child in self.plan.stages.values():
            folder = attempts.stage_dir(self.run_dir, child.name)
            if child.parent == stage.name and state.read(folder).status != state.DONE:
                newest, _ = parents.store.newest_whole(folder / "checkpoints")
                if newest is None:
                    return True
        return False

    def _refusal(self, stage: StagePlan, decision: Decision) -> CptError:
        message = f"stage `{stage.name}` {decision.why}"
        if "guard" in decision.why:
            return GuardStop(
                message,
                f"`stages.{stage.name}.stop_if=null` or a higher `loss_rises` goes on",
            )
        return UsageError(message, "choose another `name`, or `--fresh` to start again in a new folder")

    def _attempt(self, stage: StagePlan) -> bool:
        """One attempt; whether it ended the stage. False = it failed for a fault of the machine and is to be repeated.

        Raises:
            CptError: it ended in another way than done.
        """
        assert isinstance(self.launcher, Direct)
        holder = lock.holder_of(os.getpid(), self.again)
        attempt = attempts.begin(self.run_dir, stage.name, holder)
        record.write_environment(attempt.folder, self.environment)
        launch = self._launch(attempt)
        killed = False
        code = 1
        try:
            self.launcher.write_script(launch)
            self.latest |= {"stage": stage.name, "attempt": attempt.job.attempt, "step": None}
            self._snapshot()
            ranks = self.launcher.start(launch, self.settings.environ)
            code, killed = follow(
                ranks,
                attempt.folder / "events.jsonl",
                (self.held, attempt.lock),
                self.run_dir,
                self.stop,
                lambda event: self._told(stage, attempt.job.attempt, event),
                self.diary.note,
            )
        finally:
            code = attempts.finish(attempt, code, now=killed)
        first = self.first.setdefault(stage.name, attempt.job.attempt)
        verdict, why = attempts.verdict_on(attempt, code, self.launcher, asked=self.stop.asked, first=first)
        if verdict == again.REPEAT:
            ended = state.read(attempt.stage_dir)
            self._mark(stage, ended.status, ended.reason)
            self.diary.note(f"stage `{stage.name}` is tried again: {ended.reason}")
            return False
        if why:
            self.diary.note(f"stage `{stage.name}` is {why}")
        self._conclude(stage, attempt, code)
        return True

    def _launch(self, attempt: attempts.Attempt) -> Launch:
        return Launch(**vars(self._work(attempt.stage)), attempt_dir=attempt.folder)

    def _work(self, stage: StagePlan) -> Work:
        return attempts.work_of(stage, self.run_dir, self.settings.cwd)

    def _conclude(self, stage: StagePlan, attempt: attempts.Attempt, code: int) -> None:
        ended = state.read(attempt.stage_dir)
        self._mark(stage, ended.status, ended.reason)
        if code == DONE:
            return
        if code == SAVED:
            raise StoppedAndSaved(f"stage `{stage.name}` {ended.reason}", f"`{self.again}` goes on")
        if code == GUARD:
            seen = [event for event in stage_events(attempt.stage_dir) if event.get("kind") == "guard"]
            what = f": {guard_text(seen[-1])}" if seen else ""
            raise GuardStop(
                f"stage `{stage.name}` was ended by its guard `stop_if` at step {ended.step:,}{what}",
                f"the checkpoint is kept in `{attempt.stage_dir / 'checkpoints'}`",
                "later stages were not started",
            )
        raise attempts.failure_error(attempt.folder, stage, self.again)

    def _mark(self, stage: StagePlan, status: str, why: str) -> None:
        """Say and note how far a stage is."""
        found = state.read(attempts.stage_dir(self.run_dir, stage.name))
        entry = {
            "status": status,
            "reason": why,
            "step": found.step,
            "steps": stage.train.steps if stage.train else None,
        }
        self.latest["stages"][stage.name] = entry
        self.diary.write("stage", stage=stage.name, status=status, reason=why)
        self._snapshot()

    def _told(self, stage: StagePlan, attempt: int, event: Event) -> None:
        self.diary.tell({**event, "stage": stage.name, "attempt": attempt})
        if event.get("kind") == "step":
            self.latest["step"] = {k: v for k, v in event.items() if k not in ("t", "kind")}
            self.latest["stages"][stage.name]["step"] = event.get("step")
            if time.monotonic() - self._written > 1.0:
                self._snapshot()

    def _snapshot(self, **fields: Any) -> None:
        """Write `latest.json`. A full disk must not end a run for the sake of a snapshot."""
        self._written = time.monotonic()
        self.latest |= fields
        try:
            write_json(self.run_dir / "latest.json", {"updated": self.settings.clock(), **self.latest})
        except OSError:
            return


def read_latest(run_dir: Path) -> dict[str, Any]:
    """The snapshot of a run."""
    return dict(read_json(run_dir / "latest.json"))
