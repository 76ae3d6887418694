"""Faces-like: every attribute shows in every portrait, and an image has the same bits wherever it is drawn."""

import colorsys
import math

import pytest
import torch

from vaecirc_fast.data import load, portrait
from vaecirc_fast.data.faces_like import FacesLike
from vaecirc_fast.errors import InputError

FACES = FacesLike()
NAMES = FACES.factor_names
EYE_BAND, CHIN = (slice(27, 33), slice(16, 48)), (slice(48, 51), slice(29, 35))


def contexts(n, seed=0):
    return FACES.sample(n, torch.Generator().manual_seed(seed))[1]


def draw(v, **fixed):
    """The images of factors `v` with some of them set."""
    v = v.clone()
    for name, value in fixed.items():
        v[:, NAMES.index(name)] = value
    return FACES.images(FACES.index_of(v))


def test_the_grid():
    assert isinstance(load("faces_like"), FacesLike)
    assert FACES.complete and FACES.shape == (3, 64, 64) and FACES.likelihood == "bernoulli"
    assert len(FACES) == math.prod(FACES.factor_sizes) == 10_886_400
    assert len(NAMES) == len(FACES.factor_sizes) == 10
    v = FACES.factors([0, 1, 5, 10_886_399])
    assert v.tolist() == [[0] * 10, [0] * 9 + [1], [0] * 8 + [1, 0], [n - 1 for n in FACES.factor_sizes]]
    assert FACES.index_of(contexts(100)).unique().numel() == 100


@pytest.mark.parametrize("name", NAMES)
def test_every_two_values_of_an_attribute_show_in_every_portrait(name):
    v = contexts(40, NAMES.index(name))
    size = FACES.factor_sizes[NAMES.index(name)]
    images = torch.stack([draw(v, **{name: value}) for value in range(size)])
    for a in range(size):
        for b in range(a + 1, size):
            difference = (images[a] - images[b]).abs().amax(1)
            assert difference.amax((1, 2)).min() > 0.05, (a, b)  # a difference that is seen
            assert (difference > 0.02).sum((1, 2)).min() >= 8, (a, b)  # and not in a single pixel


def test_an_image_has_the_same_bits_in_any_batch():
    indices = torch.randint(len(FACES), (70,), generator=torch.Generator().manual_seed(1))
    x = FACES.images(indices)
    assert torch.equal(x, torch.cat([FACES.images(indices[n : n + 1]) for n in range(70)]))
    assert torch.equal(x.flip(0), FACES.images(indices.flip(0)))
    assert torch.equal(x, torch.cat([FACES.images(part) for part in indices.split(17)]))
    assert torch.equal(x, FacesLike().images(indices))
    assert x.min() >= 0 and x.max() <= 1 and x.is_contiguous()


def test_an_image_is_exactly_the_sum_of_its_palette():
    """In float64, one colour after the other: what the tables hold is so coarse that float32 rounds nothing."""
    indices = torch.randint(len(FACES), (20,), generator=torch.Generator().manual_seed(2))
    v, x = FACES.factors(indices), FACES.images(indices)
    tables = {portrait.HEAD: FACES._head, portrait.EYES: FACES._eyes, portrait.MOUTH: FACES._mouth}
    for row, image in zip(v.tolist(), x, strict=True):
        hue, skin, hair, style, width, yaw, smile, glasses, beard, light = row
        expected = torch.zeros(3, 64, 64, dtype=torch.float64)
        for names, rows, state in (
            (portrait.HEAD, (0, 64), style),
            (portrait.EYES, portrait.EYE_ROWS, glasses),
            (portrait.MOUTH, portrait.MOUTH_ROWS, smile * 3 + beard),
        ):
            planes = tables[names][(state * 4 + width) * 7 + yaw].double().unflatten(1, (-1, 64))
            part = expected[:, rows[0] : rows[1]]
            if names is not portrait.HEAD:
                part *= planes[0]
                planes = planes[1:]
            by_skin, by_hair, by_hue = FACES._palettes[names]
            for j, plane in enumerate(planes):
                colour = by_skin[skin, light, :, j] + by_hair[hair, light, :, j] + by_hue[hue, :, j]
                part += colour.double()[:, None, None] * plane
        assert torch.equal(image.double(), expected.clamp(0, 1))


def test_sums_stay_below_two():
    """Whence 24 bits hold every partial sum of 7 + 16 bits behind the point."""
    sides = torch.tensor([name.split("_")[-1] in ("left", "right") for name in portrait.HEAD])
    assert FACES._head.min() >= 0 and FACES._head[:, ~sides].sum(1).max() < 1.1 and FACES._head.max() <= 1
    for table in (FACES._eyes, FACES._mouth):
        assert table.min() >= 0 and (1.1 * table[:, 0] + table[:, 1:].sum(1)).max() < 1.2
    palettes = [c for colours in FACES._palettes.values() for c in colours]
    assert all(c.abs().max() <= 1 and torch.equal(c * 256, (c * 256).round()) for c in palettes)
    assert torch.equal(FACES._head * 256, (FACES._head * 256).round())
    assert torch.equal(FACES._eyes[:, 0] * 128, (FACES._eyes[:, 0] * 128).round())


