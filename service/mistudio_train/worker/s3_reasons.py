"""Why an S3 call failed, in S3's codes or in words. Never the error's own text, which may hold a signed URL."""

from xml.etree import ElementTree

from minio.error import InvalidResponseError, S3Error, ServerError
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    MaxRetryError,
    NameResolutionError,
    NewConnectionError,
    ReadTimeoutError,
    SSLError,
)

MISSING = {"NoSuchKey", "NoSuchBucket", "NoSuchObject", "InvalidBucketName"}
FORBIDDEN = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
NO_S3 = (InvalidResponseError, ElementTree.ParseError, ValueError)
"""What minio raises when an answer is not as it expects; the last two by accident."""

_WORDS: dict[type[Exception], str] = {
    NameResolutionError: "no host of that name",
    NewConnectionError: "no connection",  # after what is derived from it, before what it is derived from
    ConnectTimeoutError: "no connection in time",
    ReadTimeoutError: "no answer in time",
    SSLError: "TLS failed",
}


def reason_of(error: Exception) -> str:
    """S3's code where there is one."""
    if isinstance(error, S3Error):
        return error.code or "an error without a code"
    if isinstance(error, ServerError):
        return f"HTTP status {error.status_code}"
    if isinstance(error, InvalidResponseError) and error._code >= 500:
        return f"HTTP status {error._code}"
    if isinstance(error, NO_S3):
        return "an answer that is no S3"
    if isinstance(error, MaxRetryError) and isinstance(error.reason, HTTPError):
        error = error.reason
    for kind, words in _WORDS.items():
        if isinstance(error, kind):
            return words
    return f"the connection broke ({type(error).__name__})"


def code_in(body: bytes) -> str | None:
    """The code in S3's error document; `None` when it is none."""
    try:
        # the store's own answer; expat bounds what entities may expand to
        root = ElementTree.fromstring(body)  # noqa: S314
    except ElementTree.ParseError:
        return None
    return next((element.text for element in root.iter() if element.tag.endswith("Code")), None)
