/* Decoding step of a GPT model for a few rows on a CPU, or the tokens of a prompt, as gpt_lightning/model/cpu_decode.py
   calls it.

With one row, a product of a matrix and a vector does two operations per weight that it reads, so a step takes at least
the time to read all weights once. Torch needs longer: its products are made for many rows, and each of the two
hundred operators of a step starts and stops the threads. Here the threads start once a step. Each one computes its own
rows of every matrix and waits for the others where it needs their results.

All sums are float32. One thread computes each result, in a fixed order, so the number of threads does not change it.

Shapes: R rows, C emb_dim, H heads, D = C / H, V vocabulary size; a weight is (N, K). The compiler may be GCC or Clang. */

#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define GROUP 64 /* neighbouring numbers with a scale of their own */
#define AHEAD 4096 /* bytes: weights of fewer than 32 bits are fetched so far ahead; the CPU itself fetches them too late */

/* vectors that the CPU has: a compiler splits larger ones badly */
#ifdef __AVX512VNNI__
#define LANES 16
#else
#define LANES 8
#endif
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef float float8 __attribute__((vector_size(32)));
typedef float float4 __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef int16_t shorts __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(4 * LANES)));
#define PARTS (GROUP / (4 * LANES)) /* vectors of bytes in a group */
/* where they lie in memory, at any address */
typedef floats stored_floats __attribute__((aligned(4), may_alias));
typedef uint16_t stored_bfloat16s __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef bytes stored_bytes __attribute__((aligned(1), may_alias));
typedef uint8_t stored_codes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef int8_t stored_numbers __attribute__((vector_size(LANES), aligned(1), may_alias));

enum number_type { FLOAT32, BFLOAT16, INT8, INT4 };

/* Linear layer: weight (N, K) and bias (N,), or no bias.
   INT8: codes (N, K) from 1 to 255; weight = (code - 128) * scale, with scales (N,).
   INT4: codes from 0 to 15, those of a group in the low and those of the next one in the high half of 64 bytes;
   weight = (code - 8) * slope + offset, where lines (N, 2, K / GROUP) are the slopes and then the offsets, in bfloat16.
   K is filled up to an even number of whole groups in both. */
typedef struct {
    const void *weight;
    const float *scales;
    const uint16_t *lines;
    const float *bias;
    int32_t type, rows, columns;
} linear;

/* LayerNorm; without weight and bias it only normalizes. */
typedef struct {
    const float *weight, *bias;
    float eps;
} norm;

/* keys and values: (B, H, max_length, D), in the type of the embeddings */
typedef struct {
    norm norm1, norm2;
    linear qkv, out_proj, up, down;
    void *keys, *values;
} block;

typedef struct {
    const void *tok_emb, *pos_emb;
    int32_t type, n_layers, emb_dim, n_heads, max_length;
    const block *blocks;
    norm final_norm;
    linear head;
} model;

/* A row: its token, which position the token has in its text, and where its key and value are stored in the cache. It
   attends to the columns from ``first`` to its own. */
typedef struct {
    int64_t token;
    int32_t position, cache_row, column, first;
} row;

/* A vector that a matrix is multiplied with. For INT8 and INT4 also in 8 bits: x = numbers * scales, for each group. */
typedef struct {
    const float *x;
    int8_t *numbers;
    float *scales;
    float *sums; /* of each group, of what the 8 bits stand for */
    float sum;
} input;

static inline float from_bfloat16(uint16_t bits) {
    union { uint32_t bits; float number; } x = {(uint32_t)bits << 16};
    return x.number;
}

static inline uint16_t to_bfloat16(float number) {
    union { float number; uint32_t bits; } x = {number};
    if (number != number) return 0x7fc0; /* NaN */
    return (uint16_t)((x.bits + 0x7fff + ((x.bits >> 16) & 1)) >> 16); /* ties to even */
}

/* exp(x) to 2e-7, in a form that the compiler vectorizes; the polynomial is expf's of Cephes. */
static inline float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f); /* x = n * ln 2 + r */
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    union { int32_t bits; float number; } power = {((int32_t)n + 127) << 23};
    return (p * r * r + r + 1.0f) * power.number;
}

