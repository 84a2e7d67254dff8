"""Hands the stages of a run to a queue, all together: a script each, chained by what each stage needs.

Slurm's own dependencies are a convenience. Each job checks the state of its parents itself when it starts
(`attempt begin`), so that a queue that forgets a job, or takes a stopped one for a good one, starts nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cpt.base import lock
from cpt.base.errors import CptError, EnvironmentProblem, GuardStop, StageFailed, StoppedAndSaved, UsageError
from cpt.launch import LAUNCHERS, Work, batch, launcher_of
from cpt.launch.batch import Batch, JobState, Order, Sent
from cpt.plan.types import RunPlan, StagePlan
from cpt.stages import early, state
from cpt.stages.attempt import attempts, failure_error, read_plan, stage_dir


def needs(plan: RunPlan, stage: StagePlan) -> list[str]:
    """The stages of a run whose results a stage reads: its parent, those that it measures, laws and their grids."""
    found = [stage.parent] if stage.parent in plan.stages else []
    found += [*stage.after, *(value.partition(".")[0] for value in stage.law.values())]
    if stage.kind == "law":
        found += [n for n, s in plan.stages.items() if s.group == stage.name]
    if stage.kind == "merged":
        found += [n for n, s in plan.stages.items() if s.group == stage.group and s.train is not None]
    return [n for n in dict.fromkeys(found) if n is not None and n in plan.stages and n != stage.name]


def behind(plan: RunPlan, name: str) -> list[str]:
    """The stages that need a stage, and those that need them; in order of execution."""
    waiting = {name}
    for other, stage in plan.stages.items():
        if waiting & set(needs(plan, stage)):
            waiting.add(other)
    return [n for n in plan.stages if n in waiting and n != name]


def states(run_dir: Path, launcher: Batch) -> dict[str, JobState]:
    """What the queue says about every job of a run, by id."""
    ids = [job.id for jobs in batch.read_sent(run_dir).values() for job in jobs if job.id]
    return launcher.ask(ids) if ids else {}


def refuse_active(run_dir: Path) -> None:
    """A run whose jobs wait or run in a queue is not sent a second time, nor done here.

    Raises:
        UsageError: jobs are active.
        EnvironmentProblem: the queue does not answer.
    """
    sent = batch.read_sent(run_dir)
    if not sent:
        return
    launcher = launcher_of(read_plan(run_dir).launcher)  # of the plan as it was sent
    if not isinstance(launcher, Batch):
        return
    _settle(run_dir, launcher)
    sent = batch.read_sent(run_dir)
    found = states(run_dir, launcher)
    active = [f"{job.id} (`{stage}`)" for stage, jobs in sent.items() for job in jobs if is_active(found, job)]
    if not active and not any(s.state == batch.UNKNOWN for s in found.values()):
        active = [f"{id} (`{stage}`, sent by hand)" for id, stage in launcher.of_run(run_dir).items()]
    if active:
        raise UsageError(
            f"`{run_dir}` has jobs in the queue: {', '.join(active[:5])}",
            "`cpt status` shows how far they are, `cpt cancel` saves and stops them",
        )
    if any(s.state == batch.UNKNOWN for s in found.values()):
        raise EnvironmentProblem(
            f"the queue does not answer, and it may still have jobs of `{run_dir}`", "try again when it does"
        )


def _settle(run_dir: Path, launcher: Batch) -> None:
    """Learn what became of submissions that had no answer."""
    for stage, jobs in batch.read_sent(run_dir).items():
        for job in jobs:
            if not job.id:
                id = launcher.find(job.token)
                batch.forget(run_dir, job.token)
                if id is not None:
                    batch.note_sent(run_dir, stage, dataclasses.replace(job, id=id))


def is_active(found: Mapping[str, JobState], job: Sent) -> bool:
    """Whether a job waits or runs."""
    return job.id in found and found[job.id].state in batch.ACTIVE


def send(
    plan: RunPlan, launcher: Batch, works: Mapping[str, Work], write: Callable[..., None]
) -> dict[str, tuple[Sent, ...]]:
    """Write the script of each stage and hand all of them to the queue; all or none.

    Args:
        works: the stages that are to be done, in order.
        write: takes events: `job` (stage, id, after) of each submission, `note` of jobs that will not start.

    Raises:
        UsageError: the queue refuses a job for what the person wrote.
        EnvironmentProblem: the queue does not answer.
    """
    sent: dict[str, tuple[Sent, ...]] = {}
    begin = time.time()
    try:
        for name, work in works.items():
            if name in sent:
                continue
            members = [n for n in _array(plan, works, name) if n not in sent]
            for member, jobs in _send_one(plan, launcher, work, members, sent).items():
                sent[member] = jobs
                for job in jobs:
                    batch.note_sent(work.run_dir, member, job)
                write("job", stage=member, id=jobs[0].id, after=list(jobs[0].after))
    except CptError as error:
        run_dir = next(iter(works.values())).run_dir
        _take_back(launcher, run_dir, begin, is_refused=isinstance(error, UsageError))
        raise
    _name_stuck(launcher, sent, write)
    return sent


def _array(plan: RunPlan, works: Mapping[str, Work], name: str) -> list[str]:
    """The proxies that are one array of jobs with a stage; itself alone when it is none."""
    stage = plan.stages[name]
    if stage.group is None or stage.train is None:
        return [name]
    alike = [
        n
        for n in works
        if plan.stages[n].group == stage.group
        and plan.stages[n].train is not None
        and works[n].world_size == works[name].world_size
        and needs(plan, plan.stages[n]) == needs(plan, stage)
    ]
    return alike if len(alike) > 1 else [name]


def _send_one(
    plan: RunPlan, launcher: Batch, work: Work, members: Sequence[str], sent: Mapping[str, tuple[Sent, ...]]
) -> dict[str, tuple[Sent, ...]]:
    """Send a stage, or the members of an array, and its successors; jobs by stage."""
    is_array = len(members) > 1
    stage = plan.stages[work.stage]
    if is_array:
        assert stage.group is not None
        work = dataclasses.replace(work, stage=stage.group)
    work = dataclasses.replace(work, afterwards=_afterwards(stage, work), beside=_beside(plan, stage, work))
    script = launcher.write_script(work, members if is_array else ())
    after = [[job.id.partition("_")[0] for job in sent[n]] for n in needs(plan, stage) if n in sent]
    after = [list(ids) for ids in dict.fromkeys(tuple(ids) for ids in after)]  # elements of one array are one job
    jobs: list[tuple[str, Order]] = []
    for _ in range(1 + launcher.successors):
        order = Order(
            script=script,
            token=f"cpt-{plan.short_id}-{uuid.uuid4().hex[:12]}",
            after=after if not jobs else (),
            after_failed=jobs[-1][0] if jobs else None,
        )
        # Noted before: the job may exist although its answer is lost. And at once after: whatever comes next may fail.
        job = Sent(id="", token=order.token, script=str(script), log="", time=time.time())
        batch.note_sent(work.run_dir, members[0], job)
        id = launcher.submit(order)
        batch.note_sent(work.run_dir, members[0], dataclasses.replace(job, id=id))
        jobs.append((id, order))
    found: dict[str, tuple[Sent, ...]] = {}
    for i, member in enumerate(members):
        found[member] = tuple(
            Sent(
                id=f"{id}_{i}" if is_array else id,
                token=order.token,
                script=str(script),
                log=str(launcher.log_of(work, id, i if is_array else None)),
                after=tuple(a for ids in order.after for a in ids),
                time=time.time(),
            )
            for id, order in jobs
        )
    return found


def _afterwards(stage: StagePlan, work: Work) -> tuple[tuple[str, ...], ...]:
    """What a job does after its stage: the plan with a law's values, the report."""
    cpt = (work.python, "-m", "cpt")
    run_dir = str(work.run_dir)
    found: list[tuple[str, ...]] = []
    if stage.kind == "law":
        found.append((*cpt, "resume", run_dir, "--plan-only"))
    if stage.group is None:
        found.append((*cpt, "report", run_dir, "--quiet"))
    return tuple(found)


