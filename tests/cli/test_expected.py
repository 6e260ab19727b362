"""What is concluded from earlier jobs: on jobs whose times are made by a known rule."""

import random
from collections.abc import Mapping

import pytest

from mistudio_train.cli.expected import active_share, expected, share_error
from mistudio_train.paces import Pace, Part

Units = Mapping[str, tuple[float, ...]]
RATES: Units = {
    "loading": (2e-9, 3.0),
    "extracting": (1e-9, 0.0, 2e-8, 0.5),
    "training topk": (4e-10, 1e-9, 0, 2e-3, 0),
}


def seconds(units: Units) -> dict[str, float]:
    return {
        name: sum(rate * unit for rate, unit in zip(RATES[name], some, strict=True)) for name, some in units.items()
    }


def units_of(chance: random.Random) -> Units:
    tokens, blocks = chance.uniform(1e4, 3e5), chance.randint(2, 24)
    d_sae, steps = chance.choice([512, 1024, 4096, 16_384]), chance.uniform(50, 2000)
    size = 576 * d_sae
    return {
        "loading": (chance.uniform(1e8, 1e9), 1),
        "extracting": (tokens * blocks * 7e6, tokens, tokens * 576, 1),
        "training topk": (steps * 1024 * size / 1000, steps * size / 1000, steps * 1024 * 576, steps, 1),
    }


def pace_of(job: str, parts: dict[str, Part]) -> Pace:
    return Pace(job, "CPU", parts, 1.0, {"topk": 0.01}, 1000, 1100, 2000, disk=1900)


def jobs(count: int, noise: float = 0.0, seed: int = 0) -> list[Pace]:
    chance = random.Random(seed)
    made = []
    for number in range(count):
        units = units_of(chance)
        parts = {
            name: Part(units[name], took * (1 + chance.uniform(-noise, noise))) for name, took in seconds(units).items()
        }
        made.append(pace_of(f"j{number}", parts))
    return made


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_job_is_estimated_by_the_rule_that_the_others_followed(noise: float) -> None:
    paces, chance = jobs(12, noise), random.Random(99)
    missed = []
    for _ in range(20):
        units = units_of(chance)
        found = expected(units, paces)
        missed.append(abs(found.seconds / sum(seconds(units).values()) - 1))
        assert found.error is not None
        assert found.error.jobs == 12
        assert found.error.median < 0.02 + noise
        assert found.unknown == []
    assert sorted(missed)[17] < 0.01 + noise


def test_one_job_is_taken_as_it_is_and_its_error_is_not_known() -> None:
    (one,) = jobs(1)
    found = expected({name: part.units for name, part in one.parts.items()}, [one])
    assert found.seconds == pytest.approx(sum(part.seconds for part in one.parts.values()))
    assert found.error is None
    twice = {name: tuple(2 * unit for unit in part.units) for name, part in one.parts.items()}
    assert expected(twice, [one]).seconds == pytest.approx(2 * found.seconds)


def test_a_kind_that_was_never_trained_is_taken_to_be_like_the_others() -> None:
    paces = jobs(6)
    units = dict(units_of(random.Random(5)))
    as_known = expected(units, paces).parts["training topk"]
    found = expected({"training gated": units.pop("training topk")} | units, paces)
    assert found.parts["training gated"] == pytest.approx(as_known)
    assert found.unknown == []


def test_what_no_job_had_is_named_and_not_counted() -> None:
    found = expected(dict(units_of(random.Random(5))) | {"predicting": (1e12, 1.0)}, jobs(6))
    assert found.unknown == ["predicting"]
    assert "predicting" not in found.parts


def test_a_job_unlike_all_others_is_said_to_be() -> None:
    units = dict(units_of(random.Random(5)))
    assert expected(units, jobs(12)).beyond == []
    units["extracting"] = tuple(1000 * unit for unit in units["extracting"])
    assert expected(units, jobs(12)).beyond == ["extracting"]


def test_no_time_is_below_nothing_whatever_the_jobs_were() -> None:
    chance = random.Random(1)
    for _ in range(50):
        known = [
            pace_of("j", {"loading": Part((chance.random(), 1.0), chance.random())})
            for _ in range(chance.randint(1, 9))
        ]
        assert expected({"loading": (chance.random() * 100, 1.0)}, known).seconds >= 0


def test_the_error_is_that_of_each_job_from_the_others() -> None:
    paces = jobs(10)
    slow = {name: Part(part.units, 3 * part.seconds) for name, part in paces[4].parts.items()}
    paces[4] = pace_of("slow", slow)
    error = expected(units_of(random.Random(5)), paces).error
    assert error is not None
    assert error.worst > 0.5
    assert error.median < 0.5


def test_errors_of_figures_and_the_share_of_active_latents() -> None:
    found = share_error([(110, 100), (90, 100), (100, 0)])
    assert found is not None
    assert [found.median, found.worst, found.jobs] == pytest.approx([0.1, 0.1, 2])
    assert share_error([]) is None
    assert active_share("topk", jobs(3)) == 0.01
    assert active_share("gated", jobs(3)) is None


def test_parts_that_another_version_counted_otherwise_say_nothing() -> None:
    paces, units = jobs(6), units_of(random.Random(5))
    other = {"loading": Part((1.0,), 1e6), "extracting": Part((), 1e6)}
    assert expected(units, [*paces, pace_of("old", other)]).parts == expected(units, paces).parts


def test_an_amount_that_no_job_had_is_no_part_of_the_rule() -> None:
    known = [pace_of("j", {"exporting": Part((0.0, 0.0, float(size), 1.0), 1.0 + size)}) for size in (1, 2, 4, 8)]
    assert expected({"exporting": (5.0, 7.0, 4.0, 1.0)}, known).seconds == pytest.approx(5.0)
