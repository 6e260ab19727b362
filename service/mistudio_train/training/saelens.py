"""The folder that SAELens 6 loads: `cfg.json`, `sae_weights.safetensors`, `sparsity.safetensors`.

Owns how an SAE of ours is said in SAELens' words; must not import SAELens, which only the tests do.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from mistudio_train.sae.folded import FoldedSAE
from mistudio_train.start_files import CFG, GATES, WEIGHTS

from .files import refused, write_json, write_tensors

SAE_LENS_VERSION: Final = "6.54.12"
"""Whose format this is; without it SAELens takes a folder for one of its older formats."""
ARCHITECTURES: Final = ("standard", "topk", "jumprelu", "transcoder", "jumprelu_transcoder")
NEVER_FIRES: Final = 1e-10
"""Added to firing rates before their logarithm, as SAELens does."""


@dataclass(frozen=True)
class Origin:
    """Which activations the SAE was trained on, in SAELens' words.

    SAELens names a place in a Hugging Face model by the path of the module whose output it is, seen from an
    `AutoModelForCausalLM`: `model.layers.9`, `transformer.h.5`. That is the class's `base_model_prefix`, a dot, and
    the path inside the bare model. An encoder has no causal head: `AutoModel` and the path inside the bare model,
    `encoder.layer.5`, which SAELens does not run itself but carries along. What goes into a block or an MLP is named by
    the module that gave it: `model.layers.8`, `model.layers.9.post_attention_layernorm`. (Where others read that, too,
    as in parallel blocks and encoders, SAELens' splice is not ours, which changes what the MLP reads and nothing else.)
    """

    model_name: str
    model_class_name: str
    """`AutoModelForCausalLM` or `AutoModel`."""
    hook_name: str | None
    """`None` where no module gives the activations as they are."""
    layer: int
    hook_site: str
    context_size: int
    """Tokens a text or a window at most."""
    prepend_bos: bool
    """Whether the model saw the tokenizer's first special token."""
    exclude_special_tokens: bool
    """Whether special tokens' activations were left out."""
    dataset_path: str
    """Name of the corpus."""
    pooling: str
    """`mean`: trained on means over texts, not on tokens as SAELens expects. `token`: as SAELens expects."""
    model_revision: str | None = None
    predicts: str | None = None
    """The hook site that a transcoder reconstructs."""
    hook_name_out: str | None = None
    """And its name."""


def saelens_cannot(sae: FoldedSAE, origin: Origin) -> str | None:
    """Why SAELens has no words for this SAE; `None` if it has: of transcoders it knows those that end in a ReLU."""
    architecture = _architecture(sae, origin)
    if architecture in ARCHITECTURES:
        return None
    return f"SAELens has no architecture for the kind {sae.kind!r}" + (" of a transcoder" if origin.predicts else "")


def write_saelens(folder: Path, sae: FoldedSAE, origin: Origin, firing_rate_F: Tensor) -> None:
    """Write the folder that `SAE.load_from_disk` reads, and beside it what only training that goes on asks for.

    Args:
        folder: is made if missing.
        sae: folded, so that `relu(encoder(x))`, or its k largest, are the features.
        origin: of its activations.
        firing_rate_F: share of the rows on which each feature is active.

    Raises:
        ExportRefused: if SAELens cannot express the kind, or a number is not finite.
        DiskFull: if the disk has no room.

    """
    if reason := saelens_cannot(sae, origin):
        raise refused(reason)
    if firing_rate_F.shape != (sae.d_sae,):
        raise refused(f"there are firing rates of shape {list(firing_rate_F.shape)} for {sae.d_sae} features")
    weights = {
        "W_enc": sae.encoder_weight.T,
        "b_enc": sae.encoder_bias,
        "W_dec": sae.decoder_weight.T,
        "b_dec": sae.decoder_bias,
    }
    if sae.threshold is not None:
        weights["threshold"] = sae.threshold
    sparsity_F = torch.log10(firing_rate_F.to(torch.float32) + NEVER_FIRES)
    write_tensors(folder / WEIGHTS, weights)
    if sae.gain is not None:
        write_tensors(folder / GATES, {"gain": sae.gain})
    write_tensors(folder / "sparsity.safetensors", {"sparsity": sparsity_F})
    write_json(folder / CFG, _cfg(sae, origin))


def _architecture(sae: FoldedSAE, origin: Origin) -> str:
    """Whatever an SAE with a threshold was trained as, it is a JumpReLU SAE now."""
    architecture = "jumprelu" if sae.threshold is not None else sae.kind
    if origin.predicts is None:
        return architecture
    return "transcoder" if architecture == "standard" else f"{architecture}_transcoder"


def _cfg(sae: FoldedSAE, origin: Origin) -> dict[str, object]:
    """`apply_b_dec_to_input` and every scaling are off: they are folded into the weights."""
    cfg: dict[str, object] = {
        "architecture": _architecture(sae, origin),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": _metadata(origin),
    }
    if origin.predicts is not None:
        cfg |= {"d_out": sae.d_in}
    if sae.kind == "topk":
        cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    return cfg


def _metadata(origin: Origin) -> dict[str, object]:
    is_residual = origin.hook_site in ("resid_pre", "resid_post")
    lens_name = f"blocks.{origin.layer}.hook_{origin.hook_site}" if is_residual else None
    predicted: dict[str, object] = {
        "hook_name_out": origin.hook_name_out,
        "hook_layer_out": origin.layer,
        "predicts": origin.predicts,
    }
    metadata: dict[str, object] = {
        "sae_lens_version": SAE_LENS_VERSION,
        "sae_lens_training_version": None,
        "trained_by": "miStudioTrain",
        "model_name": origin.model_name,
        "model_revision": origin.model_revision,
        "model_class_name": origin.model_class_name,
        "hook_name": origin.hook_name,
        "hook_head_index": None,
        "transformer_lens_hook_name": lens_name,
        "hook_layer": origin.layer,
        "hook_site": origin.hook_site,
        "context_size": origin.context_size,
        "prepend_bos": origin.prepend_bos,
        "exclude_special_tokens": origin.exclude_special_tokens,
        "dataset_path": origin.dataset_path,
        "pooling": origin.pooling,
    }
    return metadata if origin.predicts is None else metadata | predicted
