// CPU kernel `render_scene`: row by row, solid by solid, a vector of rays at a time. See render_scene.h.
//
// k = 1 / (distance along the ray) is what is compared: of a face it is an affine function of u and v, so planes, boxes
// and prisms take a multiplication a face and no division.
#include "render_scene.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>

#include "registers.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vaecirc {
namespace VAECIRC_ISA {
namespace {

constexpr int MAX_FACES = 10;
// What a margin is at least: the camera in a face's plane is on its inner side, and coefficients stay finite in float.
constexpr double LEAST = 1e-20;

// u u' + v v' + one, of a ray at u', v'.
struct Affine {
    double u, v, one;
};

// The same along a row: u u' + base.
struct Line {
    float u, base;
};

struct Face {
    Affine k;
    float shade;
};

// A ball as rays meet it: the camera, relative to its centre, times the direction; b and c of |o + s d|^2 = 1.
struct Ball {
    Affine cross[3], b;
    float inverse_c;
    bool outside;
};

enum class CameraIs { outside, within, mirrored };  // of a cone's endless surface

struct Solid {
    SolidKind kind;  // prisms and boxes as prism
    int64_t row, row_end, column, column_end;
    const float* colour;
    double o[3];    // the camera
    Affine d[3];    // the direction of a ray
    float lit[3];   // n lit is the cosine times the length of n in the world
    float gram[6];  // that length squared: xx, yy, zz, xy, xz, yz
    Face front[MAX_FACES], back[MAX_FACES];
    int fronts, backs;
    Affine cross[3], b;  // of a cone's surface
    float inverse_c, slope, middle;
    CameraIs camera;
    Ball ball, other;  // of an ellipsoid; of a capsule's ends, the upper and the lower one
    float half, strength;
};

struct Row {
    const float* u;  // of all rays of a row: (samples, stride)
    float *k, *value[3];
    int64_t stride, samples;
    float v, ambient;
};

INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
INLINE vf spread(float x) { return vf{} + x; }
INLINE vf positive(vf x) { return select(x > 0, x, vf{}); }
INLINE vf load(const float* x) { return *(const vfu*)x; }
INLINE void store(float* x, vf y) { *(vfu*)x = y; }

INLINE vf root(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
    return (vf)_mm_sqrt_ps((__m128)x);
#else
    for (int n = 0; n < WIDTH; ++n) x[n] = sqrtf(x[n]);
    return x;
#endif
}

INLINE bool any(vi mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__SSE2__)
    return _mm_movemask_ps((__m128)mask) != 0;
#else
    int found = 0;
    for (int n = 0; n < WIDTH; ++n) found |= mask[n];
    return found != 0;
#endif
}

// --- what a solid is to a camera, in float64 -------------------------------------------------------------------------

INLINE Affine times(double a, Affine x) { return {a * x.u, a * x.v, a * x.one}; }
INLINE Affine plus(Affine x, Affine y) { return {x.u + y.u, x.v + y.v, x.one + y.one}; }
INLINE Affine minus(Affine x, Affine y) { return {x.u - y.u, x.v - y.v, x.one - y.one}; }
INLINE double dot(const double* a, const double* b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }
INLINE Affine dot(const double* a, const Affine* d) {
    return plus(plus(times(a[0], d[0]), times(a[1], d[1])), times(a[2], d[2]));
}
INLINE Line along(const Affine& x, float v) { return {(float)x.u, (float)(x.v * v + x.one)}; }

// The largest share of the light on a face with this normal.
float shade_of(const Solid& s, const double* n, float ambient) {
    const float* g = s.gram;
    const double length = sqrt(g[0] * n[0] * n[0] + g[1] * n[1] * n[1] + g[2] * n[2] * n[2] +
                               2 * (g[3] * n[0] * n[1] + g[4] * n[0] * n[2] + g[5] * n[1] * n[2]));
    double cosine = (s.lit[0] * n[0] + s.lit[1] * n[1] + s.lit[2] * n[2]) / length;
    cosine = cosine > 0 ? cosine < 1 ? cosine : 1 : 0;
    return (float)(ambient + (1 - ambient) * cosine);
}

void add_face(Solid& s, double x, double y, double z, double margin, float ambient) {
    const double n[3] = {x, y, z}, distance = margin - dot(n, s.o);
    const bool inside = distance >= 0;
    const Affine k = times(1 / (inside && distance < LEAST ? LEAST : distance), dot(n, s.d));
    if (inside) s.back[s.backs++] = {k, 0};
    else s.front[s.fronts++] = {k, shade_of(s, n, ambient)};
}

// The ball around (0, 0, z).
void set_ball(Solid& s, Ball& ball, double z) {
    const double o[3] = {s.o[0], s.o[1], s.o[2] - z}, c = dot(o, o) - 1;
    for (int n = 0; n < 3; ++n) {
        const int p = (n + 1) % 3, q = (n + 2) % 3;
        ball.cross[n] = minus(times(o[p], s.d[q]), times(o[q], s.d[p]));
    }
    ball.b = dot(o, s.d);
    ball.outside = c > LEAST;
    ball.inverse_c = (float)(1 / c);
}

void set_cone(Solid& s, double slope, double middle) {
    const double r = middle + slope * s.o[2], x = s.o[0], y = s.o[1];
    const Affine dr = times(slope, s.d[2]);
    s.cross[0] = minus(times(x, dr), times(r, s.d[0]));
    s.cross[1] = minus(times(y, dr), times(r, s.d[1]));
    s.cross[2] = minus(times(x, s.d[1]), times(y, s.d[0]));
    s.b = minus(plus(times(x, s.d[0]), times(y, s.d[1])), times(r, dr));
    const double c = x * x + y * y - r * r;
    s.camera = c > 0 ? CameraIs::outside : r > 0 ? CameraIs::within : CameraIs::mirrored;
    s.inverse_c = (float)(1 / (c > LEAST || c < -LEAST ? c : c > 0 ? LEAST : -LEAST));
    s.slope = (float)slope;
    s.middle = (float)middle;
}

// The rectangle of pixels that the solid within |x|, |y| <= 1, |z| <= height can cover; all where that is not known.
void set_bounds(Solid& s, double height, int64_t H, int64_t W) {
    double inverse[3][3];
    const double m[3][3] = {
        {s.d[0].u, s.d[0].v, s.d[0].one}, {s.d[1].u, s.d[1].v, s.d[1].one}, {s.d[2].u, s.d[2].v, s.d[2].one}};
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) {
            const int p = (j + 1) % 3, q = (j + 2) % 3, r = (i + 1) % 3, t = (i + 2) % 3;
            inverse[i][j] = m[p][r] * m[q][t] - m[p][t] * m[q][r];
        }
    const double determinant = m[0][0] * inverse[0][0] + m[0][1] * inverse[1][0] + m[0][2] * inverse[2][0];
    double low[2] = {INFINITY, INFINITY}, high[2] = {-INFINITY, -INFINITY};
    int behind = 0;
    for (int corner = 0; corner < 8; ++corner) {
        const double q[3] = {(corner & 1 ? 1 : -1) - s.o[0], (corner & 2 ? 1 : -1) - s.o[1],
                             (corner & 4 ? height : -height) - s.o[2]};
        const double depth = dot(inverse[2], q) / determinant;
        if (!(depth > 1e-6)) {
            ++behind;
            continue;
        }
        for (int n = 0; n < 2; ++n) {
            const double at = dot(inverse[n], q) / determinant / depth;
            low[n] = at < low[n] ? at : low[n];
            high[n] = at > high[n] ? at : high[n];
        }
    }
    s.row = s.column = 0;
    s.row_end = H, s.column_end = W;
    if (behind || !(determinant > 1e-30 || determinant < -1e-30)) return;
    const int64_t sides[2] = {W, H};
    int64_t* const first[2] = {&s.column, &s.row};
    int64_t* const end[2] = {&s.column_end, &s.row_end};
    for (int n = 0; n < 2; ++n) {
        // A hundredth of a pixel more than float64 needs and float32 reaches.
        const double from = (low[n] * H + sides[n]) / 2 - 0.01, to = (high[n] * H + sides[n]) / 2 + 1.01;
        *first[n] = from > 0 ? from < sides[n] ? (int64_t)from : sides[n] : 0;
        *end[n] = to > 0 ? to < sides[n] ? (int64_t)to : sides[n] : 0;
    }
}

