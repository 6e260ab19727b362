"""What of a result must be the same however often its job died: a digest for each file, without times and places."""

import hashlib
import io
import json
from typing import Any

import torch

from mistudio_schemas import TrainCompleted
from mistudio_train.worker.store import Store

NOT_COMPARED = ("metadata.json", "training_log.jsonl", "index.html", "curves.png", "README.md")
"""They hold times, and measurements are taken once a second."""
OF_ONE_RUN = frozenset({"job_id", "prefix", "training_seconds"})


def digests(store: Store, done: TrainCompleted) -> dict[str, str]:
    """Name to digest."""
    compared = [ref for ref in done.artifacts if ref.name.rpartition("/")[2] not in NOT_COMPARED]
    return {ref.name: digest(ref.name, store.get_bytes(ref.key)[0]) for ref in compared}


def digest(name: str, data: bytes) -> str:
    """Of a file: its bytes, or for what holds times beside the results, its content without them."""
    if name.endswith(".pt"):
        return _of(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    if name.endswith(".json"):
        return _of(json.loads(data))
    return hashlib.sha256(data).hexdigest()


def _of(value: Any) -> str:
    return hashlib.sha256(repr(_plain(value)).encode()).hexdigest()


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return [(key, _plain(value[key])) for key in sorted(value, key=str) if key not in OF_ONE_RUN]
        case list() | tuple():
            return [_plain(one) for one in value]
        case torch.Tensor():
            content = value.contiguous().view(torch.uint8).numpy().tobytes() if value.numel() and value.dim() else b""
            content = content or str(value.tolist()).encode()
            return str(value.dtype), tuple(value.shape), hashlib.sha256(content).hexdigest()
        case _:
            return value
