"""`docs/sae.md` lists every field of every kind as the contract has it: default, range, meaning."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic.fields import FieldInfo

from mistudio_schemas import KINDS, SAEConfig, SAEFields

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
    return f"| `{name}` | {default(field.default)} | {limits(field.metadata)} | {field.description} |"


def default(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(default(item) for item in value)
    return "`null`" if value is None else f"{value}"


SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "entries ≥", "max_length": "entries ≤"}


def limits(metadata: list[Any]) -> str:
    found = [(sign, getattr(limit, name)) for limit in metadata for name, sign in SIGNS.items() if hasattr(limit, name)]
    return ", ".join(f"{sign} {'2⁶³ - 1' if value == 2**63 - 1 else f'{value:g}'}" for sign, value in found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kinds_own_fields_are_those_of_the_contract(kind: str) -> None:
    own = {name: field for name, field in MODELS[kind].model_fields.items() if name not in SAEFields.model_fields}
    assert rows_of(f"`{kind}`") == [row(name, field) for name, field in own.items() if name != "kind"]


def test_the_fields_of_all_kinds_are_those_of_the_contract() -> None:
    assert rows_of("Every kind") == [row(name, field) for name, field in SAEFields.model_fields.items()]
