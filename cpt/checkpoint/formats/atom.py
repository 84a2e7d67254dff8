"""Our own format: every logical tensor by itself, as Hugging Face names it, with its Adam state, whatever wrote it.

    atom.json                    the manifest, written last: what every tensor is, where it lies, its CRC-32
    atoms-00000.safetensors ...  about 2 GiB each; a tensor is never split over files
    hf/                          config.json and tokenizer files, verbatim

Keys of tensors are `<atom>#fp32`, `#exp_avg`, `#exp_avg_sq`; `#model` only where no main weight gives it by rounding;
`#pad.<state>` for the padding rows of the vocabulary. There is no pickle in it, and no torch is needed to read it.

Two conversions of one training state have the same `id`, whatever layout they came from and however the tensors are
packed into files: it is the SHA-256 over name, shape, dtype and CRC-32 of each state of each atom. Padding rows are not
in it, because their number follows from the layout. `sum` is the SHA-256 over all else that the manifest says of the
state (its keys but `sum` and `conversion`, as canonical JSON), so that a changed step or hyperparameter is found.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from cpt import __version__
from cpt.base.errors import UsageError
from cpt.base.files import canonical_json, hash_text, read_json, why_unreadable
from cpt.base.records import from_json, to_json
from cpt.checkpoint import hf_config, mapping
from cpt.checkpoint.arrays import Array, Fill, Payload, Place, Segment, as_matrix, itemsize
from cpt.checkpoint.content import LEFT_OPTIMIZER, MAIN, MODEL, OPTIMIZER, Atom, Content, Optimizer
from cpt.checkpoint.crc32 import crc32
from cpt.checkpoint.formats import FORMATS, Output, Reading, WritableFormat, Writing
from cpt.checkpoint.formats.hf import DTYPES, safetensors
from cpt.checkpoint.safetensors_files import Place as Header
from cpt.checkpoint.safetensors_files import read_header
from cpt.checkpoint.unpickle import Dtype
from cpt.checkpoint.writing import FileSums
from cpt.plan.model import ModelConfig

NAME, VERSION = "cpt-atom", 1
MANIFEST, HF, CONFIG = "atom.json", "hf", "config.json"
SUM = "sum"
FEW, WORTH = 4, 64 << 20  # files that several workers can share, if they hold at least so much each [bytes]
Json = dict[str, Any]


@FORMATS.add("atom")
class AtomFormat(WritableFormat):
    name: ClassVar[str] = "atom"
    title: ClassVar[str] = "atom format of cpt"
    has_id: ClassVar[bool] = True

    @classmethod
    def recognise(cls, folder: Path) -> bool:
        return (folder / MANIFEST).is_file()

    @classmethod
    def open(cls, folder: Path, reading: Reading) -> Content:
        return _Folder(folder).content(reading)

    @classmethod
    def why_not_whole(cls, folder: Path) -> str | None:
        try:
            _Folder(folder).content(Reading())
        except UsageError as error:
            return error.message.replace(f"`{folder}/", "`")
        return None

    @classmethod
    def plan(cls, content: Content, writing: Writing) -> Output:
        return _plan(content, writing)

    @classmethod
    def facts(cls, folder: Path) -> Mapping[str, Any]:
        manifest = _manifest(folder)
        return {name: manifest.get(name) for name in ("id", "version", "source")}


# Writing


@dataclasses.dataclass(frozen=True, slots=True)
class _Stored:
    """A state of an atom, or of its padding rows, as a tensor of a file."""

    atom: str
    state: str
    pad: bool
    shape: tuple[int, ...]
    dtype: str

    @property
    def key(self) -> str:
        return f"{self.atom}#pad.{self.state}" if self.pad else f"{self.atom}#{self.state}"

    @property
    def payload(self) -> Payload:
        rows, columns = as_matrix(self.shape)
        fill = Fill(self.atom, 0, rows, 0, columns, pad=self.pad)
        return Payload(self.key, self.state, self.dtype, (Segment(rows, columns, (fill,)),))


def _plan(content: Content, writing: Writing) -> Output:
    dtypes = writing.weight_dtypes(content)
    with_optimizer = content.has_optimizer and writing.optimizer != "none"
    stored = sorted(
        (s for atom in content.atoms.values() for s in _states(content, atom, dtypes[atom.name], with_optimizer)),
        key=lambda s: (MODEL, *OPTIMIZER).index(s.state),  # stable: states one after another, each in the model's order
    )
    payloads = [s.payload for s in stored]
    shapes = {s.key: s.shape for s in stored}
    groups = packed(payloads, writing.file_bytes)
    names = [f"atoms-{i:05d}.safetensors" for i in range(len(groups))]
    files = tuple(
        dataclasses.replace(safetensors(name, group, shapes), sha256=writing.sha256)
        for name, group in zip(names, groups, strict=True)
    )
    copies, made = _beside(content, dtypes)
    common, dropped = _encoded(content)
    if content.has_optimizer and not with_optimizer:
        dropped.append("the optimizer's state, as asked")
        common |= {"step": None, "groups": []}
    keys = [[p.name for p in group] for group in groups]

    def finish(sums: Mapping[str, FileSums]) -> dict[str, bytes]:
        crcs = {
            key: (name, crc)
            for name, inside in zip(names, keys, strict=True)
            for key, crc in zip(inside, sums[name].payloads, strict=True)
        }
        atoms = _entries(content, stored, dtypes, crcs, common["groups"])
        manifest = {
            "format": NAME,
            "version": VERSION,
            "id": identity(atoms),
            **common,
            "files": _files({n: sums[n] for n in names}, copies, made, sha256=writing.sha256),
            "atoms": atoms,
        }
        return made | {MANIFEST: _lines({**manifest, SUM: own_sum(manifest)})}

    return Output(files=files, finish=finish, copies=copies, dropped=tuple(dropped), manifest=MANIFEST)


def _states(content: Content, atom: Atom, dtype: str, with_optimizer: bool) -> Iterator[_Stored]:
    """The states of an atom that are written: the weight itself only where rounding does not give it."""
    for pad, states in ((False, atom.states), (True, atom.pad)):
        if not states:
            continue
        if not with_optimizer or MAIN not in states or (atom.name in content.unrounded and MODEL in states):
            yield _Stored(atom.name, MODEL, pad, content.array(atom.name, MODEL, pad).shape, dtype)
        for state in OPTIMIZER if with_optimizer else ():
            if state not in states:
                continue
            array = states[state]
            if state == MAIN and array.dtype != "float32":
                raise UsageError(f"the main weight of `{atom.name}` is {array.dtype}, wanted float32")
            yield _Stored(atom.name, state, pad, array.shape, array.dtype)


def packed(payloads: Sequence[Payload], file_bytes: int) -> list[list[Payload]]:
    """Payloads in files of about equal size, in order; a few files even where one would do, for several workers."""
    total = sum(p.nbytes for p in payloads)
    count = max(1, -(-total // file_bytes), min(FEW, total // WORTH))
    groups: dict[int, list[Payload]] = {}
    at = 0
    for p in payloads:  # into the file that its middle lies in
        groups.setdefault((2 * at + p.nbytes) * count // (2 * total) if total else 0, []).append(p)
        at += p.nbytes
    return list(groups.values())


def _beside(content: Content, dtypes: Mapping[str, str]) -> tuple[dict[str, Path], dict[str, bytes]]:
    """Files taken along, and config.json where there is none to take, by name in the folder."""
    copies = {f"{HF}/{name}": path for name, path in sorted(content.files.items())}
    if f"{HF}/{CONFIG}" in copies:
        return copies, {}
    config = content.model.hf_config
    if config is None:
        config = hf_config.config_for(content.model, next(iter(dtypes.values())))
    return copies, {f"{HF}/{CONFIG}": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}


def _encoded(content: Content) -> tuple[Json, list[str]]:
    """Everything beside the tensors as JSON, and one line for each value that is none."""
    lost: list[str] = []
    layout = content.layout
    optimizer = content.optimizer
    return {
        "source": {
            "format": content.format,
            "layout": None if layout is None else to_json(layout),
            "path": "/".join(content.path.parts[-2:]) if content.path.name.startswith("iter_") else content.path.name,
            "optimizer": optimizer and optimizer.form,
            "id": content.id,
        },
        "writer": f"cpt {__version__}",
        "model": {k: v for k, v in to_json(content.model).items() if k != "hf_config"},
        "config": "made" if content.model.hf_config is None else "original",
        "padded_vocab_size": content.padded_vocab_size,
        "iteration": content.iteration,
        "step": optimizer and optimizer.step,
        "groups": encode([dict(g) for g in optimizer.groups] if optimizer else [], "groups", lost),
        "common": encode(dict(content.common), "common", lost),
        "args": None if content.args is None else encode(dict(content.args), "args", lost),
        "objects": encode(dict(content.objects), "objects", lost),
        "left_out": list(content.left_out),
    }, [f"{name} (`{kind}` is not plain data)" for name, kind in (text.split("\n") for text in lost)]


def _entries(
    content: Content,
    stored: Sequence[_Stored],
    dtypes: Mapping[str, str],
    crcs: Mapping[str, tuple[str, int]],
    groups: Sequence[Mapping[str, Any]],
) -> list[Json]:
    """The manifest's `atoms`."""
    tied = mapping.tied_copy(content.model)
    rules = {str(f.atom): key for key, t in mapping.megatron_tensors(content.model).items() for f in t.tensor.fills}
    entries: dict[str, Json] = {}
    for name, atom in content.atoms.items():
        entry: Json = {"name": name, "shape": list(atom.shape), "model_dtype": dtypes[name]}
        entry |= {"group": _group(atom, rules.get(name, ""), groups), "rule": rules.get(name)}
        if tied is not None and tied[1] == name:
            entry["tied_to"] = tied[0]
        entries[name] = entry | {"states": {}}
    for s in stored:
        file, crc = crcs[s.key]
        nbytes = math.prod(s.shape) * itemsize(s.dtype)
        made = {"file": file, "key": s.key, "dtype": s.dtype, "nbytes": nbytes, "crc32": f"{crc:08x}"}
        if s.pad:
            entries[s.atom]["pad_rows"] = s.shape[0]
        entries[s.atom]["states"][f"pad.{s.state}" if s.pad else s.state] = made
    return list(entries.values())


