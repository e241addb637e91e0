// The gradients of attention for keys and values, after attention.cu; `delta` is from
// backward_queries.cu.
//
// A block computes KEYS keys of a head, from all queries of all heads that read them. Products are
// transposed, with keys as rows: pᵀ and dsᵀ are left factors as they are, dv = pᵀ dy and dk = scale dsᵀ q.
//
// Grid: (batch * kv_heads, seq_k / KEYS rounded up). Block: THREADS. Macro beyond those of attention.cu: WARPS.

// Queries of a tile, and those of one step of computation.
#define QUERIES (HEAD_DIM <= 64 ? 64 : HEAD_DIM <= 160 ? 32 : 16)
#define STEP (HEAD_DIM <= 64 ? 32 : 16)
// Blocks that are to fit on a multiprocessor: a bound of registers.
#define BLOCKS (8 / WARPS)
constexpr u32 THREADS = 32 * WARPS, KEYS = 16 * WARPS;

// What a tile has of each query beside its rows.
struct Queries {
    // The log-sum-exps of base 2, and delta; zero where there is no query.
    float lse[QUERIES], delta[QUERIES];
    Range ranges[QUERIES];
    // The extents of each 32 queries, or of all if they are fewer.
    Extent extents[(QUERIES + 31) / 32];
};

