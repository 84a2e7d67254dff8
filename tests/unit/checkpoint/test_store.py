"""Finding, keeping and removing checkpoints, without torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cpt.base.errors import UsageError
from cpt.base.files import write_atomic, write_json
from cpt.checkpoint import manifest as manifests
from cpt.checkpoint import store
from cpt.checkpoint.manifest import FileFacts, Manifest, Origin
from cpt.plan.model import ModelConfig, Parallel
from cpt.plan.types import Retain

MODEL = ModelConfig(
    family="llama",
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=22,
    num_attention_heads=2,
    num_query_groups=1,
    head_dim=4,
    vocab_size=50,
    max_position_embeddings=64,
    norm_eps=1e-5,
    rope_scaling={"rope_type": "llama3", "factor": 8.0},
)


def a_manifest(step: int, phase: str = "train", tokens: int | None = None) -> Manifest:
    return Manifest(
        origin=Origin(stage="domain", fingerprint="f", plan_id="p", tokenizer_hash="t"),
        model=MODEL,
        padded_vocab_size=128,
        precision="fp32",
        layout=Parallel(tp=2, pp=2, layers=(1, 1)),
        phase=phase,
        step=step,
        tokens=step * 100 if tokens is None else tokens,
        progress={"step": step, "cursors": {"web": {"epoch": 0, "rank": 3}}},
        optimizer={"step": step},
        files={"__0_0.distcp": FileFacts(size=5, crc32="3610a686")},
    )


def a_checkpoint(checkpoints: Path, step: int, phase: str = "train") -> Path:
    folder = checkpoints / store.folder_name(step)
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(b"hello")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    manifests.write(folder, a_manifest(step, phase))
    return folder


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    folder = a_checkpoint(tmp_path, 7)
    assert manifests.read(folder) == a_manifest(7)


def test_the_newest_whole_checkpoint_wins_and_the_others_are_named(tmp_path: Path) -> None:
    good = a_checkpoint(tmp_path, 100)
    short = a_checkpoint(tmp_path, 200)
    (short / "__0_0.distcp").write_bytes(b"hell")
    lost = a_checkpoint(tmp_path, 300)
    (lost / "__0_0.distcp").unlink()
    unfinished = a_checkpoint(tmp_path, 10_000_000)
    (unfinished / manifests.NAME).unlink()
    damaged = a_checkpoint(tmp_path, 400)
    (damaged / manifests.NAME).write_text("{")
    found, skipped = store.newest_whole(tmp_path)
    assert found == good
    assert [p for p, _ in skipped] == [unfinished, damaged, lost, short]
    reasons = [why for _, why in skipped]
    assert "never finished" in reasons[0] and "is damaged or was cut off" in reasons[1]
    assert reasons[2:] == ["`__0_0.distcp` is missing", "`__0_0.distcp` has 4 bytes instead of 5"]
    assert store.is_whole(good) and not any(store.is_whole(p) for p, _ in skipped)


def test_a_checkpoint_with_other_bytes_than_were_written_is_set_aside_and_named(tmp_path: Path) -> None:
    good = a_checkpoint(tmp_path, 100)
    flipped = a_checkpoint(tmp_path, 200)
    (flipped / "__0_0.distcp").write_bytes(b"hallo")
    lost = a_checkpoint(tmp_path, 300)
    (lost / "__0_0.distcp").unlink()
    torn = a_checkpoint(tmp_path, 400)
    (torn / manifests.NAME).write_text("{")
    assert store.newest_whole(tmp_path)[0] == flipped, "sizes alone do not show it"
    found, skipped = store.newest_good(tmp_path)
    assert found == good
    assert [p for p, _ in skipped] == [torn, lost, flipped]
    assert skipped[1][1] == "`__0_0.distcp` is missing; it is kept as `.damaged-iter_0000300`"
    assert "`__0_0.distcp` has other bytes than were written" in skipped[2][1]
    assert (tmp_path / ".damaged-iter_0000200" / "__0_0.distcp").read_bytes() == b"hallo"
    assert store.steps(tmp_path) == [(100, good)]
    assert store.newest_good(tmp_path) == (good, [])
    again = a_checkpoint(tmp_path, 200)
    (again / "__0_0.distcp").write_bytes(b"hollo")
    assert store.newest_good(tmp_path)[0] == good and (tmp_path / ".damaged-iter_0000200.1").is_dir()


def test_what_is_unfinished_or_of_a_newer_release_is_passed_over_where_it_is(tmp_path: Path) -> None:
    good = a_checkpoint(tmp_path, 1)
    newer = a_checkpoint(tmp_path, 2)
    write_json(newer / manifests.NAME, {"format": "cpt-native", "version": 99})
    (tmp_path / "iter_0000003").mkdir()
    found, skipped = store.newest_good(tmp_path)
    assert found == good and [p.name for p, _ in skipped] == ["iter_0000003", "iter_0000002"]
    assert newer.is_dir() and (tmp_path / "iter_0000003").is_dir()


def test_a_save_that_lacked_only_its_rename_is_gone_on_from(tmp_path: Path) -> None:
    a_checkpoint(tmp_path, 1)
    a_checkpoint(tmp_path, 2).rename(tmp_path / ".writing-4-iter_0000002")
    assert store.newest_good(tmp_path) == (tmp_path / "iter_0000002", [])


def test_an_attempt_removes_what_older_ones_left_and_leaves_what_a_newer_one_writes(tmp_path: Path) -> None:
    a_checkpoint(tmp_path, 5)
    for name in (".writing-1-iter_0000006", ".writing-2-iter_0000006", ".writing-3-iter_0000006"):
        (tmp_path / name).mkdir()
    assert store.clean(tmp_path, attempt=2) == [tmp_path / "iter_0000006"] * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [".writing-3-iter_0000006", "iter_0000005"]


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert store.newest_whole(tmp_path) == (None, [])
    assert store.newest_whole(tmp_path / "none") == (None, [])
    (tmp_path / "iter_0000001.tmp").mkdir()
    (tmp_path / "iter_0000002").write_text("a file")
    assert store.newest_whole(tmp_path) == (None, [])


def test_a_newer_manifest_version_and_a_foreign_file_are_refused(tmp_path: Path) -> None:
    folder = a_checkpoint(tmp_path, 1)
    for value, words in (
        ({"format": "cpt-native", "version": 99}, "version 99"),
        ({"format": "other"}, "not a manifest of a native"),
        ([1], "not a manifest"),
        ({"format": "cpt-native", "version": 1, "files": 3}, "damaged"),
    ):
        write_json(folder / manifests.NAME, value)
        with pytest.raises(UsageError, match=words):
            manifests.read(folder)


@pytest.mark.parametrize(
    ("retain", "keep_steps", "gone"),
    [
        (Retain(last=1), (), [10, 20, 40, 50]),
        (Retain(last=2), (20,), [10, 40]),
        (Retain(last=10), (), []),
        (Retain(last=0), (), [10, 20, 40, 50]),
        (Retain(last=1, every=2000), (), [10, 50]),
        (Retain(last=1, every=2500), (), [10, 20, 40]),
    ],
)
def test_retention_keeps_what_was_promised(retain: Retain, keep_steps: tuple[int, ...], gone: list[int]) -> None:
    kept = [a_manifest(s, "pre_anneal" if s == 30 else "train") for s in (10, 20, 30, 40, 50, 60)]
    assert store.to_remove(kept, retain, keep_steps) == gone


def test_a_milestone_stays_a_milestone_as_training_goes_on() -> None:
    kept: list[Manifest] = []
    retain = Retain(last=1, every=1000)
    for step in range(3, 60, 3):
        kept.append(a_manifest(step))
        kept = [m for m in kept if m.step not in store.to_remove(kept, retain)]
    assert [m.step for m in kept] == [12, 21, 30, 42, 51, 57]


def test_stage_ends_stay_only_when_asked() -> None:
    kept = [a_manifest(10, "end"), a_manifest(20)]
    assert store.to_remove(kept, Retain(last=1)) == []
    assert store.to_remove(kept, Retain(last=1, stage_ends=False)) == [10]


def test_a_removal_that_was_killed_leaves_nothing_that_looks_like_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_checkpoint(tmp_path, 5)

    def killed(*args: object, **kwargs: object) -> None:
        pass

    monkeypatch.setattr("cpt.checkpoint.store.shutil.rmtree", killed)
    store.remove(folder)
    assert store.steps(tmp_path) == [] and len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    half = tmp_path / store.folder_name(6)
    half.mkdir()
    truncated = a_checkpoint(tmp_path, 7)
    (truncated / "__0_0.distcp").write_bytes(b"")
    assert store.clean(tmp_path) == [half]
    assert list(tmp_path.iterdir()) == [truncated], "a damaged checkpoint stays for a person to look at"


def test_a_run_a_stage_and_a_checkpoint_folder_lead_to_the_checkpoint(tmp_path: Path) -> None:
    first = a_checkpoint(tmp_path / "stages" / "b_first" / "checkpoints", 9)
    second = a_checkpoint(tmp_path / "stages" / "a_second" / "checkpoints", 3)
    (tmp_path / "stages" / "later").mkdir()
    write_json(tmp_path / "plan.json", {"stages": {"b_first": {}, "a_second": {}, "later": {}}})
    assert store.resolve(tmp_path) == second
    assert store.resolve(tmp_path / "stages" / "b_first") == first
    assert store.resolve(first.parent) == first
    assert store.resolve(first) == first
    (second / manifests.NAME).unlink()
    assert store.resolve(tmp_path) == first
    with pytest.raises(UsageError, match="is not whole: its save never finished"):
        store.resolve(second)
    with pytest.raises(UsageError, match="holds no checkpoint"):
        store.resolve(tmp_path / "stages" / "later")
    with pytest.raises(UsageError, match="is not a folder"):
        store.resolve(tmp_path / "nowhere")


def test_identity_follows_content_and_not_the_label() -> None:
    one = a_manifest(10)
    assert dataclasses.replace(one, phase="end", created=5.0).identity == one.identity
    assert dataclasses.replace(one, files={"__0_0.distcp": FileFacts(size=5, crc32="0")}).identity != one.identity


def test_a_replacement_killed_between_its_renames_is_put_into_place(tmp_path: Path) -> None:
    new = a_checkpoint(tmp_path, 5).rename(tmp_path / ".writing-iter_0000005")
    assert store.steps(tmp_path) == []
    assert store.clean(tmp_path) == []
    assert not new.exists() and store.newest_whole(tmp_path)[0] == tmp_path / "iter_0000005"


def test_the_tracker_file_is_put_right_by_who_was_cut_off_while_writing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_checkpoint(tmp_path, 3)

    def slow(path: Path, text: str) -> None:
        if not (tmp_path / store.folder_name(87)).exists():
            a_checkpoint(tmp_path, 87)  # by the attempt that has taken over meanwhile
        write_atomic(path, text)

    monkeypatch.setattr(store, "write_atomic", slow)
    assert [step for step, _ in store.track(tmp_path)] == [3, 87]
    assert (tmp_path / store.TRACKER).read_text() == "87"
