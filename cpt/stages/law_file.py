"""A saved law that a law stage takes instead of proxies: asked again for the stage that it is for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cpt.base.errors import PlanError, UsageError
from cpt.base.units import show_count
from cpt.laws.again import asked_again
from cpt.laws.question import asked_size
from cpt.laws.result import Warn, plain
from cpt.laws.saved import SavedLaw
from cpt.laws.table import GENERAL, SAME_SIZE
from cpt.stages.law import LawStage


def of_file(options: LawStage) -> SavedLaw:
    """The law of a stage's `file`, with its answer for the stage's target; one that is unfit is left as it is.

    Raises:
        UsageError: there is none, or it cannot be read.
        PlanError: the law says nothing about a model of the target's size, or has no answer for it.
    """
    assert options.file is not None
    return for_target(SavedLaw.load(options.file), options)


def for_target(saved: SavedLaw, options: LawStage) -> SavedLaw:
    """The law with its answer for the size and length of the target, with its own limit unless the stage gives one."""
    settings = saved.settings
    if saved.unfit or not options.target or settings.compute is not None:
        return saved
    size = float(options.target_params) if options.target_params and saved.table.n_params is not None else None
    before = asked_size(saved.table, settings)
    same = size is None or (before is not None and abs(size - before) <= SAME_SIZE * before)
    if size is not None:
        settings = dataclasses.replace(settings, n_params=size, force=settings.force and same)
    if options.target_tokens and saved.table.tokens is not None and settings.domain_tokens is None:
        settings = dataclasses.replace(settings, tokens=float(options.target_tokens))
    if options.tolerance is not None or options.eps_g is not None:
        tolerance = options.tolerance if options.eps_g is None else None
        settings = dataclasses.replace(settings, tolerance=tolerance, eps_g=options.eps_g)
    if settings == saved.settings:
        return saved
    foreign = []
    if GENERAL in settings.base_losses and saved.table.base_loss(GENERAL, size) is None and before is not None:
        foreign = [
            f"the general loss before training, {settings.base_losses[GENERAL]:g}, was given for a model of "
            f"{show_count(before)} parameters, and `{options.target}` has {show_count(size or 0)}"
        ]
    try:
        found = asked_again(saved, settings)
    except UsageError as error:
        wanted = "a table with the losses of that model before training, as a row of 0 tokens, answers that"
        if not foreign:
            wanted = "a law fitted to runs of three sizes or more, or of this size, answers that"
        hints = [wanted] if not same else []
        if not same and (shares := saved.values().get("mixture")):
            says = ", ".join(f"{name} {share:.3g}" for name, share in shares.items())
            at = f" of {show_count(before)} parameters" if before is not None else ""
            hints.append(f"for a model{at} it says {says}: written as the stage's `mixture` it is yours to answer for")
        what = f"the law cannot be asked for stage `{options.target}`: {error.message}"
        raise PlanError(what, *foreign, *(hints or error.hints)) from None
    if found.recommendation is None and saved.recommendation is not None:
        at = f" and {show_count(size)} parameters" if size is not None else ""
        raise PlanError(
            f"the law has no answer for `{options.target}`, of {show_count(options.target_tokens)} tokens{at}: "
            f"{found.no_recommendation}",
            *foreign,
            "fit it on runs that are more like this stage, or give the stage's `mixture` by hand",
        )
    length = found.values().get("tokens")
    if length and options.target_tokens and abs(length - options.target_tokens) > 0.01 * options.target_tokens:
        text = (
            f"the law's answer is for {show_count(length)} tokens, and `{options.target}` has "
            f"{show_count(options.target_tokens)}"
        )
        found = dataclasses.replace(found, warnings=(*found.warnings, plain(Warn("other_length", text, strong=True))))
    return found


def told(saved: SavedLaw, options: LawStage) -> dict[str, object]:
    """What a plan says of such a law: `answer` in words, and `doubts` about it, those that are strong first."""
    values = saved.values()
    file = Path(str(options.file))
    parts = [f"{saved.law} as in {file.parent.name}/{file.name}"]
    asked = [f"{show_count(values['tokens'])} tokens"] if values.get("tokens") else []
    asked += [f"{show_count(values['n_params'])} parameters"] if values.get("n_params") else []
    parts += [f"asked for {' and '.join(asked)}"] if asked else []
    low, high = values.get("low"), values.get("high")
    if values.get("ratio") is not None:
        share = f"{' + '.join(options.domain) or 'domain'} {100 * values['ratio']:.1f} %"
        between = f" ({100 * low:.1f} to {100 * high:.1f})" if low is not None and high is not None else ""
        parts.append(share + between)
    else:
        parts += [f"{name} {100 * share:.1f} %" for name, share in (values.get("mixture") or {}).items()]
    kinds = ("extrapolation", "wide_interval", "below_turning_point", "edge", "other_length")
    warned = sorted((w for w in saved.warnings if w.get("kind") in kinds), key=lambda w: not w.get("strong"))
    return {"answer": ", ".join(parts), "doubts": list(dict.fromkeys(str(w["text"]) for w in warned))}
