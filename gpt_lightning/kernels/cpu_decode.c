/* One decoding step of a GPT model for one row on a CPU, as gpt_lightning/generation/cpu_decode.py calls it.

With one row, a product of a matrix and a vector does two operations per weight that it reads, so a step takes at least
the time to read all weights once. Torch needs longer: its products are made for many rows, and each of the two
hundred operators of a step starts and stops the threads. Here the threads start once a step. Each one computes its own
rows of every matrix and waits for the others where it needs their results.

All sums are float32, and each result is computed by one thread in a fixed order, so the number of threads does not change it.

Shapes: C emb_dim, H heads, D = C / H, V vocabulary size; a weight is (N, K). The compiler may be GCC or Clang. */

#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define GROUP 64 /* neighbouring numbers with a scale of their own */

/* vectors that the CPU has: a compiler splits larger ones badly */
#ifdef __AVX512VNNI__
#define LANES 16
#else
#define LANES 8
#endif
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float float8 __attribute__((vector_size(32)));
typedef float float4 __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef int16_t shorts __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(GROUP)));
/* where they lie in memory, at any address */
typedef bytes stored_bytes __attribute__((aligned(1), may_alias));
typedef uint8_t stored_codes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef int8_t stored_numbers __attribute__((vector_size(LANES), aligned(1), may_alias));

enum number_type { FLOAT32, BFLOAT16, INT8, INT4 };

/* Linear layer: weight (N, K) and bias (N,), or no bias.
   INT8: codes (N, K) from 1 to 255; weight = (code - 128) * scale, with scales (N,).
   INT4: codes from 0 to 15, those of a group in the low and those of the next one in the high half of 64 bytes;
   weight = (code - 8) * slope + offset, where lines (N, 2, K / GROUP) are the slopes and then the offsets, in bfloat16.
   K is filled up to whole groups, and to an even number of them for INT4. */
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

/* keys and values: (H, max_length, D), in the type of the embeddings */
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

/* The vector that a matrix is multiplied with. For INT8 and INT4 also in 8 bits: x = numbers * scales, for each group. */
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

/* Products of 64 codes (0 to 255) and 64 numbers (-127 to 127), in LANES sums. */
static inline ints group_product(bytes codes, const int8_t *numbers) {
#ifdef __AVX512VNNI__
    return (ints)_mm512_dpbusd_epi32(_mm512_setzero_si512(), (__m512i)codes, _mm512_loadu_si512(numbers));
#elif defined(__AVX2__)
    __m256i sums = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
        __m256i a = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)&codes + i));
        __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)numbers + i));
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
    }
    return (ints)sums;
#else
    ints sums = {0};
    for (int i = 0; i < GROUP; i += LANES) { /* a product fits into 16 bits */
        shorts products = __builtin_convertvector(*(const stored_codes *)((uint8_t *)&codes + i), shorts) *
                          __builtin_convertvector(*(const stored_numbers *)(numbers + i), shorts);
        sums += __builtin_convertvector(products, ints);
    }
    return sums;
#endif
}

static inline int groups_of(int columns) { /* an even number */
    return (columns + 2 * GROUP - 1) / (2 * GROUP) * 2;
}

