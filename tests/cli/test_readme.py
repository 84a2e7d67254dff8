"""The commands of the README as written there: long runs cut short, a user's paths filled in with small files."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cpt.cli import available
from tests.cli.made_base import write_base, write_corpora
from tests.cli.test_laws_doc import MADE
from tests.cli.test_recipes_run import SMALL, cpt

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
LINES = [
    line.removeprefix("$ ")
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("$ cpt ")
]
CUT = {
    "demo": [
        "train.seq_length=64",
        "train.evaluate.tokens=1k",
        "stages.pretrain.tokens=16k",
        "stages.domain.tokens=6k",
        "stages.anneal.tokens=2k",
    ],
    "demo-law": [
        *("train.seq_length=64", "train.evaluate.tokens=1k", "stages.pretrain.tokens=16k", "stages.domain.tokens=6k"),
        *("stages.mix.tokens=6k", "stages.mix.every=1k", "stages.mix.draws=5", "stages.mix.max_cost=600%"),
    ],
    "medical": [*SMALL, "stages.domain.tokens=4k", "stages.anneal.tokens=1k", "stages.domain.stop_if=null"],
}


@pytest.mark.dist
def test_the_commands_of_the_readme_work_as_written(tmp_path: Path) -> None:
    assert any("recipe=demo" in line for line in LINES) and any("recipe=medical" in line for line in LINES)
    corpora = write_corpora(tmp_path)
    (tmp_path / "made.py").write_text(MADE)
    subprocess.run([sys.executable, "made.py"], cwd=tmp_path, check=True)
    given = {
        "/models/base-1b": str(write_base(tmp_path / "base", corpora["topics"])),
        "data/pubmed/*.parquet": str(corpora["more_topics"]),
        "data/web/*.jsonl.zst": str(corpora["topics"]),
    }
    for line in LINES:
        for written, here in given.items():
            line = line.replace(written, here)
        line = re.sub(r"runs/demo-[0-9a-f]{6}\b", lambda _: str(next((tmp_path / "runs").glob("demo-??????"))), line)
        words = shlex.split(line)[1:]
        recipe = next((w.removeprefix("recipe=") for w in words if w.startswith("recipe=")), None)
        cut = CUT.get(recipe or "", [])
        if recipe == "medical":
            cut = [*cut, "sources.medical.valid=10%", "sources.general.valid=10%"]
        done = cpt(tmp_path, *words, *cut)
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
    assert list((tmp_path / "runs").glob("medical-*/stages/export/hf/model.safetensors"))


def test_every_command_of_the_readme_exists_and_is_named_there() -> None:
    named = set(re.findall(r"`cpt ([a-z][a-z-]*)", README))
    assert named <= set(available()), named - set(available())
    assert set(available()) <= named, set(available()) - named


def test_every_shipped_recipe_is_in_the_readme() -> None:
    shipped = {path.stem for path in (Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml")}
    assert shipped <= set(re.findall(r"^\| `([\w-]+)` \|", README, re.MULTILINE))
