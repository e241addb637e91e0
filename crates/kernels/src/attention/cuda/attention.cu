// What the kernels of attention share (after prelude.cu).
//
// Macros: HEAD_DIM, a multiple of 16; F16, 1 for f16 and 0 for bf16; SOFTCAP, 1 if scores are capped;
// STARTS and ENDS, 1 if there are such bounds of keys.
//
// A tensor's rows are the vectors of HEAD_DIM elements of one head. A warp holds 16 rows, or two times 16, as
// left factors of products in registers, and a block copies the other factors to shared memory, tile by tile.

#if F16
#define mma mma_f16
#define pack pack_f16
#define float_of float_of_f16
#else
#define mma mma_bf16
#define pack pack_bf16
#define float_of float_of_bf16
#endif

// The elements from row to row of a tile: an odd number of 16 bytes, so that 8 rows are in different banks.
constexpr u32 TILE_STRIDE = HEAD_DIM + 8, ROW_BYTES = 2 * TILE_STRIDE;
// The steps of a product along the dimension of heads, and half of the tiles of a result of that width.
constexpr u32 DIM_STEPS = HEAD_DIM / 16;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
#define INFINITE __uint_as_float(0x7f800000)

// The elements from index to index of a tensor; a row's elements are contiguous and 16-byte aligned.
struct Strides {
    u32 batch, position, head;
};

struct Info {
    u32 heads, kv_heads, seq_q, seq_k;
    // Whether queries, the last of the positions, attend to no key after their own position.
    u32 causal;
    float scale;
    // The bound of scores, if SOFTCAP.
    float cap;
    Strides q, k, v;
};

DEVICE u32 lane() { return threadIdx.x % 32; }

// The rows of a head of a tensor.
template <typename T>
DEVICE T* rows_of(T* tensor, const Strides& strides, u32 batch, u32 head) {
    return tensor + (u64)batch * strides.batch + (u64)head * strides.head;
}

// The strides of a contiguous tensor.
DEVICE Strides contiguous(u32 positions, u32 heads) {
    return {positions * heads * HEAD_DIM, heads * HEAD_DIM, HEAD_DIM};
}

// The keys that a query attends to.
struct Range {
    int first, last;
};

// Not empty, but where there is no such query; `starts` and `ends` are [batch, seq_q], if STARTS and ENDS.
DEVICE Range range_of(const Info& info, const int* starts, const int* ends, u32 batch, u32 query) {
    if (query >= info.seq_q) return {0x7fffffff, -1};
    const u64 at = (u64)batch * info.seq_q + query;
    int last = (int)info.seq_k - 1;
    if (info.causal) last -= (int)(info.seq_q - 1 - query);
    if (ENDS) last = min(last, max(ends[at], 1) - 1);
    return {STARTS ? max(min(starts[at], last), 0) : 0, last};
}

// The ranges of the queries of a warp: all keys that one of them attends to, and those that all attend to.
struct Extent {
    Range some, all;
    __device__ __forceinline__ bool meets(int first, int last) const {
        return first <= some.last && last >= some.first;
    }
    __device__ __forceinline__ bool covers(int first, int last) const {
        return first >= all.first && last <= all.last;
    }
};

// The extent of one range of each lane.
DEVICE Extent extent_of(Range range) {
    return {{warp_min(range.first), warp_max(range.last)}, {warp_max(range.first), warp_min(range.last)}};
}

// Starts to copy ROWS rows from `first` on to a tile, by a block of THREADS; rows from `count` on are zeros.
template <u32 ROWS, u32 THREADS>
DEVICE void copy_tile(u32 tile, const u16* rows, u32 stride, u32 first, u32 count) {
    constexpr u32 CHUNKS = HEAD_DIM / 8;
#pragma unroll
    for (u32 i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        const u32 row = i / CHUNKS, column = i % CHUNKS * 8, position = first + row;
        const bool exists = position < count;
        copy_async_16_at(tile + row * ROW_BYTES + 2 * column,
                         rows + (exists ? (u64)position * stride : 0) + column, exists ? 16 : 0);
    }
}

// Loads a warp's 16 rows from `first` on as a left factor; rows from `count` on are zeros.
DEVICE void load_rows(u32 (&a)[DIM_STEPS][4], const u16* rows, u32 stride, u32 first, u32 count) {
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 position = first + 8 * half + lane() / 4;
        const bool exists = position < count;
        const u16* row = rows + (exists ? (u64)position * stride : 0) + lane() % 4 * 2;
#pragma unroll
        for (u32 step = 0; step < DIM_STEPS; step++) {
            a[step][half] = exists ? *(const u32*)(row + 16 * step) : 0;
            a[step][half + 2] = exists ? *(const u32*)(row + 16 * step + 8) : 0;
        }
    }
}

