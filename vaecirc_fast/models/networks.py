"""The encoders and decoders of the image models: convolutional (Burgess et al. 2018) and MLP.

Module names are part of the interface: interventions address units as `encoder.conv2[3]` or `decoder.ct1[:, 4:8, 4:8]`.
Activations are functional ReLUs, so every named module's output is a pre-activation.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from .likelihoods import LIKELIHOODS

_CONVOLUTIONS = ((32, 4), (32, 4), (64, 2), (64, 2))  # (channels, kernel) of conv1..conv4, all with stride 2
_TRANSPOSED = (64, 32, 32)  # channels of ct1..ct3; the last one has the image's
_BASE_CHANNELS = 64  # of the grid between the linear layers and the convolutions
_HIDDEN = 256


def _scaled(size: int, width: float) -> int:
    return max(1, round(size * width))


def stages(height: int, width: int) -> int:
    """How many halvings bring the larger side to 4 or less: 64 -> 4, 28 -> 3, 8 -> 1."""
    return max(1, math.ceil(math.log2(max(height, width) / 4)))


def _base(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Number of stride-2 stages and the base grid (h, w); the canvas is the base grid times 2 ** stages."""
    _, height, width = shape
    n = stages(height, width)
    return n, -(-height // 2**n), -(-width // 2**n)


class ConvTrunk(nn.Module):
    """x (B, C, H, W) -> h (B, `hidden`): conv1..convn, fc (256), which every convolutional encoder starts with.

    n = `stages(H, W)`. Channels 32, 32, 64, 64, kernels 4, 4, 2, 2, stride 2; fewer stages take the first n, more
    repeat the last. An image that does not fill base grid * 2 ** n is padded with zeros at the bottom and on the right.
    """

    def __init__(self, shape: tuple[int, int, int], width: float = 1.0):
        super().__init__()
        self.stages, base_height, base_width = _base(shape)
        self.pad = (0, base_width * 2**self.stages - shape[2], 0, base_height * 2**self.stages - shape[1])
        channels = shape[0]
        for i in range(self.stages):
            out, kernel = _CONVOLUTIONS[min(i, len(_CONVOLUTIONS) - 1)]
            out = _scaled(out, width)
            setattr(self, f"conv{i + 1}", nn.Conv2d(channels, out, kernel, stride=2, padding=(kernel - 2) // 2))
            channels = out
        self.hidden = _scaled(_HIDDEN, width)
        self.fc = nn.Linear(channels * base_height * base_width, self.hidden)

    def features(self, x: Tensor) -> Tensor:
        h = F.pad(x, self.pad) if any(self.pad) else x
        for i in range(1, self.stages + 1):
            h = F.relu(getattr(self, f"conv{i}")(h))
        return F.relu(self.fc(h.flatten(1)))


class MLPTrunk(nn.Module):
    """x (B, C, H, W) -> h (B, `hidden`): fc1 (256), fc2 (256), which every MLP encoder starts with."""

    def __init__(self, shape: tuple[int, int, int], width: float = 1.0):
        super().__init__()
        self.hidden = _scaled(_HIDDEN, width)
        self.fc1 = nn.Linear(math.prod(shape), self.hidden)
        self.fc2 = nn.Linear(self.hidden, self.hidden)

    def features(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc1(x.flatten(1)))
        return F.relu(self.fc2(h))


class ConvEncoder(ConvTrunk):
    """x (B, C, H, W) -> mu (B, L), logvar (B, L): the convolutional trunk, heads mu and logvar."""

    def __init__(self, shape: tuple[int, int, int], latents: int, width: float = 1.0):
        super().__init__(shape, width)
        self.mu = nn.Linear(self.hidden, latents)
        self.logvar = nn.Linear(self.hidden, latents)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.features(x)
        return self.mu(h), self.logvar(h)


class MLPEncoder(MLPTrunk):
    """x (B, C, H, W) -> mu (B, L), logvar (B, L): the MLP trunk, heads mu and logvar."""

    def __init__(self, shape: tuple[int, int, int], latents: int, width: float = 1.0):
        super().__init__(shape, width)
        self.mu = nn.Linear(self.hidden, latents)
        self.logvar = nn.Linear(self.hidden, latents)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.features(x)
        return self.mu(h), self.logvar(h)


class ConvSlotEncoder(ConvTrunk):
    """x (B, C, H, W) -> z_e (B, D, L): the convolutional trunk, and a head of L slots of D channels, slot by slot."""

    def __init__(self, shape: tuple[int, int, int], latents: int, channels: int, width: float = 1.0):
        super().__init__(shape, width)
        self.slots = (latents, channels)
        self.head = nn.Linear(self.hidden, latents * channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)).unflatten(1, self.slots).transpose(1, 2)


class MLPSlotEncoder(MLPTrunk):
    """x (B, C, H, W) -> z_e (B, D, L): the MLP trunk, and a head of L slots of D channels, slot by slot."""

    def __init__(self, shape: tuple[int, int, int], latents: int, channels: int, width: float = 1.0):
        super().__init__(shape, width)
        self.slots = (latents, channels)
        self.head = nn.Linear(self.hidden, latents * channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)).unflatten(1, self.slots).transpose(1, 2)


class Decoder(nn.Module):
    """z (B, L) -> the likelihood's mean (B, C, H, W); `logits(z)` is the value before the link, `link` its name."""

    def __init__(self, shape: tuple[int, int, int], likelihood: str):
        super().__init__()
        self.shape = shape
        self.likelihood = likelihood

    @property
    def link(self) -> str:
        """The name of the map from logits to the mean: "sigmoid" or "identity"."""
        return LIKELIHOODS[self.likelihood].link

    def logits(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, z: Tensor) -> Tensor:
        return LIKELIHOODS[self.likelihood].mean(self.logits(z))


class ConvDecoder(Decoder):
    """fc1 (256), fc2 (64 x base grid), ct1..ctn: transposed convolutions of kernel 4, stride 2, padding 1.

    Channels 64, 32, 32, C; fewer stages take the last n, more repeat 64 in front. The canvas is cropped to (H, W).
    """

    def __init__(self, shape: tuple[int, int, int], latents: int, likelihood: str = "bernoulli", width: float = 1.0):
        super().__init__(shape, likelihood)
        self.stages, base_height, base_width = _base(shape)
        channels = _scaled(_BASE_CHANNELS, width)
        hidden = _scaled(_HIDDEN, width)
        self.base = (channels, base_height, base_width)
        self.fc1 = nn.Linear(latents, hidden)
        self.fc2 = nn.Linear(hidden, channels * base_height * base_width)
        repeated = (_TRANSPOSED[0],) * max(0, self.stages - 1 - len(_TRANSPOSED)) + _TRANSPOSED
        outs = [_scaled(c, width) for c in repeated[len(repeated) - (self.stages - 1) :]] + [shape[0]]
        for i, out in enumerate(outs):
            setattr(self, f"ct{i + 1}", nn.ConvTranspose2d(channels, out, 4, stride=2, padding=1))
            channels = out

    def logits(self, z: Tensor) -> Tensor:
        """z (B, L) -> (B, C, H, W) before the link."""
        h = F.relu(self.fc1(z))
        h = F.relu(self.fc2(h)).unflatten(1, self.base)
        for i in range(1, self.stages):
            h = F.relu(getattr(self, f"ct{i}")(h))
        y = getattr(self, f"ct{self.stages}")(h)
        return y[..., : self.shape[1], : self.shape[2]]


class MLPDecoder(Decoder):
    """fc1..fc4: L -> 256 -> 256 -> 256 -> P, with P = C H W."""

    def __init__(self, shape: tuple[int, int, int], latents: int, likelihood: str = "bernoulli", width: float = 1.0):
        super().__init__(shape, likelihood)
        hidden = _scaled(_HIDDEN, width)
        self.fc1 = nn.Linear(latents, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, hidden)
        self.fc4 = nn.Linear(hidden, math.prod(shape))

    def logits(self, z: Tensor) -> Tensor:
        """z (B, L) -> (B, C, H, W) before the link."""
        h = F.relu(self.fc1(z))
        h = F.relu(self.fc2(h))
        h = F.relu(self.fc3(h))
        return self.fc4(h).unflatten(1, self.shape)


class ConvSlotDecoder(ConvDecoder):
    """`ConvDecoder` of slots: z (B, D, L), which fc1 reads flattened, D L numbers an image."""

    def logits(self, z: Tensor) -> Tensor:
        """z (B, D, L) -> (B, C, H, W) before the link."""
        return super().logits(z.flatten(1))


class MLPSlotDecoder(MLPDecoder):
    """`MLPDecoder` of slots: z (B, D, L), which fc1 reads flattened, D L numbers an image."""

    def logits(self, z: Tensor) -> Tensor:
        """z (B, D, L) -> (B, C, H, W) before the link."""
        return super().logits(z.flatten(1))


NETS = {"conv": (ConvEncoder, ConvDecoder), "mlp": (MLPEncoder, MLPDecoder)}
SLOT_NETS = {"conv": (ConvSlotEncoder, ConvSlotDecoder), "mlp": (MLPSlotEncoder, MLPSlotDecoder)}
