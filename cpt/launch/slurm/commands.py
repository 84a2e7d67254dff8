"""Slurm's commands: arguments as lists, an environment without the leftovers of other jobs, and errors with names.

An answer that does not come says nothing about the job: a submission whose answer was lost is looked for by its token
before it is made again, so that there are never two jobs of one token.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cpt.base.errors import EnvironmentProblem, UsageError

SEPARATOR = "\x1f"  # between columns: no reason, comment or name has it
SETTLE = 1.0  # seconds between two looks for a job whose submission had no answer

# Slurm's own variables would change what commands do and print; torchrun's would tell ranks of a job who they are.
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS")
_DROPPED = (
    *("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SALLOC_", "SQUEUE_", "SCANCEL_", "SCONTROL_", "SACCT_", "SINFO_"),
    *("MASTER_", "TORCHELASTIC_", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"),
)
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

_AWAY = re.compile(
    "unable to contact slurm controller|timed out|connection refused|connection reset|zero bytes were transmitted"
    "|controller not responding|connection failure|not connected|no route to host|standby mode|unexpected message"
    "|munge|authentication|credential|configuration (file|source)|fetch config|incompatible (protocol )?version",
    re.IGNORECASE,
)
_LATER = re.compile(
    r"submit\w*limit|temporarily unable to accept|resource temporarily unavailable|partition not available|"
    r"\(inactive or drain\)|in maintenance",
    re.IGNORECASE,
)
_NO_NODES = re.compile("node configuration is not available|nodes are busy", re.IGNORECASE)
_WORKING = ("idle", "mixed", "allocated", "completing", "planned", "reserved")
_UNKNOWN_JOB = re.compile("invalid job id specified", re.IGNORECASE)
_ENDED = re.compile("already (completing|finished)|invalid job id specified", re.IGNORECASE)

# What sbatch says, and what a person does about it; the first that fits.
_NODES = "`sinfo -N -o '%N %c %m %G'` lists the CPUs, memory [MiB] and GPUs of each node: "
_ASSOC = "`sacctmgr show associations user=$USER format=account,partition,qos` lists what you may use: "
_HINTS = {
    "account or account/partition|invalid account": _ASSOC + "`launcher.account=...`",
    "invalid qos": _ASSOC + "`launcher.qos=...`",
    "group not permitted|access/permission denied": "ask the cluster's administrators for the right to use it",
    "partition": "`sinfo -s` lists the partitions: `launcher.partition=...`",
    "feature": "`sinfo -o '%P %f'` lists the features of nodes: `launcher.constraint=...`",
    "reservation": "`scontrol show reservation` lists them: `launcher.reservation=...`",
    "generic resource|gres|gpu": _NODES + "`launcher.gpus`, `launcher.gres_type`, `launcher.ranks_per_node`",
    "requested time limit|--time|time specification": "`sinfo -o '%P %l'` lists the limits: `launcher.time=...`",
    "memory": _NODES + "`launcher.mem=...`",
    "cpu count|processors": _NODES + "`launcher.cpus_per_rank`, `launcher.ranks_per_node`",
    "node configuration|node count|node name|nodes": _NODES + "`launcher.nodes`, `launcher.ranks_per_node`",
    "array": "MaxArraySize in `scontrol show config` is one above the largest index",
    "qos|policy|limit": "`sacctmgr show qos` and `sacctmgr show associations` list the limits",
    "dependency": "the queue does not know a job that it waits for",
    "unrecognized option|invalid option": "`launcher.extra` holds options of `sbatch`",
    "batch script|line breaks": "it comes from `launcher.template`",
}


class NotInstalled(EnvironmentProblem):
    """A command of Slurm is not on this machine."""


class Away(EnvironmentProblem):
    """The controller does not answer. Whether it has done what it was asked is not known."""


class TryLater(EnvironmentProblem):
    """The queue takes no more jobs now; none was made."""


class Refused(UsageError):
    """Slurm does not do what it was asked, and will not do it later."""


@dataclass(frozen=True)
class Said:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


@dataclass(frozen=True, kw_only=True)
class Commands:
    """Slurm's commands on this machine.

    Args:
        environ: variables that they start from; a submission with `--export=ALL` hands these on to the job.
        cwd: where they run, which is where a job starts when its script says nothing else.
        seconds: longest wait for an answer [s].
    """

    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)
    cwd: Path = field(default_factory=Path.cwd)
    seconds: float = 30.0

    def run(self, *arguments: str, seconds: float | None = None) -> Said:
        """Run a command to its end.

        Raises:
            NotInstalled: it is not there.
            Away: no answer in time; the command is ended.
        """
        limit = self.seconds if seconds is None else seconds
        try:
            child = subprocess.Popen(
                arguments,
                env=clean(self.environ),
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C in the terminal is for `cpt` alone
            )
        except (FileNotFoundError, PermissionError):
            raise _not_started(arguments[0], self.cwd) from None
        try:
            out, err = child.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            _end(child)
            _, err = child.communicate()
            told = f": {_one_line(err)}" if err.strip() else ""
            raise Away(f"`{arguments[0]}` did not end in {limit:g} s{told}") from None
        except BaseException:
            _end(child)
            raise
        return Said(child.returncode, out, err)

    def submit(
        self,
        script: Path,
        token: str,
        dependency: str | None = None,
        kill_on_invalid_dep: bool = True,
        *,
        again: bool = False,
    ) -> str:
        """Hand a script to the queue; gives the job's id.

        Args:
            token: unique mark, kept with the job as its comment.
            dependency: as in `--dependency`.
            kill_on_invalid_dep: cancel the job when what it waits for can no longer come; else it waits for ever.
            again: the token may have been used before: a job that has it is taken.

        Raises:
            Refused: for what it asks.
            TryLater: too many jobs are in the queue.
            Away: no answer, and whether there is a job of this token is not known.
        """
        command = ["sbatch", "--parsable", f"--comment={token}"]
        if dependency:
            command += [f"--dependency={dependency}", f"--kill-on-invalid-dep={'yes' if kill_on_invalid_dep else 'no'}"]
        command.append(str(script.absolute()))
        if again and (known := self.find(token)):
            return known
        try:
            return self._sbatch(command, script)
        except Away as lost:
            if known := self._settled(token, lost):
                return known
            if _LATER.search(lost.message):  # sbatch itself tried until its time was over
                raise _later(f"`{script.name}`", lost.message) from None
        try:
            self._sbatch(command, script)
        except Away as lost:
            if known := self._settled(token, lost):
                return known
            raise
        return self._only(token)

    def test_only(self, script: Path) -> str:
        """What the queue says about a script that is not submitted; it does not look at limits of partitions.

        Raises:
            Refused: it would not take the script.
        """
        said = self.run("sbatch", "--test-only", str(script.absolute()))
        _check(said, f"`{script.name}`")
        return _one_line(said.err or said.out)

    def refuse_hopeless(self, script: Path) -> None:
        """Return unless the queue would refuse a script; nothing is submitted.

        A script that only waits for nodes that are away just now passes: `--test-only` refuses it, a submission is
        taken.

        Raises:
            Refused, TryLater, NotInstalled, Away: as a submission.
        """
        try:
            self.test_only(script)
        except Refused as error:
            if not (_NO_NODES.search(error.message) and self._lacks_nodes()):
                raise

    def _lacks_nodes(self) -> bool:
        """Whether some node of the cluster takes no jobs now."""
        said = self.run("sinfo", "-h", "-o", "%T")
        return any(word.rstrip("~#%^+") not in _WORKING for word in said.out.split())

    def find(self, token: str, *, seconds: float | None = None) -> str | None:
        """The job that has a token, finished ones included while the queue remembers them."""
        found = self._all(token, seconds)
        return found[0] if found else None

    def printing_into(self, folder: Path) -> dict[str, str]:
        """The waiting and running jobs whose log lies in a folder, by id, with the name of the folder inside of it.

        The script itself says where it prints: that stays the same however it was submitted.
        """
        columns = {"ArrayJobID": 20, "STDOUT": 4000}
        said = self.run("squeue", "-a", "-h", "--me", "-O", layout(columns))
        _check(said, "the list of jobs")
        start = f"{folder}/".replace("%", "%%")
        found = {id: log[len(start) :].partition("/")[0] for id, log in rows(said, columns) if log.startswith(start)}
        return {id: name.replace("%%", "%") for id, name in found.items()}

    def requeue(self, job: str) -> None:
        """Put a running job back into the queue, under the same id.

        Raises:
            Refused: the job or the cluster does not allow it.
        """
        _check(self.run("scontrol", "requeue", job), f"to put job {job} back into the queue")

    def cancel(self, ids: Sequence[str]) -> None:
        """Remove jobs one after the other; those that ended or are not known any more are passed over."""
        for job in ids:
            said = self.run("scancel", job)
            if not _ENDED.search(said.err):
                _check(said, f"to cancel job {job}")

    def signal(self, ids: Sequence[str], name: str) -> None:
        """Send a signal to every process of the steps of running jobs, not to their batch shells; others have none."""
        if not ids:
            return
        said = self.run("scancel", f"--signal={name}", "--state=RUNNING", *ids)
        if not _ENDED.search(said.err):
            _check(said, f"signal {name}")

    def _sbatch(self, command: Sequence[str], script: Path) -> str:
        said = self.run(*command)
        _check(said, f"`{script.name}`")
        job = said.out.strip().splitlines()[-1].split(";")[0].strip() if said.out.strip() else ""
        if not job.isdigit():
            raise Away(f"`sbatch` gave no id of a job: {_one_line(said.out + said.err) or 'nothing'}")
        return job

    def _settled(self, token: str, lost: EnvironmentProblem) -> str | None:
        """A job whose submission had no answer; looks twice, as the controller may still be at it."""
        for look in range(2):
            if look:
                time.sleep(SETTLE)
            try:
                found = self.find(token, seconds=min(self.seconds, 10))
            except EnvironmentProblem:
                hint = (
                    f"a job may be in the queue all the same: `squeue --me -o '%i %k'` shows it with the mark `{token}`"
                )
                raise Away(lost.message, hint) from None
            if found:
                return found
        return None

    def _only(self, token: str) -> str:
        """The first job of a token; others are removed before they do anything."""
        found = self._all(token)
        if not found:
            raise Away("a job was submitted, and the queue does not know it")
        self.cancel(found[1:])
        return found[0]

    def _all(self, token: str, seconds: float | None = None) -> list[str]:
        columns = {"ArrayJobID": 20, "State": 30, "Reason": 100, "Comment": 300}
        said = self.run("squeue", "-a", "-h", "--me", "-t", "all", "-O", layout(columns), seconds=seconds)
        _check(said, "the list of jobs")
        refused = ["FAILED", "BadConstraints"]  # a submission that was not taken leaves a record as well
        found = {int(row[0]) for row in rows(said, columns) if row[3] == token and row[1:3] != refused}
        return [str(job) for job in sorted(found)]


def clean(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment without what a Slurm job, `torchrun` or a person's settings for Slurm's commands put there."""
    return {k: v for k, v in environ.items() if k in _KEPT or not (k in _RANKS or k.startswith(_DROPPED))}


