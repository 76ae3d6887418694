"""The op render_sprites on every backend: every pixel, memory, threads, transforms and bad input."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from backends import ALL, CPP, one_of_each, parameters

import vaecirc_fast as vf
from vaecirc_fast import _native, _registry
from vaecirc_fast.errors import BackendError, InputError
from vaecirc_fast.ops import render_sprites
from vaecirc_fast.reference import render_sprites as reference

FRAMES = Path(__file__).parents[3] / "shared" / "data" / "dsprites_official_frames.npz"
FORMATS, SIZES, GRID = reference.FORMATS, reference.FACTOR_SIZES, 737_280
REFERENCE = ALL[0]  # on the CPU, what all others are compared with
MODULE = sys.modules["vaecirc_fast.ops.render_sprites"]  # its name in the package is the function's
ROW = _registry.rows["render_sprites"]
OP = torch.ops.vaecirc_fast.render_sprites
OP_INTO = torch.ops.vaecirc_fast.render_sprites_into


def factors_of(indices):
    """Factors (B, 6) of places in the grid, posY fastest."""
    return torch.stack(torch.unravel_index(torch.as_tensor(indices), SIZES), 1)


def drawn(factors, dtype):
    """The reference."""
    return reference.forward(factors, FORMATS.index(dtype), None)


@pytest.fixture(scope="module")
def sample():
    """Factors (3,184, 6): every outline at its corners and anywhere, one at every place; shuffled. And their images."""
    generator = torch.Generator().manual_seed(0)
    outlines = torch.cartesian_prod(*(torch.arange(n) for n in SIZES[:4])).repeat(3, 1)
    places = torch.randint(0, 32, (len(outlines), 2), generator=generator)
    places[:720] = 31 * torch.randint(0, 2, (720, 2), generator=generator)
    everywhere = factors_of(torch.arange(1024) + 1024 * 713)
    factors = torch.cat([torch.cat([outlines, places], 1), everywhere])
    factors = factors[torch.randperm(len(factors), generator=generator)]
    return factors, {dtype: drawn(factors, dtype) for dtype in FORMATS}


# --- every pixel -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_outline(backend, sample, dtype):
    factors, images = sample
    out = render_sprites(factors.to(backend.device), dtype=dtype)
    assert out.dtype == images[dtype].dtype
    assert out.device.type == backend.device
    assert torch.equal(out.cpu(), images[dtype])


def test_the_formats_hold_the_same_pixels(sample):
    _, images = sample
    assert images["float32"].shape[1:] == (1, 64, 64)
    assert images["float32"].unique().tolist() == [0, 1]
    assert np.array_equal(images["float32"][:, 0].numpy(), images["uint8"].numpy())
    assert np.array_equal(np.packbits(images["uint8"].flatten(1).numpy(), axis=1), images["bits"].numpy())


@pytest.mark.skipif(not FRAMES.exists(), reason="the official frames are not part of the repository")
def test_the_official_frames(backend):
    with np.load(FRAMES, allow_pickle=False) as frames:
        factors, images = torch.from_numpy(frames["factors"].astype(np.int64)), frames["images"]
    out = render_sprites(factors.to(backend.device), dtype="uint8").cpu().numpy()
    assert len(out) == 151
    assert (out != images).sum() == 0


@pytest.fixture(scope="module")
def grid():
    """The reference's whole grid in bits."""
    out = torch.empty(GRID, 512, dtype=torch.uint8)
    reference.forward(factors_of(torch.arange(GRID)), FORMATS.index("bits"), out)
    return out


@pytest.mark.deep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backend", parameters([b for b in ALL if b != REFERENCE]), indirect=True)
def test_the_whole_grid(backend, grid):
    """In bits on every backend; as bytes and floats too, but not in the interpreter, which would need many minutes."""
    step = 4096 if backend.name == "triton" and backend.device == "cpu" else GRID
    for n in range(0, GRID, step):
        out = render_sprites(factors_of(torch.arange(n, n + step)).to(backend.device), dtype="bits").cpu()
        assert torch.equal(out, grid[n : n + step])
    if step != GRID:
        return
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
    for n in range(0, GRID, 8192):
        factors = factors_of(torch.arange(n, n + 8192)).to(backend.device)
        pixels = (grid[n : n + 8192, :, None] >> shifts & 1).view(-1, 64, 64)
        assert torch.equal(render_sprites(factors, dtype="uint8").cpu(), pixels)
        assert torch.equal(render_sprites(factors).cpu(), pixels.float()[:, None])


