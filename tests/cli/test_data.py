"""`cpt data`: what a person sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpt.cli import main
from cpt.data import prepare, tokenizer
from cpt.plan.types import DataOptions, Source


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    path = folder / "notes.jsonl"
    lines = [json.dumps({"text": f"note {i} says \x1b[31mhello\x1b[0m to the world"}) + "\n" for i in range(60)]
    path.write_text("".join(lines))
    source = Source(name="notes", paths=(str(path),), valid=0.1, licence="CC0")
    model = tokenizer.train([source], 300, folder / "cache")
    prepare.prepare(source, model, DataOptions(), folder / "cache")
    return folder / "cache"


def test_list_prints_a_table_and_json(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list", "--cache", str(cache)]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["source", "documents", "tokens"] and row.startswith("notes ")
    assert main(["data", "--cache", str(cache), "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["names"] == ["notes"] and entry["licence"] == "CC0" and entry["tokens"] > 100


def test_an_empty_cache_says_what_fills_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list", "--cache", str(tmp_path)]) == 0
    out = capsys.readouterr()
    assert out.out == "" and "cpt data prepare" in out.err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("by", ["name", "folder", "beginning"])
def test_show_gives_facts_and_decoded_documents(cache: Path, capsys: pytest.CaptureFixture[str], by: str) -> None:
    (folder,) = (cache / "corpora").glob("[!.]*")
    target = {"name": "notes", "folder": str(folder), "beginning": folder.name[:6]}[by]
    assert main(["data", "show", target, "--cache", str(cache), "-n", "2"]) == 0
    text = capsys.readouterr().out
    assert "--- document 1, " in text and "says" in text and "<|endoftext|>" in text and "CC0" in text
    assert "\x1b" not in text  # a document cannot move the cursor of a terminal
    assert main(["data", "show", target, "--cache", str(cache), "--held-out", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["held_out"]["documents"] >= len(value["shown"]) >= 1


def test_an_unknown_source_suggests_the_nearest(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", "note", "--cache", str(cache)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown source `note`") and "did you mean `notes`?" in error


def test_a_corpus_that_was_moved_asks_for_its_tokenizer(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    (folder,) = (cache / "corpora").glob("[!.]*")
    shutil.copytree(folder, tmp_path / "moved" / "corpora" / "x")
    moved = str(tmp_path / "moved" / "corpora" / "x")
    assert main(["data", "show", moved]) == 2
    assert "--tokenizer" in capsys.readouterr().err
    (model,) = (cache / "tokenizers").glob("*/tokenizer.json")
    assert main(["data", "show", moved, "--tokenizer", str(model)]) == 0
    assert main(["data", "show", moved, "-n", "0"]) == 0
    assert main(["data", "show", str(tmp_path)]) == 2


def test_prepare_tokenises_the_sources_of_a_recipe_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert main(["data", "prepare", "recipe=demo", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert len(value["sources"]) >= 2 and all(s["tokens"] > 1e6 for s in value["sources"].values())
    assert Path(value["tokenizer"]).is_file() and not (tmp_path / "runs").exists()
    assert main(["data", "prepare", "recipe=demo"]) == 0
    assert "tokenizer" in capsys.readouterr().out
