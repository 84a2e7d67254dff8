"""Where a checkpoint comes from that `cpt convert-ckpt` or `cpt ckpt average` made, as its folder says itself."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt.base.files import read_json
from cpt.checkpoint import manifest, store
from cpt.checkpoint.sums import LISTS


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A conversion that made a checkpoint.

    Args:
        record: all that the folder says of it, see `job.record`.
        format: of the source.
        path: of the source, where it lay when it was converted.
        step: of the source.
        identity: hash over the source's files, see `job.planning.state_of_files`.
        members: of an average, what went in and how much of it [fraction].
    """

    record: Mapping[str, Any]
    format: str
    path: Path
    step: int | None = None
    identity: str = ""
    members: tuple[tuple[Path, float], ...] = field(default=())

    def __str__(self) -> str:
        if self.members:
            return "average of " + ", ".join(f"{share:.3g} × {_short(path)}" for path, share in self.members)
        return f"{self.format}, {_short(self.path)}"


def read(folder: Path) -> Converted | None:
    """What a checkpoint was converted from; None where it does not say."""
    for name in (manifest.NAME, *LISTS):
        try:
            record = read_json(folder / name)["conversion"]
            source = record["source"]
            out = folder.absolute()
            if store.is_folder_name(folder.name) or folder.name == store.RELEASE:  # paths are relative to OUT
                out = out.parent
            given = record.get("options", {}).get("average", ())
            total = math.fsum(weight for _, weight in given)
            return Converted(
                record=record,
                format=str(source["format"]),
                path=_at(out, source["path"]),
                step=source.get("step") if isinstance(source.get("step"), int) else None,
                identity=str(source.get("identity", "")),
                members=tuple((_at(out, path), weight / total) for path, weight in given),
            )
        except PermissionError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
            continue  # none there, or not one of ours
    return None


def _at(out: Path, path: str) -> Path:
    return Path(os.path.normpath(out / path))


def _short(path: Path) -> str:
    """Relative to where the person is, where it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
