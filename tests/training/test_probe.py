"""k-sparse probing: features that are made to tell a label are found, and those that tell nothing are at chance."""

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mistudio_schemas import ErrorCode, TrainRequested
from mistudio_train.errors import CorpusRefused
from mistudio_train.messages import Warned
from mistudio_train.training.bundle import write_bundle
from mistudio_train.training.corpus import CorpusRules, open_corpus
from mistudio_train.training.labels import MOST_LABELS, NONE, Labels, LabelsWriter
from mistudio_train.training.probe import LEAST, probe
from mistudio_train.training.run import run_job
from mistudio_train.training.texts import Texts, TextsWriter

from .conftest import Listener
from .test_run import spec

TEXTS, D_SAE, D_IN = 400, 30, 8


def made(folder: Path, label_of: Callable[[int], Any], acts_TF: torch.Tensor) -> tuple[Texts, Labels]:
    """A run's bundle, its texts and their labels."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    with TextsWriter(folder) as writer, LabelsWriter(folder, "kind") as labels:
        for text in range(TEXTS):
            writer.append(f"text {text}")
            labels.append(label_of(text))
    texts = Texts(folder)
    x_TD = torch.randn(TEXTS, D_IN, generator=generator)
    write_bundle(
        folder / "feature_activations.pt", [(acts_TF, x_TD)], texts=texts, total_rows=TEXTS, d_sae=D_SAE, d_in=D_IN,
        model_info={}, max_bytes=1 << 30,
    )  # fmt: skip
    return texts, labels.labels


def noise() -> torch.Tensor:
    return torch.rand(TEXTS, D_SAE, generator=torch.Generator().manual_seed(0))


def test_the_feature_that_tells_a_label_is_found_and_is_enough(tmp_path: Path) -> None:
    acts_TF = noise()
    acts_TF[1::2, 17] += 5
    texts, labels = made(tmp_path, lambda text: "odd" if text % 2 else "even", acts_TF)
    found = probe(tmp_path, labels, texts, TEXTS, D_SAE, D_IN)
    assert found is not None
    assert (found.column, found.labels, found.texts, found.features) == ("kind", 2, TEXTS, [1, 2, 5, 10, 20])
    assert found.balanced_accuracy == [1.0] * 5
    assert 0.3 < found.all_dimensions < 0.7  # activations are noise here
    told = json.loads((tmp_path / "probing.json").read_text())
    assert told["balanced_accuracy"] == found.balanced_accuracy
    by_label = {one["label"]: one for one in told["of_labels"]}
    assert {one["features"][0] for one in by_label.values()} == {17}
    assert by_label["odd"]["higher"][0]
    assert not by_label["even"]["higher"][0]
    assert by_label["odd"]["texts"] == TEXTS // 2


def test_features_that_tell_nothing_are_at_chance(tmp_path: Path) -> None:
    chance = random.Random(0)
    texts, labels = made(tmp_path, lambda text: chance.choice("ab"), noise())
    found = probe(tmp_path, labels, texts, TEXTS, D_SAE, D_IN)
    assert found is not None
    assert all(0.35 < accuracy < 0.65 for accuracy in found.balanced_accuracy)


def test_two_features_together_tell_what_neither_does_alone(tmp_path: Path) -> None:
    acts_TF = noise()
    kinds = torch.arange(TEXTS) % 4
    acts_TF[:, 3] += 3.0 * (kinds == 1) + 3.0 * (kinds == 3)
    acts_TF[:, 5] += 3.0 * (kinds == 2) + 3.0 * (kinds == 3)
    texts, labels = made(tmp_path, lambda text: text % 4 == 0, acts_TF)
    found = probe(tmp_path, labels, texts, TEXTS, D_SAE, D_IN)
    assert found is not None
    assert found.balanced_accuracy[0] < 0.9
    assert found.balanced_accuracy[1] > 0.97


def test_a_rare_label_counts_as_much_as_a_frequent_one(tmp_path: Path) -> None:
    texts, labels = made(tmp_path, lambda text: "rare" if text % 5 == 0 else "usual", noise())
    found = probe(tmp_path, labels, texts, TEXTS, D_SAE, D_IN)
    assert found is not None
    assert found.balanced_accuracy[0] < 0.75  # to say "usual" of all of them is right for four of five


def test_labels_of_few_texts_are_not_probed_and_texts_without_one_are_left_out(tmp_path: Path) -> None:
    def label(text: int) -> str | None:
        return "few" if text < LEAST else None if text < 100 else "ab"[text % 2]

    texts, labels = made(tmp_path, label, noise())
    found = probe(tmp_path, labels, texts, TEXTS, D_SAE, D_IN)
    assert found is not None
    assert (found.labels, found.texts) == (2, TEXTS - 100 + LEAST)
    texts, labels = made(tmp_path / "one", lambda text: "all the same", noise())
    assert probe(tmp_path / "one", labels, texts, TEXTS, D_SAE, D_IN) is None
    assert not (tmp_path / "one" / "probing.json").exists()


ROWS = [("a cat", "animal"), ("a plum", None), ("", "animal"), ("an oak", "plant"), ("a dog", "animal")]
EXPECTED = ["animal", None, "plant", "animal"]
"""Of the texts that are kept."""


def corpus(folder: Path, name: str) -> Path:
    path, records = folder / name, [{"text": text, "kind": kind, "n": 7} for text, kind in ROWS]
    match path.suffixes:
        case [".jsonl"]:
            path.write_text("\n".join(json.dumps(record) for record in records))
        case [".json"]:
            path.write_text(json.dumps(records))
        case [".csv"]:
            path.write_text("text,kind,n\n" + "".join(f"{text},{kind or ''},7\n" for text, kind in ROWS))
        case [".parquet"]:
            pq.write_table(pa.Table.from_pylist(records), path)
        case _:
            path.write_bytes(gzip.compress("\n".join(json.dumps(record) for record in records).encode()))
    return path


@pytest.mark.parametrize("name", ["c.jsonl", "c.json", "c.csv", "c.parquet", "c.jsonl.gz"])
def test_labels_stay_with_their_texts_in_every_format(tmp_path: Path, name: str) -> None:
    rules = CorpusRules("text", label_column="kind")
    texts = open_corpus({name: corpus(tmp_path, name)}, tmp_path / "scratch", rules)
    assert texts.labels is not None
    found = [None if one == NONE else texts.labels.names[one] for one in texts.labels.first(9).tolist()]
    assert found == EXPECTED
    assert list(texts) == ["a cat", "a plum", "an oak", "a dog"]


@pytest.mark.parametrize("name", ["c.jsonl", "c.json", "c.csv", "c.parquet"])
def test_a_column_that_is_not_there_is_refused(tmp_path: Path, name: str) -> None:
    rules = CorpusRules("text", label_column="topic")
    with pytest.raises(CorpusRefused, match="there is no column 'topic', only 'text', 'kind', 'n'") as caught:
        open_corpus({name: corpus(tmp_path, name)}, tmp_path / "scratch", rules)
    assert caught.value.code is ErrorCode.CORPUS_COLUMN
    assert "label_column" in caught.value.hint


def test_lines_of_text_have_no_labels(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("a\nb\n")
    (tmp_path / "c.jsonl").write_text('"a"\n"b"\n')
    for name, said in (("c.txt", "no column of labels"), ("c.jsonl", "line 1: a str has no column 'kind' of labels")):
        with pytest.raises(CorpusRefused, match=said):
            open_corpus({name: tmp_path / name}, tmp_path / f"scratch-{name}", CorpusRules(label_column="kind"))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1.5, "a float"),
        (["a"], "a list"),
        ({"a": 1}, "a dict"),
        ("x" * 201, "has 201"),
        ("\ud83d", "half a surrogate pair"),
    ],
    ids=["float", "list", "dict", "long", "surrogate"],
)
def test_what_is_no_label_is_refused_with_its_place(tmp_path: Path, value: object, said: str) -> None:
    lines = [{"text": "a", "kind": "fine"}, {"text": "b", "kind": value}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(CorpusRefused, match=rf"c.jsonl, line 2: .*{said}"):
        open_corpus({"c.jsonl": tmp_path / "c.jsonl"}, tmp_path / "scratch", CorpusRules(label_column="kind"))


def test_a_column_of_names_is_no_column_of_labels(tmp_path: Path) -> None:
    with LabelsWriter(tmp_path, "id") as writer:
        for number in range(MOST_LABELS):
            writer.append(number)
        writer.append(0)
        with pytest.raises(ValueError, match="more than 1000 different values"):
            writer.append(MOST_LABELS)


def test_whole_numbers_and_truth_values_are_labels(tmp_path: Path) -> None:
    with LabelsWriter(tmp_path, "kind") as writer:
        for value in (True, False, 3, "3", 3.0, "", None, float("nan")):
            writer.append(value)
    labels = writer.labels
    assert labels.names == ("true", "false", "3")
    assert labels.first(9).tolist() == [0, 1, 2, 2, 2, NONE, NONE, NONE]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_the_column_of_labels_is_not_taken_for_that_of_the_texts(tmp_path: Path, suffix: str) -> None:
    records, path = [{"body": "a cat", "kind": "x"}, {"body": "a dog", "kind": "y"}], tmp_path / f"c.{suffix}"
    match suffix:
        case "jsonl":
            path.write_text("\n".join(map(json.dumps, records)))
        case "json":
            path.write_text(json.dumps(records))
        case "csv":
            path.write_text("body,kind\na cat,x\na dog,y\n")
        case _:
            pq.write_table(pa.Table.from_pylist(records), path)
    texts = open_corpus({path.name: path}, tmp_path / "scratch", CorpusRules(label_column="kind"))
    assert list(texts) == ["a cat", "a dog"]
    assert texts.labels is not None
    assert texts.labels.names == ("x", "y")


def test_a_later_row_without_the_column_has_no_label(tmp_path: Path) -> None:
    lines = ['{"text": "a", "kind": "x"}', "null", '{"text": "b"}', "", '{"text": "c", "kind": null}']
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    texts = open_corpus({"c.jsonl": tmp_path / "c.jsonl"}, tmp_path / "scratch", CorpusRules(label_column="kind"))
    assert texts.labels is not None
    assert texts.labels.first(9).tolist() == [0, NONE, NONE]


def test_of_many_texts_some_are_drawn_whatever_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mistudio_train.training.probe.MOST_TEXTS", TEXTS // 2)
    monkeypatch.setattr("mistudio_train.training.torch_archive.BLOCK_NUMBERS", 7 * D_SAE)
    acts_TF = noise()
    acts_TF[1::2, 17] += 5
    texts, labels = made(tmp_path, lambda text: "odd" if text % 2 else "even", acts_TF)
    found = probe(tmp_path, labels, texts, TEXTS, D_SAE, D_IN)
    assert found is not None
    assert found.texts == TEXTS // 2
    assert found.balanced_accuracy[0] == 1.0


def test_a_job_is_probed_by_the_column_that_it_names(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    words = {"cats": "cat whisker purr", "ships": "ship anchor sail"}
    chance = np.random.default_rng(0)
    rows = [
        {"text": " ".join(chance.choice(words[kind].split(), 12)) + f" {number}", "topic": kind}
        for number in range(120)
        for kind in words
    ]
    job = spec(
        model_folder("llama"), tmp_path / "job", [], pooling="token", corpus_file="c.jsonl", label_column="topic",
        max_epochs=8, sae={"kind": "topk", "k": 4, "hidden_dim": 64, "batch_size": 64},
    )  # fmt: skip
    assert job.corpus is not None
    job.corpus.write_text("\n".join(map(json.dumps, rows)))
    parent = Listener()
    finished = run_job(replace(job, bundle_max_bytes=1 << 30), parent)
    probing = finished.saes[0].metrics.probing
    assert probing is not None
    assert (probing.column, probing.labels, probing.texts) == ("topic", 2, 240)
    assert probing.balanced_accuracy[-1] > 0.9
    assert probing.all_dimensions > 0.9
    page = (job.output / "report" / "index.html").read_text()
    assert "<h2>Probing</h2>" in page
    assert "cats" in page
    told = json.loads((job.output / "probing.json").read_text())
    assert TrainRequested.from_json((job.output / "request.json").read_bytes()).label_column == "topic"
    assert {one["label"] for one in told["of_labels"]} == {"cats", "ships"}
    assert not [one for one in parent.heard if isinstance(one, Warned) and "probed" in one.message]


def test_a_probe_or_a_card_that_cannot_be_made_fails_no_job(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr("mistudio_train.training.results.probe", broken)
    monkeypatch.setattr("mistudio_train.training.sweep.write_card", broken)
    monkeypatch.setattr("mistudio_train.training.pipeline.device_name", broken)
    fields: dict[str, Any] = {"corpus_file": "c.jsonl", "label_column": "topic", "report": False, "pooling": "token"}
    job = spec(model_folder("llama"), tmp_path / "job", [], sae={"kind": "topk", "k": 4, "hidden_dim": 64}, **fields)
    assert job.corpus is not None
    job.corpus.write_text("\n".join(json.dumps({"text": f"a cat {n}", "topic": "ab"[n % 2]}) for n in range(90)))
    parent = Listener()
    finished = run_job(job, parent)
    assert finished.saes[0].metrics.probing is None
    assert finished.pace is None
    warned = [one.message for one in parent.heard if isinstance(one, Warned) and "no ink" in one.message]
    assert warned == [
        "topk-0 has not been probed: RuntimeError: no ink",
        "topk-0 has no model card: RuntimeError: no ink",
    ]
