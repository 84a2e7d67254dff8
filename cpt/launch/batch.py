"""Queues: launchers that take a script for each stage and start it later, on machines of their own choice.

    runs/<name>/jobs.json                       which job was sent for which stage, written after every submission
    runs/<name>/stages/<stage>/<script>         complete; can be handed to the queue by hand with the same result

The queue's word is never taken for the state of a stage: that is `state.json` alone, which the job itself writes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cpt.base.files import read_json, write_json
from cpt.launch import Launcher, Work

NAME = "jobs.json"

# What a job can be, in words that hold for every queue.
PENDING, RUNNING, ENDING, DONE, FAILED, CANCELLED, TIMEOUT, LOST, GONE, UNKNOWN = (
    "pending",  # waits in the queue
    "running",
    "ending",  # its processes are being ended
    "done",  # ended with exit code 0
    "failed",  # ended with another
    "cancelled",
    "timeout",  # ended at its time limit
    "lost",  # its machine failed
    "gone",  # the queue does not remember it
    "unknown",  # the queue does not answer
)
ACTIVE = (PENDING, RUNNING, ENDING)


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What a queue says about a job.

    Args:
        state: one of the words above.
        word: the queue's own word, e.g. `NODE_FAIL`.
        reason: why it waits or ended so, in the queue's words; empty when it says nothing.
        stuck: it will never start by itself.
        hint: what a person can do; empty when nothing is to be done.
        nodes: where it runs or ran.
        restarts: how often the queue has started it again.
        seconds_left: until its time limit [s]; None = no limit, or not running.
    """

    id: str
    state: str
    word: str = ""
    reason: str = ""
    stuck: bool = False
    hint: str = ""
    nodes: str = ""
    restarts: int = 0
    seconds_left: float | None = None


@dataclass(frozen=True, kw_only=True)
class Inside:
    """The job that this process runs in.

    Args:
        stop_at: when its ranks are to save and stop, some time before its limit [unix seconds]; None = no limit.
        warned_from: the earliest time at which the queue itself warns of the limit [unix seconds]; None = no limit.
    """

    id: str
    stop_at: float | None = None
    warned_from: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A submitted job.

    Args:
        id: of the queue; of an array element `95_2`. Empty while the queue has not answered.
        token: unique mark that the queue keeps with the job: finds it when the submission's answer was lost.
        log: what the script itself prints; ranks have their own logs in the attempt.
        after: ids of the jobs that it waits for.
        time: of the submission [unix seconds].
    """

    id: str
    token: str
    script: str
    log: str
    after: tuple[str, ...] = ()
    time: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Order:
    """A script on its way to a queue.

    Args:
        after: jobs that must have ended well before it starts. Each entry is a list of alternatives: one of them
            must have ended well.
        after_failed: a job that must have ended badly before it starts (of a successor).
    """

    script: Path
    token: str
    after: Sequence[Sequence[str]] = field(default_factory=tuple)
    after_failed: str | None = None


class Batch(Launcher):
    """A queue. Besides `retries` each has the options

    max_attempts: most attempts at a stage, whatever they gained.
    successors: jobs sent after each stage's own that go on where a queue does not start a job again; 0 = none.
    requeue: the queue starts a job again that ended with work left.
    """

    max_attempts: int
    successors: int
    requeue: bool

    @property
    def num_starts(self) -> int:
        """How often the jobs of one stage are started."""
        return self.max_attempts if self.requeue else min(self.max_attempts, 1 + self.successors)

    @property
    @abstractmethod
    def work_seconds(self) -> float | None:
        """For how long a job may work before it is told to save [s]; None = no limit that is known."""

    @abstractmethod
    def inside(self, environ: Mapping[str, str]) -> Inside | None:
        """The job that `environ` is of; None outside of jobs."""

    @abstractmethod
    def write_script(self, work: Work, members: Sequence[str] = ()) -> Path:
        """Write the script of a stage into its folder.

        Args:
            members: stages of the same layout that are one array of jobs; `work.stage` then names their law.
        """

    @abstractmethod
    def describe(self, work: Work) -> str:
        """What a job asks the queue for, for a plan: "2 nodes of 2 ranks, at most 4h".

        Raises:
            UsageError: the ranks do not fit.
        """

    @abstractmethod
    def check(self, work: Work) -> None:
        """Ask the queue whether it would take the job of a stage; nothing is submitted or written.

        Raises:
            UsageError: it would not.
            EnvironmentProblem: it does not answer.
        """

    @abstractmethod
    def log_of(self, work: Work, id: str, member: int | None = None) -> Path:
        """Where the script of a job prints.

        Args:
            member: number of an array's element.
        """

    @abstractmethod
    def submit(self, order: Order) -> str:
        """Hand a script to the queue; gives the job's id.

        Raises:
            UsageError: the queue refuses it for what the person wrote (partition, account, limits).
            EnvironmentProblem: the queue does not answer; no job of this token is there.
        """

    @abstractmethod
    def find(self, token: str) -> str | None:
        """The job of a token, whose submission had no answer.

        Raises:
            EnvironmentProblem: the queue does not answer.
        """

    @abstractmethod
    def of_run(self, run_dir: Path) -> dict[str, str]:
        """The stage of each job of a run that waits or runs, by the job's id, also of those that were sent by hand.

        Raises:
            EnvironmentProblem: the queue does not answer.
        """

    @abstractmethod
    def ask(self, ids: Sequence[str]) -> dict[str, JobState]:
        """State of each job, by id; one question for all. Never raises: what cannot be asked is `unknown`."""

    @abstractmethod
    def lost(self, hosts: Sequence[str]) -> list[str]:
        """Those of some machines that the queue has given up, by its own names. Never raises: none where it is away."""

    @abstractmethod
    def cancel(self, ids: Sequence[str]) -> None:
        """Remove jobs from the queue, in the given order; running ones are told to stop and then killed."""

    @abstractmethod
    def ask_to_stop(self, ids: Sequence[str]) -> None:
        """Tell the ranks of running jobs to save and stop, however long that takes."""


def read_sent(run_dir: Path) -> dict[str, tuple[Sent, ...]]:
    """The jobs of a run by stage, newest submission last; empty when none was sent."""
    try:
        value = read_json(run_dir / NAME)
    except FileNotFoundError:
        return {}
    return {stage: tuple(_sent(job) for job in jobs) for stage, jobs in value.items()}


def _sent(value: Mapping[str, Any]) -> Sent:
    return Sent(**{**value, "after": tuple(value.get("after", ()))})


def note_sent(run_dir: Path, stage: str, job: Sent) -> None:
    """Add a job to what was sent, or put it in the place of the one of its token."""
    sent = read_sent(run_dir)
    sent[stage] = (*(j for j in sent.get(stage, ()) if j.token != job.token), job)
    _write(run_dir, sent)


def forget(run_dir: Path, token: str) -> None:
    """Take a submission out of what was sent: there is no job of it."""
    sent = {stage: tuple(j for j in jobs if j.token != token) for stage, jobs in read_sent(run_dir).items()}
    _write(run_dir, {stage: jobs for stage, jobs in sent.items() if jobs})


def _write(run_dir: Path, sent: Mapping[str, Sequence[Sent]]) -> None:
    write_json(run_dir / NAME, {s: [asdict(j) for j in jobs] for s, jobs in sent.items()})
