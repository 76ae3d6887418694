"""The interface every image data set shares: indices, factors, sampling and refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vaecirc_fast.data import load, names
from vaecirc_fast.errors import InputError

NEED_FILES = ("folder", "shapes3d", "mpi3d", "smallnorb", "celeba")  # have tests of their own
DATASETS = {name: load(name) for name in names() if name not in NEED_FILES}


@pytest.fixture(params=DATASETS)
def data(request):
    return DATASETS[request.param]


@given(st.lists(st.integers(0, 737_279), min_size=1, max_size=20))
def test_index_of_inverts_factors(indices):
    dsprites = DATASETS["dsprites"]
    v = dsprites.factors(indices)
    assert v.dtype == torch.int64
    assert ((v >= 0) & (v < torch.tensor(dsprites.factor_sizes))).all()
    assert dsprites.index_of(v).tolist() == indices


def test_the_last_factor_varies_fastest():
    assert DATASETS["dsprites"].factors([1, 32, 737_279]).tolist() == [
        [0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 1, 0],
        [0, 2, 5, 39, 31, 31],
    ]


def test_images_and_factors_by_index(data):
    x, v = data.images([3, 0, 3]), data.factors(torch.tensor([3, 0, 3], dtype=torch.int32))
    assert x.shape == (3, *data.shape) and x.dtype == torch.float32
    assert v.shape == (3, len(data.factor_names)) == (3, len(data.factor_sizes))
    assert torch.equal(x[0], x[2]) and not torch.equal(x[0], x[1])
    none = torch.empty(0, dtype=torch.int64)
    assert data.images(none).shape == (0, *data.shape) and data.factors(none).shape == (0, v.shape[1])


def test_samples_repeat_with_the_generator(data):
    x, v = data.sample(64, torch.Generator().manual_seed(1))
    again, w = data.sample(64, torch.Generator().manual_seed(1))
    assert x.shape == (64, *data.shape) and v.shape == (64, len(data.factor_sizes))
    assert torch.equal(x, again) and torch.equal(v, w)
    assert not torch.equal(v, data.sample(64, torch.Generator().manual_seed(2))[1])
    if data.complete:
        assert torch.equal(x, data.images(data.index_of(v)))


@pytest.mark.parametrize("n", [0, -1])
def test_an_empty_sample_is_refused(data, n):
    with pytest.raises(InputError, match=f"n: expected at least 1 image, got {n}"):
        data.sample(n)


@pytest.mark.parametrize(
    "indices",
    [[-1], [10**9], [0.0], [True], [1j], 3, [[0]]],
    ids=["negative", "too large", "float", "bool", "complex", "scalar", "matrix"],
)
def test_bad_indices_are_refused(data, indices):
    for read in (data.images, data.factors):
        with pytest.raises(InputError, match="indices"):
            read(indices)


@pytest.mark.parametrize(
    "v",
    [[0] * 6, [[0] * 5], [[0.0] * 6], [[False] * 6], [[0, 3, 0, 0, 0, 0]], [[0, 0, 0, 0, 0, -1]]],
    ids=["vector", "a factor short", "float", "bool", "too large", "negative"],
)
def test_bad_factors_are_refused(v):
    with pytest.raises(InputError, match="v: "):
        DATASETS["dsprites"].index_of(torch.tensor(v))


def test_an_unknown_name_lists_the_known():
    with pytest.raises(InputError, match="known: dsprites, .*digits"):
        load("mnist")
