"""Going on from a trained SAE: a folder of ours or of SAELens becomes the same function, or is refused before it costs.

Folders of SAELens are made by SAELens itself.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mistudio_schemas import ErrorCode, SAEConfig, TrainRequested
from mistudio_train.errors import StartRefused
from mistudio_train.messages import ChildMessage, Finished, JobSpec, LeftEarly, Progress, Warned
from mistudio_train.sae.base import SparseAutoencoder, StepInput
from mistudio_train.sae.build import build_sae
from mistudio_train.sae.trainer import Trainer
from mistudio_train.training import extract
from mistudio_train.training.run import run_job
from mistudio_train.training.start import open_starts
from mistudio_train.training.start_weights import read_start, refuse_unsuitable

from .conftest import Listener
from .test_resume import LeavesAfter
from .test_run import CHANGING, Folder, hashes, spec

# What SAELens imports of TransformerLens says so of itself.
pytestmark = pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning")

D_IN, D_SAE = 12, 40
TEXTS = [f"the cat sat on mat {number} and looked at {number % 7} birds and {number % 3} dogs" for number in range(160)]
SAES: dict[str, dict[str, Any]] = {
    "standard": {"kind": "standard"},
    "decoder_norm": {"kind": "standard", "penalty": "decoder_norm"},
    "topk": {"kind": "topk", "k": 4},
    "batchtopk": {"kind": "batchtopk", "k": 4},
    "matryoshka": {"kind": "matryoshka", "k": 4},
    "jumprelu": {"kind": "jumprelu", "target_l0": 4},
    "gated": {"kind": "gated"},
}


@pytest.fixture(autouse=True)
def _many_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extract, "ENOUGH_WINDOWS", 16)
        yield


def rows(count: int = 400) -> Tensor:
    return 2 * torch.randn(count, D_IN, generator=torch.Generator().manual_seed(4)) + torch.arange(float(D_IN))


def config_of(**fields: Any) -> SAEConfig:
    asked = {"model_name": "m", "corpus_file": "c.txt", "pooling": "token", "sae": {"hidden_dim": 64} | fields}
    config = TrainRequested.model_validate(asked).resolved_saes()[0]
    return config.model_copy(update={"hidden_dim": fields.get("hidden_dim", D_SAE)})


def lens_folder(folder: Path, architecture: str, unit_rows: bool = True, dtype: str = "float32", **options: Any) -> Any:
    """An SAE that SAELens has made and saved, its weights drawn."""
    import sae_lens

    names = {"standard": "Standard", "topk": "TopK", "jumprelu": "JumpReLU", "gated": "Gated"}
    sae_class, config = (getattr(sae_lens, f"{names[architecture]}SAE{end}") for end in ("", "Config"))
    fields = {"d_in": D_IN, "d_sae": D_SAE, "dtype": dtype, "device": "cpu", "apply_b_dec_to_input": False}
    sae = sae_class(config(**fields | options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if name == "W_dec" and unit_rows:
                drawn /= drawn.norm(dim=1, keepdim=True)
            if name == "threshold":
                drawn = drawn.abs() + 0.5
            parameter.copy_(0.3 * drawn if name in ("W_enc", "r_mag") else drawn)
    sae.save_model(folder)
    return sae


def begun(folder: Path, **fields: Any) -> SparseAutoencoder:
    """An SAE that has seen rows and begins as that folder's."""
    config = config_of(init_from="it", **fields)
    (start,) = open_starts([config], {"it": folder}, D_IN)
    assert start is not None
    refuse_unsuitable([config], [start])
    sae = build_sae(config, D_IN)
    sae.prepare(rows())
    sae.start_from(read_start(start))
    return sae


OPTIONS: list[tuple[str, str, dict[str, Any]]] = [
    ("standard", "standard", {}),
    ("standard", "decoder_norm", {"apply_b_dec_to_input": True, "unit_rows": False}),
    ("topk", "topk", {"k": 4}),
    ("topk", "topk", {"k": 4, "apply_b_dec_to_input": True}),
    ("topk", "topk", {"k": 4, "rescale_acts_by_decoder_norm": True, "unit_rows": False}),
    ("jumprelu", "jumprelu", {}),
    ("jumprelu", "jumprelu", {"apply_b_dec_to_input": True, "unit_rows": False}),
    ("jumprelu", "gated", {}),
    ("gated", "gated", {}),
    ("gated", "gated", {"apply_b_dec_to_input": True, "unit_rows": False}),
]


