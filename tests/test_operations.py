"""What an operator meets at night is on the operations page: every warning of a worker, every code of a failure."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import mistudio_train.worker
from mistudio_schemas import ErrorCode

PAGE = (Path(__file__).parents[1] / "docs" / "operations.md").read_text()
WORKER = Path(mistudio_train.worker.__file__).parent


def warnings() -> Iterator[str]:
    """The texts that the worker logs as warnings and errors."""
    for path in sorted(WORKER.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("logger.warning", "logger.exception"):
                (text, *_) = node.args
                assert isinstance(text, ast.Constant)
                yield str(text.value)


def fixed_part(text: str) -> str:
    """The longest piece of the text that is always the same."""
    return max(re.split(r"%[.0-9]*[a-z]", text), key=len).strip(" :;(),.")


@pytest.mark.parametrize("text", sorted(set(warnings()) - {"job %s: %s"}))
def test_a_warning_is_on_the_page(text: str) -> None:
    assert fixed_part(text) in PAGE


@pytest.mark.parametrize("code", list(ErrorCode))
def test_a_code_is_on_the_page(code: ErrorCode) -> None:
    assert f"`{code}`" in PAGE
