"""Validation losses by source with the engine's own forward pass; the same numbers for every layout."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from cpt.base import pulse
from cpt.data.validation import ValidSet
from cpt.engine import megatron
from cpt.engine.ports import Engine


def validation_losses(
    engine: Engine,
    sets: Mapping[str, ValidSet],
    *,
    micro_batch_size: int,
    dp_rank: int,
    stopped: Callable[[], bool],
) -> dict[str, dict[str, float]] | None:
    """Loss of every source on its held-out documents. Collective.

    Args:
        sets: by source.
        stopped: asked between batches, gives all ranks the same answer; True abandons the measurement.

    Returns:
        By source: loss [nats/token], bpb [bits/byte], tokens, bytes, stderr [nats/token] (over windows), seconds.
        None when it was abandoned.
    """
    found = {}
    for name, valid in sets.items():
        start = time.monotonic()
        sums = _sums(engine, valid, micro_batch_size, dp_rank, stopped)
        if sums is None:
            return None
        nats, tokens, squares, windows = sums
        mean = nats / max(tokens, 1.0)
        # Of the mean over windows, each weighted by its tokens (ratio estimator).
        stderr = math.sqrt(max(squares, 0.0)) / max(tokens, 1.0) * math.sqrt(windows / max(windows - 1.0, 1.0))
        found[name] = {
            "loss": mean,
            "bpb": nats / math.log(2) / max(valid.num_bytes, 1),
            "tokens": int(tokens),
            "bytes": valid.num_bytes,
            "stderr": stderr,
            "seconds": time.monotonic() - start,
        }
    return found


def _sums(
    engine: Engine, valid: ValidSet, micro_batch_size: int, dp_rank: int, stopped: Callable[[], bool]
) -> tuple[float, float, float, float] | None:
    """Nats, tokens, sum over windows of (nats - mean · tokens)², and number of windows."""
    dp = engine.parallel.dp
    # One call does a few micro-batches of every model copy; copies without windows left get ones that do not count.
    rows = micro_batch_size * 4 * engine.parallel.pp
    nats = torch.zeros(len(valid), dtype=torch.float64, device=engine.device)
    tokens = torch.zeros_like(nats)
    for first in range(0, len(valid), rows * dp):
        if stopped():
            return None
        pulse.current.tick()
        left = min(rows, -(-(len(valid) - first) // dp))
        left = -(-left // micro_batch_size) * micro_batch_size  # equal on all copies, whole micro-batches
        here = np.arange(first + dp_rank * left, first + (dp_rank + 1) * left)
        inside = here < len(valid)
        index = np.where(inside, here, 0)
        mask = valid.loss_mask_NS[index] * inside[:, None]
        batches = megatron.microbatches(
            valid.tokens_NS1[index],
            mask,
            None if valid.position_ids_NS is None else valid.position_ids_NS[index],
            None if valid.segment_ids_NS is None else valid.segment_ids_NS[index],
            micro_batch_size=micro_batch_size,
            device=engine.device,
        )
        losses = megatron.evaluate(engine, batches)
        if losses is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
            where = torch.as_tensor(here[inside], device=engine.device)
            counted = torch.as_tensor(inside, device=engine.device)
            nats.index_add_(0, where, losses.sum_B[counted].double())
            tokens.index_add_(0, where, losses.tokens_B[counted].double())
    both = torch.stack((nats, tokens))
    dist.all_reduce(both)
    nats, tokens = both
    mean = nats.sum() / tokens.sum().clamp(min=1)
    return float(nats.sum()), float(tokens.sum()), float(((nats - mean * tokens) ** 2).sum()), float(len(valid))
