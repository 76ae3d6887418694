"""What `accelerate` does to any module: replace, compare, refuse, fall back in sight, restore.

The module here is a little peer of the test's own, because this is about the machinery; how the real packages behave is
in test_peers.py and, at size, in `make peers`.
"""

import copy
import pickle
import sys
import types
import warnings

import pytest
import torch
from close import assert_gradient_close
from torch import nn

import vaecirc_fast as vf
from vaecirc_fast import ops
from vaecirc_fast.compat import methods
from vaecirc_fast.compat.methods import Check, Cut, Plan, Sparse
from vaecirc_fast.errors import AccelerationError, InputError

D, M, K, B = 8, 40, 5, 12
ENGINE = sys.modules["vaecirc_fast.compat.accelerate"]


class Little(nn.Module):
    """relu, top-k, dense codes, dense decoder; a buffer that counts calls."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(D, M)
        self.point = nn.Identity()
        self.W_dec = nn.Parameter(torch.randn(M, D))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def encode(self, x):
        self.calls += 1
        acts = self.point(torch.relu(self.encoder(x)))
        top = acts.topk(K)
        return torch.zeros_like(acts).scatter(-1, top.indices, top.values)

    def decode(self, codes):
        return codes @ self.W_dec

    def forward(self, x):
        return self.decode(self.encode(x))


class Overridden(Little):
    def encode(self, x):
        return super().encode(x) * 2


def encode(module, x):
    why = methods.why_dense(module, x, ("encoder", "point"), module.encoder.weight)
    if why:
        return methods.fall_back(module, "encode", why, x)
    values, indices = ops.topk_encode(x, module.encoder.weight, module.encoder.bias, K)
    return methods.remember(module, methods.dense(values, indices, M), Sparse(values, indices))


def encode_a_wrong_latent(module, x):
    codes = encode(module, x)
    return codes.roll(1, -1)


def encode_the_other_of_two(module, x):
    codes = encode(module, x)
    return codes[..., [M - 1, *range(1, M - 1), 0]]


def encode_too_large(module, x):
    return encode(module, x) * 1.001


def encode_one_dimension_more(module, x):
    return encode(module, x)[None]


sparse_calls = []


def decode(module, codes):
    sparse = methods.recall(module, codes)
    sparse_calls.append(sparse is not None)
    if sparse is None:
        return type(module).decode(module, codes)
    return ops.sparse_decode(sparse.values, sparse.indices, module.W_dec)


def decode_off(module, codes):
    return decode(module, codes) + 1e-3


def plan_of(module, encode=encode, decode=decode):
    return Plan(
        distribution="a-package-that-is-not-there",
        width=D,
        latents=M,
        weight=module.encoder.weight,
        methods={"encode": (encode, ("topk_encode",)), "decode": (decode, ("sparse_decode",))},
        left={"the door": "it is locked"},
        linear=lambda module, x: (x, module.encoder.weight, module.encoder.bias),
        cuts={"activations": Cut(K)},
        checks=[
            Check("activations", lambda m, x: m.encode(x), "activations"),
            Check("reconstruction", lambda m, x: m(x), "activations"),
        ],
        points=("encoder", "point"),
        sample_shape=(D,),
    )


@pytest.fixture
def peer(monkeypatch):
    """The little peer, known to `accelerate`; its plan can be replaced."""
    module = types.ModuleType("little_peer")
    module.Little = Little
    known = types.SimpleNamespace(PACKAGE="little_peer", CLASSES={("little_peer", "Little"): plan_of})
    monkeypatch.setitem(sys.modules, "little_peer", module)
    monkeypatch.setattr(ENGINE, "PEERS", (*ENGINE.PEERS, known))
    sparse_calls.clear()
    return known


@pytest.fixture
def little():
    torch.manual_seed(0)
    return Little()


@pytest.fixture
def x():
    return torch.randn(B, D, generator=torch.Generator().manual_seed(5))


def assert_original(module):
    assert not {"encode", "decode", "forward", methods.KEY} & set(module.__dict__)


def test_results_agree_and_the_report_says_so(peer, little, x):
    before = {name: t.clone() for name, t in little.state_dict().items()}
    with torch.no_grad():
        codes, y = little.encode(x), little(x)
    little.calls.zero_()
    report = vf.accelerate(little)
    assert type(little) is Little and all(torch.equal(t, before[name]) for name, t in little.state_dict().items())
    with torch.no_grad():
        assert torch.equal(little.encode(x) != 0, codes != 0)
        torch.testing.assert_close(little(x), y)
    assert sparse_calls[-1]
    text = str(report)
    for part in ("Little", "replaced encode: topk_encode (", "replaced decode", "the door: it is locked", "64 rows"):
        assert part in text
    assert [a.name for a in report.agreements] == ["activations", "reconstruction"]
    assert all(a.error <= a.allowed for a in report.agreements) and report.agreements[0].sets == 1
    assert not report.fallbacks


def test_restore_makes_it_what_it_was(peer, little, x):
    y = little(x)
    report = vf.accelerate(little)
    report.restore()
    report.restore()
    assert_original(little)
    assert torch.equal(little(x), y) and "(restored)" in str(report)
    vf.accelerate(little)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            {"encode": encode_a_wrong_latent},
            r"activations: latent \d+ of row \d+ is active in (ours|the original)",
        ),
        ({"encode": encode_too_large}, r"activations: error 0.001 of a row's largest; the original has"),
        (
            {"encode": encode_one_dimension_more},
            r"activations: got torch.float32 \(1, 64, 40\) in place of torch.float32 \(64, 40\)",
        ),
        ({"decode": decode_off}, r"reconstruction: error .* allowed"),
    ],
)
def test_a_difference_restores_and_raises_with_the_numbers(peer, little, wrong, says):
    peer.CLASSES = {("little_peer", "Little"): lambda module: plan_of(module, **wrong)}
    with pytest.raises(AccelerationError, match=says):
        vf.accelerate(little)
    assert_original(little)


def test_a_tie_is_no_difference(peer, little):
    with torch.no_grad():  # the first latent and the last are the same: where one is chosen, it may be either
        for t in (little.encoder.weight, little.encoder.bias, little.W_dec):
            t[M - 1] = t[0]
        little.encoder.bias[[0, M - 1]] += 1
    ties = 0
    for choice in (encode, encode_the_other_of_two):
        peer.CLASSES = {("little_peer", "Little"): lambda module, choice=choice: plan_of(module, encode=choice)}
        report = vf.accelerate(little)
        ties += report.agreements[0].ties
        assert report.agreements[0].rows + report.agreements[0].ties == 64
        report.restore()
    assert ties > 0


def test_a_hook_is_called_and_the_call_falls_back_in_sight(peer, little, x):
    report = vf.accelerate(little)
    seen = []
    handle = little.point.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with pytest.warns(UserWarning, match="Little.encode runs as its package has it: point has hooks"):
        y = little(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        little(x)
    assert len(seen) == 2 and seen[0].shape == (B, M)
    assert report.fallbacks == {("encode", "point has hooks"): 2}
    assert "fell back 2 times: encode: point has hooks" in str(report)
    handle.remove()
    torch.testing.assert_close(little(x), y)
    assert len(seen) == 2 and report.fallbacks.total() == 2


def test_autocast_falls_back(peer, little, x):
    report = vf.accelerate(little)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="autocast is on"):
        found = little.encode(x)
        torch.testing.assert_close(found, Little.encode(little, x))
    assert report.fallbacks == {("encode", "autocast is on"): 1}


def test_verifying_calls_no_hook_and_changes_no_buffer(peer, little):
    called = []
    handles = [m.register_forward_hook(lambda *_: called.append(1)) for m in little.modules()]
    handles.append(little.encoder.register_forward_pre_hook(lambda *_: called.append(1)))
    vf.accelerate(little)
    assert not called and int(little.calls) == 0
    assert all(m._forward_hooks for m in little.modules()) and little.encoder._forward_pre_hooks
    for handle in handles:
        handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in little.modules())


def test_a_module_that_is_part_of_two_keeps_its_weights(peer, little):
    little.again = nn.Sequential(little.encoder)
    weight = little.encoder.weight
    vf.accelerate(little)
    assert little.encoder.weight is weight and weight.dtype == torch.float32 and isinstance(weight, nn.Parameter)


# --- decode knows the codes that encode has made ---------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
def test_codes_that_were_changed_are_decoded_as_they_are(peer, little, x, grad):
    vf.accelerate(little)
    changes = (lambda c: c.__setitem__((0, 3), 7.0), lambda c: c.data.__setitem__((1, 2), 7.0), lambda c: c.zero_())
    for change in changes:
        with torch.set_grad_enabled(grad):
            codes = little.encode(x)
            with torch.no_grad():
                change(codes)
            torch.testing.assert_close(little.decode(codes), codes @ little.W_dec)
        assert not sparse_calls[-1]
    with torch.no_grad():
        codes = little.encode(x)
        assert little.decode(codes.clone()).shape == (B, D) and not sparse_calls[-1]
        assert little.decode(codes).shape == (B, D) and sparse_calls[-1]


def test_the_gradient_of_codes_is_dense(peer, little, x):
    vf.accelerate(little)
    codes = little.encode(x)
    (found,) = torch.autograd.grad(little.decode(codes).sum(), codes)
    torch.testing.assert_close(found, little.W_dec.sum(1).expand(B, M))


@pytest.mark.parametrize("code_gradients", [True, False])
def test_gradients_of_weights_and_input_are_the_originals(peer, little, x, code_gradients):
    def gradients(module, x):
        x = x.clone().requires_grad_()
        module.zero_grad()
        (module(x) ** 2).sum().backward()
        return {name: p.grad for name, p in module.named_parameters()} | {"x": x.grad}

    plain, truth = gradients(little, x), gradients(copy.deepcopy(little).double(), x.double())
    vf.accelerate(little, code_gradients=code_gradients)
    sparse_calls.clear()
    ours = gradients(little, x)
    assert sparse_calls == [not code_gradients]
    for name, true in truth.items():
        unit = true.abs().max().expand(true.shape)
        assert_gradient_close(ours[name], plain[name], true, terms=B * K, unit=unit)


def test_the_sparse_gradient_of_a_selection_is_that_of_relu_and_topk():
    g = torch.Generator().manual_seed(3)
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((3, 4, D), (M, D), (M,)))
    b -= 3  # some rows have fewer than K positive
    weights = torch.randn(3, 4, M, generator=g, dtype=torch.float64)

    def gradients(of):
        inputs = [t.clone().requires_grad_() for t in (x, w, b)]
        codes = of(*inputs)
        return [codes, *torch.autograd.grad((codes * weights).sum(), inputs)]

    def ours(x, w, b):
        values, indices = methods.selected(torch.nn.functional.linear(x, w, b), x, w, b, K)
        return methods.dense(values, indices, M)

    def plain(x, w, b):
        acts = torch.relu(torch.nn.functional.linear(x, w, b))
        top = acts.topk(K)
        return torch.zeros_like(acts).scatter(-1, top.indices, top.values)

    found, expected = gradients(ours), gradients(plain)
    assert bool(((expected[0] != 0).sum(-1) < K).any())
    for ours_, expected_ in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_, expected_)


def test_entries_with_offsets_as_dense_codes():
    g = torch.Generator().manual_seed(4)
    x, w = torch.randn(2, 3, D, generator=g), torch.randn(M, D, generator=g)
    acts = torch.relu(x @ w.T)
    flat = acts.flatten()
    kept = flat.topk(K * 6)
    expected = torch.zeros_like(flat).scatter(0, kept.indices, kept.values).view(acts.shape)
    csr = ops.topk_encode(x, w, None, K, scope="batch")
    torch.testing.assert_close(methods.dense_csr(Sparse(*csr), x.shape[:-1], M), expected)


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_has_its_own_weights(peer, little, x, copied):
    vf.accelerate(little)
    little(x)
    other = copied(little)
    with torch.no_grad():
        other.W_dec.zero_()
        other.encoder.bias.add_(1)
        assert not torch.equal(other.encode(x), little.encode(x)) and not bool(other(x).any())
        assert bool(little(x).any())


# --- refusals --------------------------------------------------------------------------------------------------------


def test_an_unknown_module_is_refused_and_nothing_is_imported():
    packages = ("sae_lens", "dictionary_learning", "sparsify", "sparse_autoencoder")
    there = {name for name in packages if name in sys.modules}
    with pytest.raises(InputError, match="module: .*Linear is not known; known: sae_lens: TopKSAE, .*SparseCoder"):
        vf.accelerate(nn.Linear(2, 2))
    assert there == {name for name in packages if name in sys.modules}
    with pytest.raises(InputError, match="module: expected a sparse autoencoder, got int"):
        vf.accelerate(3)  # pyright: ignore[reportArgumentType]


def test_what_was_changed_before_is_refused(peer, little):
    with pytest.raises(InputError, match="module: Overridden has its own encode, and Little is what is known"):
        vf.accelerate(Overridden())
    vf.accelerate(little)
    with pytest.raises(InputError, match="module: is accelerated already"):
        vf.accelerate(little)
    patched = Little()
    patched.encode = lambda x: x
    with pytest.raises(InputError, match="module: encode was replaced on this instance"):
        vf.accelerate(patched)


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        (torch.zeros(3, D + 1), r"sample: expected \(B, ..., 8\) with B > 0, got \(3, 9\)"),
        (torch.zeros(0, D), "sample: expected"),
        (torch.zeros(D), "sample: expected"),
        (torch.zeros(3, D, dtype=torch.int64), "sample: expected a floating tensor"),
        ([0.0], "sample: expected a floating tensor"),
    ],
)
def test_a_wrong_sample_is_refused(peer, little, sample, says):
    with pytest.raises(InputError, match=says):
        vf.accelerate(little, sample=sample)
    assert_original(little)


def test_a_sample_that_compares_nothing_is_refused_and_a_drawn_one_grows(peer, little, x):
    with torch.no_grad():
        little.encoder.bias.fill_(-20.0)
    with pytest.raises(InputError, match="sample: no latent is active in it"):
        vf.accelerate(little, sample=x)
    report = vf.accelerate(little)
    assert report.agreements[0].rows > 0
    report.restore()
    with torch.no_grad():
        little.encoder.bias.fill_(-float("inf"))
    with pytest.raises(InputError, match="sample: no latent is active in it"):
        vf.accelerate(little)


def test_a_module_that_fails_itself_is_named(peer, little):
    little.W_dec = nn.Parameter(torch.randn(M + 1, D))
    with pytest.raises(InputError, match=r"sample: the module's own code fails on it \(RuntimeError: "):
        vf.accelerate(little)
    assert_original(little)


def test_transforms_and_compilation(peer, little, x):
    vf.accelerate(little)
    with torch.no_grad():
        y = little(x)
        torch.testing.assert_close(torch.func.vmap(little)(x.view(3, 4, D)).view(B, D), y)
        torch.testing.assert_close(torch.compile(little, backend="eager")(x), y)
    jacobian = torch.func.jacrev(lambda z: little(z).sum(0))(x)
    assert jacobian.shape == (D, B, D) and bool(jacobian.any())


def test_a_forced_backend_is_named(peer, little):
    with vf.backend("reference"):
        report = vf.accelerate(little)
    assert report.backends == {"topk_encode": "reference", "sparse_decode": "reference"}
    report.restore()
    with vf.backend("cuda"), pytest.raises(vf.errors.BackendError, match="backend 'cuda' was asked for"):
        vf.accelerate(little)
    assert_original(little)