// Returns false for a solid that no ray can hit.
bool set_solid(Solid& s, int64_t kind, const float* pose, float shape, const float* camera, const double* light,
               float ambient, int64_t H, int64_t W) {
    const int sides = kind > (int64_t)SolidKind::prism ? (int)(kind - (int64_t)SolidKind::prism) : 0;
    s.kind = sides || kind == (int64_t)SolidKind::box ? SolidKind::prism : (SolidKind)kind;
    if (s.kind == SolidKind::absent) return false;
    double row[3][3];
    for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) row[i][j] = pose[4 * i + j];
        double to[4];
        for (int n = 0; n < 4; ++n)
            to[n] = row[i][0] * camera[3 * n] + row[i][1] * camera[3 * n + 1] + row[i][2] * camera[3 * n + 2];
        s.d[i] = {to[0], to[1], to[2]};
        s.o[i] = to[3] + pose[4 * i + 3];
        s.lit[i] = (float)dot(row[i], light);
    }
    const int pairs[6][2] = {{0, 0}, {1, 1}, {2, 2}, {0, 1}, {0, 2}, {1, 2}};
    for (int n = 0; n < 6; ++n) s.gram[n] = (float)dot(row[pairs[n][0]], row[pairs[n][1]]);
    s.fronts = s.backs = 0;
    s.strength = s.half = shape;
    const double slope = ((double)shape - 1) / 2, middle = ((double)shape + 1) / 2;
    if (s.kind == SolidKind::plane) {
        add_face(s, 0, 0, 1, 0, ambient);
        s.row = s.column = 0;
        s.row_end = H, s.column_end = W;
        return s.fronts > 0;
    }
    if (s.kind == SolidKind::ellipsoid) {
        set_ball(s, s.ball, 0);
    } else if (s.kind == SolidKind::capsule) {
        set_ball(s, s.ball, shape);
        set_ball(s, s.other, -(double)shape);
        set_cone(s, 0, 1);
        if (s.camera != CameraIs::outside && fabs(s.o[2]) <= shape) return false;
    } else {
        add_face(s, 0, 0, 1, 1, ambient);
        add_face(s, 0, 0, -1, 1, ambient);
    }
    if (s.kind == SolidKind::cone) set_cone(s, slope, middle);
    if (kind == (int64_t)SolidKind::box)
        for (int side = 0; side < 4; ++side) {
            const double sign = side % 2 ? -1 : 1;
            add_face(s, side < 2 ? sign : 0, side < 2 ? 0 : sign, 0, 1, ambient);
        }
    for (int side = 0; side < sides; ++side) {
        const double angle = (2 * side + 1) * M_PI / sides, inner = cos(M_PI / sides);
        add_face(s, cos(angle), sin(angle), -inner * slope, inner * middle, ambient);
    }
    if (s.kind == SolidKind::prism && s.fronts == 0) return false;
    set_bounds(s, s.kind == SolidKind::capsule ? 1 + (double)shape : 1, H, W);
    return s.row < s.row_end && s.column < s.column_end;
}

