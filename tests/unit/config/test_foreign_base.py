"""Bases of other formats in a plan: what they hold, where they are converted to, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpt.base.errors import CptError
from cpt.checkpoint import hf_config
from cpt.config import build
from cpt.report.plan_text import plan_text
from tests import checkpoints
from tests.command import write_project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose base is there as atoms and as Megatron's per-rank files too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CPT_CACHE", raising=False)
    folder = write_project(tmp_path)
    model = hf_config.read_config(folder / "base")
    checkpoints.write_hf(folder / "values", model)
    (folder / "base" / "model.safetensors").write_bytes((folder / "values" / "model.safetensors").read_bytes())
    checkpoints.convert(folder / "base", folder / "atom", "atom")
    checkpoints.convert(folder / "base", folder / "ranks", "megatron")
    return folder


def error(*overrides: str) -> CptError:
    with pytest.raises(CptError) as caught:
        build.plan("two", list(overrides))
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize("name", ["atom", "ranks"])
def test_a_base_of_another_format_is_converted_first(project: Path, name: str) -> None:
    plan = build.plan("two", [f"base={name}", "tokenizer=base/tokenizer.json"])
    folder = str(plan.base.path)
    assert plan.base.kind == "native" and folder.startswith(plan.cache) and not Path(folder).exists()
    made = plan.conversions[folder]
    assert Path(made.source).is_relative_to(project / name) and made.bytes == 4 * plan.model.num_parameters  # type: ignore[union-attr]
    text = plan_text(plan, None, ())
    assert f"convert {name}: {made.shown} → native, converted first, " in text  # and not of which step it is


def test_the_tokenizer_may_lie_beside_the_configuration_of_the_base(project: Path) -> None:
    plan = build.plan("two", ["base=ranks", "base.config=base"])
    assert plan.tokenizer.path == str(project / "base" / "tokenizer.json")


def test_the_same_content_is_the_same_base_wherever_it_lies(project: Path) -> None:
    one = build.plan("two", ["base=atom"])
    (project / "atom").rename(project / "moved")
    other = build.plan("two", ["base=moved"])
    assert one.id == other.id and one.base == other.base


def test_a_named_format_must_be_the_one_found(project: Path) -> None:
    assert "is of format `atom`, not `megatron`" in error("base=atom", "base.format=megatron").message
    assert "`base.config` would have no effect" in str(error("base=scratch", "base.config=base"))


def test_a_stage_cannot_start_from_files_for_other_programs(project: Path) -> None:
    fresh = ["stages.anneal.keep=[weights]", "stages.anneal.lr={schedule: constant, peak: 1e-3}"]
    found = error("stages.export.to=atom", "stages.export.from=domain", "stages.anneal.from=export", *fresh)
    assert found.message == "`stages.anneal` starts from `export`, which leaves files for other programs (`to: atom`)"
    assert found.hints == ("start from `domain`, which `export` converts",)


def test_ranks_that_cannot_share_the_model_are_refused_before_anything_is_trained(project: Path) -> None:
    assert (
        "tp 3 does not divide 4 attention heads" in error("stages.export.to=megatron", "++stages.export.tp=3").message
    )
    assert "pp 3" in error("stages.export.to=megatron", "++stages.export.pp=3").message


def test_every_option_of_a_conversion_counts_in_its_fingerprint(project: Path) -> None:
    def fingerprint(*options: str) -> str:
        return build.plan("two", ["stages.export.to=megatron", *options]).stages["export"].fingerprint

    all_ = [fingerprint(), *(fingerprint(f"++stages.export.{o}") for o in ("tp=2", "pp=2", "weights_only=true"))]
    assert len(set(all_)) == 4 and fingerprint("++stages.export.tp=2") == all_[1]


def test_options_of_another_format_mean_nothing(project: Path) -> None:
    assert "ranks of `to: megatron`" in error("++stages.export.tp=2").message
    assert "unknown format `atm`" in error("stages.export.to=atm").message
