"""Differences between the versions of Megatron-core that the engine works with (0.16 to 0.19), in one place."""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec


def mlp_spec(module: type[MLP], submodules: Any) -> Any:
    """An MLP in a layer's description: a spec up to 0.16, a builder later."""
    builder: Any = getattr(module, "as_mlp_submodule", None)
    if builder is not None:
        return functools.partial(builder, submodules=submodules)
    return ModuleSpec(module=module, submodules=submodules)
