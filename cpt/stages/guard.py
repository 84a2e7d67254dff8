"""What a `stop_if` guard saw, in one wording for the display, the report and the error that ends the run."""

from __future__ import annotations

from cpt.base.events import Event


def guard_text(event: Event) -> str:
    """Before, now and limit of a `guard` event [nats/token], the last two against the first in percent."""
    before, now, limit = (event.get(name) for name in ("before", "now", "limit"))
    text = f"the validation loss of `{event.get('source', '?')}`"
    if not isinstance(before, int | float) or not isinstance(now, int | float):
        return f"{text} rose above its limit"
    text += f" rose from {before:.3f} to {now:.3f} nats/token{_percent(before, now)}"
    if isinstance(limit, int | float):
        text += f", above the limit of {limit:.3f}{_percent(before, limit)}"
    return text


def _percent(before: float, value: float) -> str:
    return f" ({100 * (value / before - 1):+.1f} %)" if before > 0 else ""
