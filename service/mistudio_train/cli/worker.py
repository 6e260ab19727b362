"""The commands `serve` and `init`: be a worker, and create what workers need."""

import asyncio
import json
import logging
import signal
import sys
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

    Exit status: 0 when it was told to stop, 2 for wrong settings.
    """
    settings = load_settings()
    setup_logging(settings.logging)
    from mistudio_train.worker import app

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the web server hands it on when all is closed in good order
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
