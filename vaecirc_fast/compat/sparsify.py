"""sparsify (eai-sparsify 1.3): its sparse coders on our ops, and its files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .methods import (
    OPS,
    Check,
    Cut,
    Plan,
    fall_back,
    globally_hooked,
    hooked,
    plain_linear,
    selected,
    setting,
    state_of,
)
from .weights import Weights, read_config, read_safetensors, take, whole, write_config, write_safetensors

PACKAGE = "sparsify"


def _linear(coder: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    given = x if coder.cfg.transcode else x - coder.b_dec
    return given, coder.encoder.weight, coder.encoder.bias


def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As autocast does with the inputs of a linear layer: the package's forward always has it on on GPUs."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _why(coder: Any, x: Any) -> str | None:
    if coder.cfg.activation != "topk":
        return f"the activation is {coder.cfg.activation}"
    if plain_linear(coder, "encoder"):
        return plain_linear(coder, "encoder")
    if hooked(coder.encoder) or globally_hooked():
        return None  # the package's own encode calls no module either
    if x.dtype != coder.encoder.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"the input is {x.dtype} and the weights are {coder.encoder.weight.dtype}"
    return None


def _encode(coder: Any, x: Tensor) -> Any:
    """Gradients are those of relu, topk and autograd. The package's own differ: nothing flows through pre_acts, so AuxK
    trains no encoder, and a chosen 0 passes a gradient that ReLU has not."""
    why = _why(coder, x)
    if why:
        return fall_back(coder, "encode", why, x)
    given, w, b = _cast(*_linear(coder, x))
    if state_of(coder).sparse_only:
        values, indices = OPS.topk_encode(given, w, b, coder.cfg.k)
        acts = values.new_empty(0)  # forward does not look at it
    else:
        acts = torch.relu(torch.nn.functional.linear(given, w, b))
        values, indices = selected(acts, given, w, b, coder.cfg.k)
    return _output(coder)(values, indices.long(), acts)


def _output(coder: Any) -> Any:
    """The package's own tuple. It is imported, for there is a coder."""
    return sys.modules["sparsify.fused_encoder"].EncoderOutput


def _decode(coder: Any, top_acts: Tensor, top_indices: Tensor) -> Tensor:
    if coder.W_dec is None:
        return type(coder).decode(coder, top_acts, top_indices)
    return OPS.sparse_decode(top_acts.to(coder.W_dec.dtype), top_indices, coder.W_dec, coder.b_dec)


def _forward(
    coder: Any,
    x: Tensor,
    y: Tensor | None = None,
    *,
    dead_mask: Tensor | None = None,
    total_variance: Tensor | None = None,
) -> Any:
    """The package's own forward, which looks at dense pre-activations for two losses only; one of these, AuxK, is here
    without them."""
    rest = {"dead_mask": dead_mask, "total_variance": total_variance}
    aux = dead_mask is not None and bool(dead_mask.any())
    plain = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and coder.W_dec is not None
    if dead_mask is not None and aux and plain and not coder.cfg.multi_topk and not _why(coder, x):
        return _forward_with_aux(coder, x, x if y is None else y, dead_mask, total_variance)
    with setting(coder, sparse_only=not (aux or coder.cfg.multi_topk)):
        return type(coder).forward(coder, x, y, **rest)


def _forward_with_aux(coder: Any, x: Tensor, y: Tensor, dead_mask: Tensor, total_variance: Tensor | None) -> Any:
    """AuxK of Gao et al. 2024 (arXiv 2406.04093, appendix A.2) as the package scales it."""
    dead = int(dead_mask.sum())
    wanted = y.shape[-1] // 2
    codes = OPS.topk_encode(*_linear(coder, x), coder.cfg.k, dead=dead_mask.bool(), k_aux=min(wanted, dead))
    out = coder.decode(codes.values, codes.indices)
    if coder.W_skip is not None:
        out = out + x @ coder.W_skip.mT
    residual = y - out
    total = (y - y.mean(0)).pow(2).sum() if total_variance is None else total_variance
    missed = OPS.sparse_decode(codes.aux_values, codes.aux_indices, coder.W_dec) - residual.detach()
    auxk_loss = min(dead / wanted, 1.0) * missed.pow(2).sum() / total
    fvu = residual.pow(2).sum() / total
    output = sys.modules["sparsify.sparse_coder"].ForwardOutput
    return output(out, codes.values, codes.indices.long(), fvu, auxk_loss, out.new_tensor(0.0))


