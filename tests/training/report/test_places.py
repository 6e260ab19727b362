"""Where features are active, against a count of everything in memory."""

from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from mistudio_train.training.report.places import BANDS, BINS, Place, Places

D_SAE, ROWS, A_GROUP = 7, 400, 10


@pytest.fixture(scope="module")
def acts() -> NDArray[np.float32]:
    generator = np.random.default_rng(0)
    values = generator.gamma(1.0, 2.0, (ROWS, D_SAE)).astype(np.float32) * (generator.random((ROWS, D_SAE)) < 0.3)
    values[:, 3] = 0
    values[5:, 4] = 0  # a feature of few places
    return np.asarray(values, np.float32)


def found(acts: NDArray[np.float32], pieces: int, *, strongest: int = 5, weaker: int = 2) -> tuple[Places, Place]:
    places = Places(acts.max(0).astype(np.float64), strongest, weaker)
    for rows in np.array_split(np.arange(ROWS), pieces):
        row, feature = np.nonzero(acts[rows])
        row = row + rows[0]
        places.add(feature, row, row // A_GROUP, acts[row, feature])
    return places, places.found()


def test_histograms_count_every_activation(acts: NDArray[np.float32]) -> None:
    places, _ = found(acts, 9)
    assert places.histogram_FB.sum(1).tolist() == (acts > 0).sum(0).tolist()
    column = acts[acts[:, 0] > 0, 0]
    expected, _ = np.histogram(column, bins=BINS, range=(0, column.max()))
    assert np.abs(places.histogram_FB[0] - expected).sum() <= 2  # at the bins' very edges


def test_the_strongest_places_are_the_strongest_one_a_group(acts: NDArray[np.float32]) -> None:
    _, kept = found(acts, 9)
    for feature in range(D_SAE):
        by_group: dict[int, tuple[float, int]] = {}
        for row in np.flatnonzero(acts[:, feature]).tolist():
            by_group[row // A_GROUP] = max(by_group.get(row // A_GROUP, (0.0, 0)), (float(acts[row, feature]), row))
        expected = sorted(by_group.values(), reverse=True)[:5]
        mine = kept.where((kept.feature == feature) & (kept.band == 0))
        assert list(zip(mine.activation.tolist(), mine.row.tolist(), strict=True)) == expected


def test_every_band_below_has_places_of_its_own(acts: NDArray[np.float32]) -> None:
    _, kept = found(acts, 9)
    maxima = acts.max(0)
    for feature, row, activation, band in zip(kept.feature, kept.row, kept.activation, kept.band, strict=True):
        assert acts[row, feature] == activation
        if band:
            assert BANDS - 1 - int(activation / maxima[feature] * BANDS) == band
    assert {(int(f), int(b)) for f, b in zip(kept.feature, kept.band, strict=True)} >= {(0, 1), (0, 2), (0, 3), (0, 4)}
    assert 3 not in kept.feature
    assert np.all(np.diff(kept.feature * BANDS + kept.band) >= 0)


@pytest.mark.parametrize("pieces", [1, 2, 50, ROWS])
def test_it_does_not_matter_how_entries_come(acts: NDArray[np.float32], pieces: int) -> None:
    places, kept = found(acts, pieces)
    others, expected = found(acts, 9)
    assert np.array_equal(places.histogram_FB, others.histogram_FB)
    for name in Place.__dataclass_fields__:
        assert np.array_equal(getattr(kept, name), getattr(expected, name)), name


def test_each_place_of_a_band_has_about_the_same_chance() -> None:
    drawn: Counter[bool] = Counter()
    features = 2000
    places = Places(np.full(features, 10.0), 1, 1)
    for row, strength in enumerate([10.0, *[1.0] * 40]):
        places.add(
            np.arange(features),
            np.full(features, row),
            np.zeros(features, np.int64),
            np.full(features, np.float32(strength)),
        )
    kept = places.found()
    rows = kept.row[kept.band == 4]
    drawn.update((rows <= 20).tolist())
    assert len(rows) == features
    assert abs(drawn[True] / features - 0.5) < 0.05
