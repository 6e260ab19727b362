"""Every corpus format, whole and broken: what is read, what is dropped, and where an error points."""

import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from mistudio_schemas import ErrorCode
from mistudio_train.errors import CorpusRefused
from mistudio_train.training import corpus
from mistudio_train.training.corpus import CorpusRules, open_corpus
from mistudio_train.training.texts import Dropped, Texts

EXPECTED = ["one", 'two, "2"', "três\tお"]


def parquet_bytes(columns: dict[str, list[object]]) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue())


FILES: dict[str, bytes] = {
    "a.txt": 'one\n\ntwo, "2"\r\n   \ntrês\tお'.encode(),
    "b.csv": 'id,text\n1,one\n2,\n3,"two, ""2"""\n4,  \n5,três\tお\n'.encode(),
    "c.json": json.dumps(["one", "", 'two, "2"', " ", "três\tお"]).encode(),
    "d.json": json.dumps([{"id": 1, "text": t} for t in ["one", None, 'two, "2"', "", "três\tお"]]).encode(),
    "e.json": json.dumps(
        {"of": "us", "rows": [{"body": t} for t in ["one", "", 'two, "2"', " ", "três\tお"]]}
    ).encode(),
    "f.jsonl": b"\n".join(
        json.dumps(row).encode() for row in [{"text": "one"}, {"text": ""}, 'two, "2"', {"text": None}, "três\tお"]
    ),
    "g.parquet": parquet_bytes({"n": [1, 2, 3, 4, 5], "text": ["one", None, 'two, "2"', "", "três\tお"]}),
}


def refused(folder: Path, name: str, content: bytes, column: str | None = None) -> CorpusRefused:
    with pytest.raises(CorpusRefused) as caught:
        read(folder, name, content, column)
    assert caught.value.hint
    return caught.value


def read(folder: Path, name: str, content: bytes, column: str | None = None) -> Texts:
    path = folder / "corpus"
    path.write_bytes(content)
    return open_corpus({name: path}, folder / "scratch", CorpusRules(column))


