"""The GPU's kernels in Triton's interpreter, which needs no GPU, against dense products."""

import os
import subprocess
import sys

PRODUCTS = """
import torch
from mistudio_train.sae import kernels
from mistudio_train.sae.sparse import Active

torch.manual_seed(0)
for width in (1, 20, 600):
    empty_too = torch.tensor([0, 3, 3, 10, 35])
    active = Active(empty_too.int(), torch.cat([torch.randperm(50)[:n] for n in empty_too.diff().tolist()]), 50)
    values, weight, rows = torch.randn(35), torch.randn(50, width), torch.randn(4, width)
    dense = active.dense(values)
    starts, rows_N, order = active._transposed
    torch.testing.assert_close(kernels.times(active.row_starts, active.latents_N, values, weight), dense @ weight)
    torch.testing.assert_close(kernels.times(starts, rows_N, values[order], rows), dense.T @ rows)
    found = kernels.products(active.row_starts, active.latents_N, rows, weight)
    torch.testing.assert_close(found, active.pick(rows @ weight.T), atol=1e-4, rtol=1e-4)
print("all three")
"""


def test_products_with_few_places_are_the_dense_ones() -> None:
    env = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, "-c", PRODUCTS], env=env, capture_output=True, text=True, check=False)
    assert ran.stdout == "all three\n", ran.stderr[-2000:]
