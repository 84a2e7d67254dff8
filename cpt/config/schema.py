"""Every key a person may set, with its type, unit, default and help. The one place that says so.

The tree is made of `Key` (a value), `Section` (fixed keys), `Named` (names that a person chooses: sources, stages) and
`Part` (a registered class picked by name, with its own options). Reading, unknown-key errors, `cpt recipes show` and
suggestions walk this tree.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cpt.base.registry import Registry
from cpt.config import kinds
from cpt.config.kinds import Kind
from cpt.plan.types import KEEP

REQUIRED = "required"  # default of a key that must be given


@dataclass(frozen=True)
class Key:
    """A value. `default` is what the plan uses when the key is not given; `shown` is that for people."""

    kind: Kind
    help: str
    default: Any = None
    shown: str = ""
    refill: str = ""  # what to write for it on the command line, when it is left to the person


@dataclass(frozen=True)
class Section:
    """Fixed keys. `short` is the key that a plain value stands for: `lr: wsd` means `lr: {schedule: wsd}`."""

    help: str
    keys: Mapping[str, Node]
    short: str | None = None
    replace: bool = False  # a mapping on the command line replaces the one in the recipe
    optional: bool = False  # `null` takes the section away


@dataclass(frozen=True)
class Named:
    """A mapping by names that a person chooses. `what` is what a name stands for."""

    help: str
    what: str
    item: Section


@dataclass(frozen=True)
class Part:
    """A registered class picked by the key `select`, and that class's own options."""

    help: str
    select: str
    registry: Callable[[], Registry[Any]]
    default: str | None = None
    extra: Mapping[str, Key] = field(default_factory=dict)
    replace: bool = False

    @property
    def short(self) -> str:
        """A plain value picks the class."""
        return self.select


Node = Key | Section | Named | Part


def _schedules() -> Registry[Any]:
    from cpt.schedules import SCHEDULES

    return SCHEDULES


def _launchers() -> Registry[Any]:
    from cpt.launch import LAUNCHERS

    return LAUNCHERS


def _methods() -> Registry[Any]:
    from cpt.methods import METHODS

    return METHODS


OPTIMIZER = Section(
    "AdamW",
    {
        "betas": Key(kinds.numbers(2, 0.0, 1.0), "decay of the two moments", (0.9, 0.95)),
        "eps": Key(kinds.number(above=0), "added to the root of the second moment", 1e-8),
        "weight_decay": Key(kinds.number(0), "decoupled weight decay", 0.1),
        "clip": Key(kinds.number(0), "largest global gradient norm; 0 clips nothing", 1.0),
    },
)

PARALLEL = Section(
    "how the model is laid out over devices; changes the speed, not the result",
    {
        "tp": Key(kinds.integer(1, unit="devices"), "tensor parallel size: each layer is cut into so many parts", 1),
        "pp": Key(kinds.integer(1, unit="devices"), "pipeline parallel size: layers are dealt out to so many parts", 1),
        "dp": Key(
            kinds.auto(kinds.integer(1)), "copies of the model; `auto` uses all devices of the launcher", kinds.AUTO
        ),
        "vp": Key(kinds.integer(1), "model parts per pipeline rank (interleaved schedule)", 1),
        "layers": Key(
            kinds.optional(kinds.integers),
            "layers in each pipeline part, for an uneven split",
            None,
            "even if possible",
        ),
        "sequence_parallel": Key(kinds.flag, "cut activations outside of matrices over tp as well", False),
        "distributed_optimizer": Key(kinds.flag, "cut optimizer state over dp", True),
        "overlap_grad_reduce": Key(kinds.flag, "reduce gradients while the backward pass runs", False),
    },
)

ANOMALIES = Section(
    "what is done about a NaN or a loss spike; the step is named in any case",
    {
        "nan": Key(kinds.choice("skip", "stop"), "skip the update, or stop the run", "skip"),
        "spike": Key(
            kinds.choice("warn", "skip", "stop", "rollback"),
            "warn, skip the update, stop the run, or go back without the samples of the last `window` updates",
            "warn",
        ),
        "spike_factor": Key(kinds.number(above=1), "a spike is a loss above this many times the running mean", 3.0),
        "window": Key(kinds.integer(2, unit="steps"), "steps of the running mean", 50),
        "max_skips": Key(
            kinds.integer(1, unit="steps"), "more skipped steps in a row, or more rollbacks, stop the run", 10
        ),
    },
)