// --- rays ------------------------------------------------------------------------------------------------------------

INLINE vf at(const Line& x, vf u) { return x.u * u + x.base; }

// Nearer rays of `hit` take the solid's colour in this shade.
template <int C>
INLINE void paint(const Row& row, int64_t at, vi hit, vf k, vf shade, const float* colour) {
    store(row.k + at, select(hit, k, load(row.k + at)));
    for (int c = 0; c < C; ++c) store(row.value[c] + at, select(hit, colour[c] * shade, load(row.value[c] + at)));
}

INLINE vf lambert(const Solid& s, const Row& row, vf x, vf y, vf z) {
    const float* g = s.gram;
    const vf squared = x * (g[0] * x + 2 * (g[3] * y + g[4] * z)) + y * (g[1] * y + 2 * (g[5] * z)) + z * (g[2] * z);
    const vf cosine = positive(s.lit[0] * x + s.lit[1] * y + s.lit[2] * z) / root(squared);
    return row.ambient + (1 - row.ambient) * select(cosine < 1, cosine, spread(1));
}

template <int C>
INLINE void cast_plane(const Solid& s, const Row& row, int64_t n) {
    const Face& face = s.front[0];
    const Line line = along(face.k, row.v), x = along(s.d[0], row.v), y = along(s.d[1], row.v);
    const float ox = (float)s.o[0], oy = (float)s.o[1];
    for (int64_t j = 0; j < n; j += WIDTH) {
        const vf u = load(row.u + j), k = at(line, u);
        const vi hit = k > load(row.k + j);
        if (!any(hit)) continue;
        vf shade = spread(face.shade);
        if (s.strength > 0) {
            const vf t = 1 / k, px = ox + at(x, u) * t, py = oy + at(y, u) * t, spot = positive(1 - px * px - py * py);
            shade *= 1 - s.strength * spot * spot;
        }
        paint<C>(row, j, hit, k, shade, s.colour);
    }
}

