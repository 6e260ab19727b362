"""Texts that share windows: each row is the one of a plain forward pass over the packed tokens, and its own text's."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from mistudio_schemas import CrossEntropy, ErrorCode
from mistudio_train.errors import RequestRefused
from mistudio_train.messages import JobSpec
from mistudio_train.training.extract import Extraction
from mistudio_train.training.run import run_job
from mistudio_train.training.selection import FIRST_TOKEN, HELD_OUT, HIGH_NORM
from mistudio_train.training.tokens import WINDOW, Frame
from tests.models import D_IN, SENTENCES

from .conftest import Listener, load_tiny
from .test_conversations import CONVERSATIONS, chat_model
from .test_extract import RESIDUAL, hidden_states, run
from .test_run import TOPK, hashes, spec
from .test_selection import bits, selected, tokens_of
from .test_spliced import flags_of, hooked, reconstructed, whole_model

Folder = Callable[..., Path]
LENGTH = 24
TEXTS = [f"{SENTENCES[i % 6]} {i}" if i % 4 else f"{i}" for i in range(40)] + [" ".join(SENTENCES)]


def own_tokens(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def packed(tokenizer: Any, texts: list[str], length: int) -> list[list[tuple[int, int]]]:
    """Windows of (token, text), -1 for what belongs to no text: written a second time, token by token."""
    framed, body = tokenizer("ice")["input_ids"], own_tokens(tokenizer, "ice")
    before, after = framed[: framed.index(body[0])], framed[framed.index(body[0]) + len(body) :]
    between = [*after, *before] or [tokenizer.eos_token_id]
    room = length - len(before) - len(after)
    windows: list[list[tuple[int, int]]] = [[]]
    for number, text in enumerate(texts):
        ids = own_tokens(tokenizer, text)
        if ids and windows[-1]:
            if len(windows[-1]) + len(between) < room:
                windows[-1] += [(token, -1) for token in between]
            else:
                windows.append([])
        for token in ids:
            if len(windows[-1]) == room:
                windows.append([])
            windows[-1].append((token, number))
    return [[*((t, -1) for t in before), *window, *((t, -1) for t in after)] for window in windows if window]


def extraction(model: Any, folder: Path, texts: list[str] = TEXTS, **fields: Any) -> Extraction:
    asked: dict[str, Any] = {"pooling": "token", "packing": True, "max_sequence_length": LENGTH}
    return run(model, folder, texts, **asked | fields)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert"])
def test_rows_are_those_of_a_plain_forward_pass_over_the_packed_tokens_each_of_its_own_text(
    model_folder: Folder, tmp_path: Path, family: str
) -> None:
    folder = model_folder(family)
    model = load_tiny(folder, [RESIDUAL])
    result = extraction(model, tmp_path)
    store, windows = result.stores[RESIDUAL], packed(model.tokenizer, TEXTS, LENGTH)
    assert result.corpus.windows == len(windows)
    assert all(len(window) >= LENGTH - 2 for window in windows[:-1])
    rows: list[Tensor] = []
    texts: list[int] = []
    tokens: list[int] = []
    for window in windows:
        states = hidden_states(folder, family, 1, [token for token, _ in window])
        mine = [place for place, (_, text) in enumerate(window) if text >= 0]
        rows.append(states[mine])
        texts += [window[place][1] for place in mine]
        tokens += [window[place][0] for place in mine]
    assert store.text_of_row[:].tolist() == texts == sorted(texts)
    assert store.token_of_row[:].tolist() == tokens
    assert tokens == [token for text in TEXTS for token in own_tokens(model.tokenizer, text)]
    torch.testing.assert_close(store.read(0, store.rows), torch.cat(rows), atol=1e-4, rtol=0)
    for number in range(len(TEXTS)):
        own = store.rows_of_text(number)
        assert set(store.text_of_row[own].tolist()) <= {number}
        assert store.position_of_row[own].tolist() == list(range(own.stop - own.start))
    assert (result.corpus.texts, result.corpus.rows, result.corpus.tokens) == (len(TEXTS), len(tokens), len(tokens))


def windows_of(folder: Path, texts: list[str], length: int, **rules: Any) -> list[tuple[str, int, bool]]:
    """Each window's tokens as text, its first row, and whether it begins with one; the separator is a bar."""
    separator = rules.pop("separator", (ord("|"),))
    tokens = tokens_of(folder, texts, length=length, separator=separator, no_rows=frozenset(separator), **rules)
    windows = tokens.windows.read(0, len(tokens.windows))
    assert windows["real"].sum() == tokens.corpus.rows == sum(map(len, texts))
    ids = [tokens.ids.read(int(w["start"]), int(w["start"] + w["length"])) for w in windows]
    found = ["".join(map(chr, one)) for one in ids]
    return list(zip(found, windows["row"].tolist(), windows["leads"].tolist(), strict=True))


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["abc", "de", "f"], [("abc|de|f", 0, True)]),
        (["abcdefgh", "ij"], [("abcdefgh", 0, True), ("ij", 8, True)]),
        (["abcdefg", "hi"], [("abcdefg", 0, True), ("hi", 7, True)]),  # no separator at a window's end
        (["abcdef", "ghij"], [("abcdef|g", 0, True), ("hij", 7, True)]),
        (["abc", "", "de"], [("abc|de", 0, True)]),
        (["a", "bcdefghijklmnopqr", "s"], [("a|bcdefg", 0, True), ("hijklmno", 7, True), ("pqr|s", 15, True)]),
    ],
)
def test_windows_are_filled_and_separators_stand_only_between_texts(
    tmp_path: Path, texts: list[str], expected: list[Any]
) -> None:
    assert windows_of(tmp_path, texts, 8) == expected


