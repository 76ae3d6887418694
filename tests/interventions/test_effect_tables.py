"""Effects of every sample on disk: to the bit those in memory, labelled, and there whole or not at all."""

import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import vaecirc_fast as vf
from vaecirc_fast import _files
from vaecirc_fast import groups as partitions
from vaecirc_fast.errors import InputError, MissingExtra
from vaecirc_fast.interventions import Codes, Effects, effect_tables, latent_sweep
from vaecirc_fast.interventions.accumulate import Accumulator, Axes

pa = pytest.importorskip("pyarrow")
GROUPS = partitions.from_labels([0, 1, 1, 2, 2, 2], ["one", "two", "drei é"])
SUFFIXES = ("parquet", "arrow")


def decoder(dtype, linear):
    torch.manual_seed(0)
    hidden = [torch.nn.Linear(4, 2), torch.nn.Tanh(), torch.nn.Linear(2, 6)]
    return torch.nn.Sequential(*hidden, *([] if linear else [torch.nn.Tanh()])).to(dtype)


def sweep(samples=12, dtype=torch.float32, linear=False, **options):
    z = torch.randn(samples, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    return latent_sweep(decoder(dtype, linear), z, **{"groups": GROUPS, **options})


def rows_of(path):
    """The table as pandas has it."""
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_feather(path)


SWEEPS = {
    "fixed": {},
    "float64": {"dtype": torch.float64},
    "zero steps": {"grid": torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0], [1.0, 1.0]])},
    "equal steps": {"grid": torch.tensor([1.0, 1.0, -2.0])},
    "draws": {"grid": "resample", "effect": "rms"},
    "one group": {"groups": None, "effect": "signed"},
    "few samples": {"samples": 3},
    "called": {"engine": "generic"},
    "fused": {"linear": True, "engine": "fused"},
    "gram": {"linear": True, "engine": "gram", "effect": "mse", "grid": torch.tensor([1.0, 0.0, 2.0])},
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", SWEEPS)
def test_a_table_has_to_the_bit_what_memory_has(tmp_path, monkeypatch, name, suffix):
    options = SWEEPS[name]
    monkeypatch.setattr(effect_tables, "_ROWS", 50)  # several batches, none of them whole samples
    path = tmp_path / f"effects.{suffix}"
    kept, streamed = sweep(reduce=None, **options), sweep(**options)
    E = sweep(reduce=None, out=path, **options)
    for field in ("tensor", "replicates", "step_replicates", "group_weights"):
        assert torch.equal(getattr(E, field), getattr(streamed, field))
    assert E.path == str(path) and E.dims == streamed.dims
    back = Effects.from_table(path)
    assert back.tensor.dtype == kept.tensor.dtype and torch.equal(back.tensor, kept.tensor)
    for field in ("dims", "coords", "effect", "grid", "samples"):
        assert getattr(back, field) == getattr(kept, field), field
    assert torch.equal(back.group_weights, kept.group_weights) and back.plan == E.plan
    if kept.step_size is None:
        assert back.step_size is None
    else:
        assert torch.equal(back.step_size, kept.step_size) and back.step_size.dtype == kept.step_size.dtype
    if kept.effect not in ("signed", "mse"):
        assert back.ces().equals(kept.ces())
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("tile", [1, 7, None])
def test_rows_are_labelled(tmp_path, suffix, tile):
    path = tmp_path / f"effects.{suffix}"
    E = sweep(out=str(path), engine="generic", tile=tile)
    kept = sweep(reduce=None, engine="generic", tile=tile)
    table = rows_of(path)
    assert list(table.columns) == ["sample", "latent", "step", "group", "effect"]
    assert [str(t) for t in table.dtypes] == ["int32", "int32", "float64", "category", "float32"]
    expected = kept.to_dataframe()
    assert np.array_equal(table["effect"].to_numpy(), expected["effect"].to_numpy())
    for column in ("sample", "latent", "step"):
        assert np.array_equal(table[column], expected[column])
    assert list(table["group"]) == list(expected["group"]) and set(table["group"].cat.categories) == set(GROUPS.names)
    means = table.groupby(["latent", "step", "group"], observed=True)["effect"].mean()
    assert means.loc[2, 3.0, "two"] == pytest.approx(float(E.tensor[2, -1, 1]), rel=1e-6)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_metadata_say_what_was_measured(tmp_path, suffix):
    path = tmp_path / f"effects.{suffix}"
    E = sweep(out=path, grid="posterior", scale=torch.tensor([1.0, 0.0, 2.0, 0.5]))
    schema = pa.parquet.read_schema(path) if suffix == "parquet" else pa.ipc.open_file(str(path)).schema
    facts = json.loads(schema.metadata[b"vaecirc_fast"])
    assert facts["grid"] == "posterior" and facts["effect"] == "l1" and facts["samples"] == 12
    assert facts["dims"] == ["latent", "step", "group"] and facts["coords"]["group"] == list(GROUPS.names)
    assert facts["step_size"] == E.step_size.tolist() and facts["dtype"] == "float32"
    assert "engine" in Effects.from_table(path).plan


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_codes_have_their_own_columns(tmp_path, suffix):
    circuit = vf.planted.codebooks()[0]
    path, given = tmp_path / f"codes.{suffix}", Codes(circuit.indices, circuit.z_e, circuit.z_q)
    options = dict(groups=circuit.groups, grid="code_neighbour", draws=2)
    vf.code_sweep(circuit.decoder, given, circuit.codebook, out=path, **options)
    table = rows_of(path)
    assert list(table.columns) == ["sample", "position", "draw", "group", "effect"] and set(table["draw"]) == {1, 2}
    assert str(table["draw"].dtype) == "int32" and str(table["effect"].dtype) == "float64"
    kept = vf.code_sweep(circuit.decoder, given, circuit.codebook, reduce=None, **options)
    assert torch.equal(Effects.from_table(path).tensor, kept.tensor) and Effects.from_table(path).dims == kept.dims