template <int C>
INLINE void cast_faces(const Solid& s, const Row& row, int64_t first, int64_t end) {
    Line front[MAX_FACES], back[MAX_FACES];
    for (int f = 0; f < s.fronts; ++f) front[f] = along(s.front[f].k, row.v);
    for (int f = 0; f < s.backs; ++f) back[f] = along(s.back[f].k, row.v);
    for (int64_t j = first; j < end; j += WIDTH) {
        const vf u = load(row.u + j);
        vf k = at(front[0], u), shade = spread(s.front[0].shade);
        for (int f = 1; f < s.fronts; ++f) {
            const vf other = at(front[f], u);
            const vi later = other < k;
            k = select(later, other, k);
            shade = select(later, spread(s.front[f].shade), shade);
        }
        vf leaves = vf{};
        for (int f = 0; f < s.backs; ++f) {
            const vf other = at(back[f], u);
            leaves = select(other > leaves, other, leaves);
        }
        const vi hit = (k > load(row.k + j)) & (k >= leaves);
        if (any(hit)) paint<C>(row, j, hit, k, shade, s.colour);
    }
}

struct BallLine {
    Line cross[3], b;
    float inverse_c;
};

INLINE BallLine along(const Ball& ball, float v) {
    return {
        {along(ball.cross[0], v), along(ball.cross[1], v), along(ball.cross[2], v)}, along(ball.b, v), ball.inverse_c};
}

// k of the entry into a ball, 0 where it is missed; `squared` is |d|^2.
INLINE vf enter(const BallLine& ball, vf u, vf squared) {
    const vf x = at(ball.cross[0], u), y = at(ball.cross[1], u), z = at(ball.cross[2], u), b = at(ball.b, u);
    const vf discriminant = squared - (x * x + y * y + z * z);
    return select((discriminant >= 0) & (b < 0), (root(positive(discriminant)) - b) * ball.inverse_c, vf{});
}

template <int C>
INLINE void cast_ellipsoid(const Solid& s, const Row& row, int64_t first, int64_t end) {
    const Line d[3] = {along(s.d[0], row.v), along(s.d[1], row.v), along(s.d[2], row.v)};
    const BallLine ball = along(s.ball, row.v);
    const float o[3] = {(float)s.o[0], (float)s.o[1], (float)s.o[2]};
    for (int64_t j = first; j < end; j += WIDTH) {
        const vf u = load(row.u + j), x = at(d[0], u), y = at(d[1], u), z = at(d[2], u);
        const vf k = enter(ball, u, x * x + y * y + z * z);
        const vi hit = k > load(row.k + j);
        if (!any(hit)) continue;
        const vf t = 1 / k;
        paint<C>(row, j, hit, k, lambert(s, row, o[0] + x * t, o[1] + y * t, o[2] + z * t), s.colour);
    }
}

