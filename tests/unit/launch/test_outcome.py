"""Which error a person is shown, from what the ranks left."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from cpt.base.errors import DONE, FAILED, GUARD, SAVED, EnvironmentProblem, Fenced, UsageError
from cpt.launch import outcome
from cpt.launch.explain import explain


def failure(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "failure.json").read_text()))


@pytest.mark.parametrize("code", [DONE, SAVED, GUARD])
def test_ranks_that_agree_give_their_code(tmp_path: Path, code: int) -> None:
    for rank in range(2):
        outcome.write_record(tmp_path, rank, code)
    assert outcome.conclude(tmp_path, 2) == code


def test_one_rank_that_only_saved_means_saved(tmp_path: Path) -> None:
    outcome.write_record(tmp_path, 0, DONE)
    outcome.write_record(tmp_path, 1, SAVED)
    assert outcome.conclude(tmp_path, 2) == SAVED


def test_a_rank_without_a_word_is_a_failure(tmp_path: Path) -> None:
    outcome.write_record(tmp_path, 0, DONE)
    assert outcome.conclude(tmp_path, 2) == FAILED
    assert failure(tmp_path)["rank"] == 1


def test_the_earliest_error_wins(tmp_path: Path) -> None:
    for rank, when, text in ((0, 3.0, "late"), (1, 1.0, "first"), (2, 2.0, "second")):
        outcome.write_record(tmp_path, rank, FAILED, {"error": text, "time": when})
    assert outcome.conclude(tmp_path, 3, {0: 1, 2: 1, 1: 1}) == FAILED
    assert failure(tmp_path)["error"] == "first"


def test_a_killed_rank_comes_before_those_that_lost_touch_with_it(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"kind": "step", "step": 7}\n')
    outcome.write_record(tmp_path, 0, FAILED, {"error": "Connection closed by peer"})
    assert outcome.conclude(tmp_path, 2, {0: 1, 1: -signal.SIGKILL}) == FAILED
    found = failure(tmp_path)
    assert found["rank"] == 1 and found["step"] == 7
    assert str(found["error"]).startswith("killed by SIGKILL")


def test_out_of_memory_is_said_when_the_kernel_counted_one(tmp_path: Path) -> None:
    outcome.conclude(tmp_path, 1, {0: -signal.SIGKILL}, out_of_memory=True)
    assert failure(tmp_path)["error"] == "killed by the kernel: out of memory"


def test_a_rank_that_was_stopped_before_it_listened_has_lost_nothing(tmp_path: Path) -> None:
    outcome.write_record(tmp_path, 0, SAVED)
    assert outcome.conclude(tmp_path, 2, {0: SAVED, 1: -signal.SIGTERM}, stopping=True) == SAVED
    assert outcome.conclude(tmp_path, 2, {0: SAVED, 1: -signal.SIGTERM}, stopping=False) == FAILED


def test_a_full_disk_is_one_line_whatever_wraps_it() -> None:
    try:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("writer failed") from error
    except RuntimeError as error:
        found = explain(error)
    assert found["kind"] == "disk" and found["exit_code"] == 3
    assert explain(RuntimeError("[enforce fail] No space left on device (28)"))["kind"] == "disk"


def test_a_clear_error_keeps_its_words_and_hints() -> None:
    found = explain(EnvironmentProblem("the disk is gone", "plug it in"))
    assert found["error"] == "the disk is gone" and found["hints"] == ["plug it in"] and found["exit_code"] == 3


def test_a_rank_that_cannot_join_the_others_is_named() -> None:
    def init_process_group() -> None:
        raise RuntimeError("[enforce fail at gloo] makeDeviceForHostname(): unsupported gloo device\nmore")

    try:
        init_process_group()
    except RuntimeError as error:
        found = explain(error)
    assert found["kind"] == "connect"
    assert found["error"].startswith("the ranks could not connect to each other: [enforce fail at gloo]")
    assert "\n" not in found["error"]


def test_a_failure_that_the_launcher_found_itself_is_the_one_that_is_told(tmp_path: Path) -> None:
    outcome.write_record(tmp_path, 0, FAILED, {"error": "Connection closed by peer"})
    assert outcome.conclude(tmp_path, 2, {0: 1}, found={"rank": 1, "kind": "hang", "error": "stuck"}) == FAILED
    found = failure(tmp_path)
    assert (found["rank"], found["kind"], found["hints"]) == (1, "hang", [])
    assert str(found["log"]).endswith("rank_0001.log")


def test_faults_of_the_machine_are_told_from_faults_of_the_work() -> None:
    ecc = explain(RuntimeError("CUDA error: uncorrectable ECC error encountered"))
    stale = explain(OSError(116, "Stale file handle"))
    try:
        raise EnvironmentProblem("cannot save `x`") from OSError(5, "Input/output error")
    except EnvironmentProblem as error:
        save = explain(error)
    assert (save["error"], outcome.is_machine_fault(save)) == ("cannot save `x`", True)
    gone = explain(RuntimeError("Connection closed by peer [10.0.0.7]:53"))
    killed = {"kind": "killed", "error": "killed by SIGKILL"}
    assert all(outcome.is_machine_fault(f) for f in (ecc, stale, gone, killed, {"kind": "hang"}, {"kind": "lost"}))
    work = [explain(e) for e in (ValueError("a bug"), UsageError("a key"), MemoryError(), OSError(28, "No space left"))]
    assert not any(outcome.is_machine_fault(f) for f in work)
    fenced = explain(Fenced("another attempt has taken over `domain`"))
    assert fenced["kind"] == "fenced" and not outcome.is_machine_fault(fenced)
