"""SAELens itself loads the folder and finds our features and reconstructions."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from mistudio_train.errors import ExportRefused
from mistudio_train.training.saelens import Origin, write_saelens

from .exports import D_IN, D_SAE, rows, small_sae

# What SAELens imports of TransformerLens says so of itself.
pytestmark = pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning")

ORIGIN = Origin(
    model_name="tiny",
    model_class_name="AutoModelForCausalLM",
    hook_name="model.layers.1",
    layer=1,
    hook_site="resid_post",
    context_size=128,
    prepend_bos=True,
    exclude_special_tokens=True,
    dataset_path="corpus.txt",
    pooling="token",
    model_revision="0123abc",
)
RATE_F = torch.linspace(0, 1, D_SAE)


@pytest.mark.parametrize(
    ("kind", "architecture"), [("standard", "standard"), ("topk", "topk"), ("batchtopk", "jumprelu")]
)
def test_saelens_gives_the_same_features_and_reconstruction(tmp_path: Path, kind: str, architecture: str) -> None:
    from sae_lens import SAE

    sae, x_BD = small_sae(kind), rows()
    write_saelens(tmp_path / "sae", sae, ORIGIN, RATE_F)
    theirs = SAE.load_from_disk(tmp_path / "sae")
    acts_BF = sae.encode(x_BD)
    with torch.no_grad():
        their_acts_BF = theirs.encode(x_BD)
        torch.testing.assert_close(their_acts_BF, acts_BF, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs.decode(their_acts_BF), sae.decode(acts_BF), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(theirs(x_BD), sae.decode(acts_BF), atol=1e-4, rtol=1e-5)
    assert torch.equal(their_acts_BF > 0, acts_BF > 0)
    assert (theirs.cfg.d_in, theirs.cfg.d_sae, theirs.cfg.architecture()) == (D_IN, D_SAE, architecture)
    assert theirs.cfg.metadata.hook_name == "model.layers.1"
    assert theirs.cfg.metadata.transformer_lens_hook_name == "blocks.1.hook_resid_post"
    assert theirs.cfg.metadata.model_revision == "0123abc"
    if kind == "topk":
        assert theirs.cfg.k == 5


def test_files_are_those_of_the_format(tmp_path: Path) -> None:
    write_saelens(tmp_path, small_sae("topk"), replace(ORIGIN, hook_site="mlp_out"), RATE_F)
    shapes = {name: list(tensor.shape) for name, tensor in load_file(tmp_path / "sae_weights.safetensors").items()}
    assert shapes == {"W_enc": [D_IN, D_SAE], "b_enc": [D_SAE], "W_dec": [D_SAE, D_IN], "b_dec": [D_IN]}
    sparsity = load_file(tmp_path / "sparsity.safetensors")["sparsity"]
    assert sparsity[0].item() == pytest.approx(-10)  # never active: log10(0 + 1e-10)
    assert sparsity[-1].item() == pytest.approx(0)  # always active: log10(1)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg["normalize_activations"] == "none"
    assert cfg["apply_b_dec_to_input"] is False
    assert cfg["metadata"]["sae_lens_version"].startswith("6.")
    assert cfg["metadata"]["transformer_lens_hook_name"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
    ]


def test_the_hook_name_is_a_place_that_saelens_reads(tmp_path: Path) -> None:
    from sae_lens.load_model import HookedProxyLM

    config = LlamaConfig(
        vocab_size=20, hidden_size=D_IN, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2
    )
    causal = LlamaForCausalLM(config)
    bare = LlamaModel(config)
    place = f"{bare.base_model_prefix}.layers.1"
    assert place == ORIGIN.hook_name
    tokens_BT = torch.tensor([[1, 5, 7, 3]])
    with torch.no_grad():
        _, cache = HookedProxyLM(causal, None).run_with_cache(tokens_BT, names_filter=[place], stop_at_layer=2)
        expected_BTD = causal(tokens_BT, output_hidden_states=True).hidden_states[2]
    assert torch.equal(cache[place], expected_BTD)


def test_what_saelens_cannot_say_is_refused(tmp_path: Path) -> None:
    sae = small_sae("standard")
    broken = replace(sae, decoder_bias=torch.full((D_IN,), math.nan))
    for given, rate_F, message in [
        (replace(sae, kind="novel"), RATE_F, "no architecture for the kind 'novel'"),
        (sae, RATE_F[:-1], "shape \\[39\\] for 40 features"),
        (broken, RATE_F, "b_dec holds numbers that are not finite"),
    ]:
        with pytest.raises(ExportRefused, match=message):
            write_saelens(tmp_path, given, ORIGIN, rate_F)
    assert list(tmp_path.iterdir()) == []
