"""Sweeps over discrete latents: planted codebooks exactly, a plain loop by the definition, draws by usage."""

import numpy as np
import pytest
import torch
from close import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import vaecirc_fast as vf
from vaecirc_fast import groups as partitions
from vaecirc_fast import planted
from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions import Codes, Effects, code_sweep, codes, latent_sweep

CIRCUITS = {circuit.name: circuit for circuit in planted.codebooks()}
GRIDS = ("code_swap", "code_neighbour", "z_e", "z_q")
STEPS = [0.5 * k for k in range(-4, 5) if k]


@pytest.fixture(params=CIRCUITS, name="circuit")
def _circuit(request):
    return CIRCUITS[request.param]


def swept(circuit, grid, **options):
    given = Codes(circuit.indices, circuit.z_e, circuit.z_q)
    return code_sweep(circuit.decoder, given, circuit.codebook, grid=grid, **{"groups": circuit.groups, **options})


# --- planted codebooks -----------------------------------------------------------------------------------------------


def exact_grids(circuit):
    """Forms whose truth does not depend on what was drawn, and what the drawn codes were where it does."""
    two = len(circuit.indices.unique()) == 2
    drawn = codes.swaps(circuit.indices.flatten(1), len(circuit.codebook), 4, 0).numpy()
    return {grid: grid for grid in GRIDS if grid != "code_swap" or two} | ({} if two else {"code_swap": drawn})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("effect", ["l1", "mse", "rms", "tv", "signed"])
def test_planted_codebooks_come_out(circuit, effect, dtype):
    """The discrete forms and z_e in float64 to the bit but for the order of additions; all within rounding."""
    moved = circuit.to(dtype)
    for grid, truth_of in exact_grids(circuit).items():
        truth = circuit.effects(truth_of, effect=effect)
        E = swept(moved, grid, effect=effect)
        limit = 64 * torch.finfo(dtype).eps * (1 + np.abs(truth).max())
        assert E.tensor.dtype == dtype and truth.any()
        assert np.abs(E.tensor.double().numpy() - truth).max() < limit
        if effect in ("l1", "rms", "tv"):
            assert np.abs(E.ces()[["ces"]].to_numpy()[:, 0] - circuit.ces(truth_of, effect=effect)).max() < limit


def test_a_position_moves_its_own_cell_only(circuit):
    for grid in ("code_swap", "code_neighbour"):
        E = swept(circuit, grid)
        off = E.tensor.masked_fill(torch.eye(4, dtype=torch.bool)[:, None], 0)
        assert not off.any()
        assert E.specificity()["specificity"].to_numpy() == pytest.approx([1] * 4)


def test_the_planted_truth_by_brute_force(circuit):
    """The tables and thresholds of the planted codebook against a search through all codes."""
    book = circuit.codebook.tolist()

    def by_distance(z, exclude=None):
        rest = [k for k in range(len(book)) if k != exclude]
        return sorted(rest, key=lambda k: (sum((a - b) ** 2 for a, b in zip(z, book[k], strict=True)), k))

    for n, p in np.ndindex(len(circuit.indices), 4):
        at = (n, *divmod(p, 2))
        z_e, index = circuit.z_e.movedim(1, -1)[at], int(circuit.indices[at])
        assert by_distance(z_e.tolist())[0] == index
        assert planted.codebook.NEIGHBOURS[index].tolist() == by_distance(book[index], exclude=index)
        assert circuit.z_q.movedim(1, -1)[at].tolist() == book[index]


def test_the_planted_truth_never_runs_the_decoder():
    for circuit in planted.codebooks():
        circuit.decoder.register_forward_pre_hook(lambda module, args: pytest.fail("ran the decoder"))
        assert all(circuit.effects(grid).any() for grid in ("code_neighbour", "z_e", "z_q"))
        assert circuit.shows.endswith(".")


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda c: c.effects("swap"), "grid: expected code_neighbour"),
        (lambda c: c.effects("code_swap"), "2 codes in use"),
        (lambda c: c.effects(np.zeros((3, 4, 2), int)), "grid: expected codes"),
        (lambda c: c.effects("z_q", effect="l2"), "effect"),
    ],
)
def test_bad_requests_to_the_truth(call, match):
    with pytest.raises(InputError, match=match):
        call(CIRCUITS["codebook_patches"])


# --- the definition, written out, on networks ------------------------------------------------------------------------

