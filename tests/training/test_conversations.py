"""Conversations become texts by the model's chat template: which rows they give, and what is refused where."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import transformers
from pyarrow import parquet

from mistudio_schemas import ErrorCode
from mistudio_train.errors import CorpusRefused, ModelRefused
from mistudio_train.messages import JobSpec
from mistudio_train.training.conversations import ChatTemplate
from mistudio_train.training.corpus import CorpusRules, open_corpus
from mistudio_train.training.run import run_job
from mistudio_train.training.texts import Dropped
from tests.models import SENTENCES, tiny_model

from .conftest import Listener
from .test_run import TOPK, hashes, spec

Folder = Callable[..., Path]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if loop.index0 > 0 and message['role'] == messages[loop.index0 - 1]['role'] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ message['role'] + ': ' + message['content'] + eos_token + ' ' }}{% endfor %}"
)
PLAIN = TEMPLATE.removeprefix("{{ bos_token }}")


def chat_model(folder: Path, family: str = "llama", template: str | None = TEMPLATE) -> Path:
    tiny_model(family, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def said(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


CONVERSATIONS = [said(*(f"{SENTENCES[(i + k) % 6]} {i}" for k in range(1 + i % 4))) for i in range(40)]


def chat_spec(model: Path, workspace: Path, conversations: list[Any] = CONVERSATIONS, **fields: Any) -> JobSpec:
    asked: dict[str, Any] = {"corpus_file": "c.jsonl", "corpus_holds": "conversations", "pooling": "token", "sae": TOPK}
    return spec(model, workspace, [json.dumps({"id": 1, "messages": one}) for one in conversations], **asked | fields)


def tokens_in(one: JobSpec, name: str = "token_of_row.bin") -> list[int]:
    raw = bytearray((one.scratch / "tokens" / name).read_bytes())
    return torch.frombuffer(raw, dtype=torch.int32).tolist()


def reading(folder: Path, name: str, content: bytes, column: str | None = None) -> list[Any]:
    """What a template that repeats what it is given makes of a file."""
    (folder / "file").write_bytes(content)
    texts = open_corpus({name: folder / "file"}, folder / "scratch", CorpusRules(column, render=json.dumps))
    return [json.loads(text) for text in texts]


def parquet_bytes(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue())


TWO = [said("a", "b"), said("c")]
LINES = b"\n".join(json.dumps({"messages": one, "tags": ["x"]}).encode() for one in TWO)


@pytest.mark.parametrize(
    ("name", "content", "column"),
    [
        ("a.jsonl", LINES, None),
        ("a.jsonl", LINES.replace(b"messages", b"talk"), "talk"),
        ("a.jsonl", b"\n".join(json.dumps(one).encode() for one in TWO), None),
        ("a.json", json.dumps(TWO).encode(), None),
        ("a.json", json.dumps({"data": [{"talk": one} for one in TWO]}).encode(), None),
        ("a.parquet", parquet_bytes(n=[1, 2], messages=TWO), None),
        ("a.parquet", parquet_bytes(tags=[["x"], ["y"]], talk=TWO), None),
        ("a.parquet", parquet_bytes(other=TWO, talk=TWO), "talk"),
    ],
)
def test_conversations_are_read_from_every_format_that_can_hold_them(
    tmp_path: Path, name: str, content: bytes, column: str | None
) -> None:
    assert reading(tmp_path, name, content, column) == TWO


@pytest.mark.parametrize(
    ("name", "content", "column", "message", "code"),
    [
        ("a.txt", b"hello", None, ".txt holds no conversations", ErrorCode.CORPUS_UNREADABLE),
        ("a.csv", b"messages\n[]", None, ".csv holds no conversations", ErrorCode.CORPUS_UNREADABLE),
        ("a.parquet", parquet_bytes(text=["a"]), None, "column of the conversations is not", ErrorCode.CORPUS_COLUMN),
        ("a.parquet", parquet_bytes(messages=["a"]), None, "no column 'messages'", ErrorCode.CORPUS_COLUMN),
        ("a.jsonl", b'{"a": [], "b": []}', None, "line 1: the column of the conversations", ErrorCode.CORPUS_COLUMN),
    ],
)
def test_files_and_columns_that_hold_none_are_refused(
    tmp_path: Path, name: str, content: bytes, column: str | None, message: str, code: ErrorCode
) -> None:
    with pytest.raises(CorpusRefused) as caught:
        reading(tmp_path, name, content, column)
    assert message in str(caught.value)
    assert caught.value.code is code


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("hello", "a conversation (a list of messages) is expected, not str"),
        ([{"role": "user"}], "message 1 needs a text as its content, and has only role"),
        ([*said("a"), {"from": "gpt", "value": "b"}], "message 2 needs a text as its role, and has only from, value"),
        ([{"role": "user", "content": None}], "message 1 needs a text as its content, and has NoneType"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1 needs a text as its content, and has list"),
        ([{"role": 3, "content": "a"}], "message 1 needs a text as its role, and has int"),
        (["a"], "message 1 is no object of role and content, but str"),
        ([*said("a"), *said("b")], "the model's chat template refuses this conversation: roles must alternate"),
    ],
)
def test_a_malformed_conversation_is_refused_with_its_line_before_torch_has_work(
    tmp_path: Path, bad: Any, why: str
) -> None:
    model, listener = chat_model(tmp_path / "model"), Listener()
    with pytest.raises(CorpusRefused) as caught:
        run_job(chat_spec(model, tmp_path / "job", [*TWO, [], bad]), listener)
    assert f"c.jsonl, line 4: {why}" in str(caught.value)
    assert caught.value.code is ErrorCode.CORPUS_UNREADABLE
    assert "{role, content}" in caught.value.hint


def test_a_tokenizer_without_a_template_is_refused(model_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="has no chat template") as caught:
        run_job(chat_spec(model_folder("llama"), tmp_path / "job"), Listener())
    assert caught.value.code is ErrorCode.MODEL_UNSUPPORTED
    assert "corpus_holds" in caught.value.hint


@pytest.mark.parametrize(("family", "template"), [("llama", TEMPLATE), ("llama", PLAIN), ("gpt2", PLAIN)])
@pytest.mark.parametrize("specials", [False, True])
def test_the_tokens_are_the_chat_templates_own_with_one_bos_and_special_ones_are_rows_only_when_asked_for(
    tmp_path: Path, family: str, template: str, specials: bool
) -> None:
    model = chat_model(tmp_path / "model", family, template)
    length = {"max_sequence_length": 64, "include_special_tokens": specials}
    short = [one[:1] for one in CONVERSATIONS]
    one = chat_spec(model, tmp_path / "job", short, **length)
    finished = run_job(one, Listener())
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    expected = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in short]
    assert max(map(len, expected)) <= 64
    assert all(ids.count(tokenizer.eos_token_id) == 1 for ids in expected)
    special = set() if specials else {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert tokens_in(one) == [token for ids in expected for token in ids if token not in special]
    assert finished.corpus.texts == finished.corpus.windows == len(short)
    seen = tokens_in(one, "tokens.bin")
    own = sum(len(ids) for ids in expected) - (len(expected) if template == TEMPLATE else 0)
    assert len(seen) == own  # a template's BOS is the frame of its window, and stands there once


def test_rows_of_a_conversation_are_those_of_a_plain_forward_pass_over_the_templates_tokens(tmp_path: Path) -> None:
    model = chat_model(tmp_path / "model")
    short = [one[:1] for one in CONVERSATIONS[:6]]
    one = chat_spec(model, tmp_path / "job", short, max_sequence_length=64, held_out=0, left_out=[])
    run_job(one, Listener())
    tokenizer, whole = (
        transformers.AutoTokenizer.from_pretrained(model), transformers.AutoModel.from_pretrained(model).eval()
    )  # fmt: skip
    expected = []
    for chat in short:
        ids = torch.tensor([tokenizer.apply_chat_template(chat, return_dict=False)])
        special = torch.isin(ids[0], torch.tensor([tokenizer.bos_token_id, tokenizer.eos_token_id]))
        with torch.no_grad():
            expected.append(whole(ids, output_hidden_states=True).hidden_states[2][0][~special])
    rows = torch.cat(expected)
    shard = next((one.scratch / "activations").rglob("shard-*"))
    found = torch.frombuffer(bytearray(shard.read_bytes()), dtype=torch.float32).reshape(-1, rows.shape[1])
    torch.testing.assert_close(found, rows, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_texts_of_the_bundle_are_rendered_conversations_and_lengths_are_theirs(tmp_path: Path, pooling: str) -> None:
    model = chat_model(tmp_path / "model")
    fields: dict[str, Any] = {"pooling": pooling, "min_text_characters": 40}
    one = chat_spec(model, tmp_path / "job", [*CONVERSATIONS, [], said("hi")], **fields)
    corpus = run_job(one, Listener()).corpus
    bundle = torch.load(one.output / "feature_activations.pt", weights_only=True)
    assert bundle["texts"][0] == f"<s>user: {SENTENCES[0]} 0</s> "
    assert (corpus.texts, corpus.texts_empty, corpus.texts_too_short) == (40, 1, 1)


def test_the_date_that_a_template_writes_is_always_the_same(tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_model(tmp_path / "model"))
    tokenizer.chat_template = (
        "\n  {%- if strftime_now is defined %}Today: {{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d') }}"
        "{% endif %}\n{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    text = ChatTemplate(tokenizer, "m")(said("hello"))
    assert text == "Today: 26 Jul 2024 2024-07-26\nhello".replace("26\n", "26")  # trimmed as transformers trims it
    tokenizer.chat_template = TEMPLATE
    assert ChatTemplate(tokenizer, "m")(said("a")) == tokenizer.apply_chat_template(said("a"), tokenize=False)


def test_the_same_conversations_give_the_same_files_and_another_template_other_weights(tmp_path: Path) -> None:
    made = []
    for name, template in (("a", TEMPLATE), ("b", TEMPLATE), ("c", TEMPLATE + "{{ 'end' }}")):
        one = chat_spec(chat_model(tmp_path / "models" / name, template=template), tmp_path / name)
        run_job(one, Listener())
        made.append(hashes(one.output)["sae/sae_weights.safetensors"])
    assert made[0] == made[1] != made[2]


def test_empty_conversations_are_dropped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"messages": []}\n{"messages": null}\n\n' + json.dumps(said("a")))
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_model(tmp_path / "model"))
    rules = CorpusRules(render=ChatTemplate(tokenizer, "m"))
    texts = open_corpus({"c.jsonl": tmp_path / "c.jsonl"}, tmp_path / "scratch", rules)
    assert (list(texts), texts.dropped) == (["<s>user: a</s> "], Dropped(empty=3))
