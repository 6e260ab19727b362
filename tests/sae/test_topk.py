"""The `topk` kind: what it keeps, what its gradients are, how it scales, and that it finds a known dictionary."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mistudio_train.sae.base import StepInput
from mistudio_train.sae.recipe import Recipe
from mistudio_train.sae.scaled import ScaledOptions
from mistudio_train.sae.statistics import FeatureStatistics
from mistudio_train.sae.topk import TopKAutoencoder
from mistudio_train.sae.trainer import Trainer

from .batches import batches_of


def topk(d_in: int = 8, d_sae: int = 24, k: int = 3, aux_k_coeff: float = 1 / 32) -> TopKAutoencoder:
    return TopKAutoencoder(d_in, d_sae, ScaledOptions(aux_k_coeff), k=k, generator=torch.Generator().manual_seed(5))


def rows_of(count: int, d_in: int, seed: int = 0) -> Tensor:
    return torch.randn(count, d_in, generator=torch.Generator().manual_seed(seed))


def test_keeps_exactly_k_also_among_equal_values() -> None:
    sae = topk(d_in=4, d_sae=4, k=2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4))
    kept = sae.encode(torch.tensor([[2.0, 2.0, 2.0, 2.0], [1.0, 3.0, 3.0, 3.0]]))
    assert [sorted(row) for row in kept.tolist()] == [[0, 0, 2, 2], [0, 0, 3, 3]]


def test_encodes_the_k_largest_positive_ones() -> None:
    sae = topk(d_in=3, d_sae=3, k=2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
    expected = [[0.0, 4.0, 3.0], [0.0, 0.0, 0.5]]
    assert sae.encode(torch.tensor([[1.0, 4.0, 3.0], [-1.0, -2.0, 0.5]])).tolist() == expected


@pytest.mark.parametrize("with_dead", [False, True])
def test_the_gradient_of_a_step_is_that_of_its_loss(with_dead: bool) -> None:
    sae = topk().double()
    sae.prepare(rows_of(50, 8).double() + 1)
    x = rows_of(6, 8, seed=1).double() + 1
    dead = torch.arange(24) % 2 == 0 if with_dead else None
    sae.step(StepInput(x, 0, 1, dead)).loss.backward()  # type: ignore[no-untyped-call]
    residual = x * sae.scale - sae.decode(sae.encode(x)) * sae.scale
    for parameter in sae.parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, slope(sae, parameter, x, dead, residual.detach()), atol=1e-7, rtol=0)


def slope(sae: TopKAutoencoder, parameter: Tensor, x: Tensor, dead: Tensor | None, residual: Tensor) -> Tensor:
    """The gradient by central differences of the loss, with the auxiliary loss' target held fixed, written densely."""

    def loss() -> float:
        z = x * sae.scale
        positive = functional.linear(z - sae.b_dec, sae.W_enc, sae.b_enc).relu()
        kept = torch.where(positive >= positive.topk(sae.k, dim=1).values[:, -1:], positive, 0)
        total = (kept @ sae.W_dec + sae.b_dec - z).square().mean()
        if dead is not None:
            candidates = positive * dead
            kept = torch.where(candidates >= candidates.topk(sae.k_aux, dim=1).values[:, -1:], candidates, 0)
            error = kept @ sae.W_dec - residual
            total = total + sae.aux_k_coeff * error.square().sum() / residual.square().sum()
        return float(total)

    slopes, flat = torch.zeros_like(parameter), parameter.detach().view(-1)
    with torch.no_grad():
        for i in range(flat.numel()):
            value = flat[i].item()
            flat[i] = value + 1e-6
            above = loss()
            flat[i] = value - 1e-6
            slopes.view(-1)[i] = (above - loss()) / 2e-6
            flat[i] = value
    return slopes


def test_the_auxiliary_gradient_reaches_encoder_and_decoder_of_dead_latents() -> None:
    sae = topk()
    with torch.no_grad():
        sae.b_enc[:6] = -1.5  # never among the k largest, sometimes positive
    dead = torch.arange(24) < 6
    x = rows_of(200, 8) * 1.5
    output = sae.step(StepInput(x, 0, 1, dead))
    assert output.active_rows_F[:6].sum() < 20
    output.sparsity_loss.backward()  # type: ignore[no-untyped-call]
    for parameter in sae.by_latent:
        assert parameter.grad is not None
        per_latent = parameter.grad.reshape(24, -1).abs().sum(1)
        assert bool((per_latent[:6] > 0).all())
        assert bool((per_latent[6:] == 0).all())


def test_the_auxiliary_loss_by_hand() -> None:
    sae = topk(d_in=2, d_sae=2, k=1, aux_k_coeff=0.5)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
    # x = (3, 1): the first is kept, the residual is (0, 1); k_aux = 1 and the dead second gives it exactly.
    x = torch.tensor([[3.0, 1.0]])
    dead = torch.tensor([False, True])
    output = sae.step(StepInput(x, 0, 1, dead))
    assert output.reconstruction_loss.item() == 0.5
    assert output.sparsity_loss.item() == 0.0
    with torch.no_grad():
        sae.W_dec[1, 1] = -1.0
    # The dead latent now adds (0, -1): error 2² over energy 1, half of it.
    assert sae.step(StepInput(x, 0, 1, dead)).sparsity_loss.item() == 2.0
    assert sae.step(StepInput(x, 0, 1, None)).sparsity_loss.item() == 0.0
    assert sae.step(StepInput(x, 0, 1, torch.zeros(2, dtype=torch.bool))).sparsity_loss.item() == 0.0


