"""The folder data set: classes and their order, what becomes of every kind of image, and files it refuses by name."""

import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import vaecirc_fast as vf
from vaecirc_fast.data import memory
from vaecirc_fast.data.folder import Folder
from vaecirc_fast.errors import InputError

SIDE = 16


def write(path, pixels, **options):
    """An image of the given pixels (H, W) or (H, W, C) at `path`; its folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=getattr(pixels, "dtype", np.uint8))).save(path, **options)
    return path


def flat(value, height=SIDE, width=SIDE):
    """One colour or grey value everywhere."""
    return np.full((height, width) + np.shape(value), value, dtype=np.uint8)


def corners(red=0, green=0, blue=0, white=0):
    """Four quadrants, top left red and so on, of SIDE pixels a side."""
    pixels = flat((0, 0, 0))
    half = SIDE // 2
    pixels[:half, :half, 0], pixels[:half, half:, 1], pixels[half:, :half, 2] = red, green, blue
    pixels[half:, half:] = white
    return pixels


def only(root, side=SIDE):
    """The one image of a folder: (C, side, side)."""
    data = Folder(root, side=side)
    assert len(data) == 1
    return data.images([0])[0]


def quadrants(x):
    """The middle of each quadrant of an image (C, H, W): (4, C), times 255."""
    q = x.shape[-1] // 4
    return torch.stack([x[:, r, c] for r in (q, 3 * q) for c in (q, 3 * q)]) * 255


# --- classes ---------------------------------------------------------------------------------------------------------


def test_subfolders_are_classes_in_the_order_of_their_names(tmp_path):
    for k, name in enumerate(["owl", "cat", "10", "9"]):
        for n in range(k + 1):
            write(tmp_path / name / f"{n}.png", flat(40 * k + n))
    data = vf.data.load("folder", root=tmp_path)
    assert isinstance(data, Folder) and data.class_names == ("10", "9", "cat", "owl")
    assert data.factor_names == ("class",) and data.factor_sizes == (4,) and not data.complete
    assert len(data) == 10 and data.shape == (1, 64, 64)
    assert data.factors(torch.arange(10))[:, 0].tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 3]
    x = data.images(torch.arange(10))
    assert x.shape == (10, 1, 64, 64) and x.dtype == torch.float32
    values = [80, 81, 82, 120, 121, 122, 123, 40, 41, 0]
    assert torch.equal(x, (torch.tensor(values) / 255)[:, None, None, None].expand_as(x))


def test_deeper_folders_belong_to_their_class(tmp_path):
    write(tmp_path / "a" / "z.png", flat(1))
    write(tmp_path / "a" / "deep" / "deeper" / "y.png", flat(2))
    write(tmp_path / "b" / "inner" / "x.png", flat(3))
    data = Folder(tmp_path, side=8)
    assert data.factors([0, 1, 2])[:, 0].tolist() == [0, 0, 1] and data.class_names == ("a", "b")
    assert (data.images([0, 1, 2])[:, 0, 0, 0] * 255).tolist() == pytest.approx([2, 1, 3])


def test_without_subfolders_there_is_one_class(tmp_path):
    write(tmp_path / "b.png", flat(7))
    write(tmp_path / "a.png", flat(9))
    data = vf.data.load("folder", root=str(tmp_path))
    assert data.factor_sizes == (1,) and data.class_names == (tmp_path.name,)
    assert (data.images([0, 1])[:, 0, 0, 0] * 255).tolist() == pytest.approx([9, 7])
    assert data.factors([0, 1]).tolist() == [[0], [0]]


def test_names_that_begin_with_a_dot_are_left_out(tmp_path):
    root = tmp_path / ".cache" / "pictures"  # a dot above the root is nothing to us
    write(root / "a" / "1.png", flat(1))
    write(root / "b" / "2.png", flat(2))
    write(root / ".thumbnails" / "3.png", flat(3))
    write(root / "a" / ".thumbnails" / "4.png", flat(4))
    write(root / "a" / "deep" / ".trash" / "5.png", flat(5))
    (root / "b" / "._2.png").write_bytes(b"a resource fork, no image")
    data = Folder(root)
    assert len(data) == 2 and data.class_names == ("a", "b")
    (tmp_path / "flat").mkdir()
    write(tmp_path / "flat" / "1.png", flat(1))
    write(tmp_path / "flat" / ".thumbnails" / "2.png", flat(2))
    assert len(Folder(tmp_path / "flat")) == 1


def test_other_files_are_left_out_and_any_case_of_a_suffix_is_read(tmp_path):
    (tmp_path / "labels.csv").write_text("a,b\n")
    (tmp_path / "folder.png").mkdir()  # a folder of that name, and a class
    for name in ("1.PNG", "2.Jpg", "3.jpeg", "4.bmp", "5.webp", "6.tif", "7.TIFF"):
        write(tmp_path / "folder.png" / name, flat((200, 100, 50)))
    (tmp_path / "folder.png" / "notes.txt").write_text("no image")
    data = Folder(tmp_path)
    assert len(data) == 7 and data.class_names == ("folder.png",)
    colour = data.images(range(7)).mean((2, 3)) * 255
    assert (colour - torch.tensor([200.0, 100, 50])).abs().max() < 3  # the lossy ones are near


def test_it_is_a_data_set_like_the_others(tmp_path):
    for n in range(5):
        write(tmp_path / f"{n}.png", flat(n))
    data = Folder(tmp_path, side=8)
    x, v = data.sample(50, torch.Generator().manual_seed(0))
    again, _ = data.sample(50, torch.Generator().manual_seed(0))
    assert x.shape == (50, 1, 8, 8) and v.shape == (50, 1) and torch.equal(x, again)
    assert 0 <= x.min() and x.max() <= 1 and len(x.unique()) == 5
    with pytest.raises(InputError, match="'folder' do not determine the image"):
        data.index_of(v)
    with pytest.raises(InputError, match="indices"):
        data.images([5])


# --- pixels ----------------------------------------------------------------------------------------------------------


def test_pixels_of_the_right_size_are_kept(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    write(tmp_path / "1.png", pixels)
    assert np.array_equal(only(tmp_path).numpy(), pixels.transpose(2, 0, 1).astype(np.float32) / 255)


def test_grey_images_have_one_channel_unless_one_has_colour(tmp_path):
    write(tmp_path / "1.png", flat(100))  # grey by its mode
    write(tmp_path / "2.png", flat((50, 50, 50)))  # grey by its pixels
    write(tmp_path / "3.jpg", flat((30, 30, 30)))
    grey = Folder(tmp_path, side=SIDE)
    assert grey.shape == (1, SIDE, SIDE)
    assert (grey.images([0, 1, 2]).mean((1, 2, 3)) * 255).tolist() == pytest.approx([100, 50, 30], abs=1)
    pixels = flat((50, 50, 50))
    pixels[3, 4, 1] = 51  # one pixel of one channel
    write(tmp_path / "4.png", pixels)
    colour = Folder(tmp_path, side=SIDE)
    assert colour.shape == (3, SIDE, SIDE) and colour.images([0]).shape == (1, 3, SIDE, SIDE)
    assert torch.equal(colour.images([0, 1])[:, :1], grey.images([0, 1]))
    assert torch.equal(colour.images([0])[:, 0], colour.images([0])[:, 2])


@pytest.mark.parametrize("wide", [True, False])
def test_of_an_oblong_the_middle_square_is_kept(tmp_path, wide):
    pixels = flat((255, 0, 0), 40, 100)
    pixels[:, 30:70] = 0, 0, 255
    write(tmp_path / "1.png", pixels if wide else pixels.transpose(1, 0, 2))
    x = only(tmp_path, side=8)
    assert (x[2] > 0.9).all() and (x[:2] < 0.1).all()  # the filter reaches over the cut


def test_small_images_are_enlarged_and_large_ones_are_averaged(tmp_path):
    write(tmp_path / "1.png", flat((9, 8, 7), 1, 1))
    assert torch.equal(only(tmp_path) * 255, torch.tensor([9.0, 8, 7])[:, None, None].expand(3, SIDE, SIDE))
    checks = np.indices((64, 64)).sum(0) % 2 * 200
    write(tmp_path / "1.png", checks.astype(np.uint8))
    assert (only(tmp_path, side=8) * 255 - 100).abs().max() <= 3  # no aliasing: every pixel is the mean


@pytest.mark.parametrize("orientation, expected", [(1, "rgbw"), (2, "grwb"), (3, "wbgr"), (6, "brwg"), (8, "gwrb")])
def test_the_camera_s_rotation_is_undone(tmp_path, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(tmp_path / "1.png", corners(255, 255, 255, 255), exif=exif)
    colour = {"r": (255, 0, 0), "g": (0, 255, 0), "b": (0, 0, 255), "w": (255, 255, 255)}
    assert quadrants(only(tmp_path)).tolist() == [list(colour[c]) for c in expected]


def test_transparency_is_dropped(tmp_path):
    pixels = np.concatenate([corners(200, 150, 100, 50), flat((0,))], 2)
    pixels[: SIDE // 2, :, 3] = 255
    write(tmp_path / "1.png", pixels)
    assert torch.equal(only(tmp_path) * 255, torch.from_numpy(pixels[..., :3]).permute(2, 0, 1).float())
    write(tmp_path / "1.png", np.stack([flat(77), flat(0)], 2))  # grey with transparency
    assert torch.equal(only(tmp_path) * 255, torch.full((1, SIDE, SIDE), 77.0))


def test_palettes_are_looked_up(tmp_path):
    pixels = corners(200, 150, 100, 50)
    for transparency in (None, 0, bytes([0, 128, 255])):
        image = Image.fromarray(pixels).quantize(8)
        options = {} if transparency is None else {"transparency": transparency}
        image.save(tmp_path / "1.png", **options)
        assert Image.open(tmp_path / "1.png").mode == "P"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            assert torch.equal(only(tmp_path) * 255, torch.from_numpy(pixels).permute(2, 0, 1).float())


@pytest.mark.parametrize("name", ["1.png", "1.tif"])
def test_sixteen_bits_are_read_at_their_range(tmp_path, name):
    values = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) * 257
    write(tmp_path / name, values)
    assert Image.open(tmp_path / name).mode.startswith("I")
    assert torch.equal(only(tmp_path)[0] * 255, torch.arange(256.0).view(SIDE, SIDE))


def test_black_and_white_is_read(tmp_path):
    pixels = np.indices((SIDE, SIDE)).sum(0) % 2 == 1
    Image.fromarray(pixels).save(tmp_path / "1.png")
    assert torch.equal(only(tmp_path)[0], torch.from_numpy(pixels).float())


def test_of_several_frames_the_first_is_read(tmp_path):
    frames = [Image.fromarray(flat(value)) for value in (10, 200)]
    frames[0].save(tmp_path / "1.tif", save_all=True, append_images=frames[1:])
    assert (only(tmp_path) * 255 == 10).all()


# --- refusals --------------------------------------------------------------------------------------------------------


def png_of_size(width, height):
    """A PNG whose header claims a size, with next to no data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def image_bytes(tmp_path, suffix, **options):
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return write(tmp_path / "elsewhere" / f"whole{suffix}", noise, **options).read_bytes()


