"""Partitions of outputs: what holds for each, the ready-made ones against loops, and bad input."""

import itertools

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import partition

from vaecirc_fast import groups
from vaecirc_fast.errors import InputError


def check(g):
    """labels, order, offsets and sizes say the same; every group has a name and an element."""
    assert g.labels.dtype == g.order.dtype == g.offsets.dtype == torch.int32
    assert all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in (g.labels, g.order, g.offsets))
    count = len(g)
    assert g.offsets.tolist()[0] == 0 and len(g.offsets) == count + 1
    assert g.sizes.tolist() == [int((g.labels == group).sum()) for group in range(count)]
    assert int(g.sizes.min()) > 0 and g.sizes.dtype == torch.int64
    for group, (start, stop) in enumerate(itertools.pairwise(g.offsets.tolist())):
        assert g.order[start:stop].tolist() == (g.labels == group).nonzero().flatten().tolist()
    assert len(g.order) == int((g.labels >= 0).sum()) and int(g.labels.min()) >= -1
    assert len(g.names) == count and all(isinstance(name, str) for name in g.names)
    assert int(numpy.prod(g.shape)) == count and isinstance(g.shape, tuple)


@given(partition())
def test_every_partition_is_consistent(g):
    check(g)


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=40))
def test_labels_are_kept_or_refused(labels):
    present = {label for label in labels if label >= 0}
    if present != set(range(len(present))) or not present:
        with pytest.raises(InputError, match="^labels: "):
            groups.from_labels(labels)
        return
    g = groups.from_labels(labels)
    check(g)
    assert g.labels.tolist() == labels
    assert g.names == tuple(f"group {n}" for n in range(len(present))) and g.shape == (len(present),)


def test_labels_of_any_kind():
    expected = [0, -1, 1, 1, 0]
    wide = torch.tensor([[label, 9] for label in expected])
    kinds = [expected, tuple(expected), numpy.array(expected), torch.tensor(expected, dtype=torch.int8), wide[:, 0]]
    for labels in [*kinds, torch.tensor(expected, dtype=torch.int32)]:
        g = groups.from_labels(labels)
        check(g)
        assert g.labels.tolist() == expected
    assert groups.from_labels(torch.zeros(1, dtype=torch.int64).expand(7)).sizes.tolist() == [7]


def test_a_partition_does_not_follow_its_source():
    for dtype in (torch.int32, torch.int64):
        labels = torch.tensor([0, 1], dtype=dtype)
        g = groups.from_labels(labels)
        labels[0] = 1
        assert g.labels.tolist() == [0, 1]


def test_names_and_shape():
    g = groups.from_labels([0, 1, 2, 3], names=["a", "b", "c", "d"], shape=(2, 2))
    check(g)
    assert g.names == ("a", "b", "c", "d") and g.shape == (2, 2)


@given(st.integers(1, 500))
def test_whole(elements):
    g = groups.whole(elements)
    check(g)
    same = groups.from_labels([0] * elements)
    assert all(torch.equal(getattr(g, name), getattr(same, name)) for name in ("labels", "order", "offsets"))
    assert g.names == ("output",) and g.shape == (1,)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(1, 3))
