"""A composed recipe to a `RunPlan`: the one entry that commands use.

    compose (Hydra) → read (schema) → proxies of laws → sources, base, tokenizer, model → stages in order
    → lr joined over them → fingerprints → checked

A recipe that takes values from a law is built twice once the law is there: with the values that stand in, for the
fingerprints, then with the law's. Everything that is wrong is collected as far as one can see and reported together.
Nothing is written.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt.base.errors import CptError, PlanError, UsageError
from cpt.base.records import to_json
from cpt.config import base as bases
from cpt.config import convert_checks, law_checks, machine
from cpt.config import laws as law_stages
from cpt.config import model as models
from cpt.config import order as orders
from cpt.config import sources as data
from cpt.config import stages as stage_values
from cpt.config.compose import Composed, compose
from cpt.config.law_grid import Size, size_label
from cpt.config.order import From
from cpt.config.read import Reading, complete, make, overlay, read
from cpt.config.schema import ROOT, Section, node_at
from cpt.config.suggest import dotted
from cpt.plan import check, fingerprint
from cpt.plan.budget import check_memory
from cpt.plan.model import ModelConfig
from cpt.plan.types import Base, DataOptions, Lr, RunPlan, Source, StagePlan, Tokenizer

if TYPE_CHECKING:
    from cpt.schedules.join import StageLr


@dataclass
class _Work:
    """What is known while a plan is being built."""

    composed: Composed
    values: dict[str, Any]
    cwd: Path
    cache: Path
    runs: Path
    laws: law_stages.Laws = field(default_factory=law_stages.Laws)
    errors: list[CptError] = field(default_factory=list)

    @contextmanager
    def catching(self, prefix: str = "") -> Iterator[None]:
        """Collect an error instead of stopping at it."""
        try:
            yield
        except CptError as error:
            message = (
                f"{prefix}{error.message}"
                if not error.message.startswith(("`stages.", prefix.removesuffix("`: ") or "\0"))
                else error.message
            )
            self.errors.append(type(error)(message, *error.hints, more=error.more))

    def stop_if_wrong(self) -> None:
        """Report everything that has been collected.

        Raises:
            CptError: there is something.
        """
        if self.errors:
            raise together(self.errors)


def together(errors: Sequence[CptError]) -> CptError:
    """One error that carries all of them: of the kind of the first."""
    first, *rest = errors
    return type(first)(first.message, *first.hints, more=(*first.more, *rest))


def plan(
    recipe: str | None,
    overrides: Sequence[str] = (),
    *,
    cwd: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
    laws: Mapping[str, Path] | None = None,
) -> RunPlan:
    """The checked plan of a recipe.

    Args:
        recipe: its name or file; None when `recipe=...` is among the overrides.
        overrides: `key=value` texts.
        cwd: folder that relative paths, `./recipes` and `./conf` are found in; None = the current one.
        environ: environment that `CPT_CACHE` is looked up in; None = the process's.
        laws: by law stage that is done, its folder; None = look for one with an equal fingerprint among the runs.

    Raises:
        UsageError: something is written wrongly or points at nothing.
        PlanError: it reads well but cannot be run.
    """
    texts = [*([f"recipe={recipe}"] if recipe is not None else []), *overrides]
    return from_composed(compose(texts, Path(cwd) if cwd else None), cwd=cwd, environ=environ, laws=laws)


def from_composed(
    composed: Composed,
    *,
    cwd: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
    laws: Mapping[str, Path] | None = None,
) -> RunPlan:
    """The checked plan of a composed recipe; see `plan`."""
    here, variables = Path(cwd or Path.cwd()).resolve(), os.environ if environ is None else environ
    draft = _build(composed, here, variables, {})
    known, told = _known_laws(draft, laws)
    if not known:
        return draft
    done = _build(composed, here, variables, known)
    stages = {
        n: dataclasses.replace(
            s, fingerprint=draft.stages[n].fingerprint, options={**s.options, **told[n]} if n in told else s.options
        )
        for n, s in done.stages.items()
    }
    return dataclasses.replace(done, stages=stages, id=draft.id, name=draft.name)


def _known_laws(
    plan: RunPlan, folders: Mapping[str, Path] | None
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, object]]]:
    """What the laws give that later stages take values from, as far as they are fitted and may be used; and what the
    plan says of those that were given as files.

    Raises:
        PlanError: a law that was given as a file must not be used, or cannot be asked for its target.
    """
    wanted = {value.partition(".")[0] for stage in plan.stages.values() for value in stage.law.values()}
    if not wanted:
        return {}, {}
    from cpt.stages import law_file, law_values, reuse
    from cpt.stages.law import options_of

    found: dict[str, dict[str, Any]] = {}
    told: dict[str, dict[str, object]] = {}
    for name in sorted(wanted):
        stage = plan.stages[name]
        file = stage.options.get("file")
        if file is not None:
            options = options_of(plan, name)
            try:
                saved = law_file.of_file(options)
            except CptError as error:
                raise type(error)(f"`stages.{name}.file`: {error.message}", *error.hints) from None
            values, why = law_values.given(saved)
            if not values:
                raise PlanError(f"the law in `{file}` must not be used: {why}", *law_values.by_hand(plan, name))
            found[name], told[name] = values, law_file.told(saved, options)
            continue
        folder = folders.get(name) if folders is not None else reuse.find(plan, stage, Path("/"))
        values = law_values.result(folder)[0] if folder is not None else {}
        if values:
            found[name] = values
    return found, told


def _build(
    composed: Composed, cwd: Path, environ: Mapping[str, str], known: Mapping[str, Mapping[str, Any]]
) -> RunPlan:
    """The checked plan, with the values of the laws that are known."""
    work = _read(composed, cwd, environ)
    _expand_laws(work, known)
    work.stop_if_wrong()
    sources = data.build_sources(work.values.get("sources") or {}, work.cwd, work.errors)
    checkpoint = _base(work)
    order = _order(work)
    work.stop_if_wrong()
    with work.catching():
        tokenizer = data.build_tokenizer(work.values.get("tokenizer") or {}, checkpoint, sources, work.cache, work.cwd)
        options = data.build_data(complete(_section("data"), work.values.get("data") or {}), tokenizer)
        sources = data.with_facts(sources, tokenizer, options, work.cache, work.errors)
        model = _model(work, checkpoint, tokenizer)
    launcher = _launcher(work)
    stages, outside = _stages(work, order, sources, checkpoint)
    work.stop_if_wrong()
    stages = law_stages.with_facts(_with_lr(work, stages, outside, checkpoint), model)
    return _finish(work, checkpoint, model, tokenizer, options, sources, stages, launcher, outside)


def _expand_laws(work: _Work, known: Mapping[str, Mapping[str, Any]]) -> None:
    """Proxies of law stages as stages of their own, and the values that laws give."""

    def sizes(name: str, law: Mapping[str, Any], target: str | None) -> list[Size]:
        others = [bases.find(text, None, "auto", work.cwd, work.runs, work.cache) for text in law.get("bases") or ()]
        found = [
            Size(size_label(c.model.num_parameters), c.conversion.source if c.conversion else str(c.path))
            for c in others
        ]
        start = law.get("from") or (None if found else work.values["stages"].get(target, {}).get("from", "base"))
        if start is not None:
            scratch = start == "base" and (work.values.get("base") or {}).get("checkpoint") == "scratch"
            found.insert(0, Size("", start, scratch))
        labels = [size.label for size in found]
        for label in labels:
            if labels.count(label) > 1:
                raise UsageError(f"`stages.{name}.bases` has two checkpoints of {label or 'one'} parameters")
        return found

    for name, stage in work.values["stages"].items():
        for key in ("file", "data") if stage.get("kind") == "law" else ():
            if stage.get(key) is not None:
                stage[key] = str((work.cwd / Path(stage[key]).expanduser()).resolve())
        if stage.get("kind") == "law" and stage.get("file") is not None:
            with work.catching(f"`stages.{name}.file`: "):
                work.values["stages"][name] = law_stages.of_file(stage)
    work.stop_if_wrong()
    work.laws = law_stages.expand(work.values, known, sizes, work.errors)


def _section(name: str) -> Section:
    node = node_at((name,))
    assert isinstance(node, Section)
    return node


def _read(composed: Composed, cwd: Path, environ: Mapping[str, str]) -> _Work:
    """Typed values, or everything that is wrong with them."""
    reading = Reading(composed.recipe)
    values = read(composed.config, reading)
    if reading.unfilled:
        reading.errors.insert(0, _unfilled(composed.recipe, reading))
    cache = values.get("cache") or environ.get("CPT_CACHE") or ".cpt/cache"
    runs = values.get("runs") or "runs"
    work = _Work(
        composed,
        values,
        cwd,
        cache=(cwd / Path(cache).expanduser()).resolve(),
        runs=(cwd / Path(runs).expanduser()).resolve(),
        errors=reading.errors,
    )
    for key, folder in (("runs", work.runs), ("cache", work.cache)):
        if why := machine.why_unwritable(folder):
            work.errors.append(UsageError(f"cannot write the `{key}` folder `{folder}`: {why}"))
    if not values.get("stages") and not reading.errors:
        work.errors.append(UsageError(f"the recipe `{composed.recipe}` has no stages"))
    if work.errors:
        _launcher(work)  # what its class says of the other values is told as well
    work.stop_if_wrong()
    return work


def _unfilled(recipe: str, reading: Reading) -> UsageError:
    """One line that names what the recipe leaves to the person, and the overrides to give."""
    named = ", ".join(f"`{dotted(p)}`" for p in reading.unfilled)
    gives = " ".join(f"{dotted(p)}={getattr(node_at(p), 'refill', '') or '...'}" for p in reading.unfilled)
    return UsageError(f"the recipe `{recipe}` leaves {named} to you", f"`cpt plan recipe={recipe} {gives}`")


def _base(work: _Work) -> bases.Checkpoint | None:
    """The base checkpoint; None for `scratch`."""
    given = work.values.get("base") or {}
    text = given.get("checkpoint")
    if text is None:
        if not any(e.message.startswith("`base") for e in work.errors):
            work.errors.append(UsageError("`base` is missing", "`base=/models/my-base`, or `base=scratch`"))
        return None
    if text == "scratch":
        for key in ("format", "config"):
            if given.get(key, "auto") not in ("auto", None):
                work.errors.append(UsageError(f"`base.{key}` would have no effect: the base is `scratch`"))
        return None
    with work.catching("`base.checkpoint`: "):
        format_, config = given.get("format", "auto"), given.get("config")
        return bases.find(text, None, format_, work.cwd, work.runs, work.cache, config)
    return None


def _order(work: _Work) -> dict[str, From]:
    """`from` of every stage, parents first."""
    stages: Mapping[str, Any] = work.values["stages"]
    folders = [p.name for p in work.runs.iterdir() if p.is_dir()] if work.runs.is_dir() else []
    found: dict[str, From] = {}
    for name, values in stages.items():
        text = values.get("from")
        if text is None:
            first = next(iter(stages))
            hint = "base" if name == first else [n for n in stages if n != name][-1]
            work.errors.append(UsageError(f"`stages.{name}.from` is missing", f"such as `stages.{name}.from={hint}`"))
            continue
        with work.catching(f"`stages.{name}.from`: "):
            found[name] = orders.parse_from(text, list(stages), folders)
            kind = stages.get(found[name].stage or "", {}).get("kind")
            if kind in ("law", "merged"):
                above = found[name].stage
                hint = (
                    f"`${{law:{above}.mixture}}` takes the mixture from it" if kind == "law" else "name another stage"
                )
                raise PlanError(f"`{above}` is of kind `{kind}`, which leaves no weights", hint)
    if len(found) < len(stages):
        return {}
    with work.catching():
        return {name: found[name] for name in orders.order(found, work.laws.after)}
    return {}


def _model(work: _Work, checkpoint: bases.Checkpoint | None, tokenizer: Tokenizer) -> ModelConfig | None:
    values = work.values.get("model") or {}
    if checkpoint is not None:
        work.errors += models.compare(values, checkpoint.model)
        return checkpoint.model
    below = work.values.get("train") or {}
    lengths = [overlay(stage_values.STAGE, below, s).get("seq_length") for s in work.values["stages"].values()]
    longest = max((n for n in lengths if n), default=0)
    return models.from_values(values, tokenizer.vocab_size, longest)


def _launcher(work: _Work) -> Any:
    """The launcher's options, checked by its class."""
    from cpt.launch import LAUNCHERS

    given = work.values.get("launcher") or {}
    name = given.get("name", "local")
    with work.catching("`launcher`: "):
        return name, make(LAUNCHERS.get(name), {k: v for k, v in given.items() if k != "name" and v is not None})
    return name, None


