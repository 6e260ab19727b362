"""`sae_model.pt`: the SAE as the seed describes it, a state dict of two linear layers with all that was known of it.

Owns the dict's fields and the promise that safe loading reads them; must not train, fold or judge an SAE.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from mistudio_train.sae.folded import FoldedSAE

from .files import refuse_unless_own, refuse_unless_plain, require, whole
from .torch_archive import Matrix, torch_archive, write_tensor

STATS: Final = ("losses", "sparsity_levels", "reconstruction_errors")
MEMORY_OPTIMIZATIONS: Final = (
    "model_name",
    "is_large_model",
    "recommended_batch_size",
    "recommended_sequence_length",
    "use_quantization",
    "use_gradient_checkpointing",
    "min_gpu_memory_gb",
)


def write_model_file(
    path: Path,
    sae: FoldedSAE,
    *,
    config: Mapping[str, object],
    training_stats: Mapping[str, object],
    sparsity_coeff: float | None,
    predicts: str | None = None,
    model_info: Mapping[str, object],
    memory_optimizations: Mapping[str, object],
) -> None:
    """Write the seed's dict. `relu(encoder(x))` gives the features, or `needs` says what else must be done.

    Args:
        path: the file.
        sae: on any device.
        config: the request's and the SAE's settings, resolved, without a token.
        training_stats: with `losses`, `sparsity_levels` and `reconstruction_errors`, one a logged epoch or step.
        sparsity_coeff: `None` for a kind without one.
        predicts: the hook site whose rows `decoder(features)` gives, where these are not x.
        model_info: the contract's `ModelInfo`, as a dict.
        memory_optimizations: what the memory plan recommends and does.

    Raises:
        ExportRefused: if a value is not plain, finite and named as it must be, if `config` holds a token, or if a
            tensor is not fp32, contiguous and alone in its storage.
        DiskFull: if the disk has no room.

    """
    weights = sae.state_dict()
    tensors = weights if sae.threshold is None else weights | {"threshold": sae.threshold}
    content: dict[str, object] = {
        "config": dict(config),
        "training_stats": dict(training_stats),
        "input_dim": sae.d_in,
        "hidden_dim": sae.d_sae,
        "feature_dim": sae.d_sae,
        "sparsity_coeff": sparsity_coeff,
        "model_info": dict(model_info),
        "memory_optimizations": dict(memory_optimizations),
        "kind": sae.kind,
        "k": sae.k,
        "needs": sae.needs,
        "predicts": predicts,
        "decoder_gives": (
            "x, the rows that the encoder reads"
            if predicts is None
            else f"the rows of {predicts} of the same block and tokens, not x: this is a transcoder"
        ),
    }
    require(training_stats, STATS, "training_stats")
    require(memory_optimizations, MEMORY_OPTIMIZATIONS, "memory_optimizations")
    refuse_unless_plain(content, path.name)
    refuse_unless_own(tensors, "model_state_dict")
    places = {name: Matrix(str(key), tuple(tensor.shape)) for key, (name, tensor) in enumerate(tensors.items())}
    size = 4 * sum(tensor.numel() for tensor in tensors.values())
    whole_content = {
        "model_state_dict": {name: places[name] for name in weights},
        **content,
        "threshold": places.get("threshold"),
    }
    with whole(path, size) as partial, torch_archive(partial, whole_content) as archive:
        for name, tensor in tensors.items():
            with archive.open(f"data/{places[name].key}") as record:
                write_tensor(record, tensor)
