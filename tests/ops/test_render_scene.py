"""The op render_scene: its reference against a search along each ray, kernels against the reference, bad input."""

import sys
from dataclasses import dataclass, fields, replace

import pytest
import torch
from backends import CPP, one_of_each, parameters
from close import assert_close, roundings
from hypothesis import given, settings
from hypothesis import strategies as st

import vaecirc_fast as vf
from vaecirc_fast import _native, _registry
from vaecirc_fast.data import scenes
from vaecirc_fast.errors import BackendError, InputError
from vaecirc_fast.ops import render_scene
from vaecirc_fast.reference import render_scene as reference
from vaecirc_fast.reference.render_scene import ABSENT, BOX, CAPSULE, CONE, ELLIPSOID, KINDS, PLANE, PRISM

MODULE = sys.modules["vaecirc_fast.ops.render_scene"]  # its name in the package is the function's
OP = torch.ops.vaecirc_fast.render_scene
# The longest chain of additions behind a pixel: a discriminant of six products of sums of three, the point on the
# surface, the length of its normal by six products, and the light's cosine.
TERMS = 6 * 3 + 3 + 6 + 3


@dataclass(frozen=True)
class Scene:
    """Arguments of render_scene."""

    kind: torch.Tensor
    pose: torch.Tensor
    shape: torch.Tensor
    colour: torch.Tensor
    camera: torch.Tensor
    light: torch.Tensor
    background: torch.Tensor
    size: tuple[int, int] = (24, 24)
    samples: int = 1

    def tensors(self):
        return {f.name: getattr(self, f.name) for f in fields(self)[:7]}

    def mapped(self, function):
        return replace(self, **{name: function(x) for name, x in self.tensors().items()})

    def to(self, dtype):
        return self.mapped(lambda x: x if x.dtype == torch.int64 else x.to(dtype))

    def __getitem__(self, some):
        return self.mapped(lambda x: x[some])

    def run(self):
        return render_scene(**self.tensors(), size=self.size, samples=self.samples)

    def reference(self):
        return reference.forward(*self.tensors().values(), self.size, self.samples)


def random_scene(n, solids, kinds=KINDS, channels=3, seed=0, size=(24, 24), samples=1):
    """Solids of any turn, shear and scale in view of cameras all around; values are of float32."""
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(*shape, generator=generator)  # noqa: E731
    kind = torch.tensor(kinds)[torch.randint(len(kinds), (n, solids), generator=generator)]
    turn = torch.linalg.qr(torch.randn(n, solids, 3, 3, generator=generator))[0]
    pose = scenes.pose(uniform(-1.2, 1.2, n, solids, 3), uniform(0.4, 1.2, n, solids, 3), turn)
    pose[..., :3] += uniform(-0.1, 0.1, n, solids, 3, 3)
    pose[..., 2, 3] += 2.0 * (kind == PLANE)  # so that planes lie behind most solids
    position = torch.nn.functional.normalize(torch.randn(n, 3, generator=generator), dim=1) * uniform(4, 8, n, 1)
    position[:, :2] += 0.5
    return Scene(
        kind,
        pose,
        uniform(0, 1, n, solids),
        uniform(0, 1, n, solids, channels),
        scenes.look_at(position, uniform(-0.5, 0.5, n, 3), 0.4),
        torch.cat([torch.randn(n, 3, generator=generator), uniform(0, 1, n, 1)], 1),
        uniform(0, 1, n, 2, channels),
        size,
        samples,
    )


# --- the rule for kernels --------------------------------------------------------------------------------------------


def truth_and_unit(scene):
    """The reference in float64, and how large the numbers are that rounding can spoil.

    Rounding moves a ray a little, by `roundings(TERMS)` eps of the screen at most. What that does to a pixel's value is
    its condition: without bound at outlines and edges, where the value jumps. So the unit is the value, plus its
    change, divided by that shift, when all rays are moved by it to each of four sides.
    """
    scene = scene.to(torch.float64)
    truth, shift = scene.reference(), roundings(TERMS) * torch.finfo(torch.float32).eps
    unit = truth.abs()
    for axis in (0, 1):
        for sign in (-1, 1):
            camera = scene.camera.clone()
            camera[:, 2] += sign * shift * camera[:, axis]
            unit = unit + (replace(scene, camera=camera).reference() - truth).abs() / shift
    return truth, unit


