"""`cpt fit-law recipe=NAME`: run the proxies of a recipe's law stage, and fit the law.

The run holds the law stage and what it needs, nothing else; the same command goes on after a stop. A later
`cpt run recipe=NAME` finds the proxies and the law done, and takes them from there.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt.base.errors import UsageError
from cpt.base.registry import unknown
from cpt.base.units import parse_count
from cpt.cli.flags import note, result, result_json, warning

if TYPE_CHECKING:
    from cpt.cli.run import Screen
    from cpt.plan.types import RunPlan
    from cpt.stages.run import Result

# Keys of the law stage that may be written without `stages.<law>.`; others are keys of the recipe.
SHORT = (
    "for", "law", "domain", "general", "ratios", "mixtures", "tokens", "every", "bases", "lr", "tolerance", "eps_g",
    "max_cost", "how", "draws",
)  # fmt: skip
PART = 0.25  # of the target's tokens, for all proxies of a law that the recipe does not lay out itself


def command(
    texts: Sequence[str],
    *,
    json: bool = False,
    yes: bool = False,
    dry_run: bool = False,
    fresh: bool = False,
) -> int:
    """Plan the law stage of a recipe, run what it needs, and say what the law says.

    Args:
        texts: `recipe=NAME` and overrides; `stage=NAME` names one of several law stages.
        dry_run: show the plan and start nothing.
        fresh: start again in a new folder.
    """
    from cpt.cli import plan as plan_command
    from cpt.cli import run as run_command
    from cpt.config import build
    from cpt.config.compose import compose

    law, overrides = _overrides(texts)
    composed = compose(overrides)

    def make(laws: Mapping[str, Path] | None) -> RunPlan:
        return only(build.from_composed(composed, laws=laws), law, composed.config.get("name"))

    if dry_run:
        plan = make(None)
        if json:
            result_json(plan_command.as_json(plan))
        else:
            short = _too_short(plan, law)
            result(plan_command.text(plan, None if short else ["cpt", "fit-law", *texts]))
            if short:
                note(short)
        return 0

    def finish(ended: Result, screen: Screen, json: bool) -> int:
        return _finish(ended, law, overrides, json)

    return run_command.go(make, fresh=fresh, yes=yes, json=json, finish=finish)


def _too_short(plan: RunPlan, law: str) -> str:
    """That the proxies say little, and how long they should be; empty when they are long enough."""
    from cpt.base.units import show_count
    from cpt.plan.check import FEW_STEPS

    trains = [s.train for s in plan.stages.values() if s.group == law and s.train is not None]
    shortest = min((t.steps for t in trains), default=FEW_STEPS)
    if shortest >= FEW_STEPS:
        return ""
    tokens = max(FEW_STEPS * t.global_batch_size * t.seq_length for t in trains)
    longer = show_count(tokens).replace(",", "")
    return (
        f"no command is offered: proxies of {shortest} steps say little; `tokens={longer}` makes them "
        f"{FEW_STEPS} steps long"
    )


def only(plan: RunPlan, law: str, name: str | None = None) -> RunPlan:
    """The plan of a law stage and everything that it needs.

    Args:
        name: of the run, when it was given.
    """
    from cpt.plan.fingerprint import plan_id

    needed, waiting = set(), [law]
    while waiting:
        stage = plan.stages[waiting.pop()]
        needed.add(stage.name)
        parents = [p for p in (stage.parent, *stage.after) if p is not None and p in plan.stages]
        waiting += [p for p in (*parents, *(v.partition(".")[0] for v in stage.law.values())) if p not in needed]
    stages = {n: s for n, s in plan.stages.items() if n in needed}
    identity = plan_id(stages)
    return dataclasses.replace(plan, stages=stages, id=identity, name=name or f"{plan.recipe}-{identity[:6]}")


def _overrides(texts: Sequence[str]) -> tuple[str, list[str]]:
    """The law stage, and overrides with short keys written out; a recipe without a law gets one."""
    from cpt.config.compose import compose

    chosen, short, rest = None, [], []
    for text in texts:
        key, _, value = text.strip().partition("=")
        if key == "data" and not value.strip().startswith("{"):  # a mapping is the recipe's own key
            raise UsageError(
                "`recipe=` and `data=` exclude each other: the one makes the runs, the other has them",
                "`cpt fit-law data=FILE` fits a table, `stages.<law>.data=FILE` lets a recipe's law use one",
            )
        if key == "ratio":
            raise UsageError("unknown key `ratio`", "did you mean `ratios`? It lists the domain shares of the runs")
        if key == "stage":
            chosen = value.strip()
        elif key.partition(".")[0] in SHORT:
            short.append(text.strip())
        else:
            rest.append(text)
    stages: Mapping[str, Any] = compose(rest).config.get("stages") or {}
    laws = [n for n, s in stages.items() if isinstance(s, Mapping) and s.get("kind") == "law"]
    if chosen is not None and chosen not in laws:
        raise unknown("law stage", chosen, laws)
    if chosen is None and len(laws) > 1:
        raise UsageError(f"the recipe has {len(laws)} law stages", f"`stage={laws[0]}` or `stage={laws[1]}` names one")
    if not laws:
        name = next(n for n in ("mix", "law", "mixture_law") if n not in stages)
        given = {text.partition("=")[0]: text.partition("=")[2] for text in short}
        rest += _added(name, stages, given)
    else:
        name = chosen or laws[0]
    return name, [*rest, *(f"stages.{name}.{text}" for text in short)]


def _added(name: str, stages: Mapping[str, Any], given: Mapping[str, str]) -> list[str]:
    """Overrides that add a law stage for the first train stage that has domain and general sources."""
    trained = {n: s for n, s in stages.items() if isinstance(s, Mapping) and s.get("kind", "train") == "train"}
    if "for" in given:
        target = given["for"]
        if target not in trained:
            raise unknown("train stage", target, trained)
    else:
        found = next((n for n, s in trained.items() if s.get("replay")), None)
        found = found or next((n for n, s in trained.items() if len(s.get("mixture") or ()) > 1), None)
        if found is None:
            raise UsageError(
                "no train stage of the recipe has both domain and general sources",
                "`for=STAGE domain=[...] general=[...]` says what is wanted",
            )
        target = found
    if not trained[target].get("replay") and not {"domain", "general"} & set(given):
        sources = list(trained[target].get("mixture") or ())
        hint = f"`domain=[{sources[0]}]`" if sources else "`domain=[...]`"
        raise UsageError(f"which sources of stage `{target}` are the domain is not known", hint)
    keys = [f"kind: law, for: {target}"]
    if "tokens" not in given and trained[target].get("tokens") is not None:
        tokens = int(parse_count(trained[target]["tokens"]) * PART / 5)
        digits = 10 ** max(0, len(str(tokens)) - 2)
        keys.append(f"tokens: {tokens // digits * digits}")
        note(f"the recipe has no law stage: one for `{target}` is planned, with proxies of a twentieth of its tokens")
    return [f"+stages.{name}={{{', '.join(keys)}}}"]


def _finish(ended: Result, law: str, overrides: Sequence[str], json: bool) -> int:
    """What the law says and where it lies; then the error, if the run ended with one."""
    from cpt.report import law_stage
    from cpt.stages import attempt, state

    if ended.error is not None:
        raise ended.error
    home = state.home(attempt.stage_dir(ended.run_dir, law))
    analysis, files = law_stage.read(home), law_stage.files(home)
    for text in dict.fromkeys(one.text for one in analysis.warnings):  # one may be about both losses
        warning(text)
    for reason in analysis.unfit:
        warning(f"`{analysis.law}` is unfit for use here: {reason}")
    if json:
        result_json(analysis.to_json() | {"run": str(ended.run_dir), "files": files})
        return 0
    result(law_stage.text(analysis, files))
    if not analysis.unfit and (then := _then(ended.plan, law, home, overrides)):
        result(f"then     `{then}`")
    return 0


def _then(plan: RunPlan, law: str, home: Path, overrides: Sequence[str]) -> str:
    """The run itself: it takes the law's values when its recipe has the law, else they are written out."""
    from cpt.stages import law_values

    if not any(text.startswith(f"+stages.{law}=") for text in overrides):
        return shlex.join(["cpt", "run", *overrides])
    values, _ = law_values.result(home)
    options = plan.stages[law].options
    plain = [text for text in overrides if not text.startswith((f"+stages.{law}=", f"stages.{law}."))]
    if not values:
        return ""
    shares = ", ".join(f"{source}: {share:.3g}" for source, share in values["mixture"].items())
    target = options["target"]
    return shlex.join(["cpt", "run", *plain, f"stages.{target}.mixture={{{shares}}}", f"stages.{target}.replay=null"])
