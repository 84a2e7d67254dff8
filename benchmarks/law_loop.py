"""From small runs to the mixture of the real run: what a law stage chooses, against a grid search on real text.

    python -m benchmarks.law_loop [--folder DIR]

A small general base goes on with WordNet, which it has seen, and ICD-10-CM, which it has not, every run at the same
number of tokens; the general loss may rise by 5 %. The recipe `loop` holds a law stage and the run that takes its
mixture, the recipe `grid` nine ratios and three more that neither has. In `--folder` a second call goes on with what is
done. Needs the shared data (`CPT_SHARED`, or `../shared` beside the checkout).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEP = 32 * 256  # tokens of a step
STEPS, WARMUP = 64, 4
TOLERANCE = 0.05
GRID = tuple(i / 8 for i in range(9))
UNSEEN = (0.2, 0.45, 0.7)  # neither in the grid nor among the proxies
RATIOS, PROXY_STEPS, EVERY = (0.0, 0.25, 0.5, 0.75, 1.0), 40, 8
LAW = "dcpt"
TARGETS = {"unseen": 0.01, "domain": 0.01, "general": 0.005, "cost": 0.35}

HEAD = """
defaults: [/launcher: local, _self_]
base: {{checkpoint: {models}/tiny-general-1m}}
sources:
  general:
    {{paths: "{corpora}/general_wordnet_en/train.*", valid_paths: "{corpora}/general_wordnet_en/valid.*"}}
  medical: {{paths: "{corpora}/medical_icd_en/train.*", valid_paths: "{corpora}/medical_icd_en/valid.*"}}
train:
  seq_length: 256
  global_batch_size: 32
  micro_batch_size: 16
  precision: fp32
  evaluate: {{tokens: 64k, sources: [general, medical]}}
stages:
"""
LOOP = f"""
  mix:
    kind: law
    from: base
    for: domain
    law: {LAW}
    domain: [medical]
    general: [general]
    ratios: [{", ".join(f"{r:g}" for r in RATIOS)}]
    tokens: {PROXY_STEPS * STEP}
    every: {EVERY * STEP}
    lr: {{peak: 5e-4, warmup: {WARMUP} steps}}
    tolerance: {TOLERANCE:.0%}
    max_cost: {100 * TARGETS["cost"] * len(GRID):g}%   # a grid search over {len(GRID)} ratios is what they save
  domain:
    from: base
    keep: [weights]
    tokens: {STEPS * STEP}
    mixture: "${{law:mix.mixture}}"
    lr: {{schedule: constant, peak: 5e-4, warmup: {WARMUP} steps}}
"""
RUN = """
  {name}:
    from: base
    keep: [weights]
    tokens: {tokens}
    mixture: {mixture}
    lr: {{schedule: constant, peak: 5e-4, warmup: {warmup} steps}}
    evaluate: {{at_start: false}}
"""


def main(arguments: list[str] | None = None) -> int:
    """Run both recipes and compare; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where recipes and runs are kept; default: a temporary one")
    options = parser.parse_args(arguments)
    shared = Path(os.environ.get("CPT_SHARED") or ROOT.parent / "shared") / "data"
    if not shared.is_dir():
        print(f"skipped: no shared data in {shared}; set CPT_SHARED")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        write_recipes(folder, shared)
        began = time.monotonic()
        for name in ("loop", "grid"):
            if not cpt(folder, "run", f"recipe={name}", f"name={name}"):
                return 1
        print(f"all runs: {time.monotonic() - began:.0f} s", flush=True)
        return compare(folder / "runs")


def write_recipes(folder: Path, shared: Path) -> None:
    """`recipes/loop.yaml` and `recipes/grid.yaml`."""
    head = HEAD.format(models=shared / "models", corpora=shared / "corpora")
    runs = ""
    for ratio in (*GRID, *UNSEEN):
        shares = {"medical": ratio, "general": round(1 - ratio, 6)}
        mixture = "{" + ", ".join(f"{k}: {v:g}" for k, v in shares.items() if v) + "}"
        runs += RUN.format(name=run_name(ratio), tokens=STEPS * STEP, mixture=mixture, warmup=WARMUP)
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    (folder / "recipes" / "loop.yaml").write_text(head + LOOP)
    (folder / "recipes" / "grid.yaml").write_text(head + runs)


def run_name(ratio: float) -> str:
    """Of the stage of a ratio."""
    return f"r{1000 * ratio:g}"


