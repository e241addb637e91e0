// The forward pass of attention (Dao 2023, arXiv:2307.08691), after attention.cu.
//
// A block computes QUERIES queries of a head. Keys and values pass through a ring of tiles in shared memory,
// first those of the keys, then the values of the same positions, and so on.
//
// Grid: (batch * heads, seq_q / QUERIES rounded up). Block: THREADS.
//
// Macros beyond those of attention.cu: WARPS; ROW_TILES, the rows of a warp in 16s: with two of them, each load
// from shared memory is used twice.

// Keys of a tile, and the tiles of the ring.
#define KEYS (HEAD_DIM <= 176 ? 64 : 32)
#define SLOTS (HEAD_DIM <= 80 ? 4 : HEAD_DIM <= 112 ? 3 : 2)
// Blocks that are to fit on a multiprocessor: a bound of registers.
#define BLOCKS (8 / WARPS)
constexpr u32 THREADS = 32 * WARPS, WARP_ROWS = 16 * ROW_TILES, QUERIES = WARPS * WARP_ROWS;

// The running softmax of two rows of a lane.
struct Softmax {
    // The greatest result of `score_of` so far, and this lane's part of the sum of the exponentials.
    float most[2], sum[2];
};

// Turns results of `score_of` into exponentials, and shrinks the output to their new base.
DEVICE void update(Softmax& softmax, float (&scores)[KEYS / 8][4], float (&y)[2 * DIM_STEPS][4],
                   float factor) {
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        float most = softmax.most[half];
#pragma unroll
        for (u32 n = 0; n < KEYS / 8; n++)
            most = fmaxf(most, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
        most = fmaxf(most, shuffle_xor(most, 1));
        most = fmaxf(most, shuffle_xor(most, 2));
        // Before a row's first key, all its exponentials are zero whatever the base.
        const float base = most == -INFINITE ? 0 : most * factor;
        const float shrink = exp2_fast(softmax.most[half] * factor - base);
        float sum = softmax.sum[half] * shrink;
#pragma unroll
        for (u32 n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (u32 i = 2 * half; i < 2 * half + 2; i++) {
                scores[n][i] = exp2_fast(scores[n][i] * factor - base);
                sum += scores[n][i];
            }
        softmax.most[half] = most;
        softmax.sum[half] = sum;
#pragma unroll
        for (u32 n = 0; n < 2 * DIM_STEPS; n++) {
            y[n][2 * half] *= shrink;
            y[n][2 * half + 1] *= shrink;
        }
    }
}

// `starts` and `ends` are [batch, seq_q], if there are any; `y` is contiguous, and `lse` is [batch, heads,
// seq_q].
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    attention_forward(const u16* q, const u16* k, const u16* v, const int* starts, const int* ends, u16* y,
                      float* lse, const __grid_constant__ Info info) {
    __shared__ __align__(16) u16 tiles[SLOTS][KEYS * TILE_STRIDE];
    __shared__ Range ranges[QUERIES];
    __shared__ Range warp_ranges[WARPS];

    const u32 batch = blockIdx.x / info.heads, head = blockIdx.x % info.heads, warp = threadIdx.x / 32;
    const u32 kv_head = head / (info.heads / info.kv_heads);
    // Under a causal mask, the last queries have the most keys: their blocks start first.
    const u32 first_query = (gridDim.y - 1 - blockIdx.y) * QUERIES + warp * WARP_ROWS;
    const u16* keys = rows_of(k, info.k, batch, kv_head);
    const u16* values = rows_of(v, info.v, batch, kv_head);

    u32 queries[ROW_TILES][DIM_STEPS][4];
#pragma unroll
    for (u32 m = 0; m < ROW_TILES; m++)
        load_rows(queries[m], rows_of(q, info.q, batch, head), info.q.position, first_query + 16 * m,
                  info.seq_q);

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

    const u32 first_tile = block.first / KEYS, steps = 2 * (block.last / KEYS + 1 - first_tile);
    const u32 ring = shared_address(tiles);
    const auto tile_of = [&](u32 step) { return ring + step % SLOTS * (KEYS * ROW_BYTES); };
    const auto copy = [&](u32 step) {
        const u32 first = (first_tile + step / 2) * KEYS;
        const u32 tile = tile_of(step);
        if (step < steps) {
            if (step % 2 == 0)
                copy_tile<KEYS, THREADS>(tile, keys, info.k.position, first, info.seq_k);
            else
                copy_tile<KEYS, THREADS>(tile, values, info.v.position, first, info.seq_k);
        }
        copy_async_commit();
    };
    // The tile of a step, when all warps have done the step before, whose tile is then filled again.
    const auto await = [&](u32 step) {
        copy_async_wait<SLOTS - 2>();
        __syncthreads();
        copy(step + SLOTS - 1);
        return tile_of(step);
    };
    for (u32 step = 0; step < SLOTS - 1; step++) copy(step);

    const float factor = score_factor(info);
    Softmax softmax[ROW_TILES];
    float outputs[ROW_TILES][2 * DIM_STEPS][4];
#pragma unroll
    for (u32 m = 0; m < ROW_TILES; m++) {
        softmax[m] = {{-INFINITE, -INFINITE}, {0, 0}};
#pragma unroll
        for (u32 n = 0; n < 2 * DIM_STEPS; n++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) outputs[m][n][i] = 0;
    }

    for (u32 step = 0; step < steps; step += 2) {
        const int first = (first_tile + step / 2) * KEYS, last = first + KEYS - 1;
        // A warp without a query for a tile only copies it.
        const bool is_met = extent.meets(first, last);
        u32 p[ROW_TILES][KEYS / 16][4];
        u32 tile = await(step);
        if (is_met) {
            float scores[ROW_TILES][KEYS / 8][4];
            multiply_rows<ROW_TILES, KEYS>(scores, queries, tile);
#pragma unroll
            for (u32 m = 0; m < ROW_TILES; m++) {
#pragma unroll
                for (u32 n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (u32 i = 0; i < 4; i++) scores[m][n][i] = score_of(info, scores[m][n][i]);
                if (!extent.covers(first, last))
                    mask_rows<KEYS>(scores[m], ranges + warp * WARP_ROWS + m * 16, first, -INFINITE);
                update(softmax[m], scores[m], outputs[m], factor);
                pack_factor<KEYS>(p[m], scores[m]);
            }
        }
        tile = await(step + 1);
        if (is_met) add_product<ROW_TILES, KEYS>(outputs, p, tile);
    }

    const Strides strides = contiguous(info.seq_q, info.heads);
#pragma unroll
    for (u32 m = 0; m < ROW_TILES; m++) {
        float shares[2];
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const float sum = row_sum(softmax[m].sum[half]);
            const u32 query = first_query + 16 * m + 8 * half + lane() / 4;
            shares[half] = 1 / sum;
            if (lane() % 4 == 0 && query < info.seq_q)
                lse[(u64)blockIdx.x * info.seq_q + query] =
                    (softmax[m].most[half] * factor + log2_fast(sum)) * LN_2;
        }
        store_rows(rows_of(y, strides, batch, head), strides.position, first_query + 16 * m, info.seq_q,
                   outputs[m], shares);
    }
}
