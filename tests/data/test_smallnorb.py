"""SmallNORB: the six official files, and every damage of them as one error."""

import gzip
import itertools
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vaecirc_fast.data import load, memory
from vaecirc_fast.data.smallnorb import PARTS, SmallNORB
from vaecirc_fast.errors import InputError

TRAINING, TESTING = PARTS


class Small(SmallNORB):
    factor_sizes = (3, 2, 3, 2)
    parts = {TRAINING: (4, 7), TESTING: (0, 1)}


MAGIC = {np.dtype("u1"): 0x1E3D4C55, np.dtype("<i4"): 0x1E3D4C54, np.dtype("<f4"): 0x1E3D4C51}


def matrix(array, magic=None):
    """A file's bytes, by the description on the data set's page."""
    lengths = [*array.shape, 1, 1][: max(3, array.ndim)]
    head = struct.pack(f"<{2 + len(lengths)}i", magic or MAGIC[array.dtype], array.ndim, *lengths)
    return head + array.tobytes()


def content(kind: type[SmallNORB] = Small, side=96, seed=0):
    """Names and arrays of the files of a data set in a random order of rows, and its first images by label."""
    rng, arrays, first = np.random.default_rng(seed), {}, {}
    for part, instances in kind.parts.items():
        rows = np.array(list(itertools.product(*map(range, kind.factor_sizes), instances)), "<i4")
        rng.shuffle(rows)
        pixels = rng.integers(0, 256, (len(rows), 2, side, side), np.uint8)
        category, elevation, azimuth, lighting, instance = rows.T
        arrays[f"smallnorb-{part}-dat.mat"] = pixels
        arrays[f"smallnorb-{part}-cat.mat"] = category.copy()
        arrays[f"smallnorb-{part}-info.mat"] = np.stack([instance, elevation, 2 * azimuth, lighting], 1).astype("<i4")
        first |= {tuple(row): image[0] for row, image in zip(rows.tolist(), pixels, strict=True)}
    return arrays, first


ARRAYS, FIRST = content()
DAT, CAT, INFO = (f"smallnorb-{TRAINING}-{kind}.mat" for kind in ("dat", "cat", "info"))
N = 36 * 2  # images of a part


def official(root, arrays=ARRAYS, packed=False):
    for name, array in arrays.items():
        data = array if isinstance(array, bytes) else matrix(array)
        (root / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data, 1, mtime=0) if packed else data)
    return root


def test_the_real_sizes():
    assert math.prod(SmallNORB.factor_sizes) * 10 == 48_600 and not SmallNORB.complete
    assert sorted(PARTS[TRAINING] + PARTS[TESTING]) == list(range(10))


@pytest.mark.parametrize("packed", [False, True], ids=["mat", "mat.gz"])
def test_the_official_files_are_read(tmp_path, packed):
    data = Small(official(tmp_path, packed=packed))
    assert len(data) == 144
    x, v = data.images(torch.arange(144)), data.factors(torch.arange(144))
    assert x.shape == (144, 1, 64, 64) and x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
    rows = list(itertools.product(*map(range, Small.factor_sizes), (0, 1, 4, 7)))
    assert v.tolist() == [list(row[:4]) for row in rows]
    for image, row in zip(x, rows, strict=True):
        resized = Image.fromarray(FIRST[row]).resize((64, 64), Image.Resampling.LANCZOS)
        assert np.array_equal(image[0].numpy() * 255, np.asarray(resized))


def test_samples_have_all_instances_and_index_of_is_refused(tmp_path):
    data = Small(official(tmp_path))
    x, v = data.sample(200, torch.Generator().manual_seed(0))
    of_one = x[(v == torch.tensor([1, 1, 2, 0])).all(1)]
    assert 1 < len(of_one.unique(dim=0)) <= 4
    with pytest.raises(InputError, match="do not determine"):
        data.index_of(v)


def changed(name, change):
    array = ARRAYS[name].copy()
    change(array)
    return {**ARRAYS, name: array}


def put(where, value):
    def change(array):
        array[where] = value

    return change


def no_trucks(array):
    array[array == 2] = 1


@pytest.mark.parametrize(
    ("arrays", "name", "found"),
    [
        (changed(CAT, put(5, 3)), CAT, "category 3 in row 5, expected one of 0, 1, 2"),
        (changed(CAT, put(5, -1)), CAT, "category -1 in row 5"),
        (changed(CAT, no_trucks), CAT, r"no image of category 2 \(airplane\)"),
        (changed(INFO, put((3, 0), 0)), INFO, "instance 0 in row 3, expected one of 4, 7"),
        (changed(INFO, put((3, 1), 2)), INFO, "elevation 2 in row 3, expected one of 0, 1"),
        (changed(INFO, put((3, 2), 1)), INFO, "azimuth 1 in row 3, expected one of 0, 2, 4"),
        (changed(INFO, put((3, 2), 36)), INFO, "azimuth 36 in row 3"),
        (changed(INFO, put((3, 3), 2**31 - 1)), INFO, "lighting 2147483647 in row 3"),
        (changed(INFO, put((slice(None), 3), 1)), INFO, "no image of lighting 0"),
    ],
)
def test_wrong_labels_are_refused(tmp_path, arrays, name, found):
    official(tmp_path, arrays)
    with pytest.raises(InputError, match=found) as caught:
        Small(tmp_path)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_labels_that_occur_twice_are_refused(tmp_path):
    first, second = np.flatnonzero(ARRAYS[CAT] == 1)[:2]
    official(tmp_path, changed(INFO, put(first, ARRAYS[INFO][second])))
    with pytest.raises(InputError, match=rf"{CAT} and .*-info.mat have the labels of row {first} more than once"):
        Small(tmp_path)


