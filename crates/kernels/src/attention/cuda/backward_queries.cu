// The gradient of attention for queries, after attention.cu: runs before backward_keys.cu, for which
// it writes `delta`.
//
// A block computes QUERIES queries of a head. With the probabilities p = exp(s - lse) of the scores s, and
// dp = dy vᵀ: delta = Σ dy y, ds = p (dp - delta), times 1 - tanh² if scores are capped, and dq = scale ds k.
//
// Grid: (batch * heads, seq_q / QUERIES rounded up). Block: THREADS. Macro beyond those of attention.cu: WARPS.

// Rows of a warp in 16s. With two of them, each load from shared memory is used twice.
#define ROW_TILES 1
// Keys of a tile, and those of one step of computation.
#define KEYS (HEAD_DIM <= 80 ? 64 : HEAD_DIM <= 176 ? 32 : 16)
#define STEP (KEYS < 32 ? KEYS : 32)
// Blocks that are to fit on a multiprocessor: a bound of registers.
#define BLOCKS ((HEAD_DIM <= 64 ? 12 : 8) / WARPS)
constexpr u32 THREADS = 32 * WARPS, WARP_ROWS = 16 * ROW_TILES, QUERIES = WARPS * WARP_ROWS;

// Σ dy y of the two rows of a lane, of which it has the elements of left factors.
DEVICE void deltas_of(float (&delta)[2], const u32 (&dy)[DIM_STEPS][4], const u32 (&y)[DIM_STEPS][4]) {
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        float sum = 0;
#pragma unroll
        for (u32 step = 0; step < DIM_STEPS; step++)
#pragma unroll
            for (u32 i = half; i < 4; i += 2) {
                sum += float_of((u16)dy[step][i]) * float_of((u16)y[step][i]);
                sum += float_of((u16)(dy[step][i] >> 16)) * float_of((u16)(y[step][i] >> 16));
            }
        delta[half] = row_sum(sum);
    }
}

