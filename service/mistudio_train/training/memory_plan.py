"""Whether a job fits its device, and how it is to be run there, planned from shapes before any weight is read.

Counts bytes and asks the driver and the system what is free; imports no torch, loads nothing.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from mistudio_schemas import SAEConfig, StandardSAE, TrainRequested
from mistudio_train.errors import NotEnoughMemory
from mistudio_train.gpu import Gpu
from mistudio_train.messages import JobSpec

from .device import Device, leased_device
from .model_source import ModelSource
from .recommendations import recommendations
from .sites import resolve_sites

GIB: Final = 1024**3
Dtype = Literal["float32", "bfloat16", "float16"]
BYTES: Final[dict[Dtype, int]] = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4_BYTES: Final = 0.52
"""A 4-bit weight with its doubly quantised scales."""
STEP_BYTES: Final = 16 * 1024**2
"""Of a training on a CPU besides `Copies`."""
BATCH_OF_TOKENS, BATCH_OF_MEANS = 1024, 256
"""Rows a step where the request does not say."""
LOGITS_BYTES: Final = 256 * 1024**2
"""Of the predictions of one forward pass, with the copies that the loss makes."""
MAX_TOKENS_CPU: Final = 2048
"""Beyond this a forward pass on a CPU gains nothing: its activations leave the cache."""
MAX_TOKENS_GPU: Final = 65536
LARGE_PARAMETERS: Final = 2_000_000_000
"""A model of so many parameters is reported as large (the seed's list begins there, with Phi-2)."""


@dataclass(frozen=True)
class Copies:
    """How many fp32 matrices a training holds at its peak: of some shapes, on average, what is kept unused included."""

    parameters: float
    """As large as all parameters: weights, gradients, Adam's two moments, and what a step makes of them."""
    places: float
    """[batch, d_sae]."""
    rows: float
    """[batch, d_in]."""

    def bytes(self, d_in: int, d_sae: int, batch_size: int) -> int:
        """Of the training of an SAE."""
        parameters = 2 * d_in * d_sae + d_sae + d_in
        places, rows = batch_size * d_sae, batch_size * d_in
        return int(4 * (self.parameters * parameters + self.places * places + self.rows * rows))


COPIES_GPU: Final = Copies(7, 8, 8)
"""Of any kind, and safe for all."""
COPIES_CPU: Final = {
    "topk": Copies(7.7, 1.1, 2),
    "batchtopk": Copies(7.5, 1.4, 3.5),
    "matryoshka": Copies(6.2, 1.3, 47),
    "jumprelu": Copies(6.2, 2.2, 5),
    "gated": Copies(4.9, 13.9, 0),
    "standard": Copies(4, 15, 0),
    "decoder_norm": Copies(5.3, 6.8, 4),
}
"""Fitted to processes that did nothing else (`benchmarks/step_memory.py`). Kinds that may begin with half of their
latents active hold dense matrices then, and as many again in pieces that the C library keeps for the next step."""


TARGET_COPIES: Final = 6
"""[batch, d_in], of a transcoder: four batches that are made ahead, the one of the step, and scaled."""


@dataclass(frozen=True)
class MemoryPlan:
    """How the job is to be run."""

    device: str
    """`cpu` or `cuda:0`."""
    dtype: Dtype
    """Of the language model."""
    quantization: Literal["none", "nf4"]
    tokens_per_batch: int
    """Tokens of a forward pass, padding included."""
    model_bytes: int
    """Of the weights while they are loaded; those behind the deepest site are freed then."""
    sae_bytes: int
    """Of the largest SAE in training."""
    planned_bytes: int
    """The job's peak on its device."""
    available_bytes: int
    """What the lease allows there."""
    parameters: int
    weights_run: int = 0
    """Numbers in the matrices of the blocks that run for the deepest site: each meets every token once."""
    weights_of_blocks: int = 0
    """The same of all blocks."""
    memory_optimizations: dict[str, Any] = field(default_factory=dict)
    """What the job's metadata says of it, with the seed's keys."""
    splices: bool = False
    """Whether there is room for the whole model beside the SAEs, to see what it loses with one in its place."""
    warnings: tuple[str, ...] = ()


def plan_memory(source: ModelSource, spec: JobSpec, device: Device | None = None) -> MemoryPlan:
    """Plan a job: precision, quantisation, and tokens a forward pass.

    The language model is gone when the SAEs are trained, one after another, so the peak is the larger of the two.

    Args:
        source: the model.
        spec: the job.
        device: `None`: what the lease gives right now.

    Raises:
        NotEnoughMemory: saying how much is needed, how much there is, and what to lower.
        GpuUnavailable: if the lease's GPU does not answer.

    """
    device = device or leased_device(spec.lease, spec.memory_limit_bytes)
    length = source.sequence_limit(spec.request.max_sequence_length)
    dtype = _dtype(spec.request.dtype, device.gpu)
    shapes = trunk_shapes(source, spec.token)
    blocks = max(site.blocks for site in resolve_sites(spec.request, source.total_layers).distinct)
    per_token = bytes_per_token(source, dtype, length)
    sae_bytes = saes_bytes(source.d_in, spec, on_cpu=device.gpu is None)
    room = device.available_bytes - device.overhead
    quantization = _quantization(spec.request.quantization, device, shapes, dtype, room - length * per_token)
    kept_bytes = weight_bytes(first_blocks(blocks, shapes), dtype, quantization)
    model_bytes = kept_bytes if _is_mapped(source, device, dtype) else weight_bytes(shapes, dtype, quantization)
    needed = max(model_bytes, kept_bytes + length * per_token, sae_bytes)
    if needed > room:
        raise _too_large(needed + device.overhead, device, sae_bytes >= needed)
    cap = MAX_TOKENS_GPU if device.gpu else MAX_TOKENS_CPU
    tokens = max(length, _power_of_two(min(cap, (room - kept_bytes) // per_token)))
    wants_splices, splicing = _splicing(spec.request), splicing_bytes(source, spec, dtype, quantization)
    splices = wants_splices and splicing <= room
    extracting = kept_bytes + tokens * per_token
    planned = device.overhead + max(model_bytes, extracting, sae_bytes, splicing if splices else 0)
    plan = MemoryPlan(
        device.name, dtype, quantization, tokens, model_bytes, sae_bytes, planned, device.available_bytes,
        sum(map(_size, shapes.values())), _in_matrices(first_blocks(blocks, shapes)), _in_matrices(shapes),
        splices=splices, warnings=_warnings(spec.request.quantization, quantization),
    )  # fmt: skip
    if wants_splices and not splices:
        too_large = f"the whole model needs {splicing / GIB:.2f} GiB: its cross-entropy with an SAE is not measured"
        plan = replace(plan, warnings=(*plan.warnings, too_large))
    plan.memory_optimizations.update(_optimizations(source.name, plan, length))
    return plan


def trunk_shapes(source: ModelSource, token: str | None = None) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights that will be loaded: no head, and of an encoder-decoder only the encoder."""
    shapes = source.parameter_shapes(token) or _estimated_shapes(source)
    skipped: tuple[str, ...] = ("lm_head.", "embed_out.", "cls.", "score.", "classifier.")
    if source.config.get("is_encoder_decoder"):
        skipped = (*skipped, "decoder.", "model.decoder.")
    return {name: shape for name, shape in shapes.items() if not name.startswith(skipped)}


def first_blocks(count: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Without the other blocks: a block's weights have its number as the first one in their names."""
    numbers = {name: re.search(r"(?:^|\.)(\d+)\.", name) for name in shapes}
    return {name: shapes[name] for name, number in numbers.items() if number is None or int(number[1]) < count}


def _in_matrices(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Of the blocks alone: embeddings are looked up."""
    return sum(_size(shape) for name, shape in shapes.items() if len(shape) == 2 and re.search(r"(?:^|\.)\d+\.", name))


def _is_mapped(source: ModelSource, device: Device, dtype: Dtype) -> bool:
    """Whether weights stay in their files until they are used: on a CPU that computes in what they are stored in."""
    stored = source.text_config.get("dtype") or source.text_config.get("torch_dtype")
    return device.gpu is None and stored == dtype


def splicing_bytes(source: ModelSource, spec: JobSpec, dtype: Dtype, quantization: str) -> int:
    """Bytes of the whole model with its head, its predictions, and the weights of all SAEs."""
    shapes = source.parameter_shapes(spec.token) or _estimated_shapes(source)
    saes = sum(4 * 2 * source.d_in * (sae.hidden_dim or 0) for sae in spec.request.resolved_saes())
    return weight_bytes(shapes, dtype, quantization) + LOGITS_BYTES + saes


def _splicing(request: TrainRequested) -> bool:
    """Whether the request wants it; the mean of a text has no place in the model."""
    return bool(request.pooling == "token" and request.cross_entropy_tokens and request.held_out_share)


def weight_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: Dtype, quantization: str) -> int:
    """Bytes of the weights on the device. Quantised are matrices, but not embeddings."""
    total = 0.0
    for name, shape in shapes.items():
        small = quantization == "nf4" and len(shape) == 2 and not re.search(r"embed|wte|wpe|shared", name)
        total += _size(shape) * (NF4_BYTES if small else BYTES[dtype])
    return int(total)


def bytes_per_token(source: ModelSource, dtype: Dtype, length: int) -> int:
    """Bytes of a forward pass' temporaries for each token: the residual stream with its copies in a block, the MLP's
    inside, and attention scores, which some families compute whole.
    """
    scores = 2 * source.heads * length
    return BYTES[dtype] * (10 * source.d_in + 3 * source.d_mlp + scores) + 4 * source.d_in


def saes_bytes(d_in: int, spec: JobSpec, *, on_cpu: bool) -> int:
    """Bytes of the largest SAE in training, beside it the weights of those that are done, and on a CPU the buffers that
    rows are shuffled in.
    """
    request, batch = spec.request, BATCH_OF_MEANS if spec.request.pooling == "mean" else BATCH_OF_TOKENS
    saes = [(sae, sae.hidden_dim or 0) for sae in request.resolved_saes()]
    training = max(sae_training_bytes(sae, d_in, d_sae, sae.batch_size or batch, on_cpu=on_cpu) for sae, d_sae in saes)
    done = 4 * 2 * d_in * (sum(d_sae for _, d_sae in saes) - max(d_sae for _, d_sae in saes))
    return training + done + (_buffer_bytes(d_in, spec) if on_cpu else 0)


def _buffer_bytes(d_in: int, spec: JobSpec) -> int:
    """Two buffers, or all rows where the corpus has so few bytes; of a packed one or conversations it may be any."""
    request, most = spec.request, 2 * spec.request.shuffle_bytes
    tokens = _most_tokens(spec, most)
    sites = 1 + any(sae.predicts for sae in request.resolved_saes())
    return min(most, 4 * sites * d_in * min(tokens, request.token_budget or tokens))


def _most_tokens(spec: JobSpec, most: int) -> int:
    """As many as the corpus has bytes; `most` where these do not tell."""
    request = spec.request
    packed = request.corpus_file.lower().endswith((".gz", ".parquet"))
    if spec.corpus is None or packed or request.corpus_holds == "conversations":
        return most
    return spec.corpus.stat().st_size if spec.corpus.exists() else 0


def sae_training_bytes(sae: SAEConfig, d_in: int, d_sae: int, batch_size: int, *, on_cpu: bool) -> int:
    """Bytes of an SAE in training; a transcoder's rows are twice as wide, and it holds some of both halves."""
    targets = 0 if sae.predicts is None else 4 * TARGET_COPIES * batch_size * d_in
    if not on_cpu:
        return COPIES_GPU.bytes(d_in, d_sae, batch_size) + targets
    kind = "decoder_norm" if isinstance(sae, StandardSAE) and sae.penalty == "decoder_norm" else sae.kind
    return STEP_BYTES + COPIES_CPU[kind].bytes(d_in, d_sae, batch_size) + targets


def _dtype(asked: str, gpu: Gpu | None) -> Dtype:
    match asked:
        case "float32" | "bfloat16" | "float16":
            return asked
    if gpu is None:
        return "float32"
    return "bfloat16" if gpu.supports_bfloat16 else "float16"


def _quantization(
    asked: str, device: Device, shapes: Mapping[str, tuple[int, ...]], dtype: Dtype, room: int
) -> Literal["none", "nf4"]:
    """4-bit weights where they are asked for, or nothing else fits; only a GPU can compute with them."""
    if device.gpu is None or asked == "none":
        return "none"
    return "nf4" if asked == "nf4" or weight_bytes(shapes, dtype, "none") > room else "none"


def _warnings(asked: str, quantization: str) -> tuple[str, ...]:
    if asked == quantization or asked == "auto":
        return ()
    return ("4-bit weights need a GPU: the model is loaded without quantisation",)


def _too_large(needed: int, device: Device, sae: bool) -> NotEnoughMemory:
    lower = "hidden_dim or batch_size" if sae else "max_sequence_length, or choose a smaller model"
    return NotEnoughMemory(
        f"{'The SAE' if sae else 'The model'} needs {needed / GIB:.2f} GiB on {device.name}, "
        f"{device.available_bytes / GIB:.2f} GiB are available",
        f"Lower {lower}, or use a worker with more memory.",
    )


def _estimated_shapes(source: ModelSource) -> dict[str, tuple[int, ...]]:
    """A transformer of the config's numbers, for weights whose shapes cannot be had without reading them."""
    d, inner = source.d_in, source.d_mlp
    block = {"attention": (4 * d, d), "mlp": (3 * d, inner)}
    shapes: dict[str, tuple[int, ...]] = {
        f"{i}.{name}": shape for i in range(source.total_layers) for name, shape in block.items()
    }
    return shapes | {"embed": (source.vocab_size, d)}


def _power_of_two(value: int) -> int:
    """The next lower one: a little more or less free memory then gives the same batches, and the same last digits."""
    return 1 << max(0, value.bit_length() - 1)


def _size(shape: Sequence[int]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product


def _optimizations(model_name: str, plan: MemoryPlan, length: int) -> dict[str, Any]:
    return recommendations(model_name) | {
        "is_large_model": plan.parameters >= LARGE_PARAMETERS,
        "recommended_batch_size": max(1, plan.tokens_per_batch // length),
        "recommended_sequence_length": length,
        "use_quantization": plan.quantization != "none",
        "use_gradient_checkpointing": False,  # nothing is differentiated through the language model
        "min_gpu_memory_gb": round(plan.planned_bytes / GIB, 3),
        "planned_bytes": plan.planned_bytes,
        "model_bytes": plan.model_bytes,
        "sae_bytes": plan.sae_bytes,
        "available_bytes": plan.available_bytes,
        "tokens_per_batch": plan.tokens_per_batch,
        "dtype": plan.dtype,
    }
