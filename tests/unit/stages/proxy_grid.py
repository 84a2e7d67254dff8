"""A run folder with the finished proxies of a law stage, their events made from known laws."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cpt.base.files import write_json
from cpt.base.records import to_json
from cpt.laws.dcpt import DCPT
from cpt.laws.rows import points
from cpt.plan.model import ModelConfig
from cpt.plan.types import Job, Lr, RunPlan, StagePlan
from cpt.stages import state
from tests.unit.stages import plans

STEP = 1024 * 1000  # tokens of a step
STEPS, EVERY = 60, 10
RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
# One size: the N term is part of E. Base losses are those of the general law at all-general, a bit above.
DOMAIN = {"E": 1.3, "B": 300.0, "beta": 0.34, "eta": 0.45, "C": 0.28, "eps": 0.08, "gamma": 0.55}
GENERAL = {"E": 2.0, "B": 250.0, "beta": 0.33, "eta": 0.30, "C": 0.30, "eps": 0.05, "gamma": 0.60}
BASE = {"domain": 3.6, "general": 3.0}
MODEL = ModelConfig(
    family="llama",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    vocab_size=1024,
    max_position_embeddings=256,
    norm_eps=1e-5,
)


def truth(values: Mapping[str, float], tokens: float, share: float) -> float:
    """The law that the events are made from [nats/token]."""
    law = DCPT(has_n=False)
    return float(law.loss(law.fitted(values)[None], points(tokens=tokens, share=share))[0][0, 0])


def losses(ratio: float, tokens: float) -> dict[str, dict[str, float]]:
    """What an `eval` event holds: `pubmed` is the domain; `web` and `wiki` lie 0.1 above and below the general loss."""
    general = truth(GENERAL, tokens, 1 - ratio) if tokens else BASE["general"]
    domain = truth(DOMAIN, tokens, ratio) if tokens else BASE["domain"]
    found = {"pubmed": domain, "web": general + 0.1, "wiki": general - 0.1}
    return {
        name: {"loss": loss, "bpb": 1.0, "tokens": 1000, "bytes": 4000, "stderr": 0.01} for name, loss in found.items()
    }


def make(runs: Path, *, options: Mapping[str, Any] | None = None, how: str = "runs") -> tuple[RunPlan, Path]:
    """Plan and folder of a run whose proxies are done and whose law stage `mix` is next."""
    whole: dict[str, Any] = {
        "target": "domain",
        "domain": {"pubmed": 1.0},
        "general": {"web": 0.5, "wiki": 0.5},
        "ratios": list(RATIOS),
        "tokens": STEPS * STEP,
        "every": EVERY * STEP,
        "warmup": 5 * STEP,
        "target_tokens": STEPS * STEP,
        "target_params": MODEL.num_parameters,
        "tolerance": 0.02,
        "draws": 20,
        "how": how,
    } | dict(options or {})
    stages = {}
    for ratio in RATIOS if how == "runs" else ():
        stages[f"mix-r{100 * ratio:g}"] = _proxy(f"mix-r{100 * ratio:g}", mixture(ratio))
    for source in ("pubmed", "web", "wiki") if how == "merge" else ():
        stages[f"mix-{source}"] = _proxy(f"mix-{source}", {source: 1.0})
    if how == "merge":
        mixtures = [mixture(ratio) for ratio in RATIOS]
        stages["mix-merged"] = StagePlan(
            name="mix-merged", kind="merged", parent="base", group="mix", options={"mixtures": mixtures}
        )
    law = StagePlan(name="mix", kind="law", parent="base", options=whole, after=tuple(stages))
    plan = replace(plans.plan(*stages.values(), law, runs=str(runs)), model=MODEL)
    run = runs / plan.name
    for stage in stages.values():
        _write(run, stage, [])
    for name, stage in stages.items():
        if stage.train is not None:
            events = [_eval(0, "start", losses(0.0, 0))]
            ratio = stage.train.mixture.get("pubmed", 0.0)
            steps = range(EVERY, STEPS + 1, EVERY)
            events += [_eval(n, "end" if n == STEPS else "during", losses(ratio, n * STEP)) for n in steps]
            _write(run, plan.stages[name], events)
        else:
            many = enumerate(RATIOS, 1)
            same = {"tokens": STEPS * STEP}
            found = [(i, r, losses(r, STEPS * STEP)) for i, r in many]
            _write(run, stage, [{**_eval(i, "during", one), **same, "mixture": mixture(r)} for i, r, one in found])
    (run / "stages" / "mix" / "attempt_1").mkdir(parents=True)
    write_json(run / "plan.json", to_json(plan))
    return plan, run


def mixture(ratio: float) -> dict[str, float]:
    """Shares of the sources at a domain share."""
    found = {"pubmed": ratio, "web": (1 - ratio) / 2, "wiki": (1 - ratio) / 2}
    return {name: share for name, share in found.items() if share > 0}


def job(run: Path) -> Job:
    """The job of the law stage."""
    return Job(
        run_dir=str(run), stage="mix", attempt=1, start="hf", parent=None, resume=None, corpora={}, tokenizer=None
    )


def _proxy(name: str, shares: dict[str, float]) -> StagePlan:
    lr = Lr(schedule="constant", options={"peak": 1e-3}, span=STEPS, points=(1e-3, 1e-3, 1e-3))
    train = plans.train(STEPS, mixture=shares, lr=lr, tokens=STEPS * STEP)
    return StagePlan(name=name, kind="train", parent="base", keep=("weights",), train=train, group="mix")


def _eval(step: int, when: str, found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "t": 0.0,
        "kind": "eval",
        "step": step,
        "tokens": step * STEP,
        "when": when,
        "losses": found,
        "seconds": 1.0,
    }


def _write(run: Path, stage: StagePlan, events: list[dict[str, Any]]) -> None:
    folder = run / "stages" / stage.name
    (folder / "attempt_1").mkdir(parents=True, exist_ok=True)
    start = {"t": 0.0, "kind": "stage_start", "stage": stage.name, "attempt": 1, "step": 0}
    (folder / "attempt_1" / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in [start, *events]))
    steps = stage.train.steps if stage.train else 0
    state.write(folder, state.State(status=state.DONE, attempt=1, step=steps, fingerprint=stage.fingerprint))


def rewrite(run: Path, name: str, change: Any) -> None:
    """Change the events of a proxy: `change` takes and gives the list."""
    path = run / "stages" / name / "attempt_1" / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(e) + "\n" for e in change(events)))


def best_ratio(tolerance: float) -> float:
    """The ratio with the lowest domain loss within the tolerance, from the true laws on a fine grid."""
    ratios = np.linspace(0, 1, 20001)
    law, found = DCPT(has_n=False), []
    for values, shares in ((GENERAL, 1 - ratios), (DOMAIN, ratios)):
        found.append(law.loss(law.fitted(values)[None], points(tokens=STEPS * STEP, share=shares))[0][0])
    inside = found[0] <= BASE["general"] * (1 + tolerance)
    return float(ratios[inside][np.argmin(found[1][inside])])
