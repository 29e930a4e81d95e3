"""Files as streams of bytes: local or by URL, decompressed on the way; every failure is a DataError naming the file."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.metadata
import io
import os
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any

from infctx.errors import DataError, machine_fault

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK_BYTES = 2**20
BYTE_ORDER_MARK = "\ufeff"
COMPRESSED_ENDINGS = (".gz", ".zst")

_ZSTD_INPUT_BYTES = 2**14
# As large as `zstd --long=31` makes it; the default of the library refuses such files.
_ZSTD_WINDOW_BYTES = 2**31


def is_url(path: str) -> bool:
    """Whether a path is read through fsspec."""
    return "://" in path


def is_compressed(path: str) -> bool:
    """Whether `open_bytes` decompresses this file."""
    return path.lower().endswith(COMPRESSED_ENDINGS)


def require_package(package: str, *, path: str) -> None:
    """Raise DataError where an optional package is not installed.

    Asked of the metadata and not of the import system, for which any folder named like the package would do.
    """
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            f"{path}: expected the package {package} to read it, and it is not installed. "
            "Run: pip install 'infctx[data]'"
        ) from None


def cannot_open(path: str, error: Exception) -> DataError:
    """The error of a file that cannot be opened."""
    reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return DataError(f"{path}: expected a readable file, got: {reason}. Check the path and its permissions.")


def damaged(path: str, error: object) -> DataError:
    """The error of a file that cannot be read to its end."""
    return DataError(f"{path}: expected a whole file, got: {error}. It is damaged or cut short; get it again.")


def not_utf8(error: UnicodeDecodeError, whole: str) -> str:
    """Say which byte is not UTF-8. whole: what the offset counts in."""
    return f"not valid UTF-8: byte 0x{error.object[error.start]:02X} at byte offset {error.start} of the {whole}"


@contextlib.contextmanager
def unchanged(path: str) -> Iterator[None]:
    """Raise DataError where a local file is another one, or gone, after the block than before it."""
    before = _stamp(path)
    yield
    if _stamp(path) != before:
        raise DataError(f"{path}: the file changed while it was read. Start again when nothing writes to it.")


def _stamp(path: str) -> tuple[int, ...]:
    if is_url(path):
        return ()
    try:
        facts = os.stat(path)
    except OSError as error:
        raise cannot_open(path, error) from error
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


@contextlib.contextmanager
def open_bytes(path: str, *, decompress: bool = True) -> Iterator[io.BufferedReader[Any]]:
    """Open a file or URL for reading in a `with`.

    Args: decompress: read the contents of `.gz` and `.zst` files instead of their bytes.
    Raises: DataError where it cannot be opened, and from any read that fails; at the end of the block, where a local
        file has changed meanwhile.
    """
    with unchanged(path):
        if decompress and path.lower().endswith(".zst"):
            require_package("zstandard", path=path)
        stream, store = _open_stored(path)
        if decompress and path.lower().endswith(".gz"):
            stream = _GzipStream(stream)
        elif decompress and path.lower().endswith(".zst"):
            stream = _ZstdStream(stream)
        with io.BufferedReader(_Guarded(stream, path, store), BLOCK_BYTES) as file:
            yield file


def stored_bytes(path: str) -> int | None:
    """The size of a file, or of all files in a folder, as stored; None where a URL does not tell."""
    try:
        if is_url(path):
            import fsspec.core

            store, inner = fsspec.core.url_to_fs(path)
            size: int | None = store.size(inner)
            return size
        if os.path.isdir(path):
            return sum(
                os.lstat(os.path.join(parent, name)).st_size for parent, _, found in os.walk(path) for name in found
            )
        return os.stat(path).st_size
    # Stores fail with errors of the packages that they are reached through.
    except Exception as error:
        if machine_fault(error):
            raise
        raise cannot_open(path, error) from error


def hash_file(path: str) -> tuple[str, int]:
    """Give the SHA-256 of a file as it is stored, in hex, and the number of its bytes."""
    digest, num_bytes = hashlib.sha256(), 0
    with open_bytes(path, decompress=False) as file:
        while block := file.read1(BLOCK_BYTES):
            digest.update(block)
            num_bytes += len(block)
    return digest.hexdigest(), num_bytes


def _open_stored(path: str) -> tuple[Any, object]:
    """The stream of a file, and what has to live as long: an archive closes itself when nobody holds it."""
    try:
        if is_url(path):
            import fsspec

            named = fsspec.open(path, "rb")
            return named.open(), named
        return open(path, "rb", buffering=0), None
    # Stores fail with errors of the packages that they are reached through.
    except Exception as error:
        if machine_fault(error):
            raise
        raise cannot_open(path, error) from error


class _Guarded(io.RawIOBase):
    """Any stream, whose failures are DataErrors."""

    def __init__(self, stream: Any, path: str, store: object) -> None:
        self._stream, self._path, self._store = stream, path, store

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._stream.seekable())

    def readinto(self, buffer: WriteableBuffer) -> int:
        num_bytes: int = self._try(self._stream.readinto, buffer)
        return num_bytes

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position: int = self._try(self._stream.seek, offset, whence)
        return position

    def tell(self) -> int:
        position: int = self._try(self._stream.tell)
        return position

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()

    def _try(self, method: Callable[..., Any], *arguments: object) -> Any:
        try:
            return method(*arguments)
        # zlib, zstandard and every store have errors of their own.
        except Exception as error:
            if machine_fault(error):
                raise
            raise damaged(self._path, error) from error


class _GzipStream(gzip.GzipFile):
    """Decompresses, and closes what it reads from."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(fileobj=stream, mode="rb")
        self._stored = stream

    def close(self) -> None:
        super().close()
        self._stored.close()


class _ZstdStream(io.RawIOBase):
    """Decompresses frame by frame: the reader of the package takes a file that is cut short for a whole one."""

    def __init__(self, stream: IO[bytes]) -> None:
        import zstandard

        self._stored = stream
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer).cast("B")
        while not self._output:
            if not self._decompress_more():
                return 0
        num_bytes = min(len(target), len(self._output))
        target[:num_bytes] = self._output[:num_bytes]
        self._output = self._output[num_bytes:]
        return num_bytes

    def close(self) -> None:
        self._stored.close()
        super().close()

    def _decompress_more(self) -> bool:
        """Decompress one more block; False at the end of the file."""
        block = self._input or self._stored.read(_ZSTD_INPUT_BYTES)
        if not block:
            if self._frame is not None:
                raise EOFError("the end of the file within a zstd frame")
            return False
        if self._frame is None:
            self._frame = self._decompressor.decompressobj()
        self._output = memoryview(self._frame.decompress(block))
        self._input = b""
        if self._frame.eof:
            self._input = self._frame.unused_data
            self._frame = None
        return True
