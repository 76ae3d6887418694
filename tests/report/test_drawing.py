"""Scales, ticks and PNGs of the figures."""

import base64
import io
import xml.etree.ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vaecirc_fast.metrics.statistics import Estimate
from vaecirc_fast.report import charts, pictures, svg


def decoded(address):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB"))


def test_png():
    rng = np.random.default_rng(0)
    grey, colour = (rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((5, 7), (4, 3, 3)))
    assert np.array_equal(decoded(svg.png(grey)), np.repeat(grey[..., None], 3, 2))
    assert np.array_equal(decoded(svg.png(colour)), colour)
    palette, indices = svg.sequential_palette(), grey % svg.SHADES
    assert np.array_equal(decoded(svg.png(indices, palette)), palette[indices])


def test_shades_grow_darker():
    palette = svg.sequential_palette().astype(float)
    light = palette @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) < 0).all() and tuple(palette[0]) == (255, 255, 255) and light[-1] < 60


@given(st.floats(-1e6, 1e6), st.floats(1e-9, 1e6), st.integers(2, 8))
def test_ticks_lie_on_the_axis_and_differ(low, span, count):
    scale = svg.Scale(low, low + span, 0, 100)
    if scale.high == scale.low:
        return
    ticks = scale.ticks(count)
    assert len(ticks) <= count + 1
    assert all(low - 1e-6 * span <= t <= low + span * (1 + 1e-6) for t in ticks)
    if span > 1e-6 * abs(low):
        assert len(set(svg.tick_labels(ticks))) == len(ticks)


@given(st.floats(1e-6, 1e6), st.floats(1.01, 1e6))
def test_logarithmic_ticks(low, ratio):
    scale = svg.Scale(low, low * ratio, 0, 100, log=True)
    assert all(-1e-6 <= scale(t) <= 100 + 1e-6 for t in scale.ticks(6))


@given(st.floats(1e-9, 1e9), st.integers(2, 6))
def test_rounded_up_holds_its_value(value, count):
    end = svg.rounded_up(value, count)
    assert value <= end * (1 + 1e-9) and end <= 4 * value


@given(st.lists(st.floats(0, 100), max_size=6))
def test_spread_keeps_order_and_distance(positions):
    moved = svg.spread(positions, 10, 0, 100)
    assert all(b - a >= 10 - 1e-9 for a, b in zip(sorted(moved), sorted(moved)[1:], strict=False))
    for a in range(len(positions)):
        for b in range(len(positions)):
            assert positions[a] >= positions[b] or moved[a] < moved[b]


def test_drawings_are_xml_and_escape_words():
    estimate, far = Estimate(0.5, 0.4, 0.6), Estimate(0.5, -90.0, 90.0)
    rows = [charts.Dots("a <b>", estimate, far, [0.4], "d & e"), charts.Dots("c", None, None, [])]
    drawings = [
        charts.dots(rows, "unit", "what"),
        charts.dots_key(),
        charts.curves([charts.Curve([0, 1], [1.0, 2.0], "#000", [0.9, 1.9], [1.1, 2.1], "x")], "x", "y", "w"),
        charts.curves([charts.Curve([1, 2], [5.0, 5000.0], "#000")], "x", "y", "w", log=True),
        charts.bars([charts.Bar("z", 0.5, 0.4, 0.6, True), charts.Bar("y", 0.0, None, None, False)], "y", "w", 1.0),
        pictures.image_rows(np.zeros((2, 3, 3, 8, 8), np.uint8), ["a", "b"], "w", heads=["1", "2", "3"]),
        pictures.maps(np.zeros((6, 8, 8)), list("abcdef"), [False] * 6, 1.0, "w"),
        pictures.shade_bar(1.0, [0.0, 1.0], ["0", "1"], "unit"),
    ]
    for drawing in drawings:
        root = xml.etree.ElementTree.fromstring(drawing)
        for element in root.iter():
            assert not any("nan" in str(value) or "inf" in str(value) for value in element.attrib.values())
    assert drawings[0].count("arrow") == 2  # the far interval, at both ends


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_keeps_the_pixels(channels):
    images = np.random.default_rng(1).integers(0, 256, (2, 3, channels, 8, 8), dtype=np.uint8)
    page = pictures.sheet(images)
    times = 5  # 8 pixels become 40
    side = 8 * times
    for r in range(2):
        for c in range(3):
            tile = page[r * side : (r + 1) * side : times, c * side : (c + 1) * side : times]
            assert np.array_equal(tile.reshape(8, 8, channels), images[r, c].transpose(1, 2, 0))
