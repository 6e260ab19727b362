"""Texts become tokens on the scratch disk, cut or split to the model's length, and each gets the rows it will have.

Knows the tokenizer, no model; memory does not grow with the corpus.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from mistudio_schemas import CorpusInfo, ErrorCode, TrainRequested
from mistudio_train.errors import CorpusRefused, ModelRefused, RequestRefused

from .disk import ArrayFile, ArrayWriter
from .texts import Texts

WINDOW: Final = np.dtype([("start", "<i8"), ("length", "<i4"), ("row", "<i8")])
"""A piece of a text: where its tokens begin in the file of tokens, how many they are, and its first row."""
TEXTS_AT_ONCE: Final = 256
CHARACTERS_AT_ONCE: Final = 1 << 20


@dataclass(frozen=True)
class Frame:
    """The special tokens that the tokenizer puts around a text, or around a window of one."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.before) + len(self.after)


@dataclass(frozen=True)
class Rules:
    """What becomes a row."""

    pooling: Literal["mean", "token"]
    include_special_tokens: bool
    length: int
    """Tokens of a sequence at most, special ones included."""
    frame: Frame
    token_budget: int | None = None

    @property
    def body(self) -> int:
        """Tokens of a text that fit into one sequence."""
        return self.length - len(self.frame)


@dataclass(frozen=True)
class RowIndex:
    """Which text, and which token of it, each row is. Files, so that none of it is in memory.

    Rows of a text are contiguous and in the order of its tokens, texts are in the corpus' order.
    """

    starts: ArrayFile
    """int64, one more than there are texts: the first row of each text."""
    text_of_row: ArrayFile
    """int32 [rows]."""
    position_of_row: ArrayFile
    """int32 [rows]: which of its text's real tokens a row is; -1 where the row is a whole text."""
    token_of_row: ArrayFile
    """int32 [rows]: the token's id; -1 where the row is a whole text."""

    def rows_of_text(self, text: int) -> slice:
        """The rows of a text."""
        start, stop = self.starts.read(text, text + 2)
        return slice(int(start), int(stop))


@dataclass(frozen=True)
class Tokens:
    """A tokenised corpus on disk."""

    rules: Rules
    ids: ArrayFile
    """int32: the texts' own tokens, one text after another, as far as they are used."""
    windows: ArrayFile
    """`WINDOW`: what goes through the model, one sequence each."""
    index: RowIndex
    corpus: CorpusInfo


def rules_of(request: TrainRequested, tokenizer: Any, positions: int | None) -> Rules:
    """The rules of a request for a tokenizer, and a model that takes `positions` tokens (`None`: any number).

    Raises:
        RequestRefused: if the length limit leaves no room for a text.
        ModelRefused: if the tokenizer's special tokens cannot be told from a text's.
    """
    limits = [request.max_sequence_length, positions, tokenizer.model_max_length]
    length = int(min(limit for limit in limits if limit is not None and limit > 0))
    rules = Rules(request.pooling, request.include_special_tokens, length, frame_of(tokenizer), request.token_budget)
    if rules.body < 1:
        raise RequestRefused(
            f"A sequence of {length} tokens has no room for text beside {len(rules.frame)} special tokens",
            "Raise max_sequence_length.",
            ErrorCode.REQUEST_OUT_OF_RANGE,
        )
    return rules


def frame_of(tokenizer: Any) -> Frame:
    """The special tokens around a text, found by looking at one.

    Raises:
        ModelRefused: if the text's own tokens are not among what the tokenizer makes of it.
    """
    framed = tokenizer("a", return_attention_mask=False)["input_ids"]
    body = tokenizer("a", add_special_tokens=False, return_attention_mask=False)["input_ids"]
    for at in range(len(framed) - len(body) + 1):
        if body and framed[at : at + len(body)] == body:
            return Frame(tuple(framed[:at]), tuple(framed[at + len(body) :]))
    raise ModelRefused(
        "The tokenizer's special tokens cannot be told from those of a text",
        "Choose a model with an ordinary tokenizer.",
        ErrorCode.MODEL_UNSUPPORTED,
    )


