"""`cpt convert-ckpt`: any checkpoint as another format or for another layout of ranks, bit for bit."""

from __future__ import annotations

import json as _json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpt.base.errors import StageFailed, UsageError
from cpt.base.units import parse_bytes, parse_count, show_bytes, show_count, show_duration
from cpt.cli.flags import Json, note, result, result_json, talk, warning
from cpt.cli.where import place

if TYPE_CHECKING:
    from cpt.checkpoint.formats import Writing
    from cpt.checkpoint.job.planning import Plan
    from cpt.checkpoint.job.record import Report

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_MOST = 4  # names and lines of one kind that are shown


def command(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="A run, a stage, a folder of steps, or a checkpoint of any format.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder that is made; it must not be there yet.")],
    to: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="hf|torch_dist|megatron|atom", help="What OUT is to be; must be given.", show_default=False
        ),
    ] = None,
    tp: Annotated[int, typer.Option("--tp", metavar="N", min=1, help="Tensor ranks.")] = 1,
    pp: Annotated[int, typer.Option("--pp", metavar="N", min=1, help="Pipeline ranks.")] = 1,
    ep: Annotated[int, typer.Option("--ep", metavar="N", min=1, help="Expert ranks.")] = 1,
    etp: Annotated[
        int | None, typer.Option("--etp", metavar="N", min=1, help="Tensor ranks of the experts.", show_default="--tp")
    ] = None,
    vp: Annotated[
        int, typer.Option("--vp", metavar="N", min=1, help="Virtual pipeline chunks of each pipeline rank.")
    ] = 1,
    dp: Annotated[
        int, typer.Option("--dp", metavar="N", min=1, help="Data ranks that share the optimizer's buffers.")
    ] = 1,
    pipeline_layout: Annotated[
        str | None,
        typer.Option(
            "--pipeline-layout",
            metavar="LAYERS",
            help="Layers of each part: `3,5,4`, `first=3,last=4`, or Megatron's `Ett|tt|tL`.",
            show_default="even",
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            "--optimizer",
            metavar="fully_reshardable|dp_reshardable|plain|none",
            help="How Adam's state is kept; `none` leaves it out.",
            show_default="as OUT's format does",
        ),
    ] = None,
    bucket_size: Annotated[
        str | None,
        typer.Option(
            "--bucket-size",
            metavar="N",
            help="Values in each of the optimizer's flat buffers, such as `40M`.",
            show_default="one bucket",
        ),
    ] = None,
    spec: Annotated[
        str,
        typer.Option(
            "--spec",
            metavar="local|te|cpt",
            help="Layers that will load it: Megatron's own, Transformer Engine's, or this project's.",
        ),
    ] = "local",
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="fp32|bf16|fp16", help="Of the weights.", show_default="as they are"),
    ] = None,
    from_master: Annotated[
        bool, typer.Option("--from-master", help="To hf: the optimizer's fp32 weights instead of the model's.")
    ] = False,
    step: Annotated[
        str | None,
        typer.Option("--step", metavar="STEP", help="Which step of IN.", show_default="the newest whole one"),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", metavar="N", min=1, help="Of the model, where IN does not say.")
    ] = None,
    pad: Annotated[
        str,
        typer.Option("--pad", metavar="drop|keep", help="To hf: what is done with padding rows of the vocabulary."),
    ] = "drop",
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="HF_DIR", help="Hugging Face folder that says what the model is."),
    ] = None,
    replicas: Annotated[
        str, typer.Option("--replicas", metavar="equal|first", help="Copies that differ: refuse, or take the first.")
    ] = "equal",
    untie: Annotated[
        bool, typer.Option("--untie", help="Keep an output layer that differs from the embedding it is tied to.")
    ] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Convert NaN and infinite values too.")
    ] = False,
    sha256: Annotated[bool, typer.Option("--sha256", help="To atom: note each file's SHA-256 too.")] = False,
    workers: Annotated[
        int | None,
        typer.Option("--workers", metavar="N", min=1, help="Processes; changes no byte.", show_default="one a core"),
    ] = None,
    file_size: Annotated[
        str, typer.Option("--file-size", metavar="SIZE", help="Size at which another file is begun.")
    ] = "2GiB",
    block: Annotated[str, typer.Option("--block", metavar="SIZE", help="Memory of a worker for values.")] = "64MiB",
    recheck: Annotated[bool, typer.Option("--recheck", help="Going on: read again what an earlier run wrote.")] = False,
    verify: Annotated[
        str, typer.Option("--verify", metavar="usual|full", help="`full`: read everything again at the end.")
    ] = "usual",
    logits: Annotated[
        bool,
        typer.Option("--logits", help="Compare what both compute, in transformers and megatron-core; needs memory."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written and write nothing.")] = False,
    json: Json = False,
) -> int:
    """Convert a checkpoint to another format or another layout of ranks, bit for bit, its optimizer state included.

    IN's format is found by itself. A killed or stopped conversion goes on with the same command.
    """
    from cpt.checkpoint.formats import OPTIMIZER_FORMS, Reading, Writing
    from cpt.checkpoint.job import planning
    from cpt.checkpoint.job.planning import Request, Running
    from cpt.checkpoint.layouts import SPECS

    if to is None:
        raise UsageError("`--to` is missing: what OUT is to be", "`--to hf`, `torch_dist`, `megatron` or `atom`")
    keep_padding = _one_of("--pad", pad, ("drop", "keep")) == "keep"
    first_replica = _one_of("--replicas", replicas, ("equal", "first")) == "first"
    full = _one_of("--verify", verify, ("usual", "full")) == "full"
    reading = Reading(config=config, vocab_size=vocab_size, first_replica=first_replica, untie=untie)
    writing = Writing(
        layout=_layout(tp, pp, ep, etp, vp, dp, bucket_size),
        optimizer=None if optimizer is None else _one_of("--optimizer", optimizer, OPTIMIZER_FORMS),
        spec=_one_of("--spec", spec, SPECS),
        dtype=None if dtype is None else _dtype(dtype),
        keep_padding=keep_padding,
        from_master=from_master,
        sha256=sha256,
        file_bytes=_size("--file-size", file_size, 1),
    )
    refuse_unused(to, writing, pipeline_layout)
    size = _size("--block", block, 1 << 16)
    request = Request(
        source=place(source),
        out=out,
        to=to,
        reading=reading,
        writing=writing,
        pipeline_layout=pipeline_layout,
        step=None if step is None else _parsed("--step", parse_count, step),
    )
    plan = planning.plan(request, note)
    sides = _sides(plan) if logits else None
    if dry_run:
        return show_plan(plan, json)
    running = Running(
        workers=workers or _cores(), block=size, allow_nonfinite=allow_nonfinite, recheck=recheck, verify=full
    )
    return _convert(plan, running, json, sides)


def _sides(plan: Plan) -> tuple[Path, Path]:
    """(Hugging Face folder, the other one) of a conversion whose logits are to be compared."""
    made = plan.request.out / plan.output.step_folder
    known = ("torch_dist", "megatron", "hf")
    if plan.found.format == "hf" and plan.request.to in known:
        return plan.found.folder, made
    if plan.request.to == "hf" and plan.found.format in known:
        return made, plan.found.folder
    raise UsageError(
        f"`--logits` cannot compare `{plan.found.format}` with `{plan.request.to}`",
        "one of both is to be `hf`, the other `torch_dist`, `megatron` or `hf`",
    )


def _compare(sides: tuple[Path, Path]) -> float:
    """The largest relative difference of logits; an error if it is too large."""
    from cpt.checkpoint import logits

    worst = logits.compare(*sides)
    if not worst <= logits.BOUND:
        raise StageFailed(
            f"`{sides[0]}` and `{sides[1]}` do not compute the same: logits differ by {worst:.2g} of the largest, "
            f"at most {logits.BOUND:g} is rounding"
        )
    return worst


def _convert(plan: Plan, running: Any, json: bool, sides: tuple[Path, Path] | None) -> int:
    from cpt.checkpoint.job.convert import convert

    progress = _Progress(json)
    try:
        report = convert(plan, running, progress, shlex.join(["cpt", *sys.argv[1:]]))
    finally:
        progress.clear()
    worst = _compare(sides) if sides else None
    if json:
        result_json(report.to_json() | ({} if worst is None else {"logits": worst}))
    elif report.done_before:
        known = f"id {(report.state or report.id)[:12]}"
        result(f"{report.folder} holds this conversion already ({known}); nothing to do")
        if worst is not None:
            result(f"logits differ by {worst:.2g} of the largest, in fp32")
    else:
        result(report_text(plan, report, worst))
    return 0


def _cores() -> int:
    from cpt.base.processes import num_cores

    return num_cores()


def _one_of(flag: str, value: str, known: tuple[str, ...]) -> str:
    from cpt.base.registry import unknown

    if value not in known:
        error = unknown(f"value for `{flag}`:", value, known)
        raise UsageError(error.message, *error.hints)
    return value


def _parsed(flag: str, parse: Callable[[str], int], text: str) -> int:
    try:
        return parse(text)
    except UsageError as error:
        raise UsageError(f"`{flag}`: {error.message}", *error.hints) from None


def _size(flag: str, text: str, least: int) -> int:
    size = _parsed(flag, parse_bytes, text)
    if size < least:
        raise UsageError(f"`{flag} {text}` is too small, the least is {show_bytes(least)}")
    return size


def _dtype(text: str) -> str:
    if text in DTYPES.values():
        return text
    return DTYPES[_one_of("--dtype", text, tuple(DTYPES))]


def _layout(
    tp: int,
    pp: int,
    ep: int,
    etp: int | None,
    vp: int,
    dp: int,
    bucket_size: str | None,
) -> Any:
    from cpt.checkpoint.content import Layout

    bucket = None if bucket_size is None else _parsed("--bucket-size", parse_count, bucket_size)
    if bucket == 0:
        raise UsageError("`--bucket-size 0` holds no value", "leave it out for one bucket")
    return Layout(tp=tp, pp=pp, ep=ep, etp=etp, vp=vp, dp=dp, bucket_numel=bucket)


def refuse_unused(to: str, writing: Writing, pipeline_layout: str | None) -> None:
    """Options that the format has no use for: a person means another format."""
    from cpt.checkpoint.content import Layout
    from cpt.checkpoint.formats import Writing

    usual, usual_spec = Layout(), Writing().spec
    names = ("tp", "pp", "ep", "etp", "vp", "dp")
    given = [f"--{n}" for n in names if getattr(writing.layout, n) != getattr(usual, n)]
    given += ["--pipeline-layout"] * (pipeline_layout is not None)
    given += ["--bucket-size"] * (writing.layout.bucket_numel is not None)
    if to in ("hf", "atom") and given:
        raise UsageError(
            f"`{to}` has no ranks, so `{given[0]}` means nothing for it", "layouts are of `torch_dist` and `megatron`"
        )
    if to in ("hf", "atom") and writing.spec != usual_spec:
        raise UsageError(f"`{to}` knows no layers of Megatron, so `--spec {writing.spec}` means nothing for it")
    if writing.optimizer != "dp_reshardable":
        if writing.layout.bucket_numel is not None:
            raise UsageError("`--bucket-size` is for `--optimizer dp_reshardable`: other forms have no buckets")
        if writing.layout.dp != usual.dp:
            raise UsageError(
                "`--dp` is for `--optimizer dp_reshardable`: other forms are the same for all data ranks",
                "leave `--dp` out: what is written loads with any number of data ranks",
            )
    if to == "hf" and writing.optimizer not in (None, "none"):
        raise UsageError("`hf` holds no optimizer state", "`--to atom`, `torch_dist` or `megatron` keep it")
    if to == "atom" and writing.optimizer not in (None, "none"):
        raise UsageError("`atom` keeps optimizer state in one form only", "leave `--optimizer` out to keep it")
    for flag, used, format in (
        ("--from-master", writing.from_master, "hf"),
        ("--pad keep", writing.keep_padding, "hf"),
        ("--sha256", writing.sha256, "atom"),
    ):
        if used and to != format:
            raise UsageError(f"`{flag}` is for `--to {format}`, and this is `--to {to}`")


def show_plan(plan: Plan, json: bool, first: Sequence[tuple[str, str]] = ()) -> int:
    """The plan, for `--dry-run`.

    Args:
        first: lines to begin with instead of where it comes from, each with its head.
    """
    from cpt.checkpoint.formats import FORMATS
    from cpt.checkpoint.job import place as where
    from cpt.checkpoint.job.record import advice, dropped, state_id, weights_from

    where.check_names(plan)
    there = where.done_already(plan)
    if not there:
        where.check_writable(plan.request.out)
    content, output, to = plan.content, plan.output, plan.request.to
    if json:
        result_json(
            {
                "id": (state_id(plan) if there else None) if FORMATS.get(to).has_id else plan.id,
                "conversion_id": plan.id,
                "from": {
                    "format": plan.found.format,
                    "path": str(plan.found.folder),
                    "step": content.iteration,
                    "layout": str(content.layout) if content.layout else None,
                    "optimizer": content.optimizer is not None,
                    "tensors": len(content.atoms),
                    "parameters": content.model.num_parameters,
                    "family": content.model.family,
                },
                "to": plan.request.to,
                "out": str(plan.request.out),
                "options": dict(plan.options),
                "files": {f.name: f.nbytes for f in output.files},
                "copies": sorted(output.copies),
                "bytes": plan.nbytes,
                "weights": weights_from(plan),
                "dropped": list(dropped(plan)),
                "there_already": there,
            }
        )
        return 0
    model = content.model
    state = f"Adam, {content.optimizer.step:,} updates" if content.optimizer else "none, weights only"
    origin = [plan.found.format, *([f"step {content.iteration:,}"] if content.iteration is not None else [])]
    origin += [str(content.layout)] if content.layout else []
    copied = f", {len(output.copies):,} copied" if output.copies else ""
    lines = [
        *(first or [("from", f"{plan.found.folder}, {', '.join(origin)}")]),
        ("model", f"{model.family}, {show_count(model.num_parameters)} parameters, {len(content.atoms):,} tensors"),
        ("optimizer", state),
        ("to", f"{plan.request.out / output.step_folder}, {plan.request.to}{_options(plan)}"),
        ("files", f"{len(output.files):,} of tensors{copied}, {show_bytes(plan.nbytes)}; small ones are added"),
        *(("", f"{f.name} {show_bytes(f.nbytes)}") for f in output.files[:_MOST]),
        *([("", f"and {len(output.files) - _MOST:,} more")] if len(output.files) > _MOST else []),
        *([("weights", weights)] if (weights := weights_from(plan)) else []),
        *_listed("dropped", dropped(plan)),
        *_listed("advice", advice(plan)),
        ("checked", "names, shapes and sizes; values are read by the conversion itself"),
        (
            "conversion" if FORMATS.get(to).has_id else "id",
            plan.id[:12] + (", there already: nothing to do" if there else ""),
        ),
    ]
    result(_columns(lines))
    return 0


def _options(plan: Plan) -> str:
    layout = plan.request.writing.layout
    parts = [str(layout)] if plan.request.to in ("torch_dist", "megatron") else []
    own = {"average"}
    own |= set(vars(layout)) if hasattr(layout, "__dict__") else {"tp", "pp", "ep", "vp", "dp"}
    parts += [f"{name.replace('_', ' ')} {value}" for name, value in plan.options.items() if name not in own]
    return "".join(f", {p}" for p in parts)


def report_text(plan: Plan, report: Report, worst: float | None = None, first: Sequence[tuple[str, str]] = ()) -> str:
    """What was done, for a person.

    Args:
        worst: the largest relative difference of logits, where they were compared.
        first: lines to begin with, each with its head.
    """
    from cpt.checkpoint.job.record import advice
    from cpt.checkpoint.values import some

    for kind, what in (("zero", "all values are zero"), ("constant", "all values are equal")):
        names = [f.tensor for f in report.findings if f.kind == kind]
        if names:
            note(f"{what} in {len(names):,} tensor{'s' * (len(names) > 1)}: {some(names, _MOST)}")
    for f in [f for f in report.findings if f.kind == "subnormal"][:_MOST]:
        note(f"{f.count:,} values of `{f.tensor}` are too small for full precision (subnormal)")
    for f in [f for f in report.findings if f.kind == "nonfinite"]:
        what = "value is" if f.count == 1 else "values are"
        warning(f"`{f.tensor}`: {f.count:,} {what} NaN or infinite, the first at {list(f.first)}")
    earlier = report.bytes - report.written
    went_on = f"; {show_bytes(earlier)} were finished before" if earlier > 0 else ""
    lines = [
        *first,
        ("written", f"{report.folder}, {plan.request.to}"),
        ("size", f"{show_bytes(report.bytes)} in {report.files:,} files, {report.tensors:,} tensors"),
        ("time", f"{_seconds(report.seconds)}, {report.rate / 1e6:,.0f} MB/s{went_on}"),
        ("memory", f"at most {show_bytes(report.peak_memory)} in {_each(report.workers)}"),
        *(
            [("rounded", f"{report.rounded:,} values changed by another dtype")]
            if report.rounded or plan.options.get("dtype")
            else []
        ),
        *([("weights", report.weights)] if report.weights else []),
        *_listed("dropped", report.dropped),
        *_listed("advice", advice(plan)),
        ("checked", _checked(report)),
        *([] if worst is None else [("logits", f"differ by {worst:.2g} of the largest, in fp32")]),
        *([("id", report.state[:12]), ("conversion", report.id[:12])] if report.state else [("id", report.id[:12])]),
    ]
    return _columns(lines)


def _each(processes: int) -> str:
    return "one process" if processes == 1 else f"each of {processes} processes"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else show_duration(seconds)


def _checked(report: Report) -> str:
    done = ["structure", "values"]
    done += ["main weights against model weights"] if report.compared else []
    done += [f"{report.checksums:,} checksum{'s' * (report.checksums > 1)} of the source"] if report.checksums else []
    done += ["everything read again"] if report.reread else []
    return ", ".join(done)


def _listed(head: str, texts: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(head if i == 0 else "", text) for i, text in enumerate(texts)]


def _columns(lines: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


class _Progress:
    """How far it is: a line that moves in a terminal, JSON lines on stderr with `--json`, nothing elsewhere."""

    def __init__(self, json: bool) -> None:
        self._json = json and not talk.quiet
        self._moving = sys.stderr.isatty() and not talk.quiet and not json
        self._began = self._last = time.monotonic()
        self._phase, self._shown = "", False

    def __call__(self, kind: str, facts: Mapping[str, Any]) -> None:
        now = time.monotonic()
        often = kind == "progress" and now - self._last < (1.0 if self._json else 0.1)
        if kind == "progress" and facts["phase"] != self._phase:
            self._phase, self._began, often = facts["phase"], now, False
        if often:
            return
        self._last = now
        if self._json:
            sys.stderr.write(_json.dumps({"event": kind, **facts}) + "\n")
        elif kind == "resumed":
            self.clear()
            size = show_bytes(facts["bytes"])
            begun = f" and {facts['begun']:,} begun" if facts["begun"] else ""
            note(f"goes on: {facts['files']:,} of {facts['of']:,} files were finished before{begun}, {size}")
        elif kind == "taken_over":
            self.clear()
            note(f"taken over from {facts['who']}, which has ended")
        elif kind == "progress" and self._moving:
            self._move(facts, now)

    def _move(self, facts: Mapping[str, Any], now: float) -> None:
        done, total, seconds = facts["done"], max(1, facts["total"]), max(1e-3, now - self._began)
        rate = done / seconds
        left = f", {show_duration((total - done) / rate)} left" if rate and seconds > 1 else ""
        text = f"{facts['phase']}: {done / total:.0%} of {show_bytes(total)}, {rate / 1e6:,.0f} MB/s{left}"
        text += f", {facts['tensor']}"
        width = max(20, _terminal_width() - 1)
        sys.stderr.write("\r\x1b[K" + text[:width])
        sys.stderr.flush()
        self._shown = True

    def clear(self) -> None:
        """Take the moving line away."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            self._shown = False


def _terminal_width() -> int:
    import shutil

    return shutil.get_terminal_size((100, 24)).columns
