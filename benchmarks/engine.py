"""Tokens/s of the engine against a bare Megatron-core loop and against transformers, on this machine's two cores.

    python -m benchmarks.engine [--rounds 8] [--json]

A 6-layer, 256-wide Llama at sequence 256. Contestants run in turns in one run, so that other load meets all alike; the
ratio of two is the median over rounds of the ratio within a round. The engine and the bare loop use the same layers,
once as one process with two threads and once as two model copies; transformers uses one thread and two. Best counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from cpt.plan.model import ModelConfig, Parallel
from cpt.plan.types import Optimizer

MODEL = ModelConfig(
    family="llama",
    num_layers=6,
    hidden_size=256,
    ffn_hidden_size=688,
    num_attention_heads=4,
    num_query_groups=4,
    head_dim=64,
    vocab_size=2048,
    max_position_embeddings=256,
    norm_eps=1e-5,
)
SEQ, GLOBAL_BATCH, LR = 256, 16, 1e-3
OPTIMIZER = Optimizer()
# name -> (loop, model copies, threads of each, micro-batch size)
CONTESTANTS: dict[str, tuple[str, int, int, int]] = {
    "engine dp2": ("engine", 2, 1, 8),
    "engine dp1": ("engine", 1, 2, 8),
    "megatron dp2": ("megatron", 2, 1, 8),
    "megatron dp1": ("megatron", 1, 2, 8),
    "transformers 1 thread": ("transformers", 1, 1, 16),
    "transformers 2 threads": ("transformers", 1, 2, 16),
}
TARGETS = {("engine", "megatron"): 0.97, ("engine", "transformers"): 1.0}
Step = Callable[[Any], float]  # tokens [B, S + 1] of this copy -> loss


def engine_step(copies: int, micro: int) -> Step:
    """One step through the calls that the training loop makes."""
    from cpt.engine import megatron

    engine = megatron.build(MODEL, Parallel(dp=copies), precision="fp32", optimizer=OPTIMIZER)

    def step(tokens_BS1: Any) -> float:
        batches = megatron.microbatches(tokens_BS1, micro_batch_size=micro, device=engine.device)
        losses = megatron.forward_backward(engine, batches)
        sums, counts = megatron.reduce_by_source(engine, losses, [0] * len(tokens_BS1), 1)
        megatron.update(engine, LR, megatron.grad_norm(engine))
        return sums[0] / counts[0]

    return step


def megatron_step(copies: int, micro: int) -> Step:
    """The least that trains with Megatron-core: its schedule, its gradient reduction, its optimizer step."""
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from cpt.engine import megatron

    engine = megatron.build(MODEL, Parallel(dp=copies), precision="fp32", optimizer=OPTIMIZER)
    run = get_forward_backward_func()
    assert engine.optimizer is not None
    for group in engine.optimizer.param_groups:
        group["lr"] = LR

    def forward(batches: Any, model: Any) -> Any:
        tokens = next(batches)
        losses = model(tokens[:, :-1], None, None, labels=tokens[:, 1:].contiguous())
        count = torch.tensor(losses.numel(), dtype=torch.int32)
        return losses, lambda losses: ((total := losses.sum()), count, total.detach())

    def step(tokens_BS1: Any) -> float:
        assert engine.optimizer is not None
        cut = torch.as_tensor(tokens_BS1).split(micro)
        for chunk in engine.chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        engine.optimizer.zero_grad()
        totals = run(
            forward_step_func=forward,
            data_iterator=iter(cut),
            model=engine.chunks,
            num_microbatches=len(cut),
            seq_length=SEQ,
            micro_batch_size=micro,
        )
        engine.optimizer.step()
        return float(sum(totals)) / (len(tokens_BS1) * SEQ)

    return step


def transformers_step(copies: int, micro: int) -> Step:
    """The usual loop: its Llama with torch's attention, fused AdamW, gradient clipping."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from cpt.checkpoint.hf import config_for

    settings = config_for(MODEL)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().train()
    adam = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=OPTIMIZER.betas, weight_decay=OPTIMIZER.weight_decay, fused=True
    )

    def step(tokens_BS1: Any) -> float:
        adam.zero_grad(set_to_none=True)
        loss = model(input_ids=(tokens := torch.as_tensor(tokens_BS1)[:, :-1]), labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip)
        adam.step()
        return float(loss.detach())

    return step


