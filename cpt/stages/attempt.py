"""One attempt at a stage: what is found at its start, and what is recorded at its end. The same for every launcher.

    begin   take the stage's lock · check its parent's state · choose the checkpoint to go on from · write job.json
    (the launcher starts the ranks: python -m cpt.worker job.json)
    finish  read how the ranks ended · write state.json · give the lock back

`cpt run` calls both; a script calls them as `python -m cpt.stages.attempt begin RUN STAGE` and `... end JOB CODE`.
In a batch job the second also decides whether the job goes back into the queue (`again`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt.base import lock
from cpt.base.errors import DONE, FAILED, GUARD, SAVED, CptError, StageFailed, UsageError
from cpt.base.events import EventLog
from cpt.base.files import read_json, write_json
from cpt.base.records import from_json, to_json
from cpt.checkpoint import store
from cpt.launch import Launcher, Work, batch, launcher_of, outcome
from cpt.launch.batch import Batch, Inside
from cpt.launch.heartbeat import read_beats
from cpt.plan.types import Job, RunPlan, StagePlan
from cpt.stages import STAGES, again, parents, record, state
from cpt.stages.state import State

STOP_FILE = "stop"  # in a run's folder: whoever works on it saves and stops


@dataclass(frozen=True)
class Attempt:
    """An attempt that has begun."""

    plan: RunPlan
    stage: StagePlan
    job: Job
    folder: Path
    lock: lock.Lock
    notes: tuple[str, ...] = field(default=())

    @property
    def stage_dir(self) -> Path:
        return self.folder.parent

    @property
    def num_ranks(self) -> int:
        return STAGES.get(self.stage.kind).num_ranks(self.stage)


def read_plan(run_dir: Path) -> RunPlan:
    """The plan of a run folder.

    Raises:
        UsageError: it is missing or damaged.
    """
    path = run_dir / "plan.json"
    try:
        return from_json(RunPlan, read_json(path))
    except FileNotFoundError:
        raise UsageError(f"`{run_dir}` is not a run folder: it has no `plan.json`") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"`{path}` is damaged: {error}", "`--fresh` starts again in a new folder, as another `name=` does"
        ) from None


def work_of(stage: StagePlan, run_dir: Path, cwd: Path) -> Work:
    """A stage as launchers see it.

    Args:
        cwd: where the person typed the command.
    """
    train = stage.train
    layout = f"tp {train.parallel.tp}, pp {train.parallel.pp}, dp {train.parallel.dp}" if train else "one rank"
    ranks = STAGES.get(stage.kind).num_ranks(stage)
    return Work(run_dir=run_dir, stage=stage.name, world_size=ranks, layout=layout, python=sys.executable, cwd=cwd)


def read_job(job_path: Path) -> tuple[RunPlan, Job]:
    """The plan and the job of a `job.json`."""
    job = from_json(Job, read_json(job_path))
    return read_plan(Path(job.run_dir)), job


def stage_dir(run_dir: Path, name: str) -> Path:
    """A stage's folder."""
    return run_dir / "stages" / name


def attempts(folder: Path) -> list[Path]:
    """The attempts of a stage's folder, oldest first."""
    found = [(p.name.removeprefix("attempt_"), p) for p in folder.glob("attempt_*")]
    return [p for number, p in sorted((int(n), p) for n, p in found if n.isdigit())]


