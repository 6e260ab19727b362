"""The folder that EleutherAI's sparsify loads: `cfg.json` and `sae.safetensors`.

Owns how an SAE of ours is said in sparsify's words; must not import sparsify, which only the tests do.
"""

from pathlib import Path

from mistudio_train.sae.folded import FoldedSAE

from .files import refused, write_json, write_tensors


def sparsify_cannot(sae: FoldedSAE) -> str | None:
    """Why sparsify has no words for this SAE; `None` if it has: it knows nothing but the k largest of a row."""
    if sae.k is not None and sae.threshold is None:
        return None
    return f"sparsify keeps the k largest latents of a row, and {sae.kind!r} keeps others"


def write_sparsify(folder: Path, sae: FoldedSAE, *, transcodes: bool = False) -> None:
    """Write the folder that `SparseCoder.load_from_disk` reads.

    sparsify encodes x - b_dec, so W_enc b_dec goes into the encoder's bias; of a transcoder it encodes x.

    Args:
        folder: is made if missing.
        sae: folded.
        transcodes: whether what it reconstructs is not what it reads.

    Raises:
        ExportRefused: if sparsify cannot express it, or a number is not finite.
        DiskFull: if the disk has no room.

    """
    if reason := sparsify_cannot(sae):
        raise refused(reason)
    bias_F = sae.encoder_bias
    if not transcodes:
        bias_F = (bias_F.double() + sae.encoder_weight.double() @ sae.decoder_bias.double()).float()
    tensors = {
        "encoder.weight": sae.encoder_weight,
        "encoder.bias": bias_F,
        "W_dec": sae.decoder_weight.T,
        "b_dec": sae.decoder_bias,
    }
    write_tensors(folder / "sae.safetensors", tensors)
    write_json(
        folder / "cfg.json",
        {
            "activation": "topk",
            "expansion_factor": max(1, sae.d_sae // sae.d_in),
            "normalize_decoder": True,
            "num_latents": sae.d_sae,
            "k": sae.k,
            "multi_topk": False,
            "skip_connection": False,
            "transcode": transcodes,
            "d_in": sae.d_in,
        },
    )
