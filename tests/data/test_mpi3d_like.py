"""MPI3D-like: every factor shows and does what its name says, the object stays in the frame, batches change nothing."""

import itertools

import pytest
import torch

from vaecirc_fast.data import load, mpi3d_like
from vaecirc_fast.data.mpi3d import MPI3D
from vaecirc_fast.data.mpi3d_like import BACKGROUND_COLOURS, OBJECT_COLOURS, scene
from vaecirc_fast.errors import InputError
from vaecirc_fast.ops import render_scene

DATA = load("mpi3d_like")
GREEN, RED, SALMON = 1, 2, 2
SHAPES = ("cone", "cube", "cylinder", "hexagonal", "pyramid", "sphere")


def grid(**values):
    """Factors (n, 7) of all combinations of the values given; of the others the middle one, and a red object."""
    middle = dict(zip(DATA.factor_names, (RED, 1, 1, 1, 1, 12, 14), strict=True))
    columns = {name: torch.as_tensor(values.get(name, [k])).flatten() for name, k in middle.items()}
    assert not values.keys() - columns.keys()
    return torch.cartesian_prod(*columns.values())


def images(v):
    return DATA.images(DATA.index_of(v))


def drawn(n):
    """Random factors (n, 7), always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randint(size, (n,), generator=generator) for size in DATA.factor_sizes], 1)


def changed(x, y):
    """Pixels (n,) that differ by more than 4 of 255 levels in a channel."""
    return ((x - y).abs() > 4 / 255).any(1).flatten(1).sum(1)


def held(v):
    """Where the object is seen: images with it and without it differ (n, 64, 64)."""
    kind, *rest = scene(v)
    without = kind.clone()
    without[:, -1] = 0
    rest[1] = rest[1] * (without > 0)
    return (render_scene(kind, *scene(v)[1:]) != render_scene(without, *rest)).any(1)


def test_the_form_is_that_of_mpi3d():
    for field in ("shape", "factor_names", "factor_sizes", "complete", "likelihood"):
        assert getattr(DATA, field) == getattr(MPI3D, field)
    assert len(DATA) == 1_036_800 and not DATA.takes_root and DATA.name == "mpi3d_like"
    assert DATA.factors([1, 40, 1_036_799]).tolist() == [[0] * 6 + [1], [0] * 5 + [1, 0], [5, 5, 1, 2, 2, 39, 39]]


def test_a_root_is_refused(tmp_path):
    with pytest.raises(InputError, match="mpi3d_like is drawn and takes no root; .*'mpi3d'"):
        load("mpi3d_like", root=tmp_path)


@pytest.mark.parametrize("v", [[6, 0, 0, 0, 0, 0, 0], [0, 0, 0, 3, 0, 0, 0], [0] * 6 + [40], [0] * 6 + [-1], [0] * 6])
def test_factors_out_of_range_are_refused(v):
    with pytest.raises(InputError, match="v: "):
        DATA.index_of(torch.tensor([v]))


@pytest.mark.parametrize("indices", [[1_036_800], [-1], [0.5]])
def test_indices_out_of_range_are_refused(indices):
    with pytest.raises(InputError, match="indices: "):
        DATA.images(indices)


def test_the_tables_do_not_follow_the_default_device():
    with torch.device("meta"):
        tables = mpi3d_like._tables.__wrapped__(torch.device("cpu"))
    for name, table in mpi3d_like._tables(torch.device("cpu")).items():
        assert torch.equal(table, tables[name]) and table.dtype in (torch.float32, torch.int64)


def test_an_image_is_the_same_in_every_batch():
    indices = torch.randint(len(DATA), (70,), generator=torch.Generator().manual_seed(1))
    together = DATA.images(indices)
    assert together.dtype == torch.float32 and together.min() >= 0 and together.max() <= 1
    assert torch.equal(together[:10], torch.cat([DATA.images(i) for i in indices[:10].split(1)]))
    assert torch.equal(together, torch.cat([DATA.images(i) for i in indices.split(64)]))
    assert torch.equal(together.flip(0), DATA.images(indices.flip(0)))


# At least this many pixels change when the factor alone moves to any other value, of an axis to the next one.
LEAST = {
    "object_color": 15,
    "object_shape": 10,
    "object_size": 20,
    "camera_height": 500,
    "background_color": 1500,
    "horizontal_axis": 15,
    "vertical_axis": 10,
}


def visible(v, steps):
    """Checks LEAST for images of factors v, against those by `steps` on in a factor, of an axis by one."""
    x = images(v)
    for k, (name, size) in enumerate(zip(DATA.factor_names, DATA.factor_sizes, strict=True)):
        for step in [1] if size == 40 else [step for step in steps if step < size]:
            w = v.clone()
            w[:, k] = (v[:, k] + step) % size
            some = (w[:, k] > 0) | (size < 40)  # the ends of an axis are no neighbours
            least = int(changed(x[some], images(w[some])).min())
            assert least >= LEAST[name], (name, least)


def test_every_factor_is_visible():
    visible(drawn(100), steps=[1, 3])


@pytest.mark.deep
def test_every_change_of_every_factor_is_visible():
    corners = torch.tensor(list(itertools.product(*[(0, n - 2) if n == 40 else (0, n - 1) for n in DATA.factor_sizes])))
    visible(torch.cat([drawn(2000), corners]), steps=[1, 2, 3, 4, 5])


@pytest.mark.deep
def test_every_step_of_the_axes_is_visible():
    """For all other factors but the object's colour, which goes around."""
    for k, others in enumerate(itertools.product(range(6), range(2), range(3), range(3))):
        values = dict(zip(DATA.factor_names, (k % 6, *others), strict=False))
        x = images(grid(**values, horizontal_axis=range(40), vertical_axis=range(40))).unflatten(0, (40, 40))
        assert changed(x[1:].flatten(0, 1), x[:-1].flatten(0, 1)).min() >= LEAST["horizontal_axis"], others
        assert changed(x[:, 1:].flatten(0, 1), x[:, :-1].flatten(0, 1)).min() >= LEAST["vertical_axis"], others


