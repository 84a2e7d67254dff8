"""Weighted averages of checkpoints of one model: the sum of w_i · theta_i, with weights w_i that sum to 1.

Summed in fp64 in an order that does not depend on the caller's, and rounded once to fp32. The unrounded main weights
are taken where a checkpoint has them. Two ways: `Average` puts native checkpoints into an engine, one tensor in memory
at a time; `content` averages checkpoints of any formats as a content whose values are formed when they are read.

Source:
    Wortsman et al. 2022, "Model soups", arXiv:2203.05482; as proxies of training mixtures: the modular-merge ablation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cpt.base.errors import UsageError
from cpt.base.records import to_json
from cpt.checkpoint import manifest as manifests
from cpt.checkpoint import master, native, states
from cpt.checkpoint.arrays import Array, Files, Mean
from cpt.checkpoint.content import MAIN, MODEL, Atom, Content
from cpt.checkpoint.manifest import Manifest
from cpt.checkpoint.torch_dist import Folder
from cpt.data.tokenizer import tokenizer_hash

if TYPE_CHECKING:
    import torch

    from cpt.engine.ports import Engine


@dataclass(frozen=True)
class Member:
    """A checkpoint and how much of it goes into an average.

    Args:
        folder: a whole checkpoint.
        weight: at least 0; only its part of the sum of all weights counts.
    """

    folder: Path
    weight: float


def shares(members: Sequence[Member]) -> list[Member]:
    """Members in the order in which they are summed, their weights summing to 1; those of weight 0 are left out.

    Raises:
        UsageError: a weight is not a number of at least 0, or none is above 0.
    """
    for member in members:
        if not 0 <= member.weight < math.inf:
            raise UsageError(
                f"`{member.folder}` has the weight {member.weight:g}, wanted is a finite number of at least 0"
            )
    try:
        total = math.fsum(m.weight for m in members)
    except OverflowError:
        raise UsageError("the weights of an average are too large: their sum is no number") from None
    if total <= 0:
        raise UsageError("an average needs a checkpoint with a weight above 0")
    chosen = sorted((m for m in members if m.weight > 0), key=lambda m: (m.weight, str(m.folder)))
    return [replace(m, weight=m.weight / total) for m in chosen]


class Average:
    """An average of native checkpoints, read tensor by tensor.

    Args:
        members: those with weight 0 are left out.

    Raises:
        UsageError: no weight is above 0, a checkpoint is not whole, or they are not of one model and tokenizer.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        chosen = shares(members)
        opened = [native.open_folder(m.folder) for m in chosen]
        _refuse_unlike(opened)
        self._parts = [(source, m.weight) for m, (source, _) in zip(chosen, opened, strict=True)]

    def load(self, engine: Engine) -> None:
        """Put the average into an engine of the same model at any layout, main weights included. Called by all ranks.

        Raises:
            UsageError: the engine is of another model.
        """
        import torch

        from cpt.checkpoint.ranks import Ranks
        from cpt.engine import megatron

        ranks = Ranks()
        with ranks.together():
            all_places, _ = states.places(engine)
            for source, _ in self._parts:
                for place in all_places:
                    native.check_shape(source, place)
        with ranks.together(), torch.no_grad():
            for place in all_places:
                parameter = place.parameter.detach()

                def read(source: Folder, place: states.Place = place) -> torch.Tensor:
                    part = torch.empty(place.parameter.shape, dtype=torch.float32)
                    native.read_weight(source, place, part)
                    return part

                parameter.copy_(self._sum(read))
        megatron.refresh_main_weights(engine)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Megatron name with one key a layer, whole fp32 tensor) of the average.

        One process, no process group, no Megatron.

        Raises:
            UsageError: the checkpoints do not hold the same tensors.
        """
        where = {source: dict(native.stored(source)) for source, _ in self._parts}
        names = list(where[self._parts[0][0]])
        for source, there in where.items():
            if odd := sorted(set(names) ^ set(there)):
                raise UsageError(f"`{source.path}` and `{self._parts[0][0].path}` differ in the tensor `{odd[0]}`")
        for name in names:

            def read(source: Folder, name: str = name) -> torch.Tensor:
                return where[source][name].read(source, main=True)

            yield name, self._sum(read)

    def _sum(self, read: Callable[[Folder], torch.Tensor]) -> torch.Tensor:
        """The weighted sum of what `read` gives, in fp32."""
        import torch

        if len(self._parts) == 1:
            return read(self._parts[0][0]).to(torch.float32)
        found: torch.Tensor | None = None
        for source, weight in self._parts:
            part = read(source).to(torch.float64).mul_(weight)
            found = part if found is None else found.add_(part)
        assert found is not None
        return found.to(torch.float32)


def _refuse_unlike(opened: Sequence[tuple[Folder, Manifest | None]]) -> None:
    """All of one shape, over one vocabulary; a foreign checkpoint does not say."""
    first: tuple[Path, object, str | None] | None = None
    for source, manifest in opened:
        if manifest is None:
            continue
        shape, tokenizer = to_json(manifest.model), manifest.origin.tokenizer_hash
        del shape["hf_config"]
        if first is None:
            first = (source.path, shape, tokenizer)
        elif first[1:] != (shape, tokenizer):
            what = "model shapes" if first[1] != shape else "tokenizers"
            raise UsageError(
                f"`{source.path}` and `{first[0]}` have different {what}", "only weights of one model can be averaged"
            )


# Fields of a model that do not change what it computes: formats say them differently, or not at all.
_NO_MATTER = ("hf_config", "init_std", "max_position_embeddings")


def content(members: Sequence[tuple[Content, float]], files: Files) -> Content:
    """The average of opened checkpoints of any formats: weights only, formed block by block when they are read.

    Main weights are taken where there are some, after the master test. Configuration and tokenizer are those of the
    first member.

    Args:
        members: checkpoints and how much of each goes in, see `Member`; those with weight 0 are left out.

    Raises:
        UsageError: they are not of one family, shape and tokenizer, or a main weight is not its model weight.
    """
    opened = {str(c.path): c for c, _ in members}
    chosen = [(opened[str(m.folder)], m.weight) for m in shares([Member(c.path, w) for c, w in members])]
    used = [c for c, _ in members if any(c is one for one, _ in chosen)]
    first = used[0]
    for other in used[1:]:
        _refuse_other_model(first, other)
    for one in used:
        if wrong := master.check(one, files):
            refused = master.refuse(one, wrong)
            raise UsageError(
                refused.message,
                refused.hints[0],
                f"`cpt convert-ckpt {one.path} OUT --optimizer none` keeps its weights, which can be averaged",
            )
    with_pad = all(c.atoms[n].pad_rows == a.pad_rows for c in used for n, a in first.atoms.items())
    atoms = {}
    for name, atom in first.atoms.items():
        dtypes = {c.atoms[name].dtype for c in used}
        dtype = atom.dtype if len(dtypes) == 1 else "float32"
        made = {MODEL: _mean([(w, _unrounded(c.atoms[name].states)) for c, w in chosen])}
        pad = {MODEL: _mean([(w, _unrounded(c.atoms[name].pad)) for c, w in chosen])} if with_pad and atom.pad else {}
        atoms[name] = Atom(name=name, shape=atom.shape, dtype=dtype, states=made, pad=pad)
    dropped = [f"the optimizer's state of `{c.path}`" for c in used if c.has_optimizer]
    crcs: dict[str, tuple[tuple[int, int, int], ...]] = {}
    for one in used:
        crcs |= {str(one.path / file): sums for file, sums in one.crc32.items()}
    return Content(
        format=first.format,
        path=first.path,
        model=first.model,
        atoms=atoms,
        padded_vocab_size=first.padded_vocab_size if with_pad else None,
        args=first.args,
        files=first.files,
        layout=first.layout,
        left_out=tuple(dropped),
        crc32=crcs,
    )


def is_finite(content: Content, atom: str, row: int, column: int, files: Files, *, pad: bool = False) -> bool:
    """Whether a value that a member gives to an average is neither NaN nor infinite."""
    one, value = content.atoms[atom], np.empty((1, 1))
    files.read(_unrounded(one.pad if pad else one.states), row, column, value, "float64")
    return bool(np.isfinite(value).all())


def _unrounded(states: Mapping[str, Array]) -> Array:
    return states[MAIN] if MAIN in states else states[MODEL]


def _mean(parts: list[tuple[float, Array]]) -> Array:
    """The weighted sum of arrays; of one alone, that array."""
    return parts[0][1] if len(parts) == 1 else Mean("float32", parts[0][1].shape, (), tuple(parts))


def _refuse_other_model(first: Content, other: Content) -> None:
    one, two = (to_json(c.model) for c in (first, other))
    for field in one:
        if field not in _NO_MATTER and one[field] != two.get(field):
            raise UsageError(
                f"`{first.path}` and `{other.path}` have different model shapes: `{field}` is {one[field]} and "
                f"{two.get(field)}",
                "only weights of one model can be averaged",
            )
    if odd := sorted({*first.atoms} ^ {*other.atoms}):
        raise UsageError(f"`{first.path}` and `{other.path}` differ in the tensor `{odd[0]}`")
    hashes = [_tokenizer(c.path) for c in (first, other)]
    if None not in hashes and hashes[0] != hashes[1]:
        raise UsageError(
            f"`{first.path}` and `{other.path}` have different tokenizers", "only weights of one model can be averaged"
        )


def _tokenizer(folder: Path) -> str | None:
    """Hash of a checkpoint's tokenizer, where it says so."""
    if (folder / manifests.NAME).is_file():
        return manifests.read(folder).origin.tokenizer_hash
    return tokenizer_hash(folder) if (folder / "tokenizer.json").is_file() else None
