"""`docs/corpora.md` lists every field that says what of a corpus becomes a text, as the contract has it."""

from pathlib import Path

from mistudio_schemas import CorpusInfo, TrainRequested

from .test_sae_page import row

PAGE = (Path(__file__).parents[1] / "docs" / "corpora.md").read_text()
FIELDS = ("corpus_column", "label_column", "corpus_holds", "min_text_characters", "max_text_characters")


def test_the_fields_are_those_of_the_contract() -> None:
    section = PAGE.split("## Fields of the request")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert rows == [row(name, TrainRequested.model_fields[name]) for name in FIELDS]


def test_every_count_of_texts_is_named() -> None:
    assert all(f"`{name}`" in PAGE for name in CorpusInfo.model_fields if name.startswith("texts"))