def begin(run_dir: Path, name: str, holder: lock.Holder, inside: Inside | None = None) -> Attempt:
    """Start a new attempt at a stage.

    Args:
        inside: the batch job that makes the attempt.

    Raises:
        UsageError: somebody else works on it, or its parent is not done.
    """
    plan = read_plan(run_dir)
    stage = plan.stages[name]
    folder = stage_dir(run_dir, name)
    held, dead = lock.take(folder, holder, is_gone=_is_gone(plan, inside))
    try:
        old = state.read(folder)
        notes = [f"took over stage `{name}` from {dead.text()}, which is gone"] if dead else []
        if dead is not None and inside is not None and (before := attempts(folder)):
            with contextlib.suppress(OSError):
                _name_lost(plan, before[-1], STAGES.get(stage.kind).num_ranks(stage), dead.host)
        start, parent = parents.resolve(plan, stage, run_dir)
        resume, skipped = store.newest_good(folder / "checkpoints")
        notes += [f"checkpoint `{path}` is passed over: {why}" for path, why in skipped]
        if resume is None and start == "native" and parent is not None:
            try:
                parents.refuse_damaged(plan, stage, parent, run_dir)
            except UsageError as error:
                if inside is not None:  # nobody sees what a job prints
                    reason = f"{error.message}; {error.hints[0]}"
                    state.write(
                        folder, dataclasses.replace(old, status=state.FAILED, reason=reason, updated=time.time())
                    )
                raise
        number = max([old.attempt, *(int(p.name.removeprefix("attempt_")) for p in attempts(folder))]) + 1
        attempt_dir = folder / f"attempt_{number}"
        (attempt_dir / "logs").mkdir(parents=True)
        prepared = read_prepared(run_dir)
        job = Job(
            run_dir=str(run_dir),
            stage=name,
            attempt=number,
            start=start,
            parent=str(parent) if parent else None,
            resume=str(resume) if resume else None,
            corpora=prepared["corpora"],
            tokenizer=prepared["tokenizer"],
            fence=held.holder.token,
            stop_at=inside.stop_at if inside else None,
            warned_from=inside.warned_from if inside else None,
            queue_job=inside.id if inside else None,
        )
        write_json(attempt_dir / "job.json", to_json(job))
        log = EventLog(attempt_dir / "events.jsonl")
        for text in notes:
            log.write("note", text=text)
        step = int(resume.name.removeprefix("iter_")) if resume else 0
        state.write(
            folder,
            State(status=state.RUNNING, attempt=number, step=step, fingerprint=stage.fingerprint, updated=time.time()),
        )
    except BaseException:
        held.release()
        raise
    return Attempt(plan, stage, job, attempt_dir, held, tuple(notes))


def _is_gone(plan: RunPlan, inside: Inside | None) -> Callable[[lock.Holder], bool]:
    """Whether the batch job that holds a lock has ended: an earlier start of this job has, the queue knows others."""
    launcher = launcher_of(plan.launcher)

    def gone(held: lock.Holder) -> bool:
        if held.job is None:
            return False
        if inside is not None and held.job == inside.id:
            return True
        if not isinstance(launcher, Batch):
            return False
        return launcher.ask([held.job])[held.job].state not in (*batch.ACTIVE, batch.UNKNOWN)

    return gone


def finish(attempt: Attempt, code: int, *, now: bool = False) -> int:
    """Record how an attempt ended and give the stage back.

    Args:
        code: the launcher's exit code.
        now: it was killed on request, without saving.

    Returns:
        0, 75, 4 or 1; with 1 there is a `failure.json` in the attempt's folder.
    """
    code_given = code
    try:
        if now:
            code = SAVED
        elif code not in (DONE, SAVED, GUARD) and not (attempt.folder / "failure.json").exists():
            # Where all ranks say that they ended well, their parent was killed behind them: they count.
            code = outcome.conclude(attempt.folder, attempt.num_ranks)
            if code not in (DONE, SAVED, GUARD):
                _explain_lost_parent(attempt, code_given)
        if attempt.job.queue_job is not None and code not in (DONE, SAVED, GUARD):
            _explain_command(attempt, code_given)
            _name_lost(attempt.plan, attempt.folder, attempt.num_ranks, attempt.lock.holder.host)
        if code == DONE and (missing := parents.missing_result(attempt.stage, attempt.stage_dir)):
            code = FAILED
            _write_failure(attempt.folder, "result", f"the ranks ended well, but {missing}")
        state.write(attempt.stage_dir, _end_state(attempt, code, now))
    finally:
        attempt.lock.release()
    return code


def _explain_lost_parent(attempt: Attempt, code: int) -> None:
    """A failure for the case that no rank has one: their parent was killed, or could not start them."""
    path = attempt.folder / "failure.json"
    found = read_json(path) if path.exists() else {"kind": "lost"}
    if found.get("kind") == "lost" and not any((attempt.folder / "ranks").glob("*.json")):
        told = _of_silent_ranks(attempt) if attempt.job.queue_job is not None else {}
        log = next(iter(told), attempt.folder / "logs" / "launch.log")
        last = told.get(log) or [line for line in _tail(log) if line.strip()]
        killed = code < 0 or not last or (bool(told) and outcome.last_step(attempt.folder) is not None)
        error = (
            "the parent process of the ranks was killed" if killed else f"the ranks did not start: {last[-1].strip()}"
        )
        _write_failure(attempt.folder, "launch", error, log=str(log))


