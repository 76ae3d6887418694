"""Digits: the bundled scans, their labels, and the refusal of a root."""

import pytest
import torch
from sklearn.datasets import load_digits

from vaecirc_fast.data import load
from vaecirc_fast.errors import InputError


def test_the_scans_and_their_labels():
    data = load("digits")
    x, v = data.images(torch.arange(len(data))), data.factors(torch.arange(len(data)))
    bundled = load_digits()
    assert len(data) == 1797
    assert x.shape == (1797, 1, 8, 8) and x.dtype == torch.float32
    assert torch.equal(x[:, 0] * 16, torch.tensor(bundled.images).float())
    assert x.min() == 0 and x.max() == 1
    assert v.shape == (1797, 1) and v[:, 0].tolist() == bundled.target.tolist()


def test_a_root_is_refused(tmp_path):
    with pytest.raises(InputError, match="takes no root"):
        load("digits", root=tmp_path)


def test_the_digit_does_not_determine_the_image():
    with pytest.raises(InputError, match="do not determine"):
        load("digits").index_of(torch.zeros(1, 1, dtype=torch.int64))
