"""What a `torch_dist` folder says beside its tensors, in `common.pt`: arguments, groups of the optimizer, step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cpt.checkpoint import unpickle


def arguments(value: Any) -> dict[str, Any] | None:
    """Megatron's arguments, plain ones only; dtypes as their names."""
    if not isinstance(value, unpickle.Inert):
        return None
    made = {}
    for name, held in vars(value).items():
        if name in ("args", "state"):  # the record's own fields
            continue
        try:
            made[name] = plain(held)
        except TypeError:
            continue
    return made


def groups(dicts: Sequence[Any]) -> tuple[list[dict[str, Any]], list[int]]:
    """(parameter groups, step counts) out of the optimizers' own dictionaries."""
    groups: list[dict[str, Any]] = []
    steps: list[int] = []

    def count(value: Any) -> None:
        if isinstance(value, int | float) and not isinstance(value, bool) and value == int(value):
            steps.append(int(value))

    for outer in dicts:
        inner = outer.get("optimizer", outer) if isinstance(outer, dict) else None
        if not isinstance(inner, dict):
            continue
        for group in inner.get("param_groups") or ():
            count(group.get("step"))
            kept = {}
            for name, value in group.items():
                if name in ("params", "step"):
                    continue
                try:
                    kept[str(name)] = plain(value)
                except TypeError:
                    continue
            groups.append(kept)
        state = inner.get("state")
        if isinstance(state, dict):
            count(state.get("common_step"))
    return groups, steps


def plain(value: Any) -> Any:
    """A value as JSON holds it; tuples become lists.

    Raises:
        TypeError: it holds something else; names its class.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value if isinstance(value, unpickle.Dtype) else str(value)
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    kind = f"`{value.module}.{value.name}`" if isinstance(value, unpickle.Inert) else f"a `{type(value).__name__}`"
    raise TypeError(kind)
