"""Logging of both processes: the seed's line format and third-party levels, or a JSON object a line."""

import json
import logging
import sys

from .messages import Logging

FORMAT = "%(asctime)s - %(name)s - %(levelname)s - %(message)s"
DATE_FORMAT = "%Y-%m-%d %H:%M:%S"
QUIET = (
    "transformers",
    "torch",
    "urllib3",
    "aiokafka",
    "faststream",
    "minio",
    "httpx",
    "filelock",
    "matplotlib",
    "mlflow",
    "wandb",
)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, logger, level, message, and the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without a line end."""
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "logger": record.name,
            "level": record.levelname,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def setup_logging(how: Logging) -> None:
    """Send this process' log lines to stderr; call once, first of all."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if how.format == "json" else logging.Formatter(FORMAT, DATE_FORMAT))
    logging.basicConfig(level=how.level, handlers=[handler], force=True)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
