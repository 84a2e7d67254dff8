"""Law stages of a recipe: their proxies as train stages before them, and the values that later stages take from them.

    values as read ─▶ groups of sources ─▶ grid of mixtures × sizes ─▶ proxy stages, `${law:...}` filled in

A `${law:mix.mixture}` is filled from the law once that is fitted (or at once, for `file`), before that by a value that
only lets the plan be shown: half of the tokens for each group. Which stages hold such a value is kept beside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt.base.errors import CptError, PlanError, UsageError
from cpt.base.records import to_json
from cpt.base.registry import unknown
from cpt.config.kinds import LawValue
from cpt.config.law_grid import Grid, Size, law_name, make_grid, proxies, proxy_tokens, replayed, seed_of
from cpt.config.suggest import dotted
from cpt.plan.budget import training_flops
from cpt.plan.check import decays
from cpt.plan.model import ModelConfig
from cpt.plan.types import StagePlan

TOLERANCE = 0.05  # rise of the general loss that is allowed when the recipe says nothing [fraction]
RATIO = 0.5  # stands in for a ratio that is not known yet
SHARES = ("ratio", "replay", "low", "high")  # values of a law that are shares


@dataclass
class Laws:
    """What is known about the laws of a recipe while its plan is being built.

    Args:
        grids: by law stage.
        group: by proxy stage (and stage of kind `merged`), its law stage.
        after: by stage, those that must be done before besides its parent.
        taken: by stage, the keys whose value a law gives, and which: `{"replay.share": "mix.replay"}`.
        assumed: stages that hold a value which only stands in.
    """

    grids: dict[str, Grid] = field(default_factory=dict)
    group: dict[str, str] = field(default_factory=dict)
    after: dict[str, tuple[str, ...]] = field(default_factory=dict)
    taken: dict[str, dict[str, str]] = field(default_factory=dict)
    assumed: set[str] = field(default_factory=set)


def expand(
    values: dict[str, Any],
    known: Mapping[str, Mapping[str, Any]],
    sizes: Callable[[str, Mapping[str, Any], str | None], Sequence[Size]],
    errors: list[CptError],
) -> Laws:
    """Put proxies into `values["stages"]` and fill in what laws give.

    Args:
        values: the typed recipe; its stages are replaced.
        known: by law stage that is done, what `laws.saved.SavedLaw.values` gives.
        sizes: of a law stage (its name, its values, its target), what its proxies start from.
        errors: takes what is wrong.
    """
    found = Laws()
    stages: dict[str, dict[str, Any]] = values["stages"]
    laws = {name: stage for name, stage in stages.items() if stage.get("kind") == "law"}
    asked = list(_asked(stages))
    for stage, path, value in asked:
        if value.stage not in laws:
            where = f"`stages.{stage}.{dotted(path)}`: "
            if value.stage in stages:
                kind = stages[value.stage].get("kind", "train")
                errors.append(UsageError(f"{where}`{value.stage}` is a stage of kind `{kind}`, not a law"))
            else:
                error = unknown("law stage", value.stage, laws)
                errors.append(UsageError(f"{where}{error.message}", *error.hints))
    if errors or not laws:
        return found
    for name, law in laws.items():
        try:
            askers = [s for s, _, v in asked if v.stage == name]
            found.grids[name] = make_grid(name, law, values, askers)
        except CptError as error:
            errors.append(error)
    if errors:
        return found
    for stage in dict.fromkeys(s for s, path, _ in asked if path[0] == "mixture"):
        try:
            value = next(v for s, path, v in asked if s == stage and path[0] == "mixture")
            _refuse_replay(stage, stages, value.stage, found.grids[value.stage])
        except CptError as error:
            errors.append(error)
    for stage, path, value in asked:
        try:
            _fill(stages[stage], path, value, found.grids[value.stage], known.get(value.stage))
        except CptError as error:
            errors.append(type(error)(f"`stages.{stage}.{dotted(path)}`: {error.message}", *error.hints))
            continue
        found.taken.setdefault(stage, {})[dotted(path)] = f"{value.stage}.{value.key}"
        found.after[stage] = tuple(dict.fromkeys([*found.after.get(stage, ()), value.stage]))
        if value.stage not in known:
            found.assumed.add(stage)
    for stage in found.taken:
        if (stages[stage].get("replay") or {}).get("account") == "additive" and "replay.share" in found.taken[stage]:
            errors.append(
                PlanError(
                    f"`stages.{stage}.replay.account` is `additive`: the length of the stage would depend on the law",
                    f"`stages.{stage}.replay.account=equal_compute`",
                )
            )
    done: dict[str, dict[str, Any]] = {}
    for name, stage_values in stages.items():
        if name in laws and not errors:
            try:
                starts = sizes(name, stage_values, found.grids[name].target)
                made = proxies(name, stage_values, values, found.grids[name], starts)
                _own_names(made, stages)
                stage_values = {**stage_values, "from": starts[0].start}
            except CptError as error:
                errors.append(error)
                continue
            done |= made
            found.group |= dict.fromkeys(made, name)
            found.after[name] = tuple(made)
            merged = [n for n, v in made.items() if v.get("kind") == "merged"]
            found.after |= {n: tuple(p for p in made if p not in merged) for n in merged}
        done[name] = stage_values
    values["stages"] = done
    return found


def _asked(stages: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, tuple[str, ...], LawValue]]:
    """Every `${law:...}`: stage, key below it, what it names."""
    for name, stage in stages.items():
        mixture = stage.get("mixture")
        if isinstance(mixture, LawValue):
            yield name, ("mixture",), mixture
        elif isinstance(mixture, Mapping):
            yield from ((name, ("mixture", s), v) for s, v in mixture.items() if isinstance(v, LawValue))
        share = (stage.get("replay") or {}).get("share") if isinstance(stage.get("replay"), Mapping) else None
        if isinstance(share, LawValue):
            yield name, ("replay", "share"), share


def _refuse_replay(name: str, stages: Mapping[str, Mapping[str, Any]], law: str, grid: Grid) -> None:
    """A law's shares are of all that its runs read, a stage's mixture of what is not replay: the two are not the same
    where the stage replays sources of the law besides.

    Raises:
        PlanError: it does.
    """
    stage = stages[name]
    replay = stage.get("replay") or {}
    share = replay.get("share")
    if not replay or share is None or (not isinstance(share, LawValue) and share <= 0):
        return
    read = replayed(stage, stages)
    twice = [s for s in grid.sources if read is None or s in read]
    if not twice:
        return
    shown = share.text if isinstance(share, LawValue) else f"{100 * share:g} %"
    hints = [f"`stages.{name}.replay.share=0` trains on the law's mixture"]
    if not grid.several and grid.domain:
        shares = ", ".join(f"{source}: {share:.4g}" for source, share in grid.domain.items())
        hints.append(
            f"`stages.{name}.mixture={{{shares}}}` with `stages.{name}.replay.share='${{law:{law}.replay}}'` replays "
            "as much as the law says"
        )
    raise PlanError(
        f"`stages.{name}` takes its mixture from the law `{law}`, which has `{twice[0]}` in it, and replays {shown} "
        "besides: that is another mixture than the law's",
        *hints,
    )


def _fill(
    stage: dict[str, Any], path: tuple[str, ...], value: LawValue, grid: Grid, known: Mapping[str, Any] | None
) -> None:
    """Put the value of a law where it is asked for, or what stands in for it."""
    whole = path == ("mixture",)
    source = value.key.removeprefix("mixture.") if value.key.startswith("mixture.") else None
    possible = ["mixture"] if whole else [*(f"mixture.{s}" for s in grid.sources), *(() if grid.several else SHARES)]
    if value.key not in possible:
        if value.key == "mixture" or (whole and value.key in SHARES):
            wanted = "a mixture" if whole else "a share"
            near = "`mixture`" if whole else ", ".join(f"`{k}`" for k in possible[-4:])
            raise UsageError(f"`{value.text}` is not {wanted}", f"a law gives it as {near}")
        raise unknown("value of a law", value.key, possible)
    mixture = _mixture(grid, known)
    if whole:
        stage["mixture"] = mixture
        return
    if source is not None:
        share = mixture.get(source, 0.0) / sum(mixture.values())
    else:
        numbers = known or {"ratio": RATIO, "replay": 1 - RATIO, "low": RATIO, "high": RATIO}
        if numbers.get(value.key) is None:
            raise UsageError(f"the law `{value.stage}` gives no `{value.key}`", "it was fitted without resamples")
        share = float(numbers[value.key])
    if path[0] == "mixture":
        stage["mixture"] = {**stage["mixture"], path[1]: share}
    else:
        stage["replay"] = {**stage["replay"], "share": share}


def _mixture(grid: Grid, known: Mapping[str, Any] | None) -> dict[str, float]:
    """The law's mixture, over all sources."""
    if known is None:
        return dict.fromkeys(grid.sources, 1.0) if grid.several else grid.at(RATIO)
    if known.get("ratio") is not None and not grid.several:
        return grid.at(float(known["ratio"]))
    mixture = known.get("mixture") or {}
    for name in mixture:
        if name not in grid.sources:
            raise unknown("source in the law's mixture", name, grid.sources)
    return {name: float(share) for name, share in mixture.items()}


