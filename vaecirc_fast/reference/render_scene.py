"""Reference of `render_scene`: small scenes of convex solids, cast ray by ray in closed form, in plain torch.

A ray is position + s d with d = forward + u right + v down; s is the same number in the world and in every solid's own
coordinates, so all is computed there. What is compared is k = 1 / s, the larger the nearer: where a ray meets a plane,
k is an affine function of u and v, and a solid with faces needs no division at all. Sums are written out: matrix
products would add in an order that depends on the batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Kinds of solids. A prism of n sides, 3 to 8, is PRISM + n.
ABSENT, PLANE, BOX, ELLIPSOID, CONE, CAPSULE, PRISM = 0, 1, 2, 3, 4, 5, 10
SIDES = range(3, 9)
KINDS = (ABSENT, PLANE, BOX, ELLIPSOID, CONE, CAPSULE, *(PRISM + n for n in SIDES))
CELLS = 1 << 20  # rays times solids computed at once


def forward(
    kind: Tensor,
    pose: Tensor,
    shape: Tensor,
    colour: Tensor,
    camera: Tensor,
    light: Tensor,
    background: Tensor,
    size: tuple[int, int],
    samples: int,
) -> Tensor:
    """The images (B, C, H, W) in the dtype of `pose`; arguments as of `vf.ops.render_scene`."""
    out = pose.new_empty(len(kind), colour.shape[2], *size)
    u, v = rays(size, samples, pose)
    step = max(1, CELLS // max(1, kind.shape[1] * u.numel()))
    for b in range(0, len(kind), step):
        some = slice(b, b + step)
        scenes = tuple(x[some] for x in (kind, pose, shape, colour, camera, light, background))
        pixels = _render(scenes, u.flatten(), v.flatten()).unflatten(2, (samples * samples, *size))
        total = pixels[:, :, 0]
        for sample in range(1, samples * samples):
            total = total + pixels[:, :, sample]
        out[some] = (total / samples**2).clamp(0, 1)  # which rounding may leave
    return out


def rays(size: tuple[int, int], samples: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """u and v of the rays of an image: (samples samples, H, W) each; of one pixel, an even grid of samples x samples.

    u = (2 x - W) / H and v = (2 y - H) / H for the point x columns and y rows from the top left corner.
    """
    height, width = size
    place = (torch.arange(samples, dtype=torch.float64, device=like.device) + 0.5) / samples
    x = torch.arange(width, dtype=torch.float64, device=like.device) + place[:, None]
    y = torch.arange(height, dtype=torch.float64, device=like.device) + place[:, None]
    u, v = (2 * x - width) / height, (2 * y - height) / height
    grid = (samples, samples, height, width)
    u, v = u[None, :, None, :].expand(grid), v[:, None, :, None].expand(grid)
    return u.flatten(0, 1).to(like.dtype), v.flatten(0, 1).to(like.dtype)


def faces(kind: int, shape: Tensor) -> tuple[Tensor, Tensor]:
    """The faces of solids of one kind: normals (M, F, 3) and margins (M, F); inside is where n q <= margin for all."""
    n = kind - PRISM if kind > PRISM else 0
    caps = [[0.0, 0.0, 1.0]] if kind == PLANE else [[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]
    normals = shape.new_tensor(caps)
    margins = shape.new_tensor([0.0] if kind == PLANE else [1.0, 1.0])
    normals, margins = normals.expand(len(shape), -1, -1), margins.expand(len(shape), -1)
    if kind == BOX:
        sides = shape.new_tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]]).expand(len(shape), -1, -1)
        normals, margins = torch.cat([normals, sides], 1), torch.cat([margins, torch.ones_like(sides[..., 0])], 1)
    elif n:
        angle = (2 * torch.arange(n, dtype=torch.float64, device=shape.device) + 1) * (math.pi / n)
        inner = math.cos(math.pi / n)
        x, y = (f(angle).to(shape.dtype).expand(len(shape), n) for f in (torch.cos, torch.sin))
        slope, middle = (shape - 1) / 2, (shape + 1) / 2
        z = (-inner * slope)[:, None].expand(-1, n)
        normals = torch.cat([normals, torch.stack([x, y, z], 2)], 1)
        margins = torch.cat([margins, (inner * middle)[:, None].expand(-1, n)], 1)
    return normals, margins


def _render(scenes: tuple[Tensor, ...], u: Tensor, v: Tensor) -> Tensor:
    """Colours (B, C, N) along the rays u, v (N,)."""
    kind, pose, shape, colour, camera, light, background = scenes
    turn, offset = pose[..., :3], pose[..., 3]
    # Right, down, forward and the position in the solids' coordinates: (B, P, 4, 3).
    seen_from = _dot(turn[:, :, None], camera[:, None, :, None])
    across, origin = seen_from[:, :, :3], seen_from[:, :, 3] + offset
    direction, ambient = light[:, :3], light[:, 3]
    direction = direction / _dot(direction, direction).sqrt()[:, None]
    nearest = pose.new_zeros(len(kind), kind.shape[1] + 1, len(u))  # of nothing, k is 0
    cosine, shadow = torch.zeros_like(nearest), torch.zeros_like(nearest)
    for value in KINDS[1:]:
        b, p = (kind == value).nonzero(as_tuple=True)
        if len(b) == 0:
            continue
        o, (right, down, forward) = origin[b, p], across[b, p, :, :, None].unbind(1)
        d = right * u + down * v + forward
        of_kind = {ELLIPSOID: _ellipsoid, CAPSULE: _capsule}.get(value, _solid)
        k, normal = of_kind(value, shape[b, p], o, d)
        # The normal in the world is that of the solid times the transpose of its pose.
        normal = _dot(turn[b, p].mT[..., None], normal[:, None], 2)
        length = _dot(normal, normal, 1).sqrt()
        hit = (k > 0) & k.isfinite()
        nearest[b, p] = torch.where(hit, k, 0)
        cosine[b, p] = torch.where(hit, _dot(direction[b, :, None], normal, 1) / length, 0).clamp(0, 1)
        if value == PLANE:
            x, y = (o[:, :2, None] + d[:, :2] / k[:, None]).unbind(1)
            spot = (1 - (x * x + y * y)).clamp(min=0)
            shadow[b, p] = torch.where(hit, shape[b, p, None] * spot * spot, 0)
    best = nearest.argmax(1, keepdim=True)  # the first of equals
    none = (nearest.gather(1, best) == 0).squeeze(1)
    shade = ambient[:, None] + (1 - ambient)[:, None] * cosine.gather(1, best)[:, 0]
    shade = shade * (1 - shadow.gather(1, best)[:, 0])
    padded = torch.cat([colour, torch.zeros_like(background[:, :1])], 1)
    seen = padded.mT.gather(2, best.expand(-1, padded.shape[2], -1)) * shade[:, None]
    top, bottom = background[:, 0, :, None], background[:, 1, :, None]
    return torch.where(none[:, None], top + (bottom - top) * ((v + 1) / 2), seen)


def _dot(a: Tensor, b: Tensor, dim: int = -1) -> Tensor:
    """The sum of products over a dimension of 3."""
    (ax, ay, az), (bx, by, bz) = a.unbind(dim), b.unbind(dim)
    return ax * bx + ay * by + az * bz


def _solid(kind: int, shape: Tensor, o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays o + s d (M, 3), (M, 3, N) enter solids with faces, or cones: k (M, N), and normals (M, 3, N)."""
    normals, margins = faces(kind, shape)
    margin = margins - _dot(normals, o[:, None])  # >= 0: the camera is inside of this face
    inside = (margin >= 0)[..., None]
    tiny = torch.finfo(o.dtype).tiny
    k = _dot(normals[..., None], d[:, None], 2) / torch.where(margin >= 0, margin.clamp(min=tiny), margin)[..., None]
    leaves = torch.where(inside, k, 0).amax(1).clamp(min=0)
    enters = torch.where(inside, torch.inf, k)
    face = enters.argmin(1, keepdim=True)
    enters = enters.gather(1, face)[:, 0]
    normal = normals.mT.gather(2, face.expand(-1, 3, -1))
    if kind == CONE:
        side, leaves_side = _cone_side(shape, o, d)
        point = o[..., None] + d / side[:, None]
        slope, middle = (shape[:, None] - 1) / 2, (shape[:, None] + 1) / 2
        outward = torch.stack([point[:, 0], point[:, 1], -slope * (middle + slope * point[:, 2])], 1)
        normal = torch.where((side < enters)[:, None], outward, normal)
        enters, leaves = torch.minimum(enters, side), torch.maximum(leaves, leaves_side)
    return torch.where((enters > 0) & (enters >= leaves), enters, 0), normal


