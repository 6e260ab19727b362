"""Words get vectors out of token embeddings, and are told from signs, numbers and function words."""

import numpy as np
import pytest

from mistudio_train.cli.feature_meaning import is_plain, meaning_of


def test_a_words_vector_is_the_centred_mean_of_its_tokens_at_norm_one() -> None:
    embeddings_VD = np.array([[4.0, 0.0], [0.0, 4.0], [-4.0, 2.0]])  # mean: [0, 2]
    meaning = meaning_of(["king", "kingdom", "the"], [[0], [0, 2], [1]], embeddings_VD)
    expected = [
        np.array([4.0, -2.0]) / np.sqrt(20.0),
        np.array([0.0, -1.0]),  # of [4, -2] and [-4, 0]
        np.array([0.0, 1.0]),
    ]
    assert meaning.vectors == pytest.approx(np.array(expected), abs=1e-6)
    assert meaning.vectors.dtype == np.float32
    # one is in two tokens, one is a function word
    assert meaning.plain.tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("name", "plain"), [("sea", True), ("ox", False), ("1611", False), ("don't", False), ("unto", False)]
)
def test_plain_words(name: str, plain: bool) -> None:
    assert is_plain(name) is plain
