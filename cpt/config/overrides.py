"""`key=value` texts of the command line, and what they do to a composed recipe.

    key=value     set; the key need not be in the recipe, but it must exist (plain Hydra wants `++` for that)
    +key=value    add a stage, a source or a key that is not there
    ~key          take away

Values follow Hydra's grammar: `[a, b]`, `{a: 1}`, `"quoted"`, `null`. A mapping for `mixture`, `lr` or `replay`
replaces the one in the recipe; plain Hydra would merge it and keep, say, the old sources. A plain value where a section
is wanted is looked up: `stages.anneal.lr=wsd` means `{schedule: wsd}`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpt.base.errors import UsageError
from cpt.base.registry import nearest, unknown
from cpt.config.schema import Key, Named, Part, Section, node_at
from cpt.config.suggest import dotted


@dataclass(frozen=True)
class Override:
    """One text, read."""

    text: str
    operation: str  # set | add | remove
    path: tuple[str, ...]
    value: Any = None


@dataclass(frozen=True)
class Overrides:
    """All texts of a command: the recipe and the rest, in order."""

    recipe: str | None
    values: tuple[Override, ...]


def parse(texts: Sequence[str]) -> Overrides:
    """Read the texts.

    Raises:
        UsageError: a text that is no override, a list of several values, a key of Hydra's own.
    """
    recipe: str | None = None
    values = []
    for text in texts:
        override = _parse_one(text)
        if override.path == ("recipe",):
            recipe = _recipe(override, recipe)
        else:
            values.append(override)
    return Overrides(recipe, tuple(values))


def _parse_one(text: str) -> Override:
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UsageError(f"`{text}` is not UTF-8 text")
    key, equals, value = text.partition("=")
    match = re.fullmatch(r"(\+\+|\+|~)?(.*)", key.strip(), re.DOTALL)
    assert match is not None
    prefix, name = match[1] or "", match[2]
    _refuse_strange_keys(text, name)
    path = tuple(name.split("."))
    if prefix == "~":
        if equals:
            raise UsageError(f"`{text}`: `~` takes a key away and has no value", f"`~{name}`")
        return Override(text, "remove", path)
    if not equals:
        raise UsageError(f"`{text}` is not `key=value`", *_no_equals_hints(name))
    operation = "add" if prefix == "+" else "set"
    return Override(text, operation, path, _value(text, name, value))


def _refuse_strange_keys(text: str, name: str) -> None:
    first = re.split(r"[./@]", name)[0]
    if first == "hydra":
        raise UsageError(
            f"`{name}` would have no effect: `cpt` uses Hydra to read recipes and nothing else",
            "the run folder is set by `runs` and `name`, logging by `train.log_every`",
        )
    if "@" in name or "/" in name:
        raise UsageError(
            f"`{text}`: a key has no `/` and no `@`", "`launcher=slurm` picks a part, `stages.<name>.lr=wsd` a schedule"
        )
    if not all(re.fullmatch(r"[\w-]+", part) for part in name.split(".")):
        raise UsageError(
            f"`{text}` is not `key=value`", "a key is names joined by dots, such as `stages.domain.tokens=2B`"
        )


def _no_equals_hints(name: str) -> tuple[str, ...]:
    from cpt.config.compose import recipe_names

    names = recipe_names()
    if name in names:
        return (f"did you mean `recipe={name}`?",)
    near = nearest(name, names)
    return (f"did you mean `recipe={near}`?",) if near else ("keys are set as `stages.domain.tokens=2B`",)


def _recipe(override: Override, already: str | None) -> str:
    if override.operation != "set":
        raise UsageError(f"`{override.text}`: the recipe is picked as `recipe=NAME`")
    if isinstance(override.value, list | dict | bool) or override.value in (None, ""):
        raise UsageError(f"`{override.text}`: a recipe is a name or a file", "`cpt recipes` lists the names")
    name = str(override.value)
    if already is not None and already != name:
        raise _one_recipe([already, name])
    return name


def _one_recipe(names: Sequence[str]) -> UsageError:
    several = " ".join(f"`cpt run recipe={n}`" for n in names[:3])
    return UsageError(
        f"one run takes one recipe, and {len(names)} were given: " + ", ".join(f"`{n}`" for n in names[:5]),
        f"to start several, call `cpt run` once for each: {several}",
    )


def _value(text: str, name: str, value: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if "\x00" in value:
        raise UsageError(f"`{name}` has a value with a null byte")
    if not value.strip():
        raise UsageError(f"`{text}` has no value", f"`{name}=null` takes the default, `~{name}` takes the key away")
    try:
        parsed = OverridesParser.create().parse_override(f"key={value}")
        if parsed.is_sweep_override():
            raise _sweep(name, value)
        return _plain(parsed.value())
    except HydraException:
        return _as_text(text, name, value)
    except RecursionError:
        raise UsageError(f"the value of `{name}` is nested too deeply") from None


def _as_text(text: str, name: str, value: str) -> str:
    """A value outside of Hydra's grammar, such as `~/data/[ab].jsonl`: text, unless it looks like a broken list."""
    if value.lstrip()[:1] in "[{\"'" or value.rstrip()[-1:] in "\"'":
        raise UsageError(
            f"the value of `{name}` cannot be read: `{value}`",
            "lists are written `[a, b]`, mappings `{a: 1, b: 2}`, texts in quotes; the shell needs `'...'` around them",
        )
    if "," in value:
        raise _sweep(name, value)
    return value


