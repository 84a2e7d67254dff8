"""`where`: comparisons that are read and never evaluated."""

from __future__ import annotations

import pytest

from cpt.base.errors import UsageError
from cpt.laws.where import parse

COLUMNS = {
    "step": ["1000", "3000", None, "5k"],
    "top5_loss": ["0", "1", "0", "0"],
    "name": ["a", "b", "a", "c d"],
    "r_domain": [0.25, 0.5, 0.5, 1],
    "good": [True, False, True, None],
    "odd name!": ["1", "2", "3", "4"],
}


def kept(text: str) -> list[int]:
    return [i for i, met in enumerate(parse(text).mask(COLUMNS, 4)) if met]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("top5_loss==0", [0, 2, 3]),
        ("top5_loss==0 and step>=3000", [3]),
        ("step < 3k", [0]),
        ("step != 1000", [1, 3]),  # an empty cell meets no comparison
        ("name == a", [0, 2]),
        ("name == 'c d'", [3]),
        ('name != "a" AND r_domain <= 50%', [1]),
        ("r_domain > 2.5e-1", [1, 2, 3]),
        ("good == 1", [0, 2]),
        ("`odd name!` >= 3", [2, 3]),
        ("step > -1", [0, 1, 3]),
    ],
)
def test_rows_that_meet_all_comparisons_are_kept(text: str, rows: list[int]) -> None:
    assert kept(text) == rows


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("step", "ends before"),
        ("step >=", "ends before"),
        ("step = 3", "cannot be read from `= 3`"),
        ("step >= 3 or step < 1", "`and` is expected before `or`"),
        ("step >= 3 step", "`and` is expected"),
        ("step >= 3 and", "ends before"),
        (">= 3 step", "a column is expected"),
        ("step 3 4", "a comparison is expected"),
        ("step == ==", "a value is expected"),
        ("stp >= 3", "unknown column `stp`"),
        ("name >= b", "compared by `==`"),
        ("name == 3", "which is no number"),
        ("__import__('os').system('x')", "cannot be read"),
        ("step >= (1)", "cannot be read"),
        ("step >= 3; rm", "cannot be read"),
    ],
)
def test_anything_else_is_refused_with_what_was_expected(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("(", r"\(").replace(")", r"\)")):
        parse(text).mask(COLUMNS, 4)


def test_an_equals_sign_is_told_how_equality_is_written() -> None:
    with pytest.raises(UsageError) as error:
        parse("step=3")
    assert error.value.hints == ("equality is written `==`",)


def test_a_misspelled_column_gets_the_nearest() -> None:
    with pytest.raises(UsageError) as error:
        parse("top5_los==0").mask(COLUMNS, 4)
    assert error.value.hints == ("did you mean `top5_loss`?",)