def _stages(
    work: _Work, order: Mapping[str, From], sources: Mapping[str, Source], checkpoint: bases.Checkpoint | None
) -> tuple[dict[str, StagePlan], dict[str, bases.Checkpoint]]:
    """The stages in order without lr and fingerprint, and the checkpoints outside of the run that they start from."""
    launcher = _launcher(work)[1]
    devices = launcher.num_devices() if launcher is not None else None
    below = work.values.get("train") or {}
    saving = work.values.get("checkpoint") or {}
    measured = tuple(n for n, s in sources.items() if (s.valid > 0 or s.valid_paths) and not check.nothing_held_out(s))
    built: dict[str, StagePlan] = {}
    outside: dict[str, bases.Checkpoint] = {}
    for name, parent in order.items():
        values = work.values["stages"][name]
        kind = values.get("kind", "train")
        where = f"`stages.{name}`: "
        if parent.folder is not None:
            with work.catching(where):
                outside[name] = bases.find(parent.folder, parent.at, "auto", work.cwd, work.runs, work.cache)
        scratch = parent.base and checkpoint is None
        target = (
            None
            if scratch
            else parent.stage or ("base" if parent.base else str(outside[name].path) if name in outside else "")
        )
        common: dict[str, Any] = {
            "name": name,
            "kind": kind,
            "parent": target,
            "parent_at": None if parent.folder else parent.at,
            "group": work.laws.group.get(name),
            "after": work.laws.after.get(name, ()) if kind in ("law", "merged") else (),
            "law": work.laws.taken.get(name, {}),
            "assumed": name in work.laws.assumed,
            "model": _own_model(name, parent, work, built, outside, checkpoint),
        }
        with work.catching(where):
            if kind == "train":
                merged = overlay(stage_values.STAGE, {**below, "checkpoint": saving}, values)
                around = stage_values.Surroundings(
                    name=name,
                    parent=parent,
                    from_scratch=scratch,
                    built=built,
                    sources=tuple(sources),
                    measured=measured,
                    before=tuple(order)[: list(order).index(name)],
                    num_devices=devices,
                )
                _long_enough(work.laws.group.get(name, name), merged)
                train = stage_values.build_train(merged, around)
                built[name] = StagePlan(**common, keep=_keep(merged), train=train)
            else:
                grid = work.laws.grids.get(name)
                law = law_stages.options(name, values, grid, work.values) if grid is not None else None
                built[name] = StagePlan(**common, options=law or _options(kind, values, below, measured))
    return built, outside


