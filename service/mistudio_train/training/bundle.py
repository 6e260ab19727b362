"""`feature_activations.pt`: features and activations of every text, dense, for readers that want one file.

Owns the file's meaning and its limits, and holds no more than one block of rows; must not run a model or an SAE.
"""

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

from .bundle_limits import MIN_ROWS
from .files import refuse_non_finite, refuse_unless_plain, refused, whole
from .torch_archive import Matrix, Strings, TorchArchive, pickled, torch_archive, write_tensor

Block = tuple[Tensor, Tensor]
"""Features `acts_BF` and activations `x_BD` of the same consecutive texts."""
Pooling = Literal["mean", "token"]


class TextList(Protocol):
    """Texts in order, in memory or on disk."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __iter__(self) -> Iterator[str]:
        """One after another."""
        ...


FEATURES, ACTIVATIONS = "0", "1"
"""Keys of the two matrices in the archive."""
ARCHIVE_BYTES: Final = 4096
"""More than the archive takes beside its pickle and storages."""
STRING_BYTES: Final = 6
"""A pickled string takes its UTF-8 and at most this on average, the marks of its batch included."""

ROW_MEANING: Final[dict[Pooling, str]] = {
    "mean": "One row a text: the mean of its tokens' activations, and the features of that mean.",
    "token": (
        "One row a text: of each feature the maximum over the text's tokens; original_activations is the mean of the "
        "tokens' activations, so encoding it does not give the features of its row."
    ),
}


@dataclass(frozen=True)
class BundleInfo:
    """What a bundle holds."""

    rows: int
    total_rows: int
    size: int
    """Bytes of the file."""

    @property
    def truncated(self) -> bool:
        """Whether the size limit left rows out."""
        return self.rows < self.total_rows


@dataclass(frozen=True)
class _Plan:
    rows: int
    """The first rows, as many as fit."""
    size: int
    """Bytes of the file with them, at most."""
    size_of_all: int
    size_of_least: int
    """Bytes with the fewest rows that a bundle may have."""


def write_bundle(
    path: Path,
    blocks: Iterable[Block],
    *,
    texts: TextList,
    total_rows: int,
    d_sae: int,
    d_in: int,
    model_info: Mapping[str, object],
    max_bytes: int,
    complete: bool = False,
    pooling: Pooling = "mean",
) -> BundleInfo:
    """Write the bundle, row block by row block, to a file that `torch.load` reads with its safe default.

    Args:
        path: the file.
        blocks: the rows in the texts' order; consumed only as far as rows fit.
        texts: text i belongs to row i; gone through twice, never copied.
        total_rows: how many rows `blocks` has.
        d_sae: number of features.
        d_in: width of an activation.
        model_info: plain values.
        max_bytes: size limit of the file; the first rows that fit are written, and `bundle_info` in it says so.
        complete: refuse rather than leave rows out.
        pooling: what a row is.

    Raises:
        ExportRefused: if rows, texts and features do not line up, a number is not finite, there are fewer than two
            rows, or the limit leaves out what it must not. No file is left.
        DiskFull: if the disk has no room.

    """
    if total_rows != len(texts):
        raise refused(f"there are {total_rows} rows of activations for {len(texts)} texts")
    if total_rows < MIN_ROWS:
        raise refused(f"there are {total_rows} texts, and a bundle needs {MIN_ROWS}", "Give a corpus of more texts.")
    refuse_unless_plain(model_info, "model_info")
    content = _content(total_rows, total_rows, texts, d_sae, d_in, model_info, pooling)
    plan = _plan(content, texts, 4 * (d_sae + d_in), max_bytes)
    _refuse_too_small(plan, total_rows, max_bytes, complete)
    content = _content(plan.rows, total_rows, texts, d_sae, d_in, model_info, pooling)
    with whole(path, plan.size + 4 * plan.rows * d_in) as partial:
        with torch_archive(partial, content) as archive:
            _write_rows(archive, _checked(blocks, plan.rows, total_rows, (d_sae, d_in)), path.parent)
        size = partial.stat().st_size
    return BundleInfo(plan.rows, total_rows, size)


def _content(
    rows: int,
    total_rows: int,
    texts: TextList,
    d_sae: int,
    d_in: int,
    model_info: Mapping[str, object],
    pooling: Pooling,
) -> dict[str, object]:
    left_out = f" The first {rows} of {total_rows} rows: the others did not fit the size limit."
    return {
        "feature_activations": Matrix(FEATURES, (rows, d_sae)),
        "original_activations": Matrix(ACTIVATIONS, (rows, d_in)),
        "texts": Strings(islice(iter(texts), rows)),
        "feature_count": d_sae,
        "activation_dim": d_in,
        "model_info": dict(model_info),
        "bundle_info": {
            "rows": rows,
            "total_rows": total_rows,
            "truncated": rows < total_rows,
            "pooling": pooling,
            "note": ROW_MEANING[pooling] + (left_out if rows < total_rows else ""),
        },
    }


def _plan(content: Mapping[str, object], texts: TextList, row_bytes: int, max_bytes: int) -> _Plan:
    """How many of the first rows fit: each takes its text and its part of the two matrices."""
    frame = {**content, "texts": Strings([])}
    size = ARCHIVE_BYTES + sum(len(piece) for piece in pickled(frame))
    rows = size_of_rows = size_of_least = 0
    for position, text in enumerate(texts):
        if type(text) is not str:
            raise refused(f"text {position} is a {type(text).__name__}, not a str")
        size += row_bytes + STRING_BYTES + len(text.encode("utf-8", "surrogatepass"))
        if position < MIN_ROWS:
            size_of_least = size
        if size <= max_bytes:
            rows, size_of_rows = position + 1, size
    return _Plan(rows, size_of_rows, size, size_of_least)


def _refuse_too_small(plan: _Plan, total_rows: int, max_bytes: int, complete: bool) -> None:
    needed, what = (plan.size_of_all, "all rows") if complete else (plan.size_of_least, f"{MIN_ROWS} rows")
    if plan.rows < (total_rows if complete else MIN_ROWS):
        way_out = ", or do without bundle_complete" if complete else ""
        raise refused(
            f"feature_activations.pt needs {needed:,} bytes for {what}, and its limit is {max_bytes:,}",
            f"Set bundle_max_bytes to {needed} or more{way_out}.",
        )


def _write_rows(archive: TorchArchive, blocks: Iterable[Block], folder: Path) -> None:
    """A zip takes one record at a time: the second matrix waits in a nameless file on the same disk."""
    with tempfile.TemporaryFile(dir=folder) as waiting:
        with archive.open("data/0") as record:
            for acts_BF, x_BD in blocks:
                write_tensor(record, acts_BF)
                write_tensor(waiting, x_BD)
        waiting.seek(0)
        with archive.open("data/1") as record:
            shutil.copyfileobj(waiting, record, 1 << 20)


def _checked(blocks: Iterable[Block], rows: int, total_rows: int, widths: tuple[int, int]) -> Iterator[Block]:
    """The first `rows` rows; all blocks are seen, and counted, when no row is left out."""
    done = 0
    for acts_BF, x_BD in blocks:
        _check_block(acts_BF, x_BD, done, widths)
        kept = min(len(acts_BF), rows - done)
        done += len(acts_BF)
        if done > total_rows:
            raise refused(f"there are more rows of activations than the {total_rows} promised")
        yield acts_BF[:kept], x_BD[:kept]
        if rows <= done and rows < total_rows:
            return
    if done < rows:
        raise refused(f"there are {done} rows of activations, not the {total_rows} promised")


def _check_block(acts_BF: Tensor, x_BD: Tensor, first_row: int, widths: tuple[int, int]) -> None:
    for name, block, width in (("features", acts_BF, widths[0]), ("activations", x_BD, widths[1])):
        where = f"the block of {name} from row {first_row}"
        if block.layout != torch.strided or block.ndim != 2 or block.shape[1] != width:
            raise refused(f"{where} is no dense matrix of {width} columns: {block.layout}, {list(block.shape)}")
        refuse_non_finite(block, where)
    if len(acts_BF) != len(x_BD):
        raise refused(f"from row {first_row} there are {len(acts_BF)} rows of features for {len(x_BD)} of activations")
