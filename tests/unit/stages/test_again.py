"""When a stage is tried again by itself."""

from __future__ import annotations

import dataclasses

import pytest

from cpt.base.errors import DONE, FAILED, GUARD, SAVED
from cpt.stages.again import END, REPEAT, Ended, decide


def verdict(ended: Ended, retries: int = 2, max_attempts: int | None = 20, has_steps: bool = True) -> tuple[str, str]:
    return decide(ended, retries=retries, max_attempts=max_attempts, has_steps=has_steps)


def test_an_end_is_an_end() -> None:
    for code in (DONE, GUARD, FAILED):
        assert verdict(Ended(code=code, began_at=(0,), step=5)) == (END, "")


def test_saved_with_a_step_gained_goes_on() -> None:
    assert verdict(Ended(code=SAVED, began_at=(0, 10), step=11)) == (REPEAT, "")


def test_a_time_limit_without_a_step_gained_is_not_met_again() -> None:
    found, why = verdict(Ended(code=SAVED, is_at_limit=True, began_at=(0, 10), step=10))
    assert found == END
    assert "its time limit came before a step was gained; `launcher.time` must be" in why
    assert verdict(Ended(code=SAVED, is_at_limit=True, began_at=(0, 10), step=11)) == (REPEAT, "")


def test_a_stop_from_outside_before_a_step_is_repeated_as_often_as_a_fault() -> None:
    assert verdict(Ended(code=SAVED, began_at=(0, 10, 10), step=10)) == (REPEAT, "")
    found, why = verdict(Ended(code=SAVED, began_at=(0, 10, 10, 10), step=10))
    assert found == END
    assert why.endswith("3 attempts without a step gained (`launcher.retries`)")


def test_ranks_that_die_at_a_time_limit_before_they_can_save_are_told_what_to_set() -> None:
    ended = Ended(code=FAILED, is_fault=True, is_at_limit=True, began_at=(0, 0))
    assert verdict(ended) == (REPEAT, "")
    found, why = verdict(dataclasses.replace(ended, began_at=(0, 0, 0)))
    assert found == END
    assert "near its time limit: `launcher.time` must be a minute longer" in why


def test_a_stop_that_was_asked_for_is_not_repeated() -> None:
    assert verdict(Ended(code=SAVED, is_asked=True, began_at=(0,), step=5)) == (END, "")
    assert verdict(Ended(code=FAILED, is_fault=True, is_asked=True, began_at=(0,), step=5)) == (END, "")


def test_a_fault_of_the_machine_is_repeated_as_often_as_is_said() -> None:
    attempts: tuple[int, ...] = ()
    for _ in range(2):
        attempts = (*attempts, 10)
        assert verdict(Ended(code=FAILED, is_fault=True, began_at=attempts, step=10)) == (REPEAT, "")
    found, why = verdict(Ended(code=FAILED, is_fault=True, began_at=(*attempts, 10), step=10))
    assert found == END
    assert "3 attempts without a step gained" in why


def test_a_gained_step_forgives_faults() -> None:
    ended = Ended(code=FAILED, is_fault=True, began_at=(10, 10, 10), step=11)
    assert ended.without_gain == 0
    assert verdict(ended, retries=1) == (REPEAT, "")


def test_without_retries_a_fault_ends_it_without_comment() -> None:
    for step in (0, 5):
        assert verdict(Ended(code=FAILED, is_fault=True, began_at=(0,), step=step), retries=0) == (END, "")


def test_attempts_are_limited_whatever_they_gain() -> None:
    found, why = verdict(Ended(code=SAVED, began_at=tuple(range(20)), step=30))
    assert found == END
    assert "20 attempts" in why
    assert verdict(Ended(code=SAVED, began_at=tuple(range(20)), step=30), max_attempts=None)[0] == REPEAT


@pytest.mark.parametrize("code", [SAVED, FAILED])
def test_a_stage_without_steps_is_repeated_a_few_times(code: int) -> None:
    one = Ended(code=code, is_fault=True, began_at=(0,))
    assert verdict(one, has_steps=False) == (REPEAT, "")
    many = Ended(code=code, is_fault=True, began_at=(0, 0, 0))
    assert verdict(many, has_steps=False)[0] == END
