"""`cpt ckpt`: which checkpoints there are, what one is, whether it is good, how two differ, and averages of several."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpt.base.errors import FAILED, UsageError
from cpt.base.registry import unknown
from cpt.base.units import show_bytes, show_count
from cpt.cli.flags import Json, note, result, result_json, warning
from cpt.cli.where import place

if TYPE_CHECKING:
    from cpt.checkpoint.content import Content, Optimizer
    from cpt.checkpoint.find import Found
    from cpt.checkpoint.formats import Reading
    from cpt.checkpoint.manifest import Manifest
    from cpt.plan.model import ModelConfig

Where = Annotated[
    str, typer.Argument(metavar="RUN|FOLDER", help="A run or its name, a stage, or a folder of checkpoints.")
]
One = Annotated[
    str,
    typer.Argument(
        metavar="CKPT",
        help="A checkpoint of any format; of a folder of steps or a stage its newest whole one, of a run that of its "
        "last trained stage.",
    ),
]
Step = Annotated[
    str | None, typer.Option("--step", metavar="STEP", help="Which step.", show_default="the newest whole one")
]
Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="HF_DIR", help="Hugging Face folder that says what the model is."),
]
VocabSize = Annotated[
    int | None,
    typer.Option("--vocab-size", metavar="N", min=1, help="Of the model, where the checkpoint does not say."),
]
Workers = Annotated[
    int, typer.Option("--workers", metavar="N", min=1, help="Threads that look at values, beside two that read.")
]


def list_checkpoints(path: Where, json: Json = False) -> int:
    """List the checkpoints of a run, a stage or a folder of steps, of any format, and which are whole."""
    from cpt.checkpoint import find, manifest, store

    where = place(path)
    find.refuse_unfinished(where)
    rows: list[dict[str, Any]] = []
    for one in find.listed(where):
        kind = find.recognise(one.folder)
        row: dict[str, Any] = {"path": str(one.folder), "kind": kind, "step": one.step}
        row |= {"whole": one.why_not is None, "why_not": one.why_not, "in_run": _other_run(one.folder, where)}
        if one.why_not is None:
            is_ours = (one.folder / manifest.NAME).is_file()
            row |= _facts(manifest.read(one.folder)) if is_ours else _foreign_facts(one.folder, kind)
            if one.step is not None or one.folder.name == store.RELEASE:  # the folder's name says which step it is
                row["step"] = one.step
        rows.append(row)
    if json:
        result_json(rows)
    elif rows:
        result(_table(rows))
    else:
        inside = [f"`{p}`" for p in sorted(where.iterdir()) if p.is_dir() and find.listed(p)]
        more = f" and {len(inside) - _MOST_FILES:,} more" if len(inside) > _MOST_FILES else ""
        some = f"; there are some in {', '.join(inside[:_MOST_FILES])}{more}" if inside else ""
        note(f"there is no checkpoint in `{path}`{some}")
    return 0


def _foreign_facts(folder: Path, kind: str | None) -> dict[str, Any]:
    """What a checkpoint without a manifest of a run's says of itself; of one that cannot be opened its size."""
    from cpt.checkpoint import find
    from cpt.checkpoint.formats import Reading

    facts: dict[str, Any] = {"bytes": sum(_sizes(folder).values())}
    if kind in (None, "hf"):  # which has no step and no layout
        return facts
    try:
        content = find.known()[kind].open(folder, Reading(optimizer=False))
    except UsageError:
        return facts
    return facts | {"step": content.iteration} | ({"layout": str(content.layout)} if content.layout else {})


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file by its name in the folder."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def show(
    checkpoint: One, step: Step = None, config: Config = None, vocab_size: VocabSize = None, json: Json = False
) -> int:
    """Show what a checkpoint is: model, step, layout, optimizer, size, versions. Reads no values and runs no pickle."""
    from cpt.base.files import read_json
    from cpt.checkpoint import manifest
    from cpt.checkpoint.formats import Reading

    found = _found(checkpoint, step)
    if (found.folder / manifest.NAME).is_file():
        if json:
            result_json({"path": str(found.folder), "kind": "torch_dist", **read_json(found.folder / manifest.NAME)})
            return 0
        ours = manifest.read(found.folder)
        if ours.conversion is None:
            return _show_native(found.folder, ours)
    return _show_content(found, Reading(config=config, vocab_size=vocab_size), json)


