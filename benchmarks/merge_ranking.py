"""Do weight averages rank mixtures as training on them does? Four corpora, all pairs and triples, on real text.

    python -m benchmarks.merge_ranking [--folder DIR]

From one small general base a model is trained on each of four corpora, and one on each pair and triple, all of equal
length. The losses of the averages of single models are ranked against those of the models trained on the mixtures, on
every corpus and on the mean over them (Spearman). Where all averages lie within 0.1 nats nothing is ranked. Needs the
shared data (`CPT_SHARED`, or `../shared` beside the checkout).
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.law_loop import ROOT, cpt

CORPORA = {"icd": "medical_icd_en", "medquad": "medical_en", "textbooks": "general_en", "code": "code_python"}
MIXED = tuple(c for size in (2, 3) for c in itertools.combinations(CORPORA, size))
TOKENS = 40 * 16 * 256  # of every run
TARGET = 0.9  # Spearman correlation
TIE = 0.1  # [nats/token]

HEAD = """
defaults: [/launcher: local, _self_]
base: {{checkpoint: {models}/tiny-general-1m}}
sources:
{sources}
train:
  seq_length: 256
  global_batch_size: 16
  micro_batch_size: 16
  precision: fp32
  evaluate: {{tokens: 32k, sources: [{names}]}}
stages:
  mix:
    kind: law
    how: merge
    from: base
    for: {first}
    domain: [icd]
    general: [medquad, textbooks, code]
    mixtures: [{mixtures}]
    tokens: {tokens}
    lr: {{peak: 5e-4, warmup: 4 steps}}
    tolerance: null
    draws: 0
    max_cost: 400%
"""
SOURCE = '  {name}: {{paths: "{folder}/train.*", valid_paths: "{folder}/valid.*"}}'
RUN = """
  {name}:
    from: base
    keep: [weights]
    tokens: {tokens}
    mixture: {mixture}
    lr: {{schedule: constant, peak: 5e-4, warmup: 4 steps}}
    evaluate: {{at_start: false}}
"""


def main(arguments: list[str] | None = None) -> int:
    """Run everything and rank; 1 when a correlation lies below the target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where recipe and run are kept; default: a temporary one")
    options = parser.parse_args(arguments)
    shared = Path(os.environ.get("CPT_SHARED") or ROOT.parent / "shared") / "data"
    if not shared.is_dir():
        print(f"skipped: no shared data in {shared}; set CPT_SHARED")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        (folder / "recipes").mkdir(parents=True, exist_ok=True)
        (folder / "recipes" / "merge.yaml").write_text(recipe(shared))
        began = time.monotonic()
        if not cpt(folder, "run", "recipe=merge", "name=merge"):
            return 1
        print(f"all runs: {time.monotonic() - began:.0f} s", flush=True)
        return compare(folder / "runs" / "merge")


def recipe(shared: Path) -> str:
    """One law stage whose averages stand for all mixtures of equal shares, and a run for each pair and triple."""
    sources = "\n".join(SOURCE.format(name=n, folder=shared / "corpora" / f) for n, f in CORPORA.items())
    subsets = [c for size in range(1, len(CORPORA) + 1) for c in itertools.combinations(CORPORA, size)]
    text = HEAD.format(
        models=shared / "models",
        sources=sources,
        names=", ".join(CORPORA),
        first=run_name(MIXED[0]),
        mixtures=", ".join(shares(c) for c in subsets),
        tokens=TOKENS,
    )
    return text + "".join(RUN.format(name=run_name(p), tokens=TOKENS, mixture=shares(p)) for p in MIXED)


def run_name(corpora: tuple[str, ...]) -> str:
    """Of the stage that is trained on several corpora."""
    return "on-" + "-".join(corpora)


def shares(corpora: tuple[str, ...]) -> str:
    """Equal shares, as a recipe writes them."""
    return "{" + ", ".join(f"{name}: {1 / len(corpora):.6g}" for name in corpora) + "}"


def compare(run_dir: Path) -> int:
    """Print the losses and the correlations; 1 when one lies below the target."""
    from scipy.stats import spearmanr

    from cpt.base.events import stage_events
    from cpt.evaluate.collect import measurements
    from cpt.stages import state

    def events(stage: str):  # type: ignore[no-untyped-def]
        return list(stage_events(state.home(run_dir / "stages" / stage)))

    averaged: dict[tuple[str, ...], dict[str, float]] = {}
    for event in events("mix-merged"):
        if event["kind"] == "eval":
            found = {name: value["loss"] for name, value in event["losses"].items()}
            averaged[tuple(n for n in CORPORA if n in event["mixture"])] = found
    trained = {}
    for mixed in MIXED:
        last = measurements(events(run_name(mixed)))[-1]
        trained[mixed] = {name: last.losses[name].loss for name in CORPORA}
    missed = 0
    print(f"\n  {'corpora':<28}" + "".join(f"{name:>20}" for name in CORPORA) + "    (average, trained)")
    for mixed in MIXED:
        cells = "".join(f"{averaged[mixed][n]:>12.3f} {trained[mixed][n]:>7.3f}" for n in CORPORA)
        print(f"  {' + '.join(mixed):<28}{cells}")
    for name in (*CORPORA, "mean of all"):
        values = [[_loss(losses[mixed], name) for mixed in MIXED] for losses in (averaged, trained)]
        spread = max(values[0]) - min(values[0])
        above = statistics.mean(a - b for a, b in zip(*values, strict=True))
        text = f"{name:<12} averages lie {above:+.3f} nats from runs, range {spread:.3f} nats: "
        if spread < TIE:
            print(text + f"not ranked, all lie within {TIE:g} nats")
            continue
        rank = float(spearmanr(*values).statistic)
        missed += rank < TARGET
        print(text + f"Spearman {rank:.3f} (at least {TARGET:g}) {'ok' if rank >= TARGET else 'MISSED'}")
    return int(missed > 0)


def _loss(losses: dict[str, float], name: str) -> float:
    return losses[name] if name in losses else statistics.mean(losses.values())


if __name__ == "__main__":
    sys.exit(main())