SPOILED = {
    "text.png": lambda _: b"this is no image\n",
    "empty.jpg": lambda _: b"",
    "truncated.png": lambda tmp: image_bytes(tmp, ".png")[:-400],
    "truncated.jpg": lambda tmp: image_bytes(tmp, ".jpg")[:-400],
    "truncated.bmp": lambda tmp: image_bytes(tmp, ".bmp")[:-400],
    "truncated.webp": lambda tmp: image_bytes(tmp, ".webp")[:-400],
    "header_only.png": lambda tmp: image_bytes(tmp, ".png")[:40],
    "damaged.png": lambda tmp: image_bytes(tmp, ".png").replace(b"IDAT", b"IDAX"),
    "bomb.png": lambda _: png_of_size(60_000, 60_000),
}


@pytest.mark.parametrize("name", SPOILED)
def test_an_unreadable_file_is_named(tmp_path, name):
    write(tmp_path / "root" / "a" / "1.png", flat(1))
    file = tmp_path / "root" / "a" / name
    file.write_bytes(SPOILED[name](tmp_path))
    with pytest.raises(InputError, match=f"folder: .*{name} is not a readable image .*; repair or remove it") as caught:
        Folder(tmp_path / "root")
    assert caught.value.__cause__ is not None


def test_exif_that_the_decoder_stumbles_over_is_an_unreadable_file(tmp_path):
    """The width, a whole number, is given as text: turning the image upright then fails in a way of its own."""
    exif = Image.Exif()
    exif[0x0112], exif[0x0100] = 6, 7
    data = image_bytes(tmp_path, ".jpg", exif=exif)
    start = data.index(b"Exif") + 6
    order = "<" if data[start : start + 2] == b"II" else ">"
    entry = data.index(struct.pack(order + "H", 0x0100), start + 8)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "1.jpg").write_bytes(data[: entry + 2] + struct.pack(order + "H", 2) + data[entry + 4 :])
    with pytest.raises(InputError, match="1.jpg is not a readable image"):
        Folder(tmp_path / "root")


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_known_range_are_refused(tmp_path, dtype):
    write(tmp_path / "1.tif", np.ones((SIDE, SIDE), dtype=dtype))
    with pytest.raises(InputError, match="1.tif is not a readable image .32 bits a pixel, whose range is unknown"):
        Folder(tmp_path)


