"""The page's HTML, out of one template whose every value is escaped, with style and script inside and a policy that
lets nothing else run and nothing be fetched.

Owns markup and policy; decides no figure.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import jinja2
from markupsafe import Markup

from .charts import Chart
from .figures import Figure, ProbeRow, SweepRow

HERE: Final = Path(__file__).parent


@dataclass(frozen=True)
class Head:
    """What the page is of."""

    title: str
    subtitle: str
    footer: str


@dataclass(frozen=True)
class Index:
    """Of each feature with a card, in the order of the cards: numbers to sort by, and where its card is."""

    total: int
    """Features of the SAE."""
    rows_are: str
    """`tokens` or `texts`."""
    feature: list[int]
    rate: list[float]
    begins: list[int]
    """Of each pack: which card is its first."""


@dataclass(frozen=True)
class Page:
    """All that is on it."""

    head: Head
    tiles: Sequence[Figure]
    asked: Sequence[tuple[str, str]]
    warnings: Sequence[str]
    curves: Sequence[Chart]
    judged_by: str
    figures: Sequence[Figure]
    spreads: Sequence[Chart]
    sweep: Sequence[SweepRow]
    frontier: Chart | None
    probed: Sequence[ProbeRow]
    """By a column of labels; the first row is the mean of all."""
    features_note: str
    index: Index
    packs: Sequence[str]
    load_lines: str
    request_json: str


def rendered(page: Page) -> str:
    """The HTML."""
    style, script = _asset("page.css"), _asset("page.js")
    fields: dict[str, Any] = {name: getattr(page, name) for name in Page.__dataclass_fields__}
    return _template().render(
        **fields,
        sections=_sections(page),
        index_json=_json_in_html(asdict(page.index)),
        style=Markup(style),  # noqa: S704
        script=Markup(script),  # noqa: S704
        style_hash=_sha256(style),
        script_hash=_sha256(script),
    )


def _sections(page: Page) -> list[tuple[str, str]]:
    wanted: list[tuple[str, str, object]] = [
        ("outcome", "Outcome", True),
        ("warnings", "Warnings", page.warnings),
        ("curves", "Training", page.curves),
        ("evaluation", "Evaluation", True),
        ("sweep", "All SAEs", page.sweep),
        ("probing", "Probing", page.probed),
        ("features", "Features", True),
        ("files", "Files", True),
    ]
    return [(place, name) for place, name, there in wanted if there]


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, auto_reload=False
    )
    return environment.get_template("page.html")


@cache
def _asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _json_in_html(value: object) -> Markup:
    """JSON that no HTML parser takes for anything else."""
    plain = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(plain.replace("<", "\\u003c"))  # noqa: S704


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
