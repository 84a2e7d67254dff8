"""`cpt doctor` on this machine, and what it says when something is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpt.doctor import check, machine, packages, tracking


def test_a_check_that_breaks_has_failed_and_the_others_still_run() -> None:
    def broken() -> check.Check:
        raise OSError("no such device")

    found = check.run([("disk", broken), ("fine", lambda: check.Check("ok", "fine", "yes"))])
    assert [c.status for c in found] == ["fail", "ok"]
    assert "no such device" in found[0].found


def test_a_missing_requirement_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "requires", lambda name: ["no-such-package-of-ours>=1", "numpy<0.1"])
    (found,) = check.run([c for c in packages.checks() if c[0] == "packages"])
    assert found.status == "fail"
    assert "no-such-package-of-ours is missing" in found.found and "is not <0.1" in found.found


def test_a_folder_that_is_not_there_yet_is_measured_where_it_would_be(tmp_path: Path) -> None:
    (found,) = check.run([c for c in machine.checks(tmp_path / "runs", tmp_path) if c[0] == "run folder"])
    assert found.status in ("ok", "warn") and str(tmp_path) in found.found
    assert list(tmp_path.iterdir()) == []


def test_two_processes_find_each_other() -> None:
    (found,) = check.run([c for c in machine.checks(Path("runs"), Path("cache")) if c[0] == "two ranks"])
    assert found.status == "ok", found.found


def test_wandb_without_a_key_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (found,) = check.run(tracking.checks({}))
    assert found.status == "ok" and "no key" in found.found
