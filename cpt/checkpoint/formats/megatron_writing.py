"""Plans Megatron's own folder: one `model_optim_rng.pt` for each tensor, pipeline and expert rank (see `megatron`).

The optimizer is written as an ordinary Adam has it (`plain`: each parameter's state in that file) or as the distributed
optimizer has it (`dp_reshardable`: one flat buffer a rank in `distrib_optim.pt`).
"""

from __future__ import annotations

import math
import struct
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

from cpt.base.errors import UsageError
from cpt.checkpoint import buckets, layouts, mapping, megatron_args, torch_zip
from cpt.checkpoint.arrays import OutFile, Payload, Tensor, payload
from cpt.checkpoint.content import MAIN, MODEL, MOMENTS, Content
from cpt.checkpoint.formats import Output, Writing
from cpt.checkpoint.formats.megatron_files import DISTRIBUTED, FILE, rank_folder
from cpt.checkpoint.formats.megatron_optimizer import is_decayed
from cpt.checkpoint.layouts import Held
from cpt.checkpoint.mapping import OUTPUT
from cpt.checkpoint.torch_zip import Ref
from cpt.checkpoint.unpickle import Dtype

VERSION = 3.0
FORMS = ("plain", "dp_reshardable", "none")
# Modules that have an entry `_extra_state` beside their parameters; None without FP8. Those of Transformer Engine also
# include norms of their own, and the core attention, which has no parameters.
_EXTRA = ("linear_proj", "linear_qkv", "linear_fc1", "linear_fc2", "output_layer")
_EXTRA_TE = (*_EXTRA, "q_layernorm", "k_layernorm", "pre_mlp_layernorm", "final_layernorm")
# Arguments of the source that say how its ranks shared the layers; `to_args` says it in its own way.
_RANKS = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
)
_SAMPLES = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")


def plan(content: Content, writing: Writing) -> Output:
    """The folder that holds a content.

    Raises:
        UsageError: Megatron cannot compute such a model, the layout does not fit it, or state is missing.
    """
    return _Writer(content, writing).output()


