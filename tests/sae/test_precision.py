"""Products with operands of bfloat16: what is exact all the same, and that as much is learned."""

import pytest
import torch
from torch import Tensor

from mistudio_schemas import BatchTopKSAE, GatedSAE, JumpReLUSAE, MatryoshkaSAE, SAEConfig, StandardSAE, TopKSAE
from mistudio_train.sae import sparse
from mistudio_train.sae.build import build_sae, recipe_for
from mistudio_train.sae.recipe import Precision
from mistudio_train.sae.trainer import Trainer

from .batches import batches_of

D_IN, D_SAE, ROWS = 16, 64, 2048
KINDS: list[SAEConfig] = [
    TopKSAE(k=4),
    BatchTopKSAE(k=4),
    MatryoshkaSAE(k=4),
    JumpReLUSAE(target_l0=4),
    JumpReLUSAE(target_l0=None),
    GatedSAE(),
    StandardSAE(penalty="decoder_norm"),
]
of_each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)


def rows() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, 5, generator=generator) @ torch.randn(5, D_IN, generator=generator) + 3


def trained(kind: SAEConfig, precision: Precision) -> tuple[Trainer, float]:
    config = kind.model_copy(
        update={
            "hidden_dim": D_SAE,
            "seed": 1,
            "max_epochs": 4,
            "batch_size": 64,
            "learning_rate": 3e-3,
            "precision": precision,
        }
    )
    trainer = Trainer(
        build_sae(config, D_IN), recipe_for(config, rows=ROWS, mean_pooled=False), rows=ROWS, device="cpu", seed=1
    )
    trainer.prepare(rows())
    loss = 0.0
    for _ in range(4):
        for batch in batches_of(trainer):
            trainer.step(rows()[batch])
        loss = trainer.end_epoch().reconstruction_loss
    return trainer, loss


@of_each_kind
@pytest.mark.parametrize("dense_above", [0.0, 1.0], ids=["dense", "sparse"])
def test_as_much_is_learned(kind: SAEConfig, dense_above: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "DENSE_ABOVE", dense_above)
    narrow, loss = trained(kind, "bfloat16")
    assert narrow.sae.operands == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in narrow.sae.parameters())
    assert loss == pytest.approx(trained(kind, "float32")[1], rel=0.1)


def test_values_at_active_places_are_not_rounded() -> None:
    x_BD, weight_FD, bias_F = torch.randn(8, D_IN), torch.randn(D_SAE, D_IN), torch.randn(D_SAE)
    rounded_BF = torch.addmm(bias_F.bfloat16(), x_BD.bfloat16(), weight_FD.bfloat16().T)
    active = sparse.Active.same_number(rounded_BF.topk(4).indices, D_SAE)
    values_N = active.scores(rounded_BF, x_BD, weight_FD, bias_F)
    torch.testing.assert_close(values_N, active.pick(torch.addmm(bias_F, x_BD, weight_FD.T)))


def test_a_cpu_rounds_only_if_asked() -> None:
    assert trained(TopKSAE(k=4), "auto")[0].sae.operands == torch.float32
