"""Where the blocks of a transformer are, and which module of a block gives the activations of each hook site.

Known families by attribute paths, others by structure; runs no model and loads none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import nn

from mistudio_schemas import ErrorCode, HookSite
from mistudio_train.errors import ModelRefused, RequestRefused


@dataclass(frozen=True)
class Family:
    """Attribute paths: of the list of blocks within the trunk, and within a block of the modules whose output is
    exactly what the MLP, or the attention, adds to the residual stream.
    """

    blocks: str
    mlp: str | None
    """`None`: what there is adds the residual stream itself."""
    attention: str | None


_LLAMA: Final = Family("layers", "mlp", "self_attn")
_GEMMA2: Final = Family("layers", "post_feedforward_layernorm", "post_attention_layernorm")
_BERT: Final = Family("encoder.layer", "output.dense", "attention.output.dense")
_T5: Final = Family("encoder.block", "layer.1.DenseReluDense", "layer.0.SelfAttention")
FAMILIES: Final[dict[str, Family]] = {
    "gpt2": Family("h", "mlp", "attn"),
    "gpt_neox": Family("layers", "mlp", "attention"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "phi": _LLAMA,
    "bloom": Family("h", None, None),
    "opt": Family("decoder.layers", "fc2", "self_attn"),
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": Family("transformer.layer", "ffn", "attention"),
    "mpnet": Family("encoder.layer", "output.dense", "attention.attn"),
    "t5": _T5,
    "mt5": _T5,
}
UNREADABLE: Final = ("xlnet", "fsmt")
"""Families whose blocks put the sequence before the batch: rows would be those of other texts."""
PLAIN_MLP: Final = ("mlp",)
PLAIN_ATTENTION: Final = ("self_attn", "attn")
"""Children of a block of an unknown family that go by these names hold no residual connection themselves; `attention`
is not among them, because in BERT's relatives it does.
"""


def find_blocks(trunk: nn.Module, model_type: str, total_layers: int) -> nn.ModuleList:
    """The list of the model's blocks.

    Raises:
        ModelRefused: `model.unsupported`, if no list, or more than one, can be it.

    """
    if model_type in UNREADABLE:
        raise ModelRefused(
            f"The blocks of the '{model_type}' model lay out a batch in a way that this version does not read",
            "Choose a model of another family.",
            ErrorCode.MODEL_UNSUPPORTED,
        )
    family = FAMILIES.get(model_type)
    known = _at(trunk, family.blocks) if family else None
    if isinstance(known, nn.ModuleList) and len(known) == total_layers:
        return known
    lists = _outer_lists(trunk, total_layers)
    if len(lists) == 1:
        return next(iter(lists.values()))
    found = f"there are {len(lists)} ({', '.join(lists)})" if lists else "there is none"
    raise ModelRefused(
        f"The blocks of the '{model_type}' model cannot be told: of lists of {total_layers} modules {found}",
        "Choose a model of another family.",
        ErrorCode.MODEL_UNSUPPORTED,
    )


def hooked_module(block: nn.Module, model_type: str, hook_site: HookSite) -> nn.Module:
    """The module of a block whose output is the hook site's.

    Raises:
        RequestRefused: `request.hook_site_unsupported`, if the block has no such module.

    """
    if hook_site == "resid_post":
        return block
    family = FAMILIES.get(model_type)
    if family is not None:
        path = family.mlp if hook_site == "mlp_out" else family.attention
        paths: Sequence[str] = () if path is None else (path,)
    else:
        paths = PLAIN_MLP if hook_site == "mlp_out" else PLAIN_ATTENTION
    module = next((module for path in paths if (module := _at(block, path)) is not None), None)
    if module is None:
        children = ", ".join(name for name, _ in block.named_children())
        raise RequestRefused(
            f"The hook site {hook_site} cannot be told in a block of the '{model_type}' model (it has {children})",
            "Use hook_site resid_post.",
            ErrorCode.REQUEST_HOOK_SITE_UNSUPPORTED,
        )
    return module


def _outer_lists(trunk: nn.Module, length: int) -> dict[str, nn.ModuleList]:
    """Lists of that many modules which have modules of their own, none of them inside another such list."""
    lists = {
        name: module
        for name, module in trunk.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == length and any(True for _ in module[0].children())
    }
    return {
        name: module
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists if other != name)
    }


def _at(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None
