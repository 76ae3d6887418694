"""Graph recovery: models whose codes are the factors, or whose decoder holds the mechanism, on each known graph."""

import json
import math

import numpy as np
import pytest
import torch

from vaecirc_fast import models
from vaecirc_fast.data.scm_sprites import GRAPHS, NAMES, SIZES, SCMSprites
from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions.codes import Codes
from vaecirc_fast.metrics import reachable
from vaecirc_fast.studies.causal_graphs import recover, recovered

FAST = {"images": 24, "probe_images": 250, "replicates": 30}


class Table(SCMSprites):
    """An "image" is a row of its factors, each in (0, 1)."""

    shape = (1, 1, len(NAMES))

    def _render(self, indices):
        return ((self._unravel(indices) + 0.5) / torch.tensor(SIZES)).float().view(-1, *self.shape)


class Exact:
    """Codes are the factors, in another order, one of them upside down, beside a latent that says nothing."""

    order = torch.tensor([3, 1, 4, 0, 2])

    def encode(self, x):
        codes = 4 * x.flatten(1)[:, self.order] - 2
        codes[:, 1] *= -1
        return torch.cat([codes, torch.zeros(len(x), 1)], 1), torch.zeros(len(x), 6)

    def decode(self, z):
        z = z[:, :5].clone()
        z[:, 1] *= -1
        return ((z + 2) / 4)[:, self.order.argsort()].view(-1, *Table.shape)


class Mechanism:
    """Codes are the noise of a linear causal model on the data's graph: the decoder runs it, the encoder inverts it."""

    def __init__(self, graph):
        self.inverse = torch.eye(len(graph)) - 0.6 * graph

    def encode(self, x):
        return (4 * x.flatten(1) - 2) @ self.inverse

    def decode(self, z):
        return ((z @ self.inverse.inverse() + 2) / 4).view(-1, *Table.shape)


@pytest.fixture(params=GRAPHS)
def ds(request):
    return Table(graph=request.param)


def test_an_exact_encoder_shows_the_graph_and_no_mechanism_of_its_own(ds):
    found = recover(Exact(), ds, **FAST)
    truth = ds.graph.numpy()
    assert min(found.probe.values()) > 0.99
    assert (found.data["direct"].score.found == truth).all()
    assert (found.data["total"].score.found == reachable(truth)).all()
    for effects in found.data.values():
        assert effects.score.shd.value == effects.score.shd.high == 0 and effects.score.auroc.value == 1
        assert effects.score.auroc_p <= 4 / 120
    assert [found.assigned[name] for name in NAMES] == [3, 1, 4, 0, 2]
    assert found.held < 0.01 and not found.latents["total"].score.found.any()
    assert found.latents["direct"].score.shd.value == truth.sum() and found.latents["direct"].score.recall == 0


def test_a_decoder_that_holds_the_mechanism_shows_it(ds):
    found = recover(Mechanism(ds.graph.float()), ds, **FAST)
    truth = ds.graph.numpy()
    for level in (found.data, found.latents):
        assert (level["direct"].score.found == truth).all()
        assert (level["total"].score.found == reachable(truth)).all()
        assert level["direct"].score.auroc.value == 1
    assert found.held < 0.02


def test_a_chain_is_not_read_as_a_fork():
    chain, fork = (recover(Exact(), Table(graph=name), **FAST).data for name in ("chain", "fork"))
    ends = (NAMES.index("scale"), NAMES.index("posY"))
    assert chain["total"].effect[ends] > 0.5 and chain["total"].low[ends] > 0.2
    assert abs(chain["direct"].effect[ends]) < 0.05 and fork["direct"].effect[ends] > 0.5


def test_effects_have_the_size_of_the_equations():
    """do(scale := 4) against do(scale := 1) moves posX by .8 x 3 / 6 of its range, of sd sqrt(1 / 12)."""
    effects = recover(Exact(), Table(graph="fork"), **FAST | {"images": 300}).data["direct"]
    at = (NAMES.index("scale"), NAMES.index("posX"))
    assert effects.low[at] < 0.8 * 0.5 * math.sqrt(12) < effects.high[at]


def test_a_model_that_reads_nothing_finds_nothing():
    class Blind:
        def encode(self, x):
            return torch.zeros(len(x), 6)

        def decode(self, z):
            return torch.full((len(z), *Table.shape), 0.5)

    found = recover(Blind(), Table(), **FAST)
    for effects in (*found.data.values(), *found.latents.values()):
        assert not effects.effect.any() and effects.score.auroc.value == 0.5 and effects.score.auroc_p == 1
    json.dumps(found.plain(), allow_nan=False)


def test_a_model_and_its_untrained_control_as_plain_values():
    ds = SCMSprites()
    torch.manual_seed(0)
    model, control = (models.build("vae", shape=ds.shape, latents=6, net="mlp") for _ in range(2))
    found = recovered(model, control, ds, seed=3, **FAST | {"images": 8})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["trained"]["factors"] == list(NAMES) and found["trained"]["truth"] == ds.graph.tolist()
    assert found["trained"]["data"] != found["untrained"]["data"] and found["trained"]["seconds"] > 0
    shd = found["untrained"]["latents"]["direct"]["shd"]
    assert shd["low"] <= shd["value"] <= shd["high"] and shd["n"] == 8 and shd["resampled"] == "images"
    assert recovered(model, control, object(), seed=0) is None


def test_discrete_or_few_latents_are_left_out_with_the_reason():
    class Quantised(Exact):
        def encode(self, x):
            z = super().encode(x)[0][:, :, None]
            return Codes(torch.zeros(len(x), 1, dtype=torch.int64), z, z)

    class Narrow(Exact):
        def encode(self, x):
            return super().encode(x)[0][:, :4]

    quantised, narrow = recover(Quantised(), Table(), **FAST), recover(Narrow(), Table(), **FAST)
    assert not quantised.latents and "discrete" in quantised.left_out
    assert quantised.data["direct"].score.shd.value == 0
    assert not narrow.latents and narrow.left_out == "4 latents cannot hold 5 factors one each"
    assert json.dumps(narrow.plain(), allow_nan=False)


def test_the_same_call_gives_the_same_numbers():
    first, second = (recover(Exact(), Table(), **FAST).plain() for _ in range(2))
    assert first | {"seconds": 0} == second | {"seconds": 0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recover(Exact(), object()), "ds: expected a data set with a causal graph"),
        (lambda: recover(Exact(), Table(), images=4), "images: expected at least 8, got 4"),
        (lambda: recover(Exact(), Table(), probe_images=True), "probe_images"),
        (lambda: recover(type("Odd", (), {"encode": lambda self, x: "codes"})(), Table()), "model: expected encode"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.deep
def test_scores_of_noise_are_covered_by_their_null():
    """Codes that mix the factors by a random matrix: AUROC at the latents is that of chance."""
    p = []
    for seed in range(40):
        mixed = torch.tensor(np.linalg.qr(np.random.default_rng(seed).normal(size=(5, 5)))[0], dtype=torch.float32)

        class Mixed:
            def encode(self, x, mixed=mixed):
                return (4 * x.flatten(1) - 2) @ mixed

            def decode(self, z, mixed=mixed):
                return ((z @ mixed.T + 2) / 4).view(-1, *Table.shape)

        p.append(recover(Mixed(), Table(strength=0.0), **FAST).latents["total"].score.auroc_p)
    assert 0.3 < np.mean(p) < 0.75 and np.mean(np.array(p) < 0.05) < 0.2
