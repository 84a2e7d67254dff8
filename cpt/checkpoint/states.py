"""The logical tensors of an engine: every parameter with its fp32 main weight and moments, in the model's own shapes.

The distributed optimizer keeps these as flat pieces of padded buckets, spread over the dp ranks. megatron-core's own
way back into model shapes (`fully_reshardable`) loses its place when a bucket before the last ends in padding
(megatron-core 0.15 to 0.19.2). Here places are never counted: a parameter's slice is looked up in the buffer's own
index, and the gathered bucket keeps its padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from cpt.engine.ports import Engine

STATES = ("param", "exp_avg", "exp_avg_sq")  # fp32 main weight, moments
PREFIX = "optimizer.state."
_SLAB = 16 << 20  # elements gathered at a time from each dp rank (64 MiB)


@dataclass(frozen=True)
class Place:
    """One parameter of this rank and where it lies in the whole model.

    `entry` is megatron-core's ShardedTensor, or a factory of several (gate and up of a gated MLP).
    """

    entry: Any
    parameter: torch.Tensor

    @property
    def key(self) -> str:
        return self.entry.key

    @property
    def is_main_copy(self) -> bool:
        """Whether, dp apart, this copy is saved (norms are on all tp ranks, tied embeddings on two stages)."""
        return all(i == 0 for i in self.entry.replica_id[:-1])

    def pieces(self, data: torch.Tensor, prefix: str = "") -> list[Any]:
        """`data`, of the parameter's shape, as ShardedTensors that are views of it."""
        from megatron.core.dist_checkpointing.dict_utils import nested_values
        from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

        change: dict[str, Any] = {"key": prefix + self.entry.key, "data": data}
        if isinstance(self.entry, ShardedTensorFactory):
            built = replace(self.entry, **change).build()
            return list(nested_values(built)) if isinstance(built, dict | list) else [built]
        return [replace(self.entry, dtype=data.dtype, **change)]

    @property
    def is_vocabulary(self) -> bool:
        """Whether the first axis is the padded vocabulary, whose length depends on tp."""
        return bool(getattr(self.entry, "allow_shape_mismatch", False))


def places(engine: Engine) -> tuple[list[Place], dict[str, Any]]:
    """All parameters of this rank, and the objects that Megatron expects beside them (by record name, main copies)."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import (
        ShardedObject,
        ShardedTensor,
        ShardedTensorFactory,
        is_main_replica,
    )

    found, objects = [], {}
    for chunk in engine.bare_chunks():
        model: Any = chunk
        for entry in nested_values(model.sharded_state_dict(metadata=sharding_metadata())):
            if isinstance(entry, ShardedTensor | ShardedTensorFactory):
                found.append(Place(entry, entry.data))
            elif isinstance(entry, ShardedObject) and is_main_replica(entry.replica_id):
                objects[entry.unique_key] = entry.data
    return found, objects


def sharding_metadata() -> dict[str, Any]:
    """Which of megatron-core's spellings is written: layers stacked, gate and up in one tensor."""
    from megatron.core import parallel_state

    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def owners(all_places: Sequence[Place], dp: int) -> list[int]:
    """The dp rank that writes each parameter: largest first, each to the least loaded."""
    load = [0] * dp
    chosen = [0] * len(all_places)
    for i in sorted(range(len(all_places)), key=lambda i: (-all_places[i].parameter.numel(), i)):
        if all_places[i].is_main_copy:
            chosen[i] = load.index(min(load))
            load[chosen[i]] += all_places[i].parameter.numel()
    return chosen


def step_of(engine: Engine) -> int:
    """Updates that the optimizer has made."""
    from cpt.engine.optimizer import parts

    steps = [0]
    for part in parts(engine.optimizer):
        steps += [int(group["step"]) for group in part.optimizer.param_groups if group.get("step") is not None]
        steps += [int(state["step"]) for state in part.optimizer.state.values() if "step" in state]
    return max(steps)


def set_step(engine: Engine, step: int) -> None:
    """Let the optimizer go on counting from `step`."""
    import torch

    from cpt.engine.optimizer import parts

    for part in parts(engine.optimizer):
        for group in part.optimizer.param_groups:
            if isinstance(group.get("step"), torch.Tensor):
                group["step"].fill_(step)
            else:
                group["step"] = step
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"].fill_(step)


def hyperparameters(engine: Engine) -> list[dict[str, Any]]:
    """The optimizer's parameter groups without their parameters, plain values only."""
    groups = []
    for group in engine.optimizer.param_groups if engine.optimizer is not None else []:
        plain = {k: v for k, v in group.items() if k != "params"}
        plain = {k: v for k, v in plain.items() if v is None or isinstance(v, bool | int | float | str | tuple | list)}
        plain["step"] = step_of(engine)
        groups.append(plain)
    return groups


@dataclass(frozen=True)
class Local:
    """What this rank's optimizer holds of a parameter: elements `start` to `end` of it, flat. Tensors are live."""

    start: int
    end: int
    states: dict[str, torch.Tensor]