def _sweep(name: str, value: str) -> UsageError:
    if name == "recipe":
        return _one_recipe([part.strip() for part in value.split(",")])
    hints = ["to try several values, call `cpt run` once for each"]
    if "," in value and "(" not in value:
        hints.insert(0, f"a list is written in brackets: `{name}=[{value}]`")
    return UsageError(f"`{name}` has several values, and a run takes one: `{value}`", *hints)


def _plain(value: Any) -> Any:
    """A value of Hydra's grammar without its own classes."""
    if isinstance(value, Mapping):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value.text if hasattr(value, "text") and hasattr(value, "quote") else value


def apply(config: dict[str, Any], override: Override) -> dict[str, Any]:
    """The composed recipe after one override. `config` is not changed.

    Raises:
        UsageError: the key cannot be set: no such stage or source, nothing to take away, already there.
    """
    config = copy.deepcopy(config)
    expand(config, override.path[:-1])
    parent = _walk(config, override)
    key = override.path[-1]
    if override.operation == "remove":
        if key not in parent:
            raise _nothing_there(override, parent)
        del parent[key]
        return config
    if override.operation == "add" and parent.get(key) is not None:
        raise UsageError(
            f"`{override.text}`: `{dotted(override.path)}` is there already", "leave out the `+` to change it"
        )
    parent[key] = _merge(parent.get(key), override.value, override.path)
    return config


def replaced(config: Mapping[str, Any], override: Override) -> str | None:
    """What a plain value that stands for a section takes away from the recipe, as a sentence; None when nothing."""
    short = getattr(node_at(override.path), "short", None)
    old: Any = config
    for part in override.path:
        old = old.get(part) if isinstance(old, Mapping) else None
    plain = override.operation == "set" and override.value is not None and not isinstance(override.value, Mapping)
    if not short or not plain or not isinstance(old, Mapping):
        return None
    dropped = [f"`{key}: {value}`" for key, value in old.items() if key != short and value is not None]
    if not dropped:
        return None
    keeps = f"`{dotted((*override.path, short))}={override.text.partition('=')[2]}` keeps it"
    return f"`{override.text}` replaces all of `{dotted(override.path)}`, {', '.join(dropped)} too; {keeps}"


def repeated(values: Sequence[Override]) -> list[str]:
    """Keys that are given more than once, one sentence each."""
    texts: dict[tuple[str, ...], list[str]] = {}
    for override in values:
        if override.operation == "set":
            texts.setdefault(override.path, []).append(override.text)
    return [
        f"`{dotted(path)}` is given {len(found)} times; the last one counts, `{found[-1]}`"
        for path, found in texts.items()
        if len(found) > 1
    ]


def expand(config: dict[str, Any], path: Sequence[str]) -> None:
    """Write out plain values that stand for sections along `path`: `base: scratch` to `base: {checkpoint: scratch}`."""
    here: Any = config
    for i, part in enumerate(path):
        if not isinstance(here, dict) or part not in here:
            return
        node = node_at(tuple(path[: i + 1]))
        short = getattr(node, "short", None)
        value = here[part]
        if short and value is not None and not isinstance(value, dict):
            here[part] = {short: value}
        here = here[part]


def _walk(config: dict[str, Any], override: Override) -> dict[str, Any]:
    """The mapping that holds the last part of the key; made on the way where the schema knows it."""
    here: Any = config
    for i, part in enumerate(override.path[:-1]):
        above = node_at(override.path[:i]) if i else None
        if isinstance(above, Named) and part not in here and override.operation != "add":
            error = unknown(above.what, part, [str(k) for k in here])
            raise UsageError(error.message, *error.hints, f"`+{dotted(override.path[: i + 1])}={{...}}` adds one")
        if part not in here or here[part] is None:
            if override.operation == "remove":
                raise _nothing_there(override, here)
            here[part] = {}
        if not isinstance(here[part], dict):
            raise UsageError(
                f"`{override.text}`: `{dotted(override.path[: i + 1])}` is `{here[part]}` and has no keys below it"
            )
        here = here[part]
    above = node_at(override.path[:-1]) if len(override.path) > 1 else None
    if isinstance(above, Named) and override.path[-1] not in here and override.operation == "set":
        error = unknown(above.what, override.path[-1], [str(k) for k in here])
        raise UsageError(error.message, *error.hints, f"`+{override.text}` adds it")
    return here


def _nothing_there(override: Override, parent: Mapping[str, Any]) -> UsageError:
    near = nearest(override.path[-1], [str(k) for k in parent])
    hints = [f"did you mean `~{dotted([*override.path[:-1], near])}`?"] if near else []
    return UsageError(f"`{override.text}`: there is no `{dotted(override.path)}` to take away", *hints)


def _merge(old: Any, new: Any, path: tuple[str, ...]) -> Any:
    """`new` laid over `old`: mappings key by key, but for keys whose value is one thing, such as a mixture."""
    node = node_at(path)
    whole = node.replace if isinstance(node, Section | Part) else isinstance(node, Key)
    if whole or not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return {**old, **{key: _merge(old.get(key), value, (*path, str(key))) for key, value in new.items()}}
