"""The language model with an SAE in its place, against the library's own loss and a plain hook on the whole model."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from mistudio_schemas import CrossEntropy, HookSite
from mistudio_train.messages import ChildMessage, JobSpec, LeftEarly, Progress, Warned
from mistudio_train.sae.folded import FoldedSAE
from mistudio_train.training import memory_plan, spliced
from mistudio_train.training.blocks import find_blocks
from mistudio_train.training.run import run_job
from mistudio_train.training.selection import FIRST_TOKEN, HELD_OUT, HIGH_NORM
from tests.models import D_IN, LAYERS, SENTENCES

from .conftest import Listener
from .test_extract import PLACES
from .test_run import TOPK, spec

Folder = Callable[..., Path]
TEXTS = [f"{sentence} {number}" for number in range(30) for sentence in SENTENCES]
LAYER = 2
ASKED: dict[str, Any] = {"pooling": "token", "sae": TOPK, "layer_number": LAYER, "held_out": 0.2} | {
    "max_sequence_length": 64  # no text is longer
}


def job_of(folder: Path, workspace: Path, **fields: Any) -> tuple[JobSpec, dict[str, Any], list[ChildMessage]]:
    """A finished job, its metrics, and what was said."""
    one, parent = spec(folder, workspace, TEXTS, **ASKED | fields), Listener()
    with torch.enable_grad():  # the tests that look at the outcome have none
        finished = run_job(one, parent)
    return one, finished.saes[0].metrics.model_dump(), parent.heard


@pytest.fixture(scope="module")
def made(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A family's job, done once."""
    jobs: dict[str, Any] = {}

    def of(family: str, site: HookSite = "resid_post") -> Any:
        name = f"{family}-{site}"
        if name not in jobs:
            jobs[name] = job_of(model_folder(family), tmp_path_factory.mktemp(name) / "job", hook_site=site)
        return jobs[name]

    return of


def flags_of(one: JobSpec, site: HookSite = "resid_post") -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.fromfile(one.scratch / f"rows-{LAYER}.{site}.bin", np.uint8)


def whole_model(folder: Path, family: str) -> Any:
    auto: Any = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder).eval()


@contextmanager
def hooked(
    model: Any, family: str, change: Callable[[Tensor], Tensor], site: HookSite = "resid_post"
) -> Iterator[None]:
    block = find_blocks(model.base_model, family, LAYERS)[LAYER]
    attention, mlp_in, mlp_out = PLACES.get(family, ("self_attn", "mlp", "mlp"))

    def after(_module: Any, _inputs: Any, output: Any) -> Any:
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    def before(_module: Any, inputs: Any) -> Any:
        return change(inputs[0]), *inputs[1:]

    if site in ("resid_pre", "mlp_in"):
        handle = block.get_submodule(mlp_in if site == "mlp_in" else "").register_forward_pre_hook(before)
    else:
        path = {"resid_post": "", "attn_out": attention, "mlp_out": mlp_out}[site]
        handle = block.get_submodule(path).register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def reconstructed(one: JobSpec, x: Tensor) -> Tensor:
    """By the exported file alone."""
    weights = load_file(one.output / "sae" / "sae_weights.safetensors")
    pre = (x @ weights["W_enc"] + weights["b_enc"]).relu()
    kept = pre.topk(4, dim=-1)
    return torch.zeros_like(pre).scatter(-1, kept.indices, kept.values) @ weights["W_dec"] + weights["b_dec"]


@pytest.mark.parametrize(
    ("family", "site"),
    [
        *((family, "resid_post") for family in ("llama", "gpt2", "opt", "phi")),
        *(("gpt2", site) for site in ("resid_pre", "attn_out", "mlp_in", "mlp_out")),
        ("opt", "mlp_in"),
        ("phi", "mlp_in"),
        ("bloom", "mlp_out"),
        ("gemma2", "mlp_in"),
    ],
)
@torch.no_grad()
def test_each_loss_is_that_of_the_whole_model_with_a_plain_hook(
    family: str, site: HookSite, made: Any, model_folder: Folder
) -> None:
    one, metrics, _ = made(family, site)
    folder = model_folder(family)
    model, tokenizer = whole_model(folder, family), transformers.AutoTokenizer.from_pretrained(folder)
    flags, row, rows = flags_of(one, site), 0, np.fromfile(one.scratch / "tokens" / "row_starts.bin", np.int64)
    trained_on: list[Tensor] = []
    sums = dict.fromkeys(("clean", "spliced", "zero", "mean"), 0.0)
    predicted = 0
    everything = []
    for text, (first, last) in zip(TEXTS, pairwise(rows), strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        before = ids.shape[1] - (last - first)
        everything.append((ids, before, flags[first:last]))
        row = last
    assert row == len(flags)
    acts: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        acts.append(x.clone())
        return x

    for ids, before, mine in everything:
        if not mine[0] & HELD_OUT:
            with hooked(model, family, keep, site):
                model(ids)
            trained_on.append(acts.pop().reshape(-1, D_IN)[before:][mine & (FIRST_TOKEN | HIGH_NORM) == 0])
    mean = torch.cat(trained_on).mean(0)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "clean": lambda x: x,
        "spliced": lambda x: reconstructed(one, x),
        "zero": torch.zeros_like,
        "mean": lambda x: mean.expand_as(x),
    }
    for ids, before, mine in everything:
        if not mine[0] & HELD_OUT:
            continue
        judged = torch.zeros(ids.shape, dtype=torch.bool)
        judged[0, before:] = torch.from_numpy(mine & (FIRST_TOKEN | HIGH_NORM) == 0)
        labels = ids.clone()
        labels[:, : max(1, before)] = -100
        count = int((labels != -100).sum())
        predicted += count
        for way, change in ways.items():

            def where(x: Tensor, change: Any = change, judged: Tensor = judged) -> Tensor:
                return torch.where(judged.reshape(*x.shape[:-1], 1), change(x), x)

            with hooked(model, family, where, site):
                sums[way] += float(model(ids, labels=labels).loss) * count
    measured = CrossEntropy.model_validate(metrics["cross_entropy"])
    assert measured.tokens == predicted
    assert not measured.masked
    for way, total in sums.items():
        assert getattr(measured, way) == pytest.approx(total / predicted, rel=1e-4), way
    loss, clean = measured.spliced, measured.clean
    assert measured.recovered_zero == pytest.approx((measured.zero - loss) / (measured.zero - clean))
    assert measured.recovered_mean == pytest.approx((measured.mean - loss) / (measured.mean - clean))


