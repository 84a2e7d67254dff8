"""A conversion whose source is the weighted average of several checkpoints, of any formats."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from cpt import __version__
from cpt.base.files import canonical_json, hash_text
from cpt.base.records import to_json
from cpt.base.registry import unknown
from cpt.checkpoint import average, find
from cpt.checkpoint.arrays import Files
from cpt.checkpoint.content import Content
from cpt.checkpoint.formats import Reading, Writing
from cpt.checkpoint.job.planning import VERSION, Plan, Request, refuse_one_in_the_other, state_of_files
from cpt.checkpoint.sums import open_checked


def plan(
    members: Sequence[tuple[Path, float]],
    out: Path,
    to: str | None,
    writing: Writing,
    note: Callable[[str], None] = lambda text: None,
    reading: Reading = Reading(),  # noqa: B008 (frozen)
) -> Plan:
    """Open the members and plan the folder of their average; writes nothing, reads values for the master test only.

    Args:
        members: any folders that `find` knows, and how much of each goes in.
        to: a format's name; None = that of the first member, or `hf` where that is read only.
        note: called with one line for a person.
        reading: how those are read that are no Hugging Face folders.

    Raises:
        UsageError: as `average.content`, `find`, the formats' `open` and `plan`.
    """
    known = find.known()
    writable = find.writable()
    if to is not None and to not in writable:
        raise unknown("format", to, writable)
    opened: list[tuple[Content, float]] = []
    found: list[find.Found] = []
    for folder, weight in members:
        refuse_one_in_the_other(folder, out)
        one = find.find(folder)
        for text in one.notes:
            note(text)
        found.append(one)
        how = Reading() if one.format == "hf" else reading
        opened.append((open_checked(known[one.format], one.folder, how), weight))
    mean = average.content(opened, Files())
    if any(_has_padding(c) for c, weight in opened if weight > 0) and not _has_padding(mean):
        note("the members have different padding rows of the vocabulary: they are left out")
    to = to or (found[0].format if found[0].format in writable else "hf")
    writing = dataclasses.replace(writing, optimizer="none")
    identity = hash_text(
        canonical_json([[f.format, state_of_files(f.folder), w] for f, (_, w) in zip(found, opened, strict=True)])
    )
    says = [to_json(c.model) for c, _ in opened] if reading != Reading() else []
    named = [VERSION, __version__, "average", identity, to, dataclasses.asdict(writing), *says]
    return Plan(
        request=Request(source=members[0][0], out=out, to=to, writing=writing),
        found=found[0],
        content=mean,
        output=writable[to].plan(mean, writing),
        id=hash_text(canonical_json(named)),
        identity=identity,
        options={"average": [[_from(out, f.folder), w] for f, (_, w) in zip(found, opened, strict=True)]}
        | ({"dtype": writing.dtype} if writing.dtype else {}),
        members=tuple({c.path: c for c, weight in opened if weight > 0}.values()),
    )


def _from(out: Path, folder: Path) -> str:
    """A member's path from OUT, as `job.record` says the source's."""
    return os.path.relpath(folder.resolve(), out.absolute())


def _has_padding(content: Content) -> bool:
    return any(a.pad for a in content.atoms.values())
