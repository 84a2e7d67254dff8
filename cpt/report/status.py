"""Where a run stands now: what `cpt status` prints. Reads only the ends of event files: long runs answer at once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cpt.base import lock
from cpt.base.errors import CptError
from cpt.base.events import Event
from cpt.base.files import read_json
from cpt.launch import batch, launcher_of
from cpt.launch.batch import Batch, JobState, Sent
from cpt.plan.types import RunPlan
from cpt.report import show, wandb
from cpt.report.progress import StageNow
from cpt.report.runs import names
from cpt.report.table import aligned
from cpt.stages import send, state
from cpt.stages.attempt import attempts, read_plan, stop_asked

QUEUED, STUCK, STARTING, STOPPING, DEAD, CANCELLED = "queued", "stuck", "starting", "stopping", "dead", "cancelled"
MOST_WARNINGS = 3  # shown of a stage
TAIL_BYTES = 256 * 1024  # of each event file: some hundred steps


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    """One stage. Counts are of the stage; None = not known."""

    name: str
    kind: str
    status: str
    attempt: int
    step: int | None
    steps: int | None
    tokens: int | None
    total_tokens: int | None
    loss: float | None  # [nats/token]
    lr: float | None
    tokens_per_s: float | None
    seconds_left: float | None
    last_event: float | None  # [unix seconds]
    reason: str
    held_by: str | None  # the live process that works on it
    reused_from: str | None  # stage folder of another run
    losses: Mapping[str, float] = field(default_factory=dict)  # newest validation losses, by source [nats/token]
    group: str | None = None  # the law stage that it is a proxy of
    job: JobState | None = None  # what the queue says about its job
    warnings: tuple[str, ...] = ()  # and notes of its newest attempt while it is not done, newest last
    before: str | None = None  # what the attempt before this one failed with, while it is not done


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run and its stages."""

    name: str
    folder: str
    plan: str
    held_by: str | None
    seconds_left: float | None
    stages: tuple[StageStatus, ...]
    wandb: str | None = None  # why not all of it is at wandb
    is_offline: bool = False  # what wandb was told is in the run folder only
    unsent: str | None = None  # why the newest command sent nothing to the queue
    is_asked_to_stop: bool = False  # by `cpt cancel`


def read_status(folder: Path, jobs: Mapping[str, JobState] | None = None) -> RunStatus:
    """Where a run stands.

    Args:
        jobs: what the queue says about its jobs, by id; None = it is asked.

    Raises:
        UsageError: it is not a run folder, or its plan or a state is damaged.
    """
    plan = read_plan(folder)
    sent = batch.read_sent(folder)
    if jobs is None:
        jobs = _ask([folder])
    stages, left, rate = [], 0, None
    for name in plan.stages:
        found, now = _stage(plan, folder, name, sent.get(name, ()), jobs)
        stages.append(found)
        if found.status != state.DONE:
            left += (found.total_tokens or 0) - (found.tokens or 0)
        if found.held_by is not None and now.rate:
            rate = now.rate
    held = lock.live_holder(folder) if folder.is_dir() else None
    is_asked = stop_asked(folder)
    if is_asked:
        stages = [_asked_to_stop(s, state.read(folder / "stages" / s.name)) for s in stages]
    return RunStatus(
        name=plan.name,
        folder=str(folder),
        plan=plan.id,
        held_by=held.text() if held else None,
        seconds_left=left / rate if rate and not is_asked else None,
        is_asked_to_stop=is_asked,
        stages=tuple(_with_reasons(plan, stages)),
        wandb=wandb.read_state(folder / wandb.FOLDER).get("problem"),
        is_offline=wandb.is_only_here(folder),
        unsent=_unsent(plan, folder, stages),
    )


