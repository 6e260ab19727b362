"""`docs/sae.md` lists every field of every kind as the contract has it: default, range, meaning."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic.fields import FieldInfo

from mistudio_schemas import KINDS, SAEConfig, SAEFields, ScheduledFields, TrainRequested

ROW_FIELDS = (
    "pooling", "max_sequence_length", "packing", "include_special_tokens", "token_budget", "held_out", "left_out",
    "high_norm_ratio", "shuffle_bytes", "cross_entropy_tokens",
)  # fmt: skip
"""Of the request: which rows there are, which are trained on, and which the SAEs are judged by."""
PAGE = Path(__file__).parents[1] / "docs" / "sae.md"
MODELS: dict[str, type[SAEFields]] = {
    model.model_fields["kind"].default: model for model in get_args(get_args(SAEConfig)[0])
}


def rows_of(section: str) -> list[str]:
    """The table's rows under a heading, without those above the line."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"docs/sae.md has no section '{section}'"
    return [line for line in found[1].splitlines() if line.startswith("| `")]


def row(name: str, field: FieldInfo) -> str:
    """As the page should say it."""
    description = " ".join((field.description or "").split())
    return f"| `{name}` | {default(field.default)} | {limits(field.metadata)} | {description} |"


def default(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(default(item) for item in value)
    return "`null`" if value is None else f"`{value}`" if isinstance(value, str) else f"{value}"


SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "entries ≥", "max_length": "entries ≤"}


def limits(metadata: list[Any]) -> str:
    found = [(sign, getattr(limit, name)) for limit in metadata for name, sign in SIGNS.items() if hasattr(limit, name)]
    return ", ".join(f"{sign} {'2⁶³ - 1' if value == 2**63 - 1 else value}" for sign, value in found)


def own_fields(model: type[SAEFields]) -> dict[str, FieldInfo]:
    """Those that a kind has beside the shared ones, or that mean something else there."""
    shared = {name: field.description for name, field in ScheduledFields.model_fields.items()}
    return {
        name: field
        for name, field in model.model_fields.items()
        if name != "kind" and shared.get(name) != field.description
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_kinds_own_fields_are_those_of_the_contract(kind: str) -> None:
    assert issubclass(MODELS[kind], ScheduledFields)
    assert rows_of(f"`{kind}`") == [row(name, field) for name, field in own_fields(MODELS[kind]).items()]


def test_the_fields_of_all_kinds_are_those_of_the_contract() -> None:
    assert rows_of("Every kind") == [row(name, field) for name, field in SAEFields.model_fields.items()]


def test_the_fields_of_schedule_and_start_are_those_of_the_contract() -> None:
    scheduled = {
        name: field for name, field in ScheduledFields.model_fields.items() if name not in SAEFields.model_fields
    }
    assert rows_of("Schedule, start and dead latents") == [row(name, field) for name, field in scheduled.items()]


def test_the_requests_fields_that_choose_rows_are_those_of_the_contract() -> None:
    assert rows_of("The rows") == [row(name, TrainRequested.model_fields[name]) for name in ROW_FIELDS]
