"""The comparison's rules on numbers worked by hand, and both sides on a toy too small to mean anything."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.quality import __main__ as quality
from benchmarks.quality import data as quality_data
from benchmarks.quality import runs as quality_runs
from benchmarks.quality.data import SHAPES, Shape, Truth, data_of, toy
from benchmarks.quality.figures import figures_of, recovery, set_threshold
from benchmarks.quality.runs import NotThere, Runs
from benchmarks.quality.search import at_l0, beginning, hopeless, interval, next_coefficient, next_rate
from benchmarks.quality.sides import KINDS, SIDES, Run, trained
from torch import Tensor

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning"),
]
TINY = Shape(m=32, k=2, batch=64, steps=4, wanted=(1, 2, 4))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_data, "TOY_HELD_OUT", 256)
    monkeypatch.setitem(SHAPES, "toy", TINY)
    toy.cache_clear()


def test_learning_rates_go_on_until_the_best_is_at_no_edge() -> None:
    asked: list[float] = []
    fvus: dict[float, float] = {}
    while (lr := next_rate(fvus)) is not None:
        asked.append(lr)
        fvus[lr] = abs(math.log(lr / 0.02))
    assert asked == [0.001, 0.003, 0.000333, 0.009, 0.000111, 0.027, 0.081, 0.0156, 0.0468]
    assert next_rate({lr: lr for lr in asked[:5]}) == 3.7e-5
    assert next_rate({lr: abs(lr - 1e-3) for lr in asked[:5]}) == 0.000577
    assert next_rate({lr: abs(lr - 1e-3) for lr in [*asked[:5], 0.000577, 0.00173]}) is None


def test_coefficients_lie_on_both_sides_of_what_is_wanted_without_wide_gaps() -> None:
    l0s: dict[float, float] = {}
    while (coefficient := next_coefficient(l0s, 14, 70, start=5, denser=1 / 3)) is not None:
        l0s[coefficient] = 2000 / coefficient  # 400 at the first
    found = sorted(l0s.values())
    assert found[0] <= 14
    assert found[-1] >= 70
    inside = [l0 for l0 in found if 7 <= l0 <= 140]
    assert len(inside) >= 4
    assert all(high <= 2 * low for low, high in pairwise(inside))
    assert next_coefficient({2.0**n: 1.0 for n in range(10)}, 14, 70, start=5, denser=1 / 3) is None


def test_a_search_that_begins_far_away_gets_there() -> None:
    l0s: dict[float, float] = {}
    while (coefficient := next_coefficient(l0s, 32, 32, start=3e5, denser=1 / 3)) is not None:
        l0s[coefficient] = 30 / coefficient  # SAELens' `jumprelu` wants 300,000 at one learning rate and 1 at another
    assert min(l0s.values()) <= 32 <= max(l0s.values())
    assert len(l0s) < 10


def test_a_rate_begins_where_its_neighbour_came_near_and_learned() -> None:
    found = {5.0: (200, 0.1), 15.0: (60, 0.2), 45.0: (33, 0.95), 135.0: (20, 0.3)}
    nearby = {tried: {"validation_l0": float(l0), "validation_fvu": fvu} for tried, (l0, fvu) in found.items()}
    assert beginning(nearby, 32) == 135
    assert beginning({5.0: nearby[5.0], 45.0: nearby[45.0]}, 32) is None


def test_a_search_ends_where_the_l0_does_not_depend_on_the_coefficient() -> None:
    l0s: dict[float, float] = {}
    while (coefficient := next_coefficient(l0s, 14, 70, start=5, denser=1 / 3)) is not None:
        assert coefficient not in l0s
        l0s[coefficient] = 282 - len(l0s) % 2  # now a little less, now a little more
    assert len(l0s) == 10


def test_a_learning_rate_is_given_up_once_it_is_far_worse_with_more_latents_than_are_wanted() -> None:
    assert hopeless([{"validation_l0": 40, "validation_fvu": 0.2}], 32, best=0.15)
    assert not hopeless([{"validation_l0": 40, "validation_fvu": 0.2}], 32, best=0.17)
    assert not hopeless([{"validation_l0": 20, "validation_fvu": 0.9}], 32, best=0.15)
    assert not hopeless([{"validation_l0": 40, "validation_fvu": 0.8}], 32, best=math.inf)
    assert hopeless([{"validation_l0": 40, "validation_fvu": 0.95}], 32, best=math.inf)


def test_the_search_goes_to_higher_rates_where_none_has_got_there() -> None:
    assert next_rate(dict.fromkeys([0.000111, 0.000333, 0.001, 0.003, 0.009], math.inf)) == 0.027


def test_figures_are_linear_in_log_l0_and_never_extrapolated() -> None:
    points = [{"l0": 40.0, "fvu": 0.1}, {"l0": 10.0, "fvu": 0.3}, {"l0": 0.0, "fvu": 1.0}]
    assert at_l0(points, "l0", 20) == pytest.approx({"l0": 25.0, "fvu": 0.2})
    assert at_l0(points[:1], "l0", 40) == points[0]
    assert at_l0(points, "l0", 9) is None
    assert at_l0(points, "l0", 41) is None


def test_the_interval_is_of_the_logarithms() -> None:
    mean, low, high = interval([math.exp(-0.1), math.exp(-0.3)])
    # The logs' mean is -0.2, their deviation 0.2 / √2, and t(0.975, 1) = 12.706: half the interval is 1.2706.
    assert (mean, low, high) == pytest.approx((math.exp(-0.2), math.exp(-1.4706), math.exp(1.0706)), rel=1e-4)


def test_both_sides_get_the_same_batches_and_no_row_twice(tiny: None) -> None:
    data = data_of("toy", 1, TINY.steps)
    first, second = (torch.cat(list(data.batches(1, TINY.batch, TINY.steps))) for _ in range(2))
    assert torch.equal(first, second)
    assert len(torch.unique(first, dim=0)) == TINY.batch * TINY.steps
    assert not torch.equal(first, torch.cat(list(data.batches(2, TINY.batch, TINY.steps))))
    assert len(list(data.batches(1, TINY.batch, TINY.steps + 3))) == TINY.steps + 3
    centred = data.sample_ND - data.sample_ND.mean(0)
    assert centred.square().sum(1).mean() == pytest.approx(data.d, rel=1e-4)


def test_the_toys_features_are_not_what_a_trainer_draws_first(tiny: None) -> None:
    data = data_of("toy", 3, TINY.steps)
    assert data.truth is not None
    drawn = torch.randn(512, 128, generator=torch.Generator().manual_seed(3))
    cosine = torch.cosine_similarity(data.truth.features_FD, drawn, dim=1)
    assert cosine.abs().max() < 0.6


class Plain:
    """A JumpReLU SAE whose latents are the rows' dimensions."""

    def __init__(self, d: int) -> None:
        self.W_dec, self.threshold = torch.eye(d), torch.full((d,), 9.0)
        self.cfg = SimpleNamespace(d_in=d, d_sae=d)

    def encode(self, x_BD: Tensor) -> Tensor:
        return x_BD.relu() * (x_BD > self.threshold)

    def decode(self, acts_BF: Tensor) -> Tensor:
        return acts_BF


