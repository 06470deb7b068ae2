"""Object store on Amazon S3, or on a server that speaks its protocol.

All retrying happens in :meth:`S3Store._retrying`; boto3's own is switched off. Every object carries
its CRC-32 and the name of the call that stored it as metadata: the first finds damage that the
length does not show, the second tells whether a conditional put whose answer was lost had won.
"""

import base64
import random
import re
import secrets
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from smlt_tune.errors import (
    InvalidInput,
    ObjectDamaged,
    ObjectNotFound,
    StorageFull,
    StoreError,
    StoreUnavailable,
)
from smlt_tune.runtime.clock import SYSTEM_CLOCK, Clock
from smlt_tune.runtime.stores.base import Buffer
from smlt_tune.runtime.stores.object_keys import check_key, check_prefix

T = TypeVar("T")

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
#: How often an object whose checksum is wrong is read before that is believed.
_READS_OF_DAMAGED = 3
#: boto3 makes clients from one session (a second one costs 100 ms), one at a time only.
_MAKING_CLIENTS = threading.Lock()
#: Most keys of one request to delete.
_DELETES = 1000

_AGAIN = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "TooManyRequests",
    "XAmzContentChecksumMismatch",
}
_FULL = {"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull"}
_REGION = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_OPTIONS = ("endpoint_url", "access_key", "secret_key", "session_token", "region")


