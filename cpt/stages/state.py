"""How far a stage is: `stages/<stage>/state.json`, written atomically by whoever holds the stage's lock."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.base.errors import UsageError
from cpt.base.files import read_json, write_json
from cpt.base.records import from_json

PENDING, RUNNING, SAVED, DONE, FAILED = "pending", "running", "saved", "done", "failed"
STATUSES = (PENDING, RUNNING, SAVED, DONE, FAILED)


@dataclass(frozen=True, kw_only=True)
class State:
    """A stage's state. `fingerprint` is that of the plan under which the folder's checkpoints were made."""

    status: str = PENDING
    attempt: int = 0  # the newest attempt, counted from 1
    step: int | None = None  # last completed step that is known
    reason: str = ""  # why it has this status, for people
    fingerprint: str = ""
    reference: str | None = None  # stage folder of another run whose result is used instead of own work
    guard: Mapping[str, Any] | None = None  # the `stop_if` rule that ended the stage
    updated: float = 0.0  # [unix seconds]


def read(stage_dir: str | os.PathLike[str]) -> State:
    """The state in a stage's folder; pending when nothing was ever done.

    Raises:
        UsageError: the file is there but not readable as a state.
    """
    path = Path(stage_dir) / "state.json"
    try:
        value = read_json(path)
        state = from_json(State, value)
    except FileNotFoundError:
        return State()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"`{path}` is damaged: {error}", "`--fresh` starts again in a new folder") from None
    if state.status not in STATUSES:
        raise UsageError(f"`{path}` has the unknown status `{state.status}`", "`--fresh` starts again in a new folder")
    return state


def write(stage_dir: str | os.PathLike[str], state: State) -> None:
    """Write a stage's state atomically."""
    write_json(Path(stage_dir) / "state.json", dataclasses.asdict(state))


def home(stage_dir: str | os.PathLike[str]) -> Path:
    """The folder that holds a stage's results: its own, or that of the run it re-uses."""
    reference = read(stage_dir).reference
    return Path(reference) if reference else Path(stage_dir)
