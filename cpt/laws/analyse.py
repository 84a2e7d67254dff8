"""Everything a table says through one law: fits, checks, comparison, warnings and the answer.

    table ─▶ fit each loss ─▶ held-out errors ─▶ other laws beside ─▶ outliers, resamples ─▶ warnings, recommendation

Deterministic: the same rows in any order, settings and seed give the same result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from cpt.base.errors import UsageError
from cpt.laws import bootstrap, cautions, compare, growth, heldout, identify, outliers, question, shape
from cpt.laws.fit import Fit, fit
from cpt.laws.law import LAWS
from cpt.laws.options import read_options
from cpt.laws.result import Analysis, Bootstrap, Comparison, Estimate, HeldOut, TargetFit, Warn
from cpt.laws.rows import Floats
from cpt.laws.settings import Settings
from cpt.laws.table import DOMAIN, GENERAL, Table

AUTO = "auto"


def analyse(table: Table, law_name: str, settings: Settings | None = None) -> Analysis:
    """Fit a law to every loss of a table and check it.

    Args:
        law_name: of `LAWS`, or `auto`: the one with the lowest held-out error.

    Raises:
        UsageError: an unknown law, rows that cannot determine it, or a question that they cannot answer.
    """
    settings = settings or Settings()
    if law_name != AUTO:
        settings = replace(settings, options=read_options(LAWS.get(law_name), settings.options))
    elif settings.options:
        raise UsageError("`options.` are those of one law, and `law=auto` chooses among several")
    size = question.asked_size(table, settings)
    if settings.base_losses:
        settings = replace(settings, base_n_params=size)
        table = table.with_base(settings.base_losses, size)
    work = _Work(table, settings, None if law_name == AUTO else law_name)
    comparison: Comparison | None = None
    if law_name == AUTO or settings.compare:
        if law_name != AUTO:
            work.fits(law_name)
        comparison = compare.compare(table, None if law_name == AUTO else law_name, work.checked)
        law_name = comparison.chosen
    fits, dropped = work.fits(law_name)
    thetas: dict[str, Floats] = {name: found.theta_P[None] for name, found in fits.items()}
    told: Bootstrap | None = None
    if settings.bootstrap:
        options = {name: work.options(law_name, name) for name in fits}
        thetas, told = bootstrap.draws(fits, options, settings.bootstrap, settings.seed)
    targets = {
        name: _target(name, table, found, thetas[name], work.checked(law_name)[name][1], dropped[name], size, settings)
        for name, found in fits.items()
    }
    recommendation, reason = question.recommend(table, targets, settings)
    if recommendation is not None:
        recommendation = question.with_second(recommendation, question.without_outliers(table, targets, settings))
    warnings = cautions.cautions(law_name, table, targets, settings, told, recommendation)
    skipped = tuple(Warn("not_fitted", text, name) for name, text in work.skipped(law_name).items())
    return Analysis(
        law=law_name,
        table=table,
        settings=settings,
        fits=targets,
        bootstrap=told,
        comparison=comparison,
        recommendation=recommendation,
        no_recommendation=reason,
        warnings=(*warnings, *skipped),
        notes=table.notes,
        unfit=cautions.unfit(targets, recommendation),
    )


class _Work:
    """Fits and held-out errors by law, each made once.

    Args:
        asked: the law that the options belong to; None when none was asked for.
    """

    def __init__(self, table: Table, settings: Settings, asked: str | None) -> None:
        self._table, self._settings, self._asked = table, settings, asked
        self._fits: dict[str, tuple[dict[str, Fit], dict[str, tuple[str, ...]]]] = {}
        self._skipped: dict[str, dict[str, str]] = {}
        self._checked: dict[str, dict[str, tuple[Fit, HeldOut]]] = {}

    def options(self, law_name: str, target: str) -> Mapping[str, object]:
        """Options of a law: those set, when it is the one that was asked for, and which loss it is for."""
        given = dict(self._settings.options) if law_name == self._asked else {}
        if law_name == "cmr" and target in (DOMAIN, GENERAL):
            given.setdefault("side", target)
        return given

    def fits(self, law_name: str) -> tuple[dict[str, Fit], dict[str, tuple[str, ...]]]:
        """Fits by target, and the terms that were left out.

        Raises:
            UsageError: no loss of the table can be fitted.
        """
        if law_name in self._fits:
            return self._fits[law_name]
        found: dict[str, Fit] = {}
        dropped: dict[str, tuple[str, ...]] = {}
        errors: dict[str, UsageError] = {}
        for target in self._table.losses:
            if law_name == "replay" and target == DOMAIN:
                continue
            try:
                found[target], dropped[target] = self._fit(law_name, target)
            except UsageError as error:
                errors[target] = error
        if not found:
            raise next(iter(errors.values()))
        self._skipped[law_name] = {t: f"{outliers.loss_name(t)} is not fitted: {e.message}" for t, e in errors.items()}
        self._fits[law_name] = found, dropped
        return found, dropped

    def skipped(self, law_name: str) -> dict[str, str]:
        """Losses that could not be fitted, and why."""
        return self._skipped[law_name]

    def checked(self, law_name: str) -> dict[str, tuple[Fit, HeldOut]]:
        """Fits with held-out errors by target.

        Raises:
            UsageError: no loss of the table can be fitted.
        """
        if law_name not in self._checked:
            fits, _ = self.fits(law_name)
            seed = self._settings.seed
            self._checked[law_name] = {t: (f, heldout.held_out(f, t, seed=seed)) for t, f in fits.items()}
        return self._checked[law_name]

    def _fit(self, law_name: str, target: str) -> tuple[Fit, tuple[str, ...]]:
        settings, rows = self._settings, self._table.rows(target)
        kind = LAWS.get(law_name)
        for column in kind.needs:
            if column in ("share", "shares", "tokens", "n_params") and not _has(rows, column):
                if column in ("tokens", "n_params") and _has(rows, "share"):
                    continue
                raise UsageError(f"the law `{law_name}` needs {_COLUMNS[column]}, which `{self._table.name}` lacks")
        law, dropped = kind.for_rows(rows.in_order(), **self.options(law_name, target))
        return fit(law, rows, delta=settings.delta, scale=settings.scale, seed=settings.seed), dropped


_COLUMNS = {
    "share": "a column of ratios (`r_domain` or `r_general`)",
    "shares": "columns of shares (`w_*`)",
    "tokens": "a column `tokens`",
    "n_params": "a column `n_params`",
}


def _has(rows: object, column: str) -> bool:
    return getattr(rows, column + ("_RK" if column == "shares" else "_R")) is not None


def _target(
    name: str,
    table: Table,
    found: Fit,
    theta_DP: Floats,
    held: HeldOut,
    dropped: tuple[str, ...],
    size: float | None,
    settings: Settings,
) -> TargetFit:
    labels = dict(enumerate(sorted(set(table.run)))) if "run" in table.columns else {}
    far = outliers.outliers(found, labels, name)
    rows = found.rows
    steps = {} if table.step is None else dict(zip(table.line.tolist(), table.step.tolist(), strict=True))
    length = question.asked_tokens(table, settings)
    probe = question.probe_of(found.law, settings)
    lowest = None
    if rows.share_R is not None and len(table.shares) == 2 and question.by_ratio(found.law, probe):
        base = table.base_loss(name, size)
        lowest = shape.lowest_valid_share(found.law, theta_DP[0], size, length, base, probe)
    return TargetFit(
        name=name,
        fit=found,
        theta_DP=theta_DP,
        params={p: Estimate.of(draws_D) for p, draws_D in bootstrap.natural(found, theta_DP).items()},
        standard_errors=bootstrap.standard_errors(found, theta_DP),
        own=heldout.errors(found.predict(rows), rows.loss_R),
        heldout=held,
        outliers=far,
        without_outliers=_without(found, far, settings),
        rises=shape.rises(rows, rows.base_R, steps, labels, name),
        dropped=dropped,
        identified=identify.identified(found),
        base=table.base_loss(name, size),
        lowest_share=lowest,
        probe=probe,
        grows=growth.growing(rows, found.predict(rows), name),
    )


def _without(found: Fit, far: tuple[outliers.Outlier, ...], settings: Settings) -> Fit | None:
    """The fit without outliers; None when there are none or the rest cannot be fitted."""
    if not far:
        return None
    try:
        return outliers.without(found, far, settings.seed)
    except (UsageError, np.linalg.LinAlgError):
        return None
