// The end of a product with few rows: sums over the warps of a block. SPLIT is 1 if there are several splits
// of the inputs, each with its own sums, [n_splits, rows, d_out] of f32, else 0.

#if SPLIT
typedef float Output;
DEVICE Output output_of(float v) { return v; }
#else
typedef XStored Output;
DEVICE Output output_of(float v) { return XFloat::store(v); }
#endif

// Writes y, or the sums of a split. `sums` are those of each warp, [N_WARPS, ROWS, WIDTH].
template <u32 WIDTH, u32 N_WARPS>
DEVICE void finish(const float* sums, Output* y, const Info& info) {
    constexpr u32 N = ROWS * WIDTH;
    const u32 first_column = blockIdx.x * WIDTH, first_row = blockIdx.z * ROWS;
    __syncthreads();
    for (u32 t = threadIdx.x; t < N; t += THREADS) {
        const u32 row = first_row + t / WIDTH, column = first_column + t % WIDTH;
        if (row >= info.rows || column >= info.d_out) continue;
        float total = sums[t];
#pragma unroll
        for (u32 w = 1; w < N_WARPS; w++) total += sums[w * N + t];
        y[((u64)blockIdx.y * info.rows + row) * info.d_out + column] = output_of(total);
    }
}
