"""Tiny models made once for all tests of this folder, and short ways to load and run one."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mistudio_schemas import TrainRequested
from mistudio_train.messages import ChildMessage, JobSpec, Lease, Wish
from mistudio_train.training.corpus import open_corpus
from mistudio_train.training.language_model import LanguageModel, load
from mistudio_train.training.memory_plan import MemoryPlan
from mistudio_train.training.model_source import inspect
from mistudio_train.training.sites import Site
from mistudio_train.training.texts import Texts
from tests.models import tiny_model


class Listener:
    """A parent that keeps what it hears, and may want something from some moment on."""

    def __init__(self, when: Callable[[ChildMessage], Wish | None] = lambda message: None) -> None:
        self.heard: list[ChildMessage] = []
        self.wish: Wish | None = None
        self._when = when

    def __call__(self, message: ChildMessage) -> None:
        self.heard.append(message)
        self.wish = self.wish or self._when(message)


class NothingKept:
    """No shard is there, and none is kept."""

    def shard(self, number: int) -> int | None:
        return None

    def keep_shard(self, number: int, tokens_per_batch: int, files: Iterable[Path]) -> None:
        pass


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
    return open_corpus({"corpus.txt": folder / "corpus.txt"}, folder / "texts")


def spec_of(folder: Path, workspace: Path, *, memory: int | None = None, **fields: Any) -> JobSpec:
    """A job of the model in that folder, on the CPU."""
    request = TrainRequested.model_validate({"model_name": str(folder), "corpus_file": "corpus.txt"} | fields)
    return JobSpec(
        job_id="job", run=1, attempt=1, request=request, corpus=workspace / "corpus.txt", workspace=workspace,
        lease=Lease(None), uri_prefix="file:///", bundle_max_bytes=1, model_folders=(folder.parent,),
        memory_limit_bytes=memory,
    )  # fmt: skip
