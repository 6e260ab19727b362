"""The language model in memory: loaded without its head, cut behind the deepest block that is read, run up to there.

Owns the transformers library's side of things; knows no corpus, no files of activations and no SAE.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from mistudio_schemas import ErrorCode
from mistudio_train.errors import JobError, MemoryExhausted, ModelRefused

from .blocks import Look, Tap, end_before, find_blocks, site_refused, tap
from .memory_plan import MemoryPlan
from .model_source import ModelSource
from .sites import Site
from .tokenizer import load_tokenizer

logger = logging.getLogger(__name__)
TEXT_ENCODERS: Final = ("t5", "mt5", "umt5")
"""Encoder-decoders of which the library can load the encoder alone."""
UNUSED: Final = ("pooler.",)
"""Parts of a trunk that come after the blocks; files without them will do."""
NO_NEWS: Final = ("modeling_utils", "utils.loading_report", "distributed.tensor_parallel")
"""Of the library: reports of heads that nobody wants and of shards that nobody asked for. Missing weights we refuse."""
OUT_OF_MEMORY: Final = ("out of memory", "not enough memory", "can't allocate memory")


@dataclass(eq=False)
class LanguageModel:
    """A model that gives activations. One forward pass serves every site and ends at the deepest."""

    trunk: nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)
    source: ModelSource
    sites: tuple[Site, ...]
    device: torch.device
    dtype: torch.dtype
    taps: dict[Site, Tap] = field(repr=False)
    """Where each site's activations flow."""
    warnings: list[str] = field(default_factory=list)
    """What the requester should know of the loading."""

    @property
    def d_in(self) -> int:
        """Width of every site's rows."""
        return self.source.d_in

    @property
    def pad_id(self) -> int:
        """What padding is filled with."""
        return _pad_id(self.source, self.tokenizer)

    @torch.inference_mode()
    def activations(self, ids_BT: Tensor, mask_BT: Tensor) -> dict[Site, Tensor]:
        """Run the blocks up to the deepest site.

        Args:
            ids_BT: int64 token ids, padded on the right with `pad_id`, on the device.
            mask_BT: int64, 1 for tokens and 0 for padding.

        Returns:
            Each site's activations [B, T, d_in], in the model's precision, on the device.

        """
        caught: dict[Site, Tensor] = {}
        looks = {site: partial(_catch, site, caught, len(self.taps)) for site in self.taps}
        with _hooked(self.taps, looks), suppress(_AllCaught):
            self.trunk(input_ids=ids_BT, attention_mask=mask_BT)
        return {site: self._by_text(self._seen(site, caught), *ids_BT.shape) for site in self.sites}

    @torch.inference_mode()
    def module_of(self, site: Site) -> str | None:
        """The path of the module whose output a site's activations are, the outermost one: its own, or where they are
        what goes into one, that which they came out of; `None` where no module gives them as they are.
        """
        at = self.taps[site]
        if at.side == "out":
            paths: dict[nn.Module, str] = {module: path for path, module in self.trunk.named_modules()}
            return paths[at.module]
        given: list[tuple[str, Tensor]] = []  # kept, so that no other tensor takes the place of one in memory

        def keep(path: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor):
                given.append((path, first))

        handles = [
            module.register_forward_hook(partial(keep, path)) for path, module in self.trunk.named_modules() if path
        ]
        ids_BT = torch.full((1, 2), self.pad_id, device=self.device)
        try:
            acts = self.activations(ids_BT, torch.ones_like(ids_BT))[site]
        finally:
            for handle in handles:
                handle.remove()
        same = [path for path, x in given if (x.data_ptr(), x.numel()) == (acts.data_ptr(), acts.numel())]
        return same[-1] if same else None

    def _seen(self, site: Site, caught: dict[Site, Tensor]) -> Tensor:
        if site not in caught:
            raise site_refused(f"{self.source.name} runs past the module that gives {site}")
        return caught[site]

    def _by_text(self, acts: Tensor, batch: int, length: int) -> Tensor:
        """[B, T, d_in]; some families have one row a token inside their blocks."""
        if acts.shape not in ((batch, length, self.d_in), (batch * length, self.d_in)):
            raise ModelRefused(
                f"The blocks of {self.source.name} give activations of shape {list(acts.shape)} for {batch} sequences "
                f"of {length} tokens",
                "Choose a model of another family.",
                ErrorCode.MODEL_UNSUPPORTED,
            )
        return acts.reshape(batch, length, self.d_in)


