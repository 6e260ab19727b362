"""A corpus of any supported format becomes texts on the scratch disk; what is no text is refused with its place.

Reads local files in one pass and holds no more than one row of it; knows no object store, no model and no torch.
"""

import codecs
import csv
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mistudio_schemas import ErrorCode
from mistudio_train.digest import sha256_of
from mistudio_train.errors import CorpusRefused

from .labels import LabelsWriter
from .parquet import parquet_texts
from .source import Place, Row, Source
from .texts import Dropped, Texts, TextsWriter

MAX_LINE_BYTES: Final = 16 * 1024**2
"""A longer line is no text; without a bound one binary file would fill the memory."""
MAX_JSON_BYTES: Final = 64 * 1024**2
"""A `.json` file is parsed as a whole, so it must be small; `.jsonl` has no limit."""
FLAT: Final = (".txt", ".csv")
"""Formats whose fields are texts and nothing else."""
CONVERSATIONS_HINT: Final = (
    "Give each conversation as a list of {role, content}, both texts, with roles that the model's template knows."
)
TEXTS_BETWEEN: Final = 1000
FILES_NAMED: Final = 3
"""Of a corpus of many files so many are named where none holds a text."""
SAMPLE_ROWS: Final = 100
"""Rows of a csv file that are looked at to tell columns of numbers from columns of text."""


Render = Callable[[Any], str]
"""The text of a conversation; raises ValueError, saying what is wrong with it."""


@dataclass(frozen=True)
class CorpusRules:
    """What of a corpus becomes a text."""

    column: str | None = None
    """Of csv, json, jsonl and parquet; `None`: `text`, or the only one that holds strings."""
    min_characters: int | None = None
    max_characters: int | None = None
    render: Render | None = None
    """Makes the text of a conversation; `None`: the corpus holds texts."""
    label_column: str | None = None
    """The column of each text's label."""

    def reason_to_drop(self, text: str) -> str | None:
        """A field of `Dropped`; `None`: the text is kept."""
        if not text or text.isspace():
            return "empty"
        if self.min_characters is not None and len(text) < self.min_characters:
            return "too_short"
        if self.max_characters is not None and len(text) > self.max_characters:
            return "too_long"
        return None


EVERY_TEXT: Final = CorpusRules()


def open_corpus(
    files: Mapping[str, Path],
    scratch: Path,
    rules: CorpusRules = EVERY_TEXT,
    on_texts: Callable[[int], None] = lambda read: None,
) -> Texts:
    """Read the files of a corpus into `scratch`, one after another and in order; texts that are dropped are counted.

    Args:
        files: how the requester calls each, and where it is; the name's suffix tells the format, and errors have it.
        scratch: a folder for the texts, and for an unpacked file where a format needs one.
        rules: what of it becomes a text.
        on_texts: told now and then how many were read.

    Raises:
        CorpusRefused: `corpus.unreadable`, `corpus.column` or `corpus.empty`, with the line and the reason.
        DiskFull: if the scratch disk has no room.

    """
    conversations, labelled = rules.render is not None, rules.label_column
    sources = [Source(path, name, conversations, labelled) for name, path in files.items()]
    counts: Counter[str] = Counter()
    scratch.mkdir(parents=True, exist_ok=True)
    labels = None if labelled is None else LabelsWriter(scratch, labelled)
    with TextsWriter(scratch) as writer, labels or nullcontext():
        for source in sources:
            with source.reading():
                _read(source, scratch, rules, writer, labels, counts, on_texts)
    dropped = Dropped(**counts)
    if not writer.count:
        raise _no_text(", ".join(list(files)[:FILES_NAMED]), dropped)
    found = None if labels is None else labels.labels
    return Texts(scratch, dropped=dropped, sha256=_digest(list(files.values())), labels=found)