def test_samples_may_come_in_any_order(tmp_path):
    """Whoever computes effects elsewhere may add slices as they are done."""
    axes = Axes("own", "latent", "step", [3, 7], torch.tensor([1.0, 2.0, 3.0]), torch.ones(2, 3, dtype=torch.bool))
    effects = torch.arange(10 * 6 * 3.0).view(10, 6, 3)
    for suffix in SUFFIXES:
        options = dict(effect="l1", replicates=5, seed=0, dtype=torch.float32, device=torch.device("cpu"))
        path = tmp_path / f"e.{suffix}"
        accumulator = Accumulator(axes, 10, GROUPS, reduce=None, out=path, **options)
        kept = Accumulator(axes, 10, GROUPS, reduce=None, **options)
        for part in (slice(4, 6), slice(6, 7), slice(0, 4), slice(9, 10), slice(7, 9)):
            accumulator.add(part, effects[part])
            kept.add(part, effects[part])
        assert torch.equal(accumulator.result("p").tensor, effects.mean(0).view(2, 3, 3))
        back = Effects.from_table(path)
        assert torch.equal(back.tensor.view(10, 6, 3), effects) and torch.equal(kept.result("p").tensor, back.tensor)
        assert back.coords["latent"] == [3, 7] and back.plan == "p"


def test_a_sweep_with_a_path_is_saved_and_loaded(tmp_path):
    E = sweep(out=tmp_path / "e.parquet")
    E.save(tmp_path / "e.safetensors")
    assert Effects.load(tmp_path / "e.safetensors").path == E.path


