"""`cpt resume` of a run whose recipe was edited meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpt.base.records import to_json
from cpt.config import build
from tests.command import cpt, write_project


def test_an_edited_recipe_is_refused_with_a_command_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_project(tmp_path))
    run = tmp_path / "runs" / "it"
    run.mkdir(parents=True)
    (run / "plan.json").write_text(json.dumps(to_json(build.plan("two", ["name=it"]))))
    (run / "command.txt").write_text("cpt run recipe=two name=it --yes\n")
    (run / "environment.json").write_text(json.dumps({"cwd": str(tmp_path)}))
    recipe = tmp_path / "recipes" / "two.yaml"
    recipe.write_text(recipe.read_text().replace("peak: 1e-3", "peak: 2e-3"))
    ended = cpt("resume", "it", "--yes")
    assert ended.code == 2 and "holds another plan" in ended.err
    assert "`cpt run recipe=two name=it --yes --fresh` starts again in a new folder" in ended.err
    assert "`--accept-changes` goes on" in ended.err and "`--fresh`" not in ended.err
