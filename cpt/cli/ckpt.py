"""`cpt ckpt`: which checkpoints there are, what one is, and whether its bytes are what was written."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpt.base.errors import FAILED, UsageError
from cpt.base.units import show_bytes, show_count
from cpt.cli.flags import Json, note, result, result_json
from cpt.cli.where import place

if TYPE_CHECKING:
    from cpt.checkpoint.manifest import Manifest
    from cpt.plan.types import ModelConfig

Where = Annotated[
    str, typer.Argument(metavar="RUN|FOLDER", help="A run or its name, a stage, or a folder of checkpoints.")
]
One = Annotated[
    str,
    typer.Argument(
        metavar="CKPT",
        help="`iter_*` folder; of a stage its newest whole one, of a run that of its last trained stage.",
    ),
]


def list_checkpoints(path: Where, json: Json = False) -> int:
    """List the checkpoints of a run or stage, and which are whole."""
    from cpt.checkpoint import manifest, store

    where = place(path)
    if not where.is_dir():
        raise UsageError(f"`{path}` is not a folder")
    if store.hugging_face(where) is not None:
        raise _is_hugging_face(where, "has no checkpoints of steps in it")
    rows: list[dict[str, Any]] = []
    for folder in reversed(store.checkpoint_folders(where)):
        other = _other_run(folder, where)
        for step, checkpoint in store.steps(folder):
            why = store.why_not_whole(checkpoint)
            row: dict[str, Any] = {"path": str(checkpoint), "step": step, "whole": why is None, "why_not": why}
            row["in_run"] = other
            if why is None:
                row |= _facts(manifest.read(checkpoint))
            rows.append(row)
    if json:
        result_json(rows)
    elif rows:
        result(_table(rows))
    else:
        note(f"there is no checkpoint in `{path}`")
    return 0


def show(checkpoint: One, json: Json = False) -> int:
    """Show what a checkpoint is: model, stage, step, where each source stands, layout, versions."""
    from cpt.base.files import read_json
    from cpt.checkpoint import manifest, store

    path = place(checkpoint)
    exported = store.hugging_face(path)
    if exported is not None:
        return _show_hugging_face(exported, json)
    folder = store.resolve(path)
    if json:
        result_json({"path": str(folder), **read_json(folder / manifest.NAME)})
        return 0
    found = manifest.read(folder)
    model, origin = found.model, found.origin
    optimizer = f"Adam, {found.optimizer['step']:,} updates" if found.optimizer else "none, weights only"
    lr = found.progress.get("lr") or {}
    lines = {
        "path": str(folder),
        "stage": f"{origin.stage or '–'}, step {found.step:,}, {show_count(found.tokens)} tokens, {found.phase}",
        "model": f"{_model(model)} (padded to {found.padded_vocab_size:,})",
        "precision": found.precision,
        "optimizer": optimizer,
        "lr": f"{lr['last']:.3g}" if isinstance(lr.get("last"), int | float) else "–",
        "layout": _layout(found),
        "parent": str(origin.parent.get("path")) if origin.parent else "none, from scratch",
        "plan": f"{origin.plan_id[:6] or '–'}, stage fingerprint {origin.fingerprint[:6] or '–'}",
        "identity": found.identity[:12],
        "written": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.created)) if found.created else "–",
        "size": f"{show_bytes(found.bytes)} in {len(found.files)} files",
        "versions": ", ".join(f"{name} {version}" for name, version in found.versions.items()),
    }
    result("\n".join(f"{name:<10} {value}" for name, value in lines.items()))
    return 0


def verify(checkpoint: One, json: Json = False) -> int:
    """Read every byte of a checkpoint: sizes, checksums, structure, main weights against model weights."""
    from cpt.checkpoint import store
    from cpt.checkpoint import verify as checks

    path = place(checkpoint)
    if store.hugging_face(path) is not None:
        raise _is_hugging_face(path, "carries no checksums to verify")
    folder = path if store.is_folder_name(path.name) else store.resolve(path)
    wrong = checks.verify(folder)
    if json:
        result_json({"path": str(folder), "good": not wrong, "wrong": wrong})
    elif wrong:
        result("\n".join(f"{folder}: {line}" for line in wrong))
    else:
        result(f"{folder}: good")
    return FAILED if wrong else 0


def _is_hugging_face(path: Path, why: str) -> UsageError:
    return UsageError(
        f"`{path}` is a Hugging Face folder, which {why}", f"`cpt ckpt show {path}` shows its model and its files"
    )


def _show_hugging_face(folder: Path, json: bool) -> int:
    """Model and files of a Hugging Face folder; no weights are read."""
    from cpt.checkpoint import hf_config

    model = hf_config.read_config(folder)
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}
    if json:
        from cpt.plan.types import to_json

        result_json({"path": str(folder), "kind": "hf", "model": to_json(model), "files": files})
        return 0
    lines = {
        "path": f"{folder}, a Hugging Face folder",
        "model": _model(model),
        "size": f"{show_bytes(sum(files.values()))} in {len(files)} files",
        "files": ", ".join(f"{name} {show_bytes(size)}" for name, size in files.items()),
    }
    result("\n".join(f"{name:<10} {value}" for name, value in lines.items()))
    return 0


def _model(model: ModelConfig) -> str:
    return (
        f"{model.family}, {show_count(model.num_parameters)} parameters, {model.num_layers} layers of "
        f"{model.hidden_size}, vocabulary {model.vocab_size:,}"
    )


def _other_run(checkpoints: Path, asked: Path) -> str | None:
    """The run that a stage's checkpoints are taken from, when it is not the one that was asked for."""
    folder, root = checkpoints.resolve(), asked.resolve()
    return None if folder.is_relative_to(root) else folder.parents[2].name


def _layout(found: Manifest) -> str:
    layout = found.layout
    parts = [f"tp {layout.tp}", f"pp {layout.pp}", f"dp {layout.dp}"] + ([f"vp {layout.vp}"] if layout.vp > 1 else [])
    return " × ".join(parts)


def _facts(found: Manifest) -> dict[str, Any]:
    return {
        "stage": found.origin.stage,
        "tokens": found.tokens,
        "phase": found.phase,
        "layout": _layout(found),
        "bytes": found.bytes,
        "optimizer": found.optimizer is not None,
        "created": found.created,
    }


def _in(row: dict[str, Any]) -> str:
    return f"  (in {row['in_run']})" if row["in_run"] else ""


def _table(rows: list[dict[str, Any]]) -> str:
    head = ("stage", "step", "tokens", "phase", "layout", "size", "path")
    lines = [head]
    for row in rows:
        if row["whole"]:
            numbers = (f"{row['step']:,}", show_count(row["tokens"]), row["phase"], row["layout"])
            lines.append((row["stage"] or "–", *numbers, show_bytes(row["bytes"]), row["path"] + _in(row)))
        else:
            stage = Path(row["path"]).parents[1].name
            lines.append(
                (stage, f"{row['step']:,}", "–", "not whole", "–", "–", f"{row['path']}{_in(row)}: {row['why_not']}")
            )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    right = (1, 2, 5)
    return "\n".join(
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


commands = {"list": list_checkpoints, "show": show, "verify": verify}
