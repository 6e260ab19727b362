"""Every kind that keeps a number of latents, against its formulas in dense matrices with autograd's own gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mistudio_schemas import BatchTopKSAE, MatryoshkaSAE, SAEConfig, TopKSAE
from mistudio_train.sae.base import StepInput
from mistudio_train.sae.batchtopk import BatchTopKAutoencoder
from mistudio_train.sae.build import build_sae
from mistudio_train.sae.ksparse import KSparseAutoencoder
from mistudio_train.sae.matryoshka import MatryoshkaAutoencoder
from mistudio_train.sae.recipe import Recipe
from mistudio_train.sae.trainer import Trainer

from .batches import batches_of
from .reference import adam_of, update

D_IN, D_SAE, K, BATCH, STEPS = 10, 40, 4, 32, 20
KINDS: list[SAEConfig] = [
    TopKSAE(hidden_dim=D_SAE, seed=4, k=K),
    BatchTopKSAE(hidden_dim=D_SAE, seed=4, k=K),
    MatryoshkaSAE(hidden_dim=D_SAE, seed=4, k=K, group_shares=[0.1, 0.25]),
]
of_each_kind = pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)


def rows() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(STEPS * BATCH, D_IN, generator=generator) + torch.arange(float(D_IN))


def built(config: SAEConfig) -> KSparseAutoencoder:
    sae = build_sae(config, D_IN)
    assert isinstance(sae, KSparseAutoencoder)
    sae.prepare(rows())
    return sae


class Dense:
    """The same SAE in plain matrices: masks in place of choices, autograd in place of our gradients."""

    def __init__(self, sae: KSparseAutoencoder) -> None:
        self.sae = sae
        self.weights = [weight.detach().clone().requires_grad_() for weight in sae.parameters()]
        self.prefixes = sae.prefixes if isinstance(sae, MatryoshkaAutoencoder) else (sae.d_sae,)

    def losses(self, x: Tensor, dead: Tensor | None) -> tuple[Tensor, Tensor]:
        w_enc, b_enc, w_dec, b_dec = self.weights
        z = x * self.sae.scale
        pre = (z - b_dec.detach()) @ w_enc.T + b_enc + (b_dec.detach() - b_dec) @ w_enc.T
        h = torch.where(self.kept(pre.detach()), pre.relu(), 0)
        z_hats = [h[:, :end] @ w_dec[:end] + b_dec for end in self.prefixes]
        reconstruction = torch.stack([(z_hat - z).square().mean() for z_hat in z_hats]).mean()
        aux = z.new_zeros(())
        if dead is not None and dead.any():
            residual = (z - z_hats[-1]).detach()
            candidates = pre.detach().masked_fill(~dead, -torch.inf)
            border = candidates.topk(self.sae.k_aux, dim=1).values[:, -1:]
            a = torch.where(dead & (candidates >= border), pre.relu(), 0)
            error = (a @ w_dec - residual).square().sum()
            aux = self.sae.aux_k_coeff * error / residual.square().sum()
        return reconstruction, aux

    def kept(self, pre: Tensor) -> Tensor:
        if isinstance(self.sae, BatchTopKAutoencoder):
            return pre >= pre.flatten().topk(K * len(pre)).values[-1]
        return pre >= pre.topk(K, dim=1).values[:, -1:]


@of_each_kind
def test_twenty_steps_equal_the_formulas_in_dense_matrices(config: SAEConfig) -> None:
    sae, x = built(config), rows()
    recipe = Recipe(1e-2, BATCH, max_epochs=1, dead_after_rows=4 * BATCH, grad_clip=1.0, warmup=0.2, decay=0.2)
    with torch.no_grad():
        sae.b_enc[: D_SAE // 3] = -1.0  # so that some are dead for a while
    dense = Dense(sae)
    trainer = Trainer(sae, recipe, rows=len(x), device="cpu", seed=0)
    adam = adam_of(dict(zip(("W_enc", "b_enc", "W_dec", "b_dec"), dense.weights, strict=True)))
    aux_losses = []
    for batch in batches_of(trainer):
        reconstruction, aux = dense.losses(x[batch], trainer._dead_latents() if trainer._can_be_dead else None)
        update(dense.weights, dense.weights[2], adam, reconstruction + aux, trainer)
        trainer.step(x[batch])
        figures = trainer.measure()
        assert figures is not None
        assert abs(figures.reconstruction_loss - float(reconstruction.detach())) < 1e-5
        assert abs(figures.sparsity_loss - float(aux.detach())) < 1e-5
        aux_losses.append(figures.sparsity_loss)
        for ours, theirs in zip(sae.parameters(), dense.weights, strict=True):
            torch.testing.assert_close(ours.detach(), theirs.detach(), atol=1e-5, rtol=0)
    assert trainer.steps == STEPS
    assert max(aux_losses) > 0


@of_each_kind
def test_l0_and_counts_are_of_what_is_kept(config: SAEConfig) -> None:
    sae, x = built(config), rows()[:BATCH]
    output = sae.step(StepInput(x, 0, 1))
    h = torch.where(Dense(sae).kept(sae.pre_activations(x)), sae.pre_activations(x).relu(), 0)
    assert torch.equal(output.active_rows_F, (h > 1e-6).sum(0))
    assert output.l0.item() == pytest.approx(float((h > 1e-6).sum(1).double().mean()))


def trained(config: SAEConfig, change: Callable[[KSparseAutoencoder], None] = lambda _: None) -> KSparseAutoencoder:
    sae, x = built(config), rows()
    change(sae)
    recipe = Recipe(1e-2, BATCH, max_epochs=4, dead_after_rows=10**6, grad_clip=1.0)
    trainer = Trainer(sae, recipe, rows=len(x), device="cpu", seed=0)
    for _ in range(4):
        for batch in batches_of(trainer):
            trainer.step(x[batch])
        trainer.end_epoch()
    return sae


@pytest.mark.parametrize("config", KINDS[1:], ids=lambda config: config.kind)
def test_the_threshold_keeps_k_latents_in_the_mean(config: SAEConfig) -> None:
    acts = trained(config).encode(rows())
    assert (acts > 0).sum(1).double().mean().item() == pytest.approx(K, rel=0.1)
    assert len(set((acts > 0).sum(1).tolist())) > 1  # more of one row than of another


@of_each_kind
def test_activations_of_a_finished_one_are_above_nothing_but_its_own_rule(config: SAEConfig) -> None:
    sae, x = trained(config), rows()
    pre, acts = sae.pre_activations(x), sae.encode(x) * sae.scale
    kept = acts > 0
    torch.testing.assert_close(acts[kept], pre[kept])
    if isinstance(sae, BatchTopKAutoencoder):
        assert torch.equal(kept, pre > sae.threshold)


def test_the_threshold_begins_at_the_first_value_and_follows_slowly() -> None:
    sae = built(BatchTopKSAE(hidden_dim=D_SAE, seed=4, k=1, threshold_rate=0.25))
    assert isinstance(sae, BatchTopKAutoencoder)
    assert sae.folded().threshold is not None
    assert not sae.folded().threshold.any()  # type: ignore[union-attr]
    sae.choose(torch.tensor([[4.0, 2.0], [1.0, 3.0]]))
    assert sae.threshold.item() == 3.0
    sae.choose(torch.tensor([[4.0, 2.0], [1.0, 7.0]]))
    assert sae.threshold.item() == 3.25


def test_the_first_latents_of_a_matryoshka_reconstruct_better_than_those_of_another() -> None:
    def error_of_first(config: SAEConfig) -> float:
        sae, x = trained(config), rows()
        acts = sae.encode(x)
        acts[:, 16:] = 0
        return float((sae.decode(acts) - x).square().mean().detach())

    nested = MatryoshkaSAE(hidden_dim=D_SAE, seed=4, k=K, group_shares=[0.1, 0.3])
    assert error_of_first(nested) < 0.9 * error_of_first(KINDS[1])


def test_the_prefixes_are_those_of_the_shares() -> None:
    def prefixes(d_sae: int, shares: list[float]) -> tuple[int, ...]:
        sae = build_sae(MatryoshkaSAE(hidden_dim=d_sae, seed=0, k=2, group_shares=shares), D_IN)
        assert isinstance(sae, MatryoshkaAutoencoder)
        return sae.prefixes

    assert prefixes(1024, [1 / 32, 1 / 16, 1 / 8, 1 / 4]) == (32, 96, 224, 480, 1024)
    assert prefixes(8, [0.01, 0.01, 0.5]) == (4, 8)  # groups of no latent are none
    assert prefixes(8, [0.5, 0.499]) == (4, 8)
