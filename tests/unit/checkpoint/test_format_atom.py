"""The atom format keeps every bit of a training state, has one id for it however it is laid out, and names damage."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.base.errors import UsageError
from cpt.checkpoint import find, hf_config
from cpt.checkpoint.arrays import CARRIERS, Files, Payload, Segment, as_matrix
from cpt.checkpoint.content import Content, Layout, Optimizer
from cpt.checkpoint.formats import Reading, Writing
from cpt.checkpoint.formats.atom import FEW, WORTH, AtomFormat, decode, encode, packed
from cpt.checkpoint.unpickle import Dtype
from tests import made_checkpoints as made
from tests.shared import shared_data

OPTIMIZER = ("fp32", "exp_avg", "exp_avg_sq")


def bits(content: Content) -> dict[tuple[str, str, bool], bytes]:
    """Bytes of every state of every atom and of its padding rows; of weights too where only main weights are kept."""
    found = {}
    with Files() as files:
        for atom in content.atoms.values():
            for pad, states in ((False, atom.states), (True, atom.pad)):
                for state in {*states, "model"} if states else ():
                    array = content.array(atom.name, state, pad)
                    dtype = atom.dtype if state == "model" else array.dtype
                    out = np.empty(as_matrix(array.shape), CARRIERS[dtype])
                    files.read(array, 0, 0, out, dtype)
                    found[atom.name, state, pad] = out.tobytes()
    return found


def written(content: Content, out: Path, **options: Any) -> Content:
    return AtomFormat.open(made.write(content, "atom", out, Writing(**options)), Reading())


def manifest(folder: Path) -> Any:
    return json.loads((folder / "atom.json").read_text())


@pytest.mark.parametrize("model", [made.LLAMA, made.MOE], ids=["llama", "mixtral"])
def test_every_bit_comes_back(model: Any, tmp_path: Path) -> None:
    before = dataclasses.replace(
        made.content(tmp_path / "made", model),
        common={"opt_param_scheduler": {"max_lr": 1e-4, "num_steps": 3}, "consumed_train_samples": 0.1 + 0.2},
        args={
            "norm_epsilon": 1e-5,
            "lr": 5e-324,
            "layout": (1, (2,)),
            "huge": math.inf,
            "params_dtype": Dtype("bfloat16"),
        },
        objects={"cpt.cursor": {"3": [1, 2]}},
    )
    after = written(before, tmp_path / "atom")
    assert bits(after) == bits(before)
    assert (after.optimizer, after.iteration, after.padded_vocab_size) == (before.optimizer, 7, 48)
    assert (after.common, after.args, after.objects) == (before.common, before.args, before.objects)
    assert type(dict(after.args or {})["params_dtype"]) is Dtype and after.model == before.model
    assert {tuple(a.states) for a in after.atoms.values()} == {OPTIMIZER}  # the weights follow from the main weights
    again = written(after, tmp_path / "again")
    assert bits(again) == bits(before) and again.id == after.id
    assert {a.shape for a in after.atoms["lm_head.weight"].pad.values()} == {(3, 16)}


def test_weights_alone_and_weights_that_no_rounding_gives_are_kept(tmp_path: Path) -> None:
    before = made.content(tmp_path / "made", dtype="float16")
    name = "model.layers.1.mlp.up_proj.weight"
    kept = written(dataclasses.replace(before, unrounded=frozenset({name})), tmp_path / "both")
    assert tuple(kept.atoms[name].states) == ("model", *OPTIMIZER) and kept.unrounded == {name}
    assert bits(kept) == bits(before)
    alone = written(before, tmp_path / "weights", optimizer="none")
    assert alone.optimizer is None and {tuple(a.states) for a in alone.atoms.values()} == {("model",)}
    assert bits(alone) == {k: v for k, v in bits(before).items() if k[1] == "model"}
    weights = AtomFormat.open(tmp_path / "both", Reading(optimizer=False))
    assert weights.optimizer is None and bits(weights)[name, "model", False] == bits(before)[name, "model", False]
    assert set(weights.atoms[name].states) == {"model"} and set(weights.atoms["model.norm.weight"].states) == {"fp32"}


def test_the_id_depends_on_the_state_alone(tmp_path: Path) -> None:
    content = made.content(tmp_path / "made")
    first = written(content, tmp_path / "a")
    assert written(content, tmp_path / "b", file_bytes=3000, sha256=True).id == first.id
    assert len(list((tmp_path / "b").glob("atoms-*"))) > 5
    padded = made.content(tmp_path / "other", padded=None)
    assert written(padded, tmp_path / "c").id != first.id  # other values: the seed's are drawn in another order
    rest = {n: dataclasses.replace(a, pad={}) for n, a in content.atoms.items()}
    unpadded = dataclasses.replace(
        content, atoms=rest, padded_vocab_size=None, path=tmp_path / "x", layout=Layout(tp=2)
    )
    assert written(unpadded, tmp_path / "d").id == first.id
    assert written(made.content(tmp_path / "seed", seed=1), tmp_path / "e").id != first.id
    weights = [written(content, tmp_path / n, optimizer="none", dtype=d).id for n, d in (("f", None), ("g", "float32"))]
    assert len({first.id, *weights}) == 3


@pytest.mark.parametrize("to", ["torch_dist", "megatron"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=3)], ids=str)
def test_a_state_has_one_id_whatever_format_and_layout_it_went_through(to: str, layout: Layout, tmp_path: Path) -> None:
    content = made.content(tmp_path / "made")
    first = written(content, tmp_path / "first")
    folder = made.write(first, to, tmp_path / "there", Writing(layout=layout, vocabulary_multiple=24))
    there = find.known()[to].open(folder, Reading())
    back = written(there, tmp_path / "back")
    assert back.id == first.id and back.optimizer is not None and back.optimizer.step == 7
    assert bits(back) == bits(first)


def test_the_manifest_says_what_everything_is(tmp_path: Path) -> None:
    content = made.content(tmp_path / "made", dataclasses.replace(made.LLAMA, tie_embeddings=True))
    folder = made.write(content, "atom", tmp_path / "atom", Writing(sha256=True))
    found = manifest(folder)
    assert (found["format"], found["version"], found["step"], found["config"]) == ("cpt-atom", 1, 7, "made")
    for facts in found["files"]:
        data = (folder / facts["name"]).read_bytes()
        assert (facts["size"], facts["crc32"]) == (len(data), f"{zlib.crc32(data):08x}")
        assert facts["sha256"] == hashlib.sha256(data).hexdigest()
    entries = {a["name"]: a for a in found["atoms"]}
    assert entries["model.embed_tokens.weight"]["tied_to"] == "lm_head.weight"
    assert entries["model.embed_tokens.weight"]["pad_rows"] == 3
    assert entries["model.norm.weight"]["group"] == 1 and entries["model.layers.0.mlp.up_proj.weight"]["group"] == 0
    for file, stretches in AtomFormat.open(folder, Reading()).crc32.items():
        data = Path(file).read_bytes()
        assert all(zlib.crc32(data[at : at + n]) == crc for at, n, crc in stretches)


def test_files_beside_the_weights_come_along_verbatim(tmp_path: Path) -> None:
    content = made.content(tmp_path / "made")
    config = json.dumps(hf_config.config_for(content.model, "bfloat16") | {"unknown": [1]}, indent=7).encode()
    (tmp_path / "config.json").write_bytes(config)
    (tmp_path / "tokenizer.json").write_bytes(b'{"a": 1}')
    names = ("config.json", "tokenizer.json")
    model = dataclasses.replace(content.model, hf_config=json.loads(config))
    before = dataclasses.replace(content, model=model, files={n: tmp_path / n for n in names})
    after = written(before, tmp_path / "atom")
    assert {n: p.read_bytes() for n, p in after.files.items()} == {n: (tmp_path / n).read_bytes() for n in names}
    assert after.model == model and manifest(tmp_path / "atom")["config"] == "original"
    made_up = written(content, tmp_path / "without")
    assert made_up.model.hf_config is None and not made_up.files and (tmp_path / "without/hf/config.json").is_file()


@given(st.lists(st.integers(1, 2 * WORTH), min_size=1, max_size=60), st.integers(WORTH, 10 * WORTH))
def test_files_are_few_of_like_size_and_never_split_a_tensor(sizes: list[int], limit: int) -> None:
    payloads = [Payload(str(i), "model", "uint8", (Segment(n, 1, ()),)) for i, n in enumerate(sizes)]
    groups = packed(payloads, limit)
    assert [p for group in groups for p in group] == payloads and all(groups)
    total = sum(sizes)
    assert len(groups) <= max(math.ceil(total / limit), FEW)
    share = total / max(1, math.ceil(total / limit), min(FEW, total // WORTH))
    assert all(sum(p.nbytes for p in group) <= share + max(sizes) for group in groups)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.just("$tuple") | st.integers(), inner)
        | st.frozensets(st.integers()).map(set)
    ),
    max_leaves=12,
)


@given(plain)
def test_plain_values_survive_json_with_their_types(value: Any) -> None:
    lost: list[str] = []
    text = json.dumps(encode(value, "x", lost), allow_nan=False)
    assert not lost
    assert repr(decode(json.loads(text))) == repr(value) or decode(json.loads(text)) == value


def test_values_that_are_not_plain_are_told(tmp_path: Path) -> None:
    content = dataclasses.replace(made.content(tmp_path / "made"), args={"ok": 1, "inner": {"odd": [object()]}})
    assert AtomFormat.plan(content, Writing()).dropped == ("args.inner.odd[0] (`object` is not plain data)",)
    assert written(content, tmp_path / "atom").args == {"ok": 1, "inner": {"odd": [None]}}


# Damage

Change = Callable[[Path], None]


def edited(change: Callable[[Any], None]) -> Change:
    """The manifest, changed."""

    def edit(folder: Path) -> None:
        value = manifest(folder)
        change(value)
        (folder / "atom.json").write_text(json.dumps(value))

    return edit


def cut(folder: Path) -> None:
    path = folder / "atoms-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def header(change: Callable[[dict[str, Any]], None]) -> Change:
    """The header of the first file, changed, as long as before."""

    def edit(folder: Path) -> None:
        path = folder / "atoms-00000.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        value = json.loads(data[8 : 8 + length])
        change(value)
        text = json.dumps(value, separators=(",", ":")).encode().ljust(length)
        assert len(text) == length
        path.write_bytes(data[:8] + text + data[8 + length :])

    return edit


def rename_key(value: dict[str, Any]) -> None:
    name = next(n for n in value if n.endswith("up_proj.weight#fp32"))
    value[name.replace("up_proj", "up_proy")] = value.pop(name)


def swap(value: dict[str, Any]) -> None:
    names = [n for n in value if "up_proj" in n or "gate_proj" in n][:2]
    value[names[0]]["data_offsets"], value[names[1]]["data_offsets"] = (
        value[names[1]]["data_offsets"],
        value[names[0]]["data_offsets"],
    )


def overlap(value: dict[str, Any]) -> None:
    offsets = next(v["data_offsets"] for v in value.values() if v.get("data_offsets", [0])[0] > 11_000)
    offsets[:] = [offsets[0] - 4, offsets[1] - 4]


def first(value: Any) -> Any:
    return value["atoms"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, r"atoms-00001.safetensors` has [\d,]+ bytes, `atom.json` says [\d,]+: lost are `.*#"),
        (lambda f: (f / "atoms-00001.safetensors").unlink(), r"atoms-00001.safetensors` is missing.*: lost are"),
        (lambda f: shutil.copy(f / "atoms-00001.safetensors", f / "atoms-00009.safetensors"), "does not belong"),
        (lambda f: (f / "atom.json").write_bytes((f / "atom.json").read_bytes()[:300]), "is damaged or was cut off"),
        (edited(lambda m: m.update(version=2)), "has version 2, this cpt reads version 1"),
        (edited(lambda m: m.update(format="x")), "is not the manifest of an atom checkpoint"),
        (edited(lambda m: m.pop("groups")), "damaged: it lacks `groups`"),
        (edited(lambda m: m["files"][0].update(name="../atoms-00000.safetensors")), "not inside the folder"),
        (edited(lambda m: m["files"][0].update(name="/etc/passwd")), "not inside the folder"),
        (edited(lambda m: m["files"].append(m["files"][0])), "lists the file `.*` twice"),
        (edited(lambda m: m["atoms"].pop()), "does not list the tensor `lm_head.weight`"),
        (edited(lambda m: m["atoms"].append(first(m))), "lists the tensor `.*` twice"),
        (
            edited(lambda m: first(m).update(name="model.embed.weight")),
            r"no rule names .*nearest known: `model.embed_t",
        ),
        (edited(lambda m: first(m).update(shape=[16, 45])), r"has shape \[16, 45\], its `model` says \[45, 16\]"),
        (edited(lambda m: first(m)["states"].pop("exp_avg")), "holds `.*exp_avg`, which `atom.json` does not list"),
        (edited(lambda m: first(m)["states"]["fp32"].update(crc32="00000000")), "`id` is not that of the tensors"),
        (edited(lambda m: first(m)["states"]["fp32"].update(dtype="int32")), "F32 .*says int32"),
        (edited(lambda m: first(m)["states"]["fp32"].update(nbytes=4)), r"#fp32` is F32 \[45, 16\]"),
        (edited(lambda m: first(m)["states"]["fp32"].update(file="atoms-00001.safetensors")), "it is not there"),
        (edited(lambda m: first(m)["states"].update(best=first(m)["states"].pop("exp_avg"))), "state `best`"),
        (edited(lambda m: first(m).update(pad_rows=4)), r"says float32 \[4, 16\]"),
        (edited(lambda m: m["model"].update(num_layers=10**9)), "fewer tensors than its model has layers"),
        (header(rename_key), "but it is not there"),
        (header(overlap), "does not follow the tensor before it"),
    ],
)
def test_damage_is_named(change: Change, message: str, tmp_path: Path) -> None:
    folder = made.write(made.content(tmp_path / "made"), "atom", tmp_path / "atom", Writing(file_bytes=40_000))
    AtomFormat.open(folder, Reading())
    change(folder)
    with pytest.raises(UsageError, match=message):
        AtomFormat.open(folder, Reading())


def test_tensors_that_changed_places_are_found_by_their_checksums(tmp_path: Path) -> None:
    folder = made.write(made.content(tmp_path / "made"), "atom", tmp_path / "atom", Writing())
    header(swap)(folder)
    content = AtomFormat.open(folder, Reading())
    wrong = 0
    for file, stretches in content.crc32.items():
        data = Path(file).read_bytes()
        wrong += sum(zlib.crc32(data[at : at + n]) != crc for at, n, crc in stretches)
    assert wrong == 2


def test_megatron_s_own_checkpoints_have_one_id(tmp_path: Path) -> None:
    """The same training state, saved by megatron-core in five ways, is one state."""
    goldens = shared_data("ckpt", "mcore-goldens")
    ids = {}
    for name in (
        "td_fully_reshardable_dp2",
        "td_dp_reshardable_dp2",
        "td_nodistopt_tp2",
        "legacy_tp2pp2",
        "legacy_distopt_dp2",
    ):
        found = find.find(goldens / name)
        content = find.known()[found.format].open(found.folder, Reading(vocab_size=90))
        atoms = written(content, tmp_path / name)
        ids[name] = atoms.id
        assert atoms.optimizer == Optimizer(step=7, groups=atoms.optimizer.groups if atoms.optimizer else ())
    assert len(set(ids.values())) == 1, ids


@pytest.mark.parametrize("key", ["step", "iteration", "lr", "source"])
def test_the_manifest_finds_its_own_changes(tmp_path: Path, key: str) -> None:
    folder = made.write(made.content(tmp_path / "made"), "atom", tmp_path / "atom")
    value = manifest(folder)
    (folder / "atom.json").write_text(json.dumps({**value, "conversion": {"id": "added later"}}, indent=3))
    AtomFormat.open(folder, Reading())
    if key == "lr":
        value["groups"][0]["lr"] *= 2
    elif key == "source":
        value["source"]["format"] = "hf"
    else:
        value[key] += 1
    (folder / "atom.json").write_text(json.dumps(value))
    with pytest.raises(UsageError, match=r"atom\.json` was changed: its checksum `sum` is another one"):
        AtomFormat.open(folder, Reading())
    del value["sum"]  # a folder of an earlier release has none
    (folder / "atom.json").write_text(json.dumps(value))
    AtomFormat.open(folder, Reading())
