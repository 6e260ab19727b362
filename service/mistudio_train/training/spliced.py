"""What the language model loses when an SAE stands in the place of its activations, on held-out texts.

How well the model predicts their tokens is measured as it is, and with the rows of a site replaced by reconstructions,
by zero and by their mean. A transcoder reconstructs from what the model has at its site in that very pass. Rows that
the SAE is not judged by stay as they are. So do those of texts that share a window with held-out ones, and their tokens
are read, not predicted. Owns the texts, the masks and the sums; must not train, nor load a model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mistudio_schemas import CrossEntropy
from mistudio_train.sae.folded import FoldedSAE

from .blocks import Look
from .language_model import HeadedModel
from .memory_plan import LOGITS_BYTES
from .order import RowOrder
from .selection import HELD_OUT, Selection
from .sites import Ends, Site
from .tokens import Tokens, padded

MASKED_SHARE: Final = 0.15
"""Of an encoder's tokens, masked and predicted (Devlin et al. 2019, arXiv:1810.04805)."""
BYTES_PER_LOGIT: Final = 20
"""In the model's precision, in fp32, those that count, and what the loss makes of them: 19 as measured."""
NOTHING: Final = 1e-6
"""Of a smaller difference of losses no share can be recovered."""


Replace = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Splice:
    """An SAE, and what it reads and reconstructs."""

    ends: Ends
    sae: FoldedSAE
    selection: Selection


def cross_entropies(
    model: HeadedModel,
    splices: Sequence[Splice],
    tokens: Tokens,
    *,
    limit: int,
    on_progress: Callable[[float], None],
) -> list[CrossEntropy] | None:
    """Measure each SAE; `None` if there is nothing to predict.

    Args:
        model: with its head.
        splices: the SAEs, whose selections hold out the same texts.
        tokens: the corpus.
        limit: held-out tokens that go through the model, about.
        on_progress: told the share that is done, after each batch.
    """
    windows = _held_out_windows(tokens, splices[0].selection, limit)
    if not len(windows) or not (model.causal or model.mask_id):
        return None
    ways = _ways(splices, model.device)
    selections = {splice.ends: splice.selection for splice in splices}
    sums = dict.fromkeys(["clean", *ways], 0.0)
    predicted, done, total = 0, 0, int(windows["length"].sum())
    for batch in _batches(windows, len(tokens.rules.frame), model.vocabulary):
        asked = _asked(tokens, splices[0].selection, batch, model.pad_id, None if model.causal else model.mask_id)
        predicted += asked.predicted
        there = asked.to(model.device)
        sums["clean"] += there.loss(model.logits(there.ids_BT, there.mask_BT))
        judged_N = {
            ends: _judged(selection, batch, asked.real_BT).to(model.device) for ends, selection in selections.items()
        }
        for name, way in ways.items():
            sums[name] += there.loss(model.logits(there.ids_BT, there.mask_BT, way.looks(judged_N[way.ends])))
        done += int(batch["length"].sum())
        on_progress(done / total)
    if not predicted:
        return None
    means = {way: loss / predicted for way, loss in sums.items()}
    return [_result(means, f"sae {i}", splice.ends, predicted, model.causal) for i, splice in enumerate(splices)]


@dataclass(frozen=True)
class _Way:
    """What the rows of the reconstructed site are replaced by: something that is made of those that are read."""

    ends: Ends
    replace: Replace

    def looks(self, judged_N: Tensor) -> dict[Site, Look]:
        """One pass of the model with the rows replaced that are judged: bool [N]."""
        if self.ends.predicted is None:
            return {self.ends.read: partial(replaced_where, judged_N, self.replace)}
        read: list[Tensor] = []  # of this very pass, in which what comes before may have been replaced, too

        def predicted(_y_ND: Tensor) -> Tensor:
            return self.replace(read.pop())

        return {
            self.ends.read: lambda x_ND: read.append(x_ND[judged_N]),
            self.ends.predicted: partial(replaced_where, judged_N, predicted),
        }


def _ways(splices: Sequence[Splice], device: torch.device) -> dict[str, _Way]:
    """Every SAE is one way, and SAEs of the same rows share the other two."""
    ways: dict[str, _Way] = {}
    for number, splice in enumerate(splices):
        mean_D = splice.selection.mean_D
        assert mean_D is not None  # rows are tokens
        ways[f"zero {splice.ends}"] = _Way(splice.ends, torch.zeros_like)
        ways[f"mean {splice.ends}"] = _Way(splice.ends, partial(_same, mean_D.to(device)))
        ways[f"sae {number}"] = _Way(splice.ends, partial(_reconstructed, splice.sae.to(device)))
    return ways


def _same(row_D: Tensor, x_ND: Tensor) -> Tensor:
    return row_D.to(x_ND.dtype).expand_as(x_ND)


def _reconstructed(sae: FoldedSAE, x_ND: Tensor) -> Tensor:
    return sae.decode(sae.encode(x_ND.float())).to(x_ND.dtype)


def replaced_where(judged_N: Tensor, replace: Replace, x_ND: Tensor) -> Tensor:
    """The rows, those replaced that are judged: bool [N]."""
    others_ND = x_ND.clone()
    others_ND[judged_N] = replace(x_ND[judged_N])
    return others_ND