def test_a_window_that_is_framed_begins_with_no_row(tmp_path: Path) -> None:
    made = windows_of(tmp_path, ["abc", "defgh"], 8, frame=Frame((1,), (2,)), separator=(2, 1))
    assert made == [("abc\2\1d", 0, False), ("efgh", 4, False)]


def test_texts_that_are_taken_one_by_one_or_together_are_packed_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["abcdefghij"[: 1 + i % 10] for i in range(100)]
    together = windows_of(tmp_path / "a", texts, 16)
    monkeypatch.setattr("mistudio_train.training.tokenization.TEXTS_AT_ONCE", 1)
    assert windows_of(tmp_path / "b", texts, 16) == together


def test_a_token_budget_takes_whole_texts_and_the_last_window_is_as_long_as_they_are(
    model_folder: Folder, tmp_path: Path
) -> None:
    model = load_tiny(model_folder("gpt2"), [RESIDUAL])
    lengths = [len(own_tokens(model.tokenizer, text)) for text in TEXTS]
    result = extraction(model, tmp_path, token_budget=sum(lengths[:5]) + 1)
    assert (result.corpus.texts, result.corpus.tokens) == (5, sum(lengths[:5]))
    assert result.corpus.windows == len(packed(model.tokenizer, TEXTS[:5], LENGTH))


def test_the_first_token_of_a_window_is_found_also_within_a_text(tmp_path: Path) -> None:
    texts = ["abcdefghijkl"[: 3 + i % 9] + str(i) for i in range(60)]
    rules: dict[str, Any] = {"separator": (ord("|"),), "no_rows": frozenset({ord("|")})}
    expected = [row for _, row, _ in windows_of(tmp_path / "again", texts, 8)]
    assert bits(selected(tmp_path, texts, **rules), FIRST_TOKEN).tolist() == expected


def test_a_tokenizer_without_any_token_for_between_is_refused(model_folder: Folder, tmp_path: Path) -> None:
    model = load_tiny(model_folder("gpt2"), [RESIDUAL])
    model.tokenizer.eos_token = model.tokenizer.bos_token = None
    with pytest.raises(RequestRefused, match="no token to put between") as caught:
        extraction(model, tmp_path)
    assert caught.value.code is ErrorCode.REQUEST_INVALID


def packed_job(folder: Path, workspace: Path, texts: list[str], **fields: Any) -> JobSpec:
    asked: dict[str, Any] = {
        "pooling": "token", "packing": True, "sae": TOPK, "layer_number": 2, "held_out": 0.3, "max_sequence_length": 32
    }  # fmt: skip
    return spec(folder, workspace, texts, **asked | fields)


