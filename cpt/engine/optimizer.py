"""AdamW as Megatron-core's optimizers want it: the step is kept in the parameter group, the update is one fused call.

torch's own AdamW keeps a step for every parameter, which the layout-free form of the distributed optimizer cannot load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from cpt.plan.model import Parallel
from cpt.plan.types import Optimizer


class AdamW(torch.optim.Optimizer):
    """AdamW on torch's fused kernels, CPU or CUDA.

    Source:
        Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode and not capturable, "weight decay is decoupled, CUDA graphs are not used"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            group["step"] += 1
            params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            if not params:
                continue
            for p in params:
                self.initialize_state(p)
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.tensor(float(group["step"]), device=params[0].device)] * len(params),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=None,
                found_inf=None,
            )

    def initialize_state(self, param: torch.Tensor) -> None:
        """Zero moments for a parameter that has none yet."""
        if not self.state[param]:
            self.state[param] = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}


def register() -> None:
    """Make Megatron-core build this AdamW, unless Transformer Engine or Apex brings a faster one of the same form."""
    import megatron.core.optimizer as package
    from megatron.core.optimizer import distrib_optimizer as distributed

    if not getattr(package, "USING_PYTORCH_OPTIMIZER", False):
        return
    modules: tuple[Any, ...] = (package, distributed)
    for module in modules:
        module.Adam = AdamW
    modules[0].USING_PYTORCH_OPTIMIZER = False
    # Both flags only decide where the step is looked for: in the group.
    modules[1].HAVE_APEX_OR_TE = True
    modules[1].USING_APEX_OPTIMIZER = True


def build(chunks: list[torch.nn.Module], options: Optimizer, parallel: Parallel, precision: str) -> Any:
    """Megatron-core's optimizer over the DDP-wrapped chunks, with moments allocated and lr 0."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    register()
    config = OptimizerConfig(
        optimizer="adam",
        lr=0.0,
        min_lr=0.0,
        weight_decay=options.weight_decay,
        adam_beta1=options.betas[0],
        adam_beta2=options.betas[1],
        adam_eps=options.eps,
        clip_grad=options.clip,
        bf16=precision == "bf16",
        params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(config, chunks)
    for part in parts(optimizer):
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                part.optimizer.initialize_state(param)
    apply_options(optimizer, options)
    return optimizer


def parts(optimizer: Any) -> list[Any]:
    """The single optimizers under Megatron-core's chained one, without stubs."""
    chained = getattr(optimizer, "chained_optimizers", None)
    return [p for p in (chained if chained is not None else [optimizer]) if p.optimizer is not None]


def apply_options(optimizer: Any, options: Optimizer) -> None:
    """Put the plan's options on every group; call it after a checkpoint's groups were loaded over them.

    Norms and biases (`wd_mult` 0) have no weight decay.
    """
    for group in optimizer.param_groups:
        group["betas"] = tuple(options.betas)
        group["eps"] = options.eps
        group["weight_decay"] = options.weight_decay * group.get("wd_mult", 1.0)
    for part in parts(optimizer):
        part.config.clip_grad = options.clip
