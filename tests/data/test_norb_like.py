"""NORB-like: every factor shows, opposite sides differ, toys stay in the frame, and batches change nothing."""

import itertools

import pytest
import torch

from vaecirc_fast.data import load, norb_like
from vaecirc_fast.data.norb_like import SHADOWS, TOYS, scene
from vaecirc_fast.data.smallnorb import CATEGORIES, SmallNORB
from vaecirc_fast.errors import InputError
from vaecirc_fast.ops import render_scene

DATA = load("norb_like")
SIZES = (5, 9, 18, 6)


@pytest.fixture(scope="module")
def x():
    """All images: (5, 9, 18, 6, 64 x 64) int16, in levels of 1 / 255."""
    x = DATA.images(torch.arange(len(DATA)))
    assert x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
    return (255 * x).round().to(torch.int16).view(*SIZES, 64 * 64)


def changed(x, y):
    """Pixels (...) that differ by more than 4 levels."""
    return ((x - y).abs() > 4).sum(-1)


def test_the_form_is_that_of_smallnorb_but_for_instances():
    for field in ("shape", "factor_names", "factor_sizes", "likelihood"):
        assert getattr(DATA, field) == getattr(SmallNORB, field)
    assert len(DATA) == 4860 and DATA.complete and not DATA.takes_root and DATA.name == "norb_like"
    assert DATA.factors([1, 6, 4859]).tolist() == [[0, 0, 0, 1], [0, 0, 1, 0], [4, 8, 17, 5]]
    assert tuple(TOYS) == CATEGORIES and len(SHADOWS) == 5


def test_a_root_is_refused(tmp_path):
    with pytest.raises(InputError, match="norb_like is drawn and takes no root; .*'smallnorb'"):
        load("norb_like", root=tmp_path)


@pytest.mark.parametrize("v", [[5, 0, 0, 0], [0, 9, 0, 0], [0, 0, 18, 0], [0, 0, 0, 6], [0, 0, 0, -1], [0, 0, 0]])
def test_factors_out_of_range_are_refused(v):
    with pytest.raises(InputError, match="v: "):
        DATA.index_of(torch.tensor([v]))


@pytest.mark.parametrize("indices", [[4860], [-1], [0.5]])
def test_indices_out_of_range_are_refused(indices):
    with pytest.raises(InputError, match="indices: "):
        DATA.images(indices)


def test_the_tables_do_not_follow_the_default_device():
    with torch.device("meta"):
        tables = norb_like._tables.__wrapped__(torch.device("cpu"))
    for name, table in norb_like._tables(torch.device("cpu")).items():
        assert torch.equal(table, tables[name]) and table.dtype in (torch.float32, torch.int64)


def test_an_image_is_the_same_in_every_batch():
    indices = torch.randint(len(DATA), (70,), generator=torch.Generator().manual_seed(1))
    together = DATA.images(indices)
    assert torch.equal(together[:10], torch.cat([DATA.images(i) for i in indices[:10].split(1)]))
    assert torch.equal(together, torch.cat([DATA.images(i) for i in indices.split(64)]))
    assert torch.equal(together.flip(0), DATA.images(indices.flip(0)))


def test_categories_are_visible(x):
    for a, b in itertools.combinations(range(5), 2):
        assert changed(x[a], x[b]).min() >= 500


def test_elevations_are_visible(x):
    assert changed(x[:, 1:], x[:, :-1]).min() >= 75


def test_azimuths_are_visible_also_from_the_opposite_side(x):
    some = x[:, :, :, [0, 5]]
    for step in (1, 9):
        assert changed(some, some.roll(step, 2)).min() >= 250


def test_lightings_are_visible(x):
    for a, b in itertools.combinations(range(6), 2):
        assert changed(x[:, :, :, a], x[:, :, :, b]).min() >= 300


def test_toys_fill_their_frames_without_touching_them():
    kind, *rest = scene(torch.cartesian_prod(*map(torch.arange, (5, 9, 18, 1))))
    empty = torch.zeros_like(kind)
    empty[:, 0] = kind[:, 0]
    toy = (render_scene(kind, *rest) != render_scene(empty, rest[0], rest[1] * (empty > 0), *rest[2:]))[:, 0]
    rim = toy.clone()
    rim[:, 2:-2, 2:-2] = False
    assert not rim.any()
    covered = toy.unflatten(0, (5, -1)).flatten(2).double().mean(2)
    assert covered.min() > 0.06 and covered.max() < 0.45
    assert (covered.mean(1) > 0.12).all()
    of_all_sides = toy.unflatten(0, (5, -1)).any(1)
    for side in (of_all_sides.any(1), of_all_sides.any(2)):
        assert (side.sum(1) >= 36).all()


def test_the_ground_is_uniform_but_for_the_shadow(x):
    corners = x.view(-1, 64, 64)[:, [0, 0, -1, -1], [0, -1, 0, -1]].view(*SIZES, 4)
    level = corners.amax((0, 1, 2, 4))
    assert (corners.amax(4) >= level - 1).all() and level.min() > 50
    assert (corners.amin(4) > 0.8 * level).all()


def test_the_toy_turns_and_the_light_does_not(x):
    """What is brighter lit from the right than from the left lies further right, whichever side the toy shows."""
    lit = x[1].view(9, 18, 6, 64, 64).double()
    gain = lit[:, :, 0] - lit[:, :, 1]
    columns = torch.arange(64.0, dtype=torch.float64)
    right, left = ((gain * sign).clamp(min=0).sum(2) for sign in (1, -1))
    assert ((right * columns).sum(2) / right.sum(2) > (left * columns).sum(2) / left.sum(2) + 1).all()
