"""An object store that speaks S3: MinIO first of all. Knows no job; no secret and no signed URL leaves this module.

minio-py ignores the headers of a conditional put and silently overwrites, so those go by a presigned URL. That URL is a
credential: it is sent once, without urllib3's retries (which log it), and no error of it is chained.
"""

import io
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import urllib3
from minio import Minio
from minio.datatypes import Object
from minio.deleteobjects import DeleteObject
from minio.error import MinioException, S3Error
from minio.helpers import check_bucket_name
from urllib3.exceptions import HTTPError
from urllib3.util import Retry, Timeout

from mistudio_train.errors import StoreUnavailable
from mistudio_train.settings import Settings

from .objects import (
    CHUNK,
    OCTETS,
    Copied,
    HashingReader,
    KeyRefused,
    NotFound,
    ObjectInfo,
    OnBytes,
    StoreForbids,
    check_key,
    check_prefix,
    receive,
)
from .s3_reasons import FORBIDDEN, MISSING, NO_S3, code_in, reason_of

logger = logging.getLogger(__name__)

PART_BYTES = 16 * 1024 * 1024
SIGNED_FOR = timedelta(minutes=15)
CONNECTIONS = 32
RETRIES = Retry(
    connect=2,
    read=1,
    status=2,
    backoff_factor=0.2,
    status_forcelist=[500, 502, 503, 504],
    raise_on_status=False,
    respect_retry_after_header=False,  # a wait of hours is the caller's to decide
)