def check(scene, backend, truth=None):
    out = scene.mapped(lambda x: x.to(backend.device)).run().cpu()
    assert not out.isnan().any()
    assert float(out.amin()) >= 0 and float(out.amax()) <= 1
    truth, unit = truth_and_unit(scene) if truth is None else truth
    assert_close(out, scene.reference(), truth, terms=TERMS, unit=unit)
    return out


# --- the reference against a search along each ray -------------------------------------------------------------------


def outside(kind, shape, q):
    """A convex function of points q (..., 3): positive outside of the solid, negative inside."""
    x, y, z = q.unbind(-1)
    radius = 1 + (shape - 1) * (z + 1) / 2
    if kind == PLANE:
        return z
    if kind == BOX:
        return q.abs().amax(-1) - 1
    if kind == ELLIPSOID:
        return q.norm(dim=-1) - 1
    if kind == CAPSULE:
        return torch.stack([x, y, z - z.clamp(-shape, shape)], -1).norm(dim=-1) - 1
    if kind == CONE:
        return torch.maximum((x * x + y * y).sqrt() - radius, z.abs() - 1)
    n = kind - PRISM
    corner = torch.arange(n + 1, dtype=q.dtype) * (2 * torch.pi / n)
    ends = torch.stack([corner.cos(), corner.sin()], 1)
    edge = ends[1:] - ends[:-1]
    # Right of an edge of the outline at height z; the corners of that outline are radius times those.
    across = torch.stack([edge[:, 1], -edge[:, 0]], 1) / edge.norm(dim=1, keepdim=True)
    sides = (q[..., None, :2] * across).sum(-1) - radius[..., None] * (ends[:-1] * across).sum(1)
    return torch.maximum(sides.amax(-1), z.abs() - 1)


def search(kind, pose, shape, position, direction):
    """Of one kind: how far along rays (M, N, 3) each solid is entered, inf if it is not, and the normals in the world.

    Golden section finds where a ray is deepest in the solid, bisection where it enters, and the gradient there of the
    solid's function, taken by autograd in the world, is the normal.
    """

    def depth(point):
        return outside(kind, shape[:, None], (pose[:, None, :, :3] @ point[..., None])[..., 0] + pose[:, None, :, 3])

    def at(s):
        return depth(position[:, None] + s[..., None] * direction)

    shape_of_rays = direction.shape[:2]
    low, high = direction.new_zeros(shape_of_rays), direction.new_full(shape_of_rays, 40.0)
    if kind == PLANE:  # the deeper the farther
        low = high = high * 1e9
    else:
        for _ in range(44):
            a, b = low + 0.382 * (high - low), low + 0.618 * (high - low)
            left = at(a) < at(b)
            low, high = torch.where(left, low, a), torch.where(left, b, high)
    deepest, low = (low + high) / 2, torch.zeros_like(low)
    hit, high = (at(deepest) < 0) & (at(low) > 0), deepest
    for _ in range(90 if kind == PLANE else 54):
        middle = (low + high) / 2
        inside = at(middle) <= 0
        low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
    point = (position[:, None] + high[..., None] * direction).requires_grad_()
    (normal,) = torch.autograd.grad(depth(point).sum(), point)
    return torch.where(hit, high, torch.inf), normal