def _own_names(made: Mapping[str, Any], stages: Mapping[str, Any]) -> None:
    for name in made:
        if name in stages:
            raise UsageError(f"the recipe has a stage `{name}`, which is the name of a proxy", "rename the stage")


def options(name: str, law: Mapping[str, Any], grid: Grid, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a law stage's plan, as far as the recipe gives them; `with_facts` adds the rest.

    Raises:
        UsageError: a value that the stage refuses, or a file that is not there.
    """
    from cpt.base.files import hash_file
    from cpt.stages.law import LawStage

    own = {f.name for f in dataclasses.fields(LawStage)}
    found: dict[str, Any] = {k: v for k, v in law.items() if k in own and v is not None}
    if found.get("tolerance") is not None and found.get("eps_g") is not None:
        raise UsageError("both `tolerance` and `eps_g` limit the general loss", "give one of them")
    for key in ("file", "data"):
        if found.get(key) is None:
            continue
        if not Path(found[key]).is_file():  # `of_file` has put the file where a folder stood
            raise UsageError(f"`{key}`: there is no file `{found[key]}`")
        found["content"] = hash_file(found[key])
    if "data" not in found and "file" not in found:
        found["tokens"], found["every"] = proxy_tokens(law, law_name(law, grid))
    own_limit = TOLERANCE if "file" not in found else None  # a saved law has been asked with one
    found |= {
        "target": grid.target or "",
        "law": law_name(law, grid),
        "domain": grid.domain,
        "general": grid.general,
        "ratios": () if grid.several else grid.ratios,
        "mixtures": tuple(grid.mixtures.values()) if grid.several else (),
        "tolerance": None if law.get("eps_g") is not None else law.get("tolerance", own_limit),
        "seed": seed_of(law, values, grid.target),
    }
    return dict(to_json(dataclasses.asdict(LawStage(**found))))


def of_file(law: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a law stage that takes a saved law, with the sources that the law was fitted for.

    Raises:
        UsageError: the file is no law.
    """
    from cpt.laws.saved import SavedLaw
    from cpt.laws.table import DOMAIN, GENERAL

    path = Path(law["file"])
    path = path / "law.json" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"there is no file `{path}`")
    saved = SavedLaw.load(path)
    found = {**law, "file": str(path)}
    if {DOMAIN, GENERAL} >= set(saved.table.corpora):
        return found | {k: dict(v) for k, v in saved.groups.items() if k in (DOMAIN, GENERAL) and not law.get(k)}
    sources = [s for corpus in saved.table.corpora for s in saved.groups.get(corpus) or (corpus,)]
    found.setdefault("domain", dict.fromkeys(sources, 1.0))
    return found | {"mixtures": (dict.fromkeys(sources, 1 / len(sources)),)}


