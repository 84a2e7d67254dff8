"""A saved law asked again: for another model size, another length, another limit."""

from __future__ import annotations

import dataclasses
from typing import Any

from cpt.laws import cautions, question, shape
from cpt.laws.result import plain
from cpt.laws.saved import SavedLaw, SavedTarget
from cpt.laws.settings import Settings

_OF_ANSWER = frozenset({"extrapolation", "wide_interval", "below_turning_point", "edge"})  # not of the law itself


def asked_again(saved: SavedLaw, settings: Settings) -> SavedLaw:
    """The law with the recommendation for these settings, and the warnings about it.

    Raises:
        UsageError: the question is about a size that the law says nothing about, or lacks a loss.
    """
    table = saved.table.with_base(settings.base_losses)
    size, tokens = question.asked_size(table, settings), question.asked_tokens(table, settings)
    targets: Any = {
        name: dataclasses.replace(
            target,
            base=table.base_loss(name, size),
            lowest_share=_lowest(saved, target, size, tokens, settings),
            probe=question.probe_of(target.law, settings),
        )
        for name, target in saved.targets.items()
    }
    answer, reason = question.recommend(table, targets, settings)
    said, warnings = None, []
    if answer is not None:
        fields = {f.name: getattr(answer, f.name) for f in dataclasses.fields(answer) if f.name != "ratio_D"}
        said = plain(fields | {"replay": answer.replay})
        warnings = [plain(warn) for warn in cautions.of_answer(answer, targets)]
    return dataclasses.replace(
        saved,
        settings=settings,
        recommendation=said,
        no_recommendation=reason,
        warnings=(*(w for w in saved.warnings if w.get("kind") not in _OF_ANSWER), *warnings),
    )


def _lowest(
    saved: SavedLaw, target: SavedTarget, size: float | None, tokens: float | None, settings: Settings
) -> float | None:
    """Below this share the law of a loss does not hold; None for losses without a share of their own."""
    probe = question.probe_of(target.law, settings)
    if target.rows.share_R is None or len(saved.table.shares) != 2 or not question.by_ratio(target.law, probe):
        return None
    base = saved.table.base_loss(target.name, size)
    return shape.lowest_valid_share(target.law, target.theta_DP[0], size, tokens, base, probe)
