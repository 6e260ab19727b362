"""Which language model a request means, judged from its config alone: where it is, which commit, how many blocks.

Seconds matter here, so this imports neither torch nor transformers and reads no weights; a token is only an argument.
"""

import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mistudio_schemas import ErrorCode, ModelInfo
from mistudio_train.errors import ModelRefused
from mistudio_train.model_files import refuse_pickles

LAYER_KEYS: Final = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers")
WIDTH_KEYS: Final = ("hidden_size", "n_embd", "d_model", "dim")
INNER_KEYS: Final = ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "hidden_dim")
HEAD_KEYS: Final = ("num_attention_heads", "n_head", "n_heads", "num_heads")
POSITION_KEYS: Final = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
OFFSET_POSITIONS: Final = (
    "roberta",
    "mpnet",
    "camembert",
    "xlm-roberta",
    "xlm-roberta-xl",
    "data2vec-text",
    "longformer",
)
"""Families whose first position is the one after the padding token's id."""
RELATIVE_POSITIONS: Final = ("t5", "mt5", "umt5", "longt5", "bloom", "mpt")
MAX_HEAD_BYTES: Final = 100 * 1024**2
"""The format's own bound of a file's head."""
HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


@dataclass(frozen=True)
class ModelSource:
    """A model that can be had, and what its config says of it."""

    name: str
    """As requested."""
    folder: Path | None
    """Where its files are; `None`: on the hub, not fetched yet."""
    commit: str | None
    """The hub's commit; `None` for a folder."""
    config: Mapping[str, Any] = field(repr=False)
    """`config.json`."""
    files: tuple[str, ...] = field(default=(), repr=False)
    """Names of its files."""
    requires_token: bool = False
    """Whether the hub gives it only for a token."""

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The config of the text part, of a model of several parts."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) and nested else self.config

    @property
    def architecture(self) -> str:
        """The family: the config's `model_type`."""
        return str(self.config.get("model_type", "unknown"))

    @property
    def total_layers(self) -> int:
        """Number of blocks; of an encoder-decoder, of its encoder."""
        return self._number(LAYER_KEYS, "its number of layers")

    @property
    def d_in(self) -> int:
        """Width of the residual stream."""
        return self._number(WIDTH_KEYS, "its width")

    @property
    def d_mlp(self) -> int:
        """Width inside the MLP; four times the residual's where the config is silent."""
        return self._first(INNER_KEYS) or 4 * self.d_in

    @property
    def heads(self) -> int:
        """Attention heads of a block."""
        return self._first(HEAD_KEYS) or 1

    @property
    def vocab_size(self) -> int:
        """Entries of the embedding."""
        return self._first(("vocab_size",)) or 0

    @property
    def positions(self) -> int | None:
        """Tokens that the model can take at most; `None`: it has no limit of its own."""
        if self.architecture in RELATIVE_POSITIONS:
            return None
        positions = self._first(POSITION_KEYS)
        if positions and self.architecture in OFFSET_POSITIONS:
            positions -= int(self.text_config.get("pad_token_id") or 0) + 1
        return positions

    def sequence_limit(self, asked: int) -> int:
        """Tokens of a sequence at most, special tokens included: what is asked for, if the model can take it."""
        return min(asked, self.positions or asked)

    def info(self, selected_layer: int) -> ModelInfo:
        """The contract's record."""
        return ModelInfo(
            model_name=self.name,
            actual_model_loaded=self._loaded_from,
            architecture=self.architecture,
            total_layers=self.total_layers,
            selected_layer=selected_layer,
            hidden_size=self.d_in,
            vocab_size=self.vocab_size,
            requires_token=self.requires_token,
        )

    @property
    def _loaded_from(self) -> str:
        if self.commit:
            return f"{self.name}@{self.commit}"
        # where a worker keeps what it has brought is nobody's business, and not the same for the same result
        return self.name if self.name.startswith("s3://") else str(self.folder)

    def parameter_shapes(self, token: str | None = None) -> dict[str, tuple[int, ...]]:
        """Name to shape of every weight, from the heads of the safetensors files alone; empty if there are none.

        Raises:
            ModelRefused, HubUnreachable: as `inspect`, for a model that is still on the hub.

        """
        names = weight_files(self.files)
        if self.folder is not None:
            with _reading(self.name):
                return {key: shape for name in names for key, shape in _shapes_in(self.folder / name).items()}
        from . import hub

        return hub.shapes(self.name, str(self.commit), names, token)

    def _number(self, keys: Sequence[str], what: str) -> int:
        value = self._first(keys)
        if value is None:
            raise ModelRefused(
                f"The config of {self.name} does not tell {what}",
                f"Its config.json needs one of {', '.join(keys)}.",
                ErrorCode.MODEL_UNSUPPORTED,
            )
        return value

    def _first(self, keys: Sequence[str]) -> int | None:
        found = (self.text_config.get(key) for key in keys)
        return next((value for value in found if isinstance(value, int) and value > 0), None)