static inline float gelu(float x) { /* tanh approximation; (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)) */
    return x / (1.0f + fast_exp(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
}

static inline float sum_of(floats v) {
#if LANES == 16
    float8 sums = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                  __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    float8 sums = v;
#endif
    float4 four = __builtin_shufflevector(sums, sums, 0, 1, 2, 3) + __builtin_shufflevector(sums, sums, 4, 5, 6, 7);
    return (four[0] + four[1]) + (four[2] + four[3]);
}

#ifndef __AVX2__
/* Products of codes, less ``zero``, and numbers (-127 to 127), in LANES sums. */
static inline ints any_product(bytes codes, const int8_t *numbers, int16_t zero) {
    ints sums = {0};
    for (int i = 0; i < 4 * LANES; i += LANES) { /* a product fits into 16 bits */
        shorts weights = __builtin_convertvector(*(const stored_codes *)((uint8_t *)&codes + i), shorts) - zero;
        shorts products = weights * __builtin_convertvector(*(const stored_numbers *)(numbers + i), shorts);
        sums += __builtin_convertvector(products, ints);
    }
    return sums;
}
#endif

/* Products of a group's codes of INT4 (0 to 15) and 64 numbers (-127 to 127), in LANES sums. */
static inline ints int4_product(const bytes *codes, const int8_t *numbers) {
#ifdef __AVX512VNNI__
    return (ints)_mm512_dpbusd_epi32(_mm512_setzero_si512(), (__m512i)*codes, _mm512_loadu_si512(numbers));
#elif defined(__AVX2__)
    const __m256i *number = (const __m256i *)numbers;
    /* four products fit into 16 bits: 4 * 15 * 127 */
    __m256i sums = _mm256_add_epi16(
        _mm256_maddubs_epi16((__m256i)codes[0], _mm256_loadu_si256(number)),
        _mm256_maddubs_epi16((__m256i)codes[1], _mm256_loadu_si256(number + 1)));
    return (ints)_mm256_madd_epi16(sums, _mm256_set1_epi16(1));
#else
    return any_product(codes[0], numbers, 0) + any_product(codes[1], numbers + 4 * LANES, 0);
#endif
}

/* Products of a group's codes of INT8 (1 to 255), less INT8_ZERO, and 64 numbers (-127 to 127), in LANES sums. */
#ifdef __AVX512VNNI__
#define INT8_ZERO 0 /* its instruction takes codes without a sign */
#else
#define INT8_ZERO 128
#endif
static inline ints int8_product(const bytes *codes, const int8_t *numbers) {
#ifdef __AVX512VNNI__
    return (ints)_mm512_dpbusd_epi32(_mm512_setzero_si512(), (__m512i)*codes, _mm512_loadu_si512(numbers));
#elif defined(__AVX2__)
    __m256i sums = _mm256_setzero_si256();
    for (int i = 0; i < PARTS; i++) {
        __m256i a = _mm256_xor_si256((__m256i)codes[i], _mm256_set1_epi8(-128)); /* code - 128 */
        __m256i b = _mm256_loadu_si256((const __m256i *)numbers + i);
        /* the first factor of this instruction has no sign; two products fit into 16 bits: 2 * 127 * 127 */
        __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
    }
    return (ints)sums;
#else
    return any_product(codes[0], numbers, INT8_ZERO) + any_product(codes[1], numbers + 4 * LANES, INT8_ZERO);
#endif
}

/* A group of 64 bytes. */
static inline void load_group(const uint8_t *at, bytes *group) {
    for (int i = 0; i < PARTS; i++) group[i] = *(const stored_bytes *)(at + i * 4 * LANES);
}

static inline int groups_of(int columns) { /* an even number */
    return (columns + 2 * GROUP - 1) / (2 * GROUP) * 2;
}

/* Round each group of the vector to 8 bits. Where it has NaN or infinity, its scale is NaN, and so are the results. */
static void quantize(input *in, int columns) {
    int groups = groups_of(columns);
    in->sum = 0;
    for (int g = 0; g < groups; g++) {
        const float *x = in->x + g * GROUP;
        int count = columns - g * GROUP < GROUP ? columns - g * GROUP : GROUP;
        float max = 0, nan = 0;
        int32_t sum = 0;
        int8_t *numbers = in->numbers + g * GROUP;
        #pragma omp simd reduction(max : max) reduction(+ : nan)
        for (int k = 0; k < count; k++) {
            max = fabsf(x[k]) > max ? fabsf(x[k]) : max;
            nan += x[k] * 0;
        }
        float inverse = max > 0 ? 127 / max : 0;
        #pragma omp simd reduction(+ : sum)
        for (int k = 0; k < count; k++) {
            float rounded = rintf(x[k] * inverse);
            numbers[k] = nan == 0 ? (int8_t)rounded : 0;
            sum += numbers[k];
        }
        for (int k = count < 0 ? 0 : count; k < GROUP; k++) numbers[k] = 0;
        in->scales[g] = max / 127 + nan;
        in->sums[g] = in->scales[g] * sum;
        in->sum += in->sums[g];
    }
}

/* The products of N <= 2 of a weight's rows, from ``n`` on, with R <= MAX_TILE vectors: y (N, MAX_TILE), without the
   bias. N and R are constants where it is inlined, so that the sums stay in registers. Of one row the sums are computed in
   two halves, so that an addition need not wait for the one before. */
#define MAX_TILE 4
#define TILE static inline __attribute__((always_inline)) void

TILE tile_float32(const linear *layer, const input *in, int64_t n, const int N, const int R, float *y) {
    int K = layer->columns, k = 0;
    const int step = N == 1 ? 2 * LANES : LANES, next = N == 1 ? LANES : K; /* from one sum's weights to the other's */
    const float *weight = (const float *)layer->weight + n * K;
    floats sums[2][MAX_TILE] = {0};
    for (; k + step <= K; k += step)
        for (int i = 0; i < 2; i++) {
            floats numbers = *(const stored_floats *)(weight + k + i * next);
            for (int r = 0; r < R; r++)
                sums[i][r] += numbers * *(const stored_floats *)(in[r].x + k + (N == 1 ? i * LANES : 0));
        }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < N; i++) {
            float *place = y + i * MAX_TILE + r;
            *place = sum_of(N == 1 ? sums[0][r] + sums[1][r] : sums[i][r]);
            for (int j = k; j < K; j++) *place += weight[i * K + j] * in[r].x[j];
        }
}

static inline floats load_bfloat16s(const uint16_t *at) {
    return (floats)(__builtin_convertvector(*(const stored_bfloat16s *)at, words) << 16);
}

TILE tile_bfloat16(const linear *layer, const input *in, int64_t n, const int N, const int R, float *y) {
    int K = layer->columns, k = 0;
    const int step = N == 1 ? 2 * LANES : LANES, next = N == 1 ? LANES : K;
    const uint16_t *weight = (const uint16_t *)layer->weight + n * K;
    floats sums[2][MAX_TILE] = {0};
    for (; k + step <= K; k += step)
        for (int i = 0; i < 2; i++) {
            floats numbers = load_bfloat16s(weight + k + i * next);
            if (N == 1) __builtin_prefetch(weight + k + i * next + AHEAD / 2);
            for (int r = 0; r < R; r++)
                sums[i][r] += numbers * *(const stored_floats *)(in[r].x + k + (N == 1 ? i * LANES : 0));
        }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < N; i++) {
            float *place = y + i * MAX_TILE + r;
            *place = sum_of(N == 1 ? sums[0][r] + sums[1][r] : sums[i][r]);
            for (int j = k; j < K; j++) *place += from_bfloat16(weight[i * K + j]) * in[r].x[j];
        }
}

