"""Texts through the language model into rows of activations: one forward pass for all sites, row i always text i.

Owns batching, pooling and what happens when memory runs out; must not know any SAE. No text is ever skipped. The work
goes shard by shard, each in the same batches whenever it is made, so that an attempt goes on where another has ended.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mistudio_schemas import CorpusInfo, ErrorCode, TrainRequested
from mistudio_train.errors import MemoryExhausted, ModelRefused

from .activations import ActivationStore, ActivationWriter, Layout, require_room
from .language_model import LanguageModel, is_out_of_memory
from .memory_plan import MemoryPlan
from .sites import Site
from .texts import Texts
from .tokenization import rules_of, tokenize
from .tokens import Tokens, padded

WINDOWS_SORTED: Final = 1 << 16
"""Sequences that are sorted by length together: enough to leave next to no padding, few enough to hold."""
SHARD_BYTES: Final = 256 * 1024**2
"""Of a shard at most, unless there would be too many."""
MAX_SHARDS: Final = 64
"""Each is an open file of the process, and every site has as many."""
FEW_SHARDS: Final = 16
"""So many at least, that little is lost when a worker dies, if each then has enough windows to sort."""
ENOUGH_WINDOWS: Final = 256

OnProgress = Callable[[int, int], None]


class Kept(Protocol):
    """Shards that are kept for the attempt that goes on."""

    def shard(self, number: int) -> int | None:
        """Tokens of a forward pass when this shard was done; `None`: it is not there."""
        ...

    def keep_shard(self, number: int, tokens_per_batch: int, files: Iterable[Path]) -> None:
        """Keep a shard that is whole."""
        ...


@dataclass(frozen=True)
class Extraction:
    """The activations of a corpus."""

    stores: dict[Site, ActivationStore]
    """The rows of each site, all with the same index."""
    tokens: Tokens
    length: int
    """Tokens of a sequence at most, special ones included."""
    tokens_per_batch: int
    """Tokens of a forward pass at the end; less than planned if memory ran out."""
    padding: int
    """Padding tokens that went through the model."""

    @property
    def corpus(self) -> CorpusInfo:
        """What was read, kept and cut."""
        return self.tokens.corpus


def extract(
    model: LanguageModel,
    texts: Texts,
    request: TrainRequested,
    sites: Sequence[Site],
    plan: MemoryPlan,
    scratch: Path,
    kept: Kept,
    on_progress: OnProgress,
    on_tokenized: OnProgress = lambda done, total: None,
    disk_limit: int | None = None,
) -> Extraction:
    """Run the corpus through the model.

    Args:
        model: loaded for these sites.
        texts: the corpus.
        request: pooling, length limit and token budget.
        sites: where activations are read.
        plan: how many tokens a forward pass may have.
        scratch: a folder for tokens and activations.
        kept: shards that an earlier attempt has made are not made again.
        on_progress: called after each forward pass with the tokens done and in all.
        on_tokenized: called while the corpus is tokenised, with texts done and in all.
        disk_limit: bytes of the disk that activations may take.

    Raises:
        CorpusRefused: if the tokenizer makes nothing of the texts.
        RequestRefused: if the length limit leaves no room for text.
        MemoryExhausted: if a single sequence does not fit.
        ModelRefused: if activations are no finite numbers.
        DiskFull: if the scratch disk has no room, or the activations of all sites are beyond the limit.
    """
    rules = rules_of(request, model.tokenizer, model.source.positions, texts[0])
    tokens = tokenize(texts, model.tokenizer, rules, scratch / "tokens", on_tokenized)
    dtype = torch.float32 if rules.pooling == "mean" else model.dtype
    windows = _shards(tokens, model.d_in * dtype.itemsize)
    layout = Layout(model.d_in, dtype, tuple(_first_row(tokens, window) for window in windows))
    require_room(scratch, layout, len(sites), disk_limit)
    writers = {site: ActivationWriter(scratch / "activations" / str(site), layout) for site in sites}
    run = _Run(model, tokens, writers, plan.tokens_per_batch, on_progress)
    try:
        for shard, (start, stop) in enumerate(pairwise(windows)):
            if (tokens_per_batch := kept.shard(shard)) is not None:
                run.pass_by(start, stop, tokens_per_batch)
                continue
            run.windows(start, stop)
            kept.keep_shard(shard, run.budget, [layout.path(writer.folder, shard) for writer in writers.values()])
    except BaseException:
        for writer in writers.values():
            writer.close()
        raise
    stores = {site: writer.finish(tokens.index) for site, writer in writers.items()}
    return Extraction(stores, tokens, rules.length, run.budget, run.padding)


def _shards(tokens: Tokens, row_bytes: int) -> list[int]:
    """The first window of each shard, and one beyond the last window: the same for the same corpus, always."""
    count = len(tokens.windows)
    wanted = max(-(-tokens.corpus.rows * row_bytes // SHARD_BYTES), min(FEW_SHARDS, count // ENOUGH_WINDOWS), 1)
    shards = min(wanted, MAX_SHARDS, count)
    return [count * shard // shards for shard in range(shards + 1)]


def _first_row(tokens: Tokens, window: int) -> int:
    if window == len(tokens.windows):
        return tokens.corpus.rows
    return int(tokens.windows.read(window, window + 1)["row"][0])


@dataclass(eq=False)
class _Run:
    """An extraction under way."""

    model: LanguageModel
    tokens: Tokens
    writers: dict[Site, ActivationWriter]
    budget: int
    """Tokens of a forward pass, padding included."""
    on_progress: OnProgress
    done: int = 0
    padding: int = 0

    def windows(self, start: int, stop: int) -> None:
        """Run these through the model."""
        for windows in self._sorted_windows(start, stop):
            at = 0
            while at < len(windows):
                batch = windows[at : at + self._fitting(int(windows["length"][at]))]
                if self._tried(batch):
                    at += len(batch)
                else:
                    self._shrink(batch)

    def pass_by(self, start: int, stop: int, tokens_per_batch: int) -> None:
        """Count these, which an earlier attempt has done; where memory ran out for it, go on with as little."""
        self.budget = min(self.budget, tokens_per_batch)
        for windows in self._sorted_windows(start, stop):
            self.done += int(windows["real"].sum())
        self.on_progress(self.done, self.tokens.corpus.tokens)

    def _sorted_windows(self, start: int, stop: int) -> Iterator[NDArray[Any]]:
        """Windows, the longest first, so that memory runs out at once if it ever does."""
        for first in range(start, stop, WINDOWS_SORTED):
            windows = self.tokens.windows.read(first, min(first + WINDOWS_SORTED, stop))
            yield windows[np.argsort(-windows["length"].astype(np.int64), kind="stable")]

    def _fitting(self, length: int) -> int:
        """Sequences of a batch whose longest text part has this many tokens."""
        return max(1, self.budget // (length + len(self.tokens.rules.frame)))

    def _tried(self, batch: NDArray[Any]) -> bool:
        """Run a batch; false if memory ran out, and then nothing of it has been counted."""
        try:
            self._run(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _shrink(self, batch: NDArray[Any]) -> None:
        # Outside the handler: the error's traceback would keep the failed pass' tensors alive.
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch) == 1:
            raise MemoryExhausted(
                f"Memory ran out with a single sequence of {int(batch['length'][0])} tokens",
                "Lower max_sequence_length, or use a worker with more memory.",
            )
        self.budget = (len(batch) // 2) * (int(batch["length"][0]) + len(self.tokens.rules.frame))

    def _run(self, batch: NDArray[Any]) -> None:
        ids_BT, mask_BT, real_BT = map(torch.from_numpy, padded(self.tokens, batch, self.model.pad_id))
        self._refuse_foreign(int(ids_BT.max()))
        device = self.model.device
        acts = self.model.activations(ids_BT.to(device), mask_BT.to(device))
        real_device_BT = real_BT.to(device)
        for site, acts_BTD in acts.items():
            if self.tokens.rules.pooling == "mean":
                rows_ND, counts = mean_rows(acts_BTD, real_device_BT), np.ones(len(batch), int)
            else:
                rows_ND, counts = acts_BTD[real_device_BT], real_BT.sum(1).numpy()
            self._write(site, rows_ND, batch["row"], counts)
        self.done += int(real_BT.sum())
        self.padding += int((mask_BT == 0).sum())
        self.on_progress(self.done, self.tokens.corpus.tokens)

    def _refuse_foreign(self, highest_id: int) -> None:
        """A GPU would stop with an error that says nothing."""
        if highest_id >= (known := self.model.source.vocab_size) > 0:
            raise ModelRefused(
                f"The tokenizer of {self.model.source.name} gives the token {highest_id}, and the model knows {known}",
                "Save model and tokenizer together: tokens were added to one and not to the other.",
                ErrorCode.MODEL_UNSUPPORTED,
            )

    def _write(self, site: Site, rows_ND: Tensor, starts: NDArray[Any], counts: NDArray[Any]) -> None:
        rows_ND = rows_ND.to(self.writers[site].layout.dtype)  # some families compute in more than they are stored in
        if not torch.isfinite(rows_ND).all():
            raise ModelRefused(
                f"The activations at {site} are not finite numbers in {self.model.dtype}",
                "Ask for dtype float32 or bfloat16.",
                ErrorCode.MODEL_UNSUPPORTED,
            )
        first = 0
        rows_ND = rows_ND.cpu()
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
            self.writers[site].write(start, rows_ND[first : first + count])
            first += count


def mean_rows(acts_BTD: Tensor, real_BT: Tensor) -> Tensor:
    """The mean over the real tokens of each sequence, accumulated in fp32: [B, d_in]."""
    total_BD = acts_BTD.masked_fill(~real_BT[:, :, None], 0).sum(1, dtype=torch.float32)
    return total_BD / real_BT.sum(1, keepdim=True)