@pytest.mark.deep
@pytest.mark.parametrize("backend", parameters(CPP))
def test_offsets_beyond_32_bits(backend):
    """More than 2^31 bytes: the last images are where they belong."""
    n = 2**19 + 3
    with backend.forced():
        torch.utils.deterministic.fill_uninitialized_memory = False
        out = render_sprites(factors_of(torch.arange(n)), dtype="uint8")
    for some in (slice(0, 5), slice(2**19 - 5, n)):
        assert torch.equal(out[some], drawn(factors_of(torch.arange(n)[some]), "uint8"))


@pytest.mark.parametrize("wrong", ["a subpixel further along", "one column of one image"])
@pytest.mark.parametrize("backend", parameters([b for b in ALL if b.name != "reference"]), indirect=True)
def test_a_wrong_kernel_is_found(backend, sample, wrong, monkeypatch):
    """The sample bites: an error of 1/256 px changes some of its pixels."""
    factors, images = sample
    tables = [table.clone() for table in MODULE._tables(torch.device(backend.device))]
    if wrong == "a subpixel further along":
        tables[2][:, 2] += 1
    else:
        last = factors[-1].tolist()
        tables[0][(last[1] * 6 + last[2]) * 40 + last[3], last[4]] += 256
    monkeypatch.setattr(MODULE, "_tables", lambda device: tables)
    out = render_sprites(factors.to(backend.device), dtype="bits").cpu()
    assert not torch.equal(out, images["bits"])


# --- memory and threads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FORMATS)
def test_no_images(backend, dtype):
    factors = torch.empty(0, 6, dtype=torch.int64, device=backend.device)
    out = render_sprites(factors, dtype=dtype)
    assert out.shape == drawn(torch.zeros(1, 6, dtype=torch.int64), dtype)[:0].shape
    assert render_sprites(factors, dtype=dtype, out=out) is out


@pytest.mark.parametrize("dtype", FORMATS)
def test_out_is_written_and_nothing_beside_it(backend, sample, dtype):
    """Also where it starts at an odd address: one byte, or for floats one float, into its memory."""
    factors, images = sample[0][:70].to(backend.device), sample[1][dtype][:70]
    for start in (0, 1, 64):
        memory = torch.full((start + images.numel() + 100,), 7, dtype=images.dtype, device=backend.device)
        out = memory[start : start + images.numel()].view(images.shape)
        assert render_sprites(factors, dtype=dtype, out=out) is out
        assert torch.equal(out.cpu(), images)
        assert bool((memory[:start] == 7).all())
        assert bool((memory[start + images.numel() :] == 7).all())


def test_memory_layout_of_the_factors_changes_nothing(backend, sample):
    factors, images = sample[0][:40].to(backend.device), sample[1]["bits"][:40]
    layouts = {
        "transposed": factors.T.contiguous().T,
        "every other": factors.repeat_interleave(2, 0)[::2],
        "columns of more": torch.cat([factors, factors], 1)[:, :6],
        "backwards and back": factors.flip(0).contiguous().flip(0),
    }
    for name, laid_out in layouts.items():
        assert torch.equal(render_sprites(laid_out, dtype="bits").cpu(), images), name
    one = factors[:1].expand(9, 6)
    assert torch.equal(render_sprites(one, dtype="bits").cpu(), images[:1].expand(9, 512))


@pytest.mark.parametrize("backend", parameters(CPP))
@pytest.mark.parametrize("dtype", FORMATS)
def test_threads_and_large_outputs_change_no_bit(backend, sample, dtype):
    """Enough images for threads, large pages and stores past the caches; in new memory and, odd or not, in old."""
    times = {"float32": 1, "uint8": 2, "bits": 12}[dtype]
    factors, images = sample[0].repeat(times, 1), torch.cat([sample[1][dtype]] * times)
    assert images.nbytes > 16 << 20
    with backend.forced():
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            assert _native.threads(len(factors) << 8) == threads
            assert torch.equal(render_sprites(factors, dtype=dtype), images)
            for start in (0, 1):
                memory = torch.empty(images.numel() + 1, dtype=images.dtype)
                out = memory[start : start + images.numel()].view(images.shape)
                assert torch.equal(render_sprites(factors, dtype=dtype, out=out), images)


# --- vmap, torch.library, torch.compile ------------------------------------------------------------------------------


