"""Ways to start the ranks of a stage. New launcher = one file here + its import below.

A launcher is a frozen dataclass of its own options. Some start ranks at once, as children of `cpt run` (`Direct`);
others hand scripts to a queue, which starts them later and elsewhere (`batch.Batch`). What an attempt at a stage is,
and how it ended, is decided by `cpt.stages.attempt` alone: it writes `job.json`, and the ranks of both kinds are
`python -m cpt.worker JOB.json`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.base.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Work:
    """A stage, as a launcher sees it."""

    run_dir: Path
    stage: str
    world_size: int
    layout: str  # for people, e.g. "tp 2, pp 2, dp 1"
    python: str  # the interpreter that has `cpt`
    cwd: Path  # where the person typed the command
    afterwards: tuple[tuple[str, ...], ...] = ()  # commands after a stage that is done; how they end changes nothing
    beside: tuple[str, ...] = ()  # a command while a job works on the stage; at SIGTERM it comes to its end by itself


@dataclass(frozen=True, kw_only=True)
class Launch(Work):
    """One attempt at a stage. The attempt's folder holds `job.json` and takes `logs/`."""

    attempt_dir: Path

    @property
    def job(self) -> Path:
        return self.attempt_dir / "job.json"


class Ranks(ABC):
    """Ranks that were started. `poll` until it gives an exit code."""

    @abstractmethod
    def poll(self) -> int | None:
        """None while a rank lives; then 0 done, 75 saved, 4 a guard, else failed (`attempt_N/failure.json`)."""

    @abstractmethod
    def stop(self) -> None:
        """Ask all ranks to save and stop. May be called again without harm."""

    @abstractmethod
    def kill(self) -> None:
        """End everything now; returns when nothing is left."""


class Launcher(ABC):
    """One way to start workers. Every one has the options

    retries: how often a stage is tried again after a fault of the machine (a killed rank, a lost node, a hang) without
        a single step gained in between.
    """

    retries: int

    @abstractmethod
    def num_devices(self) -> int | None:
        """Processes that a stage may use when the recipe gives no `dp`; None when only the layout decides."""


class Direct(Launcher):
    """Starts ranks at once."""

    @abstractmethod
    def write_script(self, work: Work) -> Path:
        """Write the readable script that does by hand what `start` does, into the stage's folder."""

    @abstractmethod
    def start(self, launch: Launch, environ: Mapping[str, str]) -> Ranks:
        """Start the ranks; returns at once."""


LAUNCHERS: Registry[type[Launcher]] = Registry("launcher")


def launcher_of(options: Mapping[str, Any]) -> Launcher:
    """The launcher of a plan: `name` and its options."""
    return LAUNCHERS.get(str(options.get("name", "local")))(**{k: v for k, v in options.items() if k != "name"})


from cpt.launch import local, slurm  # noqa: E402, F401
