"""Two plans side by side, value by value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cpt.base.records import to_json
from cpt.base.units import show_count
from cpt.plan.fingerprint import LAYOUT
from cpt.plan.types import RunPlan

ABSENT = "absent"
# Derived values that would only repeat the difference that they come from.
_SKIPPED = ("id", "name", "config", "cache", "runs", "recipe")
_SKIPPED_BELOW = (
    "fingerprint",
    "hf_config",
    "identity",
    "keep_steps",
    "points",
    "patterns",
    "assumed",
    "answer",
    "doubts",
)


@dataclass(frozen=True)
class Difference:
    """One value that differs.

    Args:
        key: as a person would write it in a recipe or on the command line.
        changes_result: the stage's fingerprint, or the data behind it, depends on it.
    """

    key: str
    a: Any
    b: Any
    changes_result: bool


def diff(a: RunPlan, b: RunPlan) -> list[Difference]:
    """Every value that differs, in the order of the plan: first what changes a result, then the rest."""
    before, after = _flat(to_json(a), ""), _flat(to_json(b), "")
    keys = [*before, *(k for k in after if k not in before)]
    differ = [k for k in keys if before.get(k, ABSENT) != after.get(k, ABSENT)]
    found = [
        Difference(typed(k), before.get(k, ABSENT), after.get(k, ABSENT), _matters(k))
        for k in differ
        if not _said_by_another(k, before, after, differ)
    ]
    return sorted(found, key=lambda d: not d.changes_result)


def same_result(a: RunPlan, b: RunPlan) -> list[str]:
    """Stages, by name, that have equal fingerprints in both plans."""
    return [n for n, s in a.stages.items() if n in b.stages and s.fingerprint == b.stages[n].fingerprint]


def typed(key: str) -> str:
    """The key of a plan's value as recipes have it: `stages.domain.train.seed` is `stages.domain.seed` there."""
    parts = key.split(".")
    if len(parts) > 3 and parts[0] == "stages" and parts[2] in ("train", "options"):
        del parts[2]
    elif len(parts) == 3 and parts[0] == "stages":
        parts[2] = {"parent": "from", "parent_at": "from"}.get(parts[2], parts[2])
    return ".".join(parts)


def shown(one: Difference) -> tuple[str, str]:
    """Both values for a person: large counts as the plan shows them, as long as the two then still differ."""
    a, b = (_show(v, one.key) for v in (one.a, one.b))
    return (a, b) if a != b else (str(one.a), str(one.b))


def _show(value: Any, key: str) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool) and not key.endswith("seed"):
        return show_count(value)
    return str(value)


def _said_by_another(key: str, before: Mapping[str, Any], after: Mapping[str, Any], differ: list[str]) -> bool:
    """Whether a row only repeats others: the empty side of a group whose values are told, or steps beside tokens."""
    if key.endswith(".train.steps"):
        return key.removesuffix("steps") + "tokens" in differ
    empty = before.get(key, ABSENT) in (None, {}, ABSENT) and after.get(key, ABSENT) in (None, {}, ABSENT)
    return empty and any(other.startswith(f"{key}.") for other in differ)


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        found: dict[str, Any] = {}
        for key, below in value.items():
            if (not prefix and key in _SKIPPED) or key in _SKIPPED_BELOW:
                continue
            found |= _flat(below, f"{prefix}.{key}" if prefix else str(key))
        return found
    return {prefix: value}


def _matters(key: str) -> bool:
    """Whether a value takes part in a fingerprint."""
    parts = key.split(".")
    if parts[0] in ("launcher", "tracking"):
        return False
    if parts[0] == "sources":
        return parts[-1] not in ("reader", "licence", "paths", "documents", "bytes", "estimated", "valid_tokens")
    if parts[0] in ("base", "tokenizer") and parts[-1] in ("path", "kind"):
        return False
    if len(parts) > 3 and parts[0] == "stages" and parts[2] == "train":
        without = (
            "parallel",
            "evaluate",
            "saving",
            "micro_batch_size",
            "recompute",
            "log_every",
            "broken_import_guard",
            "stop_if",
        )
        return parts[3] not in without
    return not (len(parts) > 3 and parts[2] == "options" and parts[3] in LAYOUT)
