"""Atomic file writing: a reader sees the old file or the whole new one, never a part, whatever kills the writer."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import InputError


def write_with(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary)`, fsync the temporary file and rename it to `path`.

    Raises InputError when the disk is full or the directory cannot be written; `path` is then as it was.
    """
    file = Replacement(Path(path))
    try:
        with file.errors():
            write(file.temporary)
        file.commit()
    finally:
        file.discard()


class Replacement:
    """A file that is written piece by piece under a name of its own, `temporary`, until `commit` renames it to `path`.

    Whoever makes one calls `discard` in the end, which after `commit` does nothing.
    """

    def __init__(self, path: Path):
        self.path = path
        # A name of its own for every writer: other threads, and other machines on a shared disk, may write `path` too.
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        with self.errors():
            path.parent.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Within, an error of the operating system is an InputError that names the file."""
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {reason(error)}") from error

    def commit(self) -> None:
        with self.errors():
            _fsync(self.temporary)
            os.replace(self.temporary, self.path)
            _fsync(self.path.parent)

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self.temporary.unlink(missing_ok=True)


def reason(error: OSError) -> str:
    """What went wrong, in the system's words alone; libraries put their own beside them."""
    return os.strerror(error.errno) if error.errno else str(error)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_with(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as strict JSON (no NaN: a missing number is null), keys in the order given."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; a missing or damaged file is an InputError that names it."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(
            f"{path} is not valid JSON ({error}): it is damaged or not ours; delete it to start over"
        ) from error
