"""Builds the programs that the native stack runs, once a machine, and keeps them in a cache outside the checkout.

It starts no server, and nothing in the cache is ever changed after it was built.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import StackError

KAFKA = "kafka-4.3.1"
POM = Path(__file__).with_name("kafka-pom.xml")
COPY_JARS = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"

MINIO = "minio-RELEASE.2026-02-12T20-18-48Z"
MINIO_MODULE = "github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c"
MINIO_VERSION = (
    "-s -w -X github.com/minio/minio/cmd.Version=2026-02-12T20:18:48Z"
    f" -X github.com/minio/minio/cmd.ReleaseTag={MINIO.removeprefix('minio-')}"
)

NEEDS = {
    "java": "a Java runtime, 17 or newer (Debian: default-jre-headless)",
    "mvn": "Maven (Debian: maven)",
    "go": "Go, 1.24 or newer (https://go.dev/dl)",
}


def cache_folder() -> Path:
    """`$MISTUDIO_CACHE`, or `mistudio-train` in the user's cache folder. Made when it is missing."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("MISTUDIO_CACHE") or user_cache / "mistudio-train")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def kafka_jars() -> Path:
    """The folder of the broker's jars."""
    return cached(KAFKA, _fetch_kafka)


def minio_binary() -> Path:
    """MinIO's server program."""
    return cached(MINIO, _build_minio) / "minio"


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; `build` fills it when it is not there.

    Two processes that ask at once get the same folder: one builds, the other waits. A build that fails or is killed
    leaves nothing under that name.
    """
    final = cache_folder() / name
    if final.exists():
        return final
    with _locked(final.with_name(f".{name}.lock")):
        if final.exists():
            return final
        for abandoned in final.parent.glob(f".{name}.part-*"):
            shutil.rmtree(abandoned)
        part = Path(tempfile.mkdtemp(prefix=f".{name}.part-", dir=final.parent))
        try:
            build(part)
            part.chmod(final.parent.stat().st_mode)  # a temporary folder is its owner's alone
            part.rename(final)
        except BaseException:
            shutil.rmtree(part)
            raise
    return final


def missing_programs() -> list[str]:
    """What this machine lacks for the native stack, in words for a person.

    A program whose product is already in the cache is not missed; Java always is, it runs the broker.
    """
    wanted = ["java"]
    wanted += [] if (cache_folder() / KAFKA).exists() else ["mvn"]
    wanted += [] if (cache_folder() / MINIO).exists() else ["go"]
    return [NEEDS[program] for program in wanted if shutil.which(program) is None]


def _fetch_kafka(folder: Path) -> None:
    _say("fetching Kafka 4.3.1 by Maven (44 MB, once)")
    _run(["mvn", "-q", "-B", "-f", str(POM), COPY_JARS, "-DincludeScope=runtime", f"-DoutputDirectory={folder}"])


def _build_minio(folder: Path) -> None:
    _say("building MinIO from its Go module (about 3 minutes, once)")
    command = ["go", "install", "-trimpath", "-tags", "kqueue", "-ldflags", MINIO_VERSION, MINIO_MODULE]
    _run(command, CGO_ENABLED="0", GOBIN=str(folder))


def _run(command: list[str], **environment: str) -> None:
    """Run a build tool; its own words are shown only when it fails."""
    result = subprocess.run(
        command, env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if result.returncode != 0:
        raise StackError(
            f"`{' '.join(command[:2])} …` failed:\n{result.stdout[-2000:].strip()}\n",
            "It needs the network the first time; run it again, or name running servers (README, Settings)",
        )


def _say(what: str) -> None:
    print(f"mistudio-stack: {what} …", file=sys.stderr, flush=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the file lock `path`; the kernel lets go of it when the holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
