"""What the laws of a run said and what came of it: the answer, and predicted against measured losses.

A law is asked again at the size, tokens and mixture that its target stage really had, because a saved law may have
been asked about another run, and a person may have taken another mixture. What it is compared with is the measurement
at the end of that stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpt.base.errors import UsageError
from cpt.evaluate import measurements
from cpt.laws.recommend.distance import distance
from cpt.laws.result import Estimate, plain
from cpt.laws.saved import SavedLaw
from cpt.plan.types import RunPlan, Train
from cpt.report import show
from cpt.report.history import RunHistory
from cpt.stages import state
from cpt.stages.law import RESULT


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One loss at the end of the target stage."""

    name: str
    predicted: Estimate  # [nats/token]
    measured: float  # [nats/token]

    @property
    def miss(self) -> float:
        """Predicted minus measured, of the measured loss [fraction]."""
        return (self.predicted.value - self.measured) / self.measured


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One finished law stage.

    Args:
        saved: its law; None when it cannot be read.
        problem: why there is no law, or nothing to compare it with.
        target: the stage whose mixture it is about; empty when none is named.
        far: how far that stage lies from what the law was fitted on; empty = inside.
        folder: where law.json lies.
    """

    stage: str
    saved: SavedLaw | None
    problem: str
    target: str
    compared: tuple[Compared, ...]
    far: str
    folder: Path

    def to_json(self) -> dict[str, Any]:
        """For `cpt report --json`."""
        found: dict[str, Any] = {"stage": self.stage, "target": self.target, "problem": self.problem}
        if self.saved is not None:
            told = [w["text"] for w in self.saved.warnings]
            found |= {"verdict": self.saved.verdict, "values": self.saved.values(), "warnings": told}
        compared = [asdict(c) | {"miss": c.miss} for c in self.compared]
        made: dict[str, Any] = plain(found | {"measured_against_predicted": compared})
        return made


def outcomes(run: RunHistory) -> tuple[Outcome, ...]:
    """The law stages of a run that are done, in the order of the plan."""
    names = [n for n, s in run.plan.stages.items() if s.kind == "law" and run.states[n].status == state.DONE]
    return tuple(_outcome(run, name) for name in names)


def _outcome(run: RunHistory, name: str) -> Outcome:
    target = str(run.plan.stages[name].options.get("target") or "")
    folder = run.homes[name]
    saved: SavedLaw | None = None
    compared: tuple[Compared, ...] = ()
    far = problem = ""
    try:
        saved = SavedLaw.load(folder / RESULT)
        compared, far, problem = _compared(run, saved, target)
    except UsageError as error:
        problem = error.message
    return Outcome(stage=name, saved=saved, problem=problem, target=target, compared=compared, far=far, folder=folder)


def _compared(run: RunHistory, saved: SavedLaw, target: str) -> tuple[tuple[Compared, ...], str, str]:
    """The losses of a law, how far the stage lies from its data, and why nothing can be compared."""
    stage = run.plan.stages.get(target)
    if stage is None or stage.train is None:
        return (), "", ""
    ends = [m for m in measurements(run.events[target]) if m.when == "end"]
    if not ends:
        return (), "", f"`{target}` has not been measured at its end yet"
    shares = _shares(saved, stage.train)
    if saved.table.shares and shares is None:
        return (), "", f"`{target}` reads sources that the law knows nothing about"
    size = _size(run.plan, target) if saved.table.n_params is not None else None
    found, far = [], ""
    for name, law in saved.targets.items():
        parts = saved.groups.get(name) or {name: 1.0}
        if any(source not in ends[-1].losses for source in parts):
            continue
        if law.law.needs and "unique_tokens" in law.law.needs:
            return (), "", "a law of repeated data is not compared"
        extra = {"k1": saved.settings.k1, "k2": saved.settings.k2, "base": saved.table.base_loss(name, size)}
        point = saved.points(name, n_params=size, tokens=stage.train.tokens, shares=shares, **extra)
        measured = sum(ends[-1].losses[s].loss * w for s, w in parts.items()) / sum(parts.values())
        predicted = Estimate.of(saved.predict(name, point)[:, 0])
        found.append(Compared(name=name, predicted=predicted, measured=measured))
        share = shares.get(name) if shares and len(shares) == 2 else None
        lies = distance(law.rows, n_params=size, tokens=stage.train.tokens, share=share)
        far = far or ("" if lies.inside else lies.reason)
    return tuple(found), far, "" if found else f"`{target}` was not measured on what the law predicts"


def _size(plan: RunPlan, stage: str) -> float | None:
    model = plan.model_of(plan.stages[stage])
    return float(model.num_parameters) if model is not None else None


def _shares(saved: SavedLaw, train: Train) -> dict[str, float] | None:
    """Share of each corpus of the law in what a stage reads, replay included; None when it reads anything else."""
    read: dict[str, float] = {}
    part = train.replay.share if train.replay else 0.0
    for weight, sources in ((1 - part, train.mixture), (part, train.replay.sources if train.replay else {})):
        total = sum(sources.values()) or 1.0
        for source, share in sources.items():
            read[source] = read.get(source, 0.0) + weight * share / total
    read = {source: share for source, share in read.items() if share > 0}
    corpora = saved.table.corpora
    groups: Mapping[str, Mapping[str, float]] = {c: saved.groups.get(c) or {c: 1.0} for c in corpora}
    if not corpora or any(not any(source in g for g in groups.values()) for source in read):
        return None
    return {corpus: sum(read.get(source, 0.0) for source in group) for corpus, group in groups.items()}


def answer(saved: SavedLaw) -> str:
    """What a law recommends, in words."""
    values = saved.values()
    if isinstance(values.get("ratio"), int | float):
        low, high = values.get("low"), values.get("high")
        interval = f" (95 % interval {show.share(low)} to {show.share(high)})" if low is not None else ", no interval"
        return f"{show.share(values['ratio'])} domain text{interval}"
    if isinstance(values.get("mixture"), dict):
        return ", ".join(f"{show.plain(s, 60)} {show.share(share)}" for s, share in values["mixture"].items())
    return show.plain(saved.no_recommendation) or "no mixture"


def line(outcome: Outcome) -> str:
    """Predicted against measured losses in one line; empty when nothing can be compared."""
    if not outcome.compared:
        return ""
    parts = []
    for c in outcome.compared:
        parts.append(
            f"{show.plain(c.name, 40)} {show.loss(c.predicted.value)} predicted, {show.loss(c.measured)} measured "
            f"({show.plain(f'{100 * c.miss:+.1f} %')})"
        )
    far = f"; extrapolated: {show.plain(outcome.far)}" if outcome.far else ""
    return f"{show.plain(outcome.stage, 40)} at the end of {show.plain(outcome.target, 40)}: {'; '.join(parts)}{far}"


def rows(run: RunHistory, at: Path) -> list[dict[str, Any]]:
    """The laws as the page shows them.

    Args:
        at: folder of the page, from which links lead.
    """
    import os
    from urllib.parse import quote

    found = []
    for o in outcomes(run):
        answers = dict((o.saved.recommendation or {}).get("losses") or {}) if o.saved else {}
        found.append(
            {
                "stage": o.stage,
                "law": o.saved.law if o.saved else "",
                "equation": o.saved.equation if o.saved else "",
                "unfit": o.saved.unfit if o.saved else (),
                "asked": str((o.saved.recommendation or {}).get("asked") or "") if o.saved else "",
                "answer": answer(o.saved) if o.saved else "",
                "losses": [(name, _between(value)) for name, value in answers.items() if isinstance(value, dict)],
                "target": o.target,
                "compared": o.compared,
                "far": o.far,
                "problem": o.problem,
                "link": quote(os.path.relpath(o.folder / "law.html", at)) if o.saved else "",
            }
        )
    return found


def _between(value: Mapping[str, Any]) -> str:
    low, high = value.get("low"), value.get("high")
    interval = f" ({show.loss(low)} to {show.loss(high)})" if low is not None and high is not None else ""
    return show.loss(value.get("value")) + interval


def warnings(run: RunHistory) -> list[tuple[float, dict[str, str]]]:
    """What the laws of a run warn of, with the time when each was made."""
    found = []
    for o in outcomes(run):
        t = run.states[o.stage].updated
        texts = [str(w["text"]) for w in o.saved.warnings] if o.saved else [o.problem]
        unfit = [f"unfit for use: {reason}" for reason in o.saved.unfit] if o.saved else []
        for text in dict.fromkeys([*unfit, *texts]):
            found.append((t, {"stage": o.stage, "what": "law", "text": show.plain(text), "step": ""}))
    return found
