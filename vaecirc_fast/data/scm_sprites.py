"""SCM sprites: sprites whose factors cause one another by a known structural causal model, to recover its graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..ops import render_sprites
from ..reference.render_sprites import SIDE
from .dataset import Dataset

NAMES = ("shape", "scale", "orientation", "posX", "posY")
SIZES = (3, 6, 10, 32, 32)
# (cause, effect), causes before their effects.
GRAPHS: dict[str, tuple[tuple[str, str], ...]] = {
    "chain": (("scale", "posX"), ("posX", "posY")),
    "fork": (("scale", "posX"), ("scale", "posY")),
    "collider": (("posX", "posY"), ("orientation", "posY")),
    "mixed": (("scale", "posX"), ("scale", "orientation"), ("posX", "posY"), ("orientation", "posY")),
}


class SCMSprites(Dataset):
    """Binary 64 x 64 sprites drawn like dSprites, whose factors follow a structural causal model.

    Factors: shape 3, scale 6, orientation 10 (0 to 83 degrees, in which no two look alike for any shape), posX 32,
    posY 32. With U uniform on [0, 1) and B Bernoulli(strength), drawn for each sample and factor,

        v_k = floor(n_k U_k)                                                       if k has no cause or B_k = 0
        v_k = floor(n_k mean over causes a of (v_a + U_ka) / n_a)                  else

    so every combination of factors can occur, and the mean of an effect rises with each of its causes. graph: "chain"
    (scale > posX > posY), "fork" (posX < scale > posY), "collider" (posX > posY < orientation) or "mixed", all three
    at once (scale > posX > posY, scale > orientation > posY). shape causes nothing and has no cause; what an image
    looks like depends on its factors alone, whatever the graph.

    `complete`: the 184,320 indices are every combination once, and `images`, `factors` and `index_of` go by them. But
    `sample` draws from the model, in which factors depend on each other, and `intervene` under do(). `graph` (K, K)
    bool: row causes column; `strength`: how often an effect follows its causes.
    """

    name = "scm_sprites"
    shape = (1, SIDE, SIDE)
    factor_names = NAMES
    factor_sizes = SIZES
    takes_root = False

    def __init__(
        self,
        root: str | Path | None = None,
        device: str | torch.device = "cpu",
        graph: str = "mixed",
        strength: float = 0.8,
    ):
        super().__init__(device)
        if root is not None:
            raise InputError("scm_sprites is drawn and takes no root")
        if graph not in GRAPHS:
            raise InputError(f"graph: {graph!r} is unknown; known: {', '.join(GRAPHS)}")
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
            raise InputError(f"strength: expected a probability in [0, 1], got {strength!r}")
        self.strength = float(strength)
        self.graph = torch.zeros(len(NAMES), len(NAMES), dtype=torch.bool)
        for cause, effect in GRAPHS[graph]:
            self.graph[NAMES.index(cause), NAMES.index(effect)] = True
        if (graph, self.strength) != ("mixed", 0.8):
            self.contents = f"{graph} {self.strength:g}"

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """`n` images drawn from the causal model: x (n, C, H, W) float32 in [0, 1], factors v (n, K) int64."""
        return self.intervene({}, n, generator)

    def intervene(
        self, do: Mapping[str, int | Tensor], n: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """`n` images under do(factor := value), shapes as of `sample`.

        do: factor name -> its index, or one for each image (n,). All other factors follow their equations, with the
        noise of the same images under any other do() of an equally seeded generator: pairs of calls are counterfactuals
        of each other. InputError for an unknown factor or a value that it does not have.
        """
        v = self.draw(do, n, generator)
        return self.images(self.index_of(v)), v

    def draw(self, do: Mapping[str, int | Tensor], n: int, generator: torch.Generator | None = None) -> Tensor:
        """The factors (n, K) int64 of `intervene`, without the images."""
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InputError(f"n: expected at least 1 image, got {n!r}")
        held = {name: self._value(name, value, n) for name, value in do.items()}
        k = len(NAMES)
        device = generator.device if generator is not None else torch.device("cpu")
        # All of it at every call, used or not: so noise does not depend on do.
        noise = torch.rand(n, k, k + 2, generator=generator, device=device, dtype=torch.float64).to(self.device)
        v = torch.zeros(n, k, dtype=torch.int64, device=self.device)
        for at in self._order():
            size, causes = SIZES[at], self.graph[:, at].nonzero().flatten().tolist()
            drawn = (size * noise[:, at, k]).long()
            if causes:
                positions = [(v[:, a] + noise[:, at, a]) / SIZES[a] for a in causes]
                position = torch.stack(positions).mean(0)
                follows = noise[:, at, k + 1] < self.strength
                drawn = torch.where(follows, (size * position).long(), drawn)
            v[:, at] = held.get(NAMES[at], drawn.clamp(max=size - 1))
        return v

    def _order(self) -> list[int]:
        """Factors, causes before effects."""
        order: list[int] = []
        while len(order) < len(NAMES):
            order += [
                k
                for k in range(len(NAMES))
                if k not in order and all(a in order for a in self.graph[:, k].nonzero().flatten().tolist())
            ]
        return order

    def _value(self, name: str, value: int | Tensor, n: int) -> Tensor:
        if name not in NAMES:
            raise InputError(f"do: {name!r} is no factor; known: {', '.join(NAMES)}")
        size = SIZES[NAMES.index(name)]
        values = torch.as_tensor(value, device=self.device)
        whole = not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
        if not whole or values.shape not in ((), (n,)) or bool(((values < 0) | (values >= size)).any()):
            raise InputError(
                f"do: expected for {name!r} an index in [0, {size}), or one for each of {n} images, got {value!r}"
            )
        return values.long().expand(n)

    def _render(self, indices: Tensor) -> Tensor:
        return render_sprites(torch.nn.functional.pad(self._unravel(indices), (1, 0)))  # colour 0