def plain_images(scene):
    """Images solid by solid, with a search along each ray."""
    right, down, forward, position = scene.camera.unbind(1)
    u, v = (x.flatten()[:, None] for x in reference.rays(scene.size, scene.samples, scene.pose))
    direction = forward[:, None] + u * right[:, None] + v * down[:, None]
    top, bottom = scene.background[:, :1], scene.background[:, 1:]
    nearest, value = torch.full_like(direction[..., 0], torch.inf), top + (bottom - top) * (v + 1) / 2
    light, ambient = scene.light[:, None, :3], scene.light[:, 3:]
    for p in range(scene.kind.shape[1]):
        for kind in scene.kind[:, p].unique().tolist():
            if kind == ABSENT:
                continue
            b = scene.kind[:, p] == kind
            pose, shape, colour = scene.pose[b, p], scene.shape[b, p], scene.colour[b, p]
            distance, normal = search(kind, pose, shape, position[b], direction[b])
            cosine = (normal * light[b]).sum(-1) / normal.norm(dim=-1) / light[b].norm(dim=-1)
            shade = ambient[b] + (1 - ambient[b]) * cosine.clamp(min=0)
            if kind == PLANE:
                point = position[b][:, None] + distance[..., None] * direction[b]
                q = (pose[:, None, :, :3] @ point[..., None])[..., 0] + pose[:, None, :, 3]
                shade = shade * (1 - shape[:, None] * (1 - q[..., 0] ** 2 - q[..., 1] ** 2).clamp(min=0) ** 2)
            nearer = distance < nearest[b]
            nearest[b] = torch.where(nearer, distance, nearest[b])
            value[b] = torch.where(nearer[..., None], colour[:, None] * shade[..., None], value[b])
    return value.mT.unflatten(2, (scene.samples**2, *scene.size)).mean(2)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_reference_is_what_a_search_finds(kind):
    """Golden section finds the deepest point to 1e-8 of the ray, by which a grazing ray may be missed, and so is not
    compared where the image changes by that little a shift."""
    scene = random_scene(12, 2, (kind,), seed=kind, size=(9, 8)).to(torch.float64)
    truth, plain = scene.reference(), plain_images(scene)
    moved = scene.camera.clone()
    moved[:, 2] += 1e-7 * (moved[:, 0] + moved[:, 1])
    decided = (replace(scene, camera=moved).reference() - truth).abs() < 1e-4
    assert decided.float().mean() > 0.99
    torch.testing.assert_close(torch.where(decided, truth, 0), torch.where(decided, plain, 0), atol=1e-6, rtol=0)
    assert (truth != replace(scene, kind=torch.zeros_like(scene.kind)).reference()).float().mean() > 0.03


def test_scenes_of_all_kinds_and_samples():
    scene = random_scene(3, 6, seed=3, size=(6, 6), samples=2).to(torch.float64)
    difference = (scene.reference() - plain_images(scene)).abs()
    assert float(difference.median()) < 1e-12
    assert (difference > 1e-6).float().mean() < 0.01  # grazing rays


# --- closed form -----------------------------------------------------------------------------------------------------


def planted(kinds, poses, shapes=None, colours=None, position=(0.0, 0.0, 5.0), size=(5, 5), samples=1):
    """A camera on the z axis that looks down it, x to the right and y up; light from above, a quarter ambient."""
    t = lambda x: torch.tensor(x, dtype=torch.float64)  # noqa: E731
    camera = t([[0.5, 0, 0], [0, -0.5, 0], [0, 0, -1], position])
    n = len(kinds)
    return Scene(
        torch.tensor([kinds], dtype=torch.int64).view(1, n),
        torch.stack(poses)[None] if n else torch.zeros(1, 0, 3, 4, dtype=torch.float64),
        t([shapes or [0.0] * n]).view(1, n),
        t([colours or [[1.0]] * n]).view(1, n, -1 if n else 1),
        camera[None],
        t([[0, 0, 2, 0.25]]),
        t([[[0.125], [0.625]]]),
        size,
        samples,
    )


def still(z=0.0, size=1.0):
    one = torch.ones(3, dtype=torch.float64)
    return scenes.pose(torch.tensor([0.0, 0.0, z], dtype=torch.float64), size * one)


