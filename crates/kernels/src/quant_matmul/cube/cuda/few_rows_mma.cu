// y = x · w for few rows of 16-bit floats, with the matrix units.
//
// A product of the matrix units has the levels of 16 columns x 16 inputs, which 16-bit floats represent
// exactly, and 8 rows of x; its sums are single floats. Scales and zeros apply to the sums over a chunk:
// scale * (sum of x * level - zero * sum of x), where the sum of x is a product with ones.
//
// A block owns COLUMNS columns, and all inputs or those of a split. Its warps take the chunks in turn: RUNS
// steps of 4 runs of codes, all in one group. In a step the thread 4 g + q of a warp has run q of the columns
// 4 g to 4 g + 3 (of each 32 columns), and that run of row g of x. The order of inputs in a product is free:
// it is that of the codes a thread has.
//
// Grid: [ceil(d_out / COLUMNS), n_splits, ceil(rows / ROWS)], THREADS threads. n_chunks = d_in / CHUNK,
// CHUNK = RUNS * 4 * CODES; each split but the last has chunks_per_split of them.
//
// Macros beyond those of packed.cu: ROWS, COLUMNS (32 or 64), THREADS, RUNS, BATCH. X is F16 or BF16,
// IN_GROUP is 1, TABLE 0; CHUNK divides d_in, and group_size unless there is one group.

constexpr u32 PARTS = COLUMNS / 32;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 CHUNK = RUNS * 4 * CODES;
// Codes become levels around 0, `code - HALF`, whatever the center: the sums are small where zeros are near
// the middle, and lose little in the difference.
constexpr u32 HALF = 1u << (BITS - 1);
// The tiles of 8 rows.
constexpr u32 ROW_TILES = (ROWS + 7) / 8;
// The registers with a run of a row of x, two values in each.
constexpr u32 X_REGISTERS = CODES / 2;

#if X == F16
constexpr u32 ONES = 0x3c003c00;
DEVICE u32 fma_pair(u32 a, u32 b, u32 c) { return fma_f16(a, b, c); }
DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_f16(d, a, b0, b1); }
// 1024, whose lowest bit counts ones.
constexpr u32 MAGIC = 0x64006400;
#else
constexpr u32 ONES = 0x3f803f80;
DEVICE u32 fma_pair(u32 a, u32 b, u32 c) { return fma_bf16(a, b, c); }
DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_bf16(d, a, b0, b1); }
// 128, whose lowest bit counts ones.
constexpr u32 MAGIC = 0x43004300;
#endif
constexpr u32 PAIR = 0x00010001;

// Codes k and k + CODES / 2 of column c in the lower bits of two halves.
DEVICE u32 pair_of_codes(const Run& r, u32 k, u32 c) {
#if BITS == 3
    // The halves of a run have 48 bits each; `of[j]` has 16 bits of both, from bit 16 j.
    u32 of[3] = {
        lower_halves(r.of[0][c], r.of[1][c] >> 16),
        upper_halves(r.of[0][c], r.of[2][c] << 16),
        lower_halves(r.of[1][c], r.of[2][c] >> 16),
    };
    u32 j = k * 3 / 16, at = k * 3 % 16, n = 16 - at;
    u32 low = of[j] >> at & MASK * PAIR;
    if (n >= 3) return low;
    // The code has its n lowest bits in `of[j]`.
    u32 low_mask = ((1u << n) - 1) * PAIR;
    return (of[j] >> at & low_mask) | (of[j + 1 < 3 ? j + 1 : 2] << n & (MASK * PAIR & ~low_mask));
#else
    return r.of[0][c] >> (k * BITS) & MASK * PAIR;
#endif
}

// Codes k and k + CODES / 2 of column c, less HALF.
DEVICE u32 pair_of_levels(const Run& r, u32 k, u32 c) {
#if BITS == 8 && X == BF16
    // 128 has room for 7 bits: the highest one selects what is subtracted, -128 or -256.
    u32 codes = r.of[0][c] >> (k * BITS);
    return fma_pair((codes & 0x7f * PAIR) | MAGIC, ONES, (codes & 0x80 * PAIR) ^ 0xc380 * PAIR);
#else
    return fma_pair(pair_of_codes(r, k, c) | MAGIC, ONES, (MAGIC | 0x80008000) + HALF * PAIR);
#endif
}