template <int C>
INLINE void cast_cone(const Solid& s, const Row& row, int64_t first, int64_t end) {
    const Line d[3] = {along(s.d[0], row.v), along(s.d[1], row.v), along(s.d[2], row.v)}, b_line = along(s.b, row.v);
    const Line cross[3] = {along(s.cross[0], row.v), along(s.cross[1], row.v), along(s.cross[2], row.v)};
    Line front = {}, back[2];
    if (s.fronts) front = along(s.front[0].k, row.v);
    for (int f = 0; f < s.backs; ++f) back[f] = along(s.back[f].k, row.v);
    const float o[3] = {(float)s.o[0], (float)s.o[1], (float)s.o[2]};
    const vf never = spread(INFINITY), flat = spread(s.fronts ? s.front[0].shade : 0);
    for (int64_t j = first; j < end; j += WIDTH) {
        const vf u = load(row.u + j), cap = s.fronts ? at(front, u) : never;
        const vf c0 = at(cross[0], u), c1 = at(cross[1], u), c2 = at(cross[2], u), b = at(b_line, u);
        const vf discriminant = c0 * c0 + c1 * c1 - c2 * c2;
        const vi missed = discriminant < 0, ahead = b > 0;
        if (s.camera != CameraIs::within && !any(~missed)) continue;
        const vf x = at(d[0], u), y = at(d[1], u), z = at(d[2], u), dr = s.slope * z;
        const vf a = x * x + y * y - dr * dr, r = root(positive(discriminant));
        // Roots of c k^2 + 2 b k + a, neither by a difference.
        const vf q = -(b + select(ahead, r, -r)), of_c = q * s.inverse_c, of_a = select(q == 0, vf{}, a / q);
        const vf side = s.camera == CameraIs::within ? never : select(missed, vf{}, select(ahead, of_a, of_c));
        vf leaves = s.camera == CameraIs::mirrored ? vf{} : select(missed, vf{}, select(ahead, of_c, of_a));
        leaves = positive(leaves);
        for (int f = 0; f < s.backs; ++f) {
            const vf other = at(back[f], u);
            leaves = select(other > leaves, other, leaves);
        }
        const vi on_side = side < cap;
        const vf k = select(on_side, side, cap);
        const vi hit = (k > load(row.k + j)) & (k >= leaves) & (k < never);
        if (!any(hit)) continue;
        vf shade = flat;
        if (any(hit & on_side)) {
            const vf t = 1 / k, px = o[0] + x * t, py = o[1] + y * t, pz = o[2] + z * t;
            shade = select(on_side, lambert(s, row, px, py, -s.slope * (s.middle + s.slope * pz)), shade);
        }
        paint<C>(row, j, hit, k, shade, s.colour);
    }
}

template <int C>
INLINE void cast_capsule(const Solid& s, const Row& row, int64_t first, int64_t end) {
    const Line d[3] = {along(s.d[0], row.v), along(s.d[1], row.v), along(s.d[2], row.v)}, b_line = along(s.b, row.v);
    const Line cross = along(s.cross[2], row.v);
    const BallLine upper = along(s.ball, row.v), lower = along(s.other, row.v);
    const float o[3] = {(float)s.o[0], (float)s.o[1], (float)s.o[2]};
    const bool outside = s.camera == CameraIs::outside;
    for (int64_t j = first; j < end; j += WIDTH) {
        const vf u = load(row.u + j), x = at(d[0], u), y = at(d[1], u), z = at(d[2], u), w = at(cross, u);
        const vf b = at(b_line, u), a = x * x + y * y, discriminant = a - w * w;
        vf k = select((discriminant >= 0) & (b < 0), (root(positive(discriminant)) - b) * s.inverse_c, vf{});
        vf reached = spread(o[2]);
        vi on_side = {};
        if (outside) {
            if (!any(k > 0)) continue;
            reached = o[2] + z / k;
            on_side = (k > 0) & (reached <= s.half) & (reached >= -s.half);
        }
        const vi up = reached > 0;
        const vf squared = a + z * z;
        // A ball that the camera is inside of is not seen.
        const vf above = s.ball.outside ? enter(upper, u, squared) : vf{};
        const vf below = s.other.outside ? enter(lower, u, squared) : vf{};
        vf ends = select(up, above, below);
        if (outside) ends = select(k > 0, ends, vf{});
        k = select(on_side, k, ends);
        const vi hit = k > load(row.k + j);
        if (!any(hit)) continue;
        const vf t = 1 / k, pz = o[2] + z * t, centre = select(up, spread(s.half), spread(-s.half));
        const vf nz = pz - select(on_side, pz, centre);
        paint<C>(row, j, hit, k, lambert(s, row, o[0] + x * t, o[1] + y * t, nz), s.colour);
    }
}

template <int C>
INLINE void cast(const Solid& s, const Row& row) {
    // A plane covers all: the rays of all samples lie side by side.
    if (s.kind == SolidKind::plane) return cast_plane<C>(s, row, row.samples * row.stride);
    for (int64_t n = 0; n < row.samples; ++n) {
        const int64_t first = n * row.stride + s.column, end = n * row.stride + s.column_end;
        if (s.kind == SolidKind::prism) cast_faces<C>(s, row, first, end);
        else if (s.kind == SolidKind::ellipsoid) cast_ellipsoid<C>(s, row, first, end);
        else if (s.kind == SolidKind::cone) cast_cone<C>(s, row, first, end);
        else cast_capsule<C>(s, row, first, end);
    }
}

// --- images ----------------------------------------------------------------------------------------------------------

// What a thread needs: solids; u, k, values of the rays of a row; sums of a row of pixels.
struct Scratch {
    Solid* solids;
    float *u, *k, *value[3], *sum[3];
};

