"""What a run is, as pure data: `RunPlan` and its parts. Frozen, no behaviour; JSON by `cpt.base.records`.

A plan is made once, where the person typed (`config/build.py`); the ranks read it from `plan.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cpt.plan.model import ModelConfig, Parallel

Role = Literal["new", "replay"]
KEEP = ("weights", "optimizer", "cursor", "lr", "rng")


@dataclass(frozen=True, kw_only=True)
class Base:
    """What the first stages start from."""

    kind: str  # scratch | hf | native
    path: str | None = None  # absolute folder; None for scratch
    identity: str = "scratch"  # content identity of the checkpoint, part of fingerprints


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A checkpoint of another format that is made native before the first stage; see `cpt convert-ckpt`."""

    source: str  # absolute folder of the checkpoint as it is
    format: str  # of the source: megatron, torch_dist, atom, ds-universal, hf (pickled files)
    shown: str  # format and layout in words
    bytes: int  # that it takes on disk once converted
    identity: str  # of the source's content
    config: str | None = None  # Hugging Face folder that says what the model is


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """The tokenizer of a run: a `tokenizer.json`, or the order to train one."""

    path: str | None = None  # absolute folder or tokenizer.json; None until trained
    train_on: tuple[str, ...] = ()  # sources whose train split a new tokenizer is trained on
    vocab_size: int | None = None  # of the tokenizer to train
    hash: str | None = None  # of tokenizer.json's content; None until trained


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """Size of a source's train split under the run's tokenizer. An estimate until the source is prepared."""

    tokens: int
    documents: int
    bytes: int
    estimated: bool = True
    content_hash: str | None = None  # of the prepared token shards; None until prepared
    valid_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Source:
    """A named corpus."""

    name: str
    reader: str = "files"  # a name of `data.readers.READERS`
    patterns: tuple[str, ...] = ()  # paths as typed
    paths: tuple[str, ...] = ()  # absolute files, globs expanded, sorted
    text: str = "text"  # column that holds the text
    valid: float = 0.01  # held-out share, chosen by document hash [fraction]
    valid_paths: tuple[str, ...] = ()  # held-out files, instead of a share
    allow_special: bool = False  # encode special-token strings in raw text as special tokens
    licence: str | None = None
    identity: str = ""  # of the raw files: hash over (relative name, size, mtime) and the fields above
    facts: SourceFacts | None = None


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How documents become token sequences."""

    bos: bool = False  # a BOS token before each document
    eos: bool = True  # an EOS token after each document
    reset_positions: bool = False  # positions restart at each document in a packed sequence
    mask_documents: bool = False  # no attention across documents in a packed sequence


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A share of a stage's tokens from what earlier stages or the base model were trained on.

    `sources` are the shares inside the replay part, normalised.
    """

    share: float  # of all tokens of the stage [fraction]
    sources: Mapping[str, float]
    account: str = "equal_compute"  # equal_compute: inside the stage's tokens | additive: on top of them
    of: str = "base"  # whose data is read again (`from` in a recipe): base or a stage


