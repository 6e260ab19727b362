"""A job of transcoders from its request to its files: what is refused, what the files say, the model with one in it."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from mistudio_schemas import TrainRequested
from mistudio_train.messages import JobSpec
from mistudio_train.training.run import run_job
from mistudio_train.training.selection import FIRST_TOKEN, HELD_OUT, HIGH_NORM
from tests.models import D_IN

from .conftest import Listener
from .test_run import Folder, spec
from .test_spliced import ASKED, LAYER, TEXTS, whole_model

ENDS: dict[str, Any] = {"hook_site": "mlp_in", "predicts": "mlp_out", "hidden_dim": 64, "batch_size": 64}
SAES = [
    {"kind": "batchtopk", "k": 4, "name": "transcoder"} | ENDS,
    {"kind": "topk", "k": 4, "name": "of-the-largest"} | ENDS,
    {"kind": "batchtopk", "k": 4, "name": "ordinary", "hook_site": "mlp_out", "hidden_dim": 64},
]


def request(**fields: Any) -> TrainRequested:
    return TrainRequested.model_validate({"model_name": "m", "corpus_file": "c", "pooling": "token"} | fields)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"pooling": "mean", "sae": SAES[0]}, "needs pooling 'token'"),
        ({"sae": {"kind": "topk", "predicts": "resid_post"}}, "must be a later site of the block than 'hook_site'"),
        ({"hook_site": "mlp_out", "sae": {"kind": "topk", "predicts": "mlp_in"}}, "must be a later site"),
        ({"sae": {"kind": "standard", "hook_site": "mlp_in", "predicts": "mlp_out"}}, "use penalty 'decoder_norm'"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_reason(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        request(**fields)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka", "jumprelu", "gated", "standard"])
def test_every_other_kind_may_predict(kind: str) -> None:
    penalty = {"penalty": "decoder_norm"} if kind == "standard" else {}
    assert request(sae={"kind": kind} | ENDS | penalty).resolved_saes()[0].predicts == "mlp_out"


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def made(request: Any, model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A job of two transcoders and an ordinary SAE: the family, its spec and what finished."""
    family = request.param
    asked = {key: value for key, value in ASKED.items() if key != "sae"}
    one = spec(model_folder(family), tmp_path_factory.mktemp(family) / "job", TEXTS, **asked | {"saes": SAES})
    with torch.enable_grad():
        return family, one, run_job(one, Listener())


def flags_of(one: JobSpec) -> Any:
    return np.fromfile(one.scratch / f"rows-{LAYER}.mlp_in-mlp_out.bin", np.uint8)


def predicted(one: JobSpec, x: Tensor) -> Tensor:
    """By the exported file alone."""
    w = load_file(one.output / "sae" / "sae_weights.safetensors")
    acts = (x @ w["W_enc"] + w["b_enc"]).relu()
    return torch.where(acts > w["threshold"], acts, 0) @ w["W_dec"] + w["b_dec"]


@torch.no_grad()
def test_the_loss_is_that_of_the_whole_model_with_the_transcoder_for_an_mlp(made: Any, model_folder: Folder) -> None:
    """It predicts from what the MLP gets in that very pass; tokens that it is not judged by keep what the MLP gives."""
    family, one, finished = made
    folder = model_folder(family)
    model, tokenizer = whole_model(folder, family), transformers.AutoTokenizer.from_pretrained(folder)
    flags, starts = flags_of(one), np.fromfile(one.scratch / "tokens" / "row_starts.bin", np.int64)
    mlp = {path: module for path, module in model.named_modules() if path.endswith(f".{LAYER}.mlp")}
    (module,) = mlp.values()
    sums, tokens = dict.fromkeys(("clean", "spliced", "zero"), 0.0), 0
    for text, first, last in zip(TEXTS, starts[:-1], starts[1:], strict=True):
        mine = flags[first:last]
        if not mine[0] & HELD_OUT:
            continue
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        before = ids.shape[1] - len(mine)
        judged = torch.zeros(ids.shape, dtype=torch.bool)
        judged[0, before:] = torch.from_numpy(mine & (FIRST_TOKEN | HIGH_NORM) == 0)
        labels = ids.clone()
        labels[:, : max(1, before)] = -100
        count = int((labels != -100).sum())
        tokens += count
        for way in sums:

            def instead(_module: Any, inputs: Any, y: Tensor, way: str = way, judged: Tensor = judged) -> Tensor:
                other = predicted(one, inputs[0]) if way == "spliced" else torch.zeros_like(y)
                return y if way == "clean" else torch.where(judged[..., None], other, y)

            handle = module.register_forward_hook(instead)
            sums[way] += float(model(ids, labels=labels).loss) * count
            handle.remove()
    measured = finished.saes[0].metrics.cross_entropy
    assert measured.tokens == tokens
    for way, total in sums.items():
        assert getattr(measured, way) == pytest.approx(total / tokens, rel=1e-4), way


