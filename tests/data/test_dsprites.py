"""dSprites: the redrawn images against official frames and a plain rasteriser; the loader on good and hostile files."""

import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import vaecirc_fast as vf
from vaecirc_fast.data.dsprites import OFFICIAL_FILE, DSprites
from vaecirc_fast.errors import InputError
from vaecirc_fast.reference.render_sprites import draw_sprites, sprite_centres, sprite_outlines

FRAMES = Path(__file__).parents[3] / "shared" / "data" / "dsprites_official_frames.npz"


@pytest.fixture(scope="module")
def drawn():
    return DSprites()


@pytest.fixture(params=["reference", "auto"])
def forced(request):
    """The reference of the drawing op, and the kernel that is chosen here; all of them are in tests/ops."""
    with vf.backend(request.param):
        yield


@pytest.mark.skipif(not FRAMES.exists(), reason="the official frames are not part of the repository")
def test_every_pixel_of_the_official_frames(drawn, forced):
    with np.load(FRAMES, allow_pickle=False) as frames:
        indices = drawn.index_of(torch.from_numpy(frames["factors"].astype(np.int64)))
        wrong = (drawn.images(indices)[:, 0].numpy() != frames["images"]).sum((1, 2))
    assert len(wrong) == 151
    assert wrong.sum() == 0


def plain_image(shape, scale, orientation, pos_x, pos_y):
    """One image, vertex by vertex and pixel by pixel, by counting the edges crossed left of the pixel's centre."""
    size, angle = 9.6 * (0.5 + 0.1 * scale), 2 * math.pi * orientation / 39
    count = (4, 100, 150)[shape]
    points = []
    for i in range(count):
        t = 2 * math.pi * i / count
        if shape == 0:
            u, v = ((1, 1), (-1, 1), (-1, -1), (1, -1))[i]
        elif shape == 1:
            u, v = 1.33 * math.cos(t), math.sin(t) / 1.33
        else:
            lobes = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            u, v = math.sin(t) ** 3, lobes / 14.5 + 0.15
        u, v = size * (u * math.cos(angle) - v * math.sin(angle)), size * (u * math.sin(angle) + v * math.cos(angle))
        x, y = 16 + 32 * pos_x / 31 + u, 16 + 32 * pos_y / 31 - v
        points.append((round(x * 256) / 256, round(y * 256) / 256))
    rows = cols = np.arange(64) + 0.5
    inside = np.zeros((64, 64), bool)
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        for r in np.flatnonzero((y0 <= rows) != (y1 <= rows)):
            inside[r] ^= x0 + (rows[r] - y0) * (x1 - x0) / (y1 - y0) <= cols
    return inside


def test_images_equal_a_plain_rasteriser(drawn, forced):
    generator = torch.Generator().manual_seed(3)
    x, v = drawn.sample(150, generator)
    expected = np.stack([plain_image(*row[1:]) for row in v.tolist()])
    assert np.array_equal(x[:, 0].numpy(), expected)


def test_geometry_tables():
    assert sprite_outlines().shape == (3, 6, 40, 150, 2)
    assert sprite_centres().tolist() == pytest.approx([16 + 32 * k / 31 for k in range(32)], abs=1e-12)


def test_pixel_centres_on_an_edge_belong_to_left_and_top():
    square = torch.tensor([[[2.0, 2], [-2, 2], [-2, -2], [2, -2]]], dtype=torch.float64)
    x = draw_sprites(square, torch.full((1, 2), 10.5, dtype=torch.float64))[0]
    expected = torch.zeros(64, 64)
    expected[8:12, 8:12] = 1
    assert torch.equal(x, expected)


def test_a_full_turn_changes_nothing(drawn):
    v = torch.cartesian_prod(*(torch.arange(n) for n in (1, 3, 6, 1, 32, 1)))
    w = v.clone()
    w[:, 3] = 39
    assert torch.equal(drawn.images(drawn.index_of(v)), drawn.images(drawn.index_of(w)))