def _group(atom: Atom, key: str, groups: Sequence[Mapping[str, Any]]) -> int | None:
    """Index of the parameter group by Megatron's rule: vectors are not decayed, experts are apart; None = unclear."""
    decayed, expert = len(atom.shape) > 1 and not atom.name.endswith(".bias"), ".experts.experts." in key
    fits = [
        i
        for i, group in enumerate(groups)
        if bool(group.get("wd_mult", 1.0)) == decayed and bool(group.get("is_expert_parallel")) == expert
    ]
    return fits[0] if len(fits) == 1 else None


def identity(atoms: Sequence[Mapping[str, Any]]) -> str:
    """`id` of a training state from the manifest's entries."""
    facts = sorted(
        [a["name"], list(a["shape"]), a["model_dtype"], state, s["dtype"], s["crc32"]]
        for a in atoms
        for state, s in a["states"].items()
        if not state.startswith("pad.")
    )
    return hash_text(canonical_json(facts))


def own_sum(manifest: Mapping[str, Any]) -> str:
    """`sum` of a manifest: over all that it says but this, and how it was converted, which is added later."""
    return hash_text(canonical_json({k: v for k, v in manifest.items() if k not in (SUM, "conversion")}))


def _files(
    sums: Mapping[str, FileSums], copies: Mapping[str, Path], made: Mapping[str, bytes], *, sha256: bool
) -> list[Json]:
    """The manifest's `files`: all but itself."""
    found: list[Json] = []
    for name, s in sums.items():
        found.append(
            {"name": name, "size": s.size, "crc32": f"{s.crc32:08x}"} | ({"sha256": s.sha256} if sha256 else {})
        )
    for name, data in sorted({**{n: p.read_bytes() for n, p in copies.items()}, **made}.items()):
        facts: Json = {"name": name, "size": len(data), "crc32": f"{crc32(data):08x}"}
        found.append(facts | ({"sha256": hash_text(data)} if sha256 else {}))
    return found