@pytest.mark.parametrize("height", range(3))
def test_the_object_is_seen_and_within_the_frame(height):
    ends = torch.tensor([0, 39])
    for axes in ({"horizontal_axis": ends, "vertical_axis": range(40)}, {"vertical_axis": ends}):
        v = grid(object_shape=range(6), camera_height=height, **({"horizontal_axis": range(40)} | axes))
        mask = held(v)
        assert mask.flatten(1).sum(1).min() >= 60
        mask[:, 1:-1, 1:-1] = False
        assert not mask.any()


def middle_of(mask):
    """Row and column (n, 2) of the centre of the pixels of each mask."""
    weight = mask.flatten(1).double()
    places = torch.cartesian_prod(torch.arange(64.0), torch.arange(64.0)).double()
    return weight @ places / weight.sum(1, keepdim=True)


@pytest.mark.parametrize("height", range(3))
def test_the_axes_move_the_object(height):
    ball = {"camera_height": height, "object_shape": 5}
    row, _ = middle_of(held(grid(**ball, vertical_axis=range(40)))).unbind(1)
    assert (row[1:] < row[:-1]).all()  # rows are counted downwards
    _, column = middle_of(held(grid(**ball, horizontal_axis=range(40)))).unbind(1)
    assert (column[1:] > column[:-1]).all()
    assert column[0] < 15 and column[-1] > 48


def test_left_and_right_are_mirrored_silhouettes_under_another_light():
    v = grid(horizontal_axis=range(40), object_shape=[0, 5])  # those that look alike from all sides
    mask = held(v).unflatten(0, (2, 40))
    mirrored = mask.flip(1).flip(3)
    assert (mask != mirrored).flatten(2).sum(2).max() <= 6  # rays that graze
    assert changed(images(v), images(v).unflatten(0, (2, 40)).flip(1).flip(4).flatten(0, 1)).min() > 100


def test_a_large_object_covers_more_than_a_small_one():
    small, large = (
        held(grid(object_size=size, object_shape=range(6), horizontal_axis=range(0, 40, 3))).flatten(1).sum(1)
        for size in (0, 1)
    )
    assert (large > 1.5 * small).all()


def test_colours_are_those_of_their_names():
    v = grid(object_color=range(6), object_shape=range(6), background_color=SALMON)
    x, mask = images(v), held(v)
    for image, where, (colour, *_) in zip(x, mask, v.tolist(), strict=True):
        seen = torch.nn.functional.normalize(image[:, where].median(1).values, dim=0)
        known = torch.nn.functional.normalize(torch.tensor(OBJECT_COLOURS), dim=1)
        assert (known @ seen).argmax() == colour
    for k, colour in enumerate(BACKGROUND_COLOURS):
        corner = images(grid(background_color=k))[0, :, 0, 0]
        assert torch.allclose(corner / corner.max(), torch.tensor(colour) / max(colour), atol=1e-3)


def test_a_lower_camera_sees_a_flatter_table():
    x = images(grid(camera_height=range(3), background_color=SALMON))
    rim = (x[:, 0] - x[:, 2] > 0.3) & (x[:, 1] > 0.3)
    rows = rim.any(2).sum(1).tolist()
    assert rows[0] > 1.2 * rows[1] > 1.44 * rows[2]


def test_shapes_have_their_outlines():
    v = grid(object_shape=range(6), camera_height=2, horizontal_axis=20, vertical_axis=20)
    widths = dict(zip(SHAPES, held(v).sum(2).double(), strict=True))
    top, bottom = {}, {}
    for name, width in widths.items():
        rows = width[width > 0]
        top[name], bottom[name] = float(rows[:2].mean()), float(rows[-3:-1].mean())
    for name in ("cone", "pyramid"):
        assert top[name] < 0.4 * bottom[name]
    for name in ("cube", "cylinder", "hexagonal"):
        assert top[name] > 0.8 * bottom[name]
    assert top["sphere"] < 0.8 * widths["sphere"].max() and bottom["sphere"] < 0.8 * widths["sphere"].max()