int64_t stride_of(const RenderScene& args) { return (args.W + 2 * WIDTH - 1) / WIDTH * WIDTH; }

int64_t bytes_of(const RenderScene& args) {
    const int64_t rows = (5 * args.samples + 3) * stride_of(args) * (int64_t)sizeof(float);
    return (rows + args.P * (int64_t)sizeof(Solid) + 63) / 64 * 64;
}

Scratch scratch_at(const RenderScene& args, char* memory) {
    const int64_t stride = stride_of(args), rays = args.samples * stride;
    float* next = (float*)memory;
    Scratch scratch;
    scratch.u = next, next += rays;
    scratch.k = next, next += rays;
    for (int c = 0; c < 3; ++c) scratch.value[c] = next, next += rays;
    for (int c = 0; c < 3; ++c) scratch.sum[c] = next, next += stride;
    scratch.solids = (Solid*)next;
    for (int64_t n = 0; n < args.samples; ++n)
        for (int64_t j = 0; j < stride; ++j)
            scratch.u[n * stride + j] = (float)((2 * (j + (n + 0.5) / args.samples) - args.W) / args.H);
    return scratch;
}

template <int C>
void render(const RenderScene& args, int64_t b, const Scratch& scratch) {
    const float *camera = args.camera + 12 * b, *light = args.light + 4 * b, *sky = args.background + 2 * C * b;
    const double given[3] = {light[0], light[1], light[2]}, length = sqrt(dot(given, given));
    const double direction[3] = {given[0] / length, given[1] / length, given[2] / length};
    int64_t n_solids = 0;
    for (int64_t p = b * args.P; p < (b + 1) * args.P; ++p) {
        Solid& s = scratch.solids[n_solids];
        s.colour = args.colour + C * p;
        n_solids +=
            set_solid(s, args.kind[p], args.pose + 12 * p, args.shape[p], camera, direction, light[3], args.H, args.W);
    }
    const int64_t stride = stride_of(args), rays = args.samples * stride;
    const float share = 1 / (float)(args.samples * args.samples);
    Row row = {scratch.u, scratch.k, {scratch.value[0], scratch.value[1], scratch.value[2]}, stride, args.samples,
               0,         light[3]};
    for (int64_t i = 0; i < args.H; ++i) {
        for (int c = 0; c < C; ++c)
            for (int64_t j = 0; j < stride; ++j) scratch.sum[c][j] = 0;
        for (int64_t m = 0; m < args.samples; ++m) {
            row.v = (float)((2 * (i + (m + 0.5) / args.samples) - args.H) / args.H);
            for (int64_t j = 0; j < rays; j += WIDTH) {
                store(row.k + j, vf{});
                for (int c = 0; c < C; ++c)
                    store(row.value[c] + j, spread(sky[c] + (sky[C + c] - sky[c]) * ((row.v + 1) / 2)));
            }
            for (int64_t n = 0; n < n_solids; ++n) {
                const Solid& s = scratch.solids[n];
                if (i >= s.row && i < s.row_end) cast<C>(s, row);
            }
            for (int c = 0; c < C; ++c)
                for (int64_t n = 0; n < args.samples; ++n)
                    for (int64_t j = 0; j < stride; j += WIDTH)
                        store(scratch.sum[c] + j, load(scratch.sum[c] + j) + load(row.value[c] + n * stride + j));
        }
        for (int c = 0; c < C; ++c) {
            float* out = args.out + ((b * C + c) * args.H + i) * args.W;
            for (int64_t j = 0; j < args.W; ++j) {
                const float mean = scratch.sum[c][j] * share;
                out[j] = mean < 1 ? mean : 1;
            }
        }
    }
}

}  // namespace

bool render_scene(const RenderScene& args) {
    if (args.B == 0) return true;
    const int threads = args.threads < args.B ? args.threads : (int)args.B;
    const int64_t bytes = bytes_of(args);
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, threads * bytes)) return false;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Scratch scratch = scratch_at(args, (char*)memory + omp_get_thread_num() * bytes);
        // Scenes differ in cost; an image does not depend on who draws it.
#pragma omp for schedule(dynamic)
        for (int64_t b = 0; b < args.B; ++b) args.C == 1 ? render<1>(args, b, scratch) : render<3>(args, b, scratch);
    }
    free(memory);
    return true;
}

}  // namespace VAECIRC_ISA
}  // namespace vaecirc
