"""SAELens (sae_lens 6): its autoencoders on our ops, and its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
    hooked,
    recall,
    remember,
    selected,
    setting,
    thresholded,
    why_dense,
    why_transformed,
)
from .weights import Weights, flipped, read_config, read_safetensors, take, whole, write_config, write_safetensors

PACKAGE = "sae_lens"
POINTS = ("hook_sae_acts_pre", "hook_sae_acts_post")  # what the fast encoders do not call


# --- shared ----------------------------------------------------------------------------------------------------------


def _rescales(sae: Any) -> bool:
    return bool(getattr(sae.cfg, "rescale_acts_by_decoder_norm", False))


def _linear(sae: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The input of the encoder's product, and its weights as (M, D), with the norms of the decoder in them if asked."""
    given, w, b = sae.process_sae_in(x), sae.W_enc.T, sae.b_enc
    if _rescales(sae):
        norm = sae.W_dec.norm(dim=-1)
        w, b = w * norm[:, None], b * norm
    return given, w, b


def _why(sae: Any, x: Any) -> str | None:
    return why_dense(sae, x, POINTS, sae.W_enc)


def _is(function: Any, where: str, name: str) -> bool:
    return (type(function).__module__, type(function).__name__) == (where, name)


def _reconstructed(sae: Any, sparse: Sparse, shape: torch.Size) -> Tensor:
    """What SAELens' decoders do, from sparse codes of a batch of this shape."""
    values = sparse.values
    if _rescales(sae):
        values = values * (1 / sae.W_dec.norm(dim=-1)).index_select(0, sparse.indices.flatten()).view_as(values)
    y = OPS.sparse_decode(values, sparse.indices, sae.W_dec, sae.b_dec, offsets=sparse.offsets)
    y = sae.run_time_activation_norm_fn_out(sae.hook_sae_recons(y.view(*shape, y.shape[-1])))
    return sae.reshape_fn_out(y, sae.d_head)


def _watched(sae: Any) -> bool:
    return any(hooked(getattr(sae, name)) for name in POINTS)


def _decode(sae: Any, feature_acts: Tensor) -> Tensor:
    sparse = recall(sae, feature_acts)
    if sparse is not None and feature_acts.requires_grad and _watched(sae):
        sparse = None  # hooks may want the gradient of dense codes
    if sparse is None or torch.is_autocast_enabled(feature_acts.device.type):
        return type(sae).decode(sae, feature_acts)
    return _reconstructed(sae, sparse, feature_acts.shape[:-1])


# --- TopK ------------------------------------------------------------------------------------------------------------


def _why_topk(sae: Any, x: Any) -> str | None:
    if not _is(sae.activation_fn, "sae_lens.saes.topk_sae", "TopK"):
        return f"activation_fn is {type(sae.activation_fn).__name__}"
    return _why(sae, x) or ("activation_fn has hooks" if hooked(sae.activation_fn) else None)


def _topk(sae: Any, x: Tensor) -> tuple[Sparse, torch.Size]:
    given, w, b = _linear(sae, x)
    return Sparse(*OPS.topk_encode(given, w, b, sae.activation_fn.k)), given.shape[:-1]


def _activation(activation: Any, x: Tensor) -> Tensor:
    """`TopK.forward`, which also runs where hooks want the dense pre-activations."""
    if activation.use_sparse_activations:
        return type(activation).forward(activation, x)
    values, indices = OPS.topk(x, activation.k)
    values = values.relu()
    return remember(activation, dense(values, indices, x.shape[-1]), Sparse(values, indices))


def _encode_topk(sae: Any, x: Tensor) -> Tensor:
    why = _why_topk(sae, x)
    if why:
        return fall_back(sae, "encode", why, x)
    sparse, _ = _topk(sae, x)
    return remember(sae, dense(sparse.values, sparse.indices, sae.W_dec.shape[0]), sparse)


def _forward_topk(sae: Any, x: Tensor) -> Tensor:
    why = _why_topk(sae, x) or ("use_error_term is on" if sae.use_error_term else None)
    if why:
        return fall_back(sae, "forward", why, x)
    return sae.hook_sae_output(_reconstructed(sae, *_topk(sae, x)))