// A run of a row of x; 0 if there is no such row.
DEVICE void load_x(u32 (&raw)[X_REGISTERS], const XStored* from, bool exists) {
#if BITS == 8
    uint2 v = exists ? load_8(from) : make_uint2(0, 0);
    raw[0] = v.x, raw[1] = v.y;
#else
#pragma unroll
    for (u32 k = 0; k < X_REGISTERS; k += 4) {
        uint4 v = exists ? load_16(from + 2 * k) : make_uint4(0, 0, 0, 0);
        raw[k] = v.x, raw[k + 1] = v.y, raw[k + 2] = v.z, raw[k + 3] = v.w;
    }
#endif
}

// Values k and k + CODES / 2 of a run of x.
DEVICE u32 pair_of_x(const u32 (&raw)[X_REGISTERS], u32 k) {
    u32 a = raw[k / 2], b = raw[k / 2 + X_REGISTERS / 2];
    return k % 2 ? upper_halves(a, b) : lower_halves(a, b);
}

// The sums of a thread: for columns 4 g + 2 t (0 and 1) and 4 g + 2 t + 1 (2 and 3) of a part, the rows 2 q
// and 2 q + 1 of a tile of rows.
typedef float Sums[PARTS][2][ROW_TILES][4];

// Adds the products of a chunk to `sums`.
DEVICE void add_chunk(Sums& sums, const Run (&runs)[RUNS][PARTS], const float (&scale)[PARTS][4],
                      const float (&zero)[PARTS][4], const u32 (&x)[RUNS][ROW_TILES][X_REGISTERS],
                      float center) {
    constexpr u32 ones[4] = {ONES, ONES, ONES, ONES};
    Sums of_levels = {};
    float of_x[ROW_TILES][4] = {};
#pragma unroll
    for (u32 r = 0; r < RUNS; r++) {
#pragma unroll
        for (u32 k = 0; k < CODES / 2; k += 2) {
            u32 b[ROW_TILES][2];
#pragma unroll
            for (u32 n = 0; n < ROW_TILES; n++) {
                b[n][0] = pair_of_x(x[r][n], k), b[n][1] = pair_of_x(x[r][n], k + 1);
                multiply(of_x[n], ones, b[n][0], b[n][1]);
            }
#pragma unroll
            for (u32 p = 0; p < PARTS; p++) {
#pragma unroll
                for (u32 t = 0; t < 2; t++) {
                    const Run& run = runs[r][p];
                    u32 a[4] = {pair_of_levels(run, k, 2 * t), pair_of_levels(run, k, 2 * t + 1),
                                pair_of_levels(run, k + 1, 2 * t), pair_of_levels(run, k + 1, 2 * t + 1)};
#pragma unroll
                    for (u32 n = 0; n < ROW_TILES; n++) multiply(of_levels[p][t][n], a, b[n][0], b[n][1]);
                }
            }
        }
    }
#pragma unroll
    for (u32 p = 0; p < PARTS; p++) {
#pragma unroll
        for (u32 t = 0; t < 2; t++) {
#pragma unroll
            for (u32 n = 0; n < ROW_TILES; n++) {
#pragma unroll
                for (u32 k = 0; k < 4; k++) {
                    u32 c = 2 * t + k / 2;
                    float sum =
                        __fmaf_rn((float)HALF - center - zero[p][c], of_x[n][k % 2], of_levels[p][t][n][k]);
                    sums[p][t][n][k] = __fmaf_rn(scale[p][c], sum, sums[p][t][n][k]);
                }
            }
        }
    }
}