TILE tile_int8(const linear *layer, const input *in, int64_t n, const int N, const int R, float *y) {
    int groups = groups_of(layer->columns);
    const uint8_t *codes = (const uint8_t *)layer->weight + n * groups * GROUP;
    floats sums[2][MAX_TILE] = {0};
    for (int g = 0; g < groups; g++)
        for (int i = 0; i < N; i++) {
            bytes group[PARTS];
            load_group(codes + ((int64_t)i * groups + g) * GROUP, group);
            if (N == 1) __builtin_prefetch(codes + g * GROUP + AHEAD);
            for (int r = 0; r < R; r++) {
                ints products = int8_product(group, in[r].numbers + g * GROUP);
                sums[i][r] += __builtin_convertvector(products, floats) * in[r].scales[g];
            }
        }
    for (int i = 0; i < N; i++)
        for (int r = 0; r < R; r++)
            y[i * MAX_TILE + r] = (sum_of(sums[i][r]) - (128 - INT8_ZERO) * in[r].sum) * layer->scales[n + i];
}

TILE tile_int4(const linear *layer, const input *in, int64_t n, const int R, float *y) {
    int groups = groups_of(layer->columns);
    const uint8_t *codes = (const uint8_t *)layer->weight + n * groups * (GROUP / 2);
    const uint16_t *slopes = layer->lines + n * groups * 2, *offsets = slopes + groups;
    floats sums[MAX_TILE] = {0};
    float of_offsets[MAX_TILE] = {0};
    for (int g = 0; g < groups; g += 2) {
        bytes both[PARTS], low[PARTS], high[PARTS];
        load_group(codes + g * (GROUP / 2), both);
        __builtin_prefetch(codes + g * (GROUP / 2) + AHEAD);
        for (int i = 0; i < PARTS; i++) low[i] = both[i] & 15, high[i] = both[i] >> 4;
        float low_slope = from_bfloat16(slopes[g]), high_slope = from_bfloat16(slopes[g + 1]);
        float low_offset = from_bfloat16(offsets[g]) - 8 * low_slope; /* for codes that begin at 0 */
        float high_offset = from_bfloat16(offsets[g + 1]) - 8 * high_slope;
        for (int r = 0; r < R; r++) {
            ints of_low = int4_product(low, in[r].numbers + g * GROUP);
            ints of_high = int4_product(high, in[r].numbers + (g + 1) * GROUP);
            sums[r] += __builtin_convertvector(of_low, floats) * (in[r].scales[g] * low_slope);
            sums[r] += __builtin_convertvector(of_high, floats) * (in[r].scales[g + 1] * high_slope);
            of_offsets[r] += in[r].sums[g] * low_offset + in[r].sums[g + 1] * high_offset;
        }
    }
    for (int r = 0; r < R; r++) y[r] = sum_of(sums[r]) + of_offsets[r];
}

