"""Features for Neuronpedia: SAEDashboard's fields and types, and in them what the store says."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from sae_dashboard.neuronpedia.neuronpedia_dashboard import (
    NeuronpediaDashboardActivation,
    NeuronpediaDashboardBatch,
    NeuronpediaDashboardFeature,
)
from safetensors.torch import load_file

from mistudio_schemas import TrainRequested
from mistudio_train.messages import Warned
from mistudio_train.training.report import neuronpedia
from tests.training.conftest import Listener

from .conftest import PLAIN, report_of

SAE = {"kind": "topk", "k": 4, "hidden_dim": 64, "batch_size": 64}
Exported = tuple[Path, list[dict[str, Any]], Listener]


@pytest.fixture(scope="module")
def exported(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The folder and its batches, small ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neuronpedia, "BATCH", 16)
        fields: dict[str, Any] = {"pooling": "token", "sae": SAE, "cross_entropy_tokens": 64, "held_out": 0.2}
        where = tmp_path_factory.mktemp("neuronpedia")
        folder, parent = report_of(model_folder("llama"), where, exports=["neuronpedia"], **fields)
    paths = sorted((folder / "features" / "neuronpedia").iterdir(), key=lambda path: int(path.stem.split("-")[1]))
    assert [path.name for path in paths] == [f"batch-{number}.json" for number in range(len(paths))]
    return folder, [json.loads(path.read_text(encoding="utf-8")) for path in paths], parent


def features_of(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [feature for batch in batches for feature in batch["features"]]


def check(value: dict[str, Any], hints: dict[str, Any]) -> None:
    for name, found in value.items():
        if get_origin(hints[name]) is list:
            (inner,) = get_args(hints[name])
            assert all(type(item) is (get_origin(inner) or inner) for item in found), name
        else:
            assert type(found) is hints[name], name


def test_saedashboards_own_classes_take_every_field_and_say_the_same(exported: Exported) -> None:
    batches = exported[1]
    assert len(batches) > 1
    for batch in batches:
        read = NeuronpediaDashboardBatch(**batch)
        assert read.to_dict() == batch  # no field is missing, and they refuse those that they do not know
        assert len(read.features) == len(batch["features"]) > 0
        for feature in batch["features"]:
            for one, other in (("pos_str", "pos_values"), ("neg_str", "neg_values")):
                assert len(feature[one]) == len(feature[other]) > 0


def test_every_field_is_of_the_type_that_saedashboard_says(exported: Exported) -> None:
    hints = {
        name: get_type_hints(one.__init__)
        for name, one in (("feature", NeuronpediaDashboardFeature), ("activation", NeuronpediaDashboardActivation))
    }
    for feature in features_of(exported[1]):
        check(feature, hints["feature"])
        for activation in feature["activations"]:
            check(activation, hints["activation"])
            assert len(activation["tokens"]) == len(activation["values"])
            assert activation["values"][activation["qualifying_token_index"]] > 0


def test_every_living_feature_is_there_once_with_the_stores_figures(exported: Exported) -> None:
    folder, batches, _ = exported
    table = pq.read_table(folder / "features" / "activations.parquet")
    number, strength = table["feature"].to_numpy(), table["activation"].to_numpy()
    features = features_of(batches)
    assert [feature["feature_index"] for feature in features] == np.unique(number).tolist()
    rows = json.loads((folder / "metadata.json").read_text())["feature_statistics"]["total_samples_processed"]
    for feature in features:
        mine = strength[number == feature["feature_index"]]
        assert feature["frac_nonzero"] == pytest.approx(len(mine) / rows)
        assert sum(feature["freq_hist_data_bar_heights"]) == len(mine)
        top = feature["activations"][0]
        assert (top["bin_min"], top["bin_contains"]) == (-1, -1)
        assert max(top["values"]) == top["bin_max"] == pytest.approx(mine.max(), abs=1e-3)
        for activation in feature["activations"]:
            if activation["bin_min"] == -1:
                continue
            low, high = activation["bin_min"], activation["bin_max"]
            assert any(low - 2e-3 <= value <= high + 2e-3 for value in activation["values"])
            edges = np.array([round(5 * low / mine.max()), round(5 * high / mine.max())]) / 5 * mine.max()
            inside = ((mine >= edges[0] * (1 - 1e-6)) & (mine < edges[1] * (1 - 1e-6))).sum()
            expected = (inside + (rows - len(mine) if low == 0 else 0)) / rows
            assert activation["bin_contains"] == pytest.approx(expected, abs=2 / rows)


def test_tokens_are_the_corpus_own_and_not_made_safe_for_a_page(exported: Exported) -> None:
    activations = [one for feature in features_of(exported[1]) for one in feature["activations"]]
    joined = ["".join(one["tokens"]).strip() for one in activations]
    assert any(text and text in PLAIN[7] for text in joined)
    assert any("<script>" in text or "\x1b" in text or "\u202e" in text for text in joined)


def test_neurons_are_those_that_the_direction_lies_along(exported: Exported) -> None:
    folder, batches, _ = exported
    rows_FD = load_file(folder / "sae" / "sae_weights.safetensors")["W_dec"].numpy()
    for feature in features_of(batches)[:8]:
        row_D = rows_FD[feature["feature_index"]]
        largest = np.argsort(-row_D)[:3]
        assert feature["neuron_alignment_indices"] == largest.tolist()
        np.testing.assert_allclose(feature["neuron_alignment_values"], row_D[largest], atol=6e-4)
        shares = np.abs(row_D[largest]) / np.abs(row_D).sum()
        np.testing.assert_allclose(feature["neuron_alignment_l1"], shares, atol=6e-4)


def test_the_page_is_made_of_the_same_contexts(exported: Exported) -> None:
    folder, batches, parent = exported
    assert (folder / "report" / "index.html").exists()
    assert not [one for one in parent.heard if isinstance(one, Warned) and "has no" in one.message]
    assert {batch["sae_set"] for batch in batches} == {"topk-0"}


def test_writing_takes_no_more_memory_for_more_features(exported: Exported, tmp_path: Path) -> None:
    feature = features_of(exported[1])[0]
    tracemalloc.start()
    try:
        neuronpedia._write(tmp_path / "batch-0.json", {"model_id": "m"}, (feature for _ in range(3000)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "batch-0.json").stat().st_size > 10 * peak
    assert len(json.loads((tmp_path / "batch-0.json").read_text())["features"]) == 3000


def test_features_that_cannot_be_written_fail_no_job_and_no_page(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = neuronpedia._write, list[Path]()

    def broken(path: Path, *rest: Any) -> None:
        if written:
            raise RuntimeError("no ink")
        write(path, *rest)
        written.append(path)

    monkeypatch.setattr(neuronpedia, "BATCH", 16)
    monkeypatch.setattr(neuronpedia, "_write", broken)
    fields: dict[str, Any] = {"pooling": "token", "sae": SAE, "exports": ["neuronpedia"]}
    folder, parent = report_of(model_folder("llama"), tmp_path, **fields)
    assert written
    assert not list((folder / "features").glob("neuronpedia*"))
    assert (folder / "report" / "index.html").exists()
    assert [one.message for one in parent.heard if isinstance(one, Warned) and "no ink" in one.message] == [
        "topk-0 has no features for Neuronpedia: RuntimeError: no ink"
    ]


def test_means_of_texts_have_no_tokens_to_show() -> None:
    fields = {"model_name": "m", "corpus_file": "c", "exports": ["neuronpedia"]}
    with pytest.raises(ValidationError, match="needs pooling: token"):
        TrainRequested.model_validate(fields)
    assert TrainRequested.model_validate(fields | {"pooling": "token"}).exports == ["neuronpedia"]
