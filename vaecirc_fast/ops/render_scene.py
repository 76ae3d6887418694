"""Op `render_scene`: small scenes of convex solids -> their images, shaded, without noise."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import _native, _registry
from ..errors import InputError
from ..reference import render_scene as reference
from ._library import LIBRARY, is_traced

MAX_SAMPLES = 4
_SHAPES = {
    "kind": "(B, P)",
    "pose": "(B, P, 3, 4)",
    "shape": "(B, P)",
    "colour": "(B, P, C) with C 1 or 3",
    "camera": "(B, 4, 3)",
    "light": "(B, 4)",
    "background": "(B, 2, C)",
}


def render_scene(
    kind: Tensor,
    pose: Tensor,
    shape: Tensor,
    colour: Tensor,
    camera: Tensor,
    light: Tensor,
    background: Tensor,
    *,
    size: tuple[int, int] = (64, 64),
    samples: int = 2,
) -> Tensor:
    """Images of B scenes of up to P solids each: (B, C, H, W) in [0, 1], C = 1 grey or 3 colours.

    kind: (B, P) int64, the solid in its own coordinates q = (x, y, z):
        ABSENT 0; PLANE 1: z <= 0, seen from above only; BOX 2: |x|, |y|, |z| <= 1; ELLIPSOID 3: the unit ball;
        CONE 4: |z| <= 1 within the radius that falls from 1 at z = -1 to `shape` at z = 1, so 1 is a cylinder;
        CAPSULE 5: what is within 1 of the points (0, 0, z) with |z| <= `shape`;
        PRISM + n, 10 + n: a prism of n = 3...8 sides, a corner at angle 0, whose corners have the cone's radius, so
        `shape` 0 is a pyramid. The names are in `vaecirc_fast.reference.render_scene`.
    pose: (B, P, 3, 4), the affine map of the world to the solid: q = pose[..., :3] w + pose[..., 3], so any turn, scale
        by axis and shear; `vaecirc_fast.data.scenes.pose` makes it of a centre, sizes and a turn.
    shape: (B, P): of cones and prisms the taper in [0, 1]; of capsules half the length of the axis in radii, >= 0; of
        planes the strength in [0, 1] of a soft shadow within the unit circle around its origin, by which the shade is
        times 1 - strength (1 - x^2 - y^2)^2; of others not read, 0.
    colour: (B, P, C) in [0, 1].
    camera: (B, 4, 3), rows right, down, forward and position in the world: the ray of the point x columns and y rows
        from the top left corner runs along forward + u right + v down with u = (2 x - W) / H and v = (2 y - H) / H. So
        |down| / |forward| is the tangent of half the vertical angle. `vaecirc_fast.data.scenes.look_at` makes it.
    light: (B, 4): the direction towards the light, of any length, and the ambient share in [0, 1].
    background: (B, 2, C) in [0, 1], the colours of the top and the bottom edge of the image, between them linear.
    size: H, W in pixels. samples: a pixel is the mean of samples x samples rays, 1 to 4, in an even grid.

    A solid's colour is times ambient + (1 - ambient) max(0, n l), n the unit normal in the world (by the inverse
    transpose) and l the direction towards the light (Lambert). Solids cast no other shadows than that of a plane. The
    solid first hit wins, of equals the first; a solid around the camera is not drawn. All floats are float32, or
    float64 (by the reference only), of one device. There is no gradient. Under vmap the batch dimensions are joined.
    InputError for other shapes, dtypes, devices, values out of range and not finite, or a camera whose axes lie in a
    plane. An image does not depend on the others of its batch.
    """
    given = dict(kind=kind, pose=pose, shape=shape, colour=colour, camera=camera, light=light, background=background)
    _check(given)
    height, width = _checked_size(size, samples)
    tensors = (kind, pose, shape, colour, camera, light, background)
    transformed = torch._C._are_functorch_transforms_active()
    run = torch.ops.vaecirc_fast.render_scene if transformed or is_traced(*tensors) else _run
    return run(*tensors, height, width, samples)


def _check(given: dict[str, Tensor]) -> None:
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise InputError(f"{name}: expected a tensor, got {type(x).__name__}")
    kind, pose, colour = given["kind"], given["pose"], given["colour"]
    if kind.ndim != 2 or kind.dtype != torch.int64:
        raise InputError(f"kind: expected int64 (B, P), got {kind.dtype} {tuple(kind.shape)}")
    if pose.dtype not in (torch.float32, torch.float64):
        raise InputError(f"pose: expected float32 or float64, got {pose.dtype}")
    b, p = kind.shape
    c = colour.shape[-1] if colour.ndim == 3 and colour.shape[-1] in (1, 3) else 3
    expected = [(b, p), (b, p, 3, 4), (b, p), (b, p, c), (b, 4, 3), (b, 4), (b, 2, c)]
    for (name, x), wanted in zip(given.items(), expected, strict=True):
        if tuple(x.shape) != wanted:
            raise InputError(f"{name}: expected {_SHAPES[name]}, here {wanted}, got {tuple(x.shape)}")
        if name != "kind" and x.dtype != pose.dtype:
            raise InputError(f"{name}: expected the dtype of pose, {pose.dtype}, got {x.dtype}")
        if x.device != kind.device:
            raise InputError(f"{name}: expected the device of kind, {kind.device}, got {x.device}")
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError(f"{name}: expected a tensor without gradient; images of scenes have none")


def _checked_size(size: tuple[int, int], samples: int) -> tuple[int, int]:
    if not isinstance(size, tuple | list) or len(size) != 2 or not all(_is_int(n) and n >= 1 for n in size):
        raise InputError(f"size: expected (H, W), whole numbers of at least 1, got {size!r}")
    if not _is_int(samples) or not 1 <= samples <= MAX_SAMPLES:
        raise InputError(f"samples: expected a whole number from 1 to {MAX_SAMPLES}, got {samples!r}")
    return size[0], size[1]


def _is_int(n: Any) -> bool:
    return isinstance(n, int | torch.SymInt) and not isinstance(n, bool)


def _check_values(
    kind: Tensor, pose: Tensor, shape: Tensor, colour: Tensor, camera: Tensor, light: Tensor, background: Tensor
) -> None:
    right, down, forward, _ = camera.unbind(1)
    volume = (torch.linalg.cross(right, down) * forward).sum(1)
    known = (kind >= reference.ABSENT) & (kind <= reference.CAPSULE)
    known |= (kind >= reference.PRISM + reference.SIDES[0]) & (kind <= reference.PRISM + reference.SIDES[-1])
    in_range = (shape >= 0) & ((shape <= 1) | (kind == reference.CAPSULE)) & _is_finite(shape)
    ambient = light[:, 3]
    good = (  # comparisons with nan are false
        ("kind", known, f"one of {', '.join(map(str, reference.KINDS))}"),
        ("pose", _is_finite(pose), "finite values"),
        ("shape", in_range, "values in [0, 1], of capsules [0, inf)"),
        ("colour", (colour >= 0) & (colour <= 1), "values in [0, 1]"),
        ("camera", _is_finite(camera), "finite values"),
        ("camera", volume != 0, "axes right, down and forward that span space"),
        ("light", _is_finite(light), "finite values"),
        ("light", (light[:, :3] != 0).any(1), "a direction other than 0"),
        ("light", (ambient >= 0) & (ambient <= 1), "an ambient share in [0, 1]"),
        ("background", (background >= 0) & (background <= 1), "values in [0, 1]"),
    )
    if bool(torch.stack([fine.all() for _, fine, _ in good]).all()):
        return
    for name, fine, expected in good:
        if not bool(fine.all()):
            scene = int((~fine).nonzero()[0, 0])
            raise InputError(f"{name}: expected {expected}, not so in scene {scene}")


def _is_finite(x: Tensor) -> Tensor:
    return x * 0 == 0  # a third of the time of isfinite


def _run(
    kind: Tensor,
    pose: Tensor,
    shape: Tensor,
    colour: Tensor,
    camera: Tensor,
    light: Tensor,
    background: Tensor,
    height: int,
    width: int,
    samples: int,
) -> Tensor:
    scene = (kind, pose, shape, colour, camera, light, background)
    _check_values(*scene)
    return ROW.function("render_scene", pose)(*scene, (height, width), samples)


LIBRARY.define(
    "render_scene(Tensor kind, Tensor pose, Tensor shape, Tensor colour, Tensor camera, Tensor light, "
    "Tensor background, SymInt height, SymInt width, int samples) -> Tensor"
)
LIBRARY.impl("render_scene", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("vaecirc_fast::render_scene", lib=LIBRARY)
def _fake(kind, pose, shape, colour, camera, light, background, height, width, samples):
    return pose.new_empty(len(kind), colour.shape[2], height, width)


def _vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple[Tensor, int]:
    tensors, rest = arguments[:7], arguments[7:]
    joined = []
    for x, dim in zip(tensors, in_dims, strict=False):
        x = x.movedim(dim, 0) if dim is not None else x.expand(info.batch_size, *x.shape)
        joined.append(x.flatten(0, 1))
    out = torch.ops.vaecirc_fast.render_scene(*joined, *rest)
    return out.unflatten(0, (info.batch_size, -1)), 0


torch.library.register_vmap("vaecirc_fast::render_scene", _vmap, lib=LIBRARY)


def _load_reference():
    return {"render_scene": reference.forward}


def _cpp(*arguments: Any) -> Tensor:
    *scene, (height, width), samples = arguments
    scene = [x.contiguous() for x in scene]
    (n, solids), channels = scene[0].shape, scene[3].shape[2]
    out = torch.empty(n, channels, height, width, dtype=torch.float32, device="cpu")
    sizes = (n, solids, channels, height, width, samples)
    # A ray takes as long as some ten additions.
    threads = _native.threads(16 * out.numel())
    _native.cpp().render_scene([x.data_ptr() for x in scene], sizes, out.data_ptr(), threads)
    return out


def _load_cpp():
    return {"render_scene": _cpp}


@functools.cache
def _sides(device: torch.device) -> Tensor:
    """The sides of boxes and prisms, float32 (19, 8, 3) by kind: x, y of a normal and the inner radius."""
    table = torch.zeros(reference.KINDS[-1] + 1, 8, 3, dtype=torch.float64, device="cpu")
    cylinder = torch.ones(1, dtype=torch.float64, device="cpu")
    for kind in (reference.BOX, *(reference.PRISM + n for n in reference.SIDES)):
        normals, margins = reference.faces(kind, cylinder)
        table[kind, : normals.shape[1] - 2] = torch.cat([normals[0, 2:, :2], margins[0, 2:, None]], 1)
    return table.float().to(device)


def _load_triton():
    from ..triton_kernels import render_scene as kernels  # pyright: ignore[reportMissingImports]

    def forward(*arguments: Any) -> Tensor:
        *scene, size, samples = arguments
        return kernels.forward(scene, _sides(scene[0].device), size, samples)

    return {"render_scene": forward}


_FLOATS = (torch.float32, torch.float64)
ROW = _registry.Row(
    "render_scene",
    cells={
        "reference": _registry.Kernel(_load_reference, ("cpu", "cuda"), _FLOATS, _registry.always),
        "cpp": _registry.Kernel(_load_cpp, ("cpu",), _FLOATS[:1], _registry.cpp_reason),
        "triton": _registry.Kernel(_load_triton, ("cpu", "cuda"), _FLOATS[:1], _registry.triton_reason),
        "cuda": _registry.Absent("is not written: threads exchange nothing, which Triton expresses fully"),
    },
    order={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
)
