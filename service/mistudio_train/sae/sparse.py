"""Sparse activations: which latents of each row are active, and all arithmetic that touches only those.

Owns the arithmetic and its gradients; must not know of scaling, kinds or folding.
"""

import warnings
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from . import kernels

with warnings.catch_warnings():  # PyTorch says once, at the first such matrix, that the format is in beta state
    warnings.simplefilter("ignore")
    torch.eye(1).to_sparse_csr()

INT16_LATENTS = 2**15
DENSE_ABOVE = 1 / 8
"""Share of the places. Steps are as fast either way at one in five, but there a job takes more memory."""


class Active:
    """The places of the active latents in a matrix [B, d_sae], row after row; N of them in all.

    Values at these places are a vector [N]. Products with such a matrix S and its transpose cost 2·N·d_in operations,
    where dense ones cost 2·B·d_sae·d_in. On a CPU they are sums of weighted embeddings, which take half of the time of
    Intel MKL's sparse products, and `products` is MKL's, or dense where that is not there, which is right and not fast.
    On a GPU all are `kernels` or, where these cannot be built, cuSPARSE's, nearly as fast.
    """

    def __init__(self, row_starts: Tensor, latents_N: Tensor, d_sae: int) -> None:
        """`row_starts` int32 [B + 1]: where each row's places begin and the last ones end; `latents_N` int64."""
        self.row_starts, self.latents_N, self.d_sae = row_starts, latents_N, d_sae

    @classmethod
    def same_number(cls, indices_BK: Tensor, d_sae: int) -> "Active":
        """K latents a row: int64 [B, K], different within a row."""
        rows, k = indices_BK.shape
        row_starts = torch.arange(0, rows * k + 1, k, dtype=torch.int32, device=indices_BK.device)
        return cls(row_starts, indices_BK.reshape(-1), d_sae)

    @classmethod
    def at(cls, places_N: Tensor, rows: int, d_sae: int) -> "Active":
        """Places in the flattened matrix, ascending: int64 [N]."""
        first_of_row = torch.arange(0, (rows + 1) * d_sae, d_sae, device=places_N.device)
        row_starts = torch.searchsorted(places_N, first_of_row, out_int32=True)
        active = cls(row_starts, places_N.remainder(d_sae), d_sae)
        active.places_N = places_N
        return active

    @property
    def rows(self) -> int:
        """B."""
        return len(self.row_starts) - 1

    @cached_property
    def row_of_place(self) -> Tensor:
        """int64 [N]."""
        counts_B = self.row_starts.diff().long()
        return torch.arange(self.rows, device=counts_B.device).repeat_interleave(
            counts_B, output_size=len(self.latents_N)
        )

    @cached_property
    def places_N(self) -> Tensor:  # noqa: N802
        """In the flattened matrix: int64 [N]."""
        return self.row_of_place * self.d_sae + self.latents_N

    def split(self, group_N: Tensor, groups: int) -> tuple["Active", Tensor]:
        """As many such matrices below one another, each with the places of its group alone.

        Args:
            group_N: the group of each place, from 0.
            groups: how many there are.

        Returns:
            The places of the matrix [groups · B, d_sae], and their numbers among these.

        """
        order_N = group_N.to(torch.int16).argsort(stable=True)
        rows_N = (group_N * self.rows + self.row_of_place)[order_N]
        every_row = torch.arange(groups * self.rows + 1, device=rows_N.device)
        row_starts = torch.searchsorted(rows_N, every_row, out_int32=True)
        return Active(row_starts, self.latents_N[order_N], self.d_sae), order_N

    def of_rows(self, which_B: Tensor) -> tuple["Active", Tensor]:
        """The matrix of those rows alone, and which of the values are theirs."""
        which_N = which_B.index_select(0, self.row_of_place)
        ends_B = self.row_starts.diff()[which_B].cumsum(0, dtype=torch.int32)
        row_starts = torch.cat((self.row_starts[:1], ends_B))
        return Active(row_starts, self.latents_N[which_N], self.d_sae), which_N

    def entries(self, values_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row, latent and value of what is not zero, ascending in rows where places are."""
        kept_N = values_N != 0
        return self.row_of_place[kept_N], self.latents_N[kept_N], values_N[kept_N]

    def parts(self, values_N: Tensor, places: int) -> Iterator[tuple[slice, "Active", Tensor]]:
        """Rows after rows, with their places and values: all at once here, as at most one place in eight is active."""
        yield slice(0, self.rows), self, values_N

    def zero_below(self, scores_N: Tensor, floor_F: Tensor) -> "Active":
        """The same places, with values that are zero where these are not above their latent's floor."""
        return Banded(self, ~(scores_N <= self.per_place(floor_F)))

    def scores(self, pre_BF: Tensor, centred_BD: Tensor, weight_FD: Tensor, bias_F: Tensor) -> Tensor:
        """The values of `pre_BF` = centred @ weightᵀ + bias at the places, anew where that matrix is a rounded one."""
        if pre_BF.dtype == weight_FD.dtype:
            return self.pick(pre_BF)
        return self.products(centred_BD, weight_FD).add_(self.per_place(bias_F))

    def pick(self, matrix_BF: Tensor) -> Tensor:
        """The values of a dense matrix at the places: [N]."""
        return matrix_BF.reshape(-1).index_select(0, self.places_N)

    def count_above(self, values_N: Tensor, floor: float) -> Tensor:
        """On how many rows each latent's value is above a number that is not negative: int64 [d_sae]."""
        counts_F = torch.zeros(self.d_sae, dtype=torch.int32, device=values_N.device)
        return counts_F.scatter_add_(0, self.latents_N, (values_N > floor).int()).long()

    def total(self, values_N: Tensor) -> Tensor:
        """The sum of all of them, at least fp32."""
        return values_N.sum(dtype=_of_sums(values_N))

    def sum_by_latent(self, values_N: Tensor) -> Tensor:
        """S's sum over rows, of the values' type: [d_sae]."""
        if self._by_kernels(values_N):  # where adding at indices happens in any order
            return self.transpose_times(values_N, values_N.new_ones(self.rows, 1)).squeeze(1)
        return values_N.new_zeros(self.d_sae).scatter_add_(0, self.latents_N, values_N)

    def max_by_latent(self, values_N: Tensor) -> Tensor:
        """The largest value of each latent, of values that are not negative: [d_sae]."""
        return values_N.new_zeros(self.d_sae).scatter_reduce_(0, self.latents_N, values_N, "amax")

    def dense(self, values_N: Tensor) -> Tensor:
        """S itself: [B, d_sae]."""
        matrix_BF = values_N.new_zeros(self.rows, self.d_sae)
        matrix_BF[self.row_of_place, self.latents_N] = values_N
        return matrix_BF

    def times(self, values_N: Tensor, weight_FD: Tensor) -> Tensor:
        """S @ weight: [B, d_in]."""
        if self._by_kernels(values_N):
            return kernels.times(self.row_starts, self.latents_N, values_N, weight_FD)
        return _weighted_sums(self.row_starts, self._latents_int32, values_N, weight_FD)

    def transpose_times(self, values_N: Tensor, rows_BD: Tensor) -> Tensor:
        """Sᵀ @ rows: [d_sae, d_in]."""
        column_starts, rows_N, order_N = self._transposed
        by_latent_N = values_N.index_select(0, order_N)
        if self._by_kernels(values_N):
            return kernels.times(column_starts, rows_N, by_latent_N, rows_BD)
        return _weighted_sums(column_starts, rows_N, by_latent_N, rows_BD)

    def products(self, rows_BD: Tensor, weight_FD: Tensor) -> Tensor:
        """The matrix rows @ weightᵀ at the places only: [N]."""
        if self._by_kernels(rows_BD):
            return kernels.products(self.row_starts, self.latents_N, rows_BD, weight_FD)
        if self._by_library(rows_BD):
            pattern = self._csr(rows_BD.new_zeros(len(self.latents_N)))
            sampled: Tensor = torch.sparse.sampled_addmm(pattern, rows_BD, weight_FD.T, beta=0.0)
            return sampled.values()
        return self.pick(rows_BD @ weight_FD.T)

    def per_place(self, per_latent_F: Tensor) -> Tensor:
        """A number of each latent at its places."""
        return per_latent_F.index_select(0, self.latents_N)

    @staticmethod
    def _by_kernels(tensor: Tensor) -> bool:
        return tensor.is_cuda and tensor.dtype == torch.float32 and kernels.AVAILABLE

    @staticmethod
    def _by_library(tensor: Tensor) -> bool:
        return tensor.is_cuda or torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]

    def _csr(self, values_N: Tensor) -> Tensor:
        shape = (self.rows, self.d_sae)
        return torch.sparse_csr_tensor(self.row_starts, self._latents_int32, values_N, shape, check_invariants=False)

    @cached_property
    def _latents_int32(self) -> Tensor:
        return self.latents_N.int()

    @cached_property
    def _transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Starts of the latents int32 [d_sae + 1], row of each place by latent int32, and the order of the places."""
        narrow_N = self.latents_N.to(torch.int16 if self.d_sae <= INT16_LATENTS else torch.int32)
        sorted_N, order_N = torch.sort(narrow_N, stable=True)
        starts = torch.zeros(self.d_sae + 1, dtype=torch.int32, device=order_N.device)
        if order_N.is_cuda:  # which would be waited for, to know how many counts there are
            every_latent = torch.arange(1, self.d_sae + 1, device=order_N.device)
            starts[1:] = torch.searchsorted(sorted_N.int(), every_latent.int(), out_int32=True)
        else:
            starts[1:] = torch.bincount(self.latents_N, minlength=self.d_sae).cumsum(0)
        return starts, self.row_of_place.index_select(0, order_N).int(), order_N


class Banded(Active):
    """Places of which some are zero whatever comes, and wanted for what a loss would gain if they were not.

    Products with S leave them out, its gradient (`products`) does not.
    """

    def __init__(self, active: Active, which_N: Tensor) -> None:
        super().__init__(active.row_starts, active.latents_N, active.d_sae)
        self.places_N = active.places_N
        self._kept_N = which_N.nonzero().squeeze(1)
        row_starts = torch.searchsorted(self._kept_N, self.row_starts.long(), out_int32=True)
        self._others = Active(row_starts, self.latents_N[self._kept_N], self.d_sae)

    def times(self, values_N: Tensor, weight_FD: Tensor) -> Tensor:
        """S @ weight: [B, d_in]."""
        return self._others.times(values_N.index_select(0, self._kept_N), weight_FD)

    def transpose_times(self, values_N: Tensor, rows_BD: Tensor) -> Tensor:
        """Sᵀ @ rows: [d_sae, d_in]."""
        return self._others.transpose_times(values_N.index_select(0, self._kept_N), rows_BD)


class Everywhere(Active):
    """All places, where so many are active that dense products are faster: values are the matrix itself.

    Values may be of a narrower type than the weights: then the other operand is rounded to it, and sums are fp32.
    """

    def __init__(self, rows: int, d_sae: int) -> None:
        self.d_sae, self._rows = d_sae, rows

    @property
    def rows(self) -> int:
        """B."""
        return self._rows

    def pick(self, matrix_BF: Tensor) -> Tensor:
        """The matrix."""
        return matrix_BF.view_as(matrix_BF)

    def of_rows(self, which_B: Tensor) -> tuple[Active, Tensor]:
        """The matrix of those rows alone, and which of the values are theirs."""
        return Everywhere(int(which_B.sum()), self.d_sae), which_B

    def entries(self, values_BF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row, latent and value of what is not zero."""
        rows_N, latents_N = values_BF.nonzero(as_tuple=True)
        return rows_N, latents_N, values_BF[rows_N, latents_N]

    def parts(self, values_BF: Tensor, places: int) -> Iterator[tuple[slice, Active, Tensor]]:
        """Rows after rows, with their places and values: as many rows as have so many places."""
        rows = max(1, places // self.d_sae)
        for first in range(0, self.rows, rows):
            which = slice(first, min(first + rows, self.rows))
            yield which, Everywhere(which.stop - first, self.d_sae), values_BF[which]

    def zero_below(self, scores_BF: Tensor, floor_F: Tensor) -> Active:
        """All of it: dense products do not mind."""
        return self

    def scores(self, pre_BF: Tensor, centred_BD: Tensor, weight_FD: Tensor, bias_F: Tensor) -> Tensor:
        """The matrix as it is."""
        return self.pick(pre_BF)

    def count_above(self, values_BF: Tensor, floor: float) -> Tensor:
        """On how many rows each latent's value is above a number: int64 [d_sae]."""
        return (values_BF > floor).sum(0, dtype=torch.int32).long()  # three times as fast as with int64

    def total(self, values_BF: Tensor) -> Tensor:
        """The sum of all of them, at least fp32; by way of latents, whose other sums a GPU makes at the same time."""
        return self.sum_by_latent(values_BF).sum()

    def sum_by_latent(self, values_BF: Tensor) -> Tensor:
        """The matrix' sum over rows: [d_sae]."""
        return values_BF.sum(0, dtype=_of_sums(values_BF))

    def max_by_latent(self, values_BF: Tensor) -> Tensor:
        """The largest value of each latent: [d_sae]."""
        return values_BF.amax(0)

    def dense(self, values_BF: Tensor) -> Tensor:
        """The matrix."""
        return values_BF

    def times(self, values_BF: Tensor, weight_FD: Tensor) -> Tensor:
        """A dense product: [B, d_in]."""
        return _summed_wide(values_BF, weight_FD)

    def transpose_times(self, values_BF: Tensor, rows_BD: Tensor) -> Tensor:
        """A dense product: [d_sae, d_in]."""
        return _summed_wide(values_BF.T, rows_BD)

    def products(self, rows_BD: Tensor, weight_FD: Tensor) -> Tensor:
        """A dense product of the weight's type: [B, d_sae]."""
        return rows_BD.to(weight_FD.dtype) @ weight_FD.T

    def per_place(self, per_latent_F: Tensor) -> Tensor:
        """A number of each latent on every row."""
        return per_latent_F.expand(self.rows, self.d_sae)


def active_above(matrix_BF: Tensor, floor: Tensor | float) -> Active:
    """The places above a number, or one for each latent, and those that are no number, so that the loss shows them.

    Where these are many, and on a GPU, which would have to be waited for, all places: values must still be masked.
    """
    if matrix_BF.is_cuda:
        return Everywhere(*matrix_BF.shape)
    which_BF = ~(matrix_BF <= floor)
    if int(which_BF.count_nonzero()) > DENSE_ABOVE * which_BF.numel():
        return Everywhere(*which_BF.shape)
    places_N = np.flatnonzero(which_BF.numpy())  # twice as fast as PyTorch's where few are
    return Active.at(torch.from_numpy(places_N), *which_BF.shape)


def _weighted_sums(starts: Tensor, places_N: Tensor, values_N: Tensor, rows_XD: Tensor) -> Tensor:
    """For each start but the last the sum of the rows at its places, each times its value: [starts - 1, d_in]."""
    if rows_XD.is_cuda:  # by cuSPARSE
        shape = (len(starts) - 1, len(rows_XD))
        return torch.mm(torch.sparse_csr_tensor(starts, places_N, values_N, shape, check_invariants=False), rows_XD)
    # what a gradient needs is not kept for it then, and other layouts would take a hundred times as long
    rows_XD = rows_XD.detach().contiguous()
    return functional.embedding_bag(
        places_N, rows_XD, starts, mode="sum", per_sample_weights=values_N, include_last_offset=True
    )


def _of_sums(tensor: Tensor) -> torch.dtype:
    """At least fp32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _summed_wide(narrow: Tensor, other: Tensor) -> Tensor:
    """The product narrow @ other, both operands in the first one's type, the sums at least fp32."""
    other = other.to(narrow.dtype)
    if _of_sums(narrow) == narrow.dtype:
        return narrow @ other
    if narrow.is_cuda:
        return torch.mm(narrow, other, out_dtype=torch.float32)
    return (narrow @ other).float()


def encode_at(active: Active, values_N: Tensor, centred_BD: Tensor, weight_FD: Tensor) -> Tensor:
    """The `scores` of centred @ weightᵀ + bias, which are there already, with their gradient of the weight alone."""
    found_N: Tensor = _EncodeAt.apply(active, values_N, centred_BD, weight_FD)  # type: ignore[no-untyped-call]
    return found_N


def centred_bias(centre_D: Tensor, weight_FD: Tensor, bias_F: Tensor) -> Tensor:
    """The bias, with a gradient of the centre, too: it is added to (row - centre) @ weightᵀ, so that it moves both."""
    found_F: Tensor = _CentredBias.apply(centre_D, weight_FD, bias_F)  # type: ignore[no-untyped-call]
    return found_F


def with_bias(active: Active, values_N: Tensor, bias_F: Tensor) -> Tensor:
    """Values that have a bias in them already, with its gradient."""
    found_N: Tensor = _WithBias.apply(active, values_N, bias_F)  # type: ignore[no-untyped-call]
    return found_N


def decode_at(active: Active, values_N: Tensor, weight_FD: Tensor) -> Tensor:
    """S @ weight for the matrix S with these values at the active places: [B, d_in], with gradients of both."""
    decoded_BD: Tensor = _DecodeAt.apply(active, values_N, weight_FD)  # type: ignore[no-untyped-call]
    return decoded_BD


class _EncodeAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, active: Active, values_N: Tensor, centred_BD: Tensor, weight_FD: Tensor) -> Tensor:
        ctx.active = active
        ctx.save_for_backward(centred_BD)
        return values_N.view_as(values_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_N: Tensor) -> tuple[Tensor | None, ...]:
        (centred_BD,) = ctx.saved_tensors
        return None, None, None, ctx.active.transpose_times(slope_N, centred_BD)


