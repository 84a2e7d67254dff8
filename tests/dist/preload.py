"""Imported once by the process that test ranks are forked from. Computes nothing: threads do not survive a fork."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from cpt.engine import device

device.install()

import megatron.core.dist_checkpointing  # noqa: E402
import megatron.core.distributed  # noqa: E402
import megatron.core.models.gpt  # noqa: E402
import megatron.core.optimizer  # noqa: E402
import megatron.core.pipeline_parallel  # noqa: F401, E402
import safetensors.torch  # noqa: F401, E402

from cpt.checkpoint import hf  # noqa: F401, E402
from cpt.engine import distributed  # noqa: F401, E402
from cpt.engine import megatron as _megatron  # noqa: F401, E402
