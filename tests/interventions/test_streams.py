"""Patch sweeps over a stream of batches: equal to one sweep, resumed after a kill to the bit, other states refused."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vaecirc_fast as vf
from vaecirc_fast import groups as partitions
from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions import patch_sweep, patch_sweep_over
from vaecirc_fast.interventions.streams import STATE

SITES = ["0", "2", "4"]


def net(dtype=torch.float64, activation=nn.ReLU):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), activation(), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(32, 4)
    ).to(dtype)


def images(n, seed=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 6, 6, generator=g, dtype=dtype), torch.rand(n, 1, 6, 6, generator=g, dtype=dtype)


def batches(n=21, size=6, **options):
    return DataLoader(TensorDataset(*images(n, **options)), batch_size=size)


def same(a, b):
    assert torch.equal(a.tensor, b.tensor) and torch.equal(a.replicates, b.replicates)
    assert (a.recovery is None) == (b.recovery is None) and a.samples == b.samples and a.coords == b.coords
    assert a.recovery is None or torch.equal(a.recovery, b.recovery)


@pytest.mark.parametrize("n", [21, 12, 5, 1])
def test_a_stream_is_one_sweep(n):
    """Few samples too, whose interval is a jackknife's."""
    options = {"sites": SITES, "effect": "l1", "groups": partitions.from_labels([0, 0, 1, 2]), "recovery": True}
    whole = patch_sweep(net(), *images(n), **options, seed=3)
    stream = vf.wrap(net()).patch_sweep_over(batches(n), **options, seed=3)
    assert stream.coords == whole.coords and stream.samples == n and stream.effect == "l1"
    assert torch.allclose(stream.tensor, whole.tensor, rtol=1e-6)
    assert torch.allclose(stream.recovery, whole.recovery, rtol=1e-12)
    assert torch.allclose(stream.replicates, whole.replicates, rtol=1e-12)
    assert f"{n} samples in {-(-n // 6)} batches" in stream.plan


@pytest.mark.parametrize("ablation", ["zero", "mean", "noise"])
def test_ablations_need_no_source(ablation):
    x, other = images(13)
    stream = patch_sweep_over(
        net(), DataLoader(TensorDataset(x), batch_size=5), SITES, ablation=ablation, reference=other
    )
    parts = [(x, 0)] if ablation != "noise" else [(x[n : n + 5], n) for n in (0, 5, 10)]  # draws are of each batch
    options = {"ablation": ablation, "reference": other, "sites": SITES}
    expected = sum(len(part) * patch_sweep(net(), part, seed=seed, **options).tensor for part, seed in parts) / 13
    assert torch.allclose(stream.tensor, expected, rtol=1e-6) and stream.ablation == ablation


def test_only_new_batches_are_counted(tmp_path):
    """A run that stopped goes on; a longer stream adds to a shorter one; nothing is computed twice."""
    uninterrupted = patch_sweep_over(net(), batches(), SITES, recovery=True)
    part = patch_sweep_over(net(), list(batches())[:2], SITES, recovery=True, out=tmp_path, save_every=0)
    assert part.samples == 12
    calls = []
    resumed = patch_sweep_over(
        net(), batches(), SITES, recovery=True, out=tmp_path, progress=lambda b, n: calls.append((b, n))
    )
    same(resumed, uninterrupted)
    assert calls == [(3, 18), (4, 21)] and "2 of which an earlier run had counted" in resumed.plan
    again = patch_sweep_over(net(), batches(), SITES, recovery=True, out=tmp_path, progress=calls.append)
    same(again, uninterrupted)
    assert len(calls) == 2 and sorted(p.name for p in tmp_path.iterdir()) == [STATE]


