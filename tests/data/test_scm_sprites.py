"""SCM sprites: the distribution against its equations, interventions as counterfactuals, images against dSprites."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vaecirc_fast.data import load
from vaecirc_fast.data.scm_sprites import GRAPHS, NAMES, SIZES, SCMSprites
from vaecirc_fast.errors import InputError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=GRAPHS)
def ds(request):
    return SCMSprites(graph=request.param)


def descendants(ds, name):
    found, edges = {name}, [(NAMES[a], NAMES[b]) for a, b in ds.graph.nonzero().tolist()]
    while more := {b for a, b in edges if a in found} - found:
        found |= more
    return found


def test_the_graphs_are_what_they_are_called():
    def edges(name):
        return {(NAMES[a], NAMES[b]) for a, b in SCMSprites(graph=name).graph.nonzero().tolist()}

    assert edges("chain") == {("scale", "posX"), ("posX", "posY")}
    assert edges("fork") == {("scale", "posX"), ("scale", "posY")}
    assert edges("collider") == {("posX", "posY"), ("orientation", "posY")}
    assert edges("mixed") == {*edges("chain"), *edges("collider"), ("scale", "orientation")}
    assert not load("scm_sprites").contents and SCMSprites(graph="fork").contents != SCMSprites(strength=0.5).contents


def conditional(size, causes, strength):
    """P(child | levels of its causes) by midpoint integration over U, in plain numpy: the equations, written again."""
    fine = (np.arange(200) + 0.5) / 200
    if len(causes) == 1:
        (level, of) = causes[0]
        position = (level + fine) / of
    else:
        (a, m), (b, n) = causes
        position = (((a + fine)[:, None] / m + (b + fine)[None] / n) / 2).ravel()
    mass = np.bincount((size * position).astype(int), minlength=size) / position.size
    return strength * mass + (1 - strength) / size


def test_effects_follow_their_equations(ds):
    v = ds.draw({}, 60_000, seeded()).numpy()
    for k, size in enumerate(SIZES):
        causes = ds.graph[:, k].nonzero().flatten().tolist()
        if not causes:
            assert stats.chisquare(np.bincount(v[:, k], minlength=size)).pvalue > 1e-4
            continue
        lower = v[:, causes[0]] < SIZES[causes[0]] // 2
        for half in (v[lower], v[~lower]):
            seen, counts = np.unique(half[:, causes], axis=0, return_counts=True)
            levels = ([(x, SIZES[a]) for x, a in zip(row, causes, strict=True)] for row in seen)
            expected = sum(n * conditional(size, row, ds.strength) for n, row in zip(counts, levels, strict=True))
            found = np.bincount(half[:, k], minlength=size)
            assert stats.chisquare(found, expected * found.sum() / expected.sum()).pvalue > 1e-4


def test_effects_of_one_cause_in_distribution():
    v = SCMSprites(graph="chain").draw({"scale": 4}, 30_000, seeded())[:, NAMES.index("posX")].numpy()
    expected = conditional(32, [(4, 6)], 0.8)
    assert stats.chisquare(np.bincount(v, minlength=32), 30_000 * expected / expected.sum()).pvalue > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_an_intervention_moves_the_factor_and_what_it_causes_alone(ds, name):
    k = NAMES.index(name)
    plain, low = ds.draw({}, 500, seeded()), ds.draw({name: 0}, 500, seeded())
    high = ds.draw({name: torch.full((500,), SIZES[k] - 1)}, 500, seeded())
    assert (low[:, k] == 0).all() and (high[:, k] == SIZES[k] - 1).all()
    for j, other in enumerate(NAMES):
        if other not in descendants(ds, name):
            assert torch.equal(low[:, j], plain[:, j]) and torch.equal(high[:, j], plain[:, j])
        elif other != name:
            shift = (high[:, j] - low[:, j]).double() / SIZES[j]
            assert shift.mean() > 0.1 and (shift >= 0).all()  # monotone, counterfactual by counterfactual


def test_held_factors_keep_a_chain_from_its_end():
    ds = SCMSprites(graph="chain")
    held = {"posX": 11, "orientation": 3, "shape": 1}
    low, high = (ds.draw({**held, "scale": s}, 300, seeded()) for s in (0, 5))
    assert torch.equal(low[:, 4], high[:, 4])


def test_images_are_those_of_the_factors_and_of_dsprites(ds):
    x, v = ds.intervene({"posX": 7}, 40, seeded())
    assert x.dtype == torch.float32 and x.shape == (40, 1, 64, 64) and set(x.unique().tolist()) == {0.0, 1.0}
    dsprites = load("dsprites")
    colour = torch.zeros(40, 1, dtype=torch.int64)
    assert torch.equal(x, dsprites.images(dsprites.index_of(torch.cat([colour, v], 1))))
    assert torch.equal(ds.sample(40, seeded(3))[1], ds.draw({}, 40, seeded(3)))


def test_no_two_orientations_look_alike():
    ds = load("scm_sprites")
    for shape, scale in itertools.product(range(3), range(6)):
        v = torch.tensor([[shape, scale, o, 16, 16] for o in range(10)])
        assert len(ds.images(ds.index_of(v)).flatten(1).unique(dim=0)) == 10


def test_without_strength_nothing_depends_on_anything():
    ds = SCMSprites(strength=0)
    assert torch.equal(ds.draw({"scale": 0}, 200, seeded())[:, 2:], ds.draw({"scale": 5}, 200, seeded())[:, 2:])


@given(st.sampled_from(list(GRAPHS)), st.integers(0, 4), st.integers(1, 7), st.integers(0, 99))
def test_every_draw_has_an_image(graph, k, n, seed):
    ds = SCMSprites(graph=graph, strength=seed / 99)
    v = ds.draw({NAMES[k]: seed % SIZES[k]}, n, seeded(seed))
    assert v.shape == (n, 5) and torch.equal(ds.factors(ds.index_of(v)), v)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SCMSprites(graph="tree"), "graph: 'tree' is unknown; known: chain, fork, collider, mixed"),
        (lambda: SCMSprites(root="x"), "takes no root"),
        (lambda: SCMSprites(strength=1.5), r"strength: expected a probability in \[0, 1\], got 1.5"),
        (lambda: SCMSprites(strength=True), "strength"),
        (lambda: SCMSprites().sample(0), "n: expected at least 1 image, got 0"),
        (lambda: SCMSprites().intervene({"hue": 1}, 2), "do: 'hue' is no factor; known: shape"),
        (lambda: SCMSprites().intervene({"scale": 6}, 2), r"an index in \[0, 6\)"),
        (lambda: SCMSprites().intervene({"scale": 0.5}, 2), "do: expected"),
        (lambda: SCMSprites().intervene({"scale": torch.zeros(3, dtype=torch.int64)}, 2), "each of 2 images"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
