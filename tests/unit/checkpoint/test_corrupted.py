"""Damaged and hostile checkpoints of every format: refused by name, no traceback, no hang, nothing half-written left.

A change is let through only where nothing could show it: values in a format that carries no checksums. The same folder
with a manifest that lists checksums shows it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cpt.base.errors import CptError
from cpt.checkpoint import find, verify
from cpt.checkpoint.arrays import Files
from cpt.checkpoint.content import Content, Layout
from cpt.checkpoint.diff import diff
from cpt.checkpoint.formats import Reading, Writing
from cpt.checkpoint.job import planning
from cpt.checkpoint.job.convert import convert
from tests.made_checkpoints import content, write

SECONDS = 20  # a case takes a fraction of one; a hang is ended and fails
SUMMED = {"native", "atom", "converted"}  # a manifest lists the checksums of all their files
MANIFESTS = {"manifest.json", "atom.json", "conversion.json"}
FORMATS = ("hf", "sharded", "bin", "torch_dist", "native", "megatron", "megatron-distributed", "atom", "converted")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One training state in every format."""
    root = tmp_path_factory.mktemp("good")
    made = content(root / "made")
    weights = content(root / "weights", padded=None, optimizer=False)
    ranks = Layout(tp=2, pp=3)
    found = {
        "hf": write(weights, "hf", root / "hf"),
        "sharded": write(weights, "hf", root / "sharded", Writing(file_bytes=4000)),
        "native": write(made, "torch_dist", root / "native"),
        "torch_dist": write(made, "torch_dist", root / "torch_dist"),
        "megatron": write(
            made, "megatron", root / "m", Writing(layout=ranks, vocabulary_multiple=8, optimizer="plain")
        ),
        "megatron-distributed": write(
            made, "megatron", root / "md", Writing(vocabulary_multiple=16, optimizer="dp_reshardable")
        ),
        "atom": write(made, "atom", root / "atom"),
        "bin": root / "bin",
        "converted": root / "converted",
    }
    (found["torch_dist"] / "manifest.json").unlink()
    as_bin(found["hf"], found["bin"])
    convert(planning.plan(planning.Request(source=found["hf"], out=found["converted"], to="hf")))
    return found


def as_bin(source: Path, out: Path) -> None:
    import torch
    from safetensors.torch import load_file

    out.mkdir()
    shutil.copyfile(source / "config.json", out / "config.json")
    torch.save(load_file(source / "model.safetensors"), out / "pytorch_model.bin")


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    def end(number: int, frame: Any) -> None:
        raise AssertionError(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def opened(folder: Path) -> Content:
    name = find.recognise(folder)
    assert name is not None
    return find.known()[name].open(folder, Reading())


def outcome(folder: Path, out: Path) -> str | None:
    """What verify says is wrong; None = good. Whatever else is raised than a CptError fails the test.

    Converting it must not leave anything behind that looks whole when it is refused.
    """
    with no_hang():
        try:
            wrong = verify.verify(folder)
            said = "\n".join(wrong) or None
        except CptError as error:
            said = error.message
        try:
            convert(planning.plan(planning.Request(source=folder, out=out, to="atom")))
            assert verify.verify(out) == []
        except CptError as error:
            assert error.message and error.exit_code
            assert not out.exists()
            partial = out.with_name(out.name + ".partial")
            if partial.exists():
                with pytest.raises(CptError, match="unfinished conversion"):
                    find.find(partial)
        else:
            # Verify reads every file that a manifest lists; a conversion reads values and what describes them.
            assert said is None or any((folder / name).is_file() for name in MANIFESTS), said
    assert said is None or len(said) < 5000
    return said


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def flip(folder: Path, random: random.Random) -> Path:
    path = random.choice(files_of(folder))
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)
    return path


def many_flips(folder: Path, random: random.Random) -> Path:
    path = random.choice(files_of(folder))
    data = bytearray(path.read_bytes())
    for _ in range(40):
        data[random.randrange(len(data))] = random.randrange(256)
    path.write_bytes(data)
    return path


def hole(folder: Path, random: random.Random) -> Path:
    """A stretch of zeros, as a disk that lost a block leaves it."""
    path = random.choice(files_of(folder))
    data = bytearray(path.read_bytes())
    start = random.randrange(len(data))
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    path.write_bytes(data)
    return path


