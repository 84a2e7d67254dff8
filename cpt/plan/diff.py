"""Two plans side by side, value by value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cpt.plan.fingerprint import LAYOUT
from cpt.plan.types import RunPlan, to_json

ABSENT = "absent"
# Derived values that would only repeat the difference that they come from.
_SKIPPED = ("id", "name", "config", "cache", "runs", "recipe")
_SKIPPED_BELOW = ("fingerprint", "hf_config", "identity", "keep_steps", "points", "patterns")


@dataclass(frozen=True)
class Difference:
    """One value that differs. `changes_result`: the stage's fingerprint, or the data behind it, depends on it."""

    key: str
    a: Any
    b: Any
    changes_result: bool


def diff(a: RunPlan, b: RunPlan) -> list[Difference]:
    """Every value that differs, in the order of the plan: first what changes a result, then the rest."""
    before, after = _flat(to_json(a), ""), _flat(to_json(b), "")
    keys = [*before, *(k for k in after if k not in before)]
    found = [
        Difference(k, before.get(k, ABSENT), after.get(k, ABSENT), _matters(k))
        for k in keys
        if before.get(k, ABSENT) != after.get(k, ABSENT)
    ]
    return sorted(found, key=lambda d: not d.changes_result)


def same_result(a: RunPlan, b: RunPlan) -> list[str]:
    """Stages, by name, that have equal fingerprints in both plans."""
    return [n for n, s in a.stages.items() if n in b.stages and s.fingerprint == b.stages[n].fingerprint]


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