class S3Store:
    """Objects in the bucket that the settings name.

    Args:
        timeout: of a connection and of the silence between two reads.

    """

    def __init__(self, settings: Settings, *, timeout: Timeout | None = None) -> None:
        check_prefix(settings.store_prefix)
        self._bucket, self._prefix = settings.minio_bucket, settings.store_prefix
        self._endpoint, self._region = settings.minio_endpoint, settings.minio_region
        self._http = urllib3.PoolManager(
            maxsize=CONNECTIONS,
            timeout=timeout or Timeout(connect=5, read=60),
            retries=RETRIES,
        )
        self._client = _client(settings, self._http)

    @property
    def bucket(self) -> str:
        """The bucket."""
        return self._bucket

    @property
    def prefix(self) -> str:
        """What the keys that we make begin with."""
        return self._prefix

    def uri(self, key: str) -> str:
        """`s3://bucket/key`."""
        check_prefix(key)
        return f"s3://{self._bucket}/{key}"

    def ensure(self) -> None:
        """Create the bucket if it is missing."""
        with self._asking(f"show the bucket {self._bucket}"):
            if not self._client.bucket_exists(self._bucket):
                self._create_bucket()

    def put_file(self, key: str, path: Path, media_type: str = OCTETS, on_bytes: OnBytes | None = None) -> Copied:
        """Store a file, read once; parts go one after the other, so that one that fails leaves no threads behind."""
        check_key(key)
        with path.open("rb") as file:
            size = path.stat().st_size
            reader = HashingReader(file, on_bytes)
            with self._asking(f"store {key}"):
                self._client.put_object(
                    self._bucket,
                    key,
                    reader,  # type: ignore[arg-type]  # only `read` is called
                    size,
                    content_type=media_type,
                    part_size=PART_BYTES if size > PART_BYTES else 0,
                    num_parallel_uploads=1,
                )
            return reader.copied

    def put_bytes(self, key: str, data: bytes, media_type: str = OCTETS) -> None:
        """Store `data`."""
        check_key(key)
        with self._asking(f"store {key}"):
            self._client.put_object(self._bucket, key, io.BytesIO(data), len(data), content_type=media_type)

    def put_if_absent(self, key: str, data: bytes) -> str | None:
        """Store `data` as a new object: its etag, or `None` when there is one already."""
        return self._put_if(key, data, {"If-None-Match": "*"})

    def put_if_match(self, key: str, data: bytes, etag: str) -> str | None:
        """Replace the object that has `etag`: the new etag, or `None` when it is another one by now, or gone."""
        return self._put_if(key, data, {"If-Match": f'"{etag}"'})

    def get_bytes(self, key: str) -> tuple[bytes, str]:
        """An object and its etag. Raises `NotFound`."""
        with self._asking(f"give {key}", key), self._reading(self._bucket, key) as response:
            return response.read(), _etag(response)

    def get_file(self, key: str, path: Path, bucket: str | None = None) -> Copied:
        """Write an object to `path`, whole or not at all. Raises `NotFound`."""
        bucket = bucket or self._bucket
        with self._asking(f"give {key}", key, bucket), self._reading(bucket, key) as response:
            return receive(path, response.stream(CHUNK))

    def stat(self, key: str) -> ObjectInfo:
        """An object's size and time. Raises `NotFound`."""
        check_key(key)
        with self._asking(f"tell of {key}", key):
            try:
                return _info(key, self._client.stat_object(self._bucket, key))
            except S3Error:
                # the answer to HEAD has no body: only a second question tells a missing bucket from a missing object
                if self._client.bucket_exists(self._bucket):
                    raise
                raise self._unavailable(f"tell of {key}", "NoSuchBucket") from None

    def list(self, prefix: str, bucket: str | None = None) -> Iterator[ObjectInfo]:
        """Every object whose key begins with `prefix`, in the keys' order. Raises `NotFound` for another bucket."""
        check_prefix(prefix)
        bucket = bucket or self._bucket
        _check_bucket(bucket, prefix)
        with self._asking(f"list {prefix}", prefix, bucket):
            for found in self._client.list_objects(bucket, prefix, recursive=True):
                yield _info(found.object_name or "", found)

    def folders(self, prefix: str) -> Iterator[str]:
        """The names that follow `prefix`, which ends in `/`, up to the next `/`."""
        check_prefix(prefix)
        with self._asking(f"list {prefix}"):
            for found in self._client.list_objects(self._bucket, prefix):
                if found.is_dir and found.object_name:
                    yield found.object_name.removeprefix(prefix).removesuffix("/")

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; one that is not there is no error."""
        checked = list(keys)
        for key in checked:
            check_key(key)
        with self._asking("delete objects"):
            errors = list(self._client.remove_objects(self._bucket, (DeleteObject(key) for key in checked)))
        if errors:
            raise self._unavailable(f"delete {len(errors)} of {len(checked)} objects", errors[0].code or "no reason")

    def close(self) -> None:
        """Give back the connections."""
        self._http.clear()

    def _create_bucket(self) -> None:
        try:
            self._client.make_bucket(self._bucket, self._region)
            logger.info("created the bucket %s", self._bucket)
        except S3Error as error:
            if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise  # another worker may have been first

    @contextmanager
    def _reading(self, bucket: str, key: str) -> Iterator[urllib3.BaseHTTPResponse]:
        check_key(key)
        _check_bucket(bucket, key)
        response = self._client.get_object(bucket, key)
        try:
            yield response
        except BaseException:
            response.close()
            raise
        finally:
            response.release_conn()

    def _put_if(self, key: str, data: bytes, condition: dict[str, str]) -> str | None:
        check_key(key)
        with self._asking(f"store {key}"):
            url = self._client.get_presigned_url("PUT", self._bucket, key, expires=SIGNED_FOR)
            response = self._http.request("PUT", url, body=data, headers=condition, retries=False, redirect=False)
        if response.status == 200:
            return _etag(response)
        code = code_in(response.data)
        if response.status == 412 or code == "NoSuchKey":
            return None
        raise self._unavailable(f"store {key}", code or f"HTTP status {response.status}")

    @contextmanager
    def _asking(self, what: str, key: str | None = None, bucket: str | None = None) -> Iterator[None]:
        """Turn what minio and urllib3 raise into our errors; their texts may hold URLs, so only reasons are kept."""
        try:
            yield
        except KeyRefused:
            raise
        except (MinioException, HTTPError, *NO_S3) as error:
            reason = reason_of(error)
        else:
            return
        own = bucket in (None, self._bucket)
        if key is not None and reason in MISSING and (reason != "NoSuchBucket" or not own):
            raise NotFound(key if own else f"s3://{bucket}/{key}") from None
        raise self._unavailable(what, reason) from None

    def _unavailable(self, what: str, reason: str) -> StoreUnavailable:
        message = f"the object store at {self._endpoint} did not {what}: {reason}"
        if reason in FORBIDDEN:
            hint = f"Check MINIO_ACCESS_KEY and MINIO_SECRET_KEY and what they may do in the bucket {self._bucket}."
            return StoreForbids(message, hint)
        if reason == "NoSuchBucket":
            return StoreUnavailable(message, f"Create the bucket {self._bucket}, or start the worker again.")
        if reason == "RequestTimeTooSkewed":
            return StoreUnavailable(message, "Set the clock of this machine, or the store's: they differ too much.")
        return StoreUnavailable(message, "Check that it is up and that MINIO_ENDPOINT and MINIO_SECURE are right.")


def _client(settings: Settings, http: urllib3.PoolManager) -> Minio:
    try:
        check_bucket_name(settings.minio_bucket, strict=True)
        return Minio(
            settings.minio_endpoint,
            settings.minio_access_key.get_secret_value() or None,
            settings.minio_secret_key.get_secret_value() or None,
            secure=settings.minio_secure,
            region=settings.minio_region,
            http_client=http,
        )
    except ValueError:
        raise StoreUnavailable(
            "the settings MINIO_… do not name an object store",
            "MINIO_ENDPOINT is host:port without a scheme, MINIO_BUCKET 3 to 63 of a-z, 0-9, '.' and '-'; give both "
            "keys or neither.",
        ) from None


def _check_bucket(bucket: str, key: str) -> None:
    """There is no bucket of a name that none can have; minio would raise what looks like a broken answer."""
    try:
        check_bucket_name(bucket)
    except ValueError:
        raise NotFound(f"s3://{bucket}/{key}") from None


def _etag(response: urllib3.BaseHTTPResponse) -> str:
    return response.headers["ETag"].strip('"')


def _info(key: str, found: Object) -> ObjectInfo:
    return ObjectInfo(key, found.size or 0, found.last_modified or datetime.fromtimestamp(0, UTC), found.etag)
