"""A published model, real corpora, three stages at tp 2 x pp 2, killed by `kill -9` at eight random moments.

The weights after all that must have the very bits of a run that nobody touched.

    python -m benchmarks.kill_resume [--seed N]

Needs the shared data (`CPT_SHARED`, or `../shared` beside the checkout).
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("domain", "second", "anneal")
STEPS, SAVE_EVERY, EVAL_EVERY = {"domain": 40, "second": 30, "anneal": 20}, 8, 10

RECIPE = """
defaults: [/launcher: local, _self_]
base: {{checkpoint: {models}/stories260K}}
sources:
  medical: {{paths: "{corpora}/medical_en/train.*", valid_paths: "{corpora}/medical_en/valid.*"}}
  general: {{paths: "{corpora}/general_sqlite_en/train.*", valid_paths: "{corpora}/general_sqlite_en/valid.*"}}
train:
  seq_length: 128
  global_batch_size: 8
  micro_batch_size: 2
  precision: fp32
  parallel: {{tp: 2, pp: 2}}
  evaluate: {{every: 10240, tokens: 16384}}
checkpoint: {{every: 8192, retain: {{last: 3}}}}
stages:
  domain:
    from: base
    keep: [weights]
    tokens: 40960
    mixture: {{medical: 0.7, general: 0.3}}
    lr: {{schedule: rewarm, peak: 1e-3, warmup: 5}}
  second:
    from: domain
    keep: [weights, optimizer, cursor, lr, rng]
    tokens: 30720
    mixture: {{medical: 0.3, general: 0.7}}
  anneal:
    from: second
    keep: [weights, optimizer, cursor, lr, rng]
    tokens: 20480
    mixture: {{medical: 0.5, general: 0.5}}
    lr: {{schedule: linear, end: 0}}
"""


def main(arguments: list[str] | None = None) -> int:
    """Run both and compare; 1 when a bit differs or a process is left."""
    from tests.dist import killing

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args(arguments)
    shared = Path(os.environ.get("CPT_SHARED") or ROOT.parent / "shared") / "data"
    if not shared.is_dir():
        print(f"skipped: no shared data in {shared}; set CPT_SHARED")
        return 0
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "recipes").mkdir()
        recipe = RECIPE.format(models=shared / "models", corpora=shared / "corpora")
        (folder / "recipes" / "three.yaml").write_text(recipe)
        return compare(killing.Runs(folder), random.Random(seed))


def compare(runs, chance: random.Random) -> int:  # type: ignore[no-untyped-def]
    """The straight run, the killed run, and what differs."""
    from tests.dist import killing

    begin = time.monotonic()
    straight = runs.finish("straight")
    if straight.process.returncode:
        print(straight.text()[-3000:])
        return 1
    print(f"uninterrupted: {time.monotonic() - begin:.0f} s", flush=True)
    evaluation = next(
        e["seconds"] for e in straight.events("domain") if e["kind"] == "eval" and e["step"] == EVAL_EVERY
    )
    moments = [
        killing.before_first_checkpoint("domain", SAVE_EVERY),
        killing.inside_a_save("domain"),
        killing.inside_an_evaluation("domain", EVAL_EVERY, evaluation),
        killing.after_step("domain", STEPS["domain"]),
        killing.between_stages("domain", "second"),
        killing.after_step("second", STEPS["second"]),
        killing.inside_a_save("anneal"),
        killing.after_step("anneal", STEPS["anneal"]),
    ]
    for moment in moments:
        kill = killing.kill_at(runs, "killed", moment, chance)
        print(f"killed {kill.victim:8} {kill.moment}; all gone after {kill.seconds_to_end:.1f} s", flush=True)
    last = runs.finish("killed")
    if last.process.returncode:
        print(last.text()[-3000:])
        return 1
    wrong = 0
    for stage in STAGES:
        one, other = (runs.folder / name / "it" for name in ("straight", "killed"))
        same = killing.content(one, stage) == killing.content(other, stage)
        steps = killing.step_history(one, stage) == killing.step_history(other, stage)
        wrong += not (same and steps)
        print(f"{stage:8} weights, optimizer and random states {'bit-identical' if same else 'DIFFER'}; ", end="")
        print(f"losses and lr of all steps {'equal' if steps else 'DIFFER'}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