TILE tile(const linear *layer, const input *in, int64_t n, const int N, const int R, float *y) {
    switch (layer->type) {
        case INT8: tile_int8(layer, in, n, N, R, y); break;
        case INT4: /* two rows would need more registers than there are */
            for (int i = 0; i < N; i++) tile_int4(layer, in, n + i, R, y + i * MAX_TILE);
            break;
        case BFLOAT16: tile_bfloat16(layer, in, n, N, R, y); break;
        default: tile_float32(layer, in, n, N, R, y);
    }
}

#define NOT_INLINED static __attribute__((noinline)) void /* or the compiler makes many copies */

NOT_INLINED tile_of_one(const linear *layer, const input *in, int64_t n, int R, float *y) {
    switch (R) {
        case 1: tile(layer, in, n, 1, 1, y); break;
        case 2: tile(layer, in, n, 1, 2, y); break;
        case 3: tile(layer, in, n, 1, 3, y); break;
        default: tile(layer, in, n, 1, MAX_TILE, y);
    }
}

NOT_INLINED tile_of_two(const linear *layer, const input *in, int64_t n, float *y) {
    tile(layer, in, n, 2, MAX_TILE, y);
}

enum result { SET, GELU, ADD };

/* The numbers from ``first`` to ``end`` of the layer's results for all vectors, into out (R, N); ADD adds them to it. */
static void multiply(
    const linear *layer, const input *in, int R, int64_t first, int64_t end, enum result result, float *out
) {
    for (int64_t n = first, N; n < end; n += N) {
        N = R > MAX_TILE && end - n >= 2 ? 2 : 1; /* one for a few vectors: memory is read faster in one stream */
        for (int r = 0; r < R; r += MAX_TILE) {
            int count = R - r < MAX_TILE ? R - r : MAX_TILE;
            float y[2 * MAX_TILE];
            if (N == 2 && count == MAX_TILE)
                tile_of_two(layer, in + r, n, y);
            else
                for (int i = 0; i < N; i++) tile_of_one(layer, in + r, n + i, count, y + i * MAX_TILE);
            for (int i = 0; i < N; i++)
                for (int j = 0; j < count; j++) {
                    float number = y[i * MAX_TILE + j] + (layer->bias ? layer->bias[n + i] : 0);
                    float *place = out + (int64_t)(r + j) * layer->rows + n + i;
                    *place = result == ADD ? *place + number : result == GELU ? gelu(number) : number;
                }
        }
    }
}

