"""OpenAI's sparse_autoencoder: its Autoencoder on our ops, and its files."""

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
    fall_back,
    hooked,
    plain_linear,
    recall,
    remember,
    why_dense,
    why_other_dtype,
    why_transformed,
)
from .weights import Weights, flipped, read_pickled, take, whole, write_pickled

PACKAGE = "sparse_autoencoder"
WHERE = "sparse_autoencoder.model"
POSTS = {nn.ReLU: "relu", nn.Identity: "identity"}


def _linear(ae: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return ae.preprocess(x)[0] - ae.pre_bias, ae.encoder.weight, ae.latent_bias


def _kind(ae: Any) -> str | None:
    """Which of the known activations it has, "topk" or "relu"; None for another."""
    if (type(ae.activation).__module__, type(ae.activation).__name__) == (WHERE, "TopK"):
        return "topk"
    return "relu" if type(ae.activation) is nn.ReLU else None


def _why(ae: Any, x: Any) -> str | None:
    activation = ae.activation
    if _kind(ae) is None:
        return f"the activation is {type(activation).__name__}"
    if _kind(ae) == "relu" and why_transformed():
        return why_transformed()
    if _kind(ae) == "topk" and type(activation.postact_fn) not in POSTS:
        return f"postact_fn is {type(activation.postact_fn).__name__}"
    why = plain_linear(ae, "encoder") or why_dense(ae, x, ("encoder", "activation"), ae.encoder.weight)
    return why or why_other_dtype(x, ae.encoder.weight)


def _activation(activation: Any, x: Tensor) -> Tensor:
    if type(activation.postact_fn) not in POSTS:
        return type(activation).forward(activation, x)
    values, indices = OPS.topk(x, activation.k)
    values = activation.postact_fn(values)
    return remember(activation, dense(values, indices, x.shape[-1]), Sparse(values, indices))


def _encode(ae: Any, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    why = _why(ae, x)
    if why:
        return fall_back(ae, "encode", why, x)
    x, info = ae.preprocess(x)
    activation = ae.activation
    if _kind(ae) == "relu":
        return OPS.threshold_encode(x - ae.pre_bias, ae.encoder.weight, ae.latent_bias), info
    values, indices = OPS.topk_encode(
        *(x - ae.pre_bias, ae.encoder.weight, ae.latent_bias, activation.k),
        activation=POSTS[type(activation.postact_fn)],
    )
    return remember(ae, dense(values, indices, ae.encoder.out_features), Sparse(values, indices)), info


def _decode(ae: Any, latents: Tensor, info: dict[str, Any] | None = None) -> Tensor:
    sparse = recall(ae, latents)
    tied = (type(ae.decoder).__module__, type(ae.decoder).__name__) == (WHERE, "TiedTranspose")
    if not tied and plain_linear(ae, "decoder"):
        sparse = None
    if sparse is None or hooked(ae.decoder) or torch.is_autocast_enabled(latents.device.type):
        return type(ae).decode(ae, latents, info)
    y = OPS.sparse_decode(sparse.values, sparse.indices, ae.decoder.weight.T, ae.pre_bias)
    if ae.normalize:
        assert info is not None
        y = y * info["std"] + info["mu"]
    return y


def _codes(ae: Any, x: Tensor) -> Tensor:
    return ae.encode(x)[0]


def _reconstructed(ae: Any, x: Tensor) -> Tensor:
    return ae(x)[2]


def _plan(ae: Any) -> Plan:
    left = {
        "product of forward": "forward returns the dense pre-activations",
        "hooks on encoder, activation or decoder": "a call with such hooks runs as the package has it",
    }
    methods: dict = {}
    parts: dict = {}
    cut = Cut()
    if _kind(ae) == "topk":
        methods = {"encode": (_encode, ("topk_encode",)), "decode": (_decode, ("sparse_decode",))}
        parts = {"activation": (_activation, ("topk",))}
        cut = Cut(ae.activation.k, relu=type(ae.activation.postact_fn) is nn.ReLU)
    elif _kind(ae) == "relu":
        methods = {"encode": (_encode, ("threshold_encode",))}
        left["decode"] = DENSE_DECODER
    else:
        left = {"all": f"the activation is {type(ae.activation).__name__}, neither TopK nor ReLU"}
    return Plan(
        distribution="sparse-autoencoder",
        width=ae.encoder.in_features,
        latents=ae.encoder.out_features,
        weight=ae.encoder.weight,
        methods=methods,
        left=left,
        linear=_linear,
        cuts={"activations": cut},
        checks=[Check("activations", _codes, "activations"), Check("reconstruction", _reconstructed, "activations")],
        points=("encoder", "activation", "decoder"),
        parts=parts,
        sample_shape=(ae.encoder.in_features,),
    )


CLASSES = {(WHERE, "Autoencoder"): _plan}


# --- files -----------------------------------------------------------------------------------------------------------


def load(path: str | Path) -> Weights:
    """A .pt file of `Autoencoder.state_dict()`. The package normalises the input of a top-k autoencoder row by row when
    it runs; `config["normalize"]` is then True and `Weights` are those of normalised inputs.

    InputError for other activations or keys, or a file that is not plain tensors and values.
    """
    path = Path(path)
    state = read_pickled(path)
    w_enc, b_enc, b_dec = take(state, path, "encoder.weight", "latent_bias", "pre_bias")
    tied = "decoder.weight" not in state and "decoder.linear.weight" in state
    w_dec = w_enc.clone() if tied else flipped(take(state, path, "decoder.weight")[0])
    name, of_activation = state.get("activation", "ReLU"), state.get("activation_state_dict", {})
    if name == "TopK" and of_activation.get("postact_fn", "ReLU") == "ReLU":
        kind, k = "topk", whole(of_activation.get("k"), path)
    elif name == "ReLU":
        kind, k = "relu", None
    else:
        raise InputError(f"{path}: activation {name} {of_activation or ''} is not supported, expected ReLU or TopK")
    return Weights(w_enc.contiguous(), b_enc, w_dec, b_dec, kind, True, None, k, {"normalize": name == "TopK"})


def save(path: str | Path, weights: Weights) -> None:
    """Writes the file that `Autoencoder.from_state_dict(torch.load(path))` reads. The package normalises inputs of
    top-k and of nothing else, so InputError where weights.config["normalize"] says otherwise; and for other kinds."""
    if weights.kind not in ("topk", "relu") or not weights.centred:
        raise InputError(f"weights.kind: expected topk or relu, centred, got {weights.kind!r}, {weights.centred}")
    if weights.kind == "topk" and weights.k is None:
        raise InputError("weights.k: a top-k autoencoder needs it")
    if bool(weights.config.get("normalize", False)) != (weights.kind == "topk"):
        raise InputError('weights.config["normalize"]: this package normalises the input of top-k, and of that alone')
    M = len(weights.b_enc)
    state: dict[str, Any] = {
        "pre_bias": weights.b_dec,
        "latent_bias": weights.b_enc,
        "stats_last_nonzero": torch.zeros(M, dtype=torch.long),
        "latents_activation_frequency": torch.ones(M),
        "latents_mean_square": torch.zeros(M),
        "encoder.weight": weights.w_enc,
        "decoder.weight": weights.w_dec.T,
        "activation": "TopK" if weights.kind == "topk" else "ReLU",
        "activation_state_dict": {"k": weights.k, "postact_fn": "ReLU"} if weights.kind == "topk" else {},
    }
    write_pickled(Path(path), state)
