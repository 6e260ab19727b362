"""What a language model's own token embeddings know of the words of its texts: which are near each other in meaning.

Reads a run's feature store, the model's tokenizer and that one weight; runs no model and loads no torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import safe_open
from tokenizers import Tokenizer

from .feature_choice import Meaning
from .feature_words import Activations, Tokenized, Words, read_activations

EMBEDDINGS: Final = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
"""How the names of token embeddings end."""
SHORTEST: Final = 3
"""Letters of a plain word."""
FUNCTION_WORDS: Final = """
a about above after again against all also although always am among an and another any are art as at away be because
been before behind being below beneath beside besides between beyond both but by can could did didst do does doest
dost doth down during each either else even ever every few for from had has hast hath have having he hence her here
hers herself him himself his hither how howbeit however i if in indeed into is it its itself least less lest like many
may me might mine more most much must my myself nay neither never next no nor not now of off often on once one only or
other others otherwise ought our ours out over own perhaps rather same several shall shalt she should since so some
such than that the thee their theirs them themselves then thence there thereby therefore these they thine this those
thou though through thus thy thyself till to together too toward towards under unless until unto up upon us very was
wast way we were what whatever when whence where wherefore whereof whether which while whither who whole whom whose
why will wilt with within without would ye yea yes yet you your yours yourself yourselves
"""
IGNORED: Final = frozenset(FUNCTION_WORDS.split())
"""English words, old ones too, that say how others belong together: a feature on them is dull to a reader."""


def read_features(folder: Path, texts: Sequence[str], model: Path) -> tuple[Activations, Words, Meaning]:
    """A run's activations on words, and what the model's own token embeddings know of those words.

    Args:
        folder: of the run's files.
        texts: it was trained on, in order.
        model: the model's folder.

    """
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    def tokenize(text: str) -> Tokenized:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        return Tokenized(encoded.ids, encoded.offsets)

    words = Words.of(texts)
    activations = read_activations(folder / "features" / "activations.parquet", words, tokenize)
    # in the middle of a sentence, where most words are
    ids = [tokenize(f" {name}").ids for name in words.names]
    return activations, words, meaning_of(words.names, ids, token_embeddings(model))


def meaning_of(names: Sequence[str], ids: Sequence[Sequence[int]], embeddings_VD: Any) -> Meaning:
    """A word's vector is the mean embedding of its tokens, less the mean of all tokens.

    A plain word has three letters or more, is so common that the tokenizer has a token for it, and no function word.
    """
    centred_VD = embeddings_VD - embeddings_VD.mean(0)
    vectors = np.stack([centred_VD[list(own)].mean(0) if own else np.zeros(centred_VD.shape[1]) for own in ids])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-9
    plain = [is_plain(name) and len(own) == 1 for own, name in zip(ids, names, strict=True)]
    return Meaning(vectors.astype(np.float32), np.array(plain, dtype=bool))


def is_plain(name: str) -> bool:
    """Whether it looks like a word with a meaning of its own."""
    return len(name) >= SHORTEST and name.isalpha() and name not in IGNORED


def token_embeddings(model: Path) -> Any:
    """[vocabulary, width], out of the model's weights."""
    with safe_open(model / "model.safetensors", "np") as weights:
        (name,) = [key for key in weights.keys() if key.endswith(EMBEDDINGS)]  # noqa: SIM118
        return weights.get_tensor(name)