def stored(one: JobSpec, site: str) -> Tensor:
    folder = one.scratch / "activations" / f"{LAYER}.{site}"
    rows = np.concatenate([np.fromfile(path, np.float32) for path in sorted(folder.iterdir())])
    return torch.from_numpy(rows).view(-1, D_IN)


@torch.no_grad()
def test_figures_are_of_what_is_predicted_and_features_of_what_is_read(made: Any) -> None:
    _, one, finished = made
    x, y, flags = stored(one, "mlp_in"), stored(one, "mlp_out").double(), torch.from_numpy(flags_of(one))
    mine = (flags & HELD_OUT != 0) & (flags & (FIRST_TOKEN | HIGH_NORM) == 0)
    y_hat = predicted(one, x).double()
    result = finished.saes[0]
    fvu = (y - y_hat)[mine].square().sum() / (y[mine] - y[mine].mean(0)).square().sum()
    assert result.metrics.fvu == pytest.approx(float(fvu), rel=1e-4)
    cosine = torch.cosine_similarity(y[mine], y_hat[mine]).mean()
    assert result.metrics.cosine == pytest.approx(float(cosine), rel=1e-4)
    assert (result.hook_site, result.predicts, result.sites) == ("mlp_in", "mlp_out", "mlp_in to mlp_out")
    bundle = torch.load(one.output / "feature_activations.pt")
    starts = np.fromfile(one.scratch / "tokens" / "row_starts.bin", np.int64)
    means = torch.stack([x[first:last].mean(0) for first, last in pairwise(starts)])
    torch.testing.assert_close(bundle["original_activations"], means, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_files_say_that_the_decoder_predicts_another_site(made: Any) -> None:
    _, one, _ = made
    model, x = torch.load(one.output / "sae_model.pt"), stored(one, "mlp_in")
    assert model["predicts"] == "mlp_out"
    assert "mlp_out" in model["decoder_gives"]
    assert "threshold" in model["needs"]
    state = model["model_state_dict"]
    acts = (x @ state["encoder.weight"].T + state["encoder.bias"]).relu()
    acts = torch.where(acts > model["threshold"], acts, 0)
    y_hat = acts @ state["decoder.weight"].T + state["decoder.bias"]
    torch.testing.assert_close(y_hat, predicted(one, x), atol=1e-4, rtol=1e-4)
    exports = {name: json.loads(path.read_text())["exports"] for name, path in metadata_of(one).items()}
    assert exports["transcoder"] == {"sae": "SAELens"} | {"sparsify": exports["transcoder"]["sparsify"]}
    assert exports["of-the-largest"]["sae"] == "SAELens has no architecture for the kind 'topk' of a transcoder"
    assert exports["of-the-largest"]["sparsify"] == "EleutherAI sparsify"
    assert not (one.output / "saes" / "of-the-largest" / "sae").exists()
    ordinary = torch.load(one.output / "saes" / "ordinary" / "sae_model.pt")
    assert (ordinary["predicts"], ordinary["decoder_gives"]) == (None, "x, the rows that the encoder reads")


def metadata_of(one: JobSpec) -> dict[str, Path]:
    others = {name: one.output / "saes" / name / "metadata.json" for name in ("of-the-largest", "ordinary")}
    return {"transcoder": one.output / "metadata.json"} | others