def every_backend(scene, backend):
    return scene.to(torch.float32).mapped(lambda x: x.to(backend.device)).run().cpu()


def test_no_solids_leave_the_background(backend):
    out = every_backend(planted([], []), backend)
    rows = 0.125 + 0.5 * torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    torch.testing.assert_close(out, rows[:, None].expand(1, 1, 5, 5))


@pytest.mark.parametrize("kind", [BOX, ELLIPSOID, CONE, CAPSULE, PRISM + 5])
def test_a_solid_seen_from_above(backend, kind):
    """Its top faces light and camera: full colour in the middle; far to the sides there is none of it."""
    out = every_backend(planted([kind], [still(size=0.8)], [0.7], [[0.75]]), backend)[0, 0]
    assert out[2, 2] == 0.75
    assert out[0].tolist() == pytest.approx([0.175] * 5)


def test_the_shade_of_a_ball(backend):
    """A ray at tangent t meets the unit ball at distance 5 where z solves a quadratic; z is the cosine there."""
    out = every_backend(planted([ELLIPSOID], [still()], size=(9, 9)), backend)[0, 0]
    t = 0.5 * 2 / 9  # of the neighbour of the middle pixel
    k = (5 - (25 - 24 * (1 + t * t)) ** 0.5) / (1 + t * t)
    assert out[4, 5] == pytest.approx(0.25 + 0.75 * (5 - k), rel=1e-6)
    assert out[4, 5] == pytest.approx(float(out[3, 4]), rel=1e-6)


def test_the_nearest_wins_and_of_equals_the_first(backend):
    poses, colours = [still(-1.0), still(0.5), still(0.5)], [[0.2], [0.4], [0.8]]
    assert every_backend(planted([BOX] * 3, poses, None, colours), backend)[0, 0, 2, 2] == pytest.approx(0.4)
    assert every_backend(planted([BOX] * 3, poses[::-1], None, colours), backend)[0, 0, 2, 2] == pytest.approx(0.2)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in (ABSENT, PLANE)])
@pytest.mark.parametrize("where", ["around the camera", "behind the camera"])
def test_what_is_around_or_behind_the_camera_is_not_drawn(backend, kind, where):
    pose = still(5.0, 3.0) if where == "around the camera" else still(7.5)
    scene = planted([kind], [pose], [0.9], [[1.0]])
    assert torch.equal(every_backend(scene, backend), every_backend(planted([], []), backend))


def test_a_plane_is_seen_from_above_only(backend):
    scene = planted([PLANE], [still()], [0.5], [[1.0]])
    out = every_backend(scene, backend)[0, 0]
    # The middle is the origin, half in shadow; the corner is 5 * .4 * sqrt(2) away from it.
    assert out[2, 2] == 0.5
    assert out[0, 0] == 1
    below = planted([PLANE], [still(6.0)], [0.5], [[1.0]])
    assert torch.equal(every_backend(below, backend), every_backend(planted([], []), backend))


def test_a_ray_in_a_face_is_harmless(backend):
    """The camera in the plane of a side of a box, or on a cylinder's or cone's endless surface: no NaN."""
    parts = [
        planted([kind], [still()], [shape], position=position)
        for kind in (PLANE, BOX, CONE, CAPSULE, PRISM + 4)
        for position in ((1.0, 0.0, 5.0), (0.0, 0.0, 1.0), (1.0, 1.0, 1.0), (0.0, 1.0, -1.0))
        for shape in ((0.0, 1.0) if kind == CONE else (1.0,))
    ]
    names = parts[0].tensors()
    scene = replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
    out = every_backend(scene, backend)
    assert bool(((out >= 0) & (out <= 1)).all())


