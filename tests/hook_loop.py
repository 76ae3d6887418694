"""The plain way to patch: a forward pass with a hook for every unit of every site; and ours compared with it."""

import copy

import torch
from close import assert_close

import vaecirc_fast as vf
from vaecirc_fast import groups as partitions
from vaecirc_fast.interventions import selection

KINDS = {
    "l1": lambda d: d.abs().mean(-1),
    "mse": lambda d: d.square().mean(-1),
    "signed": lambda d: d.mean(-1),
}


def thirds(elements):
    return partitions.from_labels(torch.arange(elements) % min(3, elements))


def arguments(x):
    return x if isinstance(x, tuple) else (x,)


@torch.no_grad()
def hook_loop(module, x_base, x_source, sites, effect, groups, unit="channel", heads=None, readout=lambda y: y):
    """Effects (unit, group), recoveries (unit,), the base output, and the (site, unit) pairs."""
    modules = dict(module.named_modules())
    labels, count = groups.labels, len(groups)

    def distance(y, y0):
        d = (y - y0).flatten(1)
        return torch.stack([KINDS[effect](d[:, labels == g]) for g in range(count)], 1)

    rows, near, pairs = [], [], []
    base, source = (readout(module(*arguments(x))) for x in (x_base, x_source))
    apart = KINDS[effect]((base - source).flatten(1)).mean()
    for site in sites:
        kept = []
        handle = modules[site].register_forward_hook(lambda m, a, out, kept=kept: kept.append(out.clone()))
        module(*arguments(x_source))
        handle.remove()
        owner = selection.units(kept[0].shape[1:], unit, heads).labels.view(kept[0].shape[1:])
        for u in range(int(owner.max()) + 1):
            handle = modules[site].register_forward_hook(
                lambda m, a, out, u=u, owner=owner, kept=kept: torch.where(owner == u, kept[0], out)
            )
            y = readout(module(*arguments(x_base)))
            handle.remove()
            rows.append(distance(y, base).mean(0))
            near.append(1 - KINDS[effect]((y - source).flatten(1)).mean() / apart)
            pairs.append((site, u))
    return torch.stack(rows), torch.stack(near), base, pairs


def in_double(x):
    return tuple(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments(x))


def assert_equals_hook_loop(
    module, x_base, x_source, sites, *, effect="mse", unit="channel", heads=None, readout=None, tile=None
):
    """Ours in float32 is as near to the loop in float64 as the loop in float32 is; in float64 so is the recovery."""
    chosen = readout or (lambda y: y)
    double, base64, source64 = copy.deepcopy(module).double(), in_double(x_base), in_double(x_source)
    with torch.no_grad():
        elements = chosen(module(*arguments(x_base)))[0].numel()
    groups = thirds(elements)
    options = {"unit": unit, "heads": heads}
    reference, *_ = hook_loop(module, x_base, x_source, sites, effect, groups, **options, readout=chosen)
    truth, recovery, y, pairs = hook_loop(double, base64, source64, sites, effect, groups, **options, readout=chosen)
    options |= {"effect": effect, "tile": tile, "readout": readout}
    P = vf.wrap(module).patch_sweep(x_base, x_source, sites, groups=groups, **options)
    largest = 2 * float(y.abs().max()) + float(truth.max()) ** (0.5 if effect == "mse" else 1)
    unit_of_truth = torch.full_like(truth, largest**2 if effect == "mse" else largest)
    assert P.coords["unit"] == pairs
    assert_close(P.tensor, reference, truth, terms=elements + 400, unit=unit_of_truth)
    exact = vf.wrap(double).patch_sweep(base64, source64, sites, recovery=True, **options)
    assert_close(exact.recovery.double(), recovery, recovery, terms=elements + 400, unit=1 + recovery.abs())
    assert exact.recovery.abs().max() > 1e-4
    return P