def local_states(engine: Engine) -> Iterator[tuple[torch.Tensor, Local]]:
    """(parameter, live optimizer tensors) of what this rank's optimizers hold."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from cpt.engine.optimizer import parts

    for part in parts(engine.optimizer):
        if isinstance(part, DistributedOptimizer):
            for parameter, (group, order) in part.model_param_group_index_map.items():
                main = part.optimizer.param_groups[group]["params"][order]
                span = part._get_model_param_range_map(parameter)["param"]
                yield parameter, Local(span.start, span.end, _states(part.optimizer, main))
        else:
            pairs = _pairs(part)
            for parameter, main in pairs:
                yield parameter, Local(0, parameter.numel(), _states(part.optimizer, main))


def _pairs(part: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(parameter, main weight) of an optimizer that is not distributed."""
    if not hasattr(part, "float16_groups"):
        return [(p, p) for group in part.optimizer.param_groups for p in group["params"]]
    pairs = []
    for model_group, main_group in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
        pairs += list(zip(model_group, main_group, strict=True))
    return pairs + [(p, p) for group in part.fp32_from_fp32_groups for p in group]


def _states(optimizer: Any, main: torch.Tensor) -> dict[str, torch.Tensor]:
    """Main weight and moments as flat live views; moments that do not exist yet are made, zero."""
    import torch

    state = optimizer.state[main]
    for name in STATES[1:]:
        if name not in state:
            state[name] = torch.zeros_like(main, dtype=torch.float32)
    return {"param": main.detach().view(-1), **{name: state[name].view(-1) for name in STATES[1:]}}


def gather(engine: Engine, all_places: Sequence[Place], chosen: Sequence[int]) -> dict[int, dict[str, torch.Tensor]]:
    """Main weight and moments in model shape of the parameters that this rank writes, on the CPU, by index of place.

    Collective over the dp ranks. Memory: this rank's share plus one slab from each dp rank.
    """
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from cpt.engine.optimizer import parts

    rank = _dp_group().rank()
    index = {id(p.parameter): i for i, p in enumerate(all_places)}
    mine = {i for i, p in enumerate(all_places) if p.is_main_copy and chosen[i] == rank}
    out: dict[int, dict[str, torch.Tensor]] = {}

    def blank(i: int) -> dict[str, torch.Tensor]:
        return {s: torch.empty(all_places[i].parameter.shape, dtype=torch.float32) for s in STATES}

    held = {id(parameter): local for parameter, local in local_states(engine)}
    for part in parts(engine.optimizer):
        if not isinstance(part, DistributedOptimizer):
            continue
        for buffer in part.buffers:
            for bucket in buffer.buckets:
                spans = [(p, *(n - bucket.offset for n in buffer.param_index_map[p][:2])) for p in bucket.params_list]
                wanted = []
                for parameter, start, end in spans:
                    i = index[id(parameter)]
                    if i in mine:
                        out[i] = blank(i)
                        wanted.append((i, start, end))
                _gather_bucket(part, bucket, spans, held, wanted, out)
    for i in mine - out.keys():
        local = held.get(id(all_places[i].parameter))
        if local is not None:
            out[i] = blank(i)
            for name in STATES:
                out[i][name].view(-1).copy_(local.states[name])
    return out


def _dp_group() -> Any:
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _gather_bucket(
    part: Any,
    bucket: Any,
    spans: Sequence[tuple[torch.Tensor, int, int]],
    held: dict[int, Local],
    wanted: Sequence[tuple[int, int, int]],
    out: dict[int, dict[str, torch.Tensor]],
) -> None:
    """Exchange one bucket of a distributed optimizer, slab by slab, and copy what is wanted into `out`.

    Args:
        spans: (parameter, start, end) of all parameters in the bucket [elements of the bucket].
        wanted: (index of place, start, end) of those that this rank writes.
    """
    import torch
    import torch.distributed as dist

    group = part.data_parallel_group
    size, rank = group.size(), group.rank()
    share = bucket.grad_data.numel() // size
    first = rank * share
    flat = torch.zeros(share, dtype=torch.float32, device=bucket.grad_data.device)
    for name in STATES:
        for parameter, start, _ in spans:
            local = held.get(id(parameter))
            if local is not None:
                begin = start + local.start - first
                flat[begin : begin + local.end - local.start].copy_(local.states[name])
        for low in range(0, share, _SLAB):
            high = min(low + _SLAB, share)
            slabs = [torch.empty(high - low, dtype=torch.float32, device=flat.device) for _ in range(size)]
            dist.all_gather(slabs, flat[low:high].contiguous(), group=group)
            for other, slab in enumerate(slabs):
                at, until = other * share + low, other * share + high
                for i, start, end in wanted:
                    a, b = max(at, start), min(until, end)
                    if a < b:
                        out[i][name].view(-1)[a - start : b - start].copy_(slab[a - at : b - at])