def layout(columns: Mapping[str, int]) -> str:
    """Columns by name with their widths, as squeue's `-O` takes them; each ends with SEPARATOR."""
    return ",".join(f"{name}:{width}{SEPARATOR}" for name, width in columns.items())


def rows(said: Said, columns: Mapping[str, int]) -> list[list[str]]:
    """What squeue printed in such columns."""
    found = ([part.strip() for part in line.split(SEPARATOR)[:-1]] for line in said.out.split("\n"))
    return [row for row in found if len(row) == len(columns)]


def is_away(said: Said) -> bool:
    """Whether a command failed because nobody answered it."""
    return said.code != 0 and _AWAY.search(said.err) is not None and not _UNKNOWN_JOB.search(said.err)


def is_unknown_job(said: Said) -> bool:
    """Whether a command failed because no job it was given is known."""
    return said.code != 0 and _UNKNOWN_JOB.search(said.err) is not None


def why(said: Said) -> str:
    """What a command complains about, on one line."""
    return _one_line(said.err or said.out) or f"exit code {said.code}"


def parse_limit(text: str) -> float | None:
    """Slurm's `30:00`, `1:00:00` or `1-02:03:04` [s]; None for other words, such as `UNLIMITED` and `INVALID`."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _check(said: Said, what: str) -> None:
    if said.code == 0:
        return
    told = why(said)
    if _LATER.search(said.err):
        raise _later(what, told)
    if is_away(said):
        raise Away(f"Slurm does not answer: {told}")
    hints = [hint for form, hint in _HINTS.items() if re.search(form, told, re.IGNORECASE)]
    raise Refused(f"Slurm refuses {what}: {told}", *hints[:1])


def _later(what: str, told: str) -> TryLater:
    return TryLater(
        f"Slurm does not take {what} now: {told}", "try again later: the jobs that were sent stay in the queue"
    )


def _one_line(text: str) -> str:
    """Complaints without their repeated beginnings and without those that say the same once more."""
    found: list[str] = []
    for line in text.splitlines():
        line = re.sub(r"^(\w+: )?((error|fatal|warning|debug): )?(Batch job submission failed: )?", "", line.strip())
        line = "".join(c if c.isprintable() else " " for c in line).strip()
        if line and line not in found and not line.startswith(("Try ", "Usage:")):
            found.append(line)
    return "; ".join(found[:4])[:500]


def _not_started(command: str, cwd: Path) -> NotInstalled | EnvironmentProblem:
    if not cwd.is_dir():
        return EnvironmentProblem(f"`{cwd}` is not a folder: Slurm's commands run there")
    return NotInstalled(
        f"Slurm is not installed on this machine: no command `{command}`",
        "run `cpt` on a login node of the cluster, or with `launcher=local`",
    )


def _end(child: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(5)