/* The first row of a thread's part of N rows: an even one, so that the rows that are computed in pairs do not depend on the
   number of threads. */
static inline int64_t row_of(int thread, int count, int64_t N) {
    int64_t row = (N + 1) / 2 * thread / count * 2;
    return row < N ? row : N;
}

static void normalize(const norm *norm, const float *x, float *y, int C) {
    float mean = 0, variance = 0;
    #pragma omp simd reduction(+ : mean)
    for (int c = 0; c < C; c++) mean += x[c];
    mean /= C;
    #pragma omp simd reduction(+ : variance)
    for (int c = 0; c < C; c++) variance += (x[c] - mean) * (x[c] - mean);
    float scale = 1 / sqrtf(variance / C + norm->eps);
    if (norm->weight)
        for (int c = 0; c < C; c++) y[c] = (x[c] - mean) * scale * norm->weight[c] + norm->bias[c];
    else
        for (int c = 0; c < C; c++) y[c] = (x[c] - mean) * scale;
}

/* Store a head's key or value (D,) in the cache. */
static void append(void *cache, int type, int64_t at, const float *x, int D) {
    if (type == BFLOAT16)
        for (int d = 0; d < D; d++) ((uint16_t *)cache)[at + d] = to_bfloat16(x[d]);
    else
        for (int d = 0; d < D; d++) ((float *)cache)[at + d] = x[d];
}

static float dot_cached(const void *cache, int type, int64_t at, const float *x, int D) {
    float y = 0;
    if (type == BFLOAT16) {
        const uint16_t *cached = (const uint16_t *)cache + at;
        #pragma omp simd reduction(+ : y)
        for (int d = 0; d < D; d++) y += from_bfloat16(cached[d]) * x[d];
    } else {
        const float *cached = (const float *)cache + at;
        #pragma omp simd reduction(+ : y)
        for (int d = 0; d < D; d++) y += cached[d] * x[d];
    }
    return y;
}

static void add_cached(const void *cache, int type, int64_t at, float weight, float *y, int D) {
    if (type == BFLOAT16) {
        const uint16_t *cached = (const uint16_t *)cache + at;
        for (int d = 0; d < D; d++) y[d] += weight * from_bfloat16(cached[d]);
    } else {
        const float *cached = (const float *)cache + at;
        for (int d = 0; d < D; d++) y[d] += weight * cached[d];
    }
}

/* Attention of one head over the cache, to which the keys and values of all rows are appended first: qkv (R, 3C) into
   out (R, C). weights: room for max_length numbers */
