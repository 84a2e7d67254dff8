"""Ranks on this machine: one process a rank, own session, logs per rank; the first failure ends the rest."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cpt.base import processes
from cpt.base.errors import SAVED, UsageError
from cpt.base.files import write_atomic
from cpt.base.units import parse_duration
from cpt.launch import LAUNCHERS, Direct, Launch, Ranks, Work, fork, heartbeat

_SCRIPT = """\
#!/usr/bin/env bash
# Stage `{stage}` of the run in {folder}
# {num_ranks} ranks on this machine ({layout}). Written by `cpt run`, which does the same; safe to run by hand:
# it refuses while another process has the stage, goes on from the newest whole checkpoint, and records how it ended.
set -uo pipefail

cd {cwd} || exit 3

# More threads than cores slow a run several times: cores / ranks each. A stage in which nothing moves for so many
# seconds is ended.
{exports}

# 1. Take the stage: check its parent, find where to go on, write the attempt's job.json, print its path.
job=$({python} -m cpt.stages.attempt begin {run_dir} {stage_arg} --holder "$$") || exit $?
[ -n "$job" ] || exit 0  # done already

# 2. Start the ranks and wait. Logs are beside the job, in logs/rank_0000.log and so on.
{python} -m cpt.worker --ranks {num_ranks} "$job"

# 3. Record how the attempt ended: exit 0 done, 75 saved and more to do, 4 a guard ended it, else failed.
exec {python} -m cpt.stages.attempt end "$job" "$?"
"""


class LocalRanks(Ranks):
    """The ranks' parent process and everything below it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._asked = False

    def poll(self) -> int | None:
        code = self._process.poll()
        if code is not None:
            # After a `kill -9` of the parent its ranks are ending too; a resume must not meet them.
            processes.kill_session(self._process.pid)
            if self._asked and code == -signal.SIGTERM:  # before it had handlers: nothing was begun
                return SAVED
        return code

    def stop(self) -> None:
        if not self._asked:
            self._asked = True
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        processes.kill_session(self._process.pid)
        self._process.wait()


@LAUNCHERS.add("local")
@dataclass(frozen=True, kw_only=True)
class Local(Direct):
    """Start one process a rank on this machine.

    Args:
        devices: processes a stage may use when it gives no `dp`; None = the GPUs here, or what its layout needs.
        threads: threads a rank computes with; None = cores / ranks.
        retries: how often a stage is tried again after a fault of the machine without a step gained in between.
        hang_after: a stage in which no rank goes on for so long (`30m`, or seconds) is ended as a hang; 0 = never.
    """

    devices: int | None = None
    threads: int | None = None
    retries: int = 0
    hang_after: str | int | float = "30m"

    def __post_init__(self) -> None:
        for name in ("devices", "threads"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UsageError(f"`launcher.{name}` is `{value}`; it must be a whole number of at least 1")
        if isinstance(self.retries, bool) or not isinstance(self.retries, int) or self.retries < 0:
            raise UsageError(f"`launcher.retries` is `{self.retries}`; it must be a whole number of at least 0")
        try:
            parse_duration(self.hang_after)
        except UsageError as error:
            raise UsageError(f"`launcher.hang_after`: {error.message}") from None

    def num_devices(self) -> int | None:
        return self.devices if self.devices is not None else _num_gpus() or None

    def write_script(self, work: Work) -> Path:
        path = work.run_dir / "stages" / work.stage / "launch.sh"
        exports = "\n".join(f"export {k}={shlex.quote(v)}" for k, v in self._environment(work.world_size).items())
        text = _SCRIPT.format(
            stage=_comment(work.stage),
            folder=_comment(str(work.run_dir)),
            stage_arg=shlex.quote(work.stage),
            run_dir=shlex.quote(str(work.run_dir)),
            num_ranks=work.world_size,
            layout=_comment(work.layout),
            cwd=shlex.quote(str(work.cwd)),
            exports=exports,
            python=shlex.quote(work.python),
        )
        write_atomic(path, text)
        path.chmod(path.stat().st_mode | 0o111)
        return path

    def start(self, launch: Launch, environ: Mapping[str, str]) -> LocalRanks:
        logs = launch.attempt_dir / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        own = self._environment(launch.world_size)
        ours = {**environ, **own, fork.PARENT_VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        # A session of their own: Ctrl-C in a terminal reaches `cpt run` alone, which asks the ranks to save first.
        with open(logs / "launch.log", "ab") as log:
            process = subprocess.Popen(
                [launch.python, "-m", "cpt.worker", "--ranks", str(launch.world_size), str(launch.job)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=launch.cwd,
                env=ours,
                start_new_session=True,
            )
        return LocalRanks(process)

    def _environment(self, num_ranks: int) -> dict[str, str]:
        threads = self.threads or fork.num_threads(num_ranks)
        hang = {heartbeat.HANG_VARIABLE: f"{parse_duration(self.hang_after):g}"}
        return dict.fromkeys(fork.THREAD_VARIABLES, str(threads)) | hang


def _num_gpus() -> int:
    """NVIDIA GPUs of this machine, without importing torch."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def _comment(text: str) -> str:
    """Text that stays on the comment line that it is put on."""
    return "".join(c if c.isprintable() else "?" for c in text)
