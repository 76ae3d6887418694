"""Effects of every sample in a long table on disk, Parquet or Arrow: written as they come, in constant memory."""

from __future__ import annotations

import contextlib
import functools
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._files import Replacement, reason
from ..errors import InputError, MissingExtra

if TYPE_CHECKING:
    from .accumulate import Axes

SUFFIXES = (".parquet", ".arrow")
_KEY = b"vaecirc_fast"  # entry of the schema's metadata that says what the table is
_PLAN = b"plan"
_ROWS = 1 << 18  # of a row group, or record batch
_FREE = 0.8  # share of the free memory that a table may take when read


def check_out(out: Any) -> Path:
    """Where effects shall be written; InputError for another kind of file, MissingExtra without pyarrow."""
    if not isinstance(out, str | Path) or Path(out).suffix not in SUFFIXES:
        raise InputError(f"out: expected the name of a file that ends in {' or '.join(SUFFIXES)}, got {out!r}")
    _pyarrow()
    return Path(out)


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("effects on disk need pyarrow: pip install 'vaecirc-fast[arrow]'") from error
    return pyarrow


class TableWriter:
    """Writes effects (B, U, S, G) of slices of the samples, in order, under a temporary name until `close`.

    Columns: sample (int32), the unit and the step by the names and labels of `axes`, group (dictionary of names),
    effect (the dtype given). The schema's metadata hold `facts`, JSON. The plan, which is known in the end only, is in
    the metadata of a Parquet file, and of the last batch, an empty one, of an Arrow file.
    """

    def __init__(self, path: Path, axes: Axes, groups: tuple[str, ...], dtype: torch.dtype, facts: dict[str, Any]):
        pa = _pyarrow()
        self.path, self._groups = path, pa.array(groups, pa.string())
        self._labels = np.asarray(list(axes.labels), dtype=np.int32)
        self._steps = axes.coordinates.cpu().double().numpy()
        if not axes.coordinates.is_floating_point():
            self._steps = self._steps.astype(np.int32)
        self._shape, self._dtype = (*axes.decoded.shape, len(groups)), dtype
        fields = [
            ("sample", pa.int32()),
            (axes.unit, pa.int32()),
            (axes.step, pa.from_numpy_dtype(self._steps.dtype)),
            ("group", pa.dictionary(pa.int32(), pa.string())),
            ("effect", pa.float64() if dtype == torch.float64 else pa.float32()),
        ]
        self._schema = pa.schema(fields, metadata={_KEY: json.dumps(facts, allow_nan=False)})
        self._pending: list[Tensor] = []
        self._first = self._rows = 0  # sample of the first row that is pending, and how many are
        self._file = Replacement(path)
        with self._file.errors():
            self._sink = pa.OSFile(str(self._file.temporary), "wb")
            # A sweep that raises leaves nothing behind, though nobody closes it.
            self._discard = weakref.finalize(self, self._file.discard)
            if path.suffix == ".parquet":
                repeated = [field[0] for field in fields[:-1]]
                self._writer = pa.parquet.ParquetWriter(
                    self._sink, self._schema, use_dictionary=repeated, write_page_checksum=True
                )
            else:
                self._writer = pa.ipc.new_file(self._sink, self._schema)

    def add(self, samples: slice, effects: Tensor) -> None:
        """effects (B, U, S, G) of these samples, which follow those before. InputError when the disk is full."""
        if self._rows and samples.start != self._first + sum(map(len, self._pending)):
            self._flush(0)
        if not self._rows:
            self._first = samples.start
        self._pending.append(effects)
        self._rows += effects.numel()
        self._flush(_ROWS)

    def _flush(self, least: int) -> None:
        """Write what is pending if it is at least so many rows."""
        if not self._rows or self._rows < least:
            return
        values = torch.cat([part.reshape(-1) for part in self._pending]).cpu().numpy()
        with self._file.errors():
            for start in range(0, len(values), _ROWS):
                self._writer.write_batch(self._batch(start, values[start : start + _ROWS]))
        self._pending, self._rows = [], 0

    def _batch(self, start: int, values: np.ndarray) -> Any:
        """The record batch of these effects, the first of which is the start-th that is pending."""
        pa = _pyarrow()
        numbers = np.arange(start, start + len(values))
        of_sample = int(np.prod(self._shape))
        unit, step, group = np.unravel_index(numbers % of_sample, self._shape)
        columns = [
            pa.array((self._first + numbers // of_sample).astype(np.int32)),
            pa.array(self._labels[unit]),
            pa.array(self._steps[step]),
            pa.DictionaryArray.from_arrays(group.astype(np.int32), self._groups),
            pa.array(values),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)

    def close(self, plan: str) -> None:
        """Write the rest and put the file in its place."""
        self._flush(0)
        with self._file.errors():
            if self.path.suffix == ".parquet":
                self._writer.add_key_value_metadata({_PLAN: plan.encode()})
            else:
                empty = self._batch(0, torch.empty(0, dtype=self._dtype).numpy())
                self._writer.write_batch(empty, custom_metadata={_PLAN: plan.encode()})
            self._writer.close()
            self._sink.close()
        self._file.commit()
        self._discard.detach()

    def discard(self) -> None:
        """Leave nothing behind; after `close` this does nothing."""
        if self._discard.alive:
            for part in (self._writer, self._sink):
                with contextlib.suppress(Exception):  # whatever stopped the writing may stop the closing
                    part.close()
            self._discard()


def read_table(path: str | Path) -> tuple[Tensor, dict[str, Any]]:
    """Effects (sample, unit, step, group) and the facts of a file of `TableWriter`.

    InputError for a missing, foreign or damaged file, and for one larger than the memory that is free.
    """
    pa = _pyarrow()
    path = check_out(path)
    try:
        metadata, plan, rows, batches = _opened(pa, path)
        if _KEY not in metadata:
            raise InputError(f"{path} is a table, but not one of effects that a sweep of vaecirc_fast wrote")
        facts = json.loads(metadata[_KEY]) | {"plan": plan}
        shape = [len(facts["coords"][dim]) for dim in facts["dims"]]
        size = int(np.prod(shape))
        dtype = getattr(torch, facts["dtype"])
        bytes_needed, free = rows * dtype.itemsize, _free_bytes()
        if bytes_needed > _FREE * free:
            raise InputError(
                f"{path} holds {bytes_needed / 1e9:.3g} GB of effects, more than the {free / 1e9:.3g} GB of memory "
                "that are free; read it in parts with pyarrow or pandas"
            )
        if not size or rows != size * facts["samples"]:
            raise InputError(f"{path} is damaged: it has {rows} rows, not {facts['samples']} samples of {size}")
        values = torch.empty(rows, dtype=dtype)
        samples = torch.empty(facts["samples"], dtype=torch.int64)
        at = 0
        for batch in batches():
            values[at : at + len(batch)] = torch.from_numpy(np.array(batch["effect"]))
            first = -at % size
            found = torch.from_numpy(np.array(batch["sample"])[first::size]).long()
            samples[(at + first) // size : (at + first) // size + len(found)] = found
            at += len(batch)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"cannot read {path}: {reason(error)}") from error
        raise InputError(f"{path} is cut short, damaged or no table of effects ({error})") from error
    order = samples.argsort()
    if not torch.equal(samples[order], torch.arange(len(samples))):
        raise InputError(f"{path} is damaged: it does not have each of its {len(samples)} samples once")
    tensor = values.view(len(samples), *shape)
    return tensor if torch.equal(order, samples) else tensor[order], facts


def _opened(pa: Any, path: Path) -> tuple[dict[bytes, bytes], str, int, Callable[[], Iterator[Any]]]:
    """Metadata of the schema, the plan, the number of rows, and the two columns that are read, batch by batch."""
    columns = ["sample", "effect"]
    if path.suffix == ".parquet":
        file = pa.parquet.ParquetFile(path, page_checksum_verification=True)
        plan = (file.metadata.metadata or {}).get(_PLAN, b"")
        batches = functools.partial(file.iter_batches, _ROWS, columns=columns)
        return file.schema_arrow.metadata or {}, plan.decode(), file.metadata.num_rows, batches
    file = pa.ipc.open_file(pa.memory_map(str(path)))
    parts = range(file.num_record_batches)
    rows, plan = 0, b""
    for n in parts:
        batch, custom = file.get_batch_with_custom_metadata(n)
        rows, plan = rows + batch.num_rows, (custom or {}).get(_PLAN, b"")
    return file.schema.metadata or {}, plan.decode(), rows, lambda: (file.get_batch(n).select(columns) for n in parts)


def _free_bytes() -> float:
    """Memory that is free, as far as the system says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float("inf")
