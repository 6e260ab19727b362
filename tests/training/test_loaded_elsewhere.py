"""A trained SAE or transcoder of every kind in the real SAELens and sparsify: the same features, rows and losses."""

import json
from dataclasses import replace
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
from mistudio_train.training.saelens import saelens_cannot, write_saelens
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


TRANSCODERS = [config.model_copy(update={"predicts": "mlp_out"}) for config in TRAINED[1:]]
PREDICTING = replace(ORIGIN, hook_site="mlp_in", predicts="mlp_out", hook_name_out="model.layers.1.mlp")
of_every_transcoder = pytest.mark.parametrize("config", TRANSCODERS, ids=lambda config: config.kind)


def transcoder(config: SAEConfig) -> FoldedSAE:
    """Of rows that are made of those that it reads."""
    sae, x_ND = build_sae(config, D_IN), rows(6400)
    rows_ND = torch.cat([x_ND, x_ND.roll(1, 1).relu() / 5 - 3], 1)
    trainer = Trainer(sae, Recipe(3e-3, 64, 1, 10**9, grad_clip=1.0), rows=len(rows_ND), device="cpu", seed=0)
    trainer.prepare(rows_ND)
    for rows_BD in torch.split(rows_ND, 64):
        trainer.step(rows_BD)
    return trainer.sae.folded()


@of_every_transcoder
def test_saelens_finds_the_same_with_a_transcoder_or_is_said_not_to(config: SAEConfig, tmp_path: Path) -> None:
    from sae_lens import SAE, JumpReLUTranscoder, Transcoder

    sae = transcoder(config)
    if config.kind == "topk":
        assert saelens_cannot(sae, PREDICTING) == "SAELens has no architecture for the kind 'topk' of a transcoder"
        return
    write_saelens(tmp_path / "sae", sae, PREDICTING, torch.full((D_SAE,), 0.1))
    theirs, x_BD = SAE.load_from_disk(tmp_path / "sae"), rows(1000)
    assert type(theirs) is (Transcoder if config.kind == "standard" else JumpReLUTranscoder)
    metadata: Any = theirs.cfg.metadata
    assert (metadata.hook_name_out, metadata.hook_layer_out) == ("model.layers.1.mlp", 1)
    with torch.no_grad():
        acts_BF, their_acts_BF = sae.encode(x_BD), theirs.encode(x_BD)
        assert 1 < float((acts_BF > 0).sum(1).double().mean()) < D_SAE
        torch.testing.assert_close(their_acts_BF, acts_BF, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(theirs(x_BD), sae.decode(acts_BF), atol=1e-4, rtol=1e-5)


@of_every_transcoder
@torch.no_grad()
def test_sparsify_finds_the_same_with_a_transcoder_or_is_said_not_to(
    config: SAEConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    from sparsify import SparseCoder

    with torch.enable_grad():
        sae = transcoder(config)
    if config.kind != "topk":
        assert sparsify_cannot(sae)
        return
    write_sparsify(tmp_path / "sparsify", sae, transcodes=True)
    theirs, x_BD = SparseCoder.load_from_disk(tmp_path / "sparsify"), rows(1000)
    assert theirs.cfg.transcode
    top_acts, top_indices, _ = theirs.encode(x_BD)
    acts_BF = torch.zeros(len(x_BD), D_SAE).scatter(1, top_indices, top_acts)
    torch.testing.assert_close(acts_BF, sae.encode(x_BD), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(theirs(x_BD, sae.decode(acts_BF)).sae_out, sae.decode(acts_BF), atol=1e-4, rtol=1e-5)


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


def test_a_transcoder_of_a_pretrained_model_does_in_saelens_what_it_does_here(tmp_path: Path) -> None:
    """What SAELens makes of the model's own rows is what the job's figures are of, and what it loses with it."""
    from sae_lens import SAE
    from sae_lens.load_model import load_model

    folder, texts = (
        demo_inputs.smollm2_folder(),
        [text for text in demo_inputs._evenly(demo_inputs._bible(), 20) if len(text) < 700],
    )
    sae = {"kind": "batchtopk", "k": 32, "learning_rate": 3e-3, "batch_size": 128}
    one = spec(
        folder, tmp_path / "job", texts, pooling="token", layer_number=9, left_out=[], hidden_dim=512, max_epochs=4,
        held_out=0.2, max_sequence_length=256, cross_entropy_tokens=1_000_000,
        sae=sae | {"hook_site": "mlp_in", "predicts": "mlp_out"},
    )  # fmt: skip
    metrics = run_job(one, Listener()).saes[0].metrics
    model: Any = load_model("AutoModelForCausalLM", str(folder), device="cpu")
    theirs: Any = SAE.load_from_disk(one.output / "sae")
    names = theirs.cfg.metadata.hook_name, theirs.cfg.metadata.hook_name_out
    assert names == ("model.layers.9.post_attention_layernorm", "model.layers.9.mlp")
    assert theirs.cfg.architecture() == "jumprelu_transcoder"
    flags = np.fromfile(one.scratch / "rows-9.mlp_in-mlp_out.bin", np.uint8)
    starts = np.fromfile(one.scratch / "tokens" / "row_starts.bin", np.int64)
    read, predicted, losses, tokens = [], [], {"clean": 0.0, "spliced": 0.0}, 0
    for text, start in zip(texts, starts[:-1], strict=True):
        if not flags[start] & HELD_OUT:
            continue
        ids_BT = torch.tensor([model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            _, seen = model.run_with_cache(ids_BT, names_filter=list(names))
            read.append(seen[names[0]][0])
            predicted.append(seen[names[1]][0])
            handle = model.model.get_submodule(names[1]).register_forward_hook(
                lambda _module, inputs, _output: theirs(inputs[0])
            )
            spliced = model.model(ids_BT, labels=ids_BT).loss
            handle.remove()
            clean = model.model(ids_BT, labels=ids_BT).loss
        for way, loss in (("clean", clean), ("spliced", spliced)):
            losses[way] += float(loss) * (ids_BT.shape[1] - 1)
        tokens += ids_BT.shape[1] - 1
    x_ND, y_ND = torch.cat(read), torch.cat(predicted)
    with torch.no_grad():
        error = (theirs(x_ND) - y_ND).double().square().sum()
        l0 = (theirs.encode(x_ND) > 1e-6).sum(1).double().mean()
    assert metrics.fvu == pytest.approx(float(error / (y_ND - y_ND.mean(0)).double().square().sum()), rel=1e-4)
    assert metrics.l0 == pytest.approx(float(l0), rel=1e-3)
    assert metrics.cross_entropy is not None
    ours = metrics.cross_entropy
    assert ours.tokens == tokens
    assert (ours.clean, ours.spliced) == pytest.approx(tuple(loss / tokens for loss in losses.values()), rel=1e-4)
    print(f"FVU {metrics.fvu:.3f}, L0 {metrics.l0:.1f}, recovered {ours.recovered_zero:.3f}")


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
