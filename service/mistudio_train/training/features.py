"""The sparse feature store: every active feature of every row, as Parquet, where the dense bundle is too large.

Owns the columns, their order and the size limit, and holds one row group at a time; must not run a model or an SAE.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
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
class TokenFeatures:
    """Features of consecutive rows, ordered by (text, position); for whole texts position and token id are -1."""

    text: Tensor
    """[B], as the next two."""
    position: Tensor
    token_id: Tensor
    values: Tensor
    """[B, K]: activations of up to K features of each row; zeros are places without one."""
    indices: Tensor
    """[B, K], int64: which features they are of, in any order."""


@dataclass(frozen=True)
class FeaturesInfo:
    """What the store holds."""

    entries: int
    truncated: bool
    """Whether the size limit left rows out; those that are in are whole, and the first ones."""
    first_missing_text: int | None
    """From the row of this text and position on nothing is in the store; `None`: nothing is missing."""
    first_missing_position: int | None


def write_features(
    path: Path, blocks: Iterable[TokenFeatures], *, d_sae: int, max_bytes: int, about: Mapping[str, object]
) -> FeaturesInfo:
    """Write the store as a stream. The file's metadata key `mistudio` holds a JSON object that describes it.

    Args:
        path: the file.
        blocks: rows ordered by (text, position), none twice; consumed only as far as they fit.
        d_sae: number of features.
        max_bytes: size limit of the file; rows are left out from the first that might not fit.
        about: plain values to add to the description: model, layer, pooling.

    Raises:
        ExportRefused: if rows are out of order, a feature is out of range, or a number is not finite.
        DiskFull: if the disk has no room.

    """
    refuse_unless_plain(about, path.name)
    description = {"columns": COLUMNS, "sorted_by": ["text", "position", "feature"], "d_sae": d_sae, **about}
    budget = max_bytes - FOOTER_BYTES - 4 * len(json.dumps(description))
    with whole(path) as partial, partial.open("wb") as sink, _parquet(sink) as writer:
        info = _write_groups(writer, sink, _grouped(_entries(blocks, d_sae)), budget)
        writer.add_key_value_metadata({METADATA_KEY: json.dumps(description | asdict(info), allow_nan=False)})
    return info


def read_description(path: Path) -> dict[str, Any]:
    """What a store says of itself: what `write_features` was told of it, and the fields of `FeaturesInfo`."""
    description: dict[str, Any] = json.loads(pq.ParquetFile(path).metadata.metadata[METADATA_KEY.encode()])
    return description


def _parquet(sink: IO[bytes]) -> Any:
    return pq.ParquetWriter(sink, SCHEMA, compression="zstd", use_dictionary=False, column_encoding=ENCODINGS)


def _write_groups(writer: Any, sink: IO[bytes], groups: Iterable[pa.Table], budget: int) -> FeaturesInfo:
    entries = 0
    for number, group in enumerate(groups, start=1):
        room = (budget - sink.tell() - number * GROUP_BYTES) // ENTRY_BYTES
        kept = group.slice(0, _whole_rows(group, room)) if room < len(group) else group
        if len(kept):
            writer.write_table(kept, row_group_size=GROUP_ENTRIES)
        entries += len(kept)
        if len(kept) < len(group):
            missing = group.slice(len(kept), 1).to_pylist()[0]
            return FeaturesInfo(entries, True, missing["text"], missing["position"])
    return FeaturesInfo(entries, False, None, None)


def _whole_rows(group: pa.Table, room: int) -> int:
    """At most `room` entries, so many that no row is cut in two."""
    kept = max(0, room)
    text, position = group["text"], group["position"]
    while kept and text[kept] == text[kept - 1] and position[kept] == position[kept - 1]:
        kept -= 1
    return kept


def _grouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same entries in tables of at most `GROUP_ENTRIES`, none of which ends inside a row."""
    waiting: list[pa.Table] = []
    held = 0
    for table in tables:
        waiting.append(table)
        held += len(table)
        while held > GROUP_ENTRIES:
            joined = pa.concat_tables(waiting).combine_chunks()
            # A row of more features than a group holds has to be cut.
            kept = _whole_rows(joined, GROUP_ENTRIES) or GROUP_ENTRIES
            yield joined.slice(0, kept)
            waiting = [joined.slice(kept)]
            held -= kept
    if held:
        yield pa.concat_tables(waiting)


def _entries(blocks: Iterable[TokenFeatures], d_sae: int) -> Iterator[pa.Table]:
    last = -1
    for block in blocks:
        last = _check_order(block, last)
        yield _table(block, d_sae)


def _check_order(block: TokenFeatures, last: int) -> int:
    """The place of the block's last row, as one number."""
    place_B = (block.text.long() << 32) + block.position.long() + 1
    in_order = torch.cat([torch.tensor([last]), place_B.cpu()]).diff() > 0
    if not in_order.all():
        row = int((~in_order).nonzero()[0])
        raise refused(f"text {int(block.text[row])} is out of order: rows must ascend by text and position")
    return int(place_B[-1]) if len(place_B) else last


def _table(block: TokenFeatures, d_sae: int) -> pa.Table:
    refuse_non_finite(block.values, "activations of features")
    indices_BK, order_BK = block.indices.sort(dim=1)
    values_BK = block.values.gather(1, order_BK)
    row_N, place_N = (values_BK > 0).nonzero(as_tuple=True)
    feature_N = indices_BK[row_N, place_N]
    if len(feature_N) and not 0 <= int(feature_N.min()) <= int(feature_N.max()) < d_sae:
        raise refused(f"a feature is outside 0 to {d_sae - 1}")
    integers = (block.text[row_N], block.position[row_N], block.token_id[row_N], feature_N)
    columns = [column.to("cpu", torch.int32).numpy() for column in integers]
    columns.append(values_BK[row_N, place_N].to("cpu", torch.float32).numpy())
    return pa.table(columns, schema=SCHEMA)
