"""Null and stability controls, run for real on tiny models and planted ones."""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import vaecirc_fast as vf
from vaecirc_fast import data, models, training
from vaecirc_fast.errors import InputError
from vaecirc_fast.studies import controls
from vaecirc_fast.studies.control_metrics import evaluation
from vaecirc_fast.studies.control_models import half_frozen, of_constant_sigma, permuted, reinitialised

TINY = {"latents": 5, "net": "mlp", "width": 0.5, "trials": 16}
FEW = {"seeds": 2, "nulls": 3, "steps": 4, "batch_size": 8, "images": 300, "sweep_images": 8, "progress": False}
NULLS = ("untrained", "permuted")


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def trained(digits):
    torch.manual_seed(0)
    model = models.build("vae", digits.shape, **TINY)
    return training.fit(model, digits, steps=400, lr=3e-3, precision="fp32", progress=False).model


def verdicts(found):
    return dict(zip(found.table["control"], found.table["verdict"], strict=True))


def constant(model, ds):
    return 3.0


# --- the table -------------------------------------------------------------------------------------------------------


def test_one_call_gives_a_row_for_each_control(trained, digits):
    before = copy.deepcopy(trained.state_dict())
    found = vf.studies.controls(trained, digits, "specificity", **FEW)
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())
    assert all(parameter.requires_grad for parameter in trained.parameters())
    table = found.table
    retrained = ["decoder retrained", "encoder retrained", "constant sigma"]
    assert list(table["control"]) == ["the model itself", "untrained", "permuted", *retrained]
    assert list(table["kind"]) == ["result", "null", "null", "stability", "stability", "stability"]
    assert list(table["n"]) == [8, 3, 3, 2, 2, 2]
    assert list(table["resampled"]) == ["images", "draws of the weights", "permutations", *["trainings"] * 3]
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    stable = table[table["kind"] == "stability"]
    assert stable["margin"].tolist() == pytest.approx([0.1 * found.result.value] * 3)
    assert stable["difference"].tolist() == pytest.approx((stable["value"] - found.result.value).tolist())
    assert not any(isinstance(v, float) and math.isnan(v) for v in table.to_numpy().flat)  # missing is NA
    assert table.loc[table["kind"] == "null", "margin"].isna().all()
    assert len(found.models) == 12 and set(found.models["control"]) == set(table["control"][1:])
    text = str(found)
    assert all(name in text for name in table["control"]) and "90 %" in text and "nan" not in text.lower()


def test_what_a_control_cannot_say_is_left_out_and_said(trained, digits):
    found = controls(trained, digits, "ces_posterior", only=(), **FEW | {"steps": 1})
    assert "permuted" not in verdicts(found) and "permuted: left out" in str(found)
    assert found.result.unit == "intensity per posterior sd" and "in intensity per posterior sd" in str(found)
    with pytest.raises(InputError, match="'permuted' is not defined for ces_posterior"):
        controls(trained, digits, "ces_posterior", only=["permuted"], **FEW)


# --- planted cases ---------------------------------------------------------------------------------------------------


def test_a_trained_model_clears_the_nulls(trained, digits):
    found = controls(trained, digits, "mig", only=["permuted"], **FEW | {"nulls": 5, "images": 1000})
    assert verdicts(found) == {"the model itself": "", "permuted": "cleared"} and found.passed
    found = controls(trained, digits, "reconstruction", only=NULLS, **FEW)  # less is better
    assert set(found.table["verdict"][1:]) == {"cleared"} and found.passed
    assert (found.table["value"][1:] > found.result.high).all()


def test_an_untrained_model_does_not_clear_the_null_of_the_untrained(digits):
    torch.manual_seed(3)
    model = models.build("vae", digits.shape, **TINY)
    for metric in ("mig", "specificity", "ces_posterior", "reconstruction"):
        found = controls(model, digits, metric, only=["untrained"], **FEW | {"nulls": 5})
        assert verdicts(found)["untrained"] == "not cleared" and not found.passed


def test_an_invariant_metric_is_equivalent_and_above_no_null(trained, digits):
    found = controls(trained, digits, constant, **FEW)
    assert set(found.table["verdict"][1:3]) == {"not cleared"}
    stable = found.table[found.table["kind"] == "stability"]
    assert stable["difference"].tolist() == [0, 0, 0] and stable["p"].tolist() == [0, 0, 0]
    assert "no interval" in found.table["note"][0] and found.metric == "constant"


def test_what_is_frozen_stays_and_what_is_not_moves(trained, digits):
    def weights_of(part):
        def size(model, ds):
            return float(torch.cat([p.flatten() for p in getattr(model, part).parameters()]).norm())

        return size

    stability = ["decoder retrained", "encoder retrained"]
    few = FEW | {"steps": 2, "margin": 1e-9}
    for part in ("decoder", "encoder"):
        found = controls(trained, digits, weights_of(part), only=stability, **few).table.set_index("control")
        for control in stability:
            moved = control.startswith(part)
            assert (found.loc[control, "difference"] == 0) != moved
    # codes belong to the encoder alone
    found = controls(trained, digits, "mig", only=stability, **FEW).models.set_index("control")
    assert found.loc["decoder retrained", "value"].nunique() == 1
    assert found.loc["encoder retrained", "value"].nunique() == 2


