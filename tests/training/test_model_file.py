"""`sae_model.pt` has the seed's fields, loads safely, and gives the features again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mistudio_train.errors import ExportRefused
from mistudio_train.training.bundle import write_bundle
from mistudio_train.training.model_file import write_model_file

from .exports import D_IN, D_SAE, rows, small_sae

GIVEN: dict[str, Any] = {
    "config": {"model_name": "tiny", "hidden_dim": D_SAE, "learning_rate": 1e-4},
    "training_stats": {"losses": [0.5, 0.25], "sparsity_levels": [0.1, 0.1], "reconstruction_errors": [0.4, 0.2]},
    "sparsity_coeff": 1e-3,
    "model_info": {"model_name": "tiny", "hidden_size": D_IN},
    "memory_optimizations": {
        "model_name": "tiny",
        "is_large_model": False,
        "recommended_batch_size": 8,
        "recommended_sequence_length": 512,
        "use_quantization": False,
        "use_gradient_checkpointing": False,
        "min_gpu_memory_gb": 4.0,
    },
}


def test_plain_load_gives_every_field(tmp_path: Path) -> None:
    sae = small_sae("standard")
    write_model_file(tmp_path / "sae_model.pt", sae, **GIVEN)
    loaded = torch.load(tmp_path / "sae_model.pt", map_location="cpu")
    weights = loaded.pop("model_state_dict")
    assert loaded == GIVEN | {
        "input_dim": D_IN,
        "hidden_dim": D_SAE,
        "feature_dim": D_SAE,
        "kind": "standard",
        "k": None,
        "needs": None,
        "predicts": None,
        "decoder_gives": "x, the rows that the encoder reads",
        "threshold": None,
    }
    assert {name: list(weight.shape) for name, weight in weights.items()} == {
        "encoder.weight": [D_SAE, D_IN],
        "encoder.bias": [D_SAE],
        "decoder.weight": [D_IN, D_SAE],
        "decoder.bias": [D_IN],
    }
    assert all(torch.equal(weight, sae.state_dict()[name]) for name, weight in weights.items())
    assert len({weight.untyped_storage().data_ptr() for weight in weights.values()}) == 4


def test_two_linear_layers_give_the_bundle_again(tmp_path: Path) -> None:
    sae, x_BD = small_sae("standard"), rows()
    texts = [f"text {i}" for i in range(len(x_BD))]
    write_model_file(tmp_path / "sae_model.pt", sae, **GIVEN)
    write_bundle(
        tmp_path / "feature_activations.pt",
        [(sae.encode(x_BD), x_BD)],
        texts=texts,
        total_rows=len(x_BD),
        d_sae=D_SAE,
        d_in=D_IN,
        model_info={},
        max_bytes=1 << 20,
    )
    module = nn.ModuleDict({"encoder": nn.Linear(D_IN, D_SAE), "decoder": nn.Linear(D_SAE, D_IN)})
    module.load_state_dict(torch.load(tmp_path / "sae_model.pt", map_location="cpu")["model_state_dict"])
    bundle = torch.load(tmp_path / "feature_activations.pt", map_location="cpu")
    with torch.no_grad():
        acts_BF = module["encoder"](bundle["original_activations"]).relu()
        torch.testing.assert_close(acts_BF, bundle["feature_activations"])
        torch.testing.assert_close(module["decoder"](acts_BF), sae.decode(sae.encode(x_BD)))


def test_a_kind_that_needs_more_says_so_and_is_right(tmp_path: Path) -> None:
    sae, x_BD = small_sae("topk"), rows()
    write_model_file(tmp_path / "sae_model.pt", sae, **GIVEN | {"sparsity_coeff": None})
    loaded = torch.load(tmp_path / "sae_model.pt", map_location="cpu")
    assert loaded["k"] == 5
    assert "keep the 5 largest" in loaded["needs"]
    weights = loaded["model_state_dict"]
    acts_BF = nn.functional.linear(x_BD, weights["encoder.weight"], weights["encoder.bias"]).relu()
    kept_BF = acts_BF * (acts_BF >= acts_BF.topk(loaded["k"]).values[:, -1:])
    torch.testing.assert_close(kept_BF, sae.encode(x_BD))


def test_a_threshold_is_a_tensor_beside_the_weights(tmp_path: Path) -> None:
    sae, x_BD = small_sae("batchtopk"), rows()
    write_model_file(tmp_path / "sae_model.pt", sae, **GIVEN | {"sparsity_coeff": None})
    loaded = torch.load(tmp_path / "sae_model.pt", map_location="cpu")
    assert "above `threshold`" in loaded["needs"]
    assert set(loaded["model_state_dict"]) == set(sae.state_dict())
    weights = loaded["model_state_dict"]
    acts_BF = nn.functional.linear(x_BD, weights["encoder.weight"], weights["encoder.bias"]).relu()
    torch.testing.assert_close(acts_BF * (acts_BF > loaded["threshold"]), sae.encode(x_BD))


def test_the_same_sae_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        write_model_file(tmp_path / name, small_sae("standard"), **GIVEN)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training_stats": {"losses": [np.float64(0.5)]}}, "lacks sparsity_levels, reconstruction_errors"),
        ({"training_stats": GIVEN["training_stats"] | {"losses": [np.float64(1)]}}, r"losses\[0\] is a numpy"),
        ({"config": {"huggingface_token": "hf_secret"}}, "secret under 'huggingface_token'"),
        ({"memory_optimizations": {"model_name": "tiny"}}, "memory_optimizations lacks is_large_model"),
        ({"sparsity_coeff": float("inf")}, "sparsity_coeff is inf"),
    ],
)
def test_what_would_not_load_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportRefused, match=message) as refusal:
        write_model_file(tmp_path / "sae_model.pt", small_sae("standard"), **GIVEN | changes)
    assert "hf_secret" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_tied_weights_are_refused(tmp_path: Path) -> None:
    sae = small_sae("standard")
    tied = replace(sae, decoder_weight=sae.encoder_weight.view(D_IN, D_SAE))
    with pytest.raises(ExportRefused, match=r"decoder\.weight shares its storage with .*encoder\.weight"):
        write_model_file(tmp_path / "sae_model.pt", tied, **GIVEN)
