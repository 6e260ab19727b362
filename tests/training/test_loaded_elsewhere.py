"""A trained SAE of every kind in the real SAELens and sparsify: the same features, rows and losses as here."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mistudio_schemas import (
    KINDS,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    SAEConfig,
    StandardSAE,
    TopKSAE,
)
from mistudio_train.cli import demo_inputs
from mistudio_train.sae.build import build_sae
from mistudio_train.sae.folded import FoldedSAE
from mistudio_train.sae.recipe import Recipe
from mistudio_train.sae.trainer import Trainer
from mistudio_train.training.run import run_job
from mistudio_train.training.saelens import write_saelens
from mistudio_train.training.selection import HELD_OUT
from mistudio_train.training.sparsify import sparsify_cannot, write_sparsify
from tests.models import D_IN as SMALL

from .conftest import Listener
from .test_run import spec
from .test_saelens import ORIGIN
from .test_spliced import ASKED, LAYER, TEXTS, Folder

# What SAELens imports of TransformerLens says so of itself.
pytestmark = pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning")

D_IN, D_SAE = 24, 96
SIZE: dict[str, Any] = {"hidden_dim": D_SAE, "seed": 0}
TRAINED: list[SAEConfig] = [
    StandardSAE(**SIZE, sparsity_coeff=1e-2),
    StandardSAE(**SIZE, penalty="decoder_norm"),
    TopKSAE(**SIZE, k=6),
    BatchTopKSAE(**SIZE, k=6),
    MatryoshkaSAE(**SIZE, k=6),
    JumpReLUSAE(**SIZE, target_l0=6),
    GatedSAE(**SIZE),
]
of_every_kind = pytest.mark.parametrize(
    "config", TRAINED, ids=lambda config: f"{config.kind} {getattr(config, 'penalty', '')}".strip()
)


def rows(count: int) -> Tensor:
    return 3 * torch.randn(count, D_IN, generator=torch.Generator().manual_seed(count)) + torch.arange(float(D_IN))


def trained(config: SAEConfig) -> FoldedSAE:
    sae, x_ND = build_sae(config, D_IN), rows(6400)
    trainer = Trainer(sae, Recipe(3e-3, 64, 1, 10**9, grad_clip=1.0), rows=len(x_ND), device="cpu", seed=0)
    trainer.prepare(x_ND)
    for x_BD in torch.split(x_ND, 64):
        trainer.step(x_BD)
    return trainer.sae.folded()


def test_every_kind_is_there() -> None:
    assert {config.kind for config in TRAINED} == set(KINDS)


@of_every_kind
@torch.no_grad()
def test_saelens_finds_the_same_in_a_thousand_rows(config: SAEConfig, tmp_path: Path) -> None:
    from sae_lens import SAE

    with torch.enable_grad():
        sae = trained(config)
    write_saelens(tmp_path / "sae", sae, ORIGIN, torch.full((D_SAE,), 0.1))
    theirs, x_BD = SAE.load_from_disk(tmp_path / "sae"), rows(1000)
    acts_BF, their_acts_BF = sae.encode(x_BD), theirs.encode(x_BD)
    assert 1 < float((acts_BF > 0).sum(1).double().mean()) < D_SAE
    torch.testing.assert_close(their_acts_BF, acts_BF, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(theirs.decode(their_acts_BF), sae.decode(acts_BF), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(theirs(x_BD), sae.decode(acts_BF), atol=1e-4, rtol=1e-5)


@of_every_kind
@torch.no_grad()
def test_sparsify_finds_the_same_in_a_thousand_rows_or_is_said_not_to(
    config: SAEConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")  # it would take its kernel for GPUs also where there is none
    from sparsify import SparseCoder

    with torch.enable_grad():
        sae = trained(config)
    if config.kind != "topk":
        assert sparsify_cannot(sae)
        return
    write_sparsify(tmp_path / "sparsify", sae)
    theirs, x_BD = SparseCoder.load_from_disk(tmp_path / "sparsify"), rows(1000)
    top_acts, top_indices, _ = theirs.encode(x_BD)
    acts_BF = torch.zeros(len(x_BD), D_SAE).scatter(1, top_indices, top_acts)
    torch.testing.assert_close(acts_BF, sae.encode(x_BD), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(theirs.decode(top_acts, top_indices), sae.decode(acts_BF), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("hook_site", ["resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_saelens_reads_the_same_rows_by_the_name_that_the_folder_gives_them(
    model_folder: Folder, tmp_path: Path, family: str, hook_site: str
) -> None:
    from sae_lens import SAE
    from sae_lens.load_model import load_model

    folder, sae = model_folder(family), {"kind": "topk", "k": 4, "batch_size": 64}
    asked = ASKED | {"sae": sae, "hook_site": hook_site, "max_epochs": 1, "cross_entropy_tokens": 0}
    one = spec(folder, tmp_path / "job", TEXTS[:30], **asked)
    run_job(one, Listener())
    metadata: Any = SAE.load_from_disk(one.output / "sae").cfg.metadata
    model: Any = load_model("AutoModelForCausalLM", str(folder), device="cpu")
    ids_BT = torch.tensor([model.tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        _, seen = model.run_with_cache(ids_BT, names_filter=[metadata.hook_name])
    own = len(model.tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"])
    rows_ND = np.fromfile(
        one.scratch / "activations" / f"{LAYER}.{hook_site}" / "shard-00000.bin", np.float32, own * SMALL
    )
    torch.testing.assert_close(
        torch.from_numpy(rows_ND).view(own, SMALL), seen[metadata.hook_name][0][-own:], atol=1e-4, rtol=0
    )


def test_saelens_own_evaluation_gives_the_same_losses(model_folder: Folder, tmp_path: Path) -> None:
    """Of a model whose first token is no special one, with no row left out, so that both replace every token."""
    sae = {"kind": "batchtopk", "k": 4}
    judged_by_both(model_folder("gpt2"), tmp_path, LAYER, TEXTS, **ASKED | {"sae": sae})


def test_saelens_own_evaluation_gives_the_same_losses_of_a_pretrained_model(tmp_path: Path) -> None:
    texts = [text for text in demo_inputs._evenly(demo_inputs._bible(), 80) if len(text) < 700]
    assert len(texts) > 40
    judged_by_both(
        demo_inputs.smollm2_folder(),
        tmp_path,
        9,
        texts,
        pooling="token",
        held_out=0.15,
        hidden_dim=1024,
        max_epochs=4,
        max_sequence_length=256,
        sae={"kind": "batchtopk", "k": 32, "learning_rate": 3e-3, "batch_size": 256},
    )


def judged_by_both(folder: Path, tmp_path: Path, layer: int, texts: list[str], **fields: Any) -> None:
    """An SAE is trained; what SAELens' evaluation says of it on the held-out texts is what the job says."""
    from sae_lens import SAE
    from sae_lens.evals import get_recons_loss
    from sae_lens.load_model import load_model
    from sae_lens.training.activation_scaler import ActivationScaler

    asked = {"layer_number": layer, "left_out": [], "cross_entropy_tokens": 1_000_000}
    one = spec(folder, tmp_path / "job", texts, **fields | asked)
    metrics = run_job(one, Listener()).saes[0].metrics
    model: Any = load_model("AutoModelForCausalLM", str(folder), device="cpu")
    sae: Any = SAE.load_from_disk(one.output / "sae")
    flags = np.fromfile(one.scratch / f"rows-{layer}.resid_post.bin", np.uint8)
    starts = np.fromfile(one.scratch / "tokens" / "row_starts.bin", np.int64)
    sums = dict.fromkeys(("ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_with_ablation"), 0.0)
    predicted = 0
    for text, start in zip(texts, starts[:-1], strict=True):
        if not flags[start] & HELD_OUT:
            continue
        tokens = torch.tensor([model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            losses = get_recons_loss(
                sae, model, ActivationScaler(), tokens, compute_kl=False, compute_ce_loss=True, ignore_tokens=None
            )
        for name in sums:
            sums[name] += float(losses[name].sum())
        predicted += tokens.shape[1] - 1
    assert metrics.cross_entropy is not None
    ours = metrics.cross_entropy
    assert ours.tokens == predicted
    clean, spliced, zero = (total / predicted for total in sums.values())
    assert (ours.clean, ours.spliced, ours.zero) == pytest.approx((clean, spliced, zero), rel=1e-4)
    assert ours.recovered_zero == pytest.approx((zero - spliced) / (zero - clean), rel=0.01)
    kept = json.loads((one.output / "metadata.json").read_text())["training_results"]["cross_entropy"]
    assert kept["tokens"] == predicted
    print(f"{predicted} tokens, recovered {ours.recovered_zero:.4f}, SAELens {(zero - spliced) / (zero - clean):.4f}")