def test_the_same_solid_by_two_kinds():
    """A capsule without length is a ball; four sides, an eighth turned and as wide, are a box; cones of one radius."""
    eighth = scenes.about(2, torch.tensor(torch.pi / 4, dtype=torch.float64))
    wide = torch.tensor([2**0.5, 2**0.5, 1.0], dtype=torch.float64)
    scene = random_scene(8, 1, (BOX,), seed=5).to(torch.float64)
    other = scene.pose.clone()
    other[..., :3] = torch.diag(1 / wide) @ eighth @ scene.pose[..., :3]
    other[..., 3] = (torch.diag(1 / wide) @ eighth @ scene.pose[..., 3, None])[..., 0]
    box, prism = (
        scene.reference(),
        replace(scene, kind=scene.kind * 0 + PRISM + 4, pose=other, shape=scene.shape * 0 + 1).reference(),
    )
    torch.testing.assert_close(box, prism)
    ball = replace(scene, kind=scene.kind * 0 + ELLIPSOID).reference()
    torch.testing.assert_close(ball, replace(scene, kind=scene.kind * 0 + CAPSULE, shape=scene.shape * 0).reference())


def test_a_moved_world_looks_the_same():
    """Solids, camera and light turned and shifted together, and the light's length, change nothing."""
    scene = random_scene(12, 6, seed=6).to(torch.float64)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    shift = torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64)
    camera = scene.camera @ turn.T
    camera[:, 3] += shift
    pose = scene.pose.clone()
    pose[..., :3] = scene.pose[..., :3] @ turn.T
    pose[..., 3] -= pose[..., :3] @ shift
    light = torch.cat([3 * scene.light[:, :3] @ turn.T, scene.light[:, 3:]], 1)
    torch.testing.assert_close(replace(scene, camera=camera, pose=pose, light=light).reference(), scene.reference())


def test_cameras_and_poses_are_as_told():
    position, target = torch.tensor([[3.0, -4.0, 2.0]]), torch.tensor([[0.0, 1.0, 0.5]])
    right, down, forward, at = scenes.look_at(position, target, 0.3)[0]
    torch.testing.assert_close(forward, torch.nn.functional.normalize(target - position)[0])
    assert torch.equal(at, position[0])
    axes = torch.stack([right, down, forward])
    extent = torch.tan(torch.tensor(0.3))
    torch.testing.assert_close(axes @ axes.T, torch.diag(torch.stack([extent**2, extent**2, torch.tensor(1.0)])))
    assert right[2] == 0 and down[2] < 0
    assert torch.linalg.det(axes) > 0
    centre, size, turn = torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 3, 4]), scenes.about(2, torch.tensor(0.5))
    torch.testing.assert_close(
        turn @ torch.tensor([1.0, 0, 0]),
        torch.tensor([0.5, 0, 0]).cos() * torch.tensor([1.0, 0, 0]) + torch.tensor([0, torch.tensor(0.5).sin(), 0]),
    )
    solid = scenes.pose(centre, size, turn)
    corner = centre + turn @ (size * torch.tensor([1.0, -1, 1]))
    torch.testing.assert_close(solid[:, :3] @ corner + solid[:, 3], torch.tensor([1.0, -1, 1]))


# --- kernels ---------------------------------------------------------------------------------------------------------

