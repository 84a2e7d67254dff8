"""Settings refuse what cannot be meant."""

from __future__ import annotations

import pytest

from cpt.base.errors import UsageError
from cpt.laws.settings import Settings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tolerance": -0.01}, "`tolerance` is -0.01, wanted 0 or more"),
        ({"eps_g": float("nan")}, "`eps_g` is nan"),
        ({"tolerance": 0.03, "eps_g": 0.1}, "both limit the general loss"),
        ({"n_params": 0}, "`n_params` is 0, wanted more than 0"),
        ({"tokens": -1e9}, "`tokens`"),
        ({"budget": float("inf")}, "`budget`"),
        ({"ratio": 1.5}, "`ratio` is 1.5, wanted 0 to 1"),
        ({"bootstrap": -1}, "`bootstrap`"),
        ({"scale": "cubic"}, "`scale` is `cubic`"),
        ({"base_losses": {"general": 0.0}}, "`base_general` is 0"),
    ],
)
def test_a_wrong_value_is_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Settings(**wrong)  # type: ignore[arg-type]