def test_cells(height, width, cell, count):
    g = groups.cells(height, width, cell, count)
    check(g)
    rows, columns = -(-height // cell), -(-width // cell)
    assert g.shape == (rows, columns)
    labels = g.labels.view(count, height, width)
    for c, y, x in itertools.product(range(count), range(height), range(width)):
        assert g.names[labels[c, y, x]] == f"cell {y // cell},{x // cell}"
        assert labels[c, y, x] == y // cell * columns + x // cell


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
def test_mosaic(height, width, rows, columns, count):
    g = groups.mosaic(height, width, rows, columns, count)
    check(g)
    assert g.shape == (min(rows, height), min(columns, width))
    sizes = {int(size) for size in (g.labels.view(count, height, width)[0, :, 0] // g.shape[1]).bincount()}
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(groups.mosaic(64, 64).labels, groups.cells(64, 64, 8).labels)


def test_channels():
    g = groups.channels(3, 2, 4)
    check(g)
    assert g.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert g.names == ("channel 0", "channel 1", "channel 2")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_spans(sizes):
    names = [f"column {n}" for n in range(len(sizes))]
    g = groups.spans(sizes, names)
    check(g)
    assert g.labels.tolist() == [n for n, size in enumerate(sizes) for _ in range(size)]
    assert g.names == tuple(names) and g.sizes.tolist() == sizes


def test_moving_to_where_it_is_copies_nothing():
    g = groups.whole(3)
    assert g.to("cpu") is g and g.to(torch.device("cpu")) is g
    there = g.to("meta")
    assert {there.labels.device.type, there.order.device.type, there.offsets.device.type} == {"meta"}
    assert there.names == g.names and there.shape == g.shape


def test_a_partition_is_itself_and_does_not_change():
    g = groups.whole(3)
    assert g == g and g != groups.whole(3) and len({g, groups.whole(3)}) == 2  # by identity, as tensors are
    with pytest.raises(AttributeError):
        g.names = ("other",)


BAD = {
    "floats": (lambda: groups.from_labels([0.0, 1.0]), r"^labels: expected integers of shape \(P,\)"),
    "truth values": (lambda: groups.from_labels([True, False]), r"^labels: expected integers of shape \(P,\)"),
    "complex": (lambda: groups.from_labels(torch.zeros(2, dtype=torch.complex64)), r"^labels: expected integers"),
    "words": (lambda: groups.from_labels(["a", "b"]), r"^labels: expected integers"),
    "none": (lambda: groups.from_labels([]), r"^labels: expected integers of shape \(P,\), P > 0"),
    "two axes": (lambda: groups.from_labels([[0, 1]]), r"P > 0, got torch.int64 \(1, 2\)$"),
    "below -1": (lambda: groups.from_labels([0, -2]), r"^labels: expected groups 0..G-1, or -1"),
    "all left out": (lambda: groups.from_labels([-1, -1]), r"^labels: expected groups 0..G-1, or -1"),
    "a gap": (lambda: groups.from_labels([0, 2]), r"^labels: group 1 of 0..2 has no element$"),
    "names": (lambda: groups.from_labels([0, 1], ["a"]), r"^names: expected 2, one a group, got 1$"),
    "shape": (lambda: groups.from_labels([0, 1, 2], shape=(2, 2)), r"^shape: .* the 3 groups, got \(2, 2\)$"),
    "empty shape": (lambda: groups.from_labels([0, 1], shape=()), r"^shape: .* the 2 groups, got \(\)$"),
    "whole of none": (lambda: groups.whole(0), r"^whole: expected at least one element, got 0$"),
    "cells of none": (lambda: groups.cells(4, 4, 0), r"^cells: sizes must be positive, got 4 x 4, cell 0, channels 1$"),
    "no channels": (lambda: groups.channels(0, 2, 2), r"^channels: sizes must be positive, got 0 of 2 x 2$"),
    "no spans": (lambda: groups.spans([]), r"^spans: sizes must be positive, got \[\]$"),
    "an empty span": (lambda: groups.spans([2, 0]), r"^spans: sizes must be positive, got \[2, 0\]$"),
    "names of spans": (lambda: groups.spans([2, 1], ["a"]), r"^names: expected 2, one a group, got 1$"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name):
    call, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_members_by_name():
    found = groups.members({"b": [3, 0], "a": [1, 2]}, 4)
    assert found.names == ("b", "a") and found.labels.tolist() == [0, 1, 1, 0]
    some = groups.members({"a": [1, 2]}, 4, leave_out=True)
    assert some.labels.tolist() == [-1, 0, 0, -1]


@pytest.mark.parametrize(
    ("given", "elements", "message"),
    [
        ({"a": [0, 1], "b": [1, 2]}, 3, "group 'b' has element 1 and so has 'a'; groups must not overlap"),
        ({"a": [0, 0, 1]}, 2, "group 'a' has element 0 twice"),
        ({"a": [0], "b": [2]}, 4, "element 1 and 1 more are in no group; leave_out=True"),
        ({"a": [0, 4]}, 4, "group 'a' has element 4, expected integers of 0..3"),
        ({"a": [-1]}, 4, "group 'a' has element -1"),
        ({"a": [0.5]}, 4, "group 'a' has element 0.5"),
        ({"a": [0, 1], "b": []}, 2, "group 'b' is empty"),
        ({}, 2, "at least one group"),
    ],
)
def test_members_that_do_not_fit(given, elements, message):
    with pytest.raises(InputError, match=message):
        groups.members(given, elements)