@dataclass(eq=False)
class HeadedModel:
    """A whole model, which predicts tokens with something else in the place of a site's activations."""

    model: Any = field(repr=False)
    taps: dict[Site, Tap] = field(repr=False)
    """Where each site's activations flow."""
    device: torch.device
    causal: bool
    """Whether it predicts each next token, or masked ones."""
    vocabulary: int
    """Entries of a prediction."""
    pad_id: int
    """What padding is filled with."""
    mask_id: int | None
    """The token that stands for a masked one, if there is one."""

    @torch.inference_mode()
    def logits(self, ids_BT: Tensor, mask_BT: Tensor, looks: Mapping[Site, Look] | None = None) -> Tensor:
        """Predictions [B, T, vocabulary].

        Args:
            ids_BT: int64, padded on the right, on the device.
            mask_BT: int64, 1 for tokens.
            looks: see a site's activations, [B · T, d_in] in the model's precision, and may give others instead.

        """
        with _hooked(self.taps, {site: partial(_by_row, look) for site, look in (looks or {}).items()}):
            found: Tensor = self.model(input_ids=ids_BT, attention_mask=mask_BT).logits
        return found


def _pad_id(source: ModelSource, tokenizer: Any) -> int:
    """The model's own, as some families derive positions from it; else the tokenizer's."""
    for value in (source.text_config.get("pad_token_id"), tokenizer.pad_token_id):
        if isinstance(value, int) and 0 <= value < (source.vocab_size or value + 1):
            return value
    return 0


@contextmanager
def _hooked(taps: Mapping[Site, Tap], looks: Mapping[Site, Look]) -> Iterator[None]:
    """Forward passes that these look at."""
    with ExitStack() as stack:
        for site, look in looks.items():
            stack.callback(taps[site].hook(look).remove)
        yield


def _by_row(look: Look, acts: Tensor) -> Tensor | None:
    others = look(acts.reshape(-1, acts.shape[-1]))
    return None if others is None else others.reshape(acts.shape).to(acts.dtype)


class _AllCaught(Exception):
    """Every site has been seen."""


def _catch(site: Site, caught: dict[Site, Tensor], wanted: int, acts: Tensor) -> None:
    caught[site] = acts
    if len(caught) == wanted:
        raise _AllCaught


def load(
    source: ModelSource,
    plan: MemoryPlan,
    sites: Sequence[Site],
    *,
    token: str | None = None,
    allow_unsafe: bool = False,
) -> LanguageModel:
    """Bring the model's files here, load it as planned, and free the blocks behind the deepest site.

    Raises:
        ModelRefused: `model.load_failed`, or as `inspect` and `find_blocks`.
        HubUnreachable: while its files are fetched.
        RequestRefused: if a hook site cannot be told.
        MemoryExhausted: if it does not fit although it was planned to.

    """
    folder = _folder(source, token, allow_unsafe)
    with _load_errors(source.name):
        tokenizer = load_tokenizer(folder, source.name, allow_unsafe=allow_unsafe)
        trunk, warnings = _planned(partial(_trunk, source, folder), plan, allow_unsafe)
    _freeze(trunk)
    blocks = find_blocks(trunk, source.architecture, source.total_layers)
    taps = {site: tap(blocks[site.layer], source.architecture, site.hook_site) for site in sites}
    _cut(blocks, sites)
    dtype = next(weight.dtype for weight in trunk.parameters() if weight.is_floating_point())
    device = torch.device(plan.device)
    return LanguageModel(trunk, tokenizer, source, tuple(sites), device, dtype, taps, warnings)


def load_with_head(
    source: ModelSource,
    plan: MemoryPlan,
    sites: Sequence[Site],
    *,
    token: str | None = None,
    allow_unsafe: bool = False,
) -> HeadedModel:
    """Load the whole model, with the head that predicts tokens.

    Raises:
        ModelRefused: if it has no such head, or as `load`.
        HubUnreachable, RequestRefused, MemoryExhausted: as `load`.

    """
    folder = _folder(source, token, allow_unsafe)
    with _load_errors(source.name):
        tokenizer = load_tokenizer(folder, source.name, allow_unsafe=allow_unsafe)
        model, _ = _planned(partial(_headed, source, folder), plan, allow_unsafe)
    _freeze(model)
    blocks = find_blocks(model.base_model, source.architecture, source.total_layers)
    taps = {site: tap(blocks[site.layer], source.architecture, site.hook_site) for site in sites}
    return HeadedModel(
        model,
        taps,
        torch.device(plan.device),
        is_causal(source.architecture),
        source.vocab_size,
        _pad_id(source, tokenizer),
        tokenizer.mask_token_id,
    )