def test_the_threshold_gives_the_l0_that_is_wanted() -> None:
    sae, rows_ND = Plain(16), torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    set_threshold(sae, rows_ND, 3)
    assert (sae.encode(rows_ND) > 0).sum() == 300


def test_true_features_are_found_whatever_their_order() -> None:
    active_NF = torch.rand(200, 6, generator=torch.Generator().manual_seed(0)) < 0.3
    sae = Plain(6)
    sae.threshold.zero_()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    features_FD = torch.eye(6)[order]
    found = recovery(sae, active_NF.float() @ features_FD, Truth(features_FD, active_NF))
    assert found == pytest.approx({"mcc": 1.0, "f1": 1.0})
    half = recovery(sae, active_NF[:, [1, 0, 3, 2, 5, 4]].float() @ features_FD, Truth(features_FD, active_NF))
    assert half["mcc"] == pytest.approx(1)
    assert half["f1"] < 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_every_side_trains_every_kind_and_saelens_loads_it(kind: str, tiny: None) -> None:
    data = data_of("toy", 1, TINY.steps)
    for side in SIDES:
        run = Run("toy", side, kind, 1e-3, 2.0, 1, TINY.steps)
        sae = trained(run, data, TINY)
        found = figures_of(sae, data, TINY.k if kind in quality_runs.BY_THRESHOLD else None, splice=False)
        assert 0 < found["fvu"] < 3
        assert 0 <= found["mcc"] <= 1
        if kind == "topk":
            assert found["l0"] == 2
        if kind in quality_runs.BY_THRESHOLD:
            assert found["validation_l0"] == pytest.approx(2, abs=0.01)
            assert "delivered_l0" in found


