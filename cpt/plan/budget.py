"""What a plan costs: FLOPs, memory, disk, time. Estimates, each with the basis it rests on.

    FLOPs of a token, forward and backward:  6·P + 6·L·S·a·d      P parameters in matrix products (the output layer
    included, the embedding not), L layers, S sequence length, a heads of width d; the attention term counts the lower
    triangle only. Full recomputation repeats the forward pass: 4/3 of that.

Source:
    Kaplan et al. 2020, arXiv:2001.08361, section 2.1; Korthikanti et al. 2022, arXiv:2205.05198, for activations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cpt.base.errors import PlanError
from cpt.base.units import show_bytes
from cpt.plan.model import ModelConfig, Parallel
from cpt.plan.types import RunPlan, StagePlan, Train

GIB = 2**30
RUNTIME = {"cpu": 0.35 * 10**9, "gpu": 2 * 10**9}  # what a rank holds besides the model: libraries, buffers [bytes]

START = {"cpu": 5.0, "gpu": 30.0}  # until the ranks of a stage work: libraries, groups, weights; assumed [s]


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What the ranks compute on.

    Args:
        kind: cpu | gpu.
        flops_per_s: that one device keeps up in training; None = not known.
        memory: of one device, for CPUs of the machine [bytes]; None = not known.
        basis: where `flops_per_s` comes from, for people.
        cores: of the machine, for CPUs: ranks share them; None = each rank has its own.
    """

    kind: str = "cpu"
    flops_per_s: float | None = None
    memory: int | None = None
    basis: str = ""
    cores: int | None = 1


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Speed of a finished stage that is like a planned one."""

    tokens_per_s: float
    run: str


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Cost of one train stage."""

    flops: float
    seconds: float | None  # of its steps
    evaluating: float | None  # of its evaluations [s]
    basis: str  # of both
    memory: float  # at peak, of one rank [bytes]
    disk: float  # of the checkpoints that stay while the stage runs [bytes]
    checkpoints: int  # that stay


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Cost of a run."""

    stages: Mapping[str, StageCost]
    devices: Devices
    num_devices: int  # most that a stage uses
    checkpoint_bytes: float  # one checkpoint with optimizer [bytes]
    disk: float  # checkpoints and exports that stay when all is done [bytes]
    starting: float = 0.0  # of all stages, whatever their kind, together [s]
    measuring: float | None = 0.0  # of the stages that only measure [s]

    @property
    def seconds(self) -> float | None:
        """Time of all stages one after the other [s]; None when the speed of the devices is not known.

        With evaluations and starts, without the preparation of data.
        """
        parts = [p for s in self.stages.values() for p in (s.seconds, s.evaluating)]
        known = [p for p in (*parts, self.measuring) if p is not None]
        return sum(known) + self.starting if len(known) == len(parts) + 1 and parts else None

    @property
    def flops(self) -> float:
        """Of all stages."""
        return sum(s.flops for s in self.stages.values())


def matrix_parameters(model: ModelConfig) -> int:
    """Parameters that take part in matrix products: without the embedding, with the output layer (tied or not)."""
    embeddings = model.vocab_size * model.hidden_size
    return model.num_parameters - embeddings * (1 if model.tie_embeddings else 2) + embeddings


def flops_per_token(model: ModelConfig, seq_length: int, recompute: str = "none") -> float:
    """FLOPs of one token, forward and backward."""
    attention = 6 * model.num_layers * seq_length * model.num_attention_heads * model.head_dim
    once = 6 * matrix_parameters(model) + attention
    return once * (4 / 3 if recompute == "full" else 1)


def checkpoint_bytes(model: ModelConfig, precision: str) -> float:
    """One native checkpoint with optimizer: fp32 main weights and two moments, and bf16 weights [bytes]."""
    return model.num_parameters * (12 + (2 if precision == "bf16" else 0))


def memory(model: ModelConfig, train: Train, kind: str = "gpu") -> float:
    """Peak memory of the rank that needs most, the first or last of the pipeline [bytes]."""
    layout = train.parallel
    wide = 4 if train.precision == "fp32" else 2
    parts = layout.tp * layout.pp
    embeddings = model.vocab_size * model.hidden_size
    body = model.num_parameters - embeddings * (1 if model.tie_embeddings else 2)
    mine = body / parts + embeddings / layout.tp * (2 if layout.pp == 1 and not model.tie_embeddings else 1)
    # Weights and fp32 gradients, fp32 moments and, with bf16, fp32 main weights.
    moments = (8 if wide == 4 else 12) / (layout.dp if layout.distributed_optimizer else 1)
    return mine * (wide + 4 + moments) + _activations(model, train, wide) + RUNTIME[kind]


def _activations(model: ModelConfig, train: Train, wide: int) -> float:
    """Activations of the micro batches under way on the first pipeline rank, and logits on the last [bytes]."""
    layout, tokens = train.parallel, train.micro_batch_size * train.seq_length
    per_layer = {
        "none": 17 * tokens * model.hidden_size * wide
        + 5 * train.micro_batch_size * model.num_attention_heads * train.seq_length**2 * wide / 2,
        "selective": 17 * tokens * model.hidden_size * wide,
        "full": tokens * model.hidden_size * wide,
    }[train.recompute]
    # The first rank holds pp micro batches of L / pp layers: L layers' worth.
    under_way = min(layout.pp, train.global_batch_size // max(1, train.micro_batch_size * layout.dp)) / layout.pp
    logits = 2 * tokens * model.vocab_size * 4 / layout.tp
    return model.num_layers * max(under_way, 1 / layout.pp) * per_layer / layout.tp + logits


def budget(plan: RunPlan, devices: Devices, measured: Mapping[str, Measured] | None = None) -> Budget:
    """The cost of a plan.

    Args:
        plan: with a model.
        devices: what the ranks compute on.
        measured: by stage, the speed of a like stage of an earlier run.
    """
    assert plan.model is not None
    model, stages = plan.model, {}
    for name, stage in plan.stages.items():
        if stage.train is not None:
            own = stage.model or model
            stages[name] = _stage(plan, own, stage, stage.train, devices, (measured or {}).get(name))
    most = max((s.train.parallel.world_size for s in plan.stages.values() if s.train), default=1)
    precision = next((s.train.precision for s in plan.stages.values() if s.train), "fp32")
    one = checkpoint_bytes(model, precision)
    exports = sum((s.model or model).num_parameters for s in plan.stages.values() if s.kind == "convert")
    disk = sum(s.disk for s in stages.values()) + exports * (2 if precision == "bf16" else 4)
    return Budget(
        stages=stages,
        devices=devices,
        num_devices=most,
        checkpoint_bytes=one,
        disk=disk,
        starting=START[devices.kind] * len(plan.stages),
        measuring=_measuring(plan, model, devices),
    )


def _measuring(plan: RunPlan, model: ModelConfig, devices: Devices) -> float | None:
    """Time of the stages that only measure [s]; None when the speed of the devices is not known."""
    found = 0.0
    for stage in plan.stages.values():
        if stage.kind == "evaluate":
            options = stage.options
            tokens = _held_out(plan, options.get("sources") or tuple(plan.sources), options.get("tokens") or 0)
            own = stage.model or model
            length = options.get("seq_length") or own.max_position_embeddings
            ranks = (options.get("tp") or 1) * (options.get("pp") or 1) * (options.get("dp") or 1)
            speed = _flops_per_s(devices, ranks)
            if speed is None:
                return None
            found += tokens * flops_per_token(own, length) / 3 / speed
    return found


@dataclass(frozen=True, kw_only=True)
class ProxyCost:
    """What the proxies of a law cost.

    Args:
        count: how many there are.
        tokens: of all of them [tokens].
        flops: 6·N·D, summed over them; N parameters, D tokens (Kaplan et al. 2020, arXiv:2001.08361).
        share: of the same figure of the real run: the stage that the law is for and those that come from it; None when
            it is for none [fraction].
    """

    count: int
    tokens: int
    flops: float
    share: float | None


def proxy_cost(plan: RunPlan, law: str) -> ProxyCost:
    """The cost of a law stage's proxies, against the target stage and what goes on from it."""
    proxies = [(s, s.train) for s in plan.stages.values() if s.group == law and s.train is not None]
    flops = sum(training_flops(plan.model_of(stage), train.tokens) for stage, train in proxies)
    real = float(plan.stages[law].options.get("real_flops") or 0.0)
    tokens = sum(train.tokens for _, train in proxies)
    return ProxyCost(count=len(proxies), tokens=tokens, flops=flops, share=flops / real if real else None)


