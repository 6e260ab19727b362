"""k-sparse probing: how well a few features tell a label of the texts, after Gurnee et al. 2023 (arXiv:2305.01610).

For each label the features are ranked by how far their means with and without it lie apart, and a logistic regression
on the first k of them is judged on other texts. Reads a run's bundle; trains no SAE, and knows no corpus.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from mistudio_schemas import Probing

from .bundle import ACTIVATIONS, FEATURES
from .files import write_json
from .labels import Labels
from .selection import place_of
from .texts import Texts
from .torch_archive import Matrix, blocks_of

FEATURES_TRIED: Final = (1, 2, 5, 10, 20)
"""Numbers of features that a probe may see."""
TESTED: Final = 0.25
"""Share of the texts that probes are judged on; by a hash of the text, so that twins are on one side."""
LEAST: Final = 10
"""Texts with a label, and without it, on either side; a label of fewer is not probed."""
MOST_LABELS: Final = 50
"""That are probed: those of most texts."""
MOST_NUMBERS: Final = 1 << 24
"""In fp32, that probes are fitted to at once: of more texts so many are drawn."""
MOST_TEXTS: Final = 50_000
RIDGE: Final = 1e-3
"""Weight of the probes' squared norm, beside the mean loss."""
STEPS: Final = 100
"""Of L-BFGS at most."""
FILE: Final = "probing.json"


@dataclass(frozen=True)
class LabelProbe:
    """What tells one label."""

    label: str
    texts: int
    """That have it, of those that were probed on."""
    features: list[int]
    """The features that tell it, the most telling first."""
    higher: list[bool]
    """Of each whether it is higher where the label is."""
    balanced_accuracy: list[float]
    """With the first 1, 2, 5, … of them; 0.5 is chance."""
    all_dimensions: float
    """With every dimension of the model's own activations in their place."""