def _beside(plan: RunPlan, stage: StagePlan, work: Work) -> tuple[str, ...]:
    """What a job does while its ranks work: tell wandb what happens. Nothing of the proxies of a law goes there."""
    if plan.tracking.get("wandb", "off") == "off" or stage.group is not None:
        return ()
    return (work.python, "-m", "cpt.report.wandb_process", str(work.run_dir), "--beside")


def _take_back(launcher: Batch, run_dir: Path, begin: float, *, is_refused: bool) -> None:
    """Remove jobs again, the last ones first: otherwise those behind a removed one might start.

    Args:
        begin: when the first of them was sent [unix seconds].
        is_refused: the last submission was refused, so that there is no job of it.
    """
    jobs = [job for of_stage in batch.read_sent(run_dir).values() for job in of_stage if job.time >= begin]
    ids = [job.id.partition("_")[0] for job in sorted(jobs, key=lambda job: -job.time) if job.id]
    with contextlib.suppress(CptError):
        launcher.cancel(list(dict.fromkeys(ids)))
    for job in jobs:
        if is_refused and not job.id:
            batch.forget(run_dir, job.token)


def _name_stuck(launcher: Batch, sent: Mapping[str, tuple[Sent, ...]], write: Callable[..., None]) -> None:
    """Look once at what the queue thinks: it accepts jobs that it will never start."""
    found = launcher.ask([job.id for jobs in sent.values() for job in jobs])
    for stage, jobs in sent.items():
        for job in jobs:
            said = found.get(job.id)
            if said is not None and said.stuck:
                write("note", text=f"job {job.id} of stage `{stage}` {stuck_text(said)}")


