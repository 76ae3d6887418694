"""A drawn stand-in for SmallNORB: five grey toys on a turntable, from 9 heights and 18 sides, under 6 lightings."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..ops import render_scene
from ..reference.render_scene import ABSENT, BOX, CAPSULE, CONE, ELLIPSOID, PLANE, PRISM
from .dataset import Dataset
from .scenes import about, look_at
from .smallnorb import CATEGORIES, SmallNORB

SIDE = 64
ELEVATIONS = tuple(range(30, 71, 5))  # degrees of the camera above the ground
AZIMUTHS = tuple(range(0, 360, 20))  # degrees by which the camera stands to the left of where the toy looks
# Where the light is, in degrees to the right of the camera as it looks and above the ground, and the ambient share.
LIGHTINGS = ((65, 50, 0.45), (-65, 50, 0.45), (10, 35, 0.35), (170, 45, 0.40), (0, 85, 0.55), (-30, 30, 0.15))
TOY, DARK, GROUND = 0.92, 0.38, 0.60  # grey values under full light; tyres, windows and the like are dark
_HALF_ANGLE = math.radians(11.5)

Point = tuple[float, float, float]
Part = tuple[int, float, Point, Tensor, float]  # kind, shape, centre, axes (columns), grey value


class NORBLike(Dataset):
    """4,860 drawn grey images of five toys with SmallNORB's factors, sizes and order; not SmallNORB, no pixel is its.

    One toy for each category (four-legged animal, human figure, airplane, truck, car), built of ellipsoids, boxes,
    cylinders and the like in two greys, on even ground with a soft shadow, about as large as the frame. With one
    instance each the factors determine the image, so unlike SmallNORB the grid is complete; nothing can be learnt about
    new instances. The lights stand still relative to the camera, as if the toy turned. `vf.ops.render_scene` draws the
    images on `device`, 2 x 2 rays a pixel. It takes no root: the official files are read by "smallnorb".
    """

    name = "norb_like"
    shape = (1, SIDE, SIDE)
    factor_names = SmallNORB.factor_names
    factor_sizes = SmallNORB.factor_sizes
    takes_root = False

    def __init__(self, root: str | Path | None = None, device: str | torch.device = "cpu"):
        super().__init__(device)
        if root is not None:
            raise InputError("norb_like is drawn and takes no root; the official files of SmallNORB: 'smallnorb'")

    def _render(self, indices: Tensor) -> Tensor:
        return render_scene(*scene(self._unravel(indices)))


def scene(v: Tensor) -> tuple[Tensor, ...]:
    """The arguments of `vf.ops.render_scene` for factors v (B, 4) int64."""
    t = _tables(v.device)
    category, elevation, azimuth, lighting = v.unbind(1)
    ground = t["ground"][category, azimuth, lighting]
    return (
        t["kinds"][category],
        torch.cat([ground[:, None], t["poses"][category]], 1),
        t["shapes"][category],
        t["colours"][category],
        t["cameras"][category, elevation, azimuth],
        t["lights"][azimuth, lighting],
        t["background"].expand(len(v), -1, -1),
    )


@functools.cache
def _tables(device: torch.device) -> dict[str, Tensor]:
    """Everything that a few factors decide, for all their values. The ground is the first solid."""
    toys = [toy() for toy in TOYS.values()]
    most = max(map(len, toys))
    kinds = torch.full((len(toys), 1 + most), ABSENT, device="cpu")
    shapes = torch.zeros(len(toys), 1 + most, dtype=torch.float64, device="cpu")
    poses = torch.eye(3, 4, dtype=torch.float64, device="cpu").repeat(len(toys), most, 1, 1)
    greys = torch.full((len(toys), 1 + most, 1), GROUND, dtype=torch.float64, device="cpu")
    kinds[:, 0], shapes[:, 0] = PLANE, 0.6
    for n, toy in enumerate(toys):
        for p, (kind, shape, centre, axes, grey) in enumerate(toy):
            kinds[n, 1 + p], shapes[n, 1 + p], greys[n, 1 + p] = kind, shape, grey
            poses[n, p] = _inverse(axes, torch.tensor(centre, dtype=torch.float64, device="cpu"))
    azimuth = torch.tensor(AZIMUTHS, dtype=torch.float64, device="cpu").deg2rad()
    elevation = torch.tensor(ELEVATIONS, dtype=torch.float64, device="cpu").deg2rad()
    beside, above, ambient = torch.tensor(LIGHTINGS, dtype=torch.float64, device="cpu").unbind(1)
    lights = _direction(azimuth[:, None] + beside.deg2rad(), above.deg2rad())  # (18, 6, 3)
    target = torch.tensor(CENTRES, dtype=torch.float64, device="cpu")[:, None, None]
    distance = torch.tensor(DISTANCES, dtype=torch.float64, device="cpu")[:, None, None, None]
    places = target + distance * _direction(azimuth, elevation[:, None])  # (5, 9, 18, 3)
    tables = {
        "shapes": shapes,
        "poses": poses,
        "ground": _shadows(lights),
        "colours": greys,
        "cameras": look_at(places, target.expand_as(places), _HALF_ANGLE),
        "lights": torch.cat([lights, ambient[None, :, None].expand(len(azimuth), -1, 1)], 2),
        "background": torch.full((2, 1), GROUND, dtype=torch.float64, device="cpu"),
    }
    return {"kinds": kinds.to(device)} | {name: table.float().to(device) for name, table in tables.items()}


def _direction(azimuth: Tensor, elevation: Tensor) -> Tensor:
    """Unit vectors (..., 3); azimuth 0 is +x, where the toys look, and 90 degrees is +y, their left."""
    x, y, z = torch.broadcast_tensors(azimuth.cos() * elevation.cos(), azimuth.sin() * elevation.cos(), elevation.sin())
    return torch.stack([x, y, z], -1)


def _shadows(lights: Tensor) -> Tensor:
    """Poses (5, 18, 6, 3, 4) of the ground, whose unit circle is the shadow: pushed away from the light."""
    radii = torch.tensor(SHADOWS, dtype=torch.float64, device="cpu")
    centre = -0.25 * lights[..., :2] / lights[..., 2:].clamp(min=0.7)
    axes = torch.diag_embed(torch.cat([radii, torch.ones_like(radii[:, :1])], 1))[:, None, None]
    return _inverse(axes, torch.cat([centre, torch.zeros_like(centre[..., :1])], -1))


def _inverse(axes: Tensor, centre: Tensor) -> Tensor:
    """Poses (..., 3, 4), the map of the world to the solid, for w = axes q + centre."""
    linear = torch.linalg.inv(axes)
    offset = -(linear @ centre[..., None])
    return torch.cat([linear.expand(*offset.shape[:-2], 3, 3), offset], -1)


def _turned(degrees: float, axis: int) -> Tensor:
    return about(axis, torch.tensor(math.radians(degrees), dtype=torch.float64, device="cpu"))


def _part(
    kind: int, centre: Point, size: Point, turn: Tensor | None = None, shape: float = 0.0, grey: float = TOY
) -> Part:
    """A solid of half lengths `size` before it is turned. Of a prism of four sides those are of its larger base."""
    axes = torch.diag(torch.tensor(size, dtype=torch.float64, device="cpu"))
    if kind == PRISM + 4:
        axes = axes @ _turned(45, 2) * torch.tensor([2**0.5, 2**0.5, 1], dtype=torch.float64, device="cpu")
    return kind, shape, centre, axes if turn is None else turn @ axes, grey


def _rod(a: Point, b: Point, radius: float, taper: float | None = None, grey: float = TOY) -> Part:
    """From a to b: round at the ends, or with a taper a cone that at b has that share of the radius it has at a."""
    start, end = (torch.tensor(x, dtype=torch.float64, device="cpu") for x in (a, b))
    half, (x, y, z) = (end - start) / 2, ((start + end) / 2).tolist()
    length = float(half.norm())
    along = half / length
    other = torch.eye(3, dtype=torch.float64, device="cpu")[int(along.abs().argmin())]
    across = torch.nn.functional.normalize(torch.linalg.cross(other, along), dim=0)
    axes = torch.stack([across, torch.linalg.cross(along, across), along], 1)
    if taper is None:
        return CAPSULE, length / radius, (x, y, z), axes * radius, grey
    size = torch.tensor([radius, radius, length], dtype=torch.float64, device="cpu")
    return CONE, taper, (x, y, z), axes * size, grey


def _wheel(x: float, y: float, radius: float, half_width: float) -> Part:
    return _rod((x, y - half_width, radius), (x, y + half_width, radius), radius, 1.0, DARK)


def _animal() -> list[Part]:
    """A horse or a cow: its head and neck ahead, its tail behind."""
    legs = [_rod((x, y, 0.5), (1.06 * x, y, 0), 0.105, 0.7) for x in (-0.42, 0.42) for y in (-0.15, 0.15)]
    ears = [_part(CONE, (0.66, y, 1.18), (0.05, 0.05, 0.11), grey=DARK) for y in (-0.09, 0.09)]
    return [
        _part(ELLIPSOID, (0, 0, 0.60), (0.66, 0.25, 0.26)),
        _rod((0.45, 0, 0.68), (0.70, 0, 1.00), 0.15),
        _part(ELLIPSOID, (0.84, 0, 1.02), (0.25, 0.13, 0.13), _turned(25, 1)),
        _rod((-0.62, 0, 0.70), (-0.80, 0, 0.38), 0.05, grey=DARK),
        *ears,
        *legs,
    ]


def _human() -> list[Part]:
    """Walking, the left arm pointing ahead and the right one hanging, with a brimmed hat."""
    return [
        _part(PRISM + 4, (0, 0, 0.86), (0.17, 0.27, 0.25), _turned(180, 0), 0.72),
        _part(ELLIPSOID, (0.02, 0, 1.26), (0.14, 0.13, 0.16)),
        _part(CONE, (0.02, 0, 1.34), (0.22, 0.22, 0.02), shape=1.0, grey=DARK),
        _part(CONE, (0.02, 0, 1.43), (0.13, 0.13, 0.09), shape=0.8, grey=DARK),
        _rod((0.0, 0.12, 0.62), (0.20, 0.14, 0.08), 0.095),
        _rod((0.0, -0.12, 0.62), (-0.20, -0.14, 0.08), 0.095),
        _part(BOX, (0.27, 0.14, 0.045), (0.16, 0.08, 0.045), grey=DARK),
        _part(BOX, (-0.13, -0.14, 0.045), (0.16, 0.08, 0.045), grey=DARK),
        _rod((0.0, 0.29, 1.04), (0.50, 0.33, 1.08), 0.07),
        _rod((0.0, -0.29, 1.04), (-0.10, -0.38, 0.58), 0.07),
    ]


def _airplane() -> list[Part]:
    """Straight wings and tail, a little swept, an engine under each wing."""
    wings = [_part(BOX, (-0.06, y, 0.42), (0.19, 0.50, 0.03), _turned(math.copysign(14, y), 2)) for y in (-0.50, 0.50)]
    tails = [_part(BOX, (-0.86, y, 0.48), (0.11, 0.20, 0.025), _turned(math.copysign(14, y), 2)) for y in (-0.20, 0.20)]
    engines = [_rod((-0.05, y, 0.32), (0.25, y, 0.32), 0.085, 0.9, DARK) for y in (-0.45, 0.45)]
    return [
        _rod((-0.45, 0, 0.44), (0.78, 0, 0.44), 0.15),
        _rod((-0.45, 0, 0.44), (-1.05, 0, 0.50), 0.15, 0.25),
        _part(BOX, (-0.92, 0, 0.70), (0.12, 0.025, 0.20), _turned(-25, 1)),
        _part(ELLIPSOID, (0.55, 0, 0.56), (0.20, 0.09, 0.09), grey=DARK),
        *wings,
        *tails,
        *engines,
    ]


def _truck() -> list[Part]:
    """A box on three axles, a cab with a bonnet."""
    wheels = [_wheel(x, y, 0.17, 0.07) for x in (-0.62, -0.20, 0.66) for y in (-0.31, 0.31)]
    return [
        _part(BOX, (0, 0, 0.25), (1.0, 0.30, 0.06), grey=DARK),
        _part(BOX, (-0.32, 0, 0.69), (0.66, 0.37, 0.38)),
        _part(BOX, (0.62, 0, 0.56), (0.20, 0.33, 0.27)),
        _part(BOX, (0.66, 0, 0.68), (0.17, 0.335, 0.09), grey=DARK),
        _part(BOX, (0.88, 0, 0.42), (0.14, 0.30, 0.14)),
        *wheels,
    ]


def _car() -> list[Part]:
    """A saloon whose cabin sits behind its middle, with a spoiler."""
    wheels = [_wheel(x, y, 0.17, 0.07) for x in (-0.55, 0.55) for y in (-0.36, 0.36)]
    return [
        _part(BOX, (-0.02, 0, 0.28), (0.92, 0.38, 0.11)),
        _part(PRISM + 4, (-0.16, 0, 0.51), (0.52, 0.35, 0.14), shape=0.62, grey=DARK),
        _part(BOX, (-0.16, 0, 0.66), (0.34, 0.23, 0.02)),
        _part(BOX, (-0.84, 0, 0.52), (0.08, 0.36, 0.02)),
        _part(BOX, (-0.86, 0, 0.44), (0.03, 0.05, 0.07)),
        *wheels,
    ]


TOYS = dict(zip(CATEGORIES, (_animal, _human, _airplane, _truck, _car), strict=True))
SHADOWS = ((0.95, 0.55), (0.55, 0.60), (1.15, 1.0), (1.25, 0.65), (1.15, 0.65))  # radii along and across each toy
CENTRES = ((0.1, 0.0, 0.58), (0.08, 0.0, 0.70), (-0.1, 0.0, 0.44), (0.0, 0.0, 0.50), (0.0, 0.0, 0.36))  # looked at
DISTANCES = (5.8, 5.2, 6.0, 6.4, 5.9)  # of the camera
