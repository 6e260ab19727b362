"""For tests: messages that nobody should send. Those of Hypothesis, and valid requests with something wrong in them.

Whatever is in one, it ends as a dead letter or as a job with an end; `accounted` says whether each did, exactly once.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from aiokafka import AIOKafkaProducer, ConsumerRecord
from aiokafka.producer import message_accumulator, producer
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy
from confluent_kafka import Producer
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mistudio_schemas import TrainCompleted, header
from mistudio_schemas.kafka import EVENT_TYPES
from mistudio_train.settings import Settings
from mistudio_train.worker import kafka
from mistudio_train.worker.register import Register
from mistudio_train.worker.store import open_store

from .bus import events

Place = tuple[int, int]
"""Partition and offset of a message."""

BASE: dict[str, Any] = {"model_name": "m", "corpus_file": "absent.txt", "hidden_dim": 64, "max_epochs": 1}
"""A request that is accepted, and whose corpus nobody finds: no child is started for it."""
LARGE_BYTES = 9 * 1024 * 1024
NAMES = (
    "../../canary.txt",
    "..\\..\\canary.txt",
    "/etc/passwd",
    "/etc/hosts.txt",
    "{canary}",
    "file://{canary}",
    "samples/../../../canary.txt",
    "s3://foreign-bucket/canary.txt",
    "s3://{bucket}/../canary.txt",
    "s3://{bucket}/jobs/../corpora/x.txt",
    "s3:///canary.txt",
    "s3://{bucket}",
    "corpus.txt\x00.csv",
    "corpus.txt/",
    "\uff0e\uff0e\uff0fcanary.txt",
    "..%2fcanary.txt",
    "\u202etxt.suproc",
    "corpus.txt\n",
    "link.txt",
    "a" * 5000 + ".txt",
    "con.txt",
    "~/canary.txt",
    "${HOME}/canary.txt",
    "cörpus.txt",
    "co\u0301rpus.txt",
)
ODD: tuple[Any, ...] = (
    *(0, -1, 2**31, 2**63, -(2**63), 10**400, 1e308, -1e-320, True, None, "", " ", [], {}, [[]], {"kind": "topk"}),
    *(
        "\x00",
        "\ud800",
        "\U0001d7d9\U0001d7da",
        "١٢٣",
        "1e9",
        "0x10",
        "💥" * 300,
        "<script>",
        "{{7*7}}",
        "%n%s",
        "'; drop table runs",
    ),
)
FIELDS = (
    *(
        "model_name",
        "model_revision",
        "corpus_file",
        "corpus_column",
        "label_column",
        "layer_number",
        "hook_site",
        "token_name",
    ),
    *("hidden_dim", "sparsity_coeff", "learning_rate", "batch_size", "max_epochs", "min_loss", "gpu_id", "job_id"),
    *("max_sequence_length", "sae", "saes", "pooling", "huggingface_token", "seed", "dtype", "unknown"),
)


@dataclass(frozen=True)
class Hostile:
    """A message to be sent."""

    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()
    raw_name: bytes | None = None
    """Of one more header, whose name need not be text."""


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
REQUESTS = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6).map(lambda fields: BASE | fields)
HEADERS = st.lists(
    st.tuples(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8), st.binary(max_size=30)),
    max_size=3,
)


def generated(strategy: st.SearchStrategy[Any], count: int, number: int) -> list[Any]:
    """Examples of a strategy, the same for the same number."""
    found: list[Any] = []

    @seed(number)
    @hypothesis_settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(example: Any) -> None:
        found.append(example)

    collect()
    return found


class Hostility:
    """A source of messages, the same for the same seed."""

    def __init__(self, number: int, settings: Settings, canary: Path) -> None:
        self._random = random.Random(number)
        self._names = [
            name.replace("{canary}", str(canary)).replace("{bucket}", settings.minio_bucket) for name in NAMES
        ]
        self._trees, self._requests = generated(JSON, 300, number), generated(REQUESTS, 600, number + 1)
        self._headers, self._bytes = (
            generated(HEADERS, 300, number + 2),
            generated(st.binary(max_size=200), 300, number),
        )
        self._made = 0
        self._kinds: list[Callable[[], bytes | None]] = [
            self._flipped,
            self._flipped,
            self._truncated,
            self._strange_field,
            self._strange_field,
            self._strange_name,
            self._strange_name,
            self._from_hypothesis,
            self._any_json,
            self._any_bytes,
            self._deep,
            self._numbers,
            self._twice,
            self._surrogates,
            lambda: None,
        ]

    def messages(self, count: int, *, large_every: int = 500) -> Iterator[Hostile]:
        """So many messages; one in `large_every` is of 9 MB."""
        for number in range(count):
            if number % large_every == large_every - 1:
                yield Hostile(None, self._large())
            else:
                yield self._message()

    def _message(self) -> Hostile:
        rng = self._random
        value = rng.choice(self._kinds)()
        key = rng.choice([None, b"", b"key", rng.choice(self._bytes)])
        headers = list(rng.choice(self._headers)) if rng.random() < 0.5 else []
        if rng.random() < 0.1:
            headers.append(("ce_type", rng.choice([*EVENT_TYPES, "mistudio.train.requested.v2", "\x00", ""]).encode()))
        if rng.random() < 0.05:
            headers.append(("ce_type", rng.choice(self._bytes)))
        if rng.random() < 0.05:
            headers.append(("traceparent", rng.choice(self._bytes) * 20))
        raw = bytes([rng.randrange(128, 256), 0xFF]) if rng.random() < 0.02 else None
        return Hostile(key, value, tuple(headers), raw)

    def _base(self) -> dict[str, Any]:
        self._made += 1
        return BASE | {"job_id": f"fuzz-{self._made}"} if self._random.random() < 0.8 else dict(BASE)

    def _flipped(self) -> bytes:
        data = bytearray(json.dumps(self._base()).encode())
        for _ in range(self._random.randint(1, 4)):
            data[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
        return bytes(data)

    def _truncated(self) -> bytes:
        data = json.dumps(self._base()).encode()
        return data[: self._random.randrange(len(data))]

    def _strange_field(self) -> bytes:
        odd = {self._random.choice(FIELDS): self._random.choice(ODD) for _ in range(self._random.randint(1, 3))}
        return json.dumps(self._base() | odd).encode()

    def _strange_name(self) -> bytes:
        return json.dumps(self._base() | {"corpus_file": self._random.choice(self._names)}).encode()

    def _from_hypothesis(self) -> bytes:
        return json.dumps(self._base() | self._random.choice(self._requests)).encode()

    def _any_json(self) -> bytes:
        return json.dumps(self._random.choice(self._trees)).encode()

    def _any_bytes(self) -> bytes:
        return cast(bytes, self._random.choice(self._bytes))

    def _deep(self) -> bytes:
        depth = self._random.choice([50, 900, 5000, 100_000])
        inner = b"[" * depth + b"]" * depth if self._random.random() < 0.5 else b'{"a":' * depth + b"1" + b"}" * depth
        return json.dumps(self._base())[:-1].encode() + b', "%s": %s}' % (self._random.choice([b"sae", b"x"]), inner)

    def _numbers(self) -> bytes:
        number = self._random.choice(
            [b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"-0", b"1" + b"0" * 400, b"0.1e-400"]
        )
        return json.dumps(self._base())[:-1].encode() + b', "%s": %s}' % (self._random.choice(FIELDS).encode(), number)

    def _twice(self) -> bytes:
        field = self._random.choice(FIELDS)
        return json.dumps(self._base())[:-1].encode() + b', "%s": 1, "%s": "x"}' % ((field.encode(),) * 2)

    def _surrogates(self) -> bytes:
        text = self._random.choice(["\ud800", "\udfff\ud800", "a\ud83d", "\x00", "\ufeff", "\U0010ffff"])
        return json.dumps(self._base() | {self._random.choice(FIELDS): text}).encode()

    def _large(self) -> bytes:
        filling = self._random.choice([b"[1]", b'"x"', b"null"])
        value = json.dumps(self._base())[:-1].encode() + b', "unknown": ['
        return value + b",".join([filling] * (LARGE_BYTES // (len(filling) + 1))) + b"]}"


class RawName(str):
    """The name of a header that is no UTF-8, as clients in other languages can send it."""

    raw: bytes

    def encode(self, *_: Any) -> bytes:
        return self.raw


async def send(messages: Iterator[Hostile], settings: Settings) -> dict[Place, Hostile]:
    """Publish them, spread over all partitions; where each lies."""
    sent: dict[Place, Hostile] = {}
    raw = [one for one in await asyncio.to_thread(_send_plain, messages, settings, sent) if one.raw_name is not None]
    before = producer.DefaultRecordBatchBuilder
    # the builder in C would refuse the names
    for module in (producer, message_accumulator):
        module.DefaultRecordBatchBuilder = _DefaultRecordBatchBuilderPy
    try:
        async with kafka.started(AIOKafkaProducer(**kafka.client_options(settings))) as sender:
            for number, one in enumerate(raw):
                name = RawName("name")
                name.raw = one.raw_name or b""
                partition = number % settings.kafka_request_partitions
                where = await sender.send_and_wait(
                    settings.topics.requested,
                    one.value if one.value is not None or one.key is not None else b"",
                    key=one.key,
                    partition=partition,
                    headers=[*one.headers, (name, b"value")],
                )
                sent[where.partition, where.offset] = one
    finally:
        for module in (producer, message_accumulator):
            module.DefaultRecordBatchBuilder = before
    return sent


def _send_plain(messages: Iterator[Hostile], settings: Settings, sent: dict[Place, Hostile]) -> list[Hostile]:
    """Those whose headers' names are text; the others come back."""
    sender = Producer(
        {
            "bootstrap.servers": settings.kafka_bootstrap_servers,
            "message.max.bytes": kafka.MAX_MESSAGE_BYTES,
            "linger.ms": 20,
            "queue.buffering.max.kbytes": 100_000,
        }
    )

    def delivered(one: Hostile) -> Callable[[Any, Any], None]:
        def note(error: Any, record: Any) -> None:
            assert error is None, error
            sent[record.partition(), record.offset()] = one

        return note

    others = []
    for number, one in enumerate(messages):
        if one.raw_name is not None:
            others.append(one)
            continue
        while True:
            try:
                sender.produce(
                    settings.topics.requested,
                    one.value,
                    one.key,
                    number % settings.kafka_request_partitions,
                    on_delivery=delivered(one),
                    headers=list(one.headers),
                )
                break
            except BufferError:
                sender.poll(0.1)
        sender.poll(0)
    sender.flush()
    return others