def _codes(coder: Any, x: Tensor) -> Tensor:
    found = coder.encode(x)
    return torch.zeros_like(found.pre_acts).scatter(-1, found.top_indices, found.top_acts)


def _reconstructed(coder: Any, x: Tensor) -> Tensor:
    return coder(x).sae_out


def _plan(coder: Any) -> Plan:
    methods = {
        "encode": (_encode, ("topk",)),
        "decode": (_decode, ("sparse_decode",)),
        "forward": (_forward, ("topk_encode", "sparse_decode")),
    }
    left = {"multi_topk": "the package's own, on dense pre-activations"}
    differs = {
        "gradients of encode": "those of relu, topk and autograd; the package's fused encoder drops what comes through "
        "pre_acts, so AuxK trains no encoder, and lets some through chosen zeros"
    }
    if coder.cfg.activation != "topk":
        del methods["encode"], methods["forward"]
        left, differs = {"encode": f"the activation is {coder.cfg.activation}"}, {}
    checks = [Check("activations", _codes, "activations")]
    if coder.W_dec is not None:
        checks.append(Check("reconstruction", _reconstructed, "activations"))
    return Plan(
        distribution="eai-sparsify",
        width=coder.d_in,
        latents=coder.num_latents,
        weight=coder.encoder.weight,
        methods=methods,
        left=left,
        linear=_linear,
        cuts={"activations": Cut(coder.cfg.k)},
        checks=checks,
        points=(),
        differs=differs,
        sample_shape=(coder.d_in,),
    )


CLASSES = {("sparsify.sparse_coder", "SparseCoder"): _plan}


# --- files -----------------------------------------------------------------------------------------------------------


def load(path: str | Path) -> Weights:
    """The folder of `save_to_disk`: sae.safetensors and cfg.json. InputError for group-max or a skip connection, which
    are other models, for a coder without decoder, or a damaged file."""
    path = Path(path)
    config, tensors = read_config(path / "cfg.json"), read_safetensors(path / "sae.safetensors")
    if config.get("activation", "topk") != "topk":
        raise InputError(f"{path}: activation {config['activation']!r} is not supported, expected topk")
    if "W_skip" in tensors:
        raise InputError(f"{path}: has a skip connection, which is not supported")
    w_enc, b_enc, w_dec, b_dec = take(tensors, path, "encoder.weight", "encoder.bias", "W_dec", "b_dec")
    centred = not config.get("transcode", False)
    return Weights(w_enc, b_enc, w_dec, b_dec, "topk", centred, None, whole(config.get("k", 32), path), config)


def save(path: str | Path, weights: Weights) -> None:
    """Writes the folder that `SparseCoder.load_from_disk` reads. InputError for another kind than top-k."""
    if weights.kind != "topk" or weights.k is None:
        raise InputError(f"weights.kind: expected topk with a k, got {weights.kind!r} with k {weights.k}")
    path, (M, D) = Path(path), weights.w_enc.shape
    tensors = {"encoder.weight": weights.w_enc, "encoder.bias": weights.b_enc, "W_dec": weights.w_dec}
    ours = {"activation": "topk", "num_latents": M, "k": weights.k, "transcode": not weights.centred, "d_in": D}
    write_safetensors(path / "sae.safetensors", tensors | {"b_dec": weights.b_dec})
    write_config(path / "cfg.json", weights.config | ours)
