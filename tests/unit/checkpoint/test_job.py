"""The conversion job as other parts call it: what it refuses, what it keeps, what it reports."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.base import lock
from cpt.base.errors import EnvironmentProblem, StageFailed, StoppedAndSaved, UsageError
from cpt.checkpoint import find, verify
from cpt.checkpoint.content import Layout
from cpt.checkpoint.formats import Writing
from cpt.checkpoint.job import crew, place
from cpt.checkpoint.job.convert import convert
from cpt.checkpoint.job.crew import Stop, Stopped, Told, share_out
from cpt.checkpoint.job.journal import open_journal
from cpt.checkpoint.job.planning import Plan, Request, Running, plan
from cpt.checkpoint.job.record import advice, dropped, with_record
from cpt.checkpoint.job.work import CHECK, WRITE, Task
from tests import made_checkpoints
from tests.checkpoints import PLAIN, write_hf
from tests.made_checkpoints import LLAMA


@pytest.fixture
def planned(tmp_path: Path) -> Plan:
    write_hf(tmp_path / "in", PLAIN)
    return plan(Request(source=tmp_path / "in", out=tmp_path / "out", to="hf", writing=Writing(file_bytes=20_000)))


def on(kind: str, number: int, act: Callable[[], None]) -> Callable[[str, Mapping[str, Any]], None]:
    """An event sink that does something at the `number`-th event of a kind."""
    seen = 0

    def event(what: str, facts: Mapping[str, Any]) -> None:
        nonlocal seen
        seen += what == kind
        if what == kind and seen == number:
            act()

    return event


def test_a_source_that_changes_while_it_is_read_is_refused(planned: Plan, tmp_path: Path) -> None:
    change = on("file", 2, lambda: os.utime(tmp_path / "in" / "model.safetensors", ns=(1, 1)))
    with pytest.raises(UsageError, match="has changed while it was read"):
        convert(planned, Running(), change)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", ["torch_dist", "megatron", "atom", "hf"])
def test_optimizer_state_is_dropped_as_asked_only_where_there_is_some(name: str, tmp_path: Path) -> None:
    writing = Writing(optimizer="none")
    for there in (True, False):
        content = made_checkpoints.content(tmp_path / f"made_{there}", LLAMA, padded=None, optimizer=there)
        given = made_checkpoints.write(content, name, tmp_path / f"in_{there}")
        request = Request(source=given, out=tmp_path / f"out_{there}", to="atom", writing=writing)
        lines = [line for line in dropped(plan(request)) if "optimizer" in line]
        assert lines == (["optimizer state, as asked"] if there and name != "hf" else [])


def test_an_error_that_is_nobodys_fault_keeps_what_is_finished(planned: Plan, tmp_path: Path) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        convert(planned, Running(), on("file", 3, fail))
    partial = tmp_path / "out.partial"
    assert not (partial / lock.NAME).exists() and len(open_journal(partial, planned).files) == 3
    events: list[tuple[str, Mapping[str, Any]]] = []
    report = convert(planned, Running(), lambda kind, facts: events.append((kind, dict(facts))))
    resumed = {"files": 3, "begun": 0, "of": report.files - 3, "bytes": report.bytes - report.written}
    assert ("resumed", resumed) in events
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_a_journal_line_that_was_cut_off_is_written_again(planned: Plan, tmp_path: Path) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        convert(planned, Running(), on("file", 3, fail))
    journal = tmp_path / "out.partial" / "journal.jsonl"
    data = journal.read_bytes()
    for cut in (1, 20, len(data.splitlines(True)[-1]) - 1):
        journal.write_bytes(data[:-cut])
        found = open_journal(tmp_path / "out.partial", planned)
        assert len(found.files) == 2
        assert journal.read_bytes() == b"".join(data.splitlines(True)[:-1])
    first = json.loads(data.splitlines()[1])["file"]
    (tmp_path / "out.partial" / first).write_bytes(b"shorter")
    assert first not in open_journal(tmp_path / "out.partial", planned).files
    report = convert(planned)
    assert report.written < report.bytes


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 9))
def test_work_is_shared_out_whole_and_evenly(sizes: list[int], workers: int) -> None:
    tasks = [Task(WRITE, i, size) for i, size in enumerate(sizes)]
    lists = share_out(tasks, workers)
    assert sorted((t for one in lists for t in one), key=lambda t: t.number) == tasks
    assert len(lists) == max(1, min(workers, len(tasks)))
    loads = [sum(t.size for t in one) for one in lists]
    assert max(loads) - min(loads) <= max([*sizes, 0]) + len(sizes)
    assert share_out(list(reversed(tasks)), workers) == lists, "the same for the same tasks"


def told() -> tuple[Told, list[Task]]:
    done: list[Task] = []
    return Told(lambda size, label: None, lambda task, result: done.append(task)), done


@pytest.mark.parametrize("workers", [1, 3])
def test_errors_come_back_from_workers_as_they_were(workers: int) -> None:
    tasks = [Task(CHECK, i, 1) for i in range(6)]

    def fail(error: Exception) -> Callable[..., dict[str, Any]]:
        def do(task: Task, tell: Any) -> dict[str, Any]:
            if task.number == 4:
                raise error
            return {}

        return do

    wrong = UsageError("one", "hint", more=(UsageError("two"),))
    with pytest.raises(UsageError) as usage:
        crew.run(tasks, workers, fail(wrong), told()[0], Stop())
    assert (usage.value.message, usage.value.hints, usage.value.more[0].message) == ("one", ("hint",), "two")
    with pytest.raises(OSError) as full:
        crew.run(tasks, workers, fail(OSError(28, "No space left on device", "x")), told()[0], Stop())
    assert (full.value.errno, full.value.filename) == (28, "x")
    with pytest.raises((RuntimeError, ZeroDivisionError), match="bug"):
        crew.run(tasks, workers, fail(ZeroDivisionError("bug")), told()[0], Stop())


def test_a_worker_that_ends_without_a_word_is_an_error() -> None:
    def die(task: Task, tell: Any) -> dict[str, Any]:
        os._exit(3)

    with pytest.raises(StageFailed, match="a worker ended with 3"):
        crew.run([Task(CHECK, i, 1) for i in range(2)], 2, die, told()[0], Stop())


def test_a_stop_before_anything_is_begun() -> None:
    one, done = told()
    for workers in (1, 2):
        with pytest.raises(Stopped):
            crew.run([Task(CHECK, i, 1) for i in range(2)], workers, lambda task, tell: {}, one, Stop(asked=1))
    assert len(done) <= 2


def test_a_stop_in_this_process_keeps_the_journal(planned: Plan, tmp_path: Path) -> None:
    import signal

    with pytest.raises(StoppedAndSaved, match="2 of"):
        convert(planned, Running(), on("file", 2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "the handlers are those from before"
    assert convert(planned).written > 0


@pytest.mark.parametrize(
    "text",
    ['{"a": 1}', '{\n "a": [1,\n  2]\n}\n', '{"conversion": null, "a": "}"}', "{}", '{"a": {"b": "ü"}}  \n'],
)
def test_a_manifest_gains_the_record_and_keeps_the_rest(text: str) -> None:
    made = json.loads(with_record(text.encode(), {"id": "x", "list": [1, {}]}))
    assert made.pop("conversion") == {"id": "x", "list": [1, {}]}
    before = json.loads(text)
    before.pop("conversion", None)
    assert made == before


def test_the_id_is_of_all_that_bytes_depend_on_and_nothing_else(tmp_path: Path) -> None:
    write_hf(tmp_path / "in", PLAIN)
    base = Request(source=tmp_path / "in", out=tmp_path / "out", to="hf")
    same = plan(base).id
    assert plan(replace(base, out=tmp_path / "elsewhere")).id == same
    others = {plan(replace(base, writing=w)).id for w in (Writing(dtype="bfloat16"), Writing(file_bytes=1000))}
    others |= {plan(replace(base, to="atom")).id}
    assert len(others) == 3 and same not in others
    os.utime(tmp_path / "in" / "config.json", ns=(5, 5))
    assert plan(base).id != same


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 8
    file.write_bytes(data)


@pytest.mark.parametrize("to", ["hf", "atom", "torch_dist", "megatron"])
def test_a_finished_conversion_that_was_damaged_is_not_done_already(to: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "in", PLAIN)
    planned = plan(Request(source=tmp_path / "in", out=tmp_path / "out", to=to))
    first = convert(planned)
    again = convert(planned, Running(verify=True))
    assert again.done_before
    for fact in ("id", "state", "files", "bytes", "tensors", "dropped", "weights"):
        assert getattr(again, fact) == getattr(first, fact), fact
    file = first.folder / planned.output.files[0].name
    good = file.read_bytes()
    damage(file)
    assert convert(planned).done_before, "bytes of large files are read when they are to be verified"
    with pytest.raises(UsageError, match=f"is damaged: `{planned.output.files[0].name}` has other bytes") as error:
        convert(planned, Running(verify=True))
    assert "remove" in error.value.hints[-1]
    for act, said in ((lambda: file.write_bytes(good[:-1]), "bytes instead of"), (file.unlink, "is missing")):
        act()
        with pytest.raises(UsageError, match=f"is damaged: .*{said}"):
            convert(planned)


def test_an_unfinished_conversion_says_what_it_is(planned: Plan, tmp_path: Path) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    assert place.unfinished(tmp_path / "out") is None
    with pytest.raises(ZeroDivisionError):
        convert(planned, Running(), on("file", 1, fail), "cpt convert-ckpt in out --to hf")
    said = f"an unfinished conversion of `{tmp_path / 'in'}`: `cpt convert-ckpt in out --to hf` goes on with it"
    for folder in (tmp_path / "out", tmp_path / "out.partial"):
        assert place.unfinished(folder) == said
        assert verify.verify(folder) == [f"`{folder}` is {said}"]
        with pytest.raises(UsageError, match="is an unfinished conversion of"):
            find.find(folder)
    convert(planned)
    assert place.unfinished(tmp_path / "out") is None


def test_what_is_dropped_is_what_was_there(tmp_path: Path) -> None:
    write_hf(tmp_path / "in", PLAIN)
    for name in ("README.md", "tokenizer.json"):
        (tmp_path / "in" / name).write_text("{}")
    again = plan(Request(source=tmp_path / "in", out=tmp_path / "out", to="hf"))
    assert dropped(again) == ("`README.md`: not of the model or its tokenizer",)
    trained = replace(
        made_checkpoints.content(tmp_path / "made", LLAMA, padded=None),
        args={"lr": 0.1}, common={"opt_param_scheduler": {"max_lr": 0.1}},
    )  # fmt: skip
    source = made_checkpoints.write(trained, "megatron", tmp_path / "trained")
    lines = dropped(plan(Request(source=source, out=tmp_path / "out", to="hf")))
    assert "Megatron's arguments, step 7, `opt_param_scheduler`: a Hugging Face folder has no place for them" in lines
    onward = plan(Request(source=source, out=tmp_path / "out", to="megatron"))
    assert dropped(onward) == () and "`--no-load-rng`" in advice(onward)[0]


def test_other_options_are_named_as_a_person_gives_them(tmp_path: Path) -> None:
    write_hf(tmp_path / "in", PLAIN)
    request = Request(source=tmp_path / "in", out=tmp_path / "out", to="megatron", writing=Writing(layout=Layout(pp=2)))
    convert(plan(replace(request, pipeline_layout="1,2")))
    with pytest.raises(UsageError) as error:
        convert(plan(replace(request, pipeline_layout="2,1")))
    assert error.value.hints[0] == "`--pipeline-layout` is `1,2` there, `2,1` here"


def test_where_nothing_can_be_written_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.check_writable(tmp_path / "new" / "out")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(EnvironmentProblem, match="cannot be written: writing there is not permitted"):
        place.check_writable(tmp_path / "new" / "out")
