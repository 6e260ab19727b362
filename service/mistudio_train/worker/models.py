"""Models of buckets: which a request may name, and bringing one to the worker's disk.

Judges names, places and listings only; what is in a file of a model is the child's to read.
"""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mistudio_schemas import ErrorCode
from mistudio_train.errors import ModelRefused, StoreUnavailable
from mistudio_train.model_files import is_wanted, refuse_pickles
from mistudio_train.settings import Settings

from .buckets import parted, reading, shown
from .model_cache import HeldModel, ModelCache
from .objects import NotFound, ObjectInfo, Store


def fetch_model(
    model_name: str, settings: Settings, store: Store, go_on: Callable[[], None] = lambda: None
) -> HeldModel:
    """The model's folder on this disk, held against removal until it is released.

    Args:
        model_name: `s3://bucket/prefix`, in the worker's bucket or in one that its operator allows.
        settings: say which buckets, where models are kept, and whether pickled weights will do.
        store: the worker's.
        go_on: called now and then while it waits; what it raises ends the wait.

    Raises:
        ModelRefused: `model.not_allowed`, `model.not_found`, or `model.unsupported` where there is no model.
        StoreUnavailable: if the store does not answer, or somebody writes the model meanwhile; worth another try.
        DiskFull: if there is no room for it.

    """
    bucket, prefix = _place(model_name, settings, store)
    listed = _listing(model_name, bucket, prefix, store)
    names = [name for name in listed if is_wanted(name, allow_unsafe=settings.allow_unsafe_models)]
    if "config.json" not in names:
        raise ModelRefused(
            f"{shown(model_name)} holds no config.json",
            "Name the folder that save_pretrained has written: s3://bucket/path/of/it.",
            ErrorCode.MODEL_UNSUPPORTED,
        )
    if not settings.allow_unsafe_models:
        refuse_pickles(model_name, list(listed))
    wanted = {name: listed[name] for name in names}

    def fill(folder: Path) -> None:
        for name, info in wanted.items():
            go_on()
            path = folder / name
            if not path.is_file() or path.stat().st_size != info.size:
                store.get_file(info.key, path, bucket)
        if _content_of(wanted) != _content_of({name: now for name, now in again().items() if name in wanted}):
            raise StoreUnavailable(f"{shown(model_name)} was changed while it was read", "It is read again.")

    def again() -> dict[str, ObjectInfo]:
        return _listing(model_name, bucket, prefix, store)

    cache = ModelCache(settings.model_cache, settings.model_cache_max_bytes)
    return cache.hold(_content_of(wanted), sum(info.size for info in wanted.values()), fill, go_on)


def _place(model_name: str, settings: Settings, store: Store) -> tuple[str, str]:
    bucket, path = parted(model_name)
    allowed = [store.bucket, *settings.model_buckets]
    if bucket not in allowed:
        raise _not_allowed(model_name, f"Use one of the buckets {', '.join(allowed)}.")
    if not path.strip("/"):
        raise _not_allowed(model_name, "Name a folder in the bucket: s3://bucket/path/of/it.")
    return bucket, f"{path.rstrip('/')}/"


def _listing(model_name: str, bucket: str, prefix: str, store: Store) -> dict[str, ObjectInfo]:
    """The objects of the folder itself, by their names in it."""
    try:
        with reading(bucket, store, "a folder", partial(_not_allowed, model_name)):
            found = {info.key.removeprefix(prefix): info for info in store.list(prefix, bucket)}
    except NotFound:
        found = {}
    if not found:
        raise ModelRefused(f"there is no model {shown(model_name)}", "Check bucket and path.")
    return {name: info for name, info in found.items() if name and "/" not in name}


def _content_of(listed: dict[str, ObjectInfo]) -> str:
    """A name for these files as they are now; an etag stands for what is in one."""
    content = {name: [info.size, info.etag] for name, info in sorted(listed.items())}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _not_allowed(model_name: str, hint: str) -> ModelRefused:
    return ModelRefused(f"the model {shown(model_name)} is not allowed", hint, ErrorCode.MODEL_NOT_ALLOWED)
