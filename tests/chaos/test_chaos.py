"""The short campaign: twenty jobs, forty deaths, and nothing is lost, doubled or different."""

from pathlib import Path

import pytest

from .campaign import Plan, run

SEED = 20


@pytest.mark.timeout(900)
async def test_every_job_survives_every_death_and_ends_once(tmp_path: Path) -> None:
    plan = Plan("short", SEED, (0.3, 1.2), jobs=22, kills=40, at_most_seconds=300, kills_a_job=4, trapped=0.5)
    outcome = await run(plan, tmp_path / "chaos", f"make chaos MINUTES=3 SEED={SEED}")
    print("\n".join(outcome.lines()))
    assert outcome.checked.violations == []
    assert len(outcome.checked.runs) >= 20
    assert sum(deed.is_kill for deed in outcome.deeds) >= plan.kills
