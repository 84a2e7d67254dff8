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
from cpt.checkpoint import manifest, store
from cpt.checkpoint.manifest import Manifest
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

    kind: str  # stage | export | base | scratch | gone
    path: str | None
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
    """The checkpoint or export folder that a person means by a path or the name of a run.

    Raises:
        UsageError: there is none.
    """
    path = Path(name)
    if not path.exists():
        path = find_run(name, runs)
    if path.is_file():
        path = path.parent
    if (path / "config.json").is_file() and not (path / manifest.NAME).is_file():
        return path
    return store.resolve(path)


def chain(checkpoint: Path) -> list[Link]:
    """The chain from a checkpoint back to where it all began; the checkpoint itself comes first.

    Raises:
        UsageError: the checkpoint's own manifest cannot be read.
    """
    links: list[Link] = []
    if not (checkpoint / manifest.NAME).is_file():
        exported = _exported_from(checkpoint)
        if exported is None:
            return [
                Link(kind="base", path=str(checkpoint), note="a model from outside; nothing says where it comes from")
            ]
        links.append(Link(kind="export", path=str(checkpoint), stage=exported[0], run=exported[1]))
        checkpoint = exported[2]
    wanted: str | None = None
    child: _Child | None = None
    seen: set[Path] = set()
    while len(links) < LONGEST:
        checkpoint = checkpoint.resolve()
        if checkpoint in seen:
            raise UsageError(f"`{checkpoint}` names itself among its parents: its manifest was changed by hand")
        seen.add(checkpoint)
        try:
            found = manifest.read(checkpoint)
        except UsageError as error:
            if not links:
                raise
            links.append(Link(kind="gone", path=str(checkpoint), identity=wanted or "", note=error.message))
            return links
        links.append(_link(checkpoint, found, wanted, child))
        child = _Child(checkpoint, found)
        parent = found.origin.parent
        if not parent:
            links.append(Link(kind="scratch", path=None))
            return links
        path, wanted = str(parent.get("path") or ""), str(parent.get("identity") or "")
        following = _following(Path(path), wanted, child)
        if following is not None:
            links.append(following)
            return links
        checkpoint = Path(path)
    return links


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


def _following(path: Path, identity: str, child: _Child) -> Link | None:
    """The last link, when a parent is no checkpoint of ours; None when the chain goes on."""
    if not path.is_dir():
        return Link(kind="gone", path=str(path), identity=identity, note="the folder is not there any more")
    if (path / manifest.NAME).is_file():
        return None
    if (path / "config.json").is_file():
        losses = child.start()
        by = child.stage if losses else ""
        return Link(kind="base", path=str(path), identity=identity, losses=losses, measured_by=by)
    return Link(kind="gone", path=str(path), identity=identity, note="the folder holds no checkpoint any more")


def _link(path: Path, found: Manifest, wanted: str | None, child: _Child | None) -> Link:
    progress = found.progress
    said = progress.get("lr")
    last = said.get("last") if isinstance(said, dict) else None
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
    return Link(
        kind="stage",
        path=str(path),
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
        note="its content has changed since the child started from it" if changed else "",
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
    if link.kind == "stage":
        return f"{name}{run} · step {link.step or 0:,} · {show.show_count(link.tokens or 0)} tokens"
    return {
        "export": f"{name}{run} · export",
        "base": f"base model {show.plain(Path(link.path or '').name, 60)}".rstrip(),
        "scratch": "random initial weights",
        "gone": "a parent that cannot be read",
    }[link.kind]


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
    if link.path:
        found.append(f"folder   {show.plain(link.path, 300)}")
    if link.phase and link.phase != "end":
        found.append(f"phase    {link.phase}: not the end of its stage")
    if link.identity:
        found.append(f"content  {link.identity[:12]}")
    if link.note:
        found.append(f"note     {link.note}")
    return found
