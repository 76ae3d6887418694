"""shapes3d_like: rooms with one solid, rendered on the fly; factors, sizes and order of 3D Shapes."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..ops import render_scene
from ..reference.render_scene import BOX, CAPSULE, CONE, ELLIPSOID, PLANE
from . import scenes
from .dataset import Dataset

HALF_ANGLE = math.radians(20)  # of view, vertical
ORIENTATIONS = (-30, 30)  # degrees, of the camera around the middle of the room
SCALES = (0.75, 1.25)
LIGHT = (-0.4, -0.65, 1.0, 0.5)  # its direction, and the ambient share
SHADOW = 0.5
# Of cube, cylinder, sphere and capsule at scale 1: the kind, half its extent along x, y and z, and the capsule's half
# axis in radii.
SOLIDS = (
    (BOX, (0.68, 0.68, 0.68), 0.0),
    (CONE, (0.7, 0.7, 0.75), 1.0),
    (ELLIPSOID, (0.82, 0.82, 0.82), 0.0),
    (CAPSULE, (0.52, 0.52, 1.04), 1.0),
)


class Shapes3DLike(Dataset):
    """A stand-in for 3D Shapes (Burgess and Kim 2018): 480,000 colour images, one a combination of its six factors.

    A cube, cylinder, sphere or capsule (shape 0 to 3) of scale .75 to 1.25 stands in the middle of a room. The hues of
    floor, wall and object are k / 10 of the circle of hues; the camera goes around the object over 15 angles from
    -30 to 30 degrees. Names, sizes and order of the factors are those of the original, the last fastest; the pixels are
    not: these images are drawn by `vf.ops.render_scene`, on the device, 2 x 2 rays a pixel.
    """

    name = "shapes3d_like"
    shape = (3, 64, 64)
    factor_names = ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
    factor_sizes = (10, 10, 10, 8, 4, 15)
    takes_root = False

    def __init__(self, root: str | Path | None = None, device: str | torch.device = "cpu"):
        super().__init__(device)
        if root is not None:
            raise InputError("root: shapes3d_like is rendered and takes no files; shapes3d reads the official file")
        kind, pose, shape = _solids()
        # By scale and shape; the object is the last of four solids.
        self._kind, self._pose, self._shape = (x.to(self.device) for x in (kind, pose.float(), shape.float()))
        self._camera = _cameras(self.factor_sizes[5]).float().to(self.device)
        self._hues = scenes.hues(self.factor_sizes[0]).float().to(self.device)
        self._light = torch.tensor(LIGHT, device=self.device)
        self._background = torch.zeros(2, 3, device=self.device)  # floor and walls leave nothing of it

    def scenes(self, indices: Tensor) -> tuple[Tensor, ...]:
        """The tensors that `vf.ops.render_scene` takes, in its order, for the images of `indices` (B,)."""
        v, n = self.factors(indices), len(indices)
        scale_and_shape = v[:, 3] * self.factor_sizes[4] + v[:, 4]
        hues = v[:, (0, 1, 1, 2)]
        return (
            self._kind[scale_and_shape],
            self._pose[scale_and_shape],
            self._shape[scale_and_shape],
            self._hues[hues],
            self._camera[v[:, 5]],
            self._light.expand(n, 4),
            self._background.expand(n, 2, 3),
        )

    def _render(self, indices: Tensor) -> Tensor:
        kind, pose, shape, colour, camera, light, background = self.scenes(indices)
        return render_scene(kind, pose, shape, colour, camera, light, background, size=self.shape[1:])


def _solids() -> tuple[Tensor, Tensor, Tensor]:
    """Kinds (32, 4), poses (32, 4, 3, 4) and shapes (32, 4) of floor, walls and object, by scale and shape; float64."""
    kinds, poses, shapes = [], [], []
    for scale in torch.linspace(*SCALES, 8, dtype=torch.float64, device="cpu"):
        for kind, half, shape in SOLIDS:
            half = scale * torch.tensor(half, dtype=torch.float64, device="cpu")
            height = half[2].clone()
            if kind == CAPSULE:
                half = half[[0, 0, 0]]  # a capsule is measured in radii
            centre = torch.stack([torch.zeros_like(height), torch.zeros_like(height), height])
            kinds.append([PLANE, PLANE, PLANE, kind])
            shapes.append([SHADOW, 0.0, 0.0, shape])
            poses.append(torch.stack([_floor(1.9 * float(half[0])), *_walls(), scenes.pose(centre, half)]))
    return (
        torch.tensor(kinds, device="cpu"),
        torch.stack(poses),
        torch.tensor(shapes, dtype=torch.float64, device="cpu"),
    )


def _floor(radius: float) -> Tensor:
    """The plane z = 0, whose shadow lies around the object, a little away from the light."""
    origin = torch.tensor([0.15 * radius, 0.1 * radius, 0.0], dtype=torch.float64, device="cpu")
    return scenes.pose(origin, torch.tensor([radius, radius, 1.0], dtype=torch.float64, device="cpu"))


def _walls() -> tuple[Tensor, Tensor]:
    """The two walls at the back, at right angles, 2.6 from the middle; the others are behind the camera."""
    walls = []
    for angle in (-45.0, 45.0):
        turn = scenes.about(2, torch.tensor(math.radians(angle), dtype=torch.float64, device="cpu"))
        turn = turn @ scenes.about(0, torch.tensor(math.pi / 2, dtype=torch.float64, device="cpu"))  # z to -y
        origin = turn @ torch.tensor([0.0, 0.0, -2.6], dtype=torch.float64, device="cpu")
        walls.append(scenes.pose(origin, torch.ones(3, dtype=torch.float64, device="cpu"), turn))
    return walls[0], walls[1]


def _cameras(n: int) -> Tensor:
    """Cameras (n, 4, 3) around the middle of the room, looking down at the object; float64."""
    angle = torch.deg2rad(torch.linspace(*ORIENTATIONS, n, dtype=torch.float64, device="cpu"))
    height = torch.full_like(angle, 2.9)
    position = torch.stack([5.2 * angle.sin(), -5.2 * angle.cos(), height], 1)
    target = torch.tensor([0.0, 0.0, 0.75], dtype=torch.float64, device="cpu").expand(n, 3)
    return scenes.look_at(position, target, HALF_ANGLE)
