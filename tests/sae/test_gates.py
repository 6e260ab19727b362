"""`jumprelu`, `gated` and the `standard` of weighted L1 against their formulas in dense matrices; what they learn."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mistudio_schemas import GatedSAE, JumpReLUSAE, SAEConfig, StandardSAE
from mistudio_train.sae import gates, sparse
from mistudio_train.sae.base import StepInput
from mistudio_train.sae.build import build_sae
from mistudio_train.sae.gated import GatedAutoencoder
from mistudio_train.sae.gates import gate, jump_relu, rectify
from mistudio_train.sae.jumprelu import JumpReLUAutoencoder
from mistudio_train.sae.l1 import L1Autoencoder
from mistudio_train.sae.recipe import Recipe
from mistudio_train.sae.scaled import ScaledAutoencoder
from mistudio_train.sae.trainer import Trainer

from .batches import batches_of
from .reference import adam_of, update

D_IN, D_SAE, BATCH, STEPS = 10, 40, 32, 20
BANDWIDTH = 0.4
KINDS: list[SAEConfig] = [
    JumpReLUSAE(hidden_dim=D_SAE, seed=4, target_l0=6, bandwidth=BANDWIDTH, initial_threshold=0.3),
    JumpReLUSAE(hidden_dim=D_SAE, seed=4, target_l0=None, bandwidth=BANDWIDTH, initial_threshold=0.3),
    GatedSAE(hidden_dim=D_SAE, seed=4, sparsity_coeff=0.5),
    StandardSAE(hidden_dim=D_SAE, seed=4, penalty="decoder_norm", sparsity_coeff=0.5, sparsity_warmup=0.3),
]
of_each_kind = pytest.mark.parametrize("config", KINDS, ids=["jumprelu, target", "jumprelu, tanh", "gated", "l1"])


def rows(count: int = STEPS * BATCH) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(count, D_IN, generator=generator) + torch.arange(float(D_IN))


def built(config: SAEConfig) -> ScaledAutoencoder:
    sae = build_sae(config, D_IN)
    assert isinstance(sae, ScaledAutoencoder)
    sae.prepare(rows())
    return sae


class Jump(torch.autograd.Function):
    """Both of `jumprelu`'s functions on whole matrices, their estimates summed over rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, pre: Tensor, threshold: Tensor, step: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.step = step  # type: ignore[attr-defined]
        return (pre > threshold).to(pre.dtype) if step else pre * (pre > threshold)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, slope: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors  # type: ignore[attr-defined]
        near = ((pre - threshold).abs() < BANDWIDTH / 2).to(pre.dtype)
        if ctx.step:  # type: ignore[attr-defined]
            return None, -(near * slope).sum(0) / BANDWIDTH, None
        return slope * (pre > threshold), -(threshold * near * slope).sum(0) / BANDWIDTH, None


def dense_loss(sae: ScaledAutoencoder, weights: dict[str, Tensor], x: Tensor, inputs: StepInput) -> Tensor:
    """The loss without the auxiliary one, as the docstrings write it."""
    z = x * sae.scale
    b_dec = weights["b_dec"]
    pre = (z - b_dec) @ weights["W_enc"].T + weights["b_enc"]
    if isinstance(sae, GatedAutoencoder):
        magnitude = weights["r_mag"].exp() * (pre - weights["b_enc"]) + weights["b_mag"]
        h = (pre > 0) * magnitude.relu()
        z_gate = pre.relu() @ weights["W_dec"].detach() + b_dec.detach()
        risen = min(1.0, (inputs.step + 1) / round(sae.sparsity_warmup * inputs.total_steps))
        extra = risen * sae.sparsity_coeff * pre.relu().sum(1).mean() / D_IN + (z_gate - z).square().mean()
    elif isinstance(sae, L1Autoencoder):
        h = pre.relu()
        risen = min(1.0, (inputs.step + 1) / round(sae.sparsity_warmup * inputs.total_steps))
        norm = weights["W_dec"].norm(dim=1)
        norm = norm if inputs.step < 0.8 * inputs.total_steps else norm.detach()
        extra = risen * sae.sparsity_coeff * (h * norm).sum(1).mean() / D_IN
    else:
        assert isinstance(sae, JumpReLUAutoencoder)
        threshold = weights["log_threshold"].exp()
        h = Jump.apply(pre, threshold, False)  # type: ignore[no-untyped-call]
        if sae.target_l0 is None:
            penalty = (4 * h).tanh().sum(1).mean() / D_IN
        else:
            l0 = Jump.apply(pre, threshold, True).sum(1).mean()  # type: ignore[no-untyped-call]
            penalty = (l0 / sae.target_l0 - 1) ** 2
        extra = min(1.0, (inputs.step + 1) / round(sae.sparsity_warmup * inputs.total_steps)) * penalty
    reconstruction: Tensor = (h @ weights["W_dec"] + b_dec - z).square().mean()
    return reconstruction + extra


