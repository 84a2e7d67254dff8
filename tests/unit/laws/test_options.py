"""Options of a law as a person writes them."""

from __future__ import annotations

import pytest

from cpt.base.errors import UsageError
from cpt.laws import LAWS, Law
from cpt.laws.analyse import analyse
from cpt.laws.options import read_options
from cpt.laws.settings import Settings
from tests.unit.laws.tables import set_m


@pytest.mark.parametrize(
    ("law", "given", "wanted"),
    [
        ("mixing", {"two_stage": True, "c": "1.2"}, {"two_stage": True, "c": 1.2}),
        ("additive", {"joint": "yes"}, {"joint": True}),
        ("repeated", {"tied": 0}, {"tied": False}),
        ("cross_dcpt", {"probe_tokens": "100M", "normalise": "none"}, {"probe_tokens": 1e8, "normalise": "none"}),
        ("cmr", {"side": "general"}, {"side": "general"}),
        ("dcpt", {}, {}),
    ],
)
def test_values_are_read(law: str, given: dict[str, object], wanted: dict[str, object]) -> None:
    assert read_options(LAWS.get(law), given) == wanted


@pytest.mark.parametrize(
    ("law", "given", "message"),
    [
        ("mixing", {"twostage": True}, "unknown option of law `mixing` `twostage`"),
        ("mixing", {"two_stage": "maybe"}, "option `two_stage` of law `mixing`: `maybe` is neither true nor false"),
        ("mixing", {"corpora": 3}, "unknown option of law `mixing` `corpora`"),
        ("mixing", {"c": "abc"}, "option `c` of law `mixing`: `abc` is not a number"),
        ("cmr", {"side": "left"}, "option `side` of law `cmr`: `left` is not known, wanted `domain` or `general`"),
        ("dcpt", {"has_n": False}, "law `dcpt` has no options, found `has_n`"),
    ],
)
def test_what_a_law_does_not_have_or_take_is_refused(law: str, given: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as error:
        read_options(LAWS.get(law), given)
    assert error.value.message.startswith(message)


def test_an_analysis_reads_the_options_of_its_law() -> None:
    with pytest.raises(UsageError, match="law `dcpt` has no options, found `foo`"):
        analyse(set_m(), "dcpt", Settings(options={"foo": 1}))
    with pytest.raises(UsageError, match="those of one law"):
        analyse(set_m(), "auto", Settings(options={"two_stage": True}))


@pytest.mark.parametrize("name", sorted(LAWS))
def test_every_option_is_a_field_of_its_law(name: str) -> None:
    kind: type[Law] = LAWS.get(name)
    assert set(kind.settable) <= set(kind.__dataclass_fields__)  # type: ignore[attr-defined]
    assert kind.name == name and kind.equation
