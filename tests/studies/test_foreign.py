"""Models from elsewhere: the same numbers as from here, in every form in which encoders and decoders answer."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import vaecirc_fast as vf
from vaecirc_fast import data, report
from vaecirc_fast.errors import InputError
from vaecirc_fast.studies import measure_model
from vaecirc_fast.studies.foreign import adapted
from vaecirc_fast.studies.measuring import measure

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {"images": 40, "sweep_images": 6, "pairs": 6, "circuit_pairs": 3, "circuit_units": 4}
DS = data.load("digits")
L = 3


def ours():
    torch.manual_seed(3)
    return vf.models.build("vae", DS.shape, L, net="mlp", width=0.1).eval()


class Theirs(nn.Module):
    """The same network in other words; `answer` says how encode and decode give what they give."""

    def __init__(self, answer="pair", net=None):
        super().__init__()
        self.net, self.answer = net or ours(), answer

    def encode(self, x):
        mu, logvar = self.net.encode(x)
        return {
            "pair": (mu, logvar),
            "codes": mu,
            "object": SimpleNamespace(embedding=mu, log_covariance=logvar),
            "dict": {"mu": mu, "logvar": logvar},
            "nan": (mu * math.nan, logvar),
            "shape": mu[:, None],
            "rows": mu[:1],
            "logvar": (mu, logvar[:, :1]),
        }.get(self.answer, (mu, logvar))

    def decode(self, z):
        y = self.net.decode(z)
        return {
            "object": SimpleNamespace(reconstruction=y),
            "flat": y.flatten(1),
            "logits": y * 9 - 3,
            "broken": y * math.nan,
            "cut": y[..., :-1],
        }.get(self.answer, y)


def numbers(found):
    return {name: entry["value"] for name, entry in found.metrics.items()}


@pytest.mark.parametrize("answer", ["pair", "object", "dict", "flat"])
def test_a_model_from_elsewhere_has_the_numbers_of_ours(answer):
    sizes = {"images": 40, "sweep_images": 6, "seed": 1}
    assert numbers(measure(adapted(Theirs(answer), DS.shape), DS, **sizes)) == pytest.approx(
        numbers(measure(ours(), DS, **sizes)), rel=1e-5
    )


def test_codes_without_variances_have_no_noise():
    found = measure(adapted(Theirs("codes"), DS.shape), DS, images=40, sweep_images=6, seed=1)
    assert found.metrics["active"]["value"] == L and all(row["share"] == 1 for row in found.latents)
    assert found.encoded.logvar is None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("shape", r"model: expected encode\(x\) to give floats \(B = 2, L\), got torch.float32 \(2, 1, 3\)"),
        ("rows", r"model: expected encode\(x\) to give floats \(B = 2, L\), got torch.float32 \(1, 3\)"),
        ("logvar", r"model: expected log-variances of the codes' shape \(2, 3\), got torch.float32 \(2, 1\)"),
        ("nan", "model: encode gave NaN or infinity"),
        ("broken", "model: decode gave NaN or infinity"),
        ("cut", r"model: expected decode\(z\) to give images \(B = 2, 1, 8, 8\), got torch.float32 \(2, 1, 8, 7\)"),
        (
            "logits",
            r"model: the bernoulli likelihood needs means in \[0, 1\], decode gave .*; say likelihood='gaussian'",
        ),
    ],
)
def test_what_a_model_gives_is_checked_before_it_is_measured(answer, message):
    with pytest.raises(InputError, match=message):
        measure_model(Theirs(answer), DS, **SMALL, battery="none")


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(InputError, match="model: Linear has neither encode and decode nor encoder and decoder"):
        measure_model(nn.Linear(2, 2), DS)
    with pytest.raises(InputError, match="model: expected a torch.nn.Module, got str"):
        measure_model("model.pt", DS)
    with pytest.raises(InputError, match="likelihood: unknown 'laplace'"):
        measure_model(Theirs(), DS, likelihood="laplace")
    with pytest.raises(InputError, match="likelihood: the model's is 'bernoulli', got 'gaussian'"):
        measure_model(ours(), DS, likelihood="gaussian")
    with pytest.raises(InputError, match="measure_model: imags is unknown; known: images, sweep_images"):
        measure_model(ours(), DS, imags=3)
    with pytest.raises(InputError, match="images: expected a whole number of at least 2, got 1"):
        measure_model(ours(), DS, images=1)


class Unusual(nn.Module):
    """A parameter of its own that nothing resets, and a decoder whose layers are no chain."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.enc = nn.Linear(64, L)
        self.a, self.b, self.out = nn.Linear(L, 5), nn.Linear(L, 5), nn.Linear(5, 64)

    def encode(self, x):
        return self.enc(x.flatten(1)) * self.gain

    def decode(self, z):
        return self.out(self.a(z).tanh() * self.b(z)).sigmoid()


def test_what_cannot_be_had_is_left_out_and_said():
    torch.manual_seed(0)
    model = Unusual().train()
    found = measure_model(model, DS, **SMALL)
    assert model.training
    assert "Unusual has no reset_parameters" in found.left_out["untrained"] and found.left_out["graph"]
    result = found.result
    assert "untrained" not in result["inputs"] and result["circuits"]["graph"] == {}
    assert all(entry["value"] is None for entry in result["control"]["untrained"].values())
    assert result["disentanglement"]["untrained"] == {} and result["disentanglement"]["trained"]
    text = str(found)
    assert "untrained: left out" in text and "graph: left out" in text
    with_twin = measure_model(model, DS, untrained=Unusual(), **SMALL, battery="none")
    assert "untrained" not in with_twin.left_out and with_twin.result["inputs"]["untrained"]


def test_what_was_measured_can_be_kept_and_reported(tmp_path):
    for name, battery in (("mine", "samples"), ("twin", "none")):
        page = measure_model(Theirs(), DS, name=name, **SMALL, battery=battery).save(tmp_path)
    study = report.results.read(tmp_path)
    assert [run.config["architecture"] for run in study.runs] == ["mine", "twin"]
    assert not [note for run in study.runs for note in run.notes]
    text = page.read_text()
    assert "mine" in text and "twin" in text
    json.dumps(study.runs[0].result, allow_nan=False)


def test_the_table_has_each_number_once_with_its_definition():
    table = measure_model(ours(), DS, **SMALL | {"circuit_pairs": 0}).to_dataframe()
    assert table.metric.is_unique and {"mig", "ces_posterior", "irs"} <= set(table.metric)
    assert table.definition.str.len().gt(5).all()
    control = table.set_index("metric").untrained
    assert control["ces_posterior"] > 0


def test_the_example_of_a_plain_module(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "plain_module", raising=False)
    import plain_module

    found = plain_module.main(str(tmp_path), steps=20, **SMALL)
    assert (tmp_path / "report.html").exists() and not found.left_out
    assert "my_vae on digits" in capsys.readouterr().out
    assert {row["site"] for row in found.result["circuits"]["sites"]} == {"enc.1", "heads", "latents", "dec.0"}
