"""Megatron-core on CUDA + nccl or CPU + gloo: model, optimizer, loop. Knows neither `checkpoint` nor `report`."""

import logging
import warnings

# On every rank Megatron-core and torch warn about missing kernels and names to come, where nobody can act on it;
# `cpt doctor` says once what is missing. Here, because it must hold before the first import of Megatron-core.
for _module in (r"megatron\.", r"torch\.distributed"):
    for _category in (UserWarning, DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=_category, module=_module)
logging.getLogger("megatron.core").setLevel(logging.ERROR)
