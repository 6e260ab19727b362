"""A job from its spec to its files, as the child does it: the same files again, and what is refused before it costs."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mistudio_schemas import ErrorCode
from mistudio_train.errors import CorpusRefused, ExportRefused, MemoryExhausted
from mistudio_train.messages import ChildMessage, Finished, JobSpec, Progress, Warned
from mistudio_train.training import sweep
from mistudio_train.training.run import run_job

from .conftest import Listener, spec_of

Folder = Callable[..., Path]
TEXTS = [f"the cat sat on mat {number} and looked at {number % 7} birds" for number in range(40)]
TOPK = {"kind": "topk", "k": 4, "hidden_dim": 64, "batch_size": 64}
CHANGING = {"metadata.json", "training_log.jsonl", "index.html", "curves.png"}
"""Names of files that say when it was, and how long it took."""


def spec(folder: Path, workspace: Path, texts: list[str], *, limit: int = 1 << 30, **fields: Any) -> JobSpec:
    workspace.mkdir(parents=True)
    (workspace / "corpus.txt").write_text("\n".join(texts) + "\n")
    asked = {"layer_number": 1, "hidden_dim": 64, "max_epochs": 2, "max_sequence_length": 32} | fields
    return replace(spec_of(folder, workspace, **asked), bundle_max_bytes=limit)


def job(spec: JobSpec) -> tuple[Finished, list[ChildMessage]]:
    parent = Listener()
    return run_job(spec, parent), parent.heard


def hashes(folder: Path) -> dict[str, str]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


@pytest.mark.parametrize("fields", [{}, {"pooling": "token", "sae": TOPK}], ids=["standard", "topk"])
def test_the_same_request_and_seed_give_the_same_files(
    model_folder: Folder, tmp_path: Path, fields: dict[str, Any]
) -> None:
    made = []
    for name in ("first", "second"):
        one = spec(model_folder("llama"), tmp_path / name, TEXTS, **fields)
        job(one)
        made.append({file: digest for file, digest in hashes(one.output).items() if Path(file).name not in CHANGING})
    assert made[0] == made[1]
    assert {"sae_model.pt", "feature_activations.pt", "sae/sae_weights.safetensors"} <= set(made[0])


def test_another_seed_gives_other_weights(model_folder: Folder, tmp_path: Path) -> None:
    made = set()
    for seed in (0, 1):
        one = spec(model_folder("llama"), tmp_path / str(seed), TEXTS, seed=seed)
        job(one)
        made.add(hashes(one.output)["sae/sae_weights.safetensors"])
    assert len(made) == 2


def test_a_special_token_that_a_text_spells_out_is_text(model_folder: Folder, tmp_path: Path) -> None:
    model = model_folder("llama")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    special = {one["id"] for one in tokenizer["added_tokens"] if one["special"] and one["content"] != "<unk>"}
    one = spec(model, tmp_path / "job", ["a <s> b </s> c", "plain words"], pooling="token", sae=TOPK | {"k": 64})
    finished, _ = job(one)
    ids = torch.frombuffer(bytearray((one.scratch / "tokens" / "token_of_row.bin").read_bytes()), dtype=torch.int32)
    assert not special & set(ids.tolist())
    assert finished.corpus.tokens == len(ids)


@pytest.mark.parametrize(
    ("texts", "fields", "limit", "error", "code"),
    [
        (["a book on one line"], {"pooling": "token"}, 1 << 30, CorpusRefused, ErrorCode.CORPUS_EMPTY),
        (TEXTS, {"bundle_complete": True}, 1000, ExportRefused, ErrorCode.EXPORT_REFUSED),
    ],
    ids=["one text", "too small for all rows"],
)
def test_a_bundle_that_cannot_be_is_refused_before_the_model_is_loaded(
    model_folder: Folder,
    tmp_path: Path,
    texts: list[str],
    fields: dict[str, Any],
    limit: int,
    error: type[Exception],
    code: ErrorCode,
) -> None:
    parent = Listener()
    with pytest.raises(error) as caught:
        run_job(spec(model_folder("llama"), tmp_path / "job", texts, limit=limit, **fields), parent)
    assert caught.value.code is code  # type: ignore[attr-defined]
    assert {one.phase for one in parent.heard if isinstance(one, Progress)} == {"planning"}


def test_a_token_budget_that_leaves_one_text_is_refused_before_training(model_folder: Folder, tmp_path: Path) -> None:
    parent = Listener()
    with pytest.raises(CorpusRefused, match="has 1 text"):
        run_job(spec(model_folder("llama"), tmp_path / "job", TEXTS, token_budget=1), parent)
    assert not any(one.phase == "training" for one in parent.heard if isinstance(one, Progress))


def test_a_cut_bundle_is_announced_and_the_feature_store_has_every_row(model_folder: Folder, tmp_path: Path) -> None:
    one = spec(model_folder("llama"), tmp_path / "job", TEXTS, limit=8000, pooling="token", sae=TOPK)
    finished, said = job(one)
    data = json.loads((one.output / "metadata.json").read_text())["data_info"]
    assert 2 <= finished.bundle_rows < len(TEXTS)
    assert data["bundle_truncated"]
    assert data["feature_store"] == {
        "entries": data["feature_store"]["entries"],
        "truncated": False,
        "first_missing_text": None,
        "first_missing_position": None,
    }
    warnings = [message.message for message in said if isinstance(message, Warned)]
    assert any(f"the first {finished.bundle_rows} of {len(TEXTS)} texts" in warning for warning in warnings)


def test_memory_that_runs_out_in_training_can_be_tried_again(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sweep, "fit", fails)
    with pytest.raises(MemoryExhausted, match="were planned for it") as caught:
        job(spec(model_folder("llama"), tmp_path / "job", TEXTS))
    assert caught.value.retryable
    assert "Lower hidden_dim" in caught.value.hint


def test_what_is_kept_cut_and_dropped_is_counted_by_reason_in_the_event_and_the_metadata(
    model_folder: Folder, tmp_path: Path
) -> None:
    texts = ["", "ab", *TEXTS[:10], "x" * 500, " ".join(["the cat sat on"] * 30)]
    fields = {"min_text_characters": 3, "max_text_characters": 480, "max_sequence_length": 16}
    one = spec(model_folder("llama"), tmp_path / "job", texts, **fields)
    corpus = job(one)[0].corpus
    assert (corpus.texts, corpus.texts_dropped) == (11, 3)
    assert (corpus.texts_empty, corpus.texts_too_short, corpus.texts_too_long) == (1, 1, 1)
    assert 1 <= corpus.texts_truncated <= 11
    assert (corpus.tokens_truncated > 0, corpus.texts_beyond_budget) == (True, 0)
    written = json.loads((one.output / "metadata.json").read_text())["data_info"]
    assert written["corpus"] == corpus.model_dump(mode="json")
    assert written["text_count"] == 11


def test_texts_that_a_token_budget_leaves_out_are_counted_and_no_dropped_ones(
    model_folder: Folder, tmp_path: Path
) -> None:
    corpus = job(spec(model_folder("llama"), tmp_path / "job", ["", *TEXTS], token_budget=200))[0].corpus
    assert (corpus.texts_dropped, corpus.texts_empty) == (1, 1)
    assert corpus.texts_beyond_budget == len(TEXTS) - corpus.texts > 0
