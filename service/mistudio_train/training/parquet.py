"""Texts of a parquet file, a few rows at a time. Knows pyarrow, which is imported only when a corpus needs it."""

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .disk import disk_errors
from .source import Row, Source

ROWS_AT_ONCE = 1024
READ_BYTES = 1 << 20


def parquet_texts(source: Source, column: str | None, scratch: Path) -> Iterator[Row]:
    """Each row's text or conversation with its place and its label.

    Raises:
        CorpusRefused: if it is no parquet file, or has no such column of strings, or of lists of objects.

    """
    import pyarrow as pa
    from pyarrow import parquet

    with _seekable(source, scratch) as file:
        try:
            # what is read ahead stays in memory as long as the file is open
            table = parquet.ParquetFile(file, pre_buffer=False, buffer_size=READ_BYTES)
            wanted = _column(source, table.schema_arrow, column)
            label = source.label_among(None, table.schema_arrow.names)
            number, columns = 0, list(dict.fromkeys(filter(None, (wanted, label))))
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns):
                texts = batch.column(wanted)
                values = texts if source.conversations else texts.cast(pa.large_string())
                labels = itertools.repeat(None) if label is None else batch.column(label).to_pylist()
                for value, of_it in zip(values, labels, strict=False):
                    number += 1
                    yield f"row {number}", value.as_py(), of_it
        except PermissionError:
            raise
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            # damaged pages are OSErrors too
            raise source.refused(None, f"no readable parquet ({str(error).splitlines()[0]})") from error


def _column(source: Source, schema: Any, column: str | None) -> str:
    from pyarrow import types

    def holds_strings(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))

    def holds_conversations(kind: Any) -> bool:
        lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        return bool(lists and types.is_struct(kind.value_type))

    holds = holds_conversations if source.conversations else holds_strings
    texts = [field.name for field in schema if holds(field.type)]
    candidates = [name for name in texts if name != source.label_column]
    wanted = source.column(None, schema.names, candidates) if column is None else column
    if wanted not in texts:
        raise source.no_column(None, wanted, texts)
    return wanted


@contextmanager
def _seekable(source: Source, scratch: Path) -> Iterator[BinaryIO]:
    """The file itself; a gzipped one is unpacked first, because parquet is read from its end."""
    if not source.gzipped:
        with source.open() as file:
            yield file
        return
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=scratch) as unpacked, source.open() as packed, disk_errors():
        shutil.copyfileobj(packed, unpacked)
        unpacked.seek(0)
        yield unpacked