# --- whole or not at all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_sweep_that_raises_leaves_the_old_file(tmp_path, suffix, error):
    path = tmp_path / f"effects.{suffix}"
    sweep(out=path)
    old = path.read_bytes()
    calls = []

    def fails(z):
        calls.append(len(z))
        if len(calls) == 6:
            raise error("in the middle")
        return torch.cat([z, z.cos()[:, :2]], 1)

    with pytest.raises(error, match="in the middle"):
        latent_sweep(fails, torch.randn(20, 4), groups=GROUPS, out=path, tile=50)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path] and len(calls) == 6
    new = tmp_path / f"new.{suffix}"
    with pytest.raises(InputError, match="decoder: its output is NaN"):
        latent_sweep(lambda z: z / (z < 2.5), torch.zeros(20, 4), out=new)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path, suffix):
    """The system refuses to let the file grow, as a full disk does."""
    path = tmp_path / f"effects.{suffix}"
    sweep(out=path)
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(InputError, match=rf"cannot write .*effects\.{suffix}: File too large"):
            sweep(samples=400, out=path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_a_failing_fsync_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "effects.parquet"
    sweep(out=path)
    old = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_files.os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*effects\.parquet: No space left on device"):
        sweep(samples=20, out=path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_a_directory_that_is_not_there_is_made_and_one_that_cannot_be_is_named(tmp_path):
    sweep(out=tmp_path / "new" / "e.arrow")
    assert Effects.from_table(tmp_path / "new" / "e.arrow").samples == 12
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*e\.arrow: "):
        sweep(out=tmp_path / "file" / "e.arrow")


KILLED = """
import sys, time, torch, vaecirc_fast as vf
def slow(z):
    print("decoding", flush=True)
    time.sleep(0.05)
    return z
vf.latent_sweep(slow, torch.randn(4000, 4), out=sys.argv[1], tile=200)
"""


def test_a_killed_sweep_leaves_no_file_under_the_name(tmp_path):
    path = tmp_path / "effects.parquet"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    for _ in range(10):
        assert process.stdout.readline() == b"decoding\n"
    process.kill()
    process.wait(timeout=30)
    process.stdout.close()
    assert not path.exists() and all(name.name.endswith(".tmp") for name in tmp_path.iterdir())
    sweep(out=path)
    assert Effects.from_table(path).samples == 12


# --- bad input and damaged files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["effects.csv", "effects", "effects.parquet.gz", 3, b"e.parquet"])
def test_other_kinds_of_file_are_refused_before_anything_is_decoded(out):
    with pytest.raises(InputError, match=r"out: expected the name of a file that ends in \.parquet or \.arrow, got"):
        latent_sweep(lambda z: pytest.fail("decoded"), torch.zeros(3, 2), out=out)
    with pytest.raises(InputError, match="out: expected the name of a file"):
        Effects.from_table(out)


def test_without_pyarrow_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for call in (lambda: sweep(out=tmp_path / "e.parquet"), lambda: Effects.from_table(tmp_path / "e.parquet")):
        with pytest.raises(MissingExtra, match=r"pip install 'vaecirc-fast\[arrow\]'"):
            call()
    assert sweep().samples == 12  # nothing else needs it


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_files_are_named(tmp_path, suffix):
    path = tmp_path / f"effects.{suffix}"
    sweep(samples=40, out=path)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:-1], content[:20], b"", b"not at all" * 20):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"effects\.{suffix} is cut short, damaged or no table of effects"):
            Effects.from_table(path)
    with pytest.raises(InputError, match="cannot read .*missing.*: No such file"):
        Effects.from_table(tmp_path / f"missing.{suffix}")


def test_flipped_bits_in_parquet_are_found(tmp_path):
    path = tmp_path / "effects.parquet"
    sweep(samples=40, out=path)
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 4  # in the column of effects, the last and by far the largest
    path.write_bytes(flipped)
    with pytest.raises(InputError, match=r"effects\.parquet is cut short, damaged"):
        Effects.from_table(path)


def test_foreign_and_incomplete_tables_are_named(tmp_path):
    pd.DataFrame({"effect": [1.0]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(InputError, match=r"other\.parquet is a table, but not one of effects"):
        Effects.from_table(tmp_path / "other.parquet")
    path = tmp_path / "e.parquet"
    sweep(out=path)
    table = pa.parquet.read_table(path)
    pa.parquet.write_table(table.slice(0, table.num_rows - 5), path)
    with pytest.raises(InputError, match=r"e\.parquet is damaged: it has \d+ rows, not 12 samples of 120"):
        Effects.from_table(path)
    twice = pa.concat_tables([table.slice(0, 120), table.slice(0, table.num_rows - 120)])
    pa.parquet.write_table(twice, path)
    with pytest.raises(InputError, match="it does not have each of its 12 samples once"):
        Effects.from_table(path)


def test_a_table_larger_than_the_memory_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "e.arrow"
    sweep(out=path)
    assert effect_tables._free_bytes() > 1e6
    monkeypatch.setattr(effect_tables, "_free_bytes", lambda: 5_000.0)
    with pytest.raises(InputError, match=r"e\.arrow holds 5.76e-06 GB of effects, more than the 5e-06 GB .*in parts"):
        Effects.from_table(path)


# --- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys, torch, vaecirc_fast as vf
torch.set_num_threads(1)
decoder = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.ReLU(), torch.nn.Linear(16, 32))
options = dict(groups=vf.groups.spans([2] * 16), grid=torch.tensor([-1.0, 1.0]), replicates=10, engine="generic")
vf.latent_sweep(decoder, torch.randn(3000, 3), out=sys.argv[1], **options)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
vf.latent_sweep(decoder, torch.randn(int(sys.argv[2]), 3), out=sys.argv[1], **options)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.deep
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_memory_does_not_grow_with_samples(tmp_path, suffix):
    """200,000 samples are 19 million rows, 77 MB of effects and six times that with their labels."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / f"e.{suffix}"), "200000"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    few, many = (int(line) for line in done.stdout.split())
    assert many - few < 40_000  # kB
    assert len(Effects.from_table(tmp_path / f"e.{suffix}").tensor) == 200_000
