"""Where the blocks of a transformer are, and through which module of a block the activations of each hook site flow.

Known families by attribute paths, others by structure; runs no model and loads none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mistudio_schemas import ErrorCode, HookSite
from mistudio_train.errors import ModelRefused, RequestRefused


@dataclass(frozen=True)
class Family:
    """Attribute paths: of the list of blocks within the trunk, and within a block of the modules whose output is
    exactly what the MLP, or the attention, adds to the residual stream, and of the one whose input is the MLP's.
    """

    blocks: str
    mlp: str
    attention: str
    mlp_in: str = "mlp"


_LLAMA: Final = Family("layers", "mlp", "self_attn")
_GEMMA2: Final = Family("layers", "post_feedforward_layernorm", "post_attention_layernorm")
_BERT: Final = Family("encoder.layer", "output.dense", "attention.output.dense", "intermediate")
_T5: Final = Family("encoder.block", "layer.1.DenseReluDense", "layer.0.SelfAttention", "layer.1.DenseReluDense")
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
    "bloom": Family("h", "mlp.dense_4h_to_h", "self_attention.dense"),
    "opt": Family("decoder.layers", "fc2", "self_attn", "fc1"),
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": Family("transformer.layer", "ffn", "attention", "ffn"),
    "mpnet": Family("encoder.layer", "output.dense", "attention.attn", "intermediate"),
    "t5": _T5,
    "mt5": _T5,
}
UNREADABLE: Final = ("xlnet", "fsmt")
"""Families whose blocks put the sequence before the batch: rows would be those of other texts."""
PLAIN: Final[dict[HookSite, Sequence[str]]] = {
    "mlp_in": ("mlp",),
    "mlp_out": ("mlp",),
    "attn_out": ("self_attn", "attn"),
}
"""Children of a block of an unknown family that go by these names hold no residual connection themselves; `attention`
is not among them, because in BERT's relatives it does.
"""
Look = Callable[[Tensor], Tensor | None]
"""Sees activations, and may give others that go on in their place."""


@dataclass(frozen=True, eq=False)
class Tap:
    """Where the activations of a site can be seen, and replaced: on their way into a module, or out of it."""

    module: nn.Module
    side: Literal["in", "out"]

    def hook(self, look: Look) -> RemovableHandle:
        """Show them to `look` in every forward pass, until the handle is removed."""
        if self.side == "out":
            return self.module.register_forward_hook(lambda _module, _inputs, output: _with_first(output, look))
        return self.module.register_forward_pre_hook(
            lambda _module, args, kwargs: _with_input(args, kwargs, look), with_kwargs=True
        )


def _with_first(output: Any, look: Look) -> Any:
    """What a module gives, its first tensor seen; `None`: as it was."""
    is_alone = isinstance(output, Tensor)
    others = look(output if is_alone else output[0])
    return others if is_alone or others is None else (others, *output[1:])


def _with_input(args: tuple[Any, ...], kwargs: dict[str, Any], look: Look) -> Any:
    """What a module is called with, its first argument seen; `None`: as it was."""
    others = look(args[0] if args else kwargs["hidden_states"])
    if others is None:
        return None
    return ((others, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": others})


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


def tap(block: nn.Module, model_type: str, hook_site: HookSite) -> Tap:
    """Where in a block the hook site's activations flow.

    Raises:
        RequestRefused: `request.hook_site_unsupported`, if that cannot be told.

    """
    if hook_site in ("resid_pre", "resid_post"):
        return Tap(block, "in" if hook_site == "resid_pre" else "out")
    family = FAMILIES.get(model_type)
    paths = PLAIN[hook_site] if family is None else (_path(family, hook_site),)
    module = next((module for path in paths if (module := _at(block, path)) is not None), None)
    if module is None:
        children = ", ".join(name for name, _ in block.named_children())
        raise site_refused(
            f"The hook site {hook_site} cannot be told in a block of the '{model_type}' model (it has {children})"
        )
    return Tap(module, "in" if hook_site == "mlp_in" else "out")


def site_refused(message: str) -> RequestRefused:
    """A site that the model has not, and what every model has."""
    return RequestRefused(
        message,
        "Use hook_site resid_pre or resid_post, the residual stream before or after the block.",
        ErrorCode.REQUEST_HOOK_SITE_UNSUPPORTED,
    )


def _path(family: Family, hook_site: HookSite) -> str:
    match hook_site:
        case "mlp_in":
            return family.mlp_in
        case "mlp_out":
            return family.mlp
        case _:
            return family.attention


def end_before(block: nn.Module) -> None:
    """Free the weights of a block that is still to be reached, but not to be run."""
    for module in block.modules():
        for name, _ in list(module.named_parameters(recurse=False)):
            setattr(module, name, None)


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
