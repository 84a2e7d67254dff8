"""The chain of a checkpoint back to where it all began."""

import shutil
import zlib

import pytest

from cpt.base.errors import UsageError
from cpt.base.files import read_json, write_json
from cpt.checkpoint import manifest
from cpt.checkpoint.job import planning
from cpt.checkpoint.job.convert import convert
from cpt.checkpoint.manifest import FileFacts, Manifest, Origin
from cpt.plan.model import Parallel
from cpt.report.lineage import chain, find, lineage_text
from cpt.schedules import curve
from tests import made_run
from tests.shared import shared_data


def checkpoint(run, stage, step, parent):
    """A checkpoint folder with a manifest that belongs to the made run."""
    folder = run / "stages" / stage / "checkpoints" / f"iter_{step:07d}"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(stage.encode())
    facts = Manifest(
        origin=Origin(stage=stage, fingerprint=stage, plan_id="7c1e92", parent=parent),
        model=made_run.model(),
        padded_vocab_size=4096,
        precision="fp32",
        layout=Parallel(),
        phase="end",
        step=step,
        tokens=step * made_run.TOKENS_PER_STEP,
        progress={"lr": {"last": 1e-4}},
        files={"weights": FileFacts(size=len(stage), crc32=f"{zlib.crc32(stage.encode()):08x}")},
    )
    manifest.write(folder, facts)
    return folder, {"path": str(folder), "identity": facts.identity}


@pytest.fixture
def run(tmp_path):
    folder = made_run.make(tmp_path / "runs")
    parent = None
    for stage, step in (("base", 150), ("domain", 120), ("anneal", 50)):
        _, parent = checkpoint(folder, stage, step, parent)
    (folder / "stages" / "export" / "hf").mkdir()
    write_json(folder / "stages" / "export" / "hf" / "config.json", {})
    return folder


def test_a_run_leads_back_to_random_weights(run):
    links = chain(find(str(run / "stages" / "anneal")))
    assert [(x.kind, x.stage) for x in links] == [
        ("stage", "anneal"),
        ("stage", "domain"),
        ("stage", "base"),
        ("scratch", ""),
    ]
    domain = links[1]
    assert domain.mixture == {"medical": 0.7, "general (replay)": 0.3}
    assert domain.lr == (5e-4, 1e-3, 5e-4) and domain.schedule == "infinite"
    assert domain.losses["medical"] == made_run.loss_of("domain", 1, 1.0)
    assert domain.tokens == 120 * made_run.TOKENS_PER_STEP


def test_a_run_is_found_by_name_and_an_export_by_its_folder(run):
    assert chain(find(run.name, run.parent))[0].stage == "anneal"
    exported = chain(find(str(run / "stages" / "export" / "hf")))
    assert [x.kind for x in exported] == ["export", "stage", "stage", "stage", "scratch"]


