"""Triton kernel of `render_scene`; the mathematics is vaecirc_fast/reference/render_scene.py.

A program casts the rays of a block of pixels of one image, sample by sample and solid by solid; what a solid is to the
camera is a few scalars, made anew. Faces are listed by `sides`, so planes, boxes, prisms and the ends of cones are one.
"""

import torch
import triton
import triton.language as tl

# Kinds of solids; the numbers of the reference.
PLANE, BOX, ELLIPSOID, CONE, CAPSULE, PRISM = (tl.constexpr(n) for n in (1, 2, 3, 4, 5, 10))


@triton.jit
def _ball(ox, oy, oz, dx, dy, dz):
    """k where rays o + s d enter the unit ball from outside, else 0."""
    b = ox * dx + oy * dy + oz * dz
    c = ox * ox + oy * oy + oz * oz - 1
    x, y, z = oy * dz - oz * dy, oz * dx - ox * dz, ox * dy - oy * dx
    discriminant = dx * dx + dy * dy + dz * dz - (x * x + y * y + z * z)
    hit = (discriminant >= 0) & (b < 0) & (c > 0)
    return tl.where(hit, (tl.sqrt_rn(tl.where(hit, discriminant, 0.0)) - b) / tl.where(hit, c, 1.0), 0.0)


@triton.jit
def _faces(kind, shape, sides, ox, oy, oz, dx, dy, dz):
    """k where rays enter and leave a solid's faces, inf and 0 where there are none, and the normal at the entry."""
    slope = tl.where(kind == BOX, 0.0, (shape - 1) / 2)
    middle = tl.where(kind == BOX, 1.0, (shape + 1) / 2)
    ends = tl.where(kind == PLANE, 1, 2)
    count = tl.where(kind > PRISM, kind - PRISM, tl.where(kind == BOX, 4, 0))
    enters = dx * 0 + float("inf")
    leaves, nx, ny, nz = dx * 0, dx * 0, dx * 0, dx * 0
    for f in range(ends + count):
        side = f >= ends
        row = sides + (kind * 8 + tl.where(side, f - ends, 0)) * 3
        inner = tl.load(row + 2)
        x = tl.where(side, tl.load(row), 0.0)
        y = tl.where(side, tl.load(row + 1), 0.0)
        z = tl.where(side, -inner * slope, tl.where(f == 0, 1.0, -1.0))
        margin = tl.where(side, inner * middle, tl.where(kind == PLANE, 0.0, 1.0)) - (x * ox + y * oy + z * oz)
        inside = margin >= 0
        # The camera in a face's plane is inside of it.
        k = (x * dx + y * dy + z * dz) / tl.where(inside, tl.where(margin < 1e-30, 1e-30, margin), margin)
        leaves = tl.where(inside & (k > leaves), k, leaves)
        nearer = (margin < 0) & (k < enters)
        enters = tl.where(nearer, k, enters)
        nx, ny, nz = tl.where(nearer, x, nx), tl.where(nearer, y, ny), tl.where(nearer, z, nz)
    return enters, leaves, nx, ny, nz


@triton.jit
def _cone_side(slope, middle, ox, oy, oz, dx, dy, dz):
    """k where rays enter and leave the endless surface of a cone."""
    r, dr = middle + slope * oz, slope * dz
    a, b = dx * dx + dy * dy - dr * dr, ox * dx + oy * dy - r * dr
    c = ox * ox + oy * oy - r * r
    x, y, z = ox * dr - r * dx, oy * dr - r * dy, ox * dy - oy * dx
    discriminant = x * x + y * y - z * z
    missed, ahead = discriminant < 0, b > 0
    root = tl.sqrt_rn(tl.where(missed, 0.0, discriminant))
    q = -(b + tl.where(ahead, root, -root))
    of_c = q / tl.where(c == 0, 1e-30, c)
    of_a = tl.where(q == 0, 0.0, a / tl.where(q == 0, 1.0, q))
    plus, minus = tl.where(ahead, of_a, of_c), tl.where(ahead, of_c, of_a)
    within, mirrored = c <= 0, r <= 0
    enters = tl.where(within & (r > 0), float("inf"), tl.where(missed, 0.0, plus))
    leaves = tl.where((within & mirrored) | missed | (minus < 0), 0.0, minus)
    return enters, leaves


