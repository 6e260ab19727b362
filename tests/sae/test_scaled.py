"""What the scaled kinds share beside their formulas: where the centre begins, and how dead latents begin anew."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mistudio_schemas import BatchTopKSAE, GatedSAE, JumpReLUSAE, SAEConfig, TopKSAE
from mistudio_train.sae.build import build_sae
from mistudio_train.sae.recipe import Recipe
from mistudio_train.sae.scaled import ScaledAutoencoder, geometric_median
from mistudio_train.sae.trainer import Trainer

D_IN, D_SAE = 8, 32


def rows(count: int = 256) -> Tensor:
    return torch.randn(count, D_IN, generator=torch.Generator().manual_seed(0)) + 2


def built(config: SAEConfig) -> ScaledAutoencoder:
    sae = build_sae(config, D_IN)
    assert isinstance(sae, ScaledAutoencoder)
    sae.prepare(rows())
    return sae


def test_the_geometric_median_has_the_least_sum_of_distances() -> None:
    x = torch.cat([rows(50), torch.full((1, D_IN), 1e4)]).double()
    median = geometric_median(x)

    def distances(point: Tensor) -> float:
        return float((x - point).norm(dim=1).sum())

    generator = torch.Generator().manual_seed(1)
    least = distances(median)
    for size in (1e-2, 1e-1, 1.0):
        assert all(distances(median + size * torch.randn(D_IN, generator=generator)) > least for _ in range(20))
    assert least < distances(x.mean(0))
    assert (median - 2).norm() < 1, "one row far away moves it little"


def test_the_median_of_one_row_is_the_row() -> None:
    assert torch.allclose(geometric_median(rows(1).double()), rows(1)[0].double())


@pytest.mark.parametrize("init", ["mean", "geometric_median"])
def test_the_decoders_bias_begins_at_the_centre_that_was_asked_for(init: str) -> None:
    sae = built(TopKSAE.model_validate({"hidden_dim": D_SAE, "seed": 0, "k": 3, "b_dec_init": init}))
    x = rows().double()
    centre = x.mean(0) if init == "mean" else geometric_median(x)
    assert torch.allclose(sae.b_dec / sae.scale, centre.float(), atol=1e-5)
    assert ((x - centre) * sae.scale).square().sum(1).mean().item() == pytest.approx(D_IN, rel=1e-5)


RESAMPLED: list[SAEConfig] = [
    TopKSAE(hidden_dim=D_SAE, seed=0, k=3),
    BatchTopKSAE(hidden_dim=D_SAE, seed=0, k=3),
    JumpReLUSAE(hidden_dim=D_SAE, seed=0, initial_threshold=0.5),
    GatedSAE(hidden_dim=D_SAE, seed=0),
]


@pytest.mark.parametrize("config", RESAMPLED, ids=lambda config: config.kind)
@torch.no_grad()
def test_dead_latents_begin_anew_as_what_is_reconstructed_worst(config: SAEConfig) -> None:
    sae, x = built(config), rows()
    for parameter in sae.by_latent:
        if parameter.dim() == 1:
            parameter.add_(0.1)
    far = torch.zeros(1, D_IN)
    far[0, 0] = 1000.0
    x = torch.cat([x, far])  # its loss is nearly all there is
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[5] = True
    before = [parameter.clone() for parameter in sae.by_latent]
    residual = functional.normalize((x - sae.decode(sae.encode(x)))[-1], dim=0)
    which = sae.resample(dead, x, torch.Generator().manual_seed(0))
    assert torch.equal(which, dead)
    assert torch.allclose(sae.W_dec[5], residual, atol=1e-4)
    others = sae.W_enc[~dead].norm(dim=1).mean()
    assert torch.allclose(sae.W_enc[5], 0.5 * others * residual, atol=1e-4)
    for parameter, old in zip(sae.by_latent, before, strict=True):
        assert torch.equal(parameter[~dead], old[~dead])
        if parameter.dim() == 1:
            assert not torch.equal(parameter[dead], old[dead])


@torch.no_grad()
def test_no_more_latents_begin_anew_than_there_are_rows_to_learn_from() -> None:
    sae = built(RESAMPLED[0])
    which = sae.resample(torch.ones(D_SAE, dtype=torch.bool), rows(4), torch.Generator().manual_seed(0))
    assert which.sum() == 4
    assert not sae.resample(torch.zeros(D_SAE, dtype=torch.bool), rows(4), torch.Generator()).any()


def test_resampling_brings_dead_latents_to_life_when_the_recipe_says_so() -> None:
    x = rows(2048)

    def dead_share(*resample_at: float) -> float:
        sae = built(TopKSAE(hidden_dim=D_SAE, seed=0, k=3, aux_k_coeff=0.0))
        with torch.no_grad():
            sae.b_enc[:16] = -50.0
        recipe = Recipe(3e-3, 64, max_epochs=6, dead_after_rows=1024, grad_clip=1.0, resample_at=resample_at)
        trainer = Trainer(sae, recipe, rows=len(x), device="cpu", seed=0)
        for _ in range(6):
            for batch in torch.split(x, 64):
                trainer.step(batch)
            figures = trainer.end_epoch()
        return figures.dead_share

    assert dead_share() >= 0.5
    assert dead_share(0.3) < 0.25
