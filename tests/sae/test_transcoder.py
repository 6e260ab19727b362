"""SAEs that reconstruct another site than they read: against plain autograd, folded, resampled, and gone on with."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mistudio_schemas import BatchTopKSAE, GatedSAE, JumpReLUSAE, MatryoshkaSAE, SAEConfig, StandardSAE, TopKSAE
from mistudio_train.sae.base import StepInput, sides
from mistudio_train.sae.build import build_sae
from mistudio_train.sae.recipe import Recipe
from mistudio_train.sae.scaled import ScaledAutoencoder
from mistudio_train.sae.trainer import Trainer

from .reference import adam_of, update

D, D_SAE, K, B = 8, 32, 3, 32
SIZE: dict[str, Any] = {"hidden_dim": D_SAE, "seed": 0, "predicts": "mlp_out"}
KINDS_OF: list[SAEConfig] = [
    TopKSAE(**SIZE, k=K),
    BatchTopKSAE(**SIZE, k=K),
    MatryoshkaSAE(**SIZE, k=K),
    JumpReLUSAE(**SIZE, target_l0=K, initial_threshold=0.5),
    GatedSAE(**SIZE),
    StandardSAE(**SIZE, penalty="decoder_norm"),
]
of_every_kind = pytest.mark.parametrize("config", KINDS_OF, ids=lambda config: config.kind)


def rows(count: int = 640, seed: int = 0) -> Tensor:
    """What a small MLP reads, of one scale and centre, and what it makes of it, of others: side by side."""
    generator = torch.Generator().manual_seed(seed)
    x_ND = 3 * torch.randn(count, D, generator=generator) + torch.arange(float(D))
    up, down = (torch.randn(shape, generator=torch.Generator().manual_seed(9)) for shape in ((D, 4 * D), (4 * D, D)))
    return torch.cat([x_ND, (x_ND @ up).relu() @ down / 20 - 4], 1)


def trainer_of(config: SAEConfig, **fields: Any) -> Trainer:
    chosen: dict[str, Any] = {"max_epochs": 2, "dead_after_rows": 10**9, "grad_clip": 1.0} | fields
    recipe = Recipe(3e-3, B, **chosen)
    trainer = Trainer(build_sae(config, D), recipe, rows=len(rows()), device="cpu", seed=0)
    trainer.prepare(rows())
    return trainer


def trained(config: SAEConfig) -> ScaledAutoencoder:
    trainer = trainer_of(config, max_epochs=8)
    for _ in range(8):
        for batch in torch.split(rows(), B):
            trainer.step(batch)
        trainer.end_epoch()
    assert isinstance(trainer.sae, ScaledAutoencoder)
    return trainer.sae


def dense_loss(sae: Any, w: dict[str, Tensor], rows_BD: Tensor, inputs: StepInput) -> Any:
    """The kind's formulas in dense matrices, with straight-through estimates where it has some."""
    x_BD, y_BD = rows_BD[:, :D] * sae.x_scale - sae.x_centre, rows_BD[:, D:] * sae.scale
    p_BF = x_BD @ w["W_enc"].T + w["b_enc"]

    def error(acts_BF: Tensor, upto: int = D_SAE) -> Any:
        return (acts_BF[:, :upto] @ w["W_dec"][:upto] + w["b_dec"] - y_BD).square().mean()

    match sae.kind:
        case "topk":
            kept = p_BF.relu().topk(K, dim=1)
            return error(torch.zeros_like(p_BF).scatter(1, kept.indices, kept.values))
        case "batchtopk" | "matryoshka":
            least = p_BF.flatten().topk(K * len(p_BF)).values.min()
            acts_BF = torch.where(p_BF >= least, p_BF.relu(), 0)
            return torch.stack([error(acts_BF, upto) for upto in getattr(sae, "prefixes", (D_SAE,))]).mean()
        case "standard":
            acts_BF = p_BF.relu()
            norms = w["W_dec"].norm(dim=1)
            return error(acts_BF) + 2.0 * inputs.risen(0.05) * (acts_BF * norms).sum() / y_BD.numel()
        case "gated":
            gate_BF, gain_F = p_BF.relu(), w["r_mag"].exp()
            acts_BF = (p_BF > 0) * (gain_F * (p_BF - w["b_enc"]) + w["b_mag"]).relu()
            of_gates = (gate_BF @ w["W_dec"].detach() + w["b_dec"].detach() - y_BD).square().mean()
            return error(acts_BF) + 3.0 * inputs.risen(0.05) * gate_BF.sum() / y_BD.numel() + of_gates
    threshold_F, near = w["log_threshold"].exp(), sae.bandwidth
    inside = ((p_BF - threshold_F).abs() < near / 2).float().detach()
    above = (p_BF > threshold_F).float().detach()
    # values whose gradients are the estimates: -θ/ε of the activation and -1/ε of the step, of each θ within the window
    moved = -(threshold_F - threshold_F.detach()) * inside / near
    acts_BF, steps_BF = p_BF * above + threshold_F.detach() * moved, above + moved
    return error(acts_BF) + inputs.risen(0.2) * (steps_BF.sum() / len(p_BF) / K - 1).square()


