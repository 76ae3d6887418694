"""shapes3d_like: every factor shows, factors determine the image, order, batches and bad input; and scene builders."""

import itertools

import pytest
import torch

import vaecirc_fast as vf
from vaecirc_fast.data.shapes3d_like import SOLIDS, Shapes3DLike
from vaecirc_fast.errors import InputError
from vaecirc_fast.report import words

SIZES = (10, 10, 10, 8, 4, 15)
# Of the 4096 pixels of an image, how many differ by more than an eighth (hues) or a sixteenth of full brightness at
# least, between neighbouring values of a factor, whatever the others are.
HUE, GEOMETRY = 32 / 255, 16 / 255
LEAST = {"floor_hue": 1500, "wall_hue": 1300, "object_hue": 250, "scale": 60, "shape": 150, "orientation": 20}


@pytest.fixture(scope="module")
def data():
    return vf.data.load("shapes3d_like")


def images(data, *v):
    return data.images(data.index_of(torch.tensor(v)))


def test_interface(data):
    assert isinstance(data, Shapes3DLike)
    assert data.name == "shapes3d_like" and data.shape == (3, 64, 64) and data.likelihood == "bernoulli"
    assert data.factor_names == ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
    assert data.factor_sizes == SIZES and len(data) == 480_000 and data.complete
    assert not vf.data.takes_root("shapes3d_like")
    assert words.data_name("shapes3d_like") == "3D-Shapes-like"
    x, v = data.sample(7, torch.Generator().manual_seed(0))
    assert x.shape == (7, 3, 64, 64) and x.dtype == torch.float32 and v.shape == (7, 6)
    assert float(x.min()) >= 0 and float(x.max()) <= 1


def test_the_last_factor_is_the_fastest(data):
    assert data.factors([0, 1, 15, 60, 480, 4800, 48000, 479_999]).tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [9, 9, 9, 7, 3, 14],
    ]


def seen(data, rows):
    """How many pixels differ between the images of pairs of factors (N, 2, 6), by more than what counts."""
    rows = torch.as_tensor(rows)
    x = data.images(data.index_of(rows.flatten(0, 1))).unflatten(0, (-1, 2))
    difference = (x[:, 0] - x[:, 1]).abs().amax(1)
    hue = (rows[:, 0] != rows[:, 1]).to(torch.int64).argmax(1) < 3
    return (difference > torch.where(hue, HUE, GEOMETRY)[:, None, None]).sum((1, 2))


def neighbours(factor, others):
    """Pairs of factors (N, 2, 6): each two neighbouring values of the factor, for each row of the others."""
    low = torch.arange(SIZES[factor] - 1)
    rows = torch.as_tensor(others).repeat(len(low), 1)
    rows[:, factor] = low.repeat_interleave(len(rows) // len(low))
    high = rows.clone()
    high[:, factor] += 1
    return torch.stack([rows, high], 1)


@pytest.mark.parametrize("factor", range(6), ids=LEAST)
def test_every_factor_shows(data, factor):
    """Between any two neighbouring values, of all shapes at the smallest and largest scale and at three orientations,
    in one hue alone, where only shades tell floor, walls and object apart, and in many hues."""
    others = [
        (*hues, scale, shape, orientation)
        for hues in ((7, 7, 7), (0, 0, 0), (2, 5, 8))
        for scale, shape, orientation in itertools.product((0, 7), range(4), (0, 7, 14))
    ]
    counts = seen(data, neighbours(factor, others))
    assert int(counts.min()) >= LEAST[data.factor_names[factor]], int(counts.min())


def test_the_ends_of_hue_and_orientation_differ_too(data):
    """The hues go round: the last is next to the first. Orientation does not."""
    for factor in (0, 1, 2, 5):
        first, last = [3, 5, 7, 0, 2, 7], [3, 5, 7, 0, 2, 7]
        first[factor], last[factor] = 0, SIZES[factor] - 1
        assert int(seen(data, [[first, last]])) >= LEAST[data.factor_names[factor]]


def test_factors_determine_the_image(data):
    """Of 3,000 random images no two are equal, and drawn again each is the same."""
    indices = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:3000]
    x = data.images(indices)
    keys = (x.flatten(1).double() @ torch.rand(3 * 64 * 64, 1, dtype=torch.float64)).flatten()
    assert len(keys.unique()) == 3000
    assert torch.equal(data.images(indices), x)


def test_the_same_image_at_any_batch_size(data):
    indices = torch.randint(len(data), (65,), generator=torch.Generator().manual_seed(1))
    x = data.images(indices)
    for size in (1, 7, 64):
        parts = torch.cat([data.images(part) for part in indices.split(size)])
        assert torch.equal(parts, x)
    assert torch.equal(data.images(indices.flip(0)), x.flip(0))
    assert data.images(indices[:0]).shape == (0, 3, 64, 64)


def test_the_image_is_the_references(data):
    """But for edges: all kernels are compared pixel by pixel in tests/ops."""
    indices = torch.arange(0, len(data), 12_343)
    with vf.backend("reference"):
        expected = data.images(indices)
    assert ((data.images(indices) - expected).abs() > 1e-5).float().mean() < 1e-4


def test_the_object_stands_in_the_middle_in_its_hue(data):
    """Red, green and blue objects before walls and floors of other hues, at every scale and orientation."""
    for hue, channel in ((0, 0), (7, 2)):
        rows = [(3, 3, hue, scale, shape, o) for scale in range(8) for shape in range(4) for o in (0, 7, 14)]
        x = images(data, *rows)
        middle = x[:, :, 36, 32]
        assert bool((middle.argmax(1) == channel).all())
        assert bool((x[:, :, [0, 63]].amax((2, 3))[:, channel] <= x.amax((2, 3))[:, 1]).all())


def test_larger_scales_cover_more(data):
    for shape in range(len(SOLIDS)):
        x = images(data, *[(3, 3, 0, scale, shape, 7) for scale in range(8)])
        covered = (x[:, 0] > x[:, 1]).sum((1, 2))
        assert bool((covered[1:] > covered[:-1] + 10).all())
        assert 60 < int(covered[0]) < int(covered[-1]) < 1600


def test_bad_input(data):
    with pytest.raises(InputError, match="root: shapes3d_like is rendered and takes no files"):
        vf.data.load("shapes3d_like", root=".")
    for wrong in ([480_000], [-1]):
        with pytest.raises(InputError, match=r"indices: must lie in \[0, 480000\) for 'shapes3d_like'"):
            data.images(wrong)
    with pytest.raises(InputError, match=r"indices: expected integers of shape \(B,\)"):
        data.images(torch.tensor([0.5]))
    with pytest.raises(InputError, match="v: factor indices must lie"):
        data.index_of(torch.tensor([[0, 0, 0, 8, 0, 0]]))
    with pytest.raises(InputError, match="v: expected integers"):
        data.index_of(torch.zeros(1, 5, dtype=torch.int64))
