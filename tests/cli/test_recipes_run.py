"""Every shipped recipe runs from end to end, cut short: base model in, adapted Hugging Face folder out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.made_base import write_base, write_corpora

pytestmark = pytest.mark.dist
SMALL = [
    "train.seq_length=64",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.precision=fp32",
    "train.broken_import_guard=false",  # the base has random weights
    "train.evaluate.tokens=1k",
    "checkpoint.every=null",
    "tracking.wandb=off",
]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model and corpora: what a user has."""
    folder = tmp_path_factory.mktemp("given")
    corpora = write_corpora(folder)
    return {"base": write_base(folder / "base", corpora["topics"]), **corpora}


def cpt(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed command, run in a folder as a person would."""
    environ = {k: v for k, v in os.environ.items() if k not in ("CPT_CACHE", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, "-m", "cpt", *arguments], cwd=folder, env=environ, capture_output=True, text=True, timeout=500
    )


RECIPES = {
    "medical": (
        {"medical": "more_topics", "general": "topics"},
        ["stages.domain.tokens=4k", "stages.anneal.tokens=2k", "train.parallel={tp: 2, pp: 1, dp: 1}"],
    ),
    "code": (
        {"code": "code", "text_about_code": "more_topics", "general": "topics"},
        ["stages.code.tokens=4k", "stages.anneal.tokens=2k", "train.parallel={tp: 1, pp: 2, dp: 1}"],
    ),
    "language": (
        {"target": "more_topics", "first": "topics"},
        ["stages.bridge.tokens=2k", "stages.language.tokens=4k", "train.parallel={tp: 1, pp: 1, dp: 2}"],
    ),
    "infinite": (
        {"first": "topics", "second": "more_topics", "third": "code"},
        [
            *(f"stages.{stage}.tokens=8k" for stage in ("first", "second", "third")),
            "stages.first.lr.warmup=1k",
            "stages.first.lr.cooldown=2k",
            "stages.first.lr.anneal=2k",
            "stages.second.lr.anneal=2k",
            "stages.third.lr.anneal=2k",
            "train.parallel={tp: 1, pp: 1, dp: 2}",
        ],
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_shipped_recipe_runs_from_a_base_to_an_export(recipe: str, given: dict[str, Path], tmp_path: Path) -> None:
    sources, cut = RECIPES[recipe]
    paths = [f"sources.{name}.paths={given[corpus]}" for name, corpus in sources.items()]
    paths += [f"sources.{name}.valid=10%" for name in sources]
    command = ["run", f"recipe={recipe}", f"base.checkpoint={given['base']}", *paths, *SMALL, *cut, "name=short"]
    done = cpt(tmp_path, *command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_exported(tmp_path / "runs" / "short")
    assert (tmp_path / "runs" / "short" / "report.html").stat().st_size > 10_000
    again = cpt(tmp_path, *command)
    assert again.returncode == 0, again.stderr[-3000:]
    attempts = list((tmp_path / "runs" / "short" / "stages").glob("*/attempt_2"))
    assert attempts == [], "the same command did something that was done"


def test_the_demo_runs_and_tells_what_was_gained(tmp_path: Path) -> None:
    done = cpt(
        tmp_path,
        "run",
        "recipe=demo",
        "name=short",
        "train.seq_length=64",
        "train.evaluate.tokens=2k",
        "stages.pretrain.tokens=40k",
        "stages.domain.tokens=10k",
        "stages.domain.evaluate.every=5k",
        "stages.anneal.tokens=4k",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "medical" in done.stdout and "general" in done.stdout and "report.html" in done.stdout
    assert_exported(tmp_path / "runs" / "short")
    events = [json.loads(x) for x in (tmp_path / "runs" / "short" / "events.jsonl").read_text().splitlines()]
    assert events[-1]["kind"] == "run_end" and events[-1]["exit_code"] == 0


def assert_exported(run: Path) -> None:
    """transformers loads the export and continues a text with it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (folder,) = run.glob("stages/*/hf")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The statement", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3).shape[1] > ids["input_ids"].shape[1]