@pytest.mark.deep
def test_equivalence_is_found_where_retraining_is_long_enough(trained, digits):
    """Decoders trained again against the frozen encoder do with the codes what the first one did."""
    long = {"steps": 400, "lr": 3e-3, "batch_size": 64, "precision": "fp32", "margin": 0.02, "sweep_images": 32}
    found = controls(trained, digits, "ces_posterior", only=["decoder retrained"], **FEW | long)
    row = found.table.iloc[1]
    assert row["verdict"] == "equivalent" and row["rank_correlation"] > 0.5
    assert (found.models["reconstruction"] < 0.5).all()


def test_a_model_that_was_not_retrained_is_no_evidence(trained, digits):
    found = controls(trained, digits, constant, only=["constant sigma"], **FEW | {"steps": 1})
    assert verdicts(found)["constant sigma"] == "not trained" and "more steps" in found.table["note"][1]


class Tiles(nn.Module):
    """Codes are four pixels of the image; latent i draws the i-th of four cells of 8 x 8, or all draw all of them."""

    def __init__(self, apart):
        super().__init__()
        self.encoder = nn.Linear(64, 4)
        self.apart = apart
        self.decoder = nn.Sequential(nn.Linear(4, 64, bias=False), nn.Unflatten(1, (1, 8, 8)))
        cells = torch.zeros(4, 8, 8)
        for i in range(4):
            cells[i, i, :] = 1 if apart else 0
        with torch.no_grad():
            self.decoder[0].weight.copy_((cells if apart else torch.ones(4, 8, 8)).flatten(1).T)

    def encode(self, x):
        mu = self.encoder(x.flatten(1))
        return mu, torch.full_like(mu, -2.0)

    def decode(self, z):
        return self.decoder(z)


def test_the_permuted_null_of_specificity_is_that_of_exchangeable_latents(digits):
    apart = controls(Tiles(True), digits, "specificity", only=["permuted"], **FEW | {"sweep_images": 40})
    assert apart.result.value == pytest.approx(0.5) and verdicts(apart)["permuted"] == "cleared"  # one row of eight
    # every latent in turn draws every row: half of the cells
    assert apart.table["value"][1] == pytest.approx(1 - math.log(32) / math.log(64), abs=0.02)
    alike = controls(Tiles(False), digits, "specificity", only=["permuted"], **FEW)
    assert alike.table["value"][1] == pytest.approx(alike.result.value, abs=1e-9)
    assert verdicts(alike)["permuted"] == "not cleared"


def test_scores_of_the_battery_are_known_by_name(trained, digits):
    found = controls(trained, digits, "irs", only=["permuted", "decoder retrained"], **FEW)
    mu, _ = evaluation(digits, 300, 8, 0).codes(trained.eval())
    expected = vf.metrics.irs(mu.detach().numpy(), evaluation(digits, 300, 8, 0).v.numpy(), replicates=0)
    assert found.result.value == pytest.approx(expected.value) and found.result.low < found.result.high
    assert verdicts(found)["decoder retrained"] in ("equivalent", "not trained")


# --- the models compared with ----------------------------------------------------------------------------------------


def test_permuted_codes_keep_their_values_and_nothing_else(trained, digits):
    on = evaluation(digits, 250, 8, 0)
    with torch.no_grad():
        mu, logvar = on.codes(trained)
        twin = permuted(trained, 7)
        shuffled, scale = on.codes(twin)
        again, _ = on.codes(twin)
        other, _ = on.codes(permuted(trained, 8))
    assert torch.equal(shuffled.sort(0).values, mu.sort(0).values)
    assert torch.equal(scale.sort(0).values, logvar.sort(0).values)
    assert not torch.equal(again, shuffled) and not torch.equal(other, shuffled)
    with torch.no_grad():
        assert torch.equal(on.codes(permuted(trained, 7))[0], shuffled)
    correlations = np.corrcoef(np.concatenate([mu.numpy(), shuffled.numpy()], 1).T)[:5, 5:]
    assert np.abs(correlations).max() < 5 / math.sqrt(250)
    between = np.corrcoef(shuffled.numpy().T)[np.triu_indices(5, 1)]
    assert np.abs(between).max() < 5 / math.sqrt(250)


def test_an_untrained_twin_is_the_architecture_drawn_anew(trained):
    before = torch.random.get_rng_state()
    twin, other = reinitialised(trained, 1), reinitialised(trained, 2)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    expected = models.build("vae", trained.shape, **TINY).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in twin.state_dict().items())
    assert not torch.equal(twin.encoder.mu.weight, other.encoder.mu.weight)