def encode(value: Any, where: str, lost: list[str]) -> Any:
    """A plain value as strict JSON from which `decode` makes the same value: tuples, bytes, sets, infinite floats and
    keys that are no text are marked by a mapping with the one key `$...`.

    Args:
        lost: gets `where` and the class of each value that cannot be held; None stands for it.
    """
    if isinstance(value, Dtype):
        return {"$dtype": str(value)}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, bytes | bytearray):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, list):
        return [encode(v, f"{where}[{i}]", lost) for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [encode(v, f"{where}[{i}]", lost) for i, v in enumerate(value)]}
    if isinstance(value, set | frozenset):
        return {"$set": [encode(v, where, lost) for v in sorted(value, key=repr)]}
    if isinstance(value, Mapping):
        if all(isinstance(k, str) and not isinstance(k, Dtype) and not k.startswith("$") for k in value):
            return {k: encode(v, f"{where}.{k}", lost) for k, v in value.items()}
        return {"$map": [[encode(k, where, lost), encode(v, f"{where}.{k}", lost)] for k, v in value.items()]}
    lost.append(f"{where}\n{type(value).__name__}")
    return None


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    mark = next(iter(value), "")
    if not mark.startswith("$"):
        return {k: decode(v) for k, v in value.items()}
    held = value[mark]
    made: dict[str, Any] = {
        "$dtype": Dtype,
        "$float": float,
        "$bytes": base64.b64decode,
        "$tuple": lambda v: tuple(decode(v)),
        "$set": lambda v: set(decode(v)),
        "$map": lambda v: {decode(k): decode(item) for k, item in v},
    }
    return made[mark](held)


