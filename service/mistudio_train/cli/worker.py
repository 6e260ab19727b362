"""The commands `serve` and `init`: be a worker, and create what workers need."""

import asyncio
import json
import logging
import os
import signal
from typing import Annotated

import typer

from mistudio_train.logs import setup_logging
from mistudio_train.messages import Logging

from .display import say
from .environment import load_settings

commands = typer.Typer()


@commands.command(epilog="Example: KAFKA_BOOTSTRAP_SERVERS=kafka:9092 mistudio-train serve")
def serve() -> None:
    """Be a worker: take requests from Kafka until told to stop. Waits for servers that are not up yet.

    SIGTERM or Ctrl-C: jobs save what they have within GRACE_SECONDS, for the worker that goes on with them. A second
    one ends all at once.

    Exit status: 0 when it was told to stop, 2 for wrong settings, 128 + the signal's number at a second signal.
    """
    settings = load_settings()
    setup_logging(settings.logging)
    from mistudio_train.worker import app

    # The web server hands the signal on when all is closed in good order. A thread may still wait for the store then,
    # and Python would wait for the thread.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    asyncio.run(app.serve(settings))


@commands.command(epilog="Example: mistudio-train --env-file .stack/env init")
def init(as_json: Annotated[bool, typer.Option("--json", help="Print what was created as an object.")] = False) -> None:
    """Create the topics and the bucket that are missing. Prints the name of each that it created.

    Exit status: 0, or 2 when Kafka or the store cannot be used.
    """
    settings = load_settings()
    setup_logging(Logging("WARNING", settings.log_format))  # to hear which topic is not as it should be
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    from mistudio_train.worker import kafka
    from mistudio_train.worker.store import open_store

    from . import bus

    with bus.reaching_kafka(settings):
        topics = asyncio.run(kafka.ensure_topics(settings))
    open_store(settings).ensure()
    if as_json:
        typer.echo(json.dumps({"topics_created": topics, "bucket": settings.minio_bucket}))
        return
    for topic in topics:
        typer.echo(topic)
    say(f"{len(topics)} topics created, {len(settings.topics.all()) - len(topics)} were there.")
    say(f"The store is ready: {settings.store_path or settings.minio_bucket}.")
