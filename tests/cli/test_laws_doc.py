"""The page on mixture laws: its commands as written there, on the tables that it makes; its names as in the code."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import cpt.laws  # every law registers itself
from cpt.config.schema import LAW_KEYS
from cpt.laws.columns import NAMES
from cpt.laws.law import LAWS
from cpt.laws.result import Recommendation
from tests.cli.test_recipes_run import cpt as run_cpt

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "laws.md").read_text()
(MADE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
BLOCKS = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)


def steps() -> list[tuple[str, list[str]]]:
    """Each command with the lines that the page shows of what it prints."""
    found: list[tuple[str, list[str]]] = []
    for line in "".join(BLOCKS).splitlines():
        if line.startswith("$ "):
            found.append((line.removeprefix("$ "), []))
        elif line != "...":
            found[-1][1].append(line)
    return found


def test_the_commands_of_the_page_print_what_it_shows(tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text(MADE)
    subprocess.run([sys.executable, "made.py"], cwd=tmp_path, check=True)
    assert len(steps()) >= 9
    for command, shown in steps():
        done = run_cpt(tmp_path, *shlex.split(command)[1:])
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        for line in shown:
            assert line in done.stdout.splitlines(), f"{command}\n{line}\n{done.stdout}"
    law = json.loads((tmp_path / "laws" / "made" / "law.json").read_text())
    table = PAGE[PAGE.index("## `law.json`") : PAGE.index("## In a recipe")]
    assert set(re.findall(r"^\| (.*?) \|", table, re.MULTILINE)) - {"field", "---"}
    named = {
        name for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    }
    assert named == set(law)


def test_every_law_is_on_the_page() -> None:
    table = PAGE[PAGE.index("## The laws") :]
    assert set(re.findall(r"^\| `(\w+)` \| ", table, re.MULTILINE)) >= set(LAWS)
    assert cpt.laws


def test_every_column_is_on_the_page() -> None:
    table = PAGE[PAGE.index("## The table") : PAGE.index("## The laws")]
    named = set(re.findall(r"`(\w+)`", table))
    assert set(NAMES) <= named, set(NAMES) - named


def test_every_part_of_a_recommendation_is_on_the_page() -> None:
    text = PAGE[PAGE.index("`recommendation` has") :]
    missing = {f.name for f in dataclasses.fields(Recommendation)} - set(re.findall(r"`(\w+)`", text)) - {"ratio_D"}
    assert not missing


def test_every_key_of_a_law_stage_is_on_the_page() -> None:
    text = PAGE[PAGE.index("## In a recipe") :]
    missing = set(LAW_KEYS) - set(re.findall(r"`(\w+)`", text))
    assert not missing
