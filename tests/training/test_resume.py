"""A run that was interrupted, killed or extended ends exactly where an undisturbed one does."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training.blobs import Blobs

from vaecirc_fast import models
from vaecirc_fast.errors import InputError
from vaecirc_fast.training import fit
from vaecirc_fast.training.checkpoints import CHECKPOINT, MODEL
from vaecirc_fast.training.loop import step_seed

STEPS = 14


def new_model(seed=0, name="beta_vae", side=16, **options):
    torch.manual_seed(seed)
    return models.build(name, (1, side, side), 4, width=0.25, **options)


def train(model, ds=None, **options):
    defaults = {"steps": STEPS, "batch_size": 8, "checkpoint_every": 4, "log_every": 3, "progress": False}
    return fit(model, ds or Blobs(), **{**defaults, **options})


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_identical(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


class Interrupted(Blobs):
    """Blobs whose `sample` stops the run, in a way of the test's choice, when it is called for the n-th time."""

    def __init__(self, at, action, side=16):
        super().__init__(side)
        self.calls, self.at, self.action = 0, at, action

    def sample(self, n, generator=None):
        self.calls += 1
        if self.calls == self.at:
            self.action()
        return super().sample(n, generator)


def stop():
    raise KeyboardInterrupt


def crash():
    raise OSError("the disk went away")


@pytest.mark.parametrize("options", [{}, {"schedule": "cosine", "warmup": 3}], ids=["constant", "cosine"])
@pytest.mark.parametrize("net", ["conv", "mlp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_interrupted_runs_end_bit_identical(tmp_path, precision, net, options):
    options = {"precision": precision, **options}
    undisturbed = train(new_model(net=net), out=tmp_path / "a", **options)
    # stopped after 2 steps by Ctrl-C, then after 5 more by a crash (so steps 5 to 7 are lost), then after 1, then done
    model = new_model(net=net)
    for at, action, error in ((3, stop, KeyboardInterrupt), (6, crash, OSError), (2, stop, KeyboardInterrupt)):
        with pytest.raises(error):
            train(model, Interrupted(at, action), out=tmp_path / "b", **options)
        model = new_model(seed=9, net=net)  # a new process would not have the old weights
    resumed = train(model, out=tmp_path / "b", **options)
    assert_identical(weights(undisturbed.model), weights(resumed.model))
    assert resumed.history.equals(undisturbed.history)
    assert (tmp_path / "a" / MODEL).read_bytes() == (tmp_path / "b" / MODEL).read_bytes()
    assert (tmp_path / "a" / CHECKPOINT).read_bytes() == (tmp_path / "b" / CHECKPOINT).read_bytes()
    assert_identical(weights(models.load(tmp_path / "b" / MODEL)), weights(undisturbed.model))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_full_size_and_two_threads(tmp_path, precision):
    """The kernels that real runs use: blocked and split over threads, unlike those of the tiny nets above."""
    torch.set_num_threads(2)  # the fixture restores it

    def model(seed):
        torch.manual_seed(seed)
        return models.build("vae", (1, 64, 64))

    options = {"precision": precision, "batch_size": 16, "steps": 3}
    undisturbed = train(model(0), Blobs(64), **options)
    with pytest.raises(KeyboardInterrupt):
        train(model(0), Interrupted(2, stop, side=64), out=tmp_path, **options)
    resumed = train(model(9), Blobs(64), out=tmp_path, **options)
    assert_identical(weights(undisturbed.model), weights(resumed.model))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_run_resumes_bit_identical(tmp_path, precision):
    script = Path(__file__).with_name("slow_run.py")
    command = [sys.executable, str(script), str(tmp_path / "b"), precision, "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "under way\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "b" / MODEL).exists()
    reached = []

    def callback(step, terms):
        reached.append(step)

    options = {"precision": precision, "checkpoint_every": 1000, "log_every": 5}
    steps = 100
    run = train(
        new_model(seed=9), out=tmp_path / "b", steps=steps, progress=lambda step, terms: reached.append(step), **options
    )
    assert reached[0] >= 20
    undisturbed = train(new_model(), steps=steps, **options)
    assert_identical(weights(run.model), weights(undisturbed.model))
    assert run.history.equals(undisturbed.history)


def test_finished_run_returns_at_once(tmp_path):
    first = train(new_model(), out=tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = train(new_model(seed=9), Interrupted(1, crash), out=tmp_path)
    assert_identical(weights(first.model), weights(again.model))
    assert again.history.equals(first.history) and again.steps == STEPS
    assert again.images_per_second != again.images_per_second  # NaN: nothing was trained
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    assert {path.name for path in files} == {CHECKPOINT, MODEL}


def test_constant_schedule_can_be_extended(tmp_path):
    train(new_model(), out=tmp_path, steps=7)
    longer = train(new_model(seed=9), out=tmp_path)
    undisturbed = train(new_model())
    assert_identical(weights(longer.model), weights(undisturbed.model))
    assert longer.history.equals(undisturbed.history)
    with pytest.raises(InputError, match="steps 14 there, 7 here"):
        train(new_model(), out=tmp_path, steps=7)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 9}, "batch_size 8 there, 9 here"),
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"lr": 2e-3}, "lr 0.001 there, 0.002 here"),
        ({"schedule": "constant"}, "schedule 'linear' there, 'constant' here"),
        ({"steps": 20}, "steps 14 there, 20 here"),
        ({"warmup": 2}, "warmup 0 there, 2 here"),
        ({"precision": "bf16"}, "precision 'fp32' there, 'bf16' here"),
    ],
)
def test_other_settings_are_named(tmp_path, change, named):
    settings = {"out": tmp_path, "schedule": "linear", "precision": "fp32"}
    train(new_model(), **settings)
    model = new_model(seed=9)
    before = weights(model)
    with pytest.raises(InputError, match=f"checkpoint.safetensors belongs to a run with other settings .*{named}"):
        train(model, **{**settings, **change})
    assert_identical(weights(model), before)