def tokenize(
    texts: Texts, tokenizer: Any, rules: Rules, folder: Path, on_progress: Callable[[int, int], None]
) -> Tokens:
    """Tokenise the texts, in their order, until the token budget is used up.

    Args:
        texts: the corpus.
        tokenizer: the model's.
        rules: what becomes a row.
        folder: where the files go.
        on_progress: called with texts done and texts in all.

    Raises:
        CorpusRefused: `corpus.empty`, if the tokenizer makes nothing of all the texts, or of one that needs a row.
        DiskFull: if the scratch disk has no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _Files(folder, rules) as files:
        for first, bodies in _bodies(texts, tokenizer):
            if not files.add(first, bodies):
                break
            on_progress(first + len(bodies), len(texts))
    if not files.rows:
        raise _nothing("all the texts")
    info = CorpusInfo(
        texts=files.texts,
        texts_dropped=texts.dropped.total,
        texts_empty=texts.dropped.empty,
        texts_too_short=texts.dropped.too_short,
        texts_too_long=texts.dropped.too_long,
        texts_beyond_budget=len(texts) - files.texts,
        texts_truncated=files.texts_truncated,
        tokens=files.tokens,
        tokens_truncated=files.truncated,
        windows=files.window_count,
        rows=files.rows,
        sha256=texts.sha256,
    )
    return files.tokens_read(info)


def padded(tokens: Tokens, windows: NDArray[Any], pad_id: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Some windows as the model takes them: ids, attention mask and real tokens, [B, T] each.

    Always padded on the right, whatever the tokenizer does. Real tokens are those that rows are made of.
    """
    frame, specials = tokens.rules.frame, tokens.rules.include_special_tokens
    before, width = len(frame.before), int(windows["length"].max()) + len(frame)
    ids_BT = np.full((len(windows), width), pad_id, np.int64)
    mask_BT = np.zeros((len(windows), width), np.int64)
    real_BT = np.zeros((len(windows), width), bool)
    for row, (start, length) in enumerate(zip(windows["start"].tolist(), windows["length"].tolist(), strict=True)):
        end = length + len(frame)
        ids_BT[row, :end] = [*frame.before, *tokens.ids.read(start, start + length), *frame.after]
        mask_BT[row, :end] = 1
        # A text of special tokens alone has no others to be the mean of.
        real = slice(0, end) if specials or not length else slice(before, before + length)
        real_BT[row, real] = True
    return ids_BT, mask_BT, real_BT


def _bodies(texts: Texts, tokenizer: Any) -> Iterator[tuple[int, list[list[int]]]]:
    """The texts' own tokens, some texts at a time, with the first text's number."""
    waiting: list[str] = []
    characters = first = 0
    for number, text in enumerate(texts):
        waiting.append(text)
        characters += len(text)
        if len(waiting) == TEXTS_AT_ONCE or characters >= CHARACTERS_AT_ONCE or number + 1 == len(texts):
            # Without special tokens, and not cut: windows are framed one by one when they are run.
            encoded = tokenizer(
                waiting,
                add_special_tokens=False,
                split_special_tokens=True,  # one that a text spells out is text: "</s>" ends no sequence
                return_attention_mask=False,
                verbose=False,
            )
            yield first, encoded["input_ids"]
            waiting, characters, first = [], 0, number + 1


