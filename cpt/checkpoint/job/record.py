"""What is written down about a conversion, in the folder that it made, and what is reported of it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpt import __version__
from cpt.checkpoint.content import LEFT_OPTIMIZER, MAIN, MODEL
from cpt.checkpoint.formats import FORMATS
from cpt.checkpoint.formats.hf import BIN
from cpt.checkpoint.job.look import Facts, Finding, findings
from cpt.checkpoint.job.place import KEY
from cpt.checkpoint.job.planning import VERSION, Plan
from cpt.checkpoint.safetensors_files import INDEX
from cpt.checkpoint.sums import file_sums
from cpt.checkpoint.writing import FileSums

FORMAT = "cpt-conversion"
OWN = "conversion.json"  # of formats without a manifest of ours


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a conversion did.

    Args:
        id: of the conversion.
        state: the id that the folder's format gives to a training state; None where it gives none.
        done_before: OUT held it already, nothing was done.
        bytes: size of all files.
        written: bytes that this run wrote; an earlier one may have written others.
        seconds: of this run.
        peak_memory: anonymous memory of the process that had most [bytes].
        workers: processes that worked at a time.
        tensors: logical ones.
        rounded: values that another dtype changed: of the weights that it was made of (see `weights_from`).
        weights: that line.
        dropped: one line for each thing of the source that is not in the folder.
        findings: what is odd about values.
        checksums: stretches of the source whose checksum was verified.
        compared: whether main weights were compared with the model's weights.
    """

    id: str
    out: Path
    folder: Path
    state: str | None = None
    done_before: bool = False
    files: int = 0
    bytes: int = 0
    written: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    workers: int = 0
    tensors: int = 0
    rounded: int = 0
    weights: str | None = None
    dropped: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    checksums: int = 0
    compared: bool = False
    reread: bool = False

    @property
    def rate(self) -> float:
        """Bytes written in a second by this run."""
        return self.written / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "id": self.state or self.id,
            "conversion_id": self.id,
            "out": str(self.out),
            "folder": str(self.folder),
            "done_before": self.done_before,
            "files": self.files,
            "bytes": self.bytes,
            "written_bytes": self.written,
            "seconds": round(self.seconds, 3),
            "bytes_per_s": round(self.rate),
            "peak_anonymous_bytes": self.peak_memory,
            "workers": self.workers,
            "tensors": self.tensors,
            "rounded_values": self.rounded,
            "weights": self.weights,
            "dropped": list(self.dropped),
            "values": [f.to_json() for f in self.findings],
            "source_checksums": self.checksums,
            "main_weights_compared": self.compared,
            "reread": self.reread,
        }


def done_report(plan: Plan) -> Report:
    """What is said of a conversion that was done before: what it made, and nothing of the work."""
    folder = plan.request.out / plan.output.step_folder
    sums = file_sums(folder)
    return Report(
        id=plan.id,
        out=plan.request.out,
        folder=folder,
        state=state_id(plan),
        done_before=True,
        files=1 + len(sums),
        bytes=(folder / plan.output.manifest).stat().st_size + sum(s.length for s in sums),
        tensors=len(plan.content.atoms),
        weights=weights_from(plan),
        dropped=dropped(plan),
    )


def dropped(plan: Plan) -> tuple[str, ...]:
    """What of the source is not in the folder, each once."""
    asked = plan.request.writing.optimizer == "none"
    left = (f"{text}, as asked" if asked and text == LEFT_OPTIMIZER else text for text in plan.content.left_out)
    return tuple(dict.fromkeys((*left, *plan.output.dropped, *_beside_tensors(plan), *_other_files(plan))))


def _beside_tensors(plan: Plan) -> Iterator[str]:
    """What a source says of its training, which a Hugging Face folder cannot."""
    content = plan.content
    if plan.request.to != "hf":
        return
    said = ["Megatron's arguments"] if content.args is not None else []
    said += [f"step {content.iteration:,}"] if content.iteration is not None else []
    said += [f"`{name}`" for name in content.common]
    if said:
        yield f"{', '.join(said)}: a Hugging Face folder has no place for {'it' if len(said) == 1 else 'them'}"


