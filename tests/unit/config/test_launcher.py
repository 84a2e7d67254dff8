"""What is wrong with the file of a cluster is told in the words of that file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cpt.base.errors import CptError, UsageError
from cpt.config import build
from cpt.config.compose import shipped
from cpt.config.launcher import launcher
from tests.command import write_project


def both(*texts: str) -> list[tuple[CptError, ...]]:
    """Everything that is told of a launcher by itself, and of one in a recipe."""
    found = []
    reads: tuple[Callable[[], object], ...] = (lambda: launcher(texts), lambda: build.plan("two", texts))
    for read in reads:
        with pytest.raises(UsageError) as caught:
            read()
        found.append((caught.value, *caught.value.more))
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files of clusters lie."""
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path)
    found = tmp_path / "conf" / "launcher"
    found.mkdir(parents=True)
    return found


@pytest.mark.parametrize("text", ["", "# nothing\n", "partition: main\nnodes: 2\n"])
def test_a_file_without_a_name_is_not_taken_for_this_machine(folder: Path, text: str) -> None:
    (folder / "mine.yaml").write_text(text)
    for (error,) in both("launcher=mine"):
        assert error.message.startswith("`conf/launcher/mine.yaml` does not say which launcher it is for")
        assert "`name: slurm`" in error.hints[0]


def test_a_file_that_builds_on_another_has_its_name(folder: Path) -> None:
    (folder / "site.yaml").write_text("name: slurm\npartition: main\n")
    (folder / "mine.yaml").write_text("defaults: [site, _self_]\nnodes: 2\n")
    name, made = launcher(["launcher=mine"])
    assert (name, made.nodes, made.partition) == ("slurm", 2, "main")  # type: ignore[attr-defined]


def test_an_unknown_launcher_names_the_file_that_it_would_be(folder: Path) -> None:
    for (error,) in both("launcher=mycluster"):
        assert error.message == "unknown launcher `mycluster`"
        own, example = folder / "mycluster.yaml", shipped()[1] / "launcher" / "slurm-example.yaml"
        assert error.hints[-1] == f"a cluster of yours is a file `{own}`, which can begin as a copy of `{example}`"
        assert example.is_file()


def test_wrong_keys_and_wrong_values_are_told_together(folder: Path) -> None:
    (folder / "mine.yaml").write_text("name: slurm\npartion: main\nranks_per_nod: 2\ntime: 4:00:00\n")
    for errors in both("launcher=mine"):
        assert [e.message.partition(",")[0] for e in errors] == [
            "unknown key `launcher.partion`",
            "unknown key `launcher.ranks_per_nod`",
            "`launcher.time` is `14400`",
        ]
        assert "YAML takes `4:00:00` for a number when it is not in quotes" in errors[2].hints


def test_the_command_that_lists_every_key_lists_those_of_the_launcher(folder: Path) -> None:
    (folder / "mine.yaml").write_text("name: slurm\npartion: main\n")
    alone, in_recipe = both("launcher=mine")
    assert alone[0].hints[-1] == "`cpt recipes show demo launcher=slurm` lists every key"
    assert in_recipe[0].hints[-1] == "`cpt recipes show two launcher=slurm` lists every key"
