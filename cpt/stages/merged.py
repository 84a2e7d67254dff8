"""A stage that measures weight averages of proxies, one for each source, in place of runs on their mixtures.

    {kind: merged, mixtures: [{medical: 0.25, web: 0.75}, ...], sources: [medical, web]}

`config/laws.py` makes it for a law stage with `how: merge`; the proxies are the train stages of the same group. A
mixture is stood for by the average of their last weights with its shares: from one start, under one schedule and of
one length, averages rank mixtures much like runs on them, at a cost that grows with the sources instead of with the
mixtures. Their losses lie above those of runs.

Source:
    Na et al. 2024, "Scalable Data Ablation Approximations for Language Models through Modular Training and Merging".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cpt.base.errors import DONE, SAVED, UsageError
from cpt.plan.model import Parallel
from cpt.plan.types import Job, RunPlan, StagePlan
from cpt.stages import STAGES, StageKind, parents, state


@STAGES.add("merged")
@dataclass(frozen=True, kw_only=True)
class MergedStage(StageKind):
    """Validation losses of weight averages.

    Args:
        mixtures: candidates, shares by source.
        sources: what is measured; empty = all sources of the run.
        tokens: per source at most [tokens].
        seq_length: window [tokens]; 0 = that of the proxies.
        micro_batch_size: windows at a time [sequences].
        precision: `fp32` or `bf16`.
    """

    mixtures: tuple[Mapping[str, float], ...] = ()
    sources: tuple[str, ...] = ()
    tokens: int = 1_048_576
    seq_length: int = 0
    micro_batch_size: int = 4
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if not self.mixtures:
            raise UsageError("`mixtures` is empty: there is nothing to average")
        if self.precision not in ("fp32", "bf16"):
            raise UsageError(f"`precision` is `{self.precision}`, wanted `fp32` or `bf16`")
        for name in ("tokens", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"`{name}` is {getattr(self, name)}, wanted at least 1")

    @classmethod
    def num_ranks(cls, stage: StagePlan) -> int:
        """One."""
        return 1

    @classmethod
    def work(cls, plan: RunPlan, job: Job) -> int:
        """Average and measure, candidate by candidate; one `eval` event each, with its `mixture`."""
        from cpt.checkpoint.average import Average, Member
        from cpt.data.corpus import Corpus
        from cpt.stages.measuring import measuring
        from cpt.stages.train import valid_sets

        stage = plan.stages[job.stage]
        options = cls(**stage.options)
        members = members_of(plan, stage, Path(job.run_dir))
        for mixture in options.mixtures:
            for source, share in mixture.items():
                if share > 0 and source not in members:
                    raise UsageError(f"no proxy of `{stage.group}` is trained on `{source}` alone")
        model = plan.model_of(stage)
        assert model is not None
        trained = [train for name, _ in members.values() if (train := plan.stages[name].train) is not None]
        tokens = max(train.tokens for train in trained)
        seq_length = options.seq_length or max(train.seq_length for train in trained)
        with measuring(job, model, Parallel(), options.precision) as rank:
            corpora = {name: Corpus.open(folder) for name, folder in job.corpora.items()}
            sets = valid_sets(corpora, tuple(options.sources) or tuple(plan.sources), seq_length, options.tokens, plan)
            for number, mixture in enumerate(options.mixtures, 1):
                Average([Member(members[s][1], share) for s, share in mixture.items() if share > 0]).load(rank.engine)
                fields = {"step": number, "tokens": tokens, "when": "during", "mixture": dict(mixture)}
                if not rank.measure(sets, options.micro_batch_size, **fields):
                    return SAVED
            rank.end()
            return DONE


def members_of(plan: RunPlan, stage: StagePlan, run_dir: Path) -> dict[str, tuple[str, Path]]:
    """By source, the proxy that is trained on it alone and the checkpoint that it ended with.

    Raises:
        UsageError: a proxy is not done, or they cannot be averaged: another start, length or lr.
    """
    found: dict[str, tuple[str, Path]] = {}
    first: StagePlan | None = None
    for name, other in plan.stages.items():
        train = other.train
        if other.group != stage.group or train is None:
            continue
        if len(train.mixture) != 1:
            raise UsageError(f"proxy `{name}` is trained on several sources: only proxies of one source are averaged")
        first = first or other
        assert first.train is not None
        if (other.parent, train.tokens, train.lr) != (first.parent, first.train.tokens, first.train.lr):
            raise UsageError(
                f"proxies `{first.name}` and `{name}` differ in start, length or lr: their average stands for no run"
            )
        folder = run_dir / "stages" / name
        status = state.read(folder).status
        if status != state.DONE:
            raise UsageError(f"stage `{stage.name}` averages `{name}`, which is {status}, not done")
        home = state.home(folder)
        if missing := parents.missing_result(other, home):
            raise UsageError(f"stage `{stage.name}` averages `{name}`, but {missing}")
        newest, _ = parents.store.newest_whole(home / "checkpoints")
        assert newest is not None
        found[next(iter(train.mixture))] = (name, newest)
    return found