STEPS: dict[str, Callable[[int, int], Step]] = {
    "engine": engine_step,
    "megatron": megatron_step,
    "transformers": transformers_step,
}


def serve(name: str, rank: int, port: int) -> None:
    """A rank of a contestant: reads a number of steps a line, answers with tokens/s."""
    loop, copies, threads, micro = CONTESTANTS[name]
    import numpy as np
    import torch

    torch.set_num_threads(threads)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that nothing a library prints is taken for an answer
    if loop != "transformers":
        from cpt.engine import distributed

        distributed.init(Parallel(dp=copies), rank, copies, address=f"127.0.0.1:{port}")
    step = STEPS[loop](copies, micro)
    rng = np.random.default_rng(0)
    share = GLOBAL_BATCH // copies
    for line in sys.stdin:
        steps = int(line)
        batches = [rng.integers(0, MODEL.vocab_size, (GLOBAL_BATCH, SEQ + 1)) for _ in range(steps)]
        start = time.perf_counter()
        for tokens in batches:
            step(tokens[rank * share : (rank + 1) * share])
        seconds = time.perf_counter() - start
        answers.write(f"{steps * GLOBAL_BATCH * SEQ / seconds}\n")
        answers.flush()


class Contestant:
    """The processes of one contestant, idle until asked."""

    def __init__(self, name: str) -> None:
        _, copies, threads, _ = CONTESTANTS[name]
        port = random.SystemRandom().randrange(10_000, 32_000)  # below those of outgoing connections
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
        self.ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--serve", name, "--rank", str(rank), "--port", str(port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(copies)
        ]

    def run(self, steps: int) -> float:
        """Tokens/s over these steps, of the slowest rank."""
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write(f"{steps}\n")
            rank.stdin.flush()
        answers = [rank.stdout.readline() for rank in self.ranks if rank.stdout is not None]
        if not all(answers):
            raise SystemExit("a contestant ended early")
        return min(float(a) for a in answers)

    def end(self) -> None:
        """Close and wait."""
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.close()
        for rank in self.ranks:
            rank.wait(30)


def measure(rounds: int, steps: int) -> dict[str, list[float]]:
    """Tokens/s of every contestant in every round."""
    contestants = {name: Contestant(name) for name in CONTESTANTS}
    try:
        for contestant in contestants.values():
            contestant.run(2)
        speeds: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(rounds):
            order = list(contestants)[:: 1 if number % 2 else -1]
            for name in order:
                speeds[name].append(contestants[name].run(steps))
        return speeds
    finally:
        for contestant in contestants.values():
            contestant.end()


def best(speeds: dict[str, list[float]], loop: str) -> str:
    """The fastest way of running a loop, by its median."""
    return max((n for n in speeds if CONTESTANTS[n][0] == loop), key=lambda n: statistics.median(speeds[n]))


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; gives 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="steps of each contestant in a round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve, options.rank, options.port)
        return 0
    speeds = measure(options.rounds, options.steps)
    ratios = {}
    for (loop, other), target in TARGETS.items():
        a, b = best(speeds, loop), best(speeds, other)
        ratio = statistics.median(x / y for x, y in zip(speeds[a], speeds[b], strict=True))
        ratios[f"{a} / {b}"] = {"ratio": round(ratio, 3), "target": target}
    medians = {name: round(statistics.median(values)) for name, values in speeds.items()}
    if options.json:
        print(json.dumps({"tokens_per_s": medians, "ratios": ratios}))
    else:
        for name, value in medians.items():
            print(f"{name:24} {value:>8,} tokens/s")
        for name, facts in ratios.items():
            print(f"{name:48} {facts['ratio']:.3f}   wanted ≥ {facts['target']}")
    return int(any(facts["ratio"] < facts["target"] for facts in ratios.values()))


if __name__ == "__main__":
    sys.exit(main())
