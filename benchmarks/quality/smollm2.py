"""The residual stream after block 9 of SmolLM2-135M on English text, and what the model loses with an SAE in its place.

Extracted once, with the worker's own functions, into the cache: passages of the King James Bible and paragraphs of
Python's help, 128 tokens a window. A fifth of the texts is held out, one in three of these to tune on and the others to
be judged by. First tokens, and norms above three times the median, are left out of training and validation.
"""

from collections.abc import Iterable
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.quality.data import Change, Data, sample_of, scale_of
from mistudio_schemas import TopKSAE, TrainRequested
from mistudio_stack.artefacts import cached
from mistudio_train.cli.demo_inputs import _bible, _evenly, _help_texts, smollm2_folder, write_corpus
from mistudio_train.training.corpus import open_corpus
from mistudio_train.training.extract import Extraction, extract
from mistudio_train.training.language_model import HeadedModel, load, load_with_head
from mistudio_train.training.memory_plan import MemoryPlan
from mistudio_train.training.model_source import ModelSource, inspect
from mistudio_train.training.order import RowOrder
from mistudio_train.training.selection import OUTLIER, Selection, hold_out, select
from mistudio_train.training.sites import Site
from mistudio_train.training.spliced import replaced_where
from mistudio_train.training.texts import Texts
from mistudio_train.training.tokens import padded

FOLDER: Final = "quality-smollm2-1"
SITE: Final = Site(9)
BIBLE: Final = 1600
"""Passages; of the help there is less, and all is taken."""
HELD_OUT: Final = 0.2
PREDICTED: Final = 4096
"""Tokens that are predicted with an SAE in the model's place, about."""
WINDOWS_AT_ONCE: Final = 4
PLAN: Final = MemoryPlan("cpu", "float32", "none", 2048, 0, 0, 0, 0, 0)


class Nothing:
    """No shard is kept from an earlier attempt."""

    def shard(self, number: int) -> int | None:
        """There is none."""
        return None

    def keep_shard(self, number: int, tokens_per_batch: int, files: Iterable[Path]) -> None:
        """Not."""


@lru_cache(maxsize=1)
def smollm2() -> Data:
    """From the cache; what is missing there is made, in about five minutes."""
    folder = cached(FOLDER, build)
    made: dict[str, Any] = torch.load(folder / "rows.pt", mmap=True, weights_only=True)
    windows: dict[str, Tensor] = torch.load(folder / "windows.pt", weights_only=True)
    spliced = SmolLM2(windows, float(made["scale"]))
    return Data(made["train"], made["validation"], made["test"], made["ordinary"], spliced=spliced)


class SmolLM2:
    """The whole model on a few held-out windows."""

    def __init__(self, windows: dict[str, Tensor], scale: float) -> None:
        self._windows, self._scale = windows, scale

    @cached_property
    def _model(self) -> HeadedModel:
        return load_with_head(_source(), PLAN, [SITE])

    def recovered(self, change: Change) -> dict[str, float]:
        """The loss in nats a token when scaled rows go through `change`, and the shares that are recovered."""
        scale = self._scale
        loss = loss_of(self._model, self._windows, lambda x_ND: change(x_ND * scale) / scale)
        clean, zero, mean = (float(self._windows[name]) for name in ("clean", "zero", "mean"))
        return {
            "cross_entropy": loss,
            "recovered_zero": (zero - loss) / (zero - clean),
            "recovered_mean": (mean - loss) / (mean - clean),
        }


def loss_of(model: HeadedModel, windows: dict[str, Tensor], change: Change | None) -> float:
    """Mean cross-entropy of each next token, with the rows of the windows changed that are not left out."""
    total, predicted = 0.0, int(windows["mask"][:, 1:].sum())
    for start in range(0, len(windows["ids"]), WINDOWS_AT_ONCE):
        ids_BT, mask_BT, judged_BT = (
            windows[name][start : start + WINDOWS_AT_ONCE] for name in ("ids", "mask", "judged")
        )
        looks = {SITE: partial(replaced_where, judged_BT.flatten(), change)} if change else {}
        logits_BTV = model.logits(ids_BT, mask_BT, looks)
        asked_BT = mask_BT[:, 1:].bool()
        total += float(functional.cross_entropy(logits_BTV[:, :-1][asked_BT], ids_BT[:, 1:][asked_BT], reduction="sum"))
    return total / predicted


