"""The battery: its table against the metrics called one by one, what it encodes, and what it is not given."""

import math
import warnings

import numpy as np
import pytest
import torch
from coded_grids import noisy

import vaecirc_fast as vf
from vaecirc_fast.data.dataset import Dataset
from vaecirc_fast.errors import InputError
from vaecirc_fast.metrics import battery, encode_grid
from vaecirc_fast.metrics.battery import COLUMNS, METRICS
from vaecirc_fast.metrics.encoded import Encoded


class Squares(Dataset):
    """A whole grid whose images are the factors themselves, a pixel each; one factor has one value."""

    name = "squares"
    shape = (1, 2, 2)
    factor_names = ("colour", "shape", "x", "y")
    factor_sizes = (1, 3, 4, 5)

    def _render(self, indices):
        sizes = torch.tensor(self.factor_sizes)
        return (self._unravel(indices) / sizes).float().view(-1, *self.shape)


class Unlabelled(Squares):
    complete = False

    def factors(self, indices):
        return torch.zeros(len(indices), 1, dtype=torch.int64)

    factor_names = ("class",)


class Perfect:
    """No torch module: one latent a factor, and a fourth that does not move."""

    def encode(self, x):
        mu = x.flatten(1) * torch.tensor([7.0, 3.0, 4.0, 5.0])
        return mu, torch.full_like(mu, -4.0)


FEW = {"samples": 400, "test_samples": 200, "replicates": 20, "dci_replicates": 5, "progress": False}


@pytest.fixture(scope="module")
def table():
    return battery(Perfect(), Squares(), **FEW)


def test_every_metric_has_its_row(table):
    assert list(table.columns) == COLUMNS
    names = [row for metric in METRICS.values() for row in metric.definitions]
    assert list(table.metric) == names and table.attrs["left_out"] == {}
    assert table.drop(columns=["dropped", "note", "unit"]).notna().all().all()
    assert (table.low <= table.value + 1e-12).all() and (table.value <= table.high + 1e-12).all()
    assert (table.seconds > 0).all() and table.attrs["images"] == 60 and table.attrs["encoding_seconds"] > 0
    assert (table.definition.str.len() > 10).all() and (table.resampled != "").all()


def test_a_perfect_model_is_told_so(table):
    found = table.set_index("metric")
    for metric in ("factor_vae_score", "beta_vae_score", "irs", "dci_informativeness", "dci_disentanglement"):
        assert found.value[metric] == pytest.approx(1, abs=1e-9), metric
    assert found.value["mig"] > 0.95  # of 400 samples: latents seem to tell a little of other factors
    assert found.value["active_units"] == 3 and found.unit["active_units"] == "latents"
    assert found.value["modularity"] > 0.7  # the fourth latent counts 0, samples make the others a little less than 1
    labelled = [row for metric in METRICS.values() if metric.labels for row in metric.definitions]
    assert (found.dropped[labelled] == "colour").all() and (found.dropped.drop(labelled) == "").all()


def test_rows_are_those_of_the_metrics(table):
    """On the samples that the protocol draws: with replacement, those to train on first."""
    ds, rows = Squares(), np.random.default_rng(0).integers(60, size=600)
    codes = Perfect().encode(ds.images(torch.arange(60)))[0].numpy()
    factors = ds.factors(torch.arange(60)).numpy()
    z, v, options = codes[rows[:400]], factors[rows[:400]], {"replicates": 20}
    m = vf.metrics
    expected = {
        "mig": m.mig(z, v, **options),
        "factor_vae_score": m.factor_vae_score(codes, factors, train=400, test=200, variance_samples=400),
        "beta_vae_score": m.beta_vae_score(codes, factors, train=400, test=200),
        "modularity": m.modularity(z, v, **options),
        "explicitness": m.explicitness(codes[rows], factors[rows], train=400, test=200),
        "irs": m.irs(z, v, **options),
        "gaussian_total_correlation": m.gaussian_total_correlation(z, **options),
        "wasserstein_correlation": m.wasserstein_correlation(z, **options),
        "wasserstein_correlation_normalised": m.wasserstein_correlation(z, normalised=True, **options),
        "mean_pairwise_mi": m.mean_pairwise_mi(z, **options),
    }
    trees = m.dci(codes[rows], factors[rows], train=400, test=200, replicates=5)
    expected |= {f"dci_{name}": estimate for name, estimate in trees.estimates.items()}
    expected["sap"] = m.sap(codes[rows], factors[rows], train=400, test=200, replicates=20)
    found = table.set_index("metric")
    assert set(found.index) == {"active_units", *expected}
    for name, score in expected.items():
        row = found.loc[name]
        assert [row.value, row.low, row.high] == [score.value, score.low, score.high], name
        assert (row.n, row.resampled, row.unit) == (score.n, score.resampled, score.unit)


