"""Tiny models of every family, with random weights and a tokenizer trained on the spot, saved as ordinary folders."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

FAMILIES = (
    "gpt2", "gpt_neox", "llama", "mistral", "qwen2", "gemma", "gemma2", "phi", "opt",
    "bert", "roberta", "distilbert", "mpnet", "t5",
)  # fmt: skip
MORE_FAMILIES = ("gemma3_text", "bloom", "xlm-roberta", "mt5")
"""Known, and much like one of the others."""
ENCODERS = ("bert", "roberta", "distilbert", "mpnet", "t5")
D_IN = 32
LAYERS = 4
VOCAB = 320
POSITIONS = 64
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "A sparse autoencoder finds features in activations.",
    "Water boils at one hundred degrees; ice melts at zero.",
    "In the beginning was the word, and nobody had tokenised it yet.",
    "Numbers such as 3, 14 and 15 are kept apart from words.",
    "She said: nothing is lost, everything is counted twice.",
)


def tiny_model(family: str, folder: Path, *, seed: int = 0, padding_side: str | None = None, **overrides: Any) -> Path:
    """Save a tiny model of the family, and its tokenizer, to `folder`; `overrides` are fields of its config.

    Four blocks, 32 wide, 64 positions. Biases are drawn too, so that no part of the model is silent.
    """
    tokenizer = tiny_tokenizer(family)
    if padding_side is not None:
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = padding_side
    config = _config(family, tokenizer, overrides)
    torch.manual_seed(seed)
    model = _class(family)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_tokenizer(family: str) -> Any:
    """A tokenizer of the family's own make: byte-level BPE, WordPiece, or BPE on spaces with byte fallback."""
    match family:
        case "bert" | "distilbert":
            return _wordpiece("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]")
        case "mpnet":
            return _wordpiece("<s>", "</s>", "<pad>", "[UNK]", "<mask>")
        case "llama" | "mistral" | "gemma" | "gemma3_text":
            return _byte_fallback(("<s>", None), pad="</s>", padding_side="left")
        case "t5" | "mt5":
            return _byte_fallback((None, "</s>"), pad="<pad>")
        case "roberta" | "xlm-roberta":
            return _byte_level(("<s>", "</s>"), pad="<pad>")
        case "opt":
            return _byte_level(("</s>", None), pad="<pad>")
        case _:
            return _byte_level((None, None), pad="<|endoftext|>")


def _config(family: str, tokenizer: Any, overrides: dict[str, Any]) -> Any:
    common = {"vocab_size": VOCAB, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": 0, "eos_token_id": 1}
    wide = {"hidden_size": D_IN, "num_attention_heads": 4, "num_hidden_layers": LAYERS, "intermediate_size": 64}
    decoder = wide | {"num_key_value_heads": 2, "max_position_embeddings": POSITIONS}
    fields: dict[str, dict[str, Any]] = {
        "gpt2": {"n_embd": D_IN, "n_head": 4, "n_layer": LAYERS, "n_positions": POSITIONS},
        "gpt_neox": wide | {"max_position_embeddings": POSITIONS},
        "gemma": decoder | {"head_dim": 8},
        "gemma2": decoder | {"head_dim": 8},
        "gemma3_text": decoder | {"head_dim": 8},
        "bloom": {"hidden_size": D_IN, "n_head": 4, "n_layer": LAYERS},
        "opt": {
            "hidden_size": D_IN, "word_embed_proj_dim": D_IN, "num_attention_heads": 4, "num_hidden_layers": LAYERS,
            "ffn_dim": 64, "max_position_embeddings": POSITIONS,
        },
        "bert": wide | {"max_position_embeddings": POSITIONS},
        "roberta": wide | {"max_position_embeddings": POSITIONS + tokenizer.pad_token_id + 1},
        "mpnet": wide | {"max_position_embeddings": POSITIONS + tokenizer.pad_token_id + 1},
        "distilbert": {
            "dim": D_IN, "n_heads": 4, "n_layers": LAYERS, "hidden_dim": 64, "max_position_embeddings": POSITIONS,
        },
        "t5": {"d_model": D_IN, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS, "num_heads": 4, "is_gated_act": True},
    }  # fmt: skip
    fields |= {"xlm-roberta": fields["roberta"], "mt5": fields["t5"]}
    return transformers.AutoConfig.for_model(family, **(common | fields.get(family, decoder) | overrides))


def _class(family: str) -> Callable[[Any], Any]:
    """With its language model's head, as such models are usually saved."""
    names = {
        "gpt2": "GPT2LMHeadModel",
        "gpt_neox": "GPTNeoXForCausalLM",
        "opt": "OPTForCausalLM",
        "t5": "T5ForConditionalGeneration",
        "mt5": "MT5ForConditionalGeneration",
        "gemma3_text": "Gemma3ForCausalLM",
        "xlm-roberta": "XLMRobertaModel",
        "roberta": "RobertaModel",
        "bert": "BertForMaskedLM",
        "distilbert": "DistilBertModel",
        "mpnet": "MPNetModel",
    }
    made: Callable[[Any], Any] = getattr(transformers, names.get(family, f"{family.capitalize()}ForCausalLM"))
    return made


def _wordpiece(cls: str, sep: str, pad: str, unknown: str, mask: str) -> Any:
    """Characters and every other word of the sentences: not trained, because that training differs from run to run."""
    words = sorted(set(re.findall(r"[a-z0-9]+", " ".join(SENTENCES).lower())))
    characters = sorted(set("".join(SENTENCES).lower()) - {" "})
    pieces = [pad, unknown, cls, sep, mask, *characters, *(f"##{c}" for c in characters), *words[::2]]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    _frame(tokenizer, (cls, sep))
    return _fast(
        tokenizer_object=tokenizer, cls_token=cls, sep_token=sep, pad_token=pad, unk_token=unknown, mask_token=mask
    )


def _byte_level(frame: tuple[str | None, str | None], pad: str) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = sorted({"<s>", "</s>", pad, *filter(None, frame)})
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    _frame(tokenizer, frame)
    return _fast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token=pad)


def _byte_fallback(frame: tuple[str | None, str | None], pad: str, padding_side: str = "right") -> Any:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    special = ["<pad>", "</s>", "<s>", "<unk>"] + [f"<0x{byte:02X}>" for byte in range(32)]
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False)
    )
    _frame(tokenizer, frame)
    return _fast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token=pad,
        padding_side=padding_side,
    )  # fmt: skip


def _fast(**parts: Any) -> Any:
    made: Callable[..., Any] = transformers.PreTrainedTokenizerFast
    return made(**parts)


def _frame(tokenizer: Any, frame: tuple[str | None, str | None]) -> None:
    """Put special tokens before and after each text."""
    first, last = frame
    template = " ".join(filter(None, (first, "$A", last)))
    special = [(token, tokenizer.token_to_id(token)) for token in {first, last} if token is not None]
    post = processors.TemplateProcessing(single=template, special_tokens=special)
    tokenizer.post_processor = post
