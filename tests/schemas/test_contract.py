"""The contract: what the seed's request means, what is refused in which words, and what a record carries."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mistudio_schemas import (
    CorpusInfo,
    ErrorCode,
    Limits,
    StandardSAE,
    Topics,
    TopKSAE,
    TrainCompleted,
    TrainFailed,
    TrainProgress,
    TrainRequested,
    UnknownFields,
    header,
    new_job_id,
    parse_event,
    record_for,
    refuse_unknown_fields,
    terminal_event_id,
    unknown_fields,
)
from mistudio_schemas.__main__ import json_schemas

SEED: dict[str, Any] = {"model_name": "gpt2", "corpus_file": "corpus.txt"}


def test_a_request_with_only_the_seeds_fields_means_what_the_seed_says() -> None:
    request = TrainRequested.model_validate(SEED)
    expected = {
        "layer_number": 12,
        "huggingface_token": None,
        "hidden_dim": 1024,
        "sparsity_coeff": 1e-3,
        "learning_rate": 1e-4,
        "batch_size": 16,
        "max_epochs": 50,
        "min_loss": 0.01,
        "gpu_id": None,
        "max_sequence_length": 512,
        "pooling": "mean",
    }
    assert {name: getattr(request, name) for name in expected} == expected
    (sae,) = request.resolved_saes()
    assert sae == StandardSAE(
        name="standard-0",
        hook_site="resid_post",
        hidden_dim=1024,
        max_epochs=50,
        seed=0,
        sparsity_coeff=1e-3,
        learning_rate=1e-4,
        batch_size=16,
        min_loss=0.01,
    )


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("layer_number", -1, "Layer number must be non-negative"),
        ("layer_number", 49, "Layer number seems too high (max 48)"),
        ("hidden_dim", 63, "Hidden dimension too small (min 64)"),
        ("hidden_dim", 32769, "Hidden dimension too large (max 32768)"),
        ("batch_size", 0, "Batch size must be at least 1"),
        ("batch_size", 129, "Batch size too large (max 128)"),
        ("sparsity_coeff", 0, "Sparsity coefficient must be positive"),
        ("sparsity_coeff", 1.5, "Sparsity coefficient should be <= 1.0"),
    ],
)
def test_ranges_are_refused_in_the_seeds_words(field: str, value: float, sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainRequested.model_validate(SEED | {field: value})
    assert caught.value.errors()[0]["msg"] == f"Value error, {sentence}"


@pytest.mark.parametrize("field", ["layer_number", "hidden_dim", "batch_size", "max_epochs"])
def test_the_edges_of_the_ranges_are_allowed(field: str) -> None:
    edges = {"layer_number": (0, 48), "hidden_dim": (64, 32768), "batch_size": (1, 128), "max_epochs": (1, 100_000)}
    for value in edges[field]:
        assert getattr(TrainRequested.model_validate(SEED | {field: value}), field) == value


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"min_text_characters": 0}, "greater than or equal to 1"),
        ({"max_text_characters": 0}, "greater than or equal to 1"),
        ({"packing": True}, "packing needs pooling: token"),
        ({"packing": True, "pooling": "token", "include_special_tokens": True}, "include_special_tokens: false"),
        ({"min_text_characters": 10, "max_text_characters": 9}, "at most max_text_characters (10 > 9)"),
    ],
)
def test_what_no_corpus_can_give_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainRequested.model_validate(SEED | fields)
    assert said in caught.value.errors()[0]["msg"]


def test_counts_of_an_earlier_version_can_be_read_and_those_of_this_one_by_earlier_readers() -> None:
    earlier = {"texts": 3, "texts_dropped": 2, "tokens": 9, "rows": 3, "sha256": "0" * 64}
    assert CorpusInfo.model_validate(earlier).texts_too_short == 0
    written = CorpusInfo.model_validate(earlier | {"texts_empty": 1, "texts_too_long": 1}).model_dump()
    assert {name: written[name] for name in earlier} == earlier


def test_an_operator_can_widen_the_limits() -> None:
    raw = SEED | {"hidden_dim": 65536}
    request = TrainRequested.model_validate(raw, context={"limits": Limits(max_hidden_dim=65536)})
    assert request.hidden_dim == 65536


def test_an_sae_inherits_what_it_leaves_out() -> None:
    saes = [{"kind": "topk", "k": 8}, {"kind": "standard", "name": "wide", "hidden_dim": 2048, "layer_number": 3}]
    first, second = TrainRequested.model_validate(SEED | {"layer_number": 5, "seed": 7, "saes": saes}).resolved_saes()
    assert isinstance(first, TopKSAE)
    assert (first.name, first.layer_number, first.hidden_dim, first.seed) == ("topk-0", 5, 1024, 7)
    assert (second.name, second.layer_number, second.hidden_dim, second.seed) == ("wide", 3, 2048, 7)


def test_a_layer_left_to_the_default_is_told_from_one_that_is_asked_for() -> None:
    assert TrainRequested.model_validate(SEED).resolved_saes()[0].layer_number is None
    asked = TrainRequested.model_validate(SEED | {"layer_number": 12})
    assert asked.resolved_saes()[0].layer_number == 12
    again = TrainRequested.from_json(TrainRequested.model_validate(SEED).to_json())
    assert not again.names_layer


def test_an_sae_made_by_its_class_keeps_its_kind_on_the_wire() -> None:
    request = TrainRequested(job_id="a", model_name="m", corpus_file="c.txt", sae=TopKSAE(k=8))
    record = record_for(request, source="/test")
    assert record.value is not None
    assert json.loads(record.value)["sae"] == {"kind": "topk", "k": 8}
    assert TrainRequested.from_json(record.value) == request


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({"sae": {"kind": "topk"}, "saes": [{"kind": "topk"}]}, "either 'sae' or 'saes'"),
        ({"saes": [{"kind": "topk", "name": "a"}, {"kind": "standard", "name": "a"}]}, "name of its own"),
        ({"saes": []}, "at least 1 item"),
        ({"saes": [{"kind": "topk"}] * 33}, "at most 32 items"),
        ({"hidden_dim": 64, "sae": {"kind": "topk", "k": 65}}, "k must be at most the hidden dimension"),
        ({"sae": {"kind": "magic"}}, "does not match any of the expected tags"),
        ({"saes": [{"kind": "topk", "name": "../up"}]}, "String should match pattern"),
        ({"learning_rate": float("nan")}, "finite number"),
        ({"job_id": "../../etc"}, "String should match pattern"),
    ],
)
def test_nonsense_is_refused(extra: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        TrainRequested.model_validate(SEED | extra)


def test_unknown_fields_are_ignored_on_reading_and_named() -> None:
    raw = SEED | {"layer_numbr": 3, "sae": {"kind": "topk", "kk": 4}}
    assert TrainRequested.model_validate(raw).layer_number == 12
    assert list(unknown_fields(TrainRequested, raw)) == ["layer_numbr", "sae.kk"]


def test_our_client_refuses_unknown_fields_with_a_suggestion() -> None:
    with pytest.raises(UnknownFields, match=r"unknown field 'layer_numbr' \(did you mean 'layer_number'\?\)"):
        refuse_unknown_fields(TrainRequested, SEED | {"layer_numbr": 3})


def test_no_number_leaves_that_json_cannot_hold() -> None:
    event = TrainProgress(job_id="a", status="running", current_loss=1.0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        event.model_copy(update={"current_loss": float("inf")}).to_json()


def test_a_token_does_not_leave_through_a_request() -> None:
    request = TrainRequested.model_validate(SEED | {"job_id": "a", "huggingface_token": "hf_secret"})
    record = record_for(request, source="/test")
    assert record.value is not None
    assert b"hf_secret" not in record.value + repr(request).encode()
    assert b"huggingface_token" not in record.value


def test_a_record_carries_cloudevents_headers_and_reads_back() -> None:
    event = TrainFailed(
        job_id="job-1", run=2, status="failed", code=ErrorCode.CORPUS_EMPTY, hint="Give texts.", retryable=False
    )
    record = record_for(event, source="/w1", topics=Topics("dev."), traceparent="00-a-b-01")
    assert (record.topic, record.key) == ("dev.train.failed", b"job-1")
    expected = {
        "ce_specversion": "1.0",
        "ce_id": terminal_event_id("job-1", 2),
        "ce_source": "/w1",
        "ce_type": "mistudio.train.failed.v1",
        "ce_time": event.time.isoformat(),
        "ce_subject": "job-1",
        "content-type": "application/json",
        "traceparent": "00-a-b-01",
    }
    assert {name: header(record.headers, name) for name in expected} == expected
    assert parse_event(record.value or b"", record.headers) == event


def test_a_terminal_events_id_depends_on_job_and_run_alone() -> None:
    assert terminal_event_id("a", 1) == terminal_event_id("a", 1)
    assert len({terminal_event_id("a", 1), terminal_event_id("a", 2), terminal_event_id("b", 1)}) == 3


def test_events_carry_the_seeds_fields_by_name() -> None:
    status = "job_id status progress current_epoch current_loss estimated_time_remaining message model_info"
    result = "model_path activations_path metadata_path training_stats feature_count ready_for_find_service checkpoints"
    for model in (TrainProgress, TrainFailed, TrainCompleted):
        assert {*status.split(), "last_checkpoint"} <= set(model.model_fields)
    assert set(result.split()) <= set(TrainCompleted.model_fields)


def test_job_ids_have_the_seeds_form_and_do_not_collide() -> None:
    ids = {new_job_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(one.startswith("train_2") and TrainRequested.model_validate(SEED | {"job_id": one}) for one in ids)


def test_the_committed_json_schemas_are_current() -> None:
    folder = Path(__file__).parents[2] / "schemas" / "json"
    committed = {path.name: path.read_text() for path in folder.glob("*.json")}
    assert committed == json_schemas(), "run `make schemas` and commit the result"


def test_the_package_needs_pydantic_and_the_standard_library_only() -> None:
    code = "import sys, mistudio_schemas, json; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    loaded = json.loads(subprocess.check_output([sys.executable, "-I", "-c", code]))
    allowed = {"pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}
    foreign = {
        name
        for name in loaded
        if name not in sys.stdlib_module_names
        and name not in allowed
        and not name.startswith(("_", "mistudio_schemas"))
    }
    assert foreign <= {"sitecustomize", "distutils-precedence"}
