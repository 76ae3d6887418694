"""Builds the arguments of `vf.ops.render_scene`: cameras, poses of solids, turns and hues. World axes: z is up."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def look_at(position: Tensor, target: Tensor, half_angle: float) -> Tensor:
    """Cameras (..., 4, 3) at `position` (..., 3), looking at `target` (..., 3), upright.

    half_angle: half the vertical angle of view, in radians, in (0, pi / 2). The line of sight must not be vertical.
    """
    forward = torch.nn.functional.normalize(target - position, dim=-1)
    up = forward.new_tensor([0.0, 0.0, 1.0]).expand_as(forward)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, up), dim=-1)
    down = torch.linalg.cross(forward, right)
    extent = math.tan(half_angle)
    return torch.stack([right * extent, down * extent, forward, position.expand_as(forward)], -2)


def pose(centre: Tensor, size: Tensor, turn: Tensor | None = None) -> Tensor:
    """Poses (..., 3, 4), the map of the world to the solid, of solids at `centre` (..., 3).

    size: (..., 3), by how much the solid is scaled along its own axes, > 0: the half lengths of the edges of a box.
    turn: (..., 3, 3), the rotation by which the solid's axes are turned in the world; None for none.
    """
    turn = torch.eye(3, dtype=size.dtype, device=size.device) if turn is None else turn
    linear = turn.mT / size[..., None]
    offset = -(linear @ centre[..., None])
    return torch.cat([linear.expand(*offset.shape[:-1], 3), offset], -1)


def about(axis: int, angle: Tensor) -> Tensor:
    """Rotations (..., 3, 3) by `angle` (...) in radians about the axis 0 (x), 1 (y) or 2 (z), right-handed."""
    cos, sin = angle.cos(), angle.sin()
    first, second = (axis + 1) % 3, (axis + 2) % 3
    turn = angle.new_zeros(*angle.shape, 3, 3)
    turn[..., axis, axis] = 1
    turn[..., first, first] = turn[..., second, second] = cos
    turn[..., first, second], turn[..., second, first] = -sin, sin
    return turn


def hues(n: int, saturation: float = 1.0, value: float = 1.0) -> Tensor:
    """`n` colours around the circle of hues from red on: float64 (n, 3) on the CPU, in [0, 1] (HSV)."""
    import colorsys

    colours = [colorsys.hsv_to_rgb(k / n, saturation, value) for k in range(n)]
    return torch.tensor(colours, dtype=torch.float64, device="cpu")
