"""`cpt doctor` on this machine, and what it says when something is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpt.doctor import check, engine, machine, packages, tracking


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


def test_torch_and_megatron_import_and_two_processes_find_each_other() -> None:
    first, second = check.run(engine.checks())
    assert (first.status, first.name) == ("ok", engine.ENGINE) and "megatron-core" in first.found, first.found
    assert (second.status, second.name) == ("ok", engine.RANKS) and "two processes" in second.found, second.found


@pytest.mark.parametrize(
    ("module", "source", "engine_says", "ranks_say"),
    [
        ("torch.py", "raise ImportError('libcudart.so.12 is missing')", "libcudart.so.12 is missing", "not tried"),
        ("torch.py", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "exit code -11", "not tried"),
        ("megatron/core.py", "raise ImportError('no megatron here')", "no megatron here", "gloo works"),
    ],
)
def test_what_does_not_import_is_said_and_takes_no_check_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str, engine_says: str, ranks_say: str
) -> None:
    (tmp_path / module).parent.mkdir(exist_ok=True)
    (tmp_path / module).write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    first, second = check.run(engine.checks())
    assert first.status == "fail" and engine_says in first.found
    assert ranks_say in second.found and (second.status == "ok") == ("works" in ranks_say)


def test_ranks_that_do_not_meet_are_a_failure_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-device")
    first, second = check.run(engine.checks())
    assert first.status == "ok"
    assert second.status == "fail" and "GLOO_SOCKET_IFNAME" in second.hint
    assert "no-such-device" in second.found, second.found


def test_wandb_without_a_key_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (found,) = check.run(tracking.checks({}))
    assert found.status == "ok" and "no key" in found.found