def _found(checkpoint: str, step: str | None) -> Found:
    """The checkpoint that is meant; which of several is told."""
    from cpt.base.units import parse_count
    from cpt.checkpoint import find

    found = find.find(place(checkpoint), None if step is None else parse_count(step))
    for text in found.notes:
        note(text)
    return found


def _show_native(folder: Path, found: Manifest) -> int:
    """What the manifest of a run's own save says."""
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
        "layout": _layout(found) + _uneven(found.layout.layers),
        "parent": str(origin.parent.get("path")) if origin.parent else "none, from scratch",
        "plan": f"{origin.plan_id[:6] or '–'}, stage fingerprint {origin.fingerprint[:6] or '–'}",
        "identity": found.identity[:12],
        "written": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.created)) if found.created else "–",
        "size": f"{show_bytes(found.bytes)} in {len(found.files)} files",
        "versions": ", ".join(f"{name} {version}" for name, version in found.versions.items()),
    }
    result(_columns(lines))
    return 0


def _show_content(found: Found, reading: Reading, json: bool) -> int:
    """What a checkpoint of any format says of itself."""
    from cpt.base.records import to_json
    from cpt.checkpoint import content as contents
    from cpt.checkpoint import find, hf_config, origin

    form = find.known()[found.format]
    try:
        content = form.open(found.folder, reading)
    except UsageError as error:
        if found.format != "hf":
            raise
        warning(f"its weights cannot be used: {error.message}")
        content = contents.Content(
            format="hf", path=found.folder, model=hf_config.read_config(reading.config or found.folder), atoms={}
        )
    facts = dict(form.facts(found.folder))
    made = origin.read(found.folder)
    files = _sizes(found.folder)
    dtypes: dict[str, int] = {}
    for atom in content.atoms.values():
        dtypes[atom.dtype] = dtypes.get(atom.dtype, 0) + 1
    if json:
        optimizer = content.optimizer
        result_json(
            {
                "path": str(found.folder),
                "kind": found.format,
                "model": to_json(content.model),
                "iteration": content.iteration,
                "layout": to_json(content.layout) if content.layout else None,
                "dtypes": dtypes,
                "padded_vocab_size": content.padded_vocab_size,
                "optimizer": {"form": optimizer.form, "step": optimizer.step, "groups": len(optimizer.groups)}
                if optimizer
                else None,
                "id": content.id,
                "left_out": list(content.left_out),
                "facts": facts,
                "converted_from": made.record if made else {},
                "files": files,
            }
        )
        return 0
    padded = content.padded_vocab_size
    lines = {
        "path": f"{found.folder}, {find.known()[found.format].title}",
        "model": _model(content.model) + (f" (padded to {padded:,})" if padded else ""),
        "tensors": f"{len(content.atoms):,}: " + ", ".join(f"{n:,} {d}" for d, n in dtypes.items()),
        "step": f"{content.iteration:,}" if content.iteration is not None else "–",
        **_trained(content),
        "layout": f"{content.layout}{_uneven(content.layout.layers)}" if content.layout else "–",
        "optimizer": _optimizer(content.optimizer),
        "size": f"{show_bytes(sum(files.values()))} in {len(files):,} files",
        "files": ", ".join(f"{n} {show_bytes(size)}" for n, size in list(files.items())[:_MOST_FILES])
        + (f" and {len(files) - _MOST_FILES:,} more" if len(files) > _MOST_FILES else ""),
    }
    if content.id:
        lines["id"] = content.id[:12]
    if made:
        lines["from"] = str(made)
    if versions := _versions(content.args, made.record if made else {}):
        lines["versions"] = versions
    said = {
        k: v for k, v in facts.items() if isinstance(v, str | int | float) and not isinstance(v, bool) and k != "id"
    }
    if said:
        lines["says"] = ", ".join(f"{k} {v}" for k, v in said.items())
    for text in content.left_out:
        note(f"not read: {text}")
    result(_columns(lines))
    return 0


