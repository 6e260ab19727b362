"""Folded weights give the features and reconstructions of the SAE they came from, on rows as they are."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mistudio_schemas import BatchTopKSAE, GatedSAE, JumpReLUSAE, SAEConfig
from mistudio_train.sae import sparse
from mistudio_train.sae.base import SparseAutoencoder, StepInput
from mistudio_train.sae.build import build_sae
from mistudio_train.sae.scaled import ScaledOptions
from mistudio_train.sae.standard import StandardAutoencoder
from mistudio_train.sae.topk import TopKAutoencoder

D_IN, D_SAE, K = 16, 64, 5
Make = Callable[[], SparseAutoencoder]


def moved(sae: SparseAutoencoder) -> SparseAutoencoder:
    """With every weight away from its start, as training would leave it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    sae.after_update()
    return sae


def rows() -> Tensor:
    return 40 * torch.randn(200, D_IN, generator=torch.Generator().manual_seed(2)) + 25


def standard() -> SparseAutoencoder:
    return moved(StandardAutoencoder(D_IN, D_SAE, 1e-3, torch.Generator().manual_seed(0)))


def topk() -> SparseAutoencoder:
    sae = TopKAutoencoder(D_IN, D_SAE, ScaledOptions(), k=K, generator=torch.Generator().manual_seed(0))
    sae.prepare(rows())
    return moved(sae)


def with_threshold(config: SAEConfig) -> Make:
    def make() -> SparseAutoencoder:
        sae = build_sae(config, D_IN)
        sae.prepare(rows())
        sae.step(StepInput(rows(), 0, 1))
        return moved(sae)

    return make


THRESHOLDS = [
    with_threshold(BatchTopKSAE(hidden_dim=D_SAE, seed=0, k=K)),
    with_threshold(JumpReLUSAE(hidden_dim=D_SAE, seed=0, initial_threshold=0.5)),
    with_threshold(GatedSAE(hidden_dim=D_SAE, seed=0)),
]


@pytest.mark.parametrize("make", [standard, topk, *THRESHOLDS])
def test_features_and_reconstruction_are_those_of_the_sae(make: Make) -> None:
    sae, x = make(), rows()
    folded = sae.folded()
    acts = sae.encode(x).detach()
    torch.testing.assert_close(folded.encode(x), acts, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(folded.decode(acts), sae.decode(acts).detach(), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("make", [standard, topk, *THRESHOLDS])
def test_two_plain_layers_are_enough_but_for_what_needs_says(make: Make) -> None:
    folded, x = make().folded(), rows()
    plain = nn.ModuleDict({"encoder": nn.Linear(D_IN, D_SAE), "decoder": nn.Linear(D_SAE, D_IN)})
    plain.load_state_dict(folded.state_dict())
    with torch.no_grad():
        acts = plain["encoder"](x).relu()
        if folded.threshold is not None:
            assert folded.needs is not None
            assert "above `threshold`" in folded.needs
            acts = acts * (acts > folded.threshold)
        elif folded.k is None:
            assert folded.needs is None
        else:
            assert folded.needs is not None
            assert f"the {K} largest" in folded.needs
            kept = acts.topk(folded.k, dim=1)
            acts = torch.zeros_like(acts).scatter(1, kept.indices, kept.values)
        assert torch.equal(folded.encode(x), acts)
        assert torch.equal(folded.decode(acts), plain["decoder"](acts))


@pytest.mark.parametrize("make", [standard, topk, *THRESHOLDS])
def test_sparse_and_dense_agree(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folded, x = make().folded(), rows()
    acts = folded.encode(x)
    for dense_above in (0.0, 1.0):
        monkeypatch.setattr(sparse, "DENSE_ABOVE", dense_above)
        active, values = folded.encode_sparse(x)
        assert torch.equal(active.dense(values), acts)
        row, latent, value = active.entries(values)
        assert torch.equal(torch.stack((row, latent), dim=1), acts.nonzero())
        assert torch.equal(value, acts[acts > 0])
        torch.testing.assert_close(folded.decode_sparse(active, values), folded.decode(acts), atol=1e-3, rtol=1e-5)


def test_no_rows_have_no_features() -> None:
    for folded in (standard().folded(), topk().folded()):
        assert folded.encode(torch.zeros(0, D_IN)).shape == (0, D_SAE)
        active, values = folded.encode_sparse(torch.zeros(0, D_IN))
        assert (active.rows, values.numel()) == (0, 0)
        assert folded.decode_sparse(active, values).shape == (0, D_IN)


def test_a_topk_activation_is_a_length_in_the_space_of_the_rows() -> None:
    folded = topk().folded()
    torch.testing.assert_close(folded.decoder_weight.norm(dim=0), torch.ones(D_SAE))
    acts = folded.encode(rows())
    parts = folded.decode(acts) - folded.decoder_bias
    torch.testing.assert_close(parts, acts @ folded.decoder_weight.T, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("make", [standard, topk, *THRESHOLDS])
def test_weights_are_plain_copies(make: Make) -> None:
    sae = make()
    folded = sae.folded()
    weights = folded.state_dict()
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == {
        "encoder.weight": (D_SAE, D_IN),
        "encoder.bias": (D_SAE,),
        "decoder.weight": (D_IN, D_SAE),
        "decoder.bias": (D_IN,),
    }
    assert all(weight.dtype == torch.float32 and weight.is_contiguous() for weight in weights.values())
    assert not any(weight.requires_grad for weight in weights.values())
    pointers = {weight.data_ptr() for weight in weights.values()} | {p.data_ptr() for p in sae.parameters()}
    assert len(pointers) == len(weights) + len(list(sae.parameters()))
    assert folded.to("cpu").needs == folded.needs