def test_a_class_without_images_is_named(tmp_path):
    write(tmp_path / "a" / "1.png", flat(1))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match=r"folder: .*b holds no image \(\.png, \.jpg"):
        Folder(tmp_path)


def test_an_image_beside_the_classes_is_named(tmp_path):
    write(tmp_path / "a" / "1.png", flat(1))
    write(tmp_path / "stray.png", flat(2))
    with pytest.raises(InputError, match="stray.png lies beside the classes"):
        Folder(tmp_path)


@pytest.mark.parametrize(
    "root, side, match",
    [
        (None, 64, "folder: needs root, the directory of images"),
        ("nowhere", 64, "nowhere is no directory"),
        ("file.png", 64, "file.png is no directory"),
        ("empty", 64, "empty holds no image"),
        ("full", 7, "side: expected at least 8 pixels, got 7"),
    ],
)
def test_bad_input_is_refused(tmp_path, root, side, match):
    write(tmp_path / "file.png", flat(1))
    write(tmp_path / "full" / "1.png", flat(1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=match):
        Folder(root and tmp_path / root, side=side)


def test_more_images_than_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    (tmp_path / "1.png").write_bytes(b"never read")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 24_575)
    with pytest.raises(
        InputError, match=r"folder \(1 images\) needs 24.6 kB of memory, of which 24.6 kB are free; use"
    ):
        Folder(tmp_path)


def test_load_needs_a_root():
    with pytest.raises(InputError, match="folder: needs root"):
        vf.data.load("folder")
