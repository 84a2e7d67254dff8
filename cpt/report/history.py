"""A run as it lies on disk: plan, states, events and the account of losses, read together once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cpt.base.events import Event, stage_events
from cpt.base.files import read_lines
from cpt.evaluate import Account, account
from cpt.plan.types import RunPlan
from cpt.stages import state
from cpt.stages.attempt import read_plan
from cpt.stages.state import State


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """A run folder, read."""

    folder: Path
    plan: RunPlan
    states: Mapping[str, State]
    homes: Mapping[str, Path]  # by stage: the folder with its attempts, perhaps in another run
    events: Mapping[str, tuple[Event, ...]]  # by stage
    run_events: tuple[Event, ...]  # of the orchestrator
    command: str
    account: Account


def read_run(folder: Path) -> RunHistory:
    """Read a run folder, finished or not.

    Raises:
        UsageError: it is not a run folder, or its plan or a state is damaged.
    """
    plan = read_plan(folder)
    states = {name: state.read(folder / "stages" / name) for name in plan.stages}
    homes = {name: state.home(folder / "stages" / name) for name in plan.stages}
    return RunHistory(
        folder=folder,
        plan=plan,
        states=states,
        homes=homes,
        events={name: tuple(_clean(stage_events(home))) for name, home in homes.items()},
        run_events=tuple(_clean(read_lines(folder / "events.jsonl"))),
        command=_command(folder),
        account=account(plan, homes),
    )


def _clean(events: object) -> list[Event]:
    """Events that are mappings: a foreign line in the file is passed over."""
    return [e for e in events if isinstance(e, dict)]  # type: ignore[attr-defined]


def _command(folder: Path) -> str:
    """The newest command in `command.txt`."""
    try:
        lines = (folder / "command.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    typed = [line for line in lines if line.strip() and not re.match(r"\s*#", line)]
    return typed[-1] if typed else ""
