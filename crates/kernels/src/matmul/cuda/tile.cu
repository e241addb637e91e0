// What the kernels of dense matrix products share: C[m, n] = A[m, k] · B[k, n] of 16-bit operands with 32-bit
// sums. It follows shape.cu, and is followed by one kernel, in one source. Chosen by macros:
//   BF16 or F16            the operands' type, and the output's unless
//   OUTPUT_F32             the output is of f32;
//   A_BY_COLUMNS           A is contiguous along m, not along k;
//   B_BY_COLUMNS           B is contiguous along k, not along n;
//   A_UNALIGNED            A is not 16-byte aligned, or lda no multiple of 8: single elements are loaded;
//   B_UNALIGNED            the same of B;
//   STAGES                 slabs in shared memory.
// Grid: x = ceil(m / TILE_M) * ceil(n / TILE_N), y = 1, z = splits of k: split z sums k from z * k_per_split
// and writes the z-th m * ldc elements of C.
#ifdef A_BY_COLUMNS
#define A_ALONG_K false
#else
#define A_ALONG_K true
#endif
#ifdef B_BY_COLUMNS
#define B_ALONG_K true
#else
#define B_ALONG_K false
#endif
#ifdef A_UNALIGNED
#define A_ALIGNED false
#else
#define A_ALIGNED true
#endif
#ifdef B_UNALIGNED
#define B_ALIGNED false
#else
#define B_ALIGNED true
#endif
#ifdef BF16
#define pack pack_bf16
#else
#define pack pack_f16
#endif
#ifdef OUTPUT_F32
typedef float Output;
#else
typedef u16 Output;
#endif
// Whether lanes exchange elements of the output for stores of 16 bytes; pairs of f32 fill sectors of 32 bytes
// anyway.
#if !defined(OUTPUT_F32) && WARP_N % 32 == 0
#define WIDE_STORES
#endif

struct Info {
    u32 m, n, k;
    u32 lda, ldb, ldc; // elements from a row (by columns: from a column) to the next
    u32 k_per_split;   // a multiple of 8; k or more when there is one split
    u32 row_group;     // rows of tiles that blocks go through together, for the reuse of what they read in L2
};

// The tile and the part of k of this block.
struct Work {
    u32 row, column;      // the tile's first element
    u32 k_first, k_count; // the split
    u32 slabs;
};
DEVICE Work work_of_block(const Info& info) {
    const u32 rows_of_tiles = (info.m + TILE_M - 1) / TILE_M;
    const u32 columns_of_tiles = (info.n + TILE_N - 1) / TILE_N;
    const u32 group = blockIdx.x / (info.row_group * columns_of_tiles);
    const u32 in_group = blockIdx.x - group * info.row_group * columns_of_tiles;
    const u32 rows_of_group = min(info.row_group, rows_of_tiles - group * info.row_group);
    Work work;
    work.row = (group * info.row_group + in_group % rows_of_group) * TILE_M;
    work.column = in_group / rows_of_group * TILE_N;
    work.k_first = min(blockIdx.z * info.k_per_split, info.k);
    work.k_count = min(info.k - work.k_first, info.k_per_split);
    work.slabs = (work.k_count + TILE_K - 1) / TILE_K;
    return work;
}

// Copies 8 elements, of which those from `valid` are zeros, one by one.
DEVICE void copy_elements(u32 shared, const u16* source, u32 valid) {
    u32 words[4];
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        const u32 low = 2 * j < valid ? source[2 * j] : 0;
        const u32 high = 2 * j + 1 < valid ? source[2 * j + 1] : 0;
        words[j] = low | high << 16;
    }
    store_shared_16(shared, words[0], words[1], words[2], words[3]);
}

// A tile of one operand: SPAN rows of C (for A) or columns (for B), by TILE_K. Its rows are what is
// contiguous in global memory: those of the span, along k, or one row for each of k, along the span.
template <bool ALONG_K, u32 SPAN>
struct Tile {
    static constexpr u32 ROWS = ALONG_K ? SPAN : TILE_K;
    static constexpr u32 CHUNKS = (ALONG_K ? TILE_K : SPAN) / 8; // of 16 bytes, in a row
    static constexpr u32 LINE = CHUNKS < 8 ? CHUNKS : 8;         // chunks of a row that lie together
    static constexpr u32 PANEL_BYTES = ROWS * LINE * 16;         // a line of each row
    static constexpr u32 BYTES = ROWS * CHUNKS * 16;
    static_assert(CHUNKS >= 2 && (CHUNKS & (CHUNKS - 1)) == 0, "chunks in a row: a power of two");