_MOST_FILES = 8
_MOST_LINES = 10  # of one kind of difference


def _optimizer(optimizer: Optimizer | None) -> str:
    if optimizer is None:
        return "none, weights only"
    return f"Adam, {optimizer.step:,} updates" + (f", {optimizer.form}" if optimizer.form else "")


def _trained(content: Content) -> dict[str, str]:
    """The lr, and what a run of ours said when it saved."""
    from cpt.checkpoint.formats.torch_dist_names import MANIFEST

    said = content.objects.get(MANIFEST) or {}
    lines: dict[str, str] = {}
    if stage := (said.get("origin") or {}).get("stage"):
        lines["stage"] = f"{stage}, step {said['step']:,}, {show_count(said['tokens'])} tokens, {said['phase']}"
        parent = said["origin"].get("parent")
        lines["parent"] = str(parent.get("path")) if parent else "none, from scratch"
    groups = content.optimizer.groups if content.optimizer else ()
    lrs = [((said.get("progress") or {}).get("lr") or {}).get("last"), *(g.get("lr") for g in groups)]
    last = next((lr for lr in lrs if isinstance(lr, int | float)), None)
    return lines | ({} if last is None else {"lr": f"{last:.3g}"})


def _versions(args: Mapping[str, Any] | None, origin: Mapping[str, Any]) -> str:
    """Versions of what wrote it, as far as it says."""
    found = {k: v for k, v in (args or {}).items() if k.endswith("version") and isinstance(v, str | int | float)}
    versions = origin.get("versions")
    found |= versions if isinstance(versions, dict) else {}
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _columns(lines: Mapping[str, str]) -> str:
    return "\n".join(f"{name:<10} {value}" for name, value in lines.items())


