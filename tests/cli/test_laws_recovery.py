"""The benchmark of recovery, with the ten draws that every change is held to."""

from __future__ import annotations

import pytest

from benchmarks import laws_recovery


def test_ten_noisy_tables_give_back_their_law_and_intervals_that_hold_the_true_ratio(
    capsys: pytest.CaptureFixture[str],
) -> None:
    missed = laws_recovery.main(["--draws", "10"])
    said = capsys.readouterr().out
    assert missed == 0, said
    assert "of 10; ratio" in said and "MISSED" not in said


def test_ninety_of_a_hundred_intervals_must_hold_the_truth_and_few_draws_leave_room_for_chance() -> None:
    assert [laws_recovery.allowed_misses(draws) for draws in (10, 20, 100, 200)] == [3, 4, 10, 20]