def training_flops(model: ModelConfig | None, tokens: int) -> float:
    """6·N·D, the figure that laws count compute in; 0 for an unknown model."""
    return 6.0 * model.num_parameters * tokens if model is not None else 0.0


def _held_out(plan: RunPlan, names: Sequence[str], most: int) -> int:
    """Tokens that one evaluation of these sources reads; at most so many of each."""
    facts = (plan.sources[name].facts for name in names if name in plan.sources)
    return sum(min(most, f.valid_tokens) if f is not None and f.valid_tokens else most for f in facts)


def _flops_per_s(devices: Devices, ranks: int) -> float | None:
    """What so many ranks do together; those of a processor share its cores."""
    if not devices.flops_per_s:
        return None
    shared = devices.kind == "cpu" and devices.cores is not None
    return devices.flops_per_s * (min(ranks, devices.cores or 1) if shared else ranks)


def _stage(
    plan: RunPlan, model: ModelConfig, stage: StagePlan, train: Train, devices: Devices, measured: Measured | None
) -> StageCost:
    flops = train.tokens * flops_per_token(model, train.seq_length, train.recompute)
    # A forward pass is a third of a step, without what recomputation adds.
    forward = flops_per_token(model, train.seq_length) / 3
    evaluate = train.evaluate
    times = 1 + evaluate.at_start + ((train.steps - 1) // evaluate.every_steps if evaluate.every_steps else 0)
    evaluated = times * _held_out(plan, evaluate.sources, evaluate.tokens)
    seconds, evaluating, basis = None, None, "speed of the devices not known"
    speed = _flops_per_s(devices, train.parallel.world_size)
    if measured is not None:
        seconds, basis = train.tokens / measured.tokens_per_s, f"measured in run {measured.run}"
        evaluating = seconds / flops * evaluated * forward
    elif speed is not None:
        seconds, evaluating, basis = flops / speed, evaluated * forward / speed, devices.basis
    stay = _checkpoints(stage, train)
    return StageCost(
        flops=flops,
        seconds=seconds,
        evaluating=evaluating,
        basis=basis,
        memory=memory(model, train, devices.kind),
        disk=stay * checkpoint_bytes(model, train.precision),
        checkpoints=stay,
    )


def _checkpoints(stage: StagePlan, train: Train) -> int:
    """Checkpoints of a stage that stay."""
    saving, kept = train.saving, 1 + len(stage.keep_steps)
    if saving.every_steps is not None:
        written = (train.steps - 1) // saving.every_steps
        per_step = train.global_batch_size * train.seq_length
        spaced = train.tokens // saving.retain.every if saving.retain.every else 0
        kept += min(written, saving.retain.last - 1 + min(spaced, train.tokens // (saving.every_steps * per_step)))
    return kept


def check_memory(plan: RunPlan, devices: Devices) -> None:
    """Refuse a stage that cannot fit, with the two cheapest ways to make it fit.

    Raises:
        PlanError: the first stage of each kind of trouble; nothing when the memory of a device is not known.
    """
    if plan.model is None or devices.memory is None:
        return
    errors = []
    for name, stage in plan.stages.items():
        if stage.train is None:
            continue
        model = stage.model or plan.model
        needed = _needed(model, stage.train, devices)
        if needed > devices.memory:
            where = "this machine" if devices.kind == "cpu" else "a device"
            has = show_bytes(devices.memory)
            ways = [
                text for text, train in _ways(name, stage.train) if _needed(model, train, devices) <= devices.memory
            ]
            hints = ways[:2] or ["more devices or a smaller model are needed"]
            errors.append(
                PlanError(f"stage `{name}` needs about {show_bytes(needed)} at peak, {where} has {has}", *hints)
            )
    if errors:
        raise PlanError(errors[0].message, *errors[0].hints, more=tuple(errors[1:]))


def _needed(model: ModelConfig, train: Train, devices: Devices) -> float:
    """Memory where it is short: of one device, or of all ranks of a machine without devices [bytes]."""
    ranks = train.parallel.world_size if devices.kind == "cpu" else 1
    return memory(model, train, devices.kind) * ranks


def _ways(name: str, train: Train) -> Iterator[tuple[str, Train]]:
    """Changes that need less memory, the cheapest first: those that cost least speed and no devices."""

    def laid_out(**changes: int | bool) -> Train:
        return dataclasses.replace(train, parallel=dataclasses.replace(train.parallel, **changes))  # type: ignore[arg-type]

    layout: Parallel = train.parallel
    if not layout.distributed_optimizer and layout.dp > 1:
        yield f"`stages.{name}.parallel.distributed_optimizer=true`", laid_out(distributed_optimizer=True)
    size = train.micro_batch_size
    while size > 1:
        size //= 2
        if train.global_batch_size % (size * layout.dp) == 0:
            yield f"`stages.{name}.micro_batch_size={size}`", dataclasses.replace(train, micro_batch_size=size)
    for recompute in ("selective", "full"):
        if train.recompute == "none" or (train.recompute, recompute) == ("selective", "full"):
            yield f"`stages.{name}.recompute={recompute}`", dataclasses.replace(train, recompute=recompute)
    for factor in (2, 4, 8):
        if layout.dp % factor == 0:
            yield (
                f"`stages.{name}.parallel={{tp: {layout.tp * factor}, dp: {layout.dp // factor}}}`",
                laid_out(tp=layout.tp * factor, dp=layout.dp // factor),
            )
    for factor in (2, 4, 8):
        yield (
            f"`stages.{name}.parallel.tp={layout.tp * factor}` on {factor} times the devices",
            laid_out(tp=layout.tp * factor),
        )
    for dp in range(layout.dp // 2, 0, -1):
        if train.global_batch_size % (train.micro_batch_size * dp) == 0:
            yield f"`stages.{name}.parallel.dp={dp}`", laid_out(dp=dp)
