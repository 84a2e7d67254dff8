"""A stage's state survives the disk, and a damaged one is a clear message."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpt.base.errors import UsageError
from cpt.stages import state
from cpt.stages.state import State


def test_a_stage_that_never_ran_is_pending(tmp_path: Path) -> None:
    assert state.read(tmp_path / "domain") == State()


def test_a_state_is_read_back_as_written(tmp_path: Path) -> None:
    written = State(
        status=state.SAVED,
        attempt=3,
        step=120,
        reason="stopped",
        fingerprint="ab",
        guard={"source": "web", "loss_rises": 0.03},
        updated=1.5,
    )
    state.write(tmp_path, written)
    assert state.read(tmp_path) == written


@pytest.mark.parametrize("text", ["{", "[]", '{"status": "finished"}', '{"stat": "done"}', "3"])
def test_a_damaged_state_is_named_not_guessed(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(UsageError, match=r"state\.json"):
        state.read(tmp_path)


def test_results_of_a_reused_stage_lie_in_the_other_run(tmp_path: Path) -> None:
    state.write(tmp_path, State(status=state.DONE, reference="/runs/other/stages/domain"))
    assert state.home(tmp_path) == Path("/runs/other/stages/domain")
