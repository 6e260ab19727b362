"""The store of activations against plain indexing, across shards and precisions, and its resident memory."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from mistudio_train.errors import DiskFull, DiskLimit
from mistudio_train.training.activations import ActivationStore, ActivationWriter, Layout, require_room
from mistudio_train.training.disk import ArrayFile, ArrayWriter
from mistudio_train.training.tokens import RowIndex


def index_of(folder: Path, rows: int) -> RowIndex:
    """An index of one row a text."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"starts": np.arange(rows + 1), "text": np.arange(rows), "position": np.full(rows, -1)}
    for name, numbers in values.items():
        with ArrayWriter(folder / name, "<i8") as writer:
            writer.append(numbers)
    files = {name: ArrayFile(folder / name, "<i8") for name in values}
    return RowIndex(files["starts"], files["text"], files["position"], files["position"])


def even_layout(rows_ND: Tensor, shard_rows: int) -> Layout:
    """Shards of so many rows."""
    starts = (*range(0, len(rows_ND), shard_rows), len(rows_ND))
    return Layout(rows_ND.shape[1], rows_ND.dtype, starts)


def stored(folder: Path, rows_ND: Tensor, shard_rows: int = 1000) -> ActivationStore:
    """The rows, written in an order of their own."""
    writer = ActivationWriter(folder, even_layout(rows_ND, shard_rows))
    for start in reversed(range(0, len(rows_ND), 7)):
        writer.write(start, rows_ND[start : start + 7])
    return writer.finish(index_of(folder / "index", len(rows_ND)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_rows", [5, 1000])
def test_rows_come_back_as_they_were_written(tmp_path: Path, dtype: torch.dtype, shard_rows: int) -> None:
    rows_ND = torch.randn(53, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    store = stored(tmp_path, rows_ND, shard_rows)
    expected = rows_ND.float()
    assert len(list(tmp_path.glob("shard-*"))) == -(-53 // shard_rows)
    assert (store.rows, store.d_in) == (53, 6)
    wanted = np.array([52, 0, 4, 5, 5, 31, 10])
    assert torch.equal(store.gather(wanted), expected[wanted])
    assert store.gather(np.array([], np.int64)).shape == (0, 6)
    assert torch.equal(store.read(3, 24), expected[3:24])
    assert store.read(9, 9).shape == (0, 6)
    blocks = list(store.blocks(10))
    assert [start for start, _ in blocks] == [0, 10, 20, 30, 40, 50]
    assert torch.equal(torch.cat([block for _, block in blocks]), expected)
    store.close()


def test_what_is_gathered_is_the_callers_own(tmp_path: Path) -> None:
    store = stored(tmp_path, torch.ones(10, 3))
    store.gather(np.arange(10)).zero_()
    store.read(0, 10).zero_()
    assert torch.equal(store.gather(np.arange(10)), torch.ones(10, 3))


@pytest.mark.parametrize("row", [-1, 10])
def test_a_row_that_is_not_there_is_an_error(tmp_path: Path, row: int) -> None:
    with pytest.raises(IndexError, match=r"0\.\.9"):
        stored(tmp_path, torch.ones(10, 3)).gather(np.array([row]))


def test_a_full_disk_is_told_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=119))
    with pytest.raises(DiskFull, match="disk has"):
        require_room(tmp_path, Layout(3, torch.float32, (0, 10)), 1, None)


def test_the_activations_of_all_sites_count_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=239))
    require_room(tmp_path, Layout(3, torch.float32, (0, 10)), 1, 239)
    with pytest.raises(DiskFull, match="disk has"):
        require_room(tmp_path, Layout(3, torch.float32, (0, 10)), 2, 240)
    with pytest.raises(DiskLimit, match="are the limit of one job"):
        require_room(tmp_path, Layout(3, torch.float32, (0, 10)), 2, 239)


def test_what_is_there_already_needs_no_more_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(3, torch.float32, (0, 10))
    writer = ActivationWriter(tmp_path / "activations" / "1-resid_post", layout)
    writer.write(0, torch.ones(10, 3))
    writer.close()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    require_room(tmp_path, layout, 1, 120)
    (tmp_path / "tokens.bin").write_bytes(b"x" * 8192)
    with pytest.raises(DiskFull, match="disk has"):  # what tokens take is no room for activations
        require_room(tmp_path, Layout(3, torch.float32, (0, 1000)), 1, None)


READ_ALL = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from mistudio_train.training.activations import ActivationStore, Layout
from tests.training.test_activations import index_of
torch.set_num_threads(1)
folder, rows = Path(sys.argv[1]), int(sys.argv[2])
store = ActivationStore(folder, Layout(256, torch.float32, (0, rows)), index_of(folder / "index", rows))
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
store.gather(np.arange(64))
before = peak()
order = np.random.default_rng(0).permutation(rows)
for start in range(0, rows, 512):
    store.gather(order[start : start + 512])
for _ in store.blocks(512):
    pass
print(peak() - before)
"""


def test_resident_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """300 MB read at random and in order by a fresh process."""
    rows, chunk = 300_000, torch.randn(1000, 256)
    writer = ActivationWriter(tmp_path, Layout(256, torch.float32, (0, rows)))
    for start in range(0, rows, len(chunk)):
        writer.write(start, chunk)
    writer.close()
    ran = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(tmp_path), str(rows)], capture_output=True, text=True, check=True
    )
    assert int(ran.stdout) < 30e6