@triton.jit
def _capsule(half, ox, oy, oz, dx, dy, dz):
    """k where rays enter a capsule, else 0, and the height of the point of its axis that is next to the entry."""
    a, b, c = dx * dx + dy * dy, ox * dx + oy * dy, ox * ox + oy * oy - 1
    z = ox * dy - oy * dx
    discriminant = a - z * z
    outside = c > 0
    hit = outside & (discriminant >= 0) & (b < 0)
    k = tl.where(hit, (tl.sqrt_rn(tl.where(hit, discriminant, 0.0)) - b) / tl.where(outside, c, 1.0), 0.0)
    hit = hit & (k > 0)
    reached = tl.where(hit, oz + dz / tl.where(hit, k, 1.0), oz)
    end = tl.where(reached > 0, half, -half)
    on_side = hit & (tl.abs(reached) <= half)
    lost = tl.where(outside, hit == 0, tl.abs(oz) <= half)
    k = tl.where(on_side, k, tl.where(lost, 0.0, _ball(ox, oy, oz - end, dx, dy, dz)))
    return k, tl.where(on_side, reached, end)


@triton.jit
def _solid(kind, shape, sides, ox, oy, oz, dx, dy, dz):
    """k where rays enter a solid, 0 where they miss it, and the point's coordinates and normal there."""
    nx, ny, nz = dx * 0, dx * 0, dx * 0
    if kind == ELLIPSOID:
        k = _ball(ox, oy, oz, dx, dy, dz)
        s = 1 / tl.where(k > 0, k, 1.0)
        nx, ny, nz = ox + dx * s, oy + dy * s, oz + dz * s
    elif kind == CAPSULE:
        k, axis = _capsule(shape, ox, oy, oz, dx, dy, dz)
        s = 1 / tl.where(k > 0, k, 1.0)
        nx, ny, nz = ox + dx * s, oy + dy * s, oz + dz * s - axis
    else:
        k, leaves, nx, ny, nz = _faces(kind, shape, sides, ox, oy, oz, dx, dy, dz)
        if kind == CONE:
            slope, middle = (shape - 1) / 2, (shape + 1) / 2
            side, leaves_side = _cone_side(slope, middle, ox, oy, oz, dx, dy, dz)
            on_side = side < k
            s = 1 / tl.where(on_side & (side > 0), side, 1.0)
            k, leaves = tl.where(on_side, side, k), tl.where(leaves_side > leaves, leaves_side, leaves)
            nx, ny = tl.where(on_side, ox + dx * s, nx), tl.where(on_side, oy + dy * s, ny)
            nz = tl.where(on_side, -slope * (middle + slope * (oz + dz * s)), nz)
        k = tl.where((k > 0) & (k >= leaves) & (k < float("inf")), k, 0.0)
    return k, nx, ny, nz


@triton.jit
def _row(pose, x, y, z):
    return tl.load(pose) * x + tl.load(pose + 1) * y + tl.load(pose + 2) * z