def _cut(blocks: nn.ModuleList, sites: Sequence[Site]) -> None:
    """Free what lies behind the deepest site: later blocks, and the one that it is what goes into."""
    deepest = max(site.layer for site in sites)
    del blocks[deepest + 1 :]
    if max(site.blocks for site in sites) <= deepest:
        end_before(blocks[deepest])


def is_causal(architecture: str) -> bool:
    """Whether the family is a decoder: it has a causal head and no masked one, which encoders have."""
    causal, masked = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return architecture in causal and architecture not in masked


def _folder(source: ModelSource, token: str | None, allow_unsafe: bool) -> Path:
    """Where the model's files are, fetched if they are not here."""
    # The lease counts GPUs in the driver's order; CUDA by itself would put the fastest first.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    _speak_as_we_do()
    if source.folder is not None:
        return source.folder
    from . import hub

    return hub.fetch(source.name, str(source.commit), token, allow_unsafe=allow_unsafe)


def _freeze(model: Any) -> None:
    model.eval().requires_grad_(False)
    model.config.use_cache = False


def _speak_as_we_do() -> None:
    """Transformers' lines go to our log, in its format and with its levels, and its bars nowhere."""
    said: Any = transformers.utils.logging
    said.disable_default_handler()
    said.enable_propagation()
    said.disable_progress_bar()
    for name in NO_NEWS:
        logging.getLogger(f"transformers.{name}").setLevel(logging.ERROR)


def _planned(loaded: Callable[[dict[str, Any]], Any], plan: MemoryPlan, allow_unsafe: bool) -> tuple[Any, list[str]]:
    """A model on its device, as planned; without quantisation, and with a warning, where quantisation fails."""
    options: dict[str, Any] = {
        "local_files_only": True,
        "trust_remote_code": allow_unsafe,
        "dtype": getattr(torch, plan.dtype),
        "output_loading_info": True,
    }
    if not allow_unsafe:
        options["use_safetensors"] = True
    if plan.quantization == "nf4":
        try:
            return loaded(options | _nf4(plan.device)), []
        except (ImportError, RuntimeError, ValueError) as error:
            logger.warning("quantisation failed, loading without it: %s", error)
            return loaded(options).to(plan.device), [
                f"4-bit loading failed ({type(error).__name__}); the model is loaded in {plan.dtype}"
            ]
    return loaded(options).to(plan.device), []


def _nf4(device: str) -> dict[str, Any]:
    make: Any = transformers.BitsAndBytesConfig
    quantization = make(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def _trunk(source: ModelSource, folder: Path, options: dict[str, Any]) -> Any:
    """The model without a head; of an encoder-decoder only the encoder.

    Raises:
        ValueError: if the files lack weights: the library would draw them at random, and say so only in a log line.
    """
    if not source.config.get("is_encoder_decoder"):
        trunk, report = transformers.AutoModel.from_pretrained(folder, **options)
    elif source.architecture in TEXT_ENCODERS:
        trunk, report = transformers.AutoModelForTextEncoding.from_pretrained(folder, **options)
    else:
        whole, report = transformers.AutoModel.from_pretrained(folder, **options)
        trunk = whole.get_encoder()
    _refuse_missing(report["missing_keys"])
    return trunk


def _headed(source: ModelSource, folder: Path, options: dict[str, Any]) -> Any:
    """The model with its head.

    Raises:
        ValueError: if the family has none, or the files lack its weights.
    """
    if source.config.get("is_encoder_decoder"):
        raise ValueError("an encoder-decoder's encoder predicts no tokens")
    auto: Any = (
        transformers.AutoModelForCausalLM if is_causal(source.architecture) else transformers.AutoModelForMaskedLM
    )
    model, report = auto.from_pretrained(folder, **options)
    _refuse_missing(report["missing_keys"])
    return model


def _refuse_missing(names: Iterable[str]) -> None:
    missing = sorted(name for name in names if not name.startswith(UNUSED))
    if missing:
        raise ValueError(f"its files lack {len(missing)} weights, {missing[0]} among them")


@contextmanager
def _load_errors(name: str) -> Iterator[None]:
    try:
        yield
    except JobError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, MemoryError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise MemoryExhausted(
                f"The memory was exhausted while {name} was loaded", "Use a smaller model or a larger machine."
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelRefused(
            f"{name} cannot be loaded: {reason}",
            "It must load with transformers' AutoModel and AutoTokenizer, from safetensors, without code of its own.",
            ErrorCode.MODEL_LOAD_FAILED,
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or the machine, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in OUT_OF_MEMORY)