def test_a_seed_gives_the_same_table(table):
    again = battery(Perfect(), Squares(), **FEW)
    assert again.drop(columns="seconds").equals(table.drop(columns="seconds"))
    other = battery(Perfect(), Squares(), **FEW, seed=1, only=["modularity"])
    assert other.value[0] != table.set_index("metric").value["modularity"]


def test_exact_is_the_whole_grid():
    exact = battery(Perfect(), Squares(), True, **FEW).set_index("metric")
    rows = [(name, metric) for metric in METRICS.values() for name in metric.definitions]
    for name, metric in rows:
        row = exact.loc[name]
        if metric.exact:
            assert row.low == row.value == row.high and row.resampled == "rows of the whole grid" and row.n == 60, name
        else:
            assert row.note == "sampled: it has no exact form" and row.n in (200, 400)
    assert exact.value["modularity"] == pytest.approx(0.75) and exact.value["mean_pairwise_mi"] == 0
    with pytest.raises(InputError, match="whole factor grid"):
        battery(Perfect(), Squares(), True, **FEW, images=30)


def test_dci_without_an_interval_says_so():
    found = battery(Perfect(), Squares(), **(FEW | {"dci_replicates": 0}), only=["dci"]).set_index("metric")
    assert found.note["dci_completeness"] == "no interval: dci_replicates=0" and math.isnan(
        found.low["dci_completeness"]
    )
    assert found.note["dci_informativeness"] == "" and found.low["dci_informativeness"] > 0.9


def test_samples_that_are_no_grid():
    some = battery(Perfect(), Squares(), **FEW, images=40)
    assert some.note.str.contains("on 40 labelled samples, no whole factor grid").all()
    found = some.set_index("metric")
    assert found.n["mig"] == 40 and "27 training and 13 test samples" in found.note["explicitness"]
    assert "variances from all 40 rows" in found.note["factor_vae_score"]
    codes, factors = noisy(900)
    encoded = Encoded(codes, factors, ("a", "b", "c"), False)
    found = battery(None, None, encoded=encoded, **FEW).set_index("metric")
    assert found.n["mig"] == 400 and found.n["explicitness"] == 200  # without replacement
    assert "no posterior variance" in found.note["active_units"]