def test_every_pixel_is_covered_once():
    """Weights add up to nearly 1, but for what the light takes away."""
    for names, table in ((portrait.HEAD, FACES._head), (portrait.EYES, FACES._eyes), (portrait.MOUTH, FACES._mouth)):
        names = names if names is portrait.HEAD else ("below", *names)
        sides = [n.split("_")[-1] in ("left", "right") for n in names]
        total = table[:, ~torch.tensor(sides)].sum(1)
        if names[0] == "background":  # which darkens towards the corners
            total = total[:, 26 * 64 + 32]
        assert total.min() > 0.88 and total.max() < 1.03, names[0]


def test_the_corner_shows_the_background_alone():
    v = contexts(200, 3)
    for hue in range(8):
        corner = draw(v, background_hue=hue)[:, :, 0, 0]
        assert torch.equal(corner, corner[:1].expand_as(corner))
        r, g, b = corner[0].tolist()
        assert 0.2 < colorsys.rgb_to_hsv(r, g, b)[1] < 0.6
    hues = [colorsys.rgb_to_hsv(*draw(v[:1], background_hue=h)[0, :, 0, 0].tolist())[0] for h in range(8)]
    assert hues == sorted(hues)


def test_tones_go_from_light_to_dark():
    v = contexts(50, 4)
    tones = [draw(v, hair_style=0, light=2, skin_tone=k)[:, :, 20:23, 29:35].mean() for k in range(6)]
    assert tones == sorted(tones, reverse=True) and tones[0] - tones[-1] > 0.4


def test_attributes_are_where_they_belong():
    v = contexts(60, 5)
    bright = draw(v, eyeglasses=0, skin_tone=0, hair_colour=0, light=2)[:, :, *EYE_BAND].mean((1, 2, 3))
    shaded = draw(v, eyeglasses=2, skin_tone=0, hair_colour=0, light=2)[:, :, *EYE_BAND].mean((1, 2, 3))
    assert (shaded < bright - 0.15).all()  # sunglasses are dark
    chin = draw(v, beard=2, skin_tone=0, hair_colour=0, yaw=3, smile=1)[:, :, *CHIN].mean((1, 2, 3))
    bare = draw(v, beard=1, skin_tone=0, hair_colour=0, yaw=3, smile=1)[:, :, *CHIN].mean((1, 2, 3))
    assert (chin < bare - 0.2).all()  # a full beard covers the chin, a moustache does not
    teeth = draw(v, smile=4, beard=0, yaw=3, skin_tone=4)[:, :, 44:50, 28:36].amin(1).amax((1, 2))
    shut = draw(v, smile=0, beard=0, yaw=3, skin_tone=4)[:, :, 44:50, 28:36].amin(1).amax((1, 2))
    assert (teeth > 0.8).all() and (shut < 0.6).all()
    left, right = draw(v, light=0, yaw=3, hair_style=0), draw(v, light=4, yaw=3, hair_style=0)
    cheek = slice(36, 40), slice(22, 25)
    assert (left[:, :, *cheek].mean((1, 2, 3)) > right[:, :, *cheek].mean((1, 2, 3)) + 0.02).all()


def test_features_turn_with_the_head_and_widen_with_the_face():
    v = contexts(40, 6)
    columns = torch.arange(64.0)

    def middle(**fixed):
        """The mean column of what sunglasses change."""
        change = (draw(v, eyeglasses=2, **fixed) - draw(v, eyeglasses=0, **fixed)).abs().sum((1, 2))
        mean = (change * columns).sum(1) / change.sum(1)
        return mean, ((columns - mean[:, None]) ** 2 * change).sum(1) / change.sum(1)

    turned = torch.stack([middle(yaw=k)[0] for k in range(7)])
    assert (turned.diff(dim=0) > 0.5).all()
    wide = torch.stack([middle(yaw=3, face_width=k)[1] for k in range(4)])
    assert (wide.diff(dim=0) > 0).all()


def test_a_root_is_refused(tmp_path):
    with pytest.raises(
        InputError, match="faces_like is drawn and takes no root; the photographs are the data set celeba"
    ):
        load("faces_like", root=tmp_path)


@pytest.mark.gpu
def test_a_gpu_draws_the_same_bits():
    indices = torch.randint(len(FACES), (333,), generator=torch.Generator().manual_seed(7))
    assert torch.equal(FacesLike(device="cuda").images(indices.cuda()).cpu(), FACES.images(indices))
