"""The page on Slurm: its files of clusters are taken, its commands are understood, its names are those of the code.

What the page shows of outputs was printed on a cluster of `slurm-local start` by these very commands.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from cpt.config.launcher import launcher
from cpt.launch.slurm.options import Slurm
from tests.command import cpt

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "slurm.md").read_text()
EXAMPLE = (ROOT / "conf" / "launcher" / "slurm-example.yaml").read_text()
FILES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [
    shlex.split(line.removeprefix("$ "), comments=True)[1:]
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("$ cpt ")
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's first file of a cluster."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "launcher").mkdir(parents=True)
    (tmp_path / "conf" / "launcher" / "mycluster.yaml").write_text(FILES[0])
    return tmp_path


def test_the_commands_of_the_page_are_understood(folder: Path) -> None:
    assert {words[0] for words in COMMANDS} >= {"doctor", "plan", "run", "status", "logs", "cancel", "resume"}
    for command, *words in COMMANDS:
        if command == "doctor":
            assert launcher(words)[0] == "slurm"
        elif command in ("plan", "run"):
            ended = cpt("plan", *words)
            assert ended.code == 0 and "starts after" in ended.out, (words, ended)
        else:  # refused for the run, which is not there, and for nothing else
            ended = cpt(command, *words)
            assert ended.code == 2 and f"no run `{words[0]}`" in ended.err.splitlines()[0], (command, words, ended)


def test_the_files_of_clusters_on_the_page_are_taken(folder: Path) -> None:
    assert len(FILES) == 2
    for text in FILES:
        (folder / "conf" / "launcher" / "mine.yaml").write_text(text)
        assert isinstance(launcher(["launcher=mine"], folder)[1], Slurm)


def test_options_in_the_text_are_options(folder: Path) -> None:
    for key, value in re.findall(
        r"`(\w+): ([^`]+)`", PAGE.replace("`parallel.dp: auto`", "").replace("`dp: auto`", "")
    ):
        words = ["launcher=slurm", f"launcher.{key}={value}"]
        words += ["launcher.requeue=false"] if key == "successors" else []
        words += ["launcher.gpus=gres", "launcher.ranks_per_node=8"] if key == "gres_type" else []
        assert isinstance(launcher([*dict.fromkeys(words)], folder)[1], Slurm), key


def test_the_example_explains_every_option() -> None:
    explained = set(re.findall(r"^#? ?(\w+): ", EXAMPLE, re.MULTILINE)) | set(
        re.findall(r"^#? ?(\w+):\s", EXAMPLE, re.M)
    )
    assert {f.name for f in dataclasses.fields(Slurm)} <= explained
