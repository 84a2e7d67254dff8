"""A composed recipe against the schema: typed values of the keys that were given, and everything wrong with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cpt.base.errors import CptError, UsageError
from cpt.base.registry import nearest, unknown
from cpt.config import kinds, schema
from cpt.config.compose import group_options
from cpt.config.schema import REQUIRED, Key, Named, Node, Part, Section
from cpt.config.suggest import YAML_BOOLEANS, dotted, quote_hint, unknown_key

UNFILLED = "???"
Path_ = tuple[str, ...]


@dataclass
class Reading:
    """What was found while reading a recipe."""

    recipe: str
    errors: list[CptError] = field(default_factory=list)
    unfilled: list[Path_] = field(default_factory=list)  # keys left to the person

    def wrong(self, path: Path_, error: CptError) -> None:
        """Note an error about the value of a key."""
        self.errors.append(type(error)(f"`{dotted(path)}`: {error.message}", *error.hints, more=error.more))


def read(config: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    """Typed values of the keys that the recipe gives; errors go to `reading`."""
    return _section(schema.ROOT, config, (), reading)


def complete(section: Section, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the defaults of the keys that were not given; sections below included, required keys left out."""
    done = dict(values)
    for name, node in section.keys.items():
        if isinstance(node, Key) and name not in done and node.default is not REQUIRED:
            done[name] = node.default
        elif isinstance(node, Section) and not node.optional:
            done[name] = complete(node, done.get(name) or {})
    return done


