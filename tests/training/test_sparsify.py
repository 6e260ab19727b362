"""EleutherAI's sparsify itself loads the folder and finds our features and reconstructions."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mistudio_train.errors import ExportRefused
from mistudio_train.training.sparsify import sparsify_cannot, write_sparsify

from .exports import D_IN, D_SAE, rows, small_sae


def test_sparsify_gives_the_same_features_and_reconstruction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")  # it would take its kernel for GPUs also where there is none
    from sparsify import SparseCoder

    sae, x_BD = small_sae("topk"), rows(1000)
    write_sparsify(tmp_path / "sparsify", sae)
    theirs = SparseCoder.load_from_disk(tmp_path / "sparsify")
    with torch.no_grad():
        top_acts, top_indices, _ = theirs.encode(x_BD)
        acts_BF = torch.zeros(len(x_BD), D_SAE).scatter(1, top_indices, top_acts)
        torch.testing.assert_close(acts_BF, sae.encode(x_BD), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(theirs.decode(top_acts, top_indices), sae.decode(acts_BF), atol=1e-4, rtol=1e-5)
    assert (theirs.d_in, theirs.num_latents, theirs.cfg.k) == (D_IN, D_SAE, 5)


@pytest.mark.parametrize("kind", ["standard", "batchtopk"])
def test_what_sparsify_cannot_say_is_refused(tmp_path: Path, kind: str) -> None:
    reason = sparsify_cannot(small_sae(kind))
    assert reason is not None
    assert kind in reason
    with pytest.raises(ExportRefused, match="sparsify keeps the k largest"):
        write_sparsify(tmp_path, small_sae(kind))
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    broken = replace(small_sae("topk"), decoder_bias=torch.full((D_IN,), math.nan))
    with pytest.raises(ExportRefused, match="not finite"):
        write_sparsify(tmp_path, broken)
