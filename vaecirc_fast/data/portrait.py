"""The geometry of faces_like: how much of each colour of its palette a pixel shows, for every state of head, eyes and
mouth.

A portrait is drawn in pixels, x to the right and y down, from signed distances; an edge is one pixel wide. What faces
the viewer lies on an ellipsoid that turns with the yaw: a point at longitude `t` and depth `r` is at
x = 32 + r a sin(t + yaw), with `a` half the width of the face.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIDE = 64
WIDTHS = (12.4, 13.8, 15.2, 16.6)  # half the width of the face, in pixels
YAWS = tuple(math.radians(t) for t in (-27, -18, -9, 0, 9, 18, 27))
SMILES = (-0.75, -0.3, 0.15, 0.6, 1.1)  # curvature of the mouth; above .3 the teeth show
HAIR_STYLES = ("bald", "short", "curly", "fringe", "long", "bun")
EYEGLASSES = ("none", "glasses", "sunglasses")
BEARDS = ("none", "moustache", "full")
PLACES = (len(WIDTHS), len(YAWS))  # the states that all parts share
EYE_ROWS, MOUTH_ROWS = (18, 38), (38, 62)  # apart: each pixel is covered by one of the two tables at most

HEAD: tuple[str, ...] = (
    "background",
    "cloth",
    "white",
    "skin",
    "shadow",
    "left",
    "right",
    "hair",
    "hair_dark",
    "hair_left",
    "hair_right",
)
EYES: tuple[str, ...] = ("white", "dark", "iris", "shadow", "hair_dark", "lens")
MOUTH: tuple[str, ...] = ("white", "dark", "lip", "lip_dark", "shadow", "hair", "hair_dark")


def head() -> Tensor:
    """(style, width, yaw, colour of HEAD, SIDE, SIDE): background, clothes, head and hair."""
    f = Face((0, SIDE))
    drawn = []
    for style in HAIR_STYLES:
        layers = Layers(HEAD, f)
        corner = ((f.x - 32) ** 2 + (f.y - 26) ** 2) / 45**2
        layers.put(1.0, background=1 - 0.32 * corner, white=0.10 * (1 - corner).clamp(0, 1))
        _hair_behind(layers, f, style)
        _body(layers, f)
        _skin(layers, f)
        _hair_in_front(layers, f, style)
        drawn.append(layers.table())
    return torch.stack(drawn).unflatten(1, PLACES)


def eyes() -> Tensor:
    """(eyeglasses, width, yaw, 1 + colour of EYES, rows, SIDE): eyes, brows and glasses. The first plane is how much
    of what lies below shows."""
    f = Face(EYE_ROWS)
    drawn = []
    for kind in EYEGLASSES:
        layers = Layers(EYES, f)
        _eyes(layers, f)
        _glasses(layers, f, kind)
        drawn.append(layers.table(below=True))
    return torch.stack(drawn).unflatten(1, PLACES)


def mouth() -> Tensor:
    """(smile, beard, width, yaw, 1 + colour of MOUTH, rows, SIDE): beard and mouth; the first plane as in `eyes`."""
    f = Face(MOUTH_ROWS)
    drawn = []
    for smile in SMILES:
        for beard in BEARDS:
            layers = Layers(MOUTH, f)
            half_width = f.a * (0.36 + 0.05 * max(0.0, smile)) * f.turned(0)
            _cheeks(layers, f, smile, half_width)
            _beard(layers, f, beard, half_width)
            _lips(layers, f, smile, half_width)
            drawn.append(layers.table(below=True))
    return torch.stack(drawn).unflatten(0, (len(SMILES), len(BEARDS))).unflatten(2, PLACES)


class Face:
    """Coordinates of the pixels of some rows (rows, SIDE), and all widths and yaws (28, 1, 1), yaw varying fastest."""

    def __init__(self, rows: tuple[int, int]):
        states = torch.cartesian_prod(torch.tensor(WIDTHS), torch.tensor(YAWS))
        self.a, self.yaw = (s.view(-1, 1, 1) for s in states.unbind(1))
        self.x = (torch.arange(SIDE) + 0.5).expand(rows[1] - rows[0], SIDE)
        self.y = (torch.arange(*rows) + 0.5)[:, None].expand(rows[1] - rows[0], SIDE)
        self.chin = 32 + 0.30 * self.a * torch.sin(self.yaw)  # reaches further out of the axis than the skull
        skull = ellipse(self, 32 + 0.06 * self.a * torch.sin(self.yaw), 28.5, self.a, 16.5)
        jaw = ellipse(self, self.chin, 38.0, self.a * 0.80, 14.6)
        self.outline = joined(skull, jaw, 5.0)

    def at(self, longitude: float, depth: float) -> Tensor:
        return 32 + depth * self.a * torch.sin(self.yaw + math.radians(longitude))

    def turned(self, longitude: float) -> Tensor:
        """By how much a surface at this longitude is narrowed, against the face seen from the front."""
        return torch.cos(self.yaw + math.radians(longitude)) / math.cos(math.radians(longitude))


class Layers:
    """Weights of colours at every pixel; what is put on top hides what is below."""

    def __init__(self, names: tuple[str, ...], f: Face):
        shape = (len(f.a), *f.x.shape)
        self.below = torch.ones(shape)
        self.weights = {name: torch.zeros(shape) for name in names}
        self.used: set[str] = set()

    def put(self, alpha: Tensor | float, **colours: Tensor | float) -> None:
        shows = 1 - alpha
        for plane in (self.below, *(self.weights[name] for name in self.used)):
            plane.mul_(shows)
        for name, weight in colours.items():
            self.weights[name].add_(alpha * weight)
        self.used.update(colours)

    def table(self, below: bool = False) -> Tensor:
        return torch.stack([self.below] * below + list(self.weights.values()), 1)


# --- shapes: signed distances in pixels, negative inside -------------------------------------------------------------


def ellipse(f: Face, x: Tensor | float, y: Tensor | float, rx: Tensor | float, ry: Tensor | float) -> Tensor:
    """Exact at the outline and to first order near it."""
    u, v = f.x - x, f.y - y
    scaled = torch.sqrt((u / rx) ** 2 + (v / ry) ** 2).clamp(min=1e-6)
    return scaled * (scaled - 1) / torch.sqrt((u / rx**2) ** 2 + (v / ry**2) ** 2).clamp(min=1e-6)


def capsule(f: Face, x0, y0, x1, y1, radius) -> Tensor:
    """A line with round ends."""
    u, v, du, dv = f.x - x0, f.y - y0, x1 - x0, y1 - y0
    t = ((u * du + v * dv) / (du * du + dv * dv)).clamp(0, 1)
    return torch.sqrt((u - t * du) ** 2 + (v - t * dv) ** 2) - radius


def arc(f: Face, x, y, half_width, rise) -> Tensor:
    """Distance from a parabola through (x ± half_width, y) with its vertex `rise` lower; positive below it."""
    u = (f.x - x) / half_width
    slope = 2 * rise * u / half_width
    return (f.y - y - rise * (1 - u * u)) / torch.sqrt(1 + slope * slope)


def between(f: Face, upper: Tensor, lower: Tensor, x, half_width) -> Tensor:
    """Below one arc and above another of the same corners."""
    return torch.maximum(torch.maximum(-upper, lower), (f.x - x).abs() - half_width)


def joined(a: Tensor, b: Tensor, k: float) -> Tensor:
    """The union of two shapes, with the corners between them filled up to `k` pixels."""
    h = (k - (a - b).abs()).clamp(min=0) / k
    return torch.minimum(a, b) - h * h * k / 4


def covered(distance: Tensor, edge: float = 1.0) -> Tensor:
    """How much of a pixel lies inside, for an edge of `edge` pixels."""
    return (0.5 - distance / edge).clamp(0, 1)


def band(distance: Tensor, half: Tensor | float) -> Tensor:
    """A line of half width `half` along an outline."""
    return covered(distance.abs() - half)


def ramp(t: Tensor) -> Tensor:
    t = t.clamp(0, 1)
    return t * t * (3 - 2 * t)


# --- head ------------------------------------------------------------------------------------------------------------


def _body(layers: Layers, f: Face) -> None:
    neck = torch.maximum((f.x - 32).abs() - 0.58 * f.a + 0.02 * (f.y - 50), 40 - f.y)
    cloth = ellipse(f, 32.0, 73.0, 29.0, 17.5)
    neckline = ellipse(f, 32.0, 55.0, 0.58 * f.a + 2.2, 7.0)
    shade = 0.25 * ramp((cloth + 6) / 6)
    layers.put(covered(cloth), cloth=1 - shade)
    below_chin = 0.35 + 0.5 * ramp((62 - f.y) / 12)
    skin = covered(torch.minimum(torch.maximum(neck, f.y - 56), neckline))
    side = (f.x - 32) / (0.7 * f.a)
    layers.put(skin, skin=1 - below_chin, shadow=below_chin, left=0.6 * ramp(-side), right=0.6 * ramp(side))


def _skin(layers: Layers, f: Face) -> None:
    for side in (-1, 1):
        x, seen = f.at(side * 86, 1.03), torch.cos(f.yaw + math.radians(side * 86))
        width = 1.7 + 2.2 * seen.clamp(min=0)
        lobe = ellipse(f, x, 31.5, width, 4.6)
        inner = ellipse(f, x + side * 0.3, 31.3, width * 0.5, 2.6)
        layers.put(covered(lobe) * (seen > -0.25), skin=0.72, shadow=0.28)
        layers.put(covered(inner, 1.6) * 0.5 * (seen > -0.25), shadow=1.0)
    edge = 0.55 * ramp((f.outline + 5.5) / 5.5) ** 1.5
    across = (f.x - f.at(0, 0.22)) / f.a
    layers.put(
        covered(f.outline),
        skin=1 - edge,
        shadow=edge,
        left=ramp(0.1 - 1.15 * across),
        right=ramp(0.1 + 1.15 * across),
    )
    forehead = ellipse(f, f.at(0, 0.5), 18.0, 0.5 * f.a, 5.0)
    layers.put(covered(forehead, 7.0) * 0.09, white=1.0)
    _nose(layers, f)


def _nose(layers: Layers, f: Face) -> None:
    tip, turn = f.at(0, 1.16), torch.sin(f.yaw)
    for side in (-1, 1):
        flank = capsule(f, f.at(side * 9, 0.98), 27.5, f.at(side * 8, 1.13), 36.5, 0.5)
        layers.put(covered(flank, 2.6) * (0.2 + 0.5 * (-side * turn).clamp(min=0)), shadow=1.0)
        wing = ellipse(f, tip + side * 2.4, 38.3, 1.4, 1.3)
        layers.put(covered(wing, 1.8) * 0.36, shadow=1.0)
        layers.put(covered(ellipse(f, tip + side * 1.35, 39.3, 0.9, 0.55)) * 0.5, shadow=0.6)
    ridge = capsule(f, f.at(0, 1.02), 28.0, tip, 37.0, 0.4)
    layers.put(covered(ridge, 2.4) * 0.13, white=1.0)
    ball = ellipse(f, tip, 37.6, 2.3, 2.0)
    layers.put(covered(ball, 1.5) * 0.6, skin=1.0, left=0.5 * (f.x < tip), right=0.5 * (f.x > tip))
    layers.put(covered(ellipse(f, tip - 0.4, 36.9, 0.9, 0.8), 1.6) * 0.22, white=1.0)


# --- hair ------------------------------------------------------------------------------------------------------------


def _hair_behind(layers: Layers, f: Face, style: str) -> None:
    if style == "bun":
        _hair(layers, f, ellipse(f, 32 - 0.25 * f.a * torch.sin(f.yaw), 8.0, 6.6, 5.8), 99.0, 0.1)
    elif style in ("fringe", "long", "curly"):
        _hair(layers, f, {"fringe": _bob, "long": _mane, "curly": _curls}[style](f, 6.0), 99.0, 0.45)


def _hair_in_front(layers: Layers, f: Face, style: str) -> None:
    """A shape around the skull less a window for the face, which turns with it."""
    middle, back = f.at(0, 0.42), 32 - 0.08 * f.a * torch.sin(f.yaw)
    if style == "short":
        skull = ellipse(f, back, 26.0, f.a + 1.2, 16.6)
        outside = joined(skull, ellipse(f, back + 1.5, 13.0, 0.74 * f.a, 5.5), 5.0)
        window, end = ellipse(f, middle, 38.0, 0.89 * f.a, 19.2 + 0.05 * (f.x - middle)), 30.5
    elif style == "curly":
        outside = _curls(f, 4.5)
        window, end = ellipse(f, middle, 39.0, 0.88 * f.a, 18.5 + 0.5 * torch.cos(1.4 * f.x)), 38.0
    elif style == "fringe":
        u = (f.x - middle) / f.a
        fringe = 24.0 + 0.35 * torch.cos(1.9 * f.x) - 1.6 * u * u
        outside, window, end = _bob(f), torch.maximum(fringe - f.y, u.abs() * f.a - 0.84 * f.a), 99.0
    elif style == "long":
        # Parted above the nose; below the chin the strands no longer turn with the face.
        u = ((f.x - 32 - (middle - 32) * ramp((56 - f.y) / 22)) / f.a).abs()
        opening = (u - 0.9 + 0.1 * ramp((f.y - 38) / 14)) * f.a
        outside, window, end = _mane(f), torch.maximum(17.0 + 9.5 * u**1.4 - f.y, opening), 99.0
    elif style == "bun":
        outside = ellipse(f, back, 26.5, f.a + 0.9, 16.2)
        window, end = ellipse(f, middle, 39.0, 0.90 * f.a, 19.5), 30.0
    else:
        return
    _hair(layers, f, torch.maximum(outside, -window), end, 0.0)


def _hair(layers: Layers, f: Face, shape: Tensor, end: float, depth: float) -> None:
    """Down to the row `end`; strands run down from the crown, a sheen lies across them; darker with `depth`."""
    crown = torch.atan2(f.x - 32, f.y - 4)
    strands = 0.16 * torch.cos(26 * crown + 0.5 * torch.cos(f.y / 3)) + 0.10 * torch.cos(57 * crown)
    dark = (0.22 + strands + 0.45 * ramp((shape + 2.5) / 2.5) + depth).clamp(0, 1)
    radius = torch.sqrt((f.x - 31) ** 2 + (f.y - 29) ** 2)
    sheen = 0.16 * torch.exp(-(((radius - 15.5) / 1.8) ** 2)) * ramp((25 - f.y) / 7) * (1 - depth)
    across = (f.x - 32) / (f.a + 3)
    layers.put(
        covered(shape) * covered(f.y - end, 3.0),
        hair=(1 - dark) * (1 - sheen),
        hair_dark=dark * (1 - sheen),
        white=sheen,
        hair_left=ramp(-across),
        hair_right=ramp(across),
    )


def _bob(f: Face, _: float = 0.0) -> Tensor:
    sides = torch.maximum((f.x - 32).abs() - f.a - 2.8 + 0.02 * (f.y - 36) ** 2 * (f.y > 36), (f.y - 36).abs() - 11.5)
    return joined(ellipse(f, 32.0, 27.0, f.a + 2.8, 18.6), sides, 3.0)


def _mane(f: Face, _: float = 0.0) -> Tensor:
    wave = 0.6 * torch.sin(f.y / 3.1)
    sides = torch.maximum((f.x - 32 - wave).abs() - f.a - 3.2 - 0.06 * (f.y - 34), 28 - f.y)
    return joined(ellipse(f, 32.0, 26.6, f.a + 2.6, 18.4), sides, 4.0)


def _curls(f: Face, more: float) -> Tensor:
    angle = torch.atan2(f.y - 24, f.x - 32)
    return (
        ellipse(f, 32.0, 24.0, f.a + more, 15.0 + more)
        - 0.6 * torch.cos(13 * angle + 1.0)
        - 0.5 * torch.cos(19 * angle)
    )


# --- eyes ------------------------------------------------------------------------------------------------------------


def _eyes(layers: Layers, f: Face) -> None:
    face = covered(f.outline)
    for side in (-1, 1):
        x, near = f.at(side * 25, 0.94), f.turned(side * 25)
        w = f.a * 0.225 * near
        # White between two lids, the iris cut by them, and the line of the upper lid.
        upper, lower = arc(f, x, 29.7, w, -2.4), arc(f, x, 29.7, w, 1.9)
        inside = covered(between(f, upper, lower, x, w)) * face
        layers.put(covered(ellipse(f, x, 28.6, w * 1.25, 4.2), 4.0) * 0.30 * face, shadow=1.0)
        layers.put(inside, white=0.93, dark=0.04)
        pupil = x + 0.35 * torch.sin(f.yaw)
        iris = ellipse(f, pupil, 29.3, 2.15 * near.clamp(min=0.6), 2.3)
        layers.put(inside * covered(iris), iris=1.0)
        layers.put(inside * covered(iris + 1.15), dark=1.0)
        layers.put(inside * covered(ellipse(f, pupil - 0.7, 28.5, 0.55, 0.55)) * 0.9, white=1.0)
        lid = band(upper, 0.55) * covered((f.x - x).abs() - w - 0.3) * face
        layers.put(lid * 0.9, dark=1.0)
        layers.put(band(lower, 0.3) * covered((f.x - x).abs() - w + 0.5) * 0.35, shadow=1.0)
        # The brow rises to its outer third and thins out there.
        bow = arc(f, x + side * 0.4, 25.2, w * 1.35, -1.5)
        along = ((f.x - x) * side / (1.35 * w)).clamp(-1, 1)
        brow = band(bow, 0.95 - 0.35 * along) * covered((f.x - x - side * 0.4).abs() - w * 1.3) * face
        layers.put(brow * 0.92, hair_dark=1.0)


def _glasses(layers: Layers, f: Face, kind: str) -> None:
    if kind == "none":
        return
    dark = kind == "sunglasses"
    shapes = []
    for side in (-1, 1):
        x, near = f.at(side * 25, 1.0), f.turned(side * 25)
        width = f.a * 0.33 * near
        shapes.append((side, x, width, ellipse(f, x, 30.0, width + 0.7 * dark, 5.0 + 0.6 * dark)))
        arm = capsule(f, x + side * width, 28.8, f.at(side * 84, 1.02), 28.0, 0.45)
        seen = torch.cos(f.yaw + math.radians(side * 84)) > -0.3
        layers.put(covered(arm) * seen, dark=1.0)
    left, right = shapes
    bridge = arc(f, (left[1] + left[2] + right[1] - right[2]) / 2, 29.2, 2.6, -1.0)
    span = torch.maximum(left[1] + left[2] - f.x, f.x - right[1] + right[2])
    layers.put(band(bridge, 0.5) * covered(span - 0.5), dark=1.0)
    for _, x, width, lens in shapes:
        if dark:
            tint = 0.25 * ramp((f.y - 26) / 9)
            layers.put(covered(lens) * 0.96, lens=1 - tint, white=0.6 * tint)
        else:
            layers.put(covered(lens) * 0.06, white=1.0)
        gleam = capsule(f, x - 0.45 * width, 31.5, x - 0.05 * width, 26.8, 0.55)
        layers.put(covered(gleam) * covered(lens + 1) * (0.35 if dark else 0.28), white=1.0)
        layers.put(band(lens, 0.6), dark=1.0)


# --- mouth -----------------------------------------------------------------------------------------------------------


def _cheeks(layers: Layers, f: Face, smile: float, w: Tensor) -> None:
    x = f.at(0, 0.98)
    for side in (-1, 1):
        blush = ellipse(f, f.at(side * 36, 0.92), 41.5 - 0.6 * smile, 3.6 * f.turned(side * 36).clamp(min=0.3), 3.2)
        layers.put(covered(blush, 5.0) * 0.16 * covered(f.outline + 1), lip=1.0)
        fold = capsule(f, f.at(side * 17, 1.05), 40.5, x + side * (w + 1.9), 45.8 - smile, 0.3)
        layers.put(covered(fold, 1.8) * (0.12 + 0.22 * max(0.0, smile)), shadow=1.0)
    crease = arc(f, x, 50.6, 0.55 * w, 0.9)
    layers.put(band(crease, 0.5) * covered((f.x - x).abs() - 0.5 * w, 2.0) * 0.3, shadow=1.0)


def _beard(layers: Layers, f: Face, beard: str, w: Tensor) -> None:
    if beard == "none":
        return
    if beard == "full":
        u = (f.x - f.at(0, 0.35)).abs() / f.a
        top = 41.2 - 4.5 * ramp((u - 0.62) / 0.3)
        full = torch.maximum(f.outline + 0.6 - 1.4 * ramp((f.y - 40) / 8), top - f.y)
        for side in (-1, 1):
            near = f.turned(side * 36).clamp(min=0.25)
            full = torch.maximum(full, -ellipse(f, f.at(side * 37, 0.98), 38.5, 0.40 * f.a * near, 7.2))
        grain = 0.5 + 0.18 * torch.cos(2.3 * f.x + 0.7 * f.y) * torch.cos(1.1 * f.y - 0.4 * f.x)
        layers.put(covered(full, 1.6) * 0.94, hair=1 - grain, hair_dark=grain)
    x = f.at(0, 0.98)
    for side in (-1, 1):
        half = capsule(f, x + side * 1.2, 42.4, x + side * 0.95 * w, 43.8, 1.35)
        layers.put(covered(half, 1.2) * 0.96, hair=0.35, hair_dark=0.65)


def _lips(layers: Layers, f: Face, smile: float, w: Tensor) -> None:
    x, corner, rise = f.at(0, 0.98), 45.4 - 1.2 * smile, 2.7 * smile
    gap = 3.4 * max(0.0, smile - 0.3)
    upper, lower = arc(f, x, corner, w, rise - 0.2 * gap), arc(f, x, corner, w, rise + 0.8 * gap + 0.05)
    top, bottom = arc(f, x, corner, w, rise - 0.2 * gap - 1.7), arc(f, x, corner, w, rise + 0.8 * gap + 2.3)
    layers.put(covered(between(f, top, bottom, x, w)), lip=1.0)
    layers.put(covered(between(f, top, upper, x, w)) * 0.5, lip_dark=1.0)
    if gap:
        inside = covered(between(f, upper, lower, x, w - 0.3))
        layers.put(inside, dark=1.0)
        layers.put(inside * covered(lower + 0.25 * gap), white=0.94)
    line = covered(upper.abs() - 0.45) * covered((f.x - x).abs() - w - 0.2)
    layers.put(line * 0.85, lip_dark=0.5, dark=0.5)
    gloss = capsule(f, x - 0.3 * w, corner + rise + 0.8 * gap + 1.1, x + 0.2 * w, corner + rise + 0.8 * gap + 1.1, 0.3)
    layers.put(covered(gloss, 1.2) * 0.18, white=1.0)
