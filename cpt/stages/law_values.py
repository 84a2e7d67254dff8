"""What a fitted law gives to later stages, and what is said when it must not be used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt.base.errors import UsageError
from cpt.base.units import show_count
from cpt.plan.types import RunPlan, StagePlan

if TYPE_CHECKING:
    from cpt.laws.saved import SavedLaw


def result(folder: Path) -> tuple[dict[str, Any], str]:
    """What a fitted law gives, and why it must not be used: one of the two is empty.

    Args:
        folder: of the law's stage, or the file.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    from cpt.laws.saved import SavedLaw

    return given(SavedLaw.load(folder))


def given(saved: SavedLaw) -> tuple[dict[str, Any], str]:
    """The same of a law that has been read."""
    values = saved.values()
    if saved.unfit:
        return {}, "; ".join(saved.unfit)
    if not values.get("mixture"):
        return {}, saved.no_recommendation or "it recommends no mixture"
    return values, ""


def users(plan: RunPlan, law: str) -> list[StagePlan]:
    """The stages that take a value from a law."""
    return [s for s in plan.stages.values() if any(value.partition(".")[0] == law for value in s.law.values())]


def by_hand(plan: RunPlan, law: str) -> list[str]:
    """How to go on without a law: the keys that it gives, to be set by a person."""
    hints = []
    for stage in users(plan, law):
        names = ", ".join(f"{source}: ..." for source in (stage.train.mixture if stage.train else ()))
        for key in stage.law:
            hints.append(f"`stages.{stage.name}.{key}={f'{{{names}}}' if key == 'mixture' else '...'}` goes on by hand")
    return hints


def refusal(plan: RunPlan, stage: StagePlan, run_dir: Path) -> UsageError:
    """The error for a stage that would take a value from a law that must not be used."""
    from cpt.stages import state

    key, value = next(iter(stage.law.items()))
    law = value.partition(".")[0]
    home = state.home(run_dir / "stages" / law)
    why = result(home)[1] or "it gives no value"
    return UsageError(
        f"stage `{stage.name}` takes `{key}` from the law `{law}`, which must not be used: {why}",
        f"`{home / 'law.html'}` shows the measurements and what the law makes of them",
        *by_hand(plan, law),
    )


def taken(plan: RunPlan, law: str, values: dict[str, Any]) -> str:
    """What a law has decided, in a line."""
    shares = ", ".join(f"{source} {share:.1%}" for source, share in (values.get("mixture") or {}).items())
    low, high = values.get("low"), values.get("high")
    between = f" (95 % interval of the ratio {low:.2f} to {high:.2f})" if low is not None and high is not None else ""
    at = f" at {show_count(values['tokens'])} tokens" if values.get("tokens") else ""
    at += f" and {show_count(values['n_params'])} parameters" if at and values.get("n_params") else ""
    names = " and ".join(f"`{s.name}`" for s in users(plan, law))
    return f"law `{law}`: {shares}{between}{at}, for {names}"