def cpt(folder: Path, *arguments: str) -> bool:
    """Whether a command of the product ended well; its last lines are shown when not."""
    command = [sys.executable, "-m", "cpt", *arguments]
    environ = {**os.environ, "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(f"`cpt {' '.join(arguments)}` ended with {done.returncode}\n{done.stdout[-3000:]}")
    return done.returncode == 0


def measured(runs: Path, run: str, stage: str, when: str = "end") -> dict[str, float]:
    """Losses of a stage at its start or end by corpus [nats/token]."""
    from cpt.base.events import stage_events
    from cpt.evaluate.collect import measurements
    from cpt.stages import state

    home = state.home(runs / run / "stages" / stage)
    found = next(m for m in reversed(measurements(stage_events(home))) if m.when == when)
    return {"domain": found.losses["medical"].loss, "general": found.losses["general"].loss}


def compare(runs: Path) -> int:
    """Print every figure with its target; 1 when one is missed."""
    from cpt.laws.rows import points
    from cpt.laws.saved import SavedLaw

    saved = SavedLaw.load(runs / "loop" / "stages" / "mix")
    values = saved.values()
    ratio, tokens = values["ratio"], STEPS * STEP
    base = measured(runs, "loop", f"mix-r{100 * RATIOS[0]:g}", "start")
    limit = base["general"] * (1 + TOLERANCE)
    real = {r: measured(runs, "grid", run_name(r)) for r in (*GRID, *UNSEEN)}
    chosen = measured(runs, "loop", "domain")
    print(f"law {saved.law} ({saved.verdict}), ratio {ratio:.3f} ({_interval(values)}), base {_shown(base)}")
    for reason in saved.unfit:
        print(f"  unfit: {reason}")

    def predicted(r: float) -> dict[str, float]:
        found = {}
        for name, share in (("domain", r), ("general", 1 - r)):
            asked = points(n_params=values.get("n_params"), tokens=tokens, share=share, base=saved.targets[name].base)
            found[name] = float(saved.predict(name, asked)[0, 0])
        return found

    errors: dict[str, list[float]] = {"domain": [], "general": []}
    print("\n  ratio   measured domain general   predicted domain general")
    for r in sorted(real):
        guess = predicted(r)
        print(f"  {r:5.3f}            {real[r]['domain']:.3f}  {real[r]['general']:.3f}", end="")
        print(f"             {guess['domain']:.3f}  {guess['general']:.3f}", end="")
        print("   unseen" if r in UNSEEN else "   proxy" if r in RATIOS else "")
        if r in UNSEEN:
            for name in guess:
                errors[name].append(abs(guess[name] / real[r][name] - 1))
    print(f"  {ratio:5.3f}            {chosen['domain']:.3f}  {chosen['general']:.3f}   chosen by the law\n")
    admissible = [r for r in GRID if real[r]["general"] <= limit]
    best = min(admissible, key=lambda r: real[r]["domain"])
    each = ", ".join(f"{name} {statistics.median(found):.2%}" for name, found in errors.items())
    cost = len(RATIOS) * PROXY_STEPS / (len(GRID) * STEPS)
    figures = {
        "unseen": (
            statistics.median(errors["domain"] + errors["general"]),
            f"median error at ratios without a run ({each})",
        ),
        "domain": (
            chosen["domain"] / real[best]["domain"] - 1,
            f"domain loss above that of the best admissible grid point ({best:g})",
        ),
        "general": (chosen["general"] / limit - 1, f"general loss above the limit of {limit:.3f}"),
        "cost": (cost, f"tokens of the proxies, of those of the grid of {len(GRID)}"),
    }
    missed = [name for name, (value, _) in figures.items() if value > TARGETS[name]]
    for name, (value, what) in figures.items():
        print(f"{what}: {value:+.2%} (at most {TARGETS[name]:.1%}) {'MISSED' if name in missed else 'ok'}")
    return int(bool(missed) or saved.verdict != "fit")


def _interval(values: dict[str, float]) -> str:
    return (
        f"95 % interval {values['low']:.3f} to {values['high']:.3f}" if values.get("low") is not None else "no interval"
    )


def _shown(losses: dict[str, float]) -> str:
    return f"domain {losses['domain']:.3f}, general {losses['general']:.3f}"


if __name__ == "__main__":
    sys.exit(main())