EVALUATE = Section(
    "validation losses, before the first step, during and after the stage",
    {
        "every": Key(
            kinds.optional(kinds.count()), "also measure every so many tokens", None, "at the stage's start and end"
        ),
        "sources": Key(kinds.optional(kinds.names()), "what is measured", None, "every source with held-out text"),
        "tokens": Key(kinds.count(), "validation tokens per source, at most", 131_072),
        "at_start": Key(
            kinds.auto(kinds.flag),
            "measure before the first step",
            kinds.AUTO,
            "yes, unless the end of another stage of the run was measured just before",
        ),
    },
)

RETAIN = Section(
    "which checkpoints stay",
    {
        "last": Key(kinds.integer(1, unit="checkpoints"), "so many of the newest", 2),
        "every": Key(kinds.optional(kinds.count()), "and one every so many tokens", None, "no others"),
        "stage_ends": Key(kinds.flag, "and the one at the end of each stage", True),
    },
)

CHECKPOINT = Section(
    "when checkpoints are written; at the end of a stage in any case",
    {
        "every": Key(kinds.optional(kinds.count()), "write one every so many tokens", None, "at the stage's end only"),
        "retain": RETAIN,
        "asynchronous": Key(kinds.flag, "go on training while a checkpoint is written", False),
    },
)

TRAIN_KEYS: dict[str, Node] = {
    "seq_length": Key(kinds.integer(2, unit="tokens"), "length of a training sequence", REQUIRED),
    "global_batch_size": Key(kinds.integer(1, unit="sequences"), "sequences in one optimizer step", REQUIRED),
    "micro_batch_size": Key(
        kinds.integer(1, unit="sequences"), "sequences in one forward pass on one copy of the model", 1
    ),
    "seed": Key(kinds.integer(0, 2**31 - 1), "of the sample order and of new weights", 1234),
    "precision": Key(
        kinds.choice("fp32", "bf16"), "of weights and activations; optimizer and main weights are fp32", "bf16"
    ),
    "optimizer": OPTIMIZER,
    "parallel": PARALLEL,
    "recompute": Key(
        kinds.choice("none", "selective", "full"), "activations that the backward pass computes again", "none"
    ),
    "evaluate": EVALUATE,
    "anomalies": ANOMALIES,
    "broken_import_guard": Key(
        kinds.flag, "stop when the first loss of an imported base is above 0.8 · ln(vocabulary)", True
    ),
    "log_every": Key(kinds.integer(1, unit="steps"), "steps between two lines of the log", 1),
}

LR = Part("the learning rate", "schedule", _schedules, replace=True, extra={
    "counter": Key(kinds.choice("stage", "run"), "count steps from the stage's start, or from the start of the stages "
                   "that the lr has been kept through", "stage"),
})  # fmt: skip

REPLAY = Section(
    "a share of the stage's tokens from what was trained on before",
    {
        "share": Key(kinds.share, "of all tokens of the stage; 0 is no replay", REQUIRED),
        "from": Key(kinds.text, "whose data is read again: `base`, `parent` or a stage", "parent"),
        "sources": Key(
            kinds.optional(kinds.weights), "shares inside the replay part", None, "the mixture of the stage in `from`"
        ),
        "account": Key(
            kinds.choice("equal_compute", "additive"),
            "equal_compute: inside the stage's tokens; additive: on top of them",
            "equal_compute",
        ),
    },
    short="share",
    replace=True,
    optional=True,
)

STOP_IF = Section(
    "a guard: end the run, saved, when a source has become worse",
    {
        "source": Key(kinds.name, "whose validation loss is watched", REQUIRED),
        "loss_rises": Key(kinds.share, "rise against the stage's start that is still allowed", REQUIRED),
    },
    optional=True,
)

STAGE_KEYS: dict[str, Node] = {
    "kind": Key(kinds.name, "what the stage does: train, convert, evaluate, law", "train"),
    "from": Key(
        kinds.text,
        "where it starts: base, a stage, `stage@12000` (a step), `stage@pre_anneal`, a run or checkpoint folder",
        REQUIRED,
    ),
    "keep": Key(kinds.names(*KEEP), "what is kept of that; must be given unless the stage starts from scratch", ()),
    "tokens": Key(kinds.count(), "length of the stage", REQUIRED),
    "mixture": Key(kinds.weights, "shares of the tokens that are not replay; normalised", REQUIRED),
    "replay": REPLAY,
    "lr": LR,
    "methods": Key(kinds.free, "further ways to continue pretraining, by name", {}, "none"),
    "stop_if": STOP_IF,
    "checkpoint": CHECKPOINT,
}

