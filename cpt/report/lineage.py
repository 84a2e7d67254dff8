"""A checkpoint's chain of parents back to the base model, from manifests: tokens, mixture, lrs, scores at each link.

Each link is told apart by content (the identity that a child recorded), not by its path: a parent that is gone or was
changed since is shown and named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cpt.base.errors import UsageError
from cpt.base.events import stage_events
from cpt.checkpoint import find as checkpoints
from cpt.checkpoint import manifest, origin, store
from cpt.checkpoint.job.planning import state_of_files
from cpt.checkpoint.manifest import Manifest
from cpt.checkpoint.origin import Converted
from cpt.evaluate import measurements
from cpt.plan.types import RunPlan, StagePlan, Train
from cpt.report import show
from cpt.report.runs import find_run, run_of
from cpt.report.sections import asked
from cpt.schedules.join import points
from cpt.stages import state
from cpt.stages.attempt import read_plan

LONGEST = 1000  # links; a longer chain bites its own tail


@dataclass(frozen=True, kw_only=True)
class Link:
    """One checkpoint of a chain."""

    kind: str  # stage | converted | export | base | scratch | gone
    path: str | None
    source: str = ""  # that it was converted from, with its format
    stage: str = ""
    run: str = ""
    plan: str = ""
    step: int | None = None
    tokens: int | None = None  # of the stage
    mixture: Mapping[str, float] = field(default_factory=dict)  # share of all tokens, replay named apart
    schedule: str = ""
    lr: tuple[float, float, float] | None = None  # planned: first, highest and last up to this step
    last_lr: float | None = None  # that the optimizer ended on
    losses: Mapping[str, float] = field(default_factory=dict)  # validation, of exactly this checkpoint [nats/token]
    measured_by: str = ""  # the stage that measured them at its start, when it was not the checkpoint's own
    phase: str = ""
    identity: str = ""
    created: float | None = None  # [unix seconds]
    note: str = ""


def find(name: str, runs: Path = Path("runs")) -> Path:
    """The checkpoint folder that a person means by a path or the name of a run.

    Raises:
        UsageError: there is none.
    """
    path = Path(name)
    if not path.exists():
        path = find_run(name, runs)
    path = path.parent if path.is_file() else path
    try:
        return store.resolve(path)
    except UsageError:  # none of ours
        return checkpoints.find(path).folder


def chain(checkpoint: Path) -> list[Link]:
    """The chain from a checkpoint back to where it all began; the checkpoint itself comes first.

    Raises:
        UsageError: the checkpoint's own manifest cannot be read.
    """
    links: list[Link] = []
    wanted: str | None = None  # the identity that a child recorded
    child: _Child | None = None
    seen: set[Path] = set()
    while len(links) < LONGEST:
        checkpoint = checkpoint.resolve()
        if checkpoint in seen:
            raise UsageError(f"`{checkpoint}` names itself among its parents: its manifest was changed by hand")
        seen.add(checkpoint)
        made = origin.read(checkpoint)
        if (checkpoint / manifest.NAME).is_file():
            try:
                found = manifest.read(checkpoint)
            except UsageError as error:
                if not links:
                    raise
                links.append(Link(kind="gone", path=str(checkpoint), identity=wanted or "", note=error.message))
                return links
            links.append(_link(checkpoint, found, wanted, child, made))
            child = _Child(checkpoint, found)
            if parent := found.origin.parent:
                checkpoint, wanted = Path(str(parent.get("path") or "")), str(parent.get("identity") or "")
                continue
            if made is None:
                links.append(Link(kind="scratch", path=None))
                return links
        elif not links and (exported := _exported_from(checkpoint)):
            stage, run, source = exported
            links.append(Link(kind="export", path=str(checkpoint), stage=stage, run=run))
            checkpoint = source
            continue
        elif made is not None:
            links.append(
                Link(kind="converted", path=str(checkpoint), source=str(made), step=made.step, note=_changed(made))
            )
        else:
            links.append(_last(checkpoint, wanted, child))
            return links
        if made.members:
            return links
        checkpoint, wanted = made.path, None
    return links


def _changed(made: Converted) -> str:
    """A note when what a checkpoint was converted from is another one by now."""
    same = made.members or not made.path.is_dir() or not made.identity or state_of_files(made.path) == made.identity
    return "" if same else "its source has changed since it was converted"


@dataclass(frozen=True)
class _Child:
    """The link that started from the one that is looked at."""

    path: Path
    found: Manifest

    @property
    def stage(self) -> str:
        return self.found.origin.stage

    def start(self) -> dict[str, float]:
        """What the stage measured before its first step, by source [nats/token]: the losses of its parent."""
        plan = _plan(run_of(self.path))
        stage = plan.stages.get(self.stage) if plan else None
        if stage is None or stage.fingerprint != self.found.origin.fingerprint:
            return {}
        return _losses(self.path, "start")


def _last(path: Path, identity: str | None, child: _Child | None) -> Link:
    """The last link: a checkpoint that nothing says the parents of.

    Args:
        identity: that a run recorded, which starts from Hugging Face folders and from checkpoints of ours.
    """
    if not path.is_dir():
        return Link(kind="gone", path=str(path), identity=identity or "", note="the folder is not there any more")
    if not (path / "config.json").is_file() and (identity is not None or checkpoints.recognise(path) is None):
        return Link(
            kind="gone", path=str(path), identity=identity or "", note="the folder holds no checkpoint any more"
        )
    losses = child.start() if child else {}
    return Link(
        kind="base",
        path=str(path),
        identity=identity or "",
        losses=losses,
        measured_by=child.stage if child and losses else "",
        note="" if identity else "a model from outside; nothing says where it comes from",
    )


def _link(path: Path, found: Manifest, wanted: str | None, child: _Child | None, made: Converted | None) -> Link:
    progress = found.progress
    said = progress.get("lr")
    last = said.get("last") if isinstance(said, dict) else None
    if made and last is None:  # of another program's optimizer
        last = next((g["lr"] for g in (found.optimizer or {}).get("groups", ()) if g.get("lr") is not None), None)
    run = run_of(path)
    plan = _plan(run)
    stage = plan.stages.get(found.origin.stage) if plan else None
    # A folder may have been used for another plan since (`--accept-changes`): then the manifest is all there is.
    train = stage.train if stage and stage.fingerprint == found.origin.fingerprint else None
    changed = bool(wanted) and wanted != found.identity
    losses, by = _losses(path, found.step) if train else {}, ""
    if not losses and child is not None and not changed:
        losses = child.start()
        by = child.stage if losses else ""
    notes = ["its content has changed since the child started from it"] if changed else []
    notes += [text] if made and (text := _changed(made)) else []
    return Link(
        kind="converted" if made and not found.origin.stage else "stage",
        path=str(path),
        source=str(made) if made else "",
        stage=found.origin.stage,
        run=run.name if run else "",
        plan=found.origin.plan_id,
        step=found.step,
        tokens=found.tokens,
        mixture=asked(train) if train else {},
        schedule=train.lr.schedule if train else "",
        lr=_lr(train, found.step) if train else None,
        last_lr=float(last) if isinstance(last, int | float) else None,
        losses=losses,
        measured_by=by,
        phase=found.phase,
        identity=found.identity,
        created=found.created or None,
        note="; ".join(notes),
    )


def _plan(run: Path | None) -> RunPlan | None:
    if run is None:
        return None
    try:
        return read_plan(run)
    except UsageError:
        return None


def _lr(train: Train, step: int) -> tuple[float, float, float]:
    """First, highest and last lr of a stage up to a checkpoint: a fork leaves it before its last decay."""
    return train.lr.points if step >= train.steps else points(train.lr, max(1, step))


def _losses(checkpoint: Path, at: int | Literal["start"]) -> dict[str, float]:
    """The validation losses of the checkpoint's stage at exactly this step, or before its first one; empty = none."""
    found = [
        m
        for m in measurements(stage_events(checkpoint.parent.parent))
        if (m.when == "start" if at == "start" else m.when != "start" and m.step == at)
    ]
    return {source: loss.loss for source, loss in found[-1].losses.items()} if found else {}


