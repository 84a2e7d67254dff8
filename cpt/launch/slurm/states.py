"""What Slurm says about jobs, in the words that hold for every queue.

Asked in this order, each about what is still open, all within one time limit:

1. `squeue`, once for all jobs. It knows those in the queue and, for some minutes, those that ended: what
   `scontrol show job` knows, restarts included.
2. `sacct`, once for all that squeue does not know, where the cluster keeps accounts. It lags behind and calls a job
   that is back in the queue by what ended its last run, so it is only believed about ends.

What neither knows is `gone`. A controller that does not answer makes everything `unknown`, never failed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from cpt.base.errors import CptError
from cpt.base.units import show_duration
from cpt.launch.batch import (
    ACTIVE,
    CANCELLED,
    DONE,
    ENDING,
    FAILED,
    GONE,
    LOST,
    PENDING,
    RUNNING,
    TIMEOUT,
    UNKNOWN,
    JobState,
)
from cpt.launch.slurm.commands import Commands, is_unknown_job, layout, parse_limit, rows, why

WORDS = {
    **dict.fromkeys(("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "POWER_UP_NODE", "EXPEDITING"), PENDING),
    **dict.fromkeys(("REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"), PENDING),
    **dict.fromkeys(("RUNNING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "UPDATE_DB"), RUNNING),
    **dict.fromkeys(("COMPLETING", "STAGE_OUT"), ENDING),
    "COMPLETED": DONE,
    **dict.fromkeys(("FAILED", "OUT_OF_MEMORY"), FAILED),
    **dict.fromkeys(("CANCELLED", "REVOKED"), CANCELLED),
    **dict.fromkeys(("TIMEOUT", "DEADLINE"), TIMEOUT),
    **dict.fromkeys(("NODE_FAIL", "BOOT_FAIL", "LAUNCH_FAILED", "RECONFIG_FAIL", "PREEMPTED"), LOST),
}
_HELD = ("REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")

_COLUMNS = {
    **{"JobArrayID": 40, "State": 30, "RestartCnt": 10, "TimeLeft": 20, "Reason": 300, "NodeList": 1000},
    **{"exit_code": 10, "Partition": 200, "TimeLimit": 20, "NumNodes": 20, "NumCPUs": 20},
}
_NO_LIMIT = ("UNLIMITED", "365-00:00:00")  # the second once it runs
_NO_LOG = 53  # in place of a signal: the script was not even begun
_ID = re.compile(r"\d+(_\d+)?", re.ASCII)
_HOST = re.compile(r"[\w.-]+", re.ASCII)

# Of an array that is asked for as one job: what one of its elements is, the whole is.
_FIRST = (RUNNING, ENDING, PENDING, UNKNOWN, LOST, TIMEOUT, FAILED, CANCELLED, GONE, DONE)

# Why a job does not start by itself, by the beginning of the reason (blanks as `_`), and what a person does.
_RELEASE = "`scontrol release {id}` lets it start"
_STUCK: tuple[tuple[str, str], ...] = (
    ("DependencyNeverSatisfied", "a job that it waits for did not end well; `scancel {id}` removes it"),
    ("JobHeldUser", f"it is held: {_RELEASE}"),
    ("JobHeldAdmin", "an administrator of the cluster holds it: ask them why"),
    ("launch_failed_requeued_held", f"its start failed several times, see the nodes' health; {_RELEASE}"),
    ("job_requeued_in_held_state", f"it was put back and held: {_RELEASE}"),
    ("JobHoldMaxRequeue", f"it was put back too many times: {_RELEASE}"),
    ("BadConstraints", "no node has what it asks for; see `launcher.constraint` and `sinfo -o '%P %f %G'`"),
    ("PartitionTimeLimit", "partition `{partition}` allows less time than the job asks for: `launcher.time=...`"),
    (
        "PartitionNodeLimit",
        "partition `{partition}` has or allows fewer than {nodes} nodes: fewer ranks, or another one",
    ),
    (
        "PartitionConfig",
        "partition `{partition}` cannot give {cpus} CPUs on {nodes} nodes: fewer ranks, or another one",
    ),
    ("PartitionDown", "partition `{partition}` is down: wait for the administrators, or `launcher.partition=...`"),
    (
        "PartitionInactive",
        "partition `{partition}` is closed: wait for the administrators, or `launcher.partition=...`",
    ),
    ("ReqNodeNotAvail", "nodes that it needs are down or drained; `sinfo -R` says why"),
    ("InvalidAccount", "its account is not known any more: `launcher.account=...`"),
    ("InvalidQOS", "its quality of service is not known any more: `launcher.qos=...`"),
    ("ReservationDeleted", "its reservation is gone: `launcher.reservation=...`"),
    ("ReservationInvalid", "its reservation is gone or over: `launcher.reservation=...`"),
)
_WAITS = "a limit of the {whose} is reached: it waits until other jobs end; `sacctmgr show {table}` lists the limits"
_TOO_MUCH = "it asks for more than the {whose} allows; `sacctmgr show {table}` lists the limits"
_LIMIT = re.compile(r"(QOS|Assoc)(Grp|Max|Min)\w*")
_ALWAYS = re.compile(r"PerJob|WallDuration|^(QOS|Assoc)Min|PerNode|Grp(CPU|Mem|GRES|Billing|TRES)?\w*Minutes|GrpWall")


# What a job asks for, as squeue says it: `partition`, `limit`, `nodes`, `cpus`.
Facts = Mapping[str, str]


def ask(commands: Commands, ids: Iterable[str], *, seconds: float = 3.0) -> dict[str, JobState]:
    """State of each job, by id. An array's id stands for all its elements, `95_2` for one.

    Args:
        seconds: longest time for all questions together [s].
    """
    wanted = list(dict.fromkeys(ids))
    valid = [job for job in wanted if _ID.fullmatch(job)]
    end = time.monotonic() + seconds
    found: dict[str, JobState] = {}
    if valid:
        try:
            found, facts = _queue(commands, valid, seconds)
        except CptError as error:
            return {job: JobState(id=job, state=UNKNOWN, reason=error.message) for job in wanted}
        found = _with_limits(commands, found, facts, end)
    if missing := [job for job in valid if not _of(job, found)]:
        found |= _accounts(commands, missing, end)
    return {job: _combined(job, _of(job, found)) for job in wanted}


def lost(commands: Commands, hosts: Sequence[str], *, seconds: float = 3.0) -> list[str]:
    """The nodes that are down or do not answer, of some hosts; none where Slurm does not say it."""
    names = sorted({host.partition(".")[0] for host in hosts if _HOST.fullmatch(host)})
    if not names:
        return []
    try:
        said = commands.run("sinfo", "-h", "-N", "-n", ",".join(names), "-o", "%N %T", seconds=seconds)
    except CptError:
        return []
    found = dict(line.split()[:2] for line in said.out.splitlines() if len(line.split()) > 1)
    return [name for name in names if found.get(name, "").startswith("down") or found.get(name, "").endswith("*")]


def explain(job: JobState, facts: Facts) -> JobState:
    """A waiting job with whether it is stuck, and what to do about it."""
    if job.state != PENDING:
        return job
    key = job.reason.replace(" ", "_")
    if key.startswith("ReqNodeNotAvail") and "maintenance" in key:
        return replace(job, hint="its nodes are reserved for maintenance: it waits until that is over")
    for start, hint in _STUCK:
        if key.startswith(start):
            return replace(job, stuck=True, hint=hint.format(id=job.id, **facts))
    if _LIMIT.match(key) or key.startswith("AccountingPolicy"):
        whose, table = ("account", "associations") if key.startswith("A") else ("quality of service", "qos")
        never = _ALWAYS.search(key) is not None
        return replace(job, stuck=never, hint=(_TOO_MUCH if never else _WAITS).format(whose=whose, table=table))
    if job.word in _HELD:
        return replace(job, stuck=True, hint=f"it is held: {_RELEASE.format(id=job.id)}")
    return job


def _queue(commands: Commands, ids: Sequence[str], seconds: float) -> tuple[dict[str, JobState], dict[str, Facts]]:
    """What squeue says, by id, array elements one by one."""
    jobs = ",".join(dict.fromkeys(job.split("_")[0] for job in ids))
    said = commands.run("squeue", "-a", "-h", "-r", "-t", "all", "-j", jobs, "-O", layout(_COLUMNS), seconds=seconds)
    if said.code != 0 and not is_unknown_job(said):
        raise CptError(why(said))
    found: dict[str, JobState] = {}
    facts: dict[str, Facts] = {}
    for row in rows(said, _COLUMNS):
        job, word, restarts, left, reason, nodes, code, partition, limit, num_nodes, num_cpus = row
        state = WORDS.get(word, UNKNOWN)
        no_log = state == FAILED and _exit(code)[1] == _NO_LOG
        known = JobState(
            id=job,
            state=state,
            word=word,
            reason=_reason(state, "" if reason == "None" else reason, _exit(code)),
            hint="its log could not be opened: is the log's folder there, on the node too?" if no_log else "",
            nodes=nodes,
            restarts=int(restarts) if restarts.isdigit() else 0,
            seconds_left=parse_limit(left) if state == RUNNING and limit not in _NO_LIMIT else None,
        )
        facts[job] = {"partition": partition, "limit": limit, "nodes": num_nodes, "cpus": num_cpus}
        found[job] = explain(known, facts[job])
    return found, facts


def _with_limits(
    commands: Commands, found: dict[str, JobState], facts: dict[str, Facts], end: float
) -> dict[str, JobState]:
    """The same with the numbers of the partitions whose limits keep jobs from starting."""
    # In its first seconds in the queue a job that asks for too much time may have the other reason.
    late = [j for j in found.values() if j.stuck and j.reason in ("PartitionTimeLimit", "PartitionConfig")]
    limits: dict[str, float | None] = {}
    for job in late:
        partition, asked = facts[job.id]["partition"], parse_limit(facts[job.id]["limit"])
        left = end - time.monotonic()
        if partition not in limits and len(limits) < 4 and left > 0:
            limits[partition] = _partition_limit(commands, partition, left)
        if (allowed := limits.get(partition)) is not None and (asked is None or asked > allowed):
            wants = "no limit" if asked is None else _length(asked)
            hint = f"partition `{partition}` allows {_length(allowed)}, the job asks for {wants}"
            found[job.id] = replace(job, hint=f"{hint}: `launcher.time={allowed / 60:.0f}m`")
    return found


def _partition_limit(commands: Commands, name: str, seconds: float) -> float | None:
    try:
        said = commands.run("scontrol", "-o", "show", "partition", name, seconds=seconds)
    except CptError:
        return None
    match = re.search(r" MaxTime=(\S+)", said.out)
    return parse_limit(match[1]) if match else None


def _accounts(commands: Commands, ids: Sequence[str], end: float) -> dict[str, JobState]:
    """What sacct says about jobs that the queue does not know; nothing where no accounts are kept."""
    left = max(0.1, end - time.monotonic())
    jobs = ",".join(dict.fromkeys(ids))
    try:
        said = commands.run("sacct", "-n", "-X", "-P", "-j", jobs, "-o", "jobid,state,exitcode,nodelist", seconds=left)
    except CptError as error:
        told = error.message
    else:
        if said.code == 0:
            return parse_accounts(said.out)
        told = why(said)
    if "disabled" in told:
        return {}
    return {job: JobState(id=job, state=GONE, reason=f"the accounts do not answer: {told}") for job in ids}


def parse_accounts(text: str) -> dict[str, JobState]:
    """Rows of `sacct -nXP -o jobid,state,exitcode,nodelist` about jobs that are not in the queue."""
    found: dict[str, JobState] = {}
    for line in text.splitlines():
        job, word, code, nodes = [*line.strip().split("|"), "", "", ""][:4]
        if not _ID.fullmatch(job):
            continue
        first = word.split()[0] if word.split() else ""  # `CANCELLED by 0`
        state = WORDS.get(first, UNKNOWN)
        if state in ACTIVE or state == UNKNOWN:  # the accounts lag behind: what is not in the queue does not run
            found[job] = JobState(
                id=job, state=GONE, word=first, reason="not in the queue, and its end is not accounted"
            )
            continue
        status, number = (int(part) if part.isdigit() else 0 for part in [*code.split(":"), "", ""][:2])
        nodes = "" if nodes == "None assigned" else nodes
        found[job] = JobState(id=job, state=state, word=first, reason=_reason(state, "", (status, number)), nodes=nodes)
    return found


def _reason(state: str, told: str, ended: tuple[int, int]) -> str:
    """Slurm's reason, or the exit code where that says more."""
    code, number = ended
    if state != FAILED or number == _NO_LOG or told not in ("", "NonZeroExitCode", "RaisedSignal", "JobLaunchFailure"):
        return told
    return f"signal {number}" if number else f"exit code {code}"


def _exit(status: str) -> tuple[int, int]:
    """(exit code, signal) of a process's wait status."""
    number = int(status) if status.isdigit() else 0
    return number >> 8 & 0xFF, number & 0x7F


def _length(seconds: float) -> str:
    """Whole minutes, hours and days as such: 2 min, 1 h."""
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size and seconds % size == 0:
            return f"{seconds // size:.0f} {name if seconds > size else name.rstrip('s')}"
    return show_duration(seconds)


def _of(job: str, found: Mapping[str, JobState]) -> list[JobState]:
    """A job, or the elements of an array."""
    if job in found:
        return [found[job]]
    return [state for name, state in found.items() if name.startswith(f"{job}_")]


def _combined(job: str, states: Sequence[JobState]) -> JobState:
    if not states:
        return JobState(id=job, state=GONE)
    return replace(min(states, key=lambda s: _FIRST.index(s.state)), id=job)
