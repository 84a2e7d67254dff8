"""What an analysis of a table gives: fits with draws, checks, warnings and the answer.

Array suffixes: D draws (row 0 the fit, the rest bootstrap resamples), P parameters, R rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cpt.laws.law import Law
from cpt.laws.rows import Floats, Rows
from cpt.laws.settings import Settings

if TYPE_CHECKING:
    from cpt.laws.fit import Fit
    from cpt.laws.table import Table

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; `low` and `high` are NaN when there are no draws."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @classmethod
    def of(cls, draws_D: Floats) -> Estimate:
        """Value of row 0, percentile interval of the others; draws without an answer (NaN) are left out."""
        rest = np.asarray(draws_D[1:], np.float64)
        rest = rest[np.isfinite(rest)]
        if not len(rest):
            return cls(float(draws_D[0]))
        low, high = np.quantile(rest, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return cls(float(draws_D[0]), float(low), float(high))

    @property
    def width(self) -> float:
        """Length of the interval, NaN without one."""
        return self.high - self.low


@dataclass(frozen=True)
class Warn:
    """Something the reader must know.

    Args:
        kind: stable word for programs, such as `extrapolation`.
        text: one sentence.
        target: the loss it is about; empty for the whole analysis.
        strong: part of the answer should not be used as it is.
    """

    kind: str
    text: str
    target: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Errors:
    """How far predictions lie from measurements that they have not seen (or have, for the fit's own rows).

    Args:
        count: measurements.
        mean: mean of |predicted - measured| / measured [fraction].
        largest: the largest of them [fraction].
        r2: 1 - sum of squared errors / sum of squares around the mean [fraction]; NaN for fewer than 3 rows.
    """

    count: int
    mean: float
    largest: float
    r2: float


@dataclass(frozen=True)
class Fold:
    """Rows left out of a fit, and how well they were predicted.

    Args:
        by: `ratio`, `size`, `tokens` or `run`: what was left out.
        left_out: the value, for people: `r_domain 0.25`.
        value: the value as a number: ratio, parameters, or the lowest tokens left out; the number of the run.
        law: errors of the law.
        nearest: errors of taking the loss at the nearest ratio that is left; None where it does not apply.
        interpolation: errors of a line between the two ratios around; None where it does not apply.
    """

    by: str
    left_out: str
    value: float
    law: Errors
    nearest: Errors | None = None
    interpolation: Errors | None = None


@dataclass(frozen=True)
class HeldOut:
    """All folds of one target.

    Args:
        folds: each one.
        by: errors over the rows of all folds of one kind (`ratio`, `size`, `tokens`, `run`).
        error: the headline: mean relative error over the folds, each kind counting the same [fraction].
        law_within, interpolation, nearest: mean relative errors on the rows inside the remaining ratios, where the
            three can be compared; NaN where there are none [fraction]. With several corpora there is no interpolation,
            and the rows are all for which a nearest mixture was run.
        missing: kinds that could not be left out, and why.
    """

    folds: tuple[Fold, ...]
    by: Mapping[str, Errors]
    error: float
    law_within: float
    interpolation: float
    nearest: float
    missing: tuple[str, ...] = ()

    @property
    def inside(self) -> float:
        """Mean relative error where the law need not go beyond its rows: at ratios inside the remaining ones, else on
        left-out runs; NaN where neither can be left out [fraction]."""
        if math.isfinite(self.law_within):
            return self.law_within
        return self.by["run"].mean if "run" in self.by else math.nan


@dataclass(frozen=True)
class Outlier:
    """A row that the law misses by more than five times the usual.

    Args:
        row: number in `Rows` of the target.
        line: where it stands in the file.
        what: the row in words: run, size, tokens, ratio.
        residual: in the fit's scale (log: relative) [fraction or nats/token].
        times: residual over the robust spread, 1.4826 * median |residual|.
    """

    row: int
    line: int
    what: str
    residual: float
    times: float


@dataclass(frozen=True)
class RiseFall:
    """A run whose loss rose above where it began, then fell.

    Args:
        run: number of the run.
        what: the run in words.
        share: of the corpus measured [fraction].
        peak_tokens: where the loss is highest [tokens].
        peak_step: the same as a step; None without a column of steps.
        peak_loss, last_loss: highest and last measured loss [nats/token].
    """

    run: int
    what: str
    share: float
    peak_tokens: float
    peak_step: float | None
    peak_loss: float
    last_loss: float


@dataclass(frozen=True)
class Growth:
    """Runs of one ratio and size whose loss goes on rising with tokens.

    Args:
        what: the ratio in words; empty without one.
        share: of the corpus measured [fraction]; NaN without one.
        n_params: their size [parameters]; None without one.
        runs: their numbers.
        rise: from the first measurement to the last, along the trend [nats/token].
        predicted: the same by the law [nats/token].
        first_tokens, last_tokens: between which it is measured [tokens].
    """

    what: str
    share: float
    n_params: float | None
    runs: tuple[int, ...]
    rise: float
    predicted: float
    first_tokens: float
    last_tokens: float


@dataclass(frozen=True)
class Identified:
    """How well the rows determine the parameters.

    Args:
        condition: condition number of the Jacobian at the optimum, columns scaled to length 1.
        pairs: parameters that the rows cannot tell apart, with their correlation (|correlation| > 0.99).
    """

    condition: float
    pairs: tuple[tuple[str, str, float], ...]


@dataclass(frozen=True)
class Bootstrap:
    """What was resampled.

    Args:
        by: `run` or `row`.
        units: how many runs or rows there are to draw from.
        resamples: how many were fitted.
        redrawn: how many more were drawn and could not determine the law.
        absurd: how many of those fitted were left out, because they miss measured losses by far more than these differ.
    """

    by: str
    units: int
    resamples: int
    redrawn: int
    absurd: int = 0


@dataclass(frozen=True, eq=False)
class TargetFit:
    """The law of one loss.

    Args:
        name: the corpus: `domain`, `general`, the name of a `w_*` column, or `loss`.
        fit: on all rows.
        theta_DP: row 0 the fit, then the resamples; in fitting space.
        params: by name, with intervals.
        standard_errors: by name; standard deviation over the resamples, NaN without them.
        own: errors on the rows of the fit itself.
        heldout: errors on rows that were left out.
        outliers: rows far off.
        without_outliers: the fit on the other rows, None when there are no outliers.
        rises: runs whose loss rose and then fell.
        dropped: terms that the rows cannot determine, one sentence each.
        identified: condition number and pairs.
        base: loss of the base model at the size that is asked about; None when unknown [nats/token].
        lowest_share: r_i: below this share of the measured corpus the fitted loss rises with the share, which no
            training does, so that the law does not hold there; None for laws without one share [fraction].
        probe: `k1` and `k2` of the domain that is asked about, for laws over several domains.
        grows: ratios whose runs' loss goes on rising with tokens.
    """

    name: str
    fit: Fit
    theta_DP: Floats
    params: Mapping[str, Estimate]
    standard_errors: Mapping[str, float]
    own: Errors
    heldout: HeldOut
    outliers: tuple[Outlier, ...]
    without_outliers: Fit | None
    rises: tuple[RiseFall, ...]
    dropped: tuple[str, ...]
    identified: Identified
    base: float | None
    lowest_share: float | None = None
    probe: Mapping[str, float] = dataclasses.field(default_factory=dict)
    grows: tuple[Growth, ...] = ()

    @property
    def law(self) -> Law:
        """With the terms that the rows determine."""
        return self.fit.law

    @property
    def rows(self) -> Rows:
        """What was fitted, in the analysis's order."""
        return self.fit.rows

    def loss(self, points: Rows) -> Floats:
        """loss_DR at points [nats/token]; row 0 the fit."""
        return self.law.loss(self.theta_DP, points)[0]


@dataclass(frozen=True)
class Form:
    """One law in a comparison.

    Args:
        law: name.
        num_params: fitted numbers over all targets.
        error: held-out error, mean over targets [fraction]; NaN when it cannot be fitted.
        errors: the same by target.
        objective: by target.
        aicc: Akaike's criterion for small samples, summed over targets; lower is better.
        refused: why it cannot be fitted to this table; empty when it can.
    """

    law: str
    num_params: int
    error: float
    errors: Mapping[str, float]
    objective: Mapping[str, float]
    aicc: float
    refused: str = ""


@dataclass(frozen=True)
class Comparison:
    """Forms side by side on the same rows, best held-out error first.

    Args:
        forms: each one.
        chosen: the one that the analysis uses.
        best: the one with the lowest held-out error.
        why: one or two sentences.
        over: kinds of folds that all laws share, over which the errors are: `ratio`, `size`, `tokens`, `run`.
    """

    forms: tuple[Form, ...]
    chosen: str
    best: str
    why: str
    over: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Recommendation:
    """The answer to "which mixture".

    Args:
        usage: `tradeoff`, `limited`, `allocation`, `threshold`, `cmr` or `mixture`.
        asked: the question in one sentence.
        ratio: domain share [fraction]; None for several corpora.
        mixture: share of every corpus [fraction].
        n_params: size that is meant [parameters]; None when the law has none.
        tokens: total length [tokens]; None when the law has none.
        losses: predicted at the answer, by corpus [nats/token].
        base: of the base model, where known [nats/token].
        limits: highest losses allowed [nats/token].
        ratio_D: the ratio of every draw [fraction]; empty for several corpora.
        inside: the answer lies inside the hull of the measurements in (log N, log D, r).
        factors: by which each of `n_params`, `tokens` and `ratio` lies outside the measured range; 1 is inside.
        decided_by: which rule gave the answer.
        without_outliers: ratio of the fits without outliers; None when there are none.
        notes: what else to know, one sentence each.
        more: further figures by name.
    """

    usage: str
    asked: str
    ratio: Estimate | None
    mixture: Mapping[str, Estimate]
    n_params: float | None
    tokens: Estimate | None
    losses: Mapping[str, Estimate]
    base: Mapping[str, float]
    limits: Mapping[str, float]
    ratio_D: Floats
    inside: bool
    factors: Mapping[str, float]
    decided_by: str
    without_outliers: float | None = None
    notes: tuple[str, ...] = ()
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def replay(self) -> Estimate | None:
        """Share of general text, 1 - ratio [fraction]."""
        if self.ratio is None:
            return None
        return Estimate(1 - self.ratio.value, 1 - self.ratio.high, 1 - self.ratio.low)


@dataclass(frozen=True, eq=False)
class Analysis:
    """Everything that is known after a table was fitted.

    Args:
        law: name of the law.
        table: what was fitted.
        settings: how.
        fits: by target, in the table's order of losses.
        bootstrap: what was resampled; None with `bootstrap=0`.
        comparison: of forms; None when it was not asked for.
        recommendation: the answer; None when nothing was asked that this law can answer.
        no_recommendation: why there is none; empty otherwise.
        warnings: what the reader must know, strong ones first.
        notes: what was done to the rows, one sentence each.
        unfit: why the law must not be used; empty when it may.
    """

    law: str
    table: Table
    settings: Settings
    fits: Mapping[str, TargetFit]
    bootstrap: Bootstrap | None
    comparison: Comparison | None
    recommendation: Recommendation | None
    no_recommendation: str
    warnings: tuple[Warn, ...]
    notes: tuple[str, ...]
    unfit: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """`fit` or `unfit`."""
        return "unfit" if self.unfit else "fit"

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`; figures that are not known are null."""
        fits = self.fits
        found = {
            "law": self.law,
            "equation": next(iter(fits.values())).law.equation,
            "verdict": self.verdict,
            "unfit": self.unfit,
            "rows": {name: len(f.rows) for name, f in fits.items()},
            "runs": {name: f.rows.num_runs for name, f in fits.items()},
            "objective": {name: f.fit.objective for name, f in fits.items()},
            "params": {name: {p: e.value for p, e in f.params.items()} for name, f in fits.items()},
            "intervals": {name: {p: (e.low, e.high) for p, e in f.params.items()} for name, f in fits.items()},
            "standard_errors": {name: f.standard_errors for name, f in fits.items()},
            "dropped": {name: f.dropped for name, f in fits.items()},
            "heldout": {name: f.heldout for name, f in fits.items()},
            "in_sample": {name: f.own for name, f in fits.items()},
            "outliers": {name: f.outliers for name, f in fits.items()},
            "without_outliers": {
                name: None
                if f.without_outliers is None
                else {"objective": f.without_outliers.objective, "params": f.without_outliers.params}
                for name, f in fits.items()
            },
            "identified": {name: f.identified for name, f in fits.items()},
            "restarts": {name: {"agreeing": f.fit.agreeing, "starts": f.fit.num_starts} for name, f in fits.items()},
            "rises": {name: f.rises for name, f in fits.items()},
            "grows": {name: f.grows for name, f in fits.items()},
            "lowest_share": {name: f.lowest_share for name, f in fits.items()},
            "bootstrap": self.bootstrap,
            "comparison": self.comparison,
            "recommendation": None,
            "no_recommendation": self.no_recommendation,
            "warnings": self.warnings,
            "notes": self.notes,
        }
        if self.recommendation is not None:
            answer = {f.name: getattr(self.recommendation, f.name) for f in dataclasses.fields(self.recommendation)}
            del answer["ratio_D"]
            found["recommendation"] = answer | {"replay": self.recommendation.replay}
        return plain(found)


def plain(value: Any) -> Any:
    """Only dicts, lists, strings and numbers; what is not finite becomes None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