def _cone_side(shape: Tensor, o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays enter and leave x^2 + y^2 <= r(z)^2 with r(z) = middle + slope z: k (M, N) of both.

    inf for one that starts inside, 0 for one that never leaves; where a ray misses, it enters at 0. A camera beyond the
    apex may be in the mirrored cone: then a ray enters where it meets the surface for the second time.
    """
    slope, middle = (shape - 1) / 2, (shape + 1) / 2
    x, y, r = o[:, 0], o[:, 1], middle + slope * o[:, 2]
    dx, dy, dr = d[:, 0], d[:, 1], slope[:, None] * d[:, 2]
    a, b = dx * dx + dy * dy - dr * dr, x[:, None] * dx + y[:, None] * dy - r[:, None] * dr
    c = x * x + y * y - r * r
    # b^2 - a c, by Lagrange's identity: differences of what is small near the outline.
    cross = (
        x[:, None] * dr - r[:, None] * dx,
        y[:, None] * dr - r[:, None] * dy,
        x[:, None] * dy - y[:, None] * dx,
    )
    discriminant = cross[0] * cross[0] + cross[1] * cross[1] - cross[2] * cross[2]
    root = discriminant.clamp(min=0).sqrt()
    # Roots of c k^2 + 2 b k + a, neither by a difference: q / c and a / q.
    q = -(b + torch.where(b > 0, root, -root))
    of_c, of_a = q / c[:, None], torch.where(q == 0, 0, a / q)
    plus, minus = torch.where(b > 0, of_a, of_c), torch.where(b > 0, of_c, of_a)
    missed, within, mirrored = discriminant < 0, (c <= 0)[:, None], (r <= 0)[:, None]
    enters = torch.where(within & ~mirrored, torch.inf, torch.where(missed, 0, plus))
    leaves = torch.where((within & mirrored) | missed, 0, minus).clamp(min=0)
    return enters, leaves


def _ellipsoid(kind: int, shape: Tensor, o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    k = _ball(o[..., None], d)
    return k, o[..., None] + d / k[:, None]


def _ball(o: Tensor, d: Tensor) -> Tensor:
    """Where rays enter the unit ball from outside: k (M, N), else 0; o is (M, 3, 1) or (M, 3, N)."""
    b, c = _dot(o, d, 1), _dot(o, o, 1) - 1
    cross = torch.linalg.cross(o.expand_as(d), d, dim=1)
    discriminant = _dot(d, d, 1) - _dot(cross, cross, 1)  # b^2 - d^2 c
    hit = (discriminant >= 0) & (b < 0) & (c > 0)
    return torch.where(hit, (discriminant.clamp(min=0).sqrt() - b) / c, 0)


def _capsule(kind: int, shape: Tensor, o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The side where a ray enters the endless cylinder between the ends, else the ball of the end that is nearer."""
    half = shape[:, None]
    x, y, z = (o[:, i, None] for i in range(3))
    a, b, c = d[:, 0] ** 2 + d[:, 1] ** 2, x * d[:, 0] + y * d[:, 1], x * x + y * y - 1
    discriminant = a - (x * d[:, 1] - y * d[:, 0]) ** 2
    outside = c > 0
    k = torch.where(outside & (discriminant >= 0) & (b < 0), (discriminant.clamp(min=0).sqrt() - b) / c, 0)
    reached = torch.where(outside, z + d[:, 2] / k, z)
    end = torch.where(reached > 0, half, -half)
    centre = torch.stack([torch.zeros_like(end), torch.zeros_like(end), end], 1)
    of_end = _ball(o[..., None] - centre, d)
    on_side = outside & (reached.abs() <= half)
    k = torch.where(on_side, k, torch.where(outside & (k == 0) | ~outside & (z.abs() <= half), 0, of_end))
    point = o[..., None] + d / k[:, None]
    axis = torch.where(on_side, point[:, 2], end)
    return k, torch.stack([point[:, 0], point[:, 1], point[:, 2] - axis], 1)
