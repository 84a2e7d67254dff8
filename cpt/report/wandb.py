"""wandb as a sink that can never stop or slow a run: another process reads the run's event files and sends them.

    cpt run ──starts──▶ python -m cpt.report.wandb_process RUN ──▶ wandb
       │                     ▲ reads events.jsonl of every attempt
       └── closes its stdin at the end (or dies): it sends the rest, and is killed when that takes too long

In a batch job the script starts it beside the ranks of a stage, and ends it by a signal.

The run's id, and how far each event file has been sent, are in `wandb/sent.json`: a run that is started again ten times
is one wandb run, and an offline one can be sent later by `cpt sync`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cpt.launch import launcher_of
from cpt.launch.batch import Batch
from cpt.plan.types import RunPlan

FOLDER = "wandb"
STATE = "sent.json"
LOG = "process.log"
LATER = "the run does not depend on it, `cpt sync` sends it later"
CLOSE_SECONDS = 20.0  # for sending what is left when the run has ended


class WandbSink:
    """The sending process of one run.

    Args:
        run_dir: the run's folder.
        command: what to start, for tests.
    """

    def __init__(self, run_dir: Path, command: Sequence[str] | None = None) -> None:
        self.run_dir = run_dir
        self.problem: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        try:
            folder = run_dir / FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            write_state(folder, **{**read_state(folder), "problem": None})
            with open(folder / LOG, "ab") as log:
                self._process = subprocess.Popen(
                    [*(command or [sys.executable, "-m", "cpt.report.wandb_process", str(run_dir)])],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for the run, which then closes this process
                )
        except OSError as error:
            self.problem = f"wandb could not be started: {error}"

    def close(self, seconds: float = CLOSE_SECONDS) -> str | None:
        """Let it send the rest, for so long at most.

        Returns:
            What went wrong, as one line for a person, or None.
        """
        process, self._process = self._process, None
        if process is None:
            return self.problem
        with contextlib.suppress(OSError):
            assert process.stdin is not None
            process.stdin.close()
        late = False
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            late = True
        # Whatever it started ends with it, also when it has ended by itself.
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if late:
            take_back(self.run_dir / FOLDER)
        said = read_state(self.run_dir / FOLDER).get("problem")
        if late:
            self.problem = f"wandb did not finish within {seconds:.0f} s"
        elif said or process.returncode != 0:
            self.problem = f"wandb failed: {said or f'its process ended with {process.returncode}'}"
        return self.problem


def start(plan: RunPlan, run_dir: Path) -> WandbSink | None:
    """The sink of a run, or None when its plan does not want wandb, or its jobs in a queue tell wandb themselves."""
    wanted = plan.tracking.get("wandb", "off") != "off" and not isinstance(launcher_of(plan.launcher), Batch)
    return WandbSink(run_dir) if wanted else None


def sync(run_dir: Path, wait: Callable[[str], None], seconds: float = 3600.0) -> str | None:
    """Send everything of a run that was not sent online yet.

    Args:
        wait: told what is waited for.
        seconds: how long at most.

    Returns:
        What went wrong, or None.
    """
    wait("sending the events of the run to wandb")
    command = [sys.executable, "-m", "cpt.report.wandb_process", str(run_dir), "online"]
    return WandbSink(run_dir, command).close(seconds)


def is_only_here(run_dir: Path) -> bool:
    """Whether wandb was told something offline that was not sent since."""
    sent = read_state(run_dir / FOLDER).get("sent")
    modes = sent if isinstance(sent, dict) else {}
    there = modes.get("online", {})
    return any(count > there.get(name, 0) for name, count in modes.get("offline", {}).items())


def read_state(folder: Path) -> dict[str, Any]:
    """What `sent.json` says: id, problem, and by mode how many bytes of each event file were sent (`begun`: when the
    process that is at it began).
    """
    try:
        value = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def take_back(folder: Path) -> None:
    """Take what a process has sent that could not finish for not sent: twice in wandb is better than never."""
    said = read_state(folder)
    with contextlib.suppress(OSError):
        write_state(folder, **{**said, "sent": {**said.get("sent", {}), **said.get("begun", {})}})


def write_state(folder: Path, **fields: Any) -> None:
    """Replace `sent.json`."""
    from cpt.base.files import write_json

    write_json(folder / STATE, {**fields, "time": time.time()})
