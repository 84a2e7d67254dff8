"""Rules across fields and stages. Pure: everything comes from the plan and from facts that are handed over.

`check` raises one error that carries all broken rules; `warnings` gives what can run but is probably not meant.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from cpt.base.errors import CptError, PlanError
from cpt.base.registry import unknown
from cpt.base.units import show_count
from cpt.plan.model import ModelConfig, Parallel
from cpt.plan.types import RunPlan, Source, SourceFacts, StagePlan, Train

MANY_PASSES = (
    4.0  # Muennighoff et al. 2023, arXiv:2305.16264: up to about 4 passes repeated text is nearly as good as new
)
WEIGHTS_ONLY = ("weights",)
EVERYTHING = ("weights", "optimizer", "cursor", "lr", "rng")


SAME_IDS = 0.9  # share of a model's tokens that must keep their id in a tokenizer of another size


@dataclass(frozen=True)
class OtherTokenizer:
    """The tokenizer beside a checkpoint, when the run's is another one.

    Args:
        vocab_size: of the one beside the checkpoint.
        same_ids: share of its tokens that have the same id in the run's tokenizer [fraction].
    """

    vocab_size: int
    same_ids: float


@dataclass(frozen=True, kw_only=True)
class Outside:
    """A checkpoint from outside of the run that a stage starts from, as far as rules need it."""

    kind: str  # hf | native
    identity: str
    holds: tuple[str, ...] = WEIGHTS_ONLY
    model: ModelConfig | None = None
    tokenizer_hash: str | None = None
    other_tokenizer: OtherTokenizer | None = None


def why_not_trained(model: ModelConfig) -> str | None:
    """Why the engine has no layers for a model; None when it has."""
    what = None
    if model.num_experts:
        what = "experts"
    elif model.position_embedding != "rope":
        what = "learned position embeddings"
    if what is None:
        return None
    return f"models of the family `{model.family}` cannot be trained here yet: there are no layers with {what}"


CONVERT_HINT = "`cpt convert-ckpt` converts its checkpoints between formats"


def check(plan: RunPlan, outside: Mapping[str, Outside], num_devices: int | None = None) -> None:
    """Refuse a plan that cannot be run.

    Args:
        plan: without fingerprints.
        outside: facts of `base` and, by stage, of other checkpoints that stages start from.
        num_devices: of the launcher; None = only the layout decides.

    Raises:
        PlanError: every broken rule, nearest cause first.
    """
    errors = list(broken(plan, outside, num_devices))
    if errors:
        raise PlanError(errors[0].message, *errors[0].hints, more=tuple(errors[1:]))


def broken(plan: RunPlan, outside: Mapping[str, Outside], num_devices: int | None = None) -> Iterator[CptError]:
    """Every broken rule of a plan."""
    yield from _tokenizer(plan, outside)
    for stage in plan.stages.values():
        yield from _names(plan, stage)
        yield from _start(plan, stage, outside)
        yield from _held_out(plan, stage)
        if stage.train is not None:
            yield from _data(plan, stage.name, stage.train)
            yield from _layout(plan, stage.name, stage.train, num_devices)
            yield from _no_effect(stage.name, stage.train)


def _tokenizer(plan: RunPlan, outside: Mapping[str, Outside]) -> Iterator[CptError]:
    model, size = plan.model, plan.tokenizer.vocab_size
    if model is not None and size is not None and size > model.vocab_size:
        yield PlanError(
            f"the tokenizer has {size:,} tokens, but the model's vocabulary has {model.vocab_size:,} rows",
            "use the tokenizer that the base model was trained with",
        )
    for name, facts in outside.items():
        other = facts.other_tokenizer
        if name in plan.stages and plan.stages[name].kind == "law":
            continue  # its proxies say it
        if name in plan.stages and plan.stages[name].group is not None:
            yield from _tokenizer_of_proxy(plan, plan.stages[name], facts)
        elif other is not None and other.vocab_size != size and other.same_ids < SAME_IDS:
            yield PlanError(
                f"`{plan.tokenizer.path}` has {size or 0:,} tokens, the tokenizer of "
                f"{_whose(name)} {other.vocab_size:,}: {_same(other)}",
                "leave `tokenizer` out to take the base's own",
            )
        elif facts.tokenizer_hash and plan.tokenizer.hash and facts.tokenizer_hash != plan.tokenizer.hash:
            yield PlanError(
                f"{_whose(name)} was trained with another tokenizer than `{plan.tokenizer.path}`",
                "leave `tokenizer` out to take the base's own",
            )
        shaped = name != "base" and facts.model is not None and model is not None
        own = name in plan.stages and plan.stages[name].group is not None
        if shaped and not own and _shape(facts.model) != _shape(model):  # type: ignore[arg-type]
            yield PlanError(f"`stages.{name}.from` holds a model of another shape than the base")


def _tokenizer_of_proxy(plan: RunPlan, stage: StagePlan, facts: Outside) -> Iterator[CptError]:
    """Losses of models of several sizes can be compared only when all read the same tokens."""
    model, size = facts.model, plan.tokenizer.vocab_size
    where = f"`{stage.parent}`, which proxies of `{stage.group}` start from,"
    if facts.other_tokenizer is not None and facts.other_tokenizer.same_ids < 1:
        yield PlanError(
            f"{where} has another tokenizer than the run: {_same(facts.other_tokenizer)}",
            "`bases` takes checkpoints that share the run's tokenizer",
        )
    elif facts.tokenizer_hash and plan.tokenizer.hash and facts.tokenizer_hash != plan.tokenizer.hash:
        yield PlanError(
            f"{where} was trained with another tokenizer than the run's",
            "`bases` takes checkpoints that share the run's tokenizer",
        )
    elif model is not None and size is not None and size > model.vocab_size:
        yield PlanError(f"{where} has a vocabulary of {model.vocab_size:,} rows, the run's tokenizer {size:,} tokens")


def _whose(name: str) -> str:
    return "the base checkpoint" if name == "base" else f"what stage `{name}` starts from"


def _same(other: OtherTokenizer) -> str:
    """How many ids still mean to the model what they meant, in words."""
    return f"{other.same_ids:.0%} of the model's tokens have the same id in it"


def tokenizer_warnings(plan: RunPlan, others: Mapping[str, OtherTokenizer]) -> Iterator[str]:
    """Where the run's tokenizer is not the one that a checkpoint came with.

    Args:
        plan: checked.
        others: by `base` or stage, the tokenizer beside the checkpoint that it starts from.
    """
    for name, other in others.items():
        yield f"`{plan.tokenizer.path}` is not the tokenizer of {_whose(name)}: {_same(other)}"
    size = plan.tokenizer.vocab_size
    if plan.base.kind == "hf" and not others and plan.model is not None and size and size < plan.model.vocab_size / 2:
        rows = plan.model.vocab_size
        yield f"the tokenizer has {size:,} tokens, the model's vocabulary {rows:,} rows: is it the model's own?"


def _shape(model: ModelConfig) -> tuple[object, ...]:
    return tuple(
        getattr(model, n)
        for n in (
            "family",
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "vocab_size",
        )
    )


def _names(plan: RunPlan, stage: StagePlan) -> Iterator[CptError]:
    """Sources that are named somewhere but do not exist."""
    uses: list[tuple[str, Iterable[str]]] = []
    if stage.train is not None:
        train = stage.train
        uses = [("mixture", train.mixture), ("evaluate.sources", train.evaluate.sources)]
        uses += [("replay.sources", train.replay.sources)] if train.replay else []
        uses += [("stop_if.source", [train.stop_if.source])] if train.stop_if else []
    elif "sources" in stage.options:
        uses = [("sources", stage.options["sources"])]
    for key, names in uses:
        for name in names:
            if name not in plan.sources:
                error = unknown("source", name, plan.sources)
                yield PlanError(f"`stages.{stage.name}.{key}`: {error.message}", *error.hints)


def _start(plan: RunPlan, stage: StagePlan, outside: Mapping[str, Outside]) -> Iterator[CptError]:
    """What a stage starts from, and what it may keep of that."""
    where = f"stages.{stage.name}"
    if stage.parent is None:
        if stage.kind not in ("train", "law", "merged"):
            yield PlanError(f"`{where}` starts from `base`, which is `scratch`: there is nothing to {stage.kind}")
        if stage.keep:
            kept = ", ".join(f"`{k}`" for k in stage.keep)
            yield PlanError(f"`{where}.keep` has {kept}, but the stage starts from scratch", f"`{where}.keep=[]`")
        return
    above = plan.stages.get(stage.parent)
    if above is not None and above.kind == "convert" and above.options.get("to", "hf") not in ("hf", "native"):
        to = above.options["to"]
        yield PlanError(
            f"`{where}` starts from `{above.name}`, which leaves files for other programs (`to: {to}`)",
            f"start from `{above.parent}`, which `{above.name}` converts",
        )
    if stage.train is None:
        return
    if "weights" not in stage.keep:
        yield PlanError(f"`{where}.keep` has no `weights`: nothing of its parent would be continued", "add `weights`")
    holds, what = _holds(plan, stage, outside)
    for name in stage.keep:
        if name not in holds:
            has = ", ".join(f"`{h}`" for h in holds)
            yield PlanError(f"`{where}.keep` has `{name}`, but {what} holds {has} only")


def _holds(plan: RunPlan, stage: StagePlan, outside: Mapping[str, Outside]) -> tuple[tuple[str, ...], str]:
    """What can be kept of a stage's parent, and what that is in words."""
    parent: str | None = stage.parent
    facts = outside.get("base" if parent == "base" else stage.name)
    if facts is not None and (parent == "base" or parent not in plan.stages):
        return facts.holds, "a Hugging Face folder" if facts.kind == "hf" else f"`{parent}`"
    above = plan.stages.get(parent or "")
    if above is None:
        return EVERYTHING, f"`{parent}`"
    if above.kind == "evaluate":
        return _holds(plan, above, {**outside, above.name: outside[above.name]} if above.name in outside else outside)
    if above.kind == "convert":
        return WEIGHTS_ONLY, f"`{above.name}`, a converted checkpoint,"
    return EVERYTHING, f"`{above.name}`"