def _own_model(
    name: str,
    parent: From,
    work: _Work,
    built: Mapping[str, StagePlan],
    outside: Mapping[str, bases.Checkpoint],
    checkpoint: bases.Checkpoint | None,
) -> ModelConfig | None:
    """The model of a proxy of another size, and of what comes from one; None = the run's."""
    if parent.stage is not None and parent.stage in built:
        return built[parent.stage].model
    if name not in work.laws.group or name not in outside:
        return None
    own = outside[name].model
    return own if checkpoint is None or own != checkpoint.model else None


def _keep(values: Mapping[str, Any]) -> tuple[str, ...]:
    """What is kept, in the order of `KEEP`, so that the order in the recipe changes nothing."""
    from cpt.plan.types import KEEP

    return tuple(k for k in KEEP if k in (values.get("keep") or ()))


def _long_enough(name: str, values: Mapping[str, Any]) -> None:
    tokens, batch, length = (values.get(k) for k in ("tokens", "global_batch_size", "seq_length"))
    if tokens and batch and length and tokens < batch * length / 2:
        raise stage_values.too_short(name, tokens, batch * length)


def _options(
    kind: str, values: Mapping[str, Any], train: Mapping[str, Any], sources: tuple[str, ...]
) -> dict[str, Any]:
    """Options of a stage of another kind: as given, then from `train` where it has the key, then the class's own."""
    from cpt.stages import STAGES

    cls = STAGES.get(kind)
    given = {k: v for k, v in values.items() if k not in ("kind", "from")}
    names: list[str] = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    given |= {name: train[name] for name in names if name not in given and name in train}
    if "sources" in names and not given.get("sources"):
        given["sources"] = sources
    made = make(cls, given)
    return dict(to_json(dataclasses.asdict(made))) if dataclasses.is_dataclass(made) else dict(given)  # type: ignore[arg-type]


