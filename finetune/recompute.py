"""Gradient checkpointing with little work for the host: a layer keeps its input and runs again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states


def recompute(parameters: Sequence[nn.Parameter], random: bool, function: Callable, *inputs: Any) -> torch.Tensor:
    """`function(*inputs)` that keeps nothing of its inside for the backward pass and computes it again there.

    What `torch.utils.checkpoint` does, which takes two Python calls more for every tensor that autograd would keep.
    Here gradients of the parameters come out of the backward pass as those of the inputs do, so that hooks of DDP and
    DeepSpeed see them once, in order.

    Args:
        parameters: all that `function` uses; those that need gradients get them.
        random: whether it draws random numbers (dropout); then it draws the same ones again.
        function: gives one tensor. Tensors in `inputs` may need gradients, tensors that it holds itself may not.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return _Recompute.apply(function, random, len(inputs), *inputs, *trained)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function: Callable, random: bool, count: int, *tensors: Any) -> torch.Tensor:
        inputs = tensors[:count]
        ctx.function = function
        first = next(t for t in inputs if isinstance(t, torch.Tensor))
        ctx.device = first.device
        kind = ctx.device.type
        enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        ctx.autocast = torch.get_autocast_dtype(kind) if enabled else None
        ctx.rng_state = _rng_state(first) if random else None
        ctx.needs_grad = [isinstance(t, torch.Tensor) and t.requires_grad for t in inputs]
        ctx.others = {place: t for place, t in enumerate(inputs) if not isinstance(t, torch.Tensor)}
        ctx.save_for_backward(*(t for t in inputs if isinstance(t, torch.Tensor)), *tensors[count:])
        return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        saved = iter(ctx.saved_tensors)
        places = range(len(ctx.needs_grad))
        inputs = [ctx.others[place] if place in ctx.others else next(saved) for place in places]
        parameters = list(saved)
        inputs = [t.detach().requires_grad_() if n else t for t, n in zip(inputs, ctx.needs_grad, strict=True)]
        first = next(t for t in inputs if isinstance(t, torch.Tensor))
        after = None if ctx.rng_state is None else _rng_state(first)
        _set_rng_state(ctx.device, ctx.rng_state)
        autocast = torch.autocast(ctx.device.type, dtype=ctx.autocast) if ctx.autocast else nullcontext()
        with torch.enable_grad(), autocast:
            output = ctx.function(*inputs)
        _set_rng_state(ctx.device, after)
        wanted = [t for t, needed in zip(inputs, ctx.needs_grad, strict=True) if needed]
        grads = iter(torch.autograd.grad(output, [*wanted, *parameters], grad, allow_unused=True))
        return None, None, None, *(next(grads) if needed else None for needed in ctx.needs_grad), *grads


def _rng_state(tensor: torch.Tensor) -> torch.Tensor:
    """State of the generator that random numbers on the tensor's device come from, whatever kind of device it is."""
    return torch.get_rng_state() if tensor.device.type == "cpu" else get_device_states(tensor)[1][0]


def _set_rng_state(device: torch.device, state: torch.Tensor | None) -> None:
    if state is not None and device.type == "cpu":
        torch.set_rng_state(state)
    elif state is not None:
        set_device_states([device.index], [state], device_type=device.type)