def test_without_labels():
    with pytest.warns(UserWarning, match="left out mig .no factor|left out mig .needs labels"):
        table = battery(Perfect(), Unlabelled(), **FEW)
    assert list(table.metric) == [name for name, metric in METRICS.items() if not metric.labels]
    assert set(table.attrs["left_out"]) == {name for name, metric in METRICS.items() if metric.labels}
    with pytest.raises(InputError, match="mig: needs labels"):
        battery(Perfect(), Unlabelled(), **FEW, only=["mig", "active_units"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(battery(Perfect(), Unlabelled(), **FEW, only=["active_units"]).metric) == ["active_units"]


def test_what_cannot_be_computed_is_said():
    codes, factors = noisy(300)
    encoded = Encoded(codes[:, :1], factors[:, :1], ("a",), False)
    with pytest.warns(UserWarning, match="modularity .factors: modularity needs two"):
        table = battery(None, None, encoded=encoded, **FEW)
    assert set(table.attrs["left_out"]) == {
        "factor_vae_score",
        "beta_vae_score",
        "modularity",
        "mean_pairwise_mi",
        "sap",
    }
    assert table.value.notna().all()


def test_active_units_and_their_interval():
    codes = np.random.default_rng(0).normal(size=(300, 3)) * [1, 0.25, 0.01]
    encoded = Encoded(codes, np.zeros((300, 0), int), (), False, np.zeros((300, 3)))
    with pytest.warns(UserWarning):
        row = battery(None, None, encoded=encoded, **FEW).iloc[0]
    assert row.value == vf.metrics.active_units(codes, encoded.logvar).active.sum()
    assert (row.low, row.high) == (1, 2)  # the second is at 1/17 of its scale, beside the threshold of 1/20


@pytest.mark.parametrize(
    "options, match",
    [
        ({"only": ["mig", "migs"]}, "only: unknown migs; known are active_units, "),
        ({"samples": 1}, "samples"),
        ({"test_samples": 0}, "test_samples"),
        ({"replicates": -1}, "replicates"),
        ({"dci_replicates": 0.5}, "dci_replicates"),
        ({"images": 0}, "images"),
        ({"batch": 0}, "batch"),
        ({"level": 95}, "level"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(InputError, match=match):
        battery(Perfect(), Squares(), **(FEW | options))


# --- encoding --------------------------------------------------------------------------------------------------------


def test_encoding_a_grid():
    ds = Squares()
    encoded = encode_grid(Perfect(), ds, batch=7, progress=False)
    everything = torch.arange(60)
    assert np.array_equal(encoded.codes, Perfect().encode(ds.images(everything))[0].numpy())
    assert np.array_equal(encoded.factors, ds.factors(everything).numpy())
    assert encoded.codes.dtype == encoded.logvar.dtype == np.float32 and encoded.complete
    assert encoded.factor_names == ds.factor_names and encoded.seconds > 0
    some = encode_grid(Perfect(), ds, images=10, progress=False)
    assert len(some.codes) == 10 and not some.complete and len(np.unique(some.factors, axis=0)) == 10
    assert np.array_equal(some.codes, encode_grid(Perfect(), ds, images=10, progress=False).codes)


def test_a_module_is_put_into_evaluation_mode_and_back():
    torch.manual_seed(0)
    ds = vf.data.load("digits")
    model = vf.models.build("vae", shape=ds.shape, latents=3, net="mlp")
    model.decoder.eval()
    modes = []
    model.encoder.register_forward_hook(lambda *_: modes.append(model.training))
    encoded = encode_grid(model, ds, images=20, progress=False)
    assert modes == [False] and model.training and model.encoder.training and not model.decoder.training
    assert not encoded.complete and encoded.codes.shape == (20, 3)


class Wrong:
    def __init__(self, found):
        self.found = found

    def encode(self, x):
        return self.found(x)


@pytest.mark.parametrize(
    "found, got",
    [
        (lambda x: x, r"got \(60, 1, 2, 2\)"),
        (lambda x: (x, x), r"got \(60, 1, 2, 2\), "),
        (lambda x: (x.flatten(1), x.flatten(1)[:, :1]), r"\(60, 4\), \(60, 1\)"),
        (lambda x: (1, 2, 3), "int, int, int"),
        (lambda x: None, "NoneType"),
    ],
)
def test_a_model_that_encodes_otherwise_is_refused(found, got):
    with pytest.raises(InputError, match=r"\(mu, logvar\)") as caught:
        battery(Wrong(found), Squares(), **FEW)
    assert caught.match(got)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_codes_are_an_error_whatever_is_asked_for(bad):
    def found(x):
        mu = x.flatten(1).clone()
        mu[3, 1] = bad
        return mu, None

    with pytest.raises(InputError, match="finite numbers, got NaN or infinity in latent 1"):
        battery(Wrong(found), Squares(), **FEW)
    with pytest.raises(InputError, match="logvar"):
        battery(Wrong(lambda x: (x.flatten(1), x.flatten(1) + math.inf)), Squares(), **FEW)


def test_encoding_says_how_far_it_is(capsys, monkeypatch):
    import vaecirc_fast.metrics.encoded as module

    monkeypatch.setattr(module, "_FIRST_LINE", 0.0)
    encode_grid(Perfect(), Squares(), batch=20)
    assert "encoding: image 20 of 60, " in capsys.readouterr().err
    encode_grid(Perfect(), Squares(), batch=20, progress=False)
    assert capsys.readouterr().err == ""
