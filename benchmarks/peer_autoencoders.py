"""The autoencoders of other packages, as they are and accelerated: equal results and gradients, and the time of both.

Run by `make peers`, in an environment with the real packages.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

import vaecirc_fast as vf

SIZES = ((4096, 64, 500, 50), (1024, 256, 4096, 32))  # B, D, M, K
ROUNDS = 7
GRADIENT_ROWS = 256  # so few that float32 seldom chooses other latents than float64
DEAD = 20  # latents that the auxiliary losses revive


@dataclass(frozen=True)
class Peer:
    """A class of a package: how to make one, encode with it, and get the loss of a training step, if it trains."""

    name: str
    distribution: str
    make: Callable[[int, int, int], Any]
    codes: Callable[[Any, Tensor], Tensor] = lambda m, x: m.encode(x)
    out: Callable[[Any, Tensor], Tensor] = lambda m, x: m(x)
    loss: Callable[[Any, Tensor], Tensor] | None = None
    step: tuple[str, ...] = ("encode", "forward")  # the methods of which the loss is made
    eager: Callable[[Any], None] | None = None  # makes one whose gradients are autograd's, where the package's are not


def _import(name: str) -> Any:
    return importlib.import_module(name)


def _sae_lens() -> list[Peer]:
    topk, jump = _import("sae_lens.saes.topk_sae"), _import("sae_lens.saes.jumprelu_sae")
    batch, standard = _import("sae_lens.saes.batchtopk_sae"), _import("sae_lens.saes.standard_sae")
    step_input = _import("sae_lens.saes.sae").TrainStepInput

    def loss(m: Any, x: Tensor) -> Tensor:
        dead = torch.arange(m.cfg.d_sae) < DEAD
        return m.training_forward_pass(step_input(x, {"l1": 1e-2, "l0": 1e-3}, dead, 0, False)).loss

    def peer(module: Any, name: str, trains: bool, k: Callable[[int], Any] | None = None, **settings: Any) -> Peer:
        make_config, make_sae = getattr(module, f"{name}Config"), getattr(module, name)

        def make(D: int, M: int, K: int) -> Any:
            of_k = {"k": k(K)} if k else {}
            return make_sae(make_config(d_in=D, d_sae=M, **of_k, **settings))

        step = ("training_forward_pass",)
        return Peer(f"SAELens {name}", "sae-lens", make, loss=loss if trains else None, step=step)

    return [
        peer(topk, "TopKSAE", False, int),
        peer(topk, "TopKTrainingSAE", True, int, rescale_acts_by_decoder_norm=True),
        peer(batch, "BatchTopKTrainingSAE", True, float),
        peer(standard, "StandardSAE", False),
        peer(standard, "StandardTrainingSAE", True),
        peer(jump, "JumpReLUSAE", False),
        peer(jump, "JumpReLUTrainingSAE", True),
    ]


def _dictionary_learning() -> list[Peer]:
    topk, batch = _import("dictionary_learning.trainers.top_k"), _import("dictionary_learning.trainers.batch_top_k")
    plain = _import("dictionary_learning.dictionary")

    def loss_of(trainer_class: Any) -> Callable[[Any, Tensor], Tensor]:
        def loss(ae: Any, x: Tensor) -> Tensor:
            D, M, K = ae.activation_dim, ae.dict_size, int(ae.k)
            trainer = trainer_class(2000, D, M, K, 0, "none", warmup_steps=1, device="cpu")
            trainer.ae = ae
            trainer.num_tokens_since_fired[:DEAD] = trainer.dead_feature_threshold
            return trainer.loss(x, step=0)

        return loss

    def l1(ae: Any, x: Tensor) -> Tensor:
        y, f = ae(x, output_features=True)
        return (y - x).square().sum(-1).mean() + 1e-2 * f.sum(-1).mean()

    def peer(make: Any, loss: Any) -> Peer:
        return Peer(f"dictionary_learning {make.__name__}", "dictionary-learning", make, loss=loss)

    makers = (plain.AutoEncoder, plain.JumpReluAutoEncoder)
    without_k = [
        Peer(f"dictionary_learning {m.__name__}", "dictionary-learning", lambda D, M, K, m=m: m(D, M), loss=l1)
        for m in makers
    ]
    return [
        peer(topk.AutoEncoderTopK, loss_of(topk.TopKTrainer)),
        Peer(
            "dictionary_learning BatchTopKSAE",
            "dictionary-learning",
            batch.BatchTopKSAE,
            codes=lambda m, x: m.encode(x, use_threshold=False),
            loss=loss_of(batch.BatchTopKTrainer),
        ),
        *without_k,
    ]


def _sparsify() -> list[Peer]:
    if not torch.cuda.is_available():
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # on a CPU its decoder would want a GPU
    module = _import("sparsify")
    output = _import("sparsify.fused_encoder").EncoderOutput

    def make(D: int, M: int, K: int) -> Any:
        return module.SparseCoder(D, module.SparseCoderConfig(num_latents=M, k=K))

    def codes(m: Any, x: Tensor) -> Tensor:
        found = m.encode(x)
        return torch.zeros(len(x), m.num_latents, dtype=x.dtype).scatter(1, found.top_indices, found.top_acts)

    def loss(m: Any, x: Tensor) -> Tensor:
        found = m(x, dead_mask=torch.arange(m.num_latents) < DEAD)
        return found.fvu + found.auxk_loss / 32

    def eager(m: Any) -> None:
        def encode(m: Any, x: Tensor) -> Any:
            acts = torch.relu(m.encoder(x - m.b_dec))
            return output(*acts.topk(m.cfg.k), acts)

        m.encode = types.MethodType(encode, m)

    out = lambda m, x: m(x).sae_out  # noqa: E731
    return [Peer("sparsify SparseCoder", "eai-sparsify", make, codes, out, loss, eager=eager)]


def _openai() -> list[Peer]:
    module = _import("sparse_autoencoder.model")

    def make(D: int, M: int, K: int) -> Any:
        return module.Autoencoder(M, D, module.TopK(K), normalize=True)

    return [
        Peer(
            "OpenAI Autoencoder",
            "sparse_autoencoder",
            make,
            lambda m, x: m.encode(x)[0],
            lambda m, x: m(x)[2],
            lambda m, x: (m(x)[2] - x).square().mean(),
        )
    ]


PACKAGES = {
    "sae_lens": _sae_lens,
    "dictionary_learning": _dictionary_learning,
    "sparsify": _sparsify,
    "sparse_autoencoder": _openai,
}


def made(peer: Peer, size: tuple[int, int, int, int], double: bool = False) -> Any:
    """One with biases, norms and thresholds that are not the trivial ones of a start; the same each time."""
    torch.manual_seed(0)
    m = peer.make(*size[1:])
    with torch.no_grad():
        for name, p in m.named_parameters():
            p.mul_(1 + 0.2 * torch.rand(p.shape[:1] + (1,) * (p.ndim - 1)))
            if p.ndim == 1:
                p.add_(0.3 if name == "threshold" else 0.05 * torch.randn(p.shape))
        _make_sparse(m, *size)
    if double:
        m = m.to(torch.float64)
    return m


def _make_sparse(m: Any, B: int, D: int, M: int, K: int) -> None:
    """Where no k keeps codes few: K of them active in a row of normal numbers on average, as training leaves them."""
    of_layer = hasattr(m, "encoder")
    w = m.encoder.weight if of_layer else m.W_enc.T
    bias = m.encoder.bias if of_layer and hasattr(m.encoder, "bias") else getattr(m, "b_enc", None)
    if bias is None:
        return
    pre = torch.randn(512, D, generator=torch.Generator().manual_seed(2)) @ w.T + bias
    above = pre.flatten().kthvalue(int(pre.numel() * (1 - K / M))).values
    threshold = getattr(m, "threshold", None)
    if threshold is not None:
        threshold.fill_(above)
    elif not hasattr(m, "activation_fn") or type(m.activation_fn) is nn.ReLU:
        bias.sub_(above)


def _gradients(peer: Peer, m: Any, x: Tensor) -> dict[str, Tensor]:
    assert peer.loss
    m.zero_grad()
    x = x.clone().requires_grad_()
    peer.loss(m, x).backward()
    found = {name: p.grad for name, p in m.named_parameters() if p.grad is not None}
    return found | ({"input": x.grad} if x.grad is not None else {})


def _error(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-300))


def unequal_gradients(peer: Peer, size: tuple[int, int, int, int]) -> list[str]:
    """Complaints: gradients of a training step that are further from float64 than twice the package's own and some
    roundings; of the package's class itself, where that is wrong, it says so and by how much."""
    if peer.loss is None:
        return []
    truth, theirs, accelerated = made(peer, size, double=True), made(peer, size), made(peer, size)
    vf.accelerate(accelerated)
    for seed in range(20):
        x = torch.randn(GRADIENT_ROWS, size[1], generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            active = [
                peer.codes(m, x.to(d)) != 0
                for m, d in ((truth, torch.float64), (theirs, x.dtype), (accelerated, x.dtype))
            ]
        if torch.equal(active[0], active[1]) and torch.equal(active[0], active[2]):
            break
    else:
        return [f"{peer.name}: float32 chooses other latents than float64 in 20 batches"]
    own = _gradients(peer, theirs, x)
    if peer.eager:
        peer.eager(truth)
        peer.eager(theirs)
    true, plain, ours = (
        _gradients(peer, truth, x.double()),
        _gradients(peer, theirs, x),
        _gradients(peer, accelerated, x),
    )
    complaints = []
    if not set(ours) == set(plain) == set(true):
        complaints.append(f"{peer.name}: gradients of {sorted(ours)}, the package has {sorted(plain)}")
    for name in sorted(set(ours) & set(true)):
        error, yardstick = _error(ours[name], true[name]), _error(plain[name], true[name])
        allowed = 2 * yardstick + 8 * torch.finfo(torch.float32).eps
        if error > allowed:
            complaints.append(f"{peer.name}: gradient of {name}: error {error:.2g}, the package's {yardstick:.2g}")
        if peer.eager and _error(own[name], true[name]) > allowed:
            off = _error(own[name], true[name])
            print(f"{peer.name}: the package's own gradient of {name} is off by {off:.2g} of its largest; ours is not")
    return complaints


def timed(forms: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of each, in turn, so that a drift of the machine's speed meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for n in range(ROUNDS + 1):
        for name, form in forms.items():
            started = time.perf_counter()
            form()
            if n:
                times[name].append(time.perf_counter() - started)
    return times


def _backward(peer: Peer, m: nn.Module, x: Tensor) -> None:
    assert peer.loss
    m.zero_grad()
    peer.loss(m, x).backward()


def measure() -> tuple[list[dict[str, Any]], list[str]]:
    """Cases with their times, and complaints about what is not equal."""
    cases: list[dict[str, Any]] = []
    complaints: list[str] = []
    for package, peers in PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            print(f"{package}: not installed, so not measured")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = peers()
        for peer in found:
            for size in SIZES:
                try:
                    cases += _cases(peer, size)
                    complaints += unequal_gradients(peer, size)
                except vf.errors.BackendError as error:
                    complaints.append(f"{peer.name}: {error}")
    return cases, complaints


def _cases(peer: Peer, size: tuple[int, int, int, int]) -> list[dict[str, Any]]:
    B, D, M, K = size  # k is of those that have one
    theirs, accelerated = made(peer, size), made(peer, size)
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(1))
    report = vf.accelerate(accelerated, sample=x)
    if size == SIZES[0]:
        print(report)
    parts: dict[str, Callable[[Any], Any]] = {"forward": lambda m: peer.out(m, x)}
    if "encode" in report.replaced:  # what is left alone has nothing to compare
        parts["encode"] = lambda m: peer.codes(m, x)
    if peer.loss and set(peer.step) & set(report.replaced):
        parts["training step without optimizer"] = lambda m: _backward(peer, m, x)
    cases = []
    try:
        version = metadata.version(peer.distribution)
    except metadata.PackageNotFoundError:
        version = ""
    for part, call in parts.items():
        with torch.set_grad_enabled(part not in ("encode", "forward")):
            forms = {
                "accelerated": lambda c=call: c(accelerated),
                f"as it is {version}".strip(): lambda c=call: c(theirs),
            }
            times = timed(forms)
        for form, taken in times.items():
            low, middle, high = statistics.quantiles(taken, n=4)
            case = f"{peer.name}, {part}, {B} rows, D {D}, M {M}" + (
                f", k {K}" if "TopK" in peer.name or peer.eager else ""
            )
            facts = {"case": case, "form": form, "ours": form == "accelerated", "rounds": ROUNDS, "rows": B}
            cases.append({**facts, "median_s": middle, "iqr_s": high - low})
    if report.fallbacks:
        print(f"{peer.name}: fell back: {dict(report.fallbacks)}", file=sys.stderr)
    return cases
