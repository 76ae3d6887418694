"""A drawn stand-in for MPI3D: a jointed arm on a turntable that holds an object, with MPI3D's factors."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..ops import render_scene
from ..reference.render_scene import BOX, CONE, ELLIPSOID, PRISM
from .dataset import Dataset
from .mpi3d import MPI3D
from .scenes import about, look_at, pose

SIDE = 64
# World units: the radius of the table is 1.6, its top at z = 0; the camera looks along y from y < 0, x is to its right.
OBJECT_COLOURS = (
    (0.96, 0.96, 0.93),  # white
    (0.10, 0.78, 0.22),  # green
    (0.92, 0.10, 0.10),  # red
    (0.12, 0.30, 0.96),  # blue
    (0.52, 0.27, 0.10),  # brown
    (0.62, 0.64, 0.10),  # olive
)
BACKGROUND_COLOURS = ((0.55, 0.24, 0.72), (0.18, 0.62, 0.44), (0.98, 0.56, 0.46))  # purple, sea green, salmon
RADII = (0.29, 0.44)  # of the object, small and large
# Shape of the object: kind, taper, half sizes in radii across and up. All are about as tall as they are wide.
OBJECTS = (
    (CONE, 0.0, 1.0, 1.0),
    (BOX, 0.0, 0.80, 0.80),
    (CONE, 1.0, 0.82, 0.95),  # cylinder
    (PRISM + 6, 1.0, 0.95, 0.90),
    (PRISM + 4, 0.0, 1.15, 1.0),  # pyramid
    (ELLIPSOID, 0.0, 1.0, 1.0),
)
CAMERAS = (46.0, 27.0, 9.0)  # degrees above the table: top, centre, bottom
TURN = 70.0  # degrees the arm turns to either side of straight at the camera
SHOULDER = 0.50  # its height
UPPER, FORE = 0.90, 0.78  # lengths of the two links
# Each joint rises in equal steps: sines of the links' pitch at the least and the greatest lift.
UPPER_RISE, FORE_RISE = (0.50, 0.97), (-0.50, 0.95)
_LINK, _JOINT, _BASE, _TABLE = (0.17, 0.17, 0.19), (0.66, 0.66, 0.70), (0.34, 0.34, 0.37), (0.27, 0.27, 0.29)
_FIXED = 3  # solids that do not move: rim, table, base


class MPI3DLike(Dataset):
    """1,036,800 drawn colour images of an arm with MPI3D's factors, sizes and order; not MPI3D, and no pixel is its.

    An arm of two dark links stands on a turntable. The horizontal axis turns it from 70 degrees left of straight at the
    camera to 70 right, the vertical axis lifts it; the object at its tip is kept level, as by a palletiser's wrist, and
    turns with the arm, so its shape shows in every pose. The background colour is that of the table's rim and, darker,
    of the wall. `vf.ops.render_scene` draws the images on `device`, 2 x 2 rays a pixel. It takes no root: the official
    files are read by "mpi3d".
    """

    name = "mpi3d_like"
    shape = (3, SIDE, SIDE)
    factor_names = MPI3D.factor_names
    factor_sizes = MPI3D.factor_sizes
    takes_root = False

    def __init__(self, root: str | Path | None = None, device: str | torch.device = "cpu"):
        super().__init__(device)
        if root is not None:
            raise InputError("mpi3d_like is drawn and takes no root; the official files of MPI3D are read by 'mpi3d'")

    def _render(self, indices: Tensor) -> Tensor:
        return render_scene(*scene(self._unravel(indices)))


def scene(v: Tensor) -> tuple[Tensor, ...]:
    """The arguments of `vf.ops.render_scene` for factors v (B, 7) int64."""
    t = _tables(v.device)
    colour, shape, size, height, background, turn, lift = v.unbind(1)
    arm = t["arm"][turn, lift]
    held = t["held"][turn, lift, shape, size]
    fixed = t["fixed"].expand(len(v), -1, -1, -1)
    colours = t["colours"][background, colour]
    return (
        t["kinds"][shape],
        torch.cat([fixed, arm, held[:, None]], 1),
        t["tapers"][shape],
        colours,
        t["cameras"][height],
        t["light"].expand(len(v), -1),
        t["backgrounds"][background],
    )


@functools.cache
def _tables(device: torch.device) -> dict[str, Tensor]:
    """Everything that a few factors decide, for all their values."""
    turn = torch.linspace(-TURN, TURN, 40, dtype=torch.float64, device="cpu").deg2rad()[:, None]
    lift = torch.linspace(0, 1, 40, dtype=torch.float64, device="cpu")[None]
    arm, grip = _arm(turn, lift)
    outward = about(2, turn)[..., 1] * -1  # where the arm points
    shapes = torch.tensor(OBJECTS, dtype=torch.float64, device="cpu")
    radii = torch.tensor(RADII, dtype=torch.float64, device="cpu")
    sizes = radii[:, None] * shapes[:, None, [2, 2, 3]]  # (6, 2, 3)
    reach = 0.7 * radii[:, None] * outward[:, :, None]  # (40, 1, 2, 3)
    centres = grip[:, :, None] + reach
    held = pose(centres[:, :, None], sizes, about(2, turn)[:, :, None, None])
    links = [BOX, BOX, BOX, BOX, CONE, CONE, ELLIPSOID]
    fixed_kinds = [CONE] * _FIXED
    kinds = torch.tensor([[*fixed_kinds, *links, int(kind)] for kind, *_ in OBJECTS], device="cpu")
    tapers = (kinds == CONE).double()
    tapers[:, -1] = shapes[:, 1]
    rest = (_TABLE, _BASE, _BASE, _BASE, _LINK, _LINK, _JOINT, _JOINT, _JOINT)
    colours = torch.tensor(
        [[[rim, *rest, colour] for colour in OBJECT_COLOURS] for rim in BACKGROUND_COLOURS],
        dtype=torch.float64,
        device="cpu",
    )
    walls = torch.tensor(BACKGROUND_COLOURS, dtype=torch.float64, device="cpu")
    pitch = torch.tensor(CAMERAS, dtype=torch.float64, device="cpu").deg2rad()
    away = torch.stack([torch.zeros_like(pitch), -pitch.cos(), pitch.sin()], 1)
    target = torch.tensor([[0.0, -0.3, 0.88]], dtype=torch.float64, device="cpu")
    tables = {
        "arm": arm,
        "held": held,
        "fixed": _furniture(),
        "tapers": tapers,
        "colours": colours,
        "cameras": look_at(target + 7.5 * away, target.expand(3, 3), math.radians(18.5)),
        "light": torch.tensor([-0.45, -0.75, 1.0, 0.42], dtype=torch.float64, device="cpu"),
        "backgrounds": torch.stack([0.22 * walls, 0.45 * walls], 1),
    }
    return {"kinds": kinds.to(device)} | {name: table.float().to(device) for name, table in tables.items()}


def _furniture() -> Tensor:
    """Poses (3, 3, 4) of the rim, the table on it and the base of the arm."""
    centres = torch.tensor([[0, 0, -0.20], [0, 0, -0.05], [0, 0, 0.08]], dtype=torch.float64, device="cpu")
    sizes = torch.tensor([[1.95, 1.95, 0.14], [1.6, 1.6, 0.05], [0.52, 0.52, 0.08]], dtype=torch.float64, device="cpu")
    return pose(centres, sizes)


def _arm(turn: Tensor, lift: Tensor) -> tuple[Tensor, Tensor]:
    """Poses (40, 40, 7, 3, 4) of post, counterweight, upper link, forearm, shoulder, elbow and wrist, and where the
    forearm ends (40, 40, 3)."""
    turn, lift = torch.broadcast_tensors(turn, lift)
    about_z = about(2, turn)
    pitches = [torch.asin(a + lift * (b - a)) for a, b in (UPPER_RISE, FORE_RISE)]
    # In the arm's own plane: x across, y away from where it points, z up. A link's y runs against its direction.
    tilts = [about_z @ about(0, -pitch) for pitch in pitches]
    along = [-tilt[..., 1] for tilt in tilts]
    zero = torch.zeros_like(lift)
    up = torch.stack([zero, zero, zero + 1], -1)
    shoulder = SHOULDER * up
    elbow = shoulder + UPPER * along[0]
    wrist = elbow + FORE * along[1]
    back = about_z[..., 1]
    sideways = about_z @ about(1, zero + math.pi / 2)  # whose z is the axis of the joints

    def part(centre: Tensor, size: tuple[float, float, float], rotation: Tensor) -> Tensor:
        return pose(centre, torch.tensor(size, dtype=torch.float64, device="cpu"), rotation)

    parts = [
        part(0.30 * up, (0.17, 0.20, 0.22), about_z),
        part(0.26 * up + 0.36 * back, (0.13, 0.16, 0.12), about_z),
        part((shoulder + elbow) / 2, (0.12, UPPER / 2, 0.15), tilts[0]),
        part((elbow + wrist) / 2, (0.10, FORE / 2, 0.12), tilts[1]),
        part(shoulder, (0.22, 0.22, 0.22), sideways),
        part(elbow, (0.19, 0.19, 0.17), sideways),
        part(wrist, (0.16, 0.16, 0.16), about_z),
    ]
    return torch.stack(parts, 2), wrist