def _explain_command(attempt: Attempt, code: int) -> None:
    """A failure for the case that what a queue starts ranks with (a container, an interpreter) cannot be executed."""
    path = attempt.folder / "failure.json"
    if path.exists() and read_json(path).get("kind") not in ("lost", "launch"):
        return
    told = _of_silent_ranks(attempt)
    for log, lines in told.items():
        if (line := outcome.not_executed(code, lines)) is not None:
            hint = "`launcher.python` and `launcher.wrap_command` name it, as it is called on the nodes"
            error = f"what starts the ranks cannot be executed: {line}"
            _write_failure(attempt.folder, outcome.COMMAND, error, log=str(log), hints=[hint])
            return


def _name_lost(plan: RunPlan, folder: Path, num_ranks: int, host: str) -> bool:
    """Name the machines of an attempt that the queue has given up as what ended it; whether there are some.

    Args:
        host: where its script ran.
    """
    path, launcher = folder / "failure.json", launcher_of(plan.launcher)
    found = read_json(path) if path.exists() else {"kind": "lost"}
    if not isinstance(launcher, Batch) or found.get("kind") not in ("lost", "launch", "killed", "connect"):
        return False
    lost = launcher.lost([host, *(beat.host for beat in read_beats(folder, num_ranks).values())])
    if lost:
        text = " and ".join(f"`{node}`" for node in lost)
        log = found.get("log") or str(folder / "logs")
        _write_failure(folder, "lost", f"{text} {'was' if len(lost) == 1 else 'were'} lost", log=log)
    return bool(lost)


def _of_silent_ranks(attempt: Attempt) -> dict[Path, list[str]]:
    """The last lines in the logs of ranks that left no record, where there are some."""
    logs = {rank: outcome.log_path(attempt.folder, rank) for rank in range(attempt.num_ranks)}
    silent = [log for rank, log in logs.items() if not outcome.record_path(attempt.folder, rank).exists()]
    return {log: lines for log in silent if (lines := [line for line in _tail(log) if line.strip()])}


def _tail(path: Path) -> list[str]:
    try:
        return path.read_bytes()[-4000:].decode(errors="replace").splitlines()
    except OSError:
        return []


def _write_failure(folder: Path, kind: str, error: str, **more: Any) -> None:
    step = outcome.last_step(folder)
    value = {"rank": None, "step": step, "kind": kind, "error": error, "hints": [], "exit_code": FAILED, **more}
    write_json(folder / "failure.json", value)


def _end_state(attempt: Attempt, code: int, now: bool) -> State:
    folder, stage = attempt.stage_dir, attempt.stage
    whole, _ = store.newest_whole(folder / "checkpoints")
    step = int(whole.name.removeprefix("iter_")) if whole else 0
    common: dict[str, Any] = {
        "attempt": attempt.job.attempt,
        "fingerprint": stage.fingerprint,
        "updated": time.time(),
    }
    if code == DONE:
        return State(status=state.DONE, step=stage.train.steps if stage.train else None, **common)
    if code == SAVED:
        reason = f"stopped at once, goes on from step {step}" if now else f"stopped and saved at step {step}"
        return State(status=state.SAVED, step=step, reason=reason, **common)
    if code == GUARD:
        guard = to_json(stage.train.stop_if) if stage.train and stage.train.stop_if else {}
        return State(status=state.FAILED, step=step, reason="ended by its guard `stop_if`", guard=guard, **common)
    failure = read_json(attempt.folder / "failure.json")
    return State(status=state.FAILED, step=step, reason=str(failure["error"]), **common)


def failure_error(attempt_dir: Path, stage: StagePlan, command: str) -> CptError:
    """What a person sees about a failed attempt: stage, step, rank, first error, logs, and the command that goes on."""
    found = read_json(attempt_dir / "failure.json")
    log = found.get("log") or str(attempt_dir / "logs")
    if stage.kind == "law":  # one process that saves nothing on its way
        told = (f"its log is `{log}`", f"`{command}` does it again")
        error = StageFailed(f"law `{stage.name}` failed: {found['error']}", *found.get("hints", []), *told)
        error.exit_code = int(found.get("exit_code") or FAILED)
        return error
    where = f" after step {found['step']}" if found.get("step") else " before its first step"
    rank = f" on rank {found['rank']}" if found.get("rank") is not None else ""
    error = StageFailed(
        f"stage `{stage.name}` failed{where}{rank}: {found['error']}",
        *found.get("hints", []),
        f"the log of that rank is `{log}`, the others lie beside it",
        f"`{command}` goes on from the newest whole checkpoint",
    )
    error.exit_code = int(found.get("exit_code") or FAILED)
    return error


