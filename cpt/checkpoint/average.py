"""Weighted averages of checkpoints of one model: the sum of w_i · theta_i, with weights w_i that sum to 1.

Summed in fp64 in an order that does not depend on the caller's, and rounded once to fp32, one tensor in memory at a
time. The unrounded main weights are taken where a checkpoint has them.

Source:
    Wortsman et al. 2022, "Model soups", arXiv:2203.05482; as proxies of training mixtures: the modular-merge ablation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cpt.base.errors import UsageError
from cpt.checkpoint import native, states
from cpt.checkpoint.manifest import Manifest
from cpt.checkpoint.torch_dist import Folder
from cpt.plan.types import to_json

if TYPE_CHECKING:
    import torch

    from cpt.engine.ports import Engine


@dataclass(frozen=True)
class Member:
    """A checkpoint and how much of it goes into an average.

    Args:
        folder: a whole native checkpoint.
        weight: at least 0; only its part of the sum of all weights counts.
    """

    folder: Path
    weight: float


class Average:
    """An average of native checkpoints, read tensor by tensor.

    Args:
        members: those with weight 0 are left out.

    Raises:
        UsageError: no weight is above 0, a checkpoint is not whole, or they are not of one model and tokenizer.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        for member in members:
            if not 0 <= member.weight < math.inf:
                raise UsageError(f"`{member.folder}` has the weight {member.weight:g}, wanted at least 0")
        total = math.fsum(m.weight for m in members)
        if total <= 0:
            raise UsageError("an average needs a checkpoint with a weight above 0")
        chosen = sorted((m for m in members if m.weight > 0), key=lambda m: (m.weight, str(m.folder)))
        opened = [native.open_folder(m.folder) for m in chosen]
        _refuse_unlike(opened)
        self._parts = [(source, m.weight / total) for m, (source, _) in zip(chosen, opened, strict=True)]

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
