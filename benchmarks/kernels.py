"""Products with few active places on a GPU: our Triton kernels, cuSPARSE and dense products, and the choice of largest.

Every answer is first compared with one in fp64. Times are medians, in milliseconds, by CUDA events.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Final

import torch
import triton.testing
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import machine
from mistudio_train.sae import kernels
from mistudio_train.sae.largest import largest_of_rows
from mistudio_train.sae.sparse import Active

SHAPES: Final = ((768, 16384, 4096, 32), (768, 65536, 4096, 32), (2048, 65536, 4096, 64), (4096, 131072, 4096, 64))
"""d, m, B, k."""
WRONG_ABOVE: Final = 1e-5


def measured(d: int, m: int, batch: int, k: int) -> dict[str, float]:
    """What one shape takes."""
    x_BD, weight_FD = (torch.randn(rows, d, device="cuda") for rows in (batch, m))
    pre_BF = (x_BD.bfloat16() @ weight_FD.bfloat16().T).contiguous()
    active = Active.same_number(pre_BF.topk(k, dim=1, sorted=False).indices, m)
    values_N = torch.randn(batch * k, device="cuda")
    csr = torch.sparse_csr_tensor(active.row_starts, active.latents_N.int(), values_N, (batch, m))
    starts, rows_N, order_N = active._transposed
    csr_transposed = torch.sparse_csr_tensor(starts, rows_N, values_N[order_N], (m, batch))
    few = torch.arange(64, device="cuda")
    _same(active.times(values_N, weight_FD)[few], active.dense(values_N.double())[few] @ weight_FD.double())
    _same(active.products(x_BD, weight_FD).view(batch, k)[few], _exact(x_BD, weight_FD, active, few, k))
    _same(active.transpose_times(values_N, x_BD)[few], active.dense(values_N.double())[:, few].T @ x_BD.double())
    narrow_BD, narrow_FD = x_BD.bfloat16(), weight_FD.bfloat16()
    dense_BF = active.dense(values_N.bfloat16())
    ways: dict[str, Callable[[], object]] = {
        "dense product": lambda: narrow_BD @ narrow_FD.T,
        "made dense": lambda: active.dense(values_N.bfloat16()),
        "S W": lambda: active.times(values_N, weight_FD),
        "S W cuSPARSE": lambda: csr @ weight_FD,
        "S W dense": lambda: torch.mm(dense_BF, weight_FD.bfloat16(), out_dtype=torch.float32),
        "at places": lambda: active.products(x_BD, weight_FD),
        "at places cuSPARSE": lambda: torch.sparse.sampled_addmm(csr, x_BD, weight_FD.T, beta=0.0),
        "S'X": lambda: kernels.times(starts, rows_N, values_N[order_N], x_BD),
        "S'X cuSPARSE": lambda: csr_transposed @ x_BD,
        "S'X dense": lambda: torch.mm(dense_BF.T, x_BD.bfloat16(), out_dtype=torch.float32),
        "transposed": lambda: Active.same_number(active.latents_N.view(batch, k), m)._transposed,
        "largest of rows, two stages": lambda: largest_of_rows(pre_BF, k),
        "largest of rows, one": lambda: pre_BF.topk(k, dim=1, sorted=False),
        "largest of batch, two stages": lambda: largest_of_rows(pre_BF.view(1, -1), batch * k),
        "largest of batch, one": lambda: pre_BF.flatten().topk(batch * k, sorted=False),
        "fp32 topk": lambda: pre_BF.float().topk(k, dim=1, sorted=False),
    }
    return {name: _time(way) for name, way in ways.items()}


def _time(way: Callable[[], object]) -> float:
    try:
        taken: float = triton.testing.do_bench(way, warmup=10, rep=50, return_mode="median")
    except (RuntimeError, torch.OutOfMemoryError) as error:
        print(error)
        return float("nan")
    return taken


def _exact(x_BD: Tensor, weight_FD: Tensor, active: Active, few: Tensor, k: int) -> Tensor:
    return (x_BD[few].double() @ weight_FD.double().T).gather(1, active.latents_N.view(-1, k)[few])


def _same(found: Tensor, exact: Tensor) -> None:
    error = float((found.double() - exact).norm() / exact.norm())
    if not error < WRONG_ABOVE:
        raise SystemExit(f"wrong by {error:.2g}")


def main() -> int:
    """Compare and show."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    console = Console(width=126, highlight=False)
    columns = {f"d {d}, m {m:,}, B {batch}, k {k}": measured(d, m, batch, k) for d, m, batch, k in SHAPES}
    table = Table("milliseconds", *columns)
    for name in next(iter(columns.values())):
        table.add_row(name, *(f"{taken[name]:.3f}" for taken in columns.values()))
    console.print(table)
    console.print(f"{machine()}, torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
