"""What a `torch_dist` folder says beside its tensors, in `common.pt`: arguments, groups of the optimizer, step."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from cpt.base.errors import UsageError
from cpt.checkpoint import arrays, torch_zip, unpickle
from cpt.checkpoint.arrays import CARRIERS, Files
from cpt.checkpoint.formats.torch_dist_names import COMMON_OBJECT
from cpt.checkpoint.torch_dist import COMMON, Folder


def read(source: Folder) -> dict[str, Any]:
    """What `common.pt`, or the object in its stead, holds; tensors of one value as numbers.

    Raises:
        UsageError: it is missing or damaged.
    """
    path, record = source.path / COMMON, source.objects.get(COMMON_OBJECT)
    if path.is_file():
        record = None
    elif record is None:
        raise UsageError(f"`{path}` is missing: the save never finished or the copy is incomplete")
    else:
        path = source.path / record.file
    data = Files().map(os.fspath(path))
    archive = torch_zip.read(data, *((record.start, record.length) if record else (0, len(data))), path)
    value = archive.value[0] if record and isinstance(archive.value, list) and archive.value else archive.value
    if not isinstance(value, dict):
        raise UsageError(f"`{path}` does not hold a Megatron checkpoint's common part")

    def numbers(value: Any) -> Any:
        if isinstance(value, unpickle.TensorRecord):
            stored = archive.storages.get(value.storage.key)
            if stored is None or value.storage.dtype not in CARRIERS or math.prod(value.size) != 1:
                return value
            held = np.frombuffer(data, CARRIERS[value.storage.dtype], 1, stored.start)
            return arrays.convert(held.reshape(1, 1), value.storage.dtype, "float64").item()
        if isinstance(value, dict):
            return {k: numbers(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(numbers(v) for v in value)
        return value

    return dict(numbers(value))


def arguments(value: Any) -> dict[str, Any] | None:
    """Megatron's arguments, plain ones only; dtypes by name."""
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
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    kind = f"`{value.module}.{value.name}`" if isinstance(value, unpickle.Inert) else f"a `{type(value).__name__}`"
    raise TypeError(kind)
