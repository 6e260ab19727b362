"""What makes two jobs the same: everything that shows in the numbers, and nothing else."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mistudio_schemas import TrainRequested
from mistudio_train.messages import Identified
from mistudio_train.training.identity import identity_of
from mistudio_train.training.model_source import ModelSource
from mistudio_train.training.reporter import Reporter
from mistudio_train.training.run import accept

from .conftest import Listener
from .test_run import TEXTS, spec

Folder = Callable[..., Path]


def request(**fields: Any) -> TrainRequested:
    return TrainRequested.model_validate({"model_name": "m/n", "corpus_file": "c.txt"} | fields)


def identity(request: TrainRequested, commit: str = "abc", corpus: str = "0" * 64) -> str:
    return identity_of(request, ModelSource("m/n", None, commit, {}), corpus)


def test_what_does_not_show_in_the_numbers_does_not_count() -> None:
    same: list[dict[str, Any]] = [
        {"job_id": "a"},
        {"gpu_id": 1},
        {"token_name": "team"},
        {"checkpoint_seconds": 5},
        {"model_revision": "main"},
    ]
    assert {identity(request(**fields)) for fields in same} == {identity(request())}


def test_everything_else_counts() -> None:
    others: list[dict[str, Any]] = [
        {"seed": 1},
        {"hidden_dim": 128},
        {"sae": {"kind": "topk", "k": 4}},
        {"pooling": "token"},
        {"corpus_column": "body"},
        {"corpus_holds": "conversations"},
        {"pooling": "token", "packing": True},
        {"min_text_characters": 9},
        {"max_text_characters": 9},
    ]
    found = {identity(request(**fields)) for fields in others}
    found |= {identity(request()), identity(request(), commit="def"), identity(request(), corpus="1" * 64)}
    assert len(found) == len(others) + 3


def test_a_model_in_a_folder_counts_by_its_content(model_folder: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder("gpt2"), folder)
    said = []
    for name in ("before", "again", "changed"):
        if name == "changed":
            (folder / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text() + "\n")
        listener = Listener()
        accept(replace(spec(folder, tmp_path / name, TEXTS), identify=True), Reporter(listener))
        said.append(next(message.identity for message in listener.heard if isinstance(message, Identified)))
    assert said[0] == said[1] != said[2]
