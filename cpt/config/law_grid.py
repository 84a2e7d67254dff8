"""The proxies of a law stage: which sources are the domain, which mixtures are run, what each proxy does.

A proxy does what the stage does that the law is for, but short, on its own mixture, at a constant lr after a warmup,
and is measured on the way, on all sources of the law.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpt.base.errors import PlanError, UsageError
from cpt.base.registry import unknown
from cpt.config.kinds import LawValue
from cpt.config.read import overlay
from cpt.config.schema import LAW_RATIOS, STAGE, TRAIN_KEYS

FEWEST = 3  # distinct ratios or mixtures: with fewer no law can be fitted
SCALING = ("dcpt", "l1", "cross_dcpt", "chinchilla")  # laws in size and tokens, which know one ratio
ONE_LENGTH = ("mixing",)
NEEDS_FOUR = ("dcpt", "l1")  # ratios
MERGE_RATIOS = tuple(i / 8 for i in range(9))  # weight averages cost next to nothing


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The proxies of one law stage.

    Args:
        target: the train stage whose mixture is wanted; None when nobody asks.
        domain, general: sources of the two groups with their shares inside each.
        mixtures: what each proxy reads, by the end of its name.
        several: mixtures of more than two groups: the law has no single ratio.
    """

    target: str | None
    domain: Mapping[str, float]
    general: Mapping[str, float]
    mixtures: Mapping[str, Mapping[str, float]]
    several: bool

    def at(self, ratio: float) -> dict[str, float]:
        """The mixture at a domain share."""
        return split(self.domain, self.general, ratio)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Domain shares of the mixtures."""
        return tuple(round(sum(m.get(s, 0.0) for s in self.domain), 9) for m in self.mixtures.values())

    @property
    def sources(self) -> tuple[str, ...]:
        """All sources, the domain's first."""
        return tuple(dict.fromkeys([*self.domain, *self.general, *(n for m in self.mixtures.values() for n in m)]))


@dataclass(frozen=True)
class Size:
    """What proxies of one size start from.

    Args:
        label: in their names; empty for the run's own size.
        start: `from` of the proxies.
        scratch: new weights.
    """

    label: str
    start: str
    scratch: bool = False


def split(domain: Mapping[str, float], general: Mapping[str, float], ratio: float) -> dict[str, float]:
    """A mixture with so much of the domain; sources without a share are left out."""
    found = {name: ratio * share for name, share in domain.items()}
    for name, share in general.items():
        found[name] = found.get(name, 0.0) + (1 - ratio) * share
    return {name: share for name, share in found.items() if share > 0}


def make_grid(name: str, law: Mapping[str, Any], values: Mapping[str, Any], askers: Sequence[str]) -> Grid:
    stages, sources = values["stages"], list(values.get("sources") or {})
    target = law.get("for") or next(iter(askers), None)
    where = f"stages.{name}"
    if target is None:
        trained = [n for n, s in stages.items() if s.get("kind", "train") == "train"]
        target = trained[0] if len(trained) == 1 else None  # as when a person has given the mixture by hand instead
        if target is None and law.get("file") is None:
            hint = f"`{where}.for={trained[-1] if trained else 'domain'}`"
            raise UsageError(f"`{where}.for` is missing: no stage takes a value of the law", hint)
    elif target not in stages:
        error = unknown("stage", target, [n for n, s in stages.items() if s.get("kind", "train") == "train"])
        raise UsageError(f"`{where}.for`: {error.message}", *error.hints)
    elif stages[target].get("kind", "train") != "train":
        raise UsageError(f"`{where}.for` is `{target}`, of kind `{stages[target]['kind']}`, wanted a train stage")
    domain, general = _groups(name, law, stages.get(target, {}), stages, sources)
    given = [k for k in ("ratios", "mixtures", "runs") if law.get(k)]
    if len(given) > 1:
        raise UsageError(f"`{where}` has both `{given[0]}` and `{given[1]}`", "one of them lays out the proxies")
    several = given in (["mixtures"], ["runs"])
    if law.get("mixtures"):
        mixtures = {f"m{i}": m for i, m in enumerate(law["mixtures"], 1)}
        for one in mixtures.values():
            for source in one:
                _known(source, sources, f"{where}.mixtures")
    elif law.get("runs"):
        every = list(dict.fromkeys([*domain, *general]))
        if len(every) < 2:
            raise UsageError(f"`{where}.runs` spreads mixtures over several sources, and there is only one")
        mixtures = {f"m{i}": m for i, m in enumerate(spread(every, law["runs"], seed_of(law, values, target)), 1)}
    else:
        merge = law.get("how") == "merge"
        ratios = law.get("ratios") or (MERGE_RATIOS if merge else LAW_RATIOS)
        mixtures = {f"r{_percent(r)}": split(domain, general, r) for r in sorted(set(ratios))}
    grid = Grid(target=target, domain=domain, general=general, mixtures=mixtures, several=several)
    if law.get("file") is None and law.get("data") is None:
        _enough(name, law, grid)
    return grid