    // The place of a chunk in bytes. The chunks of 8 successive rows, from one column of chunks, lie in
    // different banks; those of a line are permuted among themselves. These are also the layouts that wgmma
    // calls swizzled.
    static __device__ __forceinline__ u32 place(u32 row, u32 chunk) {
        return chunk / LINE * PANEL_BYTES + (row * LINE + (chunk % LINE ^ row / (8 / LINE) % LINE)) * 16;
    }
};
typedef Tile<A_ALONG_K, TILE_M> TileA;
typedef Tile<B_ALONG_K, TILE_N> TileB;

// A thread's part of the copying of one operand's slabs, in order, to shared memory.
template <bool ALONG_K, bool ALIGNED, u32 SPAN>
struct Copier {
    typedef Tile<ALONG_K, SPAN> T;
    static constexpr u32 ROWS_AT_ONCE = THREADS / T::CHUNKS;
    static_assert(THREADS % T::CHUNKS == 0, "each thread copies one column of chunks");

    const u16* from; // this thread's first chunk of the next slab
    u32 row, chunk;  // its place in the tile
    u32 span_left;   // rows or columns of C from the tile's first to the last
    u32 stride;      // elements from a row to the next

    // first: the tile's first row or column of C, of `span`.
    __device__ __forceinline__ void begin(const u16* all, u32 leading, u32 first, u32 span, u32 k_first) {
        row = threadIdx.x / T::CHUNKS;
        chunk = threadIdx.x % T::CHUNKS;
        span_left = span - first;
        stride = leading;
        from =
            all + (u64)((ALONG_K ? first : k_first) + row) * stride + (ALONG_K ? k_first : first) + chunk * 8;
    }

    // Copies the next slab, of which k_left are within the split, to `tile`; zeros beyond the edges.
    __device__ __forceinline__ void copy(u32 tile, u32 k_left) {
        const u32 rows_left = ALONG_K ? span_left : k_left;
        const u32 row_left = ALONG_K ? k_left : span_left; // elements of a row
        if (ALIGNED && rows_left >= T::ROWS && row_left >= T::CHUNKS * 8) {
            // The usual case on its own: a number of bytes that is not a constant costs several instructions
            // a copy.
            for_each_row([&](const u16* source, u32 i) {
                copy_async_16_at(tile + T::place(row + i, chunk), source, 16);
            });
        } else {
            const u32 count = row_left > chunk * 8 ? min(row_left - chunk * 8, 8u) : 0;
            for_each_row([&](const u16* source, u32 i) {
                const u32 valid = row + i < rows_left ? count : 0;
                const u32 target = tile + T::place(row + i, chunk);
                if (ALIGNED)
                    copy_async_16_at(target, source, valid * 2);
                else
                    copy_elements(target, source, valid);
            });
        }
        from += ALONG_K ? (u64)TILE_K : (u64)stride * TILE_K;
    }

    // Calls f(source, i) for this thread's chunk of each row row + i of the tile.
    template <typename F>
    __device__ __forceinline__ void for_each_row(const F& f) const {
        const u16* source = from;
#pragma unroll
        for (u32 i = 0; i < T::ROWS; i += ROWS_AT_ONCE, source += (u64)stride * ROWS_AT_ONCE)
            if (T::ROWS % ROWS_AT_ONCE == 0 || row + i < T::ROWS) f(source, i);
    }
};

// Copies slabs of both operands to stages of shared memory: A's tile, then B's.
struct Slabs {
    static constexpr u32 STAGE_BYTES = TileA::BYTES + TileB::BYTES;
    Copier<A_ALONG_K, A_ALIGNED, TILE_M> a;
    Copier<B_ALONG_K, B_ALIGNED, TILE_N> b;
    u32 shared; // the first stage
    u32 k_left; // of the split, from the next slab