def test_an_encoder_predicts_masked_tokens(made: Any, model_folder: Folder) -> None:
    _, metrics, _ = made("bert")
    measured = CrossEntropy.model_validate(metrics["cross_entropy"])
    assert measured.masked
    assert 10 < measured.tokens < 2000
    assert len({measured.clean, measured.spliced, measured.zero, measured.mean}) == 4


@torch.no_grad()
def test_masked_are_about_a_seventh_of_the_texts_own_tokens_and_predicted_are_the_right_ones(
    made: Any, model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    real = spliced._asked

    def remembered(*given: Any) -> Any:
        asked.append(real(*given))
        return asked[-1]

    monkeypatch.setattr(spliced, "_asked", remembered)
    _, metrics, _ = job_of(model_folder("bert"), made("bert")[0].workspace.parent / "again")
    model = whole_model(model_folder("bert"), "bert")
    mask = transformers.AutoTokenizer.from_pretrained(model_folder("bert")).mask_token_id
    masked = sum(int((one.ids_BT == mask).sum()) for one in asked)
    tokens = sum(int(one.real_BT.sum()) for one in asked)
    assert 0.1 < masked / tokens < 0.2
    loss = 0.0
    for one in asked:
        assert torch.equal(one.ids_BT == mask, one.predicts_BT)
        labels = torch.where(one.predicts_BT, one.targets_BT, -100)
        loss += float(model(one.ids_BT, attention_mask=one.mask_BT, labels=labels).loss) * int(one.predicts_BT.sum())
    assert metrics["cross_entropy"]["clean"] == pytest.approx(loss / masked, rel=1e-5)
    assert metrics["cross_entropy"] == made("bert")[1]["cross_entropy"]  # always the same tokens are masked


def test_the_number_of_texts_that_go_through_together_changes_nothing(
    made: Any, model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spliced, "LOGITS_BYTES", 1)
    _, metrics, _ = job_of(model_folder("llama"), tmp_path / "job")
    for way, loss in metrics["cross_entropy"].items():
        assert loss == pytest.approx(made("llama")[1]["cross_entropy"][way], rel=1e-4), way


def test_no_more_tokens_go_through_the_model_than_asked_for(model_folder: Folder, tmp_path: Path) -> None:
    _, metrics, _ = job_of(model_folder("gpt2"), tmp_path / "job", cross_entropy_tokens=60)
    assert 30 < metrics["cross_entropy"]["tokens"] < 60 + 64


@pytest.mark.parametrize(
    "fields", [{"held_out": 0}, {"cross_entropy_tokens": 0}, {"pooling": "mean"}], ids=lambda fields: next(iter(fields))
)
def test_where_it_has_no_meaning_it_is_not_measured_and_nobody_is_warned(
    model_folder: Folder, tmp_path: Path, fields: dict[str, Any]
) -> None:
    _, metrics, heard = job_of(model_folder("llama"), tmp_path / "job", **fields)
    assert metrics["cross_entropy"] is None
    assert not any("cross-entropy" in said.message for said in heard if isinstance(said, Warned))


@pytest.mark.parametrize(("family", "reason"), [("roberta", "lack"), ("t5", "encoder-decoder")])
def test_a_model_without_a_head_is_trained_on_all_the_same(
    family: str, reason: str, model_folder: Folder, tmp_path: Path
) -> None:
    _, metrics, heard = job_of(model_folder(family), tmp_path / "job")
    assert metrics["cross_entropy"] is None
    assert metrics["fvu"] is not None
    assert any(
        "no cross-entropy" in said.message and reason in said.message for said in heard if isinstance(said, Warned)
    )


def test_a_model_that_does_not_fit_beside_the_saes_is_not_measured(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_plan, "LOGITS_BYTES", 1 << 50)
    _, metrics, heard = job_of(model_folder("llama"), tmp_path / "job")
    assert metrics["cross_entropy"] is None
    assert any("is not measured" in said.message for said in heard if isinstance(said, Warned))


def test_who_is_told_to_leave_meanwhile_leaves_and_goes_on(model_folder: Folder, tmp_path: Path, made: Any) -> None:
    one = spec(model_folder("llama"), tmp_path / "job", TEXTS, **ASKED)
    leaving = Listener(lambda said: "leave" if isinstance(said, Progress) and said.phase == "evaluating" else None)
    with pytest.raises(LeftEarly):
        run_job(one, leaving)
    finished = run_job(one, Listener())
    assert finished.saes[0].metrics.model_dump() == made("llama")[1]


def test_a_perfect_sae_recovers_everything_and_one_that_gives_zero_nothing(
    model_folder: Folder, tmp_path: Path
) -> None:
    identity = FoldedSAE(
        "topk", torch.cat([torch.eye(D_IN), -torch.eye(D_IN)]), torch.zeros(2 * D_IN),
        torch.cat([torch.eye(D_IN), -torch.eye(D_IN)], 1), torch.zeros(D_IN),
    )  # fmt: skip
    nothing = replace(identity, decoder_weight=torch.zeros(D_IN, 2 * D_IN))
    found: list[Any] = []
    real = spliced.cross_entropies

    def with_others(model: Any, splices: Any, *rest: Any, **options: Any) -> Any:
        found.extend(real(model, [replace(splices[0], sae=sae) for sae in (identity, nothing)], *rest, **options) or [])
        return real(model, splices, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mistudio_train.training.sweep.cross_entropies", with_others)
        job_of(model_folder("llama"), tmp_path / "job")
    perfect, zero = found
    assert perfect.spliced == pytest.approx(perfect.clean, rel=1e-6)
    assert perfect.recovered_zero == pytest.approx(1, abs=1e-4)
    assert zero.spliced == pytest.approx(zero.zero, rel=1e-6)
    assert zero.recovered_zero == pytest.approx(0, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_figures_are_those_of_the_exported_file_on_the_whole_models_activations(
    family: str, made: Any, model_folder: Folder
) -> None:
    """Nothing of ours but which rows are held out: the library's model, a hook, and the file's weights."""
    one, metrics, _ = made(family)
    folder = model_folder(family)
    model, tokenizer = whole_model(folder, family), transformers.AutoTokenizer.from_pretrained(folder)
    flags = flags_of(one)
    rows: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        rows.append(x.reshape(-1, D_IN)[-count:].clone())
        return x

    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        with hooked(model, family, keep):
            model(ids)
    x = torch.cat(rows).double()
    x_hat = reconstructed(one, x.float()).double()
    weights = load_file(one.output / "sae" / "sae_weights.safetensors")
    acts = (x.float() @ weights["W_enc"] + weights["b_enc"]).relu()
    kept = acts.topk(4, dim=1)
    active = torch.zeros_like(acts).scatter(1, kept.indices, kept.values) > 1e-6

    def fvu(which: Any) -> float:
        mine = x[torch.from_numpy(which)]
        error = (mine - x_hat[torch.from_numpy(which)]).square().sum()
        return float(error / (mine - mine.mean(0)).square().sum())

    outlier = flags & (FIRST_TOKEN | HIGH_NORM) != 0
    held_out, training = (flags & HELD_OUT != 0) & ~outlier, (flags & HELD_OUT == 0) & ~outlier
    mine = torch.from_numpy(held_out)
    expected = {
        "fvu": fvu(held_out),
        "fvu_ordinary": fvu(held_out),
        "explained_variance": 1 - fvu(held_out),
        "training_fvu": fvu(training),
        "l0": float(active[mine].sum(1).double().mean()),
        "fraction_active": float(active[mine].double().mean()),
        "cosine": float(torch.cosine_similarity(x[mine], x_hat[mine], dim=1).mean()),
        "mse": float((x - x_hat)[mine].square().mean()),
        "dead_share": float((~active[mine].any(0)).double().mean()),
        "never_active_share": float((~active.any(0)).double().mean()),
    }
    if outlier.any():
        whole = (x - x.mean(0)).square().sum(1)
        expected["fvu_outliers"] = fvu(outlier)
        expected["outliers_variance_share"] = float(whole[torch.from_numpy(outlier)].sum() / whole.sum())
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=2e-4), name
    assert (metrics["held_out"], metrics["rows"]) == (True, int(held_out.sum()))
    rates = active.double().mean(0).numpy()
    edges = [0.0, *(10 ** (half / 2) for half in range(-12, 1))]
    histogram = [int((rates == 0).sum()), *np.histogram(rates[rates > 0], edges)[0].tolist()]
    assert metrics["firing_histogram"] == histogram
    assert sum(histogram) == len(rates)
    written = json.loads((one.output / "metadata.json").read_text())["training_results"]
    assert all(written[name] == value for name, value in metrics.items())