def _data(plan: RunPlan, name: str, train: Train) -> Iterator[CptError]:
    reads = {**train.mixture, **(train.replay.sources if train.replay else {})}
    for source in reads:
        facts = plan.sources[source].facts if source in plan.sources else None
        if facts is not None and facts.tokens == 0:
            yield PlanError(f"`stages.{name}.mixture` has `{source}`, which has no tokens to train on")
    if train.stop_if and train.stop_if.source in plan.sources and train.stop_if.source not in train.evaluate.sources:
        yield PlanError(
            f"`stages.{name}.stop_if.source` is `{train.stop_if.source}`, which `evaluate.sources` does not measure",
            f"add `{train.stop_if.source}` to `stages.{name}.evaluate.sources`",
        )


def _held_out(plan: RunPlan, stage: StagePlan) -> Iterator[CptError]:
    """Sources that are measured although nothing of them is held out."""
    if stage.train is not None:
        key, names = "evaluate.sources", stage.train.evaluate.sources
    elif stage.kind == "evaluate":
        key, names = "sources", tuple(stage.options.get("sources") or plan.sources)
    else:
        return
    for name in names:
        known = plan.sources.get(name)
        if known is None:
            continue
        what = f"`stages.{stage.name}.{key}` has `{name}`"
        if known.valid == 0 and not known.valid_paths:
            yield PlanError(
                f"{what}, of which nothing is held out",
                f"`sources.{name}.valid=1%` holds out a share, `valid_paths` names files",
            )
        elif nothing_held_out(known) and known.facts is not None:
            yield PlanError(
                f"{what}, which has {few(known.facts)}: no held-out documents to measure",
                f"leave `{name}` out there, or name files to hold out: `sources.{name}.valid_paths=...`",
            )


