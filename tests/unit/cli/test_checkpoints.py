"""Which checkpoint `cpt ckpt` and `cpt sample` take for a word, without torch."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cpt.base.errors import UsageError
from cpt.base.files import closed_at, why_unreadable, write_json
from cpt.checkpoint import manifest, store
from cpt.checkpoint.content import Layout
from cpt.checkpoint.formats import Writing
from cpt.evaluate import sample
from tests import made_checkpoints
from tests.command import cpt, write_base
from tests.unit.checkpoint.test_store import a_checkpoint


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose `base` is that of a sibling, with a trained stage and a native copy of the base after it."""
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    sibling = runs / "demo-1" / "stages" / "first"
    a_checkpoint(sibling / "checkpoints", 7, "end")
    run = runs / "demo-2"
    write_json(run / "stages" / "first" / "state.json", {"status": "done", "reference": str(sibling)})
    a_checkpoint(run / "stages" / "second" / "checkpoints", 9, "end")
    a_checkpoint(run / "stages" / "nat" / "checkpoints", 0, "end")
    write_base(run / "stages" / "export" / "hf")
    kinds = {"first": "train", "second": "train", "nat": "convert", "export": "convert"}
    write_json(run / "plan.json", {"stages": {name: {"kind": kind} for name, kind in kinds.items()}})
    write_json(runs / "demo-1" / "plan.json", {"stages": {"first": {"kind": "train"}}})
    return run


def test_of_a_run_the_stage_that_trained_last_counts_and_not_a_copy_of_the_base(run: Path) -> None:
    assert store.resolve(run) == run / "stages" / "second" / "checkpoints" / "iter_0000009"
    (run / "stages" / "second" / "checkpoints").rename(run / "gone")
    sibling = run.parent / "demo-1" / "stages" / "first"
    assert store.resolve(run) == sibling / "checkpoints" / "iter_0000007"
    assert store.resolve(run / "stages" / "first") == sibling / "checkpoints" / "iter_0000007"


def test_a_list_names_the_run_that_a_stage_is_taken_from(run: Path) -> None:
    ended = cpt("ckpt", "list", "demo-2")
    assert ended.code == 0
    rows = ended.out.splitlines()[1:]
    assert sorted(row.split()[1] for row in rows) == ["0", "7", "9", "–"]  # the last is an export, of no step
    assert [row.split()[1] for row in rows if row.endswith("(in demo-1)")] == ["7"]
    rows = json.loads(cpt("ckpt", "list", "demo-2/stages/first", "--json").out)
    assert [(row["step"], row["in_run"]) for row in rows] == [(7, "demo-1")]
    assert cpt("ckpt", "list", "demo-2/stages/second").out.count("(in ") == 0


@pytest.mark.parametrize("words", [["ckpt", "list"], ["ckpt", "show"], ["ckpt", "verify"]])
def test_a_run_is_found_by_its_name(words: list[str], run: Path) -> None:
    ended = cpt(*words, "demo-2")
    assert ended.code in (0, 1) and ended.err == "" and "iter_0000009" in ended.out
    for arguments in ([*words, "demo-3"], ["sample", "demo-3", "The"]):
        ended = cpt(*arguments)
        said = "error: there is no folder `demo-3`, and no run of this name\n\nhint: did you mean `demo-"
        assert ended.code == 2 and ended.err.startswith(said)


