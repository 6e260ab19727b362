"""The functions with a jump by which a latent is active or not, and the gradients that stand in for their missing ones.

Owns the straight-through estimators; must not know kinds or weights.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def jump_relu(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """The function p · [p > θ], with a pseudo-derivative by θ (Rajamanoharan et al. 2024, arXiv:2407.14435).

    d/dθ = -(θ / ε) · [|p - θ| < ε / 2] for the bandwidth ε. Both tensors have the same shape, θ > 0.
    """
    value: Tensor = _JumpReLU.apply(pre, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return value


def heaviside(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """The function [p > θ], with the pseudo-derivative -(1 / ε) · [|p - θ| < ε / 2] by θ (there, too); none by p."""
    value: Tensor = _Heaviside.apply(pre, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return value


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        return slope * (pre > threshold), -(threshold / ctx.bandwidth) * near * slope, None


class _Heaviside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        return None, -(near / ctx.bandwidth) * slope, None