def truncate(folder: Path, random: random.Random) -> Path:
    path = random.choice(files_of(folder))
    os.truncate(path, random.randrange(path.stat().st_size))
    return path


def append(folder: Path, random: random.Random) -> Path:
    path = random.choice(files_of(folder))
    with open(path, "ab") as file:
        file.write(random.randbytes(random.choice([1, 64, 4096])))
    return path


def remove(folder: Path, random: random.Random) -> Path:
    path = random.choice(files_of(folder))
    path.unlink()
    return path


def empty(folder: Path, random: random.Random) -> Path:
    path = random.choice(files_of(folder))
    path.write_bytes(b"")
    return path


def swap(folder: Path, random: random.Random) -> Path:
    """Two files under each other's names."""
    files = files_of(folder)
    one, other = random.sample(files, 2)
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    return one


KINDS: dict[Callable[[Path, random.Random], Path], int] = {
    flip: 9,
    many_flips: 3,
    hole: 3,
    truncate: 4,
    append: 2,
    remove: 3,
    empty: 2,
    swap: 2,
}
CASES = [(name, kind, seed) for name in FORMATS for kind, count in KINDS.items() for seed in range(count)]


@pytest.mark.parametrize(("name", "kind", "seed"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_damage_by_chance_is_refused_or_changes_nothing_or_could_not_be_seen(
    good: dict[str, Path], tmp_path: Path, name: str, kind: Callable[..., Path], seed: int
) -> None:
    folder = tmp_path / good[name].name
    shutil.copytree(good[name], folder)
    before = {p: p.read_bytes() for p in files_of(folder)}
    path = kind(folder, random.Random(f"{name} {kind.__name__} {seed}"))
    if {p: p.read_bytes() for p in files_of(folder)} == before:
        return  # zeros over zeros
    said = outcome(folder, tmp_path / "out")
    if said is not None:
        return
    listed = name in SUMMED and path.name not in MANIFESTS
    assert not listed, f"{path.name} is listed with a checksum"
    same = diff(opened(good[name]), opened(folder), Files())
    unseen = path.name.endswith(".safetensors") or path.name in ("config.json", *MANIFESTS)
    assert same.is_equal or unseen, f"{path.name}: {[str(d) for d in same.tensors[:3]]} {same.only} {same.fields}"
    if kind in (truncate, remove, empty, append) and path.name not in (
        "config.json", "model.safetensors.index.json", *MANIFESTS
    ):  # fmt: skip
        assert same.is_equal and kind is append, path.name


def test_a_manifest_with_checksums_shows_what_the_format_cannot(good: dict[str, Path], tmp_path: Path) -> None:
    """The same flipped bit of a value: not seen in a bare folder, found in one that a conversion wrote."""
    for name, found in (("hf", False), ("converted", True)):
        folder = tmp_path / name
        shutil.copytree(good[name], folder)
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-11] ^= 1
        path.write_bytes(data)
        said = outcome(folder, tmp_path / f"out-{name}")
        assert (said is not None) == found, said
    assert (
        "`model.safetensors` has other bytes than were written" in (said or "")
        and not (tmp_path / "out-converted").exists()
    )


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file."""
    value = json.loads(path.read_text())
    changed = change(value)
    path.write_text(json.dumps(value if changed is None else changed))


def set_at(value: Any, where: tuple[Any, ...], to: Any) -> None:
    for key in where[:-1]:
        value = value[key]
    value[where[-1]] = to


CONFIG: list[tuple[str, Any]] = [
    ("num_hidden_layers", 4),
    ("num_hidden_layers", 2),
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", "3"),
    ("hidden_size", 32),
    ("hidden_size", -16),
    ("hidden_size", 10**30),
    ("hidden_size", None),
    ("intermediate_size", 2.5),
    ("num_attention_heads", 0),
    ("num_attention_heads", 5),
    ("num_key_value_heads", 0),
    ("num_key_value_heads", 3),
    ("head_dim", 7),
    ("vocab_size", 46),
    ("vocab_size", 10**12),
    ("vocab_size", [45]),
    ("model_type", "lama"),
    ("model_type", 7),
    ("rms_norm_eps", "x"),
    ("rope_parameters", {"rope_type": "yarn"}),
]


@pytest.mark.parametrize(("field", "value"), CONFIG, ids=lambda v: str(v)[:20])
def test_a_configuration_that_does_not_fit_the_tensors_is_refused(
    good: dict[str, Path], tmp_path: Path, field: str, value: Any
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(good["hf"], folder)
    edit(folder / "config.json", lambda c: c.__setitem__(field, value))
    assert outcome(folder, tmp_path / "out")


INDEX: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a file that is not there": lambda v: v["weight_map"].update(
        {"lm_head.weight": "model-00009-of-00009.safetensors"}
    ),
    "up and out": lambda v: v["weight_map"].update({"lm_head.weight": "../../secret.safetensors"}),
    "an absolute path": lambda v: v["weight_map"].update({"lm_head.weight": "/etc/passwd"}),
    "another file": lambda v: v["weight_map"].update({"lm_head.weight": v["weight_map"]["model.embed_tokens.weight"]}),
    "a tensor less": lambda v: v["weight_map"].pop("lm_head.weight") and None,
    "a tensor more": lambda v: v["weight_map"].update({"model.more": v["weight_map"]["lm_head.weight"]}),
    "a list": lambda v: [v],
    "no map": lambda v: {"metadata": {}},
    "numbers": lambda v: v["weight_map"].update({"lm_head.weight": 7}),
    "a zero byte": lambda v: v["weight_map"].update({"lm_head.weight": "a\0b"}),
    "the folder": lambda v: v["weight_map"].update({"lm_head.weight": ".."}),
}


@pytest.mark.parametrize("what", INDEX)
def test_an_index_that_lies_is_refused(good: dict[str, Path], tmp_path: Path, what: str) -> None:
    folder = tmp_path / "a" / "hf"
    shutil.copytree(good["sharded"], folder)
    shutil.copyfile(good["hf"] / "model.safetensors", tmp_path / "secret.safetensors")
    edit(folder / "model.safetensors.index.json", INDEX[what])
    said = outcome(folder, tmp_path / "out")
    if what in ("a tensor less", "a tensor more"):  # the files themselves say what they hold
        return
    assert said and ("model.safetensors.index.json" in said or "is missing" in said), said


def test_a_tensor_in_two_shards_is_refused_with_both_names(good: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(good["sharded"], folder)
    shards = sorted(folder.glob("*.safetensors"))
    shutil.copyfile(shards[0], shards[1])
    said = outcome(folder, tmp_path / "out")
    assert said and shards[0].name in said and shards[1].name in said


def with_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of a safetensors file; the values stay."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    text = json.dumps(header if changed is None else changed).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


NORM = "model.norm.weight"
HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "shape": lambda h: h[NORM].update(shape=[17]),
    "product of a shape": lambda h: h[NORM].update(shape=[4, 4]),
    "negative shape": lambda h: h[NORM].update(shape=[-16]),
    "huge shape": lambda h: h[NORM].update(shape=[10**18]),
    "deep shape": lambda h: h[NORM].update(shape=[1] * 5000),
    "shape that is none": lambda h: h[NORM].update(shape="16"),
    "dtype of another size": lambda h: h[NORM].update(dtype="F32"),
    "integers": lambda h: h[NORM].update(dtype="I16"),
    "dtype of nobody": lambda h: h[NORM].update(dtype="F4"),
    "quantised": lambda h: h[NORM].update(dtype="F8_E4M3"),
    "offset before the file": lambda h: h[NORM].update(data_offsets=[-32, 0]),
    "offset behind the file": lambda h: h[NORM].update(data_offsets=[10**15, 10**15 + 32]),
    "offsets the wrong way": lambda h: h[NORM].update(data_offsets=h[NORM]["data_offsets"][::-1]),
    "offsets of another": lambda h: h[NORM].update(
        data_offsets=[h["lm_head.weight"]["data_offsets"][0], h["lm_head.weight"]["data_offsets"][0] + 32]
    ),
    "one offset": lambda h: h[NORM].update(data_offsets=[0]),
    "offsets that are none": lambda h: h[NORM].update(data_offsets=["a", "b"]),
    "no such tensor": lambda h: h.pop(NORM) and None,
    "another name": lambda h: h.update({"model.nrom.weight": h.pop(NORM)}),
    "one tensor more": lambda h: h.update({"model.more.weight": h[NORM]}),
    "a list": lambda h: [h],
    "a text": lambda h: "header",
    "an entry that is none": lambda h: h.update({NORM: 5}),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_lies_is_refused(good: dict[str, Path], tmp_path: Path, what: str) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(good["hf"], folder)
    with_header(folder / "model.safetensors", HEADERS[what])
    assert outcome(folder, tmp_path / "out")


@pytest.mark.parametrize("length", [0, 1, 7, 2**31, 2**63 - 1, 2**64 - 1, 100 * 2**20])
def test_an_absurd_length_of_a_header_is_refused(good: dict[str, Path], tmp_path: Path, length: int) -> None:
    for name in ("hf", "atom"):
        folder = tmp_path / name
        shutil.copytree(good[name], folder)
        path = next(folder.glob("*.safetensors"))
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
        said = outcome(folder, tmp_path / "out")
        assert said and path.name in said


ATOM: list[tuple[tuple[Any, ...], Any]] = [
    (("format",), "other"),
    (("version",), 2),
    (("id",), "0" * 64),
    (("model", "num_layers"), 10**9),
    (("model", "num_layers"), 2),
    (("model", "num_experts"), 10**9),
    (("model", "hidden_size"), 8),
    (("model", "family"), "lama"),
    (("model",), []),
    (("atoms",), {}),
    (("atoms",), []),
    (("atoms", 0, "shape"), [10**12, 16]),
    (("atoms", 0, "shape"), [-45, 16]),
    (("atoms", 0, "name"), "model.other"),
    (("atoms", 0, "model_dtype"), "float8"),
    (("atoms", 0, "states", "fp32", "file"), "../other.safetensors"),
    (("atoms", 0, "states", "fp32", "file"), "/etc/passwd"),
    (("atoms", 0, "states", "fp32", "crc32"), "00000000"),
    (("atoms", 0, "states", "fp32", "crc32"), "nonsense"),
    (("atoms", 0, "states", "fp32", "dtype"), "int64"),
    (("atoms", 0, "states", "fp32", "key"), "model.norm.weight#fp32"),
    (("atoms", 0, "states"), {}),
    (("atoms", 0, "pad_rows"), 10**15),
    (("files", 0, "name"), "../../etc/passwd"),
    (("files", 0, "size"), 3),
    (("files", 0, "size"), "x"),
    (("files", 0, "crc32"), "00000000"),
    (("files",), None),
    (("step",), "seven"),
    (("groups",), 3),
    (("padded_vocab_size",), -1),
]


@pytest.mark.parametrize(("where", "to"), ATOM, ids=lambda v: str(v)[:40])
def test_a_manifest_that_lies_is_refused(
    good: dict[str, Path], tmp_path: Path, where: tuple[Any, ...], to: Any
) -> None:
    folder = tmp_path / "atom"
    shutil.copytree(good["atom"], folder)
    edit(folder / "atom.json", lambda v: set_at(v, where, to))
    assert outcome(folder, tmp_path / "out")


NATIVE: list[tuple[tuple[Any, ...], Any]] = [
    (("format",), "other"),
    (("version",), 3),
    (("model", "num_layers"), 10**9),
    (("model", "hidden_size"), 15),
    (("model", "num_query_groups"), 0),
    (("files",), {}),
    (("files", "../../x"), {"size": 1, "crc32": "00000000"}),
    (("files", "common.pt", "crc32"), "00000000"),
    (("files", "common.pt", "size"), -1),
    (("optimizer",), 5),
    (("layout",), "tp2"),
]


@pytest.mark.parametrize(("where", "to"), NATIVE, ids=lambda v: str(v)[:40])
def test_a_manifest_of_a_training_save_that_lies_is_refused(
    good: dict[str, Path], tmp_path: Path, where: tuple[Any, ...], to: Any
) -> None:
    folder = tmp_path / good["native"].name
    shutil.copytree(good["native"], folder)
    edit(folder / "manifest.json", lambda v: set_at(v, where, to))
    said = outcome(folder, tmp_path / "out")
    assert said or where == ("files",)


@pytest.mark.parametrize("text", ["{}", "[]", "null", "{", '{"sharded_backend": "zarr"}', '{"sharded_backend": 5}'])
def test_a_metadata_json_of_something_else_is_refused(good: dict[str, Path], tmp_path: Path, text: str) -> None:
    folder = tmp_path / good["torch_dist"].name
    shutil.copytree(good["torch_dist"], folder)
    (folder / "metadata.json").write_text(text)
    assert outcome(folder, tmp_path / "out")


# Pickles: nothing in them is ever run, nothing that they ask for is ever made.


class Runs:
    """A pickle that asks for a command to be run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


class Evaluates(Runs):
    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.marker)!r}, 'w')",)