def test_prepare_centres_and_scales() -> None:
    sae, x = topk(), rows_of(1000, 8) * 7 + torch.arange(8.0)
    sae.prepare(x)
    encoder_input = x * sae.scale - sae.b_dec
    torch.testing.assert_close(encoder_input.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    assert encoder_input.square().sum(1).mean().item() == pytest.approx(8, rel=1e-5)
    sae.prepare(torch.ones(4, 8))
    assert sae.scale.item() == 1.0


def test_the_decoder_keeps_norm_one_and_its_gradient_has_no_part_along_it() -> None:
    sae = topk()
    sae.step(StepInput(rows_of(64, 8), 0, 1)).loss.backward()  # type: ignore[no-untyped-call]
    sae.before_update()
    assert sae.W_dec.grad is not None
    assert sae.W_dec.grad.abs().max() > 1e-3
    along = (sae.W_dec.grad * sae.W_dec).sum(1)
    torch.testing.assert_close(along, torch.zeros(24), atol=1e-7, rtol=0)
    with torch.no_grad():
        sae.W_dec.mul_(3)
    sae.after_update()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24))


def test_starts_with_unit_directions_and_an_encoder_that_is_half_of_them() -> None:
    sae = topk()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24))
    assert torch.equal(sae.W_enc, 0.5 * sae.W_dec)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    assert not sae.b_enc.any()


def test_training_in_other_units_changes_only_the_units() -> None:
    """Inputs are scaled, so that rows a thousand times as large give the same SAE in their own units."""
    x = rows_of(256, 8) + 2
    small, large = trained(x, epochs=3), trained(x * 1024, epochs=3)
    assert torch.equal(small.W_enc, large.W_enc)
    torch.testing.assert_close(small.encode(x) * 1024, large.encode(x * 1024))


def trained(x: Tensor, epochs: int) -> TopKAutoencoder:
    sae = topk()
    recipe = Recipe(learning_rate=3e-3, batch_size=64, max_epochs=epochs, dead_after_rows=10**6, grad_clip=1.0)
    trainer = Trainer(sae, recipe, rows=len(x), device="cpu", seed=0)
    trainer.prepare(x)
    train(trainer, x)
    return sae


def train(trainer: Trainer, x: Tensor) -> None:
    stop_reason = None
    while stop_reason is None:
        for batch in batches_of(trainer):
            trainer.step(x[batch])
        stop_reason = trainer.end_epoch().stop_reason


def dictionary_rows(count: int, d_in: int, features: int, active: int) -> tuple[Tensor, Tensor]:
    """Rows that are sums of `active` of the unit directions, with strengths 1 to 2, and the directions."""
    generator = torch.Generator().manual_seed(1)
    directions = functional.normalize(torch.randn(features, d_in, generator=generator), dim=1)
    chosen = torch.rand(count, features, generator=generator).topk(active, dim=1).indices
    strengths = 1 + torch.rand(count, active, generator=generator)
    return (strengths[:, :, None] * directions[chosen]).sum(1), directions


def test_finds_a_known_dictionary() -> None:
    every, directions = dictionary_rows(18_000, d_in=32, features=48, active=3)
    x, held_out = every[:16_384], every[16_384:]
    sae = topk(d_in=32, d_sae=96, k=3)
    recipe = Recipe(
        learning_rate=3e-3, batch_size=512, max_epochs=20, dead_after_rows=30_000, decay=0.2, warmup=0.05, grad_clip=1.0
    )
    trainer = Trainer(sae, recipe, rows=len(x), device="cpu", seed=0)
    trainer.prepare(x[:4096])
    train(trainer, x)
    folded, statistics = sae.folded(), FeatureStatistics(96, 32)
    acts = folded.encode(held_out)
    statistics.update(held_out, folded.decode(acts), acts)
    fvu = statistics.metrics().fvu
    assert fvu is not None
    assert fvu < 0.08
    recovered = (directions @ folded.decoder_weight).max(1).values
    assert recovered.mean() > 0.95


def test_the_auxiliary_loss_revives_dead_latents() -> None:
    x, _ = dictionary_rows(4096, d_in=16, features=64, active=2)  # so that every latent is wanted

    def dead_share_with(aux_k_coeff: float) -> float:
        sae = topk(d_in=16, d_sae=64, k=2, aux_k_coeff=aux_k_coeff)
        recipe = Recipe(learning_rate=3e-3, batch_size=256, max_epochs=12, dead_after_rows=4096, grad_clip=1.0)
        trainer = Trainer(sae, recipe, rows=len(x), device="cpu", seed=0)
        trainer.prepare(x)
        with torch.no_grad():
            sae.b_enc[:32] = -1.0  # half of the latents begin too low to be chosen
        train(trainer, x)
        return float((sae.encode(x) > 0).any(0)[:32].logical_not().double().mean())

    assert dead_share_with(0.0) > 0.8
    assert dead_share_with(1 / 32) < 0.2
