"""One self-contained page about a fitted law: the answer in words first, then why to believe it, then the pictures.

Everything that comes from a table (names of corpora, runs, columns, files) is text of unknown origin: jinja2 escapes
it, and matplotlib escapes what it writes into an SVG. The page has no scripts and loads nothing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from cpt.base.files import write_atomic
from cpt.base.units import show_count
from cpt.laws.result import Analysis, Estimate, Recommendation, TargetFit
from cpt.laws.rows import Floats
from cpt.report import law_charts, show
from cpt.report.law_charts import Picture
from cpt.report.page import fill

NAME, PICTURES = "law.html", "pictures"
MOST_OUTLIERS = 20
LEFT_OUT = {
    "ratio": "each ratio left out in turn",
    "size": "the largest size left out",
    "tokens": "the last third of tokens left out",
    "run": "each run left out in turn",
}
GROUPS = {
    "ratio": "Losses, measured and fitted",
    "iso": "Equal losses",
    "residuals": "What the law misses",
}
CAPTIONS = {
    "answer": "Line and band: the law with its 95 % interval. Orange: the recommended share with its interval. Grey: "
    "nothing was measured there.",
    "ratio": "Marks are measurements, lines the law, bands its 95 % interval.",
    "iso": "Along a line the loss is the same [nats/token]; a star is the recommendation.",
    "residuals": "Marks in a second colour lie more than five times the usual distance from the law.",
}


def write(analysis: Analysis, folder: str | Path) -> Path:
    """Write `law.html` and the pictures (SVG and PNG, in `pictures/`) into a folder; give the page's path."""
    folder = Path(folder)
    drawn = law_charts.pictures(analysis)
    law_charts.write(drawn, folder / PICTURES)
    write_atomic(folder / NAME, render(analysis, drawn))
    return folder / NAME


def render(analysis: Analysis, drawn: list[Picture]) -> str:
    """The page as HTML."""
    return fill("law.html", content(analysis, drawn))


def content(analysis: Analysis, drawn: list[Picture]) -> dict[str, Any]:
    """All that the page shows, as plain values."""
    from markupsafe import Markup

    fits = analysis.fits
    groups = [
        {
            "title": GROUPS.get(kind, ""),
            "kind": kind,
            "caption": CAPTIONS[kind],
            "pictures": [(p.title, Markup(p.inline)) for p in drawn if p.group == kind],
        }
        for kind in ("answer", *GROUPS)
    ]
    return {
        "name": show.plain(analysis.table.name, 120),
        "facts": _facts(analysis),
        "equation": next(iter(fits.values())).law.equation,
        "unfit": [_spans(reason) for reason in analysis.unfit],
        "answer": _answer(analysis),
        "no_answer": _spans(analysis.no_recommendation),
        "headline": [(_loss(f), _percent(f.heldout.error)) for f in fits.values() if math.isfinite(f.heldout.error)],
        "warnings": [
            {"strong": w.strong, "target": show.plain(w.target, 40), "text": _spans(w.text)} for w in analysis.warnings
        ],
        "heldout": [_held_out(f) for f in fits.values()],
        "folds": [_folds(f) for f in fits.values() if f.heldout.folds],
        "answer_pictures": groups[0],
        "groups": [g for g in groups[1:] if g["pictures"]],
        "constants": [_constants(f) for f in fits.values()],
        "bootstrap": analysis.bootstrap,
        "comparison": _comparison(analysis),
        "outliers": [_outliers(f) for f in fits.values() if f.outliers],
        "rises": [(_loss(f), r) for f in fits.values() for r in f.rises],
        "ranges": _ranges(analysis),
        "notes": [_spans(note) for note in analysis.notes],
        "show": show,
    }


def _facts(analysis: Analysis) -> list[tuple[str, str]]:
    found = [
        ("law", analysis.law),
        ("data", f"{len(analysis.table)} rows of {analysis.table.num_runs} runs"),
        ("verdict", "unfit: not to be used" if analysis.unfit else "fit for use"),
    ]
    if analysis.bootstrap is not None and analysis.bootstrap.resamples:
        told = analysis.bootstrap
        found.append(("intervals", f"95 %, {told.resamples} resamples of {told.units} {told.by}s"))
    return found