class Imports(Runs):
    def __reduce__(self) -> Any:
        import subprocess

        return subprocess.Popen, (["touch", str(self.marker)],)


def raw(text: bytes) -> Callable[[Path], bytes]:
    return lambda marker: text


HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda m: pickle.dumps({"args": Runs(m)}, protocol=2),
    "eval": lambda m: pickle.dumps([Evaluates(m)], protocol=2),
    "Popen": lambda m: pickle.dumps({"state_dict": {"a": Imports(m)}}, protocol=2),
    "a nested name": lambda m: (
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c" + bytes([len(f"touch {m}")]) + f"touch {m}".encode() + b"\x85R."
        if len(f"touch {m}") < 256
        else b""
    ),
    "build by setstate": lambda m: b"ccollections\nOrderedDict\n)R}(Vx\ncposix\nsystem\nub.",
    "a list of 10^12": raw(b"cbuiltins\nlist\n(cbuiltins\nrange\n(L1000000000000L\ntRtR."),
    "10^12 bytes": raw(b"cbuiltins\nbytearray\n(L1000000000000L\ntR."),
    "a set of 10^12": raw(b"cbuiltins\nset\n(cbuiltins\nrange\n(L1000000000000L\ntRtR."),
    "10^11 times a text": raw(b"\x80\x04\x8e" + struct.pack("<Q", 10**14) + b"abc."),
    "a deep list": raw(b"(" * 100_000 + b"l" * 100_000 + b"."),
    "a list in itself": raw(b"]q\x00h\x00a."),
    "memo of 2^31": raw(b"\x80\x02]r\xff\xff\xff\x7f."),
    "nothing": raw(b""),
    "a bare end": raw(b"."),
    "a number": raw(b"I7\n."),
    "None": raw(b"N."),
    "another protocol": raw(b"\x80\xff."),
}
PLACES = {
    "torch_dist": [".metadata", "common.pt", "__0_0.distcp"],
    "native": [".metadata", "common.pt"],
    "megatron": ["mp_rank_00_000/model_optim_rng.pt"],
    "megatron-distributed": ["mp_rank_00/model_optim_rng.pt", "mp_rank_00/distrib_optim.pt"],
    "bin": ["pytorch_model.bin"],
}


