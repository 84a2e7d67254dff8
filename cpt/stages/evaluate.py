"""A stage that measures its parent on held-out documents and changes nothing.

{kind: evaluate, from: domain, sources: [pubmed, web], tokens: 1M}
"""

from __future__ import annotations

from dataclasses import dataclass

from cpt.base.errors import DONE, SAVED, UsageError
from cpt.plan.model import Parallel
from cpt.plan.types import Job, RunPlan, StagePlan
from cpt.stages import STAGES, StageKind


@STAGES.add("evaluate")
@dataclass(frozen=True, kw_only=True)
class EvaluateStage(StageKind):
    """Validation losses of the parent checkpoint.

    Args:
        sources: what is measured; empty = all sources of the run.
        tokens: per source at most [tokens].
        seq_length: window [tokens]; 0 = that of the run's train stages, else the model's context.
        micro_batch_size: windows at a time [sequences].
        precision: `fp32` or `bf16`.
        tp, pp, dp: layout.
    """

    sources: tuple[str, ...] = ()
    tokens: int = 1_048_576
    seq_length: int = 0
    micro_batch_size: int = 4
    precision: str = "fp32"
    tp: int = 1
    pp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise UsageError(f"`precision` is `{self.precision}`, wanted `fp32` or `bf16`")
        for name in ("tokens", "micro_batch_size", "tp", "pp", "dp"):
            if getattr(self, name) < 1:
                raise UsageError(f"`{name}` is {getattr(self, name)}, wanted at least 1")

    @classmethod
    def num_ranks(cls, stage: StagePlan) -> int:
        """tp · pp · dp."""
        options = cls(**stage.options)
        return options.tp * options.pp * options.dp

    @classmethod
    def work(cls, plan: RunPlan, job: Job) -> int:
        """Measure on this rank."""
        from cpt.checkpoint import hf, native
        from cpt.data.corpus import Corpus
        from cpt.stages.measuring import measuring
        from cpt.stages.train import valid_sets

        options = cls(**plan.stages[job.stage].options)
        model = plan.model_of(plan.stages[job.stage])
        if job.parent is None or model is None:
            raise UsageError(f"stage `{job.stage}` has nothing to measure: the run starts from scratch")
        layout = Parallel(tp=options.tp, pp=options.pp, dp=options.dp)
        with measuring(job, model, layout, options.precision) as rank:
            if job.start == "hf":
                hf.load(rank.engine, job.parent)
            else:
                native.load(rank.engine, job.parent, keep=("weights",))
            corpora = {name: Corpus.open(folder) for name, folder in job.corpora.items()}
            sources = tuple(options.sources) or tuple(plan.sources)
            sets = valid_sets(corpora, sources, options.seq_length or _seq_length(plan), options.tokens, plan)
            if not rank.measure(sets, options.micro_batch_size, step=0, tokens=0, when="end"):
                return SAVED
            rank.end()
            return DONE


def _seq_length(plan: RunPlan) -> int:
    """Of the run's first train stage, so that its numbers can be compared; else the model's context."""
    trained = [stage.train.seq_length for stage in plan.stages.values() if stage.train]
    assert plan.model is not None
    return trained[0] if trained else plan.model.max_position_embeddings