def verify(
    checkpoint: One,
    step: Step = None,
    config: Config = None,
    vocab_size: VocabSize = None,
    workers: Workers = 1,
    json: Json = False,
) -> int:
    """Read every byte of a checkpoint: structure, checksums, main weights against model weights, odd values.

    Exit code 1 when something is wrong with it, 2 when the path is no checkpoint.
    """
    from cpt.checkpoint import find, store
    from cpt.checkpoint import verify as checks
    from cpt.checkpoint.formats import Reading

    path = place(checkpoint)
    itself = path.is_dir() and (store.is_folder_name(path.name) or find.recognise(path) is not None)
    begin = time.monotonic()
    try:
        folder = path if itself and step is None else _found(checkpoint, step).folder
        reading = Reading(config=config, vocab_size=vocab_size)
        report = checks.inspect(folder, reading=reading, workers=workers)
    except find.NotWhole as error:
        folder = path
        hints = tuple(error.hints) if len(error.hints) > 1 else ()  # one line for each of several steps
        report = checks.Report(folder=path, format="unknown", wrong=(error.message, *hints))
    seconds = time.monotonic() - begin
    if json:
        result_json(
            {
                "path": str(folder),
                "kind": report.format,
                "good": report.is_good,
                "wrong": report.wrong,
                "odd": report.odd,
                "not_seen": report.unseen,
                "checked": report.done,
                "bytes": report.nbytes,
                "seconds": round(seconds, 3),
            }
        )
        return 0 if report.is_good else FAILED
    for text in report.odd:
        note(text)
    for text in report.unseen:
        note(text)
    if report.is_good:
        rate = f"{report.nbytes / max(seconds, 1e-3) / 1e6:,.0f} MB/s"
        result(f"{folder}: good ({report.format}: {', '.join(report.done)}; {show_bytes(report.nbytes)}, {rate})")
    else:
        lines = [line.removeprefix(f"`{folder}`: ") for line in report.wrong]
        result("\n".join(line if f"`{folder}" in line else f"{folder}: {line}" for line in lines))
    return 0 if report.is_good else FAILED


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint of any format.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    weights: Annotated[
        bool, typer.Option("--weights", help="Compare the model and its weights only, no optimizer, padding or step.")
    ] = False,
    config: Config = None,
    vocab_size: VocabSize = None,
    json: Json = False,
) -> int:
    """Compare two checkpoints of any formats and layouts bit by bit. Exit code 0 when equal, 1 when not."""
    from cpt.checkpoint import diff as compare
    from cpt.checkpoint import find
    from cpt.checkpoint.arrays import Files
    from cpt.checkpoint.formats import Reading

    folders = [_found(text, None) for text in (a, b)]
    reading = Reading(optimizer=not weights, config=config, vocab_size=vocab_size)
    contents = [find.known()[f.format].open(f.folder, _needed(reading, f)) for f in folders]
    found = compare.diff(contents[0], contents[1], Files(), weights=weights)
    if json:
        result_json(
            {
                "equal": found.is_equal,
                "a": {"path": str(folders[0].folder), "kind": folders[0].format},
                "b": {"path": str(folders[1].folder), "kind": folders[1].format},
                "compared": found.compared,
                "tensors": [
                    {
                        "tensor": d.tensor,
                        "state": d.state,
                        "first": d.first,
                        "values": d.values,
                        "differing": d.count,
                        "of": d.numel,
                        "largest_difference": d.largest,
                        "dtypes": d.dtypes,
                    }
                    for d in found.tensors
                ],
                "only_a": [what for side, what in found.only if side == 0],
                "only_b": [what for side, what in found.only if side == 1],
                "fields": [{"name": n, "a": x, "b": y} for n, x, y in found.fields],
            }
        )
        return 0 if found.is_equal else FAILED
    what = "weights" if weights else "tensors and states"
    if found.is_equal:
        result(f"equal: {found.compared:,} {what} of {folders[0].format} and {folders[1].format}")
        return 0
    lines = [f"{len(found.tensors):,} of {found.compared:,} {what} differ"] if found.tensors else []
    lines += _some([f"  {d}" for d in found.tensors], "tensors and states")
    if not found.tensors:
        lines.append(f"equal values in all {found.compared:,} {what} that both have")
    for side, text in enumerate((a, b)):
        lines += _some([f"only in {text}: {what}" for s, what in found.only if s == side], f"only in {text}")
    lines += _some([f"{name}: {_short(x)} and {_short(y)}" for name, x, y in found.fields], "fields")
    result("\n".join(lines))
    if not found.tensors and not weights:
        note("`--weights` compares the model and its weights only")
    return FAILED


def _needed(reading: Reading, found: Found) -> Reading:
    """Without what a Hugging Face folder says itself: the options are for what lies beside it."""
    from dataclasses import replace

    return replace(reading, config=None, vocab_size=None) if found.format == "hf" else reading