SHAPES = {"image": (5, 3, 3, 2), "sequence": (6, 4, 3), "vector": (9, 3)}  # (N, D, positions...)


def problem(name, dtype=torch.float64, size=7):
    """A decoder, codes quantised from random z_e, and the codebook. Rounded, so that float32 has the same numbers."""
    torch.manual_seed(4)
    shape = SHAPES[name]
    book = (torch.randn(size, shape[1]) * 8).round() / 8
    z_e = (torch.randn(shape) * 16).round() / 16
    distance = (z_e.movedim(1, -1)[..., None, :] - book).square().sum(-1)
    indices = distance.argmin(-1)
    width = shape[1:].numel() if isinstance(shape, torch.Size) else int(np.prod(shape[1:]))
    net = nn.Sequential(nn.Flatten(), nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, 10))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    z_q = book[indices].movedim(-1, 1)
    return net.to(dtype), Codes(indices, z_e.to(dtype), z_q.to(dtype)), book.to(dtype)


def by_definition(net, given, book, grid, effect, labels):
    """Effects (N, unit, step, G), one call each; draws of code_swap are passed as (N, positions, S)."""
    flat = given.indices.reshape(len(given.indices), -1)
    count = max(labels) + 1

    def reduced(y, base):
        dy = (y - base).tolist()
        members = [[d for d, label in zip(dy, labels, strict=True) if label == g] for g in range(count)]
        return [
            {
                "l1": sum(map(abs, m)) / len(m),
                "rms": (sum(d * d for d in m) / len(m)) ** 0.5,
                "signed": sum(m) / len(m),
            }[effect]
            for m in members
        ]

    def quantised(indices):
        return torch.stack([book[k] for k in indices.flatten()], 1).reshape(given.z_e.shape[1:])

    def run(z):
        with torch.no_grad():
            return net(z[None])[0]

    result = []
    for n in range(len(flat)):
        base = run(given.z_q[n])
        rows = []
        if grid in ("z_e", "z_q"):
            values = getattr(given, grid)
            for c in range(values.shape[1]):
                sd = float(np.std(values[:, c].double().numpy()))
                row = []
                for t in STEPS:
                    z = values[n].clone()
                    z[c] += t * sd
                    if grid == "z_e":
                        distance = (z.movedim(0, -1)[..., None, :] - book).square().sum(-1)
                        z = quantised(distance.argmin(-1))
                    row.append(reduced(run(z), base))
                rows.append(row)
        else:
            for p in range(flat.shape[1]):
                row = []
                for code in grid[n, p].tolist():
                    changed = flat[n].clone()
                    changed[p] = code
                    row.append(reduced(run(quantised(changed)), base))
                rows.append(row)
        result.append(rows)
    return torch.tensor(result, dtype=book.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SHAPES)
def test_effects_are_those_of_a_loop(name, grid, dtype):
    net, given, book = problem(name, dtype)
    double, given64, book64 = problem(name)
    labels = [0, 1, 0, 2, 2, 1, 0, 0, 1, 0]
    replaced = grid
    if grid == "code_swap":
        replaced = codes.swaps(given.indices.reshape(len(given.indices), -1), len(book), 4, 3)
    elif grid == "code_neighbour":
        order = (book64[:, None] - book64).square().sum(-1).fill_diagonal_(np.inf).argsort(stable=True)
        replaced = order[given.indices.reshape(len(given.indices), -1)][..., :4]
    for effect in ("l1", "rms", "signed"):
        options = dict(grid=grid, effect=effect, groups=partitions.from_labels(labels), seed=3)
        E = code_sweep(net, given, book, reduce=None, **options)
        reference = by_definition(net, given, book, replaced, effect, labels)
        truth = by_definition(double, given64, book64, replaced, effect, labels)
        unit = truth.abs() + 4 * double(given64.z_q).abs().max().detach()
        assert E.tensor.dtype == dtype and truth.any()
        assert_close(E.tensor, reference, truth, terms=30, unit=unit)
        mean = code_sweep(net, given, book, tile=5, **options)
        assert_close(mean.tensor, reference.mean(0), truth.mean(0), terms=40, unit=unit.mean(0))


