"""A run folder as `cpt run` leaves it, made from formulas: plan, states and events of three train stages and an export.

The base stage is trained from scratch on `general`; `domain` reads `medical` with 30 % replay and is stopped once, so
that it has two attempts whose steps overlap; `anneal` falls to zero.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from cpt.base.files import write_json
from cpt.base.records import to_json
from cpt.plan.model import ModelConfig, Parallel
from cpt.plan.types import (
    Base,
    DataOptions,
    Evaluate,
    Lr,
    Optimizer,
    Replay,
    RunPlan,
    Source,
    SourceFacts,
    StagePlan,
    StopIf,
    Tokenizer,
    Train,
)
from cpt.schedules import curve, resolve
from cpt.schedules.join import StageLr

TOKENS_PER_STEP = 4096
START = 1_760_000_000.0


def model() -> ModelConfig:
    return ModelConfig(
        family="llama",
        num_layers=4,
        hidden_size=128,
        ffn_hidden_size=384,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=32,
        vocab_size=4096,
        max_position_embeddings=512,
        norm_eps=1e-5,
        tie_embeddings=True,
    )


def _train(steps: int, mixture: dict[str, float], replay: Replay | None, lr: Lr, tp: int, dp: int) -> Train:
    return Train(
        tokens=steps * TOKENS_PER_STEP,
        steps=steps,
        seq_length=256,
        global_batch_size=16,
        micro_batch_size=4,
        seed=1234,
        precision="fp32",
        mixture=mixture,
        replay=replay,
        lr=lr,
        optimizer=Optimizer(),
        parallel=Parallel(tp=tp, pp=tp, dp=dp),
        evaluate=Evaluate(sources=tuple(NAMES), every_steps=20),
        stop_if=StopIf(source=NAMES[0], loss_rises=0.3) if replay else None,
    )


NAMES = ["general", "medical"]


def plan(runs: Path, names: tuple[str, str] = ("general", "medical"), scratch: bool = True, scale: int = 1) -> RunPlan:
    """The plan of the made run; `scale` makes it longer."""
    general, medical = names
    steps = {"base": 150 * scale, "domain": 120 * scale, "anneal": 50 * scale}
    lrs = resolve(
        [
            _lr("base", steps["base"], {"schedule": "wsd", "peak": 2e-3}),
            _lr("domain", steps["domain"], {"schedule": "infinite", "peak": 1e-3, "counter": "run"}, "base"),
            _lr("anneal", steps["anneal"], {"schedule": "linear", "end": 0}, "domain", keep=True),
        ]
    )
    replay = Replay(share=0.3, sources={general: 1.0})
    trains = {
        "base": _train(steps["base"], {general: 1.0}, None, lrs["base"], 1, 2),
        "domain": _train(steps["domain"], {medical: 1.0}, replay, lrs["domain"], 2, 1),
        "anneal": _train(steps["anneal"], {general: 0.5, medical: 0.5}, None, lrs["anneal"], 2, 1),
    }
    parents = {"base": "base" if not scratch else None, "domain": "base", "anneal": "domain"}
    stages = {
        name: StagePlan(name=name, kind="train", parent=parents[name], keep=("weights",), train=train, fingerprint=name)
        for name, train in trains.items()
    }
    stages["export"] = StagePlan(name="export", kind="convert", parent="anneal", options={"to": "hf"})
    facts = SourceFacts(tokens=2_000_000, documents=4000, bytes=7_000_000, estimated=False, content_hash="ab")
    return RunPlan(
        id="7c1e92" + "0" * 58,
        name="demo-7c1e92",
        recipe="demo",
        base=Base(kind="scratch"),
        model=model(),
        tokenizer=Tokenizer(train_on=(general,), vocab_size=4096),
        sources={name: Source(name=name, facts=facts) for name in names},
        data=DataOptions(),
        stages=stages,
        runs=str(runs),
    )


def _lr(name: str, steps: int, lr: dict, parent: str | None = None, keep: bool = False) -> StageLr:
    return StageLr(name=name, steps=steps, tokens_per_step=TOKENS_PER_STEP, lr=lr, keep_lr=keep, parent=parent)


def loss_of(stage: str, domain: int, u: float) -> float:
    """Validation loss at progress u of a stage, for the general (0) and the medical (1) domain [nats/token]."""
    if stage == "base":
        return (3.6, 5.2)[domain] + (4.7, 3.1)[domain] * math.exp(-6 * u)
    if stage == "domain":
        bump = 0.55 * math.exp(-((u - 0.15) ** 2) / 0.01)
        return 3.6 + 0.12 * u + bump if domain == 0 else 2.4 + 2.8 * math.exp(-5 * u) + 0.3 * bump
    return (3.72 - 0.1 * u, 2.42 - 0.12 * u)[domain]


def make(
    runs: Path,
    names: tuple[str, str] = ("general", "medical"),
    *,
    until: tuple[str, int] | None = None,
    scale: int = 1,
    note: str = "loss spike at step 31: 5.91 against a mean of 3.87",
) -> Path:
    """Write the made run and give its folder. With `until` it ends in that stage at that step, without a word."""
    made = plan(runs, names, scale=scale)
    run = runs / made.name
    run.mkdir(parents=True)
    write_json(run / "plan.json", to_json(made))
    (run / "command.txt").write_text("cpt run recipe=demo\n")
    rng, t = random.Random(1), START
    orchestrator = [{"t": t, "kind": "run_start", "command": "cpt run recipe=demo", "plan_id": made.id}]
    for stage in made.stages.values():
        folder = run / "stages" / stage.name
        folder.mkdir(parents=True)
        stop = until[1] if until and until[0] == stage.name else None
        state = {
            "status": "running" if stop is not None else "done",
            "attempt": 1,
            "step": stop,
            "reason": "",
            "updated": t,
        }
        if stage.train:
            pieces = [(1, 0, stage.train.steps)]
            if stage.name == "domain":
                half = stage.train.steps // 2
                pieces = [(1, 0, half + 7), (2, half, stage.train.steps)]
            for attempt, first, last in pieces:
                if stop is None or first < stop:
                    t = _attempt(folder, stage, names, attempt, first, min(last, stop or last), stop, t, rng, note)
            state |= {"attempt": len(pieces), "step": stop if stop is not None else stage.train.steps}
        write_json(folder / "state.json", {"fingerprint": stage.fingerprint, "reference": None, "guard": None, **state})
        orchestrator.append({"t": t, "kind": "stage", "stage": stage.name, "status": state["status"], "reason": ""})
        if stop is not None:
            break
    else:
        orchestrator.append({"t": t, "kind": "run_end", "exit_code": 0, "reason": "every stage is done"})
    _append(run / "events.jsonl", orchestrator)
    return run


def _attempt(folder, stage, names, attempt, first, last, stop, t, rng, note) -> float:
    train = stage.train
    at = curve(train.lr)
    events = [
        {
            "t": t,
            "kind": "stage_start",
            "stage": stage.name,
            "attempt": attempt,
            "step": first,
            "tokens": train.tokens,
            "steps": train.steps,
            "world_size": train.parallel.world_size,
            "tp": train.parallel.tp,
            "pp": train.parallel.pp,
            "dp": train.parallel.dp,
            "parent": stage.parent,
            "resumed": first > 0,
        }
    ]
    if first == 0:
        events.append(_eval(stage.name, names, 0, "start", 0.0, t))
    replayed = f"{names[0]} (replay)"
    for n in range(first, last):
        t += 0.6 + (0.25 if attempt == 2 and n < first + 3 else 0.0)
        u = (n + 1) / train.steps
        medical = {"base": 0.0, "domain": 0.7, "anneal": 0.5}[stage.name]
        losses = {names[0] if stage.name != "domain" else replayed: loss_of(stage.name, 0, u) + rng.gauss(0, 0.05)}
        if medical:
            losses[names[1]] = loss_of(stage.name, 1, u) + rng.gauss(0, 0.05)
        given = {k: int((n + 1) * TOKENS_PER_STEP * (medical if k == names[1] else 1 - medical)) for k in losses}
        skipped = "NaN in the gradient" if stage.name == "domain" and n == 40 else None
        events.append(
            {
                "t": round(t, 3),
                "kind": "step",
                "step": n + 1,
                "tokens": (n + 1) * TOKENS_PER_STEP,
                "loss": sum(losses.values()) / len(losses) if not skipped else None,
                "lr": at(n),
                "grad_norm": 0.9 + rng.random() * 0.2,
                "tokens_per_s": (6800 if stage.name == "base" else 4700) * (1 + rng.gauss(0, 0.03)),
                "step_s": 0.6,
                "losses": losses,
                "given": given,
                **({"skipped": skipped} if skipped else {}),
                "memory_bytes": 700_000_000,
            }
        )
        if stage.name == "domain" and n == 30:
            events.append({"t": t, "kind": "warning", "text": note, "step": n + 1})
        if (n + 1) % 20 == 0 and n + 1 < train.steps:
            events.append(_eval(stage.name, names, n + 1, "during", u, t))
    if last < train.steps and stop is None:
        events.append({"t": t, "kind": "stop", "reason": "SIGTERM", "step": last})
    if last == train.steps:
        events.append(_eval(stage.name, names, last, "end", 1.0, t))
        path = str(folder / "checkpoints" / f"iter_{last:07d}")
        events.append({"t": t, "kind": "save", "step": last, "path": path, "seconds": 1.2, "phase": "end"})
        events.append({"t": t, "kind": "stage_end", "step": last, "tokens": last * TOKENS_PER_STEP, "seconds": 90.0})
    (folder / f"attempt_{attempt}").mkdir()
    _append(folder / f"attempt_{attempt}" / "events.jsonl", events)
    return t


def _eval(stage: str, names: tuple[str, str], step: int, when: str, u: float, t: float) -> dict:
    losses = {}
    for i, name in enumerate(names):
        loss = loss_of(stage, i, u)
        bpb = loss / math.log(2) / 3.6
        losses[name] = {"loss": loss, "bpb": bpb, "tokens": 40_000, "bytes": 144_000, "stderr": 0.012}
    tokens = step * TOKENS_PER_STEP
    return {"t": t, "kind": "eval", "step": step, "tokens": tokens, "when": when, "losses": losses, "seconds": 1.1}


def _append(path: Path, events: list[dict]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)
