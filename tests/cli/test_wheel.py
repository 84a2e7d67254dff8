"""The wheel carries the recipes and defaults, and works from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the project's wheel installed, and nothing else of it."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip"]
    built = subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cpt"}
    target = folder / "site"
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


def cpt(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, "-m", "cpt", *arguments], cwd=folder, env=environ, capture_output=True, text=True
    )


def test_recipes_are_found_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    code = "import cpt, sys; print(cpt.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(installed))
    listed = cpt(installed, tmp_path, "recipes")
    assert listed.returncode == 0, listed.stderr
    for name in ("demo", "medical", "code", "language", "infinite"):
        assert f"{name} " in listed.stdout
    plan = cpt(installed, tmp_path, "plan", "recipe=demo")
    assert plan.returncode == 0, plan.stderr
    assert "tp 2 pp 2" in plan.stdout
    assert list(tmp_path.iterdir()) == []
