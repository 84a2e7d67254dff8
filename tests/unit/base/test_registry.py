"""Parts by name, with near names."""

from __future__ import annotations

import pytest

from cpt.base.errors import UsageError
from cpt.base.registry import Registry, nearest


def registry() -> Registry[type]:
    found: Registry[type] = Registry("animal")
    for name in ("horse", "mouse", "zebra"):
        found.add(name)(type(name, (), {}))
    return found


def test_a_part_is_found_by_its_name() -> None:
    assert registry().get("zebra").__name__ == "zebra"
    assert list(registry()) == ["horse", "mouse", "zebra"]
    assert "horse" in registry() and "cow" not in registry()


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        registry().get("zbra")
    assert caught.value.message == "unknown animal `zbra`"
    assert caught.value.hints == ("did you mean `zebra`?",)


def test_a_name_like_no_other_lists_all() -> None:
    with pytest.raises(UsageError) as caught:
        registry().get("xylophone")
    assert caught.value.hints == ("known: `horse`, `mouse`, `zebra`",)


def test_nearest_does_not_mind_capitals() -> None:
    assert nearest("ZEBRA", ["zebra", "horse"]) == "zebra"
    assert nearest("q", ["zebra"]) is None


def test_a_name_is_registered_once() -> None:
    parts = registry()
    with pytest.raises(AssertionError, match="twice"):
        parts.add("horse")(int)
