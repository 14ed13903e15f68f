"""Compiled kernels on disk, shared by all processes of one user.

An entry is code that will run with the user's rights, so the folder must be the user's own and closed to other
writers. It is ``$FASTSD_CACHE_DIR``, else ``$XDG_CACHE_HOME/fastsd``, else ``~/.cache/fastsd``, and may be deleted at
any time. A folder that cannot be trusted or opened is not used, kernels are compiled in each process instead, and one
warning says why.
"""

import functools
import hashlib
import os
import secrets
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ENVIRONMENT_VARIABLE = "FASTSD_CACHE_DIR"

_DIGEST_BYTES = hashlib.sha256().digest_size
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def load_or_build(key: str, build: Callable[[], bytes]) -> bytes:
    """The cached content of ``key``, else what ``build()`` returns, which is then cached.

    Args:
        key: a hexadecimal hash of everything that the content depends on.
    """
    with _trusted_folder() as folder:
        content = None if folder is None else _read(folder, key)
        if content is None:
            content = build()
            if folder is not None:
                _write(folder, key, content)
        return content


def folder_path() -> Path:
    """Where the cache is, or would be.

    Raises:
        RuntimeError: the home folder is needed and cannot be determined.
    """
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    if chosen:
        return Path(chosen)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # the XDG specification has relative paths ignored
    return (base if base.is_absolute() else Path.home() / ".cache") / "fastsd"


@contextmanager
def _trusted_folder() -> Iterator[int | None]:
    """A descriptor of the cache folder, made if missing; ``None``, after a warning, where it cannot be used.

    All access goes through the descriptor, so that nobody can exchange the folder after it was checked.
    """
    try:
        path = folder_path()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (OSError, RuntimeError) as error:
        _warn_once(f"expected a folder that is not a symbolic link: {error}")
        yield None
        return
    try:
        status = os.fstat(folder)
        if status.st_uid != os.geteuid():
            _warn_once(f"{path} belongs to user {status.st_uid}, not to you ({os.geteuid()})")
            yield None
        elif status.st_mode & _WRITABLE_BY_OTHERS:
            _warn_once(f"others may write to {path} (mode {stat.S_IMODE(status.st_mode):o}); run `chmod 700 {path}`")
            yield None
        else:
            yield folder
    finally:
        os.close(folder)


def _read(folder: int, key: str) -> bytes | None:
    """The content of an intact entry that is the user's own, else ``None``."""
    try:
        # O_NONBLOCK: opening a named pipe would wait for its writer
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(_entry(key), flags, dir_fd=folder)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or status.st_mode & _WRITABLE_BY_OTHERS:
            return None
        with open(descriptor, "rb", closefd=False) as file:
            digest, content = file.read(_DIGEST_BYTES), file.read()
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return content if digest == _digest(key, content) else None


def _write(folder: int, key: str, content: bytes) -> None:
    """Put an entry in place in one step: a reader sees the old entry or the new one, never a part."""
    temporary = f".{key}.{secrets.token_hex(8)}"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(temporary, flags, 0o600, dir_fd=folder), "wb") as file:
            file.write(_digest(key, content) + content)
        os.replace(temporary, _entry(key), src_dir_fd=folder, dst_dir_fd=folder)
    except OSError as error:
        _warn_once(f"{folder_path()} cannot be written: {error.strerror}")
    finally:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=folder)


def _entry(key: str) -> str:
    return f"{key}.cubin"


def _digest(key: str, content: bytes) -> bytes:
    # the key is part of it: an entry renamed to another key does not pass either
    return hashlib.sha256(key.encode() + content).digest()


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"fastsd compiles its kernels anew in every process, because its cache cannot be used: {reason}; "
        f"set {ENVIRONMENT_VARIABLE} to a folder of your own",
        RuntimeWarning,
        stacklevel=2,
    )