def _with_lr(
    work: _Work,
    stages: Mapping[str, StagePlan],
    outside: Mapping[str, bases.Checkpoint],
    checkpoint: bases.Checkpoint | None,
) -> dict[str, StagePlan]:
    """The stages with the lr joined over them, and the steps at which later stages fork."""
    from cpt.schedules import join

    starts = {**outside, **{n: checkpoint for n, s in stages.items() if s.parent == "base" and checkpoint is not None}}
    asked = [_stage_lr(work, s, stages, starts) for s in stages.values() if s.train is not None]
    found: Mapping[str, Lr] = {}
    with work.catching():
        found = join.resolve(asked)
    if not found:
        return dict(stages)
    done = {}
    for name, stage in stages.items():
        train = dataclasses.replace(stage.train, lr=found[name]) if stage.train is not None else None
        done[name] = dataclasses.replace(stage, train=train)
    for name, stage in list(done.items()):
        parent = done.get(stage.parent or "")
        if stage.parent_at is None or parent is None:
            continue
        if parent.train is None:
            work.errors.append(
                PlanError(
                    f"`stages.{name}.from` asks for a step of `{parent.name}`, "
                    f"which has none: its kind is `{parent.kind}`"
                )
            )
            continue
        with work.catching(f"`stages.{name}.from`: "):
            step = join.fork_step(stage.parent_at, parent.name, parent.train.steps, parent.train.lr)
            steps = tuple(sorted({*parent.keep_steps, step}))
            done[parent.name] = dataclasses.replace(parent, keep_steps=steps)
    return done


