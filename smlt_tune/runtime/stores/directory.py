"""Object store in a directory: of this machine, or a network file system that all machines see."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from smlt_tune.errors import InvalidInput, ObjectNotFound, StorageFull, StoreUnavailable
from smlt_tune.runtime.stores.base import Buffer
from smlt_tune.runtime.stores.object_keys import check_key, check_prefix

#: Not a character of any key, so that no unfinished file is ever taken for an object.
_UNFINISHED = "~"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_OBJECT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


class DirectoryStore:
    """Every object is a file below a directory; its key is the path.

    An object appears, complete and on the disk, by a rename or a link of a temporary file. A
    process that is killed while it writes leaves at most a file whose name starts with ``~``; it is
    no object. May be used from several threads, processes, and machines that share the file system.

    Args:
        root: The directory. Made when the first object is stored.

    Raises:
        InvalidInput: It is no directory.
    """

    def __init__(self, root: str | Path) -> None:
        if not os.fspath(root):
            raise InvalidInput("the directory of an object store has no name")
        self._root = Path(os.path.abspath(root))
        if self._root.exists() and not self._root.is_dir():
            raise InvalidInput(f"{self._root} is no directory: an object store needs one")

    def __repr__(self) -> str:
        return f"DirectoryStore({str(self._root)!r})"

    @property
    def url(self) -> str:  # noqa: D102 - the contract stands on the protocol
        return self._root.as_uri()

    def put(  # noqa: D102
        self, key: str, content: Buffer, *, if_absent: bool = False
    ) -> bool:
        path = self._path(key)
        with self._translated(f"cannot store {key}"):
            if if_absent and path.is_file():
                return False
            path.parent.mkdir(parents=True, exist_ok=True)
            with _written(path.parent, content) as temporary:
                return _link(temporary, path) if if_absent else _rename(temporary, path)

    def get(self, key: str) -> bytes:  # noqa: D102
        path = self._path(key)
        with self._translated(f"cannot read {key}"):
            try:
                return path.read_bytes()
            except _NO_OBJECT as error:
                raise ObjectNotFound(f"no object {key} in {self.url}") from error

    def list(self, prefix: str) -> list[str]:  # noqa: D102
        check_prefix(prefix)
        folder, _, start = prefix.rpartition("/")
        with self._translated(f"cannot list {prefix!r}"):
            return sorted(_keys(str(self._root / folder), f"{folder}/" if folder else "", start))

    def delete(self, keys: Sequence[str]) -> None:  # noqa: D102
        paths = [self._path(key) for key in keys]
        with self._translated("cannot delete objects"):
            for path in paths:
                with contextlib.suppress(*_NO_OBJECT):
                    path.unlink()

    def _path(self, key: str) -> Path:
        check_key(key)
        return self._root / key

    @contextlib.contextmanager
    def _translated(self, failure: str) -> Iterator[None]:
        """Errors of the operating system to ours."""
        try:
            yield
        except OSError as error:
            problem = f"{failure} in {self.url}: {error.strerror}"
            if error.errno in _FULL:
                raise StorageFull(
                    f"{problem}. Nothing was damaged; free some space, or name a larger disk"
                ) from error
            if error.errno in _FORBIDDEN:
                raise InvalidInput(
                    f"{problem}: give this user the permission to write there, or name another "
                    "directory as object store"
                ) from error
            if isinstance(error, (*_NO_OBJECT, FileExistsError)):
                raise InvalidInput(
                    f"{problem}: one key may not be the folder of another one"
                ) from error
            raise StoreUnavailable(
                f"{problem}: check that the file system is mounted and healthy"
            ) from error


@contextlib.contextmanager
def _written(folder: Path, content: Buffer) -> Iterator[str]:
    """A temporary file with the content, safely on the disk; gone afterwards, whatever happens."""
    temporary = str(folder / f"{_UNFINISHED}{secrets.token_hex(8)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _write(descriptor, content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _write(descriptor: int, content: Buffer) -> None:
    rest = memoryview(content)
    rest = rest.cast("B") if rest.c_contiguous else memoryview(rest.tobytes())
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _rename(temporary: str, path: Path) -> bool:
    os.replace(temporary, path)
    _sync(path.parent)
    return True


def _link(temporary: str, path: Path) -> bool:
    try:
        os.link(temporary, path)
    except FileExistsError:
        if path.is_dir():
            raise
        return False
    _sync(path.parent)
    return True


def _sync(folder: Path) -> None:
    """Makes a new name survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _keys(folder: str, prefix: str, start: str = "") -> Iterator[str]:
    """Keys of the objects below a folder, in no order."""
    try:
        entries = os.scandir(folder)
    except _NO_OBJECT:
        return
    with entries:
        for entry in entries:
            if entry.name.startswith(_UNFINISHED) or not entry.name.startswith(start):
                continue
            if entry.is_dir():
                yield from _keys(entry.path, f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name


def open_url(url: str, options: Mapping[str, str]) -> DirectoryStore:
    """The store at a ``file:///`` URL.

    Raises:
        InvalidInput: The URL names another machine or no absolute path, or there are options.
    """
    parts = urlsplit(url)
    mistakes = [f"object store {url}: unknown option {name!r}" for name in sorted(options)]
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        mistakes.append(
            f"{url} is no object store: expected file:///absolute/path, with three slashes"
        )
    if mistakes:
        raise InvalidInput(mistakes)
    return DirectoryStore(unquote(parts.path))


if TYPE_CHECKING:
    from smlt_tune.runtime.stores.base import ObjectStore

    _: ObjectStore = DirectoryStore("")