def build(folder: Path) -> None:
    """Extract the rows, tell them apart, and measure the model without an SAE."""
    corpus, scratch = folder / "corpus.txt", folder / "scratch"
    write_corpus(corpus, [*_help_texts(), *_evenly(_bible(), BIBLE)])
    texts = open_corpus({corpus.name: corpus}, scratch)
    request = _request(corpus)
    with torch.inference_mode():
        model = load(_source(), PLAN, [SITE])
        extraction = extract(model, texts, request, [SITE], PLAN, scratch, Nothing(), lambda done, total: None)
    pad_id = model.pad_id
    del model
    chosen = _selection(extraction, texts, request, scratch / "flags.bin")
    made = _rows(extraction, chosen)
    windows = _windows(extraction, chosen, pad_id)
    whole = load_with_head(_source(), PLAN, [SITE])
    mean_D = made.pop("mean")
    windows["clean"] = torch.tensor(loss_of(whole, windows, None))
    windows["zero"] = torch.tensor(loss_of(whole, windows, torch.zeros_like))
    windows["mean"] = torch.tensor(loss_of(whole, windows, lambda x_ND: mean_D.expand_as(x_ND)))
    torch.save(made, folder / "rows.pt")
    torch.save(windows, folder / "windows.pt")
    for path in sorted(scratch.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def _source() -> ModelSource:
    folder = smollm2_folder()
    return inspect(str(folder), folders=[folder.parent])


def _request(corpus: Path) -> TrainRequested:
    return TrainRequested(
        model_name=str(smollm2_folder()),
        corpus_file=corpus.name,
        pooling="token",
        layer_number=SITE.layer,
        max_sequence_length=128,
        held_out=HELD_OUT,
        sae=TopKSAE(),
    )


def _selection(extraction: Extraction, texts: Texts, request: TrainRequested, path: Path) -> Selection:
    held_out = hold_out(texts, extraction.tokens, HELD_OUT)
    return select([extraction.stores[SITE]], extraction.tokens, held_out, request, path, lambda done: None)


def _sides(extraction: Extraction, chosen: Selection) -> tuple[Tensor, Tensor]:
    """Of each row, what it is used for (0: training, 1: validation, 2: test), and whether it is ordinary."""
    store = extraction.stores[SITE]
    flags = chosen.flags.read(0, store.rows)
    text_of_row = store.text_of_row[0 : store.rows]
    held_out_texts = np.unique(text_of_row[flags & 1 != 0])
    use_of_text = np.zeros(extraction.corpus.texts, np.int64)
    use_of_text[held_out_texts] = np.where(np.arange(len(held_out_texts)) % 3 == 0, 1, 2)
    return torch.from_numpy(use_of_text[text_of_row]), torch.from_numpy(flags & OUTLIER == 0)


def _rows(extraction: Extraction, chosen: Selection) -> dict[str, Tensor]:
    store = extraction.stores[SITE]
    rows_ND = store.read(0, store.rows)
    use_N, ordinary_N = _sides(extraction, chosen)
    train_ND = rows_ND[(use_N == 0) & ordinary_N]
    scale = scale_of(sample_of(train_ND))
    return {
        "mean": train_ND.mean(0),
        "train": train_ND.mul_(scale),
        "validation": rows_ND[(use_N == 1) & ordinary_N] * scale,
        "test": rows_ND[use_N == 2] * scale,
        "ordinary": ordinary_N[use_N == 2],
        "scale": torch.tensor(scale, dtype=torch.float64),
    }


def _windows(extraction: Extraction, chosen: Selection, pad_id: int) -> dict[str, Tensor]:
    """Some of the texts to be judged by, from everywhere."""
    tokens = extraction.tokens
    use_N, ordinary_N = _sides(extraction, chosen)
    windows = tokens.windows.read(0, len(tokens.windows))
    mine = windows[(use_N.numpy()[windows["row"]] == 2) & (windows["length"] > 1)]
    mixed = mine[RowOrder(len(mine), (0,)).at(0, len(mine))]
    few = mixed[np.cumsum(mixed["length"]) - mixed["length"] < PREDICTED]
    ids_BT, mask_BT, real_BT = map(torch.from_numpy, padded(tokens, few, pad_id))
    judged_BT = torch.zeros_like(real_BT)
    for row, (first, real_T) in enumerate(zip(few["row"].tolist(), real_BT, strict=True)):
        judged_BT[row, real_T] = ordinary_N[first : first + int(real_T.sum())]
    return {"ids": ids_BT, "mask": mask_BT, "judged": judged_BT}
