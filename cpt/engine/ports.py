"""What the engine is, and what the worker plugs into it. Other packages depend on these shapes, not on the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from cpt.plan.model import ModelConfig, Parallel


@dataclass
class Engine:
    """A built model with its optimizer on this rank. Made by `engine.megatron.build`.

    `chunks` are the pipeline chunks of this rank (DDP-wrapped when there is an optimizer), one unless interleaved.
    `padded_vocab_size` is the smallest multiple of 128 · tp that holds the vocabulary.
    """

    model: ModelConfig
    parallel: Parallel
    precision: str
    chunks: list[torch.nn.Module]
    optimizer: Any | None  # megatron.core.optimizer.MegatronOptimizer
    config: Any  # megatron.core.transformer.TransformerConfig
    padded_vocab_size: int
    device: torch.device

    def bare_chunks(self) -> list[torch.nn.Module]:
        """The GPT models without their DDP wrapper."""
        return [getattr(chunk, "module", chunk) for chunk in self.chunks]


@dataclass
class Progress:
    """How far a stage is: all that a checkpoint holds besides weights, optimizer and random state. JSON types only.

    `cursors` is the data stream's own (see `data.stream`); `lr` is `{"last": lr of the last step, "lr": the resolved
    curve}`; `run_step` counts steps over the chain of stages that kept their lr (for `counter: run`).
    """

    step: int = 0
    tokens: int = 0
    run_step: int = 0
    run_tokens: int = 0
    cursors: dict[str, Any] = field(default_factory=dict)
    lr: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)  # last window, for the spike rule
    first_eval: dict[str, float] = field(default_factory=dict)  # valid loss at the stage's start, for `stop_if`
    newest_eval: dict[str, float] = field(default_factory=dict)  # valid loss by source, newest measurement
    last_eval: int = -1  # step whose evaluation is complete; -1 = none
    methods: dict[str, Any] = field(default_factory=dict)


class Saver(Protocol):
    """Writes and finds checkpoints of one stage. All methods are collective: every rank calls them."""

    def save(self, engine: Engine, progress: Progress, *, phase: str) -> Path:
        """Write `iter_<step>` whole or not at all. `phase`: train | pre_anneal | stop | end."""
        ...

    def wait(self) -> None:
        """Finish an asynchronous save that is under way (manifest written, retention done)."""
        ...


class Reporter(Protocol):
    """Takes events (see `base.events`). Only rank 0's does something."""

    clock: Callable[[], float]  # [unix seconds]

    def __call__(self, kind: str, **fields: Any) -> None: ...
