#ifndef BY_GROUPS
// The product with mma.sync, for any GPU with cp.async (8.0 or newer); see tile.cu. Each warp has WARP_M by
// WARP_N of the tile, powers of two of at least 16, and TILE_K is at least 32.
#define FRAGMENTS_M (WARP_M / 16)
#define FRAGMENTS_N (WARP_N / 8)
#define STEPS (TILE_K / 16)
#ifdef BF16
#define mma mma_bf16
#else
#define mma mma_f16
#endif

// A lane's part of reading fragments of 16 of the span by 16 of k from tiles, in the order in which mma takes
// them: those of A with their four 8x8 matrices rows first, those of B (two of 8 columns) k first.
template <bool IS_A, bool ALONG_K, u32 SPAN>
struct Reader {
    typedef Tile<ALONG_K, SPAN> T;
    u32 first; // where this lane reads its row of the warp's first fragment

    __device__ __forceinline__ void begin(u32 warp_first) {
        const u32 lane = threadIdx.x % 32;
        const bool tile_rows_first = IS_A == ALONG_K;
        const u32 row = tile_rows_first ? lane % 16 : lane / 16 * 8 + lane % 8;
        const u32 chunk = tile_rows_first ? lane / 16 : lane / 8 % 2;
        first = T::place(row + (ALONG_K ? warp_first : 0), chunk + (ALONG_K ? 0 : warp_first / 8));
    }
    // Reads the fragment at of_span, from the warp's first, and step * 16. Both are known when compiled, and
    // the bits of its chunk's number are not those of the lane's or the warp's: so xor adds, and is permuted
    // as they are.
    __device__ __forceinline__ void read(u32 (&r)[4], u32 tile, u32 of_span, u32 step) const {
        const u32 row = ALONG_K ? of_span : step * 16;
        const u32 chunk = ALONG_K ? step * 2 : of_span / 8;
        const u32 at =
            tile + (first ^ (chunk % T::LINE * 16)) + chunk / T::LINE * T::PANEL_BYTES + row * T::LINE * 16;
        if (ALONG_K)
            load_matrices_at(r, at);
        else
            load_matrices_transposed_at(r, at);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    product(const u16* a, const u16* b, Output* c, const __grid_constant__ Info info) {
    static_assert(THREADS == TILE_M / WARP_M * (TILE_N / WARP_N) * 32, "a warp for each part of the tile");
    static_assert(TILE_K % 32 == 0, "fragments alternate between two sets of registers, over slabs too");
    static_assert(STAGES >= 2, "one slab is copied while another is read");
    __shared__ __align__(128) char stages[STAGES * Slabs::STAGE_BYTES];
    const u32 warp = threadIdx.x / 32;
    const u32 warp_m = warp % (TILE_M / WARP_M) * WARP_M;
    const u32 warp_n = warp / (TILE_M / WARP_M) * WARP_N;
    const Work work = work_of_block(info);
    Slabs slabs;
    slabs.begin(a, b, shared_address(stages), work, info);
    Reader<true, A_ALONG_K, TILE_M> reader_a;
    Reader<false, B_ALONG_K, TILE_N> reader_b;
    reader_a.begin(warp_m);
    reader_b.begin(warp_n);

    u32 a_parts[2][FRAGMENTS_M][4], b_parts[2][FRAGMENTS_N / 2][4];
    auto read_step = [&](u32 stage, u32 step, u32 set) {
        const u32 tile_a = slabs.shared + stage * Slabs::STAGE_BYTES;
#pragma unroll
        for (u32 i = 0; i < FRAGMENTS_M; i++) reader_a.read(a_parts[set][i], tile_a, i * 16, step);
#pragma unroll
        for (u32 j = 0; j < FRAGMENTS_N / 2; j++)
            reader_b.read(b_parts[set][j], tile_a + TileA::BYTES, j * 16, step);
    };

    float sums[FRAGMENTS_M][FRAGMENTS_N][4] = {};
#pragma unroll
    for (u32 stage = 0; stage < STAGES - 1; stage++) slabs.copy_next(stage);
    copy_async_wait<STAGES - 2>();
    __syncthreads();
    read_step(0, 0, 0);

    u32 stage = 0, free_stage = STAGES - 1;
    for (u32 slab = 0; slab < work.slabs; slab++) {
        // The stage of the slab before: all warps have read it, since they did so before the last barrier.
        slabs.copy_next(free_stage);
        free_stage = stage;
        const u32 next_stage = stage + 1 == STAGES ? 0 : stage + 1;
#pragma unroll
        for (u32 step = 0; step < STEPS; step++) {
            // Reads the fragments of the next step, at the end those of the next slab (after the last one:
            // unused ones).
            if (step + 1 < STEPS) {
                read_step(stage, step + 1, (step + 1) % 2);
            } else {
                copy_async_wait<STAGES - 2>();
                __syncthreads();
                read_step(next_stage, 0, 0);
            }
#pragma unroll
            for (u32 i = 0; i < FRAGMENTS_M; i++)
#pragma unroll
                for (u32 j = 0; j < FRAGMENTS_N; j++) {
                    const u32* part = b_parts[step % 2][j / 2] + j % 2 * 2;
                    mma(sums[i][j], a_parts[step % 2][i], part[0], part[1]);
                }
        }
        stage = next_stage;
    }

    const u32 row = work.row + warp_m, column = work.column + warp_n;
    if (row >= info.m || column >= info.n) return;
    store<16>(sums, c + ((u64)blockIdx.z * info.m + row) * info.ldc + column, info.ldc, info.m - row,
              info.n - column);
}
#endif
