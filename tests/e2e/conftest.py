"""One real worker on a real Kafka and a real MinIO takes many jobs at once; each test looks at what became of one."""

import asyncio
import io
import json
import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics as help_texts
from typing import Any
from uuid import uuid4

import pytest
from aiokafka import ConsumerRecord

from mistudio_schemas import ArtifactRef, TrainCompleted, TrainFailed, TrainProgress, TrainRequested, record_for
from mistudio_stack import Stack
from mistudio_train.settings import Settings
from mistudio_train.worker.corpora import put_corpus
from mistudio_train.worker.store import Store, open_store
from tests.models import tiny_model
from tests.worker.bus import events, publish, reading, running_worker
from tests.worker.jobs import trains_and_keeps

LAYERS = 6
TOKEN = "hf_a_token_that_somebody_put_into_a_request"


@dataclass
class Outcome:
    """What the topics say of one job."""

    progress: list[TrainProgress] = field(default_factory=list)
    ends: list[TrainCompleted | TrainFailed] = field(default_factory=list)

    @property
    def completed(self) -> TrainCompleted:
        (end,) = self.ends
        assert isinstance(end, TrainCompleted), end
        return end

    @property
    def failed(self) -> TrainFailed:
        (end,) = self.ends
        assert isinstance(end, TrainFailed), end
        return end


@dataclass(frozen=True)
class World:
    """The worker's settings and store, the models, and every job's outcome."""

    settings: Settings
    store: Store
    folder: Path
    outcomes: dict[str, Outcome]
    records: list[ConsumerRecord]
    """Everything that the worker published."""
    printed: str
    """Everything that the worker and its children logged or printed."""

    def file(self, ref: ArtifactRef) -> bytes:
        return self.store.get_bytes(ref.key)[0]


def corpus_texts() -> list[str]:
    paragraphs = (one.replace("\n", " ") for text in help_texts.values() for one in text.split("\n\n"))
    return [one for one in paragraphs if 40 < len(one) < 400][:160]


def jobs(folder: Path, bucket: str) -> dict[str, dict[str, Any]]:
    """Name to request; models are folders, and one lies in the bucket."""
    decoder, encoder = str(folder / "llama"), str(folder / "bert")
    base: dict[str, Any] = {
        "corpus_file": "corpus.txt",
        "layer_number": 2,
        "hidden_dim": 64,
        "max_epochs": 3,
        "max_sequence_length": 64,
    }
    topk = {"kind": "topk", "k": 8, "batch_size": 256}
    saes = [
        topk | {"kind": "batchtopk", "name": "first"},
        {"kind": "standard", "name": "second", "layer_number": 2},
        topk | {"kind": "matryoshka", "name": "third", "layer_number": 4, "hidden_dim": 128},
    ]
    return {
        "decoder-mean-standard": base | {"model_name": decoder},
        "decoder-token-topk": base | {"model_name": decoder, "pooling": "token", "sae": topk},
        "encoder-mean-topk": base | {"model_name": encoder, "sae": topk},
        "encoder-token-standard": base | {"model_name": encoder, "pooling": "token", "token_budget": 600},
        "three-saes": base | {"model_name": decoder, "pooling": "token", "saes": saes},
        "default-layer": {key: value for key, value in base.items() if key != "layer_number"} | {"model_name": decoder},
        "same-again": base | {"model_name": decoder},
        "from-the-bucket": base
        | {"model_name": f"s3://{bucket}/models/llama", "corpus_file": f"s3://{bucket}/corpora/corpus.txt"},
        "no-bucket-model": base | {"model_name": f"s3://{bucket}/models/lama"},
        "layer-out-of-range": base | {"model_name": decoder, "layer_number": LAYERS},
        "no-corpus": base | {"model_name": decoder, "corpus_file": "corpse.txt"},
        "no-model": base | {"model_name": "nobody/has-this-model"},
        "foreign-model": base | {"model_name": "/etc"},
        "too-wide": base | {"model_name": decoder, "hidden_dim": 40_000},
        "too-large": base | {"model_name": str(folder / "wide"), "hidden_dim": 32_768},
        "with-token": base | {"model_name": decoder, "huggingface_token": TOKEN},
        "bad-corpus": base | {"model_name": decoder, "corpus_file": "latin.txt"},
    }


def prepare(folder: Path, store: Store) -> None:
    store.ensure()
    for family in ("llama", "bert"):
        tiny_model(family, folder / family, num_hidden_layers=LAYERS)
    wide = tiny_model("llama", folder / "wide")
    config = json.loads((wide / "config.json").read_text()) | {"hidden_size": 65_536}
    (wide / "config.json").write_text(json.dumps(config))
    (folder / "corpus.txt").write_text("\n".join(corpus_texts()) + "\n\n")
    (folder / "latin.txt").write_bytes("good\ncaf\u00e9\n".encode("latin-1"))
    for path in (folder / "llama").iterdir():
        store.put_file(f"models/llama/{path.name}", path)
    for name in ("corpus.txt", "latin.txt"):
        put_corpus(store, name, folder / name)


async def observe(settings: Settings, wanted: dict[str, dict[str, Any]]) -> list[ConsumerRecord]:
    """Publish the requests, run a worker until each has ended, and keep what was said."""
    topics = settings.topics
    await publish(settings, *(request(name, fields, settings) for name, fields in wanted.items()))
    said = set(topics.all()) - {topics.requested}
    async with running_worker(settings, trains_and_keeps), reading(settings, *said) as reader:
        await reader.until(
            lambda records: (
                bool(records)
                and {one.key for one in records if one.topic != topics.progress} == {name.encode() for name in wanted}
            ),
            seconds=280,
        )
        return await reader.drained()


def outcomes_of(names: Iterable[str], records: list[ConsumerRecord]) -> dict[str, Outcome]:
    outcomes = {name: Outcome() for name in names}
    for event in events(records):
        if isinstance(event, TrainProgress):
            outcomes[event.job_id].progress.append(event)
        elif isinstance(event, TrainCompleted | TrainFailed):
            outcomes[event.job_id].ends.append(event)
    return outcomes


def request(name: str, fields: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """A record also for what our client would refuse."""
    record = record_for(TrainRequested(job_id=name, model_name="m", corpus_file="c"), source="/e2e")
    value = json.dumps(fields | {"job_id": name}).encode()
    return {"topic": settings.topics.requested, "key": record.key, "value": value, "headers": record.headers}


@pytest.fixture(scope="session")
async def world(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    folder, name = tmp_path_factory.mktemp("e2e"), f"e{uuid4().hex[:12]}"
    settings = Settings.model_validate(
        {key.lower(): value for key, value in stack.env().items()}
        | {
            "kafka_topic_prefix": f"{name}.",
            "kafka_group_id": name,
            "kafka_request_partitions": 8,
            "minio_bucket": name,
            "data_path": folder / "data",
            "local_model_folders": [folder],
            "max_concurrent_jobs": 1,
        }
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_HUB_OFFLINE", "1")
        store = open_store(settings)
        await asyncio.to_thread(prepare, folder, store)
        wanted = jobs(folder, name)
        with printed() as said:
            records = await observe(settings, wanted)
        yield World(settings, store, folder, outcomes_of(wanted, records), records, said.getvalue())


@contextmanager
def printed() -> Iterator[io.StringIO]:
    """Catches the worker's log and what its children print, and prints it afterwards."""
    said = io.StringIO()
    handler, logger = logging.StreamHandler(said), logging.getLogger("mistudio_train")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        with redirect_stderr(said):
            yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        print(said.getvalue())
