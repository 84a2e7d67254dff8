"""Ways to continue pretraining, as hooks in the training step. New method = one file here + one registration.

A method is a frozen dataclass of its own options with the hooks it needs; `state` and `load_state` hold what a
checkpoint must keep. Order inside one step: `weights` · forward with `loss`, backward · `grad` · clipping · optimizer
step · `update`. torch is imported inside the hooks, so that listing the methods is free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cpt.base.registry import Registry

if TYPE_CHECKING:
    from cpt.plan.types import Train


class Method:
    """Hooks of one method; each does nothing unless a method overrides it. `engine` is an `engine.ports.Engine`."""

    def start(self, engine: Any, train: Train) -> None:
        """Once, after the weights are in place and before the first step (also after a resume)."""

    def weights(self, step: int, losses: Mapping[str, float]) -> Mapping[str, float] | None:
        """New shares of the sources for the coming step, or None; `losses` are the newest validation losses."""
        return None

    def loss(self, engine: Any, losses_BS: Any, microbatch: Any) -> Any:
        """Per-token losses of a micro-batch on the last pipeline stage; return them changed or as they are."""
        return losses_BS

    def grad(self, engine: Any, step: int) -> None:
        """After gradients are reduced over data-parallel ranks, before clipping."""

    def update(self, engine: Any, step: int) -> None:
        """After the optimizer step; who changes fp32 main weights here refreshes the model's copy."""

    def state(self) -> dict[str, Any]:
        """What the checkpoint must keep, as JSON types."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""


METHODS: Registry[type[Method]] = Registry("method")