@pytest.mark.parametrize(("architecture", "kind", "options"), OPTIONS)
def test_the_first_loss_is_that_of_the_sae_that_saelens_saved(
    tmp_path: Path, architecture: str, kind: str, options: dict[str, Any]
) -> None:
    theirs, x_BD = lens_folder(tmp_path, architecture, **options), rows()[:256]
    sae = begun(tmp_path, **SAES[kind])
    with torch.no_grad():
        expected = theirs.decode(theirs.encode(x_BD))
        found = sae.decode(sae.encode(x_BD))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)
        loss = float((expected - x_BD).square().mean()) * float(getattr(sae, "scale", torch.ones(()))) ** 2
    assert float(sae.step(StepInput(x_BD, 0, 100)).reconstruction_loss.detach()) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka"])
def test_a_batchtopk_that_saelens_saved_goes_on_with_its_threshold(tmp_path: Path, kind: str) -> None:
    theirs = lens_folder(tmp_path, "jumprelu")
    with torch.no_grad():
        theirs.threshold.fill_(0.7)
    theirs.save_model(tmp_path)
    x_BD = rows()[:256]
    sae = begun(tmp_path, **SAES[kind])
    with torch.no_grad():
        torch.testing.assert_close(
            sae.decode(sae.encode(x_BD)), theirs.decode(theirs.encode(x_BD)), rtol=1e-3, atol=2e-3
        )
    torch.testing.assert_close(sae.folded().threshold, torch.full((D_SAE,), 0.7))


def test_weights_of_half_precision_are_read_as_they_are(tmp_path: Path) -> None:
    theirs = lens_folder(tmp_path, "jumprelu", dtype="bfloat16")
    found = begun(tmp_path, **SAES["jumprelu"]).folded().encode(rows())
    weights = {name: weight.detach().float() for name, weight in theirs.named_parameters()}
    pre_BF = rows() @ weights["W_enc"] + weights["b_enc"]
    norm_F = weights["W_dec"].norm(dim=1)  # rounded, too
    torch.testing.assert_close(found, norm_F * pre_BF.relu() * (pre_BF > weights["threshold"]), rtol=1e-3, atol=2e-3)


