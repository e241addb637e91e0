// The gradients of scales and zeros, [n_groups, d_out], from p = xᵀ · dy, [d_in, d_out], in the floats of X:
// dscales = sum of p * (level - zero), dzeros = -scale * (sum of p), over the inputs of a group.
//
// A block owns a group of the columns of a tile; its units of 16 threads, 4 columns each, take the runs of
// codes in turn. Their sums are added at the end, in the order of the units.
//
// Grid: [n_groups, n_tiles], THREADS threads. Macros beyond those of packed.cu: THREADS.

constexpr u32 LANES = TILE / 4;
constexpr u32 UNITS = THREADS / LANES;
// The inputs whose values of p are loaded before the first is used.
constexpr u32 PART = CODES < 8 ? CODES : 8;

// Four columns of a row of p; those beyond d_out are not used.
DEVICE void load_p(float (&v)[4], const XStored* row, u32 column, const Info& info) {
#if ALIGNED
    row += min(column, info.d_out - 4);
#if X == F32
    float4 f = *(const float4*)row;
    v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
#else
    uint2 u = *(const uint2*)row;
    v[0] = XFloat::part(u.x, 0), v[1] = XFloat::part(u.x, 1);
    v[2] = XFloat::part(u.y, 0), v[3] = XFloat::part(u.y, 1);
#endif
#else
#pragma unroll
    for (u32 c = 0; c < 4; c++) v[c] = XFloat::load(row[min(column + c, info.d_out - 1)]);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS)
    dgrid(const XStored* __restrict__ p, const uint4* __restrict__ words,
          const GridStored* __restrict__ scales, const GridStored* __restrict__ zeros,
          const float* __restrict__ table, GridStored* __restrict__ dscales, GridStored* __restrict__ dzeros,
          const __grid_constant__ Info info) {
    __shared__ __align__(16) float of_levels[UNITS][TILE];
    __shared__ __align__(16) float of_products[UNITS][TILE];
#if TABLE
    __shared__ float levels[16];
    if (threadIdx.x < 16) levels[threadIdx.x] = table[threadIdx.x];
    __syncthreads();
#else
    const float* levels = table;
#endif
    u32 lane = threadIdx.x % LANES, unit = threadIdx.x / LANES;
    u32 group = blockIdx.x, column = blockIdx.y * TILE + 4 * lane;
    u32 start = group * info.group_size, end = min(start + info.group_size, info.d_in);
    const uint4* of_columns = words_of(words, column, info);

    float zero[4];
    load_zeros(zero, zeros, group, column, info);
    float level_sums[4] = {}, product_sums[4] = {};
    // Two groups both read a run that they share.
    for (u32 run = start / CODES + unit; run * CODES < end; run += UNITS) {
        Run r;
        load_run(r, of_columns + (u64)run * (WORDS * TILE / 4),
                 IN_GROUP ? WORDS : info.word_rows - run * WORDS);
#pragma unroll
        for (u32 part = 0; part < CODES; part += PART) {
            float v[PART][4];
#pragma unroll
            for (u32 k = 0; k < PART; k++) {
                u32 i = run * CODES + part + k;
                if (IN_GROUP || (i >= start && i < end)) {
                    load_p(v[k], p + (u64)i * info.d_out, column, info);
                } else {
                    v[k][0] = v[k][1] = v[k][2] = v[k][3] = 0.0f;
                }
            }
#pragma unroll
            for (u32 k = 0; k < PART; k++) {
#pragma unroll
                for (u32 c = 0; c < 4; c++) {
                    level_sums[c] = __fmaf_rn(v[k][c], level(r, part + k, c, levels, info.center) - zero[c],
                                              level_sums[c]);
                    product_sums[c] += v[k][c];
                }
            }
        }
    }
    *(float4*)&of_levels[unit][4 * lane] =
        make_float4(level_sums[0], level_sums[1], level_sums[2], level_sums[3]);
    *(float4*)&of_products[unit][4 * lane] =
        make_float4(product_sums[0], product_sums[1], product_sums[2], product_sums[3]);
    __syncthreads();
    // The first threads add the sums with levels, the next ones those of products.
    u32 c = blockIdx.y * TILE + threadIdx.x % TILE;
    if (threadIdx.x >= 2 * TILE || c >= info.d_out) return;
    bool is_product = threadIdx.x >= TILE;
    float total = 0.0f;
#pragma unroll
    for (u32 u = 0; u < UNITS; u++) total += (is_product ? of_products : of_levels)[u][threadIdx.x % TILE];
    u64 at = (u64)group * info.d_out + c;
    if (is_product) {
        dzeros[at] = GridFloat::store(-(total * GridFloat::load(scales[at])));
    } else {
        dscales[at] = GridFloat::store(total);
    }
}