/* Round each group of the vector to 8 bits. Where it has NaN or infinity, its scale is NaN, and so are the results. */
static void quantize(input *in, int columns) {
    in->sum = 0;
    for (int g = 0; g < groups_of(columns); g++) {
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

static float row_product_int8(const linear *layer, const input *in, int64_t row) {
    int groups = groups_of(layer->columns);
    const uint8_t *codes = (const uint8_t *)layer->weight + row * groups * GROUP;
    floats y = {0};
    for (int g = 0; g < groups; g++) {
        ints sums = group_product(*(const stored_bytes *)(codes + g * GROUP), in->numbers + g * GROUP);
        y += __builtin_convertvector(sums, floats) * in->scales[g];
    }
    return (sum_of(y) - 128 * in->sum) * layer->scales[row];
}

static float row_product_int4(const linear *layer, const input *in, int64_t row) {
    int groups = groups_of(layer->columns);
    const uint8_t *codes = (const uint8_t *)layer->weight + row * groups * (GROUP / 2);
    const uint16_t *slopes = layer->lines + row * groups * 2, *offsets = slopes + groups;
    const int8_t *numbers = in->numbers;
    const float *scales = in->scales, *group_sums = in->sums;
    floats low = {0}, high = {0};
    float offset = 0;
    for (int g = 0; g < groups; g += 2) {
        bytes both = *(const stored_bytes *)(codes + g * (GROUP / 2));
        ints low_sums = group_product(both & 15, numbers + g * GROUP);
        ints high_sums = group_product(both >> 4, numbers + (g + 1) * GROUP);
        float low_slope = from_bfloat16(slopes[g]), high_slope = from_bfloat16(slopes[g + 1]);
        low += __builtin_convertvector(low_sums, floats) * (scales[g] * low_slope);
        high += __builtin_convertvector(high_sums, floats) * (scales[g + 1] * high_slope);
        offset += group_sums[g] * (from_bfloat16(offsets[g]) - 8 * low_slope);
        offset += group_sums[g + 1] * (from_bfloat16(offsets[g + 1]) - 8 * high_slope);
    }
    return sum_of(low + high) + offset;
}

/* One number of the layer's result: row ``row`` of the weight times the vector, plus the bias. */
static inline float row_product(const linear *layer, const input *in, int64_t row) {
    int K = layer->columns;
    const float *x = in->x;
    float y = 0;
    if (layer->type == INT8) {
        y = row_product_int8(layer, in, row);
    } else if (layer->type == INT4) {
        y = row_product_int4(layer, in, row);
    } else if (layer->type == BFLOAT16) {
        const uint16_t *weight = (const uint16_t *)layer->weight + row * K;
        #pragma omp simd reduction(+ : y)
        for (int k = 0; k < K; k++) y += from_bfloat16(weight[k]) * x[k];
    } else {
        const float *weight = (const float *)layer->weight + row * K;
        #pragma omp simd reduction(+ : y)
        for (int k = 0; k < K; k++) y += weight[k] * x[k];
    }
    return layer->bias ? y + layer->bias[row] : y;
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

/* Attention of one head: of its query in qkv (3C,) over the cache, to which its key and value are appended; into y (C,).
   weights: room for max_length numbers */
static void attend(
    const model *m, const block *b, const float *qkv, float *y, float *weights, int head, int position
) {
    int C = m->emb_dim, D = C / m->n_heads, length = position + 1;
    int64_t first = (int64_t)head * m->max_length * D;
    const float *query = qkv + head * D;
    float scale = 1 / sqrtf((float)D), max = -INFINITY, sum = 0;
    append(b->keys, m->type, first + (int64_t)position * D, query + C, D);
    append(b->values, m->type, first + (int64_t)position * D, query + 2 * C, D);
    for (int t = 0; t < length; t++)
        weights[t] = dot_cached(b->keys, m->type, first + (int64_t)t * D, query, D) * scale;
    #pragma omp simd reduction(max : max)
    for (int t = 0; t < length; t++) max = weights[t] > max ? weights[t] : max;
    #pragma omp simd reduction(+ : sum)
    for (int t = 0; t < length; t++) {
        weights[t] = fast_exp(weights[t] - max);
        sum += weights[t];
    }
    y += head * D;
    for (int d = 0; d < D; d++) y[d] = 0;
    for (int t = 0; t < length; t++)
        add_cached(b->values, m->type, first + (int64_t)t * D, weights[t], y, D);
    for (int d = 0; d < D; d++) y[d] /= sum;
}

/* Numbers of float32 in the room of each thread: a normalized vector, attention weights and an input in 8 bits. */
static size_t own_size(const model *m) {
    size_t groups = groups_of(4 * m->emb_dim);
    return (m->emb_dim + m->max_length + groups * (2 + GROUP / 4) + 15) / 16 * 16;
}

/* Numbers of float32 that decode_step needs as its room. */
size_t decode_room(const model *m, int32_t threads) {
    return (size_t)9 * m->emb_dim + 16 + threads * own_size(m);
}

/* Of the token at this position, compute the logits (V,) of the next one. Its keys and values are appended to the cache.
   room: aligned to 64 bytes */
void decode_step(
    const model *m, int64_t token, int32_t position, int32_t threads, float *room, float *logits
) {
    int C = m->emb_dim;
    float *x = room, *qkv = x + C, *y = qkv + 3 * C, *hidden = y + C; /* shared by the threads */
    float *own_rooms = room + (9 * (size_t)C + 15) / 16 * 16;
    for (int c = 0; c < C; c++) {
        int64_t of_token = token * C + c, of_position = (int64_t)position * C + c;
        x[c] = m->type == BFLOAT16 ? from_bfloat16(((const uint16_t *)m->tok_emb)[of_token]) +
                                         from_bfloat16(((const uint16_t *)m->pos_emb)[of_position])
                                   : ((const float *)m->tok_emb)[of_token] + ((const float *)m->pos_emb)[of_position];
    }
    #pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num(), count = omp_get_num_threads();
        int groups = groups_of(4 * C);
        float *normed = own_rooms + thread * own_size(m), *weights = normed + C, *scales = weights + m->max_length;
        input in = {normed, (int8_t *)(scales + 2 * groups), scales, scales + groups, 0};

/* This thread's rows of a layer's result; STORE uses each number ``r`` and its row ``i``. */
#define EACH_ROW(layer, vector, STORE)                                                       \
    do {                                                                                     \
        in.x = (vector);                                                                     \
        if ((layer)->type == INT8 || (layer)->type == INT4) quantize(&in, (layer)->columns); \
        int64_t end = (int64_t)(layer)->rows * (thread + 1) / count;                         \
        for (int64_t i = (int64_t)(layer)->rows * thread / count; i < end; i++) {            \
            float r = row_product((layer), &in, i);                                          \
            STORE;                                                                           \
        }                                                                                    \
    } while (0)

        for (const block *b = m->blocks; b < m->blocks + m->n_layers; b++) {
            normalize(&b->norm1, x, normed, C);
            EACH_ROW(&b->qkv, normed, qkv[i] = r);
            #pragma omp barrier
            for (int h = m->n_heads * thread / count; h < m->n_heads * (thread + 1) / count; h++)
                attend(m, b, qkv, y, weights, h, position);
            #pragma omp barrier
            EACH_ROW(&b->out_proj, y, x[i] += r);
            #pragma omp barrier
            normalize(&b->norm2, x, normed, C);
            EACH_ROW(&b->up, normed, hidden[i] = gelu(r));
            #pragma omp barrier
            EACH_ROW(&b->down, hidden, x[i] += r);
            #pragma omp barrier
        }
        normalize(&m->final_norm, x, normed, C);
        EACH_ROW(&m->head, normed, logits[i] = r);
    }
}
