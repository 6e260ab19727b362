"""The bundle is what safe loading reads, lines up, keeps its limit, and is written in little memory."""

import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mistudio_train.errors import ExportRefused
from mistudio_train.training.bundle import Block, BundleInfo, write_bundle

D_IN, D_SAE = 6, 10
TEXTS = [f"text {i}: naïve ☃ 中" for i in range(2503)]
X_ND = torch.randn(len(TEXTS), D_IN, generator=torch.Generator().manual_seed(0))
ACTS_NF = torch.randn(len(TEXTS), D_SAE, generator=torch.Generator().manual_seed(1)).relu()
MODEL_INFO: dict[str, object] = {"model_name": "tiny", "total_layers": 2, "requires_token": False}
PLENTY = 1 << 30


def in_blocks(rows: int, size: int = 64, acts_NF: Tensor = ACTS_NF, x_ND: Tensor = X_ND) -> Iterator[Block]:
    for start in range(0, rows, size):
        yield acts_NF[start : min(start + size, rows)], x_ND[start : min(start + size, rows)]


def write(path: Path, rows: int = len(TEXTS), **changes: Any) -> BundleInfo:
    given: dict[str, Any] = {
        "blocks": in_blocks(rows),
        "texts": TEXTS[:rows],
        "total_rows": rows,
        "d_sae": D_SAE,
        "d_in": D_IN,
        "model_info": MODEL_INFO,
        "max_bytes": PLENTY,
    }
    return write_bundle(path, **(given | changes))


def test_plain_load_gives_every_field_and_the_dense_reference(tmp_path: Path) -> None:
    path = tmp_path / "feature_activations.pt"
    info = write(path)
    bundle = torch.load(path, map_location="cpu")
    assert torch.equal(bundle["feature_activations"], ACTS_NF)
    assert torch.equal(bundle["original_activations"], X_ND)
    assert bundle["feature_activations"].dtype == bundle["original_activations"].dtype == torch.float32
    assert bundle["texts"] == TEXTS
    assert type(bundle["texts"]) is list
    assert bundle["feature_count"] == D_SAE
    assert bundle["activation_dim"] == D_IN
    assert bundle["model_info"] == MODEL_INFO
    assert bundle["bundle_info"]["truncated"] is False
    assert bundle["bundle_info"]["rows"] == bundle["bundle_info"]["total_rows"] == 2503
    assert info == BundleInfo(rows=2503, total_rows=2503, size=path.stat().st_size)
    assert not info.truncated
    assert list(tmp_path.iterdir()) == [path]


def test_storages_are_mapped_into_memory_and_aligned(tmp_path: Path) -> None:
    path = tmp_path / "feature_activations.pt"
    write(path)
    mapped = torch.load(path, map_location="cpu", mmap=True)
    assert torch.equal(mapped["feature_activations"], ACTS_NF)
    assert torch.equal(mapped["original_activations"], X_ND)
    assert mapped["feature_activations"].data_ptr() % 64 == 0
    assert mapped["original_activations"].data_ptr() % 64 == 0


def test_checksums_are_right_and_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a.pt")
    write(tmp_path / "b.pt", blocks=in_blocks(len(TEXTS), size=1000))
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_an_archive_beyond_four_gigabytes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Python writes the large form of the central directory above this limit; torch's reader must follow it.
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    write(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.getinfo("archive/data/1").extra.startswith(b"\x01\x00")
    bundle = torch.load(tmp_path / "a.pt", map_location="cpu", mmap=True)
    assert torch.equal(bundle["original_activations"], X_ND)


@pytest.mark.parametrize("rows", [2, 999, 1000, 1001, 2000])
def test_every_number_of_texts(tmp_path: Path, rows: int) -> None:
    write(tmp_path / "a.pt", rows)
    assert torch.load(tmp_path / "a.pt")["texts"] == TEXTS[:rows]


def test_other_devices_precisions_and_strides_become_plain_fp32(tmp_path: Path) -> None:
    half_NF, turned_ND = ACTS_NF[:5].half(), X_ND[:5].T.contiguous().T
    write(tmp_path / "a.pt", 5, blocks=[(half_NF.requires_grad_(), turned_ND)])
    bundle = torch.load(tmp_path / "a.pt")
    assert torch.equal(bundle["feature_activations"], half_NF.float())
    assert torch.equal(bundle["original_activations"], X_ND[:5])


def test_limit_holds_the_first_rows_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    consumed: list[int] = []

    def counted() -> Iterator[Block]:
        for block in in_blocks(len(TEXTS)):
            consumed.append(len(block[0]))
            yield block

    info = write(path, max_bytes=60_000, blocks=counted())
    bundle = torch.load(path)
    assert info.truncated
    assert 50_000 < path.stat().st_size == info.size <= 60_000
    assert len(bundle["texts"]) == len(bundle["feature_activations"]) == info.rows < 2503
    assert torch.equal(bundle["feature_activations"], ACTS_NF[: info.rows])
    assert torch.equal(bundle["original_activations"], X_ND[: info.rows])
    assert bundle["texts"] == TEXTS[: info.rows]
    assert bundle["bundle_info"]["total_rows"] == 2503
    assert bundle["bundle_info"]["truncated"] is True
    assert f"first {info.rows} of 2503 rows" in bundle["bundle_info"]["note"]
    assert sum(consumed) < info.rows + 64  # no row is made that is not written


def test_incomplete_is_refused_and_the_size_it_names_is_enough(tmp_path: Path) -> None:
    with pytest.raises(ExportRefused, match=r"needs .* bytes for all rows, and its limit is 60,000") as refusal:
        write(tmp_path / "a.pt", max_bytes=60_000, complete=True)
    needed = int("".join(filter(str.isdigit, refusal.value.hint)))
    assert list(tmp_path.iterdir()) == []
    info = write(tmp_path / "a.pt", max_bytes=needed, complete=True)
    assert not info.truncated
    assert needed - 8192 - 6 * len(TEXTS) < info.size <= needed
    with pytest.raises(ExportRefused):
        write(tmp_path / "b.pt", max_bytes=needed - 1, complete=True)


def test_a_limit_below_two_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportRefused, match="for 2 rows") as refusal:
        write(tmp_path / "a.pt", max_bytes=100)
    needed = int("".join(filter(str.isdigit, refusal.value.hint)))
    assert write(tmp_path / "a.pt", max_bytes=needed).rows == 2


