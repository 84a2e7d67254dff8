"""What a reader of a fitted law must be warned of, and what makes a law unfit for use."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from cpt.base.units import show_count
from cpt.laws.bootstrap import FEW_RUNS
from cpt.laws.outliers import loss_name, ratio_name
from cpt.laws.recommend.distance import STRONG
from cpt.laws.result import Bootstrap, Growth, Recommendation, TargetFit, Warn
from cpt.laws.settings import Settings
from cpt.laws.table import DOMAIN, GENERAL, Table

WIDE = 0.2  # interval of a ratio that says little [fraction]
AGREEING = 5  # restarts that should find the same optimum
WORSE = 3.0  # error at ratios inside the others over in-sample error
FAR_WORSE = 10.0  # the same for sizes and tokens beyond those of the fit, where even the true law misses more
PART = 0.2  # of the allowed rise of the general loss: growth with tokens that an answer must not hide
_FAR = 2.0  # a share further beyond the measured ones than these are apart
_FOLLOWING = ("cmr", "replay")  # laws whose loss may rise with tokens
_STEADY = ("constant", "infinite")  # schedules of the lr that do not end in a decay

Fits = Mapping[str, TargetFit]


def cautions(
    law: str,
    table: Table,
    fits: Fits,
    settings: Settings,
    bootstrap: Bootstrap | None,
    recommendation: Recommendation | None,
) -> tuple[Warn, ...]:
    """All warnings, strong ones first."""
    found = [Warn("table", text) for text in table.warnings]
    found += _mixed(table) + _decaying(table, settings)
    for name, fit in fits.items():
        found += _of_fit(law, name, fit, table)
        found += _growth(law, name, fit)
        found += _checks(name, fit)
    if bootstrap is not None:
        found += _of_bootstrap(bootstrap)
    if GENERAL in fits and fits[GENERAL].base is None:
        found.append(
            Warn("base_missing", "the general loss before training is not known; give it as `base_general=`", GENERAL)
        )
    if recommendation is not None:
        found += of_answer(recommendation, fits)
    return tuple(sorted(found, key=lambda w: not w.strong))


def unfit(fits: Fits, recommendation: Recommendation | None = None) -> tuple[str, ...]:
    """Why the law must not be used: nothing could be left out, it predicts left-out ratios worse than a line between
    their neighbours, or mixtures of several corpora worse than the nearest one, or it falls with tokens at the
    recommended ratio where the runs rise."""
    found = _against_growth(fits, recommendation)
    for name, fit in fits.items():
        if not math.isfinite(fit.heldout.error) or len(fit.rows) <= len(fit.fit.theta_P):
            found.append(f"{loss_name(name)}: nothing could be left out, so its error on new runs is not known")
            continue
        held = fit.heldout
        line = math.isfinite(held.interpolation)
        other = held.interpolation if line else held.nearest
        if held.law_within > other:
            instead = "a line between the neighbouring ratios" if line else "the nearest mixture that was run"
            what = "ratios" if line else "mixtures"
            found.append(
                f"{loss_name(name)} at left-out {what} is predicted worse by the law than by {instead}: "
                f"{100 * held.law_within:.3g} % against {100 * other:.3g} %"
            )
    return tuple(found)


def _of_fit(law: str, name: str, fit: TargetFit, table: Table) -> list[Warn]:
    found = [Warn("not_determined", text, name) for text in fit.dropped]
    rows = fit.rows
    has_size = any(p.name in ("A", "alpha") for p in fit.law.parameters)
    if has_size and rows.n_params_R is not None and len(np.unique(rows.n_params_R)) == 2:
        text = "two model sizes determine neither `alpha` nor `E`: nothing can be said about other sizes"
        found.append(Warn("two_sizes", text, name))
    if fit.fit.at_bound:
        named = ", ".join(f"`{p}`" for p in fit.fit.at_bound)
        advice = "; `law=l1` does without `eta`" if law == "dcpt" and "eta" in fit.fit.at_bound else ""
        lies = "lies on its bound" if len(fit.fit.at_bound) == 1 else "lie on their bounds"
        found.append(Warn("bound", f"{named} {lies} in the fit of {loss_name(name)}{advice}", name))
    wanted = min(AGREEING, fit.fit.num_starts)
    if fit.fit.agreeing < wanted:
        text = f"{fit.fit.agreeing} of {fit.fit.num_starts} starts found the best fit of {loss_name(name)}"
        text += f", wanted {wanted}"
        found.append(Warn("restarts", text, name))
    if fit.rises and name != DOMAIN:
        found.append(Warn("rise_and_fall", _rise(law, name, fit), name, strong=law != "cmr"))
    return found


def _rise(law: str, name: str, fit: TargetFit) -> str:
    runs = []
    for r in fit.rises[:3]:
        peak = f"step {r.peak_step:,.0f}" if r.peak_step is not None else f"{show_count(r.peak_tokens)} tokens"
        share = "" if math.isnan(r.share) else f"{ratio_name(name)} {r.share:.4g}, "
        runs.append(f"{share}peak at {peak}")
    more = f" and {len(fit.rises) - 3} more" if len(fit.rises) > 3 else ""
    text = f"{loss_name(name)} rises and then falls in {len(fit.rises)} of {fit.rows.num_runs} runs"
    text += f" ({'; '.join(runs)}{more})"
    return text if law == "cmr" else f"{text}; the form of `{law}` cannot follow that, `law=cmr` can"


def _growth(law: str, name: str, fit: TargetFit) -> list[Warn]:
    humped = {r.run for r in fit.rises}
    grows = [g for g in fit.grows if 2 * len(humped & set(g.runs)) <= len(g.runs)]
    if not grows or law in _FOLLOWING:
        return []
    shown = [" ".join([f"{g.what}:" if g.what else "", f"+{g.rise:.3g} nats"]).strip() for g in grows[:4]]
    more = f" and {len(grows) - 4} more" if len(grows) > 4 else ""
    first, last = min(g.first_tokens for g in grows), max(g.last_tokens for g in grows)
    text = (
        f"{loss_name(name)} goes on rising between {show_count(first)} and {show_count(last)} tokens "
        f"({', '.join(shown)}{more}); the form of `{law}` cannot follow that: what it says of more tokens is too low"
    )
    if fit.rows.share_R is not None:
        text += f"; `law=mixing where='tokens=={last:.10g}'` answers for that length alone, and `law=cmr` can follow "
        text += "with six checkpoints of each run and the losses before training"
    return [Warn("rises_with_tokens", text, name, strong=True)]


def _against_growth(fits: Fits, answer: Recommendation | None) -> list[str]:
    """Where the general loss of the ratios beside the answer rises with tokens and that of the law does not."""
    if answer is None or answer.ratio is None or GENERAL not in fits:
        return []
    fit = fits[GENERAL]
    limit, base = answer.limits.get(GENERAL), answer.base.get(GENERAL)
    if limit is None or base is None or fit.rows.share_R is None:
        return []
    share = 1 - answer.ratio.value
    measured = np.unique(fit.rows.share_R)
    beside = {*measured[measured <= share + 1e-6][-1:].tolist(), *measured[measured >= share - 1e-6][:1].tolist()}
    against = [g for s in beside if (g := _nearest_size(fit, s, answer.n_params)) is not None]
    least = PART * (limit - base)
    if not beside or len(against) < len(beside) or any(g.rise <= least or g.predicted > PART * g.rise for g in against):
        return []
    named = " and ".join(f"{g.rise:.3g} nats at {g.what}" for g in sorted(against, key=lambda g: g.share))
    return [
        f"{loss_name(GENERAL)} rises with tokens beside the answer ({named}, of {limit - base:.3g} allowed), and the "
        "law has it fall"
    ]


def _nearest_size(fit: TargetFit, share: float, n_params: float | None) -> Growth | None:
    """What grows at a ratio, among runs of the size nearest to the one asked."""
    rows = fit.rows
    assert rows.share_R is not None
    found = [g for g in fit.grows if g.share == share]
    if rows.n_params_R is None or n_params is None:
        return found[0] if found else None
    sizes = np.unique(rows.n_params_R[rows.share_R == share])
    nearest = sizes[np.argmin(np.abs(np.log(sizes / n_params)))]
    return next((g for g in found if g.n_params == nearest), None)


def _checks(name: str, fit: TargetFit) -> list[Warn]:
    found = []
    own = fit.own.mean * math.sqrt(len(fit.rows) / max(len(fit.rows) - len(fit.fit.theta_P), 1))
    missed = [("left-out ratios inside the others", fit.heldout.inside, WORSE)]
    beyond = {"size": "the largest sizes, left out,", "tokens": "the last third of tokens, left out,"}
    missed += [(what, fit.heldout.by[k].mean, FAR_WORSE) for k, what in beyond.items() if k in fit.heldout.by]
    for what, error, times in missed:
        if error > times * own:
            text = f"{loss_name(name)} at {what} is missed by {100 * error:.3g} %, that of the fit's own rows by "
            found.append(Warn("held_out", f"{text}{100 * fit.own.mean:.3g} %", name))
    if not fit.heldout.folds:
        text = f"no rows of {loss_name(name)} can be left out, so the error on new runs is not known"
        found.append(Warn("no_held_out", text, name))
    if fit.outliers:
        count = len(fit.outliers)
        rows = "1 row lies" if count == 1 else f"{count} rows lie"
        first = fit.outliers[0]
        text = (
            f"{rows} far off the fit of {loss_name(name)} (farthest: {first.what}, {first.times:.1f} times the usual)"
        )
        found.append(Warn("outliers", f"{text}; the fit without is told beside", name))
    return found


def _of_bootstrap(told: Bootstrap) -> list[Warn]:
    units = "runs" if told.by == "run" else "rows"
    if not told.resamples:
        text = f"{told.units} {units} are too few to resample, so there are no intervals"
        return [Warn("no_intervals", text)]
    if told.units < FEW_RUNS:
        return [Warn("few_runs", f"{told.units} {units} were resampled: the intervals are rough below {FEW_RUNS}")]
    return []


def of_answer(answer: Recommendation, fits: Fits) -> list[Warn]:
    """Warnings about a recommendation."""
    found = []
    words = {"n_params": "model size", "tokens": "token count", "ratio": "ratio"}
    for name, factor in answer.factors.items():
        if factor > 1:
            strong = factor > STRONG.get(name, _FAR)
            how = f"{factor:.3g} times beyond" if name != "ratio" and math.isfinite(factor) else "outside"
            text = f"the {words[name]} lies {how} what was measured: the prediction extrapolates"
            found.append(Warn("extrapolation", text + (" far" if strong else ""), strong=strong))
    if answer.ratio is None or answer.usage == "allocation":
        return found
    if answer.ratio.width > WIDE:
        text = f"the interval of the ratio is wide, {answer.ratio.low:.3f} to {answer.ratio.high:.3f}"
        found.append(Warn("wide_interval", text))
    for name in (DOMAIN, GENERAL):
        if name not in fits or fits[name].rows.share_R is None:
            continue
        share = answer.ratio.value if name == DOMAIN else 1 - answer.ratio.value
        lowest = fits[name].lowest_share
        if lowest is not None and 0 < share < lowest:
            text = (
                f"{ratio_name(name)} {share:.3g} lies below {lowest:.3g}, where the fitted {name} loss stops rising "
                "with its own share: the law does not hold there"
            )
            found.append(Warn("below_turning_point", text, name))
    fit = fits[DOMAIN] if DOMAIN in fits else fits[GENERAL]
    assert fit.rows.share_R is not None
    measured_R = fit.rows.share_R if DOMAIN in fits else 1 - fit.rows.share_R
    if min(abs(answer.ratio.value - measured_R.min()), abs(answer.ratio.value - measured_R.max())) < 1e-6:
        text = f"the ratio {answer.ratio.value:.3g} is at the edge of those that were run; a better one may lie beyond"
        found.append(Warn("edge", text))
    return found


def _mixed(table: Table) -> list[Warn]:
    found = []
    for kind, values in (("eval_id", table.eval_id), ("tokenizer", table.tokenizer)):
        names = sorted({v for v in values or () if v})
        if len(names) > 1:
            what = "validation sets" if kind == "eval_id" else "tokenizers"
            shown = ", ".join(f"`{n}`" for n in names[:3]) + (" and others" if len(names) > 3 else "")
            text = f"the losses come from {len(names)} {what} ({shown}) and cannot be compared"
            found.append(Warn("mixed_" + kind, text, strong=True))
    return found


def _decaying(table: Table, settings: Settings) -> list[Warn]:
    """Rows before the end of a run whose lr falls are not finished runs of that length."""
    many = table.num_runs < len(table)
    falls = settings.decaying_lr or _falls(table)
    if not (many and falls):
        return []
    text = "the lr fell during the runs, and their earlier checkpoints are used as if they were finished runs"
    return [Warn("decaying_lr", f"{text}; constant lr after warm-up, or the last checkpoint of each run, says more")]


def _falls(table: Table) -> bool:
    if table.schedule is not None and any(s and s.lower() not in _STEADY for s in table.schedule):
        return True
    if table.lr is None or (table.tokens is None and table.step is None):
        return False
    moment = table.tokens if table.tokens is not None else table.step
    assert moment is not None
    for label in set(table.run):
        at = np.array([r == label for r in table.run])
        lr = table.lr[at][np.argsort(moment[at], kind="stable")]
        if len(lr) > 1 and lr[-1] < 0.9 * lr.max():
            return True
    return False