def test_half_a_model_is_drawn_anew(trained):
    twin = half_frozen(trained, 1, "decoder")
    assert torch.equal(twin.encoder.mu.weight, trained.encoder.mu.weight)
    assert not torch.equal(twin.decoder.fc1.weight, trained.decoder.fc1.weight)
    assert {n.split(".")[0] for n, p in twin.named_parameters() if p.requires_grad} == {"decoder"}


def test_a_model_of_constant_sigma_is_of_the_same_kind(trained):
    model = of_constant_sigma(trained, torch.linspace(0.1, 0.5, 5, dtype=torch.float64), 0)
    assert type(model) is type(trained) and model.sigma == pytest.approx((0.1, 0.2, 0.3, 0.4, 0.5))


def test_latents_of_a_model_from_scratch_are_matched(trained, digits):
    """A metric that is a latent's share of brightness: its order is found again through the codes."""

    def brightness(model, ds):
        x = ds.images(range(300))
        mu, _ = model.encode(x)
        sums = x.flatten(1).sum(1)
        r = torch.corrcoef(torch.cat([mu, sums[:, None]], 1).T)[-1, :-1].abs()
        return r.mean(), r

    found = controls(trained, digits, brightness, only=["decoder retrained", "constant sigma"], **FEW)
    assert found.table["rank_correlation"][1] == 1.0  # the encoder was frozen
    assert found.models["rank_correlation"].notna().all()


# --- kept trainings --------------------------------------------------------------------------------------------------


def test_trainings_are_kept_and_shared_by_metrics(trained, digits, tmp_path):
    stability = ["decoder retrained", "constant sigma"]
    first = controls(trained, digits, "mig", only=stability, out=tmp_path, **FEW)
    stored = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("model.safetensors"))}
    assert len(stored) == 4
    again = controls(trained, digits, "mig", only=stability, out=tmp_path, **FEW)
    controls(trained, digits, constant, only=stability, out=tmp_path, **FEW)
    assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("model.safetensors"))} == stored
    pd.testing.assert_frame_equal(first.table, again.table)
    plain = controls(trained, digits, "mig", only=stability, **FEW)
    pd.testing.assert_frame_equal(first.table, plain.table)
    other = reinitialised(trained, 5)
    controls(other, digits, constant, only=["decoder retrained"], out=tmp_path, **FEW)
    assert len(list(tmp_path.rglob("model.safetensors"))) == 6  # another model's: trained for themselves


def test_progress_goes_to_stderr(trained, digits, capsys):
    controls(trained, digits, constant, only=["untrained"], **FEW | {"progress": True})
    out, err = capsys.readouterr()
    assert not out and "controls: untrained, 3 of 3" in err


# --- refusals --------------------------------------------------------------------------------------------------------


class Bare(nn.Module):
    """A module that owns a parameter and cannot be drawn anew."""

    def __init__(self):
        super().__init__()
        self.encoder = self.decoder = nn.Identity()
        self.weight = nn.Parameter(torch.ones(1))

    def encode(self, x):
        return x.flatten(1)[:, :4], torch.zeros(len(x), 4)

    def decode(self, z):
        return z


@pytest.mark.parametrize(
    "change, match",
    [
        ({"metric": "fid"}, "metric: 'fid' is unknown; known: mig"),
        ({"metric": 3}, "metric: expected a name or a function"),
        ({"metric": lambda model, ds: "much"}, "must give a number"),
        ({"metric": lambda model, ds: math.nan}, "gave nan"),
        ({"metric": lambda model, ds: (1.0, np.ones((2, 2)))}, "values of latents of shape"),
        ({"metric": lambda model, ds: 0.0}, "margin"),
        ({"only": ["frozen"]}, "only: 'frozen' is unknown"),
        ({"seeds": 1}, "seeds"),
        ({"nulls": 0}, "nulls"),
        ({"images": 1}, "images"),
        ({"steps": 0}, "steps"),
        ({"lr": -1.0}, "lr"),
        ({"seed": -1}, "seed"),
        ({"margin": -1.0}, "margin"),
        ({"side": "left"}, "side"),
        ({"level": 95}, "level"),
        ({"model": "vae"}, "model: expected a module"),
        ({"model": Bare()}, "train one of models.build, got Bare; pass only="),
        ({"model": Bare(), "only": NULLS}, "reset_parameters"),
        ({"model": models.VAE((1, 16, 16), 4)}, "is for images"),
    ],
)
def test_bad_input(trained, digits, change, match):
    given = {"model": trained, "metric": constant, **FEW} | change
    with pytest.raises(InputError, match=match) as caught:
        controls(given.pop("model"), digits, given.pop("metric"), **given)
    assert "\n" not in str(caught.value)
