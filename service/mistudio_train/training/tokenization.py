"""Texts become tokens on the scratch disk, cut or split to the model's length, and each gets the rows it will have.

Knows the tokenizer, no model; memory does not grow with the corpus.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mistudio_schemas import CorpusInfo, ErrorCode, TrainRequested
from mistudio_train.errors import CorpusRefused, ModelRefused, RequestRefused

from .disk import ArrayFile, ArrayWriter
from .packing import Packing
from .texts import Texts
from .tokenizer import special_ids
from .tokens import WINDOW, Frame, RowIndex, Rules, Tokens

TEXTS_AT_ONCE: Final = 256
CHARACTERS_AT_ONCE: Final = 1 << 20


def rules_of(request: TrainRequested, tokenizer: Any, positions: int | None, first_text: str) -> Rules:
    """The rules of a request for a tokenizer, and a model that takes `positions` tokens (`None`: any number).

    Args:
        request: pooling, length limit and token budget.
        tokenizer: the model's.
        positions: tokens that the model takes at most.
        first_text: of the corpus; a rendered one shows whether the chat template begins as the tokenizer would.

    Raises:
        RequestRefused: if the length limit leaves no room for a text, or nothing can stand between two.
        ModelRefused: if the tokenizer's special tokens cannot be told from a text's.
    """
    limits = [request.max_sequence_length, positions, tokenizer.model_max_length]
    rendered, specials = request.corpus_holds == "conversations", request.include_special_tokens
    frame = frame_of(tokenizer)
    if (
        rendered
    ):  # the template says all that stands around a text; what may be put before a window is what it begins with
        begins = _encoded(tokenizer, [first_text], rendered=True)[0][: len(frame.before)] == list(frame.before)
        frame = Frame(frame.before if begins else (), ())
    separator = _separator(tokenizer, frame, rendered) if request.packing else None
    no_rows = special_ids(tokenizer) if rendered and not specials else frozenset()
    rules = Rules(
        pooling=request.pooling,
        include_special_tokens=specials,
        length=int(min(limit for limit in limits if limit is not None and limit > 0)),
        frame=frame,
        token_budget=request.token_budget,
        rendered=rendered,
        no_rows=no_rows | set(separator or ()),
        separator=separator,
    )
    if rules.body < 1:
        raise RequestRefused(
            f"A sequence of {rules.length} tokens has no room for text beside {len(rules.frame)} special tokens",
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


def _separator(tokenizer: Any, frame: Frame, rendered: bool) -> tuple[int, ...]:
    """What a model has seen between two documents: what its tokenizer puts around each, else an EOS, else a BOS.

    Between conversations there is nothing more than their template says.
    """
    between = (*frame.after, *frame.before)
    if between or rendered:
        return between
    ends = [token for token in (tokenizer.eos_token_id, tokenizer.bos_token_id) if token is not None]
    if not ends:
        raise RequestRefused(
            "The model's tokenizer has no token to put between two packed texts", "Leave packing out of the request."
        )
    return (ends[0],)


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
        for first, bodies in _bodies(texts, tokenizer, rules):
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


def _bodies(texts: Texts, tokenizer: Any, rules: Rules) -> Iterator[tuple[int, list[list[int]]]]:
    """The texts' own tokens, some texts at a time, with the first text's number."""
    waiting: list[str] = []
    characters = first = 0
    before = list(rules.frame.before)
    for number, text in enumerate(texts):
        waiting.append(text)
        characters += len(text)
        if len(waiting) == TEXTS_AT_ONCE or characters >= CHARACTERS_AT_ONCE or number + 1 == len(texts):
            bodies = _encoded(tokenizer, waiting, rendered=rules.rendered)
            if rules.rendered and before:  # which every window is framed with
                bodies = [ids[len(before) :] if ids[: len(before)] == before else ids for ids in bodies]
            yield first, bodies
            waiting, characters, first = [], 0, number + 1


def _encoded(tokenizer: Any, texts: list[str], *, rendered: bool) -> list[list[int]]:
    """The tokens of each text, not cut and without what frames it: windows are framed one by one when they are run.

    A special token that a text spells out is text ("</s>" ends no sequence), unless a chat template has written it.
    """
    encoded: list[list[int]] = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=not rendered,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    return encoded


class _Files:
    """The files of a tokenised corpus while they are written, and the counts."""

    def __init__(self, folder: Path, rules: Rules) -> None:
        self.rules, self._folder = rules, folder
        self.texts = self.tokens = self.truncated = self.texts_truncated = self.window_count = self.rows = 0
        self._ids_written = 0
        self._packing = None if rules.separator is None else Packing(rules)
        self._writers = {
            name: ArrayWriter(folder / name, dtype)
            for name, dtype in (
                ("tokens.bin", "<i4"), ("windows.bin", WINDOW), ("row_starts.bin", "<i8"), ("text_of_row.bin", "<i4"),
                ("position_of_row.bin", "<i4"), ("token_of_row.bin", "<i4"),
            )
        }  # fmt: skip
        self._windows: list[tuple[int, int, int, int, bool]] = []
        self._pending: dict[str, list[Any]] = {name: [] for name in self._writers}
        self._pending["row_starts.bin"].append(np.zeros(1, "<i8"))

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self._windows += self._packing.rest() if self._packing else []
            self._flush()
        for writer in self._writers.values():
            writer.__exit__(kind, error, trace)

    def add(self, first: int, bodies: list[list[int]]) -> bool:
        """Take some texts; false when the budget is used up, so that no more are wanted."""
        for number, ids in enumerate(bodies, first):
            body = np.asarray(ids, "<i4")
            kept = body[: self.rules.body] if self.rules.pooling == "mean" else body
            pieces = self._pieces(number, kept)
            reals = [self.rules.real(piece) for piece in pieces]
            real = sum(int(real_T.sum()) for real_T in reals)
            budget = self.rules.token_budget
            if budget is not None and self.texts and self.tokens + real > budget:
                return False
            self._add_windows(pieces, reals)
            self._add_rows(number, pieces, reals, real)
            self.truncated += len(body) - len(kept)
            self.texts_truncated += len(kept) < len(body)
        self._flush()
        return True

    def _pieces(self, number: int, kept: NDArray[Any]) -> list[NDArray[Any]]:
        """What is framed of a text: its windows, or if it is packed all of it."""
        if len(kept) and self._packing:
            return [kept]
        if len(kept):
            return [kept[at : at + self.rules.body] for at in range(0, len(kept), self.rules.body)]
        if self.rules.pooling == "mean" and not len(self.rules.frame):
            raise _nothing(f"text {number + 1}")
        wanted = self.rules.pooling == "mean" or (self.rules.include_special_tokens and len(self.rules.frame))
        return [kept] if wanted else []

    def _add_windows(self, pieces: list[NDArray[Any]], reals: list[NDArray[Any]]) -> None:
        row, before = self.rows, len(self.rules.frame.before)
        for piece, real_T in zip(pieces, reals, strict=True):
            if self._packing:
                tokens, windows = self._packing.place(piece, real_T[before : before + len(piece)])
            else:
                real, leads = int(real_T.sum()), bool(len(piece) and real_T[0])
                tokens, windows = [piece], [(self._ids_written, len(piece), real, row, leads)]
                row += real
            self._pending["tokens.bin"].extend(tokens)
            self._ids_written += len(piece)
            self._windows += windows

    def _add_rows(self, number: int, pieces: list[NDArray[Any]], reals: list[NDArray[Any]], real: int) -> None:
        if self.rules.pooling == "mean":
            rows, positions, ids = 1, np.full(1, -1), [np.full(1, -1)]
        else:
            rows, positions = real, np.arange(real)
            ids = [self.rules.framed(piece)[real_T] for piece, real_T in zip(pieces, reals, strict=True)]
        self._pending["row_starts.bin"].append(np.asarray([self.rows + rows]))
        self._pending["text_of_row.bin"].append(np.full(rows, number))
        self._pending["position_of_row.bin"].append(positions)
        self._pending["token_of_row.bin"].extend(ids)
        self.texts += 1
        self.tokens += real
        self.rows += rows

    def _flush(self) -> None:
        if self._windows:
            self._pending["windows.bin"].append(np.array(self._windows, WINDOW))
            self.window_count += len(self._windows)
            self._windows = []
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