def test_labels_of_the_result():
    net, given, book = problem("image")
    E = code_sweep(net, given, book, grid="code_neighbour", draws=3)
    assert isinstance(E, Effects) and E.dims == ("position", "draw", "group") and E.tensor.shape == (6, 3, 1)
    assert E.coords == {"position": [0, 1, 2, 3, 4, 5], "draw": [1, 2, 3], "group": ["output"]}
    assert (E.grid, E.effect, E.samples, E.step_size) == ("code_neighbour", "l1", 5, None)
    assert list(E.ces().columns) == ["position", "ces", "low", "high"]
    kept = code_sweep(net, given, book, draws=2, reduce=None)
    assert kept.dims == ("sample", "position", "draw", "group") and kept.coords["draw"] == [0, 1]
    assert list(kept.to_dataframe().columns) == ["sample", "position", "draw", "group", "effect"]
    for grid in ("z_e", "z_q"):
        E = code_sweep(net, given, book, grid=grid)
        assert E.dims == ("channel", "step", "group") and E.coords["step"] == STEPS and E.coords["channel"] == [0, 1, 2]
        assert E.step_size.tolist() == [[abs(t) for t in STEPS]] * 3 and list(E.ces()["channel"]) == [0, 1, 2]
        assert E.replicates.shape == (5, 3, 1)  # five samples are left out one at a time


def test_a_saved_sweep_over_codes_comes_back(tmp_path):
    E = swept(CIRCUITS["codebook_patches"], "code_neighbour")
    E.save(tmp_path / "e.safetensors")
    back = Effects.load(tmp_path / "e.safetensors")
    assert back.dims == E.dims and torch.equal(back.tensor, E.tensor) and back.ces().equals(E.ces())


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_swaps_are_drawn_by_usage_of_the_other_codes():
    """P(k | c) = n_k / sum of the others; 20,000 draws, six standard deviations."""
    indices = torch.tensor([[0, 0, 0, 0, 0, 2, 2, 2, 3, 5]])
    usage = torch.tensor([5.0, 0, 3, 1, 0, 1])
    drawn = codes.swaps(indices, 6, 20_000, 1)
    assert drawn.shape == (1, 10, 20_000) and drawn.dtype == torch.int64
    for p, c in enumerate(indices[0].tolist()):
        share = usage.clone()
        share[c] = 0
        share /= share.sum()
        found = torch.bincount(drawn[0, p], minlength=6) / 20_000
        assert found[c] == 0 and not found[[1, 4]].any()
        assert ((found - share).abs() <= 6 * (share * (1 - share) / 20_000).sqrt()).all()
        pairs = torch.bincount(drawn[0, p, ::2] * 6 + drawn[0, p, 1::2], minlength=36).view(6, 6) / 10_000
        joint = share[:, None] * share
        assert ((pairs - joint).abs() <= 6 * (joint / 10_000).sqrt() + 1e-9).all()  # draws are independent