SHAPES = {
    "one pixel": dict(n=5, solids=3, size=(1, 1), samples=1),
    "one solid": dict(n=12, solids=1, size=(16, 16)),
    "odd": dict(n=2, solids=3, size=(7, 19), samples=3),
    "wide": dict(n=2, solids=3, size=(5, 70), samples=2),
    "grey": dict(n=5, solids=4, channels=1, size=(17, 16)),
    "tall, many": dict(n=1, solids=24, size=(23, 5)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_values(backend, name):
    check(random_scene(**SHAPES[name], seed=len(name)), backend)


@pytest.fixture(scope="module")
def of_kind():
    found = {}
    for kind in KINDS[1:]:
        scene = random_scene(16, 2, (kind,), seed=100 + kind)
        found[kind] = scene, truth_and_unit(scene)
    return found


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("backend", parameters(CPP), indirect=True)
def test_every_kind(backend, kind, of_kind):
    check(of_kind[kind][0], backend, of_kind[kind][1])


@pytest.mark.deep
@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("backend", parameters(CPP), indirect=True)
def test_many_of_every_kind(backend, kind):
    for seed in range(20):
        check(random_scene(48, 2, (kind,), seed=seed, size=(32, 32)), backend)


@given(
    n=st.integers(1, 3),
    solids=st.integers(0, 5),
    channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**31),
    height=st.integers(1, 20),
    width=st.integers(1, 40),
    samples=st.integers(1, 4),
)
@settings(max_examples=12)
@pytest.mark.parametrize("backend", parameters(CPP), indirect=True)
def test_any_scene(backend, n, solids, channels, seed, height, width, samples):
    check(random_scene(n, solids, channels=channels, seed=seed, size=(height, width), samples=samples), backend)


@pytest.mark.parametrize("backend", parameters(CPP[-1:]), indirect=True)
def test_a_wrong_kernel_is_found(backend, of_kind, monkeypatch):
    """The rule bites: a pose or a light that is off by 1e-4 in one coordinate, a camera by 2e-3."""
    run = MODULE._cpp
    for scene, truth in of_kind.values():
        for at, by in ((1, 1e-4), (4, 2e-3), (5, 1e-4)):

            def wrong(*arguments, at=at, by=by):
                changed = list(arguments)
                changed[at] = arguments[at].clone()
                changed[at][..., 0] += by
                return run(*changed)

            monkeypatch.setattr(MODULE, "_cpp", wrong)
            with pytest.raises(AssertionError, match="elements are off"):
                check(scene, backend, truth)
            monkeypatch.setattr(MODULE, "_cpp", run)


def test_no_images(backend):
    scene = random_scene(2, 3)[:0].mapped(lambda x: x.to(backend.device))
    assert scene.run().shape == (0, 3, 24, 24)


def test_an_image_does_not_depend_on_its_batch(backend):
    """Bit by bit: alone, in another order, and once more."""
    scene = random_scene(4, 3, seed=9, size=(9, 21)).mapped(lambda x: x.to(backend.device))
    images = scene.run()
    assert torch.equal(scene.run(), images)
    for n in (0, 3):
        assert torch.equal(scene[n : n + 1].run(), images[n : n + 1])
    assert torch.equal(scene[[2, 0, 2]].run(), images[[2, 0, 2]])


def test_memory_layout_changes_nothing(backend):
    scene = random_scene(5, 3, seed=10, size=(6, 6)).mapped(lambda x: x.to(backend.device))
    images = scene.run()
    assert torch.equal(scene.mapped(lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)).run(), images)
    assert torch.equal(scene.mapped(lambda x: x.repeat_interleave(2, 0)[::2]).run(), images)
    one = scene[:1].mapped(lambda x: x.expand(4, *x.shape[1:]))
    assert torch.equal(one.run(), images[:1].expand(4, *images.shape[1:]))


@pytest.mark.parametrize("backend", parameters(CPP), indirect=True)
def test_threads_change_no_bit(backend):
    scene = random_scene(24, 4, seed=11, size=(32, 32), samples=2)
    images = scene.run()
    torch.set_num_threads(3)
    assert _native.threads(16 * images.numel()) == 3
    assert torch.equal(scene.run(), images)


# --- vmap, torch.library, torch.compile ------------------------------------------------------------------------------


@one_of_each
def test_vmap_joins_the_dimensions(backend):
    scene = random_scene(6, 3, seed=12, size=(5, 5)).mapped(lambda x: x.to(backend.device))
    images, split = scene.run(), [x.unflatten(0, (2, 3)) for x in scene.tensors().values()]
    draw = lambda *x: render_scene(*x, size=(5, 5), samples=1)  # noqa: E731
    assert torch.equal(torch.vmap(draw)(*split), images.unflatten(0, (2, 3)))
    swapped = [x.transpose(0, 1) for x in split]
    assert torch.equal(torch.vmap(draw, 1)(*swapped), images.unflatten(0, (2, 3)))
    shared = split[:4] + [x[0] for x in split[4:]]
    out = torch.vmap(draw, (0, 0, 0, 0, None, None, None))(*shared)
    assert torch.equal(out[0], images[:3])