@dataclass(frozen=True, kw_only=True)
class Lr:
    """A learning-rate curve, resolved: `schedules.curve(lr)(n)` gives the lr of stage step n (from 0).

    The curve is evaluated at `offset + n` over `span` steps; with `counter: run` both count from the first stage of
    the chain, with `counter: stage` offset is 0 and span is the stage's steps.
    """

    schedule: str
    options: Mapping[str, Any]  # the schedule's own options, complete
    counter: str = "stage"  # stage | run
    offset: int = 0
    span: int = 0
    start_lr: float = 0.0  # lr that a warmup rises from: where the curve's first stage found its parent; 0 = none
    points: tuple[float, float, float] = (0.0, 0.0, 0.0)  # first, highest and last lr of the stage


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # global gradient norm; 0 = no clipping


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Validation losses of a stage."""

    sources: tuple[str, ...] = ()
    every_steps: int | None = None  # None: only at the start (first stage) and at the end
    tokens: int = 131_072  # per source at most
    at_start: bool = True  # measure before the first step


@dataclass(frozen=True, kw_only=True)
class StopIf:
    """A guard: ends the run when a source's validation loss has risen against the stage's start."""

    source: str
    loss_rises: float  # relative rise that is allowed [fraction]


@dataclass(frozen=True, kw_only=True)
class Anomalies:
    """What is done about a NaN or a loss spike."""

    nan: str = "skip"  # skip the update | stop
    spike: str = "warn"  # warn | skip | stop | rollback (see `engine.anomalies.roll_back`)
    spike_factor: float = 3.0  # a spike is a loss above factor · running mean (of `window` steps)
    window: int = 50
    max_skips: int = 10  # skipped updates in a row, or rollbacks of a stage; more stop the run


@dataclass(frozen=True, kw_only=True)
class Retain:
    """Which checkpoints stay."""

    last: int = 2
    every: int | None = None  # additionally every so many tokens
    stage_ends: bool = True


@dataclass(frozen=True, kw_only=True)
class Saving:
    """When checkpoints are written and which stay."""

    every_steps: int | None = None
    retain: Retain = field(default_factory=Retain)
    asynchronous: bool = False


@dataclass(frozen=True, kw_only=True)
class Train:
    """Everything a train stage does. Tokens = steps · global_batch_size · seq_length."""

    tokens: int
    steps: int
    seq_length: int
    global_batch_size: int
    micro_batch_size: int
    seed: int
    precision: str  # fp32 | bf16
    mixture: Mapping[str, float]  # shares of the non-replay tokens, normalised, by source
    replay: Replay | None
    lr: Lr
    optimizer: Optimizer
    parallel: Parallel
    recompute: str = "none"  # none | selective | full
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    evaluate: Evaluate = field(default_factory=Evaluate)
    stop_if: StopIf | None = None
    anomalies: Anomalies = field(default_factory=Anomalies)
    saving: Saving = field(default_factory=Saving)
    broken_import_guard: bool = True
    log_every: int = 1  # steps between `step` events


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage: turns a parent checkpoint into a child checkpoint (or measures one, or fits a law)."""

    name: str
    kind: str  # train | convert | evaluate | law | merged
    parent: str | None  # `base`, a stage of this run, or an absolute checkpoint folder; None = scratch
    parent_at: int | str | None = None  # None = its end | a step | "pre_anneal"
    keep: tuple[str, ...] = ()
    train: Train | None = None  # of a train stage
    options: Mapping[str, Any] = field(default_factory=dict)  # of another kind, e.g. {"to": "hf"}
    fingerprint: str = ""
    keep_steps: tuple[int, ...] = ()  # a later stage forks here: these checkpoints are never removed
    model: ModelConfig | None = None  # of a proxy of another size; None = the run's
    group: str | None = None  # the law stage that this stage is a proxy of
    after: tuple[str, ...] = ()  # stages whose results it reads besides its parent's
    law: Mapping[str, str] = field(default_factory=dict)  # keys whose value a law gives: "mixture" -> "mix.mixture"
    assumed: bool = False  # the law of one of them is not there yet: the value stands in so that a plan can be shown


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A whole run."""

    id: str  # 64 hexadecimal digits; people see the first 6
    name: str
    recipe: str
    base: Base
    model: ModelConfig | None  # None only while the base cannot be read (plan of a missing base is refused)
    tokenizer: Tokenizer
    sources: Mapping[str, Source]
    data: DataOptions
    stages: Mapping[str, StagePlan]  # in order of execution
    conversions: Mapping[str, Conversion] = field(default_factory=dict)  # by the folder that they make
    tracking: Mapping[str, Any] = field(default_factory=dict)
    launcher: Mapping[str, Any] = field(default_factory=dict)
    cache: str = ""  # absolute folder of prepared corpora and converted checkpoints
    runs: str = ""  # absolute folder that holds the run folders
    config: Mapping[str, Any] = field(default_factory=dict)  # the composed recipe, for people (`plan.yaml`)
    notes: tuple[str, ...] = ()  # what the overrides do that may not be meant, one sentence each; changes nothing

    @property
    def short_id(self) -> str:
        return self.id[:6]

    def model_of(self, stage: StagePlan) -> ModelConfig | None:
        """The model that a stage works on: the run's, or that of a proxy of another size."""
        return stage.model or self.model


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one attempt at a stage gets besides the plan (`attempt_N/job.json`): everything found at its start."""

    run_dir: str
    stage: str
    attempt: int
    start: str  # scratch | hf | native: what `parent` is
    parent: str | None  # absolute HF folder or native iter_* folder; None = scratch
    resume: str | None  # iter_* folder of this very stage to go on from; wins over parent
    corpora: Mapping[str, str]  # source -> absolute folder of the prepared corpus
    tokenizer: str | None  # absolute tokenizer.json
    fence: str | None = None  # token of the stage's lock: whoever finds another one there publishes nothing any more
    stop_at: float | None = None  # save and stop at this time, before the queue ends the job [unix seconds]
    warned_from: float | None = None  # before this time a stop has another cause than the job's limit [unix seconds]
    queue_job: str | None = None  # id of the batch job that makes this attempt