def _answer(analysis: Analysis) -> dict[str, Any] | None:
    answer = analysis.recommendation
    if answer is None:
        return None
    distance = answer.more.get("distance")
    return {
        "asked": _spans(answer.asked),
        "sentence": _sentence(answer),
        "interval": _interval_sentence(answer),
        "mixture": [(show.plain(c, 60), show.share(s.value), _between(s)) for c, s in answer.mixture.items()]
        if answer.ratio is None
        else [],
        "losses": [_predicted(answer, corpus, loss) for corpus, loss in answer.losses.items()],
        "distance": _distance(answer, distance if isinstance(distance, str) else ""),
        "without": None if answer.without_outliers is None else f"{answer.without_outliers:.3f}",
        "notes": [_spans(note) for note in answer.notes],
    }


def _sentence(answer: Recommendation) -> str:
    """The answer in words."""
    tokens = answer.tokens.value if answer.tokens is not None else None
    if answer.usage == "allocation" and answer.n_params is not None and tokens is not None:
        return f"A model of {show_count(answer.n_params)} parameters, trained on {show_count(tokens)} tokens."
    if answer.ratio is None:
        return "The mixture below."
    share = answer.ratio.value
    text = f"{show.share(share)} domain text, {show.share(1 - share)} replay of general text"
    if tokens is not None:
        text += f": {show_count(share * tokens)} and {show_count((1 - share) * tokens)} of {show_count(tokens)} tokens"
    return text + "."


def _interval_sentence(answer: Recommendation) -> str:
    ratio = answer.ratio
    if ratio is None or not math.isfinite(ratio.low):
        return ""
    return f"95 % interval of the domain share: {show.share(ratio.low)} to {show.share(ratio.high)}."


def _distance(answer: Recommendation, said: str) -> str:
    """Where the answer lies from the measurements."""
    if said:
        return f"{said[0].upper()}{said[1:]}."
    if answer.inside:
        return "Inside the measured points."
    far = ", ".join(f"{key} by a factor of {value:.2g}" for key, value in answer.factors.items() if value > 1)
    return f"Outside the measured points{': ' + far if far else ''}."


def _predicted(answer: Recommendation, corpus: str, loss: Estimate) -> dict[str, str]:
    base, limit = answer.base.get(corpus), answer.limits.get(corpus)
    return {
        "corpus": show.plain(corpus, 60),
        "loss": f"{loss.value:.4f}",
        "between": _interval(loss, ".4f"),
        "base": show.NOTHING if base is None else f"{base:.4f}",
        "change": show.NOTHING if base is None else f"{100 * (loss.value / base - 1):+.2f} %",
        "limit": show.NOTHING if limit is None else f"{limit:.4f}",
    }


def _held_out(fit: TargetFit) -> dict[str, Any]:
    held = fit.heldout
    rows = [(LEFT_OUT.get(kind, kind), errors) for kind, errors in held.by.items()]
    rows.append(("rows of the fit itself", fit.own))
    beside = []
    if math.isfinite(held.interpolation):
        beside = [
            ("the law", held.law_within),
            ("a line between two ratios", held.interpolation),
            ("the nearest ratio", held.nearest),
        ]
    elif math.isfinite(held.nearest):
        beside = [("the law", held.law_within), ("the nearest mixture", held.nearest)]
    return {
        "loss": _loss(fit),
        "rows": [(label, _percent(e.mean), _percent(e.largest), _r2(e.r2), str(e.count)) for label, e in rows],
        "beside": [(label, _percent(value)) for label, value in beside],
        "missing": [_spans(text) for text in held.missing],
    }


def _folds(fit: TargetFit) -> dict[str, Any]:
    rows = [
        (
            show.plain(fold.left_out, 60),
            _percent(fold.law.mean),
            _percent(fold.law.largest),
            _percent(fold.interpolation.mean) if fold.interpolation is not None else show.NOTHING,
            str(fold.law.count),
        )
        for fold in fit.heldout.folds
        if fold.by != "run"
    ]
    return {"loss": _loss(fit), "rows": rows}


