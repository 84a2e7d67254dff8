"""What a conversion will do: source, content, files, and an id that is equal only for conversions to equal bytes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt import __version__
from cpt.base.errors import UsageError
from cpt.base.files import canonical_json, hash_text
from cpt.base.registry import unknown
from cpt.checkpoint import find, pipeline_layout
from cpt.checkpoint.content import Content, Layout
from cpt.checkpoint.find import Found
from cpt.checkpoint.formats import Output, Reading, Writing
from cpt.checkpoint.sums import open_checked
from cpt.checkpoint.writing import BLOCK

VERSION = 3  # of the bytes that equal options give; raised when a release writes other ones


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be converted to what.

    Args:
        source: any folder that `find` knows.
        out: the folder that is made.
        to: a format's name.
        step: which of several.
        files: to take along, by name, besides those that lie beside the source's weights.
        pipeline_layout: `writing.layout.layers` as a person writes it, see `pipeline_layout`.
    """

    source: Path
    out: Path
    to: str
    reading: Reading = field(default_factory=Reading)
    writing: Writing = field(default_factory=Writing)
    step: int | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    pipeline_layout: str | None = None


@dataclass(frozen=True, kw_only=True)
class Running:
    """How a conversion is done; changes no byte of what is written.

    Args:
        workers: processes; 1 = this one.
        block: bytes that are in hand at a time, for each worker.
        allow_nonfinite: NaN and infinite values are reported and no error.
        recheck: what an earlier run has written is read again.
        verify: all files are read again at the end, and the folder is opened.
    """

    workers: int = 1
    block: int = BLOCK
    allow_nonfinite: bool = False
    recheck: bool = False
    verify: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A conversion before it is begun.

    Args:
        id: hash over the source's files, the format, the options and the version.
        identity: hash over the source's files: names, sizes, times of change.
        options: those that are not the default, by name, as JSON.
        sources: folders that are read, and the hash over their files (see `state_of_files`).
        members: of an average, what goes in.
    """

    request: Request
    found: Found
    content: Content
    output: Output
    id: str
    identity: str
    options: Mapping[str, Any]
    sources: Mapping[Path, str] = field(default_factory=dict)
    members: tuple[Content, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of the files that are written or copied, small ones at the end excepted."""
        return self.output.nbytes + sum(p.stat().st_size for p in self.output.copies.values())


def plan(request: Request, note: Callable[[str], None] = lambda text: None) -> Plan:
    """Find and open the source and plan the folder; reads no values and writes nothing.

    Args:
        note: called with one line for a person: which of several checkpoints is taken, and the like.

    Raises:
        UsageError: as `find`, the format's `open` and `plan`; or OUT and IN are one in the other.
    """
    known, writable = find.known(), find.writable()
    if request.to not in known:
        raise unknown("format", request.to, writable)
    if request.to not in writable:
        names = ", ".join(f"`{n}`" for n in writable)
        raise UsageError(f"`{request.to}` is read, not written", f"formats that are written: {names}")
    target = writable[request.to]
    refuse_one_in_the_other(request.source, request.out)
    found = find.find(request.source, request.step)
    for text in found.notes:
        note(text)
    with_optimizer = request.reading.optimizer and request.writing.optimizer != "none"
    reading = dataclasses.replace(request.reading, optimizer=with_optimizer)
    content = open_checked(known[found.format], found.folder, reading)
    content = dataclasses.replace(content, files={**content.files, **request.files})
    _refuse_what_is_not_there(request, found, content)
    if request.pipeline_layout is not None:
        request = _with_layers(request, content.model.num_layers)
    if with_optimizer and target.keeps_optimizer:
        content = request.writing.with_weights_from_main(content)
    output = target.plan(content, request.writing)
    identity = state_of_files(found.folder)
    options = _options(request)
    text = canonical_json(
        {
            "version": VERSION,
            "cpt": __version__,
            "source": [found.format, identity],
            "to": request.to,
            "reading": _json(request.reading),
            "writing": _json(request.writing),
        }
    )
    return Plan(
        request=request,
        found=found,
        content=content,
        output=output,
        id=hash_text(text),
        identity=identity,
        options=options,
        sources={found.folder: identity},
    )


def refuse_one_in_the_other(source: Path, out: Path) -> None:
    """Raises UsageError when OUT is what is read, or lies inside it."""
    if source.resolve() == out.resolve():
        raise UsageError(f"`{out}` is both what is read and what is written", "name another folder")
    if out.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"`{out}` lies inside `{source}`, which is read", "name a folder outside it")


def state_of_files(folder: Path) -> str:
    """Hash over the names, sizes and times of change of a checkpoint's files."""
    return hash_text(canonical_json(list(_files(folder))))


def _refuse_what_is_not_there(request: Request, found: Found, content: Content) -> None:
    if request.step is not None and found.step is None and content.iteration != request.step:
        which = "of no step" if content.iteration is None else f"step {content.iteration:,}"
        raise UsageError(f"`{found.folder}` is {which}, and step {request.step:,} was asked for")
    form = request.writing.optimizer
    if content.optimizer is None and form not in (None, "none"):
        raise UsageError(
            f"`{content.path}` has no optimizer state to write as `{form}`", "leave `--optimizer` out: weights only"
        )
    layout = request.writing.layout
    if layout.etp is not None and not content.model.num_experts:
        raise UsageError(f"etp is {layout.etp}, but the model has no experts", "leave `--etp` out")
    if layout.dp > 1 and content.optimizer is None:
        raise UsageError(
            f"dp is {layout.dp}, but no optimizer state is written that data ranks could share", "leave `--dp` out"
        )
    if request.reading.untie and found.format != "hf":
        raise UsageError(f"`--untie` is for Hugging Face folders, and `{found.folder}` is `{found.format}`")
    if request.writing.from_master and content.optimizer is None:
        raise UsageError(f"`{content.path}` has no fp32 main weights", "leave `--from-master` out: the model's weights")


def _with_layers(request: Request, num_layers: int) -> Request:
    layout = request.writing.layout
    layers = pipeline_layout.parse(request.pipeline_layout or "", pp=layout.pp, vp=layout.vp, num_layers=num_layers)
    layout = dataclasses.replace(layout, layers=layers)
    return dataclasses.replace(request, writing=dataclasses.replace(request.writing, layout=layout))


def _files(folder: Path) -> Iterator[tuple[str, int, int]]:
    """(name, size, time of change) of every file of a checkpoint, by name."""
    found = []
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            facts = path.stat()
            found.append((str(path.relative_to(folder)), facts.st_size, facts.st_mtime_ns))
    yield from sorted(found)


def _options(request: Request) -> dict[str, Any]:
    """Options that are not the default, by name."""
    found: dict[str, Any] = {}
    for given, usual in (
        (request.reading, Reading()),
        (request.writing, Writing()),
        (request.writing.layout, Layout()),
    ):
        for f in dataclasses.fields(given):
            value = getattr(given, f.name)
            if value != getattr(usual, f.name) and not isinstance(value, Layout):
                found[f.name] = value.name if isinstance(value, Path) else value
    return found


def _json(options: Reading | Writing) -> dict[str, Any]:
    """All options as JSON; a configuration counts by what it says, not by where it lies."""
    found = dataclasses.asdict(options)
    config = found.get("config")
    if isinstance(config, Path):
        file = config / "config.json" if config.is_dir() else config
        try:
            found["config"] = hash_text(file.read_bytes())
        except OSError:
            found["config"] = str(config)
    return found