def figures_made_up(run: Run) -> dict[str, float]:
    """A side's own optimum, and L0 by the coefficient."""
    worse = 0.1 * abs(math.log(run.lr / 1e-3)) + (0.2 if run.side == "ours" else 0.3) + 0.001 * run.seed
    if run.coefficient is None:
        return {"fvu": worse, "l0": 8.0, "validation_fvu": worse, "validation_l0": 8.0, "mcc": 0.5}
    l0 = run.coefficient if run.side == "ours" else 20 / run.coefficient
    return {"fvu": worse / l0, "l0": l0, "validation_fvu": worse / l0, "validation_l0": l0, "mcc": 0.5}


def test_each_training_is_kept_and_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Run] = []

    def figures(run: Run) -> dict[str, float]:
        asked.append(run)
        return figures_made_up(run)

    monkeypatch.setattr(quality_runs, "_figures", figures)
    raw, to = tmp_path / "raw.jsonl", tmp_path / "table.json"
    arguments = ["--data", "toy", "--kinds", "topk", "jumprelu", "--raw", str(raw), "--to", str(to)]
    assert quality.main(arguments) == 0
    assert len(asked) == len(set(asked)) == len(raw.read_text().splitlines())
    assert {run.seed for run in asked if run.side == "ours"} == {0, 1, 2, 3, 4, 5}
    rows = json.loads(to.read_text())["rows"]
    assert [(row["kind"], row["l0"]) for row in rows] == [
        ("topk", 8),
        ("jumprelu", 4),
        ("jumprelu", 8),
        ("jumprelu", 16),
    ]
    assert all(row["passed"] for row in rows)
    assert rows[0]["sides"]["ours"]["lr"] == 1e-3
    assert rows[0]["ratio"][0] == pytest.approx(0.203 / 0.303, rel=1e-3)
    asked.clear()
    assert quality.main([*arguments, "--table"]) == quality.main(arguments) == 0
    assert not asked
    assert "pass" in capsys.readouterr().out


def test_what_is_not_there_is_not_trained_for_the_table(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "none.jsonl", train=False, say=print)
    with pytest.raises(NotThere):
        runs(Run("toy", "ours", "topk", 1e-3, None, 1, 4))


def test_a_training_that_diverges_is_a_line_without_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: None
) -> None:
    from mistudio_train.errors import TrainingDiverged

    def diverge(*_: Any) -> Any:
        raise TrainingDiverged("The loss is no number.", "Lower learning_rate.")

    monkeypatch.setattr(quality_runs, "trained", diverge)
    run = Run("toy", "ours", "topk", 1.0, None, 0, TINY.steps)
    raw = tmp_path / "raw.jsonl"
    assert Runs(raw, train=True, say=print)(run) == {}
    assert Runs(raw, train=False, say=print)(run) == {}
    with pytest.raises(NotThere):
        Runs(raw, train=False, say=print)(replace(run, seed=1))
