"""`from` of every stage, and the order in which the stages can be done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cpt.base.errors import CptError, PlanError, UsageError
from cpt.base.registry import nearest
from cpt.base.units import parse_count


@dataclass(frozen=True, kw_only=True)
class From:
    """Where a stage starts. Exactly one of `base`, `stage` and `folder` is set."""

    base: bool = False
    stage: str | None = None
    folder: str | None = None
    at: int | str | None = None  # None = the end | a step | pre_anneal


def parse_from(text: str, stages: Sequence[str], folders: Sequence[str] = ()) -> From:
    """Read a `from`.

    Args:
        text: as written.
        stages: names of the stages.
        folders: texts that are known to be folders although they have no `/` (names of runs).

    Raises:
        UsageError: it is none of the accepted forms, or names an unknown stage.
    """
    name, sep, tail = text.rpartition("@")
    if not sep:
        name, tail = text, ""
    is_place = not sep or tail == "pre_anneal" or _step(tail) is not None
    target = name if is_place else text
    at = _at(tail) if sep and is_place else None
    if target == "base" and at is None:
        return From(base=True)
    if target in stages:
        return From(stage=target, at=at)
    if name in stages and not is_place:
        near = nearest(tail, ["pre_anneal"])
        hint = f"did you mean `{name}@{near}`?" if near else f"accepted: `{name}@12000` (a step), `{name}@pre_anneal`"
        raise UsageError(f"`{text}` names no place in the stage `{name}`", hint)
    if "/" in target or target in folders or target.startswith("~"):
        if at == "pre_anneal":
            raise UsageError(
                f"`{text}`: `@pre_anneal` needs a stage of this recipe", "a folder takes a step: `folder@12000`"
            )
        return From(folder=target, at=at)
    known = ["base", *stages]
    near = nearest(target, known)
    hint = f"did you mean `{near}`?" if near else "known: " + ", ".join(f"`{k}`" for k in known)
    raise UsageError(f"there is no stage `{target}` to start from", hint, "a checkpoint folder is written with a `/`")


def _step(text: str) -> int | None:
    try:
        return parse_count(text) if text else None
    except UsageError:
        return None


def _at(text: str) -> int | str | None:
    return text if text == "pre_anneal" else _step(text)


def order(parents: Mapping[str, From], after: Mapping[str, Sequence[str]] | None = None) -> list[str]:
    """The stages so that parents come before their children, in the recipe's order where that leaves a choice.

    Args:
        parents: where each stage starts.
        after: by stage, others that must be done before it too.

    Raises:
        PlanError: stages start from each other in a circle; all circles are named.
    """
    done: list[str] = []
    waiting = list(parents)
    needs = {n: [*filter(None, [p.stage]), *(after or {}).get(n, ())] for n, p in parents.items()}
    while waiting:
        ready = next((n for n in waiting if all(above in done for above in needs[n])), None)
        if ready is None:
            errors: list[CptError] = [_circle(c, parents) for c in _circles(waiting, needs)]
            raise PlanError(errors[0].message, *errors[0].hints, more=tuple(errors[1:]))
        done.append(ready)
        waiting.remove(ready)
    return done


def _circles(names: Sequence[str], needs: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The circles among stages that wait for each other, each once."""
    found: list[list[str]] = []
    for name in names:
        path = [name]
        above: str | None = next((n for n in needs[name] if n in names), None)
        while above is not None and above not in path:
            path.append(above)
            above = next((n for n in needs[above] if n in names), None)
        if above == name and not any(set(path) == set(c) for c in found):
            found.append(path)
    return found


def _circle(names: Sequence[str], parents: Mapping[str, From]) -> PlanError:
    if not all(parents[a].stage == b for a, b in zip(names, [*names[1:], names[0]], strict=True)):
        way = " → ".join(f"`{n}`" for n in [*names, names[0]])
        return PlanError(
            f"stages wait for each other in a circle: {way}", "a law comes before the stage that takes its values"
        )
    if len(names) == 1:
        return PlanError(f"stage `{names[0]}` starts from itself", "`from: base` starts from the base model")
    way = " → ".join(f"`{n}`" for n in [*names, names[0]])
    return PlanError(f"stages start from each other in a circle: {way}", "one of them must start from `base`")
