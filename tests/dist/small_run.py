"""A run folder of a tiny Llama on real text, as `cpt run` lays it out, for tests that call a stage's work directly.

The text is Python's own documentation topics, read from the installation.
"""

from __future__ import annotations

import json
import pydoc_data.topics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpt.base.events import Event
from cpt.base.files import read_lines, write_json
from cpt.checkpoint import store
from cpt.data import catalog, prepare, tokenizer
from cpt.methods import METHODS, Method
from cpt.plan.types import Base, DataOptions, Evaluate, Job, Lr, Optimizer, RunPlan, Saving, Source, StagePlan, Tokenizer, Train
from cpt.plan.model import ModelConfig, Parallel
from cpt.base.records import to_json

SEQ, BATCH, STEPS = 32, 8, 12
MODEL = ModelConfig(
    family="llama",
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=56,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    vocab_size=320,
    max_position_embeddings=SEQ,
    norm_eps=1e-5,
    tie_embeddings=True,
)
LR = Lr(schedule="constant", options={"peak": 5e-3, "warmup": "0 steps"}, span=STEPS, points=(5e-3, 5e-3, 5e-3))


def write_text(folder: Path) -> dict[str, Source]:
    """Two sources: topics of the language's documentation with an odd and an even place in the alphabet."""
    topics = sorted(pydoc_data.topics.topics.items())
    sources = {}
    for name, half in (("odd", topics[1::2]), ("even", topics[0::2])):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for _, text in half))
        source = Source(name=name, patterns=(str(path),), paths=(str(path),), valid=0.1)
        sources[name] = replace(source, identity=catalog.identity(source))
    return sources


@dataclass(frozen=True)
class SmallRun:
    """A run folder with prepared data."""

    folder: Path
    sources: Mapping[str, Source]
    corpora: Mapping[str, str]
    tokenizer: str

    @classmethod
    def prepare(cls, folder: Path) -> SmallRun:
        """Tokenizer and corpora; the run's plan is written by `job`."""
        folder.mkdir(parents=True, exist_ok=True)
        sources = write_text(folder)
        cache = folder / "cache"
        path = tokenizer.train(list(sources.values()), MODEL.vocab_size, cache)
        data = DataOptions()
        corpora = {name: str(prepare.prepare(s, path, data, cache).folder) for name, s in sources.items()}
        return cls(folder, sources, corpora, path)

    def copy(self, folder: Path) -> SmallRun:
        """Another run folder on the same data."""
        return replace(self, folder=folder)

    def train(self, **changes: Any) -> Train:
        """Twelve steps on both sources at dp 2, changed as wanted."""
        plain = Train(
            tokens=STEPS * BATCH * SEQ,
            steps=STEPS,
            seq_length=SEQ,
            global_batch_size=BATCH,
            micro_batch_size=2,
            seed=5,
            precision="fp32",
            mixture={"odd": 0.7, "even": 0.3},
            replay=None,
            lr=LR,
            optimizer=Optimizer(),
            parallel=Parallel(dp=2),
            evaluate=Evaluate(sources=("odd", "even"), every_steps=4, tokens=600),
            saving=Saving(every_steps=3),
        )
        return replace(plain, **changes)

    def job(self, train: Train, *, start: str = "scratch", parent: str | None = None, stage: str = "only") -> Job:
        """Write plan and job of the next attempt; resumes from the newest whole checkpoint."""
        plan = RunPlan(
            id="0" * 64,
            name=self.folder.name,
            recipe="small",
            base=Base(kind="scratch"),
            model=MODEL,
            tokenizer=Tokenizer(path=self.tokenizer, hash=tokenizer.tokenizer_hash(self.tokenizer)),
            sources=self.sources,
            data=DataOptions(),
            stages={stage: StagePlan(name=stage, kind="train", parent=parent, keep=("weights",), train=train)},
        )
        stage_dir = self.folder / "stages" / stage
        number = len(list(stage_dir.glob("attempt_*"))) + 1
        attempt = stage_dir / f"attempt_{number}"
        attempt.mkdir(parents=True)
        newest, _ = store.newest_whole(stage_dir / "checkpoints")
        job = Job(
            run_dir=str(self.folder),
            stage=stage,
            attempt=number,
            start=start,
            parent=parent,
            resume=str(newest) if newest else None,
            corpora=self.corpora,
            tokenizer=self.tokenizer,
        )
        write_json(self.folder / "plan.json", to_json(plan))
        write_json(attempt / "job.json", to_json(job))
        return job

    def events(self, job: Job, kind: str) -> list[Event]:
        """Events of one kind of an attempt."""
        path = self.folder / "stages" / job.stage / f"attempt_{job.attempt}" / "events.jsonl"
        return [e for e in read_lines(path) if e["kind"] == kind]


