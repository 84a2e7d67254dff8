"""A run that is killed and goes on ends with the very bits of one that was not."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cpt.checkpoint import store
from cpt.stages import state
from cpt.stages.train import SKIPS
from tests.dist import killing
from tests.dist.killing import Moment, Running, Runs

STAGES = ("domain", "second", "anneal")
STEPS, SAVE_EVERY, EVAL_EVERY = 12, 5, 6  # of the first stage

# A new tokenizer and a new model of two layers at tp 2 x pp 2; re-warmed, another mixture, annealed to zero.
RECIPE = """
defaults: [/launcher: local, _self_]
base: scratch
model:
  {family: llama, num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, tie_embeddings: true}
tokenizer: {train_on: [even, odd], vocab_size: 384}
sources:
  even: {paths: even.jsonl, valid: 5%}
  odd: {paths: odd.jsonl, valid: 5%}
train:
  seq_length: 64
  global_batch_size: 4
  micro_batch_size: 1
  precision: fp32
  parallel: {tp: 2, pp: 2}
  evaluate: {every: 1536, tokens: 6144}
checkpoint: {every: 1280, retain: {last: 3}}
stages:
  domain:
    from: base
    tokens: 3072
    mixture: {even: 0.7, odd: 0.3}
    lr: {schedule: rewarm, peak: 1e-3, warmup: 4}
  second:
    from: domain
    keep: [weights, optimizer, cursor, lr, rng]
    tokens: 2560
    mixture: {even: 0.2, odd: 0.8}
  anneal:
    from: second
    keep: [weights, optimizer, cursor, lr, rng]
    tokens: 1536
    mixture: {even: 0.2, odd: 0.8}
    lr: {schedule: linear, end: 0}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A folder in which the recipe has run once without a stop, as `straight`."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "three.yaml").write_text(RECIPE)
    killing.write_topics(folder)
    found = Runs(folder)
    done = found.finish("straight")
    assert done.process.returncode == 0, done.text()[-4000:]
    return found


def evaluation_seconds(runs: Runs) -> float:
    events = killing.Running(None, runs.folder / "straight" / "it", Path()).events("domain")  # type: ignore[arg-type]
    return float(next(e["seconds"] for e in events if e["kind"] == "eval" and e["step"] == EVAL_EVERY))


def test_a_run_killed_at_random_moments_ends_bit_identical(runs: Runs) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    moments = [
        killing.before_first_checkpoint("domain", SAVE_EVERY),
        killing.inside_a_save("domain"),
        killing.inside_an_evaluation("domain", EVAL_EVERY, evaluation_seconds(runs)),
        killing.between_stages("domain", "second"),
        killing.after_step("second", 10),
    ]
    name = kill_at_all(runs, moments, chance)
    last = runs.finish(name)
    assert last.process.returncode == 0, last.text()[-4000:]
    assert "domain  done" in last.text()
    straight, killed = runs.folder / "straight" / "it", runs.folder / name / "it"
    for stage in STAGES:
        assert killing.content(killed, stage) == killing.content(straight, stage), f"{stage} differs, seed {seed}"
        assert killing.step_history(killed, stage) == killing.step_history(straight, stage)


def kill_at_all(runs: Runs, moments: list[Moment], chance: random.Random) -> str:
    """Kill a run at one moment after the other; gives its name. Begins again where a moment was missed, twice."""
    for name in ("killed", "again", "once-more"):
        try:
            for moment in moments:
                kill = killing.kill_at(runs, name, moment, chance)
                print(kill)
                assert kill.exit_code == (-9 if kill.victim == "cpt run" else 1)
        except killing.TooLate as missed:
            print(missed)
        else:
            return name
    pytest.fail("a moment was missed three times")


def test_a_failure_names_stage_step_rank_cause_log_and_what_goes_on(runs: Runs) -> None:
    moment = killing.after_step("domain", 3)
    killing.kill_at(runs, "told", moment, random.Random(1))
    text = (runs.folder / "told.out").read_text()
    assert re.search(r"error: stage `domain` failed after step \d+ on rank \d: killed by SIGKILL", text)
    assert re.search(r"hint: the log of that rank is `.*attempt_1/logs/rank_000\d.log`", text)
    assert re.search(r"hint: `.*run recipe=three runs=told name=it` goes on", text)
    assert "Traceback" not in text
    words = [sys.executable, "-m", "cpt", "logs", str(runs.folder / "told" / "it")]
    environ = {**os.environ, "PYTHONPATH": str(killing.ROOT)}
    shown = subprocess.run(words, env=environ, capture_output=True, text=True, check=True)
    rank = re.search(r"on rank (\d)", text)
    assert rank and f"rank_000{rank[1]}.log" in shown.stderr, "the log of the rank that failed is shown unasked"


def test_a_finished_run_starts_nothing_and_says_so(runs: Runs) -> None:
    again = runs.finish("straight")
    assert again.process.returncode == 0
    assert (again.run_dir / "stages" / "domain" / "attempt_2").exists() is False
    assert again.text().count("domain  done") >= 2


