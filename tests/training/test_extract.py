"""Extraction against the plain way of doing it: the whole model, one text at a time, no batching, no early end."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from mistudio_schemas import ErrorCode, HookSite, TrainRequested
from mistudio_train.errors import CorpusRefused, MemoryExhausted, ModelRefused, RequestRefused
from mistudio_train.training import extract as extraction
from mistudio_train.training.extract import Extraction, Kept, extract
from mistudio_train.training.language_model import LanguageModel
from mistudio_train.training.sites import Site
from tests.models import D_IN, FAMILIES, LAYERS, MORE_FAMILIES, SENTENCES, VOCAB

from .conftest import NothingKept, load_tiny, plan_of, texts_of

Folder = Callable[..., Path]
RESIDUAL = Site(1)
LONG = " ".join(SENTENCES)
TEXTS = [SENTENCES[0], "ice", LONG, SENTENCES[1], "a b", SENTENCES[2] + " " + SENTENCES[3]]


def run(
    model: LanguageModel,
    folder: Path,
    texts: Sequence[str] = TEXTS,
    tokens_per_batch: int = 256,
    kept: Kept | None = None,
    **fields: Any,
) -> Extraction:
    request = TrainRequested.model_validate({"model_name": "m", "corpus_file": "c", "max_sequence_length": 48} | fields)
    return extract(
        model,
        texts_of(folder, texts),
        request,
        model.sites,
        plan_of(tokens_per_batch),
        folder,
        kept or NothingKept(),
        lambda *_: None,
    )


def whole_model(folder: Path, family: str) -> Any:
    """The model as the library loads it, with all its blocks."""
    encoders: dict[str, Any] = {"t5": transformers.T5EncoderModel, "mt5": transformers.MT5EncoderModel}
    auto: Any = encoders.get(family, transformers.AutoModel)
    return auto.from_pretrained(folder).eval()


def blocks_of(model: Any, family: str) -> nn.ModuleList:
    paths = {
        "gpt2": "h", "opt": "decoder.layers", "distilbert": "transformer.layer", "t5": "encoder.block",
        "bert": "encoder.layer", "roberta": "encoder.layer", "mpnet": "encoder.layer", "xlm-roberta": "encoder.layer",
        "bloom": "h", "mt5": "encoder.block",
    }  # fmt: skip
    found: nn.ModuleList = model.get_submodule(paths.get(family, "layers"))
    return found


def hidden_states(folder: Path, family: str, layer: int, ids: Sequence[int]) -> Tensor:
    """What comes out of a block in a full forward pass over one sequence: [T, d_in]."""
    seen: list[Tensor] = []
    model = whole_model(folder, family)
    blocks_of(model, family)[layer].register_forward_hook(
        lambda _module, _inputs, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    with torch.no_grad():
        model(input_ids=torch.tensor([list(ids)]))
    return seen[0][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_early_end_equals_the_full_forward_at_every_layer(model_folder: Folder, family: str) -> None:
    folder = model_folder(family)
    sites = [Site(layer) for layer in range(LAYERS)]
    model = load_tiny(folder, sites)
    ids = model.tokenizer(SENTENCES[0])["input_ids"]
    ids_BT = torch.tensor([ids])
    caught = model.activations(ids_BT, torch.ones_like(ids_BT))
    for layer in range(LAYERS):
        expected = hidden_states(folder, family, layer, ids)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(caught[Site(layer)][0], expected, atol=1e-5, rtol=0)


PLACES: dict[str, tuple[str, str, str]] = {
    "gpt2": ("attn", "mlp", "mlp"),
    "gpt_neox": ("attention", "mlp", "mlp"),
    "gemma2": ("post_attention_layernorm", "mlp", "post_feedforward_layernorm"),
    "gemma3_text": ("post_attention_layernorm", "mlp", "post_feedforward_layernorm"),
    "bloom": ("self_attention.dense", "mlp", "mlp.dense_4h_to_h"),
    "opt": ("self_attn", "fc1", "fc2"),
    "bert": ("attention.output.dense", "intermediate.dense", "output.dense"),
    "roberta": ("attention.output.dense", "intermediate.dense", "output.dense"),
    "xlm-roberta": ("attention.output.dense", "intermediate.dense", "output.dense"),
    "distilbert": ("attention", "ffn", "ffn"),
    "mpnet": ("attention.attn", "intermediate.dense", "output.dense"),
    "t5": ("layer.0.SelfAttention", "layer.1.DenseReluDense", "layer.1.DenseReluDense"),
    "mt5": ("layer.0.SelfAttention", "layer.1.DenseReluDense", "layer.1.DenseReluDense"),
}
"""In a block: whose output is the attention's, whose input is the MLP's, and whose output."""
HOOK_SITES: tuple[HookSite, ...] = ("resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in (*FAMILIES, *MORE_FAMILIES)),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("opt", {"do_layer_norm_before": False}),
    ("t5", {"is_gated_act": False}),
]
of_every_family = pytest.mark.parametrize(
    ("family", "fields"), VARIANTS, ids=["-".join([family, *fields]) for family, fields in VARIANTS]
)


def plainly_hooked(folder: Path, family: str, ids_BT: Tensor) -> dict[Site, Tensor]:
    """Every site of every block in one full forward pass of the whole model, by hooks that do nothing else."""
    seen: dict[Site, Tensor] = {}
    model = whole_model(folder, family)

    def keep(site: Site, acts: Any) -> None:
        seen[site] = (acts if isinstance(acts, Tensor) else acts[0]).clone().reshape(*ids_BT.shape, D_IN)

    def before(site: Site, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        keep(site, args[0] if args else kwargs["hidden_states"])

    def after(site: Site, _module: nn.Module, _args: Any, output: Any) -> None:
        keep(site, output)

    attention, mlp_in, mlp_out = PLACES.get(family, ("self_attn", "mlp", "mlp"))
    inputs: list[tuple[HookSite, str]] = [("resid_pre", ""), ("mlp_in", mlp_in)]
    outputs: list[tuple[HookSite, str]] = [("attn_out", attention), ("mlp_out", mlp_out), ("resid_post", "")]
    for layer, block in enumerate(blocks_of(model, family)):
        for hook_site, path in inputs:
            hook = partial(before, Site(layer, hook_site))
            block.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
        for hook_site, path in outputs:
            block.get_submodule(path).register_forward_hook(partial(after, Site(layer, hook_site)))
    with torch.no_grad():
        model(input_ids=ids_BT)
    return seen


@of_every_family
def test_every_site_equals_a_plain_hook_on_the_whole_model(
    model_folder: Folder, family: str, fields: dict[str, Any]
) -> None:
    folder = model_folder(family, **fields)
    every = [Site(layer, hook_site) for layer in range(LAYERS) for hook_site in HOOK_SITES]
    model = load_tiny(folder, every)
    ids_BT = torch.tensor([model.tokenizer(SENTENCES[0])["input_ids"]])
    expected, together = plainly_hooked(folder, family, ids_BT), model.activations(ids_BT, torch.ones_like(ids_BT))
    assert len(expected) == len(every)
    for site in every:
        assert expected[site].abs().max() > 1e-3
        torch.testing.assert_close(together[site], expected[site], atol=1e-5, rtol=0)
    for hook_site in HOOK_SITES:  # cut as early as it can be
        site = Site(2, hook_site)
        alone = load_tiny(folder, [site]).activations(ids_BT, torch.ones_like(ids_BT))[site]
        torch.testing.assert_close(alone, expected[site], atol=1e-5, rtol=0)


@of_every_family
def test_what_goes_into_a_block_needs_neither_its_weights_nor_those_behind(
    model_folder: Folder, family: str, fields: dict[str, Any]
) -> None:
    folder = model_folder(family, **fields)
    before, after = load_tiny(folder, [Site(2, "resid_pre")]), load_tiny(folder, [Site(1)])
    ids_BT = torch.tensor([before.tokenizer(SENTENCES[0])["input_ids"]])
    mask_BT = torch.ones_like(ids_BT)
    acts = before.activations(ids_BT, mask_BT)[Site(2, "resid_pre")]
    torch.testing.assert_close(acts, after.activations(ids_BT, mask_BT)[Site(1)], atol=0, rtol=0)
    blocks = blocks_of(before.trunk, family)
    assert len(blocks) == 3
    assert not list(blocks[2].parameters())
    sizes = [sum(weight.numel() for weight in model.trunk.parameters()) for model in (before, after)]
    assert sizes[0] == sizes[1]
    embedded = load_tiny(folder, [Site(0, "resid_pre")])
    assert not list(blocks_of(embedded.trunk, family).parameters())
    assert embedded.activations(ids_BT, mask_BT)[Site(0, "resid_pre")].shape == acts.shape


def test_what_goes_into_a_block_or_an_mlp_is_named_by_the_module_that_gave_it(model_folder: Folder) -> None:
    given: dict[str, tuple[str | None, str | None, str | None]] = {
        "llama": ("embed_tokens", "layers.1", "layers.2.post_attention_layernorm"),
        "gpt2": ("drop", "h.1", "h.2.ln_2"),
        "phi": ("embed_dropout", "layers.1", "layers.2.input_layernorm"),
        "opt": (None, "decoder.layers.1", "decoder.layers.2.final_layer_norm"),
        "bloom": ("word_embeddings_layernorm", "h.1", "h.2.post_attention_layernorm"),
        "bert": ("embeddings", "encoder.layer.1", "encoder.layer.2.attention"),
        "distilbert": ("embeddings", "transformer.layer.1", "transformer.layer.2.sa_layer_norm"),
        "t5": ("encoder.dropout", "encoder.block.1", "encoder.block.2.layer.1.layer_norm"),
    }
    for family, expected in given.items():
        model = load_tiny(
            model_folder(family), sites := [Site(0, "resid_pre"), Site(2, "resid_pre"), Site(2, "mlp_in")]
        )
        assert tuple(map(model.module_of, sites)) == expected, family


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_hidden_state_of_the_library_is_the_blocks_output(model_folder: Folder, family: str) -> None:
    folder, layer = model_folder(family), 2
    model = load_tiny(folder, [Site(layer)])
    ids = torch.tensor([model.tokenizer(SENTENCES[0])["input_ids"]])
    with torch.no_grad():
        expected = whole_model(folder, family)(input_ids=ids, output_hidden_states=True).hidden_states[layer + 1]
    torch.testing.assert_close(model.activations(ids, torch.ones_like(ids))[Site(layer)], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_behind_the_deepest_site_are_gone_and_never_run(model_folder: Folder, family: str) -> None:
    model = load_tiny(model_folder(family), [Site(0, "mlp_out"), RESIDUAL])
    assert len(blocks_of(model.trunk, family)) == 2
    full = sum(p.numel() for p in whole_model(model_folder(family), family).parameters())
    assert sum(p.numel() for p in model.trunk.parameters()) < full


@pytest.mark.parametrize("family", [*FAMILIES, "bloom", "gemma3_text"])
def test_the_mlps_and_the_attentions_output_are_what_is_added_to_the_residual(
    model_folder: Folder, family: str
) -> None:
    """Where a block adds nothing else and normalises before, not after: out = in + attention + mlp."""
    model = load_tiny(model_folder(family), [Site(0), Site(1, "attn_out"), Site(1, "mlp_out"), Site(1)])
    ids = torch.tensor([model.tokenizer(SENTENCES[0])["input_ids"]])
    acts = model.activations(ids, torch.ones_like(ids))
    attention, mlp = acts[Site(1, "attn_out")], acts[Site(1, "mlp_out")]
    block: Any = blocks_of(model.trunk, family)[1]
    if family in ("bert", "roberta", "mpnet"):
        norm = block.attention.LayerNorm if family == "mpnet" else block.attention.output.LayerNorm
        expected = block.output.LayerNorm(norm(acts[Site(0)] + attention) + mlp)
    elif family == "distilbert":
        middle = block.sa_layer_norm(acts[Site(0)] + attention)
        expected = block.output_layer_norm(middle + mlp)
    else:
        expected = acts[Site(0)] + attention + mlp
    torch.testing.assert_close(acts[Site(1)], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_texts_row_is_the_mean_over_its_own_tokens_alone_and_in_any_batch(
    model_folder: Folder, tmp_path: Path, family: str
) -> None:
    folder = model_folder(family)
    model = load_tiny(folder, [RESIDUAL])
    in_batches = run(model, tmp_path / "batches").stores[RESIDUAL].read(0, len(TEXTS))
    for number, text in enumerate(TEXTS):
        alone = run(model, tmp_path / f"alone-{number}", [text]).stores[RESIDUAL].read(0, 1)[0]
        torch.testing.assert_close(in_batches[number], alone, atol=1e-4, rtol=0)
        encoded = model.tokenizer(text, return_special_tokens_mask=True, truncation=True, max_length=48)
        own = ~torch.tensor(encoded["special_tokens_mask"]).bool()
        expected = hidden_states(folder, family, 1, encoded["input_ids"])[own].mean(0)
        torch.testing.assert_close(alone, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_the_tokenizers_padding_side_changes_nothing(
    model_folder: Folder, tmp_path: Path, family: str, pooling: str
) -> None:
    rows = []
    for side in ("left", "right"):
        model = load_tiny(model_folder(family, padding_side=side), [RESIDUAL])
        assert model.tokenizer.padding_side == side
        store = run(model, tmp_path / side, pooling=pooling).stores[RESIDUAL]
        rows.append(store.read(0, store.rows))
    assert torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("specials", [False, True])
def test_windows_lose_no_token_and_rows_are_in_the_texts_order(
    model_folder: Folder, tmp_path: Path, family: str, specials: bool
) -> None:
    folder = model_folder(family)
    model = load_tiny(folder, [RESIDUAL])
    result = run(model, tmp_path, pooling="token", max_sequence_length=16, include_special_tokens=specials)
    store, frame = result.stores[RESIDUAL], model.tokenizer("ice")["input_ids"]
    body = model.tokenizer("ice", add_special_tokens=False)["input_ids"]
    before, after = frame[: frame.index(body[0])], frame[frame.index(body[0]) + len(body) :]
    width, row, windows = 16 - len(before) - len(after), 0, 0
    for number, text in enumerate(TEXTS):
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = [[*before, *ids[at : at + width], *after] for at in range(0, len(ids), width)]
        windows += len(pieces)
        kept = [piece if specials else piece[len(before) : len(piece) - len(after)] for piece in pieces]
        rows = store.rows_of_text(number)
        assert (rows.start, rows.stop - rows.start) == (row, sum(map(len, kept)))
        assert store.token_of_row[rows].tolist() == [token for piece in kept for token in piece]
        assert store.position_of_row[rows].tolist() == list(range(rows.stop - rows.start))
        assert set(store.text_of_row[rows].tolist()) == {number}
        for piece, own in zip(pieces, kept, strict=True):
            states = hidden_states(folder, family, 1, piece)
            expected = states if specials else states[len(before) : len(piece) - len(after)]
            torch.testing.assert_close(store.read(row, row + len(own)), expected, atol=1e-4, rtol=0)
            row += len(own)
    assert (result.corpus.rows, result.corpus.tokens, result.corpus.windows) == (row, row, windows)
    assert result.corpus.tokens_truncated == 0
    assert windows > len(TEXTS)


def test_a_mean_cuts_long_texts_and_counts_what_it_cut(model_folder: Folder, tmp_path: Path) -> None:
    model = load_tiny(model_folder("bert"), [RESIDUAL])
    result = run(model, tmp_path, max_sequence_length=10)
    lengths = [len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    assert result.corpus.tokens == sum(min(length, 8) for length in lengths)
    assert result.corpus.tokens_truncated == sum(max(0, length - 8) for length in lengths)
    assert (result.corpus.rows, result.corpus.texts, result.corpus.windows) == (len(TEXTS),) * 3
    index = result.stores[RESIDUAL].index
    assert index.text_of_row[:].tolist() == list(range(len(TEXTS)))
    assert set(index.token_of_row[:].tolist()) == set(index.position_of_row[:].tolist()) == {-1}


def test_the_models_own_positions_limit_the_length(model_folder: Folder, tmp_path: Path) -> None:
    for family in ("roberta", "gpt2"):
        model = load_tiny(model_folder(family), [RESIDUAL])
        result = run(model, tmp_path / family, [LONG * 2], max_sequence_length=512, pooling="token")
        assert result.length == 64
        assert result.corpus.windows > 1


def test_special_tokens_count_only_when_asked_for_or_when_there_are_no_others(
    model_folder: Folder, tmp_path: Path
) -> None:
    folder = model_folder("bert")
    model = load_tiny(folder, [RESIDUAL])
    ids = model.tokenizer("ice")["input_ids"]
    states = hidden_states(folder, "bert", 1, ids)
    without = run(model, tmp_path / "a", ["ice"])
    included = run(model, tmp_path / "b", ["ice"], include_special_tokens=True)
    torch.testing.assert_close(without.stores[RESIDUAL].read(0, 1)[0], states[1:-1].mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(included.stores[RESIDUAL].read(0, 1)[0], states.mean(0), atol=1e-5, rtol=0)
    assert (without.corpus.tokens, included.corpus.tokens) == (len(ids) - 2, len(ids))
    # BERT's tokenizer drops control characters: nothing but [CLS] and [SEP] is left of this text.
    bare = run(model, tmp_path / "c", ["ice", "\x07"])
    expected = hidden_states(folder, "bert", 1, [ids[0], ids[-1]]).mean(0)
    torch.testing.assert_close(bare.stores[RESIDUAL].read(1, 2)[0], expected, atol=1e-4, rtol=0)
    by_token = run(model, tmp_path / "d", ["ice", "\x07", "ice"], pooling="token").stores[RESIDUAL]
    assert [by_token.rows_of_text(i) for i in range(3)] == [slice(0, n := len(ids) - 2), slice(n, n), slice(n, 2 * n)]


def test_texts_of_which_the_tokenizer_makes_nothing_are_refused(model_folder: Folder, tmp_path: Path) -> None:
    model = load_tiny(model_folder("bert"), [RESIDUAL])
    with pytest.raises(CorpusRefused) as caught:
        run(model, tmp_path, ["\x07"], pooling="token")
    assert caught.value.code is ErrorCode.CORPUS_EMPTY


def test_the_token_budget_takes_whole_texts_in_order(model_folder: Folder, tmp_path: Path) -> None:
    model = load_tiny(model_folder("llama"), [RESIDUAL])
    lengths = [len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    for pooling in ("mean", "token"):
        two = run(model, tmp_path / pooling, pooling=pooling, token_budget=lengths[0] + lengths[1] + 1)
        assert (two.corpus.texts, two.corpus.tokens) == (2, lengths[0] + lengths[1])
        one = run(model, tmp_path / f"{pooling}-1", pooling=pooling, token_budget=1)
        assert (one.corpus.texts, one.corpus.tokens) == (1, lengths[0])


def test_batches_of_like_length_need_little_padding(model_folder: Folder, tmp_path: Path) -> None:
    model = load_tiny(model_folder("gpt2"), [RESIDUAL])
    texts = [LONG[: 5 + 7 * (i % 20)] for i in range(200)]
    result = run(model, tmp_path, texts)
    assert result.padding < 0.1 * result.corpus.tokens


def test_progress_ends_at_the_total(model_folder: Folder, tmp_path: Path) -> None:
    model = load_tiny(model_folder("bert"), [RESIDUAL])
    request = TrainRequested(model_name="m", corpus_file="c", max_sequence_length=16, pooling="token")
    seen: list[tuple[int, int]] = []
    tokenized: list[tuple[int, int]] = []
    result = extract(
        model, texts_of(tmp_path, TEXTS), request, [RESIDUAL], plan_of(32), tmp_path, NothingKept(),
        lambda *step: seen.append(step), lambda *step: tokenized.append(step),
    )  # fmt: skip
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {total for _, total in seen} == {result.corpus.tokens}
    assert seen[-1][0] == result.corpus.tokens
    assert tokenized[-1] == (len(TEXTS), len(TEXTS))


def starve(model: LanguageModel, most: int) -> list[int]:
    """Make the model run out of memory whenever a batch has more tokens than `most`; returns the batches' sizes."""
    sizes: list[int] = []

    def forward(_module: nn.Module, _inputs: Any, kwargs: dict[str, Any]) -> None:
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    model.trunk.register_forward_pre_hook(forward, with_kwargs=True)
    return sizes