def _some(lines: list[str], what: str) -> list[str]:
    """The first of many lines, and how many there are besides."""
    more = len(lines) - _MOST_LINES
    return lines if more <= 0 else [*lines[:_MOST_LINES], f"  and {more:,} more {what}; `--json` names all"]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def average(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="A B ...", help="Checkpoints of one model, of any formats.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="OUT", help="The folder that is made.", show_default=False)],
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="W,W,...", help="How much of each goes in.", show_default="equally much"),
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="FORMAT", help="What OUT is to be.", show_default="A's format")
    ] = None,
    tp: Annotated[int, typer.Option("--tp", metavar="N", min=1, help="Tensor ranks, to megatron or torch_dist.")] = 1,
    pp: Annotated[int, typer.Option("--pp", metavar="N", min=1, help="Pipeline ranks, likewise.")] = 1,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="fp32|bf16|fp16", help="Of the weights.", show_default="as they are"),
    ] = None,
    config: Config = None,
    vocab_size: VocabSize = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", metavar="N", min=1, help="Processes; changes no byte.", show_default="one a core"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written and write nothing.")] = False,
    json: Json = False,
) -> int:
    """Average the weights of checkpoints of one model, summed in fp64 from unrounded ones; without optimizer state."""
    from cpt.base.processes import num_cores
    from cpt.checkpoint.content import Layout
    from cpt.checkpoint.formats import Reading, Writing
    from cpt.checkpoint.job import averaging
    from cpt.checkpoint.job.convert import convert
    from cpt.checkpoint.job.planning import Running
    from cpt.cli.convert_ckpt import DTYPES, refuse_unused, report_text, show_plan

    if dtype is not None and dtype not in DTYPES:
        raise unknown("value for `--dtype`:", dtype, DTYPES)
    given = _weights(weights, len(checkpoints))
    members = [(place(text), weight) for text, weight in zip(checkpoints, given, strict=True)]
    reading = Reading(config=config, vocab_size=vocab_size)
    writing = Writing(layout=Layout(tp=tp, pp=pp), dtype=DTYPES[dtype] if dtype else None)
    plan = averaging.plan(members, out, to, writing, note, reading)
    refuse_unused(plan.request.to, writing, None)
    shares = ", ".join(f"{w / sum(given):.3g} of {text}" for text, w in zip(checkpoints, given, strict=True))
    lines = [("average", f"{shares}; weights only")]
    lines += [("layout", str(writing.layout))] if plan.request.to in ("megatron", "torch_dist") else []
    if dry_run:
        return show_plan(plan, json, lines[:1])
    report = convert(plan, Running(workers=workers or num_cores()), command="cpt ckpt average")
    if json:
        result_json(report.to_json())
    elif report.done_before:
        result(f"{report.folder} holds this average already (id {report.id[:12]}); nothing to do")
    else:
        result(report_text(plan, report, first=lines))
    return 0


def _weights(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1.0] * count
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(
            f"`--weights {text}` is not a list of numbers", "for example `--weights 0.5,0.3,0.2`"
        ) from None
    if len(found) != count:
        raise UsageError(f"`--weights` names {len(found)} numbers for {count} checkpoints")
    return found


def _model(model: ModelConfig) -> str:
    return (
        f"{model.family}, {show_count(model.num_parameters)} parameters, {model.num_layers} layers of "
        f"{model.hidden_size}, vocabulary {model.vocab_size:,}"
    )


def _other_run(checkpoint: Path, asked: Path) -> str | None:
    """The run that a stage's result is taken from, when it is not the one that was asked for."""
    folder, root = checkpoint.resolve(), asked.resolve()
    if folder.is_relative_to(root):
        return None
    stages = next((p for p in folder.parents if p.name == "stages"), None)
    return stages.parent.name if stages is not None else None


def _layout(found: Manifest) -> str:
    layout = found.layout
    parts = [f"tp {layout.tp}", f"pp {layout.pp}", f"dp {layout.dp}"] + ([f"vp {layout.vp}"] if layout.vp > 1 else [])
    return " × ".join(parts)


def _uneven(layers: Sequence[int] | None) -> str:
    """How many layers each part of a pipeline has, where they are not all the same."""
    return f", layers {' + '.join(map(str, layers))}" if layers and len(set(layers)) > 1 else ""


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
    head = ("stage", "step", "tokens", "phase", "layout", "size", "kind", "path")
    lines = [head]
    for row in rows:
        path = Path(row["path"])
        stage = row.get("stage") or next((p.name for p in path.parents if p.parent.name == "stages"), "–")
        step = "–" if row["step"] is None else f"{row['step']:,}"
        kind = row["kind"] or "–"
        if row["whole"]:
            tokens = show_count(row["tokens"]) if "tokens" in row else "–"
            facts = (tokens, row.get("phase", "–"), row.get("layout", "–"), show_bytes(row["bytes"]))
            lines.append((stage, step, *facts, kind, row["path"] + _in(row)))
        else:
            lines.append((stage, step, "–", "not whole", "–", "–", kind, f"{path}{_in(row)}: {row['why_not']}"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    right = (1, 2, 5)
    return "\n".join(
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


commands = {"list": list_checkpoints, "show": show, "verify": verify, "diff": diff, "average": average}
