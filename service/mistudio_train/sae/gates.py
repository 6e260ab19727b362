"""The functions with a jump by which a latent is active or not, in as few passes over all places as they need.

Owns them, their gradients and the estimates where there are none; must not know kinds or weights. Conditions are
kept as numbers where they multiply: a product with booleans takes seven times as long.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .kernels import fused
from .sparse import Active


def jump_relu(active: Active, values: Tensor, threshold_F: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """The function p · [p > θ] at the active places, and at how many p > θ, as a number with a gradient by θ.

    The pseudo-derivatives are of Rajamanoharan et al. 2024 (arXiv:2407.14435), for the bandwidth ε: of the function
    -(θ / ε) · [|p - θ| < ε / 2] by θ, of the number -(1 / ε) · [|p - θ| < ε / 2] by θ, and none by p. θ > 0.
    """
    found: tuple[Tensor, Tensor] = _JumpReLU.apply(active, values, threshold_F, bandwidth)  # type: ignore[no-untyped-call]
    return found


def gate(active: Active, values: Tensor, gain_F: Tensor, offset_F: Tensor) -> tuple[Tensor, Tensor]:
    """The functions ReLU(p), and [p > 0] · ReLU(m) for m = gain · p + offset, at the active places."""
    found: tuple[Tensor, Tensor] = _Gate.apply(active, values, gain_F, offset_F)  # type: ignore[no-untyped-call]
    return found


@fused
def _opened(values: Tensor, gain: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    magnitude = torch.addcmul(offset, gain, values)
    shown = (magnitude > 0).to(values.dtype).mul_((values > 0).to(values.dtype))
    return values.relu(), magnitude.mul_(shown).to(values.dtype)


@fused
def _opened_backward(
    values: Tensor, slope_of_gate: Tensor, slope: Tensor, gain: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    is_open = (values > 0).to(values.dtype)
    shown = (torch.addcmul(offset, gain, values) > 0).to(values.dtype).mul_(is_open)
    slope = slope * shown
    return torch.addcmul(slope_of_gate * is_open, slope, gain).to(values.dtype), slope, slope * values


class _Gate(Function):
    @staticmethod
    def forward(ctx: Any, active: Active, values: Tensor, gain_F: Tensor, offset_F: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(values, gain_F, offset_F)
        ctx.active = active
        return _opened(values, active.per_place(gain_F), active.per_place(offset_F))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_of_gate: Tensor, slope: Tensor) -> tuple[Tensor | None, ...]:
        values, gain_F, offset_F = ctx.saved_tensors
        gain, offset = ctx.active.per_place(gain_F), ctx.active.per_place(offset_F)
        value_slope, offset_slope, gain_slope = _opened_backward(values, slope_of_gate, slope, gain, offset)
        return None, value_slope, ctx.active.sum_by_latent(gain_slope), ctx.active.sum_by_latent(offset_slope)


@fused
def _jumped(values: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    above = (values > threshold).to(values.dtype)
    return values * above, above.sum(dtype=threshold.dtype)


@fused
def _jumped_backward(
    values: Tensor, slope: Tensor, threshold: Tensor, bandwidth: float
) -> tuple[Tensor, Tensor, Tensor]:
    above = (values > threshold).to(values.dtype)
    near = (values > threshold - bandwidth / 2) & (values < threshold + bandwidth / 2)
    return slope * above, slope * near.to(slope.dtype), near


class _JumpReLU(Function):
    @staticmethod
    def forward(
        ctx: Any, active: Active, values: Tensor, threshold_F: Tensor, bandwidth: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(values, threshold_F)
        ctx.active, ctx.bandwidth = active, bandwidth
        return _jumped(values, active.per_place(threshold_F))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, slope_of_number: Tensor) -> tuple[Tensor | None, ...]:
        values, threshold_F = ctx.saved_tensors
        threshold = ctx.active.per_place(threshold_F)
        value_slope, near_slope, near = _jumped_backward(values, slope, threshold, ctx.bandwidth)
        near_slope_F, near_F = ctx.active.sum_by_latent(near_slope), ctx.active.count_by_latent(near)
        threshold_slope_F = -(threshold_F * near_slope_F + slope_of_number * near_F) / ctx.bandwidth
        return None, value_slope, threshold_slope_F, None