class S3Store:
    """Objects below a prefix of a bucket.

    May be used from several threads. A process that was forked must make its own store.

    Without keys, boto3 looks for credentials in its usual places (environment, configuration
    files, role of the function).

    Args:
        url: ``s3://bucket`` or ``s3://bucket/prefix``. The bucket must exist.
        endpoint_url: Address of a server other than Amazon's.
        access_key: Access key id; together with ``secret_key``.
        secret_key: Secret access key.
        session_token: Goes with temporary keys.
        region: Region of the bucket.
        retry_s: How long to try again before StoreUnavailable, in seconds.
        answer_s: How long to wait for the server's next byte, in seconds.
        clock: Source of time.

    Raises:
        InvalidInput: The arguments are wrong, or (from every verb) the bucket does not exist or the
            credentials are refused.
        StoreError: boto3 is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        endpoint_url: str | None = None,
        access_key: str | None = None,
        secret_key: str | None = None,
        session_token: str | None = None,
        region: str | None = None,
        retry_s: float = 30.0,
        answer_s: float = 20.0,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._bucket, self._prefix = _parts(url)
        if (access_key is None) != (secret_key is None):
            raise InvalidInput(
                f"object store {url}: access_key and secret_key go together; give both or neither"
            )
        self._endpoint = endpoint_url
        self._retry_s = retry_s
        self._clock = clock
        self._random = random.Random()
        self._client = _client(
            url,
            answer_s,
            endpoint_url=endpoint_url,
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            aws_session_token=session_token,
            region_name=region or ("us-east-1" if endpoint_url else None),
        )

    def __repr__(self) -> str:
        endpoint = f", endpoint_url={self._endpoint!r}" if self._endpoint else ""
        return f"S3Store({self.url!r}{endpoint})"

    @property
    def url(self) -> str:  # noqa: D102 - the contract stands on the protocol
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def put(  # noqa: D102
        self, key: str, content: Buffer, *, if_absent: bool = False
    ) -> bool:
        name = self._name(key)
        body = bytes(content) if isinstance(content, memoryview) else content
        crc, call = zlib.crc32(body), secrets.token_hex(8)
        request = {
            **name,
            "Body": body,
            "ChecksumCRC32": base64.b64encode(crc.to_bytes(4, "big")).decode(),
            "Metadata": {"crc32": f"{crc:08x}", "call": call},
            **({"IfNoneMatch": "*"} if if_absent else {}),
        }
        attempts = 0

        def attempt() -> bool:
            nonlocal attempts
            attempts += 1
            try:
                self._client.put_object(**request)
            except self._client.exceptions.ClientError as error:
                if not if_absent or _status(error) != 412:
                    raise
                return False
            return True

        stored = self._retrying(f"store {key}", attempt)
        return stored or (attempts > 1 and self._caller(key) == call)

    def _caller(self, key: str) -> str | None:
        """Which call stored the object."""

        def attempt() -> str | None:
            metadata: dict[str, str] = self._client.head_object(**self._name(key))["Metadata"]
            return metadata.get("call")

        return self._retrying(f"look at {key}", attempt)

    def get(self, key: str) -> bytes:  # noqa: D102
        name = self._name(key)

        def attempt() -> bytes:
            response = self._client.get_object(**name)
            content: bytes = response["Body"].read()
            if len(content) != response["ContentLength"]:
                raise _Again(f"{len(content)} of {response['ContentLength']} bytes came")
            expected = response["Metadata"].get("crc32")
            if expected and f"{zlib.crc32(content):08x}" != expected:
                raise _Damaged(f"its checksum is not {expected}")
            return content

        return self._retrying(f"read {key}", attempt)

    def list(self, prefix: str) -> list[str]:  # noqa: D102
        check_prefix(prefix)
        return sorted(self._listed(prefix))

    def _listed(self, prefix: str) -> Iterator[str]:
        request = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        while True:
            page = self._retrying(
                f"list {prefix!r}", lambda: self._client.list_objects_v2(**request)
            )
            for entry in page.get("Contents", ()):
                yield entry["Key"].removeprefix(self._prefix)
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, keys: Sequence[str]) -> None:  # noqa: D102
        names = [self._name(key)["Key"] for key in keys]
        for first in range(0, len(names), _DELETES):
            left = names[first : first + _DELETES]
            self._retrying("delete objects", partial(self._delete, left))

    def _delete(self, left: Any) -> None:  # Any: the name list means the method here
        """Deletes what is left, and takes out of that list what is gone."""
        objects = [{"Key": name} for name in left]
        reply = self._client.delete_objects(
            Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True}
        )
        errors = [error for error in reply.get("Errors", ()) if error.get("Code") != "NoSuchKey"]
        left[:] = [error["Key"] for error in errors]
        if errors:
            reason = f"{errors[0].get('Code')}: {errors[0].get('Message')}"
            if errors[0].get("Code") == "AccessDenied":
                raise InvalidInput(
                    f"cannot delete objects in {self._place}: {reason}: the credentials must allow "
                    "s3:DeleteObject"
                )
            raise _Again(f"{len(errors)} objects are left, {reason}")

    def close(self) -> None:
        """Releases connections. Idempotent."""
        self._client.close()

    def _name(self, key: str) -> dict[str, str]:
        check_key(key)
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def _retrying(self, verb: str, call: Callable[[], T]) -> T:
        """The only retry loop: bounded by ``retry_s`` since the first failure of the call."""
        from botocore.exceptions import BotoCoreError, ClientError

        give_up: float | None = None
        pause_s, damaged = _FIRST_PAUSE_S, 0
        while True:
            try:
                return call()
            except (BotoCoreError, ClientError, _Again) as error:
                failure = f"cannot {verb} in {self._place}: {error}"
                if not _worth_retrying(error):
                    raise self._translated(error, failure) from error
                damaged += isinstance(error, _Damaged)
                if damaged == _READS_OF_DAMAGED:
                    raise ObjectDamaged(
                        f"{failure} (read {damaged} times): the object was damaged; delete it"
                    ) from error
                now = self._clock.monotonic()
                give_up = now + self._retry_s if give_up is None else give_up
                if now >= give_up:
                    raise StoreUnavailable(
                        f"{failure}; tried again for {self._retry_s:g} s: check the network and "
                        "the server, or ask for less at once"
                    ) from error
                self._clock.sleep(min(pause_s * self._random.uniform(0.5, 1.0), give_up - now))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    @property
    def _place(self) -> str:
        return f"{self.url} at {self._endpoint}" if self._endpoint else self.url

    def _translated(self, error: Exception, failure: str) -> Exception:
        """Errors of boto3 that no second attempt heals to ours."""
        code, status = _code(error), _status(error)
        if code == "NoSuchBucket":
            return InvalidInput(f"{failure}: make the bucket {self._bucket}, or correct its name")
        if code == "NoSuchKey" or status == 404:
            return ObjectNotFound(f"no object in {self._place}: {failure}")
        if code in _FULL or status == 507:
            return StorageFull(f"{failure}. Nothing was damaged; free some space")
        if code in _REGION or status == 301:
            return InvalidInput(f"{failure}: correct the region of the bucket {self._bucket}")
        if status in (401, 403):
            return InvalidInput(
                f"{failure}: check the credentials; they must allow s3:GetObject, s3:PutObject, "
                f"s3:DeleteObject and s3:ListBucket on the bucket {self._bucket}, and the clock of "
                "this machine must be right"
            )
        if not code:
            return InvalidInput(f"{failure}: give access_key and secret_key, or configure boto3")
        return StoreError(f"{failure}: the server must support this part of the S3 protocol")


class _Again(Exception):
    """An answer that is none; another attempt may be luckier."""


class _Damaged(_Again):
    """An object whose checksum is wrong."""


def _worth_retrying(error: Exception) -> bool:
    from botocore.exceptions import (
        ChecksumError,
        ConnectionError,
        FlexibleChecksumError,
        HTTPClientError,
        IncompleteReadError,
    )

    broken = (
        _Again,
        ChecksumError,
        ConnectionError,
        FlexibleChecksumError,
        HTTPClientError,
        IncompleteReadError,
    )
    status = _status(error)
    overloaded = status >= 500 and status not in (501, 507)
    return isinstance(error, broken) or overloaded or status in (409, 429) or _code(error) in _AGAIN


def _code(error: Exception) -> str:
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _status(error: Exception) -> int:
    response = getattr(error, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _parts(url: str) -> tuple[str, str]:
    """Bucket and prefix; the prefix is empty or ends with a slash."""
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.rstrip("/")
    if scheme != "s3" or not _BUCKET.fullmatch(bucket):
        raise InvalidInput(
            f"{url} is no object store: expected s3://bucket or s3://bucket/prefix, the bucket of "
            "3 to 63 small letters, digits, '-', '.'"
        )
    if prefix:
        check_key(prefix)
    return bucket, f"{prefix}/" if prefix else ""


def _client(url: str, answer_s: float, **options: str | None) -> Any:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise StoreError(
            f"object store {url}: s3:// needs boto3, install it with: pip install 'smlt-tune[aws]'"
        ) from error
    config = Config(
        retries={"total_max_attempts": 1},
        connect_timeout=min(5.0, answer_s),
        read_timeout=answer_s,
        max_pool_connections=50,
        tcp_keepalive=True,
        # Checksums are sent and checked here: not every server takes botocore's default trailers.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path"} if options["endpoint_url"] else None,
    )
    try:
        with _MAKING_CLIENTS:
            client: Any = boto3.client
            return client("s3", config=config, **options)
    except (ValueError, BotoCoreError) as error:
        raise InvalidInput(f"object store {url}: {error}") from error


def open_url(url: str, options: Mapping[str, str]) -> S3Store:
    """The store at an ``s3://`` URL.

    Raises:
        InvalidInput: The URL or an option is wrong.
    """
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        known = ", ".join(_OPTIONS)
        raise InvalidInput(
            [f"object store {url}: unknown option {name!r}, known are {known}" for name in unknown]
        )
    arguments: dict[str, Any] = dict(options)
    return S3Store(url, **arguments)


if TYPE_CHECKING:
    from smlt_tune.runtime.stores.base import ObjectStore

    _: ObjectStore = S3Store("")
