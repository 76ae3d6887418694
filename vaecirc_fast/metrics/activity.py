"""Which latents a model uses: the aggregate posterior's scale and the share of it that the means move."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError

if TYPE_CHECKING:
    import pandas as pd

ACTIVE_SHARE = 0.05
BURDA_VARIANCE = 0.01


def posterior_scale_from(mu: Any, logvar: Any = None) -> Tensor:
    """Standard deviation of the aggregate posterior, s_i = sqrt(Var_x[mu_i] + E_x[sigma_i^2]): (L,), in latent units.

    `mu` (N, L) means and `logvar` (N, L) log sigma^2, tensors or arrays; `logvar=None` where the encoder gives no
    variance. Population variance over the N samples; summed in float64, returned in mu's dtype and on its device.
    Source: docs/definitions, "aggregate posterior scale". Raises InputError on wrong or unequal shapes, no samples,
    NaN or infinite mu, or a logvar that is NaN, +inf or overflows (-inf is sigma = 0).
    """
    mean, variance = _moments(mu, logvar)
    scale = (variance + mean).sqrt()
    dtype = mu.dtype if isinstance(mu, Tensor) and mu.is_floating_point() else torch.get_default_dtype()
    return scale.to(dtype)


def active_units(mu: Any, logvar: Any = None) -> pd.DataFrame:
    """One row for each latent: how much of its aggregate posterior the means move, and whether that makes it active.

    Columns: `latent`; `share` = Var_x[mu_i] / s_i^2, in [0, 1], the same in any unit of z_i; `active` = share > 0.05;
    `variance` = Var_x[mu_i] and `burda_active` = variance > 0.01 (Burda et al. 2016, arXiv 1509.00519, which depends on
    the unit); `scale` = s_i. A latent with s_i = 0 has share 0. Arguments and errors as `posterior_scale_from`.
    """
    import pandas as pd

    variance, noise = _moments(mu, logvar)
    total = variance + noise
    share = (variance / total).nan_to_num(0.0)
    return pd.DataFrame(
        {
            "latent": range(len(total)),
            "share": share.cpu().numpy(),
            "active": (share > ACTIVE_SHARE).cpu().numpy(),
            "variance": variance.cpu().numpy(),
            "burda_active": (variance > BURDA_VARIANCE).cpu().numpy(),
            "scale": total.sqrt().cpu().numpy(),
        }
    )


def _moments(mu: Any, logvar: Any) -> tuple[Tensor, Tensor]:
    """Var_x[mu_i] and E_x[sigma_i^2], float64 (L,) each."""
    mu = torch.as_tensor(mu)
    if mu.ndim != 2 or 0 in mu.shape or mu.is_complex():
        raise InputError(f"mu: expected numbers of shape (N, L), got {mu.dtype} {tuple(mu.shape)}")
    mu = mu.detach().double()
    variance = mu.var(0, correction=0)
    if not variance.isfinite().all():
        raise InputError("mu: expected finite numbers with a finite variance, got NaN, infinity or an overflow")
    if logvar is None:
        return variance, torch.zeros_like(variance)
    logvar = torch.as_tensor(logvar, device=mu.device).detach()
    if logvar.shape != mu.shape:
        raise InputError("logvar: expected the shape of mu, {tuple(mu.shape)}, got {tuple(logvar.shape)}")
    noise = logvar.double().exp().mean(0)
    if not (noise + variance).isfinite().all():
        raise InputError("logvar: expected log variances below 709, got NaN or an overflow")
    return variance, noise
