/* What stands around an INT8 product on the CPU: tokens rounded before it, sums scaled after it. `activations` says
   what is computed; the bits are those. Built by cpu_build.py without contraction of a * b + c and without fast math.

   bf16: whether activations are bf16 (else fp32). threads: how many to use. */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef float lanes __attribute__((vector_size(64), aligned(4), may_alias));
#define LANES 16

static float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

/* A finite fp16 that is not negative, widened: its exponent is 112 below that of fp32. */
static float from_half(uint16_t half) { return from_bits((uint32_t)half << 13) * 0x1p112f; }

/* To the nearest bf16, half to even; NaN stays NaN. */
static uint16_t to_bf16(float x) {
    uint32_t bits = to_bits(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded;
}

/* Sums and differences of lanes h apart: the lower of a pair keeps its sign, the upper is subtracted. */
#define STAGE(v, h, ...)                                                                   \
    do {                                                                                   \
        lanes other = __builtin_shufflevector(v, v, __VA_ARGS__), sign;                    \
        for (int i = 0; i < LANES; i++) sign[i] = i & h ? -1.0f : 1.0f;                    \
        v = other + v * sign;                                                              \
    } while (0)

static void rotate_block(float *x, int64_t block) {
    for (int64_t i = 0; i < block; i += LANES) {
        lanes v = *(lanes *)(x + i);
        STAGE(v, 1, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
        STAGE(v, 2, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
        STAGE(v, 4, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
        STAGE(v, 8, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
        *(lanes *)(x + i) = v;
    }
    for (int64_t h = LANES; h < block; h *= 2)
        for (int64_t i = 0; i < block; i += 2 * h)
            for (int64_t j = i; j < i + h; j += LANES) {
                lanes a = *(lanes *)(x + j), b = *(lanes *)(x + j + h);
                *(lanes *)(x + j) = a + b;
                *(lanes *)(x + j + h) = a - b;
            }
}

/* One token. Magnitudes are compared as whole numbers, among which NaN is the largest. */
static float quantize_token(float *x, int64_t k, int64_t block, float least, float factor, int8_t *q) {
    for (int64_t i = 0; block >= LANES && i < k; i += block) rotate_block(x + i, block);
    uint32_t largest = to_bits(least);
    for (int64_t i = 0; i < k; i++) {
        uint32_t bits = to_bits(x[i]) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    if (largest >= 0x7f800000) {
        memset(q, 0, k);
        return NAN;
    }
    float absmax = from_bits(largest), inverse = 127.0f / absmax;
    for (int64_t i = 0; i < k; i++) q[i] = (int8_t)(int32_t)rintf(x[i] * inverse);
    return absmax * factor;
}

/* x [m, k] -> q [m, k], scale [m]. block is 1 or 16 and more. room: fp32 [threads, k]. */
void quantize_tokens(const void *x, int bf16, int64_t m, int64_t k, int64_t block, float least, float factor,
                     float *room, int8_t *q, float *scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        float *token = room + thread * k;
        for (int64_t row = m * thread / threads; row < m * (thread + 1) / threads; row++) {
            const uint16_t *narrow = (const uint16_t *)x + row * k;
            if (bf16)
                for (int64_t i = 0; i < k; i++) token[i] = from_bits((uint32_t)narrow[i] << 16);
            else
                memcpy(token, (const float *)x + row * k, k * sizeof(float));
            scale[row] = quantize_token(token, k, block, least, factor, q + row * k);
        }
    }
}

static void store(const float *from, void *to, int bf16, int64_t start, int64_t count) {
    if (bf16)
        for (int64_t i = 0; i < count; i++) ((uint16_t *)to)[start + i] = to_bf16(from[i]);
    else
        memcpy((float *)to + start, from, count * sizeof(float));
}

#define CHUNK 256

/* sums [m, n] -> out [m, n] = token_scale * (scale * sums) + bias; without a bias it is null. */
void scale_sums(const int32_t *sums, const float *token_scale, const uint16_t *scale, const float *bias, int64_t m,
                int64_t n, void *out, int bf16, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < m; row++)
        for (int64_t start = 0; start < n; start += CHUNK) {
            int64_t count = n - start < CHUNK ? n - start : CHUNK;
            const int32_t *sum = sums + row * n + start;
            const uint16_t *by_row = scale + start;
            float token = token_scale[row], y[CHUNK];
            if (bias)
                for (int64_t i = 0; i < count; i++)
                    y[i] = fmaf(token, from_half(by_row[i]) * (float)sum[i], bias[start + i]);
            else
                for (int64_t i = 0; i < count; i++) y[i] = token * (from_half(by_row[i]) * (float)sum[i]);
            store(y, out, bf16, row * n + start, count);
        }
}

/* x / (1 + e^-x) with e^-x = 2^whole e^rest, the latter by its series: within two units in fp32's last place. */
static float silu(float x) {
    float power = -x;
    power = power > 87.0f ? 87.0f : power;
    power = power < -87.0f ? -87.0f : power;
    float whole = rintf(power * 0x1.715476p+0f);                 /* 1 / ln 2 */
    float rest = fmaf(whole, -0x1.62e430p-1f, power);            /* ln 2, in two parts */
    rest = fmaf(whole, 0x1.05c610p-29f, rest);
    float series = 1.0f / 5040;
    series = fmaf(series, rest, 1.0f / 720);
    series = fmaf(series, rest, 1.0f / 120);
    series = fmaf(series, rest, 1.0f / 24);
    series = fmaf(series, rest, 1.0f / 6);
    series = fmaf(series, rest, 0.5f);
    series = fmaf(series, rest, 1.0f);
    series = fmaf(series, rest, 1.0f);
    return x / (1.0f + series * from_bits((uint32_t)((int32_t)whole + 127) << 23));
}

/* sums [m, 2 width] of gate and up -> out [m, width] = silu(gate) * up. */
void swiglu_sums(const int32_t *sums, const float *token_scale, const uint16_t *scale, int64_t m, int64_t width,
                 void *out, int bf16, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < m; row++)
        for (int64_t start = 0; start < width; start += CHUNK) {
            int64_t count = width - start < CHUNK ? width - start : CHUNK;
            const int32_t *gate = sums + row * 2 * width + start, *up = gate + width;
            const uint16_t *by_gate = scale + start, *by_up = by_gate + width;
            float token = token_scale[row], y[CHUNK];
            for (int64_t i = 0; i < count; i++)
                y[i] = silu(token * (from_half(by_gate[i]) * (float)gate[i])) *
                       (token * (from_half(by_up[i]) * (float)up[i]));
            store(y, out, bf16, row * width + start, count);
        }
}