LAW_RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Keys of a law stage as a person writes them; `config/laws.py` makes proxies and options of `stages/law.py` of them.
LAW_KEYS: dict[str, Node] = {
    "from": Key(kinds.text, "where proxies of the run's own size start", None, "where the stage in `for` starts"),
    "for": Key(kinds.name, "the train stage whose mixture is wanted", None, "the stage that takes a value of the law"),
    "law": Key(kinds.name, "which law; `auto` takes the one with the smallest held-out error", None,
               "dcpt; mixing for mixtures of several sources, and for weight averages"),
    "domain": Key(kinds.weights, "sources of the domain; `ratio` is their share", None,
                  "the mixture of the stage in `for`"),
    "general": Key(kinds.weights, "the other sources", None, "what the stage in `for` replays, or all others"),
    "ratios": Key(kinds.shares, "domain shares of the proxies, one proxy each", LAW_RATIOS),
    "mixtures": Key(kinds.mixtures, "whole mixtures of the proxies, instead of `ratios`", (), "none"),
    "runs": Key(kinds.optional(kinds.integer(3, 1000)), "so many mixtures spread over all sources, instead of `ratios`",
                None, "none"),
    "tokens": Key(kinds.count(), "length of one proxy", REQUIRED),
    "every": Key(kinds.optional(kinds.count()), "measure a proxy every so many tokens", None,
                 "a sixth of `tokens`; for `mixing` at its end only"),
    "bases": Key(kinds.texts, "further checkpoints of other sizes that proxies start from", (), "none"),
    "lr": Section(
        "lr of the proxies: constant after a warmup, so that each measurement is one of a finished run",
        {
            "peak": Key(kinds.number(above=0), "held after the warmup", None, "the peak of the stage in `for`"),
            "warmup": Key(kinds.text, "length of the rise", "5%"),
        },
        short="peak",
        replace=True,
    ),
    "train": Section("what proxies do otherwise than the stage in `for`, such as their layout or batch",
                     {k: v for k, v in TRAIN_KEYS.items() if k not in ("evaluate", "seed")}),
    "seed": Key(kinds.integer(0, 2**31 - 1), "of the sample order of proxies, of starts and resamples", None,
                "that of the stage in `for`"),
    "tolerance": Key(kinds.optional(kinds.part), "rise of the general loss above the base's that is allowed", None,
                     "5%, unless `eps_g` is given; of a `file` its own"),
    "eps_g": Key(kinds.optional(kinds.number(0, unit="nats/token")), "the same as an amount", None, "none"),
    "max_cost": Key(kinds.part, "most that the proxies may cost, as a part of the compute of the stage in `for` and of "
                    "those that come from it", 0.35),
    "how": Key(kinds.choice("runs", "merge"), "runs: a proxy for each mixture; merge: one for each source, whose "
               "averaged weights stand for mixtures", "runs"),
    "file": Key(kinds.optional(kinds.text), "a saved law, instead of proxies", None, "none"),
    "data": Key(kinds.optional(kinds.text), "a table of finished runs, instead of proxies", None, "none"),
    "draws": Key(kinds.integer(0, 10_000), "bootstrap resamples", 200),
}  # fmt: skip
# Options of a law stage that come from other keys, or from the plan.
_LAW_FOUND = (
    "target", "target_tokens", "target_params", "target_decays", "real_flops", "warmup", "content", "answer", "doubts",
)  # fmt: skip

SOURCE = Section(
    "a corpus",
    {
        "paths": Key(
            kinds.texts,
            "files or globs: .jsonl (plain, .gz, .zst), .parquet, .arrow, .txt, or a Megatron .bin/.idx pair",
            (),
            refill="'data/*.jsonl'",
        ),
        "reader": Key(kinds.name, "how documents are read", "files"),
        "text": Key(kinds.text, "column that holds the text", "text"),
        "valid": Key(kinds.share, "held-out share of the documents, chosen by document hash", 0.01),
        "valid_paths": Key(kinds.texts, "held-out files, instead of a share", (), "none", refill="'valid/*.jsonl'"),
        "allow_special": Key(kinds.flag, "encode special-token strings inside the text as special tokens", False),
        "licence": Key(kinds.optional(kinds.text), "of the corpus, for the catalog and the report", None, "not stated"),
    },
    short="paths",
)