// Stores a warp's 16 rows, times a factor, from `first` on and before `count`.
DEVICE void store_rows(u16* rows, u32 stride, u32 first, u32 count, const float (&d)[2 * DIM_STEPS][4],
                       const float (&factors)[2]) {
    const bool is_odd = lane() % 2;
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 position = first + 8 * half + lane() / 4;
        u16* row = rows + (u64)position * stride + is_odd * 8 + lane() % 4 / 2 * 4;
        const float factor = factors[half];
#pragma unroll
        for (u32 step = 0; step < DIM_STEPS; step++) {
            const float (&l)[4] = d[2 * step], (&r)[4] = d[2 * step + 1];
            const u32 left = pack(l[2 * half] * factor, l[2 * half + 1] * factor);
            const u32 right = pack(r[2 * half] * factor, r[2 * half + 1] * factor);
            // Even lanes take the neighbor's half of the left tile, odd ones that of the right tile: four
            // lanes store 32 contiguous bytes.
            const float sent = __uint_as_float(is_odd ? left : right);
            const u32 received = __float_as_uint(shuffle_xor(sent, 1));
            const uint2 both = is_odd ? make_uint2(received, right) : make_uint2(left, received);
            if (position < count) *(uint2*)(row + 16 * step) = both;
        }
    }
}

// d = a bᵀ, with N rows of a tile as b.
template <u32 M, u32 N>
DEVICE void multiply_rows(float (&d)[M][N / 8][4], const u32 (&a)[M][DIM_STEPS][4], u32 tile) {
    const u32 address = tile + (lane() / 16 * 8 + lane() % 8) * ROW_BYTES + lane() / 8 % 2 * 16;
#pragma unroll
    for (u32 m = 0; m < M; m++)
#pragma unroll
        for (u32 n = 0; n < N / 8; n++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) d[m][n][i] = 0;
#pragma unroll
    for (u32 step = 0; step < DIM_STEPS; step++)
#pragma unroll
        for (u32 n = 0; n < N / 16; n++) {
            u32 b[4];
            load_matrices_at(b, address + n * 16 * ROW_BYTES + step * 32);
#pragma unroll
            for (u32 m = 0; m < M; m++) {
                mma(d[m][2 * n], a[m][step], b[0], b[1]);
                mma(d[m][2 * n + 1], a[m][step], b[2], b[3]);
            }
        }
}

// d += a b, with N rows of a tile as b.
template <u32 M, u32 N>
DEVICE void add_product(float (&d)[M][2 * DIM_STEPS][4], const u32 (&a)[M][N / 16][4], u32 tile) {
    const u32 address = tile + lane() % 16 * ROW_BYTES + lane() / 16 * 16;
#pragma unroll
    for (u32 step = 0; step < N / 16; step++)
#pragma unroll
        for (u32 n = 0; n < DIM_STEPS; n++) {
            u32 b[4];
            load_matrices_transposed_at(b, address + step * 16 * ROW_BYTES + n * 32);
#pragma unroll
            for (u32 m = 0; m < M; m++) {
                mma(d[m][2 * n], a[m][step], b[0], b[1]);
                mma(d[m][2 * n + 1], a[m][step], b[2], b[3]);
            }
        }
}

// A product's result of N columns as a left factor.
template <u32 N>
DEVICE void pack_factor(u32 (&a)[N / 16][4], const float (&d)[N / 8][4]) {
#pragma unroll
    for (u32 step = 0; step < N / 16; step++)
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            a[step][i] = pack(d[2 * step + i / 2][i % 2 * 2], d[2 * step + i / 2][i % 2 * 2 + 1]);
}

// Sets what the 16 rows of a result have of keys, from `first` on, that are not in the ranges of the rows.
template <u32 N>
DEVICE void mask_rows(float (&d)[N / 8][4], const Range* ranges, int first, float value) {
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const Range range = ranges[half * 8 + lane() / 4];
#pragma unroll
        for (u32 n = 0; n < N / 8; n++)
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                const int key = first + n * 8 + lane() % 4 * 2 + i;
                if (key < range.first || key > range.last) d[n][2 * half + i] = value;
            }
    }
}

// The sum of the numbers of the four lanes that hold a row.
DEVICE float row_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

// tanh, with an absolute error of some 1e-7.
DEVICE float tanh_fast(float x) { return 1 - 2 * reciprocal_fast(1 + exp2_fast(2 * LOG2_E * x)); }

// Scores divided by `score_factor`: products of queries and keys, or their tanh if they are capped.
DEVICE float score_of(const Info& info, float product) {
#if SOFTCAP
    return tanh_fast(product * (info.scale / info.cap));
#else
    return product;
#endif
}

// What turns the results of `score_of` into scores whose exponential has base 2.
DEVICE float score_factor(const Info& info) { return (SOFTCAP ? info.cap : info.scale) * LOG2_E; }
