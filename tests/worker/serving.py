"""For tests: a worker as a process of its own, with a job of `jobs.py`: `python -m tests.worker.serving NAME`."""

import asyncio
import logging
import os
import signal
import sys

from mistudio_train.logs import setup_logging
from mistudio_train.settings import Settings
from mistudio_train.worker.app import serve

from . import jobs

if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    settings = Settings()
    setup_logging(settings.logging)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    name = sys.argv[1]
    job = jobs.waits_in(name) if name in ("loading", "training", "exporting") else getattr(jobs, name)  # type: ignore[arg-type]
    asyncio.run(serve(settings, job))
