"""What a native checkpoint is: `manifest.json`, written last. A folder with a manifest whose sizes match is whole.

No torch here: plans, `cpt status` and the orchestrator read manifests.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt.base.errors import UsageError
from cpt.base.files import canonical_json, hash_text, read_json, why_unreadable, without_nan, write_json
from cpt.base.records import from_json, to_json
from cpt.plan.model import ModelConfig, Parallel

NAME = "manifest.json"
FORMAT = "cpt-native"
VERSION = 1
SUM = "sum"  # key of the checksum over the rest
PHASES = ("train", "stop", "pre_anneal", "end")  # of two labels for one step, the later in this order stays


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """One file of a checkpoint. `crc32` is of all its bytes, as eight hexadecimal digits."""

    size: int  # [bytes]
    crc32: str


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a checkpoint comes from: what the engine cannot know by itself. Same for every save of an attempt.

    `parent` is `{"path": ..., "identity": ...}` of the checkpoint that the stage started from, None from scratch.
    """

    stage: str = ""
    fingerprint: str = ""  # of the stage
    plan_id: str = ""
    tokenizer_hash: str | None = None
    parent: Mapping[str, Any] | None = None
    attempt: int = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a checkpoint but its tensors. `progress` is `engine.ports.Progress` as JSON."""

    origin: Origin
    model: ModelConfig
    padded_vocab_size: int
    precision: str  # fp32 | bf16
    layout: Parallel
    phase: str  # train | stop | pre_anneal | end
    step: int  # of the stage
    tokens: int  # of the stage
    progress: Mapping[str, Any]
    optimizer: Mapping[str, Any] | None = (
        None  # {"step": updates made, "groups": [hyperparameters]}; None = weights only
    )
    rng_ranks: int = 0  # ranks whose random state is stored; 0 = none
    versions: Mapping[str, str] = field(default_factory=dict)  # cpt, torch, megatron_core, python
    created: float = 0.0  # [unix seconds]
    conversion: Mapping[str, Any] | None = None  # what it was converted from, see `job.record`; None = saved by a run
    files: Mapping[str, FileFacts] = field(default_factory=dict)  # by path inside the folder, manifest excepted
    format: str = FORMAT
    version: int = VERSION

    @property
    def bytes(self) -> int:
        """Size on disk without the manifest [bytes]."""
        return sum(f.size for f in self.files.values())

    @property
    def identity(self) -> str:
        """Content identity: equal for equal files of an equal model, whatever folder, phase and time."""
        content = {name: [f.size, f.crc32] for name, f in self.files.items()}
        return hash_text(canonical_json({"files": content, "model": to_json(self.model)}))


def with_sum(manifest: Manifest) -> dict[str, Any]:
    """The manifest as JSON, with a checksum over all that it says."""
    value = without_nan(to_json(manifest))
    return {**value, SUM: _own_sum(value)}


def _own_sum(value: Mapping[str, Any]) -> str:
    """Of a manifest as JSON: over all but this, and how it was converted, which is added later."""
    return hash_text(canonical_json({k: v for k, v in value.items() if k not in (SUM, "conversion")}))


def write(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write the manifest atomically: from here on the checkpoint is whole."""
    write_json(Path(folder) / NAME, with_sum(manifest))


def read(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a native checkpoint folder.

    Raises:
        UsageError: there is none, it is not one of ours, or it was changed.
    """
    path = Path(folder) / NAME
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise UsageError(
            f"`{folder}` has no `{NAME}`: its save never finished, or it is not a checkpoint of cpt"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"`{path}` {why_unreadable(error)}") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UsageError(f"`{path}` is not a manifest of a native checkpoint")
    if value.get("version") != VERSION:
        raise UsageError(
            f"`{path}` has version {value.get('version')}, this cpt reads version {VERSION}",
            "read it with the release that wrote it",
        )
    try:
        said = value.pop(SUM, None)
        if said is not None and said != _own_sum(value):
            raise UsageError(f"`{path}` was changed: its checksum `{SUM}` is another one")
        manifest = from_json(Manifest, value)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UsageError(f"`{path}` {why_unreadable(error)}") from None
    for name in manifest.files:
        if Path(name).is_absolute() or not {"", "..", "."}.isdisjoint(name.split("/")) or "\0" in name:
            raise UsageError(f"`{path}` is damaged: `{name}` is not a file of the folder")
    return manifest


def why_not_whole(folder: str | os.PathLike[str]) -> str | None:
    """Why a native checkpoint folder must not be used; None when it is whole (manifest there, all sizes match)."""
    folder = Path(folder)
    if not (folder / NAME).is_file():
        return "its save never finished (no manifest)"
    try:
        files = read(folder).files
    except UsageError as error:
        return error.message
    for name, facts in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            return f"`{name}` is missing"
        if size != facts.size:
            return f"`{name}` has {size:,} bytes instead of {facts.size:,}"
    return None


def is_whole(folder: str | os.PathLike[str]) -> bool:
    """Whether a native checkpoint folder can be used."""
    return why_not_whole(folder) is None
