"""captum's LayerFeatureAblation by its own signature: against a loop of hooks, and captum where it is installed."""

import copy

import pytest
import torch
from close import assert_close
from torch import nn

from vaecirc_fast import models
from vaecirc_fast.compat.captum import LayerFeatureAblation
from vaecirc_fast.errors import InputError

N = 4


class Block(nn.Module):
    """Around a layer goes its input, behind it an activation in place; some arguments are no inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.act, self.b, self.c = nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x, scale=1.0):
        h = self.a(x)
        return self.c(self.act(h) + scale * self.b(h))


def made(name, dtype=torch.float32):
    torch.manual_seed(3)
    if name == "block":
        module, x = Block(), torch.randn(N, 3)
    else:
        module, x = models.build("vae", (1, 16, 16), 3, net=name, width=0.25).decoder, torch.randn(N, 3)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)
    return module.eval().to(dtype), x.to(dtype)


def whole(module):
    return lambda *args: module(*args).flatten(1).mean(1)


def standardised(correction):
    """Rows that depend on each other: of copies too with correction 0, whose deviation is that of the rows."""

    def of(module):
        def forward(x):
            y = module(x - x.mean(0))
            return y / y.std(0, correction=correction)

        return forward

    return of


CASES = [  # module, layer, forward function, options
    ("mlp", "fc2", whole, {}),
    ("mlp", "fc1", whole, {"layer_baselines": 0.5, "attribute_to_layer_input": True}),
    ("mlp", "fc3", lambda m: m, {"target": (0, 3, 5)}),
    ("conv", "fc1", lambda m: m, {"target": [(0, 1, 2), (0, 3, 4), (0, 5, 6), (0, 7, 8)]}),
    ("conv", "ct1", whole, {"layer_mask": torch.arange(8).view(8, 1, 1), "layer_baselines": torch.ones(1, 8, 1, 1)}),
    ("conv", "fc2", whole, {"layer_mask": torch.arange(256)[None] // 16, "perturbations_per_eval": 7}),
    ("block", "b", lambda m: m, {"target": 1, "additional_forward_args": torch.tensor([[0.5], [2.0], [0.1], [3.0]])}),
    ("block", "a", lambda m: m, {"target": torch.tensor([0, 1, 1, 0]), "additional_forward_args": (0.5,)}),
    ("block", "b", lambda m: m, {"attribute_to_layer_input": True}),
    ("block", "a", lambda m: lambda x: m(x).sum(), {}),  # one number for all inputs
    ("block", "b", lambda m: lambda x: m(x).square().sum() / len(x), {"layer_mask": torch.tensor([0, 0, 1, 2, 2])}),
    ("block", "a", standardised(1), {"target": 0}),
    ("block", "a", standardised(0), {"target": 0}),
    ("block", "b", lambda m: lambda x: (m(x) * torch.arange(8.0).view(4, 2).to(x)).sum(1), {}),  # knows its rows
]


def options_in(options, dtype):
    def of(v):
        return v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v

    return {k: tuple(map(of, v)) if isinstance(v, tuple) else of(v) for k, v in options.items()}


@pytest.fixture(params=range(len(CASES)), ids=lambda n: f"{CASES[n][0]}-{CASES[n][1]}-{n}")
def case(request):
    name, layer, forward, options = CASES[request.param]

    def run(kind, dtype):
        module, x = made(name, dtype)
        found = kind(forward(module), getattr(module, layer))
        return found.attribute(x, **options_in(options, dtype))

    return run


class Loop:
    """The formula itself: a forward pass with a hook for every group."""

    def __init__(self, forward, layer):
        self.forward, self.layer = forward, layer

    @torch.no_grad()
    def attribute(
        self,
        x,
        layer_baselines=0.0,
        target=None,
        additional_forward_args=(),
        layer_mask=None,
        attribute_to_layer_input=False,
        perturbations_per_eval=1,
    ):
        given = additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)

        def run(change):
            def before(_module, args):
                return (change(args[0]),)

            if attribute_to_layer_input:
                handle = self.layer.register_forward_pre_hook(before)
            else:
                handle = self.layer.register_forward_hook(lambda _module, _args, out: change(out))
            y = self.forward(x, *given)
            handle.remove()
            if target is None:
                return y.reshape(-1)
            each = target if isinstance(target, list) else target.tolist() if isinstance(target, torch.Tensor) else None
            at = [t if isinstance(t, tuple) else (t,) for t in (each or [target] * N)]
            return torch.stack([y[(n, *t)] for n, t in enumerate(at)])

        kept = []
        base = run(lambda a: kept.append(a.clone()) or a)
        a = kept[0]
        mask = torch.arange(a[0].numel()).view(a[:1].shape) if layer_mask is None else layer_mask
        total = torch.zeros(len(base), *a.shape[1:], dtype=a.dtype)
        for g in mask.unique():
            y = run(lambda a, g=g: torch.where(mask == g, torch.as_tensor(layer_baselines).to(a), a))
            total += (base - y).view(-1, *[1] * (a.ndim - 1)) * (mask == g)
        return total


def test_equals_a_loop_of_hooks(case):
    truth, reference = case(Loop, torch.float64), case(Loop, torch.float32)
    found = case(LayerFeatureAblation, torch.float32)
    unit = truth.abs().amax() + 1
    assert_close(found, reference, truth, terms=600, unit=unit)
    exact = case(LayerFeatureAblation, torch.float64)
    assert_close(exact, truth, truth, terms=600, unit=unit)
    assert truth.abs().max() > 1e-4


def test_equals_captum(case):
    attr = pytest.importorskip("captum.attr")
    truth, reference = case(attr.LayerFeatureAblation, torch.float64), case(attr.LayerFeatureAblation, torch.float32)
    unit = truth.abs().amax() + 1
    assert_close(case(LayerFeatureAblation, torch.float32), reference, truth, terms=600, unit=unit)


def test_the_signature_is_captums():
    import inspect

    attr = pytest.importorskip("captum.attr")
    for name in ("__init__", "attribute"):
        ours, theirs = (inspect.signature(getattr(c, name)) for c in (LayerFeatureAblation, attr.LayerFeatureAblation))
        assert [(p.name, p.default) for p in ours.parameters.values()] == [
            (p.name, p.default) for p in theirs.parameters.values()
        ]


def test_what_is_before_the_layer_runs_a_few_times():
    module, x = made("mlp")
    calls = []
    module.fc1.register_forward_hook(lambda *_: calls.append(1))
    found = LayerFeatureAblation(whole(module), module.fc3).attribute(x)
    assert found.shape == (N, 64) and len(calls) <= 4


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.rnn, self.drop, self.unused = nn.Linear(3, 3), nn.LSTM(3, 3), nn.Dropout(), nn.Linear(3, 3)

    def forward(self, x):
        return self.rnn(self.drop(self.a(self.a(x))))[0]


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        ("a", {}, "layer: runs 2 times in one pass"),
        ("unused", {}, "layer: is not reached"),
        ("rnn", {}, "layer: gives 2 values, expected one tensor"),
        ("drop", {"layer_mask": torch.ones(2)}, r"layer_mask: expected integers that broadcast to \(4, 3\)"),
        ("drop", {"layer_baselines": torch.ones(2)}, r"layer_baselines: expected a number or a tensor that broad"),
        ("drop", {"layer_baselines": "zero"}, "got str"),
        ("drop", {"layer_mask": (torch.ones(3).long(),) * 2}, "layer_mask: has 2 parts"),
        ("drop", {"target": (1, 2)}, "has more indices than an output of shape"),
        ("drop", {"target": [1]}, "one for each of the 4 rows, got 1"),
        ("drop", {"perturbations_per_eval": 0}, "perturbations_per_eval: expected an integer of at least 1, got 0"),
        ("drop", {"inputs": [1]}, "inputs: expected a tensor"),
    ],
)
def test_refused(layer, options, message):
    module = Twice().eval()
    with pytest.raises(InputError, match=message):
        LayerFeatureAblation(module, getattr(module, layer)).attribute(**{"inputs": torch.randn(N, 3), **options})


def test_what_cannot_be_the_same_is_refused():
    module, x = Twice(), torch.randn(N, 3)
    with pytest.raises(InputError, match="draws random numbers"):
        LayerFeatureAblation(copy.deepcopy(module).train(), module.rnn).attribute(x)
    with pytest.raises(InputError, match="device_ids: runs on one device"):
        LayerFeatureAblation(module, module.a, device_ids=[0])
    with pytest.raises(InputError, match="forward_func: expected a callable"):
        LayerFeatureAblation(3, module.a)
    with pytest.raises(InputError, match="layer: expected a torch.nn.Module"):
        LayerFeatureAblation(module, "a")