def changed(**cfg: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        said = json.loads((folder / "cfg.json").read_text()) | cfg
        (folder / "cfg.json").write_text(json.dumps(said))

    return change


def tensor(name: str, value: Tensor | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "sae_weights.safetensors")
        tensors = {key: one for key, one in tensors.items() if key != name}
        save_file(tensors if value is None else tensors | {name: value}, folder / "sae_weights.safetensors")

    return change


def cut(folder: Path) -> None:
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("change", "fields", "says", "hint"),
    [
        (changed(), {"kind": "jumprelu"}, "a 'standard' SAE, from which the kind 'jumprelu'", "Set kind to 'standard'"),
        (changed(), {"hidden_dim": 64}, "has 40 latents, and hidden_dim is 64", "Set hidden_dim to 40"),
        (changed(d_in=13), {}, "W_enc", "save it again"),
        (changed(architecture="temporal"), {}, "architecture 'temporal'", "save_inference_model"),
        (changed(architecture="transcoder"), {}, "architecture 'transcoder'", "transcoders"),
        (changed(normalize_activations="layer_norm"), {}, "'layer_norm'", "row to row"),
        (changed(normalize_activations="expected_average_only_in"), {}, "by how much", "fold_activation_norm"),
        (changed(reshape_activations="hook_z"), {}, "'hook_z'", "whole rows"),
        (changed(rescale_acts_by_decoder_norm=True), {}, "rescale_acts_by_decoder_norm", "save it again"),
        (changed(apply_b_dec_to_input="yes"), {}, "neither true nor false", "save it again"),
        (changed(metadata={}), {}, "not of SAELens 6", "save it again"),
        (changed(d_sae="40"), {}, "no whole number 'd_sae'", "save it again"),
        (lambda folder: (folder / "cfg.json").write_text("[" * 100_000), {}, "no JSON object", "save it again"),
        (lambda folder: (folder / "cfg.json").unlink(), {}, "no cfg.json", "save_model"),
        (tensor("scaling_factor", torch.ones(D_SAE)), {}, "scaling_factor", "save it again"),
        (tensor("b_enc", None), {}, "has W_dec", "save it again"),
        (tensor("b_enc", torch.ones(D_SAE, dtype=torch.int32)), {}, "no floating-point", "save it again"),
        (tensor("b_enc", torch.full((D_SAE,), torch.nan)), {}, "not finite in b_enc", "another"),
        (cut, {}, "cannot be read", "save it again"),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused(
    tmp_path: Path, change: Any, fields: dict[str, Any], says: str, hint: str
) -> None:
    lens_folder(tmp_path, "standard")
    change(tmp_path)
    with pytest.raises(StartRefused, match=says) as caught:
        begun(tmp_path, **SAES["standard"] | fields)
    assert caught.value.code is ErrorCode.SAE_UNSUITABLE
    assert hint in caught.value.hint


def test_another_k_is_refused(tmp_path: Path) -> None:
    lens_folder(tmp_path, "topk", k=5)
    with pytest.raises(StartRefused, match="keeps 5 latents a row, and k is 4") as caught:
        begun(tmp_path, **SAES["topk"])
    assert caught.value.hint == "Set k to 5."


def job_of(model: Path, workspace: Path, kind: str, start: Path | None = None, **fields: Any) -> JobSpec:
    sae = SAES[kind] | {"hidden_dim": 64, "batch_size": 128, "init_from": "origin/1" if start else None}
    asked: dict[str, Any] = {"pooling": "token", "max_epochs": 3, "max_sequence_length": 16, "sae": sae}
    one = spec(model, workspace, TEXTS, **asked | fields)
    return replace(one, starts={"origin/1": start} if start else {}, checkpoint_seconds=0.05)


def run(one: JobSpec) -> tuple[Finished, list[ChildMessage]]:
    parent = Listener()
    return run_job(one, parent), parent.heard


def exact_files(one: JobSpec) -> dict[str, str]:
    """Of all but what says when it was made, or what the job was warned of."""
    files = hashes(one.output).items()
    return {name: digest for name, digest in files if Path(name).name not in {*CHANGING, "README.md"}}


@pytest.mark.parametrize("kind", SAES)
def test_a_job_goes_on_from_a_run_of_ours_at_its_last_loss(
    model_folder: Folder, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the batch that the first one saw last, by the trainers of both jobs."""
    trainers: list[Trainer] = []
    first: list[float] = []
    real_prepare = Trainer.prepare

    def prepare(self: Trainer, *arguments: Any) -> None:
        real_prepare(self, *arguments)
        trainers.append(self)
        if len(trainers) == 2:
            first.extend(losses(self))

    def losses(trainer: Trainer) -> list[float]:
        x_BD = batch * 1.0
        output = trainer.sae.step(StepInput(x_BD, 50, 100))
        return [float(output.loss.detach()), float(output.reconstruction_loss.detach())]

    batch = torch.randn(64, 32, generator=torch.Generator().manual_seed(9))
    monkeypatch.setattr(Trainer, "prepare", prepare)
    origin = job_of(model_folder("llama"), tmp_path / "origin", kind)
    run(origin)
    last = losses(trainers[0])
    run(job_of(model_folder("llama"), tmp_path / "job", kind, origin.output / "sae"))
    assert first == pytest.approx(last, rel=1e-4)


@pytest.mark.parametrize("kind", ["standard", "batchtopk", "gated"])
def test_a_job_that_goes_on_and_is_interrupted_is_as_one_that_never_was(
    model_folder: Folder, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, origin = model_folder("llama"), job_of(model_folder("llama"), tmp_path / "origin", kind)
    run(origin)
    whole = job_of(model, tmp_path / "whole", kind, origin.output / "sae")
    run(whole)
    one, steps, real = job_of(model, tmp_path / "job", kind, origin.output / "sae"), 0, Trainer.step

    def step(trainer: Trainer, x_BD: Tensor) -> None:
        nonlocal steps
        steps += 1
        real(trainer, x_BD)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(LeftEarly):
        run_job(one, LeavesAfter(lambda: steps >= 5))
    shutil.rmtree(one.output)
    run(one)
    total = json.loads((one.output / "metadata.json").read_text())["training_results"]["steps"]
    assert steps == total
    assert exact_files(one) == exact_files(whole)


def test_what_was_kept_of_another_origin_is_not_used(model_folder: Folder, tmp_path: Path) -> None:
    model = model_folder("llama")
    origins = [job_of(model, tmp_path / f"origin-{seed}", "topk", seed=seed) for seed in (0, 1)]
    for origin in origins:
        run(origin)
    one = job_of(model, tmp_path / "job", "topk", origins[0].output / "sae")
    run(one)
    shutil.rmtree(one.output)
    _, heard = run(replace(one, starts={"origin/1": origins[1].output / "sae"}))
    fresh = job_of(model, tmp_path / "fresh", "topk", origins[1].output / "sae")
    run(fresh)
    assert any("init_from was" in said.message for said in heard if isinstance(said, Warned))
    assert exact_files(one) == exact_files(fresh)


def test_one_that_does_not_fit_is_refused_while_planning(model_folder: Folder, tmp_path: Path) -> None:
    lens_folder(tmp_path / "start", "topk", k=4)
    parent = Listener()
    with pytest.raises(StartRefused, match="rows of width 12, and the model's have 32"):
        run_job(job_of(model_folder("llama"), tmp_path / "job", "topk", tmp_path / "start"), parent)
    assert {one.phase for one in parent.heard if isinstance(one, Progress)} == {"planning"}


def test_a_transcoder_is_refused_by_the_contract() -> None:
    with pytest.raises(ValueError, match="leave out 'init_from' or 'predicts'"):
        config_of(kind="batchtopk", init_from="job", hook_site="mlp_in", predicts="mlp_out")
