"""The run store: a run is a directory named by its configuration's hash, finished when its result.json is there."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._files import read_json, write_json
from ..errors import InputError


@dataclass(frozen=True)
class RunDirectory:
    """One run: `config` (everything that determines its numbers), `id` its hash, `path` where its files are."""

    config: Mapping[str, Any]
    id: str
    path: Path

    @property
    def done(self) -> bool:
        """Whether the run is finished: its result was written whole, which is the last thing a run does."""
        return (self.path / "result.json").exists()

    def begin(self) -> None:
        """Make the directory and write config.json; InputError if the directory holds a run of another config.

        What killed writers left is deleted: the caller holds the store's lock, so nobody is writing here.
        """
        for temporary in self.path.glob(".*.tmp"):
            temporary.unlink(missing_ok=True)
        file = self.path / "config.json"
        if file.exists():
            if read_json(file) != _plain(self.config):
                raise InputError(f"{file} is not the configuration of run {self.id}: the directory was changed by hand")
            return
        write_json(file, self.config)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write result.json, atomically: from here on the run is done."""
        write_json(self.path / "result.json", {"id": self.id, "config": self.config, **result})

    def result(self) -> dict[str, Any]:
        """What `finish` wrote; InputError names a damaged file."""
        file = self.path / "result.json"
        result = read_json(file)
        if not isinstance(result, dict) or result.get("id") != self.id or result.get("config") != _plain(self.config):
            raise InputError(f"{file} does not belong to run {self.id}; delete it to measure the run again")
        return result


class RunStore:
    """The runs of one study under `root`/runs, and the lock that keeps two processes from working on them at once."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def run(self, name: str, config: Mapping[str, Any]) -> RunDirectory:
        """The directory of the run with this configuration: root/runs/<name>-<id>."""
        canonical = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
        id = hashlib.sha256(canonical.encode()).hexdigest()[:12]
        return RunDirectory(config, id, self.root / "runs" / f"{name}-{id}")

    def results(self) -> list[tuple[Path, dict[str, Any]]]:
        """Directory and result of every finished run, by name; InputError names a damaged one."""
        found = []
        for file in sorted(self.root.glob("runs/*/result.json")):
            config = read_json(file.parent / "config.json")
            run = self.run(file.parent.name.rsplit("-", 1)[0], config)
            if run.path != file.parent:
                raise InputError(f"{file.parent} is not named after its config.json: it was changed by hand; delete it")
            found.append((run.path, run.result()))
        return found

    @contextlib.contextmanager
    def lock(self) -> Iterator[int]:
        """Hold the store; the file descriptor that holds it, for processes to inherit.

        InputError if another process does, or if the directory cannot be made or written.
        """
        file = self.root / ".lock"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            handle = file.open("w")
        except OSError as error:
            raise InputError(f"out: cannot write to {self.root}: {error.strerror or error}") from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the system however this process ends
            except OSError as error:
                raise InputError(f"out: another process is working in {self.root}; wait for it to end") from error
            yield handle.fileno()


def _plain(config: Mapping[str, Any]) -> Any:
    """The configuration as JSON reads it back."""
    return json.loads(json.dumps(config))