def test_a_model_from_outside_is_the_end(run, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    write_json(base / "config.json", {"model_type": "llama"})
    folder, _ = checkpoint(run, "other", 7, {"path": str(base), "identity": "abc"})
    links = chain(folder)
    assert [x.kind for x in links] == ["stage", "base"] and links[1].identity == "abc"
    assert links[0].mixture == {}  # the plan knows no such stage
    assert chain(base)[0].kind == "base"


def test_a_parent_that_is_gone_is_named(run):
    shutil.rmtree(run / "stages" / "base" / "checkpoints")
    links = chain(find(str(run / "stages" / "anneal")))
    assert links[-1].kind == "gone" and "not there any more" in links[-1].note
    assert "a parent that cannot be read" in lineage_text(links)


def test_a_parent_whose_manifest_is_damaged_is_named(run):
    (run / "stages" / "base" / "checkpoints" / "iter_0000150" / "manifest.json").write_text("{")
    links = chain(find(str(run / "stages" / "anneal")))
    assert links[-1].kind == "gone" and "is damaged or was cut off" in links[-1].note


def test_a_parent_that_was_changed_since_is_named(run):
    path = run / "stages" / "domain" / "checkpoints" / "iter_0000120" / "manifest.json"
    value = read_json(path)
    del value["sum"]
    value["files"]["weights"]["crc32"] = "00000000"
    write_json(path, value)
    links = chain(find(str(run / "stages" / "anneal")))
    assert "has changed since" in links[1].note and links[0].note == ""


def test_a_chain_that_bites_its_tail_ends(run):
    first = run / "stages" / "base" / "checkpoints" / "iter_0000150" / "manifest.json"
    value = read_json(first)
    del value["sum"]
    value["origin"]["parent"] = {
        "path": str(run / "stages" / "anneal" / "checkpoints" / "iter_0000050"),
        "identity": "",
    }
    write_json(first, value)
    with pytest.raises(UsageError, match="among its parents"):
        chain(find(str(run / "stages" / "anneal")))


def test_the_text_shows_tokens_mixture_lrs_and_losses(run):
    text = lineage_text(chain(find(str(run / "stages" / "anneal"))))
    assert "domain of demo-7c1e92 · step 120 · 492K tokens" in text
    assert "mixture  medical 70.0 %, general (replay) 30.0 %" in text
    assert "lr       5.0e-04 → 1.0e-03 → 5.0e-04 (infinite)" in text
    assert "random initial weights" in text


def test_a_fork_shows_the_losses_and_the_lr_at_the_fork_and_none_of_another_step(run):
    shutil.rmtree(run / "stages" / "domain" / "checkpoints")
    shutil.rmtree(run / "stages" / "anneal" / "checkpoints")
    _, fork = checkpoint(run, "base", 131, None)  # between the evaluations at steps 120 and 140
    child, _ = checkpoint(run, "domain", 120, fork)
    link = chain(child)[1]
    assert link.losses["general"] == made_run.loss_of("domain", 0, 0.0) and link.measured_by == "domain"
    train = made_run.plan(run).stages["base"].train
    assert link.lr[-1] == curve(train.lr)(130) > train.lr.points[-1]
    text = lineage_text(chain(child))
    assert "loss     general 3.658, medical 5.217 nats/token (measured at the start of `domain`)" in text
    alone = chain(run / "stages" / "base" / "checkpoints" / "iter_0000131")
    assert alone[0].losses == {} and "loss     not measured at this step" in lineage_text(alone)


def test_the_base_has_a_heading_and_the_losses_it_was_measured_with(run, tmp_path):
    base = tmp_path / "base-1b"
    base.mkdir()
    write_json(base / "config.json", {"model_type": "llama"})
    shutil.rmtree(run / "stages" / "base" / "checkpoints")
    folder, _ = checkpoint(run, "base", 150, {"path": str(base), "identity": "abc"})
    text = lineage_text(chain(folder))
    assert "base model base-1b\n    loss     general 8.300, medical 8.300 nats/token (measured at the start" in text


def test_a_conversion_leads_on_to_what_it_was_made_from_and_is_never_random_weights(run, tmp_path):
    source = shared_data("ckpt", "stories260k-hf")
    ranks, native = tmp_path / "ranks", tmp_path / "native"
    for one, out, to in ((source, ranks, "megatron"), (ranks, native, "torch_dist")):
        convert(planning.plan(planning.Request(source=one, out=out, to=to)))
    facts = manifest.read(native / "release")
    folder, _ = checkpoint(run, "other", 7, {"path": str(native / "release"), "identity": facts.identity})
    links = chain(folder)
    assert [(x.kind, x.path) for x in links[1:]] == [
        ("converted", str(native / "release")),
        ("converted", str(ranks / "release")),
        ("base", str(source.resolve())),
    ]
    assert chain(find(str(ranks)))[0] == links[2]
    text = lineage_text(links)
    assert "random" not in text and " · step 0" not in text
    assert f"from     megatron, {ranks / 'release'}\n" in text and f"from     hf, {source}\n" in text
    (ranks / "release" / "more").write_text("")
    assert chain(folder)[1].note == "its source has changed since it was converted"