def probe(folder: Path, labels: Labels, texts: Texts, rows: int, d_sae: int, d_in: int) -> Probing | None:
    """Probe one SAE, and write `probing.json`.

    Args:
        folder: of the SAE's files; it has the bundle.
        labels: of the texts.
        texts: those of the bundle.
        rows: texts that the bundle holds.
        d_sae: number of features.
        d_in: width of an activation.

    Returns:
        The figures; `None` if no label is that of enough texts.

    Raises:
        DiskFull: if the disk has no room.

    """
    bundle, number_T = folder / "feature_activations.pt", labels.first(rows)
    columns = max(d_in, min(MOST_LABELS, len(labels.names)) * max(FEATURES_TRIED))
    chosen_T = _drawn(np.flatnonzero(number_T >= 0), min(MOST_TEXTS, MOST_NUMBERS // columns))
    number_T = number_T[chosen_T]
    tested_T = np.array([place_of(texts[text]) < TESTED for text in chosen_T.tolist()], bool)
    wanted = _enough(number_T, tested_T)
    if not wanted:
        return None
    has_TL = torch.from_numpy(number_T[:, None] == np.array(wanted)[None, :])
    task = _Task(chosen_T, has_TL, torch.from_numpy(tested_T))
    dense_L = task.judged(task.seen(_Stored(bundle, Matrix(ACTIVATIONS, (rows, d_in)))))
    found = _of_labels(
        task, _Stored(bundle, Matrix(FEATURES, (rows, d_sae))), dense_L, [labels.names[n] for n in wanted]
    )
    probing = Probing(
        column=labels.column,
        labels=len(found),
        texts=len(chosen_T),
        features=list(FEATURES_TRIED),
        balanced_accuracy=np.mean([one.balanced_accuracy for one in found], axis=0).tolist(),
        all_dimensions=float(dense_L.mean()),
    )
    write_json(folder / FILE, _told(probing, found))
    return probing


@dataclass(frozen=True)
class _Task:
    """Which texts have which labels, and on which of them probes are judged."""

    chosen_T: NDArray[np.int64]  # noqa: N815
    """Rows of the bundle."""
    has_TL: Tensor  # noqa: N815
    tested_T: Tensor  # noqa: N815

    def parts(self, stored: "_Stored") -> Iterator[tuple[slice, Tensor]]:
        """The chosen rows of a matrix of the bundle, some at a time, and which they are."""
        first = done = 0
        for rows_BC in blocks_of(stored.bundle, stored.matrix):
            until = int(np.searchsorted(self.chosen_T, first + len(rows_BC)))
            yield slice(done, until), rows_BC[torch.from_numpy(self.chosen_T[done:until] - first)]
            first, done = first + len(rows_BC), until

    def seen(self, stored: "_Stored", columns: Tensor | None = None) -> Tensor:
        """The chosen rows, or some of their columns, as a probe sees them: about 0, and of deviation 1."""
        width = stored.matrix.shape[1] if columns is None else len(columns)
        seen_TC = torch.empty(len(self.chosen_T), width)
        for rows, part_BC in self.parts(stored):
            seen_TC[rows] = part_BC if columns is None else part_BC[:, columns]
        deviation_C, mean_C = torch.std_mean(seen_TC[~self.tested_T], dim=0)
        return seen_TC.sub_(mean_C).div_(deviation_C.clamp_min(1e-6))

    def differences(self, stored: "_Stored") -> Tensor:
        """Of each label and feature: its mean on training texts with the label, less that on the others; [L, F]."""
        trained_T, has_TL = ~self.tested_T, self.has_TL & ~self.tested_T[:, None]
        sums_LF = torch.zeros(has_TL.shape[1], stored.matrix.shape[1], dtype=torch.float64)
        sums_F = torch.zeros(stored.matrix.shape[1], dtype=torch.float64)
        for rows, part_BF in self.parts(stored):
            sums_LF += (has_TL[rows].T.float() @ part_BF).double()
            sums_F += part_BF[trained_T[rows]].sum(0).double()
        with_L1 = has_TL.sum(0).double()[:, None]
        return sums_LF / with_L1 - (sums_F - sums_LF) / (trained_T.sum() - with_L1)

    def judged(self, seen_TC: Tensor, label: int | None = None) -> Tensor:
        """Balanced accuracy of each label's probe, or of one's, on the texts that it has not seen; [L]."""
        has_TL = self.has_TL if label is None else self.has_TL[:, label : label + 1]
        slope_CL, offset_L = _fitted(seen_TC[~self.tested_T], has_TL[~self.tested_T].float())
        says_TL, so_TL = seen_TC[self.tested_T] @ slope_CL + offset_L > 0, has_TL[self.tested_T]
        found_L = (says_TL & so_TL).sum(0) / so_TL.sum(0)
        passed_by_L = (~says_TL & ~so_TL).sum(0) / (~so_TL).sum(0)
        return (found_L + passed_by_L) / 2


@dataclass(frozen=True)
class _Stored:
    """A matrix of the bundle, on the disk."""

    bundle: Path
    matrix: Matrix


def _of_labels(task: _Task, acts_TF: _Stored, dense_L: Tensor, names: list[str]) -> list[LabelProbe]:
    difference_LF = task.differences(acts_TF)
    most = min(max(FEATURES_TRIED), acts_TF.matrix.shape[1])
    ranked_LK = difference_LF.abs().topk(most, dim=1).indices
    columns = sorted(set(ranked_LK.flatten().tolist()))
    place_of_column = {column: place for place, column in enumerate(columns)}
    seen_TC = task.seen(acts_TF, torch.tensor(columns))
    found = []
    for label, name in enumerate(names):
        features = ranked_LK[label].tolist()
        places = [place_of_column[feature] for feature in features]
        found.append(
            LabelProbe(
                label=name,
                texts=int(task.has_TL[:, label].sum()),
                features=features,
                higher=[bool(difference_LF[label, feature] > 0) for feature in features],
                balanced_accuracy=[float(task.judged(seen_TC[:, places[:k]], label)) for k in FEATURES_TRIED],
                all_dimensions=float(dense_L[label]),
            )
        )
    return found


def _fitted(rows_TC: Tensor, target_TL: Tensor) -> tuple[Tensor, Tensor]:
    """Logistic regressions, one a label, in which texts with it weigh as much as those without; slopes and offsets."""
    share_L = target_TL.mean(0)
    weight_TL = target_TL / (2 * share_L) + (1 - target_TL) / (2 * (1 - share_L))
    slope_CL = torch.zeros(rows_TC.shape[1], target_TL.shape[1], requires_grad=True)
    offset_L = torch.zeros(target_TL.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([slope_CL, offset_L], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        logits_TL = rows_TC @ slope_CL + offset_L
        missed = binary_cross_entropy_with_logits(logits_TL, target_TL, weight_TL, reduction="sum") / len(rows_TC)
        loss = missed + RIDGE * slope_CL.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return slope_CL.detach(), offset_L.detach()


def _told(probing: Probing, found: list[LabelProbe]) -> dict[str, Any]:
    of_labels = [asdict(one) for one in sorted(found, key=lambda one: -one.texts)]
    return probing.model_dump(mode="json") | {"tested_share": TESTED, "of_labels": of_labels}


def _drawn(places: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """So many of them at most, in their order; not evenly spread, as labels often come in turns."""
    if len(places) <= most:
        return places
    return np.sort(np.random.default_rng(0).choice(places, most, replace=False))


def _enough(number_T: NDArray[np.int32], tested_T: NDArray[np.bool_]) -> list[int]:
    """The labels that enough texts of both sides have, and enough have not, those of most texts first."""
    numbers, counts = np.unique(number_T, return_counts=True)

    def enough(number: int) -> bool:
        has_T = number_T == number
        return all((some & side).sum() >= LEAST for some in (has_T, ~has_T) for side in (tested_T, ~tested_T))

    ordered = numbers[np.argsort(-counts, kind="stable")].tolist()
    return [number for number in ordered if enough(number)][:MOST_LABELS]
