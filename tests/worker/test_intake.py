"""What is a request, what is refused and in which words, and what is garbage."""

import json
from typing import Any

import pytest

from mistudio_schemas import ErrorCode, Limits, TrainRequested, record_for
from mistudio_train.worker.intake import Message, NotARequest, read

SEED: dict[str, Any] = {"model_name": "gpt2", "corpus_file": "corpus.txt"}


def message(value: bytes | None, headers: tuple[tuple[str, bytes], ...] = ()) -> Message:
    return Message("train.requested", 3, 17, 1_700_000_000_000, None, value, headers)


def read_json(raw: dict[str, Any]) -> Any:
    return read(message(json.dumps(raw).encode()), Limits())


@pytest.mark.parametrize(
    "field",
    [
        {"sae": {"kind": "x" * 5_000_000}},
        {"y" * 5_000_000: 1},
        {f"unknown{number}": 1 for number in range(100_000)},
        {"corpus_column": "c" * 5_000_000},
    ],
    ids=["kind", "name", "names", "column"],
)
def test_what_is_said_of_a_request_has_bounds(field: dict[str, Any]) -> None:
    intake = read_json(SEED | field)
    said = json.dumps([intake.unknown, str(intake.refusal), intake.refusal.hint if intake.refusal else ""])
    assert len(said) < 20_000


def test_a_trace_context_that_can_be_none_is_not_carried_on() -> None:
    value = json.dumps(SEED).encode()
    assert read(message(value, (("traceparent", b"0" * 1000),)), Limits()).traceparent is None


GARBAGE = [
    None,
    b"",
    b"\xff\xfe\x00",
    b"not json",
    b"[1, 2]",
    b'"text"',
    b"null",
    b'{"model_name": NaN}',
    b'{"hello": "world"}',
    b'{"model_name": "a"',
    b"[" * 100_000,
    b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
]


@pytest.mark.parametrize("value", GARBAGE)
def test_bytes_that_are_no_request_are_told_apart(value: bytes | None) -> None:
    with pytest.raises(NotARequest):
        read(message(value), Limits())


def test_a_message_that_meets_a_defect_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: Any, **__: Any) -> None:
        raise UnboundLocalError("top")

    monkeypatch.setattr(TrainRequested, "model_validate", defect)
    with pytest.raises(NotARequest, match="a defect of the worker: UnboundLocalError"):
        read_json(SEED)


def test_another_type_of_event_is_no_request() -> None:
    with pytest.raises(NotARequest, match=r"ce_type 'mistudio.train.requested.v9'"):
        read(message(json.dumps(SEED).encode(), (("ce_type", b"mistudio.train.requested.v9"),)), Limits())


def test_headers_that_are_no_text_do_no_harm() -> None:
    intake = read(message(json.dumps(SEED).encode(), (("ce_type", b"\xff"), ("x", b"\x00\xfe"))), Limits())
    assert intake.request is not None


def test_our_clients_request_is_read_as_it_was_meant() -> None:
    sent = TrainRequested(job_id="job-1", model_name="gpt2", corpus_file="c.txt", layer_number=3)
    record = record_for(sent, source="/test", traceparent="00-1-2-01")
    intake = read(message(record.value, tuple(record.headers)), Limits())
    assert (intake.job_id, intake.request, intake.refusal, intake.unknown) == ("job-1", sent, None, [])
    assert intake.traceparent == "00-1-2-01"


def test_a_request_without_an_id_gets_the_same_one_when_delivered_again() -> None:
    first, second = read_json(SEED), read_json(SEED)
    assert first.job_id == second.job_id == "job-train.requested-3-17"
    assert first.request.job_id == first.job_id


@pytest.mark.parametrize(
    ("extra", "code", "sentence"),
    [
        ({"hidden_dim": 1}, ErrorCode.REQUEST_OUT_OF_RANGE, "hidden_dim: Hidden dimension too small (min 64)"),
        ({"layer_number": 99}, ErrorCode.REQUEST_OUT_OF_RANGE, "layer_number: Layer number seems too high (max 48)"),
        ({"hidden_dim": "wide"}, ErrorCode.REQUEST_INVALID, "hidden_dim: Input should be a valid integer"),
        ({"sae": {"kind": "magic"}}, ErrorCode.REQUEST_INVALID, "sae: Input tag 'magic'"),
        ({"job_id": "../x"}, ErrorCode.REQUEST_OUT_OF_RANGE, "job_id: letters"),
        ({"job_id": 5}, ErrorCode.REQUEST_OUT_OF_RANGE, "job_id: letters"),
        ({"max_epochs": 0}, ErrorCode.REQUEST_OUT_OF_RANGE, "max_epochs: Maximum epochs must be between 1 and 100000"),
        (
            {"max_sequence_length": -1},
            ErrorCode.REQUEST_OUT_OF_RANGE,
            "max_sequence_length: Maximum sequence length must be between 4 and 131072",
        ),
        ({"model_name": ""}, ErrorCode.REQUEST_OUT_OF_RANGE, "model_name: String should have at least 1 character"),
    ],
)
def test_a_request_that_cannot_be_accepted_says_why(extra: dict[str, Any], code: ErrorCode, sentence: str) -> None:
    intake = read_json(SEED | extra)
    assert intake.request is None
    assert str(intake.refusal).startswith(sentence)
    assert intake.job_id


def test_a_missing_field_is_named() -> None:
    intake = read_json({"model_name": "gpt2"})
    assert intake.refusal.code is ErrorCode.REQUEST_INVALID
    assert str(intake.refusal) == "corpus_file: Field required"


def test_the_token_is_taken_out_of_the_request_and_shown_nowhere() -> None:
    intake = read_json(SEED | {"huggingface_token": "hf_secret"})
    assert intake.token.get_secret_value() == "hf_secret"
    assert "hf_secret" not in repr(intake)
    assert intake.request.huggingface_token is None


def test_a_token_of_the_wrong_type_is_not_repeated_in_the_refusal() -> None:
    intake = read_json(SEED | {"huggingface_token": ["hf_secret"]})
    assert "hf_secret" not in str(intake.refusal) + intake.refusal.hint


def test_unknown_fields_are_listed() -> None:
    assert read_json(SEED | {"colour": "blue", "sae": {"kind": "topk", "kk": 1}}).unknown == ["colour", "sae.kk"]
