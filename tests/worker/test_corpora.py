"""Corpora by name, by bucket and by folder, and the names that lead elsewhere."""

import os
from pathlib import Path

import pytest

from mistudio_schemas import ErrorCode
from mistudio_train.errors import CorpusRefused
from mistudio_train.settings import Settings
from mistudio_train.worker.corpora import checked_name, fetch_corpus, list_corpora, put_corpus, remove_corpus
from mistudio_train.worker.store import Store, StoreUnavailable, open_store


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "mine.txt"
    path.write_text("one\ntwo\n")
    return path


@pytest.fixture
def samples(store_settings: Settings) -> Path:
    folder = store_settings.data_path / "samples"
    folder.mkdir(parents=True)
    return folder


def code_of(corpus_file: str, to: Path, settings: Settings, store: Store) -> ErrorCode:
    with pytest.raises(CorpusRefused) as raised:
        fetch_corpus(corpus_file, to, settings, store)
    assert raised.value.hint
    assert str(raised.value).isprintable()
    assert not to.exists() or not list(to.iterdir())
    return raised.value.code


@pytest.mark.parametrize(
    "name", ["a.txt", "A b.CSV", "c.json", "d.jsonl", "e.parquet", "f.v2.jsonl.gz", "naïve ☃ 100%.txt.gz"]
)
def test_a_corpus_is_put_listed_fetched_and_removed(
    name: str, corpus: Path, store: Store, store_settings: Settings, tmp_path: Path
) -> None:
    assert put_corpus(store, name, corpus).size == 8
    assert {known: found.size for known, found in list_corpora(store).items()} == {name: 8}
    fetched = fetch_corpus(name, tmp_path / "to", store_settings, store)
    assert fetched.read_text() == "one\ntwo\n"
    assert name.lower().endswith("".join(fetched.suffixes))
    remove_corpus(store, name)
    assert list_corpora(store) == {}
    with pytest.raises(CorpusRefused, match="there is no corpus"):
        remove_corpus(store, name)


@pytest.mark.parametrize(
    "name",
    [
        "../x.txt",
        "/etc/x.txt",
        "a/b.txt",
        "a\\b.txt",
        "a\0.txt",
        "a\n.txt",
        "a\u202etxt.csv",
        "\ud800.txt",
        ".hidden.txt",
        " a.txt",
        "a.txt ",
        "x" * 200 + ".txt",
    ],
)
def test_names_that_lead_out_or_hide_something_are_refused(name: str, corpus: Path, store: Store) -> None:
    for call in (lambda: put_corpus(store, name, corpus), lambda: remove_corpus(store, name)):
        with pytest.raises(CorpusRefused) as raised:
            call()
        assert raised.value.code is ErrorCode.CORPUS_NOT_ALLOWED
        assert str(raised.value).isprintable()
    assert list_corpora(store) == {}


@pytest.mark.parametrize("name", ["", "x", "x.pdf", "x.gz", "x.txt.zip", "x.txt.gz.gz", "txt"])
def test_formats_that_nobody_reads_are_refused(name: str) -> None:
    with pytest.raises(CorpusRefused, match="format") as raised:
        checked_name(name)
    assert ".parquet" in raised.value.hint


def test_two_spellings_of_one_name_are_one_corpus(corpus: Path, store: Store) -> None:
    put_corpus(store, "caf\u00e9.txt", corpus)
    put_corpus(store, "cafe\u0301.txt", corpus)
    assert list(list_corpora(store)) == ["caf\u00e9.txt"]