// `starts` and `ends` are [batch, seq_q], if there are any; `dy`, `dk` and `dv` are contiguous, and `lse` and
// `delta` are [batch, heads, seq_q].
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    attention_backward_keys(const u16* q, const u16* k, const u16* v, const int* starts, const int* ends,
                            const float* lse, const float* delta, const u16* dy, u16* dk, u16* dv,
                            const __grid_constant__ Info info) {
    static_assert(THREADS % QUERIES == 0, "each query of a tile has as many threads");
    static_assert(STEP <= 32 && QUERIES % STEP == 0, "a step has one extent");
    __shared__ __align__(16) u16 tiles[2][2][QUERIES * TILE_STRIDE];
    __shared__ Queries tile_queries[2];

    const u32 batch = blockIdx.x / info.kv_heads, kv_head = blockIdx.x % info.kv_heads,
              warp = threadIdx.x / 32;
    const u32 group = info.heads / info.kv_heads, block_key = blockIdx.y * KEYS;
    const int first_key = block_key + warp * 16, last_key = first_key + 15;
    const Strides strides = contiguous(info.seq_q, info.heads);

    // Under a causal mask, the queries before the first key of the block do not attend to it.
    const u32 cached = info.seq_k - info.seq_q;
    const u32 first_query = info.causal && block_key > cached ? (block_key - cached) / QUERIES * QUERIES : 0;
    // The next tile to copy: of which head of the group, from which query on.
    u32 next_head = kv_head * group, next_query = first_query;
    const u32 tile_count = group * ((info.seq_q - first_query + QUERIES - 1) / QUERIES);
    const auto tile_of = [&](u32 tile, u32 of_dy) {
        return shared_address(tiles) + (tile % 2 * 2 + of_dy) * (QUERIES * ROW_BYTES);
    };
    // What a thread loads of a query of the tile, to be stored when the loads are done; several threads may
    // have the same query, and store the same.
    const u32 own_query = threadIdx.x % QUERIES;
    float next_lse, next_delta;
    Range next_range;
    const auto copy = [&](u32 tile) {
        if (tile < tile_count) {
            copy_tile<QUERIES, THREADS>(tile_of(tile, 0), rows_of(q, info.q, batch, next_head),
                                        info.q.position, next_query, info.seq_q);
            copy_tile<QUERIES, THREADS>(tile_of(tile, 1), rows_of(dy, strides, batch, next_head),
                                        strides.position, next_query, info.seq_q);
            const u32 query = next_query + own_query;
            const u64 at = ((u64)batch * info.heads + next_head) * info.seq_q + query;
            next_lse = query < info.seq_q ? lse[at] * LOG2_E : 0;
            next_delta = query < info.seq_q ? delta[at] : 0;
            next_range = range_of(info, starts, ends, batch, query);
            next_query += QUERIES;
            if (next_query >= info.seq_q) {
                next_query = first_query;
                next_head++;
            }
        }
        copy_async_commit();
    };
    const auto store = [&](u32 tile) {
        if (tile < tile_count) {
            Queries& queries = tile_queries[tile % 2];
            queries.lse[own_query] = next_lse;
            queries.delta[own_query] = next_delta;
            queries.ranges[own_query] = next_range;
            queries.extents[own_query / 32] = extent_of(next_range);
        }
    };
    copy(0);
    store(0);

    const float factor = score_factor(info);
    // Keys and values, and their gradients.
    u32 keys[1][DIM_STEPS][4], values[1][DIM_STEPS][4];
    load_rows(keys[0], rows_of(k, info.k, batch, kv_head), info.k.position, first_key, info.seq_k);
    load_rows(values[0], rows_of(v, info.v, batch, kv_head), info.v.position, first_key, info.seq_k);
    float dks[1][2 * DIM_STEPS][4], dvs[1][2 * DIM_STEPS][4];
#pragma unroll
    for (u32 n = 0; n < 2 * DIM_STEPS; n++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) dks[0][n][i] = dvs[0][n][i] = 0;

    for (u32 tile = 0; tile < tile_count; tile++) {
        copy_async_wait<0>();
        // Here all warps have also done the tile before, which is then filled again.
        __syncthreads();
        copy(tile + 1);
        const Queries& queries = tile_queries[tile % 2];
#pragma unroll
        for (u32 step = 0; step < QUERIES; step += STEP) {
            const Extent extent = queries.extents[step / 32];
            if (!extent.meets(first_key, last_key)) continue;
            const u32 step_q = tile_of(tile, 0) + step * ROW_BYTES,
                      step_dy = tile_of(tile, 1) + step * ROW_BYTES;
            // Scores, then probabilities.
            float p[1][STEP / 8][4], ds[1][STEP / 8][4];
            multiply_rows<1, STEP>(p, keys, step_q);
            multiply_rows<1, STEP>(ds, values, step_dy);
#pragma unroll
            for (u32 n = 0; n < STEP / 8; n++)
#pragma unroll
                for (u32 column = 0; column < 2; column++) {
                    const u32 query = step + n * 8 + lane() % 4 * 2 + column;
                    const float query_lse = queries.lse[query], query_delta = queries.delta[query];
#pragma unroll
                    for (u32 i = column; i < 4; i += 2) {
                        const float score = score_of(info, p[0][n][i]);
                        p[0][n][i] = exp2_fast(score * factor - query_lse);
                        ds[0][n][i] -= query_delta;
                        if (SOFTCAP) ds[0][n][i] *= 1 - score * score;
                    }
                }
            if (!extent.covers(first_key, last_key)) {
#pragma unroll
                for (u32 n = 0; n < STEP / 8; n++)
#pragma unroll
                    for (u32 i = 0; i < 4; i++) {
                        const Range range = queries.ranges[step + n * 8 + lane() % 4 * 2 + i % 2];
                        const int key = first_key + i / 2 * 8 + lane() / 4;
                        if (key < range.first || key > range.last) p[0][n][i] = 0;
                    }
            }
#pragma unroll
            for (u32 n = 0; n < STEP / 8; n++)
#pragma unroll
                for (u32 i = 0; i < 4; i++) ds[0][n][i] *= p[0][n][i];
            u32 factors[1][STEP / 16][4];
            pack_factor<STEP>(factors[0], p[0]);
            add_product<1, STEP>(dvs, factors, step_dy);
            pack_factor<STEP>(factors[0], ds[0]);
            add_product<1, STEP>(dks, factors, step_q);
        }
        store(tile + 1);
    }

    const Strides results = contiguous(info.seq_k, info.kv_heads);
    const float scales[2] = {info.scale, info.scale}, ones[2] = {1, 1};
    store_rows(rows_of(dk, results, batch, kv_head), results.position, first_key, info.seq_k, dks[0], scales);
    store_rows(rows_of(dv, results, batch, kv_head), results.position, first_key, info.seq_k, dvs[0], ones);
}