def inspect(
    name: str,
    revision: str | None = None,
    *,
    folders: Sequence[Path] = (),
    brought: Path | None = None,
    token: str | None = None,
    allow_unsafe: bool = False,
) -> ModelSource:
    """Find a model, read its config, and resolve its revision to a commit.

    Args:
        name: a hub's `owner/name`; or a folder, absolute or below one of `folders`.
        revision: branch, tag or commit on the hub.
        folders: the local folders that models may come from.
        brought: where the model of a bucket has been brought to.
        token: the hub's token.
        allow_unsafe: whether pickled weights will do.

    Raises:
        ModelRefused: `model.not_allowed`, `model.not_found`, `model.unsupported`.
        HubUnreachable: if the hub does not answer, and the model is not in its cache.

    """
    source = _from_folder(name, folders) if brought is None else _in_folder(name, brought)
    if source is None:
        if name.startswith("s3://"):
            raise ModelRefused(
                f"'{name}' is in a bucket, and only a worker brings models from there",
                "Submit the request to a worker, or name a model of the hub or in a folder.",
            )
        if HUB_NAME.fullmatch(name) is None:
            raise ModelRefused(f"'{name}' is no model's name", "Give a hub's name, such as openai-community/gpt2.")
        source = _from_hub(name, revision, token)
    if not allow_unsafe:
        refuse_pickles(name, source.files)
    return source


def _from_folder(name: str, folders: Sequence[Path]) -> ModelSource | None:
    with _reading(name):
        folder = _local_folder(name, folders)
        return None if folder is None else _in_folder(name, folder)


def _in_folder(name: str, folder: Path) -> ModelSource:
    with _reading(name):
        return ModelSource(name, folder, None, _config_in(folder, name), _names_in(folder))


def _from_hub(name: str, revision: str | None, token: str | None) -> ModelSource:
    from . import hub  # its client takes seconds to import, which a folder need not wait for

    found = hub.find(name, revision, token)
    config = _parsed(found.config, name)
    return ModelSource(name, found.folder, found.commit, config, found.files, found.requires_token)


def weight_files(files: Sequence[str]) -> list[str]:
    """The safetensors files that transformers reads: those of the model, not copies in another layout."""
    return [name for name in files if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name)]


def _local_folder(name: str, folders: Sequence[Path]) -> Path | None:
    """The allowed folder that `name` means; `None` if it is no folder's name."""
    allowed = [folder.resolve() for folder in folders]
    for root in allowed:
        below = (root / name).resolve()
        if below != root and below.is_relative_to(root) and below.is_dir():
            return below
    if not (name.startswith((".", "~", "/")) or "\\" in name or ".." in name.split("/")):
        return None
    path = Path(name).expanduser().resolve()
    if not any(path.is_relative_to(root) for root in allowed):
        raise ModelRefused(
            f"The folder '{name}' is not among those that models may be loaded from",
            "Ask the worker's operator to add it to LOCAL_MODEL_FOLDERS, or name a model of the hub.",
            ErrorCode.MODEL_NOT_ALLOWED,
        )
    raise ModelRefused(f"There is no model folder '{name}'", "Check the path.", ErrorCode.MODEL_NOT_FOUND)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Say in our words that a folder or a file of it may not be read."""
    try:
        yield
    except PermissionError as error:
        raise ModelRefused(
            f"The worker may not read {error.filename or name}",
            "Let its user read the model's folder and every file in it (chmod -R a+rX FOLDER).",
            ErrorCode.MODEL_NOT_ALLOWED,
        ) from error


def _names_in(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_file()))


def _config_in(folder: Path, name: str) -> Mapping[str, Any]:
    try:
        return _parsed((folder / "config.json").read_bytes(), name)
    except FileNotFoundError as error:
        raise ModelRefused(
            f"The folder '{name}' holds no config.json",
            "Save the model there with save_pretrained.",
            ErrorCode.MODEL_NOT_FOUND,
        ) from error


def _parsed(raw: bytes, name: str) -> Mapping[str, Any]:
    try:
        config = json.loads(raw)
    except ValueError as error:
        raise ModelRefused(
            f"The config.json of {name} is no JSON", "Save the model again.", ErrorCode.MODEL_UNSUPPORTED
        ) from error
    if not isinstance(config, dict):
        raise ModelRefused(
            f"The config.json of {name} is no object", "Save the model again.", ErrorCode.MODEL_UNSUPPORTED
        )
    return config


def _shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """The head of a safetensors file: eight bytes of length, then JSON of each tensor's type, shape and place.

    Raises:
        ModelRefused: `model.load_failed`, if it is damaged.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            head = json.loads(file.read(min(length, MAX_HEAD_BYTES)))
        return {name: tuple(entry["shape"]) for name, entry in head.items() if name != "__metadata__"}
    except (struct.error, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ModelRefused(
            f"{path.name} is no whole safetensors file",
            "Save or download the model again.",
            ErrorCode.MODEL_LOAD_FAILED,
        ) from error