static void attend(
    const model *m, const block *b, const row *rows, int R, const float *qkv, float *out, float *weights, int head
) {
    int C = m->emb_dim, D = C / m->n_heads;
    float scale = 1 / sqrtf((float)D);
    for (int r = 0; r < R; r++) {
        int64_t at = ((int64_t)(rows[r].cache_row * m->n_heads + head) * m->max_length + rows[r].column) * D;
        append(b->keys, m->type, at, qkv + (int64_t)r * 3 * C + C + head * D, D);
        append(b->values, m->type, at, qkv + (int64_t)r * 3 * C + 2 * C + head * D, D);
    }
    for (int r = 0; r < R; r++) {
        int length = rows[r].column + 1 - rows[r].first;
        int64_t at = ((int64_t)(rows[r].cache_row * m->n_heads + head) * m->max_length + rows[r].first) * D;
        const float *query = qkv + (int64_t)r * 3 * C + head * D;
        float *y = out + (int64_t)r * C + head * D, max = -INFINITY, sum = 0;
        for (int t = 0; t < length; t++)
            weights[t] = dot_cached(b->keys, m->type, at + (int64_t)t * D, query, D) * scale;
        #pragma omp simd reduction(max : max)
        for (int t = 0; t < length; t++) max = weights[t] > max ? weights[t] : max;
        #pragma omp simd reduction(+ : sum)
        for (int t = 0; t < length; t++) {
            weights[t] = fast_exp(weights[t] - max);
            sum += weights[t];
        }
        for (int d = 0; d < D; d++) y[d] = 0;
        for (int t = 0; t < length; t++)
            add_cached(b->values, m->type, at + (int64_t)t * D, weights[t], y, D);
        for (int d = 0; d < D; d++) y[d] /= sum;
    }
}

static void embed(const model *m, const row *row, float *x) {
    int64_t token = row->token * m->emb_dim, position = (int64_t)row->position * m->emb_dim;
    for (int c = 0; c < m->emb_dim; c++)
        x[c] = m->type == BFLOAT16 ? from_bfloat16(((const uint16_t *)m->tok_emb)[token + c]) +
                                         from_bfloat16(((const uint16_t *)m->pos_emb)[position + c])
                                   : ((const float *)m->tok_emb)[token + c] + ((const float *)m->pos_emb)[position + c];
}

/* The input of a product with a vector (K,). */
static void set_input(const linear *layer, const float *vector, input *in) {
    in->x = vector;
    if (layer->type == INT8 || layer->type == INT4) quantize(in, layer->columns);
}

static size_t whole_lines(size_t numbers) { /* of the CPU's cache */
    return (numbers + 15) / 16 * 16;
}

/* Every thread computes the inputs of a few rows itself. Those of many rows are divided among the threads, which then
   wait for each other. */
static int are_divided(int R) {
    return R > MAX_TILE;
}

/* Sizes in numbers of float32: of results that all threads see, of a row in 8 bits, and of the inputs of all rows. */
static size_t results_size(const model *m, int R) {
    return whole_lines((size_t)R * 9 * m->emb_dim);
}

static size_t rounded_size(const model *m) {
    return whole_lines(groups_of(4 * m->emb_dim) * (2 + GROUP / 4));
}

static size_t inputs_size(const model *m, int R) {
    return whole_lines(R * (size_t)m->emb_dim) + R * rounded_size(m);
}

/* Numbers of float32 that decode_step needs as its room for up to R rows. */
size_t decode_room(const model *m, int32_t R, int32_t threads) {
    size_t own = threads * inputs_size(m, R < MAX_TILE ? R : MAX_TILE), divided = are_divided(R) ? inputs_size(m, R) : 0;
    return results_size(m, R) + (own > divided ? own : divided) + threads * whole_lines(m->max_length);
}

typedef struct {
    float logit; /* NaN if any is */
    int64_t id;
} maximum;

/* The largest of the logits from ``first`` to ``end``, with the lowest id that has it. */
static maximum find_maximum(const float *logits, int64_t first, int64_t end) {
    float max = -INFINITY, nan = 0;
    #pragma omp simd reduction(max : max) reduction(+ : nan)
    for (int64_t n = first; n < end; n++) {
        max = logits[n] > max ? logits[n] : max;
        nan += logits[n] == logits[n] ? 0 : NAN;
    }
    int64_t id = first;
    while (id < end - 1 && logits[id] != max) id++;
    return (maximum){max + nan, id};
}