def test_a_second_run_at_once_is_refused_and_told_who_works(runs: Runs) -> None:
    first = runs.start("twice")
    first.wait_until(lambda: bool(first.ranks()), "ranks")
    second = runs.finish("twice")
    assert second.process.returncode == 2
    assert f"is in use by process {first.process.pid}" in second.text()
    assert first.process.wait(300) == 0, first.text()[-3000:]


def test_ctrl_c_saves_and_stops_and_the_same_command_goes_on(runs: Runs) -> None:
    running = runs.start("stopped")
    running.wait_until(lambda: killing._step(running, "domain") >= 2, "a few steps")
    running.tree()
    os.kill(running.process.pid, signal.SIGINT)
    assert running.process.wait(60) == 75, running.text()[-3000:]
    assert not running.orphans()
    assert "Ctrl-C again stops at once" in running.text()
    found = state.read(running.run_dir / "stages" / "domain")
    assert found.status == state.SAVED and found.step
    saved, _ = store.newest_whole(running.run_dir / "stages" / "domain" / "checkpoints")
    assert saved is not None and saved.name == store.folder_name(found.step)
    assert runs.finish("stopped").process.returncode == 0
    assert killing.content(running.run_dir, "anneal") == killing.content(runs.folder / "straight" / "it", "anneal")


def test_cancel_from_another_terminal_saves_and_stops(runs: Runs) -> None:
    running = runs.start("cancelled")
    running.wait_until(lambda: killing._step(running, "domain") >= 1, "a step")
    words = [sys.executable, "-m", "cpt", "cancel", str(running.run_dir)]
    environ = {**os.environ, "PYTHONPATH": str(killing.ROOT)}
    told = subprocess.run(words, env=environ, capture_output=True, text=True, check=True)
    assert f"process {running.process.pid}" in told.stdout
    assert running.process.wait(60) == 75
    assert not (running.run_dir / "stop").exists()


def test_a_truncated_shard_is_named_and_the_checkpoint_before_is_used(runs: Runs) -> None:
    killing.kill_at(runs, "cut", killing.between_stages("domain", "second"), random.Random(2))
    stage_dir = runs.folder / "cut" / "it" / "stages" / "domain"
    # As if the end had been written by a machine that lost power: the stage is not known to be done either.
    newest, _ = store.newest_whole(stage_dir / "checkpoints")
    assert newest is not None
    shard = max(newest.glob("*.distcp"), key=lambda p: p.stat().st_size)
    os.truncate(shard, shard.stat().st_size // 2)
    again = runs.finish("cut")
    assert again.process.returncode == 0, again.text()[-3000:]
    assert f"`{newest}` is passed over: `{shard.name}` has" in again.text().replace("\n", "")
    assert killing.content(runs.folder / "cut" / "it", "anneal") == killing.content(
        runs.folder / "straight" / "it", "anneal"
    )


def test_the_launch_script_does_by_hand_what_the_command_does(runs: Runs) -> None:
    killing.kill_at(runs, "byhand", killing.after_step("domain", 3), random.Random(3))
    stage_dir = runs.folder / "byhand" / "it" / "stages" / "domain"
    environ = {**os.environ, "PYTHONPATH": str(killing.ROOT)}
    done = subprocess.run([stage_dir / "launch.sh"], env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert state.read(stage_dir).status == state.DONE
    assert killing.content(runs.folder / "byhand" / "it", "domain") == killing.content(
        runs.folder / "straight" / "it", "domain"
    )
    again = subprocess.run([stage_dir / "launch.sh"], env=environ, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and "done already" in again.stderr


def test_a_kill_around_a_rollback_changes_nothing(runs: Runs) -> None:
    """A large lr, and every loss above the mean of the last few counts as a spike: the run goes back several times."""
    words = (
        "~stages.second",
        "~stages.anneal",
        "train.parallel={dp: 2}",
        "stages.domain.tokens=10240",
        "stages.domain.lr={schedule: constant, peak: 3e-2}",
        "train.anomalies={spike: rollback, spike_factor: 1.02, window: 4, max_skips: 40}",
    )
    plain = runs.finish("rolled-straight", *words)
    assert plain.process.returncode == 0, plain.text()[-3000:]

    def skips(name: str) -> str:
        path = runs.folder / name / "it" / "stages" / "domain" / SKIPS
        return path.read_text() if path.exists() else ""

    for seed in (1, 2, 3):
        before = skips("rolled")
        if len(before) == len(skips("rolled-straight")):
            break  # that was the last rollback

        def wait(running: Running, chance: random.Random, before: str = before) -> None:
            running.wait_until(lambda: skips("rolled") != before, "a rollback")
            running.tree()
            time.sleep(chance.choice([0.0, 0.02, 0.2]))

        killing.kill_at(runs, "rolled", Moment("after a rollback", wait, victim="command"), random.Random(seed), *words)
    assert runs.finish("rolled", *words).process.returncode == 0
    assert skips("rolled") == skips("rolled-straight") != ""
    found = [killing.content(runs.folder / name / "it", "domain") for name in ("rolled", "rolled-straight")]
    assert found[0] == found[1]
