"""`Codes`: what a vector quantiser makes of its inputs, between models and the interventions on them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Codes(NamedTuple):
    """What a vector quantiser makes of N inputs. Positions are the axes after the channels, as (H, W) or (T,).

    indices: (N, ...) integers, the code of each position. z_e: (N, D, ...) floats, before quantisation. z_q:
    (N, D, ...) floats, codebook[indices] with channels second: what the decoder is given.
    """

    indices: Tensor
    z_e: Tensor
    z_q: Tensor
