"""The model's tokenizer: loaded from its files, and which of its tokens are special. Reads no weights."""

from pathlib import Path
from typing import Any

import transformers

from mistudio_schemas import ErrorCode
from mistudio_train.errors import ModelRefused

from .model_source import ModelSource


def load_tokenizer(folder: Path, name: str, *, allow_unsafe: bool) -> Any:
    """The tokenizer in a model's folder.

    Raises:
        ModelRefused: `model.load_failed`.

    """
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=allow_unsafe, use_fast=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelRefused(
            f"{name} cannot be loaded: {reason}",
            "Its tokenizer must load with transformers' AutoTokenizer, without code of its own.",
            ErrorCode.MODEL_LOAD_FAILED,
        ) from error


def tokenizer_of(source: ModelSource, token: str | None, *, allow_unsafe: bool) -> Any:
    """The model's tokenizer; of a model on the hub its small files are fetched, and no weights.

    Raises:
        ModelRefused, HubUnreachable: as `load_tokenizer` and `hub.fetch`.

    """
    folder = source.folder
    if folder is None:
        from . import hub

        folder = hub.fetch_tokenizer(source.name, str(source.commit), token)
    return load_tokenizer(folder, source.name, allow_unsafe=allow_unsafe)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that the tokenizer marks as special; not of the one for unknown words, which are text."""
    marked = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    framing = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    unknown = {tokenizer.unk_token_id} - framing
    return frozenset((marked | set(tokenizer.all_special_ids)) - unknown)
