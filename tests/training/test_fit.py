"""What fit does besides resuming: learns, stops cleanly, refuses bad input, and leaves nothing behind."""

import io
import math
import signal

import pytest
import torch
from training.blobs import Blobs

from vaecirc_fast import models
from vaecirc_fast._tensor_files import read_tensors
from vaecirc_fast.errors import InputError, TrainingDiverged
from vaecirc_fast.training import fit, progress
from vaecirc_fast.training.checkpoints import CHECKPOINT, MODEL
from vaecirc_fast.training.schedules import learning_rate
from vaecirc_fast.training.settings import resolved_precision


def new_model(name="vae", side=16, **options):
    torch.manual_seed(0)
    return models.build(name, (1, side, side), 4, **{"width": 0.25, **options})


def train(model, ds=None, **options):
    return fit(model, ds or Blobs(), **{"steps": 6, "batch_size": 8, "progress": False, **options})


def checkpoint_step(directory):
    return read_tensors(directory / CHECKPOINT, "checkpoint", "")[1]["step"]


@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_it_learns(net):
    """Well below what a decoder that ignores its latents can reach: the cross-entropy of the mean image."""
    ds = Blobs()
    mean = ds.images(range(len(ds))).mean(0)
    mean_image_loss = torch.special.entr(torch.stack([mean, 1 - mean])).sum().item()
    run = train(new_model(net=net, width=0.5), ds, steps=400, batch_size=32, lr=1e-2, schedule="cosine", log_every=10)
    assert run.history["reconstruction"].iloc[-5:].mean() < 0.85 * mean_image_loss  # measured: .71 (mlp), .26 (conv)
    assert run.history["kl"].iloc[-5:].mean() > 1


def test_first_step_is_adam_on_the_documented_batch():
    """One update against plain torch, with the batch and the noise drawn from the step's own generator."""
    from vaecirc_fast.training.loop import step_seed

    mine, theirs = new_model(net="mlp").double(), new_model(net="mlp").double()
    train(mine, steps=1, seed=5)
    generator = torch.Generator().manual_seed(step_seed(5, 0))
    x, _ = Blobs().sample(8, generator=generator)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-3)
    theirs.loss(x.double(), generator=generator)["loss"].backward()
    optimizer.step()
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict())


def test_history_and_callback():
    calls = []
    run = train(new_model("beta_vae"), steps=7, log_every=3, progress=lambda step, terms: calls.append((step, terms)))
    assert list(run.history.columns) == ["step", "loss", "reconstruction", "kl"]
    assert list(run.history["step"]) == [step for step, _ in calls] == [1, 3, 6, 7]
    assert calls[1][1] == run.history.iloc[1].drop("step").to_dict()
    assert run.steps == 7 and run.out is None and run.images_per_second > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_model_comes_back_as_it_was(precision):
    model = new_model().eval()
    before = {name: (p.stride(), p.dtype) for name, p in model.named_parameters()}
    parameters = list(model.parameters())
    state = torch.get_rng_state()
    run = train(model, precision=precision)
    assert run.model is model and not model.training
    assert {name: (p.stride(), p.dtype) for name, p in model.named_parameters()} == before
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_is_what_was_asked_for(precision):
    seen = set()
    model = new_model()
    model.decoder.ct1.register_forward_hook(lambda _m, _i, output: seen.add(output.dtype))
    train(model, steps=1, precision=precision)
    assert seen == {{"fp32": torch.float32, "bf16": torch.bfloat16}[precision]}


def test_auto_precision(monkeypatch):
    for native in (True, False):
        monkeypatch.setattr("vaecirc_fast.training.settings._native_bf16", lambda device, native=native: native)
        assert resolved_precision(new_model(), "auto") == ("bf16" if native else "fp32")
        assert resolved_precision(new_model(net="mlp"), "auto") == ("bf16" if native else "fp32")
        assert resolved_precision(new_model().double(), "auto") == "fp32"


def test_ctrl_c_finishes_the_step_and_saves(tmp_path):
    class Pressed(Blobs):
        calls = 0

        def sample(self, n, generator=None):
            self.calls += 1
            if self.calls == 4:
                signal.raise_signal(signal.SIGINT)
            return super().sample(n, generator)

    with pytest.raises(KeyboardInterrupt):
        train(new_model(), Pressed(), out=tmp_path)
    assert checkpoint_step(tmp_path) == 4 and not (tmp_path / MODEL).exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_inside_an_update_saves_nothing_half_done(tmp_path, monkeypatch):
    """The second Ctrl-C is not waited for; in the middle of Adam's update the weights are no step's weights."""
    update = torch.optim.Adam.step
    calls = []

    def interrupted(self, *arguments):
        calls.append(1)
        update(self, *arguments)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(new_model(), out=tmp_path, checkpoint_every=2)
    assert len(calls) == 4 and checkpoint_step(tmp_path) == 2


