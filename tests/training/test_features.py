"""The sparse store holds every active feature in order, by bounded groups, and keeps its limit."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from mistudio_train.errors import ExportRefused
from mistudio_train.training import features
from mistudio_train.training.features import FeaturesInfo, RowFeatures, feature_store, read_description

from .exports import D_SAE, rows, small_sae

ABOUT: dict[str, object] = {"model_name": "tiny", "layer": 1, "pooling": "token"}
PLENTY = 1 << 30


def block(place: list[tuple[int, int, int]], acts: list[dict[int, float]]) -> RowFeatures:
    """Rows of (text, position, token id) with their features."""
    text, position, token_id = torch.tensor(place).T
    entries = [(row, feature, value) for row, active in enumerate(acts) for feature, value in active.items()]
    row, feature, activation = (torch.tensor(column) for column in zip(*entries, strict=True))
    return RowFeatures(text, position, token_id, row, feature, activation)


def random_blocks(n_rows: int, per_text: int = 7, size: int = 50) -> Iterator[RowFeatures]:
    sae = small_sae("topk")
    x_BD = rows(n_rows)
    row_B = torch.arange(n_rows)
    for at_B in torch.split(row_B, size):
        active, values = sae.encode_sparse(x_BD[at_B])
        yield RowFeatures(at_B // per_text, at_B % per_text, at_B + 1000, *active.entries(values))


def write_features(
    path: Path, blocks: Iterable[RowFeatures], d_sae: int = D_SAE, max_bytes: int = PLENTY
) -> FeaturesInfo:
    with feature_store(path, d_sae=d_sae, max_bytes=max_bytes, about=ABOUT) as store:
        for rows in blocks:
            store.add(rows)
    return store.info


def test_entries_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "features" / "features.parquet"
    first = block([(0, 0, 101), (0, 1, 102), (0, 2, 103)], [{2: 1.5, 7: 0.5}, {}, {3: 0.25}])
    second = block([(2, 0, 104)], [{0: 4.0, 1: 8.0, 9: 2.0}])
    info = write_features(path, [first, second], d_sae=10)
    assert info == FeaturesInfo(entries=6, truncated=False, first_missing_text=None, first_missing_position=None)
    table = pq.read_table(path)
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        (0, 0, 101, 2, 1.5),
        (0, 0, 101, 7, 0.5),
        (0, 2, 103, 3, 0.25),
        (2, 0, 104, 0, 4.0),
        (2, 0, 104, 1, 8.0),
        (2, 0, 104, 9, 2.0),
    ]
    assert [f"{field.name}:{field.type}" for field in table.schema] == [
        "text:int32",
        "position:int32",
        "token_id:int32",
        "feature:int32",
        "activation:float",
    ]
    assert list(path.parent.iterdir()) == [path]


def test_a_store_equals_the_dense_features_and_reads_by_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "GROUP_ENTRIES", 333)
    path = tmp_path / "features.parquet"
    info = write_features(path, random_blocks(500))
    file = pq.ParquetFile(path)
    dense = torch.zeros(500, D_SAE)
    last = (-1, -1)
    for group in range(file.num_row_groups):
        table = file.read_row_group(group)
        assert 0 < len(table) <= 333
        text, position, token_id, feature, activation = (torch.tensor(column.to_pylist()) for column in table.columns)
        assert torch.equal(token_id, text * 7 + position + 1000)
        dense[text * 7 + position, feature] = activation
        places = list(zip(text.tolist(), position.tolist(), strict=True))
        assert last < places[0]  # no row lies in two groups
        assert places == sorted(places)
        last = places[-1]
    assert file.num_row_groups > 5
    assert torch.equal(dense, small_sae("topk").encode(rows(500)))
    assert info.entries == int((dense > 0).sum())


def test_the_file_describes_itself(tmp_path: Path) -> None:
    path = tmp_path / "features.parquet"
    write_features(path, random_blocks(20))
    description = read_description(path)
    assert description["model_name"] == "tiny"
    assert description["d_sae"] == D_SAE
    assert description["sorted_by"] == ["text", "position", "feature"]
    assert set(description["columns"]) == set(pq.read_schema(path).names)
    assert description["truncated"] is False


@pytest.mark.parametrize("limit", [50_000, 75_000])
def test_limit_keeps_whole_first_rows_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(features, "GROUP_ENTRIES", 1000)
    everything = tmp_path / "all.parquet"
    write_features(everything, random_blocks(3000))
    path = tmp_path / "features.parquet"
    info = write_features(path, random_blocks(3000), max_bytes=limit)
    groups = pq.ParquetFile(path).num_row_groups
    slack = features.FOOTER_BYTES + features.GROUP_BYTES * (groups + 1) + features.ENTRY_BYTES * 1000
    assert limit - slack < path.stat().st_size <= limit < everything.stat().st_size
    table, whole_table = pq.read_table(path), pq.read_table(everything)
    assert table.equals(whole_table.slice(0, len(table)))
    missing = whole_table.slice(len(table), 1).to_pylist()[0]
    assert (info.first_missing_text, info.first_missing_position) == (missing["text"], missing["position"])
    kept = table.slice(len(table) - 1).to_pylist()[0]
    assert (kept["text"], kept["position"]) < (missing["text"], missing["position"])
    assert info.truncated
    assert read_description(path)["first_missing_text"] == missing["text"]


def test_no_room_at_all_leaves_an_empty_store(tmp_path: Path) -> None:
    path = tmp_path / "features.parquet"
    info = write_features(path, random_blocks(20), max_bytes=1)
    assert info == FeaturesInfo(entries=0, truncated=True, first_missing_text=0, first_missing_position=0)
    assert len(pq.read_table(path)) == 0


def test_whole_texts_have_no_position(tmp_path: Path) -> None:
    path = tmp_path / "features.parquet"
    pooled = block([(0, -1, -1), (1, -1, -1)], [{1: 1.0}, {2: 2.0}])
    write_features(path, [pooled], d_sae=10)
    assert pq.read_table(path)["position"].to_pylist() == [-1, -1]


A = (0, 0, 1)
B = (0, 1, 1)
ONE = [{1: 1.0}]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([block([B], ONE), block([A], ONE)], "text 0 is out of order"),
        ([block([A, A], ONE * 2)], "text 0 is out of order"),
        ([block([(1, 0, 1), B], ONE * 2)], "text 0 is out of order"),
        ([block([A], [{3: 1.0, 2: 1.0}])], "features of a row are out of order"),
        ([block([A], [{10: 1.0}])], "a feature is outside 0 to 9"),
        ([block([A], [{-1: 1.0}])], "a feature is outside 0 to 9"),
        ([block([A], [{1: float("nan")}])], "not finite"),
    ],
)
def test_what_readers_could_not_trust_is_refused(tmp_path: Path, blocks: list[RowFeatures], message: str) -> None:
    with pytest.raises(ExportRefused, match=message):
        write_features(tmp_path / "features.parquet", blocks, d_sae=10)
    assert list(tmp_path.iterdir()) == []
