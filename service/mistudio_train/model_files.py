"""Which files of a model are fetched, from the hub or a bucket, and which models are refused by their files' names.

Stands below everything that fetches one; reads no file.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Final

from mistudio_schemas import ErrorCode

from .errors import ModelRefused

TOKENIZER_FILES: Final = ("*.json", "*.txt", "*.model", "*.jinja")
SAFE_FILES: Final = (*TOKENIZER_FILES, "model*.safetensors")
"""No pickles, no code, no copies of the weights in other layouts."""
UNSAFE_FILES: Final = ("*.py", "pytorch_model*.bin")
PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def patterns(*, allow_unsafe: bool) -> list[str]:
    """Of the files that are fetched."""
    return [*SAFE_FILES, *(UNSAFE_FILES if allow_unsafe else ())]


def is_wanted(name: str, *, allow_unsafe: bool) -> bool:
    """Whether a file is fetched."""
    return any(fnmatchcase(name, pattern) for pattern in patterns(allow_unsafe=allow_unsafe))


def refuse_pickles(model_name: str, files: Sequence[str]) -> None:
    """See that a model with these files has weights that are no pickles.

    Raises:
        ModelRefused: `model.not_allowed`, if it has only pickled ones.

    """
    if any(name.endswith(".safetensors") for name in files):
        return
    if any(name.endswith(PICKLES) for name in files):
        raise ModelRefused(
            f"{model_name} has only pickled weights, which could run code on the worker",
            "Use a revision with safetensors (the hub converts models on request).",
            ErrorCode.MODEL_NOT_ALLOWED,
        )