MODEL = Section(
    "shape of the model; needed for `base: scratch`, else only compared with the checkpoint's",
    {
        "family": Key(kinds.choice("llama", "mistral", "qwen2", "qwen3", "gpt_neox"), "of the architecture", REQUIRED),
        "num_layers": Key(kinds.integer(1), "transformer layers", REQUIRED),
        "hidden_size": Key(kinds.integer(1), "width of the residual stream", REQUIRED),
        "ffn_hidden_size": Key(kinds.integer(1), "width inside the MLP", REQUIRED),
        "num_attention_heads": Key(kinds.integer(1), "query heads", REQUIRED),
        "num_query_groups": Key(kinds.integer(1), "key and value heads", None, "num_attention_heads"),
        "head_dim": Key(kinds.integer(1), "width of a head", None, "hidden_size / num_attention_heads"),
        "vocab_size": Key(kinds.integer(1), "tokens of the vocabulary", None, "the tokenizer's"),
        "max_position_embeddings": Key(kinds.integer(1, unit="tokens"), "longest sequence", None, "seq_length"),
        "norm_eps": Key(kinds.number(above=0), "of the norms", 1e-5),
        "rope_theta": Key(kinds.number(above=0), "base of the rotary embedding", 10000.0),
        "rope_scaling": Key(kinds.optional(kinds.free), "as in a Hugging Face config", None, "none"),
        "rotary_percent": Key(kinds.number(0, 1), "share of a head that is rotated", None, "of the family"),
        "tie_embeddings": Key(kinds.flag, "one matrix for the embedding and the output layer", False),
        "qkv_bias": Key(kinds.flag, "biases on query, key and value", None, "of the family"),
        "linear_bias": Key(kinds.flag, "biases on the other linear layers", None, "of the family"),
        "qk_norm": Key(kinds.flag, "norms on query and key", None, "of the family"),
        "normalization": Key(kinds.choice("rmsnorm", "layernorm"), "kind of norm", None, "of the family"),
        "activation": Key(kinds.choice("swiglu", "gelu", "gelu_tanh"), "inside the MLP", None, "of the family"),
        "parallel_residual": Key(kinds.flag, "attention and MLP side by side", None, "of the family"),
        "init_std": Key(kinds.number(above=0), "standard deviation of new weights", 0.02),
    },
    optional=True,
)

STAGE = Section("a stage", {**STAGE_KEYS, **TRAIN_KEYS})

ROOT = Section(
    "a run",
    {
        "name": Key(kinds.optional(kinds.folder_name), "of the run and its folder", None, "<recipe>-<id>"),
        "base": Section(
            "what the first stages start from",
            {
                "checkpoint": Key(
                    kinds.text,
                    "a Hugging Face folder, a checkpoint or a finished run; or `scratch`",
                    REQUIRED,
                    refill="/models/my-base",
                ),
                "format": Key(
                    kinds.choice("auto", "hf", "native", "torch_dist", "megatron", "atom", "ds-universal"),
                    "of the checkpoint; others than hf and native are converted first",
                    "auto",
                ),
                "config": Key(
                    kinds.text, "Hugging Face folder that says what the model of a Megatron checkpoint is", None
                ),
            },
            short="checkpoint",
        ),
        "model": MODEL,
        "tokenizer": Section(
            "the tokenizer; by default the one in the base checkpoint",
            {
                "path": Key(kinds.optional(kinds.text), "a `tokenizer.json` or its folder", None, "the base's",
                            refill="/models/my-base"),
                "train_on": Key(kinds.names(), "train a new one on these sources", (), "none"),
                "vocab_size": Key(kinds.optional(kinds.integer(2, unit="tokens")), "of a new tokenizer", None, "none"),
            },
            short="path",
        ),
        "sources": Named("the corpora", "source", SOURCE),
        "data": Section(
            "how documents become token sequences",
            {
                "bos": Key(kinds.auto(kinds.flag), "a BOS before each document; `auto` asks the tokenizer", kinds.AUTO),
                "eos": Key(kinds.auto(kinds.flag), "an EOS after each document; `auto` asks the tokenizer", kinds.AUTO),
                "reset_positions": Key(kinds.flag, "positions start again at each document of a sequence", False),
                "mask_documents": Key(kinds.flag, "no attention from one document of a sequence to another", False),
            },
        ),
        "train": Section("defaults of the train stages; a stage may set each of them itself", TRAIN_KEYS),
        "checkpoint": CHECKPOINT,
        "tracking": Section(
            "where the run's log is sent besides its own files",
            {
                "wandb": Key(kinds.choice("off", "offline", "online"), "whether and how wandb is used", "off"),
                "project": Key(kinds.text, "of wandb", "cpt"),
                "entity": Key(kinds.optional(kinds.text), "of wandb", None, "yours"),
                "tags": Key(kinds.names(), "of wandb", (), "none"),
            },
            short="wandb",
        ),
        "launcher": Part("how the ranks are started", "name", _launchers, default="local"),
        "cache": Key(kinds.text, "folder of prepared corpora and tokenizers", None, "CPT_CACHE or ./.cpt/cache"),
        "runs": Key(kinds.text, "folder that holds the run folders", "runs"),
        "ask_above": Key(kinds.optional(kinds.duration), "ask in a terminal before a longer run", None, "never"),
        "stages": Named("the stages, by name; they follow each other through `from`", "stage", STAGE),
    },
)  # fmt: skip