def stuck_text(said: JobState) -> str:
    """Why a job will not start by itself, completing "job 12 ..."."""
    return f"will not start by itself: {said.reason}" + (f"; {said.hint}" if said.hint else "")


def cancel_useless(plan: RunPlan, run_dir: Path, name: str, job: str, launcher: Batch, *, is_done: bool) -> None:
    """Take the jobs that a stage's end makes useless out of the queue: not every site does it by itself.

    Args:
        job: of the stage, the one that has ended it; its successors are no longer needed.
        is_done: whether the stage ended well; else the jobs behind it go too.
    """
    sent = batch.read_sent(run_dir)
    stages = [name] if is_done else [*reversed(behind(plan, name)), name]
    # Of an array of successors only this stage's own element: the other elements are of stages that still need them.
    ids = [
        j.id if n == name else j.id.partition("_")[0]
        for n in stages
        for j in reversed(sent.get(n, ()))
        if _is_other(j.id, job)
    ]
    if ids:
        with contextlib.suppress(CptError):
            launcher.cancel(list(dict.fromkeys(ids)))


def is_last(run_dir: Path, name: str, job: str, launcher: Batch) -> bool:
    """Whether no other job of a stage waits or runs."""
    ids = [j.id for j in batch.read_sent(run_dir).get(name, ()) if j.id and _is_other(j.id, job)]
    there = (batch.PENDING, batch.RUNNING, batch.UNKNOWN)
    return not ids or not any(said.state in there for said in launcher.ask(ids).values())


def _is_other(id: str, job: str) -> bool:
    """Whether an id is not of a job or of the array that it belongs to."""
    return id != job and id.partition("_")[0] != job.partition("_")[0]


def cancel(run_dir: Path, *, now: bool = False) -> dict[str, str]:
    """Take a run's waiting jobs out of the queue and ask running ones to save and stop; the run's stop file is there.

    Args:
        now: end running ones as the queue does it, with the few seconds that it gives.

    Returns:
        What each job was, by id: the last stage first, so that none starts because one before it has gone.

    Raises:
        EnvironmentProblem: the queue does not answer.
    """
    sent = batch.read_sent(run_dir)
    launcher = launcher_of(read_plan(run_dir).launcher)
    if not sent or not isinstance(launcher, Batch):
        return {}
    _settle(run_dir, launcher)
    sent = batch.read_sent(run_dir)
    found = states(run_dir, launcher)
    if any(s.state == batch.UNKNOWN for s in found.values()):
        raise EnvironmentProblem(
            "the queue does not answer",
            "the job that runs was asked too: it saves and stops; those that wait end at once when they start. "
            "`cpt cancel` again, when the queue answers, removes them",
        )
    ids = [job.id for name in reversed(list(sent)) for job in reversed(sent[name]) if is_active(found, job)]
    by_hand = [id for id in launcher.of_run(run_dir) if id not in {i.partition("_")[0] for i in ids}]
    found |= launcher.ask(by_hand)
    ids += by_hand
    waiting = [id for id in ids if found[id].state == batch.PENDING]
    launcher.cancel(waiting if not now else ids)
    if not now and (running := [id for id in ids if id not in waiting]):
        launcher.ask_to_stop(running)
    return {id: found[id].state for id in ids}


def cancel_deleted(run_dir: Path) -> list[str]:
    """Take the jobs of a run whose folder was deleted out of the queue of this machine; none where there is none."""
    ids: list[str] = []
    for name in LAUNCHERS:
        made = LAUNCHERS.get(name)
        if issubclass(made, Batch):
            with contextlib.suppress(EnvironmentProblem):
                launcher = made()
                found = launcher.of_run(run_dir)
                launcher.cancel(sorted(found, key=int, reverse=True))
                ids += found
    return ids


