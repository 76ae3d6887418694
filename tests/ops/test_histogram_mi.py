"""The op histogram_mi on every backend: scikit-learn's information, binning, resamples, closed forms and bad input."""

import math
import warnings

import numpy as np
import pytest
import torch
from backends import CPP, one_of_each, parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

import vaecirc_fast as vf
from vaecirc_fast import _native
from vaecirc_fast.errors import InputError
from vaecirc_fast.ops.histogram_mi import cut

OP = torch.ops.vaecirc_fast.histogram_mi.default
OP_CUT = torch.ops.vaecirc_fast.histogram_cut.default
CLOSE = 1e-12  # nats: what the row promises


def problem(n=200, latents=4, sizes=(3, 7, 2), seed=0):
    """Codes that know something of the factors, and factors."""
    g = torch.Generator().manual_seed(seed)
    levels = torch.stack([torch.randint(0, size, (n,), generator=g) for size in sizes], 1)
    codes = torch.randn(n, latents, generator=g, dtype=torch.float64)
    codes += levels[:, torch.arange(latents) % len(sizes)] * 0.7
    return codes, levels


def naive_cut(codes, bins):
    """disentanglement_lib's: np.digitize on np.histogram's edges; a constant code is all in the first bin."""
    columns = []
    for z in codes.double().numpy().T:
        constant = z.min() == z.max()
        columns.append(0 * z.astype(int) if constant else np.digitize(z, np.histogram(z, bins)[1][:-1]) - 1)
    return np.stack(columns, 1)


def naive(binned, levels):
    """The double loop over sklearn's mutual_info_score: I(code; level), and entropies as I(x; x)."""
    information = [[mutual_info_score(v, z) for v in levels.T] for z in binned.T]
    own = [[mutual_info_score(x, x) for x in columns.T] for columns in (binned, levels)]
    between = [[mutual_info_score(a, b) for b in binned.T] for a in binned.T]
    return information, *own, between


def check(result, expected):
    for got, truth in zip(result, expected, strict=True):
        assert np.abs(got.cpu().numpy() - np.array(truth)).max() <= CLOSE