def test_what_is_no_file_is_not_put(store: Store, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.txt"):
        with pytest.raises(CorpusRefused, match="there is no file"):
            put_corpus(store, "a.txt", path)


def test_a_missing_corpus_is_told_with_its_neighbours(
    corpus: Path, store: Store, store_settings: Settings, tmp_path: Path
) -> None:
    put_corpus(store, "webtext_corpus.txt", corpus)
    with pytest.raises(CorpusRefused, match=r"there is no corpus 'webtext_korpus\.txt'") as raised:
        fetch_corpus("webtext_korpus.txt", tmp_path / "to", store_settings, store)
    assert raised.value.code is ErrorCode.CORPUS_NOT_FOUND
    assert "corpus put" in raised.value.hint
    assert "webtext_corpus.txt?" in raised.value.hint


def test_a_name_is_looked_for_in_the_store_and_then_in_the_folders(
    corpus: Path, samples: Path, store: Store, store_settings: Settings, tmp_path: Path
) -> None:
    (samples / "mine.txt").write_text("local")
    assert fetch_corpus("mine.txt", tmp_path / "to", store_settings, store) == samples / "mine.txt"
    put_corpus(store, "mine.txt", corpus)
    assert fetch_corpus("mine.txt", tmp_path / "to", store_settings, store) == tmp_path / "to" / "corpus.txt"


def test_a_path_in_an_allowed_folder_is_used_in_place(
    samples: Path, store: Store, store_settings: Settings, tmp_path: Path
) -> None:
    (samples / "deep").mkdir()
    (samples / "deep" / "c.jsonl.gz").write_bytes(b"x")
    expected = samples / "deep" / "c.jsonl.gz"
    to = tmp_path / "to"
    assert fetch_corpus(str(expected), to, store_settings, store) == expected
    assert fetch_corpus("deep/c.jsonl.gz", to, store_settings, store) == expected
    assert not to.exists()
    assert code_of(f"{samples}/none.txt", to, store_settings, store) is ErrorCode.CORPUS_NOT_FOUND


def test_a_path_elsewhere_is_not_allowed(samples: Path, store: Store, store_settings: Settings, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("secret")
    (samples / "link.txt").symlink_to(outside)
    (samples / "loop.txt").symlink_to(samples / "loop.txt")
    os.mkfifo(samples / "fifo.txt")
    to = tmp_path / "to"
    for path in (str(outside), "../../outside.txt", f"{samples}/../../outside.txt", f"{samples}/link.txt", "a/\0.txt"):
        assert code_of(path, to, store_settings, store) is ErrorCode.CORPUS_NOT_ALLOWED
    for name in ("link.txt", "fifo.txt", "loop.txt", f"{samples}/fifo.txt"):
        assert code_of(name, to, store_settings, store) in (ErrorCode.CORPUS_NOT_FOUND, ErrorCode.CORPUS_NOT_ALLOWED)


def test_a_path_elsewhere_is_refused_whether_it_exists_or_not(
    store: Store, store_settings: Settings, tmp_path: Path
) -> None:
    for path in ("/etc/hostname.txt", "/nowhere/at/all.txt"):
        assert code_of(path, tmp_path / "to", store_settings, store) is ErrorCode.CORPUS_NOT_ALLOWED


def test_buckets_are_opened_only_when_allowed(worker_settings: Settings, tmp_path: Path) -> None:
    own, other = worker_settings, worker_settings.minio_bucket + "-other"
    allowing = own.model_copy(update={"corpus_buckets": [other]})
    foreign = open_store(own.model_copy(update={"minio_bucket": other}))
    store = open_store(own)
    for one in (foreign, store):
        one.ensure()
        one.put_bytes("some/c.csv", b"text\none\n")
    to = tmp_path / "to"
    assert fetch_corpus(f"s3://{own.minio_bucket}/some/c.csv", to, own, store).read_bytes() == b"text\none\n"
    assert fetch_corpus(f"s3://{other}/some/c.csv", to, allowing, store) == to / "corpus.csv"
    (to / "corpus.csv").unlink()
    refused = ErrorCode.CORPUS_NOT_ALLOWED
    assert code_of(f"s3://{other}/some/c.csv", to, own, store) is refused
    for uri in (
        "s3:///c.csv",
        f"s3://{other}/../{own.minio_bucket}/c.csv",
        f"s3://{other}/a\nb.csv",
        "s3://x/../c.csv",
    ):
        assert code_of(uri, to, allowing, store) is refused
    assert code_of(f"s3://{other}/none.csv", to, allowing, store) is ErrorCode.CORPUS_NOT_FOUND
    gone = own.model_copy(update={"corpus_buckets": ["no-such-bucket"]})
    assert code_of("s3://no-such-bucket/c.csv", to, gone, store) is ErrorCode.CORPUS_NOT_FOUND
    foreign.close()
    store.close()


def test_a_store_that_is_away_is_no_missing_corpus(tmp_path: Path) -> None:
    settings = Settings(store_path=tmp_path / "unmounted", data_path=tmp_path)
    with pytest.raises(StoreUnavailable):
        fetch_corpus("a.txt", tmp_path / "to", settings, open_store(settings))


def test_a_folder_that_may_not_be_read_is_told_with_what_to_do(unprivileged: Path) -> None:
    settings = Settings(data_path=unprivileged / "data", store_path=unprivileged / "store")
    samples = settings.data_path / "samples"
    samples.mkdir(parents=True)
    (samples / "mine.txt").write_text("one\n")
    store = open_store(settings)
    settings.store_path.mkdir()  # type: ignore[union-attr]
    samples.chmod(0)
    with pytest.raises(CorpusRefused) as caught:
        fetch_corpus("mine.txt", unprivileged / "to", settings, store)
    samples.chmod(0o755)
    assert caught.value.code is ErrorCode.CORPUS_NOT_ALLOWED
    assert "Let the worker's user read" in caught.value.hint
