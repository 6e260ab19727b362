"""Work on a GPU in few kernels: products with a sparse matrix, in Triton, and functions of matrices, compiled.

Products are fp32, each row's or latent's sum in an order of its own. Owns the kernels; which places are active, and
gradients, are `sparse`'s. Where they are not `AVAILABLE` no product here may be called.
"""

import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import torch
from torch import Tensor

COMPILERS: Final = ("cc", "gcc", "clang")
AVAILABLE: Final = (
    find_spec("triton") is not None
    # which Triton builds its launchers with: a C compiler, and Python's own headers, a package apart on some systems
    and ("CC" in os.environ or any(map(shutil.which, COMPILERS)))
    and Path(sysconfig.get_path("include"), "Python.h").exists()
)
PLACES_AT_ONCE: Final = 8
"""Rows of the dense matrix that are on their way to a program at a time."""
WIDTH_AT_ONCE: Final = 512
"""Numbers of each of them."""

P = ParamSpec("P")
R = TypeVar("R")


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """On a GPU compiled by PyTorch, at its first use, so that matrices are read and written once; elsewhere as it is.

    `function` is of tensors and plain numbers alone, the first argument a tensor.
    """

    @cache
    def compiled() -> Callable[P, R]:
        return torch.compile(function, dynamic=False)  # which is imported only now, and takes its time

    @wraps(function)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
        on_gpu = AVAILABLE and isinstance(args[0], Tensor) and args[0].is_cuda
        return (compiled() if on_gpu else function)(*args, **kwargs)

    return chosen


if find_spec("triton"):
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def _times(starts, columns, values, dense, out, width, PLACES: tl.constexpr, WIDTH: tl.constexpr) -> Any:  # type: ignore[no-untyped-def]
        """A part of a row of the product: the sum over the row's places."""
        row = tl.program_id(0).to(tl.int64)
        across = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        inside = across < width
        end = tl.load(starts + row + 1)
        total = tl.zeros([WIDTH], dtype=tl.float32)
        for first in range(tl.load(starts + row), end, PLACES):
            places = first + tl.arange(0, PLACES)
            column = tl.load(columns + places, mask=places < end, other=0).to(tl.int64)
            value = tl.load(values + places, mask=places < end, other=0.0)
            wanted = (places < end)[:, None] & inside[None, :]
            tile = tl.load(dense + column[:, None] * width + across[None, :], mask=wanted, other=0.0)
            total += tl.sum(value[:, None] * tile, axis=0)
        tl.store(out + row * width + across, total, mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def _products(starts, columns, rows, weight, out, width, PLACES: tl.constexpr, WIDTH: tl.constexpr) -> Any:  # type: ignore[no-untyped-def]
        """The scalar products of one row with those of the weight that its places name."""
        row = tl.program_id(0).to(tl.int64)
        end = tl.load(starts + row + 1)
        for first in range(tl.load(starts + row), end, PLACES):
            places = first + tl.arange(0, PLACES)
            column = tl.load(columns + places, mask=places < end, other=0).to(tl.int64)
            total = tl.zeros([PLACES], dtype=tl.float32)
            for begin in range(0, width, WIDTH):
                across = begin + tl.arange(0, WIDTH)
                mine = tl.load(rows + row * width + across, mask=across < width, other=0.0)
                wanted = (places < end)[:, None] & (across < width)[None, :]
                tile = tl.load(weight + column[:, None] * width + across[None, :], mask=wanted, other=0.0)
                total += tl.sum(mine[None, :] * tile, axis=1)
            tl.store(out + places, total, mask=places < end)


def times(starts: Tensor, columns_N: Tensor, values_N: Tensor, dense_CD: Tensor) -> Tensor:
    """The product of a sparse matrix [R, C] and a dense one: [R, D].

    Row r of the sparse one has the values from `starts[r]` to `starts[r + 1]`, each in its column; all fp32.
    """
    rows, width = len(starts) - 1, dense_CD.shape[1]
    out_RD = torch.empty(rows, width, dtype=torch.float32, device=dense_CD.device)
    block = _width(width)
    grid = (rows, triton.cdiv(width, block))
    _times[grid](starts, columns_N, values_N, dense_CD.contiguous(), out_RD, width, PLACES=PLACES_AT_ONCE, WIDTH=block)
    return out_RD


def products(starts: Tensor, columns_N: Tensor, rows_RD: Tensor, weight_CD: Tensor) -> Tensor:
    """The dense product rows @ weightᵀ at the places of such a matrix only: [N]."""
    out_N = torch.empty(len(columns_N), dtype=torch.float32, device=rows_RD.device)
    width = rows_RD.shape[1]
    _products[(len(starts) - 1,)](
        starts,
        columns_N,
        rows_RD.contiguous(),
        weight_CD.contiguous(),
        out_N,
        width,
        PLACES=PLACES_AT_ONCE,
        WIDTH=_width(width),
    )
    return out_N


def _width(width: int) -> int:
    """Of the blocks, which are powers of two."""
    return min(WIDTH_AT_ONCE, max(16, 1 << (width - 1).bit_length()))
