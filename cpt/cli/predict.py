"""`cpt predict LAW`: losses that a saved law predicts, or the ratio that it recommends."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpt.cli import law_keys as keys
from cpt.cli.flags import Json, note, result, result_json, warning

if TYPE_CHECKING:
    from cpt.laws.recommend.distance import Distance
    from cpt.laws.result import Estimate
    from cpt.laws.saved import SavedLaw
    from cpt.laws.settings import Settings

KINDS: dict[str, keys.Kind] = {
    "n_params": keys.amount,
    "tokens": keys.amount,
    "r_domain": keys.share,
    "r_general": keys.share,
    "mixture": keys.amounts,
    "unique_tokens": keys.amount,
    "k1": keys.nats,
    "k2": keys.amount,
    "tolerance": keys.rise,
    "eps_g": keys.nats,
    "domain_tokens": keys.amount,
    "epochs": keys.amount,
    "budget": keys.amount,
    "compute": keys.amount,
    "ratio": keys.share,
    "penalty": keys.amount,
    "caps": keys.amounts,
    "limits": keys.amounts,
    "goal": keys.amounts,
}
FAMILIES: dict[str, keys.Kind] = {"base_": keys.nats}
_POINT = ("r_domain", "r_general", "mixture", "unique_tokens")
_QUESTION = ("tolerance", "eps_g", "domain_tokens", "compute", "limits", "goal", "caps")
_SUM = 0.005  # shares that miss 1 by more are wrong [fraction]

Law = Annotated[str, typer.Argument(metavar="LAW", help="`law.json`, its folder, or a run.", show_default=False)]
Keys = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value ...", help="`n_params=1.8B tokens=10B r_domain=0.5`.", show_default=False),
]


def command(
    law: Law,
    overrides: Keys = None,
    json: Json = False,
    force: Annotated[
        bool, typer.Option("--force", help="Answer also for model sizes that the law says nothing about.")
    ] = False,
) -> int:
    """Print the losses that a saved law predicts, with intervals; without a ratio, the one that it recommends.

    \b
    n_params=1.8B tokens=10B       the run that is asked about; the largest and longest of the table if not given
    r_domain=0.5 | r_general=0.5 | mixture={web: 0.3, code: 0.7}      its mixture
    tolerance=3% | eps_g=0.05      without a mixture: how far the general loss may rise
    base_general=2.87              losses of the base model, if the table has none
    domain_tokens=1B epochs=2 budget=20B | compute=1e21 ratio=0.5     other questions, as in `cpt fit-law`
    unique_tokens=1B k1=2.1 k2=0.3         for laws that have these
    """
    from cpt.laws.saved import SavedLaw

    given = keys.parse(list(overrides or []), KINDS, FAMILIES, "cpt predict")
    saved = SavedLaw.load(_file(law))
    settings = _settings(saved, given, force)
    shares = _shares(saved, given)
    for reason in saved.unfit:
        warning(f"the law is unfit for use: {reason}")
    if shares is None and saved.table.shares:
        return _recommend(saved, settings, given, json)
    return _predict(saved, settings, shares, given, json)


def _file(law: str) -> Path:
    """The law that a word stands for: a file, its folder, or a run with one law stage."""
    from cpt.base.errors import UsageError

    path = Path(law)
    run = path if path.exists() or "/" in law else Path("runs") / law
    try:
        inside = sorted(run.glob("stages/*/law.json")) if run.is_dir() and not (run / "law.json").exists() else []
    except ValueError:  # a null byte
        raise UsageError(f"`{law}` is not a file name") from None
    if len(inside) > 1:
        raise UsageError(f"`{law}` has {len(inside)} laws", *(f"`cpt predict {one}`" for one in inside[:4]))
    return inside[0] if inside else path


def _settings(saved: SavedLaw, given: Mapping[str, Any], force: bool) -> Settings:
    """The questions that the law was fitted with, with those of the command in their place."""
    from cpt.laws import question

    changed: dict[str, Any] = {k: v for k, v in given.items() if k not in _POINT and not k.startswith("base_")}
    if "tolerance" in changed or "eps_g" in changed:
        changed = {"tolerance": None, "eps_g": None} | changed
    if any(key in given for key in _QUESTION):
        kept = {key: None for key in ("domain_tokens", "compute", "budget", "ratio") if key not in given}
        changed = kept | changed
    if base := keys.family(given, "base_"):
        changed |= {"base_losses": base}
    settings = dataclasses.replace(saved.settings, **changed, force=force)
    size = question.asked_size(saved.table, settings)
    if base:
        return dataclasses.replace(settings, base_n_params=size)
    _warn_of_base(saved, size)
    return settings


def _warn_of_base(saved: SavedLaw, size: float | None) -> None:
    """Say when the losses before training that were given with the fit are of another size than is asked about."""
    from cpt.base.units import show_count

    of = saved.settings.base_n_params
    lost = [name for name in saved.settings.base_losses if saved.table.base_loss(name, size) is None]
    if lost and size is not None and of is not None:
        keys_of = " and ".join(f"`base_{name}=`" for name in lost)
        warning(
            f"the losses before training were given for {show_count(of)} parameters and are not used for "
            f"{show_count(size)}; {keys_of} gives them"
        )


def _shares(saved: SavedLaw, given: Mapping[str, Any]) -> dict[str, float] | None:
    """Share of every corpus, None when none is given."""
    from cpt.base.errors import UsageError
    from cpt.laws.table import DOMAIN, GENERAL

    ways = [key for key in ("r_domain", "r_general", "mixture") if key in given]
    if not ways:
        return None
    corpora = saved.table.corpora
    named = ", ".join(f"`{c}`" for c in corpora) or "no corpora"
    if len(ways) > 1:
        raise UsageError(f"`{ways[0]}` and `{ways[1]}` both say the mixture", "give one of them")
    if ways[0] != "mixture":
        if set(corpora) != {DOMAIN, GENERAL}:
            hint = "`mixture={NAME: SHARE, ...}` gives the share of each" if corpora else "ask without a ratio"
            raise UsageError(f"`{ways[0]}` is a share of two corpora, and the law was fitted on {named}", hint)
        other = GENERAL if ways[0] == "r_domain" else DOMAIN
        return {ways[0][2:]: given[ways[0]], other: 1 - given[ways[0]]}
    found: dict[str, float] = given["mixture"]
    if unlike := [c for c in found if c not in corpora]:
        raise UsageError(f"`mixture` names `{unlike[0]}`, and the law was fitted on {named}")
    if wrong := [c for c, share in found.items() if not 0 <= share <= 1]:
        raise UsageError(f"`mixture.{wrong[0]}` is {found[wrong[0]]:g}, wanted 0 to 1")
    total = sum(found.values())
    if abs(total - 1) > _SUM:
        raise UsageError(f"the shares of `mixture` sum to {total:g}, wanted 1")
    return {corpus: found.get(corpus, 0.0) / total for corpus in corpora}


def _predict(
    saved: SavedLaw, settings: Settings, shares: dict[str, float] | None, given: Mapping[str, Any], json: bool
) -> int:
    import numpy as np

    from cpt.base.units import show_count
    from cpt.laws import again, question
    from cpt.laws.recommend.answer import general_limit
    from cpt.laws.recommend.distance import distance
    from cpt.laws.result import Estimate, plain
    from cpt.laws.table import GENERAL
    from cpt.report import law_text

    table = saved.table.with_base(settings.base_losses, settings.base_n_params)
    size, tokens = question.asked_size(table, settings), question.asked_tokens(table, settings)
    losses: dict[str, Estimate] = {}
    base = {}
    warnings: list[str] = []
    lies: Distance | None = None
    for name, target in saved.targets.items():
        extra = {"unique_tokens": given.get("unique_tokens"), "k1": settings.k1, "k2": settings.k2}
        extra["base"] = table.base_loss(name, size)
        _refuse_lacking(saved, name, extra, size, tokens)
        point = saved.points(name, n_params=size, tokens=tokens, shares=shares, **extra)
        losses[name] = Estimate.of(saved.predict(name, point)[:, 0])
        if extra["base"] is not None:
            base[name] = extra["base"]
        several = np.array([shares[c] for c in saved.table.corpora]) if shares and len(shares) > 2 else None
        share = shares.get(name) if shares and several is None else None
        far = distance(target.rows, n_params=size, tokens=tokens, share=share, shares=several)
        lies = lies or far
        lowest = again.lowest_share(saved, name, size, tokens, settings)
        warnings += _warnings(name, far.strong, far.reason, share, lowest)
    assert lies is not None
    limit = None
    if ("tolerance" in given or "eps_g" in given) and GENERAL in losses:
        limit = general_limit(base.get(GENERAL), given.get("tolerance"), given.get("eps_g"))
    for text in dict.fromkeys(warnings):
        warning(text)
    parts = [] if size is None else [f"{show_count(size)} parameters"]
    parts += [] if tokens is None else [f"{show_count(tokens)} tokens"]
    parts += [f"{'r_' if len(saved.table.shares) == 2 else ''}{c} {share:g}" for c, share in (shares or {}).items()]
    if json:
        asked = {"n_params": size, "tokens": tokens, "shares": shares}
        result_json(
            plain(
                {
                    "law": saved.law,
                    "verdict": saved.verdict,
                    "asked": asked | {k: given[k] for k in ("unique_tokens", "k1", "k2") if k in given},
                    "losses": losses,
                    "base": base,
                    "inside": lies.inside,
                    "factors": lies.factors,
                    "warnings": list(dict.fromkeys(warnings)),
                }
                | ({"limit": limit, "admissible": losses[GENERAL].value <= limit} if limit is not None else {})
            )
        )
    else:
        meets = [_meets(losses[GENERAL], limit)] if limit is not None else []
        result(law_text.prediction(" · ".join(parts), losses, base, lies.reason, meets))
    return 0


def _meets(loss: Estimate, limit: float) -> str:
    """Whether the general loss keeps the limit that was given with a mixture."""
    by = f"{abs(loss.value - limit):.4f} nats {'below' if loss.value <= limit else 'above'} the limit of {limit:.4f}"
    sure = "" if not loss.low <= limit <= loss.high else ", and the interval reaches over it"
    verdict = "is within" if loss.value <= limit else "is not within"
    return f"limit    this mixture {verdict} the tolerance: general loss {by}{sure}"


def _refuse_lacking(
    saved: SavedLaw, name: str, extra: Mapping[str, float | None], size: float | None, tokens: float | None
) -> None:
    from cpt.base.errors import UsageError

    target = saved.targets[name]
    known = {**extra, "n_params": size, "tokens": tokens}
    asked_for = {"n_params": "has_n", "tokens": "has_d"}
    for column in target.law.needs:
        dropped = not getattr(target.law, asked_for.get(column, ""), True)
        if column in known and known[column] is None and not dropped:
            key = f"base_{name}" if column == "base" else column
            raise UsageError(f"the law `{saved.law}` predicts nothing without `{key}`", f"give `{key}=`")


def _warnings(name: str, strong: tuple[str, ...], reason: str, share: float | None, lowest: float | None) -> list[str]:
    found = []
    if "beyond" in reason or "outside" in reason:
        found.append(f"{reason}: the prediction extrapolates" + (" far" if strong else ""))
    if share is not None and lowest is not None and 0 < share < lowest:
        found.append(
            f"r_{name} {share:.3g} lies below {lowest:.3g}, where the fitted {name} loss stops rising with its own "
            "share: the law does not hold there"
        )
    return found


def _recommend(saved: SavedLaw, settings: Settings, given: Mapping[str, Any], json: bool) -> int:
    from cpt.laws import again, cautions, question
    from cpt.report import law_text

    answer, reason, targets, table = again.answer(saved, settings)
    if answer is None:
        size, tokens = question.asked_size(table, settings), question.asked_tokens(table, settings)
        return _no_answer(saved, settings, size, tokens, reason, json)
    warnings = [w.text for w in cautions.of_answer(answer, targets)]
    for text in warnings:
        warning(text)
    if json:
        result_json(
            {
                "law": saved.law,
                "verdict": saved.verdict,
                "recommendation": again.said(answer),
                "warnings": warnings,
            }
        )
    else:
        result("\n".join(law_text.recommendation(answer, unfit=bool(saved.unfit))))
    note("`r_domain=...` asks for the losses at a ratio of your own")
    return 0


def _no_answer(
    saved: SavedLaw, settings: Settings, size: float | None, tokens: float | None, reason: str, json: bool
) -> int:
    """No share is admissible, which is an answer as in `cpt fit-law`; that nothing was asked is an error."""
    from cpt.base.errors import UsageError
    from cpt.laws.recommend.distance import distance

    way = "`r_domain=0.5` asks for the losses at a ratio, `tolerance=3%` for the best one within a tolerance"
    if all(getattr(settings, key) is None for key in ("tolerance", "eps_g", "domain_tokens", "compute")) and not any(
        getattr(settings, key) for key in ("limits", "goal", "caps")
    ):
        raise UsageError(f"the law recommends no mixture: {reason}", way)
    lies = distance(next(iter(saved.targets.values())).rows, n_params=size, tokens=tokens)
    warnings = [] if lies.inside else [f"{lies.reason}: the prediction extrapolates" + " far" * bool(lies.strong)]
    for text in warnings:
        warning(text)
    if json:
        said = {"recommendation": None, "no_recommendation": reason, "warnings": warnings}
        result_json({"law": saved.law, "verdict": saved.verdict, **said})
    else:
        result(f"no recommendation: {reason}")
        note(way)
    return 0