def _encode_topk_in_training(sae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    why = _why_topk(sae, x)
    if why:
        return fall_back(sae, "encode_with_hidden_pre", why, x)
    given, w, b = _linear(sae, x)
    pre = given @ sae.W_enc + sae.b_enc
    if _rescales(sae):
        pre = pre * sae.W_dec.norm(dim=-1)
    values, indices = selected(pre, given, w, b, sae.activation_fn.k)
    return remember(sae, dense(values, indices, pre.shape[-1]), Sparse(values, indices)), pre


def _train(sae: Any, step_input: Any) -> Any:
    """The package's own step: without hooks, nobody asks for the gradient of its codes before they are decoded."""
    with setting(sae, own_codes=not _watched(sae)):
        return type(sae).training_forward_pass(sae, step_input)


# --- BatchTopK -------------------------------------------------------------------------------------------------------


def _why_batch(sae: Any, x: Any) -> str | None:
    if not _is(sae.activation_fn, "sae_lens.saes.batchtopk_sae", "BatchTopK"):
        return f"activation_fn is {type(sae.activation_fn).__name__}"
    if not float(sae.activation_fn.k).is_integer():
        return f"k = {sae.activation_fn.k} is no integer"
    return _why(sae, x) or ("activation_fn has hooks" if hooked(sae.activation_fn) else None)


def _batch(sae: Any, given: Tensor, w: Tensor, b: Tensor) -> Sparse:
    return Sparse(*OPS.topk_encode(given, w, b, int(sae.activation_fn.k), scope="batch"))


def _dense_batch(sae: Any, sparse: Sparse, shape: torch.Size) -> Tensor:
    return remember(sae, dense_csr(sparse, shape, sae.W_dec.shape[0]), sparse)


def _encode_batch(sae: Any, x: Tensor) -> Tensor:
    why = _why_batch(sae, x)
    if why:
        return fall_back(sae, "encode", why, x)
    given, w, b = _linear(sae, x)
    return _dense_batch(sae, _batch(sae, given, w, b), given.shape[:-1])


def _forward_batch(sae: Any, x: Tensor) -> Tensor:
    why = _why_batch(sae, x) or ("use_error_term is on" if sae.use_error_term else None)
    if why:
        return fall_back(sae, "forward", why, x)
    given, w, b = _linear(sae, x)
    return sae.hook_sae_output(_reconstructed(sae, _batch(sae, given, w, b), given.shape[:-1]))


def _encode_batch_in_training(sae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    why = _why_batch(sae, x)
    if why:
        return fall_back(sae, "encode_with_hidden_pre", why, x)
    given, w, b = _linear(sae, x)
    pre = given @ sae.W_enc + sae.b_enc  # made twice: choosing from a flat sort is what costs
    if _rescales(sae):
        pre = pre * sae.W_dec.norm(dim=-1)
    return _dense_batch(sae, _batch(sae, given, w, b), given.shape[:-1]), pre


# --- thresholds ------------------------------------------------------------------------------------------------------


def _why_relu(sae: Any, x: Any) -> str | None:
    if type(sae.activation_fn) is not nn.ReLU:
        return f"activation_fn is {type(sae.activation_fn).__name__}"
    return _why(sae, x) or why_transformed() or ("activation_fn has hooks" if hooked(sae.activation_fn) else None)


def _jump_threshold(sae: Any) -> Tensor:
    return sae.threshold.detach()  # a mask passes it no gradient


def _decoded(sae: Any, codes: Tensor | Sparse, shape: torch.Size) -> Tensor:
    sparse = isinstance(codes, Sparse)
    return sae.hook_sae_output(_reconstructed(sae, codes, shape) if sparse else type(sae).decode(sae, codes))


def _why_forward(sae: Any, x: Any) -> str | None:
    return _why_relu(sae, x) or ("use_error_term is on" if sae.use_error_term else None)


def _encode_relu(sae: Any, x: Tensor) -> Tensor:
    why = _why_relu(sae, x)
    if why:
        return fall_back(sae, "encode", why, x)
    return OPS.threshold_encode(*_linear(sae, x))


def _forward_relu(sae: Any, x: Tensor) -> Tensor:
    why = _why_forward(sae, x)
    if why:
        return fall_back(sae, "forward", why, x)
    given, w, b = _linear(sae, x)
    return _decoded(sae, thresholded(given, w, b, 0.0, "relu"), given.shape[:-1])


def _encode_jump(sae: Any, x: Tensor) -> Tensor:
    why = _why_relu(sae, x)
    if why:
        return fall_back(sae, "encode", why, x)
    return OPS.threshold_encode(*_linear(sae, x), _jump_threshold(sae))


def _forward_jump(sae: Any, x: Tensor) -> Tensor:
    why = _why_forward(sae, x)
    if why:
        return fall_back(sae, "forward", why, x)
    given, w, b = _linear(sae, x)
    return _decoded(sae, thresholded(given, w, b, _jump_threshold(sae), "relu"), given.shape[:-1])


def _why_jump_training(sae: Any, x: Any) -> str | None:
    on = sae.cfg.jumprelu_ste_to_input and torch.is_grad_enabled()
    return _why(sae, x) or why_transformed() or ("jumprelu_ste_to_input is on" if on else None)


def _encode_jump_in_training(sae: Any, x: Tensor) -> Tensor:
    why = _why_jump_training(sae, x)
    if why:
        return fall_back(sae, "encode", why, x)
    given, w, b = _linear(sae, x)
    return OPS.threshold_encode(given, w, b, sae.threshold.to(given.dtype), "jump", bandwidth=sae.bandwidth)


def _forward_jump_in_training(sae: Any, x: Tensor) -> Tensor:
    why = _why_jump_training(sae, x) or ("use_error_term is on" if sae.use_error_term else None)
    if why:
        return fall_back(sae, "forward", why, x)
    given, w, b = _linear(sae, x)
    codes = thresholded(given, w, b, sae.threshold.to(given.dtype), "jump", bandwidth=sae.bandwidth)
    return _decoded(sae, codes, given.shape[:-1])


# --- plans -----------------------------------------------------------------------------------------------------------

_DENSE_TRAINING = "its losses want the dense pre-activations, so there is nothing to fuse"


def _plan(sae: Any, methods: dict, left: dict[str, str], cut: Cut, parts: dict | None = None) -> Plan:
    z = sae.hook_z_reshaping_mode
    left |= {"hooks on " + " or ".join(POINTS): "a call with such hooks runs as the package has it"}
    return Plan(
        distribution="sae-lens",
        width=sae.W_dec.shape[1],
        latents=sae.W_dec.shape[0],
        weight=sae.W_enc,
        methods=methods,
        left=left,
        linear=_linear,
        cuts={"activations": cut},
        checks=[
            Check("activations", _codes, "activations"),
            Check("reconstruction", lambda sae, x: sae(x), "activations"),
        ],
        points=POINTS,
        parts=parts or {},
        sample_shape=None if z else (sae.W_enc.shape[0],),
    )


def _codes(sae: Any, x: Tensor) -> Tensor:
    codes = sae.encode(x)
    return codes.to_dense() if codes.is_sparse else codes


_TOPK = ("topk_encode", "sparse_decode")


def _plan_topk(sae: Any) -> Plan:
    methods = {
        "encode": (_encode_topk, ("topk_encode",)),
        "decode": (_decode, ("sparse_decode",)),
        "forward": (_forward_topk, _TOPK),
    }
    return _plan(sae, methods, {}, Cut(sae.activation_fn.k), {"activation_fn": (_activation, ("topk",))})


def _plan_topk_training(sae: Any) -> Plan:
    methods: dict = {"forward": (_forward_topk, _TOPK)}
    cut = Cut(sae.activation_fn.k)
    if sae.activation_fn.use_sparse_activations:
        why = "use_sparse_activations makes encode return a sparse COO tensor"
        left: dict[str, str] = dict.fromkeys(
            ("encode", "encode_with_hidden_pre", "decode", "training_forward_pass"), why
        )
        return _plan(sae, methods, left, cut)
    methods |= {
        "encode": (_encode_topk, ("topk_encode",)),
        "encode_with_hidden_pre": (_encode_topk_in_training, ("topk",)),
        "decode": (_decode, ("sparse_decode",)),
        "training_forward_pass": (_train, ("topk", "sparse_decode")),
    }
    left = {"calculate_aux_loss": "it is the package's own, on dense pre-activations"}
    return _plan(sae, methods, left, cut, {"activation_fn": (_activation, ("topk",))})


def _plan_batch(sae: Any) -> Plan:
    methods = {
        "encode": (_encode_batch, ("topk_encode",)),
        "encode_with_hidden_pre": (_encode_batch_in_training, ("topk_encode",)),
        "decode": (_decode, ("sparse_decode",)),
        "forward": (_forward_batch, _TOPK),
        "training_forward_pass": (_train, _TOPK),
    }
    left = {"calculate_aux_loss": "it is the package's own, on dense pre-activations"}
    k = sae.activation_fn.k
    if not float(k).is_integer():
        methods, left = {}, {"all": f"k = {k} is no integer"}
    return _plan(sae, methods, left, Cut(int(k), batch=True))


_THRESHOLD = ("threshold_encode", "topk", "sparse_decode")
_RELU = {"encode": (_encode_relu, ("threshold_encode",)), "forward": (_forward_relu, _THRESHOLD)}


def _plan_relu(sae: Any) -> Plan:
    return _plan(sae, _RELU, {"decode": DENSE_DECODER}, Cut())


def _plan_relu_training(sae: Any) -> Plan:
    return _plan(sae, _RELU, {"decode": DENSE_DECODER, "training_forward_pass": _DENSE_TRAINING}, Cut())


def _plan_jump(sae: Any) -> Plan:
    methods = {"encode": (_encode_jump, ("threshold_encode",)), "forward": (_forward_jump, _THRESHOLD)}
    return _plan(sae, methods, {"decode": DENSE_DECODER}, Cut(threshold=sae.threshold.detach()))


def _plan_jump_training(sae: Any) -> Plan:
    methods = {
        "encode": (_encode_jump_in_training, ("threshold_encode",)),
        "forward": (_forward_jump_in_training, _THRESHOLD),
    }
    left = {"decode": DENSE_DECODER, "training_forward_pass": _DENSE_TRAINING}
    return _plan(sae, methods, left, Cut(threshold=sae.threshold.detach(), relu=False))


CLASSES = {
    ("sae_lens.saes.topk_sae", "TopKSAE"): _plan_topk,
    ("sae_lens.saes.topk_sae", "TopKTrainingSAE"): _plan_topk_training,
    ("sae_lens.saes.batchtopk_sae", "BatchTopKTrainingSAE"): _plan_batch,
    ("sae_lens.saes.standard_sae", "StandardSAE"): _plan_relu,
    ("sae_lens.saes.standard_sae", "StandardTrainingSAE"): _plan_relu_training,
    ("sae_lens.saes.jumprelu_sae", "JumpReLUSAE"): _plan_jump,
    ("sae_lens.saes.jumprelu_sae", "JumpReLUTrainingSAE"): _plan_jump_training,
}


# --- files -----------------------------------------------------------------------------------------------------------

_KINDS = {"topk": "topk", "batchtopk": "batch_topk", "standard": "relu", "jumprelu": "jumprelu"}  # architecture -> kind
_TENSORS, _CONFIG = "sae_weights.safetensors", "cfg.json"


def load(path: str | Path) -> Weights:
    """The folder of `sae.save_model` or `save_inference_model`: sae_weights.safetensors and cfg.json.

    Norms of the decoder that the package would multiply pre-activations by (rescale_acts_by_decoder_norm) are folded
    into the weights as `save_inference_model` does. InputError for another architecture, a normalisation that is made
    when it runs, or a damaged file.
    """
    path = Path(path)
    config = read_config(path / _CONFIG)
    tensors = read_safetensors(path / _TENSORS)
    kind = _KINDS.get(config.get("architecture", ""))
    if kind is None:
        raise InputError(
            f"{path}: architecture {config.get('architecture')!r} is not known; known: {', '.join(_KINDS)}"
        )
    normalised = config.get("normalize_activations", "none")
    if normalised in ("constant_norm_rescale", "layer_norm"):
        raise InputError(f"{path}: normalize_activations {normalised!r} is done at run time, which is not supported")
    w_enc, b_enc, w_dec, b_dec = take(tensors, path, "W_enc", "b_enc", "W_dec", "b_dec")
    if config.get("rescale_acts_by_decoder_norm"):
        norm = w_dec.norm(dim=-1).clamp(min=1e-8)
        w_enc, b_enc, w_dec = w_enc * norm, b_enc * norm, w_dec / norm[:, None]
        config = config | {"rescale_acts_by_decoder_norm": False}
    threshold = tensors.get("threshold", tensors.get("topk_threshold"))
    k = whole(config.get("k"), path) if kind in ("topk", "batch_topk") else None
    centred = bool(config.get("apply_b_dec_to_input", True))
    return Weights(flipped(w_enc), b_enc, w_dec, b_dec, kind, centred, threshold, k, config)


def save(path: str | Path, weights: Weights) -> None:
    """Writes the folder that `SAE.load_from_disk` reads. Batch top-k is written as the JumpReLU it is in use, as the
    package does. InputError for a kind that it does not have."""
    path, kind = Path(path), "jumprelu" if weights.kind == "batch_topk" else weights.kind
    architecture = {"topk": "topk", "relu": "standard", "jumprelu": "jumprelu"}.get(kind)
    if architecture is None:
        raise InputError(f"weights.kind: expected topk, batch_topk, relu or jumprelu, got {weights.kind!r}")
    tensors = {"W_enc": weights.w_enc.T, "b_enc": weights.b_enc, "W_dec": weights.w_dec, "b_dec": weights.b_dec}
    M, D = weights.w_enc.shape
    config = {
        **{"normalize_activations": "none", "reshape_activations": "none", "metadata": {}},
        **weights.config,
        **{"architecture": architecture, "d_in": D, "d_sae": M, "device": "cpu"},
        **{"dtype": str(weights.w_enc.dtype).removeprefix("torch."), "apply_b_dec_to_input": weights.centred},
    }
    if kind == "topk":
        if weights.k is None:
            raise InputError("weights.k: a top-k autoencoder needs it")
        config |= {"k": weights.k, "rescale_acts_by_decoder_norm": False}
    if kind == "jumprelu":
        if weights.threshold is None:
            raise InputError("weights.threshold: a JumpReLU autoencoder needs it")
        tensors["threshold"] = weights.threshold.to(weights.b_enc.dtype).expand(M)
    write_safetensors(path / _TENSORS, tensors)
    write_config(path / _CONFIG, config)