def _exported_from(folder: Path) -> tuple[str, str, Path] | None:
    """(stage, run, checkpoint) that an exported folder `stages/<stage>/hf` was made from; None for any other folder."""
    run = run_of(folder)
    plan = _plan(run)
    if run is None or plan is None:
        return None
    inside = folder.resolve().relative_to(run).parts
    stage = plan.stages.get(inside[1]) if len(inside) >= 2 and inside[0] == "stages" else None
    if stage is None or stage.kind != "convert":
        return None
    source = _checkpoint_of(plan, run, stage)
    return (stage.name, run.name, source) if source else None


def _checkpoint_of(plan: RunPlan, run: Path, stage: StagePlan) -> Path | None:
    parent = plan.stages.get(stage.parent or "")
    if parent is None:
        return None
    home = state.home(run / "stages" / parent.name)
    if parent.kind != "train":
        return _checkpoint_of(plan, run, parent)
    found, _ = store.newest_whole(home / "checkpoints")
    return found


def lineage_json(links: list[Link]) -> list[dict[str, Any]]:
    """For `--json`."""
    return [asdict(link) for link in links]


def lineage_text(links: list[Link]) -> str:
    """As text for a terminal, newest first."""
    lines: list[str] = []
    for link in links:
        lines += [_head(link), *(f"    {text}" for text in _details(link)), ""]
    return "\n".join(lines[:-1]) + "\n"