@of_every_kind
def test_twenty_steps_are_those_of_plain_autograd(config: SAEConfig) -> None:
    trainer = trainer_of(config)
    sae: Any = trainer.sae
    weights = {name: one.detach().clone().requires_grad_() for name, one in sae.named_parameters()}
    free = config.kind == "standard"
    adam = adam_of(weights, free=free)
    for batch in torch.split(rows(), B)[:20]:
        loss = dense_loss(sae, weights, batch, StepInput(batch, trainer.steps, trainer.total_steps))
        update(weights.values(), weights["W_dec"], adam, loss, trainer, free=free)
        trainer.step(batch)
    for name, one in sae.named_parameters():
        torch.testing.assert_close(one.detach(), weights[name].detach(), atol=1e-5, rtol=1e-5)


@of_every_kind
@torch.no_grad()
def test_both_ends_begin_at_their_own_centre_and_scale(config: SAEConfig) -> None:
    sae: Any = trainer_of(config).sae
    x_ND, y_ND = rows()[:, :D], rows()[:, D:]
    for one, scale, centre in ((x_ND, sae.x_scale, sae.x_centre), (y_ND, sae.scale, sae.b_dec)):
        torch.testing.assert_close(centre / scale, one.mean(0), atol=1e-4, rtol=1e-4)
        assert float(((one - one.mean(0)) * scale).square().sum(1).mean()) == pytest.approx(D, rel=1e-4)