@pytest.mark.parametrize("words", [["list"], ["show"], ["verify"], ["diff", "there"]])
def test_a_path_that_is_nowhere_is_told_with_the_nearest(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_base(Path("there"))
    write_base(Path("up/there"))
    for name, said, near in (
        ("ther", "`ther`, and no run of this name", "there"),
        ("up/ther", "`up/ther`", "up/there"),
        ("upp/there", "`upp`", "up/there"),
    ):
        ended = cpt("ckpt", *words, name)
        assert (ended.code, ended.err) == (2, f"error: there is no folder {said}\n\nhint: did you mean `{near}`?\n")


@pytest.mark.parametrize("word", ["show", "verify", "list"])
def test_an_unfinished_conversion_is_told_under_both_its_names(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out.partial").mkdir()
    head = {"command": "cpt convert-ckpt in out --to hf", "source": {"path": "in"}}
    Path("out.partial", "journal.jsonl").write_text(json.dumps(head) + "\n")
    for name in ("out", "out.partial"):
        ended = cpt("ckpt", word, name)
        said = f"`{name}` is an unfinished conversion of `in`: `{head['command']}` goes on with it\n"
        assert ended.code == (1 if word == "verify" else 2) and said in (ended.out, ended.err.removeprefix("error: "))


def test_a_hugging_face_folder_is_told_as_what_it_is(run: Path) -> None:
    export = run / "stages" / "export"
    for path in (export, export / "hf"):
        shown = cpt("ckpt", "show", str(path))
        assert shown.code == 0 and "Hugging Face format" in shown.out and "llama" in shown.out
        assert "model.safetensors" in shown.out and "warning: its weights cannot be used: " in shown.err
        listed = cpt("ckpt", "list", str(path))
        assert listed.code == 0 and " hf " in listed.out and str(export / "hf") in listed.out
        ended = cpt("ckpt", "verify", str(path))
        assert ended.code == 1 and "tensor `model.embed_tokens.weight` is missing" in ended.out
        assert sample.find(path).folder == export / "hf"
    value = json.loads(cpt("ckpt", "show", str(export), "--json").out)
    assert value["kind"] == "hf" and value["model"]["num_layers"] == 4 and value["files"]["model.safetensors"] == 10


def test_what_is_neither_is_told_what_would_do(tmp_path: Path) -> None:
    ended = cpt("ckpt", "show", str(tmp_path))
    assert ended.code == 2 and "hint: known are folders of Hugging Face" in ended.err
    assert "and runs and stages of cpt" in ended.err


@pytest.mark.parametrize("name", ["torch_dist", "megatron", "atom"])
def test_what_is_not_sampled_from_is_told_by_its_format_and_what_to_do(tmp_path: Path, name: str) -> None:
    folder = made_checkpoints.write(made_checkpoints.content(tmp_path / "values"), name, tmp_path / "made")
    (folder / "manifest.json").unlink(missing_ok=True)
    ended = cpt("sample", str(tmp_path / "made"), "The")
    assert ended.code == 2 and f"`{folder}` is in " in ended.err and "which is not sampled from" in ended.err
    assert f"hint: `cpt convert-ckpt {folder} OUT --to hf` makes a folder to sample from" in ended.err


def test_a_list_says_where_checkpoints_are_and_the_layout_of_foreign_ones(tmp_path: Path) -> None:
    given, writing = made_checkpoints.content(tmp_path / "values"), Writing(layout=Layout(tp=2))
    made_checkpoints.write(given, "megatron", tmp_path / "all" / "made", writing)
    ended = cpt("ckpt", "list", str(tmp_path / "all"))
    assert ended.code == 0 and f"there are some in `{tmp_path / 'all' / 'made'}`\n" in ended.err
    assert " tp 2 × pp 1 " in cpt("ckpt", "list", str(tmp_path / "all" / "made")).out


def test_a_folder_in_a_files_place_and_a_closed_file_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made_checkpoints.write(made_checkpoints.content(tmp_path / "values"), "hf", tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    for words in (("verify", str(folder)), ("diff", str(folder), str(folder))):
        ended = cpt("ckpt", *words)
        assert ended.code in (1, 2) and "`model.safetensors` is a folder, wanted is a file" in (
            ended.out + ended.err
        ).replace(f"{folder}/", "")
    closed = tmp_path / "closed"
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and access(path, mode))
    assert closed_at(closed / "in" / "file") == closed and closed_at(folder / "file") == folder / "file"
    with pytest.raises(PermissionError):
        why_unreadable(PermissionError(13, "no", "x"))


def test_a_manifest_that_was_changed_is_never_believed(tmp_path: Path) -> None:
    folder = made_checkpoints.write(made_checkpoints.content(tmp_path / "values"), "torch_dist", tmp_path / "made")
    path = folder / manifest.NAME
    good = manifest.read(folder)
    manifest.write(folder, good)
    text = path.read_text()
    path.write_text(text.replace('"tokens": 0', '"tokens": 1'))
    with pytest.raises(UsageError, match="was changed: its checksum `sum` is another one"):
        manifest.read(folder)
    value = {k: v for k, v in json.loads(text).items() if k != "sum"}  # as earlier releases wrote it
    write_json(path, value | {"step": 8})
    assert "says step 8, `common.pt` 7: one of them was changed" in cpt("ckpt", "verify", str(folder)).out
    for name in ("../../x", "/x", "a/../../x", ""):
        write_json(path, value | {"files": value["files"] | {name: {"size": 1, "crc32": "00000000"}}})
        with pytest.raises(UsageError, match="is not a file of the folder"):
            manifest.read(folder)


def test_an_uneven_pipeline_is_shown(tmp_path: Path) -> None:
    writing = Writing(vocabulary_multiple=8, layout=Layout(pp=2, layers=(2, 1)))
    folder = made_checkpoints.write(made_checkpoints.content(tmp_path / "made"), "megatron", tmp_path / "out", writing)
    assert "tp 1 × pp 2, layers 2 + 1" in cpt("ckpt", "show", str(folder)).out
