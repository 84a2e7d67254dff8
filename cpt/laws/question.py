"""From what a person set to a question that `laws/recommend` answers, and from its answer to a `Recommendation`.

| set | question |
|---|---|
| `tolerance` or `eps_g` | usage 1: the ratio with the lowest domain loss within the tolerance |
| the same, general loss alone | the largest ratio within the tolerance |
| the same with the law `cmr` | the largest of those ratios whose objective begins to fall within the run |
| `domain_tokens` | usage 2: how long a run to make of the domain data there are |
| several corpora; `goal`, `limits`, `caps` | the best mixture of them (`question_mixture`) |
| `compute` and `ratio` | usage 3: model size and tokens for a compute budget |

Array suffixes: D draws, G points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from cpt.base.errors import UsageError
from cpt.base.units import show_count
from cpt.laws.cmr import UNIT, Cmr
from cpt.laws.law import Law
from cpt.laws.question_mixture import recommend_mixture
from cpt.laws.ratio_curve import ratio_curve
from cpt.laws.recommend.allocation import allocation
from cpt.laws.recommend.answer import Loss, Ratio
from cpt.laws.recommend.critical import critical
from cpt.laws.recommend.distance import Distance, distance
from cpt.laws.recommend.limited import limited
from cpt.laws.recommend.threshold import threshold
from cpt.laws.recommend.tradeoff import tradeoff
from cpt.laws.result import Estimate, Recommendation, TargetFit
from cpt.laws.rows import Floats, points
from cpt.laws.settings import Settings
from cpt.laws.table import DOMAIN, GENERAL, SAME_SIZE, Table
from cpt.laws.turning import turning

Fits = Mapping[str, TargetFit]


def asked_size(table: Table, settings: Settings) -> float | None:
    """The model size that is meant: the one set, else the largest of the table [parameters].

    Raises:
        UsageError: a size outside the table's that fewer than three sizes say nothing about.
    """
    if table.n_params is None:
        return settings.n_params
    sizes = np.unique(table.n_params)
    size = float(sizes[-1]) if settings.n_params is None else settings.n_params
    inside = sizes[0] * (1 - SAME_SIZE) <= size <= sizes[-1] * (1 + SAME_SIZE)
    if not inside and len(sizes) < 3 and not settings.force:
        there = " and ".join(show_count(n) for n in sizes)
        says = "one model size says" if len(sizes) == 1 else "two model sizes say"
        raise UsageError(
            f"`n_params` is {show_count(size)}, the table has {there}, and {says} nothing about others",
            "add runs of three sizes or more, or answer all the same with `--force`",
        )
    return size


def asked_tokens(table: Table, settings: Settings) -> float | None:
    """The length that is meant: the one set, else the longest of the table [tokens]."""
    if settings.tokens is not None or table.tokens is None:
        return settings.tokens
    return float(table.tokens.max())


def probe_of(law: Law, settings: Settings) -> dict[str, float]:
    """`k1` and `k2` of the domain that is asked about, for a law over several domains; empty when they are not set."""
    if "k1" not in law.needs or settings.k1 is None or settings.k2 is None:
        return {}
    return {"k1": settings.k1, "k2": settings.k2}


def by_ratio(law: Law, probe: Mapping[str, float]) -> bool:
    """Whether the law can be asked for its loss at a ratio, a size and a length, and nothing else."""
    if "k1" in law.needs:
        return bool(probe)
    return not {"shares", "unique_tokens"} & set(law.needs)


def _unasked(fits: Fits) -> str:
    """Why the laws cannot be asked for a ratio or a size; empty when they can."""
    for fit in fits.values():
        if "k1" in fit.law.needs and not fit.probe:
            return f"`{fit.law.name}` is a law over several domains: `k1=` and `k2=` say which is meant"
        if "unique_tokens" in fit.law.needs:
            return f"`{fit.law.name}` is about epochs, not about mixtures: `cpt predict` asks it with `unique_tokens=`"
    return ""


def loss_along(fit: TargetFit, n_params: float | None) -> Loss:
    """loss_DG of a target by share of its corpus and tokens, at one size."""
    if isinstance(fit.law, Cmr):
        return ratio_curve(fit.law, fit.theta_DP)
    corpora = fit.rows.corpora
    own = corpora.index(fit.name) if len(corpora) == 2 and fit.name in corpora else None

    def loss(share_G: Floats, tokens_G: Floats) -> Floats:
        tokens_G = np.broadcast_to(tokens_G, share_G.shape)
        shares_GK = None if own is None else np.stack([share_G, 1 - share_G][:: -1 if own else 1], axis=1)
        asked = points(
            n_params=n_params,
            tokens=tokens_G,
            share=share_G,
            shares=shares_GK,
            corpora=corpora,
            base=fit.base,
            k1=fit.probe.get("k1"),
            k2=fit.probe.get("k2"),
        )
        return fit.loss(asked)

    return loss


def recommend(table: Table, fits: Fits, settings: Settings) -> tuple[Recommendation | None, str]:
    """The answer, or None and why there is none.

    Raises:
        UsageError: what was asked needs a loss, a column or a base loss that is missing.
    """
    limit = settings.tolerance is not None or settings.eps_g is not None
    if reason := _unasked(fits):
        if limit or settings.domain_tokens is not None or settings.compute is not None:
            raise UsageError(reason)
        return None, reason
    if len(table.shares) > 2:
        if limit or settings.domain_tokens is not None:
            key = "domain_tokens" if settings.domain_tokens is not None else "tolerance` or `eps_g"
            raise UsageError(
                f"`{key}` is for tables of two corpora, `domain` and `general`",
                "for several, `limits={CORPUS: loss}` limits losses and `caps={CORPUS: tokens}` what is read",
            )
        if settings.compute is None:
            return recommend_mixture(table, fits, settings, asked_size(table, settings), asked_tokens(table, settings))
    if settings.compute is not None:
        return _allocation(table, fits, settings), ""
    if settings.domain_tokens is not None:
        return _answer(table, fits, settings, _limited(table, fits, settings))
    if limit:
        found = _within(table, fits, settings)
        both = [fits.get(name) for name in (DOMAIN, GENERAL)]
        if all(fit is not None and isinstance(fit.law, Cmr) for fit in both):
            return _critical(table, fits, settings, found)
        return _answer(table, fits, settings, found)
    if len(table.shares) < 2:
        return None, "the table has no column of ratios"
    return None, "nothing was asked: `tolerance=3%` asks for the ratio that keeps the general loss within 3 %"


def _within(table: Table, fits: Fits, settings: Settings) -> Ratio:
    """Usage 1, or the threshold where only the general loss is there."""
    if GENERAL not in fits:
        missing = "is not fitted" if GENERAL in table.losses else "is not in the table"
        raise UsageError(
            f"a tolerance limits the general loss, and `loss_general` {missing}",
            "`domain_tokens=` asks for the best ratio for an amount of domain data, without a limit",
        )
    n_params, tokens = asked_size(table, settings), asked_tokens(table, settings)
    general = loss_along(fits[GENERAL], n_params)
    domain = loss_along(fits[DOMAIN], n_params) if DOMAIN in fits else None
    _refuse_unknown_base(fits[GENERAL], table, n_params)
    length = 1.0 if tokens is None else tokens
    limits = {"base_general": fits[GENERAL].base, "tolerance": settings.tolerance, "eps_g": settings.eps_g}
    if domain is None or isinstance(fits[DOMAIN].law, Cmr):
        found = threshold(general, tokens=length, domain=domain, **limits)  # type: ignore[arg-type]
    else:
        found = tradeoff(domain, general, tokens=length, **limits)  # type: ignore[arg-type]
    return found if tokens is not None else replace(found, tokens=None)


def _critical(table: Table, fits: Fits, settings: Settings, found: Ratio) -> tuple[Recommendation | None, str]:
    """The critical ratio: what the threshold allows and what has begun to pay by the end of the run."""
    domain, general = fits[DOMAIN], fits[GENERAL]
    assert isinstance(domain.law, Cmr) and isinstance(general.law, Cmr) and found.tokens is not None
    turns = turning(domain.law, domain.theta_DP, general.law, general.theta_DP, found.tokens, weight=settings.penalty)
    both = critical(found, turns.share_D)
    answer = both.answer
    if both.answer.decided_by == "turning":
        along = [(loss_along(domain, None), answer.value), (loss_along(general, None), 1 - answer.value)]
        at = [Estimate.of(loss(np.array([share]), np.array([found.tokens]))[:, 0]) for loss, share in along]
        answer = replace(answer, loss_domain=at[0], loss_general=at[1])
    given, reason = _answer(table, fits, settings, answer)
    if given is None:
        return given, reason
    started = dict(zip(turns.ratios, (turns.units_DK[0] * UNIT).tolist(), strict=True))
    more = {
        "threshold": both.threshold.value,
        "turning": both.turning,
        "turning_rests_on": turns.how,
        "clipped": both.clipped,
        "falls_from_tokens": started,
        "feasible": turns.feasible(found.tokens),
        "penalty": settings.penalty,
    }
    return replace(given, more={**given.more, **more}), ""


def _limited(table: Table, fits: Fits, settings: Settings) -> Ratio:
    """Usage 2."""
    assert settings.domain_tokens is not None
    if DOMAIN not in fits:
        raise UsageError("`domain_tokens` asks for the lowest domain loss, and the table has no `loss_domain`")
    if table.tokens is None:
        raise UsageError("`domain_tokens` needs a table with `tokens`: how the loss falls with the length is not known")
    n_params = asked_size(table, settings)
    general = loss_along(fits[GENERAL], n_params) if GENERAL in fits else None
    if settings.tolerance is not None or settings.eps_g is not None:
        if general is None:
            raise UsageError("a tolerance limits the general loss, and `loss_general` is not in the table")
        _refuse_unknown_base(fits[GENERAL], table, n_params)
    share_R = fits[DOMAIN].rows.share_R
    assert share_R is not None
    return limited(
        loss_along(fits[DOMAIN], n_params),
        general,
        domain_tokens=settings.domain_tokens,
        max_tokens=settings.budget,
        low=float(share_R[share_R > 0].min(initial=1.0)),
        max_epochs=settings.epochs,
        base_general=fits[GENERAL].base if general is not None else None,
        tolerance=settings.tolerance,
        eps_g=settings.eps_g,
    )


def _refuse_unknown_base(general: TargetFit, table: Table, n_params: float | None) -> None:
    if general.base is None and table.base and n_params is not None:
        raise UsageError(
            f"the general loss before training is not known for a model of {show_count(n_params)} parameters",
            "give it as `base_general=`",
        )


def _answer(table: Table, fits: Fits, settings: Settings, found: Ratio) -> tuple[Recommendation | None, str]:
    if not math.isfinite(found.value):
        return None, found.reason
    n_params = asked_size(table, settings)
    ratio = Estimate(found.value, found.low, found.high)
    losses = {DOMAIN: found.loss_domain, GENERAL: found.loss_general}
    base = {name: fit.base for name, fit in fits.items() if fit.base is not None}
    far = _distance(fits, n_params, found.tokens, found.value)
    return (
        Recommendation(
            usage=found.usage,
            asked=_words(found, settings, n_params),
            ratio=ratio,
            mixture={DOMAIN: ratio, GENERAL: Estimate(1 - ratio.value, 1 - ratio.high, 1 - ratio.low)},
            n_params=n_params,
            tokens=None if found.tokens is None else Estimate(found.tokens),
            losses={name: loss for name, loss in losses.items() if loss is not None},
            base=base,
            limits={} if found.limit is None else {GENERAL: found.limit},
            ratio_D=found.draws_D,
            inside=far.inside,
            factors=far.factors,
            decided_by=found.decided_by,
            notes=(found.reason, *found.notes),
            more={"distance": far.reason, "domain_tokens": found.domain_tokens, "replay_tokens": found.replay_tokens}
            | ({} if found.epochs is None else {"epochs": found.epochs}),
        ),
        "",
    )


def without_outliers(table: Table, fits: Fits, settings: Settings) -> float | None:
    """The ratio when every loss is fitted without its outliers; None when there are none or nothing is admissible."""
    if not any(fit.without_outliers is not None for fit in fits.values()):
        return None
    cleaned = {}
    for name, fit in fits.items():
        other = fit.without_outliers
        theta_P = fit.fit.theta_P if other is None else other.theta_P
        cleaned[name] = replace(fit, theta_DP=theta_P[None])
    found, _ = recommend(table, cleaned, settings)
    return None if found is None or found.ratio is None else found.ratio.value


def with_second(found: Recommendation, ratio: float | None) -> Recommendation:
    """The answer with the one that the fits without outliers give beside it."""
    return replace(found, without_outliers=ratio)


def _allocation(table: Table, fits: Fits, settings: Settings) -> Recommendation:
    """Usage 3."""
    assert settings.compute is not None
    name = DOMAIN if DOMAIN in fits else next(iter(fits))
    fit = fits[name]
    if table.n_params is None or len(np.unique(table.n_params)) < 2:
        raise UsageError("`compute` is split between size and tokens, and the table has one model size")
    if len(np.unique(table.n_params)) < 3 and not settings.force:
        raise UsageError(
            "`compute` is split between size and tokens, and two model sizes do not say how the loss goes on with size",
            "add runs of a third size, or answer all the same with `--force`",
        )
    if table.tokens is None or len(np.unique(table.tokens)) < 2:
        raise UsageError("`compute` is split between size and tokens, and the table has one token count")
    if fit.rows.share_R is not None and settings.ratio is None:
        raise UsageError("`compute` is split at a fixed ratio", "give `ratio=`, the share of domain data")
    ratio = settings.ratio if fit.rows.share_R is not None else None
    share = None if ratio is None else ratio if name != GENERAL else 1 - ratio

    def loss(n_params_G: Floats, tokens_G: Floats) -> Floats:
        k1, k2 = fit.probe.get("k1"), fit.probe.get("k2")
        return fit.loss(points(n_params=n_params_G, tokens=tokens_G, share=share, base=fit.base, k1=k1, k2=k2))

    found = allocation(loss, flops=settings.compute)
    losses = {name: found.loss}
    if name == DOMAIN and GENERAL in fits and ratio is not None:
        general = loss_along(fits[GENERAL], found.value)
        losses[GENERAL] = Estimate.of(general(np.array([1 - ratio]), np.array([found.tokens.value]))[:, 0])
    far = distance(fit.rows, n_params=found.value, tokens=found.tokens.value, share=share)
    exact = {} if ratio is None else {DOMAIN: Estimate(ratio), GENERAL: Estimate(1 - ratio)}
    return Recommendation(
        usage="allocation",
        asked=f"the model size and length with the lowest {name} loss for {settings.compute:.3g} FLOPs",
        ratio=None if ratio is None else Estimate(ratio),
        mixture=exact,
        n_params=found.value,
        tokens=found.tokens,
        losses=losses,
        base={},
        limits={},
        ratio_D=np.empty(0),
        inside=far.inside,
        factors=far.factors,
        decided_by="range" if found.at_edge else "minimum",
        notes=(found.reason,),
        more={"distance": far.reason, "n_params": Estimate(found.value, found.low, found.high), "flops": found.flops},
    )


def _distance(fits: Fits, n_params: float | None, tokens: float | None, ratio: float) -> Distance:
    """From the rows of the domain loss, or of the general loss where that is all there is."""
    if DOMAIN in fits:
        return distance(fits[DOMAIN].rows, n_params=n_params, tokens=tokens, share=ratio)
    return distance(fits[GENERAL].rows, n_params=n_params, tokens=tokens, share=1 - ratio)


def _words(found: Ratio, settings: Settings, n_params: float | None) -> str:
    model = "" if n_params is None else f" of a model of {show_count(n_params)} parameters"
    most = ""
    if settings.tolerance is not None:
        most = f"a general loss at most {100 * settings.tolerance:g} % above the base model's"
    elif settings.eps_g is not None:
        most = f"a general loss at most {settings.eps_g:g} nats above the base model's"
    if found.usage == "limited":
        assert settings.domain_tokens is not None
        text = f"the lowest domain loss{model} from {show_count(settings.domain_tokens)} domain tokens"
        return f"{text} with {most}" if most else text
    length = "" if found.tokens is None else f" after {show_count(found.tokens)} tokens"
    if found.usage == "cmr":
        return f"the critical domain share{model} with {most}{length}"
    if found.usage == "threshold":
        return f"the largest domain share{model} with {most}{length}"
    return f"the lowest domain loss{model} with {most}{length}"