/* Compute the logits (L, V) of the next tokens after the last L rows, and the maximum of each. The keys and values of all
   R rows are stored in the cache. The rows are successive tokens of one text, or the newest tokens of several texts.
   room: aligned to 64 bytes */
void decode_step(
    const model *m, const row *rows, int32_t R, int32_t L, int32_t threads, float *room, float *logits,
    float *max_logits, int64_t *argmax_ids
) {
    size_t C = m->emb_dim;
    int divided = are_divided(R), used_threads = 1;
    float *x = room, *qkv = x + R * C, *y = qkv + R * 3 * C, *hidden = y + R * C; /* shared by the threads */
    float *areas = room + results_size(m, R), *of_threads = areas + (divided ? 1 : threads) * inputs_size(m, R);
    input shared_inputs[R];
    maximum maxima[threads][L + 1];
    for (int r = 0; r < R; r++) embed(m, rows + r, x + r * C);
    #pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num(), count = omp_get_num_threads();
        float *weights = of_threads + thread * whole_lines(m->max_length);
        float *normed = areas + (divided ? 0 : thread) * inputs_size(m, R), *rounded = normed + whole_lines(R * C);
        input own_inputs[R], *inputs = divided ? shared_inputs : own_inputs;

/* The rows, from ``first`` on, whose inputs this thread computes. */
#define FOR_ROWS(r, first) for (int r = (first) + (divided ? thread : 0); r < R; r += divided ? count : 1)

/* This thread's part of a layer's results for the rows from ``first`` on. */
#define MULTIPLY(layer, vectors, first, result, out)                                                        \
    do {                                                                                                    \
        FOR_ROWS(r, first) set_input(layer, (vectors) + (int64_t)r * (layer)->columns, inputs + r);         \
        if (divided) {                                                                                      \
            _Pragma("omp barrier")                                                                          \
        }                                                                                                   \
        multiply(layer, inputs + (first), R - (first), row_of(thread, count, (layer)->rows),                \
                 row_of(thread + 1, count, (layer)->rows), result, out);                                    \
    } while (0)

        FOR_ROWS(r, 0) {
            int8_t *numbers = (int8_t *)(rounded + r * rounded_size(m));
            float *scales = (float *)(numbers + groups_of(4 * C) * GROUP);
            inputs[r] = (input){NULL, numbers, scales, scales + groups_of(4 * C), 0};
        }
        for (const block *b = m->blocks; b < m->blocks + m->n_layers; b++) {
            FOR_ROWS(r, 0) normalize(&b->norm1, x + r * C, normed + r * C, C);
            MULTIPLY(&b->qkv, normed, 0, SET, qkv);
            #pragma omp barrier
            for (int head = m->n_heads * thread / count; head < m->n_heads * (thread + 1) / count; head++)
                attend(m, b, rows, R, qkv, y, weights, head);
            #pragma omp barrier
            MULTIPLY(&b->out_proj, y, 0, ADD, x);
            #pragma omp barrier
            FOR_ROWS(r, 0) normalize(&b->norm2, x + r * C, normed + r * C, C);
            MULTIPLY(&b->up, normed, 0, GELU, hidden);
            #pragma omp barrier
            MULTIPLY(&b->down, hidden, 0, ADD, x);
            #pragma omp barrier
        }
        if (L > 0) {
            FOR_ROWS(r, R - L) normalize(&m->final_norm, x + r * C, normed + r * C, C);
            MULTIPLY(&m->head, normed, R - L, SET, logits);
        }
        int64_t V = m->head.rows;
        for (int l = 0; l < L; l++)
            maxima[thread][l] = find_maximum(logits + l * V, row_of(thread, count, V), row_of(thread + 1, count, V));
        if (thread == 0) used_threads = count;
    }
    for (int l = 0; l < L; l++) {
        maximum best = maxima[0][l];
        for (int thread = 1; thread < used_threads; thread++) /* NaN is not less than any number, and stays */
            if (!(maxima[thread][l].logit <= best.logit) && best.logit == best.logit) best = maxima[thread][l];
        max_logits[l] = best.logit;
        argmax_ids[l] = best.id;
    }
}
