#ifdef BY_GROUPS
// The product with wgmma (Hopper, sm_90a); see tile.cu. wgmma.cu comes before it too. Each group of four
// warps has WARP_M by TILE_N (= WARP_N) of the tile: WARP_M is a multiple of 64, TILE_N 64 or 128; TILE_K is
// 16, 32 or 64. The products of a slab end before those of the next one begin: with some of both under way, a
// stage would be filled later.
#define BLOCKS_M (WARP_M / 64)
#define STEPS (TILE_K / 16)

// The descriptor of a tile's 16 of k from the first, by the span from `at`, which begins 8 rows' pattern of
// chunks: its address, the distance of panels along the span, that of 8 rows, all in units of 16 bytes, and
// the width of a line.
template <bool ALONG_K, u32 SPAN>
DEVICE u64 describe(u32 at) {
    typedef Tile<ALONG_K, SPAN> T;
    static_assert(!ALONG_K || T::CHUNKS <= 8, "a row along k is one line");
    static_assert(ALONG_K || T::LINE == 8, "a line along the span is of 64 elements");
    const u64 swizzle = T::LINE == 8 ? 1 : T::LINE == 4 ? 2 : 3;
    return at / 16 % 0x4000 | (u64)(ALONG_K ? 1 : T::PANEL_BYTES / 16) << 16 | (u64)(8 * T::LINE) << 32 |
           swizzle << 62;
}
// What a descriptor of the tile is more by when it begins `span` (a multiple of 64) and `step` times 16 of k
// later.
template <bool ALONG_K, u32 SPAN>
DEVICE u64 advance(u32 span, u32 step) {
    typedef Tile<ALONG_K, SPAN> T;
    return ALONG_K ? span * T::LINE + step * 2 : span / 64 * (T::PANEL_BYTES / 16) + step * 16 * T::LINE;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    product(const u16* a, const u16* b, Output* c, const __grid_constant__ Info info) {
    static_assert(THREADS == TILE_M / WARP_M * 128 && WARP_N == TILE_N,
                  "four warps for each part of the tile");
    static_assert(STAGES >= 2, "one slab is copied while another is read");
    static_assert(TileA::BYTES % 1024 == 0 && TileB::BYTES % 1024 == 0, "tiles begin a pattern of chunks");
    __shared__ __align__(1024) char stages[STAGES * Slabs::STAGE_BYTES];
    const u32 AHEAD = STAGES - 1; // slabs whose copies are under way while one is read
    const u32 warp_m = threadIdx.x / 128 * WARP_M;
    const Work work = work_of_block(info);
    Slabs slabs;
    slabs.begin(a, b, shared_address(stages), work, info);

    float sums[BLOCKS_M][TILE_N / 8][4] = {};
#pragma unroll
    for (u32 stage = 0; stage < AHEAD; stage++) slabs.copy_next(stage);

    u32 stage = 0, free_stage = AHEAD;
    for (u32 slab = 0; slab < work.slabs; slab++) {
        copy_async_wait<AHEAD - 1>();
        fence_of_stages();
        __syncthreads();
        const u32 tile = slabs.shared + stage * Slabs::STAGE_BYTES;
        const u64 tile_a = describe<A_ALONG_K, TILE_M>(tile) + advance<A_ALONG_K, TILE_M>(warp_m, 0);
        const u64 tile_b = describe<B_ALONG_K, TILE_N>(tile + TileA::BYTES);
        multiply_fence();
#pragma unroll
        for (u32 step = 0; step < STEPS; step++)
#pragma unroll
            for (u32 i = 0; i < BLOCKS_M; i++)
                Multiply<TILE_N, !A_ALONG_K, !B_ALONG_K>::add(
                    sums[i], tile_a + advance<A_ALONG_K, TILE_M>(i * 64, step),
                    tile_b + advance<B_ALONG_K, TILE_N>(0, step));
        multiply_commit();
        // Nobody reads the free stage: all waited for the products of its slab before the last barrier.
        slabs.copy_next(free_stage);
        multiply_wait<0>();
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        free_stage = free_stage + 1 == STAGES ? 0 : free_stage + 1;
    }

    const u32 row = work.row + warp_m + threadIdx.x % 128 / 32 * 16;
    if (row >= info.m) return;
    store<64>(sums, c + ((u64)blockIdx.z * info.m + row) * info.ldc + work.column, info.ldc, info.m - row,
              info.n - work.column);
}
#endif