def overlay(section: Section, below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a stage laid over the defaults in `train`, section by section."""
    done = dict(below)
    for name, value in above.items():
        node = section.keys.get(name)
        deep = isinstance(node, Section) and not node.replace
        done[name] = overlay(node, done.get(name) or {}, value) if deep and isinstance(value, dict) else value  # type: ignore[arg-type]
    return done


def _node(node: Node, value: Any, path: Path_, reading: Reading) -> Any:
    if value == UNFILLED:
        reading.unfilled.append(path)
        return None
    short = getattr(node, "short", None)
    if short and value is not None and not isinstance(value, Mapping):
        value = {short: value}
    if isinstance(node, Key):
        try:
            law = _of_law(value, path)
            return law if law is not None else node.kind.read(value)
        except CptError as error:
            reading.wrong(path, error)
            return None
    if not isinstance(value, Mapping):
        reading.wrong(path, UsageError(f"`{value}` is not a mapping", *_mapping_hints(node)))
        return {}
    if isinstance(node, Named):
        return _named(node, value, path, reading)
    if isinstance(node, Part):
        return _part(node, value, path, reading)
    if path[:1] == ("stages",) and len(path) == 2:
        return _stage(node, value, path, reading)
    return _section(node, value, path, reading)


def _of_law(value: Any, path: Path_) -> Any:
    """`${law:...}` where a law may give a value: a mixture or a share of it, a replay share. None without one.

    Raises:
        UsageError: it stands where no law gives a value.
    """
    if isinstance(value, Mapping) and path[:1] == ("stages",) and path[2:] == ("mixture",):
        laws = {str(k): kinds.law_value(v) for k, v in value.items()}
        if not any(laws.values()):
            return None
        plain = {k: v for k, v in value.items() if laws[str(k)] is None}
        read = kinds.weights.read(plain) if any(v for v in plain.values()) else {}
        return {k: law or read.get(k, 0.0) for k, law in laws.items()}
    found = kinds.law_value(value)
    if found is not None and not (path[:1] == ("stages",) and path[2:] in (("mixture",), ("replay", "share"))):
        raise UsageError(f"a law gives no value here, `{value}`", "it gives a `mixture` and a `replay.share`")
    return found


def _mapping_hints(node: Node) -> list[str]:
    names = list(schema.children(node))[:6]
    return ["keys below it: " + ", ".join(f"`{n}`" for n in names)] if names else []


def _section(section: Section, value: Mapping[str, Any], path: Path_, reading: Reading) -> dict[str, Any]:
    found = {}
    for name, below in value.items():
        if name not in section.keys:
            reading.errors.append(_unknown((*path, name), below, section.keys, reading.recipe))
            continue
        node = section.keys[name]
        if below is None and not (isinstance(node, Key) and node.kind.optional):
            continue  # null stands for the default
        found[name] = _node(node, below, (*path, name), reading)
    _missing(section, found, path, reading)
    return found


def _missing(section: Section, found: Mapping[str, Any], path: Path_, reading: Reading) -> None:
    """Note required keys that are absent; those of stages and `train` are known only together, in `config.stages`."""
    if not path or path[0] in ("train", "stages", "model"):
        return
    for name, node in section.keys.items():
        if isinstance(node, Key) and node.default is REQUIRED and name not in found:
            reading.errors.append(UsageError(f"`{dotted((*path, name))}` is missing", f"it is {node.help}"))


def _unknown(path: Path_, value: Any, known: Mapping[str, Any], recipe: str) -> UsageError:
    """An unknown key; `lr=3e-5` at a wrong place means a peak."""
    error = unknown_key(path, known, schema.every_key(), recipe)
    if path[-1] in ("lr", "learning_rate") and not isinstance(value, Mapping):
        return UsageError(error.message, "the lr is set by stage, as `stages.<stage>.lr.peak`", *error.hints[1:])
    return error


def _named(node: Named, value: Mapping[str, Any], path: Path_, reading: Reading) -> dict[str, Any]:
    found = {}
    for name, below in value.items():
        try:
            kinds.read_name(name)
            if node.what == "stage" and name in ("base", "parent", "scratch"):
                raise UsageError(f"`{name}` is a word of its own in `from` and cannot name a stage")
        except CptError as error:
            reading.wrong(path, error)
            continue
        if below is None:
            below = {}
        found[name] = _node(node.item, below, (*path, name), reading) or {}
    return found


def _part(part: Part, value: Mapping[str, Any], path: Path_, reading: Reading) -> dict[str, Any]:
    registry = part.registry()
    chosen = value.get(part.select, part.default)
    if isinstance(chosen, bool):
        reading.wrong((*path, part.select), UsageError(f"`{chosen}` is not a name", quote_hint(chosen)))
        return {}
    if chosen is None:
        possible = schema.children(part)
        wrong = [name for name in value if name not in possible]
        for name in wrong:
            reading.errors.append(unknown_key((*path, name), possible, schema.every_key(), reading.recipe))
        if not wrong and set(value) - {*part.extra}:
            known = ", ".join(f"`{name}`" for name in registry)
            reading.errors.append(UsageError(f"`{dotted((*path, part.select))}` is missing", f"known: {known}"))
        return {k: v for k, v in value.items() if k in part.extra}
    if not isinstance(chosen, str) or chosen not in registry:
        error = unknown(registry.kind, chosen, registry)
        if len(path) == 1 and chosen in group_options(path[0]):
            error = UsageError(
                f"`{chosen}` is a file in `conf/{path[0]}`, which a value does not read",
                f"in a recipe: `defaults: [{path[0]}: {chosen}, _self_]`; on the command line: `{path[0]}={chosen}`",
            )
        reading.wrong((*path, part.select), error)
        return {}
    keys = schema.part_keys(part, chosen)
    found: dict[str, Any] = {part.select: chosen}
    for name, below in value.items():
        if name == part.select:
            continue
        if name not in keys:
            reading.errors.append(_no_option(part, chosen, (*path, name), keys, reading.recipe))
        elif below is None:
            continue
        elif below == UNFILLED:
            reading.unfilled.append((*path, name))
        else:
            found[name] = _node(keys[name], below, (*path, name), reading)
    return found


def _no_option(part: Part, chosen: str, path: Path_, keys: Mapping[str, Any], recipe: str) -> UsageError:
    """An option that the chosen class does not have; it may be another's."""
    registry = part.registry()
    name = path[-1]
    owners = [other for other in registry if name in schema.options_of(registry.get(other))]
    if owners:
        of = ", ".join(f"`{o}`" for o in owners[:3])
        near = nearest(name, keys)
        hints = [f"did you mean `{near}`?"] if near else []
        has = ", ".join(f"`{k}`" for k in keys if k != part.select)
        message = (
            f"`{dotted(path)}` would have no effect: it is an option of {of}, and the {registry.kind} is `{chosen}`"
        )
        return UsageError(message, *hints, f"`{chosen}` takes {has}")
    if path[0] == "launcher":  # `cpt recipes show` lists the keys of the one that it is told
        recipe = f"{recipe or 'demo'} launcher={chosen}"
    return unknown_key(path, keys, schema.every_key(), recipe)


def _stage(section: Section, value: Mapping[str, Any], path: Path_, reading: Reading) -> dict[str, Any]:
    from cpt.stages import STAGES

    kind = value.get("kind", "train")
    if kind is False or kind is True or str(kind).lower() in YAML_BOOLEANS:
        reading.wrong((*path, "kind"), UsageError(f"`{kind}` is not a kind of stage", quote_hint(kind)))
        return {}
    known = sorted({*STAGES, "train"})
    if not isinstance(kind, str) or kind not in known:
        reading.wrong((*path, "kind"), unknown("kind of stage", kind, known))
        return {}
    if kind == "train":
        return _section(section, value, path, reading)
    keys = {name: schema.STAGE_KEYS[name] for name in ("kind", "from")}
    options = schema.stage_options(kind)
    keys |= options
    found = {}
    for name, below in value.items():
        if name in keys and (below is not None or (kind, name) == ("law", "tolerance")):  # null there is no limit
            found[name] = _node(keys[name], below, (*path, name), reading)
        elif name in section.keys and name not in keys:
            takes = ", ".join(f"`{k}`" for k in keys)
            reading.errors.append(
                UsageError(
                    f"`{dotted((*path, name))}` would have no effect: the stage's kind is `{kind}`",
                    f"a stage of kind `{kind}` takes {takes}",
                )
            )
        elif name not in keys:
            reading.errors.append(unknown_key((*path, name), keys, schema.every_key(), reading.recipe))
    return found


def make(cls: Any, options: Mapping[str, Any]) -> Any:
    """A registered options class from values as composed: lists become tuples, the class checks the rest.

    Raises:
        UsageError: a value that the class refuses.
    """
    known = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items() if k in known}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error).splitlines()[0].rstrip(".")) from None
