// CPU kernel `render_sprites`: an image as 64 rows of 64 bits, then as its format. See render_sprites.h.
//
// Inside a row lie the columns from a left crossing to the next right one. As bits that is 2^right - 2^left, so a row
// is the sum of +-2^column over its crossings: no branch, whatever their order.
#include "render_sprites.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vaecirc {
namespace VAECIRC_ISA {
namespace {

#define INLINE static inline __attribute__((always_inline))

constexpr int SIDE = 64;
constexpr int64_t BLOCK = 256;            // images of one task, at most
constexpr int64_t STREAMED = 16 << 20;    // bytes: an output that no cache keeps is written past the caches
constexpr int64_t LARGE_PAGES = 8 << 20;  // bytes: from here on, large pages pay

typedef uint64_t u64x8 __attribute__((vector_size(64)));  // a block: 64 bytes, what one store writes

// Bytes 0 or 1 of 8 pixels, by their bits, the first pixel in the lowest one.
struct Spread {
    uint64_t of[256];
    constexpr Spread() : of() {
        for (int b = 0; b < 256; ++b)
            for (int k = 0; k < 8; ++k) of[b] |= (uint64_t)(b >> k & 1) << 8 * k;
    }
};
constexpr Spread SPREAD;

// Where the tables speak of one image.
struct Place {
    const int16_t* x;
    const int32_t* first;
};

INLINE Place place_of(const RenderSprites& args, const int64_t* v) {
    const int64_t outline = (v[1] * args.sizes[2] + v[2]) * args.sizes[3] + v[3];
    return {args.x + (outline * args.sizes[4] + v[4]) * args.vertices, args.first + outline * args.sizes[5] + v[5]};
}

// Random images find nothing of the tables in the nearest caches.
INLINE void prefetch(const RenderSprites& args, const int64_t* v) {
    const Place at = place_of(args, v);
    const char* x = (const char*)at.x;
    const char* crossing = (const char*)(args.crossings + at.first[0]);
    for (int k = 0; k < 320; k += 64) {
        __builtin_prefetch(x + k);
        __builtin_prefetch(crossing + k);
    }
}

// The rows of one image; bit c of a row is column c.
INLINE void draw(const RenderSprites& args, const int64_t* v, uint64_t rows[SIDE]) {
    const Place at = place_of(args, v);
    const int16_t* x = at.x;
    const Crossing* crossing = args.crossings + at.first[0];
    const int64_t n = at.first[1] - at.first[0];
    double above[MAX_CROSSINGS], below[MAX_CROSSINGS];
    int32_t column[MAX_CROSSINGS];
    for (int64_t k = 0; k < n; ++k) {
        const Crossing c = crossing[k];
        const int32_t height = c.rise < 0 ? -c.rise : c.rise, x0 = x[c.edge], x1 = x[c.edge + 1];
        above[k] = (x0 - 128) * height + c.along * (x1 - x0);
        below[k] = 256 * height;
    }
    // The first column whose centre is at or right of the crossing: the quotient of two whole numbers, rounded up. One
    // half is taken off the dividend, so that no rounding to double (1e-14) reaches a whole quotient (at least 4e-7).
    for (int64_t k = 0; k < n; ++k) column[k] = (int32_t)((above[k] - 0.5) / below[k] + 1);
    for (int r = 0; r < SIDE; ++r) rows[r] = 0;
    for (int64_t k = 0; k < n; ++k) {
        const uint64_t sign = (uint64_t)((int64_t)crossing[k].rise >> 63);
        rows[crossing[k].row] += (((uint64_t)1 << column[k]) ^ sign) - sign;
    }
}

template <bool STREAM>
INLINE void put(char* out, u64x8 block) {
#if defined(__AVX512F__)
    if (STREAM) return _mm512_stream_si512((__m512i*)out, (__m512i)block);
#elif defined(__x86_64__)
    if (STREAM) {
        __m128i part[4];
        __builtin_memcpy(part, &block, 64);
        for (int k = 0; k < 4; ++k) _mm_stream_si128((__m128i*)out + k, part[k]);
        return;
    }
#endif
    __builtin_memcpy(out, &block, 64);
}

template <ImageFormat FORMAT, bool STREAM>
INLINE void write(const uint64_t rows[SIDE], char* out) {
    if (FORMAT == ImageFormat::bits) {
        for (int r = 0; r < SIDE; r += 8, out += 64) {
            u64x8 block;
            for (int k = 0; k < 8; ++k) {
                // Reversed within each byte.
                uint64_t b = rows[r + k];
                b = (b >> 1 & 0x5555555555555555) | (b & 0x5555555555555555) << 1;
                b = (b >> 2 & 0x3333333333333333) | (b & 0x3333333333333333) << 2;
                b = (b >> 4 & 0x0f0f0f0f0f0f0f0f) | (b & 0x0f0f0f0f0f0f0f0f) << 4;
                block[k] = b;
            }
            put<STREAM>(out, block);
        }
    } else if (FORMAT == ImageFormat::u8) {
        for (int r = 0; r < SIDE; ++r, out += 64) {
#if defined(__AVX512BW__)
            put<STREAM>(out, (u64x8)_mm512_maskz_set1_epi8(rows[r], 1));
#else
            u64x8 block;
            for (int k = 0; k < 8; ++k) block[k] = SPREAD.of[rows[r] >> 8 * k & 255];
            put<STREAM>(out, block);
#endif
        }
    } else {
        const i32x16 bit = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
        const f32x16 zero = {}, one = zero + 1.0f;
        for (int r = 0; r < SIDE; ++r)
            for (int k = 0; k < 4; ++k, out += 64) {
                const i32x16 part = (i32x16{} + (int32_t)(rows[r] >> 16 * k & 0xffff)) & bit;
                put<STREAM>(out, (u64x8)(part != 0 ? one : zero));
            }
    }
}

constexpr int64_t bytes_of(ImageFormat format) {
    return SIDE * SIDE * (format == ImageFormat::f32 ? 4 : 1) / (format == ImageFormat::bits ? 8 : 1);
}

template <ImageFormat FORMAT, bool STREAM>
void render(const RenderSprites& args) {
    // Blocks are handed out as threads get free: their images do not depend on who draws them.
    const int64_t shared = (args.B + 4 * args.threads - 1) / (4 * args.threads);
    const int64_t block = shared < BLOCK ? shared : BLOCK, blocks = (args.B + block - 1) / block;
#pragma omp parallel num_threads(args.threads) if (args.threads > 1)
    {
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < blocks; ++t)
            for (int64_t b = t * block; b < args.B && b < (t + 1) * block; ++b) {
                if (b + 2 < args.B) prefetch(args, args.factors + 6 * (b + 2));
                uint64_t rows[SIDE];
                draw(args, args.factors + 6 * b, rows);
                write<FORMAT, STREAM>(rows, (char*)args.out + b * bytes_of(FORMAT));
            }
#if defined(__x86_64__)
        if (STREAM) _mm_sfence();
#endif
    }
}

template <ImageFormat FORMAT>
void choose(const RenderSprites& args) {
    const int64_t bytes = args.B * bytes_of(FORMAT);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (args.fresh && bytes >= LARGE_PAGES) {
        // Whole pages only; the system may say no, and nothing changes then but the time.
        const uintptr_t page = 4096, from = ((uintptr_t)args.out + page - 1) / page * page;
        madvise((void*)from, ((uintptr_t)args.out + bytes - from) / page * page, MADV_HUGEPAGE);
    }
#endif
    if (bytes >= STREAMED && (uintptr_t)args.out % 64 == 0) render<FORMAT, true>(args);
    else render<FORMAT, false>(args);
}

int64_t first_wrong(const RenderSprites& args) {
    int64_t wrong = args.B;
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.threads > 1) reduction(min : wrong)
    for (int64_t b = 0; b < args.B; ++b) {
        bool ok = true;
        for (int k = 0; k < 6; ++k) ok &= (uint64_t)args.factors[6 * b + k] < (uint64_t)args.sizes[k];
        if (!ok && b < wrong) wrong = b;
    }
    return wrong < args.B ? wrong : -1;
}

}  // namespace

int64_t render_sprites(const RenderSprites& args) {
    const int64_t wrong = first_wrong(args);
    if (wrong >= 0 || args.B == 0) return wrong;
    switch (args.format) {
        case ImageFormat::f32: choose<ImageFormat::f32>(args); break;
        case ImageFormat::u8: choose<ImageFormat::u8>(args); break;
        case ImageFormat::bits: choose<ImageFormat::bits>(args); break;
    }
    return -1;
}

}  // namespace VAECIRC_ISA
}  // namespace vaecirc
