"""The cache of compiled kernels: what it keeps, what it distrusts, and what it does where it cannot write."""

import hashlib
import multiprocessing
import os
import stat
import warnings
from pathlib import Path

import pytest

from fastsd_kernels import cubin_cache

KEY = hashlib.sha256(b"a kernel").hexdigest()
OTHER_KEY = hashlib.sha256(b"another kernel").hexdigest()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache folder that does not exist yet."""
    monkeypatch.setenv("FASTSD_CACHE_DIR", str(tmp_path / "cache"))
    cubin_cache._warn_once.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def entry(folder):
    """The file of an entry that holds ``b"code"``."""
    assert cubin_cache.load_or_build(KEY, lambda: b"code") == b"code"
    (file,) = folder.iterdir()
    return file


def must_not_build():
    raise AssertionError("built although the entry is intact")


def assert_rebuilds(key=KEY):
    """The entry is not served, and is intact afterwards."""
    assert cubin_cache.load_or_build(key, lambda: b"new code") == b"new code"
    assert cubin_cache.load_or_build(key, must_not_build) == b"new code"


def assert_not_cached(says):
    """Every call builds, and one warning over all calls says why."""
    contents = [b"first", b"second"]
    with pytest.warns(RuntimeWarning) as caught:
        served = [cubin_cache.load_or_build(KEY, lambda content=content: content) for content in contents]
    assert served == contents
    (warning,) = caught
    for words in (*says, "FASTSD_CACHE_DIR"):
        assert words in str(warning.message)


def test_entry_is_kept(entry):
    assert cubin_cache.load_or_build(KEY, must_not_build) == b"code"


def test_keys_are_apart(entry):
    assert cubin_cache.load_or_build(OTHER_KEY, lambda: b"other code") == b"other code"
    assert cubin_cache.load_or_build(KEY, must_not_build) == b"code"


def test_only_the_user_has_access(entry):
    assert stat.S_IMODE(entry.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600


def test_build_error_leaves_no_entry(folder):
    with pytest.raises(ZeroDivisionError):
        cubin_cache.load_or_build(KEY, lambda: 1 // 0)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry[:-1],
        lambda entry: entry[:7],
        lambda entry: b"",
        lambda entry: entry + b"x",
        lambda entry: entry[:-1] + bytes([entry[-1] ^ 1]),
        lambda entry: bytes([entry[0] ^ 1]) + entry[1:],
    ],
    ids=["truncated", "shorter than a digest", "empty", "extended", "flipped content bit", "flipped digest bit"],
)
def test_damaged_entry_is_rebuilt(entry, damage):
    entry.write_bytes(damage(entry.read_bytes()))
    assert_rebuilds()


def test_renamed_entry_is_rebuilt(entry):
    entry.rename(entry.with_name(f"{OTHER_KEY}.cubin"))
    assert_rebuilds(OTHER_KEY)


def test_entry_that_others_may_write_is_rebuilt(entry):
    entry.chmod(0o622)
    assert_rebuilds()


def test_entry_that_is_a_link_is_replaced(entry, tmp_path):
    target = entry.rename(tmp_path / "target")
    before = target.read_bytes()
    entry.symlink_to(target)
    assert_rebuilds()
    assert not entry.is_symlink()
    assert target.read_bytes() == before


def test_entry_that_is_a_pipe_is_replaced(entry):
    entry.unlink()
    os.mkfifo(entry)
    assert_rebuilds()


def test_entry_that_cannot_be_replaced(entry):
    entry.unlink()
    (entry / "something").mkdir(parents=True)
    assert_not_cached(says=["cannot be written"])
    assert [file.name for file in entry.parent.iterdir()] == [entry.name]


def test_folder_that_others_may_write_is_refused(entry):
    for mode in (0o770, 0o702, 0o777):
        entry.parent.chmod(mode)
        cubin_cache._warn_once.cache_clear()
        assert_not_cached(says=[str(entry.parent), f"{mode:o}", "chmod 700"])
    entry.parent.chmod(0o755)
    assert cubin_cache.load_or_build(KEY, must_not_build) == b"code"


def test_folder_of_another_user_is_refused(entry, monkeypatch):
    owner = entry.parent.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert_not_cached(says=[f"belongs to user {owner}", f"({owner + 1})"])


def test_folder_that_is_a_link_is_refused(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    assert_not_cached(says=["symbolic link", str(folder)])
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTSD_CACHE_DIR", str(tmp_path / "file" / "cache"))
    cubin_cache._warn_once.cache_clear()
    assert_not_cached(says=["Not a directory"])


def test_folder_that_cannot_be_written(entry, monkeypatch):
    # what a read-only file system does, also to root
    def read_only_open(path, flags, *args, **kwargs):
        if flags & os.O_CREAT:
            raise OSError(30, "Read-only file system")
        return real_open(path, flags, *args, **kwargs)

    real_open = os.open
    monkeypatch.setattr(os, "open", read_only_open)
    assert cubin_cache.load_or_build(KEY, must_not_build) == b"code"
    entry.unlink()
    assert_not_cached(says=["cannot be written", "Read-only"])


def test_folder_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("FASTSD_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cubin_cache.folder_path() == Path("/home/someone/.cache/fastsd")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cubin_cache.folder_path() == Path("/home/someone/.cache/fastsd")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert cubin_cache.folder_path() == Path("/var/cache/fastsd")
    monkeypatch.setenv("FASTSD_CACHE_DIR", "/elsewhere")
    assert cubin_cache.folder_path() == Path("/elsewhere")


def _hammer(folder, writer, start):
    """Rewrite and read one entry over and over; exits with an error where a read shows a torn entry."""
    os.environ["FASTSD_CACHE_DIR"] = str(folder)
    warnings.simplefilter("error")
    mine = bytes([writer]) * 100_000
    start.wait()
    for _ in range(200):
        with cubin_cache._trusted_folder() as descriptor:
            cubin_cache._write(descriptor, KEY, mine)
            read = cubin_cache._read(descriptor, KEY)
        assert read is not None, "torn entry"
        assert len(read) == len(mine)
        assert len(set(read)) == 1


def test_several_processes_write_one_entry(folder):
    context = multiprocessing.get_context("fork")
    start = context.Event()
    processes = [context.Process(target=_hammer, args=(folder, writer, start)) for writer in range(4)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert [file.name for file in folder.iterdir()] == [f"{KEY}.cubin"]