@settings(max_examples=20)
@given(
    n=st.integers(1, 300),
    latents=st.integers(1, 5),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    bins=st.integers(1, 30),
    seed=st.integers(0, 99),
    rounded=st.booleans(),
    narrow=st.booleans(),
)
def test_scikit_learn(backend, n, latents, sizes, bins, seed, rounded, narrow):
    codes, levels = problem(n, latents, sizes, seed)
    codes = codes.round() if rounded else codes  # whole numbers fall on bin edges
    codes = codes.float() if narrow else codes
    result = vf.ops.histogram_mi(codes.to(backend.device), levels.to(backend.device), bins, pairs=True)
    binned = naive_cut(codes, bins)
    assert np.array_equal(cut(codes.to(backend.device), bins).cpu().numpy(), binned)
    check(result, naive(binned, levels.numpy()))


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("replicates", [1, 63, 65])
def test_resamples(backend, replicates, pairs):
    """Each is the information of rows repeated by the weights, in the bins of the whole."""
    codes, levels = problem(90)
    weights = torch.poisson(torch.ones(replicates, 90), torch.Generator().manual_seed(1)).to(torch.uint8)
    weights[0] = 0
    weights[-1, :2] = torch.tensor([255, 254], dtype=torch.uint8)
    on_device = [t.to(backend.device) for t in (codes, levels, weights)]
    result = vf.ops.histogram_mi(*on_device[:2], 9, weights=on_device[2], pairs=pairs)
    binned = naive_cut(codes, 9)
    assert (result.between is None) == (not pairs)
    for r in {0, replicates // 2, replicates - 1}:
        rows = np.repeat(np.arange(90), weights[r].numpy())
        found = [x[r] for x in result if x is not None]
        if len(rows):
            check(found, naive(binned[rows], levels.numpy()[rows])[: 4 if pairs else 3])
        else:
            assert not any(bool(x.any()) for x in found)


def test_weights_of_one_are_no_weights(backend):
    codes, levels = (t.to(backend.device) for t in problem(5000))
    plain = vf.ops.histogram_mi(codes, levels, pairs=True)
    ones = torch.ones(2, 5000, dtype=torch.uint8, device=backend.device)
    for a, b in zip(plain, vf.ops.histogram_mi(codes, levels, pairs=True, weights=ones), strict=True):
        assert float((a - b).abs().max()) <= CLOSE and torch.equal(b[0], b[1])


def test_codes_cut_already(backend):
    codes, levels = (t.to(backend.device) for t in problem())
    whole = vf.ops.histogram_mi(codes, levels, 11)
    for dtype in (torch.uint8, torch.int16, torch.int64):
        again = vf.ops.histogram_mi(cut(codes, 11).to(dtype), levels.to(dtype), 11)
        assert all(torch.equal(a, b) for a, b in zip(again[:3], whole[:3], strict=True))


def test_codes_alone(backend):
    codes, levels = (t.to(backend.device) for t in problem())
    weights = torch.randint(0, 4, (3, 200), dtype=torch.uint8, device=backend.device)
    for some in (None, weights):
        both = vf.ops.histogram_mi(codes, levels, pairs=True, weights=some)
        alone = vf.ops.histogram_mi(codes, None, pairs=True, weights=some)
        assert torch.equal(alone.between, both.between) and torch.equal(alone.of_codes, both.of_codes)
        assert alone.information.numel() == alone.of_levels.numel() == 0


# --- closed forms ----------------------------------------------------------------------------------------------------


def test_known_information(backend):
    """Of a grid of four by three levels: a copy, half of the bits, nothing, and a constant."""
    first, second = torch.arange(12) // 3, torch.arange(12) % 3
    codes = torch.stack([first, first // 2, second, torch.full((12,), 2)], 1).to(backend.device)
    levels = torch.stack([first, second, torch.zeros(12, dtype=torch.int64)], 1).to(backend.device)
    result = vf.ops.histogram_mi(codes, levels, 4, pairs=True)
    four, three, two = math.log(4), math.log(3), math.log(2)
    of_codes = [four, two, three, 0]
    information = [[four, 0, 0], [two, 0, 0], [0, three, 0], [0, 0, 0]]
    between = [[four, two, 0, 0], [two, two, 0, 0], [0, 0, three, 0], [0, 0, 0, 0]]
    check(result, (information, of_codes, [four, three, 0], between))
    assert result.of_levels[2] == 0 and result.of_codes[3] == 0  # exactly: nothing is divided by rounding


@settings(max_examples=15)
@given(st.integers(2, 200), st.integers(1, 12), st.integers(0, 99))
def test_bounds(backend, n, bins, seed):
    codes, levels = (t.to(backend.device) for t in problem(n, seed=seed))
    information, of_codes, of_levels, between = vf.ops.histogram_mi(codes, levels, bins, pairs=True)
    assert float(information.min()) >= 0 and float(between.min()) >= 0
    least = torch.minimum(of_codes[:, None], of_levels)
    assert bool((information <= least + CLOSE).all()) and float(of_codes.max()) <= math.log(bins) + CLOSE
    assert torch.equal(between, between.T) and torch.equal(between.diagonal(), of_codes)


def test_large_counts(backend):
    """Counts beyond the table of logarithms, of one cell a million times."""
    n = 1 << 20
    codes = (torch.arange(n) >= n // 4).long()[:, None].to(backend.device)
    result = vf.ops.histogram_mi(codes, codes, 2)
    quarter = math.log(4) / 4 + 0.75 * math.log(4 / 3)
    check(result[:3], ([[quarter]], [quarter], [quarter]))


@pytest.mark.parametrize("values", [[0.0, 5e-324, 1e-320], [1e308, 1.0, -5e307], [7.0, 7.0, 7.0], [1.0, 1 + 2e-16, 2]])
def test_extreme_codes(backend, values):
    codes = torch.tensor(values, dtype=torch.float64)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        binned = cut(codes.to(backend.device), 20)
        result = vf.ops.histogram_mi(codes.to(backend.device), torch.arange(3)[:, None].to(backend.device))
    edges = np.linspace(min(values), max(values), 21)[:-1]
    expected = np.searchsorted(edges, values, side="right") - 1 if min(values) < max(values) else [0, 0, 0]
    assert binned.flatten().tolist() == list(expected)
    assert all(bool(x.isfinite().all()) for x in result[:3])


# --- other ways to call it -------------------------------------------------------------------------------------------


@one_of_each
def test_memory_layout_changes_nothing(backend):
    codes, levels = (t.to(backend.device) for t in problem(70))
    weights = torch.randint(0, 4, (5, 70), dtype=torch.uint8, device=backend.device)
    expected = vf.ops.histogram_mi(codes, levels, weights=weights)
    laid_out = [x.T.contiguous().T for x in (codes, levels, weights)]
    spread = [x.repeat_interleave(2, 1)[:, ::2] for x in (codes, levels, weights)]
    for c, v, w in (laid_out, spread):
        got = vf.ops.histogram_mi(c, v, weights=w)
        assert all(torch.equal(a, b) for a, b in zip(got[:3], expected[:3], strict=True))


@pytest.mark.parametrize("backend", parameters(CPP), indirect=True)
def test_threads_change_nothing(backend):
    codes, levels = problem(6000, 5)
    weights = torch.poisson(torch.ones(70, 6000)).to(torch.uint8)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert _native.threads(codes.numel() * 3 * 70) == threads
        weighted = vf.ops.histogram_mi(codes, levels, weights=weights, pairs=True)
        wide = torch.cat([codes, codes, codes], 1).repeat(3, 1)
        found.append([*weighted, cut(wide, 20), *vf.ops.histogram_mi(wide, levels.repeat(3, 1), pairs=True)])
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@one_of_each
def test_opcheck(backend):
    codes, levels = (t.to(backend.device) for t in problem(20))
    weights = torch.randint(0, 4, (5, 20), dtype=torch.uint8, device=backend.device)
    edges = torch.linspace(0, 1, 6, dtype=torch.float64, device=backend.device).repeat(4, 1)
    torch.library.opcheck(OP_CUT, (codes.clamp(min=0), edges))
    for some, pairs in ((None, False), (weights, True)):
        torch.library.opcheck(OP, (cut(codes, 6), levels.int(), 6, [3, 7, 2], some, pairs))


@one_of_each
def test_gradients_do_not_flow(backend):
    codes, levels = (t.to(backend.device) for t in problem(20))
    assert not vf.ops.histogram_mi(codes.requires_grad_(), levels).information.requires_grad


def test_no_resamples(backend):
    codes, levels = (t.to(backend.device) for t in problem(20))
    none = torch.empty(0, 20, dtype=torch.uint8, device=backend.device)
    result = vf.ops.histogram_mi(codes, levels, weights=none, pairs=True)
    assert [tuple(x.shape) for x in result] == [(0, 4, 3), (0, 4), (0, 3), (0, 4, 4)]


BAD = {
    r"codes: expected a tensor of shape \(N, L\)": lambda c, v: ((c[0], v), {}),
    r"codes: expected a tensor of shape \(N, L\), none of them 0, got \(0, 4\)": lambda c, v: ((c[:0], v[:0]), {}),
    r"levels: expected a tensor of shape \(N, K\), none of them 0, got list": lambda c, v: ((c, [1]), {}),
    r"levels: expected a tensor of shape \(N, K\), none of them 0, got \(9, 0\)": lambda c, v: ((c, v[:, :0]), {}),
    "levels: expected N = 9 samples, as codes has, got 8": lambda c, v: ((c, v[:8]), {}),
    "levels: expected integers, got torch.float64": lambda c, v: ((c, v.double()), {}),
    "levels: expected numbers from 0 on, got -1": lambda c, v: ((c, v - 1 - v.min()), {}),
    r"levels: expected at most 2\^31 bins of a pair": lambda c, v: ((c, v + (1 << 27)), {}),
    r"levels: expected numbers below 2\^31": lambda c, v: ((c, v + (1 << 40)), {}),
    "codes: expected float32, float64 or integers, got torch.bfloat16": lambda c, v: ((c.bfloat16(), v), {}),
    "codes: expected bins from 0 to 19, got 3 to 20": lambda c, v: (
        (c.long() * 0 + torch.tensor([[3, 20, 4, 4]]), v),
        {},
    ),
    "codes: expected finite numbers, got NaN or infinity in latent 2": lambda c, v: (
        (c.index_fill(1, torch.tensor(2), math.nan), v),
        {},
    ),
    "codes: expected finite numbers, .* latent 1": lambda c, v: ((c.index_fill(1, torch.tensor(1), math.inf), v), {}),
    "codes: expected latents whose range": lambda c, v: ((c.sign() * 1.7e308, v), {}),
    "bins: expected a whole number from 1": lambda c, v: ((c, v, 0), {}),
    "bins: expected a whole number .*2.5": lambda c, v: ((c, v, 2.5), {}),
    "weights: expected uint8.* got torch.float32": lambda c, v: ((c, v), {"weights": torch.ones(3, 9)}),
    r"weights: expected shape \(R, 9\), got \(3, 8\)": lambda c, v: (
        (c, v),
        {"weights": torch.ones(3, 8, dtype=torch.uint8)},
    ),
    "expected one device": lambda c, v: ((c, v.to("meta")), {}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_clear_line(message):
    arguments, options = BAD[message](*problem(9))
    with pytest.raises(InputError, match=message) as caught:
        vf.ops.histogram_mi(*arguments, **options)
    assert "\n" not in str(caught.value)
