"""A job that ended before its stage began, or went on: no attempt has recorded how, and the queue's own word counts."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpt.base.errors import SAVED
from cpt.base.files import read_json
from cpt.launch import batch, launcher_of
from cpt.launch.batch import JobState, Sent
from cpt.plan.types import RunPlan
from cpt.stages import state
from cpt.stages.attempt import attempts, stage_dir, stop_asked
from cpt.stages.state import State

MOST_LINES, MOST_CHARACTERS, TAIL_BYTES = 3, 200, 4000  # of what a job printed last


@dataclass(frozen=True, kw_only=True)
class Early:
    """How a job ended without its stage.

    Args:
        reason: for people.
        is_known: the queue says how; else it has forgotten the job.
    """

    reason: str
    is_known: bool


def find(
    run_dir: Path, plan: RunPlan, name: str, sent: Sequence[Sent], found: Mapping[str, JobState], needs: Sequence[str]
) -> Early | None:
    """How the newest job of a stage ended, where the stage itself cannot say it.

    None where it is active or has done its part, was cancelled, or had to end because a stage before it is not done.

    Args:
        sent: the jobs of the stage, newest last.
        found: what the queue says, by id.
        needs: the stages that this one reads.
    """
    folder = stage_dir(run_dir, name)
    said = state.read(folder)
    known = [job for job in sent if job.id in found]
    if said.status == state.DONE or not known or any(found[job.id].state in batch.ACTIVE for job in known):
        return None
    job, now = known[-1], found[known[-1].id]
    if now.state in (batch.CANCELLED, batch.UNKNOWN) or stop_asked(run_dir):
        return None
    if any(state.read(stage_dir(run_dir, n)).status != state.DONE for n in needs) or _is_told(said, job):
        return None
    if (began := _has_begun(folder, job)) and not _went_wrong(said, now):
        return None
    what = "before the stage went on" if began else "before the stage began"
    return Early(reason=f"{_ended(now, what)}{_told(plan, job, now)}", is_known=now.state != batch.GONE)


def _is_told(said: State, job: Sent) -> bool:
    """Whether the job, or who waited for it, has written down itself why there is no attempt."""
    return said.status == state.FAILED and said.updated > job.time


def _has_begun(folder: Path, job: Sent) -> bool:
    """Whether an attempt is of a job."""
    for attempt in reversed(attempts(folder)):
        with contextlib.suppress(OSError, ValueError):
            if read_json(attempt / "job.json").get("queue_job") == job.id:
                return True
    return False


def _went_wrong(said: State, now: JobState) -> bool:
    """Whether a job that had saved was started again and ended badly before it went on."""
    return said.status == state.SAVED and now.state == batch.FAILED and now.reason != f"exit code {SAVED}"


def _ended(now: JobState, what: str) -> str:
    if now.state == batch.GONE:
        why = now.reason or "the queue forgets jobs some minutes after their end, and keeps no accounts here"
        return f"job {now.id} left the queue {what}, and how it ended cannot be told: {why}"
    return f"job {now.id} ended: {now.word}{f' ({now.reason})' if now.reason else ''} {what}"


def _told(plan: RunPlan, job: Sent, now: JobState) -> str:
    """What else helps: the last lines that the job printed, the lines that it runs first."""
    lines = [line.strip()[:MOST_CHARACTERS] for line in _tail(Path(job.log)) if line.strip()]
    parts = [now.hint] if now.hint else []
    parts.append(f"it printed last: {' / '.join(lines[-MOST_LINES:])}" if lines else "it printed nothing")
    if getattr(launcher_of(plan.launcher), "environment", ()):
        parts.append("`launcher.environment` runs first")
    return "".join(f"; {part}" for part in parts)


def _tail(path: Path) -> list[str]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