def _stage_lr(
    work: _Work, stage: StagePlan, stages: Mapping[str, StagePlan], outside: Mapping[str, bases.Checkpoint]
) -> StageLr:
    from cpt.schedules.join import StageLr

    train = stage.train
    assert train is not None
    # A stage that measures hands on what it was given, lr included.
    parent, at = stage.parent, stage.parent_at
    while parent in stages and stages[parent].kind == "evaluate":  # type: ignore[index]
        parent, at = stages[parent].parent, stages[parent].parent_at  # type: ignore[index]
    above = stages.get(parent or "")
    is_train = above is not None and above.train is not None
    known = outside.get(stage.name)
    return StageLr(
        name=stage.name,
        steps=train.steps,
        tokens_per_step=train.global_batch_size * train.seq_length,
        lr=work.values["stages"][stage.name].get("lr") or None,
        keep_lr="lr" in stage.keep,
        parent=parent if is_train else None,
        parent_at=at,
        outside=known.lr if known is not None else None,
    )


def _finish(
    work: _Work,
    checkpoint: bases.Checkpoint | None,
    model: ModelConfig | None,
    tokenizer: Tokenizer,
    options: DataOptions,
    sources: Mapping[str, Source],
    stages: Mapping[str, StagePlan],
    launcher: tuple[str, Any],
    outside: Mapping[str, bases.Checkpoint],
) -> RunPlan:
    """The plan with fingerprints, id and name, checked."""
    base = Base(kind="scratch")
    if checkpoint is not None:
        base = Base(kind=checkpoint.kind, path=str(checkpoint.path), identity=checkpoint.identity)
    name, made = launcher
    draft = RunPlan(
        id="",
        name="",
        recipe=work.composed.recipe,
        base=base,
        model=model,
        tokenizer=tokenizer,
        sources=sources,
        data=options,
        stages=stages,
        conversions={
            str(c.path): c.conversion
            for c in (*([checkpoint] if checkpoint is not None else []), *outside.values())
            if c.conversion is not None
        },
        tracking=to_json(complete(_section("tracking"), work.values.get("tracking") or {})),
        launcher={"name": name, **(to_json(dataclasses.asdict(made)) if dataclasses.is_dataclass(made) else {})},  # type: ignore[arg-type]
        cache=str(work.cache),
        runs=str(work.runs),
        config=work.composed.config,
        notes=work.composed.notes,
    )
    facts = {
        name: check.Outside(
            kind=c.kind,
            identity=c.identity,
            holds=c.holds,
            model=c.model,
            tokenizer_hash=c.tokenizer_hash,
            other_tokenizer=data.fit(c.tokenizer, tokenizer) if c.kind == "hf" else None,
        )
        for name, c in {**outside, **({"base": checkpoint} if checkpoint is not None else {})}.items()
    }
    work.errors += check.broken(draft, facts, made.num_devices() if made is not None else None)
    work.errors += convert_checks.impossible(draft)
    work.errors += [*law_checks.too_costly(draft), *law_checks.unfittable(draft), *law_checks.wrong_table(draft)]
    with work.catching():
        check_memory(draft, machine.devices(made))
    work.stop_if_wrong()
    identities = {name: c.identity for name, c in outside.items()}
    done = fingerprint.with_fingerprints(draft, identities, _curves(stages))
    given = work.values.get("name")
    return dataclasses.replace(done, name=given or f"{done.recipe}-{done.short_id}")


