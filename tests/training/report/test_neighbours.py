"""The nearest directions of a dictionary, against all cosines at once."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from mistudio_train.training.report import neighbours as module
from mistudio_train.training.report.neighbours import NEAREST, neighbours

CPU = torch.device("cpu")


def dictionary(count: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(16, count) * torch.rand(count)


def test_they_are_the_nearest_of_the_living(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUERIES_AT_ONCE", 7)
    decoder, living = dictionary(40), np.array([0, *range(3, 40)])
    found = neighbours(decoder, living, CPU)
    directions = functional.normalize(decoder.T, dim=1)
    cosines = directions @ directions.T
    cosines.fill_diagonal_(-1)
    cosines[:, [1, 2]] = -1
    expected = cosines[living].topk(NEAREST, dim=1)
    assert found.feature.tolist() == living.tolist()
    assert found.nearest.tolist() == expected.indices.tolist()
    torch.testing.assert_close(torch.from_numpy(found.cosine), expected.values)


def test_of_too_many_some_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PRODUCTS", 10 * 40 * 16)
    found = neighbours(dictionary(40), np.arange(40), CPU)
    assert found.feature.tolist() == [4 * number for number in range(10)]


@pytest.mark.parametrize("living", [[], [5]])
def test_one_alone_has_none(living: list[int]) -> None:
    found = neighbours(dictionary(40), np.array(living, np.int64), CPU)
    assert found.cosine.size == 0