@of_every_kind
@torch.no_grad()
def test_the_decoder_begins_where_a_regression_takes_the_encoder(config: SAEConfig) -> None:
    sae: Any = trainer_of(config).sae
    x_ND, y_ND = rows()[:, :D] * sae.x_scale - sae.x_centre, rows()[:, D:] * sae.scale - sae.b_dec
    augmented = torch.cat([x_ND, (0.1 * len(x_ND)) ** 0.5 * torch.eye(D)])  # rows that pull the map towards zero
    mapped = torch.linalg.lstsq(augmented, torch.cat([y_ND, torch.zeros(D, D)])).solution
    expected = sae.decoder_start * functional.normalize(sae.W_enc @ mapped, dim=1)
    torch.testing.assert_close(sae.W_dec, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_of_what_does_not_vary_the_decoder_stays_as_it_was_drawn() -> None:
    sae: Any = build_sae(KINDS_OF[0], D)
    drawn = sae.W_dec.clone()
    sae.prepare(torch.ones(16, 2 * D))
    assert torch.equal(sae.W_dec, drawn)


@of_every_kind
def test_the_folded_weights_do_the_same_and_the_input_s_centre_never_moves(config: SAEConfig) -> None:
    before = trainer_of(config).sae.state_dict()
    sae: Any = trained(config)
    folded, (x_BD, y_BD) = sae.folded(), sides(rows(200, seed=1), D)
    assert y_BD is not None
    with torch.no_grad():
        acts_BF = sae.encode(x_BD)
        assert 0 < float((acts_BF > 0).float().mean()) < 1
        torch.testing.assert_close(folded.encode(x_BD), acts_BF, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(folded.decode(acts_BF), sae.decode(acts_BF), atol=1e-4, rtol=1e-4)
    error = (folded.decode(folded.encode(x_BD)) - y_BD).square().sum()
    assert float(error / (y_BD - y_BD.mean(0)).square().sum()) < 0.9
    assert torch.equal(sae.x_centre, before["x_centre"])
    assert torch.equal(sae.x_scale, before["x_scale"])


def test_an_ordinary_sae_has_no_state_of_a_transcoder() -> None:
    ordinary = build_sae(TopKSAE(hidden_dim=D_SAE, seed=0, k=K), D)
    assert not {"x_scale", "x_centre"} & set(ordinary.state_dict())
    whole = torch.randn(4, D)
    x_BD, y_BD = sides(whole, D)
    assert y_BD is None
    assert x_BD.data_ptr() == whole.data_ptr()


@of_every_kind
def test_what_goes_on_from_any_step_is_what_was_never_interrupted(config: SAEConfig) -> None:
    """With dead latents, their losses, and some that begin anew."""

    def fresh() -> Trainer:
        return trainer_of(config, dead_after_rows=3 * B, resample_at=(0.3,))

    batches = [batch for _ in range(2) for batch in torch.split(rows(), B)]
    whole, first = fresh(), fresh()
    for trainer, upto in ((whole, 40), (first, 9)):
        for step, batch in enumerate(batches[:upto]):
            if step == 20:
                trainer.end_epoch()
            trainer.step(batch)
    second = Trainer(build_sae(config, D), first.recipe, rows=len(rows()), device="cpu", seed=0)
    second.load_state_dict(first.state_dict())
    for step, batch in enumerate(batches[9:], 9):
        if step == 20:
            second.end_epoch()
        second.step(batch)
    for name, one in whole.sae.state_dict().items():
        assert torch.equal(one, second.sae.state_dict()[name]), name


@torch.no_grad()
def test_dead_latents_begin_anew_from_what_was_read_towards_what_is_reconstructed_worst() -> None:
    sae: Any = trainer_of(KINDS_OF[0]).sae
    far = torch.zeros(1, 2 * D)
    far[0, 1], far[0, D] = 7.0, 1000.0  # its loss is nearly all there is
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[5] = True
    all_rows = torch.cat([rows(), far])
    x_BD, y_BD = all_rows[:, :D], all_rows[:, D:]
    residual = functional.normalize((y_BD - sae.decode(sae.encode(x_BD)))[-1], dim=0)
    read = functional.normalize(x_BD[-1] * sae.x_scale - sae.x_centre, dim=0)
    assert torch.equal(sae.resample(dead, all_rows, torch.Generator().manual_seed(0)), dead)
    assert torch.allclose(sae.W_dec[5], residual, atol=1e-4)
    assert torch.allclose(sae.W_enc[5], 0.5 * sae.W_enc[~dead].norm(dim=1).mean() * read, atol=1e-4)


def test_the_losses_of_dead_latents_are_of_what_is_reconstructed() -> None:
    sae, batch = trained(KINDS_OF[0]), rows(B, seed=2)
    x_BD, y_BD = sides(batch, D)
    assert y_BD is not None
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[:8] = True
    output = sae.step(StepInput(x_BD, 0, 1, dead, y_BD))
    with torch.no_grad():
        residual = (y_BD - sae.decode(sae.encode(x_BD))) * sae.scale
        p_BF = (x_BD * sae.x_scale - sae.x_centre) @ sae.W_enc.T + sae.b_enc
        kept = p_BF[:, :8].relu().topk(D // 2, dim=1)
        acts_BF = torch.zeros(len(p_BF), 8).scatter(1, kept.indices, kept.values)
        expected = (acts_BF @ sae.W_dec[:8] - residual).square().sum() / residual.square().sum()
    assert output.sparsity_loss.item() == pytest.approx(float(expected), rel=1e-4)
