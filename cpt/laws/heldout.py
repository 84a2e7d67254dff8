"""Held-out error: each ratio, the largest sizes and the last third of the tokens are left out and predicted.

What is left out depends on the table alone, so that two laws are compared on the same folds. All folds of a law are
fitted as one batch, from the optimum and from many other starts: with few starts a fold stays in a local optimum (on
the two-corpus table of Ye et al. the worst ratio's error then triples).

Array suffixes: R rows, F folds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cpt.base.errors import UsageError
from cpt.base.units import show_count
from cpt.laws import baselines
from cpt.laws.fit import Fit, fit, refit
from cpt.laws.law import Law
from cpt.laws.outliers import ratio_name
from cpt.laws.result import Errors, Fold, HeldOut
from cpt.laws.rows import Floats, Rows

EXTRA_STARTS = 24
_WORK = 100_000  # rows x parameters x starts of a fold; larger tables get fewer starts
MOST_FOLDS = 10  # of one kind; where there are more ratios or mixtures, several go together
_LEAST_ROWS = 0.05  # of the table in the fold of the largest sizes


@dataclass(frozen=True, eq=False)
class Part:
    """Rows to leave out together."""

    by: str
    left_out: str
    value: float
    out_R: NDArray[np.bool_]


def held_out(fitted: Fit, target: str, *, seed: int = 0, extra_starts: int | None = None) -> HeldOut:
    """Errors on rows that the law has not seen, with the baselines beside.

    Args:
        target: name of the loss, for the names of ratios.
        extra_starts: of each fold beside the optimum; None gives 24, fewer on large tables.
    """
    rows = fitted.rows
    nan = float("nan")
    if extra_starts is None:
        extra_starts = max(3, min(EXTRA_STARTS, _WORK // (len(rows) * len(fitted.theta_P))))
    folds, missing = parts(rows, target)
    if not folds:
        return HeldOut((), {}, nan, nan, nan, nan, missing)
    folds, laws, thetas, refused = _refits(fitted, folds, seed, extra_starts)
    missing += refused
    if not folds:
        return HeldOut((), {}, nan, nan, nan, nan, missing)
    done: list[Fold] = []
    seen: dict[str, list[tuple[Floats, Floats]]] = {}
    inside: list[tuple[Floats, Floats, Floats, Floats]] = []
    for part, law, theta_P in zip(folds, laws, thetas, strict=True):
        asked = rows.take(part.out_R)
        law_L = law.loss(theta_P[None], asked)[0][0]
        nearest = interpolation = None
        if part.by == "ratio":
            nearest_L, line_L = baselines.by_ratio(rows.take(~part.out_R), asked)
            nearest, interpolation = _some(nearest_L, asked.loss_R), _some(line_L, asked.loss_R)
            both = np.isfinite(line_L) | (np.isfinite(nearest_L) & several(rows))
            inside.append((law_L[both], nearest_L[both], line_L[both], asked.loss_R[both]))
        done.append(Fold(part.by, part.left_out, part.value, errors(law_L, asked.loss_R), nearest, interpolation))
        seen.setdefault(part.by, []).append((law_L, asked.loss_R))
    by = {kind: errors(*_joined(pairs)) for kind, pairs in seen.items()}
    within = [np.concatenate(column) for column in zip(*inside, strict=True)] if inside else []
    means = [_mean(predicted, within[3]) for predicted in within[:3]] or [float("nan")] * 3
    return HeldOut(
        folds=tuple(done),
        by=by,
        error=float(np.mean([e.mean for e in by.values()])),
        law_within=means[0],
        nearest=means[1],
        interpolation=means[2],
        missing=missing,
    )


def _refits(
    fitted: Fit, folds: list[Part], seed: int, extra_starts: int
) -> tuple[list[Part], list[Law], list[Floats], tuple[str, ...]]:
    """The law and its parameters without each part, those that have them, and why others have not.

    As one batch where the law stays the same; alone where its terms belong to the rows (the ratios of CMR).
    """
    rows = fitted.rows
    laws: list[Law | None] = []
    missing = []
    for part in folds:
        try:
            laws.append(fitted.law.left_with(rows.take(~part.out_R)))
        except UsageError as error:
            laws.append(None)
            missing.append(f"{part.left_out} cannot be left out: {error.message}")
    same = [i for i, law in enumerate(laws) if law is fitted.law]
    found: dict[int, Floats] = {}
    if same:
        weight_FR = np.stack([np.where(folds[i].out_R, 0.0, rows.weight_R) for i in same])
        found = dict(zip(same, refit(fitted, weight_FR, extra_starts=extra_starts, seed=seed)[0], strict=True))
    for i, law in enumerate(laws):
        if law is not None and i not in found:
            kept = rows.take(~folds[i].out_R)
            found[i] = fit(law, kept, delta=fitted.delta, scale=fitted.scale, seed=seed).theta_P
    for i in sorted(found):
        law = laws[i]
        assert law is not None
        try:
            finite = bool(np.isfinite(law.loss(found[i][None], rows.take(folds[i].out_R))[0]).all())
            why = f"law `{law.name}` gives no finite losses there"
        except UsageError as error:
            finite, why = False, error.message
        if not finite:
            missing.append(f"{folds[i].left_out} cannot be predicted: {why}")
            del found[i]
    order = sorted(found)
    known = [laws[i] for i in order]
    return [folds[i] for i in order], [law for law in known if law], [found[i] for i in order], tuple(missing)


def parts(rows: Rows, target: str) -> tuple[list[Part], tuple[str, ...]]:
    """What to leave out, and which kinds cannot be left out and why."""
    found: list[Part] = []
    missing = []
    if several(rows):
        found += _mixtures(rows)
    elif rows.share_R is not None:
        ratios = np.unique(rows.share_R)
        if len(ratios) >= 4:
            found += _ratios(rows.share_R, ratios, ratio_name(target))
        else:
            missing.append(f"{len(ratios)} ratios are too few to leave one out")
    if rows.n_params_R is not None:
        sizes = np.unique(rows.n_params_R)
        if len(sizes) >= 3:
            found.append(_largest(rows.n_params_R, sizes))
        else:
            one = "one model size" if len(sizes) == 1 else "two model sizes"
            missing.append(f"{one}: the largest cannot be left out, the error at other sizes is not known")
    if rows.tokens_R is not None:
        counts = np.unique(rows.tokens_R)
        if len(counts) >= 3:
            least = float(counts[len(counts) - len(counts) // 3])
            found.append(Part("tokens", f"from {show_count(least)} tokens", least, rows.tokens_R >= least))
        else:
            missing.append("fewer than three token counts: the last third cannot be left out")
    if not found and rows.num_runs >= 4:
        found += _runs(rows)
    return found, tuple(missing)


def several(rows: Rows) -> bool:
    """Mixtures of more than two corpora."""
    return rows.shares_RK is not None and rows.shares_RK.shape[1] > 2


def _ratios(share_R: Floats, ratios: Floats, name: str) -> list[Part]:
    if len(ratios) <= MOST_FOLDS:
        return [Part("ratio", f"{name} {r:.4g}", float(r), share_R == r) for r in ratios]
    found = []
    for k in range(MOST_FOLDS):
        chosen = ratios[k::MOST_FOLDS]
        found.append(Part("ratio", f"{name} {_list(chosen)}", float(chosen[0]), np.isin(share_R, chosen)))
    return found


def _mixtures(rows: Rows) -> list[Part]:
    """Mixtures in order of their shares, every n-th of them together when there are many."""
    assert rows.shares_RK is not None
    mixtures, place_R = np.unique(rows.shares_RK, axis=0, return_inverse=True)
    place_R = place_R.reshape(-1)
    if len(mixtures) < 4:
        return []
    found = []
    for k in range(min(MOST_FOLDS, len(mixtures))):
        chosen = np.arange(len(mixtures))[k::MOST_FOLDS]
        what = f"{len(chosen)} of {len(mixtures)} mixtures" if len(chosen) > 1 else f"mixture {k + 1}"
        found.append(Part("ratio", what, float(k), np.isin(place_R, chosen)))
    return found


def _largest(n_params_R: Floats, sizes: Floats) -> Part:
    """The largest size; where each size has but a row or two, the largest sizes that make up 5 % of the rows."""
    least = next(size for size in sizes[::-1] if np.sum(n_params_R >= size) >= _LEAST_ROWS * len(n_params_R))
    least = max(least, sizes[2])
    return Part("size", f"from {show_count(least)} parameters", float(least), n_params_R >= least)


def _runs(rows: Rows) -> list[Part]:
    """Runs in the order of the sorted rows."""
    listed, first = np.unique(rows.run_R, return_index=True)
    listed = listed[np.argsort(first, kind="stable")]
    return [
        Part("run", f"part {k + 1} of the runs", float(k), np.isin(rows.run_R, listed[k::MOST_FOLDS]))
        for k in range(min(MOST_FOLDS, len(listed)))
    ]


def errors(predicted_R: Floats, measured_R: Floats) -> Errors:
    """How far predictions lie from measurements."""
    miss_R = np.abs(predicted_R - measured_R) / measured_R
    spread = float(np.sum((measured_R - measured_R.mean()) ** 2))
    r2 = 1 - float(np.sum((predicted_R - measured_R) ** 2)) / spread if spread > 0 and len(miss_R) > 2 else np.nan
    return Errors(len(miss_R), float(miss_R.mean()), float(miss_R.max()), r2)


def _some(predicted_L: Floats, measured_L: Floats) -> Errors | None:
    there = np.isfinite(predicted_L)
    return errors(predicted_L[there], measured_L[there]) if there.any() else None


def _joined(pairs: list[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    return np.concatenate([p for p, _ in pairs]), np.concatenate([m for _, m in pairs])


def _mean(predicted_L: Floats, measured_L: Floats) -> float:
    return float(np.mean(np.abs(predicted_L - measured_L) / measured_L)) if len(measured_L) else float("nan")


def _list(values: Floats) -> str:
    return ", ".join(f"{v:.4g}" for v in values)