@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_out_of_memory_halves_the_batch_and_keeps_every_row(model_folder: Folder, tmp_path: Path, pooling: str) -> None:
    texts = TEXTS * 10
    expected = run(load_tiny(model_folder("gpt2"), [RESIDUAL]), tmp_path / "whole", texts, 512, pooling=pooling)
    model = load_tiny(model_folder("gpt2"), [RESIDUAL])
    sizes = starve(model, most=100)
    result = run(model, tmp_path / "starved", texts, 512, pooling=pooling)
    assert sizes[0] > 400
    assert max(sizes[-5:]) <= 100
    assert result.tokens_per_batch <= 100
    assert result.corpus == expected.corpus
    rows = expected.stores[RESIDUAL].rows
    torch.testing.assert_close(
        result.stores[RESIDUAL].read(0, rows), expected.stores[RESIDUAL].read(0, rows), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(("held", "goes_on_with"), [(48, 48), (10**6, 256)])
def test_where_memory_ran_out_a_later_attempt_goes_on_with_as_little(
    model_folder: Folder, tmp_path: Path, held: int, goes_on_with: int
) -> None:
    class FirstKept(NothingKept):
        def shard(self, number: int) -> int | None:
            return held if number == 0 else None

    model = load_tiny(model_folder("gpt2"), [RESIDUAL])
    run(model, tmp_path)
    assert run(model, tmp_path, kept=FirstKept()).tokens_per_batch == goes_on_with


def test_memory_that_does_not_hold_one_sequence_is_an_error_and_no_skipped_text(
    model_folder: Folder, tmp_path: Path
) -> None:
    model = load_tiny(model_folder("gpt2"), [RESIDUAL])
    starve(model, most=30)
    with pytest.raises(MemoryExhausted, match="single sequence"):
        run(model, tmp_path)


def test_another_error_in_the_model_is_not_taken_for_lack_of_memory(model_folder: Folder, tmp_path: Path) -> None:
    model = load_tiny(model_folder("gpt2"), [RESIDUAL])

    def broken(*_: Any) -> None:
        raise RuntimeError("shapes do not fit")

    model.trunk.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(model, tmp_path)


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(model_folder: Folder, tmp_path: Path) -> None:
    model = load_tiny(model_folder("llama"), [RESIDUAL])
    model.tokenizer.add_tokens([f"<{number}>" for number in range(VOCAB)])
    with pytest.raises(ModelRefused, match=rf"gives the token \d+, and the model knows {VOCAB}"):
        run(model, tmp_path, [f"the <{VOCAB - 1}> fox"])


def test_padding_is_a_token_that_the_model_knows(model_folder: Folder, tmp_path: Path) -> None:
    model = load_tiny(model_folder("llama"), [RESIDUAL])
    model.source.text_config["pad_token_id"] = None  # type: ignore[index]
    model.tokenizer.add_special_tokens({"pad_token": "<beyond>"})
    assert model.pad_id < model.source.vocab_size
    assert run(model, tmp_path).corpus.texts == len(TEXTS)


def test_activations_that_are_no_numbers_are_refused(model_folder: Folder, tmp_path: Path) -> None:
    model = load_tiny(model_folder("gpt2"), [RESIDUAL])
    with torch.no_grad():
        next(model.trunk.parameters()).fill_(float("nan"))
    with pytest.raises(ModelRefused, match="not finite"):
        run(model, tmp_path)


def test_several_sites_come_from_one_forward_pass(model_folder: Folder, tmp_path: Path) -> None:
    folder = model_folder("llama")
    sites = [Site(0), Site(2), Site(2, "mlp_out")]
    model = load_tiny(folder, sites)
    passes = starve(model, most=10**9)
    together = run(model, tmp_path / "all", tokens_per_batch=10**6)
    assert len(passes) == 1
    for site in sites:
        alone = run(load_tiny(folder, [site]), tmp_path / str(site)).stores[site]
        torch.testing.assert_close(together.stores[site].read(0, 6), alone.read(0, 6), atol=1e-5, rtol=0)


def test_more_sequences_than_are_sorted_together_are_all_run(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_tiny(model_folder("gpt2"), [RESIDUAL])
    expected = run(model, tmp_path / "a").stores[RESIDUAL].read(0, 6)
    monkeypatch.setattr(extraction, "WINDOWS_SORTED", 4)
    torch.testing.assert_close(run(model, tmp_path / "b").stores[RESIDUAL].read(0, 6), expected, atol=1e-5, rtol=0)


def test_a_length_without_room_for_text_is_refused(model_folder: Folder, tmp_path: Path) -> None:
    model = load_tiny(model_folder("bert"), [RESIDUAL])
    model.tokenizer.model_max_length = 2
    with pytest.raises(RequestRefused, match="no room for text"):
        run(model, tmp_path)


def test_half_precision_is_kept_for_token_rows_and_means_are_fp32(model_folder: Folder, tmp_path: Path) -> None:
    model = load_tiny(model_folder("gpt2"), [RESIDUAL])
    model.trunk.to(torch.bfloat16)
    model.dtype = torch.bfloat16
    by_token = run(model, tmp_path / "token", pooling="token").stores[RESIDUAL]
    by_text = run(model, tmp_path / "mean").stores[RESIDUAL]
    assert (by_token.layout.dtype, by_text.layout.dtype) == (torch.bfloat16, torch.float32)
    rows = by_token.gather(np.arange(by_token.rows))
    assert rows.dtype == torch.float32
    first = by_token.rows_of_text(0)
    torch.testing.assert_close(rows[first].mean(0), by_text.read(0, 1)[0], atol=2e-2, rtol=0)
    assert rows.shape[1] == D_IN