    __device__ __forceinline__ void begin(const u16* all_a, const u16* all_b, u32 stages, const Work& work,
                                          const Info& info) {
        a.begin(all_a, info.lda, work.row, info.m, work.k_first);
        b.begin(all_b, info.ldb, work.column, info.n, work.k_first);
        shared = stages;
        k_left = work.k_count;
    }
    // Copies the next slab, if there is one, to a stage; always one group of copies, so that their number
    // tells the slab.
    __device__ __forceinline__ void copy_next(u32 stage) {
        if (k_left > 0) {
            a.copy(shared + stage * STAGE_BYTES, k_left);
            b.copy(shared + stage * STAGE_BYTES + TileA::BYTES, k_left);
            k_left -= min(k_left, (u32)TILE_K);
        }
        copy_async_commit();
    }
};

#ifdef WIDE_STORES
DEVICE u32 exchange(u32 x, int mask) { return __float_as_uint(shuffle_xor(__uint_as_float(x), mask)); }

// Transposes 4x4 words of four lanes: word j of lane q becomes word q of lane j.
DEVICE void transpose_in_quad(u32 (&w)[4]) {
    const u32 lane = threadIdx.x;
#pragma unroll
    for (u32 bit = 1; bit <= 2; bit *= 2) {
        const bool upper = lane & bit;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            if (i & bit) continue;
            const u32 other = exchange(upper ? w[i] : w[i | bit], bit);
            if (upper)
                w[i] = other;
            else
                w[i | bit] = other;
        }
    }
}
#else
// Writes two adjacent elements of a row of C, of which `left` are within it.
DEVICE void store_pair(Output* to, float low, float high, u32 left, bool aligned) {
#ifdef OUTPUT_F32
    if (aligned && left >= 2) {
        *(float2*)to = make_float2(low, high);
        return;
    }
    if (left > 0) to[0] = low;
    if (left > 1) to[1] = high;
#else
    const u32 both = pack(low, high);
    if (aligned && left >= 2) {
        *(u32*)to = both;
        return;
    }
    if (left > 0) to[0] = (u16)both;
    if (left > 1) to[1] = (u16)(both >> 16);
#endif
}
#endif

// Writes a warp's part of C, ROWS fragments of 16 rows, ROW_STEP rows apart, by COLUMNS fragments of 8
// columns: `to` is the place of the first element, of which rows_left by columns_left are within C.
template <u32 ROW_STEP, u32 ROWS, u32 COLUMNS>
DEVICE void store(const float (&sums)[ROWS][COLUMNS][4], Output* to, u32 ldc, u32 rows_left,
                  u32 columns_left) {
    const u32 lane = threadIdx.x % 32;
#ifdef WIDE_STORES
    const bool aligned = ldc % 8 == 0 && (u64)to % 16 == 0;
#else
    const bool aligned = ldc % 2 == 0 && (u64)to % (2 * sizeof(Output)) == 0;
#endif
#pragma unroll
    for (u32 i = 0; i < ROWS * 2; i++) {
        const u32 row = i / 2 * ROW_STEP + i % 2 * 8 + lane / 4;
        Output* to_row = to + (u64)row * ldc;
#ifdef WIDE_STORES
        // Four lanes hold a row of a fragment, two elements each: exchanged over four fragments, each lane
        // has 8 of one.
#pragma unroll
        for (u32 j = 0; j < COLUMNS; j += 4) {
            u32 words[4];
#pragma unroll
            for (u32 q = 0; q < 4; q++)
                words[q] = pack(sums[i / 2][j + q][i % 2 * 2], sums[i / 2][j + q][i % 2 * 2 + 1]);
            transpose_in_quad(words);
            const u32 column = (j + lane % 4) * 8;
            if (row >= rows_left || column >= columns_left) continue;
            if (aligned && column + 8 <= columns_left) {
                *(uint4*)(to_row + column) = make_uint4(words[0], words[1], words[2], words[3]);
                continue;
            }
#pragma unroll
            for (u32 e = 0; e < 8; e++)
                if (column + e < columns_left) to_row[column + e] = (u16)(words[e / 2] >> e % 2 * 16);
        }
#else
#pragma unroll
        for (u32 j = 0; j < COLUMNS; j++) {
            const u32 column = j * 8 + lane % 4 * 2;
            if (row >= rows_left || column >= columns_left) continue;
            const float* pair = sums[i / 2][j] + i % 2 * 2;
            store_pair(to_row + column, pair[0], pair[1], columns_left - column, aligned);
        }
#endif
    }
}
