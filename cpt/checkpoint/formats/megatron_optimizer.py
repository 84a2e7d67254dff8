"""Optimizer state of Megatron's own folders: of an ordinary optimizer, and of the distributed one.

Ordinary: `optimizer.optimizer.state[n]` by the number of the parameter in `param_groups`, fp32 weights in
`fp32_from_fp16_params` group by group (an fp32 model has none, and its `state` lies one level higher).
Distributed: flat buffers in `distrib_optim.pt`.
With expert ranks there are two optimizers in a list: of all parameters but experts, and of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpt.base.errors import UsageError
from cpt.checkpoint import arrays, bucket_search, buckets, unpickle
from cpt.checkpoint.arrays import Array
from cpt.checkpoint.content import MAIN, MOMENTS, Layout, Optimizer
from cpt.checkpoint.copies import Parts
from cpt.checkpoint.formats.megatron_files import DISTRIBUTED, Folder, Opened, Param, Rank
from cpt.checkpoint.layouts import Held
from cpt.checkpoint.mapping import EMBEDDING, OUTPUT
from cpt.checkpoint.unpickle import TensorRecord
from cpt.plan.model import ModelConfig


class OptimizerReader:
    """Gathers the optimizer state of a folder.

    Args:
        parts: takes the states.
        weights: the model's weight of (logical tensor, whether its padding rows).
        args: Megatron's arguments; what buffers say about gradients is added.
    """

    def __init__(
        self,
        folder: Folder,
        parts: Parts,
        model: ModelConfig,
        layout: Layout,
        weights: Callable[[str, bool], Array | None],
        args: dict[str, Any],
    ) -> None:
        self.folder, self.parts, self.model, self.layout = folder, parts, model, layout
        self.weights, self.args = weights, args
        self.apart = layout.ep > 1 and model.num_experts > 0
        self.steps: set[int] = set()
        self.gradients: dict[str, str] = {}
        self.groups: tuple[Mapping[str, Any], ...] = ()
        self.left_out: list[str] = []

    def read(self, ranks: Sequence[Rank], params: Sequence[Sequence[Param]]) -> Optimizer:
        """Gather the state of all ranks.

        Args:
            params: of each rank, in order of registration.

        Raises:
            UsageError: it is missing somewhere, does not fit the parameters, or is of a kind that is not converted.
        """
        there = [rank for rank in ranks if rank.opened.archive.value.get("optimizer") is not None]
        if len(there) < len(ranks):
            missing = next(rank for rank in ranks if rank not in there)
            raise UsageError(f"`{missing.file}` has no `optimizer`, `{there[0]}` has one")
        form = "plain"
        for rank, of_rank in zip(ranks, params, strict=True):
            stored = _chained(rank.opened.archive.value["optimizer"])
            if len(stored) != 1 + self.apart:
                raise UsageError(
                    f"`{rank.file}` has the state of {len(stored)} optimizers, a model with"
                    f"{'' if self.apart else 'out'} expert ranks has {1 + self.apart}"
                )
            groups: list[Mapping[str, Any]] = []
            flat: list[tuple[int, list[Param]]] = []
            for chain, one in enumerate(stored):
                of_chain = [p for p in of_rank if not self.apart or p.held.is_expert == (chain == 1)]
                what = f"`{rank.file}`, optimizer {chain}" if self.apart else f"`{rank.file}`"
                inner = one.get("optimizer", one)
                if not isinstance(inner, dict) or not isinstance(inner.get("param_groups"), list):
                    raise UsageError(f"{what}: the optimizer's state has no `param_groups`")
                groups += self._note_groups(inner["param_groups"])
                if "grad_scaler" in one:
                    self.left_out.append(f"the state of the loss scaler in `{rank}`")
                if inner.get("state"):
                    self._plain(rank, one, inner, of_chain, what)
                elif of_chain and "fp32_from_fp16_params" in one:
                    raise UsageError(f"{what}: the optimizer has no state of its parameters: it made no update yet")
                elif of_chain:
                    flat.append((chain, of_chain))
            self.groups = self.groups or tuple(groups)
            if flat:
                form = "dp_reshardable"
                self._distributed(rank, flat)
        if len(self.steps) != 1:
            said = ", ".join(map(str, sorted(self.steps))) or "no number"
            raise UsageError(
                f"`{self.folder.path}`: the optimizer's states do not say one count of updates, but {said}"
            )
        return Optimizer(step=next(iter(self.steps)), groups=self.groups, form=form, gradients=self.gradients)

    def _note_groups(self, groups: Sequence[Any]) -> list[Mapping[str, Any]]:
        found = []
        for group in groups:
            step = group.get("step")
            if isinstance(step, int | float) and step == int(step):
                self.steps.add(int(step))
            found.append(unpickle.plain({k: v for k, v in group.items() if k not in ("params", "step")}))
        return found

    def _plain(
        self,
        rank: Rank,
        outer: Mapping[str, Any],
        inner: Mapping[str, Any],
        params: Sequence[Param],
        what: str,
    ) -> None:
        """State of an ordinary optimizer: by the number of the parameter in the groups."""
        groups, state = inner["param_groups"], inner["state"]
        mains = outer.get("fp32_from_fp16_params", outer.get("fp32_from_fp16"))
        if mains is not None and len(mains) != len(groups):
            raise UsageError(f"{what}: {len(mains)} groups of fp32 weights for {len(groups)} parameter groups")
        for i, (group, members) in enumerate(zip(groups, _members(groups, state, params, what), strict=True)):
            halves = [p for p in members if p.dtype != "float32"]
            given = list(mains[i]) if mains is not None else []
            if len(given) != len(halves):
                raise UsageError(
                    f"{what}: parameter group {i} has fp32 weights of {len(given)} parameters "
                    f"(`fp32_from_fp16_params`), wanted are {len(halves)}"
                )
            main_of = iter(given)
            for number, param in zip(group["params"], members, strict=True):
                name = param.held.name
                if number not in state:
                    raise UsageError(f"{what}: the optimizer has no state of `{name}` (number {number})")
                tensors = {m: state[number].get(m) for m in MOMENTS}
                if param.dtype != "float32":
                    tensors[MAIN] = next(main_of)
                self._count(rank, state[number].get("step"))
                for key, record in tensors.items():
                    label = f"{key} of `{name}`"
                    if not isinstance(record, TensorRecord):
                        raise UsageError(f"{what}: there is no {label}")
                    buckets.require_float32(record.storage.dtype, key, f"{what}: {label}")
                    placed = rank.opened.places(record, param.held, label)
                    self.parts.add(str(rank), param.held, rank.tp, key, "float32", placed)

    def _count(self, rank: Rank, step: Any) -> None:
        """Take in a parameter's own step, a number or a tensor of one value."""
        if isinstance(step, TensorRecord):
            start = rank.opened.start(step, "`step`")
            place = arrays.Place(rank.file, start, 0, 0, 1, 0, 1)
            found = arrays.convert(self.folder.files.view(place, step.storage.dtype), step.storage.dtype, "float64")
            step = float(found[0, 0])
        if isinstance(step, int | float):
            self.steps.add(int(step))

    def _distributed(
        self,
        rank: Rank,
        chains: Sequence[tuple[int, Sequence[Param]]],
    ) -> None:
        """State of the distributed optimizer: flat buffers in a file of their own."""
        path = Path(rank.file).with_name(DISTRIBUTED)
        if not path.is_file():
            raise UsageError(
                f"`{path}` is missing: it holds the optimizer state of the distributed optimizer",
                "`--optimizer none` converts the weights alone",
            )
        opened = self.folder.open(path)
        stored = _chained(opened.archive.value)
        for chain, params in chains:
            entry = stored[chain] if chain < len(stored) else None
            if entry is None:
                if chain == 0 and rank.ep > 0:
                    continue  # saved by the first expert rank
                raise UsageError(f"`{path}` holds no state of optimizer {chain}")
            if not isinstance(entry, Mapping):
                raise UsageError(f"`{path}` does not hold a distributed optimizer's state")
            if not entry.get("buckets_coalesced"):
                raise UsageError(
                    f"`{path}` was written by Megatron of before February 2024 (no `buckets_coalesced`): not supported"
                )
            dtypes = {p.held.key: p.dtype for p in params}
            made = buckets.buffers(
                self.model, self.layout, [p.held for p in params], pp=rank.pp, dtype_of=dtypes.__getitem__
            )
            numbers = sorted(k for k in entry if isinstance(k, int))
            if len(numbers) != len(made):
                raise UsageError(f"`{path}` has {len(numbers)} gradient buffers, the model on `{rank}` has {len(made)}")
            for buffer, number in zip(made, numbers, strict=True):
                what = f"`{path}`, buffer {number}"
                flats = _flats(opened, entry[number], buffer, what)
                self._note_gradients(entry[number])
                try:
                    slots = bucket_search.search(buffer, flats, self.weights, self.folder.files, what)
                except UsageError:
                    self.folder.refuse_damaged(rank.file, opened.file)
                    raise
                for slot in slots:
                    for state, flat in flats.items():
                        placed = [(a, p, q) for _, a, p, q in buckets.places([slot], 0, flat)]
                        self.parts.add(str(rank), slot.held, rank.tp, state, flat.dtype, placed)

    def _note_gradients(self, entry: Mapping[Any, Any]) -> None:
        """Keep what dtype gradients had, and let the arguments say it too, where they do not."""
        ((dtypes, _),) = entry.items()
        self.gradients.setdefault(str(dtypes[0]), str(dtypes[1]))
        if self.args.get("accumulate_allreduce_grads_in_fp32") is None and str(dtypes[0]) == "bfloat16":
            self.args.setdefault("grad_reduce_in_bf16", str(dtypes[1]) == "bfloat16")