def _head(link: Link) -> str:
    name = show.plain(link.stage, 60)
    run = f" of {show.plain(link.run, 80)}" if link.run else ""
    if link.kind == "converted":
        return "converted" + (f" · step {link.step:,}" if link.step else "")
    if link.kind == "stage":
        return f"{name}{run} · step {link.step or 0:,} · {show.show_count(link.tokens or 0)} tokens"
    return {
        "export": f"{name}{run} · export",
        "base": f"base model {show.plain(_name(Path(link.path or '')), 60)}".rstrip(),
        "scratch": "random initial weights",
        "gone": "a parent that cannot be read",
    }[link.kind]


def _name(folder: Path) -> str:
    """A checkpoint folder's name; of a step with that of the folder of all steps."""
    is_step = store.is_folder_name(folder.name) or folder.name == store.RELEASE
    return f"{folder.parent.name}/{folder.name}" if is_step else folder.name


def _details(link: Link) -> list[str]:
    found = []
    if link.mixture:
        found.append("mixture  " + ", ".join(f"{show.plain(s, 60)} {show.share(x)}" for s, x in link.mixture.items()))
    if link.lr:
        found.append(f"lr       {' → '.join(show.lr(x) for x in link.lr)} ({link.schedule})")
    elif link.last_lr is not None:
        found.append(f"lr       ended on {show.lr(link.last_lr)}")
    if link.losses:
        by = f" (measured at the start of `{show.plain(link.measured_by, 60)}`)" if link.measured_by else ""
        each = ", ".join(f"{show.plain(source, 60)} {show.loss(x)}" for source, x in link.losses.items())
        found.append(f"loss     {each} nats/token{by}")
    elif link.kind == "stage":
        found.append("loss     not measured at this step")
    if link.source:
        found.append(f"from     {show.plain(link.source, 300)}")
    if link.path:
        found.append(f"folder   {show.plain(link.path, 300)}")
    if link.phase and link.phase != "end":
        found.append(f"phase    {link.phase}: not the end of its stage")
    if link.identity:
        found.append(f"content  {link.identity[:12]}")
    if link.note:
        found.append(f"note     {link.note}")
    return found