def test_parts_that_were_exchanged_are_refused(tmp_path):
    exchange = {TRAINING: TESTING, TESTING: TRAINING}
    parts = [(name, part) for name in ARRAYS for part in PARTS if part in name]
    official(tmp_path, {name.replace(part, exchange[part]): ARRAYS[name] for name, part in parts})
    with pytest.raises(InputError, match=f"{TRAINING}-info.mat has instance [01] in row 0, expected one of 4, 7"):
        Small(tmp_path)


SIZE = 24 + N * 2 * 96 * 96


@pytest.mark.parametrize("packed", [False, True], ids=["mat", "mat.gz"])
@pytest.mark.parametrize(
    ("name", "data", "found"),
    [
        (DAT, matrix(ARRAYS[DAT], MAGIC[np.dtype("<i4")]), r"found the magic number 0x1e3d4c54 \(int32\)"),
        (DAT, matrix(ARRAYS[DAT])[:24][::-1], r"found the magic number 0x.* \(of no format\)"),
        (DAT, matrix(ARRAYS[DAT][1:]), rf"found 4 axes of lengths \({N - 1}, 2, 96, 96\)"),
        (DAT, matrix(ARRAYS[DAT][:, 0]), rf"found 3 axes of lengths \({N}, 96, 96, "),
        (DAT, matrix(ARRAYS[DAT])[:-1], rf"found {SIZE - 1:,} bytes|an end before that"),
        (DAT, matrix(ARRAYS[DAT]) + b"\0", rf"found {SIZE + 1:,} bytes|more than that"),
        (DAT, b"", "an end before that"),
        (DAT, b"\x80\x04cposix\nsystem\n", "magic number"),
        (CAT, matrix(ARRAYS[CAT].astype("<f4")), r"0x1e3d4c51 \(float32\)"),
        (CAT, matrix(ARRAYS[CAT][:, None]), rf"found 2 axes of lengths \({N}, 1, 1\)"),
        (INFO, matrix(ARRAYS[INFO].T.copy()), rf"found 2 axes of lengths \(4, {N}, 1\)"),
        (INFO, matrix(ARRAYS[INFO])[:-4], "bytes|an end"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, name, data, found, packed):
    official(tmp_path, {**ARRAYS, name: data}, packed)
    with pytest.raises(InputError, match=found) as caught:
        Small(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"root: expected {tmp_path / name}") and "\n" not in message
    if name == DAT:
        assert f"uint8 ({N}, 2, 96, 96) with the magic number 0x1e3d4c55, {SIZE:,} bytes" in message


@pytest.mark.parametrize("name", ARRAYS)
def test_a_missing_file_is_named(tmp_path, name):
    official(tmp_path, {key: array for key, array in ARRAYS.items() if key != name})
    with pytest.raises(InputError, match=rf"{tmp_path} lacks {name} \(or {name}.gz\), of [\d,]+ bytes; .*https"):
        Small(tmp_path)


def test_a_root_is_needed(tmp_path):
    with pytest.raises(InputError, match=rf"smallnorb: needs root, .*{DAT}.*https.*norb_like"):
        load("smallnorb")
    with pytest.raises(InputError, match="to be the directory of"):
        Small(tmp_path / "absent")


def test_memory_is_checked_before(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device="cpu": 144 * 64 * 64 - 1)
    with pytest.raises(InputError, match="smallnorb needs 589.8 kB of memory, of which 589.8 kB are free"):
        Small(official(tmp_path))


class Tiny(SmallNORB):
    """Two images of 2 x 2 pixels."""

    factor_sizes = (1, 1, 1, 1)
    parts = {TRAINING: (4,), TESTING: (0,)}
    raw_side = 2


TINY, _ = content(Tiny, side=2)
FILES = {name: matrix(array) for name, array in TINY.items()}
PACKED = {f"{name}.gz": gzip.compress(data, 6, mtime=0) for name, data in FILES.items()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Loads the tiny set with other bytes in one file."""
    roots = {}
    for files in (FILES, PACKED):
        root = tmp_path_factory.mktemp("tiny")
        for name, data in files.items():
            (root / name).write_bytes(data)
            roots[name] = root

    def tiny(name, data):
        path = roots[name] / name
        path.write_bytes(data)
        try:
            return Tiny(roots[name]).images([0, 1])
        finally:
            path.write_bytes((FILES | PACKED)[name])

    tiny.right = Tiny(roots[next(iter(FILES))]).images([0, 1])  # pyright: ignore[reportFunctionMemberAccess]
    return tiny


@pytest.mark.parametrize("name", [*FILES, *PACKED])
def test_truncated_at_any_byte(tiny, name):
    data = (FILES | PACKED)[name]
    for length in range(len(data)):
        with pytest.raises(InputError, match=name.removesuffix(".gz")):
            tiny(name, data[:length])


@pytest.mark.parametrize("name", [*FILES, *PACKED])
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_changed_byte(tiny, name, data):
    right = (FILES | PACKED)[name]
    head = len(right) if name.endswith(".gz") or "-dat" not in name else 24  # pixels have no checksum unless packed
    changed = bytearray(right)
    changed[data.draw(st.integers(0, head - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = tiny(name, bytes(changed))
    except InputError as error:
        assert name.removesuffix(".gz") in str(error) and "\n" not in str(error)
    else:
        assert torch.equal(found, tiny.right)