class _Files:
    """The files of a tokenised corpus while they are written, and the counts."""

    def __init__(self, folder: Path, rules: Rules) -> None:
        self.rules, self._folder = rules, folder
        self.texts = self.tokens = self.truncated = self.texts_truncated = self.window_count = self.rows = 0
        self._ids_written = 0
        self._writers = {
            name: ArrayWriter(folder / name, dtype)
            for name, dtype in (
                ("tokens.bin", "<i4"), ("windows.bin", WINDOW), ("row_starts.bin", "<i8"), ("text_of_row.bin", "<i4"),
                ("position_of_row.bin", "<i4"), ("token_of_row.bin", "<i4"),
            )
        }  # fmt: skip
        self._pending: dict[str, list[Any]] = {name: [] for name in self._writers}
        self._pending["row_starts.bin"].append(np.zeros(1, "<i8"))

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self._flush()
        for writer in self._writers.values():
            writer.__exit__(kind, error, trace)

    def add(self, first: int, bodies: list[list[int]]) -> bool:
        """Take some texts; false when the budget is used up, so that no more are wanted."""
        for number, ids in enumerate(bodies, first):
            body = np.asarray(ids, "<i4")
            kept = body[: self.rules.body] if self.rules.pooling == "mean" else body
            lengths = self._window_lengths(number, len(kept))
            real = int(lengths.sum()) + (len(self.rules.frame) * len(lengths) if self._specials_count(kept) else 0)
            budget = self.rules.token_budget
            if budget is not None and self.texts and self.tokens + real > budget:
                return False
            self._add_text(number, kept, lengths, real)
            self.truncated += len(body) - len(kept)
            self.texts_truncated += len(kept) < len(body)
        self._flush()
        return True

    def _specials_count(self, kept: NDArray[Any]) -> bool:
        """Whether special tokens are real ones: when asked for, and when a mean would have no others."""
        return self.rules.include_special_tokens or (self.rules.pooling == "mean" and not len(kept))

    def _window_lengths(self, number: int, kept: int) -> NDArray[Any]:
        frame, whole = len(self.rules.frame), self.rules.body
        if kept:
            return np.diff(np.append(np.arange(0, kept, whole), kept))
        if self.rules.pooling == "mean" and not frame:
            raise _nothing(f"text {number + 1}")
        wanted = self.rules.pooling == "mean" or (self.rules.include_special_tokens and frame)
        return np.zeros(1 if wanted else 0, int)

    def _add_text(self, number: int, kept: NDArray[Any], lengths: NDArray[Any], real: int) -> None:
        mean = self.rules.pooling == "mean"
        offsets = np.cumsum(lengths) - lengths
        specials = len(self.rules.frame) if self.rules.include_special_tokens else 0
        windows = np.zeros(len(lengths), WINDOW)
        windows["start"] = self._ids_written + offsets
        windows["length"] = lengths
        windows["row"] = self.rows + (0 if mean else offsets + specials * np.arange(len(lengths)))
        rows = 1 if mean else real
        for name, values in (
            ("tokens.bin", kept),
            ("windows.bin", windows),
            ("row_starts.bin", np.asarray([self.rows + rows])),
            ("text_of_row.bin", np.full(rows, number)),
            ("position_of_row.bin", np.full(1, -1) if mean else np.arange(rows)),
            ("token_of_row.bin", np.full(1, -1) if mean else self._row_tokens(kept, lengths)),
        ):
            self._pending[name].append(values)
        self._ids_written += len(kept)
        self.texts += 1
        self.tokens += real
        self.window_count += len(lengths)
        self.rows += rows

    def _row_tokens(self, kept: NDArray[Any], lengths: NDArray[Any]) -> NDArray[Any]:
        if not self.rules.include_special_tokens:
            return kept
        before, after = np.asarray(self.rules.frame.before, "<i4"), np.asarray(self.rules.frame.after, "<i4")
        pieces = np.split(kept, np.cumsum(lengths)[:-1])[: len(lengths)]  # split gives one piece even of nothing
        framed = [part for piece in pieces for part in (before, piece, after)]
        return np.concatenate(framed) if framed else kept

    def _flush(self) -> None:
        for name, parts in self._pending.items():
            if parts:
                self._writers[name].append(np.concatenate(parts))
                parts.clear()

    def tokens_read(self, info: CorpusInfo) -> Tokens:
        """The same files, to read."""
        files = {name: ArrayFile(self._folder / name, writer.dtype) for name, writer in self._writers.items()}
        index = RowIndex(
            files["row_starts.bin"],
            *(files[name] for name in ("text_of_row.bin", "position_of_row.bin", "token_of_row.bin")),
        )
        return Tokens(self.rules, files["tokens.bin"], files["windows.bin"], index, info)


def _nothing(of_what: str) -> CorpusRefused:
    return CorpusRefused(
        f"The model's tokenizer makes no token of {of_what}",
        "Give texts in a language and script that the model knows.",
        ErrorCode.CORPUS_EMPTY,
    )