def options_of(cls: Any) -> dict[str, Key]:
    """The options of a registered class as keys. Values are checked by the class itself."""
    if not dataclasses.is_dataclass(cls):
        return {}
    found = {}
    said = _said_of_options(cls)
    for f in dataclasses.fields(cls):
        if f.name.startswith("_") or not f.init:
            continue
        given = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        default = f.default if f.default is not dataclasses.MISSING else None
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        unit = f.metadata.get("unit", "")
        what = f"{f.type}" if isinstance(f.type, str) else getattr(f.type, "__name__", "value")
        shown_kind = unit or what.replace(" | None", "").replace("str", "text").replace("bool", "true | false")
        found[f.name] = Key(
            _kind_of(str(what), shown_kind),
            f.metadata.get("help") or said.get(f.name, ""),
            default if given else REQUIRED,
        )
    return found


def _kind_of(annotation: str, shown: str) -> Kind:
    """How an option with a simple annotation is read; others are left to their class."""
    simple = {
        "int": kinds.integer(),
        "float": kinds.number(),
        "bool": kinds.flag,
        "str": kinds.text,
        "tuple[str, ...]": kinds.names(),
    }
    found = simple.get(annotation.removesuffix(" | None"))
    return Kind(shown, found.read if found else lambda value: value)


def _said_of_options(cls: Any) -> dict[str, str]:
    """What the `Args:` of a class's docstring say about its options."""
    text = (cls.__doc__ or "").partition("Args:\n")[2]
    found: dict[str, str] = {}
    for line in text.splitlines():
        match = re.match(r"\s+(\w+): (.+)", line)
        if match:
            found[match[1]] = match[2].rstrip(".")
    return found


def part_keys(part: Part, chosen: str | None) -> dict[str, Key]:
    """The keys of a part: the one that picks, the extra ones, and the options of the chosen class."""
    registry = part.registry()
    pick = Key(kinds.choice(*registry), f"which {registry.kind}", part.default or REQUIRED)
    options = options_of(registry.get(chosen)) if chosen is not None and chosen in registry else {}
    return {part.select: pick, **part.extra, **options}


def stage_options(kind: str) -> dict[str, Node]:
    """Options of a stage kind other than `train`; those that `train` has too are read as there."""
    from cpt.stages import STAGES

    own = options_of(STAGES.get(kind))
    if kind == "law":
        return {**LAW_KEYS, **{k: v for k, v in own.items() if k not in LAW_KEYS and k not in _LAW_FOUND}}
    return {name: TRAIN_KEYS.get(name, key) for name, key in own.items()}


def children(node: Node) -> Mapping[str, Node]:
    """Keys below a node; of a part, those of every registered class."""
    if isinstance(node, Section):
        return node.keys
    if isinstance(node, Named):
        return {f"<{node.what}>": node.item}
    if isinstance(node, Part):
        merged: dict[str, Node] = {}
        for name in node.registry():
            merged |= part_keys(node, name)
        return merged
    return {}


@functools.cache
def every_key() -> tuple[tuple[str, ...], ...]:
    """Every key of the tree, sections included, with `<source>` and `<stage>` for names."""

    def walk(node: Node, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for name, child in children(node).items():
            yield (*path, name)
            yield from walk(child, (*path, name))

    return tuple(walk(ROOT, ()))


def node_at(path: tuple[str, ...]) -> Node | None:
    """The node of a key as a person writes it, with real names of sources and stages; None when there is none."""
    node: Node = ROOT
    for part in path:
        if isinstance(node, Named):
            node = node.item
            continue
        below = children(node)
        if part not in below and path[:1] == ("stages",) and node is STAGE:
            below = LAW_KEYS
        if part not in below:
            return None
        node = below[part]
    return node