@dataclass
class Account:
    """What became of messages."""

    letters: Counter[Place]
    jobs: Counter[Place]
    codes: Counter[str]
    wrong: list[str]
    """What is not as it must be; nothing when all is well."""


def accounted(sent: dict[Place, Hostile], records: list[ConsumerRecord], settings: Settings) -> Account:
    """Match the messages with dead letters, and with the terminal events of their jobs.

    Args:
        records: of the dead letters and of all terminal topics.

    """
    wrong: list[str] = []
    letters: Counter[Place] = Counter()
    for record in records:
        if record.topic == settings.topics.dead_letter:
            newest = list(record.headers)[::-1]
            place = tuple(int(header(newest, f"kafka_dlt-original-{part}") or -1) for part in ("partition", "offset"))
            letters[cast(Place, place)] += 1
            original = sent.get(cast(Place, place))
            if original is None or (record.key, record.value) != (original.key, original.value):
                empty = original is not None and (original.key, original.value) == (None, None)
                if not (empty and record.value == b""):
                    wrong.append(f"the dead letter of {place} differs from the message")
    ends = events([record for record in records if record.topic != settings.topics.dead_letter])
    ended = Counter((str(event.job_id), event.run) for event in ends)  # type: ignore[attr-defined]
    wrong += [f"{run} has {count} ends" for run, count in ended.items() if count != 1]
    done = {(str(event.job_id), event.run) for event in ends if isinstance(event, TrainCompleted)}
    jobs: Counter[Place] = Counter()
    store = open_store(settings)
    register = Register(store)
    for job_id in {job_id for job_id, _ in ended}:
        for claim in register.runs(job_id):
            said = claim.record.message
            place = said.partition, said.offset
            jobs[place] += 1
            if (job_id, claim.record.run) in done and not _may_read(sent[place], settings):
                wrong.append(f"the job of {place} was given a corpus that it may not read")
            if (job_id, claim.record.run) not in ended:
                wrong.append(f"{job_id} run {claim.record.run} has no end")
    wrong += [f"the key {found.key!r} is in the store" for found in store.list("") if not found.key.startswith("jobs/")]
    both = letters + jobs
    wrong += [f"the message at {place} has {both[place]} ends" for place in sent if both[place] != 1]
    wrong += [f"{place} is no message of ours" for place in both if place not in sent]
    codes = Counter(str(getattr(event, "code", "completed")) for event in ends)
    return Account(letters, jobs, codes, wrong)


def _may_read(message: Hostile, settings: Settings) -> bool:
    """Whether the corpus that the message names is one of the worker's."""
    samples = settings.data_path / "samples"
    named = json.loads(message.value or b"{}")["corpus_file"]
    return bool((samples / named).resolve() == samples / "corpus.txt")


def lay_canaries(folder: Path, samples: Path) -> dict[str, tuple[int, int]]:
    """Files that nothing may touch, beside the worker's folder, and a link to one within it; see `touched`."""
    samples.mkdir(parents=True, exist_ok=True)
    (samples / "corpus.txt").write_text("one\ntwo\nthree\n")
    canary = folder / "canary.txt"
    canary.write_text("nobody may read this\n")
    (samples / "link.txt").symlink_to(canary)
    return outside(folder)


def outside(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file beside the worker's folder."""
    found = [path for path in folder.iterdir() if path.name != "data"]
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}