@pytest.mark.parametrize("pack", [lambda b: b, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_its_texts_in_order_and_counts_the_empty_ones(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes]
) -> None:
    content = pack(FILES[name])
    texts = read(tmp_path, name if content == FILES[name] else f"{name}.gz", content)
    assert list(texts) == EXPECTED
    assert [texts[i] for i in (2, 0, 1)] == [EXPECTED[i] for i in (2, 0, 1)]
    assert (len(texts), texts.dropped) == (3, Dropped(empty=2))
    assert texts.sha256 == hashlib.sha256(content).hexdigest()


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name in ("a.txt", "c.json", "f.jsonl"):
        assert next(iter(read(tmp_path, name, b"\xef\xbb\xbf" + FILES[name]))) == "one"


def test_more_texts_than_are_read_at_once_come_in_order(tmp_path: Path) -> None:
    lines = [f"text {i}" for i in range(300)]
    assert list(read(tmp_path, "a.txt", "\n".join(lines).encode())) == lines


def test_a_text_that_is_not_there_is_an_index_error(tmp_path: Path) -> None:
    texts = read(tmp_path, "a.txt", b"one")
    with pytest.raises(IndexError, match="text 1 of 1"):
        texts[1]


@pytest.mark.parametrize(
    ("name", "content", "column", "expected"),
    [
        ("a.csv", b"n,body\n1,x\n2,y\n", None, ["x", "y"]),
        ("a.csv", b"body\nx\n7\n", None, ["x", "7"]),
        ("a.csv", b"text,body\nx,y\n", "body", ["y"]),
        ("a.csv", b'body\n"x\ny"\n', None, ["x\ny"]),
        ("a.jsonl", b'{"n":1,"body":"x"}\n{"body":"y"}', None, ["x", "y"]),
        ("a.json", b'{"text":["x","y"],"other":["z"]}', None, ["x", "y"]),
        ("a.json", b'{"text":["x","y"],"other":["z"]}', "other", ["z"]),
        ("a.json", b'{"data":[{"body":"x","title":"t"}]}', "body", ["x"]),
        ("a.parquet", parquet_bytes({"n": [1], "body": ["x"]}), None, ["x"]),
        ("a.parquet", parquet_bytes({"title": ["t"], "body": ["x"]}), "body", ["x"]),
    ],
)
def test_the_column_is_the_named_or_the_obvious_one(
    tmp_path: Path, name: str, content: bytes, column: str | None, expected: list[str]
) -> None:
    assert list(read(tmp_path, name, content, column)) == expected


@pytest.mark.parametrize(
    ("name", "content", "where", "why"),
    [
        ("a.txt", b"one\ntw\xff\n", "a.txt, line 2:", "0xff is not UTF-8"),
        ("a.txt", "one\n".encode("utf-16"), "line 1:", "not UTF-8"),
        ("a.csv", b"text\nx,y\n", "line 2:", "2 fields where the header has 1"),
        ("a.csv", b'text\none\n"two', "line 3:", "unexpected end"),
        ("a.jsonl", b'"one"\n{"text": ', "line 2:", "no JSON"),
        ("a.jsonl", b'"one"\n\n{"text": 3}', "line 3:", "not int"),
        ("a.jsonl", b'"one"\n[1]', "line 2:", "not list"),
        ("a.jsonl", b'"\\ud800"', "line 1:", "surrogate"),
        ("a.json", b'["one",\n"two"', "line 2:", "no JSON"),
        ("a.json", b'["one",\n"\xfe"]', "line 2:", "not UTF-8"),
        ("a.json", b'["one", 2]', "item 2:", "not int"),
        ("a.json", b'"one"', "a.json:", "neither a list"),
        ("a.json", b"[" * 100_000, "a.json:", "nested too deeply"),
        ("a.parquet", b"PAR1 nothing", "a.parquet:", "no readable parquet"),
        ("a.txt.gz", gzip.compress(b"one\n" * 99, mtime=0)[:-9], "a.txt.gz:", "gzip stream is broken"),
        ("a.txt.gz", b"one", "a.txt.gz:", "gzip stream is broken"),
        ("a.jsonl.gz", gzip.compress(b'"one"\n{', mtime=0), "a.jsonl.gz, line 2:", "no JSON"),
        ("a.pdf", b"one", "a.pdf", "no known corpus format"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(
    tmp_path: Path, name: str, content: bytes, where: str, why: str
) -> None:
    error = refused(tmp_path, name, content)
    assert error.code is ErrorCode.CORPUS_UNREADABLE
    assert where in str(error)
    assert why in str(error)


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.csv", b"title,body\nt,x\n", None, "line 1: the column of the texts is not obvious among 'title', 'body'"),
        ("a.csv", b"title,body\nt,x\n", "text", "there is no column 'text', only 'title', 'body'"),
        ("a.jsonl", b'{"title":"t","body":"x"}', None, "line 1: the column of the texts is not obvious"),
        ("a.jsonl", b'{"body":"x"}\n{"n":1}', None, "line 2: there is no column 'body', only 'n'"),
        ("a.json", b'{"x":["t"],"y":["x"]}', None, "not obvious among 'x', 'y'"),
        ("a.parquet", parquet_bytes({"n": [1]}), None, "not obvious among 'n'"),
        ("a.parquet", parquet_bytes({"n": [1], "text": ["x"]}), "n", "there is no column 'n', only 'text'"),
    ],
)
def test_a_column_that_cannot_be_told_is_refused_with_those_there_are(
    tmp_path: Path, name: str, content: bytes, column: str | None, message: str
) -> None:
    error = refused(tmp_path, name, content, column)
    assert error.code is ErrorCode.CORPUS_COLUMN
    assert message in str(error)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", b""), ("a.txt", b"\n \n"), ("a.csv", b"text\n"), ("a.json", b"[]"), ("a.jsonl", b""),
     ("a.parquet", parquet_bytes({"text": pa.array([], pa.string())}))],
)  # fmt: skip
def test_an_empty_corpus_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    assert refused(tmp_path, name, content).code is ErrorCode.CORPUS_EMPTY


def test_a_large_json_document_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MAX_JSON_BYTES", 64)
    assert ".jsonl" in refused(tmp_path, "a.json", json.dumps(["x" * 64]).encode()).hint