def _read(
    source: Source,
    scratch: Path,
    rules: CorpusRules,
    writer: TextsWriter,
    labels: LabelsWriter | None,
    counts: Counter[str],
    on_texts: Callable[[int], None],
) -> None:
    reader = _reader_of(source)
    for place, value, label in reader(source, rules.column, scratch):
        text = _text_of(source, place, value, rules.render)
        if reason := rules.reason_to_drop(text):
            counts[reason] += 1
            continue
        if writer.count % TEXTS_BETWEEN == 0:
            on_texts(writer.count)
        try:
            writer.append(text)
        except UnicodeEncodeError as error:
            raise source.refused(place, "half a surrogate pair, which is no character") from error
        if labels is not None:
            try:
                labels.append(label)
            except ValueError as error:
                raise source.refused(place, str(error), "Name a column of labels with label_column.") from error


def _digest(paths: list[Path]) -> str:
    """Of the file's bytes; of several files of their digests in order."""
    digests = [sha256_of(path) for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _no_text(name: str, dropped: Dropped) -> CorpusRefused:
    counted = f"{dropped.empty} empty, {dropped.too_short} too short, {dropped.too_long} too long"
    hint = "Give a corpus with at least one text"
    if dropped.total > dropped.empty:
        hint += ", or change min_text_characters or max_text_characters"
    return CorpusRefused(f"{name} holds no text ({counted})", f"{hint}.", ErrorCode.CORPUS_EMPTY)


Reader = Callable[[Source, str | None, Path], Iterator[Row]]


def _reader_of(source: Source) -> Reader:
    readers: dict[str, Reader] = {
        ".txt": _txt,
        ".csv": _csv,
        ".json": _json,
        ".jsonl": _jsonl,
        ".parquet": parquet_texts,
    }
    reader = readers.get(source.suffix)
    if reader is not None and source.conversations and source.suffix in FLAT:
        raise source.refused(
            None, f"{source.suffix} holds no conversations", "Write them as .jsonl, .json or .parquet."
        )
    if reader is not None and source.label_column is not None and source.suffix == ".txt":
        raise source.refused(None, ".txt has no column of labels", "Write it as .jsonl, .csv, .json or .parquet.")
    if reader is None:
        raise CorpusRefused(
            f"{source.name} has no known corpus format",
            f"Name it by its format: {', '.join(readers)}, or one of these with .gz.",
            ErrorCode.CORPUS_UNREADABLE,
        )
    return reader


def _txt(source: Source, column: str | None, scratch: Path) -> Iterator[Row]:
    return ((place, line.rstrip("\r\n"), None) for place, line in _lines(source))


def _jsonl(source: Source, column: str | None, scratch: Path) -> Iterator[Row]:
    labels = _LabelOf(source)
    for place, line in _lines(source):
        if line.isspace():
            yield place, None, None
            continue
        row = _parsed(source, place, line)
        if column is None and isinstance(row, dict):
            column = source.column(place, row, [key for key, value in row.items() if source.may_be_text(key, value)])
        yield place, _value_of(source, place, row, column), labels.of(place, row)


def _json(source: Source, column: str | None, scratch: Path) -> Iterator[Row]:
    with source.open() as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise CorpusRefused(
            f"{source.name} is larger than {MAX_JSON_BYTES // 1024**2} MiB, too large to parse as one JSON document",
            "Write it as .jsonl, an object or a string a line: that has no limit.",
            ErrorCode.CORPUS_UNREADABLE,
        )
    document = _parsed(source, None, _decoded(source, None, raw))
    labels = _LabelOf(source)
    for i, row in enumerate(_json_rows(source, document, column)):
        place = f"item {i + 1}"
        if column is None and isinstance(row, dict):
            column = source.column(place, row, [key for key, value in row.items() if source.may_be_text(key, value)])
        yield place, _value_of(source, place, row, column), labels.of(place, row)


def _json_rows(source: Source, document: Any, column: str | None) -> list[Any]:
    """The list itself, or the one list of an object: the one that the column names, `text`'s, or the only one."""
    if isinstance(document, list):
        return document
    if isinstance(document, dict):
        lists = {key: value for key, value in document.items() if isinstance(value, list)}
        if lists:
            named = column if column in lists else source.column(None, lists, list(lists))
            return lists[named]
    raise source.refused(None, "neither a list nor an object of a list")


def _csv(source: Source, column: str | None, scratch: Path) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE_BYTES)
    rows = _csv_rows(source)
    _, header = next(rows, (None, []))
    sample = list(itertools.islice(rows, SAMPLE_ROWS))
    if column is None:
        candidates = [name for name in header if name != source.label_column]
        texts = [name for name in candidates if any(not _is_number(row[header.index(name)]) for _, row in sample)]
        column = source.column("line 1", header, texts if sample else candidates)
    elif column not in header:
        raise source.no_column("line 1", column, header)
    wanted, labels = header.index(column), source.label_among("line 1", header)
    label_at = None if labels is None else header.index(labels)
    for place, row in itertools.chain(sample, rows):
        yield place, row[wanted], None if label_at is None else row[label_at]