def write_prepared(run_dir: Path, corpora: dict[str, str], tokenizer: str | None) -> None:
    """Note in the run folder where its prepared data lies, for jobs that start later or elsewhere."""
    write_json(run_dir / "prepared.json", {"corpora": corpora, "tokenizer": tokenizer})


def read_prepared(run_dir: Path) -> dict[str, Any]:
    """Where a run's prepared data lies: `corpora` by source, `tokenizer`."""
    try:
        return dict(read_json(run_dir / "prepared.json"))
    except FileNotFoundError:
        raise UsageError(f"`{run_dir}` has no prepared data yet", "`cpt run` prepares it") from None


def stop_asked(run_dir: Path) -> bool:
    """Whether `cpt cancel` has asked for a stop."""
    return (run_dir / STOP_FILE).exists()


def pulse(job_path: Path) -> Callable[[], bool]:
    """What the ranks' parent does once a second: beat the stage's lock if it is still its own, and say whether
    a stop was asked for.
    """
    folder = job_path.parent.parent
    run_dir = folder.parent.parent
    token = read_json(job_path).get("fence")
    fence = lock.Fence(folder, token) if token is not None else None

    def tick() -> bool:
        if fence is not None:
            fence.beat()
        return stop_asked(run_dir)

    return tick


def main(arguments: list[str]) -> int:
    """`begin RUN STAGE --holder PID` prints the job's path; `end JOB CODE` records the end and gives the exit code.

    In a batch job `end` prints one word: done, repeat (back into the queue), stopped, guard or failed.
    """
    try:
        if len(arguments) == 5 and arguments[0] == "begin" and arguments[3] == "--holder":
            return _main_begin(Path(arguments[1]), arguments[2], int(arguments[4]))
        if len(arguments) == 3 and arguments[0] == "end":
            return _main_end(Path(arguments[1]), int(arguments[2]))
    except CptError as error:
        sys.stderr.write(f"error: {error.message}\n" + "".join(f"hint: {hint}\n" for hint in error.hints))
        return error.exit_code
    sys.stderr.write("usage: python -m cpt.stages.attempt begin RUN STAGE --holder PID | end JOB.json CODE\n")
    return 2


def _main_begin(run_dir: Path, name: str, holder_pid: int) -> int:
    plan = read_plan(run_dir)
    if name not in plan.stages:
        raise UsageError(f"the run has no stage `{name}`")
    if state.read(stage_dir(run_dir, name)).status == state.DONE:
        sys.stderr.write(f"note: stage `{name}` is done already\n")
        return 0
    launcher = launcher_of(plan.launcher)
    inside = launcher.inside(os.environ) if isinstance(launcher, Batch) else None
    if inside is None:
        (run_dir / STOP_FILE).unlink(missing_ok=True)
    elif stop_asked(run_dir):
        sys.stderr.write(f"note: `cpt cancel` has stopped the run; stage `{name}` is not started\n")
        return SAVED
    holder = lock.holder_of(holder_pid, f"script of stage `{name}`", job=inside.id if inside else None)
    attempt = begin(run_dir, name, holder, inside)
    now = record.environment(Path.cwd(), os.environ, time.time())
    record.write_environment(attempt.folder, now)
    for text in (*attempt.notes, *record.differences(run_dir, now)):
        sys.stderr.write(f"note: {text}\n")
    sys.stdout.write(f"{attempt.folder / 'job.json'}\n")
    return 0


def _main_end(job_path: Path, code: int) -> int:
    plan, job = read_job(job_path)
    folder = job_path.parent.parent
    holder = lock.read_holder(folder)
    if holder is None or (job.fence is not None and holder.token != job.fence) or holder.pid not in _ourselves():
        raise UsageError(f"the lock of `{folder}` was taken over meanwhile; nothing is recorded")
    attempt = Attempt(plan, plan.stages[job.stage], job, job_path.parent, lock.Lock(folder, holder))
    launcher = launcher_of(plan.launcher)
    code = finish(attempt, _code_of_ranks(attempt, code) if job.queue_job is not None else code)
    if job.queue_job is not None and isinstance(launcher, Batch):
        word = _word(attempt, code, launcher)
        from cpt.stages import send

        run_dir = Path(job.run_dir)
        if word == "repeat" and not launcher.requeue and send.is_last(run_dir, job.stage, job.queue_job, launcher):
            word = "stopped"
            old = state.read(folder)
            reason = f"{old.reason}; no job of it is left, `cpt resume {run_dir.name}` goes on"
            state.write(folder, dataclasses.replace(old, reason=reason))
        if word != "repeat":
            send.cancel_useless(plan, run_dir, job.stage, job.queue_job, launcher, is_done=word == "done")
        sys.stdout.write(f"{word}\n")
        sys.stdout.flush()
        sys.stderr.write(f"note: stage `{job.stage}`: {_said(state.read(folder))}\n")
        return {"done": DONE, "guard": GUARD, "failed": FAILED}.get(word, SAVED)
    if code not in (DONE, SAVED, GUARD):
        raise failure_error(attempt.folder, attempt.stage, str(folder / "launch.sh"))
    sys.stderr.write(f"note: stage `{job.stage}`: {state.read(folder).status}\n")
    return code


