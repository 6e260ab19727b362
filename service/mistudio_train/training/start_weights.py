"""The weights that training goes on from, as plain ones on plain rows, whatever options their folder says.

Reads what `start` has judged; which kind can be what they say is the kinds' to decide, before a row is extracted.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from safetensors.torch import load_file
from torch import Tensor

from mistudio_schemas import SAEConfig
from mistudio_train.errors import StartRefused
from mistudio_train.sae.build import build_sae
from mistudio_train.sae.folded import CannotStart, FoldedSAE, plain
from mistudio_train.start_files import GATES, WEIGHTS

from .start import Start, content_of


def refuse_unsuitable(configs: Sequence[SAEConfig], starts: Sequence[Start | None]) -> None:
    """See that each kind can be what it is to go on from; in numbers, where shapes and names do not say it.

    Raises:
        StartRefused: if one cannot.
    """
    for config, start in zip(configs, starts, strict=True):
        if start is None:
            continue
        try:
            build_sae(config, start.d_in).start_from(read_start(start))
        except CannotStart as error:
            reason = f"the kind {config.kind!r} cannot go on from the SAE {start.name!r}: {error}"
            raise StartRefused(reason, error.hint) from None


def read_start(start: Start) -> FoldedSAE:
    """Its weights, fp32, on the CPU: encoder [d_sae, d_in] and decoder [d_in, d_sae] of rows as they are.

    Raises:
        StartRefused: if a number is not finite, or the files are not those any more that were judged.
    """
    tensors = {name: tensor.double() for name, tensor in load_file(start.folder / WEIGHTS).items()}
    gates = start.folder / GATES
    gain = load_file(gates)["gain"] if gates.is_file() else None
    if content_of(start.folder) != start.sha256:
        raise StartRefused(f"the SAE {start.name!r} was changed while the job went on", "Send the request again.")
    if bad := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise StartRefused(f"the SAE {start.name!r} has numbers that are not finite in {bad[0]}", "Name another SAE.")
    folded = _gated(start, tensors) if start.architecture == "gated" else _plain(start, tensors, gain)
    return _rescaled(folded) if start.rescales else folded


def _plain(start: Start, tensors: dict[str, Tensor], gain: Tensor | None) -> FoldedSAE:
    weight_FD, bias_F = tensors["W_enc"].T, tensors["b_enc"]
    if start.reads_centred:
        bias_F = bias_F - weight_FD @ tensors["b_dec"]
    threshold = tensors.get("threshold")
    return FoldedSAE(
        kind=start.architecture,
        encoder_weight=plain(weight_FD),
        encoder_bias=plain(bias_F),
        decoder_weight=plain(tensors["W_dec"].T),
        decoder_bias=plain(tensors["b_dec"]),
        k=start.k,
        threshold=None if threshold is None else plain(threshold),
        gain=None if gain is None else plain(gain),
    )


def _gated(start: Start, tensors: dict[str, Tensor]) -> FoldedSAE:
    """The magnitude m = e^r W x + b_mag, active where the gate W x + b_gate is positive: m > b_mag - e^r b_gate."""
    gain_F, gate_FD = tensors["r_mag"].exp(), tensors["W_enc"].T
    gate_bias_F, bias_F = tensors["b_gate"], tensors["b_mag"]
    threshold_F = bias_F - gain_F * gate_bias_F
    if start.reads_centred:  # moves m and its threshold alike, as the gate's bias moves too
        moved_F = gain_F * (gate_FD @ tensors["b_dec"])
        bias_F = bias_F - moved_F
    return FoldedSAE(
        kind="gated",
        encoder_weight=plain(gain_F[:, None] * gate_FD),
        encoder_bias=plain(bias_F),
        decoder_weight=plain(tensors["W_dec"].T),
        decoder_bias=plain(tensors["b_dec"]),
        threshold=plain(threshold_F),
        gain=plain(gain_F),
    )


def _rescaled(folded: FoldedSAE) -> FoldedSAE:
    """Latents by their decoder rows' norms, which the decoder takes away again: as if these had been 1."""
    return replace(replace(folded, k=None).with_unit_rows(), k=folded.k)