def _known(source: str, sources: Sequence[str], where: str) -> None:
    if source not in sources:
        error = unknown("source", source, sources)
        raise UsageError(f"`{where}`: {error.message}", *error.hints)


def _groups(
    name: str,
    law: Mapping[str, Any],
    target: Mapping[str, Any],
    stages: Mapping[str, Mapping[str, Any]],
    sources: Sequence[str],
) -> tuple[dict[str, float], dict[str, float]]:
    """The sources of the domain and the others, each with its shares inside the group."""
    where = f"stages.{name}"
    for key in ("domain", "general"):
        for source in law.get(key) or ():
            _known(source, sources, f"{where}.{key}")
    domain, general = dict(law.get("domain") or {}), dict(law.get("general") or {})
    if not domain:
        mixture = target.get("mixture")
        if isinstance(mixture, Mapping):
            asked = {s: v for s, v in mixture.items() if isinstance(v, LawValue)}
            new = {s: 1.0 for s, v in asked.items() if v.key in ("ratio", "low", "high")} if asked else mixture
            domain = {s: w for s, w in new.items() if s not in general}
        elif general and len(general) == len(sources) - 1:
            domain = {s: 1.0 for s in sources if s not in general}
    if not domain and law.get("file") is None:
        parent = {**target, "replay": {"from": "parent"}}  # what was trained on before is hardly the domain
        other_side = {*general, *(replayed(target, stages) or replayed(parent, stages) or ())}
        left = [s for s in sources if s not in other_side] if other_side else []
        raise UsageError(
            f"`{where}.domain` is missing: which sources the ratio is the share of is not known",
            f"`{where}.domain=[{left[0] if len(left) == 1 else '...'}]` names them",
        )
    if not general:
        old = replayed(target, stages)
        general = {s: w for s, w in (old or dict.fromkeys(sources, 1.0)).items() if s not in domain}
    if both := [s for s in domain if s in general]:
        raise UsageError(f"`{where}`: `{both[0]}` is both in `domain` and in `general`")
    if not general and law.get("file") is None:
        raise UsageError(f"`{where}.general` is missing: there is no source besides the domain's to weigh them against")
    return _normalised(domain), _normalised(general)