def _result(means: dict[str, float], way: str, ends: Ends, predicted: int, causal: bool) -> CrossEntropy:
    clean, spliced = means["clean"], means[way]
    zero, mean = means[f"zero {ends}"], means[f"mean {ends}"]

    def recovered(without: float) -> float | None:
        return (without - spliced) / (without - clean) if abs(without - clean) > NOTHING else None

    return CrossEntropy(
        tokens=predicted,
        masked=not causal,
        clean=clean,
        spliced=spliced,
        zero=zero,
        mean=mean,
        recovered_zero=recovered(zero),
        recovered_mean=recovered(mean),
    )


def _held_out_windows(tokens: Tokens, selection: Selection, limit: int) -> NDArray[Any]:
    """Those with tokens of held-out texts, from everywhere, until they have as many of these; the longest first."""
    windows = tokens.windows.read(0, len(tokens.windows))
    windows = windows[windows["real"] > 0]
    flags = selection.flags.read(0, len(selection.flags))
    held_out = np.add.reduceat((flags & HELD_OUT != 0).view(np.uint8), windows["row"], dtype=np.int64)
    wanted = (held_out > 0) & (windows["length"] > 1)
    mine, held_out = windows[wanted], held_out[wanted]
    if not len(mine):
        return mine
    order = RowOrder(len(mine), (0,)).at(0, len(mine))
    before = np.cumsum(held_out[order]) - held_out[order]
    chosen: NDArray[Any] = mine[order][before < limit]
    longest_first: NDArray[Any] = chosen[np.argsort(-chosen["length"].astype(np.int64), kind="stable")]
    return longest_first


def _batches(windows: NDArray[Any], frame: int, vocabulary: int) -> Iterator[NDArray[Any]]:
    """Windows whose predictions fit together."""
    at = 0
    while at < len(windows):
        each = (int(windows["length"][at]) + frame) * vocabulary * BYTES_PER_LOGIT
        count = max(1, LOGITS_BYTES // each)
        yield windows[at : at + count]
        at += count


@dataclass(frozen=True, eq=False)
class _Asked:
    """Sequences, and which of their tokens the model is to predict."""

    ids_BT: Tensor  # noqa: N815
    mask_BT: Tensor  # noqa: N815
    real_BT: Tensor  # noqa: N815
    """Tokens that rows are made of."""
    predicts_BT: Tensor  # noqa: N815
    """Places whose prediction counts."""
    targets_BT: Tensor  # noqa: N815
    """What is right there."""

    @property
    def predicted(self) -> int:
        """How many count."""
        return int(self.predicts_BT.sum())

    def to(self, device: torch.device) -> "_Asked":
        return _Asked(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def loss(self, logits_BTV: Tensor) -> float:
        """The sum of the cross-entropies, in nats."""
        logits_NV = logits_BTV[self.predicts_BT].float()
        return float(functional.cross_entropy(logits_NV, self.targets_BT[self.predicts_BT], reduction="sum"))


def _asked(tokens: Tokens, selection: Selection, windows: NDArray[Any], pad_id: int, mask_id: int | None) -> _Asked:
    """Without a mask every token of a held-out text is predicted from those before it, the very first if any is."""
    ids_BT, mask_BT, real_BT = padded(tokens, windows, pad_id)
    held_out_BT = _flags(selection, windows, real_BT) & HELD_OUT != 0
    before, width = len(tokens.rules.frame.before), ids_BT.shape[1]
    place_T, ends_B = np.arange(width), before + windows["length"].astype(np.int64)
    text_BT = (place_T >= before) & (place_T < ends_B[:, None]) & held_out_BT
    if mask_id is None:
        predicts_BT, targets_BT = np.zeros_like(text_BT), np.zeros_like(ids_BT)
        predicts_BT[:, :-1], targets_BT[:, :-1] = text_BT[:, 1:], ids_BT[:, 1:]
    else:
        targets_BT, predicts_BT = ids_BT.copy(), text_BT & _chosen(windows, before, width)
        ids_BT[predicts_BT] = mask_id
    return _Asked(*map(torch.from_numpy, (ids_BT, mask_BT, real_BT, predicts_BT, targets_BT)))


def _chosen(windows: NDArray[Any], before: int, width: int) -> NDArray[np.bool_]:
    """The tokens of each window that are masked, always the same: bool [B, T]."""
    chosen_BT = np.zeros((len(windows), width), bool)
    for row, (start, length) in enumerate(zip(windows["start"].tolist(), windows["length"].tolist(), strict=True)):
        count = max(1, round(MASKED_SHARE * length))
        chosen_BT[row, before + RowOrder(length, (start,)).at(0, count)] = True
    return chosen_BT


def _judged(selection: Selection, windows: NDArray[Any], real_BT: Tensor) -> Tensor:
    """Which tokens have rows that the SAEs are judged by: bool [B · T]."""
    flags_BT = _flags(selection, windows, real_BT.numpy())
    return torch.from_numpy((flags_BT & HELD_OUT != 0) & (flags_BT & selection.left_out == 0)).flatten()


def _flags(selection: Selection, windows: NDArray[Any], real_BT: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """What each token's row is, 0 where it has none: uint8 [B, T]."""
    flags_BT = np.zeros(real_BT.shape, np.uint8)
    for row, (first, real_T) in enumerate(zip(windows["row"].tolist(), real_BT, strict=True)):
        flags_BT[row, real_T] = selection.flags.read(first, first + int(real_T.sum()))
    return flags_BT
