"""Every key of a recipe as rows: value, unit, origin, help. What `cpt recipes show` prints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cpt.config import schema
from cpt.config.compose import DEFAULT, Composed
from cpt.config.read import UNFILLED
from cpt.config.schema import REQUIRED, ROOT, Key, Named, Node, Part, Section

Path_ = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One key."""

    path: Path_
    value: str
    unit: str
    origin: str  # a file, `command line`, or `default`
    help: str

    def as_json(self) -> dict[str, str]:
        """Without the path."""
        return {"value": self.value, "unit": self.unit, "origin": self.origin, "help": self.help}


def rows(composed: Composed) -> list[Row]:
    """Every key that the recipe gives or could give, in the order of the schema."""
    return list(_section(ROOT.keys, composed.config, (), composed))


def _section(keys: Mapping[str, Node], value: Any, path: Path_, composed: Composed) -> Iterator[Row]:
    value = value if isinstance(value, Mapping) else {}

    # Values first, then the sections: a section's name heads its own block.
    def is_block(item: tuple[str, Node]) -> bool:
        name, node = item
        absent = isinstance(node, Section) and node.optional and not value.get(name)
        return not isinstance(node, Key) and not absent

    for name, node in sorted(keys.items(), key=is_block):
        below, here = value.get(name), (*path, name)
        if isinstance(node, Key):
            yield _row(node, below, here, composed)
        else:
            yield from _node(node, below, here, composed)


def _node(node: Node, value: Any, path: Path_, composed: Composed) -> Iterator[Row]:
    short = getattr(node, "short", None)
    if short and value is not None and not isinstance(value, Mapping):
        value = {short: value}
    if isinstance(node, Named):
        for name, below in (value or {}).items():
            yield from _node(node.item, below, (*path, name), composed)
    elif isinstance(node, Part):
        chosen = (value or {}).get(node.select, node.default)
        yield from _section(schema.part_keys(node, chosen), value or {}, path, composed)
    elif isinstance(node, Section):
        if node.optional and not value:
            yield Row(path, "none", "", DEFAULT, node.help)
        elif path[:1] == ("stages",) and path[2:3] == ("train",):  # of a law: what is not here is as in another stage
            keys = {n: k for n, k in node.keys.items() if value and n in value}
            yield from _section(keys, value, path, composed)
        elif path[:1] == ("stages",) and len(path) == 2:
            yield from _section(_stage_keys(node, value or {}), value or {}, path, composed)
        else:
            yield from _section(node.keys, value, path, composed)


def _stage_keys(section: Section, value: Mapping[str, Any]) -> Mapping[str, Node]:
    """Keys of a stage: all of its own; of those that `train` sets for all stages, the ones that it overrides."""
    kind = value.get("kind", "train")
    if kind != "train":
        return {"kind": section.keys["kind"], "from": section.keys["from"], **schema.stage_options(str(kind))}
    return {n: k for n, k in section.keys.items() if n in value or n not in {**schema.TRAIN_KEYS, "checkpoint": None}}


def _row(key: Key, value: Any, path: Path_, composed: Composed) -> Row:
    unit = key.kind.what.split("[")[1].rstrip("]") if "[" in key.kind.what else ""
    if value == UNFILLED:
        return Row(path, "(yours to give)", unit, composed.origin(path), key.help)
    if value is None:
        shown = "(required)" if key.default is REQUIRED else key.shown or _plain(key.default)
        return Row(path, shown, unit, DEFAULT, key.help)
    return Row(path, _plain(value), unit, composed.origin(path), key.help)


def _plain(value: Any) -> str:
    """A value as it is written in a recipe, on one line."""
    if value is None or value in ((), {}, []):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_plain(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_plain(v) for v in value) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return text if text.isprintable() else json.dumps(text)