@triton.jit
def _render_scene_kernel(
    kinds,  # (B, P)
    poses,  # (B, P, 3, 4)
    shapes,  # (B, P)
    colours,  # (B, P, C)
    cameras,  # (B, 4, 3)
    lights,  # (B, 4)
    backgrounds,  # (B, 2, C)
    sides,  # (19, 8, 3) by kind: x, y of the normals of the sides, and their inner radius
    out,  # (B, C, H, W)
    P,
    H,
    W,
    C: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = (pixel // W).to(tl.float32), (pixel % W).to(tl.float32)
    light, camera, sky = lights + 4 * b, cameras + 12 * b, backgrounds + 2 * C * b
    lx, ly, lz, ambient = tl.load(light), tl.load(light + 1), tl.load(light + 2), tl.load(light + 3)
    length = tl.sqrt_rn(lx * lx + ly * ly + lz * lz)
    lx, ly, lz = lx / length, ly / length, lz / length
    zero = column * 0
    red, green, blue = zero, zero, zero
    for sample in range(SAMPLES * SAMPLES):
        u = (2 * (column + (sample % SAMPLES + 0.5) / SAMPLES) - W) / H
        v = (2 * (row + (sample // SAMPLES + 0.5) / SAMPLES) - H) / H
        share = (v + 1) / 2
        top = tl.load(sky)
        r = top + (tl.load(sky + C) - top) * share
        g, blu = r, r
        if C == 3:
            top = tl.load(sky + 1)
            g = top + (tl.load(sky + C + 1) - top) * share
            top = tl.load(sky + 2)
            blu = top + (tl.load(sky + C + 2) - top) * share
        nearest = zero
        # The rays in the world.
        x = tl.load(camera) * u + tl.load(camera + 3) * v + tl.load(camera + 6)
        y = tl.load(camera + 1) * u + tl.load(camera + 4) * v + tl.load(camera + 7)
        z = tl.load(camera + 2) * u + tl.load(camera + 5) * v + tl.load(camera + 8)
        px, py, pz = tl.load(camera + 9), tl.load(camera + 10), tl.load(camera + 11)
        for p in range(P):
            solid = b * P + p
            kind, shape, pose = tl.load(kinds + solid).to(tl.int32), tl.load(shapes + solid), poses + 12 * solid
            if kind > 0:
                # The camera, one a ray: the interpreter cannot join masks of scalars and of blocks.
                ox = _row(pose, px, py, pz) + tl.load(pose + 3) + zero
                oy = _row(pose + 4, px, py, pz) + tl.load(pose + 7) + zero
                oz = _row(pose + 8, px, py, pz) + tl.load(pose + 11) + zero
                dx, dy, dz = _row(pose, x, y, z), _row(pose + 4, x, y, z), _row(pose + 8, x, y, z)
                k, nx, ny, nz = _solid(kind, shape, sides, ox, oy, oz, dx, dy, dz)
                hit = k > nearest
                # The normal in the world: that of the solid times the transpose of its pose.
                wx = tl.load(pose) * nx + tl.load(pose + 4) * ny + tl.load(pose + 8) * nz
                wy = tl.load(pose + 1) * nx + tl.load(pose + 5) * ny + tl.load(pose + 9) * nz
                wz = tl.load(pose + 2) * nx + tl.load(pose + 6) * ny + tl.load(pose + 10) * nz
                squared = tl.where(hit, wx * wx + wy * wy + wz * wz, 1.0)
                cosine = (lx * wx + ly * wy + lz * wz) / tl.sqrt_rn(squared)
                cosine = tl.where(cosine > 0, tl.where(cosine < 1, cosine, 1.0), 0.0)
                shade = ambient + (1 - ambient) * cosine
                if kind == PLANE:
                    s = 1 / tl.where(hit, k, 1.0)
                    qx, qy = ox + dx * s, oy + dy * s
                    spot = 1 - (qx * qx + qy * qy)
                    spot = tl.where(spot > 0, spot, 0.0)
                    shade = shade * (1 - shape * spot * spot)
                nearest = tl.where(hit, k, nearest)
                colour = colours + C * solid
                r = tl.where(hit, tl.load(colour) * shade, r)
                if C == 3:
                    g = tl.where(hit, tl.load(colour + 1) * shade, g)
                    blu = tl.where(hit, tl.load(colour + 2) * shade, blu)
        red, green, blue = red + r, green + g, blue + blu
    inside = pixel < H * W
    at = out + b * C * H * W + pixel
    n: tl.constexpr = SAMPLES * SAMPLES
    tl.store(at, tl.where(red < n, red / n, 1.0), mask=inside)
    if C == 3:
        tl.store(at + H * W, tl.where(green < n, green / n, 1.0), mask=inside)
        tl.store(at + 2 * H * W, tl.where(blue < n, blue / n, 1.0), mask=inside)


def forward(scene, sides, size, samples):
    """Images (B, C, H, W) of the seven tensors of a scene, all float32 but the kinds; `sides` as the kernel's."""
    scene = [x.contiguous() for x in scene]
    (n, solids), channels, (height, width) = scene[0].shape, scene[3].shape[2], size
    out = torch.empty(n, channels, height, width, dtype=torch.float32, device=scene[0].device)
    # The interpreter wants few, big programs.
    block = 256 if scene[0].is_cuda else min(4096, triton.next_power_of_2(height * width))
    if n:
        _render_scene_kernel[(triton.cdiv(height * width, block), n)](
            *(*scene, sides, out, solids, height, width), C=channels, SAMPLES=samples, BLOCK=block
        )
    return out


def _draw(channels, samples):
    """A batch of scenes, for the calls below."""
    shapes = ((64, 5), (64, 5, 3, 4), (64, 5), (64, 5, channels), (64, 4, 3), (64, 4), (64, 2, channels))
    scene = [torch.empty(shape, device="cuda") for shape in shapes]
    scene[0] = scene[0].long()
    forward(scene, torch.empty(19, 8, 3, device="cuda"), (64, 64), samples)


# Launches that are compiled for GPUs which are not at hand, and instructions that their machine code must hold: see
# tests/compile_gate.py.
GATE = {
    "colour": (lambda: _draw(3, 2), ("STG.E",)),
    "grey": (lambda: _draw(1, 1), ("STG.E",)),
}
