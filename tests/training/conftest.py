"""Tiny models made once for all tests of this folder, and short ways to load and run one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mistudio_schemas import TrainRequested
from mistudio_train.messages import JobSpec, Lease
from mistudio_train.training.corpus import open_corpus
from mistudio_train.training.language_model import LanguageModel, load
from mistudio_train.training.memory_plan import MemoryPlan
from mistudio_train.training.model_source import inspect
from mistudio_train.training.sites import Site
from mistudio_train.training.texts import Texts
from tests.models import tiny_model


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a family's tiny model, made when first asked for."""
    root = tmp_path_factory.mktemp("models")

    def folder(family: str, **options: Any) -> Path:
        name = "-".join([family, *(f"{key}={value}" for key, value in options.items())])
        return root / name if (root / name).exists() else tiny_model(family, root / name, **options)

    return folder


def plan_of(tokens_per_batch: int) -> MemoryPlan:
    """A plan for the CPU."""
    return MemoryPlan("cpu", "float32", "none", tokens_per_batch, 0, 0, 0, 0, 0)


def load_tiny(folder: Path, sites: Sequence[Site]) -> LanguageModel:
    """Load a model of that folder."""
    return load(inspect(str(folder), folders=[folder.parent]), plan_of(256), sites)


def texts_of(folder: Path, texts: Sequence[str]) -> Texts:
    """The texts as a corpus, by way of a file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.txt").write_text("\n".join(texts))
    return open_corpus(folder / "corpus.txt", None, "corpus.txt", folder / "texts")


def spec_of(folder: Path, workspace: Path, *, memory: int | None = None, **fields: Any) -> JobSpec:
    """A job of the model in that folder, on the CPU."""
    request = TrainRequested.model_validate({"model_name": str(folder), "corpus_file": "corpus.txt"} | fields)
    return JobSpec(
        job_id="job", run=1, attempt=1, request=request, corpus=workspace / "corpus.txt", workspace=workspace,
        lease=Lease(None), uri_prefix="file:///", bundle_max_bytes=1, model_folders=(folder.parent,),
        memory_limit_bytes=memory,
    )  # fmt: skip