def _chained(value: Any) -> list[Any]:
    """State of one or of several optimizers as a list."""
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, dict) and value and all(isinstance(k, int) for k in value):
        return [value[k] for k in sorted(value)]
    return [value]


def _flats(opened: Opened, entry: Any, buffer: buckets.Buffer, what: str) -> dict[str, buckets.Flat]:
    """The flat tensors of a buffer by state."""
    if not isinstance(entry, dict) or len(entry) != 1:
        raise UsageError(f"{what} has several dtypes, which is not supported")
    ((dtypes, tensors),) = entry.items()
    if str(dtypes[0]) != buffer.dtypes[0]:
        raise UsageError(f"{what} is of {dtypes[0]} parameters, the model's are {buffer.dtypes[0]}")
    flats = {}
    for state, name in buckets.STATES.items():
        record = tensors.get(name)
        if not isinstance(record, TensorRecord) or len(record.size) != 1:
            raise UsageError(f"{what}: `{name}` is not a flat tensor")
        buckets.require_float32(record.storage.dtype, state, f"{what}: `{name}`")
        numel = int(tensors.get("numel_unpadded", record.size[0]))
        if record.size[0] < numel:
            raise UsageError(f"{what}: `{name}` has {record.size[0]:,} values, `numel_unpadded` is {numel:,}")
        start = opened.start(record, f"`{name}`")
        flats[state] = buckets.Flat("float32", numel, (buckets.Piece(0, numel, opened.file, start),))
    return flats