// `starts` and `ends` are [batch, seq_q], if there are any; `y`, `dy` and `dq` are contiguous, and `lse` and
// `delta` are [batch, heads, seq_q].
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    attention_backward_queries(const u16* q, const u16* k, const u16* v, const int* starts, const int* ends,
                               const u16* y, const float* lse, const u16* dy, float* delta, u16* dq,
                               const __grid_constant__ Info info) {
    __shared__ __align__(16) u16 tiles[2][2][KEYS * TILE_STRIDE];
    __shared__ Range ranges[QUERIES];
    __shared__ Range warp_ranges[WARPS];

    const u32 batch = blockIdx.x / info.heads, head = blockIdx.x % info.heads, warp = threadIdx.x / 32;
    const u32 kv_head = head / (info.heads / info.kv_heads);
    // Under a causal mask, the last queries have the most keys: their blocks start first.
    const u32 first_query = (gridDim.y - 1 - blockIdx.y) * QUERIES + warp * WARP_ROWS;
    const Strides strides = contiguous(info.seq_q, info.heads);
    const u16* keys = rows_of(k, info.k, batch, kv_head);
    const u16* values = rows_of(v, info.v, batch, kv_head);

    const u32 row = lane() % WARP_ROWS;
    const Range own = range_of(info, starts, ends, batch, first_query + row);
    const Extent extent = extent_of(own);
    ranges[warp * WARP_ROWS + row] = own;
    warp_ranges[warp] = extent.some;
    __syncthreads();
    Range block = warp_ranges[0];
#pragma unroll
    for (u32 w = 1; w < WARPS; w++)
        block = {min(block.first, warp_ranges[w].first), max(block.last, warp_ranges[w].last)};

    const u32 first_tile = block.first / KEYS, last_tile = block.last / KEYS;
    const auto tile_of = [&](u32 tile, u32 of_values) {
        return shared_address(tiles) + (tile % 2 * 2 + of_values) * (KEYS * ROW_BYTES);
    };
    const auto copy = [&](u32 tile) {
        if (tile <= last_tile) {
            copy_tile<KEYS, THREADS>(tile_of(tile, 0), keys, info.k.position, tile * KEYS, info.seq_k);
            copy_tile<KEYS, THREADS>(tile_of(tile, 1), values, info.v.position, tile * KEYS, info.seq_k);
        }
        copy_async_commit();
    };
    copy(first_tile);

    const float factor = score_factor(info);
    u32 queries[ROW_TILES][DIM_STEPS][4], dys[ROW_TILES][DIM_STEPS][4];
    // The log-sum-exps, of base 2.
    float lses[ROW_TILES][2], deltas[ROW_TILES][2];
    float dqs[ROW_TILES][2 * DIM_STEPS][4];
#pragma unroll
    for (u32 m = 0; m < ROW_TILES; m++) {
        const u32 first = first_query + 16 * m;
        load_rows(queries[m], rows_of(q, info.q, batch, head), info.q.position, first, info.seq_q);
        load_rows(dys[m], rows_of(dy, strides, batch, head), strides.position, first, info.seq_q);
        u32 ys[DIM_STEPS][4];
        load_rows(ys, rows_of(y, strides, batch, head), strides.position, first, info.seq_q);
        deltas_of(deltas[m], dys[m], ys);
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const u32 query = first + 8 * half + lane() / 4;
            const u64 at = (u64)blockIdx.x * info.seq_q + query;
            lses[m][half] = query < info.seq_q ? lse[at] * LOG2_E : 0;
            if (lane() % 4 == 0 && query < info.seq_q) delta[at] = deltas[m][half];
        }
#pragma unroll
        for (u32 n = 0; n < 2 * DIM_STEPS; n++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) dqs[m][n][i] = 0;
    }

    for (u32 tile = first_tile; tile <= last_tile; tile++) {
        copy_async_wait<0>();
        // Here all warps have also done the tile before, which is then filled again.
        __syncthreads();
        copy(tile + 1);
#pragma unroll
        for (u32 step = 0; step < KEYS; step += STEP) {
            const int first = tile * KEYS + step, last = first + STEP - 1;
            if (!extent.meets(first, last)) continue;
            const u32 step_keys = tile_of(tile, 0) + step * ROW_BYTES,
                      step_values = tile_of(tile, 1) + step * ROW_BYTES;
            // Scores, then probabilities.
            float p[ROW_TILES][STEP / 8][4], ds[ROW_TILES][STEP / 8][4];
            multiply_rows<ROW_TILES, STEP>(p, queries, step_keys);
            multiply_rows<ROW_TILES, STEP>(ds, dys, step_values);
            u32 factors[ROW_TILES][STEP / 16][4];
#pragma unroll
            for (u32 m = 0; m < ROW_TILES; m++) {
#pragma unroll
                for (u32 n = 0; n < STEP / 8; n++)
#pragma unroll
                    for (u32 i = 0; i < 4; i++) {
                        const float score = score_of(info, p[m][n][i]);
                        p[m][n][i] = exp2_fast(score * factor - lses[m][i / 2]);
                        ds[m][n][i] -= deltas[m][i / 2];
                        if (SOFTCAP) ds[m][n][i] *= 1 - score * score;
                    }
                if (!extent.covers(first, last))
                    mask_rows<STEP>(p[m], ranges + warp * WARP_ROWS + m * 16, first, 0);
#pragma unroll
                for (u32 n = 0; n < STEP / 8; n++)
#pragma unroll
                    for (u32 i = 0; i < 4; i++) ds[m][n][i] *= p[m][n][i];
                pack_factor<STEP>(factors[m], ds[m]);
            }
            add_product<ROW_TILES, STEP>(dqs, factors, step_keys);
        }
    }

    const float scales[2] = {info.scale, info.scale};
#pragma unroll
    for (u32 m = 0; m < ROW_TILES; m++)
        store_rows(rows_of(dq, strides, batch, head), strides.position, first_query + 16 * m, info.seq_q,
                   dqs[m], scales);
}