def _other_files(plan: Plan) -> Iterator[str]:
    """What lies in a Hugging Face folder and is neither the model's nor the tokenizer's."""
    content, folder = plan.content, plan.content.path
    if content.format != "hf":
        return
    arrays = [a for one in plan.members or (content,) for atom in one.atoms.values() for a in atom.states.values()]
    known = {Path(p.file).name for a in arrays for p in a.places} | {p.name for p in content.files.values()}
    known |= {"config.json", OWN, INDEX, f"{BIN}.index.json", ".cache", ".git"}
    others = [f"`{p.name}{'/' * p.is_dir()}`" for p in sorted(folder.iterdir()) if p.name not in known]
    if others:
        yield f"{', '.join(others)}: not of the model or its tokenizer"


def state_id(plan: Plan) -> str | None:
    """The id of the training state in a finished folder, equal for equal states; None where its format has none."""
    target = FORMATS.get(plan.request.to)
    if not target.has_id:
        return None
    found = target.facts(plan.request.out / plan.output.step_folder).get("id")
    return None if found is None else str(found)


def advice(plan: Plan) -> tuple[str, ...]:
    """What a person must know to load the folder."""
    layout, layers = plan.request.writing.layout, plan.content.model.num_layers
    parts = layout.pp * layout.vp
    if plan.request.to == "megatron" and plan.content.has_optimizer:
        return ("no random states (`rng_state`) are in it: a run that goes on from here needs `--no-load-rng`",)
    if plan.request.to != "torch_dist" or layout.layers is not None or layers % parts == 0:
        return ()
    return (f"{layers} layers do not divide into {parts} parts: Megatron loads it with `--pipeline-layout` only",)


def weights_from(plan: Plan) -> str | None:
    """Which weights another dtype was made of, where the source has main weights; None = there was no choice."""
    writing, atoms = plan.request.writing, plan.content.atoms.values()
    if writing.dtype is None:
        return None
    if LEFT_OPTIMIZER in plan.content.left_out:
        return "taken from the model's weights; the main weights are left out, as asked"
    if not any(MAIN in a.states for a in atoms):
        return None
    if writing.from_master or all(a.name in plan.content.from_main or MODEL not in a.states for a in atoms):
        return "taken from the fp32 main weights"
    if plan.content.from_main or plan.request.to != "hf":
        return "taken from the fp32 main weights, where there are some"
    return "taken from the model's weights; `--from-master` takes the fp32 main weights"


def record(plan: Plan, facts: Facts, *, checksums: int, compared: bool) -> dict[str, Any]:
    """What a folder says about how it was made: the same for every run that gives the same bytes.

    Args:
        checksums: stretches of the source whose own checksums were verified.
        compared: whether main weights were compared with the model's weights.
    """
    content = plan.content
    return {
        "format": FORMAT,
        "version": VERSION,
        "id": plan.id,
        "to": plan.request.to,
        "source": {
            "format": plan.found.format,
            "path": os.path.relpath(plan.found.folder.resolve(), plan.request.out.absolute()),
            "step": content.iteration,
            "layout": str(content.layout) if content.layout else None,
            "identity": plan.identity,
        },
        "options": dict(plan.options),
        "dropped": list(dropped(plan)),
        "verdict": {
            "structure": "every tensor is there once, in its shape",
            "main_weights": "rounded, they are the model's weights" if compared else None,
            "source_checksums": checksums,
            "rounded_values": facts.rounded,
            "values": [f.to_json() for f in findings(facts, content)],
        },
        "versions": {"cpt": __version__, "python": platform.python_version(), "numpy": np.__version__},
    }


def with_record(data: bytes, value: Mapping[str, Any]) -> bytes:
    """A manifest with the record in it. Its other lines stay as they are."""
    text = data.decode()
    found = json.loads(text)
    if KEY in found or not found:
        return (json.dumps({**found, KEY: value}, indent=1, ensure_ascii=False) + "\n").encode()
    end = text.rstrip().removesuffix("}").rstrip()
    own = json.dumps({KEY: value}, indent=1, ensure_ascii=False)[1:].lstrip("\n")
    return f"{end},\n{own}\n".encode()


def own_manifest(value: Mapping[str, Any], files: Mapping[str, FileSums]) -> bytes:
    """`conversion.json`: the record, and sizes and checksums of all other files."""
    listed = {name: {"size": s.size, "crc32": f"{s.crc32:08x}"} for name, s in sorted(files.items())}
    return (json.dumps({KEY: {**value, "files": listed}}, indent=1, ensure_ascii=False) + "\n").encode()