def test_an_endless_line_is_refused_before_it_fills_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MAX_LINE_BYTES", 64)
    assert "line 2: longer than" in str(refused(tmp_path, "a.txt", b"x\n" + b"y" * 99))


def test_reading_a_corpus_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    code = (
        "import sys; from pathlib import Path; from mistudio_train.training.corpus import open_corpus;"
        f"open_corpus({{'a.txt': Path({str(tmp_path / 'a.txt')!r})}}, Path({str(tmp_path / 's')!r}));"
        "sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["a.txt", "b.csv", "c.json", "f.jsonl", "g.parquet", "h.txt.gz"])
def test_a_file_that_may_not_be_read_is_refused_with_what_to_do(unprivileged: Path, name: str) -> None:
    path = unprivileged / name
    path.touch(0)
    with pytest.raises(CorpusRefused, match=f"may not read {name}") as caught:
        open_corpus({name: path}, unprivileged / "scratch")
    assert caught.value.code is ErrorCode.CORPUS_NOT_ALLOWED
    assert "Let its user read" in caught.value.hint


def test_a_damaged_parquet_file_is_a_corpus_that_cannot_be_read(tmp_path: Path) -> None:
    texts = [f"text {number} {hashlib.sha256(bytes([number % 256])).hexdigest()}" for number in range(5000)]
    good = parquet_bytes({"text": list(texts)})
    refused = 0
    for at in range(100, len(good) - 100, len(good) // 40):
        (tmp_path / "p.parquet").write_bytes(
            good[:at] + bytes(byte ^ 0xFF for byte in good[at : at + 16]) + good[at + 16 :]
        )
        try:
            open_corpus({"p.parquet": tmp_path / "p.parquet"}, tmp_path / f"scratch-{at}")
        except CorpusRefused:
            refused += 1
    assert refused > 20


def test_reading_says_how_far_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\n" * 5000)
    said: list[int] = []
    open_corpus({"a.txt": tmp_path / "a.txt"}, tmp_path / "scratch", on_texts=said.append)
    assert said == [0, 1000, 2000, 3000, 4000]


def test_long_texts_are_not_read_many_at_once(tmp_path: Path) -> None:
    lines = ["x" * (3 * 1024**2), "short", "y" * (3 * 1024**2), "z" * (6 * 1024**2), "end"]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    texts = open_corpus({"a.txt": tmp_path / "a.txt"}, tmp_path / "scratch")
    assert list(texts) == lines
    assert list(texts.first(2)) == lines[:2]


LENGTHS = ["a", "bb", "", "ccc", "dddd", "  ", "eé☃𝄞", "fffff"]


@pytest.mark.parametrize(
    ("least", "most", "kept", "dropped"),
    [
        (None, None, ["a", "bb", "ccc", "dddd", "eé☃𝄞", "fffff"], Dropped(empty=2)),
        (3, None, ["ccc", "dddd", "eé☃𝄞", "fffff"], Dropped(empty=2, too_short=2)),
        (None, 3, ["a", "bb", "ccc"], Dropped(empty=2, too_long=3)),
        (2, 4, ["bb", "ccc", "dddd", "eé☃𝄞"], Dropped(empty=2, too_short=1, too_long=1)),
    ],
)
def test_texts_outside_the_asked_lengths_in_characters_are_dropped_and_counted_by_reason(
    tmp_path: Path, least: int | None, most: int | None, kept: list[str], dropped: Dropped
) -> None:
    (tmp_path / "a.txt").write_text("\n".join(LENGTHS))
    texts = open_corpus({"a.txt": tmp_path / "a.txt"}, tmp_path / "scratch", CorpusRules(None, least, most))
    assert (list(texts), texts.dropped) == (kept, dropped)
    assert len(texts) + texts.dropped.total == len(LENGTHS)


def test_a_filter_that_keeps_nothing_is_refused_with_the_counts_and_what_to_change(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(LENGTHS))
    with pytest.raises(CorpusRefused, match=r"2 empty, 5 too short, 1 too long") as caught:
        open_corpus({"a.txt": tmp_path / "a.txt"}, tmp_path / "scratch", CorpusRules(None, 5, 4))
    assert caught.value.code is ErrorCode.CORPUS_EMPTY
    assert "min_text_characters" in caught.value.hint
