"""Between the weights of any package's sparse autoencoder and the modules of `vaecirc_fast.nn`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import nn
from ..errors import InputError
from .weights import Weights


@torch.no_grad()
def to_module(weights: Weights) -> nn.SparseAutoencoder:
    """The module of `vaecirc_fast.nn` that reconstructs alike: for "topk" a TopKSAE, for "batch_topk" a BatchTopKSAE,
    for "jumprelu" a JumpReLUSAE, for "relu" an L1SAE.

    Where the weights do not centre their input, b_enc becomes b_enc + w_enc b_dec, which comes to the same. An L1SAE
    scales its decoder's rows to unit norm; their norms go into the encoder, so its activations are larger by them.
    InputError for kind "unknown", or where k or the threshold is missing or not positive.
    """
    w_enc, b_enc, w_dec, b_dec = (
        t.detach().clone() for t in (weights.w_enc, weights.b_enc, weights.w_dec, weights.b_dec)
    )
    (M, D), dtype = w_enc.shape, w_enc.dtype
    if not weights.centred:
        b_enc += w_enc @ b_dec
    if weights.kind in ("topk", "batch_topk"):
        if weights.k is None:
            raise InputError(f"weights: kind {weights.kind!r} needs k; set weights.k")
        make = nn.TopKSAE if weights.kind == "topk" else nn.BatchTopKSAE
        sae: nn.SparseAutoencoder = make(D, M, weights.k, dtype=dtype)
        if isinstance(sae, nn.BatchTopKSAE) and weights.threshold is not None:
            if weights.threshold.ndim:
                raise InputError("weights: a BatchTopKSAE has one threshold for all latents")
            sae.threshold.copy_(weights.threshold)
    elif weights.kind == "jumprelu":
        if weights.threshold is None or not bool((weights.threshold > 0).all()):
            raise InputError("weights: kind 'jumprelu' needs thresholds above 0")
        sae = nn.JumpReLUSAE(D, M, dtype=dtype)
        sae.log_threshold.copy_(weights.threshold.log().expand(M))
    elif weights.kind == "relu":
        sae = nn.L1SAE(D, M, dtype=dtype)
        norms = w_dec.norm(dim=1, keepdim=True)
        # A row of zeros decodes nothing; its latent stays as it is.
        norms = torch.where(norms > 0, norms, 1)
        w_enc, b_enc, w_dec = w_enc * norms, b_enc * norms[:, 0], w_dec / norms
    else:
        raise InputError(f"weights: kind {weights.kind!r} says not which module it is; set weights.kind")
    for name, value in {"w_enc": w_enc, "b_enc": b_enc, "w_dec": w_dec, "b_dec": b_dec}.items():
        getattr(sae, name).copy_(value)
    return sae.to(w_enc.device)


def from_module(sae: nn.SparseAutoencoder) -> Weights:
    """The weights of a module of `vaecirc_fast.nn`, to be saved as another package has them."""
    kinds = {nn.TopKSAE: "topk", nn.BatchTopKSAE: "batch_topk", nn.JumpReLUSAE: "jumprelu", nn.L1SAE: "relu"}
    if type(sae) not in kinds:
        raise InputError(f"sae: expected one of {', '.join(k.__name__ for k in kinds)}, got {type(sae).__name__}")
    threshold: Tensor | None = None
    if isinstance(sae, nn.BatchTopKSAE) and not bool(sae.threshold.isnan()):
        threshold = sae.threshold.detach().clone()
    if isinstance(sae, nn.JumpReLUSAE):
        threshold = sae.threshold.detach().clone()
    w_dec = torch.nn.functional.normalize(sae.w_dec) if isinstance(sae, nn.L1SAE) else sae.w_dec
    return Weights(
        *(t.detach().clone() for t in (sae.w_enc, sae.b_enc, w_dec, sae.b_dec)),
        kind=kinds[type(sae)],
        threshold=threshold,
        k=sae.k if isinstance(sae, nn.TopKSAE | nn.BatchTopKSAE) else None,
    )
