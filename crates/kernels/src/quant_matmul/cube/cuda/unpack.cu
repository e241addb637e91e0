// The dense weight [d_in, d_out] of a packed one, in the floats of X.
//
// A thread has RUNS runs of codes of as many columns as 16 bytes of the result hold; the threads of a warp
// cover 64 columns, the whole lines of memory that a row of a tile has.
//
// Grid: [ceil(n_runs / (RUNS * THREADS / LANES)), n_tiles], THREADS threads; n_runs = ceil(d_in / CODES).
//
// Macros beyond those of packed.cu: RUNS, THREADS. With IN_GROUP, RUNS * CODES divides d_in, and group_size
// unless there is one group; without, RUNS is 1. WIDE is 1 if d_out is a multiple of the columns of a thread
// (8 for 16-bit floats, 4 for F32), so that rows of the result are written in vectors, else 0.

// The quarters of 4 columns that a thread has, and the threads of a tile.
constexpr u32 QUADS = X == F32 ? 1 : 2;
constexpr u32 LANES = TILE / (4 * QUADS);
constexpr u32 UNITS = THREADS / LANES;

// Writes the values of one input in the columns of a thread; those beyond d_out are not written.
DEVICE void store(XStored* row, const float (&w)[QUADS][4], u32 column, const Info& info) {
#if WIDE
    if (column >= info.d_out) return;
#if X == F32
    uint4 v = make_uint4(__float_as_uint(w[0][0]), __float_as_uint(w[0][1]), __float_as_uint(w[0][2]),
                         __float_as_uint(w[0][3]));
#elif X == F16
    uint4 v = make_uint4(pack_f16(w[0][0], w[0][1]), pack_f16(w[0][2], w[0][3]), pack_f16(w[1][0], w[1][1]),
                         pack_f16(w[1][2], w[1][3]));
#else
    uint4 v = make_uint4(pack_bf16(w[0][0], w[0][1]), pack_bf16(w[0][2], w[0][3]),
                         pack_bf16(w[1][0], w[1][1]), pack_bf16(w[1][2], w[1][3]));
#endif
    *(uint4*)(row + column) = v;
#else
#pragma unroll
    for (u32 j = 0; j < QUADS; j++) {
#pragma unroll
        for (u32 c = 0; c < 4; c++) {
            if (column + 4 * j + c < info.d_out) row[column + 4 * j + c] = XFloat::store(w[j][c]);
        }
    }
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS)
    unpack(const uint4* __restrict__ words, const GridStored* __restrict__ scales,
           const GridStored* __restrict__ zeros, const float* __restrict__ table,
           XStored* __restrict__ weight, const __grid_constant__ Info info) {
#if TABLE
    __shared__ float levels[16];
    if (threadIdx.x < 16) levels[threadIdx.x] = table[threadIdx.x];
    __syncthreads();
#else
    const float* levels = table;
#endif
    u32 column = blockIdx.y * TILE + threadIdx.x % LANES * (4 * QUADS);
    u32 run = (blockIdx.x * UNITS + threadIdx.x / LANES) * RUNS;
    u32 first = run * CODES;
    if (first >= info.d_in) return;

    Run runs[RUNS][QUADS];
#pragma unroll
    for (u32 j = 0; j < QUADS; j++) {
        const uint4* from = words_of(words, column + 4 * j, info) + (u64)run * (WORDS * TILE / 4);
#pragma unroll
        for (u32 r = 0; r < RUNS; r++) {
            load_run(runs[r][j], from + r * (WORDS * TILE / 4),
                     IN_GROUP ? WORDS : info.word_rows - run * WORDS);
        }
    }
    float scale[QUADS][4], zero[QUADS][4];
    u32 group = first / info.group_size, end = (group + 1) * info.group_size;
#pragma unroll
    for (u32 j = 0; j < QUADS; j++) {
        load_grid(scale[j], scales, group, column + 4 * j, info);
        load_zeros(zero[j], zeros, group, column + 4 * j, info);
    }
    XStored* row = weight + (u64)first * info.d_out;
#pragma unroll
    for (u32 r = 0; r < RUNS; r++) {
#pragma unroll
        for (u32 k = 0; k < CODES; k++) {
            if (!IN_GROUP) {
                u32 i = first + r * CODES + k;
                if (i >= info.d_in) return;
                if (i == end) {
                    group++, end += info.group_size;
#pragma unroll
                    for (u32 j = 0; j < QUADS; j++) {
                        load_grid(scale[j], scales, group, column + 4 * j, info);
                        load_zeros(zero[j], zeros, group, column + 4 * j, info);
                    }
                }
            }
            float w[QUADS][4];
#pragma unroll
            for (u32 j = 0; j < QUADS; j++) {
#pragma unroll
                for (u32 c = 0; c < 4; c++) {
                    w[j][c] = (level(runs[r][j], k, c, levels, info.center) - zero[j][c]) * scale[j][c];
                }
            }
            store(row, w, column, info);
            row += info.d_out;
        }
    }
}