def test_other_model_or_data_is_named(tmp_path):
    class Others(Blobs):
        name = "others"

    train(new_model(), out=tmp_path)
    with pytest.raises(InputError, match="model beta 4.0 there, 2.0 here"):
        train(new_model(beta=2.0), out=tmp_path)
    with pytest.raises(InputError, match="model name 'beta_vae' there, 'vae' here; model beta 4.0 there, None here"):
        train(new_model(name="vae"), out=tmp_path)
    with pytest.raises(InputError, match="data 'blobs' there, 'others' here"):
        train(new_model(), Others(), out=tmp_path)


def test_damaged_checkpoint_names_the_file_and_the_remedy(tmp_path):
    train(new_model(), out=tmp_path)
    path = tmp_path / CHECKPOINT
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[-100] ^= 1
    for damaged in (content[: len(content) // 2], content[:4], b"", bytes(flipped), (tmp_path / MODEL).read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"checkpoint\.safetensors is .*delete it to start this run over"):
            train(new_model(), out=tmp_path)


def test_step_seeds_never_repeat_in_a_run():
    """In the 32 bits that torch's CPU generator uses; and another run seed gives another sequence."""
    first, second = ([step_seed(seed, step) & 0xFFFFFFFF for step in range(100_000)] for seed in (0, 1))
    assert len(set(first)) == len(set(second)) == 100_000
    assert len(set(first) & set(second)) < 20  # 2.3 expected of two random subsets
    assert all(0 <= step_seed(2**63 - 1, step) < 2**64 for step in range(100))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_interrupted_runs_end_bit_identical_on_a_gpu(tmp_path, precision):
    undisturbed = train(new_model().cuda(), precision=precision)
    with pytest.raises(KeyboardInterrupt):
        train(new_model().cuda(), Interrupted(6, stop), out=tmp_path, precision=precision)
    resumed = train(new_model(seed=9).cuda(), out=tmp_path, precision=precision)
    assert_identical(weights(undisturbed.model), weights(resumed.model))