def replayed(target: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> Mapping[str, float] | None:
    """What a stage replays, as far as the recipe says it in so many words."""
    replay = target.get("replay") or {}
    if replay.get("sources"):
        return dict(replay["sources"])
    of = replay.get("from", "parent") if replay else None
    parent = stages.get(str(target.get("from") if of == "parent" else of)) or {}
    mixture = parent.get("mixture")
    plain = isinstance(mixture, Mapping) and not any(isinstance(v, LawValue) for v in mixture.values())
    return mixture if plain else None


def _normalised(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items() if weight > 0}


def _percent(ratio: float) -> str:
    """0.125 as `12p5`: names of stages have no dots."""
    return f"{100 * ratio:.4g}".replace(".", "p")


def seed_of(law: Mapping[str, Any], values: Mapping[str, Any], target: str | None) -> int:
    """Of the sample order: the law's own, else that of the target stage."""
    given = [law, values["stages"].get(target or "", {}), values.get("train") or {}]
    return int(next((v["seed"] for v in given if v.get("seed") is not None), 1234))


def spread(sources: Sequence[str], count: int, seed: int, candidates: int = 2000) -> list[dict[str, float]]:
    """So many mixtures spread over the simplex of shares: its corners and middle first, then each as far as it can be
    from those before among random candidates.

    Args:
        candidates: uniform draws from the simplex (Dirichlet with all ones) that each further one is chosen from.
    """
    import numpy as np

    width = len(sources)
    draws_CK = np.random.default_rng(seed).dirichlet(np.ones(width), candidates)
    chosen = [*np.eye(width), np.full(width, 1 / width)][:count]
    while len(chosen) < count:
        far_C = np.min(np.linalg.norm(draws_CK[:, None] - np.array(chosen)[None], axis=2), axis=1)
        chosen.append(draws_CK[int(np.argmax(far_C))])
    found = []
    for shares in chosen:
        rounded = {s: round(float(v), 3) for s, v in zip(sources, shares, strict=True) if round(float(v), 3) > 0}
        found.append(_normalised(rounded))
    return found


def law_name(law: Mapping[str, Any], grid: Grid) -> str:
    """The law that is fitted: as asked for, else the one that fits the layout of the proxies."""
    given = law.get("law")
    if given is not None:
        return str(given)
    return "mixing" if grid.several or law.get("how") == "merge" else "dcpt"


def _enough(name: str, law: Mapping[str, Any], grid: Grid) -> None:
    """Refuse what no law could be fitted to, before anything runs."""
    from cpt.laws import LAWS

    where, chosen = f"stages.{name}", law_name(law, grid)
    if chosen != "auto":
        LAWS.get(chosen)
    if law.get("tokens") is None:
        raise UsageError(f"`{where}.tokens` is missing: the length of one proxy", f"such as `{where}.tokens=30M`")
    count = len(grid.mixtures)
    if count < FEWEST:
        raise PlanError(f"`{where}` has {count} mixtures: no law can be fitted to fewer than {FEWEST}")
    if chosen in NEEDS_FOUR and count < 4:
        raise PlanError(
            f"`{where}` has {count} ratios, and the law `{chosen}` needs at least 4", f"`{where}.law=mixing` takes 3"
        )
    if chosen in SCALING and grid.several:
        raise PlanError(
            f"`{where}.law` is `{chosen}`, which knows one ratio, and the proxies mix {len(grid.sources)} sources",
            f"`{where}.law=mixing` or `{where}.law=additive`",
        )


def proxy_tokens(law: Mapping[str, Any], chosen: str) -> tuple[int, int]:
    """Length of a proxy, and tokens between two measurements.

    Args:
        chosen: name of the law: one that holds at one length needs no measurements on the way.
    """
    tokens = int(law["tokens"])
    every = tokens if chosen in ONE_LENGTH else max(1, tokens // 6)
    return tokens, int(law.get("every") or every)


def proxies(
    name: str, law: Mapping[str, Any], values: Mapping[str, Any], grid: Grid, sizes: Sequence[Size]
) -> dict[str, dict[str, Any]]:
    """The train stages of a law's proxies, and the stage that measures averages of them, by name."""
    if law.get("file") is not None or law.get("data") is not None:
        return {}
    assert grid.target is not None
    common = _common(name, law, values, grid)
    merge = law.get("how") == "merge"
    if merge and len(sizes) > 1:
        raise PlanError(f"`stages.{name}` has `how: merge` and {len(sizes)} sizes: weights of one size are averaged")
    wanted = {s: {s: 1.0} for s in grid.sources} if merge else grid.mixtures
    found: dict[str, dict[str, Any]] = {}
    for size in sizes:
        for ending, mixture in wanted.items():
            label = "-".join(filter(None, (name, size.label, ending)))
            keep = () if size.scratch else ("weights",)
            found[label] = {**common, "from": size.start, "keep": keep, "mixture": dict(mixture)}
    if merge:
        evaluate = common["evaluate"]
        options = {k: v for k, v in common.items() if k in ("seq_length", "micro_batch_size", "precision")}
        mixtures = [dict(m) for m in grid.mixtures.values()]
        options |= {"mixtures": mixtures, "sources": tuple(evaluate["sources"])}
        options |= {"tokens": evaluate["tokens"]} if evaluate.get("tokens") else {}
        found[f"{name}-merged"] = {"kind": "merged", "from": sizes[0].start, **options}
    return found


def _common(name: str, law: Mapping[str, Any], values: Mapping[str, Any], grid: Grid) -> dict[str, Any]:
    """What all proxies of a law have in common: what the target stage does, but short, at a constant lr, measured."""
    target = values["stages"][grid.target]
    kept = {k: v for k, v in target.items() if k in TRAIN_KEYS or k == "methods"}
    tokens, every = proxy_tokens(law, law_name(law, grid))
    below = {k: v for k, v in (values.get("train") or {}).items() if k == "evaluate"}
    found = overlay(STAGE, overlay(STAGE, below, kept), law.get("train") or {})
    found |= {
        "kind": "train",
        "tokens": tokens,
        "seed": seed_of(law, values, grid.target),
        "lr": _lr(name, law, values, str(grid.target)),
        "evaluate": {**(found.get("evaluate") or {}), "every": every, "sources": grid.sources, "at_start": True},
        "checkpoint": {"every": None, "asynchronous": False, "retain": {"last": 1, "every": None, "stage_ends": True}},
    }
    return found


def _lr(name: str, law: Mapping[str, Any], values: Mapping[str, Any], target: str) -> dict[str, Any]:
    """Constant after a warmup, at the target's peak; a target that goes on with its parent's lr has that one's."""
    given = law.get("lr") or {}
    stages, at, seen = values["stages"], target, set()
    peak = given.get("peak")
    while peak is None and at in stages and at not in seen:
        seen.add(at)
        peak = (stages[at].get("lr") or {}).get("peak")
        at = str(stages[at].get("from", "")).partition("@")[0]
    if peak is None:
        raise UsageError(f"`stages.{name}.lr` is missing: `{target}` gives no `peak`", f"`stages.{name}.lr.peak=3e-5`")
    return {"schedule": "constant", "peak": peak, "warmup": given.get("warmup") or "5%"}


def size_label(num_parameters: int) -> str:
    """A size for names, without dots: 1260000 as `1260k`."""
    for unit, letter in ((10**9, "b"), (10**6, "m"), (10**3, "k")):
        if num_parameters >= 10 * unit:
            return f"{round(num_parameters / unit)}{letter}"
    return str(num_parameters)