// Writes the sums of a warp to `shared`, [WARPS, ROWS, COLUMNS].
DEVICE void share_sums(float* shared, const Sums& sums) {
    u32 g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    float* of_warp = shared + threadIdx.x / 32 * ROWS * COLUMNS;
#pragma unroll
    for (u32 n = 0; n < ROW_TILES; n++) {
#pragma unroll
        for (u32 k = 0; k < 2; k++) {
            u32 row = 8 * n + 2 * q + k;
            if (row >= ROWS) continue;
#pragma unroll
            for (u32 p = 0; p < PARTS; p++) {
                *(float4*)(of_warp + row * COLUMNS + 32 * p + 4 * g) = make_float4(
                    sums[p][0][n][k], sums[p][0][n][2 + k], sums[p][1][n][k], sums[p][1][n][2 + k]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, THREADS < 512 ? 512 / THREADS : 1)
    few_rows_mma(const XStored* __restrict__ x, const uint4* __restrict__ words,
                 const GridStored* __restrict__ scales, const GridStored* __restrict__ zeros,
                 const float* __restrict__ table, Output* __restrict__ y, const __grid_constant__ Info info) {
    __shared__ __align__(16) float shared[WARPS * ROWS * COLUMNS];
    u32 warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    u32 column = blockIdx.x * COLUMNS + 4 * g;
    // The thread's runs are every fourth.
    const uint4* of_columns[PARTS];
#pragma unroll
    for (u32 p = 0; p < PARTS; p++)
        of_columns[p] = words_of(words, column + 32 * p, info) + q * (WORDS * TILE / 4);
    u32 row = blockIdx.z * ROWS + g;
    const XStored* of_row = x + (u64)row * info.d_in + q * CODES;
    u32 n_chunks = info.d_in / CHUNK;
    u32 first_chunk = blockIdx.y * info.chunks_per_split;
    u32 last_chunk = min(first_chunk + info.chunks_per_split, n_chunks);

    Sums sums = {};
    for (u32 chunk = first_chunk + warp; chunk < last_chunk; chunk += BATCH * WARPS) {
        Run runs[BATCH][RUNS][PARTS];
        u32 of_x[BATCH][RUNS][ROW_TILES][X_REGISTERS];
        float scale[BATCH][PARTS][4], zero[BATCH][PARTS][4];
#pragma unroll
        for (u32 b = 0; b < BATCH; b++) {
            if (chunk + b * WARPS >= last_chunk) break;
            u64 words_before = (u64)(chunk + b * WARPS) * (RUNS * 4 * WORDS * TILE / 4);
#pragma unroll
            for (u32 r = 0; r < RUNS; r++) {
#pragma unroll
                for (u32 p = 0; p < PARTS; p++) {
                    load_run(runs[b][r][p], of_columns[p] + words_before + r * (4 * WORDS * TILE / 4));
                }
            }
        }
        // Loads do not pass it: those of words come first.
        __syncwarp();
#pragma unroll
        for (u32 b = 0; b < BATCH; b++) {
            u32 of_batch = chunk + b * WARPS;
            if (of_batch >= last_chunk) break;
#pragma unroll
            for (u32 n = 0; n < ROW_TILES; n++) {
                const XStored* from = of_row + (u64)8 * n * info.d_in + of_batch * CHUNK;
#pragma unroll
                for (u32 r = 0; r < RUNS; r++)
                    load_x(of_x[b][r][n], from + r * (4 * CODES), row + 8 * n < info.rows);
            }
            u32 group = of_batch * CHUNK / info.group_size;
#pragma unroll
            for (u32 p = 0; p < PARTS; p++) {
                load_grid(scale[b][p], scales, group, column + 32 * p, info);
                load_zeros(zero[b][p], zeros, group, column + 32 * p, info);
            }
        }
        __syncwarp();
#pragma unroll
        for (u32 b = 0; b < BATCH; b++) {
            if (chunk + b * WARPS >= last_chunk) break;
            add_chunk(sums, runs[b], scale[b], zero[b], of_x[b], info.center);
        }
    }
    share_sums(shared, sums);
    finish<COLUMNS, WARPS>(shared, y, info);
}
