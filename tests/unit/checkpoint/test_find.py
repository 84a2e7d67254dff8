"""A person's folder leads to the checkpoint that is meant, or to one sentence that says what is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cpt.base.errors import UsageError
from cpt.base.files import write_json
from cpt.checkpoint import find
from cpt.checkpoint.content import Layout
from cpt.checkpoint.formats import Writing
from tests import made_checkpoints
from tests.shared import shared_data

FORMATS = ("hf", "atom", "torch_dist", "megatron")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("made")
    given = made_checkpoints.content(root / "values")
    return {name: made_checkpoints.write(given, name, root / name) for name in FORMATS}


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def said(path: Path, step: int | None = None) -> str:
    with pytest.raises(UsageError) as error:
        find.find(path, step)
    return "\n".join([error.value.message, *error.value.hints])


@pytest.mark.parametrize("name", FORMATS)
def test_a_checkpoint_itself(made: dict[str, Path], name: str) -> None:
    found = find.find(made[name])
    assert (found.folder, found.format, found.notes) == (made[name], name, ())
    assert found.step == (7 if name in ("torch_dist", "megatron") else None)
    assert find.recognise(made[name].parent) != name or name in ("hf", "atom")


@pytest.mark.parametrize("name", ("torch_dist", "megatron"))
def test_the_newest_whole_step_is_taken_and_what_is_passed_over_is_named(
    made: dict[str, Path], name: str, tmp_path: Path
) -> None:
    copy(made[name], tmp_path / "iter_0000003")
    copy(made[name], tmp_path / "iter_0000010")
    torn = copy(made[name], tmp_path / "iter_0000020")
    for file in (*torn.rglob("metadata.json"), *torn.rglob("manifest.json"), *torn.rglob("model_optim_rng.pt")):
        file.unlink()
    found = find.find(tmp_path)
    assert found.step == 10 and found.format == name
    assert any("iter_0000020` was passed over" in note for note in found.notes)
    assert any("iter_0000010` is taken, one of 3 steps" in note for note in found.notes)
    assert find.find(tmp_path, 3).folder.name == "iter_0000003" and find.find(tmp_path, 3).notes == ()
    assert "there are 3, 10, 20" in said(tmp_path, 4)
    if name == "torch_dist":
        assert "is not whole" in said(tmp_path, 20)
        assert "the newest whole step beside it is `iter_0000010`" in said(torn)
    assert "is step 10" in said(tmp_path / "iter_0000010", 3)


@pytest.mark.parametrize(
    ("name", "file", "size", "why"),
    [
        ("torch_dist", "common.pt", None, "`common.pt` is missing"),
        ("torch_dist", "common.pt", 100, "`common.pt` is damaged or was cut off"),
        ("torch_dist", "__0_0.distcp", None, "`__0_0.distcp` is missing"),
        ("torch_dist", "__0_0.distcp", 100, "`__0_0.distcp` has 100 bytes, `.metadata` says 1"),
        ("torch_dist", "__0_0.distcp", 0, "`__0_0.distcp` is empty"),
        ("torch_dist", ".metadata", None, "`.metadata` is missing"),
        ("torch_dist", ".metadata", 10, "`.metadata` is"),
        ("megatron", "mp_rank_01/model_optim_rng.pt", None, "`mp_rank_01` holds no `model_optim_rng.pt`"),
        ("megatron", "mp_rank_01/model_optim_rng.pt", 3000, "`mp_rank_01/model_optim_rng.pt` is damaged or was cut"),
        ("megatron", "mp_rank_01", None, "`mp_rank_01` is missing: `mp_rank_00/model_optim_rng.pt` says tp 2 × pp 1"),
        ("megatron", "mp_rank_01/distrib_optim.pt", None, "`mp_rank_01` holds no `distrib_optim.pt`"),
        ("megatron", "mp_rank_00/distrib_optim.pt", 0, "`mp_rank_00/distrib_optim.pt` is empty"),
    ],
)
def test_a_step_that_lacks_something_is_not_whole_and_the_one_before_is_taken(
    tmp_path: Path, name: str, file: str, size: int | None, why: str
) -> None:
    layout, form = (Layout(tp=2), "dp_reshardable") if name == "megatron" else (Layout(), None)
    writing = Writing(layout=layout, optimizer=form)
    made = made_checkpoints.write(made_checkpoints.content(tmp_path / "values"), name, tmp_path / "made", writing)
    (made / "manifest.json").unlink(missing_ok=True)  # as Megatron leaves it
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "latest_checkpointed_iteration.txt").write_text("20")
    assert_an_older_step_is_taken(made, tmp_path / "steps", file, size, why)


@pytest.mark.parametrize(
    ("file", "size", "why"),
    [
        ("atoms-00001.safetensors", None, "`atoms-00001.safetensors` is missing"),
        ("atoms-00001.safetensors", -1, "`atoms-00001.safetensors` has "),
        ("atom.json", 20, "`atom.json` "),
    ],
)
def test_an_atom_step_that_lacks_weights_is_not_whole(tmp_path: Path, file: str, size: int | None, why: str) -> None:
    given = made_checkpoints.content(tmp_path / "values", optimizer=False)
    made = made_checkpoints.write(given, "atom", tmp_path / "made", Writing(file_bytes=8000))
    assert_an_older_step_is_taken(made, tmp_path / "steps", file, size, why)


@pytest.mark.parametrize("why", ["`pytorch_model-00002.bin` is missing", "`pytorch_model.bin.index.json` is not"])
def test_a_step_of_pickled_weights_that_lacks_a_file_is_not_whole(tmp_path: Path, why: str) -> None:
    made = tmp_path / "made"
    made.mkdir()
    write_json(made / "config.json", {"model_type": "llama"})
    write_json(made / "pytorch_model.bin.index.json", {"weight_map": {"a": "pytorch_model-00002.bin"}})
    (made / "pytorch_model-00002.bin").write_bytes(b"x")
    assert_an_older_step_is_taken(made, tmp_path / "steps", why.split("`")[1], 0 if "not" in why else None, why)


def assert_an_older_step_is_taken(made: Path, steps: Path, file: str, size: int | None, why: str) -> None:
    """Of two equal steps, once files of the newer one are gone or cut to a size."""
    one, torn = copy(made, steps / "iter_0000010"), copy(made, steps / "iter_0000020")
    assert find.find(steps).folder == torn
    for path in torn.glob(file):
        if size is not None:
            path.write_bytes(path.read_bytes()[:size])
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    listed = find.listed(steps)
    assert [(c.folder, c.why_not is None) for c in listed] == [(one, True), (torn, False)]
    assert str(listed[1].why_not).startswith(why) and find.listed(torn)[0].why_not == listed[1].why_not
    found = find.find(steps)
    assert found.folder == one and sum(why in note for note in found.notes) == 1


@pytest.mark.parametrize(
    ("file", "size", "why"),
    [
        ("model-00002-of-00003.safetensors", None, "`model-00002-of-00003.safetensors` is missing"),
        ("model-00003-of-00003.safetensors", -1, "`model-00003-of-00003.safetensors` has "),
        ("model-00001-of-00003.safetensors", 5, "`model-00001-of-00003.safetensors` is cut short"),
        ("model.safetensors.index.json", 20, "`model.safetensors.index.json` is not an index"),
        ("*.safetensors*", None, "it holds no weights"),
    ],
)
def test_a_hugging_face_step_that_lacks_weights_is_not_whole(
    tmp_path: Path, file: str, size: int | None, why: str
) -> None:
    given = made_checkpoints.content(tmp_path / "values", optimizer=False)
    made = made_checkpoints.write(given, "hf", tmp_path / "made", Writing(file_bytes=8000))
    assert_an_older_step_is_taken(made, tmp_path / "steps", file, size, why)


def test_the_tracker_file_says_which_step_is_meant(made: dict[str, Path], tmp_path: Path) -> None:
    for step in (3, 10):
        (copy(made["torch_dist"], tmp_path / f"iter_{step:07d}") / "manifest.json").unlink()  # as Megatron leaves it
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("3\n")
    assert find.find(tmp_path).step == 3
    tracker.write_text("11")
    found = find.find(tmp_path)
    assert found.step == 10 and any("names `11`, which is not there" in note for note in found.notes)
    (tmp_path / "iter_0000010" / "metadata.json").unlink()
    tracker.write_text("10")
    found = find.find(tmp_path)
    assert found.step == 3 and any("names `10`, which is not whole" in note for note in found.notes)
    copy(tmp_path / "iter_0000003", tmp_path / "release")
    tracker.write_text("release")
    found = find.find(tmp_path)
    assert found.folder.name == "release" and found.step is None
    tracker.write_bytes(b"\xff\xfe")
    assert find.find(tmp_path).folder.name == "release"


def test_of_our_own_saves_the_newest_whole_one_counts(made: dict[str, Path], tmp_path: Path) -> None:
    for step in (3, 10, 12):
        copy(made["torch_dist"], tmp_path / f"iter_{step:07d}")
    (tmp_path / "iter_0000012" / "manifest.json").unlink()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    found = find.find(tmp_path)
    assert found.step == 10 and any("no manifest" in note for note in found.notes)


@pytest.mark.parametrize("name", ("atom", "hf"))
def test_beside_our_own_saves_a_step_of_another_format_is_whole_by_its_own_mark(
    made: dict[str, Path], name: str, tmp_path: Path
) -> None:
    copy(made["torch_dist"], tmp_path / "iter_0000010")
    step = copy(made[name], tmp_path / "iter_0000020")
    assert [c.why_not for c in find.listed(tmp_path)] == [None, None]
    found = find.find(tmp_path)
    assert (found.folder, found.format) == (step, name)
    (step / {"atom": "atom.json", "hf": "config.json"}[name]).unlink()
    assert find.find(tmp_path).step == 10


def test_runs_and_stages(made: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    copy(made["torch_dist"], run / "stages" / "domain" / "checkpoints" / "iter_0000003")
    copy(made["torch_dist"], run / "stages" / "anneal" / "checkpoints" / "iter_0000005")
    copy(made["hf"], run / "stages" / "export" / "hf")
    kinds = {"domain": "train", "anneal": "train", "export": "convert"}
    write_json(run / "plan.json", {"stages": {name: {"kind": kind} for name, kind in kinds.items()}})
    assert find.find(run).folder.name == "iter_0000005"
    assert find.find(run / "stages" / "domain").step == 3
    assert find.find(run / "stages" / "domain" / "checkpoints").step == 3
    exported = find.find(run / "stages" / "export")
    assert exported.format == "hf" and exported.folder.name == "hf"


@pytest.mark.parametrize("name", ("hf", "atom", "megatron"))
def test_what_a_stage_converted_to_is_found(made: dict[str, Path], name: str, tmp_path: Path) -> None:
    stage = tmp_path / "run" / "stages" / "meg"
    inner = stage / name / "iter_0000007" if name == "megatron" else stage / name
    copy(made[name], inner)
    write_json(tmp_path / "run" / "plan.json", {"stages": {"meg": {"kind": "convert"}}})
    for path in (stage, stage / name, tmp_path / "run"):
        found = find.find(path)
        assert (found.folder, found.format) == (inner, name)
        assert [(c.folder, c.why_not) for c in find.listed(path)] == [(inner, None)]
    copy(made["torch_dist"], tmp_path / "run" / "stages" / "train" / "checkpoints" / "iter_0000007")
    assert find.find(tmp_path / "run").format == "torch_dist"
    assert len(find.listed(tmp_path / "run")) == 2
    assert "holds nothing" in said(new_folder(stage / "checkpoints"))


def new_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_known_kinds_of_folders_that_cannot_be_used(made: dict[str, Path], tmp_path: Path) -> None:
    (copy(made["atom"], tmp_path / "atom") / "atom.json").unlink()
    with pytest.raises(find.NotWhole, match=r"`atom.json` is missing, which says"):
        find.find(tmp_path / "atom")
    deep = new_folder(tmp_path / "deep" / "global_step7")
    (deep / "mp_rank_00_model_states.pt").touch()
    (deep / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    for path in (deep, deep.parent):
        assert "DeepSpeed checkpoint that is not universal" in said(path) and "ds_to_universal" in said(path)
    copy(made["torch_dist"], tmp_path / "steps" / "iter_0000003").joinpath("manifest.json").unlink()
    (tmp_path / "steps" / "latest_checkpointed_iteration.txt").touch()
    assert any("latest_checkpointed_iteration.txt` is empty" in note for note in find.find(tmp_path / "steps").notes)


def test_unknown_folders_say_what_is_there_and_what_is_known(made: dict[str, Path], tmp_path: Path) -> None:
    assert "it holds nothing" in said(tmp_path)
    for name in ("a", "b", "c", "d", "e", "f", "g"):
        (tmp_path / name).mkdir()
    assert "`a/`, `b/`, `c/`, `d/`, `e/` and 2 more" in said(tmp_path) and "known are" in said(tmp_path)
    (tmp_path / "a" / "x.safetensors").write_text("")
    assert "no `config.json` beside it" in said(tmp_path / "a")
    (tmp_path / "b" / "adapter_config.json").write_text("{}")
    assert "adapter" in said(tmp_path / "b")
    (tmp_path / "c" / ".metadata").write_text("")
    assert "its save never finished, or it is torch's own format" in said(tmp_path / "c")
    (tmp_path / "out.partial").mkdir()
    assert "unfinished conversion" in said(tmp_path / "out.partial")
    assert "did you mean" in said(tmp_path / "out.partia")
    assert "is a file" in said(tmp_path / "c" / ".metadata")
    (tmp_path / "d" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert find.find(tmp_path / "d").format == "hf", "the format's own reader says why it cannot be read"


def test_every_golden_is_found() -> None:
    root = shared_data("ckpt", "mcore-goldens")
    formats = {p.name: find.find(p).format for p in root.iterdir() if p.is_dir()}
    assert set(formats.values()) == {"torch_dist", "megatron"}
    assert {n for n, f in formats.items() if f == "megatron"} == {"legacy_tp2pp2", "legacy_distopt_dp2"}