def is_decayed(held: Held) -> bool:
    """Whether Megatron applies weight decay to a parameter: neither to vectors nor to biases."""
    return len(held.tensor.shape) > 1 and not held.key.endswith(".bias")


def _members(groups: Sequence[Any], state: Mapping[Any, Any], params: Sequence[Param], what: str) -> list[list[Param]]:
    """Parameters of each group, in the order of registration.

    Groups do not name them: what they are told apart by is in the groups (weight decay, experts, a learning rate of
    their own for embeddings), and numbers and shapes of the states must agree.

    Raises:
        UsageError: they do not.
    """

    def decays(held: Held, norms: bool) -> bool:
        return is_decayed(held) or (norms and "_layernorm." in held.key and "self_attention" in held.key)

    def kind(group: Any) -> tuple[bool, bool, bool]:
        given = group.get("wd_mult")
        if given is None:
            shapes = [_shape(state, number) for number in group["params"]]
            decayed = any(len(shape) > 1 for shape in shapes)
        else:
            decayed = given != 0
        return decayed, bool(group.get("is_expert_parallel")), bool(group.get("is_decoupled_lr"))

    kinds = [kind(g) for g in groups]
    experts, decoupled = any(k[1] for k in kinds), any(k[2] for k in kinds)

    def divided(rule: int) -> list[list[Param]]:
        made: list[list[Param]] = [[] for _ in groups]
        for param in params:
            held = param.held
            edge = decoupled and held.key in (EMBEDDING, OUTPUT)
            own = (decays(held, rule == 1) or rule == 2, experts and held.is_expert, edge)
            if own in kinds:
                made[kinds.index(own)].append(param)
        return made

    for rule in range(3):  # as Megatron does; with `apply_wd_to_qk_layernorm`; all parameters in one group
        made = divided(rule)
        if all(
            [p.held.tensor.shape for p in members] == [_shape(state, n) for n in group["params"]]
            for group, members in zip(groups, made, strict=True)
        ):
            return made
    counts = ", ".join(str(len(g["params"])) for g in groups)
    raise UsageError(
        f"{what}: the optimizer's groups have {counts} parameters, the model's {len(params)} do not divide like that "
        "by weight decay and shape"
    )


def _shape(state: Mapping[Any, Any], number: Any) -> tuple[int, ...]:
    """Shape of a parameter as its first moment shows."""
    moment = state.get(number, {}).get(MOMENTS[0])
    return tuple(moment.size) if isinstance(moment, TensorRecord) else ()
