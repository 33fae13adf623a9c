"""DeepSpeed's ZeRO-1 and ZeRO-2 step in less memory and fewer kernels than it takes by itself.

Its step takes the gradients of one parameter group after another: a flat copy, and another in float32. Groups of a
limited size keep these copies small. Before that it looks for overflow and takes norms, both parameter by parameter,
and in a run of one process all gradients travel through buckets for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import TrainerCallback

GROUP_ELEMENTS = 2**26  # 384 MiB of copies in bfloat16 runs; checkpoints are divided likewise


def without_communication(config: dict) -> dict:
    """DeepSpeed configuration for a run of one process: ZeRO-1 and 2 without what only serves communication.

    Gradients stay where they are rather than travel through buckets, and the host does not wait for the device at
    every bucket (`overlap_comm`). Other stages, and optimizer states on the CPU, which need the buckets, stay as is.
    """
    zero = config.get("zero_optimization", {})
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    if zero.get("stage") not in (1, 2) or offloaded:
        return config
    return {**config, "zero_optimization": {**zero, "overlap_comm": False, "contiguous_gradients": False}}


def split_param_groups(optimizer: torch.optim.Optimizer, most: int) -> None:
    """Divide an optimizer's parameter groups, in place, into groups of at most `most` elements or one parameter."""
    groups = []
    for group in optimizer.param_groups:
        size = most + 1
        for parameter in group["params"]:
            if size + parameter.numel() > most:
                groups.append({**group, "params": []})
                size = 0
            groups[-1]["params"].append(parameter)
            size += parameter.numel()
    optimizer.param_groups[:] = groups


class LightZeroStep(TrainerCallback):
    """Puts `use_one_norm` and `leave_out_reduction` in place when training begins."""

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):  # noqa: ARG002
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        optimizer = getattr(optimizer, "optimizer", optimizer)
        if isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.cpu_offload:
            use_one_norm(optimizer)
            if args.world_size == 1 and not optimizer.contiguous_gradients:
                leave_out_reduction(optimizer)


def use_one_norm(optimizer) -> None:
    """Let the one norm of all gradients, which clipping needs anyway, also find their overflow.

    DeepSpeed (0.19.8) copies every gradient to float64 for its norm, 4 GiB for the embeddings of 2.5, and before that
    takes minimum and maximum of each to see whether it is finite. Norms accumulated in float32 without a copy, all at
    once, are as good for clipping, and they are not finite where a gradient is not: then DeepSpeed skips the step just
    the same.

    Reaches into `DeepSpeedZeroOptimizer`, and uses `torch._foreach_norm`. To go when DeepSpeed takes norms without
    copies.
    """
    if not (optimizer.compute_grad_norm and optimizer.check_grad_overflow):
        return
    combine = optimizer.get_grad_norm_direct

    def norm(gradients: Iterable[torch.Tensor], params: list[nn.Parameter], norm_type: float = 2) -> torch.Tensor:
        gradients = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        if not gradients:
            return combine(gradients, params, norm_type)
        norms = torch.stack(torch._foreach_norm(gradients, norm_type, dtype=torch.float32))
        # DeepSpeed's own function adds up over ranks; the norm of a norm is itself.
        return combine([torch.linalg.vector_norm(norms, ord=norm_type)], params[:1], norm_type)

    optimizer.get_grad_norm_direct = norm
    optimizer.check_overflow = lambda *_, **__: None


def leave_out_reduction(optimizer) -> None:
    """Let a run of one process keep its gradients: DeepSpeed (0.19.8) would flatten them, sum them up over the one
    process, divide by one, and copy every one of them back.

    Reaches into `DeepSpeedZeroOptimizer`. To go when DeepSpeed does without by itself.
    """
    optimizer.buffered_reduce_fallback = lambda *_, **__: None
