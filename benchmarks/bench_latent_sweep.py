"""Benchmark of the latent sweep on the two reference decoders: against loops, chunks, compilers and oneDNN by hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vaecirc_fast as vf
from vaecirc_fast.interventions.grids import symmetric

from .harness import measure

SAMPLES, LATENTS, STEPS = 64, 10, 10  # the grid "fixed": 11 steps less the zero that is never decoded
DECODES = SAMPLES * LATENTS * STEPS
DELTAS = symmetric(5, 0.6)
GROUPS = vf.groups.cells(64, 64, 8)
TILES = {"conv": (8, 16, 32, 64), "mlp": (64, 200, 400, 800, 1600)}  # rows of a chunk, of which eager takes the best


@cache
def _decoder(net: str) -> nn.Module:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return vf.models.build("vae", (1, 64, 64), latents=LATENTS, net=net).decoder.eval().to(device)


def _codes(decoder: nn.Module, samples: int = SAMPLES) -> Tensor:
    z = torch.randn(samples, LATENTS, generator=torch.Generator().manual_seed(0))
    return z.to(next(decoder.parameters()).device)


def _moved(z: Tensor) -> Tensor:
    """All intervened codes (samples, latents, steps, latents)."""
    codes = z[:, None, None].repeat(1, LATENTS, STEPS, 1)
    for i in range(LATENTS):
        codes[:, i, :, i] += DELTAS.to(z)
    return codes


def _cells(y: Tensor, base: Tensor) -> Tensor:
    """Mean |y - base| by cell: (rows, 64)."""
    return (y - base).abs().view(-1, 8, 8, 8, 8).mean((2, 4)).flatten(1)


def hook_loop(decoder: nn.Module, z: Tensor) -> Tensor:
    """What one writes first: a hook that shifts one latent, and a forward pass of all samples per (latent, step)."""
    effects = z.new_zeros(LATENTS, STEPS, 64)
    base = decoder(z)
    for i in range(LATENTS):
        for s, delta in enumerate(DELTAS.tolist()):

            def shift(_module, inputs, i=i, delta=delta):
                moved = inputs[0].clone()
                moved[:, i] += delta
                return (moved,)

            handle = decoder.register_forward_pre_hook(shift)
            y = decoder(z)
            handle.remove()
            effects[i, s] = _cells(y, base).mean(0)
    return effects


def materialised(decoder: nn.Module, z: Tensor) -> Tensor:
    """Every perturbed output at once."""
    y = decoder(_moved(z).flatten(0, 2)).view(SAMPLES, -1, 64, 64)
    return _cells(y, decoder(z)).view(SAMPLES, LATENTS, STEPS, 64).mean(0)


def chunked(decoder: Callable[[Tensor], Tensor], z: Tensor, rows: int) -> Tensor:
    """The generic form by hand: chunks of rows that fit the cache, reduced at once."""
    codes, base = _moved(z).flatten(0, 2), decoder(z)
    owner = torch.arange(SAMPLES, device=z.device).repeat_interleave(LATENTS * STEPS)
    parts = [_cells(decoder(codes[n : n + rows]), base[owner[n : n + rows]]) for n in range(0, len(codes), rows)]
    return torch.cat(parts).view(SAMPLES, LATENTS, STEPS, 64).mean(0)


def vmapped(decoder: nn.Module, z: Tensor) -> Tensor:
    """torch.func.vmap over the interventions of all samples."""
    codes, base = _moved(z).flatten(1, 2).transpose(0, 1), decoder(z)
    mapped = torch.func.vmap(lambda batch: _cells(decoder(batch), base).mean(0), chunk_size=1)
    return mapped(codes).view(LATENTS, STEPS, 64)


def by_onednn(decoder: nn.Module, z: Tensor, rows: int) -> Tensor:
    """The MLP by hand, as fast as torch's parts allow: rank-1 first layer, oneDNN's products on packed weights with
    fused activations, in place."""
    linear, pack = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._reorder_linear_weight
    fc1, fc2, fc3, fc4 = (m for m in decoder.modules() if isinstance(m, nn.Linear))
    packed = [pack(layer.weight.detach(), rows) for layer in (fc2, fc3, fc4)]
    pre = F.linear(z, fc1.weight, fc1.bias)
    steps = (fc1.weight.T[:, None] * DELTAS.to(z)[:, None]).flatten(0, 1)  # (latents steps, hidden)
    base, effects = decoder(z).flatten(1), []
    biases = [layer.bias for layer in (fc2, fc3, fc4)]
    for n in range(SAMPLES):
        for at in range(0, LATENTS * STEPS, rows):
            h = torch.relu_(pre[n] + steps[at : at + rows])
            h = linear(h, packed[0], biases[0], "relu", [], "")
            h = linear(h, packed[1], biases[1], "relu", [], "")
            y = linear(h, packed[2], biases[2], "none", [], "").sigmoid_().sub_(base[n]).abs_()
            effects.append(y.view(-1, 8, 8, 8, 8).mean((2, 4)).flatten(1))
    return torch.cat(effects).view(SAMPLES, LATENTS, STEPS, 64).mean(0)


def _best(call: Callable[[int], Tensor], sizes: tuple[int, ...]) -> int:
    """The size of the quickest of three calls each."""
    times = {}
    for size in sizes:
        call(size)
        taken = []
        for _ in range(3):
            started = time.perf_counter()
            call(size)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
        times[size] = min(taken)
    return min(times, key=times.__getitem__)


FORMS = {
    "conv": (
        *("ours", "ours, 200 replicates", "ours, generic engine", "hook loop", "materialised"),
        *("eager, best chunk, channels_last", "torch.compile, best chunk", "vmap"),
    ),
    "mlp": (
        *("ours", "ours, 200 replicates", "ours, generic engine", "hook loop", "materialised"),
        *("eager, best chunk", "torch.compile, best chunk", "vmap", "oneDNN by hand, best chunk"),
    ),
}


@pytest.mark.parametrize(("net", "form"), [(net, form) for net in FORMS for form in FORMS[net]])
@torch.no_grad()
def test_sweep(benchmark, net: str, form: str) -> None:
    decoder = _decoder(net)
    z = _codes(decoder)
    name = form.partition(",")[0]
    if name == "oneDNN by hand" and z.is_cuda:
        pytest.skip("oneDNN is a CPU's")
    if "channels_last" in form:
        torch.manual_seed(0)
        decoder = _decoder.__wrapped__(net)
        for p in decoder.parameters():
            p.data = p.data.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else p.data
    rows = 0
    if name == "eager":
        rows = _best(lambda n: chunked(decoder, z, n), TILES[net])
    if name == "oneDNN by hand":
        rows = _best(lambda n: by_onednn(decoder, z, n), (50, 100))
    if name == "torch.compile":
        torch.compiler.reset()
        compiled = torch.compile(decoder, dynamic=False)
        rows = 200 if net == "mlp" else 32  # sizes that divide the decodes: one compilation
        chunked(compiled, z, rows)

    def ours(**options) -> Tensor:
        return vf.latent_sweep(decoder, z, groups=GROUPS, **{"replicates": 0, **options}).tensor

    call = {
        "ours": ours,
        "hook loop": lambda: hook_loop(decoder, z),
        "materialised": lambda: materialised(decoder, z),
        "eager": lambda: chunked(decoder, z, rows),
        "torch.compile": lambda: chunked(compiled, z, rows),
        "vmap": lambda: vmapped(decoder, z),
        "oneDNN by hand": lambda: by_onednn(decoder, z, rows),
    }[name]
    if form == "ours, 200 replicates":
        call = lambda: ours(replicates=200)  # noqa: E731
    if form == "ours, generic engine":
        call = lambda: ours(engine="generic")  # noqa: E731
    expected = ours()
    assert torch.allclose(call(), expected, rtol=1e-3, atol=1e-6), f"{form} measures something else"
    case = f"{net} decoder, {SAMPLES} samples x {LATENTS} latents x {STEPS} steps"
    measure(benchmark, call, case=case, form=form, ours=form == "ours", rounds=7, memory=True, decodes=DECODES)


@pytest.mark.parametrize("samples", [SAMPLES, 4 * SAMPLES])
@pytest.mark.parametrize("form", ["ours, gram", "ours, exact", "ours, generic engine", "eager, best chunk"])
@torch.no_grad()
def test_squared_effect(benchmark, form: str, samples: int) -> None:
    """logit_mse of the whole output, which the gram engine takes through the R factor of the last layer."""
    decoder = _decoder("mlp")
    z = _codes(decoder, samples)
    groups = vf.groups.whole(4096)
    logits: Callable[[Tensor], Tensor] = getattr(decoder, "logits")  # noqa: B009

    def eager(rows: int) -> Tensor:
        codes, base = _moved(z).flatten(0, 2), logits(z).flatten(1)
        owner = torch.arange(samples, device=z.device).repeat_interleave(LATENTS * STEPS)
        parts = []
        for n in range(0, len(codes), rows):
            y = logits(codes[n : n + rows]).flatten(1)
            parts.append((y - base[owner[n : n + rows]]).square().mean(1))
        return torch.cat(parts).view(samples, LATENTS, STEPS, 1).mean(0)

    engine = {"ours, gram": "gram", "ours, exact": "fused", "ours, generic engine": "generic"}.get(form)
    rows = 0 if engine else _best(eager, TILES["mlp"])

    def call() -> Tensor:
        if engine is None:
            return eager(rows)
        options = {"effect": "logit_mse", "groups": groups, "replicates": 0, "engine": engine}
        return vf.latent_sweep(decoder, z, **options).tensor

    assert torch.allclose(call(), eager(400), rtol=1e-3), f"{form} measures something else"
    case = f"mlp decoder, logit_mse of the whole output, {samples} samples x {LATENTS} latents x {STEPS} steps"
    measure(
        benchmark,
        call,
        case=case,
        form=form,
        ours=form == "ours, gram",
        rounds=7,
        memory=True,
        decodes=samples * LATENTS * STEPS,
    )
