"""How much of what a job has to do: amounts that its time, its disk and its result grow with, part by part.

Counts from shapes, before a job as after it; measures nothing, and knows no rate. Imports no torch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mistudio_schemas import KSparseFields, SAEConfig, TrainRequested

from .memory_plan import BYTES, MemoryPlan
from .model_source import ModelSource
from .sites import Sites

Units = dict[str, tuple[float, ...]]
"""Of each part of a job, by its name; the main amount first."""

STATES = 3
"""Copies of an SAE in its checkpoint: the weights and Adam's two moments."""
ROW_BYTES = 18
"""Of a row's token, place, text and mark on the scratch disk."""
ENTRY_BYTES = 6
"""Of an entry of the feature store, compressed."""
CARD_BYTES, CARDS_BYTES = 900, 12_500_000
"""Of a feature on the page, and of all of them at most."""
EXPORT_BYTES = 6000
"""Of a feature for Neuronpedia."""
FEATURE_BYTES = 60
"""Of a feature in `metadata.json`."""


@dataclass(frozen=True)
class SAEWork:
    """One SAE's training."""

    kind: str
    d_sae: int
    batch_size: int
    steps: int
    active: float
    """Latents that are active on a row."""

    @property
    def rows(self) -> int:
        """That go through it in training."""
        return self.steps * self.batch_size


@dataclass(frozen=True)
class CorpusWork:
    """What of the corpus goes through the model."""

    bytes: int
    """Of all its texts."""
    texts: int
    tokens: int
    windows: int
    rows: int


@dataclass(frozen=True)
class Work:
    """All that a job has to do."""

    source: ModelSource
    plan: MemoryPlan
    sites: Sites
    request: TrainRequested
    corpus: CorpusWork
    saes: Sequence[SAEWork]

    def units(self) -> Units:
        """What each part's time is a sum of multiples of."""
        corpus, d_in = self.corpus, self.source.d_in
        units: Units = {
            "planning": (corpus.bytes, 1),
            "loading": (self.plan.model_bytes, 1),
            "extracting": (
                corpus.tokens * self._flop(self.plan.weights_run, self._blocks),
                corpus.tokens,
                corpus.rows * d_in * len(self.sites.distinct),
                1,
            ),
        }
        for kind in {sae.kind for sae in self.saes}:
            units[f"training {kind}"] = _sum(self._training(sae) for sae in self.saes if sae.kind == kind)
        if self.plan.splices:
            held_out = min(self.request.cross_entropy_tokens, corpus.tokens * self.request.held_out_share)
            head = 2 * d_in * self.source.vocab_size
            passes = len(self.saes) * 3 + 1  # as it is, and each with reconstructions, zero and the mean
            flop = held_out * passes * (self._flop(self.plan.weights_of_blocks, self.source.total_layers) + head)
            units["predicting"] = (flop, self.plan.model_bytes, 1)
        units["evaluating"] = _sum(self._evaluating(sae) for sae in self.saes)
        units["exporting"] = _sum(self._exporting(sae) for sae in self.saes)
        return units

    def result_bytes(self, bundle_max_bytes: int) -> int:
        """Of the files that are delivered."""
        return sum(self._result_bytes(sae, bundle_max_bytes) for sae in self.saes)

    def disk_bytes(self, bundle_max_bytes: int) -> int:
        """Of the workspace when the files are written: texts, tokens, rows, checkpoints and result."""
        corpus, dtype = self.corpus, "float32" if self.request.pooling == "mean" else self.plan.dtype
        activations = corpus.rows * self.source.d_in * BYTES[dtype] * len(self.sites.distinct)
        states = sum(STATES * self._sae_bytes(sae) for sae in self.saes)
        return int(
            activations + corpus.tokens * ROW_BYTES + corpus.bytes + states + self.result_bytes(bundle_max_bytes)
        )

    @property
    def _blocks(self) -> int:
        return max(site.blocks for site in self.sites.distinct)

    def _flop(self, weights: int, blocks: int) -> float:
        """Of a token through so many blocks of so many weights: two for each, and the attention to the others."""
        others = self.corpus.tokens / max(1, self.corpus.windows)
        return 2 * weights + 4 * blocks * self.source.d_in * others

    def _training(self, sae: SAEWork) -> tuple[float, ...]:
        """Products, what each step does to the parameters, reading the rows, what a step costs by itself."""
        size = self.source.d_in * sae.d_sae
        return sae.rows * size, sae.steps * size, sae.rows * self.source.d_in, sae.steps, 1

    def _evaluating(self, sae: SAEWork) -> tuple[float, ...]:
        """Encoding, entries, the bundle; and where there are labels reading it again, to probe."""
        corpus, bundle = self.corpus, self.corpus.texts * sae.d_sae
        probed = bundle if self.request.label_column else 0
        return corpus.rows * self.source.d_in * sae.d_sae, corpus.rows * sae.active, bundle, probed, 1

    def _exporting(self, sae: SAEWork) -> tuple[float, ...]:
        """Going over the entries, cards, the SAE's own files."""
        shows = float(self.request.report or bool(self.request.exports))
        return shows * self.corpus.rows * sae.active, shows * sae.d_sae, self._sae_bytes(sae), 1

    def _sae_bytes(self, sae: SAEWork) -> int:
        return 8 * self.source.d_in * sae.d_sae

    def _result_bytes(self, sae: SAEWork, bundle_max_bytes: int) -> int:
        corpus = self.corpus
        copies = 3 if sae.kind == "topk" else 2  # sae_model.pt, sae/, sparsify/
        bundle = min(bundle_max_bytes, 4 * corpus.texts * (sae.d_sae + self.source.d_in) + corpus.bytes)
        store = ENTRY_BYTES * corpus.rows * sae.active if self.request.pooling == "token" else 0
        page = min(CARDS_BYTES, CARD_BYTES * sae.d_sae) if self.request.report else 0
        exports = len(self.request.exports) * EXPORT_BYTES * sae.d_sae
        return int(copies * self._sae_bytes(sae) + bundle + store + page + exports + FEATURE_BYTES * sae.d_sae)


def expected_active(config: SAEConfig, d_sae: int, known: float | None) -> float:
    """Latents that will be active on a row: as asked for, or the share that is known of its kind; else a twentieth."""
    if isinstance(config, KSparseFields) and config.k is not None:
        return config.k
    target = getattr(config, "target_l0", None)
    return target or d_sae * (0.05 if known is None else known)


def _sum(rows: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(map(sum, zip(*rows, strict=True)))