@of_each_kind
@pytest.mark.parametrize("dense_above", [0.0, 1.0], ids=["dense", "sparse"])
def test_twenty_steps_equal_the_formulas_in_dense_matrices(
    config: SAEConfig, dense_above: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "DENSE_ABOVE", dense_above)
    sae, x = built(config), rows()
    recipe = Recipe(1e-2, BATCH, max_epochs=1, dead_after_rows=10**6, grad_clip=1.0, warmup=0.2, decay=0.2)
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in sae.named_parameters()}
    trainer = Trainer(sae, recipe, rows=len(x), device="cpu", seed=0)
    free = isinstance(sae, L1Autoencoder)
    adam = adam_of(weights, free=free)
    for batch in batches_of(trainer):
        loss = dense_loss(sae, weights, x[batch], StepInput(x[batch], trainer.steps, trainer.total_steps))
        update(weights.values(), weights["W_dec"], adam, loss, trainer, free=free)
        trainer.step(x[batch])
        figures = trainer.measure()
        assert figures is not None
        assert abs(figures.loss - float(loss.detach())) < 1e-5
        for name, weight in sae.named_parameters():
            torch.testing.assert_close(weight.detach(), weights[name].detach(), atol=1e-5, rtol=0, msg=name)
    assert trainer.steps == STEPS


