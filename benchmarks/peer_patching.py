"""Activation patching as other packages do it, and ours: equal effects, the time and the memory of each.

Run by `make peers`, in an environment with the real packages: nnsight and pyvene with the source's activations cached,
TransformerLens on the decoders with hook points behind their sites and on a transformer of its own, captum's ablation
of channels. Ours is `patch_sweep`, and the shims with the signatures of captum and TransformerLens.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

import vaecirc_fast as vf
from vaecirc_fast.compat import captum as captum_shim
from vaecirc_fast.compat import transformer_lens as transformer_lens_shim

from .bench_patching import PAIRS, SITES
from .harness import peak_bytes

ROUNDS = 3
Form = Callable[[nn.Module, Tensor, Tensor, Sequence[str]], Tensor]
TRANSFORMER = {"n_layers": 4, "d_model": 128, "n_heads": 4, "d_head": 32, "d_mlp": 512, "d_vocab": 128, "n_ctx": 16}
BATCH, POSITIONS = 8, 16


def _effect(y: Tensor, base: Tensor) -> Tensor:
    return (y - base).square().mean()


def _set(out: Tensor, unit: int, source: Tensor) -> Tensor:
    out = out.clone()
    out[:, unit] = source[:, unit]
    return out


def ours(decoder: nn.Module, base: Tensor, source: Tensor, sites: Sequence[str]) -> Tensor:
    return vf.wrap(decoder).patch_sweep(base, source, sites, replicates=0).tensor[:, 0]


def nnsight_loop(decoder: nn.Module, base: Tensor, source: Tensor, sites: Sequence[str]) -> Tensor:
    """A trace per unit, as nnsight's documentation writes one."""
    from nnsight import NNsight  # pyright: ignore[reportMissingImports]

    model, effects = NNsight(decoder), []
    y0 = decoder(base)
    for site in sites:
        part = getattr(model, site)
        with model.trace(source):
            kept = part.output.save()
        for u in range(kept.shape[1]):
            with model.trace(base):
                out = part.output.clone()
                out[:, u] = kept[:, u]
                part.output = out
                y = model.output.save()
            effects.append(_effect(y, y0))
    return torch.stack(effects)


def pyvene_loop(decoder: nn.Module, base: Tensor, source: Tensor, sites: Sequence[str]) -> Tensor:
    """An intervenable model per unit."""
    import pyvene  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    decoder.config = transformers.PretrainedConfig()  # pyvene asks every model for one
    _, cache = vf.interventions.run_with_cache(decoder, source, sites)
    y0, effects = decoder(base), []
    for site in sites:
        kept = cache[site]
        for u in range(kept.shape[1]):

            def patch(out: Tensor, source: Any = None, *rest: Any, u: int = u, kept: Tensor = kept) -> Tensor:
                return _set(out, u, kept)

            model = pyvene.IntervenableModel({"component": f"{site}.output", "intervention": patch}, model=decoder)
            _, y = model({"z": base.clone()})  # it writes into its input
            effects.append(_effect(y, y0))
    return torch.stack(effects)


def transformer_lens_loop(decoder: nn.Module, base: Tensor, source: Tensor, sites: Sequence[str]) -> Tensor:
    """A run with hooks per unit, on the decoder with a hook point behind each site."""
    from transformer_lens.hook_points import (  # pyright: ignore[reportMissingImports]
        HookedRootModule,
        HookPoint,
    )

    class Hooked(HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = copy.deepcopy(decoder)
            for site in sites:
                setattr(self.decoder, site, nn.Sequential(getattr(self.decoder, site), HookPoint()))
            self.setup()

        def forward(self, z: Tensor) -> Tensor:
            return self.decoder(z)

    model = Hooked()
    _, cache = model.run_with_cache(source)
    y0, effects = model(base), []
    for site in sites:
        name = f"decoder.{site}.1"
        for u in range(cache[name].shape[1]):

            def patch(out: Tensor, hook: Any, u: int = u, name: str = name) -> Tensor:
                return _set(out, u, cache[name])

            effects.append(_effect(model.run_with_hooks(base, fwd_hooks=[(name, patch)]), y0))
    return torch.stack(effects)


def zeroed(decoder: nn.Module, base: Tensor, source: Tensor, sites: Sequence[str]) -> Tensor:
    P = vf.wrap(decoder).ablate(base, sites, ablation="zero", effect="signed", replicates=0)
    return P.tensor[:, 0]


def captum_loop(
    decoder: nn.Module, base: Tensor, source: Tensor, sites: Sequence[str], of: Any = None, **options: Any
) -> Tensor:
    """Ablation of each channel of each site: the change of the output's mean, over the pairs' bases."""
    if of is None:
        of = __import__("captum.attr", fromlist=["attr"]).LayerFeatureAblation
    found = []
    for site in sites:
        layer = getattr(decoder, site)
        axes = (1, -1, 1, 1) if isinstance(layer, nn.ConvTranspose2d) else (1, -1)
        channels = layer.out_channels if isinstance(layer, nn.ConvTranspose2d) else layer.out_features
        mask = torch.arange(channels).view(axes)
        change = of(lambda z: decoder(z).flatten(1).mean(1), layer).attribute(base, layer_mask=mask, **options)
        found.append(-change.flatten(2)[..., 0].mean(0) if change.ndim > 2 else -change.mean(0))
    return torch.cat(found)


PATCHING: dict[str, Form] = {
    "ours": ours,
    "nnsight": nnsight_loop,
    "pyvene": pyvene_loop,
    "transformer-lens": transformer_lens_loop,
}
ABLATION: dict[str, Form] = {
    "ours": zeroed,
    "ours, by captum's signature": functools.partial(captum_loop, of=captum_shim.LayerFeatureAblation),
    "captum": captum_loop,
}


def _transformer(dtype: torch.dtype) -> tuple[Any, Tensor, Any]:
    """One with random weights, corrupted tokens and the cache of the clean ones."""
    import transformer_lens  # pyright: ignore[reportMissingImports]

    config = transformer_lens.HookedTransformerConfig(**TRANSFORMER, act_fn="gelu", normalization_type="LN", seed=0)
    model = transformer_lens.HookedTransformer(config)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / p.shape[-1] ** 0.5)
    model = model.to(dtype)
    clean, corrupted = torch.randint(TRANSFORMER["d_vocab"], (2, BATCH, POSITIONS), generator=generator)
    return model, corrupted, model.run_with_cache(clean)[1]