def _comes_from(stage: StagePlan, name: str, stages: Mapping[str, StagePlan]) -> bool:
    """Whether a stage is, or goes on from, the one of that name."""
    at: StagePlan | None = stage
    while at is not None and at.name != name:
        at = stages.get(at.parent or "")
    return at is not None


def with_facts(stages: Mapping[str, StagePlan], model: ModelConfig | None) -> dict[str, StagePlan]:
    """The stages with what a law must know of its target and its proxies, now that their lengths and lrs are known."""
    found = {}
    for name, stage in stages.items():
        target = stages.get(str(stage.options.get("target"))) if stage.kind == "law" else None
        if target is not None and target.train is not None:
            size = target.model or model
            proxy = next((s.train for s in stages.values() if s.group == name and s.train is not None), None)
            facts: dict[str, Any] = {
                "target_tokens": target.train.tokens,
                "target_params": size.num_parameters if size is not None else 0,
                "target_decays": decays(target.train),
                "real_flops": sum(
                    training_flops(s.model or model, s.train.tokens)
                    for s in stages.values()
                    if s.train is not None and s.group is None and _comes_from(s, target.name, stages)
                ),
            }
            if proxy is not None:
                steps = int(str(proxy.lr.options.get("warmup", "0 steps")).split()[0])
                facts["warmup"] = steps * proxy.global_batch_size * proxy.seq_length
                facts["tokens"] = proxy.tokens
            stage = dataclasses.replace(stage, options={**stage.options, **facts})
        found[name] = stage
    return found