def test_ctrl_c_without_a_directory():
    def stop(step, terms):
        raise KeyboardInterrupt

    model = new_model().eval()
    with pytest.raises(KeyboardInterrupt):
        train(model, progress=stop)
    assert not model.training


def test_divergence_names_the_step_and_keeps_the_good_checkpoint(tmp_path):
    class Poisoned(Blobs):
        calls = 0

        def sample(self, n, generator=None):
            self.calls += 1
            x, v = super().sample(n, generator)
            return (1e30 * x if self.calls == 6 else x), v  # finite, but its square is not

    model = new_model(likelihood="gaussian")
    with pytest.raises(TrainingDiverged, match=r"the loss is (inf|nan) at step 6; .*checkpoint\.safetensors at step 4"):
        train(model, Poisoned(), steps=9, out=tmp_path, checkpoint_every=2)
    assert checkpoint_step(tmp_path) == 4 and not (tmp_path / MODEL).exists()
    assert all(p.isfinite().all() for p in model.parameters())


def test_broken_weights_are_never_saved(tmp_path):
    """The first update at this rate overflows the weights; the loss before it was fine."""
    with pytest.raises(TrainingDiverged, match="weights are NaN or infinite at step 1; there is no checkpoint"):
        train(new_model(), lr=1e300, out=tmp_path, checkpoint_every=1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TrainingDiverged, match="the loss is nan at step 2"):
        train(new_model(), lr=1e300)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: expected an integer of at least 1, got 0"),
        ({"steps": 1.5}, "steps: expected an integer"),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"warmup": -1}, "warmup: expected"),
        ({"checkpoint_every": 0}, "checkpoint_every: expected"),
        ({"log_every": 0}, "log_every: expected"),
        ({"seed": -1}, "seed: expected"),
        ({"lr": 0}, "lr: expected a positive number"),
        ({"lr": math.inf}, "lr: expected a positive number"),
        ({"schedule": "step"}, "schedule: unknown 'step'; known are constant, linear, cosine"),
        ({"precision": "fp16"}, "precision: unknown 'fp16'; known are auto, fp32, bf16"),
        ({"ds": Blobs(12)}, r"model: is for images \(1, 16, 16\), but data set 'blobs' has \(1, 12, 12\)"),
        ({"model": torch.nn.Linear(2, 2)}, "model: expected one of models.build, got Linear"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(InputError, match=message):
        train(**{"model": new_model(), **options})


def test_unwritable_directory_is_found_before_training(tmp_path):
    class NeverAsked(Blobs):
        def sample(self, n, generator=None):
            raise AssertionError("training started")

    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot write"):
            train(new_model(), NeverAsked(), out=out)


def test_progress_is_quiet_unless_asked(capfd, monkeypatch):
    train(new_model(), progress=False)
    train(new_model(), progress=True)  # too short for a line, and no terminal
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(progress, "_FIRST_LINE", 0.0)
    train(new_model(), progress=True)
    output, errors = capfd.readouterr()
    assert output == "" and errors.startswith("training: step 1 of 6, ") and errors.count("\n") == 1


def test_progress_bar_on_a_terminal(capfd, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    train(new_model(), progress=True)
    assert "6/6" in terminal.getvalue() and "images/s" in terminal.getvalue()
    assert capfd.readouterr().out == ""


def test_schedules():
    def curve(**options):
        return [learning_rate(step, lr=2.0, steps=10, **options) for step in range(10)]

    assert curve() == [2.0] * 10
    assert curve(warmup=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert curve(schedule="linear") == pytest.approx([2 - 0.2 * step for step in range(10)])
    assert curve(schedule="linear", warmup=5) == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0, 1.6, 1.2, 0.8, 0.4])
    cosine = curve(schedule="cosine")
    assert cosine[0] == 2.0 and cosine[5] == pytest.approx(1.0)
    assert cosine == sorted(cosine, reverse=True) and 0 < cosine[-1] < 0.1
    assert curve(schedule="cosine", warmup=10)[-1] == 2.0