def test_what_stops_a_run_leaves_the_batches_before_it(tmp_path):
    good = list(batches())
    broken = [*good[:3], (good[3][0] * torch.nan, good[3][1])]
    with pytest.raises(InputError, match="contains NaN"):
        patch_sweep_over(net(), broken, SITES, out=tmp_path, save_every=1e9)

    def interrupted():
        yield from good[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        patch_sweep_over(net(), interrupted(), SITES, out=tmp_path / "other", save_every=1e9)
    for out in (tmp_path, tmp_path / "other"):
        resumed = patch_sweep_over(net(), good, SITES, out=out)
        assert "3 of which" in resumed.plan
        same(resumed, patch_sweep_over(net(), good, SITES))


CHILD = """
import sys, time
sys.path.insert(0, {folder!r})
from test_streams import SITES, batches, net
from vaecirc_fast.interventions import patch_sweep_over

def slowly():
    for n, batch in enumerate(batches()):
        if n == 2:
            print("two", flush=True)
            time.sleep(60)
        yield batch

patch_sweep_over(net(), slowly(), SITES, recovery=True, out={out!r}, save_every=0)
"""


def test_a_run_that_is_killed_goes_on_to_the_bit(tmp_path):
    code = CHILD.format(folder=str(Path(__file__).parent), out=str(tmp_path))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout is not None and child.stdout.readline() == "two\n"
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    resumed = patch_sweep_over(net(), batches(), SITES, recovery=True, out=tmp_path)
    assert "2 of which an earlier run had counted" in resumed.plan
    same(resumed, patch_sweep_over(net(), batches(), SITES, recovery=True))


# --- what does not go on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"sites": ["0", "2"]}, r'its sites is \["0", "2", "4"\], this one\'s \["0", "2"\]'),
        ({"effect": "l1"}, 'its effect is "mse", this one\'s "l1"'),
        ({"seed": 1}, "its seed is 0, this one's 1"),
        ({"replicates": 10}, "its replicates is 200"),
        ({"unit": "element"}, "its unit is"),
        ({"groups": partitions.from_labels([0, 0, 1, 1])}, "its groups is null"),
        ({"recovery": True}, "its recovery is false"),
        ({"readout": lambda y: 2 * y}, "its readout is null"),
        ({"module": "weights"}, "its module is"),
        ({"module": "activation"}, "its module is"),
    ],
)
def test_states_of_another_sweep(tmp_path, options, what):
    patch_sweep_over(net(), batches(), SITES, out=tmp_path)
    options = {"module": net(), "sites": SITES, **options}
    if options["module"] == "weights":
        options["module"] = net()
        with torch.no_grad():
            options["module"][4].bias[2] += 1e-9
    elif options["module"] == "activation":
        options["module"] = net(activation=nn.Tanh)
    with pytest.raises(InputError, match=what):
        patch_sweep_over(options.pop("module"), batches(), out=tmp_path, **options)


def test_other_data(tmp_path):
    patch_sweep_over(net(), list(batches())[:3], SITES, out=tmp_path)
    for other in (batches(seed=9), list(batches())[::-1], batches(size=7)):
        with pytest.raises(InputError, match="first 3 batches are not those"):
            patch_sweep_over(net(), other, SITES, out=tmp_path)
    with pytest.raises(InputError, match=r"gave 2 batches, but .* has counted 3"):
        patch_sweep_over(net(), list(batches())[:2], SITES, out=tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_damaged_states(tmp_path, damage):
    patch_sweep_over(net(), batches(), SITES, out=tmp_path)
    content = bytearray((tmp_path / STATE).read_bytes())
    if damage == "flipped":
        content[-40] ^= 4
    (tmp_path / STATE).write_bytes({"cut": content[:-9], "flipped": content, "foreign": b"no state"}[damage])
    with pytest.raises(InputError, match="delete it to start over"):
        patch_sweep_over(net(), batches(), SITES, out=tmp_path)


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([], {}, "at least one batch, got none"),
        (torch.rand(3, 1, 6, 6), {}, "pairs: expected an iterable of"),
        ([torch.rand(3, 1, 6, 6)], {}, "expected .x_base, x_source., got Tensor in batch 0"),
        ([(*images(2), 1)], {}, "got 3 things in batch 0"),
        ([(images(3)[0], images(2)[0])], {}, "x_source: has 2 rows, x_base 3"),
        ([images(2), tuple(x[..., 1:] for x in images(2))], {}, "rows of batch 1 are"),
        (batches(), {"replicates": -1}, "replicates: expected a whole number"),
        (batches(), {"effect": "far"}, "effect: 'far' is unknown"),
        (batches(), {"recovery": True, "ablation": "zero"}, "recovery: is of ablation='resample'"),
    ],
)
def test_bad_input(pairs, options, message):
    with pytest.raises(InputError, match=message):
        patch_sweep_over(net(), pairs, SITES, **options)


def test_progress_goes_to_stderr(monkeypatch, capsys):
    clock = iter(range(0, 10000, 20))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    patch_sweep_over(net(), batches(), SITES, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines and lines[-1].startswith("patch sweep:") and "of 4 batches" in lines[-1]


@pytest.mark.deep
def test_memory_does_not_grow_with_the_stream():
    """Of what is alive after a batch, from a stream made on the way."""
    peaks = []
    for n in (4, 40):
        live = []

        def watch(_batches, _samples, live=live):
            live.append(sum(t.nbytes for t in gc.get_objects() if type(t) is torch.Tensor))

        patch_sweep_over(net(), (images(8, seed=k) for k in range(n)), SITES, progress=watch)
        peaks.append(max(live))
    assert peaks[1] <= peaks[0]