def _metrics(module: Any, dtype: torch.dtype) -> Callable[[], Tensor]:
    model, corrupted, cache = _transformer(dtype)

    def metric(logits: Tensor) -> Tensor:
        return (logits[:, -1, 1] - logits[:, -1, 2]).mean()

    return lambda: torch.cat(
        [
            f(model, corrupted, cache, metric).flatten()
            for f in (module.get_act_patch_block_every, module.get_act_patch_attn_head_all_pos_every)
        ]
    )


@torch.no_grad()
def measure() -> tuple[list[dict[str, Any]], list[str]]:
    """Figures, and which forms differ from the truth."""
    cases, complaints = [], []
    for net in ("conv", "mlp"):
        sites = SITES[net]
        torch.manual_seed(0)
        decoder = vf.models.build("vae", (1, 64, 64), latents=10, net=net).decoder.eval()
        base, source = torch.randn(2, PAIRS, 10)
        double = copy.deepcopy(decoder).double()
        for what, forms in (("patching", PATCHING), ("zero ablation of", ABLATION)):
            truth = forms["ours"](double, base.double(), source.double(), sites)
            calls = {n: functools.partial(form, decoder, base, source, sites) for n, form in forms.items()}
            case = f"{net} decoder, {what} {len(truth)} units of {len(sites)} sites x {PAIRS} pairs"
            # a difference of means of numbers up to 1 has roundings of its own
            rounding = torch.finfo(torch.float32).eps if forms is ABLATION else 0.0
            _measure(case, calls, truth, rounding, PAIRS * len(truth), cases, complaints)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens import patching  # pyright: ignore[reportMissingImports]

        _quiet(patching)
        truth = _metrics(patching, torch.float64)()
        calls = {
            "ours, by TransformerLens' signature": _metrics(transformer_lens_shim, torch.float32),
            "transformer-lens": _metrics(patching, torch.float32),
        }
    case = f"transformer of {TRANSFORMER['n_layers']} layers, {len(truth)} patches x {BATCH} sequences of {POSITIONS}"
    rounding = torch.finfo(torch.float32).eps * float(truth.abs().max())
    _measure(case, calls, truth, rounding, BATCH * len(truth), cases, complaints)
    return cases, complaints


def _quiet(patching: Any) -> None:
    """No progress bars, which cost time."""
    patching.tqdm = lambda rows: rows


def _measure(
    case: str,
    calls: dict[str, Callable[[], Tensor]],
    truth: Tensor,
    rounding: float,
    patched: int,
    cases: list[dict[str, Any]],
    complaints: list[str],
) -> None:
    times: dict[str, list[float]] = {name: [] for name in calls}
    memory = {name: peak_bytes(call) for name, call in calls.items()}
    truth, first = truth.double(), next(iter(calls))
    allowed = 10 * max(rounding, float((calls[first]() - truth).abs().max()))
    for _ in range(ROUNDS):  # in turn, so that a drift of the machine's speed meets all alike
        for name, call in calls.items():
            started = time.perf_counter()
            result = call()
            times[name].append(time.perf_counter() - started)
            error = float((result - truth).abs().max())
            if not error <= allowed:
                complaints.append(f"{case}: {name} differs from the float64 truth by {error:.2g}")
    for name, taken in times.items():
        low, middle, high = statistics.quantiles(taken, n=4)
        version = "" if name.startswith("ours") else f" {metadata.version(name)}"
        facts = {"case": case, "form": name + version, "ours": name == first, "rounds": ROUNDS, "patched": patched}
        cases.append({**facts, "median_s": middle, "iqr_s": high - low, "peak_bytes": memory[name]})
