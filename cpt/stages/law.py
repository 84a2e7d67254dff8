"""A stage that turns measurements of small runs into a law, and the law into the mixture of a later stage.

    mix: {kind: law, from: base, for: domain, ratios: [0, 0.25, 0.5, 0.75, 1], tokens: 30M, every: 5M, tolerance: 5%}

`config/laws.py` makes a train stage of each proxy run (`StagePlan.group` is this stage's name) and puts them before it;
this stage reads what they measured, fits, and leaves in its folder

    law.json     the fitted law with its draws and the recommendation: where `${law:mix.ratio}` and its like come from
    table.csv    what it was fitted on
    law.html     the same as a page

A proxy is measured before its first step, every `every` tokens and at its end, on the sources of `domain` and
`general`. With `how: merge` there is one proxy for each source (its `train.mixture` names it alone), and one stage of
kind `merged` in the same group, which measures weight averages of them: its options hold `mixtures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cpt.base.errors import UsageError
from cpt.plan.types import Job, RunPlan, StagePlan
from cpt.stages import STAGES, StageKind

RESULT = "law.json"
HOW = ("runs", "merge")


@STAGES.add("law")
@dataclass(frozen=True, kw_only=True)
class LawStage(StageKind):
    """Fit a law on proxy runs and take the best mixture from it. Options as in the plan, resolved.

    Args:
        target: the train stage whose mixture is wanted (`for` in a recipe); empty = none is named.
        target_tokens: its length [tokens]: what the law is asked at.
        target_params: parameters of its model [count].
        target_decays: whether its lr decays, which proxies with a constant lr do not show.
        real_flops: compute of the target and of the train stages that come from it, 6·N·D [FLOPs].
        law: name of the law; `auto` = the one with the smallest held-out error.
        domain: sources of the domain with their shares inside it; what `ratio` is the share of.
        general: the other sources with their shares inside the rest.
        ratios: domain shares of the proxies, for two groups of sources.
        mixtures: whole mixtures of the proxies, for more than two groups, instead of `ratios`.
        tokens: length of one proxy [tokens].
        every: tokens between two measurements [tokens].
        warmup: of a proxy; measurements before its end are not used [tokens].
        tolerance: relative rise of the general loss that is allowed; None = `eps_g` says it [fraction].
        eps_g: allowed rise of the general loss [nats/token].
        how: `runs` = a proxy for each mixture; `merge` = one for each source, and averages of their weights.
        draws: bootstrap resamples.
        seed: of starts and resamples.
        file: a saved law that is asked for the target, absolute path.
        data: a table of finished runs that is fitted instead of proxies, absolute path.
        content: hash of `file` or `data`.
        answer: what the law in `file` says for the target, in words.
        doubts: warnings about that.
        max_cost: most that the proxies may cost, as a part of `real_flops` [fraction].
    """

    modules: ClassVar[tuple[str, ...]] = ()  # one rank without torch

    target: str = ""
    target_tokens: int = 0
    target_params: int = 0
    target_decays: bool = False
    real_flops: float = 0.0
    law: str = "dcpt"
    domain: Mapping[str, float] = field(default_factory=dict)
    general: Mapping[str, float] = field(default_factory=dict)
    ratios: tuple[float, ...] = ()
    mixtures: tuple[Mapping[str, float], ...] = ()
    tokens: int = 0
    every: int = 0
    warmup: int = 0
    tolerance: float | None = 0.05
    eps_g: float | None = None
    how: str = "runs"
    draws: int = 200
    seed: int = 0
    file: str | None = None
    data: str | None = None
    content: str | None = None
    max_cost: float = 0.35
    answer: str = ""
    doubts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise UsageError(f"`how` is `{self.how}`, wanted `runs` or `merge`")
        if self.file is not None and self.data is not None:
            raise UsageError("both `file` and `data` are given", "a saved law needs no table")

    @classmethod
    def num_ranks(cls, stage: StagePlan) -> int:
        """One."""
        return 1

    @classmethod
    def work(cls, plan: RunPlan, job: Job) -> int:
        """Collect, fit, recommend, write."""
        from cpt.stages import law_work

        return law_work.work(plan, job)


def proxies_of(plan: RunPlan, law: str) -> dict[str, StagePlan]:
    """The proxy train stages of a law stage, by name in order of execution."""
    return {n: s for n, s in plan.stages.items() if s.group == law and s.train is not None}


def options_of(plan: RunPlan, law: str) -> LawStage:
    """The options of a law stage of a plan."""
    stage: StagePlan = plan.stages[law]
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stage.options.items()}
    return LawStage(**values)
