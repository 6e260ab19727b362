"""The functions by which a latent is active or not and how much, each with all that a step asks of its whole matrix.

Owns them, their gradients and the estimates where there are none; must not know kinds or weights. Every function takes
the encoder's bias only to give its gradient, the sum of the values' over rows: so a GPU reads a matrix of activations
once on the way forward and once on the way back. On a CPU a condition as a matrix of its own takes four times as long
as a number that is let through or not, by the gradients of ReLU and of a clipping.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .base import ACTIVE_ABOVE
from .kernels import fused
from .sparse import Active


def rectify(active: Active, values: Tensor, bias_F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ReLU(p) at the active places, its sum over rows, and on how many rows each latent is active: the last two [F]."""
    found: tuple[Tensor, Tensor, Tensor] = _Rectify.apply(active, values, bias_F)  # type: ignore[no-untyped-call]
    return found


def gate(
    active: Active, values: Tensor, bias_F: Tensor, gain_F: Tensor, offset_F: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The functions g = ReLU(p) and h = [p > 0] · ReLU(m) for m = gain · p + offset at the active places, and more.

    Returns:
        g; h; the sum of g; on how many rows each latent is active, [F].

    """
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _Gate.apply(active, values, bias_F, gain_F, offset_F)  # type: ignore[no-untyped-call]
    return found


def jump_relu(
    active: Active, values: Tensor, bias_F: Tensor, threshold_F: Tensor, bandwidth: float, tanh_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The function h = p · [p > θ] at the active places, and more.

    The pseudo-derivatives are of Rajamanoharan et al. 2024 (arXiv:2407.14435), for the bandwidth ε: of the function
    -(θ / ε) · [|p - θ| < ε / 2] by θ, of the number -(1 / ε) · [|p - θ| < ε / 2] by θ, and none by p. θ > 0.

    Returns:
        h; at how many places p > θ, as a number with a gradient by θ; the sum of tanh(`tanh_scale` · h), 0 for a scale
        of 0; on how many rows each latent has p > θ, [F].

    """
    found: tuple[Tensor, Tensor, Tensor, Tensor]
    found = _JumpReLU.apply(active, values, bias_F, threshold_F, bandwidth, tanh_scale)  # type: ignore[no-untyped-call]
    return found


def _where_positive(condition: Tensor, numbers: Tensor) -> Tensor:
    """Zero elsewhere, but not where the condition is no number."""
    found: Tensor = torch.ops.aten.threshold_backward(numbers, condition, 0)
    return found


def _where_within(bound: float, condition: Tensor, numbers: Tensor) -> Tensor:
    """Zero where the condition is not less than the bound from zero."""
    found: Tensor = torch.ops.aten.hardtanh_backward(numbers, condition, -bound, bound)
    return found


@fused
def _rectified(values: Tensor, active: Active) -> tuple[Tensor, Tensor, Tensor]:
    acts = values.relu()
    return acts, active.sum_by_latent(acts), active.count_above(acts, ACTIVE_ABOVE)


@fused
def _rectified_backward(acts: Tensor, slope: Tensor, slope_of_sums_F: Tensor, active: Active) -> tuple[Tensor, Tensor]:
    slope = _where_positive(acts, (slope + active.per_place(slope_of_sums_F)).to(acts.dtype))
    return slope, active.sum_by_latent(slope)


class _Rectify(Function):
    @staticmethod
    def forward(ctx: Any, active: Active, values: Tensor, bias_F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        acts, sums_F, counts_F = _rectified(values, active)
        ctx.save_for_backward(acts)
        ctx.active = active
        ctx.mark_non_differentiable(counts_F)
        return acts, sums_F, counts_F

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, slope_of_sums_F: Tensor, _counts: Tensor) -> tuple[Tensor | None, ...]:
        (acts,) = ctx.saved_tensors
        return None, *_rectified_backward(acts, slope, slope_of_sums_F, ctx.active)


@fused
def _opened(values: Tensor, gain_F: Tensor, offset_F: Tensor, active: Active) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    magnitude = torch.addcmul(active.per_place(offset_F), active.per_place(gain_F), values).relu_().to(values.dtype)
    gates, acts = values.relu(), _where_positive(values, magnitude)
    return gates, acts, active.total(gates), active.count_above(acts, ACTIVE_ABOVE)


@fused
def _opened_backward(
    values: Tensor,
    acts: Tensor,
    slope_of_gates: Tensor,
    slope: Tensor,
    slope_of_total: Tensor,
    gain_F: Tensor,
    active: Active,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slope = _where_positive(acts, slope)
    value_slope = _where_positive(values, (slope_of_gates + slope_of_total).to(values.dtype))
    value_slope = value_slope.addcmul_(slope, active.per_place(gain_F))
    by_latent = active.sum_by_latent(value_slope), active.sum_by_latent(slope * values), active.sum_by_latent(slope)
    return value_slope, *by_latent


class _Gate(Function):
    @staticmethod
    def forward(
        ctx: Any, active: Active, values: Tensor, bias_F: Tensor, gain_F: Tensor, offset_F: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gates, acts, total, counts_F = _opened(values, gain_F, offset_F, active)
        ctx.save_for_backward(values, acts, gain_F)
        ctx.active = active
        ctx.mark_non_differentiable(counts_F)
        return gates, acts, total, counts_F

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, slope_of_gates: Tensor, slope: Tensor, slope_of_total: Tensor, _counts: Tensor
    ) -> tuple[Tensor | None, ...]:
        values, acts, gain_F = ctx.saved_tensors
        return None, *_opened_backward(values, acts, slope_of_gates, slope, slope_of_total, gain_F, ctx.active)


def _tanh(numbers: Tensor) -> Tensor:
    """On a GPU not by the function of that name, which takes longer than all else there together."""
    return 2 * torch.sigmoid(2 * numbers) - 1 if numbers.is_cuda else numbers.tanh()


@fused
def _jumped(
    values: Tensor, threshold_F: Tensor, tanh_scale: float, active: Active
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acts = _where_positive((values - active.per_place(threshold_F)).to(values.dtype), values)
    counts_F = active.count_above(acts, 0)  # those above a threshold, which is positive
    total = active.total(_tanh(tanh_scale * acts)) if tanh_scale else threshold_F.new_zeros(())
    return acts, counts_F.sum().to(threshold_F.dtype), total, counts_F


@fused
def _jumped_backward(
    values: Tensor,
    acts: Tensor,
    slope: Tensor,
    slope_of_number: Tensor,
    slope_of_total: Tensor,
    threshold_F: Tensor,
    bandwidth: float,
    tanh_scale: float,
    active: Active,
) -> tuple[Tensor, Tensor, Tensor]:
    threshold = active.per_place(threshold_F)
    if tanh_scale:
        slope = slope + tanh_scale * slope_of_total * (1 - _tanh(tanh_scale * acts).square())
    gained = torch.addcmul(slope_of_number, threshold, slope)
    gained = _where_within(bandwidth / 2, values - threshold, gained)
    slope = _where_positive(acts, slope.to(acts.dtype))
    return slope, active.sum_by_latent(slope), active.sum_by_latent(gained) / -bandwidth


class _JumpReLU(Function):
    @staticmethod
    def forward(
        ctx: Any,
        active: Active,
        values: Tensor,
        bias_F: Tensor,
        threshold_F: Tensor,
        bandwidth: float,
        tanh_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        acts, number, total, counts_F = _jumped(values, threshold_F, tanh_scale, active)
        ctx.save_for_backward(values, acts, threshold_F)
        ctx.active, ctx.bandwidth, ctx.tanh_scale = active, bandwidth, tanh_scale
        ctx.mark_non_differentiable(counts_F)
        return acts, number, total, counts_F

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, slope: Tensor, slope_of_number: Tensor, slope_of_total: Tensor, _counts: Tensor
    ) -> tuple[Tensor | None, ...]:
        values, acts, threshold_F = ctx.saved_tensors
        slopes = _jumped_backward(
            values, acts, slope, slope_of_number, slope_of_total, threshold_F, ctx.bandwidth, ctx.tanh_scale, ctx.active
        )
        return None, *slopes, None, None
