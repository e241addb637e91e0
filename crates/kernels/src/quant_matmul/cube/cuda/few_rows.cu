// y = x · w for few rows of x, with the multiply-adds of single floats.
//
// A block owns COLUMNS = 4 LANES columns, and all inputs or those of a split. Units of LANES threads take its
// chunks in turn: RUNS runs of codes that lie in one group. A thread loads BATCH chunks before it uses the
// first, which keeps the memory busy; the sums of the units are added at the end.
//
// Grid: [ceil(d_out / COLUMNS), n_splits, ceil(rows / ROWS)], THREADS threads. n_chunks = ceil(d_in / CHUNK),
// CHUNK = RUNS * CODES; each split but the last has chunks_per_split of them.
//
// Macros beyond those of packed.cu: ROWS, LANES (4, 8 or 16), THREADS, RUNS, BATCH, SPLIT. IN_GROUP is 1: CHUNK
// divides d_in, and group_size unless there is one group.

constexpr u32 COLUMNS = 4 * LANES;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 UNITS = THREADS / LANES;
constexpr u32 CHUNK = RUNS * CODES;
// The codes of a run whose values of x are loaded together: 16 bytes of a row, or 8 where rows are many.
constexpr u32 PER_REGISTER = 4 / sizeof(XStored);
constexpr u32 PART = CODES < 4 * PER_REGISTER || ROWS > 4 ? 2 * PER_REGISTER : 4 * PER_REGISTER;
// Whether scale and zero apply to the sums of a chunk; otherwise they apply to each weight, which is less
// work for more rows.
constexpr bool SCALES_SUMS = ROWS <= 2;

// Whether the values of x of a batch fit the registers, up to 32 of a thread, and are loaded with its words.
constexpr bool X_AHEAD = BATCH * CHUNK * ROWS * sizeof(XStored) <= 128;

// The values of x for a run, those of PART codes together.
struct XOfRun {
    u32 of[CODES / PART][ROWS][PART / PER_REGISTER];
};

DEVICE void load_x(u32 (&raw)[PART / PER_REGISTER], const XStored* from) {
    if constexpr (PART / PER_REGISTER == 4) {
        uint4 v = X_AHEAD ? load_16(from) : *(const uint4*)from;
        raw[0] = v.x, raw[1] = v.y, raw[2] = v.z, raw[3] = v.w;
    } else {
        uint2 v = X_AHEAD ? load_8(from) : *(const uint2*)from;
        raw[0] = v.x, raw[1] = v.y;
    }
}

// Adds the products of the chunk from input `first` to `sums`.
DEVICE void add_chunk(float (&sums)[4 * ROWS], const Run (&runs)[RUNS], const float (&scale)[4],
                      const float (&zero)[4], XOfRun (&x)[RUNS], const XStored* (&of_rows)[ROWS], u32 first,
                      const float* table, float center) {
    float of_levels[4 * ROWS] = {}, of_x[ROWS] = {};
#pragma unroll
    for (u32 r = 0; r < RUNS; r++) {
#pragma unroll
        for (u32 part = 0; part < CODES / PART; part++) {
            u32(&raw)[ROWS][PART / PER_REGISTER] = x[r].of[part];
            if (!X_AHEAD) {
#pragma unroll
                for (u32 row = 0; row < ROWS; row++)
                    load_x(raw[row], of_rows[row] + first + (r * CODES + part * PART));
            }
#pragma unroll
            for (u32 k = 0; k < PART; k++) {
                float w[4];
#pragma unroll
                for (u32 c = 0; c < 4; c++) {
                    w[c] = level(runs[r], part * PART + k, c, table, center);
                    if (!SCALES_SUMS) w[c] = (w[c] - zero[c]) * scale[c];
                }
#pragma unroll
                for (u32 row = 0; row < ROWS; row++) {
                    float v = XFloat::part(raw[row][k / PER_REGISTER], k % PER_REGISTER);
                    if (SCALES_SUMS) of_x[row] += v;
#pragma unroll
                    for (u32 c = 0; c < 4; c++) {
                        float& sum = SCALES_SUMS ? of_levels[4 * row + c] : sums[4 * row + c];
                        sum = __fmaf_rn(v, w[c], sum);
                    }
                }
            }
        }
    }
    if (SCALES_SUMS) {
#pragma unroll
        for (u32 row = 0; row < ROWS; row++) {
#pragma unroll
            for (u32 c = 0; c < 4; c++) {
                sums[4 * row + c] = __fmaf_rn(
                    scale[c], __fmaf_rn(-zero[c], of_x[row], of_levels[4 * row + c]), sums[4 * row + c]);
            }
        }
    }
}

