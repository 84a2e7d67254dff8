"""A fitted law for a person at a terminal: what it predicts unseen rows with, its constants, and the answer."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence

import numpy as np

from cpt.base.units import parse_amount, show_count
from cpt.laws.result import Analysis, Errors, Estimate, Recommendation
from cpt.laws.table import Table
from cpt.report import show
from cpt.report.table import aligned

FEW = 2  # losses whose constants fit beside each other
MOST_OUTLIERS = 6
KINDS = {"ratio": "ratios", "size": "largest size", "tokens": "last third of tokens", "run": "runs"}


def text(analysis: Analysis, files: Mapping[str, str] | None = None) -> str:
    """An analysis as text; warnings and notes are not in it.

    Args:
        files: what was written where.
    """
    parts = [_head(analysis), _held_out(analysis), _constants(analysis), _comparison(analysis)]
    parts += [_outliers(analysis), _answer(analysis), _files(analysis, files or {})]
    return "\n\n".join("\n".join(line.rstrip() for line in lines) for lines in parts if lines) + "\n"


def _head(analysis: Analysis) -> list[str]:
    table = analysis.table
    law = next(iter(analysis.fits.values())).law
    lines = [f"law      {analysis.law}: {law.equation}", f"table    {_table(table)}"]
    for name, fit in analysis.fits.items():
        starts = f"{fit.fit.agreeing} of {fit.fit.num_starts} starts agree"
        count = f"{len(fit.rows)} rows of {fit.rows.num_runs} runs"
        lines.append(f"fitted   {_loss(name)}: {count}, objective {fit.fit.objective:.6g}, {starts}")
    if analysis.bootstrap is not None and analysis.bootstrap.resamples:
        told = analysis.bootstrap
        again = f", {told.redrawn} drawn again" if told.redrawn else ""
        again += f", {told.absurd} left out that predict absurd losses" if told.absurd else ""
        lines.append(f"         intervals: 95 %, {told.resamples} resamples of {told.units} {told.by}s{again}")
    lines.append("verdict  " + ("unfit: do not use it for a mixture" if analysis.unfit else "fit for use"))
    return lines


def _table(table: Table) -> str:
    fields = [show.plain(table.name), f"{len(table)} rows of {table.num_runs} runs"]
    if table.n_params is not None:
        sizes = np.unique(table.n_params)
        named = ", ".join(show_count(n) for n in sizes)
        fields.append(f"size{'s' if len(sizes) > 1 else ''} " + (named if len(sizes) < 5 else _span(sizes)))
    if table.tokens is not None:
        fields.append(f"{_span(table.tokens)} tokens")
    if "domain" in table.shares and len(table.shares) == 2:
        shares = np.unique(table.shares["domain"])
        fields.append(f"r_domain {shares[0]:.3g} to {shares[-1]:.3g} ({len(shares)} ratios)")
    elif table.shares:
        fields.append(f"{len(table.shares)} corpora")
    return " · ".join(fields)


def _span(values: np.ndarray) -> str:
    low, high = float(values.min()), float(values.max())
    return show_count(low) if low == high else f"{show_count(low)} to {show_count(high)}"


def _held_out(analysis: Analysis) -> list[str]:
    """The headline: errors on rows that were left out, the baselines beside."""
    rows: list[list[str]] = []
    for name, fit in analysis.fits.items():
        held = fit.heldout
        begin = len(rows)
        for kind, errors in held.by.items():
            rows.append(_error_row(f"left out: {KINDS.get(kind, kind)}", errors))
        if math.isfinite(held.interpolation):
            rows.append(["inside other ratios, by the law", _percent(held.law_within), "", ""])
            rows.append(["   by a line between two ratios", _percent(held.interpolation), "", ""])
            rows.append(["   by the nearest ratio", _percent(held.nearest), "", ""])
        if len(held.by) > 1:
            rows.insert(begin, [f"left out: mean of the {len(held.by)} below", _percent(held.error), "", ""])
        rows.append(_error_row("rows of the fit", fit.own))
        for i, row in enumerate(rows[begin:]):
            row.insert(0, _loss(name) if i == 0 else "")
    if len(analysis.fits) > FEW:
        rows = []
        for name, fit in analysis.fits.items():
            held = fit.heldout
            r2 = max((e.r2 for e in held.by.values()), default=math.nan)
            rows.append([_loss(name), "left out", _percent(held.error), "", _r2(r2)])
            rows.append(["", "rows of the fit", _percent(fit.own.mean), _percent(fit.own.largest), _r2(fit.own.r2)])
    return aligned([["error of", "", "mean", "largest", "R²"], *rows], right=(2, 3, 4))


def _error_row(label: str, errors: Errors) -> list[str]:
    return [label, _percent(errors.mean), _percent(errors.largest), _r2(errors.r2)]


def _constants(analysis: Analysis) -> list[str]:
    fits = analysis.fits
    if len(fits) > FEW:
        return []
    names = list(dict.fromkeys(p for fit in fits.values() for p in fit.params))
    head = ["constant", *(cell for name in fits for cell in (_corpus(name), "95 % interval"))]
    rows = [head]
    for p in names:
        row = [p]
        for fit in fits.values():
            found = fit.params.get(p)
            row += ["", ""] if found is None else [f"{found.value:.5g}", _interval(found, ".4g")]
        rows.append(row)
    return aligned(rows, right=range(1, len(head)))


def _comparison(analysis: Analysis) -> list[str]:
    told = analysis.comparison
    if told is None or len(told.forms) < 2:
        return []
    rows = [["law", "left-out error", "AICc", "constants", ""]]
    for form in told.forms:
        note = f"cannot be fitted: {show.plain(form.refused, 90)}" if form.refused else ""
        note = note or ("used" if form.law == told.chosen else "")
        known = ["", "", ""] if form.refused else [_percent(form.error), _number(form.aicc), str(form.num_params)]
        rows.append([form.law, *known, note])
    over = [f"left-out error: mean over {' and '.join(KINDS[k] for k in told.over)} left out of all laws"]
    return [*aligned(rows, right=(1, 2, 3)), *(over if told.over else []), show.plain(told.why)]


def _outliers(analysis: Analysis) -> list[str]:
    rows = []
    for name, fit in analysis.fits.items():
        for i, far in enumerate(fit.outliers[:MOST_OUTLIERS]):
            what = show.plain(far.what, 90)
            rows.append([_loss(name) if i == 0 else "", f"line {far.line}", what, f"{far.times:.1f} times the usual"])
        if (more := len(fit.outliers) - MOST_OUTLIERS) > 0:
            rows.append(["", "", f"and {more} more", ""])
    if not rows:
        return []
    lines = aligned([["far off", "", "", ""], *rows])
    for name, fit in analysis.fits.items():
        other = fit.without_outliers
        if other is not None and len(fit.params) <= 12:
            constants = ", ".join(f"{p} {v:.4g}" for p, v in other.params.items())
            lines.append(f"without them, {_loss(name)}: {constants}")
    return lines


def _answer(analysis: Analysis) -> list[str]:
    if analysis.recommendation is None:
        return [f"no recommendation: {show.plain(analysis.no_recommendation)}"] if analysis.no_recommendation else []
    return recommendation(analysis.recommendation, unfit=bool(analysis.unfit))


def recommendation(answer: Recommendation, unfit: bool = False) -> list[str]:
    """The answer in lines.

    Args:
        unfit: the law must not be used, and each answer is marked.
    """
    mark = "(unfit) " if unfit else ""
    lines = [f"asked    {show.plain(answer.asked)}"]
    if answer.ratio is not None:
        lines.append(f"answer   {mark}r_domain {answer.ratio.value:.3f}{_in_brackets(answer.ratio, '.3f')}")
        replay = answer.replay
        assert replay is not None
        text = f"replay   {replay.value:.3f}{_in_brackets(replay, '.3f')}"
        if answer.tokens is not None:
            tokens = answer.tokens.value
            text += f": {show_count(replay.value * tokens)} general of {show_count(tokens)} tokens"
        lines.append(text)
    elif answer.mixture:
        rows = [[corpus, f"{s.value:.3f}", _interval(s, ".3f")] for corpus, s in answer.mixture.items()]
        lines += [f"answer   {mark}".rstrip(), *("  " + line for line in aligned(rows, right=(1, 2)))]
    if answer.usage == "allocation" and answer.n_params is not None and answer.tokens is not None:
        length = show_count(answer.tokens.value)
        lines.append(f"answer   {mark}{show_count(answer.n_params)} parameters, {length} tokens")
    for corpus, loss in answer.losses.items():
        line = f"{_loss(corpus)} {loss.value:.4f}{_in_brackets(loss, '.4f')}"
        if corpus in answer.base:
            line += (
                f", {100 * (loss.value / answer.base[corpus] - 1):+.2f} % of the base model's {answer.base[corpus]:.4f}"
            )
        if corpus in answer.limits:
            line += f", limit {answer.limits[corpus]:.4f}"
        lines.append(f"predicts {line}")
    lines += _critical(answer)
    distance = answer.more.get("distance")
    if isinstance(distance, str):
        lines.append(f"data     {show.plain(distance)}")
    if answer.without_outliers is not None:
        lines.append(f"without  the rows far off: r_domain {answer.without_outliers:.3f}")
    lines += [
        f"why      {show.plain(note)}" if i == 0 else f"         {show.plain(note)}"
        for i, note in enumerate(answer.notes)
    ]
    return lines


def _critical(answer: Recommendation) -> list[str]:
    """Both answers of a critical ratio, and when the objective of each measured ratio begins to fall."""
    turning = answer.more.get("turning")
    if answer.usage != "cmr" or not isinstance(turning, Estimate):
        return []
    rests = show.plain(answer.more.get("turning_rests_on", ""))
    first = f"{answer.more['threshold']:.3f} by the limit of the general loss"
    lines = [
        f"critical {first}, {turning.value:.3f} by where the objective turns ({rests}); {answer.decided_by} decides"
    ]
    falls = answer.more.get("falls_from_tokens") or {}
    known = [f"{float(r):.3g} from {show_count(t)}" for r, t in falls.items() if math.isfinite(t)]
    if known:
        lines.append("falls    objective of r_domain " + ", ".join(known) + " tokens on")
    return lines


def prediction(
    asked: str, losses: Mapping[str, Estimate], base: Mapping[str, float], lies: str, answer: Sequence[str]
) -> str:
    """What `cpt predict` says.

    Args:
        asked: the point in words.
        losses: predicted there [nats/token].
        base: of the base model, where known [nats/token].
        lies: where the point lies from the measurements.
        answer: lines of a recommendation, if one was asked for.
    """
    lines = []
    if losses:
        head = ["loss [nats/token]", "", "95 % interval", "against base"]
        rows = [
            [
                _corpus(name),
                f"{loss.value:.4f}",
                _interval(loss, ".4f"),
                f"{100 * (loss.value / base[name] - 1):+.2f} %" if name in base else "",
            ]
            for name, loss in losses.items()
        ]
        lines = [
            f"asked    {show.plain(asked)}",
            f"data     {show.plain(lies)}",
            "",
            *aligned([head, *rows], right=(1, 2, 3)),
        ]
    return "\n".join(line.rstrip() for line in [*lines, *answer]) + "\n"


def _files(analysis: Analysis, files: Mapping[str, str]) -> list[str]:
    lines = [f"{what:<8} {show.plain(path)}" for what, path in files.items() if what != "law"]
    if "law" in files:
        lines.insert(0, f"saved    {show.plain(files['law'])}")
        query = " ".join(_example(analysis))
        lines.append(f"next     `cpt predict {shlex.quote(files['law'])} {query}`")
    return lines


def _example(analysis: Analysis) -> list[str]:
    """A question that the law can answer, as keys."""
    table = analysis.table
    found = []
    if table.n_params is not None:
        found.append(f"n_params={_typed(float(table.n_params.max()))}")
    if table.tokens is not None:
        found.append(f"tokens={_typed(float(table.tokens.max()))}")
    if len(table.shares) == 2 and "domain" in table.shares:
        found.append("r_domain=0.5")
    return found


def _typed(count: float) -> str:
    """A count as a person would type it, exact."""
    short = show_count(count).strip()
    return short if parse_amount(short) == count else f"{count:.15g}"


def _loss(name: str) -> str:
    return "loss" if name == "loss" else f"{show.plain(name, 32)} loss"


def _corpus(name: str) -> str:
    return show.plain(name, 32)


def _interval(estimate: Estimate, form: str) -> str:
    if not math.isfinite(estimate.low):
        return ""
    return f"{estimate.low:{form}} to {estimate.high:{form}}"


def _in_brackets(estimate: Estimate, form: str) -> str:
    interval = _interval(estimate, form)
    return f" ({interval})" if interval else ""


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %" if math.isfinite(value) else show.NOTHING


def _r2(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else show.NOTHING


def _number(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else show.NOTHING
