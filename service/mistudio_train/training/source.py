"""The one file that a corpus is read from: how it is opened, and how what is wrong in it is said.

Knows no format; the readers of `corpus` and `parquet` share it.
"""

import gzip
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from mistudio_schemas import ErrorCode
from mistudio_train.errors import CorpusRefused

Place = str | None
"""Where in the file: `line 3`, `item 3`, `row 3`; `None`: the file as a whole."""
Row = tuple[Place, Any, Any]
"""Of a corpus: where it is, what it holds, and its label if these are wanted."""
HINT = "Correct the file; texts are UTF-8, and its suffix must say what it is."
TEXTS_HINT = "Name one of these with corpus_column."
LABELS_HINT = "Name one of these with label_column, or leave it out."
COLUMNS_NAMED = 12
"""As many columns are named in an error."""


@dataclass(frozen=True)
class Source:
    """A corpus file."""

    path: Path
    name: str
    """What the requester calls it."""
    conversations: bool = False
    """Whether it holds conversations, and no texts."""
    label_column: str | None = None
    """The column of each row's label; `None`: none are wanted."""

    @property
    def gzipped(self) -> bool:
        """Whether it is packed."""
        return self.name.lower().endswith(".gz")

    @property
    def suffix(self) -> str:
        """The format's suffix, in small letters, without `.gz`."""
        name = PurePosixPath(self.name.lower())
        return name.with_suffix("").suffix if self.gzipped else name.suffix

    def open(self) -> BinaryIO:
        """The file's bytes, unpacked."""
        return cast(BinaryIO, gzip.open(self.path)) if self.gzipped else self.path.open("rb")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Say in our words that the file may not be read, or that the gzip stream inside is broken."""
        try:
            yield
        except PermissionError as error:
            raise CorpusRefused(
                f"The worker may not read {self.name}",
                "Let its user read the file and the folders above it.",
                ErrorCode.CORPUS_NOT_ALLOWED,
            ) from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise self.refused(None, f"the gzip stream is broken ({error})") from error

    def refused(self, place: Place, reason: str, hint: str = HINT) -> CorpusRefused:
        """The error for something that is no text."""
        where = f", {place}" if place else ""
        return CorpusRefused(f"{self.name}{where}: {reason}", hint, ErrorCode.CORPUS_UNREADABLE)

    def holds(self, value: object) -> bool:
        """Whether a value of the file can be what it holds: a text, or a conversation."""
        return isinstance(value, list if self.conversations else str)

    def may_be_text(self, column: str, value: object) -> bool:
        """Whether a column may be that of the texts, as its value shows."""
        return column != self.label_column and self.holds(value)

    def column(self, place: Place, columns: Collection[str], texts: list[str]) -> str:
        """The obvious column: `text` (of conversations `messages`), or the only one of texts.

        Raises:
            CorpusRefused: `corpus.column`, if none is obvious.

        """
        what, obvious = ("conversations", "messages") if self.conversations else ("texts", "text")
        if obvious in columns:
            return obvious
        if len(texts) == 1:
            return texts[0]
        raise CorpusRefused(
            f"{self._at(place)}: the column of the {what} is not obvious among {_listed(columns)}",
            "Name it with corpus_column.",
            ErrorCode.CORPUS_COLUMN,
        )

    def no_column(self, place: Place, column: str, columns: Collection[str], hint: str = TEXTS_HINT) -> CorpusRefused:
        """The error for a column that is not there."""
        return CorpusRefused(
            f"{self._at(place)}: there is no column '{column}', only {_listed(columns)}",
            hint,
            ErrorCode.CORPUS_COLUMN,
        )

    def label_among(self, place: Place, columns: Collection[str]) -> str | None:
        """The column of the labels, if these are wanted.

        Raises:
            CorpusRefused: `corpus.column`, if it is not there.

        """
        if self.label_column is None or self.label_column in columns:
            return self.label_column
        raise self.no_column(place, self.label_column, columns, LABELS_HINT)

    def _at(self, place: Place) -> str:
        return f"{self.name}, {place}" if place else self.name


def _listed(columns: Collection[str]) -> str:
    names = [f"'{name}'" for name in list(columns)[:COLUMNS_NAMED]]
    more = len(columns) - len(names)
    return (", ".join(names) or "none") + (f" and {more} more" if more else "")