def test_swaps_follow_the_seed_and_leave_the_global_state():
    indices = torch.randint(5, (20, 6), generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    first, again, other = (codes.swaps(indices, 5, 4, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not (first == indices[..., None]).any()
    assert all(not torch.equal(first[..., a], first[..., b]) for a in range(4) for b in range(a))


def test_where_one_code_is_in_use_a_swap_changes_nothing():
    net, given, book = problem("image")
    alone = torch.full_like(given.indices, 3)
    vector = book[3][None, :, None, None].expand_as(given.z_q)
    calls = Recorder(net)
    E = code_sweep(calls, Codes(alone, vector, vector), book)
    assert not E.tensor.any() and not E.replicates.any() and calls.rows == 1 + 5
    assert "nor 120 interventions that change nothing" in E.plan
    assert (E.ces()["ces"] == 0).all()
    neighbours = code_sweep(net, Codes(alone, vector, vector), book, grid="code_neighbour")
    assert bool((neighbours.tensor > 0).all())


def test_neighbours_break_ties_by_index():
    book = torch.tensor([[0.0, 0], [1, 0], [0, 1], [-1, 0], [0, 0], [2, 0]])
    assert codes.neighbours(book, 5).tolist() == [
        [4, 1, 2, 3, 5],
        [0, 4, 5, 2, 3],
        [0, 4, 1, 3, 5],
        [0, 4, 2, 1, 5],
        [0, 1, 2, 3, 5],
        [1, 0, 4, 2, 3],
    ]


def test_requantising_breaks_ties_by_index():
    """Codes at 2 and 0, 4 and 2 again: what lies in the middle takes the lower index; sd is 1."""
    book = torch.tensor([[2.0], [0.0], [4.0], [2.0]])
    z_e = torch.tensor([[[1.0, 3.0]]])
    given = Codes(torch.tensor([[0, 0]]), z_e, torch.tensor([[[2.0, 2.0]]]))
    E = code_sweep(lambda z: z[:, 0], given, book, grid="z_e", effect="signed", groups=partitions.spans([1, 1]))
    moved = {t: row.tolist() for t, row in zip(E.coords["step"], E.tensor[0], strict=True)}
    assert moved == {t: [-2, 0] if t < 0 else [0, 2] for t in STEPS}


# --- what is decoded -------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """A decoder that keeps every batch it was given."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder, self.batches = decoder, []

    def forward(self, z):
        self.batches.append(z.clone())
        return self.decoder(z)

    @property
    def rows(self):
        return sum(map(len, self.batches))


def test_equal_vectors_and_kept_codes_are_never_decoded():
    net, given, book = problem("sequence")
    twice = torch.cat([book, book])
    calls = Recorder(net)
    E = code_sweep(calls, given, twice, grid="code_neighbour", draws=1)  # the copy is nearest
    assert not E.tensor.any() and calls.rows == 1 + 6
    calls = Recorder(net)
    E = code_sweep(calls, given, book, grid="z_e", reduce=None)
    moved = E.tensor[..., 0] != 0
    assert 0 < int(moved.sum()) < moved.numel() and calls.rows == 1 + 6 + int(moved.sum())
    bases = [tuple(z.flatten().tolist()) for z in given.z_q]
    assert all(tuple(z.flatten().tolist()) not in bases for batch in calls.batches[2:] for z in batch)
    assert f"{6 + int(moved.sum())} decodes" in E.plan


def test_every_row_is_made_of_codes_and_changes_one_position():
    net, given, book = problem("image")
    calls = Recorder(net)
    code_sweep(calls, given, book, tile=4)
    rows = torch.cat(calls.batches[1:]).flatten(2).transpose(1, 2)
    base = given.z_q.flatten(2).transpose(1, 2)
    changed = (rows[:, None] != base).any(-1).sum(-1).min(1).values
    assert changed.tolist().count(0) == 5 and changed.tolist().count(1) == 5 * 6 * 4 == len(rows) - 5
    assert bool((rows[:, :, None] == book).all(-1).any(-1).all())
    assert max(len(batch) for batch in calls.batches) == 4


class Whole(nn.Module):
    """Whole numbers, so that no order of additions shows."""

    def forward(self, z):
        return z.flatten(1).cumsum(1).relu()


@pytest.mark.parametrize("grid", GRIDS)
def test_no_tile_size_changes_a_bit(grid):
    generator = torch.Generator().manual_seed(3)
    book = torch.randint(-4, 5, (6, 2), generator=generator).double()
    book += torch.arange(6)[:, None] * 16  # no two alike
    indices = torch.randint(6, (16, 4), generator=generator)
    z = book[indices].movedim(-1, 1)
    options = dict(grid=grid, groups=partitions.spans([2, 2, 4]), scale=torch.tensor([16.0, 8.0]))
    whole = code_sweep(Whole(), Codes(indices, z, z), book, tile=10**6, **options)
    assert whole.tensor.any()
    for tile in (1, 3, 7, 50, None):
        E = code_sweep(Whole(), Codes(indices, z, z), book, tile=tile, **options)
        assert torch.equal(E.tensor, whole.tensor) and torch.equal(E.step_replicates, whole.step_replicates)


def test_a_large_codebook_goes_in_parts(monkeypatch):
    net, given, book = problem("image")
    whole = {grid: code_sweep(net, given, book, grid=grid) for grid in GRIDS}
    monkeypatch.setattr(codes, "_SCORE_BYTES", 500)  # less than the distances of one image
    for grid, E in whole.items():
        assert torch.equal(code_sweep(net, given, book, grid=grid).tensor, E.tensor)


def test_a_shift_of_z_q_is_a_latent_sweep():
    """Without positions a channel is a latent, and the grid `posterior` with sd for scale."""
    net, given, book = problem("vector")
    scale = given.z_q.std(0, correction=0)
    expected = latent_sweep(net, given.z_q, grid="posterior", scale=scale)
    E = code_sweep(net, given, book, grid="z_q")
    assert torch.allclose(E.tensor, expected.tensor, rtol=1e-12) and torch.allclose(E.replicates, expected.replicates)
    assert torch.equal(code_sweep(net, given, book, grid="z_q", scale=scale).tensor, expected.tensor)


def test_a_channel_that_does_not_vary_is_zero():
    net, given, book = problem("vector")
    book[:, 1], given.z_q[:, 1], given.z_e[:, 1] = 2.0, 2.0, 2.0
    for grid in ("z_q", "z_e"):
        indices = (given.z_e[:, None] - book).square().sum(-1).argmin(-1)
        E = code_sweep(net, Codes(indices, given.z_e, book[indices]), book, grid=grid)
        assert not E.tensor[1].any() and E.tensor[[0, 2]].any() and E.ces()["ces"][1] == 0
        assert "8 zero steps not decoded" in E.plan


def test_logits_and_module_methods():
    net, given, book = problem("vector")

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def logits(self, z):
            return self.net(z)

        def forward(self, z):
            return torch.sigmoid(self.net(z))

    on = code_sweep(Decoder(), given, book, on="logits", effect="mse")
    assert torch.equal(on.tensor, code_sweep(Decoder(), given, book, effect="logit_mse").tensor)
    assert torch.equal(on.tensor, code_sweep(net, given, book, effect="mse").tensor)
    assert vf.code_sweep is code_sweep
    with pytest.raises(InputError, match="on: the decoder has no method `logits`"):
        code_sweep(net, given, book, on="logits")
    with pytest.raises(InputError, match="Dropout.* train mode"):
        code_sweep(nn.Sequential(nn.Dropout(), net), given, book)


# --- invariances of the definitions ----------------------------------------------------------------------------------

MAPS = {
    "cubic": (lambda z: z**3, lambda w: w.sign() * w.abs() ** (1 / 3)),
    "sinh": (torch.sinh, torch.asinh),
    "affine": (lambda z: 5 - 3 * z, lambda w: (5 - w) / 3),
}


def mapped(given, book, forth):
    return Codes(given.indices, forth(given.z_e), forth(given.z_q)), forth(book)


@pytest.mark.parametrize("name", MAPS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), effect=st.sampled_from(["l1", "rms"]))
def test_swaps_do_not_depend_on_any_invertible_map_of_the_codebook(name, seed, effect):
    """As resampling of a latent does not: a code is known by its index."""
    forth, back = MAPS[name]
    net, codes_, book = problem("image")
    options = dict(grid="code_swap", effect=effect, seed=seed, groups=partitions.spans([3, 7]))
    expected = code_sweep(net, codes_, book, **options)
    E = code_sweep(lambda z: net(back(z)), *mapped(codes_, book, forth), **options)
    assert torch.allclose(E.tensor, expected.tensor, rtol=1e-9, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(unit=st.floats(0.01, 100), grid=st.sampled_from(["z_e", "z_q", "code_neighbour"]))
def test_the_unit_of_the_codebook_does_not_matter(unit, grid):
    """Steps are in standard deviations, and what is nearest stays so."""
    net, codes_, book = problem("sequence")
    expected = code_sweep(net, codes_, book, grid=grid)
    E = code_sweep(lambda z: net(z / unit), *mapped(codes_, book, lambda z: z * unit), grid=grid)
    assert torch.allclose(E.tensor, expected.tensor, rtol=1e-9, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(7)), grid=st.sampled_from(["z_e", "z_q"]))
def test_the_order_of_the_codes_does_not_matter(order, grid):
    net, codes_, book = problem("image")
    place = torch.tensor(order).argsort()
    E = code_sweep(net, Codes(place[codes_.indices], codes_.z_e, codes_.z_q), book[order], grid=grid)
    assert torch.allclose(E.tensor, code_sweep(net, codes_, book, grid=grid).tensor, rtol=1e-12)


# --- bad input -------------------------------------------------------------------------------------------------------

FLOATS = torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook": torch.zeros(1, 3)}, "codebook: expected at least 2 codes of at least 1 channel, got 1 of 3"),
        ({"codebook": torch.zeros(3)}, r"codebook: expected floats \(K, D\), got torch.float32 \(3,\)"),
        ({"codebook": torch.zeros(7, 3, dtype=torch.int64)}, "codebook: expected floats .* got torch.int64"),
        ({"codebook": [[1.0]]}, "codebook: expected floats .* got list"),
        ({"codebook": torch.zeros(7, 2, dtype=FLOATS)}, r"codes.z_e: expected shape \(9, 2\) .* got \(9, 3\)"),
        ({"codebook": torch.zeros(7, 3)}, "codes.z_e: expected the codebook's dtype torch.float32, got torch.float64"),
        ({"codebook": torch.full((7, 3), torch.nan, dtype=FLOATS)}, "codebook: contains NaN or infinity"),
        ({"codebook": torch.ones(7, 3, dtype=FLOATS)}, "codes.z_q: differs from codebook.indices. by up to .*pass the"),
        ({"indices": torch.full((9,), 7)}, r"codes.indices: expected 0..6, the codebook's rows, got 7..7"),
        ({"indices": torch.full((9,), -1)}, r"codes.indices: expected 0..6, .* got -1..-1"),
        ({"indices": torch.zeros(9)}, "codes.indices: expected integers, got torch.float32"),
        ({"indices": torch.zeros(0, dtype=torch.int64)}, r"at least one position, got \(0,\)"),
        ({"indices": torch.zeros(9, 2, dtype=torch.int64)}, r"codes.z_e: expected shape \(9, 3, 2\) .* got \(9, 3\)"),
        ({"z_q": torch.zeros(8, 3, dtype=FLOATS)}, r"codes.z_q: expected shape \(9, 3\) .* got \(8, 3\)"),
        ({"z_e": torch.full((9, 3), torch.nan, dtype=FLOATS)}, "codes.z_e: contains NaN or infinity"),
        ({"z_e": None}, r"codes: expected Codes\(indices, z_e, z_q\) of tensors, got Codes"),
        ({"grid": "swap"}, "grid: 'swap' is unknown; known: code_swap, code_neighbour, z_e, z_q"),
        ({"grid": torch.ones(3)}, "grid: .* is unknown"),
        ({"grid": "code_neighbour", "draws": 7}, "draws: a code has 6 neighbours in this codebook, got 7"),
        ({"draws": 0}, "draws: expected an integer of at least 1, got 0"),
        ({"effect": "l2"}, "effect: 'l2' is unknown"),
        ({"reduce": "sum"}, "reduce: "),
        ({"tile": 0}, "tile: "),
        ({"replicates": -1}, "replicates: "),
        ({"groups": [0]}, "groups: expected Groups"),
        ({"groups": partitions.spans([3])}, "groups: partition 3 elements, but the decoder's output has 10"),
        ({"grid": "z_q", "scale": torch.ones(2)}, r"scale: expected a tensor \(3,\), one number a channel"),
        ({"grid": "z_e", "scale": torch.tensor([1.0, -1, 1])}, "scale: expected finite numbers >= 0"),
    ],
)
def test_bad_input(change, message):
    net, given, book = problem("vector")
    parts = {name: change.pop(name, getattr(given, name)) for name in ("indices", "z_e", "z_q")}
    book = change.pop("codebook", book)
    with pytest.raises(InputError, match=message):
        code_sweep(net, Codes(**parts), book, **change)