def test_vmap_joins_the_dimensions(backend, sample):
    factors, images = sample[0][:24].to(backend.device), sample[1]["uint8"][:24]
    draw = lambda v: render_sprites(v, dtype="uint8")  # noqa: E731
    assert torch.equal(torch.vmap(draw)(factors.view(4, 6, 6)).cpu(), images.view(4, 6, 64, 64))
    assert torch.equal(torch.vmap(draw, 1)(factors.view(4, 6, 6)).cpu(), images.view(4, 6, 64, 64).transpose(0, 1))
    twice = torch.vmap(torch.vmap(draw, in_dims=1))(factors.view(2, 3, 4, 6))
    assert torch.equal(twice.cpu(), images.view(2, 3, 4, 64, 64).transpose(1, 2))
    out = torch.empty(4, 6, 64, 64, dtype=torch.uint8, device=backend.device)
    for given, in_dims in ((out, (0, 0)), (out[0], (0, None))):
        into = lambda v, o: render_sprites(v, dtype="uint8", out=o)  # noqa: E731
        with pytest.raises(InputError, match="out: cannot be given under vmap"):
            torch.vmap(into, in_dims)(factors.view(4, 6, 6), given)


def test_what_is_computed_from_images_has_gradients(backend, sample):
    factors, images = sample[0][:5].to(backend.device), sample[1]["float32"][:5]
    weight = torch.ones(1, 64, 64, device=backend.device, requires_grad=True)
    x = render_sprites(factors)
    assert not x.requires_grad
    (x * weight).sum().backward()
    assert torch.equal(weight.grad.cpu(), images.sum(0))
    grad = torch.func.grad(lambda w: (render_sprites(factors) * w).sum())(weight.detach())
    assert torch.equal(grad.cpu(), images.sum(0))


def test_a_graph_that_saved_out_hears_of_writing(backend, sample):
    """Otherwise its gradient would silently be that of other images."""
    factors = sample[0][:5].to(backend.device)
    out = render_sprites(factors)
    weight = torch.ones_like(out, requires_grad=True)
    loss = (out * weight).sum()
    render_sprites(factors.flip(0), out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        out = render_sprites(factors)
        assert render_sprites(factors, out=out) is out


@pytest.mark.parametrize("dtype", FORMATS)
@one_of_each
def test_the_registered_ops_pass_opcheck(backend, sample, dtype, poisoned):
    factors, images = sample[0][:3].to(backend.device), sample[1][dtype][:3]
    form = FORMATS.index(dtype)
    torch.library.opcheck(OP.default, (factors, form))
    torch.library.opcheck(OP_INTO.default, (factors, form, torch.zeros_like(images, device=backend.device)))
    assert torch.equal(OP(factors, form).cpu(), images)


def check_compiled(backend, sample, compiler):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=compiler)
    def compiled(v, out):
        v = v * 1
        return render_sprites(v) + 1, render_sprites(v, dtype="bits"), render_sprites(v, dtype="uint8", out=out) + 1

    for some in (slice(0, 4), slice(4, 8), slice(8, 17)):
        images = {dtype: x[some] for dtype, x in sample[1].items()}
        out = torch.empty_like(images["uint8"], device=backend.device)
        a, b, c = compiled(sample[0][some].to(backend.device), out)
        assert torch.equal(a.cpu(), images["float32"] + 1)
        assert torch.equal(b.cpu(), images["bits"])
        assert torch.equal(c.cpu(), images["uint8"] + 1)
        assert torch.equal(out.cpu(), images["uint8"])
    outside = torch.full((2, 6), 3, device=backend.device)
    with pytest.raises(InputError, match=r"factors: row 0 is \(3, 3, 3, 3, 3, 3\)"):
        compiled(outside, torch.empty(2, 64, 64, dtype=torch.uint8, device=backend.device))


@one_of_each
def test_compiled_without_breaks(backend, sample):
    check_compiled(backend, sample, "aot_eager")


@pytest.mark.deep
@one_of_each
def test_compiled_by_inductor(backend, sample):
    check_compiled(backend, sample, "inductor")


def test_a_trace_holds_the_registered_op(backend, sample):
    from torch.fx.experimental.proxy_tensor import make_fx

    factors = sample[0].to(backend.device)
    graph = make_fx(lambda v: render_sprites(v, dtype="bits"))(factors[:5])
    assert "vaecirc_fast.render_sprites.default" in [str(node.target) for node in graph.graph.nodes]
    assert torch.equal(graph(factors[5:10]).cpu(), sample[1]["bits"][5:10])


