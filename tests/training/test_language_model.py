"""Loading: what is refused and why, families that are not known by name, and a model's state after it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mistudio_schemas import ErrorCode
from mistudio_train.errors import MemoryExhausted, ModelRefused, RequestRefused
from mistudio_train.training import language_model
from mistudio_train.training.blocks import Tap, find_blocks, tap
from mistudio_train.training.language_model import is_out_of_memory, load
from mistudio_train.training.model_source import inspect
from mistudio_train.training.sites import Site
from tests.models import tiny_model

from .conftest import load_tiny, plan_of

Folder = Callable[..., Path]


def block(**children: nn.Module) -> nn.Module:
    made = nn.Module()
    for name, child in children.items():
        made.add_module(name, child)
    return made


def trunk(**lists: int) -> nn.Module:
    """A module of lists of blocks, each of which has a list of the same length inside."""
    made = nn.Module()
    for name, length in lists.items():
        inner = [block(mlp=nn.Linear(2, 2), experts=nn.ModuleList([block(a=nn.Linear(2, 2))] * length))]
        made.add_module(name, nn.ModuleList(inner * length))
    return made


def test_blocks_of_an_unknown_family_are_the_one_list_of_the_right_length() -> None:
    model = trunk(stages=3, others=2)
    assert find_blocks(model, "unheard-of", 3) is model.stages


def test_a_known_family_of_another_shape_is_found_by_structure() -> None:
    model = trunk(layers=2, stages=3)
    assert find_blocks(model, "llama", 3) is model.stages


@pytest.mark.parametrize(
    ("lists", "reason"), [({"a": 2}, "there is none"), ({"a": 3, "b": 3}, r"there are 2 \(a, b\)")]
)
def test_blocks_that_cannot_be_told_are_an_error_that_says_what_was_found(lists: dict[str, int], reason: str) -> None:
    with pytest.raises(ModelRefused, match=reason) as caught:
        find_blocks(trunk(**lists), "unheard-of", 3)
    assert caught.value.code is ErrorCode.MODEL_UNSUPPORTED


def test_hook_sites_of_an_unknown_family_are_refused_where_they_may_hold_the_residual() -> None:
    one = block(mlp=nn.Linear(2, 2), attention=nn.Linear(2, 2))
    found = {site: tap(one, "unheard-of", site) for site in ("resid_pre", "mlp_in", "mlp_out", "resid_post")}
    assert {site: at.module for site, at in found.items()} == {
        "resid_pre": one, "mlp_in": one.mlp, "mlp_out": one.mlp, "resid_post": one
    }  # fmt: skip
    assert [at.side for at in found.values()] == ["in", "in", "out", "out"]
    with pytest.raises(RequestRefused, match="mlp, attention") as caught:
        tap(one, "unheard-of", "attn_out")
    assert caught.value.code is ErrorCode.REQUEST_HOOK_SITE_UNSUPPORTED
    assert "resid_pre or resid_post" in caught.value.hint


def test_a_family_that_is_not_in_the_table_loads_by_structure(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "m")
    config = transformers.Qwen3Config(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    model = load_tiny(folder, [Site(1), Site(1, "attn_out"), Site(0)])
    ids = torch.tensor([[1, 2, 3]])
    acts = model.activations(ids, torch.ones_like(ids))
    assert acts[Site(1, "attn_out")].shape == (1, 3, 32)
    assert not torch.equal(acts[Site(0)], acts[Site(1)])


def test_an_encoder_decoder_without_a_class_for_its_encoder_gives_its_encoder(tmp_path: Path) -> None:
    folder = tiny_model("roberta", tmp_path / "m")
    config = transformers.BartConfig(
        vocab_size=320, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    whole: Any = transformers.BartModel(config)
    whole.eval()
    whole.save_pretrained(folder)
    model = load_tiny(folder, [Site(1)])
    ids = torch.tensor([[0, 5, 6, 2]])
    with torch.no_grad():
        expected = whole.get_encoder()(input_ids=ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(model.activations(ids, torch.ones_like(ids))[Site(1)], expected, atol=1e-5, rtol=0)


def refused(folder: Path) -> ModelRefused:
    with pytest.raises(ModelRefused) as caught:
        load_tiny(folder, [Site(1)])
    assert caught.value.code is ErrorCode.MODEL_LOAD_FAILED
    assert caught.value.hint
    return caught.value


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = tiny_model("gpt2", tmp_path / "m")
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in str(refused(folder))


def test_weights_that_are_missing_are_never_drawn_at_random(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lack 1 weights, layers.1.mlp.up_proj.weight" in str(refused(folder))


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    folder = tiny_model("gpt2", tmp_path / "m")
    source = inspect(str(folder), folders=[tmp_path])
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelRefused) as caught:
        load(source, plan_of(1), [Site(0)])
    assert caught.value.code is ErrorCode.MODEL_LOAD_FAILED


def test_pickled_weights_are_not_loaded_even_beside_a_file_that_looks_safe(tmp_path: Path) -> None:
    folder = tiny_model("gpt2", tmp_path / "m")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    refused(folder)


def test_a_model_with_code_of_its_own_is_refused_without_running_it(tmp_path: Path) -> None:
    folder = tiny_model("gpt2", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refused(folder)
    assert not (tmp_path / "ran").exists()


def test_quantisation_that_fails_falls_back_with_a_warning(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_quantisation(_device: str) -> dict[str, Any]:
        raise ImportError("no CUDA kernels")

    monkeypatch.setattr(language_model, "_nf4", no_quantisation)
    folder = model_folder("gpt2")
    source = inspect(str(folder), folders=[folder.parent])
    model = load(source, replace(plan_of(8), quantization="nf4"), [Site(0)])
    assert model.dtype == torch.float32
    assert "4-bit loading failed" in model.warnings[0]


def test_memory_that_runs_out_while_loading_is_told_apart(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", too_large)
    with pytest.raises(MemoryExhausted, match="while"):
        load_tiny(model_folder("gpt2"), [Site(0)])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_running_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_nothing_is_left_hooked_and_nothing_can_be_differentiated(model_folder: Folder) -> None:
    model = load_tiny(model_folder("gpt2"), [Site(1), Site(0, "attn_out")])
    ids = torch.tensor([[1, 2]])
    model.activations(ids, torch.ones_like(ids))
    assert not any(module._forward_hooks for module in model.trunk.modules())
    assert not any(weight.requires_grad for weight in model.trunk.parameters())


def test_activations_of_another_layout_are_refused_and_never_reshaped(model_folder: Folder) -> None:
    model = load_tiny(model_folder("llama"), [Site(1)])
    ids = torch.ones(2, 3, dtype=torch.int64)

    class SequenceFirst(nn.Module):
        def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            return hidden.transpose(0, 1)

    trunk: Any = model.trunk
    trunk.layers[1] = SequenceFirst()
    model.taps[Site(1)] = Tap(trunk.layers[1], "out")
    with pytest.raises(ModelRefused, match=r"activations of shape \[3, 2, 32\] for 2 sequences of 3 tokens"):
        model.activations(ids, torch.ones_like(ids))


@pytest.mark.parametrize("family", ["xlnet", "fsmt"])
def test_families_that_put_the_sequence_first_are_refused(family: str) -> None:
    with pytest.raises(ModelRefused, match=family):
        find_blocks(nn.Module(), family, 2)


def test_a_module_that_the_model_runs_past_is_refused_and_not_an_error(model_folder: Folder) -> None:
    """As those of a BLOOM are that is told to compute in slices."""
    model = load_tiny(model_folder("bloom", pretraining_tp=2, slow_but_exact=True), [Site(1, "mlp_out")])
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(RequestRefused, match=r"runs past the module that gives 1\.mlp_out") as caught:
        model.activations(ids, torch.ones_like(ids))
    assert caught.value.code is ErrorCode.REQUEST_HOOK_SITE_UNSUPPORTED