def is_in_queue(run_dir: Path) -> bool:
    """Whether some job of a run waits or runs."""
    if not batch.read_sent(run_dir):
        return False
    launcher = launcher_of(read_plan(run_dir).launcher)
    return isinstance(launcher, Batch) and any(s.state in batch.ACTIVE for s in states(run_dir, launcher).values())


_LOOK_SECONDS, _ASK_SECONDS = 1.0, 20.0  # between two looks at the run's own files, and two questions to the queue


def wait_for_jobs(run_dir: Path, plan: RunPlan, note: Callable[[str], None]) -> CptError | None:
    """Wait until no job of a run is left in the queue, and say what happens to its stages.

    Args:
        note: told one line for every change.

    Returns:
        What the run ended with, as an error; None = all is done.
    """
    launcher = launcher_of(plan.launcher)
    assert isinstance(launcher, Batch)
    said: dict[str, str] = {}
    asked, stuck = 0.0, None
    while True:
        now = {name: state.read(stage_dir(run_dir, name)) for name in plan.stages}
        for name, found in now.items():
            text = f"{found.status}: {found.reason}" if found.reason else found.status
            if said.get(name, state.PENDING) != text:
                note(f"{name}  {text}")
            said[name] = text
        ended = all(found.status in (state.DONE, state.FAILED) for found in now.values())
        if ended or time.monotonic() - asked > _ASK_SECONDS:
            asked = time.monotonic()
            jobs = states(run_dir, launcher)
            if not any(s.state in (*batch.ACTIVE, batch.UNKNOWN) for s in jobs.values()):
                return _end(run_dir, plan, jobs)
            before, stuck = stuck, what_holds_all(jobs)
            if before is not None and stuck is not None:  # twice: a reason of the first seconds may pass
                return EnvironmentProblem(
                    f"job {stuck.id} {stuck_text(stuck)}",
                    f"the jobs stay in the queue: `cpt resume {run_dir.name} --wait` waits again once it can start, "
                    f"`cpt cancel {run_dir.name}` takes them out",
                )
        time.sleep(_LOOK_SECONDS)


def what_holds_all(jobs: Mapping[str, JobState]) -> JobState | None:
    """A job that will never start by itself, when all others that are left are such jobs, too, or wait for others."""
    left = [s for s in jobs.values() if s.state in (*batch.ACTIVE, batch.UNKNOWN)]
    can_start = any(not s.stuck and (s.state != batch.PENDING or s.reason != "Dependency") for s in left)
    return None if can_start else next((s for s in left if s.stuck), None)


def early_end(run_dir: Path, plan: RunPlan, name: str, jobs: Mapping[str, JobState]) -> early.Early | None:
    """How the newest job of a stage ended, where it ended before the stage began.

    Args:
        jobs: what the queue says, by id.
    """
    sent = batch.read_sent(run_dir).get(name, ())
    return early.find(run_dir, plan, name, sent, jobs, needs(plan, plan.stages[name]))


def _end(run_dir: Path, plan: RunPlan, jobs: Mapping[str, JobState]) -> CptError | None:
    """The error of a run whose jobs have ended."""
    for name, stage in plan.stages.items():
        found = state.read(stage_dir(run_dir, name))
        if found.status == state.DONE:
            continue
        again = f"cpt resume {run_dir.name}"
        if (ended := early_end(run_dir, plan, name, jobs)) is not None:
            # The queue forgets it; what is known now is the stage's state from here on.
            if ended.is_known and lock.live_holder(stage_dir(run_dir, name)) is None:
                failed = dataclasses.replace(found, status=state.FAILED, reason=ended.reason, updated=time.time())
                state.write(stage_dir(run_dir, name), failed)
            job = f"`cpt logs {run_dir.name} --stage {name} --job` shows all that it printed"
            return StageFailed(f"stage `{name}` failed: {ended.reason}", job, f"`{again}` goes on")
        folders = attempts(stage_dir(run_dir, name))
        if found.guard is not None:
            return GuardStop(f"stage `{name}` was ended by its guard `stop_if` at step {found.step:,}")
        if found.status == state.FAILED and folders and (folders[-1] / "failure.json").exists():
            return failure_error(folders[-1], stage, again)
        if found.status == state.FAILED:
            return StageFailed(f"stage `{name}` failed: {found.reason}", f"`{again}` goes on")
        return StoppedAndSaved(f"stage `{name}` is {found.status}, and no job is left", f"`{again}` goes on")
    return None