# --- bad input -------------------------------------------------------------------------------------------------------

V = torch.zeros(2, 6, dtype=torch.int64)
X = torch.zeros(2, 1, 64, 64)
BAD = {
    "unknown dtype": (dict(dtype="bool"), r"dtype: 'bool' is unknown; known: float32, uint8, bits"),
    "a torch dtype": (dict(dtype=torch.uint8), r"dtype: torch.uint8 is unknown"),
    "no tensor": (dict(factors=[[0] * 6]), r"factors: expected a tensor, got list"),
    "without color": (dict(factors=V[:, 1:]), r"factors: expected int64 \(B, 6\), got torch.int64 \(2, 5\)"),
    "one row": (dict(factors=V[0]), r"factors: expected int64 \(B, 6\), got torch.int64 \(6,\)"),
    "int32": (dict(factors=V.int()), r"factors: expected int64 \(B, 6\), got torch.int32 \(2, 6\)"),
    "floats": (dict(factors=V.double()), r"factors: expected int64 \(B, 6\), got torch.float64"),
    "bool": (dict(factors=V.bool()), r"factors: expected int64 \(B, 6\), got torch.bool"),
    "out no tensor": (dict(out=X.numpy()), r"out: expected a tensor, got ndarray"),
    "out of another dtype": (dict(out=X.double()), r"out: expected torch.float32 \(2, 1, 64, 64\), got torch.float64"),
    "out of another format": (dict(out=X, dtype="uint8"), r"out: expected torch.uint8 \(2, 64, 64\), got .*float32"),
    "bytes for bits": (dict(out=X[:, 0].byte(), dtype="bits"), r"out: expected torch.uint8 \(2, 512\), got .*64\)"),
    "out without channels": (dict(out=X[:, 0]), r"out: expected torch.float32 \(2, 1, 64, 64\), got .* \(2, 64, 64\)"),
    "out too short": (dict(out=X[:1]), r"out: expected torch.float32 \(2, 1, 64, 64\), got .* \(1, 1, 64, 64\)"),
    "out elsewhere": (dict(out=X.to("meta")), r"out: expected the device of factors, cpu, got meta"),
    "out with gaps": (dict(out=X.repeat(2, 1, 1, 1)[::2]), r"out: expected a contiguous tensor, got strides \(8192,"),
    "out transposed": (dict(out=X.mT), r"out: expected a contiguous tensor, got strides"),
    "out of one value": (dict(out=X[:1].expand(2, 1, 64, 64)), r"out: expected a contiguous tensor, got strides \(0,"),
    "out with gradient": (dict(out=X.clone().requires_grad_()), r"out: expected a tensor without gradient"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name):
    arguments, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        render_sprites(**{"factors": V, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factor", range(6))
@pytest.mark.parametrize("value", ["size", -1, 2**63 - 1, -(2**63)])
def test_factors_out_of_range_are_found_before_anything_is_written(backend, factor, value):
    """The first of them is named; native code never looks outside its tables."""
    factors = factors_of(torch.arange(0, 700_000, 1000))
    factors[[600, 650, 699], factor] = SIZES[factor] if value == "size" else value
    shown = ", ".join(map(str, factors[600].tolist()))
    message = rf"factors: row 600 is \({shown}\), expected indices in \[0, size\) with sizes \(1, 3, 6, 40, 32, 32\)"
    out = torch.full((700, 512), 7, dtype=torch.uint8, device=backend.device)
    for arguments in (dict(dtype="bits", out=out), dict(dtype="bits")):
        with pytest.raises(InputError, match=message) as caught:
            render_sprites(factors.to(backend.device), **arguments)
        assert "\n" not in str(caught.value)
    assert bool((out == 7).all())


@pytest.mark.parametrize("backend", parameters(CPP))
def test_the_first_one_out_of_range_is_named_whatever_the_threads(backend):
    factors = torch.zeros(9000, 6, dtype=torch.int64)
    factors[[100, 8000]] = 5
    torch.set_num_threads(2)
    with backend.forced(), pytest.raises(InputError, match="factors: row 100 is"):
        render_sprites(factors, dtype="bits")


def test_a_backend_that_cannot_run_is_an_error():
    with vf.backend("cuda"), pytest.raises(BackendError, match="'cuda' was asked for but is not written"):
        render_sprites(V)
    with pytest.raises(BackendError, match="no backend runs on meta"):
        render_sprites(V.to("meta"))