@one_of_each
def test_the_registered_op_passes_opcheck(backend, poisoned):
    scene = random_scene(2, 3, seed=13, size=(4, 5)).mapped(lambda x: x.to(backend.device))
    torch.library.opcheck(OP.default, (*scene.tensors().values(), 4, 5, 1))


@pytest.mark.parametrize("backend", parameters(CPP[-1:]), indirect=True)
def test_compiled_without_breaks(backend):
    torch._dynamo.reset()
    scene = random_scene(6, 3, seed=14, size=(4, 5)).mapped(lambda x: x.to(backend.device))
    compiled = torch.compile(lambda *x: render_scene(*x, size=(4, 5)) * 2, fullgraph=True, backend="aot_eager")
    for some in (slice(0, 2), slice(2, 5)):
        expected = 2 * replace(scene[some], samples=2).run()
        assert torch.equal(compiled(*scene[some].tensors().values()), expected)


@one_of_each
def test_a_trace_holds_the_registered_op(backend):
    from torch.fx.experimental.proxy_tensor import make_fx

    scene = random_scene(2, 3, seed=15, size=(4, 5)).mapped(lambda x: x.to(backend.device))
    graph = make_fx(lambda *x: render_scene(*x, size=(4, 5), samples=1))(*scene.tensors().values())
    assert "vaecirc_fast.render_scene.default" in [str(node.target) for node in graph.graph.nodes]


def test_what_is_computed_from_images_has_gradients(backend):
    scene = random_scene(2, 3, seed=16, size=(4, 5)).mapped(lambda x: x.to(backend.device))
    weight = torch.ones(3, 4, 5, device=backend.device, requires_grad=True)
    (scene.run() * weight).sum().backward()
    assert torch.equal(weight.grad, scene.run().sum(0))


# --- bad input -------------------------------------------------------------------------------------------------------

GOOD = random_scene(3, 2, (BOX, CONE), seed=17, size=(4, 4))


def changed(name, at, value):
    x = getattr(GOOD, name).clone()
    x[at] = value
    return {name: x}