def _csv_rows(source: Source) -> Iterator[tuple[Place, list[str]]]:
    """The header and every row, each with as many fields as the header; blank lines are no rows."""
    reader = csv.reader((line for _, line in _lines(source)), strict=True)
    width = 0
    try:
        for row in reader:
            width = width or len(row)
            if row and len(row) != width:
                raise source.refused(f"line {reader.line_num}", f"{len(row)} fields where the header has {width}")
            if row:
                yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise source.refused(f"line {reader.line_num}", str(error)) from error


def _is_number(field: str) -> bool:
    """Whether a csv field says nothing against its column holding numbers."""
    try:
        float(field or "0")
    except ValueError:
        return False
    return True


def _lines(source: Source) -> Iterator[tuple[Place, str]]:
    """Each line with its end, and its place. A byte order mark at the start is dropped."""
    with source.open() as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            if len(raw) > MAX_LINE_BYTES:
                raise source.refused(f"line {number}", f"longer than {MAX_LINE_BYTES // 1024**2} MiB")
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            yield f"line {number}", _decoded(source, f"line {number}", raw)


def _decoded(source: Source, place: Place, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig" if place is None else "utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise source.refused(
            place or f"line {line}", f"byte 0x{raw[error.start]:02x} is not UTF-8 ({error.reason})"
        ) from error


def _parsed(source: Source, place: Place, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = place or f"line {error.lineno}"
        raise source.refused(where, f"no JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise source.refused(place, "JSON that is nested too deeply") from error


def _value_of(source: Source, place: Place, row: Any, column: str | None) -> Any:
    """What a row holds: itself, or its column."""
    if not isinstance(row, dict):
        return row
    if column not in row:
        raise source.no_column(place, str(column), row)
    return row[column]


class _LabelOf:
    """The labels of a file of JSON rows: the first object must have the column, of later ones some may not."""

    def __init__(self, source: Source) -> None:
        self._source, self._known = source, False

    def of(self, place: Place, row: Any) -> Any:
        """The row's, if labels are wanted; `None`: it has none."""
        column = self._source.label_column
        if column is None or row is None:
            return None
        if not isinstance(row, dict):
            raise self._source.refused(place, f"a {type(row).__name__} has no column '{column}' of labels")
        if not self._known:
            self._source.label_among(place, row)
            self._known = True
        return row.get(column)


def _text_of(source: Source, place: Place, value: Any, render: Render | None) -> str:
    """`null` counts as empty."""
    if value is None:
        return ""
    if render is not None:
        try:
            return render(value)
        except ValueError as error:
            raise source.refused(place, str(error), CONVERSATIONS_HINT) from error
    if not isinstance(value, str):
        raise source.refused(place, f"a text is expected, not {type(value).__name__}")
    return value
