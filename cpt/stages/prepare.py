"""What a run needs before its final plan can be made: a tokenizer, the tokenised corpora, and native checkpoints.

All go into the cache under their own identity, so that other runs find them; a second call finds everything done.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cpt.base.errors import PlanError, UsageError
from cpt.base.processes import num_cores
from cpt.base.units import show_bytes, show_duration
from cpt.plan.check import few, nothing_held_out
from cpt.plan.types import Conversion, RunPlan

if TYPE_CHECKING:
    from cpt.data.prepare import Preparing


@dataclass(frozen=True)
class Prepared:
    """Where the prepared data of a run lies: corpus folder by source, `tokenizer.json`."""

    corpora: dict[str, str]
    tokenizer: str | None


def prepare(plan: RunPlan, report: Callable[..., None], workers: int | None = None) -> Prepared:
    """Train the tokenizer if the run asks for one, and tokenise every source that a stage uses.

    Args:
        plan: may still hold estimates.
        report: called as `report(kind, **fields)` with the events of `base.events`.
        workers: processes to tokenise and convert with; None = the cores of this machine.
    """
    from cpt.data import prepare as corpora

    workers = workers or num_cores()
    for folder, conversion in plan.conversions.items():
        make_native(conversion, Path(folder), workers, report, keepers=_keepers(plan, folder))
    names = used_sources(plan)
    if not names:
        return Prepared({}, plan.tokenizer.path)
    tokenizer = tokenizer_of(plan, report)
    folders = {}
    for name in names:
        start = time.monotonic()
        corpus = corpora.prepare(plan.sources[name], tokenizer, plan.data, plan.cache, workers, _told(report))
        folders[name] = str(corpus.folder)
        if nothing_held_out(dataclasses.replace(plan.sources[name], facts=corpus.facts)):
            report("note", text=f"source `{name}` has {few(corpus.facts)}: nothing of it is held out to measure")
        report("data", source=name, tokens=corpus.facts.tokens, seconds=round(time.monotonic() - start, 3), done=True)
    return Prepared(folders, str(tokenizer))


def _keepers(plan: RunPlan, folder: str) -> list[str]:
    """What to set in the recipe so that no stage wants the optimizer's state of a checkpoint that is converted first:
    one line for each stage that wants it."""
    found = []
    for stage in plan.stages.values():
        parent = stage.parent or ""
        while parent in plan.stages and plan.stages[parent].kind == "evaluate":  # gives on what it was given
            parent = plan.stages[parent].parent or ""
        if (plan.base.path if parent == "base" else parent) != folder:
            continue
        other = stage.kind == "convert" and stage.options.get("to") in ("megatron", "atom")
        if "optimizer" in stage.keep:
            found.append(f"take `optimizer` out of `stages.{stage.name}.keep`: its weights alone can be used")
        elif other and not stage.options.get("weights_only"):
            found.append(f"`stages.{stage.name}.weights_only=true`: its weights alone can be used")
    return found


def make_native(
    conversion: Conversion,
    folder: Path,
    workers: int,
    report: Callable[..., None],
    keepers: Sequence[str] = (),
) -> None:
    """Convert a checkpoint of another format into a folder of steps of ours; nothing to do where that is there.

    An optimizer's state that is not its model's is left out, so what is made depends on the source only.

    Args:
        keepers: what to do instead, if it is left out but wanted; empty = no stage wants it.

    Raises:
        UsageError: as `convert`; or the optimizer's state is wanted, and it is not its model's.
    """
    from cpt.checkpoint import manifest, master, store
    from cpt.checkpoint.formats import Reading, Writing
    from cpt.checkpoint.job.convert import convert
    from cpt.checkpoint.job.planning import Request, Running
    from cpt.checkpoint.job.planning import plan as plan_conversion

    if folder.is_dir():
        made = manifest.read(store.resolve(folder)).conversion or {}
        if keepers and made.get("options", {}).get("optimizer") == "none":
            raise UsageError(
                f"`{conversion.source}`: the optimizer's main weights are not the model's weights", *keepers
            )
        return
    start = time.monotonic()
    report("note", text=f"converting `{conversion.source}` ({conversion.shown}) to a native checkpoint")
    config = None if conversion.config is None else Path(conversion.config)
    request = Request(
        source=Path(conversion.source),
        out=folder,
        to="torch_dist",
        reading=Reading(config=config),
        writing=Writing(spec="cpt"),  # our own layers are to load it
    )
    running = Running(workers=workers)
    try:
        done = convert(plan_conversion(request), running, command="cpt run")
    except master.NotItsWeights as error:
        if keepers:
            raise UsageError(error.message, error.hints[0], *keepers) from None
        report(
            "note", text=f"{error.message}; no stage keeps its optimizer's state, so the weights alone are converted"
        )
        request = dataclasses.replace(request, writing=dataclasses.replace(request.writing, optimizer="none"))
        done = convert(plan_conversion(request), running, command="cpt run")
    seconds = show_duration(time.monotonic() - start)
    report("note", text=f"converted `{conversion.source}`: {show_bytes(done.bytes)} in {seconds}")


def _told(report: Callable[..., None]) -> Callable[[Preparing], None]:
    """Progress of one source as events, at most two a second; each note once."""
    last = [0.0]
    notes: set[str] = set()

    def tell(now: Preparing) -> None:
        if now.note and now.note not in notes:
            notes.add(now.note)
            report("note", text=f"source `{now.source}`: {now.note}")
        if time.monotonic() - last[0] > 0.5:
            last[0] = time.monotonic()
            report(
                "data",
                source=now.source,
                tokens=now.tokens,
                documents=now.documents,
                bytes=now.bytes,
                total_bytes=now.total_bytes,
                done=False,
            )

    return tell


def used_sources(plan: RunPlan) -> list[str]:
    """The sources that some stage reads, in the recipe's order."""
    used: set[str] = set()
    for stage in plan.stages.values():
        if stage.kind == "evaluate":
            used |= set(stage.options.get("sources") or plan.sources)
        if stage.train is not None:
            used |= set(stage.train.mixture) | set(stage.train.evaluate.sources)
            used |= set(stage.train.replay.sources) if stage.train.replay else set()
            used |= {stage.train.stop_if.source} if stage.train.stop_if else set()
    return [name for name in plan.sources if name in used]


def tokenizer_of(plan: RunPlan, report: Callable[..., None]) -> Path:
    """The run's `tokenizer.json`, trained first when the recipe asks for that."""
    if plan.tokenizer.path is not None:
        return Path(plan.tokenizer.path)
    from cpt.data import tokenizer

    if not plan.tokenizer.train_on or plan.tokenizer.vocab_size is None:
        raise PlanError("the run has no tokenizer", "set `tokenizer` to a `tokenizer.json`, or `tokenizer.train_on`")
    sources = [plan.sources[name] for name in plan.tokenizer.train_on]
    size = plan.tokenizer.vocab_size
    if tokenizer.find_trained(sources, size, plan.cache) is None:
        report("note", text=f"training a tokenizer of {size:,} tokens on {', '.join(s.name for s in sources)}")
    return Path(tokenizer.train(sources, size, plan.cache))
