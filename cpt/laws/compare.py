"""Laws side by side on the same rows: held-out error first, then Akaike's criterion.

The criterion takes residuals as Laplace distributed, which is what the Huber loss with its small delta assumes:
AICc = 2·n·log(2·e·b) + 2·p + 2·p·(p + 1) / (n - p - 1), b the weighted mean |residual|, n rows, p parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from cpt.base.errors import UsageError
from cpt.laws.fit import Fit
from cpt.laws.law import LAWS
from cpt.laws.result import Comparison, Form, HeldOut
from cpt.laws.table import Table

Checked = Mapping[str, tuple[Fit, HeldOut]]  # by target
ALIKE = 0.05  # held-out errors that differ by less, as a part of the better, are taken for equal
_TWO, _SEVERAL, _NONE = ("dcpt", "l1", "mixing", "cmr"), ("mixing", "additive"), ("chinchilla", "repeated")


def candidates(table: Table) -> tuple[str, ...]:
    """Laws that the table's columns allow."""
    names: tuple[str, ...] = _TWO if len(table.shares) == 2 else _SEVERAL if table.shares else _NONE
    if "repeated" in names and not table.unique_tokens:
        names = tuple(n for n in names if n != "repeated")
    return tuple(n for n in names if n in LAWS)


def compare(table: Table, chosen: str | None, checked: Callable[[str], Checked]) -> Comparison:
    """All laws that the columns allow, and the choice in words.

    Args:
        chosen: the law that was asked for; None chooses the best.
        checked: fits and held-out errors of a law by target; raises UsageError where it cannot be fitted.

    Raises:
        UsageError: none was asked for and none can be fitted.
    """
    names = candidates(table)
    if chosen is not None and chosen not in names:
        names = (chosen, *names)
    forms = _forms(names, chosen, checked)
    forms.sort(key=lambda f: (not np.isfinite(f.error), f.error if np.isfinite(f.error) else 0.0, f.law))
    able = [f for f in forms if not f.refused]
    if not able:
        reasons = [UsageError(f"`{f.law}`: {f.refused}") for f in forms[1:]]
        raise UsageError(
            f"no law can be fitted to `{table.name}`; `{forms[0].law}`: {forms[0].refused}", more=tuple(reasons)
        )
    best = able[0]
    alike = [f for f in able if not f.error > best.error * (1 + ALIKE)]  # all, where no errors are known
    simplest = min(alike, key=lambda f: (f.aicc, f.law))
    why = _why(chosen, best, simplest, able)
    return Comparison(tuple(forms), chosen or simplest.law, best.law, why, _over([f.law for f in able], checked))


def _forms(names: tuple[str, ...], chosen: str | None, checked: Callable[[str], Checked]) -> list[Form]:
    """Errors over the folds that every law which has any could be asked for: same rows, fair comparison.

    A law that fits fewer losses than another is no choice: the question may need the one that is missing.
    """
    nan = float("nan")
    able: dict[str, Checked] = {}
    forms = []
    for name in names:
        try:
            able[name] = checked(name)
        except UsageError as error:
            forms.append(Form(name, 0, nan, {}, {}, nan, error.message))
    targets = {target for found in able.values() for target in found}
    for name in [n for n, found in able.items() if n != chosen and len(found) < len(targets)]:
        missing = " and ".join(f"`{t}`" for t in sorted(targets - set(able.pop(name))))
        forms.append(Form(name, 0, nan, {}, {}, nan, f"the losses on {missing} cannot be fitted by it"))
    for name, found in able.items():
        errors = {target: _error(target, name, able) for target in found}
        forms.append(
            Form(
                law=name,
                num_params=sum(len(fit.theta_P) for fit, _ in found.values()),
                error=float(np.mean(list(errors.values()))),
                errors=errors,
                objective={target: fit.objective for target, (fit, _) in found.items()},
                aicc=sum(aicc(fit) for fit, _ in found.values()),
            )
        )
    return forms


def _error(target: str, name: str, able: Mapping[str, Checked]) -> float:
    """Mean over kinds of folds of the mean relative error in the folds that all laws share."""
    held = {law: found[target][1] for law, found in able.items() if target in found and found[target][1].folds}
    if name not in held:
        return able[name][target][1].error
    shared = set.intersection(*({(f.by, f.value) for f in h.folds} for h in held.values()))
    by: dict[str, list[tuple[float, int]]] = {}
    for fold in held[name].folds:
        if (fold.by, fold.value) in shared:
            by.setdefault(fold.by, []).append((fold.law.mean, fold.law.count))
    if not by:
        return held[name].error
    return float(np.mean([np.average([m for m, _ in kind], weights=[n for _, n in kind]) for kind in by.values()]))


def _over(names: list[str], checked: Callable[[str], Checked]) -> tuple[str, ...]:
    """Kinds of folds that all laws share for some loss."""
    able = {name: checked(name) for name in names}
    found: set[str] = set()
    for target in {t for one in able.values() for t in one}:
        folds = [{(f.by, f.value) for f in one[target][1].folds} for one in able.values() if target in one]
        folds = [f for f in folds if f]
        found |= {by for by, _ in set.intersection(*folds)} if folds else set()
    return tuple(by for by in ("ratio", "size", "tokens", "run") if by in found)


def aicc(fit: Fit) -> float:
    """Akaike's criterion for small samples; infinite with fewer than two rows more than parameters."""
    weight_R = fit.rows.weight_R
    spread = float(np.sum(weight_R * np.abs(fit.residuals_R)) / np.sum(weight_R))
    rows, params = len(fit.rows), len(fit.theta_P)
    if rows <= params + 1:
        return float("inf")
    return (
        2 * rows * (np.log(2 * max(spread, 1e-300)) + 1) + 2 * params + 2 * params * (params + 1) / (rows - params - 1)
    )


def _why(chosen: str | None, best: Form, simplest: Form, able: list[Form]) -> str:
    if len(able) == 1:
        only = f"`{best.law}` is the only law that these rows allow"
        return only if chosen in (None, best.law) else f"{only}, `{chosen}` was asked for"
    if not np.isfinite(best.error):
        return f"no rows can be left out, so the laws are told apart by AICc alone: lowest for `{simplest.law}`"
    next_form = able[1]
    lowest = f"`{best.law}` predicts left-out rows best: {_percent(best.error)} mean error"
    lowest += f", `{next_form.law}` {_percent(next_form.error)}" if np.isfinite(next_form.error) else ""
    if chosen is None:
        if simplest.law == best.law:
            return lowest
        alike = f"within {ALIKE:.0%} of each other" if simplest.error > 0 else "equal"
        return f"{lowest}; errors {alike} count as equal, and `{simplest.law}` has the lower AICc"
    if chosen == best.law:
        return lowest
    asked = next((f for f in able if f.law == chosen), None)
    if asked is None or asked.error <= best.error * (1 + ALIKE):
        return f"{lowest}; `{chosen}` was asked for and is as good within {ALIKE:.0%}" if asked else lowest
    return f"{lowest}; `{chosen}` was asked for and misses them by {_percent(asked.error)}"


def _percent(error: float) -> str:
    return f"{100 * error:.3g} %"