NAN, INF = float("nan"), float("inf")
BAD = {
    "no tensor": (dict(kind=[[1]]), "kind: expected a tensor, got list"),
    "kinds of floats": (dict(kind=GOOD.kind.float()), r"kind: expected int64 \(B, P\), got torch.float32 \(3, 2\)"),
    "kinds of one scene": (dict(kind=GOOD.kind[0]), r"kind: expected int64 \(B, P\), got torch.int64 \(2,\)"),
    "half": (dict(pose=GOOD.pose.half()), "pose: expected float32 or float64, got torch.float16"),
    "poses of other scenes": (dict(pose=GOOD.pose[:2]), r"pose: expected \(B, P, 3, 4\), here \(3, .*, got \(2, 2"),
    "square poses": (dict(pose=GOOD.pose[..., :3]), r"pose: expected \(B, P, 3, 4\), here .*, got \(3, 2, 3, 3\)"),
    "shapes": (dict(shape=GOOD.shape[:, :1]), r"shape: expected \(B, P\), here \(3, 2\), got \(3, 1\)"),
    "two channels": (dict(colour=GOOD.colour[..., :2]), r"colour: expected \(B, P, C\) with C 1 or 3, here .*3\), got"),
    "grey background": (dict(background=GOOD.background[..., :1]), r"background: expected \(B, 2, C\), here \(3, 2, 3"),
    "camera": (dict(camera=GOOD.camera[:, :3]), r"camera: expected \(B, 4, 3\), here \(3, 4, 3\), got \(3, 3, 3\)"),
    "light": (dict(light=GOOD.light[:, :3]), r"light: expected \(B, 4\), here \(3, 4\), got \(3, 3\)"),
    "mixed": (dict(light=GOOD.light.double()), "light: expected the dtype of pose, torch.float32, got torch.float64"),
    "elsewhere": (dict(camera=GOOD.camera.to("meta")), "camera: expected the device of kind, cpu, got meta"),
    "gradient": (dict(pose=GOOD.pose.clone().requires_grad_()), "pose: expected a tensor without gradient"),
    "unknown kind": (changed("kind", (1, 0), 6), "kind: expected one of 0, 1, 2, .*, 18, not so in scene 1"),
    "a prism of 2 sides": (changed("kind", (2, 1), 12), "kind: expected one of .*, not so in scene 2"),
    "a prism of 9 sides": (changed("kind", (0, 1), 19), "kind: expected one of .*, not so in scene 0"),
    "a negative kind": (changed("kind", (0, 1), -1), "kind: expected one of"),
    "nan in a pose": (changed("pose", (2, 0, 1, 3), NAN), "pose: expected finite values, not so in scene 2"),
    "inf in a pose": (changed("pose", (0, 0, 1, 3), INF), "pose: expected finite values, not so in scene 0"),
    "a growing taper": (changed("shape", (1, 1), 1.01), r"shape: expected values in \[0, 1\], of capsules \[0, inf\)"),
    "a negative shape": (changed("shape", (1, 1), -0.01), "shape: expected values in"),
    "nan as shape": (changed("shape", (1, 1), NAN), "shape: expected values in .*, not so in scene 1"),
    "a bright colour": (changed("colour", (1, 1, 0), 1.01), r"colour: expected values in \[0, 1\], not so in scene 1"),
    "nan as colour": (changed("colour", (1, 1, 0), NAN), "colour: expected values in"),
    "nan in a camera": (changed("camera", (1, 1, 0), NAN), "camera: expected finite values, not so in scene 1"),
    "a flat camera": (changed("camera", (1, 1), 0.0), "camera: expected axes right, down and forward that span space"),
    "no light": (changed("light", (1, slice(0, 3)), 0.0), "light: expected a direction other than 0"),
    "an endless light": (changed("light", (1, 0), INF), "light: expected finite values"),
    "too ambient": (changed("light", (2, 3), 1.5), r"light: expected an ambient share in \[0, 1\], not so in scene 2"),
    "a dark background": (changed("background", (0, 1, 2), -0.5), r"background: expected values in \[0, 1\]"),
    "no height": (dict(size=(0, 4)), r"size: expected \(H, W\), whole numbers of at least 1, got \(0, 4\)"),
    "one size": (dict(size=4), r"size: expected \(H, W\), .*, got 4"),
    "a size of floats": (dict(size=(4.0, 4)), r"size: expected \(H, W\), .*, got \(4.0, 4\)"),
    "no samples": (dict(samples=0), "samples: expected a whole number from 1 to 4, got 0"),
    "many samples": (dict(samples=5), "samples: expected a whole number from 1 to 4, got 5"),
    "truth as samples": (dict(samples=True), "samples: expected a whole number from 1 to 4, got True"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name):
    arguments, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        render_scene(**{**GOOD.tensors(), "size": (4, 4), **arguments})
    assert "\n" not in str(caught.value)


def test_a_capsule_of_infinite_length_is_refused():
    scene = replace(GOOD, kind=GOOD.kind * 0 + CAPSULE, shape=GOOD.shape * 0 + INF)
    with pytest.raises(InputError, match="shape: expected values in"):
        scene.run()


def test_a_backend_that_cannot_run_is_an_error():
    with vf.backend("cuda"), pytest.raises(BackendError, match="'cuda' was asked for but is not written"):
        GOOD.run()
    with vf.backend("cpp"), pytest.raises(BackendError, match="no kernel for torch.float64"):
        GOOD.to(torch.float64).run()
    assert _registry.rows["render_scene"].choose("cpu", torch.float64) == "reference"
