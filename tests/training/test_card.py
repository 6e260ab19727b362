"""The card beside the weights: what the hub reads of it, what it says, and that nothing in it acts."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from mistudio_train.messages import Warned
from mistudio_train.training.card import code, prose
from mistudio_train.training.run import run_job

from .conftest import Listener, spec_of
from .test_run import TEXTS, TOPK, spec

Folder = Callable[..., Path]
HOSTILE = "x`` | <img src=x onerror=y> [a](javascript:b) **c** \\` # d\n\n# e https://evil.example www.evil.example `"
MARKDOWN = MarkdownIt("gfm-like", {"linkify": False, "html": True})


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter and the rest."""
    _, front, text = (folder / "sae" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def shown_text(markdown: str) -> str:
    """What a reader sees, of what is only text and code; raises if there is anything else."""
    found = []
    for block in MARKDOWN.parse(markdown):
        for token in block.children or []:
            assert token.type in ("text", "code_inline", "text_special"), token.type
            found.append(token.content)
    return "".join(found)


@pytest.mark.parametrize("text", [HOSTILE, "`", "``", " a ", "a|b", "~~~", "1. a", "- a", "\\", "&lt;", "<!-- a"])
def test_whatever_a_value_holds_is_shown_and_does_nothing(text: str) -> None:
    line = text.replace("\n", "⏎")
    assert shown_text(prose(text)).strip() == line.strip()
    cells = [
        token for token in MARKDOWN.parse(f"| a | b |\n| - | - |\n| {code(text)} | c |\n") if token.type == "inline"
    ]
    assert [token.type for token in cells[2].children or []] == ["code_inline"]
    assert (cells[2].children or [])[0].content.strip() == line.strip()
    assert len(cells) == 4


def test_the_card_says_how_good_it_is_and_what_it_was_made_from(model_folder: Folder, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"pooling": "token", "sae": TOPK, "cross_entropy_tokens": 256, "held_out": 0.2, "seed": 7}
    job, parent = spec(model_folder("llama"), tmp_path / "job", TEXTS, **fields), Listener()
    finished = run_job(job, parent)
    front, text = card_of(job.output)
    assert front == {
        "library_name": "saelens",
        "tags": ["sparse-autoencoder", "saelens", "interpretability", "topk"],
    }  # the model is a folder's: the hub knows no such name, and nobody has said a licence
    metrics = finished.saes[0].metrics
    assert metrics.fvu is not None
    assert metrics.cross_entropy is not None
    assert f"| {metrics.fvu:.4g} |" in text
    assert "Cross-entropy recovered" in text
    assert f"On {metrics.rows:,} rows of texts that were held out" in shown_text(text)
    for said in (finished.corpus.sha256, "resid_post", "| Seed | 7 |", "sae.encode(x)", f'"k": {TOPK["k"]}'):
        assert said in text
    assert all(prose(warning) in text for warning in [one.message for one in parent.heard if isinstance(one, Warned)])


def test_a_hostile_request_changes_nothing_on_the_card(model_folder: Folder, tmp_path: Path) -> None:
    tmp_path.joinpath("corpus.jsonl").write_text("".join(json.dumps({"```<b>": text}) + "\n" for text in TEXTS))
    asked: dict[str, Any] = {"layer_number": 1, "hidden_dim": 64, "max_epochs": 1, "corpus_column": "```<b>"}
    job = spec_of(model_folder("llama"), tmp_path, corpus_file="c|`<b>[x](y).jsonl", **asked)
    run_job(replace(job, corpus=tmp_path / "corpus.jsonl", bundle_max_bytes=1 << 30), Listener())
    _, text = card_of(job.output)
    fences = [token for token in MARKDOWN.parse(text) if token.type == "fence"]
    assert [fence.info for fence in fences] == ["python", "json", "json"]
    assert json.loads(fences[2].content)["corpus_column"] == "```<b>"
    assert "c|`<b>[x](y).jsonl" in shown_text(text)


@pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning")
def test_saelens_loads_the_folder_with_its_card(model_folder: Folder, tmp_path: Path) -> None:
    from sae_lens import SAE

    job = spec(model_folder("llama"), tmp_path / "job", TEXTS, pooling="token", sae=TOPK)
    run_job(job, Listener())
    assert (job.output / "sae" / "README.md").exists()
    assert SAE.load_from_disk(job.output / "sae").cfg.d_sae == 64


def test_every_sae_of_several_has_its_own_card(model_folder: Folder, tmp_path: Path) -> None:
    saes = [TOPK | {"name": "a"}, TOPK | {"name": "b", "kind": "batchtopk"}]
    job = spec(model_folder("llama"), tmp_path / "job", TEXTS, pooling="token", saes=saes, report=False)
    run_job(job, Listener())
    for folder, kind in ((job.output, "topk"), (job.output / "saes" / "b", "batchtopk")):
        assert card_of(folder)[0]["tags"][-1] == kind