def test_codes_quantised_otherwise_are_refused_where_it_matters():
    net, given, book = problem("vector")
    other = (given.indices + 1) % len(book)
    wrong = Codes(other, given.z_e, book[other])
    with pytest.raises(InputError, match="codes.indices: 9 of 9 are not the code nearest to z_e"):
        code_sweep(net, wrong, book, grid="z_e")
    assert code_sweep(net, wrong, book, grid="z_q").tensor.any()


def test_one_value_has_no_standard_deviation():
    net, given, book = problem("vector")
    one = Codes(given.indices[:1], given.z_e[:1], given.z_q[:1])
    with pytest.raises(InputError, match=r"codes: one value a channel has no standard deviation; pass scale \(3,\)"):
        code_sweep(net, one, book, grid="z_q")
    assert code_sweep(net, one, book, grid="z_q", scale=torch.ones(3)).tensor.any()
    assert code_sweep(net, one, book, grid="code_neighbour").tensor.any()


def test_outputs_that_are_not_finite_name_position_and_draw():
    book = torch.arange(7.0)[:, None]
    indices = torch.tensor([[0, 1, 0], [1, 1, 0]])  # their 3rd neighbour is code 3
    given = Codes(indices, book[indices].movedim(-1, 1), book[indices].movedim(-1, 1))
    with pytest.raises(InputError, match="NaN or infinite for position 1 at draw 2 of the grid 'code_neighbour'"):
        code_sweep(lambda z: z / (z[..., 1:2] != 3), given, book, grid="code_neighbour", draws=3)
