"""What training may go on from: the folder of a trained SAE, judged by its `cfg.json` and the shapes of its tensors.

Reads no numbers and imports no torch, so that most refusals come in seconds; the weights are `start_weights`'.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from mistudio_schemas import SAEConfig
from mistudio_train.digest import sha256_of
from mistudio_train.errors import StartRefused
from mistudio_train.start_files import CFG, GATES, NAMES, WEIGHTS

ARCHITECTURES: Final = {
    "standard": ("standard",),
    "topk": ("topk",),
    "batchtopk": ("jumprelu",),
    "matryoshka": ("jumprelu",),
    "jumprelu": ("jumprelu",),
    "gated": ("gated", "jumprelu"),
}
"""By kind those in which SAELens has what it can go on from; our own of any kind with thresholds is a `jumprelu`."""
BIASES: Final = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}
"""By architecture the tensors of one value a latent."""
FLOATS: Final = ("F64", "F32", "F16", "BF16")
MOST_BYTES_OF_CFG: Final = 1 << 20
SAVE_AGAIN: Final = "Load it with SAELens 6 (SAE.load_from_disk) and save it again with save_model."


@dataclass(frozen=True)
class Start:
    """A trained SAE to go on from, as its folder says it."""

    name: str
    """As the request names it."""
    folder: Path
    sha256: str
    """Of all its files that count."""
    architecture: str
    d_in: int
    d_sae: int
    k: int | None
    """Of `topk`."""
    reads_centred: bool
    """`apply_b_dec_to_input`: it encodes x - b_dec."""
    rescales: bool
    """`rescale_acts_by_decoder_norm`: latents are weighed by the norms of their decoder rows."""


def open_starts(configs: Sequence[SAEConfig], folders: Mapping[str, Path], d_in: int) -> tuple[Start | None, ...]:
    """What each SAE goes on from; `None`: it starts afresh.

    Args:
        configs: resolved.
        folders: by `init_from`.
        d_in: the width of the model's rows.

    Raises:
        StartRefused: if a folder holds no SAE that we can read, or another than `config` asks for.
    """
    return tuple(None if one.init_from is None else _opened(one, one.init_from, folders, d_in) for one in configs)


def content_of(folder: Path) -> str:
    """A sha256 over the files that say what the SAE is."""
    found = {name: sha256_of(folder / name) for name in NAMES if (folder / name).is_file()}
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _opened(config: SAEConfig, name: str, folders: Mapping[str, Path], d_in: int) -> Start:
    if name not in folders:
        raise StartRefused(f"there is no SAE {name!r} here", "Name a folder that this worker may read.")
    folder = folders[name]
    try:
        cfg = _cfg(name, folder)
        start = _start(name, folder, cfg)
        _refuse_other_tensors(start, _shapes(folder / WEIGHTS))
        if (folder / GATES).is_file() and _shapes(folder / GATES) != {"gain": [start.d_sae]}:
            raise _refused(name, f"its {GATES} is not of {start.d_sae} latents", "Remove that file, or restore it.")
    except (OSError, SafetensorError) as error:
        raise _refused(name, f"its files cannot be read: {error}", SAVE_AGAIN) from None
    _refuse_other_request(start, config, d_in)
    return start


def _cfg(name: str, folder: Path) -> dict[str, Any]:
    for needed in (CFG, WEIGHTS):
        if not (folder / needed).is_file():
            raise _refused(
                name,
                f"its folder holds no {needed}",
                "Name the folder that SAELens' save_model has written, or our `sae/`.",
            )
    with (folder / CFG).open("rb") as file:
        data = file.read(MOST_BYTES_OF_CFG + 1)
    try:
        cfg = json.loads(data) if len(data) <= MOST_BYTES_OF_CFG else None
    except (ValueError, RecursionError):
        cfg = None
    if not isinstance(cfg, dict):
        raise _refused(name, f"its {CFG} is no JSON object of a sensible size", SAVE_AGAIN)
    return cfg


def _start(name: str, folder: Path, cfg: dict[str, Any]) -> Start:
    """What `cfg` says, with every option that changes the function either understood or refused."""
    metadata = cfg.get("metadata")
    version = metadata.get("sae_lens_version") if isinstance(metadata, dict) else None
    if not str(version).startswith("6."):
        raise _refused(name, f"its {CFG} is not of SAELens 6 (metadata.sae_lens_version: {version!r})", SAVE_AGAIN)
    architecture = cfg.get("architecture")
    if architecture not in BIASES:
        raise _refused(
            name,
            f"its architecture {architecture!r} is none of {', '.join(BIASES)}",
            "One that SAELens is training is saved as one of them by save_inference_model; transcoders and others "
            "cannot be gone on from.",
        )
    if (how := cfg.get("normalize_activations", "none")) != "none":
        raise _refused(
            name,
            f"it normalises what it reads (normalize_activations: {how!r}), and its folder does not say by how much",
            "Fold it into the weights first (SAELens' fold_activation_norm_scaling_factor), if it is one factor for "
            "all rows, and save it again; 'layer_norm' and 'constant_norm_rescale' differ from row to row.",
        )
    if (how := cfg.get("reshape_activations", "none")) != "none":
        raise _refused(
            name, f"it reshapes what it reads (reshape_activations: {how!r})", "Use one that reads whole rows."
        )
    rescales = _flag(name, cfg, "rescale_acts_by_decoder_norm")
    if rescales and architecture != "topk":
        raise _refused(name, f"rescale_acts_by_decoder_norm means nothing to us of {architecture!r}", SAVE_AGAIN)
    return Start(
        name=name,
        folder=folder,
        sha256=content_of(folder),
        architecture=architecture,
        d_in=_number(name, cfg, "d_in"),
        d_sae=_number(name, cfg, "d_sae"),
        k=_number(name, cfg, "k") if architecture == "topk" else None,
        reads_centred=_flag(name, cfg, "apply_b_dec_to_input"),
        rescales=rescales,
    )


def _number(name: str, cfg: dict[str, Any], field: str) -> int:
    value = cfg.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _refused(name, f"its {CFG} has no whole number {field!r}", SAVE_AGAIN)
    return value


def _flag(name: str, cfg: dict[str, Any], field: str) -> bool:
    value = cfg.get(field, False)
    if not isinstance(value, bool):
        raise _refused(name, f"{field!r} in its {CFG} is neither true nor false", SAVE_AGAIN)
    return value


def _shapes(path: Path) -> dict[str, list[int]]:
    """Of the tensors of a file; empty if one of them is not of floating-point numbers."""
    with safe_open(path, framework="numpy") as file:
        tensors = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        if not all(tensor.get_dtype() in FLOATS for tensor in tensors.values()):
            return {}
        return {key: list(tensor.get_shape()) for key, tensor in tensors.items()}


def _refuse_other_tensors(start: Start, shapes: dict[str, list[int]]) -> None:
    d_in, d_sae = start.d_in, start.d_sae
    expected = {"W_enc": [d_in, d_sae], "W_dec": [d_sae, d_in], "b_dec": [d_in]}
    expected |= {name: [d_sae] for name in BIASES[start.architecture]}
    if shapes != expected:
        said = ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items())) or "no floating-point tensors"
        wanted = ", ".join(f"{name} {shape}" for name, shape in sorted(expected.items()))
        raise _refused(
            start.name, f"its {WEIGHTS} holds {said}; a {start.architecture!r} of that {CFG} has {wanted}", SAVE_AGAIN
        )


def _refuse_other_request(start: Start, config: SAEConfig, d_in: int) -> None:
    if start.architecture not in ARCHITECTURES[config.kind]:
        kinds = [kind for kind, found in ARCHITECTURES.items() if start.architecture in found]
        raise _refused(
            start.name,
            f"it is a {start.architecture!r} SAE, from which the kind {config.kind!r} cannot go on",
            f"Set kind to {' or '.join(repr(kind) for kind in kinds)}, or name another SAE.",
        )
    if start.d_in != d_in:
        raise _refused(
            start.name,
            f"it reads rows of width {start.d_in}, and the model's have {d_in}",
            "Name the model that it was trained on, or another SAE.",
        )
    if start.d_sae != config.hidden_dim:
        raise _refused(
            start.name,
            f"it has {start.d_sae} latents, and hidden_dim is {config.hidden_dim}",
            f"Set hidden_dim to {start.d_sae}.",
        )


def _refused(name: str, message: str, hint: str) -> StartRefused:
    return StartRefused(f"the SAE {name!r} cannot be gone on from: {message}", hint)
