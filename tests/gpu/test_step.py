"""Training on a GPU: products against fp64, every kind against the CPU, recorded updates against plain ones."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from mistudio_schemas import BatchTopKSAE, GatedSAE, JumpReLUSAE, MatryoshkaSAE, SAEConfig, StandardSAE, TopKSAE
from mistudio_train.errors import TrainingDiverged
from mistudio_train.sae import kernels, replay
from mistudio_train.sae.build import build_sae
from mistudio_train.sae.figures import Divergence
from mistudio_train.sae.recipe import Precision, Recipe
from mistudio_train.sae.sparse import Active
from mistudio_train.sae.trainer import Trainer

pytestmark = pytest.mark.gpu
GPU = "cuda"
D_IN, D_SAE, BATCH, STEPS = 64, 512, 128, 110
KINDS: list[SAEConfig] = [
    StandardSAE(hidden_dim=D_SAE, seed=4, sparsity_coeff=1e-3),
    TopKSAE(hidden_dim=D_SAE, seed=4, k=8),
    BatchTopKSAE(hidden_dim=D_SAE, seed=4, k=8),
    MatryoshkaSAE(hidden_dim=D_SAE, seed=4, k=8),
    JumpReLUSAE(hidden_dim=D_SAE, seed=4, target_l0=8, initial_threshold=0.3),
    JumpReLUSAE(hidden_dim=D_SAE, seed=4, target_l0=None, initial_threshold=0.3),
    GatedSAE(hidden_dim=D_SAE, seed=4),
    StandardSAE(hidden_dim=D_SAE, seed=4, penalty="decoder_norm"),
]
NAMES = ["seed", "topk", "batchtopk", "matryoshka", "jumprelu", "tanh", "gated", "l1"]
of_each_kind = pytest.mark.parametrize("config", KINDS, ids=NAMES)


def rows() -> Tensor:
    """Of a low rank, so that there is something to learn, and some latents die."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(STEPS * BATCH, 12, generator=generator) @ torch.randn(12, D_IN, generator=generator)


def trainer(config: SAEConfig, device: str, precision: Precision = "float32", dead_after: int = 10) -> Trainer:
    """With latents that are dead after so many steps."""
    recipe = Recipe(
        3e-3,
        BATCH,
        max_epochs=1,
        dead_after_rows=dead_after * BATCH,
        grad_clip=1.0,
        adam_eps=1e-12,
        precision=precision,
    )
    made = Trainer(build_sae(config, D_IN), recipe, rows=STEPS * BATCH, device=device, seed=0)
    made.prepare(rows()[:1024])
    return made


def losses(made: Trainer, first: int = 0, last: int = STEPS) -> list[float]:
    """Of each step."""
    found = []
    for step, x_BD in enumerate(torch.split(rows(), BATCH)):
        if first <= step < last:
            made.step(x_BD)
            figures = made.measure()
            assert figures is not None
            found.append(figures.loss)
    return found


@of_each_kind
def test_training_is_the_cpus(config: SAEConfig) -> None:
    """Not to the last bit: sums are of another order. The first steps are still close."""
    on_gpu, on_cpu = losses(trainer(config, GPU)), losses(trainer(config, "cpu"))
    assert on_gpu[:8] == pytest.approx(on_cpu[:8], rel=1e-3)
    assert on_gpu[-1] == pytest.approx(on_cpu[-1], rel=0.1)


@of_each_kind
def test_a_recorded_update_is_the_one_done_as_it_comes(config: SAEConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = losses(trainer(config, GPU))
    monkeypatch.setattr(replay, "EAGER", 10**6)
    assert recorded == pytest.approx(losses(trainer(config, GPU)), rel=2e-2)


@of_each_kind
def test_bfloat16_learns_as_much(config: SAEConfig) -> None:
    narrow, wide = losses(trainer(config, GPU, "bfloat16")), losses(trainer(config, GPU))
    assert narrow[0] == pytest.approx(wide[0], rel=0.02)
    assert narrow[-1] == pytest.approx(wide[-1], rel=0.1)


@of_each_kind
def test_training_goes_on_from_what_was_saved(config: SAEConfig) -> None:
    whole = losses(trainer(config, GPU))
    first, second = trainer(config, GPU), trainer(config, GPU)
    assert losses(first, 0, 25) == pytest.approx(whole[:25], rel=2e-2)
    losses(second, 0, 7)
    second.load_state_dict(deepcopy(first.state_dict()))
    assert losses(second, 25) == pytest.approx(whole[25:], rel=5e-2)


@of_each_kind
def test_what_was_saved_on_a_gpu_goes_on_on_a_cpu(config: SAEConfig) -> None:
    first, second = trainer(config, GPU), trainer(config, "cpu")
    losses(first, 0, 25)
    second.load_state_dict(deepcopy(first.state_dict()))
    assert losses(second, 25, 35) == pytest.approx(losses(first, 25, 35), rel=5e-2)


def test_what_cannot_be_recorded_is_done_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Waits(Trainer):
        def _update(self, x_BD: Tensor, revives: bool) -> None:
            super()._update(x_BD, revives)
            self._active_rows_F.sum().item()

    expected = losses(trainer(KINDS[1], GPU))
    monkeypatch.setattr("tests.gpu.test_step.Trainer", Waits)
    assert losses(trainer(KINDS[1], GPU)) == pytest.approx(expected, rel=2e-2)


def test_many_trainers_after_each_other_are_recorded() -> None:
    for _ in range(6):
        made = trainer(KINDS[4], GPU)
        losses(made, 0, 30)
        assert isinstance(made._replay, replay.Replay)
        assert made._replay._recordings


def test_dead_latents_are_seen_a_little_later() -> None:
    made = trainer(KINDS[1], GPU)
    losses(made)
    assert made._any_dead
    alive = trainer(KINDS[1], GPU, dead_after=50)
    alive._rows_since_active_F.zero_()
    losses(alive, 0, 49)
    assert not alive._revives()


def test_divergence_is_noticed() -> None:
    made, bad_BD = trainer(KINDS[1], GPU), torch.full((BATCH, D_IN), torch.nan)
    for _ in range(2 * Divergence.EVERY - 1):
        made.step(bad_BD)
    with pytest.raises(TrainingDiverged):
        made.step(bad_BD)


@pytest.mark.parametrize("by_kernels", [True, False], ids=["Triton", "cuSPARSE"])
@pytest.mark.parametrize(("d", "m", "batch", "k"), [(64, 512, 128, 8), (100, 70_000, 33, 5), (768, 4096, 512, 32)])
def test_products_are_right(
    d: int, m: int, batch: int, k: int, by_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "AVAILABLE", by_kernels)
    indices_BK = torch.stack([torch.randperm(m, device=GPU)[:k] for _ in range(batch)])
    active = Active.same_number(indices_BK, m)
    values_N, weight_FD = torch.randn(batch * k, device=GPU), torch.randn(m, d, device=GPU)
    rows_BD = torch.randn(batch, d, device=GPU)
    dense_BF = active.dense(values_N.double())
    close = pytest.approx(0, abs=1e-4)
    assert float((active.times(values_N, weight_FD) - dense_BF @ weight_FD.double()).abs().max()) == close
    assert float((active.transpose_times(values_N, rows_BD) - dense_BF.T @ rows_BD.double()).abs().max()) == close
    exact_N = active.pick(rows_BD.double() @ weight_FD.double().T)
    assert float((active.products(rows_BD, weight_FD) - exact_N).abs().max()) == close
    assert float((active.sum_by_latent(values_N) - dense_BF.sum(0)).abs().max()) == close