// Adds the N sums in `v` over the units of a warp, from units OFFSET threads apart on. Each exchange between
// threads halves the sums that a thread goes on with, those from `first`; writes them to `of_warp`, [ROWS,
// COLUMNS].
template <u32 N, u32 OFFSET>
DEVICE void share_sums(float* of_warp, const float (&v)[N], u32 first) {
    if constexpr (OFFSET < LANES) {
#pragma unroll
        for (u32 k = 0; k < N; k++) of_warp[(first + k) / 4 * COLUMNS + (first + k) % 4] = v[k];
    } else if constexpr (N == 1) {
        float sum[1] = {v[0] + shuffle_xor(v[0], OFFSET)};
        share_sums<1, OFFSET / 2>(of_warp, sum, first);
    } else {
        bool upper = threadIdx.x & OFFSET;
        float sums[N / 2];
#pragma unroll
        for (u32 k = 0; k < N / 2; k++) {
            float given = upper ? v[k] : v[k + N / 2];
            float kept = upper ? v[k + N / 2] : v[k];
            sums[k] = kept + shuffle_xor(given, OFFSET);
        }
        share_sums<N / 2, OFFSET / 2>(of_warp, sums, upper ? first + N / 2 : first);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, THREADS < 512 ? 512 / THREADS : 1)
    few_rows(const XStored* __restrict__ x, const uint4* __restrict__ words,
             const GridStored* __restrict__ scales, const GridStored* __restrict__ zeros,
             const float* __restrict__ table, Output* __restrict__ y, const __grid_constant__ Info info) {
    __shared__ float shared[WARPS * ROWS * COLUMNS];
#if TABLE
    __shared__ float levels[16];
    if (threadIdx.x < 16) levels[threadIdx.x] = table[threadIdx.x];
#else
    const float* levels = table;
#endif
    u32 lane = threadIdx.x % LANES, unit = threadIdx.x / LANES;
    u32 column = blockIdx.x * COLUMNS + 4 * lane;
    const uint4* of_columns = words_of(words, column, info);
    // Rows beyond the last repeat it, and are not written.
    const XStored* of_rows[ROWS];
#pragma unroll
    for (u32 row = 0; row < ROWS; row++) {
        of_rows[row] = x + (u64)min(blockIdx.z * ROWS + row, info.rows - 1) * info.d_in;
    }
    u32 n_chunks = (info.d_in + CHUNK - 1) / CHUNK;
    u32 first_chunk = blockIdx.y * info.chunks_per_split;
    u32 last_chunk = min(first_chunk + info.chunks_per_split, n_chunks);

    float sums[4 * ROWS] = {};
#if TABLE
    __syncthreads();
#endif
    for (u32 chunk = first_chunk + unit; chunk < last_chunk; chunk += BATCH * UNITS) {
        Run runs[BATCH][RUNS];
        XOfRun of_x[BATCH][RUNS];
        float scale[BATCH][4], zero[BATCH][4];
#pragma unroll
        for (u32 b = 0; b < BATCH; b++) {
            u32 of_batch = chunk + b * UNITS;
            if (of_batch >= last_chunk) break;
            const uint4* from = of_columns + (u64)of_batch * (RUNS * WORDS * TILE / 4);
#pragma unroll
            for (u32 r = 0; r < RUNS; r++) load_run(runs[b][r], from + r * (WORDS * TILE / 4));
        }
        // Loads do not pass it: those of words come first.
        __syncwarp(__activemask());
#pragma unroll
        for (u32 b = 0; b < BATCH; b++) {
            if (chunk + b * UNITS >= last_chunk) break;
            u32 first = (chunk + b * UNITS) * CHUNK;
            if (X_AHEAD) {
#pragma unroll
                for (u32 k = 0; k < CHUNK / PART * ROWS; k++) {
                    u32 run = k / ROWS / (CODES / PART), part = k / ROWS % (CODES / PART), row = k % ROWS;
                    load_x(of_x[b][run].of[part][row], of_rows[row] + first + (run * CODES + part * PART));
                }
            }
            u32 group = first / info.group_size;
            load_grid(scale[b], scales, group, column, info);
            load_zeros(zero[b], zeros, group, column, info);
        }
        __syncwarp(__activemask());
#pragma unroll
        for (u32 b = 0; b < BATCH; b++) {
            u32 of_batch = chunk + b * UNITS;
            if (of_batch >= last_chunk) break;
            add_chunk(sums, runs[b], scale[b], zero[b], of_x[b], of_rows, of_batch * CHUNK, levels,
                      info.center);
        }
    }
    share_sums<4 * ROWS, 16>(shared + threadIdx.x / 32 * ROWS * COLUMNS + 4 * lane, sums, 0);
    finish<COLUMNS, WARPS>(shared, y, info);
}