class _Writer:
    """One folder while it is planned."""

    def __init__(self, content: Content, writing: Writing) -> None:
        self.content, self.writing, self.layout = content, writing, writing.layout
        self.model = content.model
        if writing.spec not in layouts.SPECS:
            raise UsageError(
                f"`megatron` folders have no layer spec `{writing.spec}`", f"known: {', '.join(layouts.SPECS)}"
            )
        if self.layout.etp not in (None, self.layout.tp):
            raise UsageError(
                f"`megatron` folders cannot hold experts with tensor ranks of their own ({self.layout.etp}, tp "
                f"{self.layout.tp})"
            )
        self.form = self._form()
        self.padded = writing.padded_vocab_size(content)
        layouts.check(self.model, self.layout, self.padded)
        self.dtypes = writing.weight_dtypes(content)
        values: dict[str, int] = {}
        for name, atom in content.atoms.items():
            values[self.dtypes[name]] = values.get(self.dtypes[name], 0) + math.prod(atom.shape)
        self.dtype = max(values, key=lambda d: values[d])
        self.dtype_of_key = {
            key: self._one_dtype(fused.tensor) for key, fused in mapping.megatron_tensors(self.model).items()
        }
        self.apart = bool(self.model.num_experts) and self.layout.ep > 1
        self.args = self._args()
        self.dropped: list[str] = []
        self.hyper = self._hyper() if self.form != "none" else []

    def output(self) -> Output:
        files: list[OutFile] = []
        for rank in layouts.ranks(self.layout):
            files += self._rank(*rank)
        iteration = self.content.iteration
        return Output(
            files=tuple(files),
            finish=lambda sums: {},
            step_folder=f"iter_{iteration:07d}" if iteration else "release",
            dropped=(*self._dropped(), *self.dropped),
        )

    def _form(self) -> str:
        form = self.writing.optimizer or ("plain" if self.content.has_optimizer else "none")
        if form not in FORMS:
            raise UsageError(
                f"`megatron` folders have no optimizer form `{form}`",
                "`plain` is an ordinary optimizer's, `dp_reshardable` the distributed one's",
            )
        if form != "none" and not self.content.has_optimizer:
            raise UsageError(f"`{self.content.path}` holds no optimizer state, so there is none to write as `{form}`")
        return form

    def _one_dtype(self, tensor: Tensor) -> str:
        found = {self.dtypes[f.atom] for f in tensor.fills if f.atom}
        if len(found) != 1:
            raise UsageError(f"`{tensor.key}` is made of tensors of several dtypes: {', '.join(sorted(found))}")
        return next(iter(found))

    def _args(self) -> Namespace:
        """Megatron's arguments: those of the source, and over them what the model and the layout give."""
        given = dict(self.content.args or {})
        said = given.get("make_vocab_size_divisible_by")
        multiple = self.writing.vocabulary_multiple or (said if isinstance(said, int) and said > 0 else 128)
        layout = self.layout
        made = megatron_args.to_args(
            self.model,
            layout=layout,
            padded_vocab_size=self.padded,
            dtype=self.dtype,
            iteration=self.content.iteration,
            spec=self.writing.spec,
            vocabulary_multiple=multiple,
        )
        made |= {"ckpt_format": "torch", "use_distributed_optimizer": self.form == "dp_reshardable"}
        made |= {"world_size": layout.tp * layout.pp * layout.dp}
        made |= {name: None for name in _RANKS if name in given}
        made |= {name: value for name, value in self.content.common.items() if name in _SAMPLES}
        return Namespace(**given | made)

    def _hyper(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Hyperparameters with and without weight decay of each optimizer: of all parameters, or of experts apart."""
        assert self.content.optimizer is not None
        given = [dict(g) for g in self.content.optimizer.groups]
        made = []
        for experts in (False, True) if self.apart else (False,):
            own = [g for g in given if bool(g.get("is_expert_parallel")) == experts] or given
            decayed = next((g for g in own if g.get("wd_mult", 1.0) != 0), own[0] if own else {})
            rest = next((g for g in own if g.get("wd_mult", 1.0) == 0), decayed)
            pair = []
            for group, multiplier in ((decayed, decayed.get("wd_mult", 1.0) or 1.0), (rest, 0.0)):
                group = {"lr_mult": 1.0, "is_decoupled_lr": False} | group
                group |= {"wd_mult": multiplier, "is_expert_parallel": experts}
                if isinstance(group.get("betas"), list):
                    group["betas"] = tuple(group["betas"])
                pair.append(group)
            if any(g.get("is_decoupled_lr") for g in own):
                self.dropped.append("the learning rate of their own that embeddings and output layer had")
            made.append((pair[0], pair[1]))
        return made

    def _rank(self, tp: int, pp: int, ep: int) -> Iterator[OutFile]:
        """The files of a rank."""
        held = layouts.held(
            self.model,
            self.layout,
            self.padded,
            tp=tp,
            pp=pp,
            ep=ep,
            spec=self.writing.spec,
            pad_rows=self.content.pad_rows,
        )
        folder = rank_folder(self.layout, tp, pp, ep)
        storages: list[Payload | bytes] = []
        value: dict[str, Any] = {
            "args": Namespace(**vars(self.args) | {"rank": self._number(tp, pp, ep)}),
            "checkpoint_version": VERSION,
            "iteration": self.content.iteration or 0,
        }
        for chunk in range(self.layout.vp):
            name = f"model{chunk}" if self.layout.vp > 1 else "model"
            is_last = (pp, chunk) == (self.layout.pp - 1, self.layout.vp - 1)
            value[name] = self._module([h for h in held if h.chunk == chunk], is_last, storages)
        if self.form == "plain":
            value["optimizer"] = self._joined([self._plain(own, i, storages) for i, own in self._optimizers(held)])
        elif self.form == "dp_reshardable":
            value["optimizer"] = self._joined([self._shared(i) for i, _ in self._optimizers(held)])
        value |= {k: v for k, v in self.content.common.items() if k not in value}
        value |= {k if k.startswith("cpt.") else f"cpt.{k}": v for k, v in self.content.objects.items()}
        yield OutFile(f"{folder}/{FILE}", torch_zip.parts(value, storages))
        if self.form == "dp_reshardable":
            flat: list[Payload | bytes] = []
            states = [
                None if self.apart and i == 0 and ep > 0 else self._flat(own, i, pp, flat)
                for i, own in self._optimizers(held)
            ]
            yield OutFile(f"{folder}/{DISTRIBUTED}", torch_zip.parts(self._joined(states), flat))

    def _number(self, tp: int, pp: int, ep: int) -> int:
        """Of a rank among all, in Megatron's usual order: tensor ranks first, pipeline ranks last."""
        return tp + self.layout.tp * (ep + max(self.layout.dp, self.layout.ep) * pp)

    def _module(self, held: Sequence[Held], is_last: bool, storages: list[Payload | bytes]) -> OrderedDict[str, Any]:
        """The state of a chunk's module."""
        state: OrderedDict[str, Any] = OrderedDict()
        for i, h in enumerate(held):
            state[h.name] = self._ref(storages, h, MODEL)
            module = h.name.rpartition(".")[0]
            following = held[i + 1].name.rpartition(".")[0] if i + 1 < len(held) else ""
            parent, _, last = module.rpartition(".")
            if module != following and last in (_EXTRA_TE if self.writing.spec == "te" else _EXTRA):
                state[f"{module}._extra_state"] = None
                if self.writing.spec == "te" and last == "linear_proj":
                    state[f"{parent}.core_attention._extra_state"] = None
        if is_last and OUTPUT not in state:  # the tied output layer is there and has no weight of its own
            state["output_layer._extra_state"] = None
        return state

    def _optimizers(self, held: Sequence[Held]) -> list[tuple[int, list[Held]]]:
        """(number, parameters) of each optimizer."""
        if not self.apart:
            return [(0, list(held))]
        return [(i, [h for h in held if h.is_expert == bool(i)]) for i in (0, 1)]

    def _joined(self, states: Sequence[Any]) -> Any:
        return list(states) if self.apart else states[0]

    def _plain(self, held: Sequence[Held], number: int, storages: list[Payload | bytes]) -> dict[str, Any]:
        """State of an ordinary optimizer: decayed parameters in order of registration, then the others."""
        assert self.content.optimizer is not None
        step = self.content.optimizer.step
        groups, state, mains = [], {}, []
        at = 0
        for hyper, decayed in zip(self.hyper[number], (True, False), strict=True):
            members = [h for h in held if is_decayed(h) == decayed]
            groups.append(hyper | {"step": step, "params": list(range(at, at + len(members)))})
            mains.append([self._ref(storages, h, MAIN) for h in members if self._dtype_of(h) != "float32"])
            for h in members:
                of: dict[str, Any] = {}
                if self.writing.spec == "local":  # Transformer Engine's Adam counts in the groups
                    storages.append(struct.pack("<f", step))
                    of["step"] = Ref(len(storages) - 1, (), "float32")
                state[at] = of | {m: self._ref(storages, h, m) for m in MOMENTS}
                at += 1
        inner = {"state": state, "param_groups": groups}
        return inner if self.dtype == "float32" else {"optimizer": inner, "fp32_from_fp16_params": mains}

    def _shared(self, number: int) -> dict[str, Any]:
        """What the distributed optimizer keeps beside its tensors."""
        assert self.content.optimizer is not None
        step = self.content.optimizer.step
        return {"optimizer": {"param_groups": [hyper | {"step": step} for hyper in self.hyper[number]]}}

    def _flat(self, held: Sequence[Held], number: int, pp: int, storages: list[Payload | bytes]) -> dict[Any, Any]:
        """The distributed optimizer's buffers, the buckets of each joined."""
        state: dict[Any, Any] = {"buckets_coalesced": True}
        made = buckets.buffers(self.model, self.layout, held, pp=pp, dtype_of=self.dtype_of_key.__getitem__)
        for buffer in made:
            param = buffer.dtypes[0]
            known = self.content.optimizer.gradients if self.content.optimizer else {}
            grad = buckets.grad_dtype(vars(self.args), param, known)
            formed = buckets.joined(buckets.form(buffer, self.layout.bucket_numel, self.layout.dp))
            tensors: dict[str, Any] = {}
            for ours, name in buckets.STATES.items():
                source = self._source(buffer.params, ours)
                storages.append(buckets.payload(formed, 0, ours, f"optimizer {number} {name}", source=source))
                tensors[name] = Ref(len(storages) - 1, (formed.unpadded[0],), "float32")
            state[buffer.index] = {(Dtype(param), Dtype(grad)): tensors | {"numel_unpadded": formed.unpadded[0]}}
        return state

    def _ref(self, storages: list[Payload | bytes], held: Held, state: str) -> Ref:
        """A tensor with a storage of its own."""
        dtype = self._dtype_of(held) if state == MODEL else "float32"
        stored = payload(held.tensor, self._source([held], state), dtype)
        name = held.name if state == MODEL else f"{held.name} {state}"
        storages.append(Payload(name, stored.state, dtype, stored.segments))
        return Ref(len(storages) - 1, held.tensor.shape, dtype)

    def _source(self, held: Sequence[Held], state: str) -> str:
        """The content's state that a state is made from.

        A weight in another dtype is the fp32 weight of the optimizer, rounded, where that is written too: the two must
        agree after rounding.
        """
        atoms = [self.content.atoms[f.atom] for h in held for f in h.tensor.fills if f.atom]
        if state == MODEL:
            is_other = any(self.dtypes[a.name] != a.dtype for a in atoms)
            return MAIN if is_other and self.form != "none" and all(MAIN in a.states for a in atoms) else MODEL
        missing = next((a for a in atoms if state not in a.states), None)
        if missing is None:
            return state
        if state == MAIN and all(MODEL in a.states and a.dtype == "float32" for a in atoms):
            return MODEL
        raise UsageError(f"`{self.content.path}` has no `{state}` of `{missing.name}`")

    def _dtype_of(self, held: Held) -> str:
        return self.dtype_of_key[held.key]

    def _dropped(self) -> Iterator[str]:
        if self.content.has_optimizer and self.form == "none":
            yield "the optimizer's state, as asked"
        others = [f"`{name}`" for name in self.content.files if name != "config.json"]
        if others:
            yield f"{', '.join(others)}: `megatron` has no place for files of a tokenizer"