def _code_of_ranks(attempt: Attempt, code: int) -> int:
    """How the ranks of a batch job ended, by what they wrote: a queue's own code says little about any of them.

    Args:
        code: of the command that started them; 75 = a stop came before that.
    """
    if any((attempt.folder / "ranks").glob("*.json")):
        failed = (attempt.folder / "failure.json").exists()
        return FAILED if failed else outcome.conclude(attempt.folder, attempt.num_ranks)
    started = any((attempt.folder / "logs").glob("rank_*.log"))
    return code if code not in (DONE, GUARD, SAVED) or (code == SAVED and not started) else FAILED


def _said(now: State) -> str:
    return f"{now.status}: {now.reason}" if now.reason else now.status


def _word(attempt: Attempt, code: int, launcher: Batch) -> str:
    """What becomes of the batch job of an attempt that has been recorded."""
    run_dir = Path(attempt.job.run_dir)
    asked = stop_asked(run_dir)
    verdict, why = verdict_on(attempt, code, launcher, asked=asked)
    if verdict == again.REPEAT:
        return "repeat"
    if why:
        old = state.read(attempt.stage_dir)
        reason = f"{old.reason}; {why}"
        state.write(attempt.stage_dir, dataclasses.replace(old, status=state.FAILED, reason=reason))
        return "failed"
    return {DONE: "done", GUARD: "guard", SAVED: "stopped"}.get(code, "failed")


def verdict_on(
    attempt: Attempt, code: int, launcher: Launcher, *, asked: bool = False, first: int = 1
) -> tuple[str, str]:
    """Whether a stage is tried again by itself, see `again.decide`. The attempt's end has been recorded.

    Args:
        code: what `finish` gave.
        asked: somebody has asked for a stop.
        first: the attempt that counting begins with: what went wrong before a person looked counts no more.
    """
    failure = attempt.folder / "failure.json"
    is_fault = code not in (DONE, SAVED, GUARD) and outcome.is_machine_fault(read_json(failure))
    ended = again.Ended(
        code=code,
        is_fault=is_fault,
        is_asked=asked,
        is_at_limit=attempt.job.warned_from is not None and time.time() >= attempt.job.warned_from,
        began_at=_began_at(attempt.stage_dir, first),
        step=state.read(attempt.stage_dir).step or 0,
    )
    return again.decide(
        ended,
        retries=launcher.retries,
        max_attempts=launcher.max_attempts if isinstance(launcher, Batch) else None,
        has_steps=attempt.stage.train is not None,
    )


def _began_at(stage_dir: Path, first: int = 1) -> list[int]:
    """The steps at which the attempts from `first` on went on; those killed before they had begun are left out."""
    found = []
    for folder in attempts(stage_dir):
        if int(folder.name.removeprefix("attempt_")) >= first:
            with contextlib.suppress(FileNotFoundError):
                resume = read_json(folder / "job.json").get("resume")
                found.append(int(Path(resume).name.removeprefix("iter_")) if resume else 0)
    return found


def _ourselves() -> set[int]:
    """This process and those that it descends from: the script that holds the lock is one of them."""
    import psutil

    found = {os.getpid(), os.getppid()}
    with contextlib.suppress(psutil.Error):  # one further up ends just now
        found.update(parent.pid for parent in psutil.Process().parents())
    return found


def with_reference(old: State, fingerprint: str, reference: Path, reason: str) -> State:
    """The state of a stage whose result is taken from another run."""
    return dataclasses.replace(
        old,
        status=state.DONE,
        fingerprint=fingerprint,
        reference=str(reference),
        step=state.read(reference).step,
        reason=reason,
        updated=time.time(),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