class _CentredBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, centre_D: Tensor, weight_FD: Tensor, bias_F: Tensor) -> Tensor:
        ctx.save_for_backward(weight_FD)
        return bias_F.view_as(bias_F)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_F: Tensor) -> tuple[Tensor | None, ...]:
        (weight_FD,) = ctx.saved_tensors
        return -(slope_F @ weight_FD), None, slope_F


class _WithBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, active: Active, values_N: Tensor, bias_F: Tensor) -> Tensor:
        ctx.active = active
        return values_N.view_as(values_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_N: Tensor) -> tuple[Tensor | None, ...]:
        return None, slope_N, ctx.active.sum_by_latent(slope_N)


class _DecodeAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, active: Active, values_N: Tensor, weight_FD: Tensor) -> Tensor:
        weight_FD = weight_FD.to(values_N.dtype)  # once for the way back, too
        ctx.active = active
        ctx.save_for_backward(values_N, weight_FD)
        return active.times(values_N, weight_FD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_BD: Tensor) -> tuple[Tensor | None, ...]:
        values_N, weight_FD = ctx.saved_tensors
        slope_BD = slope_BD.to(weight_FD.dtype).contiguous()
        weight_slope_FD = ctx.active.transpose_times(values_N, slope_BD) if ctx.needs_input_grad[2] else None
        return None, ctx.active.products(slope_BD, weight_FD), weight_slope_FD
