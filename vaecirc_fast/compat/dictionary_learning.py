"""dictionary_learning (0.1): its autoencoders on our ops, and its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .methods import (
    DENSE_DECODER,
    OPS,
    Check,
    Cut,
    Plan,
    Sparse,
    dense,
    dense_csr,
    fall_back,
    plain_linear,
    recall,
    remember,
    selected,
    thresholded,
    why_dense,
    why_other_dtype,
    why_transformed,
)
from .weights import Weights, flipped, read_config, read_pickled, take, whole, write_pickled

PACKAGE = "dictionary_learning"
LAYERS = ("encoder", "decoder")


# --- shared ----------------------------------------------------------------------------------------------------------


def _linear(ae: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x - ae.b_dec, ae.encoder.weight, ae.encoder.bias


def _why(ae: Any, x: Any) -> str | None:
    why = plain_linear(ae, *LAYERS) or why_dense(ae, x, LAYERS, ae.encoder.weight)
    return why or why_other_dtype(x, ae.encoder.weight)


def _reconstructed(ae: Any, sparse: Sparse, shape: torch.Size) -> Tensor:
    y = OPS.sparse_decode(sparse.values, sparse.indices, ae.decoder.weight.T, ae.b_dec, offsets=sparse.offsets)
    return y.view(*shape, y.shape[-1])


def _decode(ae: Any, x: Tensor) -> Tensor:
    sparse = recall(ae, x)
    if sparse is None or _why(ae, x):
        return type(ae).decode(ae, x)
    return _reconstructed(ae, sparse, x.shape[:-1])


def _above(ae: Any, x: Tensor) -> Tensor:
    """Activations above the one threshold that training has found; below 0 while it has found none."""
    return OPS.threshold_encode(*_linear(ae, x), ae.threshold.to(x.dtype))


# --- TopK ------------------------------------------------------------------------------------------------------------


def _topk(ae: Any, x: Tensor) -> Sparse:
    return Sparse(*OPS.topk_encode(*_linear(ae, x), int(ae.k)))


def _encode_topk(ae: Any, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
    why = _why(ae, x) or ("return_topk with use_threshold" if return_topk and use_threshold else None)
    why = why or (why_transformed() if use_threshold else None)
    if why:
        return fall_back(ae, "encode", why, x, return_topk, use_threshold)
    if use_threshold:
        return _above(ae, x)
    if not return_topk:
        sparse = _topk(ae, x)
        return remember(ae, dense(sparse.values, sparse.indices, ae.dict_size), sparse)
    given, w, b = _linear(ae, x)
    acts = torch.relu(torch.nn.functional.linear(given, w, b))
    values, indices = selected(acts, given, w, b, int(ae.k))
    codes = remember(ae, dense(values, indices, ae.dict_size), Sparse(values, indices))
    return codes, values, indices.long(), acts


def _forward_topk(ae: Any, x: Tensor, output_features: bool = False) -> Any:
    why = _why(ae, x)
    if why:
        return fall_back(ae, "forward", why, x, output_features)
    if output_features:  # the codes are seen, so encode and decode are two calls
        return type(ae).forward(ae, x, output_features)
    return _reconstructed(ae, _topk(ae, x), x.shape[:-1])


# --- BatchTopK -------------------------------------------------------------------------------------------------------


def _encode_batch(ae: Any, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
    why = _why(ae, x) or (why_transformed() if use_threshold else None)
    if not why and not use_threshold and x.ndim != 2:
        why = f"BatchTopK of an input of {x.ndim} dimensions"  # the package then keeps k entries a first index
    if why:
        return fall_back(ae, "encode", why, x, return_active, use_threshold)
    if use_threshold:
        codes = _above(ae, x)
    else:
        sparse = Sparse(*OPS.topk_encode(*_linear(ae, x), int(ae.k), scope="batch"))
        codes = remember(ae, dense_csr(sparse, x.shape[:-1], ae.dict_size), sparse)
    if not return_active:
        return codes
    acts = torch.relu(ae.encoder(x - ae.b_dec))  # made twice: choosing from a flat sort is what costs
    return codes, codes.sum(0) > 0, acts


def _forward_batch(ae: Any, x: Tensor, output_features: bool = False) -> Any:
    why = _why(ae, x) or why_transformed()
    if why:
        return fall_back(ae, "forward", why, x, output_features)
    if output_features:
        return type(ae).forward(ae, x, output_features)
    codes = thresholded(*_linear(ae, x), ae.threshold.to(x.dtype), "relu")
    return _reconstructed(ae, codes, x.shape[:-1]) if isinstance(codes, Sparse) else type(ae).decode(ae, codes)


# --- ReLU, JumpReLU --------------------------------------------------------------------------------------------------


def _linear_relu(ae: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x - ae.bias, ae.encoder.weight, ae.encoder.bias


def _encode_relu(ae: Any, x: Tensor) -> Tensor:
    why = _why(ae, x) or why_transformed()
    if why:
        return fall_back(ae, "encode", why, x)
    return OPS.threshold_encode(*_linear_relu(ae, x))


def _forward_relu(ae: Any, x: Tensor, output_features: bool = False, ghost_mask: Tensor | None = None) -> Any:
    why = _why(ae, x) or why_transformed()
    if why:
        return fall_back(ae, "forward", why, x, output_features, ghost_mask)
    if output_features or ghost_mask is not None:
        return type(ae).forward(ae, x, output_features, ghost_mask)
    codes = thresholded(*_linear_relu(ae, x), 0.0, "relu")
    if isinstance(codes, Tensor):
        return type(ae).decode(ae, codes)
    return OPS.sparse_decode(codes.values, codes.indices, ae.decoder.weight.T, ae.bias)


def _linear_jump(ae: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x - ae.b_dec if ae.apply_b_dec_to_input else x, ae.W_enc.T, ae.b_enc


def _encode_jump(ae: Any, x: Tensor, output_pre_jump: bool = False) -> Any:
    why = why_dense(ae, x, (), ae.W_enc) or why_other_dtype(x, ae.W_enc) or why_transformed()
    if not why and output_pre_jump:
        why = "output_pre_jump asks for dense pre-activations"
    if why:
        return fall_back(ae, "encode", why, x, output_pre_jump)
    return OPS.threshold_encode(*_linear_jump(ae, x), ae.threshold.detach())  # a mask gives its threshold no gradient


def _forward_jump(ae: Any, x: Tensor, output_features: bool = False) -> Any:
    why = why_dense(ae, x, (), ae.W_enc) or why_other_dtype(x, ae.W_enc) or why_transformed()
    if why:
        return fall_back(ae, "forward", why, x, output_features)
    if output_features:
        return type(ae).forward(ae, x, output_features)
    codes = thresholded(*_linear_jump(ae, x), ae.threshold.detach(), "relu")
    if isinstance(codes, Tensor):
        return type(ae).decode(ae, codes)
    return OPS.sparse_decode(codes.values, codes.indices, ae.W_dec, ae.b_dec)


# --- plans -----------------------------------------------------------------------------------------------------------


_THRESHOLD = ("threshold_encode", "topk", "sparse_decode")


def _plan(ae: Any, methods: dict, left: dict[str, str], cut: Cut, linear: Any, layers: tuple[str, ...]) -> Plan:
    weight = ae.encoder.weight if layers else ae.W_enc
    if layers:
        left |= {"hooks on " + " or ".join(layers): "a call with such hooks runs as the package has it"}
    return Plan(
        distribution="dictionary-learning",
        width=ae.activation_dim,
        latents=ae.dict_size,
        weight=weight,
        methods=methods,
        left=left,
        linear=linear,
        cuts={"activations": cut},
        checks=[
            Check("activations", lambda ae, x: ae.encode(x), "activations"),
            Check("reconstruction", lambda ae, x: ae(x), "activations"),
        ],
        points=layers,
        sample_shape=(ae.activation_dim,),
    )


def _plan_topk(ae: Any) -> Plan:
    methods = {
        "encode": (_encode_topk, ("topk_encode", "topk", "threshold_encode")),
        "decode": (_decode, ("sparse_decode",)),
        "forward": (_forward_topk, ("topk_encode", "sparse_decode")),
    }
    return _plan(ae, methods, {}, Cut(int(ae.k)), _linear, LAYERS)


def _batch_codes(ae: Any, x: Tensor) -> Tensor:
    return ae.encode(x.reshape(-1, x.shape[-1]), use_threshold=False)


def _plan_batch(ae: Any) -> Plan:
    methods = {
        "encode": (_encode_batch, ("topk_encode", "threshold_encode")),
        "decode": (_decode, ("sparse_decode",)),
        "forward": (_forward_batch, _THRESHOLD),
    }
    left = {"decode of codes above the threshold": DENSE_DECODER}
    plan = _plan(ae, methods, left, Cut(threshold=ae.threshold), _linear, LAYERS)
    plan.cuts["activations of BatchTopK"] = Cut(int(ae.k), batch=True)
    plan.checks.append(Check("activations of BatchTopK", _batch_codes, "activations of BatchTopK"))
    return plan


def _plan_relu(ae: Any) -> Plan:
    methods = {"encode": (_encode_relu, ("threshold_encode",)), "forward": (_forward_relu, _THRESHOLD)}
    left = {"decode": DENSE_DECODER, "ghost_mask": "the package's own, on dense pre-activations"}
    return _plan(ae, methods, left, Cut(), _linear_relu, LAYERS)


def _plan_jump(ae: Any) -> Plan:
    methods = {"encode": (_encode_jump, ("threshold_encode",)), "forward": (_forward_jump, _THRESHOLD)}
    return _plan(ae, methods, {"decode": DENSE_DECODER}, Cut(threshold=ae.threshold.detach()), _linear_jump, ())


CLASSES = {
    ("dictionary_learning.trainers.top_k", "AutoEncoderTopK"): _plan_topk,
    ("dictionary_learning.trainers.batch_top_k", "BatchTopKSAE"): _plan_batch,
    ("dictionary_learning.dictionary", "AutoEncoder"): _plan_relu,
    ("dictionary_learning.dictionary", "JumpReluAutoEncoder"): _plan_jump,
}


# --- files -----------------------------------------------------------------------------------------------------------


def load(path: str | Path) -> Weights:
    """An `ae.pt` that the package's trainers write, or the folder with it. The keys say which class it is; of the two
    with encoder, decoder, b_dec and k, a config.json beside it says which, else it is taken for top-k.

    InputError for gated autoencoders, other keys, or a file that is not plain tensors.
    """
    path = Path(path)
    path = path / "ae.pt" if path.is_dir() else path
    state = read_pickled(path)
    beside = path.parent / "config.json"
    config = read_config(beside) if beside.is_file() else {}
    if "W_enc" in state:
        w_enc, b_enc, w_dec, b_dec, threshold = take(state, path, "W_enc", "b_enc", "W_dec", "b_dec", "threshold")
        centred = bool(config.get("apply_b_dec_to_input", False))
        return Weights(flipped(w_enc), b_enc, w_dec.contiguous(), b_dec, "jumprelu", centred, threshold, None, config)
    w_enc, b_enc, w_dec = take(state, path, "encoder.weight", "encoder.bias", "decoder.weight")
    w_enc, w_dec = w_enc.contiguous(), flipped(w_dec)
    if "k" in state:
        (b_dec,) = take(state, path, "b_dec")
        kind = "batch_topk" if config.get("trainer", config).get("dict_class") == "BatchTopKSAE" else "topk"
        threshold = state.get("threshold")
        if threshold is not None and float(threshold) < 0:
            threshold = None  # training has found none
        return Weights(w_enc, b_enc, w_dec, b_dec, kind, True, threshold, whole(state["k"], path), config)
    centred = "bias" in state
    (b_dec,) = take(state, path, "bias" if centred else "decoder.bias")
    return Weights(w_enc, b_enc, w_dec, b_dec, "relu", centred, None, None, config)


def save(path: str | Path, weights: Weights) -> None:
    """Writes the state_dict of AutoEncoderTopK, BatchTopKSAE, AutoEncoder or JumpReluAutoEncoder to `path`.

    InputError for what these classes cannot be: top-k and ReLU centre their input, and a threshold is one for all but
    for JumpReLU.
    """
    state: dict[str, Any]
    if weights.kind == "jumprelu":
        if weights.threshold is None:
            raise InputError("weights.threshold: a JumpReLU autoencoder needs it")
        threshold = weights.threshold.to(weights.b_enc.dtype).expand(len(weights.b_enc))
        state = {"W_enc": weights.w_enc.T, "b_enc": weights.b_enc, "W_dec": weights.w_dec, "b_dec": weights.b_dec}
        write_pickled(Path(path), state | {"threshold": threshold})
        return
    if not weights.centred and weights.kind != "relu":
        raise InputError("weights.centred: these classes subtract b_dec from their input")
    state = {"encoder.weight": weights.w_enc, "encoder.bias": weights.b_enc, "decoder.weight": weights.w_dec.T}
    if weights.kind == "relu":
        state |= {"bias" if weights.centred else "decoder.bias": weights.b_dec}
    elif weights.kind in ("topk", "batch_topk"):
        if weights.k is None:
            raise InputError("weights.k: a top-k autoencoder needs it")
        if weights.threshold is not None and weights.threshold.ndim:
            raise InputError(f"weights.threshold: expected one for all latents, got {tuple(weights.threshold.shape)}")
        threshold = torch.tensor(-1.0) if weights.threshold is None else weights.threshold.float()
        state |= {"b_dec": weights.b_dec, "k": torch.tensor(weights.k, dtype=torch.int32), "threshold": threshold}
    else:
        raise InputError(f"weights.kind: expected topk, batch_topk, relu or jumprelu, got {weights.kind!r}")
    write_pickled(Path(path), state)