class Small(DSprites):
    factor_sizes = (1, 3, 2, 4, 2, 3)


class Trap:
    """Raises when unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('the file was unpickled')",)


def official(path, **changed):
    n = math.prod(Small.factor_sizes)
    images = np.random.default_rng(0).integers(0, 2, (n, 64, 64), np.uint8)
    classes = np.stack(np.unravel_index(np.arange(n), Small.factor_sizes), 1).astype(np.int64)
    arrays = {"metadata": np.array(Trap(), object), "imgs": images, "latents_classes": classes} | changed
    np.savez_compressed(path, **{key: a for key, a in arrays.items() if a is not None})
    return images


@pytest.mark.parametrize("by_directory", [True, False])
def test_the_official_file_is_read(tmp_path, by_directory):
    images = official(tmp_path / OFFICIAL_FILE)
    data = Small(tmp_path if by_directory else str(tmp_path / OFFICIAL_FILE))
    x = data.images(torch.arange(len(data)))
    assert x.shape == (144, 1, 64, 64) and x.dtype == torch.float32
    assert np.array_equal(x[:, 0].numpy(), images)
    assert data.images([5, 5])[1].equal(x[5])


N = math.prod(Small.factor_sizes)


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"imgs": None}, "imgs.npy"),
        ({"latents_classes": None}, "latents_classes.npy"),
        ({"imgs": np.zeros((N - 1, 64, 64), np.uint8)}, r"imgs is uint8 \(143, 64, 64\)"),
        ({"imgs": np.zeros((N, 64, 64), np.float32)}, "imgs is float32"),
        ({"imgs": np.zeros((N, 64, 64), np.uint8, order="F")}, "Fortran"),
        ({"imgs": np.full((N, 64, 64), 255, np.uint8)}, "value 255"),
        ({"imgs": np.array([Trap()] * N, object)}, "imgs is object"),
        ({"latents_classes": np.array(Trap(), object)}, "latents_classes is object"),
        ({"latents_classes": np.zeros((N, 6), np.int64)}, "order of the factors"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, changed, found):
    path = tmp_path / OFFICIAL_FILE
    official(path, **changed)
    with pytest.raises(InputError, match=found) as caught:
        Small(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / OFFICIAL_FILE
    official(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(InputError, match=OFFICIAL_FILE):
        Small(tmp_path)


def rewrite(path, key, change):
    """Replaces the bytes of one array inside the file."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members[key] = change(members[key])
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda b: b[:-5000], "ends after 142 of 144"),
        (lambda b: b + b"\0", "more than 144"),
        (lambda b: b"\x80\x04" + b, "magic"),
        (lambda b: b[:40], "EOF"),
        (lambda b: b.replace(b"'descr'", b"'descr("), "found"),
        (lambda b: b.replace(b"{'descr'", b"(((((((("), "found"),
        (lambda b: b"", "EOF"),
    ],
)
def test_a_broken_array_is_refused(tmp_path, change, found):
    path = tmp_path / OFFICIAL_FILE
    official(path)
    rewrite(path, "imgs.npy", change)
    with pytest.raises(InputError, match=found):
        Small(tmp_path)


def test_flipped_bytes_are_noticed_by_the_checksum(tmp_path):
    path = tmp_path / OFFICIAL_FILE
    official(path)
    rewrite(path, "imgs.npy", lambda b: b)  # stored without compression: a flipped bit is valid content
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("imgs.npy").header_offset
    whole[start + 5000] ^= 1
    path.write_bytes(whole)
    with pytest.raises(InputError, match="CRC"):
        Small(tmp_path)


@pytest.mark.parametrize("root", ["absent", "."])
def test_a_missing_file_is_named(tmp_path, root):
    with pytest.raises(InputError, match="No such file"):
        Small(tmp_path / root)
