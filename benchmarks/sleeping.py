"""A worker whose jobs sleep, for benchmarks of the queue; each job is a child process like any other.

What a child imports to find its job must be little, so the worker itself is imported inside `serve`.
"""

import asyncio
import logging
import os
import time
from typing import Any, Final

from tests.worker.jobs import Send, works

from mistudio_train.messages import Finished, JobSpec, Progress

SECONDS: Final = "BENCHMARK_JOB_SECONDS"
"""The environment variable that says how long."""
LONG: Final = "long"
"""The job that speaks once a second for `LONG_SECONDS`; all others are as short as `SECONDS` says."""
LONG_SECONDS: Final = "BENCHMARK_LONG_JOB_SECONDS"


def sleeps(spec: JobSpec, send: Send) -> Finished:
    """A job that costs next to no CPU, and writes three files of a few bytes."""
    time.sleep(float(os.environ[SECONDS]))
    return works(spec, send)


def speaks(spec: JobSpec, send: Send) -> Finished:
    """The long job says once a second that it goes on, from the beginning whenever it is begun; the others sleep."""
    if spec.job_id != LONG:
        return sleeps(spec, send)
    seconds = int(float(os.environ[LONG_SECONDS]))
    for second in range(seconds):
        send(Progress("training", "going on", second / seconds, step=second, total_steps=seconds))
        time.sleep(1)
    return works(spec, send)


def serve(assignor: str, job: str = "sleeps") -> None:
    """Run a worker by the environment's settings until it is told to stop.

    Args:
        assignor: `ours` or `stock`.
        job: `sleeps` or `speaks`.

    """
    from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor

    from mistudio_train.logs import setup_logging
    from mistudio_train.settings import Settings
    from mistudio_train.worker import app
    from mistudio_train.worker.assignor import BusyAwareAssignor

    settings = Settings()
    setup_logging(settings.logging)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # new topics have no leader yet
    made: Any = {"ours": BusyAwareAssignor, "stock": lambda slot: RoundRobinPartitionAssignor}[assignor]
    jobs = {"sleeps": sleeps, "speaks": speaks}
    asyncio.run(app.serve(settings, jobs[job], made))