def _constants(fit: TargetFit) -> dict[str, Any]:
    rows = []
    for name, found in fit.params.items():
        error = fit.standard_errors.get(name, math.nan)
        bound = "on its bound" if name in fit.fit.at_bound else ""
        shown = f"{error:.2g}" if math.isfinite(error) else show.NOTHING
        rows.append((name, f"{found.value:.5g}", _interval(found, ".4g"), shown, bound))
    pairs = [f"{a} and {b} ({c:+.3f})" for a, b, c in fit.identified.pairs]
    condition = fit.identified.condition
    return {
        "loss": _loss(fit),
        "rows": rows,
        "objective": f"{fit.fit.objective:.6g}",
        "starts": f"{fit.fit.agreeing} of {fit.fit.num_starts}",
        "condition": f"{condition:.2g}" if math.isfinite(condition) else show.NOTHING,
        "pairs": ", ".join(pairs),
        "dropped": [_spans(text) for text in fit.dropped],
        "lowest_share": None if fit.lowest_share is None else f"{fit.lowest_share:.3g}",
    }


def _comparison(analysis: Analysis) -> dict[str, Any] | None:
    told = analysis.comparison
    if told is None or len(told.forms) < 2:
        return None
    rows = []
    for form in told.forms:
        known = not form.refused
        rows.append(
            {
                "law": form.law,
                "error": _percent(form.error) if known else show.NOTHING,
                "aicc": f"{form.aicc:.1f}" if known and math.isfinite(form.aicc) else show.NOTHING,
                "constants": str(form.num_params) if known else show.NOTHING,
                "used": form.law == told.chosen,
                "refused": _spans(form.refused),
            }
        )
    return {"rows": rows, "why": _spans(told.why)}


def _outliers(fit: TargetFit) -> dict[str, Any]:
    log = fit.fit.scale == "log"
    rows = [
        (
            str(far.line),
            show.plain(far.what, 120),
            f"{100 * far.residual:+.2f} %" if log else f"{far.residual:+.4f}",
            f"{far.times:.1f}",
        )
        for far in fit.outliers[:MOST_OUTLIERS]
    ]
    other = fit.without_outliers
    constants = [] if other is None else [(name, f"{value:.5g}") for name, value in other.params.items()]
    return {
        "loss": _loss(fit),
        "rows": rows,
        "more": max(0, len(fit.outliers) - MOST_OUTLIERS),
        "without": ", ".join(f"{name} {value}" for name, value in constants[:12]),
    }


def _ranges(analysis: Analysis) -> list[tuple[str, str, str, str]]:
    """(quantity, lowest, highest, distinct values) of everything in the table."""
    table = analysis.table
    found = []

    def add(name: str, values: Floats | None, shown: Any) -> None:
        known = np.empty(0) if values is None else values[np.isfinite(values)]
        if len(known):
            found.append((name, shown(float(known.min())), shown(float(known.max())), f"{len(np.unique(known)):,}"))

    add("parameters", table.n_params, show_count)
    add("tokens", table.tokens, show_count)
    for corpus, shares in table.shares.items():
        add(f"share of {show.plain(corpus, 60)}", shares, lambda v: f"{v:.3g}")
    for corpus, unique in table.unique_tokens.items():
        add(f"distinct tokens of {show.plain(corpus, 60)}", unique, show_count)
    for corpus, losses in table.losses.items():
        name = "loss" if corpus == "loss" else f"{show.plain(corpus, 60)} loss"
        add(f"{name} [nats/token]", losses, lambda v: f"{v:.4f}")
    return found


def _loss(fit: TargetFit) -> str:
    return "loss" if fit.name == "loss" else f"{show.plain(fit.name, 40)} loss"


def _spans(text: str) -> list[tuple[str, bool]]:
    """A sentence as pieces, each with whether it is code."""
    return [(part, i % 2 == 1) for i, part in enumerate(show.plain(text, 1000).split("`")) if part]


def _between(estimate: Estimate) -> str:
    if not math.isfinite(estimate.low):
        return show.NOTHING
    return f"{show.share(estimate.low)} to {show.share(estimate.high)}"


def _interval(estimate: Estimate, form: str) -> str:
    if not math.isfinite(estimate.low):
        return show.NOTHING
    return f"{estimate.low:{form}} to {estimate.high:{form}}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %" if math.isfinite(value) else show.NOTHING


def _r2(value: float) -> str:
    if not math.isfinite(value):
        return show.NOTHING
    return f"{value:.4f}" if value > -10 else f"{value:.3g}"
