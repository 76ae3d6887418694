"""MPI3D: the official archive, mapped or unpacked, and every damage of it as one error."""

import io
import math
import re
import warnings
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vaecirc_fast.data import load, memory
from vaecirc_fast.data.mpi3d import MPI3D, OFFICIAL_FILES
from vaecirc_fast.errors import InputError

TOY = OFFICIAL_FILES[0]


class Small(MPI3D):
    factor_sizes = (2, 2, 1, 1, 1, 3, 2)


class Trap:
    """Raises when unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('the file was unpickled')",)


N = math.prod(Small.factor_sizes)
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 64, 64, 3), np.uint8)


def official(path, images=PIXELS, key="images", save=np.savez):
    save(path, **{key: images})
    return path


def test_the_real_sizes():
    assert math.prod(MPI3D.factor_sizes) == 1_036_800 and len(MPI3D.factor_names) == 7 and MPI3D.complete


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
@pytest.mark.parametrize("file", OFFICIAL_FILES)
def test_the_official_file_is_read(tmp_path, file, save):
    official(tmp_path / file, save=save)
    for root in (tmp_path, str(tmp_path / file)):
        data = Small(root)
        x = data.images(torch.arange(N))
        assert x.shape == (N, 3, 64, 64) and x.dtype == torch.float32 and x.is_contiguous()
        assert torch.equal(x, torch.from_numpy(PIXELS).movedim(3, 1) / 255)
        assert isinstance(data._images, np.memmap) == (save is np.savez)
        assert torch.equal(data.images([5, 5, 0])[1], x[5])
    assert data.factors([1, 2, N - 1]).tolist() == [[0] * 6 + [1], [0] * 5 + [1, 0], [1, 1, 0, 0, 0, 2, 1]]


def test_images_cannot_be_changed_by_changing_a_batch(tmp_path):
    data = Small(official(tmp_path / TOY))
    data.images([3]).zero_()
    assert torch.equal(data.images([3])[0], torch.from_numpy(PIXELS[3]).movedim(2, 0) / 255)


def test_contents_tell_files_apart(tmp_path):
    found = {
        Small(official(tmp_path / name, images, save=save)).contents
        for name, images, save in [
            ("mpi3d_toy.npz", PIXELS, np.savez),
            ("mpi3d_real.npz", PIXELS ^ 1, np.savez),
            ("a.npz", PIXELS, np.savez_compressed),
        ]
    }
    assert len(found) == 2


def test_a_header_that_python_2_wrote(tmp_path):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({N}L, 64L, 64L, 3L), }}"
    header = (header + " " * (117 - len(header)) + "\n").encode()
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + PIXELS.tobytes()
    with zipfile.ZipFile(tmp_path / TOY, "w") as archive:
        archive.writestr("images.npy", content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = Small(tmp_path).images([7])
    assert torch.equal(x[0], torch.from_numpy(PIXELS[7]).movedim(2, 0) / 255)


@pytest.mark.parametrize(
    ("images", "key", "found"),
    [
        (PIXELS, "imgs", "no item named 'images.npy'"),
        (PIXELS[:-1], "images", r"images is uint8 \(23, 64, 64, 3\)"),
        (PIXELS.reshape(2, 12, 64, 64, 3), "images", r"images is uint8 \(2, 12, 64, 64, 3\)"),
        (PIXELS.astype(np.float32), "images", "images is float32"),
        (PIXELS.view(np.int8), "images", "images is int8"),
        (np.asfortranarray(PIXELS), "images", "Fortran order"),
        (np.array([Trap()] * N, object), "images", "images is object"),
    ],
    ids=["key", "one short", "shaped by factors", "float", "signed", "Fortran", "pickled"],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
def test_a_wrong_array_is_refused(tmp_path, images, key, found, save):
    path = official(tmp_path / TOY, images, key, save)
    with pytest.raises(InputError, match=found) as caught:
        Small(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"root: expected {path} to be") and "\n" not in message
    assert f"images uint8 ({N}, 64, 64, 3)" in message and f"{path.stat().st_size:,} bytes" in message


def test_a_flipped_pixel_is_noticed(tmp_path):
    path = official(tmp_path / TOY)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="CRC"):
        Small(tmp_path)


def test_a_compressed_file_that_memory_cannot_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device="cpu": N * 64 * 64 * 3 - 1)
    Small(official(tmp_path / TOY))  # mapped: needs none
    path = official(tmp_path / TOY, save=np.savez_compressed)
    message = f"{path}, which is compressed, needs 294.9 kB of memory, of which 294.9 kB are free; free some, or store"
    with pytest.raises(InputError, match=re.escape(message)):
        Small(tmp_path)


def test_a_root_is_needed():
    with pytest.raises(InputError, match=r"mpi3d: needs root, .*mpi3d_real.npz.*https.*mpi3d_like"):
        load("mpi3d")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"mpi3d_real.npz.*found no file"):
        Small(tmp_path / "mpi3d_real.npz")
    with pytest.raises(InputError, match="holds none of mpi3d_toy.npz, "):
        Small(tmp_path)
    (tmp_path / TOY).mkdir()
    with pytest.raises(InputError, match="directory"):
        Small(tmp_path)


def test_of_two_official_files_one_must_be_chosen(tmp_path):
    for name in OFFICIAL_FILES[1:]:
        official(tmp_path / name)
    with pytest.raises(InputError, match="holds mpi3d_realistic.npz and mpi3d_real.npz; pass the path"):
        Small(tmp_path)
    assert len(Small(tmp_path / OFFICIAL_FILES[1])) == N


class Tiny(MPI3D):
    factor_sizes = (1, 1, 1, 1, 1, 1, 1)


def archive_of(save):
    file = io.BytesIO()
    save(file, images=PIXELS[:1])
    return file.getvalue()


ARCHIVES = [archive_of(np.savez), archive_of(np.savez_compressed)]
HEAD = 300  # bytes of the archive's and the array's header; the directory at the end is shorter


def loads_or_refuses(path, content):
    path.write_bytes(content)
    try:
        data = Tiny(path)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    assert torch.equal(data.images([0])[0], torch.from_numpy(PIXELS[0]).movedim(2, 0) / 255)


@given(st.sampled_from(ARCHIVES), st.floats(0, 1, exclude_max=True))
@example(ARCHIVES[0], 0.0)
@settings(max_examples=60, deadline=None)
def test_truncated_anywhere(tmp_path_factory, archive, where):
    path = tmp_path_factory.getbasetemp() / "truncated.npz"
    path.write_bytes(archive[: int(where * len(archive))])
    with pytest.raises(InputError, match="truncated.npz"):
        Tiny(path)


@given(st.sampled_from(ARCHIVES), st.integers(-HEAD, HEAD - 1), st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_any_changed_byte_of_the_headers(tmp_path_factory, archive, at, change):
    content = bytearray(archive)
    content[at] ^= change
    loads_or_refuses(tmp_path_factory.getbasetemp() / "changed.npz", bytes(content))


@pytest.mark.deep
@pytest.mark.parametrize("archive", ARCHIVES, ids=["stored", "compressed"])
def test_every_changed_byte_of_the_headers(tmp_path, archive):
    for at in range(-HEAD, HEAD):
        for change in (*(1 << k for k in range(8)), 255):
            content = bytearray(archive)
            content[at] ^= change
            loads_or_refuses(tmp_path / "changed.npz", bytes(content))
