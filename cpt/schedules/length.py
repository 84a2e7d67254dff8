"""Lengths of the parts of a curve: a share of the span, a number of steps, or a number of tokens."""

from __future__ import annotations

import math
import re

from cpt.base.errors import UsageError
from cpt.base.units import parse_count, parse_share

Length = str | float | int
FORMS = "`1%` of the span, `200 steps`, `500M` tokens"


def parse_length(name: str, value: object) -> tuple[str, float]:
    """The unit (`share`, `steps` or `tokens`) and the amount of a length. Numbers up to 1 are shares.

    Raises:
        UsageError: not a length.
    """
    error = UsageError(f"`{name}` is `{value}`, not a length; accepted forms: {FORMS}")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise error
    text = str(value).strip()
    steps = re.fullmatch(r"(.+?)\s*steps?", text)
    try:
        if steps:
            return "steps", parse_count(steps[1])
        if text.endswith("%"):
            return "share", parse_share(text)
        try:
            number = float(text)
        except ValueError:
            number = math.inf
        if 0 <= number <= 1:
            return "share", number
        return "tokens", parse_count(re.sub(r"\s*tokens?$", "", text))
    except UsageError:
        raise error from None


def num_steps(value: Length, span: int, tokens_per_step: int | None = None) -> int:
    """A length in steps, rounded up.

    Args:
        value: the length.
        span: what a share is a share of [steps].
        tokens_per_step: tokens of one optimizer step; only lengths in tokens need it.
    """
    unit, amount = parse_length("length", value)
    if unit == "share":
        return math.ceil(amount * span - 1e-9)  # 0.07 · 100 is 7.000000000000001
    if unit == "tokens":
        assert tokens_per_step, "a length in tokens was not turned into steps by `join.resolve`"
        return -(-int(amount) // tokens_per_step)
    return int(amount)


def in_steps(steps: int) -> str:
    """The text of a length in steps: what resolved options hold."""
    return f"{steps} steps"
