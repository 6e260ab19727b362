"""The sparse feature store: every active feature of every row, as Parquet, where the dense bundle is too large.

Owns the columns, their order and the size limit, and holds one row group at a time; must not run a model or an SAE.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from .files import refuse_non_finite, refuse_unless_plain, refused, whole

COLUMNS: Final = {
    "text": "Which text of the corpus, counted from 0; empty texts were dropped before counting.",
    "position": "Which token of the text, counted from 0; -1 where the row is a whole text.",
    "token_id": "The tokenizer's id of the token; -1 where the row is a whole text.",
    "feature": "Which feature, counted from 0.",
    "activation": "How strong it is, above 0. What is not listed is 0.",
}
SCHEMA: Final = pa.schema(
    [pa.field(name, pa.float32() if name == "activation" else pa.int32(), nullable=False) for name in COLUMNS]
)
ENCODINGS: Final = {
    "text": "DELTA_BINARY_PACKED",
    "position": "DELTA_BINARY_PACKED",
    "token_id": "PLAIN",
    "feature": "PLAIN",
    "activation": "BYTE_STREAM_SPLIT",
}
GROUP_ENTRIES: Final = 1 << 18
"""Entries of a row group: 5 MB in memory."""
ENTRY_BYTES: Final = 24
"""More than an entry can take in the file: 20 bytes that do not compress, and the pages around them."""
GROUP_BYTES: Final = 2048
"""More than a row group takes beside its entries, its part of the footer included."""
FOOTER_BYTES: Final = 8192
METADATA_KEY: Final = "mistudio"


@dataclass(frozen=True)
class RowFeatures:
    """Active features of B consecutive rows, ordered by (text, position), and in a row by feature; on the CPU.

    For whole texts position and token id are -1. All but the activations are int64.
    """

    text: Tensor
    """[B], as the next two: of each row, also of those without any feature."""
    position: Tensor
    token_id: Tensor
    row: Tensor
    """[N], as the next two, one entry each: which of the rows, from 0."""
    feature: Tensor
    activation: Tensor


@dataclass(frozen=True)
class FeaturesInfo:
    """What the store holds."""

    entries: int
    truncated: bool
    """Whether the size limit left rows out; those that are in are whole, and the first ones."""
    first_missing_text: int | None
    """From the row of this text and position on nothing is in the store; `None`: nothing is missing."""
    first_missing_position: int | None


class FeatureStore:
    """A store that is being written; `feature_store` makes it. Holds one row group at a time."""

    def __init__(self, writer: Any, sink: IO[bytes], d_sae: int, budget: int) -> None:
        self.info = FeaturesInfo(0, False, None, None)
        """What it holds; of all rows once it is closed."""
        self._writer, self._sink, self._d_sae, self._budget = writer, sink, d_sae, budget
        self._groups = 0
        self._last_place = -1
        self._waiting: list[pa.Table] = []
        self._held = 0

    def add(self, block: RowFeatures) -> None:
        """Add rows behind those before; ignored from the first that did not fit.

        Raises:
            ExportRefused: if rows are out of order, a feature is out of range, or a number is not finite.
            DiskFull: if the disk has no room.

        """
        if self.info.truncated:
            return
        self._last_place = _check_order(block, self._last_place)
        table = _table(block, self._d_sae)
        self._waiting.append(table)
        self._held += len(table)
        while self._held > GROUP_ENTRIES:
            joined = pa.concat_tables(self._waiting).combine_chunks()
            # A row of more features than a group holds has to be cut.
            kept = _whole_rows(joined, GROUP_ENTRIES) or GROUP_ENTRIES
            self._write(joined.slice(0, kept))
            self._waiting = [joined.slice(kept)]
            self._held -= kept

    def flush(self) -> None:
        """Write what waits for a group to be full."""
        if self._held:
            self._write(pa.concat_tables(self._waiting))
            self._waiting, self._held = [], 0

    def _write(self, group: pa.Table) -> None:
        """A group whose first and last rows are whole, as far as it fits."""
        if self.info.truncated:
            return
        self._groups += 1
        room = (self._budget - self._sink.tell() - self._groups * GROUP_BYTES) // ENTRY_BYTES
        kept = group.slice(0, _whole_rows(group, room)) if room < len(group) else group
        if len(kept):
            self._writer.write_table(kept, row_group_size=GROUP_ENTRIES)
        entries = self.info.entries + len(kept)
        if len(kept) == len(group):
            self.info = FeaturesInfo(entries, False, None, None)
        else:
            missing = group.slice(len(kept), 1).to_pylist()[0]
            self.info = FeaturesInfo(entries, True, missing["text"], missing["position"])


@contextmanager
def feature_store(path: Path, *, d_sae: int, max_bytes: int, about: Mapping[str, object]) -> Iterator[FeatureStore]:
    """A store to add rows to, complete at the end; no file is left if anything is raised.

    The file's metadata key `mistudio` holds a JSON object that describes it.

    Args:
        path: the file.
        d_sae: number of features.
        max_bytes: size limit of the file; rows are left out from the first that might not fit.
        about: plain values to add to the description: model, layer, pooling.

    Raises:
        ExportRefused: if the description is not plain.
        DiskFull: if the disk has no room.

    """
    refuse_unless_plain(about, path.name)
    description = {"columns": COLUMNS, "sorted_by": ["text", "position", "feature"], "d_sae": d_sae, **about}
    budget = max_bytes - FOOTER_BYTES - 4 * len(json.dumps(description))
    with whole(path) as partial, partial.open("wb") as sink, _parquet(sink) as writer:
        store = FeatureStore(writer, sink, d_sae, budget)
        yield store
        store.flush()
        writer.add_key_value_metadata({METADATA_KEY: json.dumps(description | asdict(store.info), allow_nan=False)})


def read_description(path: Path) -> dict[str, Any]:
    """What a store says of itself: what `feature_store` was told of it, and the fields of `FeaturesInfo`."""
    description: dict[str, Any] = json.loads(pq.ParquetFile(path).metadata.metadata[METADATA_KEY.encode()])
    return description


def _parquet(sink: IO[bytes]) -> Any:
    return pq.ParquetWriter(sink, SCHEMA, compression="zstd", use_dictionary=False, column_encoding=ENCODINGS)


def _whole_rows(group: pa.Table, room: int) -> int:
    """At most `room` entries, so many that no row is cut in two."""
    kept = max(0, room)
    text, position = group["text"], group["position"]
    while kept and text[kept] == text[kept - 1] and position[kept] == position[kept - 1]:
        kept -= 1
    return kept


def _check_order(block: RowFeatures, last: int) -> int:
    """The place of the block's last row, as one number."""
    place_B = (block.text << 32) + block.position + 1
    in_order = torch.cat([torch.tensor([last]), place_B]).diff() > 0
    if not in_order.all():
        row = int((~in_order).nonzero()[0])
        raise refused(f"text {int(block.text[row])} is out of order: rows must ascend by text and position")
    return int(place_B[-1]) if len(place_B) else last


def _table(block: RowFeatures, d_sae: int) -> pa.Table:
    refuse_non_finite(block.activation, "activations of features")
    row_N, feature_N = block.row, block.feature
    if len(feature_N) and not 0 <= int(feature_N.min()) <= int(feature_N.max()) < d_sae:
        raise refused(f"a feature is outside 0 to {d_sae - 1}")
    if not ((row_N * d_sae + feature_N).diff() > 0).all():
        raise refused("features of a row are out of order: they must ascend")
    integers = (block.text[row_N], block.position[row_N], block.token_id[row_N], feature_N)
    columns = [*(column.int().numpy() for column in integers), block.activation.float().numpy()]
    return pa.table(columns, schema=SCHEMA)