def nothing_held_out(source: Source) -> bool:
    """Whether a prepared source has no held-out text, although some was to be held out."""
    facts = source.facts
    wanted = source.valid > 0 or bool(source.valid_paths)
    return wanted and facts is not None and not facts.estimated and facts.valid_tokens == 0


def few(facts: SourceFacts) -> str:
    """How many documents a source trains on, in words."""
    return f"{facts.documents:,} document" + ("s" if facts.documents != 1 else "")


def _layout(plan: RunPlan, name: str, train: Train, num_devices: int | None) -> Iterator[CptError]:
    layout, model = train.parallel, plan.model_of(plan.stages[name])
    where = f"stages.{name}.parallel"
    copies = train.micro_batch_size * layout.dp
    if train.global_batch_size % copies:
        fits = [d for d in range(1, layout.dp + 1) if train.global_batch_size % (train.micro_batch_size * d) == 0]
        hints = (
            [f"a `dp` of {fits[-1]} divides it"]
            if fits
            else ["make `micro_batch_size` a divisor of `global_batch_size`"]
        )
        yield PlanError(
            f"`stages.{name}`: `global_batch_size` {train.global_batch_size} is not a multiple of "
            f"`micro_batch_size` · `dp`, {train.micro_batch_size} · {layout.dp}",
            *hints,
        )
    if num_devices is not None and layout.world_size > num_devices:
        yield PlanError(
            f"`{where}` needs {layout.world_size} devices (tp {layout.tp}, pp {layout.pp}, dp {layout.dp}), "
            f"the launcher has {num_devices}"
        )
    if layout.sequence_parallel and layout.tp == 1:
        yield PlanError(f"`{where}.sequence_parallel` would have no effect: `tp` is 1")
    if layout.sequence_parallel and train.seq_length % layout.tp:
        yield PlanError(
            f"`stages.{name}.seq_length` {train.seq_length} is not a multiple of `tp` {layout.tp}, "
            "which `sequence_parallel` needs"
        )
    if layout.vp > 1 and layout.pp == 1:
        yield PlanError(f"`{where}.vp` {layout.vp} would have no effect: `pp` is 1")
    elif layout.vp > 1 and (train.global_batch_size // max(1, copies)) % layout.pp:
        yield PlanError(f"`{where}.vp` needs the micro batches of a step to be a multiple of `pp` {layout.pp}")
    if model is not None:
        yield from _layout_of_model(where, layout, model)


def _layout_of_model(where: str, layout: Parallel, model: ModelConfig) -> Iterator[CptError]:
    for number, what in (
        (model.num_attention_heads, "attention heads"),
        (model.num_query_groups, "key and value heads"),
        (model.ffn_hidden_size, "MLP columns"),
    ):
        if number % layout.tp:
            ways = [
                str(t)
                for t in range(1, layout.tp)
                if model.num_attention_heads % t == 0 and model.num_query_groups % t == 0
            ]
            yield PlanError(
                f"`{where}.tp` {layout.tp} does not divide the model's {number} {what}",
                f"a `tp` of {' or '.join(ways[-3:])} does",
            )
            break
    parts = layout.pp * layout.vp
    if layout.layers is None:
        if model.num_layers < parts:
            yield PlanError(f"`{where}`: {parts} pipeline parts (pp · vp), but the model has {model.num_layers} layers")
        elif layout.vp > 1 and model.num_layers % parts:
            yield PlanError(
                f"`{where}.vp`: {model.num_layers} layers do not divide evenly into {parts} parts (pp · vp)",
                "`layers` gives an uneven split",
            )
    elif len(layout.layers) != parts:
        yield PlanError(f"`{where}.layers` has {len(layout.layers)} parts, pp · vp is {parts}")
    elif sum(layout.layers) != model.num_layers or min(layout.layers) < 1:
        yield PlanError(
            f"`{where}.layers` adds up to {sum(layout.layers)}, wanted {model.num_layers} with at least 1 in each part"
        )


def _no_effect(name: str, train: Train) -> Iterator[CptError]:
    """Settings that another setting makes pointless."""
    saving = train.saving
    if saving.retain.every is not None and saving.every_steps is None:
        yield PlanError(
            f"`checkpoint.retain.every` would have no effect in stage `{name}`: `checkpoint.every` is not given"
        )
    if train.anomalies.spike == "rollback" and saving.every_steps is None:
        yield PlanError(
            f"`anomalies.spike: rollback` in stage `{name}` needs `checkpoint.every`: there is nothing to go back to"
        )


def warnings(plan: RunPlan, lr_before: Mapping[str, float], num_devices: int | None = None) -> list[str]:
    """What can run but is probably not meant, one sentence each.

    Args:
        plan: checked.
        lr_before: by stage, the lr of its parent at the step where it starts from it; absent = no parent with an lr.
        num_devices: of the launcher.
    """
    found = [*_unused_sources(plan), *_not_measured(plan)]
    for stage in plan.stages.values():
        if stage.kind == "law":
            found += [*_law(plan, stage)]
        if stage.train is not None and stage.group is None:
            found += [*_lr_jump(stage, stage.train, lr_before.get(stage.name))]
            found += [*_read_again(plan, stage, stage.train)]
            found += [*_positions(plan, stage.name, stage.train)]
            found += [*_idle(stage.name, stage.train, num_devices)]
    return [*found, *_many_passes(plan)]


FAR_TOKENS, FAR_PARAMETERS = 8.0, 4.0  # a law asked further than these factors outside its runs says little
FEW_STEPS = 20  # of a proxy: so short a run shows its warmup more than its mixture


def _law(plan: RunPlan, stage: StagePlan) -> Iterator[str]:
    """What a law stage cannot know about its target, said before its proxies run."""
    yield from (f"law `{stage.name}`: {text}" for text in stage.options.get("doubts") or ())
    target = plan.stages.get(str(stage.options.get("target")))
    proxies = [(s, s.train) for s in plan.stages.values() if s.group == stage.name and s.train is not None]
    shortest = min((train.steps for _, train in proxies), default=FEW_STEPS)
    if shortest < FEW_STEPS:
        yield f"the proxies of `{stage.name}` have {shortest} steps: too short to say much about a mixture"
    if target is None or target.train is None or not proxies:
        return
    if decays(target.train):
        yield (
            f"the lr of `{target.name}` decays, and the proxies of `{stage.name}` hold theirs: "
            f"the law is for a constant lr, so losses of `{target.name}` may differ from what it says"
        )
    tokens = target.train.tokens / max(train.tokens for _, train in proxies)
    if tokens > FAR_TOKENS:
        times = f"{tokens:,.0f} times as long as the proxies of `{stage.name}`"
        yield f"`{target.name}` is {times}: the law is extrapolated"
    model, largest = plan.model_of(target), max(_parameters(plan, s) for s, _ in proxies)
    if model is not None and largest and model.num_parameters / largest > FAR_PARAMETERS:
        yield (
            f"`{target.name}` is {model.num_parameters / largest:,.0f} times as large as the largest proxy of "
            f"`{stage.name}`: the law is extrapolated"
        )


def decays(train: Train) -> bool:
    """Whether a stage's lr ends lower than its peak."""
    _, peak, last = train.lr.points
    return last < 0.99 * peak


def _parameters(plan: RunPlan, stage: StagePlan) -> int:
    model = plan.model_of(stage)
    return model.num_parameters if model is not None else 0


def _unused_sources(plan: RunPlan) -> Iterator[str]:
    used: set[str] = set(plan.tokenizer.train_on)
    for stage in plan.stages.values():
        if stage.train is not None:
            used |= {*stage.train.mixture, *(stage.train.replay.sources if stage.train.replay else ())}
        used |= set(stage.options.get("sources", ()))
    for name in plan.sources:
        if name not in used:
            yield f"no stage trains on `{name}`"


def _not_measured(plan: RunPlan) -> Iterator[str]:
    for name, source in plan.sources.items():
        if nothing_held_out(source) and source.facts is not None:
            yield f"`{name}` has {few(source.facts)}: nothing of it is held out, so it is not measured"


def _lr_jump(stage: StagePlan, train: Train, before: float | None) -> Iterator[str]:
    first, peak, _ = train.lr.points
    if "lr" in stage.keep and before:
        if abs(first - before) > 0.1 * before:
            yield f"the lr of `{stage.name}` jumps at its start, {before:.1e} → {first:.1e}, although `keep` has `lr`"
    elif "optimizer" in stage.keep and before and first > 1.5 * before:
        jump = f"{before:.1e} → {first:.1e}"
        yield f"the lr of `{stage.name}` jumps at its start, {jump}, with a kept optimizer; a `warmup` would soften it"
    elif "optimizer" not in stage.keep and first >= 0.999 * peak > 0 and train.steps > 1:
        start = f"`{stage.name}` starts with a new optimizer at its highest lr, {first:.1e}"
        if train.lr.options.get("warmup") == "1 steps":
            yield f"{start}: its `warmup` is only one step of {train.steps:,}"
        else:
            yield f"{start}; a `warmup` is usual"


def ancestors(plan: RunPlan, stage: StagePlan) -> Iterator[StagePlan]:
    """The stages that a stage's weights have gone through, nearest first."""
    parent = plan.stages.get(stage.parent or "")
    while parent is not None:
        yield parent
        parent = plan.stages.get(parent.parent or "")


def _read_again(plan: RunPlan, stage: StagePlan, train: Train) -> Iterator[str]:
    if "cursor" in stage.keep:
        return
    for above in ancestors(plan, stage):
        if above.train is None:
            continue
        both = [n for n in train.mixture if n in above.train.mixture]
        for name in both:
            yield (
                f"`{stage.name}` reads `{name}` from its beginning again, which `{above.name}` has read; "
                "`cursor` in `keep` goes on behind it"
            )
        if both:
            return


def _positions(plan: RunPlan, name: str, train: Train) -> Iterator[str]:
    model = plan.model_of(plan.stages[name])
    longest = model.max_position_embeddings if model is not None else None
    if longest is not None and train.seq_length > longest:
        yield f"`{name}`: `seq_length` {train.seq_length:,} is more than the {longest:,} positions that the model knows"


def _idle(name: str, train: Train, num_devices: int | None) -> Iterator[str]:
    if num_devices and train.parallel.world_size < num_devices:
        yield f"`{name}` uses {train.parallel.world_size} of {num_devices} devices"


def tokens_by_source(train: Train) -> dict[tuple[str, str], float]:
    """Tokens that a stage reads, by (source, role)."""
    replayed = train.tokens * train.replay.share if train.replay else 0.0
    found = {(name, "new"): (train.tokens - replayed) * share for name, share in train.mixture.items()}
    if train.replay:
        found |= {(name, "replay"): replayed * share for name, share in train.replay.sources.items()}
    return found


def passes(plan: RunPlan, stage: StagePlan) -> dict[str, float]:
    """How often each corpus has been read when a stage ends, over the stages that its weights went through."""
    found: dict[str, float] = {}
    part = 1.0
    for one in [stage, *ancestors(plan, stage)]:
        if one.train is not None:
            for (name, _), tokens in tokens_by_source(one.train).items():
                source = plan.sources.get(name)
                if source is not None and source.facts is not None and source.facts.tokens:
                    found[name] = found.get(name, 0.0) + part * tokens / source.facts.tokens
        part = _part_of_parent(plan, one)
    return found


def _part_of_parent(plan: RunPlan, stage: StagePlan) -> float:
    """How much of its parent's length a stage goes on from: less than 1 at a fork."""
    parent = plan.stages.get(stage.parent or "")
    if parent is None or parent.train is None or stage.parent_at is None:
        return 1.0
    step = stage.parent_at if isinstance(stage.parent_at, int) else max(parent.keep_steps, default=parent.train.steps)
    return step / parent.train.steps


def _many_passes(plan: RunPlan) -> Iterator[str]:
    most: dict[str, float] = {}
    for stage in plan.stages.values():
        for name, count in passes(plan, stage).items():
            most[name] = max(most.get(name, 0.0), count)
    for name, count in most.items():
        if count > MANY_PASSES + 0.05:
            facts = plan.sources[name].facts
            about = "about " if facts is None or facts.estimated else ""
            size = show_count(facts.tokens) if facts else "?"
            yield (
                f"`{name}` ({size} tokens) is read {about}{count:.1f} times; "
                "past about 4 passes repeated text helps little (arXiv:2305.16264)"
            )
