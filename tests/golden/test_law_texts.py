"""What the law commands say to wrong tables and wrong commands, kept as a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import cpt
from tests.golden.test_golden import same, shown
from tests.unit.laws import set_m

ROWS = set_m.lines()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    set_m.write(tmp_path / "runs.csv")
    return tmp_path


def changed(row: int, column: str, value: str) -> list[str]:
    cells = [line.split(",") for line in ROWS]
    cells[row][set_m.HEAD.split(",").index(column)] = value
    return [",".join(line) for line in cells]


TABLES = {
    "a loss that is text": changed(4, "loss_domain", "low"),
    "a loss that is NaN": changed(4, "loss_general", "nan"),
    "a loss below zero": changed(4, "loss_general", "-2"),
    "a ratio above 1": changed(4, "r_domain", "1.2"),
    "percent": [line.replace(",0.2,", ",20,").replace(",0.4,", ",40,") for line in ROWS],
    "no parameters": changed(0, "n_params", "0"),
    "an empty cell": changed(0, "tokens", ""),
    "two losses for one moment of a run": [*ROWS, changed(3, "loss_domain", "2.5")[3]],
    "constant losses": [",".join([*line.split(",")[:4], "2", "3"]) for line in ROWS],
    "one ratio": [line for line in ROWS if ",0.2," in line],
    "one row": ROWS[:1],
    "no rows": [],
    "too few rows": ROWS[::7],
}
COMMANDS = [
    [],
    ["runs.csv"],
    ["data=run.csv"],
    ["data=runs.csv", "law=dcp"],
    ["data=runs.csv", "tolerence=3%"],
    ["data=runs.csv", "tolerance=3"],
    ["data=runs.csv", "tolerance=-3%"],
    ["data=runs.csv", "tolerance=3%", "bootstrap=0", "--no-compare"],
    ["data=runs.csv", "where=tokens=3"],
    ["data=runs.csv", "where=step >= 3"],
    ["data=runs.csv", "columns={x: r_domain}"],
    ["data=runs.csv", "out=runs.csv"],
]


def test_wrong_tables(folder: Path) -> None:
    texts = []
    for title, rows in TABLES.items():
        set_m.write(folder / "runs.csv", rows)
        ended = cpt("fit-law", "data=runs.csv", "law=dcpt")
        assert ended.code == 2 and ended.out == "", title
        texts.append(f"# {title}\n{shown(['fit-law', 'data=runs.csv', 'law=dcpt'], ended)}")
    same("law_tables", "\n".join(texts), folder)


def test_wrong_commands(folder: Path) -> None:
    texts = [shown(["fit-law", *texts], cpt("fit-law", *texts)) for texts in COMMANDS]
    texts.append(shown(["predict", "law"], cpt("predict", "law")))
    assert all("[exit 2]" in text for text in texts)
    same("law_commands", "\n".join(texts), folder)