def _lines(manifest: Json) -> bytes:
    """The manifest, one line for each atom, file and other fact."""
    parts = []
    for name, value in manifest.items():
        if name in ("files", "atoms"):
            text = "[\n" + ",\n".join(f"  {_line(v)}" for v in value) + "\n ]"
        else:
            text = _line(value)
        parts.append(f" {_line(name)}: {text}")
    return ("{\n" + ",\n".join(parts) + "\n}\n").encode()


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


# Reading


def _manifest(folder: Path) -> Json:
    """`atom.json`, its version checked."""
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"`{path}` {why_unreadable(error)}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != NAME:
        raise UsageError(f"`{path}` is not the manifest of an atom checkpoint: `format` is not `{NAME}`")
    if manifest.get("version") != VERSION:
        raise UsageError(f"`{path}` has version {manifest.get('version')}, this cpt reads version {VERSION}")
    return manifest


class _Folder:
    """An atom checkpoint whose manifest and headers agree. Reads no values."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / MANIFEST
        self.manifest = _manifest(folder)
        try:
            self.files = self._check_files()
            self.model = self._read_model()
            self.headers = self._read_headers()
            self.entries = self._check_entries()
            if identity(list(self.entries.values())) != self.manifest["id"]:
                raise UsageError(f"`{self.path}`: `id` is not that of the tensors listed: the manifest was changed")
            self._check_rest()
            if SUM in self.manifest and own_sum(self.manifest) != self.manifest[SUM]:
                raise UsageError(f"`{self.path}` was changed: its checksum `{SUM}` is another one")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise UsageError(f"`{self.path}` {why_unreadable(error)}") from None

    def _check_rest(self) -> None:
        """What lies beside the tensors is of the right kind."""
        for name in ("step", "iteration", "padded_vocab_size"):
            value = self.manifest[name]
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise UsageError(f"`{self.path}`: `{name}` is {str(value)[:40]!r}, wanted a whole number")
        for name, kind in (("groups", list), ("common", dict), ("objects", dict)):
            if not isinstance(self.manifest[name], kind):
                raise UsageError(f"`{self.path}`: `{name}` is not a {'list' if kind is list else 'mapping'}")
        if not all(isinstance(g, dict) for g in self.manifest["groups"]):
            raise UsageError(f"`{self.path}`: `groups` is not a list of mappings")

    def content(self, reading: Reading) -> Content:
        manifest = self.manifest
        step, groups = manifest["step"], manifest["groups"]
        with_optimizer = reading.optimizer and step is not None
        atoms: dict[str, Atom] = {}
        crcs: dict[str, list[tuple[int, int, int]]] = {}
        for name, entry in self.entries.items():
            held = entry["states"]
            if not with_optimizer:  # the weight, or what it is rounded from
                held = {
                    p + s: held[p + s]
                    for p in ("", "pad.")
                    for s in [MODEL if p + MODEL in held else MAIN]
                    if p + s in held
                }
            arrays = {state: self._array(entry, state, facts, crcs) for state, facts in held.items()}
            atoms[name] = Atom(
                name=name,
                shape=tuple(entry["shape"]),
                dtype=entry["model_dtype"],
                states={s: a for s, a in arrays.items() if not s.startswith("pad.")},
                pad={s.removeprefix("pad."): a for s, a in arrays.items() if s.startswith("pad.")},
            )
        both = {n for n, a in atoms.items() if MODEL in a.states and MAIN in a.states}
        beside = {n.removeprefix(f"{HF}/"): self.folder / n for n in self.files if n.startswith(f"{HF}/")}
        if self.model.hf_config is None:
            beside.pop(CONFIG, None)
        for name, facts in self.files.items():
            if name.startswith(f"{HF}/"):
                crcs[str(self.folder / name)] = [(0, facts["size"], int(facts["crc32"], 16))]
        return Content(
            format=AtomFormat.name,
            path=self.folder,
            model=self.model,
            atoms=atoms,
            padded_vocab_size=manifest["padded_vocab_size"],
            optimizer=Optimizer(step=step, groups=tuple(decode(groups))) if with_optimizer else None,
            iteration=manifest["iteration"],
            common=decode(manifest["common"]),
            args=decode(manifest["args"]),
            objects=decode(manifest["objects"]),
            files=beside,
            unrounded=frozenset(both),
            id=manifest["id"],
            left_out=(LEFT_OPTIMIZER,) if step is not None and not with_optimizer else (),
            crc32={file: tuple(sorted(found)) for file, found in crcs.items()},
        )

    def _array(self, entry: Json, state: str, facts: Json, crcs: dict[str, list[tuple[int, int, int]]]) -> Array:
        header = self.headers[facts["key"]]
        shape = self._shape(entry, state)
        rows, columns = as_matrix(shape)
        file = str(header.file)
        crcs.setdefault(file, []).append((header.start, header.nbytes, int(facts["crc32"], 16)))
        place = Place(file, header.start, columns * itemsize(facts["dtype"]), 0, rows, 0, columns)
        return Array(facts["dtype"], shape, (place,))

    def _shape(self, entry: Json, state: str) -> tuple[int, ...]:
        rest = entry["shape"][1:]
        return (entry["pad_rows"], *rest) if state.startswith("pad.") else tuple(entry["shape"])

    def _check_files(self) -> dict[str, Json]:
        """The manifest's files by name: all there, of the size it says, and no others."""
        found: dict[str, Json] = {}
        states = [(a, s) for a in self.manifest["atoms"] for s in a["states"].values()]
        for facts in self.manifest["files"]:
            name, size = facts["name"], facts["size"]
            if not isinstance(name, str) or not _is_inside(name):
                raise UsageError(f"`{self.path}` lists the file `{name}`, which is not inside the folder")
            if name in found:
                raise UsageError(f"`{self.path}` lists the file `{name}` twice")
            path = self.folder / name
            if not path.is_file():
                raise UsageError(f"`{path}` is missing, `{MANIFEST}` lists it{_lost(states, name)}")
            has = path.stat().st_size
            if has != size:
                raise UsageError(f"`{path}` has {has:,} bytes, `{MANIFEST}` says {size:,}{_lost(states, name)}")
            found[name] = facts
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in found:
                raise UsageError(f"`{path}` does not belong to this checkpoint: `{MANIFEST}` does not list it")
        return found

    def _read_model(self) -> ModelConfig:
        fields = dict(self.manifest["model"])
        if self.manifest["config"] == "original":
            name = f"{HF}/{CONFIG}"
            if name not in self.files:
                raise UsageError(f"`{self.path}` does not list `{name}`, which it says to have")
            data = (self.folder / name).read_bytes()
            if f"{crc32(data):08x}" != self.files[name]["crc32"]:
                raise UsageError(f"`{self.folder / name}` was changed: its CRC-32 is not the one in `{MANIFEST}`")
            fields["hf_config"] = json.loads(data)
        model = from_json(ModelConfig, fields)
        if max(model.num_layers, model.num_experts) > len(self.manifest["atoms"]):
            raise UsageError(f"`{self.path}` lists fewer tensors than its model has layers or experts")
        return model

    def _read_headers(self) -> dict[str, Header]:
        """Every tensor of the files by its key; their bytes fill each file exactly."""
        found: dict[str, Header] = {}
        for name in self.files:
            if name.startswith(f"{HF}/"):
                continue
            for key, header in read_header(self.folder / name).items():
                if key in found:
                    raise UsageError(f"tensor `{key}` is both in `{found[key].file}` and in `{header.file}`")
                found[key] = header
        return found

    def _check_entries(self) -> dict[str, Json]:
        """The manifest's atoms by name: those of the model, each with headers that agree."""
        shapes = mapping.atom_shapes(self.model)
        found: dict[str, Json] = {}
        keys = set(self.headers)
        for entry in self.manifest["atoms"]:
            name = entry["name"]
            if name not in shapes:
                raise UsageError(f"`{self.path}`: no rule names the tensor `{name}`{mapping.suggest(name, shapes)}")
            if name in found:
                raise UsageError(f"`{self.path}` lists the tensor `{name}` twice")
            if tuple(entry["shape"]) != shapes[name]:
                raise UsageError(
                    f"`{self.path}`: `{name}` has shape {entry['shape']}, its `model` says {list(shapes[name])}"
                )
            found[name] = entry
            states = entry["states"]
            if MODEL not in states and MAIN not in states:
                raise UsageError(f"`{self.path}`: `{name}` has neither `{MODEL}` nor `{MAIN}`")
            for state, facts in states.items():
                if state.removeprefix("pad.") not in (MODEL, *OPTIMIZER):
                    raise UsageError(f"`{self.path}`: `{name}` has the state `{state}`, which is not known")
                self._check_state(entry, state, facts)
                if facts["key"] not in keys:
                    raise UsageError(f"`{self.path}` lists the key `{facts['key']}` twice")
                keys.discard(facts["key"])
        if missing := [name for name in shapes if name not in found]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UsageError(f"`{self.path}` does not list the tensor `{missing[0]}`{more} of its model")
        if keys:
            key = min(keys)
            raise UsageError(f"`{self.headers[key].file}` holds `{key}`, which `{MANIFEST}` does not list")
        return {name: found[name] for name in shapes}

    def _check_state(self, entry: Json, state: str, facts: Json) -> None:
        key, file, dtype, shape = facts["key"], facts["file"], facts["dtype"], self._shape(entry, state)
        header = self.headers.get(key)
        if header is None or header.file != self.folder / file:
            raise UsageError(f"`{self.path}` says that `{key}` is in `{file}`, but it is not there")
        nbytes = math.prod(shape) * itemsize(dtype)
        said = (DTYPES.get(header.dtype), header.shape, header.nbytes, header.nbytes)
        if said != (dtype, shape, nbytes, facts["nbytes"]):
            raise UsageError(
                f"`{header.file}`: `{key}` is {header.dtype} {list(header.shape)} with {header.nbytes:,} bytes, "
                f"`{MANIFEST}` says {dtype} {list(shape)} with {nbytes:,}"
            )
        int(facts["crc32"], 16)


def _is_inside(name: str) -> bool:
    """Whether a file's name is a plain one: `atoms-...`, or one in `hf/`."""
    folder, _, rest = name.rpartition("/")
    return folder in ("", HF) and rest not in ("", ".", "..", MANIFEST) and not set(name) & set("\\\0")


def _lost(states: Sequence[tuple[Json, Json]], name: str) -> str:
    """`: lost are ...` for a file that is not whole."""
    inside = [s["key"] for _, s in states if s["file"] == name]
    some = ", ".join(f"`{k}`" for k in inside[:3]) + (f" and {len(inside) - 3} more" if len(inside) > 3 else "")
    return f": lost are {some}" if inside else ""
