"""The `standard` kind against the seed's formulas, written out again by hand."""

import math

import torch
from torch import Tensor

from mistudio_schemas import StandardSAE
from mistudio_train.sae.base import StepInput
from mistudio_train.sae.build import build_sae
from mistudio_train.sae.recipe import Recipe
from mistudio_train.sae.standard import StandardAutoencoder
from mistudio_train.sae.trainer import Trainer

from .batches import batches_of

D_IN, D_SAE, COEFF, LEARNING_RATE = 12, 40, 1e-3, 1e-3


class Reference:
    """The seed's SAE with gradients and Adam worked out by hand: no autograd, no optimiser, no layer."""

    def __init__(self, generator: torch.Generator) -> None:
        bound = math.sqrt(6 / (D_IN + D_SAE))
        encoder = (torch.rand(D_SAE, D_IN, generator=generator) * 2 - 1) * bound
        self.weights = [encoder, torch.full((D_SAE,), -0.1), encoder.clone(), torch.zeros(D_IN)]
        self.moments = [(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in self.weights]
        self.steps = 0

    def step(self, x: Tensor) -> tuple[float, float]:
        """One update; the losses before it."""
        w_enc, b_enc, w_dec, b_dec = self.weights
        pre = x @ w_enc.T + b_enc
        h = pre.clamp(min=0)
        error = h @ w_dec + b_dec - x
        d_error = 2 * error / error.numel()
        d_pre = (d_error @ w_dec.T + COEFF / h.numel()) * (pre > 0)
        self._adam([d_pre.T @ x, d_pre.sum(0), h.T @ d_error, d_error.sum(0)])
        return float((error**2).mean()), COEFF * float(h.abs().mean())

    def _adam(self, gradients: list[Tensor]) -> None:
        self.steps += 1
        for weight, gradient, (first, second) in zip(self.weights, gradients, self.moments, strict=True):
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.999).add_(0.001 * gradient**2)
            corrected = (second / (1 - 0.999**self.steps)).sqrt() + 1e-8
            weight.sub_(LEARNING_RATE * first / (1 - 0.9**self.steps) / corrected)


def standard(seed: int = 3) -> StandardAutoencoder:
    return StandardAutoencoder(D_IN, D_SAE, COEFF, torch.Generator().manual_seed(seed))


def test_starts_as_the_seed_says() -> None:
    sae, reference = standard(), Reference(torch.Generator().manual_seed(3))
    for ours, theirs in zip(sae.parameters(), reference.weights, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, atol=1e-7, rtol=0)
    assert torch.equal(sae.W_dec, sae.W_enc)
    assert sae.W_dec.data_ptr() != sae.W_enc.data_ptr()


def test_twenty_steps_equal_the_formulas_written_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20 * 16, D_IN, generator=generator)
    recipe = Recipe(learning_rate=LEARNING_RATE, batch_size=16, max_epochs=1, dead_after_rows=len(rows))
    trainer, reference = (
        Trainer(standard(), recipe, rows=len(rows), device="cpu", seed=0),
        Reference(torch.Generator().manual_seed(3)),
    )
    for batch in batches_of(trainer):
        expected_reconstruction, expected_sparsity = reference.step(rows[batch])
        trainer.step(rows[batch])
        figures = trainer.measure()
        assert figures is not None
        assert abs(figures.reconstruction_loss - expected_reconstruction) < 1e-6
        assert abs(figures.sparsity_loss - expected_sparsity) < 1e-8
        for ours, theirs in zip(trainer.sae.parameters(), reference.weights, strict=True):
            torch.testing.assert_close(ours.detach(), theirs, atol=1e-6, rtol=0)
    assert trainer.steps == reference.steps == 20


def test_one_step_by_hand() -> None:
    sae = StandardAutoencoder(1, 2, 0.5, torch.Generator())
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0], [-1.0]]))
        sae.b_enc.copy_(torch.tensor([0.5, 0.5]))
        sae.W_dec.copy_(torch.tensor([[1.0], [1.0]]))
        sae.b_dec.fill_(0.25)
    # x = 1: h = (1.5, 0), x_hat = 1.75; x = 0: h = (0.5, 0.5), x_hat = 1.25
    output = sae.step(StepInput(torch.tensor([[1.0], [0.0]]), step=0, total_steps=1))
    assert output.reconstruction_loss.item() == (0.75**2 + 1.25**2) / 2
    assert output.sparsity_loss.item() == 0.5 * 2.5 / 4
    assert output.loss.item() == output.reconstruction_loss.item() + output.sparsity_loss.item()
    assert output.l0.item() == 1.5
    assert output.active_rows_F.tolist() == [2, 1]


def test_an_activation_at_the_threshold_is_not_active() -> None:
    sae = StandardAutoencoder(1, 1, 0.5, torch.Generator())
    with torch.no_grad():
        sae.W_enc.fill_(1.0)
        sae.b_enc.zero_()
    output = sae.step(StepInput(torch.tensor([[1e-6], [1.1e-6], [-1.0]]), step=0, total_steps=1))
    assert output.active_rows_F.tolist() == [1]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    def weights(seed: int) -> Tensor:
        config = StandardSAE(hidden_dim=D_SAE, seed=seed, sparsity_coeff=COEFF)
        return build_sae(config, D_IN).W_enc.detach()

    torch.manual_seed(1)
    first = weights(7)
    torch.manual_seed(2)
    assert torch.equal(first, weights(7))
    assert not torch.equal(first, weights(8))


def test_building_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    standard()
    assert torch.equal(before, torch.random.get_rng_state())


def test_only_the_latents_asked_for_are_reset() -> None:
    sae = standard()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(1.0)
    before = [parameter.detach().clone() for parameter in sae.parameters()]
    which = torch.zeros(D_SAE, dtype=torch.bool)
    which[[2, 5]] = True
    sae.reset_latents(which, torch.Generator().manual_seed(11))
    fresh = Reference(torch.Generator().manual_seed(11)).weights[0]
    torch.testing.assert_close(sae.W_enc[which], fresh[which], atol=1e-7, rtol=0)
    assert sae.b_enc[which].tolist() == [torch.tensor(-0.1).item()] * 2
    assert torch.equal(sae.W_dec[which], sae.W_enc[which])
    assert torch.equal(sae.W_enc[~which], before[0][~which])
    assert torch.equal(sae.b_enc[~which], before[1][~which])
    assert torch.equal(sae.W_dec[~which], before[2][~which])
    assert torch.equal(sae.b_dec, before[3])