@pytest.mark.parametrize("everywhere", [False, True])
def test_jumps_and_their_estimates_by_hand(everywhere: bool) -> None:
    pre = torch.tensor([[0.5, 1.05], [0.95, 3.0]])
    active = sparse.Everywhere(2, 2) if everywhere else sparse.Active.at(torch.arange(4), 2, 2)
    values = active.pick(pre).clone().requires_grad_()
    threshold, bias = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    acts, number, tanh, counts = jump_relu(active, values, bias, threshold, 0.2, 0.5)
    assert acts.flatten().tolist() == pytest.approx([0, 1.05, 0, 3])
    assert number.item() == 2
    assert tanh.item() == pytest.approx(math.tanh(0.525) + math.tanh(1.5))
    assert counts.tolist() == [0, 2]
    slopes = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view_as(acts)
    inputs = values, threshold, bias
    by_value, by_threshold, by_bias = torch.autograd.grad((acts * slopes).sum(), inputs, retain_graph=True)
    assert by_value.flatten().tolist() == [0, 2, 0, 4]
    assert by_threshold.tolist() == pytest.approx([-15, -10])
    assert by_bias.tolist() == [0, 6]
    by_value, by_threshold, by_bias = torch.autograd.grad(number, inputs, retain_graph=True)
    assert by_value.flatten().tolist() == [0, 0, 0, 0]
    assert by_threshold.tolist() == pytest.approx([-5, -5])
    assert by_bias.tolist() == [0, 0]
    by_value, by_threshold, by_bias = torch.autograd.grad(tanh, inputs)
    steep, flat = (0.5 * (1 - math.tanh(x) ** 2) for x in (0.525, 1.5))
    assert by_value.flatten().tolist() == pytest.approx([0, steep, 0, flat])
    assert by_threshold.tolist() == pytest.approx([-0.5 / 0.2, -steep / 0.2])
    assert by_bias.tolist() == pytest.approx([0, steep + flat])


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("function", [rectify, gate])
def test_gates_have_the_gradients_of_their_values(everywhere: bool, function: Callable[..., Any]) -> None:
    """The bias is in the values already, so here it is added to them once more."""
    generator = torch.Generator().manual_seed(3)
    pre = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    active = sparse.Everywhere(6, 5) if everywhere else sparse.Active.at(torch.arange(30), 6, 5)
    of_latents = torch.rand(3 if function is gate else 1, 5, generator=generator, dtype=torch.float64)
    of_latents.requires_grad_()

    def checked(pre: Tensor, of_latents: Tensor) -> tuple[Tensor, ...]:
        values = active.pick(pre) + active.per_place(of_latents[0]).detach()
        *found, counts = function(active, values, *of_latents)
        assert torch.equal(counts, ((pre + of_latents[0]) > 0).sum(0))
        return tuple(found)

    pre.requires_grad_()
    squares = torch.stack([one.square().sum() for one in checked(pre, of_latents)])
    analytic = torch.autograd.grad(squares.sum(), (pre, of_latents))

    def plain(pre: Tensor, of_latents: Tensor) -> Tensor:
        p = pre + of_latents[0]
        g = p.relu()
        if function is rectify:
            return g.square().sum() + g.sum(0).square().sum()
        h = (p > 0) * (of_latents[1] * p + of_latents[2]).relu()
        return g.square().sum() + h.square().sum() + g.sum().square()

    numeric = torch.autograd.grad(plain(pre, of_latents), (pre, of_latents))
    for found, wanted in zip(analytic, numeric, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the tracer's look at it
@pytest.mark.parametrize("config", KINDS[1:], ids=["tanh", "gated", "l1"])
def test_what_a_gpu_compiles_can_be_traced_whole(config: SAEConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a break in the graph, and once for all batches of a size: each is another object for the places."""
    monkeypatch.setattr(sparse, "DENSE_ABOVE", 0.0)
    x = rows(3 * BATCH).view(3, BATCH, D_IN)
    wanted = [gradients(built(config), x_BD) for x_BD in x]
    counter = CompileCounterWithBackend("aot_eager")
    for name in ("_rectified", "_rectified_backward", "_opened", "_opened_backward", "_jumped", "_jumped_backward"):
        function = getattr(gates, name).__wrapped__
        monkeypatch.setattr(gates, name, torch.compile(function, backend=counter, fullgraph=True, dynamic=False))
    for x_BD, expected in zip(x, wanted, strict=True):
        for found, one in zip(gradients(built(config), x_BD), expected, strict=True):
            torch.testing.assert_close(found, one)
    assert counter.frame_count == 2


def gradients(sae: ScaledAutoencoder, x_BD: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(sae.step(StepInput(x_BD, 0, 1)).loss, list(sae.parameters())))


@of_each_kind
@pytest.mark.parametrize("lifts", [0.0, 0.7])
def test_dead_latents_are_lifted_as_the_formula_says(config: SAEConfig, lifts: float) -> None:
    sae = built(config.model_copy(update={"pre_act_coeff": lifts, "aux_k_coeff": 0.0})).double()
    x, dead = rows(BATCH).double(), torch.arange(D_SAE) % 3 == 0
    with torch.no_grad():
        sae.b_enc[:20] -= 2.0  # some below on all rows, some on a few
    named = dict(sae.named_parameters())
    alone = sae.step(StepInput(x, 0, 1))
    plain = torch.autograd.grad(alone.loss, list(named.values()), allow_unused=True)
    output = sae.step(StepInput(x, 0, 1, dead))
    found = torch.autograd.grad(output.loss, list(named.values()), allow_unused=True)
    pre = (x * sae.scale - sae.b_dec.detach()) @ sae.W_enc.T + sae.b_enc
    height = sae.threshold if isinstance(sae, JumpReLUAutoencoder) else 0
    lack = lifts * ((height - pre).relu() * dead).sum(1).mean() / D_IN
    formula = torch.autograd.grad(lack, list(named.values()), allow_unused=True)
    assert (output.sparsity_loss - alone.sparsity_loss).item() == pytest.approx(lack.item(), abs=1e-12)
    assert lack.item() > 0 or not lifts
    for name, by_all, by_rest, by_lack in zip(named, found, plain, formula, strict=True):
        weight = named[name]
        wanted = sum((part for part in (by_rest, by_lack) if part is not None), torch.zeros_like(weight))
        torch.testing.assert_close(torch.zeros_like(weight) if by_all is None else by_all, wanted, msg=name)


@of_each_kind
def test_latents_below_their_thresholds_on_every_row_come_back(config: SAEConfig) -> None:
    def revived(lifts: float) -> int:
        sae, x = built(config.model_copy(update={"pre_act_coeff": lifts, "sparsity_coeff": 0.01})), rows(512)
        with torch.no_grad():
            sae.b_enc[:20] = -4.0
        assert not (sae.encode(x)[:, :20] > 0).any()
        recipe = Recipe(2e-2, 64, max_epochs=40, dead_after_rows=128, grad_clip=1.0)
        trainer = Trainer(sae, recipe, rows=len(x), device="cpu", seed=0)
        active = torch.zeros(20, dtype=torch.bool)
        for _ in range(recipe.max_epochs):
            for batch in batches_of(trainer):
                trainer.step(x[batch])
            trainer.end_epoch()
            active |= (sae.encode(x)[:, :20] > 0).any(0)
        return int(active.sum())

    assert revived(0.0) == 0
    assert revived(0.1) == 20


def trained(config: SAEConfig, epochs: int, rate: float = 1e-2) -> ScaledAutoencoder:
    sae, x = built(config), rows(4096)
    recipe = Recipe(rate, 64, max_epochs=epochs, dead_after_rows=10**6, grad_clip=1.0, decay=0.2)
    trainer = Trainer(sae, recipe, rows=len(x), device="cpu", seed=0)
    for _ in range(epochs):
        for batch in batches_of(trainer):
            trainer.step(x[batch])
        trainer.end_epoch()
    return sae


@pytest.mark.parametrize("target", [3.0, 8.0])
def test_a_jumprelu_comes_to_the_latents_a_row_that_it_aims_at(target: float) -> None:
    acts = trained(JumpReLUSAE(hidden_dim=D_SAE, seed=4, target_l0=target), epochs=8).encode(rows())
    assert (acts > 0).sum(1).double().mean().item() == pytest.approx(target, rel=0.2)


@pytest.mark.parametrize(
    "config",
    [
        GatedSAE(hidden_dim=D_SAE, seed=4),
        JumpReLUSAE(hidden_dim=D_SAE, seed=4, target_l0=None),
        StandardSAE(hidden_dim=D_SAE, seed=4, penalty="decoder_norm"),
    ],
)
def test_a_larger_penalty_leaves_fewer_latents_active(config: SAEConfig) -> None:
    def l0(coefficient: float) -> float:
        sae = trained(config.model_copy(update={"sparsity_coeff": coefficient}), epochs=4)
        return float((sae.encode(rows()) > 0).sum(1).double().mean())

    assert l0(2.0) < 0.8 * l0(0.1)


@of_each_kind
def test_what_starts_again_starts_as_new(config: SAEConfig) -> None:
    sae = trained(config, epochs=1)
    which = torch.arange(D_SAE) < 3
    kept = {name: weight.detach().clone() for name, weight in sae.named_parameters()}
    sae.reset_latents(which, torch.Generator().manual_seed(9))
    fresh = built(config)
    for name, weight in sae.named_parameters():
        if name != "b_dec":
            assert torch.equal(weight[~which], kept[name][~which])
            assert not torch.equal(weight[which], kept[name][which])
        if weight.dim() == 1 and name != "b_dec":
            assert torch.equal(weight[which], dict(fresh.named_parameters())[name][which])
    assert len(sae.by_latent) == len(list(sae.parameters())) - 1