def in_zip(path: Path, pickled: bytes) -> bytes:
    """A torch file whose `data.pkl` is another one."""
    import io

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3")
    return out.getvalue()


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize(("name", "file"), [(n, f) for n, files in PLACES.items() for f in files])
def test_no_code_of_a_pickle_is_run_and_nothing_huge_is_made(
    good: dict[str, Path], tmp_path: Path, name: str, file: str, what: str
) -> None:
    marker = tmp_path / "marker"
    pickled = HOSTILE[what](marker)
    folder = tmp_path / good[name].name
    shutil.copytree(good[name], folder)
    path = folder / file
    path.write_bytes(pickled if file == ".metadata" else in_zip(path, pickled))
    if name == "native":  # a manifest that fits the hostile file
        import zlib

        data = path.read_bytes()
        facts = {"size": len(data), "crc32": f"{zlib.crc32(data):08x}"}
        edit(folder / "manifest.json", lambda v: v["files"].__setitem__(file, facts))
    said = outcome(folder, tmp_path / "out")
    assert not marker.exists()
    # A native checkpoint is described by its manifest: of common.pt only plain values are looked at.
    assert said or (name, file) == ("native", "common.pt"), f"a hostile {file} was taken"


def test_the_marker_shows_a_pickle_that_is_run(tmp_path: Path) -> None:
    """What the tests above rely on: plain pickle would run these."""
    for what in ("os.system", "eval", "Popen", "a nested name"):
        marker = tmp_path / what.replace(" ", "_")
        with contextlib.suppress(Exception):
            made = pickle.loads(HOSTILE[what](marker))  # noqa: S301 - the very thing that is tested
            getattr(made, "wait", lambda: None)()
            for value in made if isinstance(made, list) else made.values() if isinstance(made, dict) else ():
                for inner in value.values() if isinstance(value, dict) else ():
                    inner.wait()
        assert marker.exists(), what
