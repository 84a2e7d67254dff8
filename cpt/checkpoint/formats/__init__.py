"""Checkpoint formats: how a folder becomes a `Content`, and a `Content` the plan of a folder. One file a format."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from cpt.base.registry import Registry
from cpt.checkpoint.arrays import OutFile
from cpt.checkpoint.content import MAIN, Content, Layout
from cpt.checkpoint.layouts import pad_vocabulary
from cpt.checkpoint.writing import FileSums

OPTIMIZER_FORMS = ("fully_reshardable", "dp_reshardable", "plain", "none")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a checkpoint is read.

    Args:
        optimizer: whether optimizer state is read at all.
        vocab_size: of the model, where the checkpoint does not say.
        config: Hugging Face folder or `config.json` that says what the model is.
        first_replica: take the first of copies that differ instead of refusing.
        untie: keep an output layer that differs from the embedding it is said to be tied to.
    """

    optimizer: bool = True
    vocab_size: int | None = None
    config: Path | None = None
    first_replica: bool = False
    untie: bool = False


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How a checkpoint is written.

    Args:
        layout: of Megatron ranks; where the files do not depend on it, it decides the vocabulary's padding only.
        optimizer: one of `OPTIMIZER_FORMS`; None = the format's own where the content has optimizer state.
        spec: whose layers load it: Transformer Engine's (`te`), Megatron's own (`local`), or this project's (`cpt`),
            which are named as Megatron's and compute more.
        dtype: of the model's weights, as torch spells it; None = as they are.
        keep_padding: write padding rows of the vocabulary into a Hugging Face folder too.
        vocabulary_multiple: Megatron's `make_vocab_size_divisible_by`; None = rows of the vocabulary as the source has
            them where tp divides them, else 128.
        file_bytes: size at which another file is begun [bytes].
        from_master: the optimizer's fp32 weights are the weights of a Hugging Face folder, as float32.
        sha256: note each file's SHA-256 too, where the format has a place for it.
    """

    layout: Layout = field(default_factory=Layout)
    optimizer: str | None = None
    spec: str = "local"
    dtype: str | None = None
    keep_padding: bool = False
    vocabulary_multiple: int | None = None
    file_bytes: int = 2 << 30
    from_master: bool = False
    sha256: bool = False

    def padded_vocab_size(self, content: Content) -> int:
        """Rows of the vocabulary matrices of a Megatron checkpoint."""
        given = content.padded_vocab_size
        if self.vocabulary_multiple is None and given is not None and given % self.layout.tp == 0:
            return given
        return pad_vocabulary(content.model.vocab_size, self.vocabulary_multiple or 128, self.layout.tp)

    def weight_dtypes(self, content: Content) -> dict[str, str]:
        """Dtype of each atom's weight: `dtype` for those that have the dtype of most values, the others keep theirs."""
        values: dict[str, int] = {}
        for atom in content.atoms.values():
            values[atom.dtype] = values.get(atom.dtype, 0) + math.prod(atom.shape)
        most = max(values, key=lambda d: values[d], default="")
        return {
            name: self.dtype if self.dtype and atom.dtype == most else atom.dtype
            for name, atom in content.atoms.items()
        }

    def with_weights_from_main(self, content: Content) -> Content:
        """The content to plan a folder with that keeps main weights: a weight of another dtype is its main weight
        rounded once, because rounding the source's rounded weight again gives other values."""
        dtypes = self.weight_dtypes(content)
        changed = (a for a in content.atoms.values() if MAIN in a.states and dtypes[a.name] != a.dtype)
        return dataclasses.replace(content, from_main=frozenset(a.name for a in changed))


@dataclass(frozen=True, kw_only=True)
class Output:
    """The plan of a folder.

    Args:
        files: written by workers, in any order.
        copies: files taken along unchanged, by their name in the folder.
        finish: makes the small files that come last, by name, in the order in which they are to be written (the last
            one makes the folder whole), from the sums of `files` and `copies`.
        step_folder: `iter_*` or `release` below OUT, into which everything goes; "" = OUT itself.
        dropped: one line for each thing of the content that this format cannot hold.
        manifest: JSON file of `finish` that is given the key `conversion` (see `job.record`); if `finish` makes no such
            file, one is written that holds nothing else.
    """

    files: tuple[OutFile, ...]
    finish: Callable[[Mapping[str, FileSums]], Mapping[str, bytes]]
    copies: Mapping[str, Path] = field(default_factory=dict)
    step_folder: str = ""
    dropped: tuple[str, ...] = ()
    manifest: str = "conversion.json"

    @property
    def nbytes(self) -> int:
        """Size of `files` [bytes]."""
        return sum(f.nbytes for f in self.files)


class Format(ABC):
    """A checkpoint format. Everything is a class method: formats have no state."""

    name: ClassVar[str]
    title: ClassVar[str]  # for a person
    has_id: ClassVar[bool] = False  # whether `facts` has an `id` that is equal for equal training states

    @classmethod
    @abstractmethod
    def recognise(cls, folder: Path) -> bool:
        """Whether a folder is of this format: a look at names and small files, never an error."""

    @classmethod
    @abstractmethod
    def open(cls, folder: Path, reading: Reading) -> Content:
        """What the folder holds. Checks structure (every tensor once, shapes, byte ranges) and reads no values.

        Raises:
            UsageError: unfinished, damaged, hostile, or of a kind that cannot be expressed; names file and tensor.
        """

    @classmethod
    def why_not_whole(cls, folder: Path) -> str | None:
        """What shows that a recognised folder was never finished, or is not all there any more, in one phrase; None
        when nothing does. Looks at names, sizes and indices, never at values."""
        return None

    @classmethod
    def facts(cls, folder: Path) -> Mapping[str, Any]:
        """Plain facts about a folder for `cpt ckpt show`, beyond what `Content` says."""
        return {}


class WritableFormat(Format):
    """A format that is written too."""

    keeps_optimizer: ClassVar[bool] = True  # whether a folder has a place for main weights and moments

    @classmethod
    @abstractmethod
    def plan(cls, content: Content, writing: Writing) -> Output:
        """The folder that holds a content in this format.

        Raises:
            UsageError: it cannot be held, or the layout does not fit the model.
        """


FORMATS: Registry[type[Format]] = Registry("checkpoint format")
