"""Which tokens a direction speaks for, against the model's own norm and head."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mistudio_train.sae.folded import FoldedSAE
from mistudio_train.training import promoted
from mistudio_train.training.language_model import HeadedModel, load_with_head
from mistudio_train.training.memory_plan import plan_memory
from mistudio_train.training.model_source import inspect
from mistudio_train.training.sites import Site
from tests.models import D_IN, ENCODERS, FAMILIES

from .conftest import spec_of

Folder = Callable[..., Path]
D_SAE = 24
NORMS = {
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "opt": "model.decoder.final_layer_norm",
    "phi": "model.final_layernorm",
}


def sae(d_in: int) -> FoldedSAE:
    torch.manual_seed(0)
    weight = torch.randn(d_in, D_SAE)
    return FoldedSAE("topk", weight.T.contiguous(), torch.zeros(D_SAE), weight, torch.zeros(d_in), k=4)


def headed(folder: Path, tmp_path: Path) -> HeadedModel:
    spec = spec_of(folder, tmp_path)
    (tmp_path / "corpus.txt").write_text("a\nb\n")
    source = inspect(str(folder), folders=[folder.parent])
    return load_with_head(source, plan_memory(source, spec), [Site(1)])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ENCODERS])
def test_they_are_those_that_the_head_prefers(model_folder: Folder, tmp_path: Path, family: str) -> None:
    folder, mine = model_folder(family), sae(D_IN)
    found = promoted.promoted_tokens(headed(folder, tmp_path), mine)
    assert found is not None
    whole: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    norm = whole.get_submodule(NORMS.get(family, "model.norm"))
    weight = whole.get_output_embeddings().weight
    with torch.no_grad():
        directions = mine.decoder_weight.T
        logits = (norm(directions) - norm(torch.zeros_like(directions))) @ weight.T
        centred = logits - logits.mean(1, keepdim=True)
    most, least = centred.topk(promoted.TOKENS), centred.topk(promoted.TOKENS, largest=False)
    assert found.most.tolist() == most.indices.tolist()
    assert found.least.tolist() == least.indices.tolist()
    torch.testing.assert_close(torch.from_numpy(found.most_logits), most.values)


def test_it_does_not_matter_how_many_are_looked_at_together(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, mine = headed(model_folder("llama"), tmp_path), sae(D_IN)
    together = promoted.promoted_tokens(model, mine)
    monkeypatch.setattr(promoted, "NUMBERS_AT_ONCE", 1)
    alone = promoted.promoted_tokens(model, mine)
    assert together is not None
    assert alone is not None
    assert together.most.tolist() == alone.most.tolist()


def test_nothing_is_said_where_there_is_no_such_head(model_folder: Folder, tmp_path: Path) -> None:
    assert promoted.promoted_tokens(headed(model_folder("bert"), tmp_path), sae(D_IN)) is None
    assert promoted.promoted_tokens(headed(model_folder("llama"), tmp_path), sae(D_IN // 2)) is None
