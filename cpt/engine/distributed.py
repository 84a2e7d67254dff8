"""Starts and ends the process groups of a rank, and Megatron-core's layout of them."""

from __future__ import annotations

import datetime
import os
import random

import numpy as np
import torch
import torch.distributed as dist

from cpt.engine import device
from cpt.plan.model import Parallel


def init(
    parallel: Parallel,
    rank: int,
    world_size: int,
    local_rank: int = 0,
    seed: int = 0,
    timeout_s: float = 600.0,
    collective_s: float | None = None,
    address: str | None = None,
) -> torch.device:
    """Join the other ranks and build the tp, pp and dp groups.

    Args:
        parallel: the layout; its `world_size` must be the number of ranks.
        local_rank: number of this rank on its machine; chooses the GPU.
        seed: of the random states (dropout and the like); initial weights have their own, see `build`.
        timeout_s: how long to wait for all ranks to join [s].
        collective_s: how long a collective may wait for a dead or slow rank before it fails [s]; None = `timeout_s`.
        address: `host:port` of rank 0; None reads `MASTER_ADDR` and `MASTER_PORT` as torchrun sets them.

    Returns:
        The device this rank computes on.
    """
    from megatron.core import parallel_state
    from torch.distributed import distributed_c10d

    assert world_size == parallel.world_size, f"{world_size} ranks for a layout of {parallel.world_size}"
    if device.has_cuda():
        # Some sites show each task its own GPU only, which is number 0 to all of them.
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    where = device.install()
    host = address.rsplit(":", 1)[0] if address else os.environ.get("MASTER_ADDR", "")
    if host in ("127.0.0.1", "localhost") and os.path.exists("/sys/class/net/lo"):
        # Gloo binds to what the host name resolves to, which need not be reachable on a laptop or in a container.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        device.backend(),
        init_method=f"tcp://{address}" if address else "env://",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    collective_s = timeout_s if collective_s is None else collective_s
    if collective_s != timeout_s:
        distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=collective_s))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vp if parallel.vp > 1 else None,
        distributed_timeout_minutes=collective_s / 60,
        create_gloo_process_groups=True,  # saving a distributed optimizer gathers over them
    )
    set_seeds(seed)
    return where


def place() -> tuple[int, int, int]:
    """(rank, world size, rank on this machine) as torchrun and our launchers put it in the environment."""
    return (
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
        int(os.environ.get("LOCAL_RANK", "0")),
    )


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()


def set_seeds(seed: int) -> None:
    """Seed Python, numpy and torch alike on all ranks, and Megatron-core's per-tensor-rank states."""
    from megatron.core import tensor_parallel

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def shutdown() -> None:
    """Leave all groups. Safe to call when `init` failed half way or was never called."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.destroy_global_memory_buffer()
    if dist.is_initialized():
        dist.destroy_process_group()


def is_last_stage() -> bool:
    """Whether this rank holds the end of the model, where losses are."""
    from megatron.core import parallel_state

    return (
        parallel_state.get_pipeline_model_parallel_rank() == parallel_state.get_pipeline_model_parallel_world_size() - 1
    )


def dp_rank() -> int:
    """Number of this rank's model copy."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_rank()