MANY = [f"{SENTENCES[i % 6]} {i}" for i in range(120)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cross_entropy_is_of_the_held_out_texts_alone_though_they_share_windows(
    model_folder: Folder, tmp_path: Path, family: str
) -> None:
    """Against the whole model with a plain hook: rows of training texts stay, and nothing of theirs is predicted."""
    folder = model_folder(family)
    one = packed_job(folder, tmp_path / "job", MANY)
    measured = CrossEntropy.model_validate(run_job(one, Listener()).saes[0].metrics.cross_entropy)
    model, tokenizer = whole_model(folder, family), transformers.AutoTokenizer.from_pretrained(folder)
    flags, row = flags_of(one), 0
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "clean": lambda x: x, "spliced": lambda x: reconstructed(one, x), "zero": torch.zeros_like,
    }  # fmt: skip
    sums, predicted, mixed = dict.fromkeys(ways, 0.0), 0, 0
    for window in packed(tokenizer, MANY, 32):
        of_row = np.array([text >= 0 for _, text in window])
        mine = np.zeros(len(window), np.uint8)
        mine[of_row] = flags[row : (row := row + int(of_row.sum()))]
        held_out = mine & HELD_OUT != 0
        if not held_out.any():
            continue
        mixed += not held_out[of_row].all()
        judged = torch.from_numpy(held_out & (mine & (FIRST_TOKEN | HIGH_NORM) == 0))
        ids = torch.tensor([[token for token, _ in window]])
        targets = torch.where(torch.from_numpy(held_out), ids[0], -100)[1:]
        predicted += int((targets != -100).sum())
        for way, change in ways.items():

            def where(x: Tensor, change: Any = change, judged: Tensor = judged) -> Tensor:
                replaced = x.clone().reshape(-1, D_IN)
                replaced[judged] = change(replaced[judged])
                return replaced.reshape(x.shape)

            with torch.no_grad(), hooked(model, family, where):
                logits = model(ids).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
            sums[way] += float(loss) if (targets != -100).any() else 0.0
    assert row == len(flags)
    assert mixed > 10
    assert measured.tokens == predicted
    for way, total in sums.items():
        assert getattr(measured, way) == pytest.approx(total / predicted, rel=1e-4), way
    assert measured.spliced != measured.clean


def test_held_out_are_the_same_texts_as_without_packing(model_folder: Folder, tmp_path: Path) -> None:
    held_out = []
    for packing in (False, True):
        one = packed_job(model_folder("gpt2"), tmp_path / str(packing), MANY, packing=packing)
        run_job(one, Listener())
        starts = np.fromfile(one.scratch / "tokens" / "row_starts.bin", np.int64)
        held_out.append([int(flags_of(one)[a] & HELD_OUT) for a, b in pairwise(starts) if b > a])
    assert held_out[0] == held_out[1]
    assert 20 < sum(held_out[0]) < 50


def test_the_same_request_gives_the_same_files_and_packing_other_ones(model_folder: Folder, tmp_path: Path) -> None:
    made = []
    for name, packing in (("a", True), ("b", True), ("c", False)):
        one = packed_job(model_folder("llama"), tmp_path / name, MANY, packing=packing)
        run_job(one, Listener())
        made.append(hashes(one.output)["sae/sae_weights.safetensors"])
    assert made[0] == made[1] != made[2]


def test_conversations_are_packed_as_the_template_ends_and_begins_them(tmp_path: Path) -> None:
    model = chat_model(tmp_path / "model")
    lines = [json.dumps({"messages": one}) for one in CONVERSATIONS]
    fields = {"corpus_file": "c.jsonl", "corpus_holds": "conversations"}
    one = packed_job(model, tmp_path / "job", lines, **fields)
    corpus = run_job(one, Listener()).corpus
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model)
    stream: list[int] = []
    for chat in CONVERSATIONS:
        stream += tokenizer.apply_chat_template(chat, return_dict=False)
    windows = np.fromfile(one.scratch / "tokens" / "windows.bin", WINDOW)
    ids = np.fromfile(one.scratch / "tokens" / "tokens.bin", np.int32)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert all(ids[start] != bos for start in windows["start"])  # the frame has it
    assert [i for i in ids if i != bos] == [i for i in stream if i != bos]
    assert corpus.rows == sum(token not in (bos, eos) for token in stream)
    assert corpus.windows == len(windows) <= -(-len(ids) // 31) + 1


def test_memory_does_not_grow_with_the_texts_that_are_packed(tmp_path: Path) -> None:
    """One window is open at a time, and nothing of those before it is held."""
    from mistudio_train.training.packing import Packing
    from mistudio_train.training.tokens import Rules

    packing = Packing(Rules("token", False, 64, Frame((), ()), separator=(1,)))
    text, own = np.arange(40, dtype="<i4"), np.ones(40, bool)
    for _ in range(1000):
        packing.place(text, own)
    assert {type(value) for value in vars(packing._open).values()} <= {int, bool}
    assert vars(packing).keys() == {"_rules", "_separator", "_written", "_rows", "_open"}
