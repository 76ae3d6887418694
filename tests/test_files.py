"""Atomic files: whatever stops a writer, the old file is whole, no temporary stays, and the message names the file."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading

import pytest

from vaecirc_fast import _files
from vaecirc_fast.errors import InputError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def path(tmp_path):
    """A file that is there already."""
    path = tmp_path / "a.json"
    _files.write_json(path, {"old": 1})
    return path


def unchanged(path):
    return _files.read_json(path) == {"old": 1} and names(path.parent) == [path.name]


@pytest.mark.parametrize("value", [None, True, 0, -1.5, "", "é\n\x00", [], {"b": 1, "a": [None, {}]}, 2**70, 1e-300])
def test_what_is_written_is_read(tmp_path, value):
    path = tmp_path / "deeper" / "still" / "a.json"
    _files.write_json(path, value)
    assert _files.read_json(path) == value
    assert names(path.parent) == ["a.json"]


def test_a_file_is_replaced_as_a_whole(path):
    _files.write_json(path, {"new": 2})
    assert path.read_text() == '{\n "new": 2\n}\n'
    _files.write_text(path, "short ü")
    assert path.read_bytes() == "short ü".encode()
    assert names(path.parent) == [path.name]


@pytest.mark.parametrize(
    "error", [RuntimeError("no"), KeyboardInterrupt(), OSError(errno.EIO, "broken"), MemoryError()]
)
@pytest.mark.parametrize("half", [False, True])
def test_a_writer_that_fails_leaves_the_old_file(path, error, half):
    def write(temporary):
        if half:
            temporary.write_text('{"half"')
        raise error

    expected = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        _files.write_with(path, write)
    assert unchanged(path)


def test_a_first_file_that_fails_leaves_nothing(tmp_path):
    def write(temporary):
        temporary.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        _files.write_with(tmp_path / "a", write)
    assert names(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": {1, 2}}])
def test_what_json_cannot_hold_is_refused_before_writing(path, value):
    with pytest.raises((ValueError, TypeError)):
        _files.write_json(path, value)
    assert unchanged(path)


def test_a_full_disk_is_one_clear_line(path):
    """A real failing write: the system refuses what goes beyond a limit, in the middle of the file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(InputError) as caught:
            _files.write_text(path, "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value) == f"cannot write {path}: {os.strerror(errno.EFBIG)}"
    assert unchanged(path)


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_a_disk_that_fills_while_the_file_is_finished_is_the_same(path, monkeypatch, stage):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, stage, full)
    with pytest.raises(InputError, match=f"^cannot write .*a.json: {os.strerror(errno.ENOSPC)}$"):
        _files.write_json(path, {"new": 2})
    monkeypatch.undo()
    assert unchanged(path)


def test_a_place_that_cannot_be_written_is_one_clear_line(path):
    for place in (path / "below.json", path / "deep" / "below.json"):  # a file where a folder is needed
        with pytest.raises(InputError, match=f"^cannot write {place}: "):
            _files.write_json(place, 1)
    (path.parent / "folder").mkdir()
    with pytest.raises(InputError, match="^cannot write .*folder: "):
        _files.write_json(path.parent / "folder", 1)
    assert names(path.parent) == ["a.json", "folder"] and names(path.parent / "folder") == []
    long = path.parent / ("n" * 300)
    with pytest.raises(InputError, match="^cannot write .*: File name too long$"):
        _files.write_json(long, 1)


def test_the_bytes_are_on_the_disk_before_the_name_is(path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append((str(a), str(b))) or replace(a, b))
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("this system does not tell which file a descriptor is of")
    _files.write_json(path, {"new": 2})
    synced, renamed, folder = calls
    assert renamed == (synced, str(path)) and folder == str(path.parent)


WRITE = """
import sys
from pathlib import Path
from vaecirc_fast import _files
path = Path(sys.argv[1])
print("under way", flush=True)
for n in range(1_000_000):
    _files.write_json(path, [n % 10] * 200_000)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    """Also while it writes, every read sees a whole file."""
    path = tmp_path / "a.json"
    process = subprocess.Popen([sys.executable, "-c", WRITE, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "under way\n"
        seen = set()
        while len(seen) < 5:
            if path.exists():
                first, *rest = _files.read_json(path)
                assert rest == [first] * 199_999
                seen.add(first)
            assert process.poll() is None
        while not list(tmp_path.glob(".*.tmp")):  # in the middle of a file
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    first, *rest = _files.read_json(path)
    assert rest == [first] * 199_999
    _files.write_json(path, {"new": 2})
    assert _files.read_json(path) == {"new": 2}


def test_writers_of_one_file_do_not_mix(tmp_path):
    """Threads that write the same file at once: one of them wins, with all of its file."""
    path, ready, errors = tmp_path / "a", threading.Barrier(4), []

    def write(letter):
        def slowly(temporary):
            with open(temporary, "w") as file:
                file.write(letter * 10)
                ready.wait(timeout=30)
                file.write(letter * 10)

        try:
            _files.write_with(path, slowly)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert path.read_text() in [letter * 20 for letter in "abcd"]
    assert names(tmp_path) == ["a"]


BAD = {
    "missing": (None, r"^cannot read .*a: No such file or directory$"),
    "empty": (b"", r"^.*a is not valid JSON \(.*\): it is damaged or not ours; delete it to start over$"),
    "cut short": (b'{"a": [1, 2', r"is not valid JSON"),
    "followed by more": (b"{}{}", r"is not valid JSON"),
    "no text": (b"\xff\xfe\x00", r"is not valid JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    content, message = BAD[name]
    if content is not None:
        (tmp_path / "a").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        _files.read_json(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(InputError, match=r"^cannot read .*: Is a directory$"):
        _files.read_json(tmp_path)
