"""How a file of the result comes into being: whole or not at all, and of plain values only.

Owns temporary names, strict JSON and the guard of plain values; must not know what any file means.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mistudio_train.errors import DiskFull, ExportRefused

from .disk import disk_errors

PLAIN_SCALARS = (str, int, float, bool, type(None))
SECRETS = ("huggingface_token", "hf_token", "token")
"""Names under which no file may hold a value."""
REPORT_HINT = "This is a fault of the worker, not of the request: report it with the job's id."


def refused(message: str, hint: str = REPORT_HINT) -> ExportRefused:
    """The error of a file that was not written because its readers would have been misled."""
    return ExportRefused(message, hint)


@contextmanager
def whole(path: Path, size: int = 0) -> Iterator[Path]:
    """A path beside `path` to write to, renamed to `path` at the end and deleted if anything is raised.

    Args:
        path: where the file shall be; its folder is made.
        size: bytes of disk that writing will take at most, asked for before anything is written.

    Raises:
        DiskFull: if the disk has not that much, or none is left on the way.

    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(path.parent).free < size:
        raise DiskFull(
            f"the disk has no room for {path.name} ({size:,} bytes)",
            "Free space under DATA_PATH, or ask for fewer tokens (token_budget).",
        )
    partial = path.with_name(f".{path.name}.partial")
    try:
        with disk_errors():
            yield partial
            partial.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files for their owner alone
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file of fp32 tensors.

    Raises:
        ExportRefused: if a number is not finite.
        DiskFull: if the disk has no room.

    """
    plain = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    for name, tensor in plain.items():
        refuse_non_finite(tensor, f"{path.name}.{name}")
    with whole(path, 4 * sum(tensor.numel() for tensor in plain.values())) as partial:
        save_file(plain, partial)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a strict JSON object, UTF-8 and indented.

    Raises:
        ExportRefused: if anything in it is no plain value, or a number that JSON cannot hold.
        DiskFull: if the disk is full.

    """
    refuse_unless_plain(value, path.name)
    with whole(path) as partial:
        partial.write_text(json.dumps(value, allow_nan=False, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def require(value: Mapping[str, object], keys: tuple[str, ...], where: str) -> None:
    """Raise ExportRefused unless `value` has all of `keys`."""
    if missing := [key for key in keys if key not in value]:
        raise refused(f"{where} lacks {', '.join(missing)}")


def refuse_unless_plain(value: object, where: str) -> None:
    """Walk an object that is to be written.

    Plain are str, int, float, bool, None, and lists and string-keyed dicts of them, by exact type: a numpy scalar is a
    float to Python, yet its pickle holds a class that safe loading refuses. No value may stand under a secret's name.

    Raises:
        ExportRefused: naming the place of the first value that must not be there.

    """
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise refused(f"{where} has a key that is no string: {key!r}")
            if key in SECRETS and item is not None:
                raise refused(f"{where} holds a secret under {key!r}")
            refuse_unless_plain(item, f"{where}.{key}")
    elif type(value) is list:
        for position, item in enumerate(value):
            refuse_unless_plain(item, f"{where}[{position}]")
    elif type(value) not in PLAIN_SCALARS:
        raise refused(f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which is no plain value")
    elif isinstance(value, float) and not math.isfinite(value):
        raise refused(f"{where} is {value}, which is no finite number")


def refuse_unless_own(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise ExportRefused unless each tensor is fp32, contiguous, finite, and alone in a storage of just its size."""
    owner: dict[int, str] = {}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise refused(f"{where}.{name} is {tensor.dtype}, not torch.float32")
        if not tensor.is_contiguous():
            raise refused(f"{where}.{name} is not contiguous")
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.numel() * tensor.element_size():
            raise refused(f"{where}.{name} is a view of a larger storage")
        if (other := owner.setdefault(storage.data_ptr(), name)) != name:
            raise refused(f"{where}.{name} shares its storage with {where}.{other}")
        refuse_non_finite(tensor, f"{where}.{name}")


def refuse_non_finite(tensor: Tensor, where: str) -> None:
    """Raise ExportRefused if any element is NaN or infinite."""
    if not torch.isfinite(tensor).all():
        raise refused(f"{where} holds numbers that are not finite", "Lower the learning rate and run the job again.")