def _curves(stages: Mapping[str, StagePlan], points: int = 512) -> dict[str, list[float]]:
    """The lr of every train stage at up to so many of its steps, first and last among them."""
    from cpt.schedules import curve

    found = {}
    for name, stage in stages.items():
        if stage.train is None:
            continue
        at, last = curve(stage.train.lr), stage.train.steps - 1
        count = min(points, last + 1)
        found[name] = [at(round(i * last / max(1, count - 1))) for i in range(count)]
    return found


def warnings(plan: RunPlan) -> list[str]:
    """What can run but is probably not meant, one sentence each."""
    from cpt.launch import launcher_of
    from cpt.schedules import curve
    from cpt.schedules.join import pre_anneal_step

    before = {}
    for name, stage in plan.stages.items():
        parent = plan.stages.get(stage.parent or "")
        while parent is not None and parent.kind == "evaluate":
            stage, parent = parent, plan.stages.get(parent.parent or "")
        if parent is None or parent.train is None:
            continue
        at = stage.parent_at
        step = pre_anneal_step(parent.train.lr, parent.train.steps) if at == "pre_anneal" else at
        steps = parent.train.steps if step is None else int(step)
        before[name] = curve(parent.train.lr)(steps - 1)
    devices = launcher_of(plan.launcher).num_devices()
    return [*plan.notes, *_tokenizer_warnings(plan), *check.warnings(plan, before, devices)]


def _tokenizer_warnings(plan: RunPlan) -> list[str]:
    """Where the run's tokenizer is not the one beside a Hugging Face folder that a stage starts from."""
    folders = {"base": plan.base.path if plan.base.kind == "hf" else None}
    others = [s for s in plan.stages.values() if s.group is None and s.kind != "law"]
    folders |= {s.name: s.parent for s in others if s.parent not in (None, "base", *plan.stages)}
    beside = {n: Path(f) for n, f in folders.items() if f is not None and (Path(f) / "config.json").is_file()}
    fits = {n: data.fit(f if (f / "tokenizer.json").is_file() else None, plan.tokenizer) for n, f in beside.items()}
    return list(check.tokenizer_warnings(plan, {n: o for n, o in fits.items() if o is not None}))


__all__ = ["ROOT", "from_composed", "plan", "together", "warnings"]
