"""What a checkpoint of any format holds: logical tensors (atoms) with their states, and everything beside them.

One atom is one parameter as Hugging Face names it, [out, in], unfused and unstacked, its vocabulary without padding.
Formats turn files into a `Content` and a `Content` into files; no format knows another. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt.checkpoint.arrays import Array
from cpt.plan.model import ModelConfig

MODEL, MAIN = "model", "fp32"  # the weight the model computes with; its unrounded fp32 twin of the optimizer
MOMENTS = ("exp_avg", "exp_avg_sq")
OPTIMIZER = (MAIN, *MOMENTS)
LEFT_OPTIMIZER = "optimizer state"  # in `Content.left_out`: it is there and was not to be read


@dataclass(frozen=True, kw_only=True)
class Atom:
    """A logical tensor.

    Args:
        dtype: of the model's weight.
        states: `model`, `fp32`, `exp_avg`, `exp_avg_sq`. Without `model` the weight is `fp32` rounded to `dtype`.
        pad: the same for padding rows of the vocabulary ([pad rows, hidden]), where there are some.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    states: Mapping[str, Array]
    pad: Mapping[str, Array] = field(default_factory=dict)

    @property
    def pad_rows(self) -> int:
        """Padding rows of the vocabulary that are there."""
        return next((a.shape[0] for a in self.pad.values()), 0)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Ranks of a Megatron checkpoint.

    Args:
        layers: layers of each (virtual chunk, stage) part, chunk 0 of all stages first; None = even.
        bucket_numel: optimizer buckets end once they hold this many values; None = one bucket.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None  # tensor ranks of the experts; None = tp
    vp: int = 1
    dp: int = 1
    layers: tuple[int, ...] | None = None
    bucket_numel: int | None = None

    def __str__(self) -> str:
        parts = [f"tp {self.tp}", f"pp {self.pp}"]
        parts += [f"{name} {n}" for name, n in (("vp", self.vp), ("ep", self.ep), ("dp", self.dp)) if n > 1]
        return " × ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Adam's state beside the tensors.

    Args:
        step: updates made.
        groups: hyperparameters of each parameter group, plain values, without parameters and step.
        form: how it was stored (`fully_reshardable`, `dp_reshardable`, ...); None where the format has one only.
        gradients: dtype of gradients by dtype of parameters, where flat buffers are named after both.
    """

    step: int
    groups: tuple[Mapping[str, Any], ...] = ()
    form: str | None = None
    gradients: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Content:
    """A checkpoint, opened: what it holds and where; no values are read.

    Args:
        format: `hf`, `torch_dist`, `megatron`, `atom`, `ds-universal`.
        model: as the configuration or Megatron's arguments say. `hf_config` is set where the source came with one.
        atoms: by name, in the order of the model.
        padded_vocab_size: rows of the stored vocabulary matrices; None where the format has no padding.
        iteration: of the training run; None for released weights.
        common: further plain state by Megatron's names, kept as it is (`opt_param_scheduler`, `consumed_train_samples`,
            `num_floating_point_operations_so_far`, ...): JSON values only.
        args: Megatron's arguments, plain values only; None where there were none.
        objects: named states that a stage of ours added (`cpt.*`), as JSON.
        files: files to take along by their names in a Hugging Face folder (config.json, tokenizer, ...).
        layout: of the ranks that wrote it, where the format shows it.
        unrounded: atoms whose `model` is declared not to be `fp32` rounded (stochastic rounding, FP8); both are kept.
        from_main: atoms whose weight is read from `fp32`, because it is wanted in another dtype than `model` has and
            `fp32` is kept beside it (see `Writing.with_weights_from_main`).
        id: of an atom checkpoint, the same for equal training states.
        left_out: one line for each thing that the format holds and this content does not; `LEFT_OPTIMIZER` where
            there is optimizer state that was not to be read.
        crc32: checksums that the format itself carries, by file as places name it: [(start, length, crc32)] of stored
            bytes.
    """

    format: str
    path: Path
    model: ModelConfig
    atoms: Mapping[str, Atom]
    padded_vocab_size: int | None = None
    optimizer: Optimizer | None = None
    iteration: int | None = None
    common: Mapping[str, Any] = field(default_factory=dict)
    args: Mapping[str, Any] | None = None
    objects: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    layout: Layout | None = None
    unrounded: frozenset[str] = frozenset()
    from_main: frozenset[str] = frozenset()
    id: str | None = None
    left_out: tuple[str, ...] = ()
    crc32: Mapping[str, tuple[tuple[int, int, int], ...]] = field(default_factory=dict)

    @property
    def has_optimizer(self) -> bool:
        """Whether moments are there."""
        return self.optimizer is not None

    @property
    def pad_rows(self) -> int:
        """Padding rows of the vocabulary that are there."""
        return max((a.pad_rows for a in self.atoms.values()), default=0)

    def array(self, atom: str, state: str, pad: bool = False) -> Array:
        """Where a state lies; the weight of a checkpoint without `model` is its `fp32`, to be rounded."""
        states = self.atoms[atom].pad if pad else self.atoms[atom].states
        if state == MODEL and atom in self.from_main and MAIN in states:
            return states[MAIN]
        return states[state] if state in states else states[MAIN if state == MODEL else MODEL]
