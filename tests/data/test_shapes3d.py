"""3D Shapes: files in the official format, whole and spoiled, in memory and read on demand."""

import builtins
import math
import re

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vaecirc_fast.data import load, memory, takes_root
from vaecirc_fast.data.shapes3d import OFFICIAL_FILE, Shapes3D
from vaecirc_fast.errors import InputError, MissingExtra

FULL = (10, 10, 10, 8, 4, 15)


class Small(Shapes3D):
    factor_sizes = (2, 3, 1, 2, 2, 3)


N = math.prod(Small.factor_sizes)
VALUES = [np.linspace(0, 0.9, 10)] * 3 + [np.linspace(0.75, 1.25, 8), np.arange(4.0), np.linspace(-30, 30, 15)]


def labels(sizes=Small.factor_sizes):
    """As the official file has them: the values of the factors, the last fastest."""
    return np.stack(
        [g.ravel() for g in np.meshgrid(*(v[:n] for v, n in zip(VALUES, sizes, strict=True)), indexing="ij")], 1
    )


def pixels():
    return np.random.default_rng(0).integers(0, 256, (N, 64, 64, 3), np.uint8)


def official(path, storage=None, **changed):
    """A file of that format at `path`; an array given as None is left out."""
    arrays = {"images": pixels(), "labels": labels()} | changed
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            if array is not None:
                file.create_dataset(key, data=array, **(storage or {}))
    return arrays["images"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("shapes3d") / OFFICIAL_FILE
    official(path)
    return path


def test_what_it_says_of_itself():
    assert Shapes3D.factor_sizes == FULL and math.prod(FULL) == 480_000
    assert Shapes3D.factor_names == ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
    assert takes_root("shapes3d") and Shapes3D.complete and Shapes3D.shape == (3, 64, 64)


@pytest.mark.parametrize("storage", [None, {"chunks": True, "compression": "gzip"}], ids=["plain", "gzip"])
@pytest.mark.parametrize("by_directory", [True, False])
@pytest.mark.parametrize("free", [math.inf, 0], ids=["in memory", "on demand"])
@pytest.mark.filterwarnings("ignore:shapes3d. 884.7 kB of images do not fit:UserWarning")
def test_the_official_file_is_read(tmp_path, monkeypatch, storage, by_directory, free):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    images = official(tmp_path / OFFICIAL_FILE, storage)
    data = Small(tmp_path if by_directory else str(tmp_path / OFFICIAL_FILE))
    assert len(data) == N == 72
    indices = [71, 3, 3, 0, 40, 3]
    x = data.images(indices)
    assert x.shape == (6, 3, 64, 64) and x.dtype == torch.float32 and x.is_contiguous()
    assert np.array_equal(x.numpy(), images[indices].transpose(0, 3, 1, 2).astype(np.float32) / 255)
    assert data.images(torch.empty(0, dtype=torch.int64)).shape == (0, 3, 64, 64)
    v = data.factors(range(N))
    for k, values in enumerate(VALUES):
        assert np.allclose(values[v[:, k]], labels()[:, k])
    assert torch.equal(data.index_of(v), torch.arange(N))
    a, _ = data.sample(9, torch.Generator().manual_seed(1))
    assert torch.equal(a, data.sample(9, torch.Generator().manual_seed(1))[0])


def test_too_little_memory_is_said(whole, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 884_735)
    with pytest.warns(
        UserWarning, match="884.7 kB of images do not fit into 884.7 kB of free memory; every batch is read from"
    ):
        data = Small(whole)
    assert data._images is None
    monkeypatch.setattr(memory, "free_bytes", lambda device: 884_736)
    assert Small(whole)._images is not None


def test_a_file_that_is_lost_while_it_is_read(whole, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    with pytest.warns(UserWarning):
        data = Small(whole)
    data._stored.file.close()
    with pytest.raises(InputError, match="root: expected .* to be the official file 3dshapes.h5"):
        data.images([0])


def edited(where, value):
    spoiled = labels()
    spoiled[where] = value
    return spoiled


SPOILED = {
    "no images": ({"images": None}, "no array 'images'; it holds 'labels'"),
    "no labels": ({"labels": None}, "no array 'labels'; it holds 'images'"),
    "nothing": ({"images": None, "labels": None}, "no array 'images'; it holds nothing"),
    "too few images": ({"images": pixels()[:-1]}, "images is uint8 (71, 64, 64, 3)"),
    "channels first": ({"images": pixels().transpose(0, 3, 1, 2)}, "images is uint8 (72, 3, 64, 64)"),
    "floats": ({"images": np.zeros((N, 64, 64, 3), np.float32)}, "images is float32 (72, 64, 64, 3)"),
    "a scalar": ({"images": np.uint8(3)}, "images is uint8 ()"),
    "five labels": ({"labels": labels()[:, :5]}, "labels is float64 (72, 5)"),
    "small labels": ({"labels": labels().astype(np.float32)}, "labels is float32 (72, 6)"),
    "words": ({"labels": np.full((N, 6), b"red")}, "labels is |S3 (72, 6)"),
    "not a number": ({"labels": edited((5, 3), np.nan)}, "labels[5]: scale is nan"),
    "one value more": ({"labels": edited((5, 3), 3.0)}, "labels: scale has 3 values, expected 2"),
    "swapped": (
        {"labels": edited((slice(None), 5), labels()[::-1, 5])},
        f"labels[0]: orientation is {-30 + 2 * 60 / 14:g}, expected -30: rows are to be in the order of the factors",
    ),
    "shuffled": (
        {"labels": np.random.default_rng(0).permutation(labels())},
        "rows are to be in the order of the factors",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_wrong_with_a_file_is_said(tmp_path, name):
    changed, found = SPOILED[name]
    path = tmp_path / OFFICIAL_FILE
    official(path, **changed)
    expected = (
        f"root: expected {path} to be the official file 3dshapes.h5 with images uint8 (72, 64, 64, 3) and labels "
    )
    with pytest.raises(InputError, match=re.escape(expected) + ".*found: .*" + re.escape(found)) as caught:
        Small(path)
    assert "\n" not in str(caught.value)


def test_the_sizes_of_the_whole_data_set_are_asked_for(whole):
    with pytest.raises(InputError, match=r"images uint8 \(480000, 64, 64, 3\) and labels float64 \(480000, 6\), found"):
        Shapes3D(whole)


def test_links_groups_and_arrays_elsewhere_are_refused(tmp_path, whole):
    path = tmp_path / OFFICIAL_FILE
    with h5py.File(path, "w") as file:
        file["images"] = h5py.ExternalLink(str(whole), "/images")
        file["labels"] = labels()
    with pytest.raises(InputError, match="no array 'images'; it holds"):
        Small(path)
    with h5py.File(path, "w") as file:
        file.create_group("images")
    with pytest.raises(InputError, match="no array 'images'"):
        Small(path)
    (tmp_path / "raw").write_bytes(bytes(N * 64 * 64 * 3))
    with h5py.File(path, "w") as file:
        file.create_dataset("images", (N, 64, 64, 3), np.uint8, external=str(tmp_path / "raw"))
    with pytest.raises(InputError, match="images lies in another file"):
        Small(path)
    with h5py.File(path, "w") as file:
        layout = h5py.VirtualLayout((N, 64, 64, 3), np.uint8)
        layout[:] = h5py.VirtualSource(str(whole), "images", (N, 64, 64, 3))
        file.create_virtual_dataset("images", layout)
    with pytest.raises(InputError, match="images lies in another file"):
        Small(path)


@pytest.mark.parametrize("text", [b"", b"no hdf5\n", b"\x89HDF\r\n\x1a\n"])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / OFFICIAL_FILE).write_bytes(text)
    with pytest.raises(InputError, match="to be the official file 3dshapes.h5"):
        Small(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    for root in (tmp_path, tmp_path / "nowhere.h5"):
        with pytest.raises(InputError, match=f"expected {root}.* to be the official file .*No such file"):
            Small(root)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_file_cut_anywhere_is_refused(whole, data):
    content = whole.read_bytes()
    end = data.draw(st.one_of(st.integers(0, 4096), st.integers(0, len(content) - 1)))
    path = whole.with_name("cut.h5")
    path.write_bytes(content[:end])
    with pytest.raises(InputError, match="to be the official file 3dshapes.h5"):
        Small(path)


def test_no_root_says_where_the_file_is():
    with pytest.raises(
        InputError, match="shapes3d: needs root, the file 3dshapes.h5 .*github.com.*stand-in shapes3d_like"
    ):
        load("shapes3d")


def test_without_h5py_the_extra_is_named(whole, monkeypatch):
    imported = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "h5py":
            raise ImportError("No module named 'h5py'")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtra, match=r"shapes3d needs h5py: pip install 'vaecirc-fast\[h5\]'"):
        Small(whole)