def spoilt(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed[70, 3] = value
    return changed


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fewer texts": ({"texts": TEXTS[:99]}, "100 rows of activations for 99 texts"),
    "more texts": ({"texts": TEXTS[:101]}, "100 rows of activations for 101 texts"),
    "one row": ({"texts": TEXTS[:1], "total_rows": 1}, "a bundle needs 2"),
    "no text": ({"texts": [*TEXTS[:99], None]}, "text 99 is a NoneType"),
    "bytes": ({"texts": [b"x", *TEXTS[:99]]}, "text 0 is a bytes"),
    "nan": ({"blocks": in_blocks(100, acts_NF=spoilt(ACTS_NF, float("nan")))}, "features from row 64 holds"),
    "inf": ({"blocks": in_blocks(100, x_ND=spoilt(X_ND, float("inf")))}, "activations from row 64 holds"),
    "narrow features": ({"d_sae": D_SAE + 1}, "no dense matrix of 11 columns"),
    "wide activations": ({"d_in": D_IN - 1}, "no dense matrix of 5 columns"),
    "sparse": ({"blocks": [(ACTS_NF[:100].to_sparse(), X_ND[:100])]}, "no dense matrix"),
    "uneven block": ({"blocks": [(ACTS_NF[:100], X_ND[:99])]}, "100 rows of features for 99"),
    "too few rows": ({"blocks": in_blocks(99)}, "99 rows of activations, not the 100"),
    "no rows": ({"blocks": []}, "0 rows of activations, not the 100"),
    "too many rows": ({"blocks": in_blocks(101)}, "more rows of activations than the 100"),
    "a block too many": ({"blocks": in_blocks(200, size=100)}, "more rows of activations than the 100"),
    "class in model info": ({"model_info": {"folder": Path("/m")}}, "model_info.folder is a pathlib"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_line_up_is_refused_and_leaves_no_file(tmp_path: Path, case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ExportRefused, match=message):
        write(tmp_path / "a.pt", 100, **changes)
    assert list(tmp_path.iterdir()) == []


class LazyTexts(Sequence[str]):
    """Texts that are read from elsewhere one by one."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < 50:
            raise IndexError(index)
        return f"lazy {index}"


def test_texts_need_not_be_a_list(tmp_path: Path) -> None:
    write(tmp_path / "a.pt", 50, texts=LazyTexts())
    assert torch.load(tmp_path / "a.pt")["texts"] == [f"lazy {i}" for i in range(50)]


MEASURE = """
import json, resource, sys
from pathlib import Path
import torch
from mistudio_train.training.bundle import write_bundle
torch.set_num_threads(1)
rows, d_sae, d_in = (int(given) for given in sys.argv[2:])
def blocks(rows):
    for start in range(0, rows, 64):
        n = min(64, rows - start)
        yield torch.ones(n, d_sae), torch.ones(n, d_in)
def write(rows, path):
    return write_bundle(path, blocks(rows), texts=["x" * 100] * rows, total_rows=rows, d_sae=d_sae, d_in=d_in,
                        model_info={}, max_bytes=1 << 40)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
write(64, Path(sys.argv[1] + ".small"))
before = peak()
info = write(rows, Path(sys.argv[1]))
print(json.dumps({"size": info.size, "grown": peak() - before}))
"""


def test_memory_does_not_grow_with_the_bundle(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "a.pt"), "9000", "8192", "512"]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    measured = json.loads(done.stdout)
    assert measured["size"] > 300e6
    assert measured["grown"] < 60e6
