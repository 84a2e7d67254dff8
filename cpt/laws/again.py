"""A saved law asked again: for another model size, another length, another limit."""

from __future__ import annotations

import dataclasses
from typing import Any

from cpt.laws import cautions, question, shape
from cpt.laws.result import Recommendation, plain
from cpt.laws.saved import SavedLaw
from cpt.laws.settings import Settings
from cpt.laws.table import Table

_OF_ANSWER = frozenset({"extrapolation", "wide_interval", "below_turning_point", "edge"})  # not of the law itself


def answer(saved: SavedLaw, settings: Settings) -> tuple[Recommendation | None, str, dict[str, Any], Table]:
    """What the law recommends for these settings.

    Returns:
        The recommendation or None, why there is none, the targets as they were asked, the table with base losses.

    Raises:
        UsageError: the question is about a size that the law says nothing about, or lacks a loss.
    """
    table = saved.table.with_base(settings.base_losses, settings.base_n_params)
    size, tokens = question.asked_size(table, settings), question.asked_tokens(table, settings)
    targets: Any = {
        name: dataclasses.replace(
            target,
            base=table.base_loss(name, size),
            lowest_share=lowest_share(saved, name, size, tokens, settings),
            probe=question.probe_of(target.law, settings),
        )
        for name, target in saved.targets.items()
    }
    found, reason = question.recommend(table, targets, settings)
    return found, reason, targets, table


def said(found: Recommendation) -> dict[str, Any]:
    """A recommendation as plain data; the draws of the ratio are left out."""
    fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found) if f.name != "ratio_D"}
    return dict(plain(fields | {"replay": found.replay}))


def asked_again(saved: SavedLaw, settings: Settings) -> SavedLaw:
    """The law with the recommendation for these settings, and the warnings about it.

    Raises:
        UsageError: as `answer`.
    """
    found, reason, targets, _ = answer(saved, settings)
    warnings = [] if found is None else [plain(warn) for warn in cautions.of_answer(found, targets)]
    return dataclasses.replace(
        saved,
        settings=settings,
        recommendation=None if found is None else said(found),
        no_recommendation=reason,
        warnings=(*(w for w in saved.warnings if w.get("kind") not in _OF_ANSWER), *warnings),
    )


def lowest_share(
    saved: SavedLaw, name: str, size: float | None, tokens: float | None, settings: Settings
) -> float | None:
    """Below this share the law of a loss does not hold; None for losses without a share of their own."""
    target = saved.targets[name]
    probe = question.probe_of(target.law, settings)
    if target.rows.share_R is None or len(saved.table.shares) != 2 or not question.by_ratio(target.law, probe):
        return None
    base = saved.table.base_loss(name, size)
    if base is None and "base" in target.law.needs:
        return None
    return shape.lowest_valid_share(target.law, target.theta_DP[0], size, tokens, base, probe)