def work(job: Job) -> int:
    """What a rank does for a job; to be given to `run_ranks`."""
    from cpt.base.files import read_json
    from cpt.base.records import from_json
    from cpt.stages.train import TrainStage

    return TrainStage.work(from_json(RunPlan, read_json(Path(job.run_dir) / "plan.json")), job)


def weights(folder: Path) -> dict[str, Any]:
    """Every tensor of a native checkpoint that training changes, by key."""
    from cpt.checkpoint import native

    return {name: tensor.clone() for name, tensor in native.tensors(folder)}


@METHODS.add("test_sabotage")
@dataclass(frozen=True, kw_only=True)
class Sabotage(Method):
    """Breaks a run on purpose at one step: a NaN gradient, weights blown up, a signal on one rank, or one that computes
    slowly up to there and then never goes on.

    With `once`, only when that file does not exist; it is made then.
    """

    what: str
    step: int
    once: str = ""

    def _is_due(self, step: int) -> bool:
        return step == self.step and not (self.once and Path(self.once).exists())

    def grad(self, engine: Any, step: int) -> None:
        """A NaN in one gradient (on every rank: which one owns its slice of the optimizer is not known here)."""
        import os
        import signal

        if not self._is_due(step):
            return
        rank = int(os.environ["RANK"])
        if self.what == "nan":
            next(p for p in engine.chunks[0].parameters() if p.requires_grad).main_grad.view(-1)[0] = float("nan")
        if self.what == "signal" and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.what == "stuck" and rank == 1:
            time.sleep(600)

    def loss(self, engine: Any, losses_BS: Any, microbatch: Any) -> Any:
        """One rank is slow."""
        import os

        if self.what == "stuck" and os.environ["RANK"] == "1":
            time.sleep(0.1)
        return losses_BS

    def update(self, engine: Any, step: int) -> None:
        """Weights of the last layers times fifty, on every rank alike."""
        import torch
        import torch.distributed as dist

        from cpt.engine import megatron

        due = self.what == "blow_up" and self._is_due(step)
        dist.barrier()
        if due:
            with torch.no_grad():
                for chunk in engine.bare_chunks():
                    for parameter in chunk.parameters():
                        parameter.mul_(50.0)
            megatron.refresh_main_weights(engine)
            if self.once:
                Path(self.once).touch()


@METHODS.add("test_order")
@dataclass(frozen=True, kw_only=True)
class Order(Method):
    """Writes down the order in which the first rank's hooks are called."""

    path: str

    def _note(self, word: str) -> None:
        import os

        if os.environ["RANK"] == "0":
            with open(self.path, "a") as file:
                file.write(word + "\n")

    def start(self, engine: Any, train: Train) -> None:
        self._note("start")

    def weights(self, step: int, losses: Mapping[str, float]) -> None:
        self._note(f"weights {step}")

    def loss(self, engine: Any, losses_BS: Any, microbatch: Any) -> Any:
        self._note(f"loss {tuple(losses_BS.shape)}")
        return losses_BS

    def grad(self, engine: Any, step: int) -> None:
        self._note(f"grad {step}")

    def update(self, engine: Any, step: int) -> None:
        self._note(f"update {step}")