def _unsent(plan: RunPlan, folder: Path, stages: Sequence[StageStatus]) -> str | None:
    """Why the newest command sent nothing to the queue; None when it did, or when something happened since."""
    if not isinstance(launcher_of(plan.launcher), Batch):
        return None
    try:
        latest = read_json(folder / "latest.json")
        told = str(latest["reason"]) if latest["status"] == state.FAILED else None
        updated = float(latest["updated"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_over = all(s.held_by is None and not (s.job and s.job.state in batch.ACTIVE) for s in stages)
    is_newest = all(s.last_event is None or s.last_event <= updated for s in stages)
    return told if is_over and is_newest else None


def _ask(folders: Sequence[Path]) -> dict[str, JobState]:
    """What the queue says about the jobs of stages that are not done, of several runs at once."""
    ids: list[str] = []
    launcher: Batch | None = None
    for folder in folders:
        sent = batch.read_sent(folder)
        open_stages = [n for n in sent if state.read(folder / "stages" / n).status != state.DONE]
        if not open_stages:
            continue
        made = launcher_of(read_plan(folder).launcher)
        if isinstance(made, Batch):
            launcher = made
            ids += [job.id for n in open_stages for job in sent[n] if job.id]
    return launcher.ask(ids) if launcher is not None else {}


def _job(sent: Sequence[Sent], jobs: Mapping[str, JobState]) -> JobState | None:
    """The job that a stage is in: the one that is active, else the newest that is known."""
    known = [jobs[job.id] for job in sent if job.id in jobs]
    active = [j for j in known if j.state in batch.ACTIVE]
    return active[0] if active else known[-1] if known else None


def _status(said: state.State, job: JobState | None, is_held: bool) -> str:
    """A stage's state in one word, by its own record first and by the queue where that says more."""
    if said.status == state.DONE or is_held:
        return said.status
    if job is not None and job.state == batch.PENDING:
        return STUCK if job.stuck else QUEUED
    if job is not None and job.state in (batch.RUNNING, batch.ENDING):
        return STARTING if said.status != state.RUNNING else said.status
    if job is not None and job.state == batch.CANCELLED and said.status == state.PENDING:
        return CANCELLED
    if said.status == state.RUNNING and not (job is not None and job.state == batch.UNKNOWN):
        return DEAD
    return said.status


def _asked_to_stop(stage: StageStatus, said: state.State) -> StageStatus:
    """A stage of a run that was asked to stop: who works on it saves, and a job that starts now ends at once."""
    if stage.status == state.RUNNING and stage.held_by is not None:
        return dataclasses.replace(stage, status=STOPPING, seconds_left=None)
    return dataclasses.replace(stage, status=said.status) if stage.status == STARTING else stage


def _with_reasons(plan: RunPlan, stages: list[StageStatus]) -> list[StageStatus]:
    """Stages whose jobs were cancelled say which stage before them ended badly."""
    ended = {s.name: s for s in stages if s.status in (state.FAILED, state.SAVED, DEAD)}
    found = []
    for stage in stages:
        cause = next((n for n in ended if stage.name in send.behind(plan, n)), None)
        if stage.status == CANCELLED and not stage.reason and cause is not None:
            how = {state.SAVED: "was stopped", DEAD: "was cut off"}.get(ended[cause].status, "failed")
            stage = dataclasses.replace(stage, reason=f"left the queue because stage `{cause}` {how}")
        found.append(stage)
    return found


def _stage(
    plan: RunPlan, run: Path, name: str, sent: Sequence[Sent], jobs: Mapping[str, JobState]
) -> tuple[StageStatus, StageNow]:
    own = run / "stages" / name
    said, job = state.read(own), _job(sent, jobs)
    now = StageNow(plan=plan.stages[name])
    warned: dict[str, None] = {}
    for event in newest_events(state.home(own)):
        now.take(event)
        if event.get("kind") in ("warning", "note"):
            warned[_warning(event)] = None
    holder = lock.live_holder(own) if own.is_dir() else None
    if holder is not None and job is not None and holder.job == job.id and job.state == batch.PENDING:
        holder = None  # of an earlier start of the job, on a machine that was lost
    early = send.early_end(run, plan, name, jobs) if holder is None else None
    train = plan.stages[name].train
    done = said.status == state.DONE
    step, tokens = now.step if now.started else said.step, now.tokens
    if train and said.status == state.SAVED and said.step is not None:  # steps after the last save are gone
        step, tokens = said.step, said.step * train.global_batch_size * train.seq_length
    return StageStatus(
        name=name,
        kind=plan.stages[name].kind,
        status=state.FAILED if early is not None and early.is_known else _status(said, job, holder is not None),
        attempt=max(said.attempt, now.attempt),
        step=(train.steps if done else step) if train else None,
        steps=train.steps if train else None,
        tokens=(train.tokens if done else tokens) if train else None,
        total_tokens=train.tokens if train else None,
        loss=now.loss,
        lr=now.lr,
        tokens_per_s=now.tokens_per_s,
        seconds_left=0.0 if done else now.seconds_left if holder else None,
        last_event=now.last,
        reason=early.reason if early is not None else said.reason,
        held_by=holder.text() if holder else None,
        reused_from=said.reference,
        losses=dict(now.losses),
        group=plan.stages[name].group,
        job=job,
        warnings=() if done else tuple(warned),
        before=None if done else _failure(own / f"attempt_{said.attempt - 1}"),
    ), now


def _failure(attempt_dir: Path) -> str | None:
    try:
        return str(read_json(attempt_dir / "failure.json")["error"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _warning(event: Event) -> str:
    kind, text, step = event.get("kind"), str(event.get("text", "")), event.get("step")
    return f"{kind}: {text}" if not step or f"step {step}" in text else f"{kind}: at step {step}: {text}"


def newest_events(home: Path) -> Iterator[Event]:
    """The last events of the newest attempt of a stage that has any."""
    for folder in reversed(attempts(home)):
        found = list(tail(folder / "events.jsonl"))
        if found:
            yield from found
            return


def tail(path: Path, size: int = TAIL_BYTES) -> Iterator[Event]:
    """The whole event lines in the last bytes of a file, oldest first."""
    try:
        with open(path, "rb") as file:
            length = file.seek(0, 2)
            file.seek(max(0, length - size))
            data = file.read()
    except OSError:
        return
    lines = data.split(b"\n")
    for line in lines if length <= size else lines[1:]:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


@dataclass(frozen=True, kw_only=True)
class RunLine:
    """One run among others. `stage` is the one that is not done yet, else the last."""

    name: str
    folder: str
    state: str  # of the stage, or "damaged"
    stage: str | None
    step: int | None
    steps: int | None
    last_event: float  # [unix seconds]


def overview(runs: Path) -> list[RunLine]:
    """The runs of a folder, newest first."""
    folders = [runs / name for name in names(runs)]
    try:
        jobs = _ask(folders)
    except CptError:  # a damaged run; each line says its own
        jobs = {}
    return [_line(folder, jobs) for folder in folders]


def _line(folder: Path, jobs: Mapping[str, JobState]) -> RunLine:
    written = (folder / "plan.json").stat().st_mtime
    try:
        stages = read_status(folder, jobs).stages
    except CptError:
        stages = ()
    if not stages:
        common: dict[str, Any] = {"stage": None, "step": None, "steps": None}
        return RunLine(name=folder.name, folder=str(folder), state="damaged", last_event=written, **common)
    now = next((s for s in stages if s.status != state.DONE), stages[-1])
    return RunLine(
        name=folder.name,
        folder=str(folder),
        state=now.status,
        stage=now.name,
        step=now.step,
        steps=now.steps,
        last_event=max([written, *(s.last_event for s in stages if s.last_event)]),
    )


def overview_text(lines: list[RunLine], now: float) -> str:
    """As a table for a terminal.

    Args:
        now: present time [unix seconds].
    """
    rows = [
        [
            show.plain(line.name, 60),
            line.state,
            show.plain(line.stage or show.NOTHING, 40),
            f"{line.step or 0:,}/{line.steps:,}" if line.steps else show.NOTHING,
            show.ago(line.last_event, now),
        ]
        for line in lines
    ]
    return "\n".join(aligned([["run", "state", "stage", "step", "last event"], *rows], right=(3,))) + "\n"


def status_json(status: RunStatus) -> dict[str, Any]:
    """For `--json`."""
    return asdict(status)


def with_proxies_together(stages: Sequence[StageStatus]) -> list[StageStatus]:
    """The stages with the proxies of each law as one, which says how many are done and shows the one at work."""
    found: list[StageStatus] = []
    told: set[str] = set()
    for stage in stages:
        if stage.group is None:
            found.append(stage)
        elif stage.group not in told:
            told.add(stage.group)
            found.append(_together([s for s in stages if s.group == stage.group]))
    return found


def _together(proxies: list[StageStatus]) -> StageStatus:
    done = sum(s.status == state.DONE for s in proxies)
    at_work = next((s for s in proxies if s.status not in (state.DONE, state.PENDING)), None)
    started = [s for s in proxies if s.last_event is not None]
    shown = at_work or (started or proxies)[-1]
    left = [s.seconds_left for s in proxies if s.seconds_left]
    return dataclasses.replace(
        shown,
        name=f"{shown.group}: {done} of {len(proxies)} proxies",
        status=state.DONE if done == len(proxies) else at_work.status if at_work else state.PENDING,
        tokens=sum(s.tokens or 0 for s in proxies),
        total_tokens=sum(s.total_tokens or 0 for s in proxies),
        seconds_left=sum(left) if left else None,
        last_event=max((s.last_event for s in started if s.last_event), default=None),
    )


def status_text(status: RunStatus, now: float) -> str:
    """As a table for a terminal.

    Args:
        now: present time [unix seconds].
    """
    lines = [f"run     {show.plain(status.name)} · plan {status.plan[:6]}", f"folder  {show.plain(status.folder)}"]
    if status.held_by:
        lines.append(f"worked on by {show.plain(status.held_by)}")
    if status.seconds_left is not None:
        lines.append(f"left    about {show.show_duration(status.seconds_left)}")
    head = ["stage", "state", "step", "tokens", "loss", "lr", "tokens/s", "left", "last event"]
    rows = [
        [
            show.plain(s.name, 40),
            s.status,
            f"{s.step or 0:,}/{s.steps:,}" if s.steps else show.NOTHING,
            f"{show.show_count(s.tokens or 0)}/{show.show_count(s.total_tokens)}" if s.total_tokens else show.NOTHING,
            show.loss(s.loss),
            show.lr(s.lr),
            show.speed(s.tokens_per_s),
            show.show_duration(s.seconds_left) if s.seconds_left else show.NOTHING,
            show.ago(s.last_event, now),
        ]
        for s in with_proxies_together(status.stages)
    ]
    lines += ["", *aligned([head, *rows], right=(2, 3, 4, 5, 6, 7))]
    notes = []
    for s in status.stages:
        name = show.plain(s.name, 40)
        if s.group is not None and s.status == state.DONE:
            continue
        if s.kind == "evaluate" and s.losses:
            each = ", ".join(f"{show.plain(source, 40)} {show.loss(loss)}" for source, loss in s.losses.items())
            notes.append(f"{name}: validation loss {each} nats/token")
        if s.reused_from:
            notes.append(f"{name}: result of `{show.plain(s.reused_from)}` is used")
        if s.held_by:
            attempt = f", attempt {s.attempt}" if s.attempt > 1 else ""
            asked = ", asked to save and stop" if s.status == STOPPING else ""
            notes.append(f"{name}: worked on by {show.plain(s.held_by)}{attempt}{asked}")
        is_told = s.job is not None and s.reason.startswith(f"job {s.job.id} ended: ")
        ended_badly = s.status in (DEAD, state.FAILED) and not is_told
        if s.job is not None and (s.job.state in (*batch.ACTIVE, batch.UNKNOWN) or ended_badly):
            ends = status.is_asked_to_stop and s.status == QUEUED
            notes.append(f"{name}: {job_text(s.job)}" + ("; it ends at once when it starts" if ends else ""))
        if s.status == DEAD:
            again = f"`cpt resume {show.plain(status.name)}` goes on from its checkpoint"
            notes.append(f"{name}: nobody works on it any more; {again}")
        if s.before:
            notes.append(f"{name}: attempt {s.attempt - 1} ended: {show.plain(s.before)}")
        notes += [f"{name}: {show.plain(text)}" for text in s.warnings[-MOST_WARNINGS:]]
        if (older := len(s.warnings) - MOST_WARNINGS) > 0:
            notes.append(f"{name}: {older} older warning{'s' if older > 1 else ''}: `cpt report` shows all")
        if s.reason:
            notes.append(f"{name}: {show.plain(s.reason)}")
    if status.unsent:
        again = f"`cpt resume {show.plain(status.name)}` tries again"
        notes.append(f"nothing was sent to the queue: {show.plain(status.unsent)}; {again}")
    if status.wandb:
        later = wandb.LATER.replace("cpt sync", f"cpt sync {show.plain(status.name)}")
        notes.append(f"wandb failed: {show.plain(status.wandb)}; {later}")
    elif status.is_offline:
        notes.append(f"wandb is offline: `cpt sync {show.plain(status.name)}` sends what was written")
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def job_text(job: JobState) -> str:
    """What the queue says about a job, in one line."""
    name = f"job {job.id}"
    again = f", started again {job.restarts} time{'s' if job.restarts > 1 else ''}" if job.restarts else ""
    if job.stuck:
        return f"{name} {send.stuck_text(job)}"
    if job.state == batch.UNKNOWN:
        return f"{name}: the queue does not answer"
    if job.state == batch.GONE:
        return f"{name} is not in the queue any more"
    if job.state == batch.PENDING:
        return f"{name} waits in the queue" + (f" ({job.reason})" if job.reason else "") + again
    if job.state in (batch.RUNNING, batch.ENDING):
        where = f" on {show.plain(job.nodes)}" if job.nodes else ""
        left = f", {show.show_duration(job.seconds_left)} to its time limit" if job.seconds_left else ""
        return f"{name} {'runs' if job.state == batch.RUNNING else 'is ending'}{where}{left}{again}"
    return f"{name} ended: {job.word}" + (f" ({job.reason})" if job.reason and job.reason != "None" else "")
