"""Runs through the command: kinds of stages, guards, re-use between runs, changed plans, full disks."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpt.base.files import read_json, read_lines
from cpt.checkpoint import store
from cpt.stages import state
from tests.dist import killing
from tests.dist.killing import Runs

# One stage from scratch, measured, exported, and gone on with from the exported folder.
RECIPE = (
    killing.TINY
    + """
train:
  seq_length: 64
  global_batch_size: 4
  micro_batch_size: 1
  precision: fp32
  broken_import_guard: false
  evaluate: {tokens: 2048}
stages:
  domain:
    from: base
    tokens: 1024
    mixture: {even: 0.7, odd: 0.3}
    lr: {schedule: constant, peak: 1e-3}
  measure: {kind: evaluate, from: domain, tokens: 2048}
  export: {kind: convert, from: measure, to: hf}
  native: {kind: convert, from: export, to: native}
  more:
    from: native
    keep: [weights]
    tokens: 512
    mixture: {odd: 1}
    lr: {schedule: constant, peak: 1e-3}
    parallel: {tp: 2}
"""
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "kinds.yaml").write_text(RECIPE)
    killing.write_topics(folder)
    found = Runs(folder, recipe="kinds")
    done = found.finish("first")
    assert done.process.returncode == 0, done.text()[-4000:]
    return found


def test_every_kind_of_stage_leaves_what_its_children_start_from(runs: Runs) -> None:
    run_dir = runs.folder / "first" / "it"
    for name in ("domain", "measure", "export", "native", "more"):
        assert state.read(run_dir / "stages" / name).status == state.DONE
    assert (run_dir / "stages" / "export" / "hf" / "config.json").is_file()
    job = read_json(run_dir / "stages" / "more" / "attempt_1" / "job.json")
    assert job["start"] == "native" and "/native/checkpoints/" in job["parent"]
    measured = [
        e for e in read_lines(run_dir / "stages" / "measure" / "attempt_1" / "events.jsonl") if e["kind"] == "eval"
    ]
    ended = [e for e in read_lines(run_dir / "stages" / "domain" / "attempt_1" / "events.jsonl") if e["kind"] == "eval"]
    for source in ("even", "odd"):
        assert measured[-1]["losses"][source]["loss"] == pytest.approx(ended[-1]["losses"][source]["loss"], abs=1e-5)


def test_an_exported_folder_loads_in_transformers_with_its_tokenizer(runs: Runs) -> None:
    transformers = pytest.importorskip("transformers")
    folder = runs.folder / "first" / "it" / "stages" / "export" / "hf"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == 384


def test_the_run_folder_says_how_it_came_to_be(runs: Runs) -> None:
    run_dir = runs.folder / "first" / "it"
    names = {p.name for p in run_dir.iterdir()}
    wanted = {"plan.json", "plan.yaml", "command.txt", "environment.json", "events.jsonl", "latest.json", "report.html"}
    assert wanted <= names
    assert "run recipe=kinds runs=first name=it" in (run_dir / "command.txt").read_text()
    assert read_json(run_dir / "environment.json")["packages"]["torch"]
    assert read_json(run_dir / "latest.json")["status"] == "done"
    kinds = [e["kind"] for e in read_lines(run_dir / "events.jsonl")]
    assert kinds[-1] == "run_end" and "run_start" in kinds and kinds.count("data") == 2


def test_another_run_uses_finished_stages_and_says_what_changed_in_the_others(runs: Runs) -> None:
    done = runs.finish("first", "name=other", "stages.more.tokens=768")
    assert done.process.returncode == 0, done.text()[-3000:]
    other = runs.folder / "first" / "other"
    kept = state.read(other / "stages" / "domain")
    assert kept.reference == str(runs.folder / "first" / "it" / "stages" / "domain")
    assert "domain  done with the same plan in `it`" in done.text()
    assert "more  runs: never ran; differs from run `it`: `tokens` 512 → 768" in done.text()
    assert not (other / "stages" / "domain" / "attempt_1").exists()


def test_a_folder_with_another_plan_is_refused_with_the_differences(runs: Runs) -> None:
    refused = runs.finish("first", "stages.domain.mixture={even: 0.5, odd: 0.5}")
    assert refused.process.returncode == 2
    text = refused.text()
    assert "holds another plan, under which stages `domain`" in text
    assert "`stages.domain.mixture.even` 0.7 → 0.5" in text
    refused_too = runs.finish("first", "stages.domain.mixture={even: 0.5, odd: 0.5}", "--accept-changes")
    assert refused_too.process.returncode == 2, "finished stages are never overwritten"


def test_an_unfinished_stage_goes_on_under_accepted_changes_only(runs: Runs) -> None:
    stop = killing.after_step("domain", 2)
    killing.kill_at(runs, "changed", stop, random.Random(1))
    wider = "stages.domain.mixture={even: 0.6, odd: 0.4}"
    refused = runs.finish("changed", wider)
    assert refused.process.returncode == 2 and "--accept-changes" in refused.text()
    accepted = runs.finish("changed", wider, "--accept-changes")
    assert accepted.process.returncode == 0, accepted.text()[-3000:]
    assert "`mixture.even` 0.7 → 0.6" in accepted.text()


def test_a_stage_that_is_further_than_the_new_plan_is_refused(runs: Runs) -> None:
    long = runs.start("shrunk", "stages.domain.tokens=262144")  # ends by Ctrl-C only
    long.wait_until(lambda: any(e["kind"] == "step" and e["step"] >= 3 for e in long.events("domain")), "step 3")
    long.process.send_signal(signal.SIGINT)
    assert long.process.wait(120) == 75
    short = runs.finish("shrunk", "stages.domain.tokens=256", "--accept-changes")
    assert short.process.returncode == 2 and "the new plan ends it at step 1" in short.text()


def test_fresh_starts_again_in_a_new_folder_and_so_does_what_resumes_it(runs: Runs) -> None:
    before = read_json(runs.folder / "first" / "it" / "plan.json")
    fresh = runs.start("first", "--fresh", "~stages.export", "~stages.native", "~stages.more")
    stages = runs.folder / "first" / "it-2" / "stages"
    fresh.wait_until((stages / "domain" / "attempt_1" / "events.jsonl").exists, "its first stage")
    fresh.process.send_signal(signal.SIGINT)
    assert fresh.process.wait(120) == 75, fresh.text()[-3000:]
    resumed = runs.resume("first", "it-2")
    assert resumed.process.wait(300) == 0, resumed.text()[-3000:]
    assert (stages / "measure" / "attempt_1").is_dir() and state.read(stages / "measure").reference is None
    assert read_json(runs.folder / "first" / "it" / "plan.json") == before


def test_a_guard_ends_the_run_with_4_and_later_stages_do_not_start(runs: Runs) -> None:
    guard = "stages.domain.stop_if={source: odd, loss_rises: 1%}"
    wild = ("stages.domain.lr={schedule: constant, peak: 5.0}", "stages.domain.evaluate.every=512")
    ended = runs.finish("guarded", guard, *wild)
    assert ended.process.returncode == 4, ended.text()[-3000:]
    assert re.search(
        r"warning: .*was ended by its guard `stop_if` at step \d+: .* rose from [\d.]+ to [\d.]+ nats/token \(\+",
        ended.text(),
    )
    assert not (ended.run_dir / "stages" / "measure").exists()
    assert store.newest_whole(ended.run_dir / "stages" / "domain" / "checkpoints")[0] is not None
    again = runs.finish("guarded", guard, *wild)
    assert again.process.returncode == 4 and not (again.run_dir / "stages" / "domain" / "attempt_2").exists()
    freed = runs.finish("guarded", *wild)
    assert freed.process.returncode == 0, freed.text()[-3000:]
    assert (freed.run_dir / "stages" / "domain" / "attempt_2").exists()


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A real file system of a few MB; skips where it may not be mounted."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_full_disk_is_one_clear_message_and_the_checkpoint_before_is_used(runs: Runs) -> None:
    one_stage = ("~stages.measure", "~stages.export", "~stages.native", "~stages.more", "checkpoint.every=256")
    with small_disk(runs.folder / "small", "4m") as disk:
        ballast = disk / "ballast"
        running = runs.start("small", *one_stage, "stages.domain.tokens=4096", "checkpoint.retain.last=20")
        folder = running.run_dir / "stages" / "domain" / "checkpoints"
        running.wait_until(lambda: store.newest_whole(folder)[0] is not None, "a first checkpoint")
        with contextlib.suppress(OSError), open(ballast, "wb") as file:
            while True:
                file.write(b"\0" * 4096)
                file.flush()
        code = running.process.wait(120)
        text = running.text()
        assert code == 3, text[-3000:]
        assert "Traceback" not in text
        assert "space" in text[text.index("error: ") :].splitlines()[0]
        assert "goes on" in text[text.index("error: ") :]
        newest, _ = store.newest_whole(folder)
        assert newest is not None, "the checkpoint before is whole"
        os.unlink(ballast)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        again = runs.finish("small", *one_stage, "stages.domain.tokens=4096", "checkpoint.retain.last=20")
        assert again.process.returncode == 0, again.text()[-3000:]
        assert "goes on from step" in again.text()
