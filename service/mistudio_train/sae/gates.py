"""The functions with a jump by which a latent is active or not, in as few passes over all places as they need.

Owns them, their gradients and the estimates where there are none; must not know kinds or weights. On a CPU a condition
as a matrix of its own takes four times as long as a number that is let through or not, by the gradients of ReLU and of
a clipping: so it is done here.
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
    magnitude = torch.addcmul(offset, gain, values).relu_().to(values.dtype)
    return values.relu(), _where_positive(values, magnitude)


@fused
def _opened_backward(
    values: Tensor, acts: Tensor, slope_of_gate: Tensor, slope: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    slope = _where_positive(acts, slope)
    return _where_positive(values, slope_of_gate).addcmul_(slope, gain), slope, slope * values


class _Gate(Function):
    @staticmethod
    def forward(ctx: Any, active: Active, values: Tensor, gain_F: Tensor, offset_F: Tensor) -> tuple[Tensor, Tensor]:
        gates, acts = _opened(values, active.per_place(gain_F), active.per_place(offset_F))
        ctx.save_for_backward(values, acts, gain_F)
        ctx.active = active
        return gates, acts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_of_gate: Tensor, slope: Tensor) -> tuple[Tensor | None, ...]:
        values, acts, gain_F = ctx.saved_tensors
        slopes = _opened_backward(values, acts, slope_of_gate, slope, ctx.active.per_place(gain_F))
        value_slope, offset_slope, gain_slope = slopes
        return None, value_slope, ctx.active.sum_by_latent(gain_slope), ctx.active.sum_by_latent(offset_slope)


@fused
def _jumped(values: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    acts = _where_positive((values - threshold).to(values.dtype), values)
    return acts, acts.sign().sum(dtype=threshold.dtype)  # those above a threshold, which is positive


@fused
def _jumped_backward(
    values: Tensor, acts: Tensor, slope: Tensor, slope_of_number: Tensor, threshold: Tensor, bandwidth: float
) -> tuple[Tensor, Tensor]:
    gained = torch.addcmul(slope_of_number, threshold, slope)
    gained = _where_within(bandwidth / 2, values - threshold, gained)
    return _where_positive(acts, slope), gained.to(values.dtype)


def _where_positive(condition: Tensor, numbers: Tensor) -> Tensor:
    """Zero elsewhere, but not where the condition is no number."""
    found: Tensor = torch.ops.aten.threshold_backward(numbers, condition, 0)
    return found


def _where_within(bound: float, condition: Tensor, numbers: Tensor) -> Tensor:
    """Zero where the condition is not less than the bound from zero."""
    found: Tensor = torch.ops.aten.hardtanh_backward(numbers, condition, -bound, bound)
    return found


class _JumpReLU(Function):
    @staticmethod
    def forward(
        ctx: Any, active: Active, values: Tensor, threshold_F: Tensor, bandwidth: float
    ) -> tuple[Tensor, Tensor]:
        acts, number = _jumped(values, active.per_place(threshold_F))
        ctx.save_for_backward(values, acts, threshold_F)
        ctx.active, ctx.bandwidth = active, bandwidth
        return acts, number

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, slope_of_number: Tensor) -> tuple[Tensor | None, ...]:
        values, acts, threshold_F = ctx.saved_tensors
        threshold = ctx.active.per_place(threshold_F)
        value_slope, gained = _jumped_backward(values, acts, slope, slope_of_number, threshold, ctx.bandwidth)
        return None, value_slope, -ctx.active.sum_by_latent(gained) / ctx.bandwidth, None
