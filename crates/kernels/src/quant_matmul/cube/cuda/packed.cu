// A packed weight: w[i, o] = scales[g, o] * (level(code[i, o]) - zeros[g, o]), g = i / group_size.
//
// Macros:
//   BITS      2, 3, 4 or 8
//   X, GRID   the floats of x and y (of the dense weight) and of scales and zeros: F32, F16 or BF16
//   ZEROS     1 if there are zeros, else 0
//   TABLE     1 if levels are the entries of a table, else 0
//   IN_GROUP  1 if d_in is a whole number of runs (chunks, see few_rows.cu), each in one group, else 0
//   ALIGNED   1 if d_out is a multiple of 4 (the rows of scales and zeros are then read in vectors), else 0

#define F32 0
#define F16 1
#define BF16 2

struct Info {
    u32 d_in, d_out, word_rows, group_size, rows;
    // The chunks of runs in each split of the inputs (see few_rows.cu).
    u32 chunks_per_split;
    // The number subtracted from a code to get its level: 0 or 2^(BITS - 1).
    float center;
};

// The columns in a tile of words.
constexpr u32 TILE = 64;
// A run: the codes between two boundaries of words.
constexpr u32 WORDS = BITS == 3 ? 3 : 1;
constexpr u32 CODES = 32 * WORDS / BITS;
constexpr u32 MASK = (1u << BITS) - 1;
template <int KIND>
struct Float;
template <>
struct Float<F32> {
    typedef float Stored;
    static DEVICE_MEMBER float load(float v) { return v; }
    static DEVICE_MEMBER float store(float v) { return v; }
    // Value k of a register's values.
    static DEVICE_MEMBER float part(u32 v, u32) { return __uint_as_float(v); }
};
template <>
struct Float<F16> {
    typedef u16 Stored;
    static DEVICE_MEMBER float load(u16 v) { return float_of_f16(v); }
    static DEVICE_MEMBER u16 store(float v) { return f16_of(v); }
    static DEVICE_MEMBER float part(u32 v, u32 k) { return float_of_f16((u16)(k ? v >> 16 : v)); }
};
template <>
struct Float<BF16> {
    typedef u16 Stored;
    static DEVICE_MEMBER float load(u16 v) { return float_of_bf16(v); }
    static DEVICE_MEMBER u16 store(float v) { return bf16_of(v); }
    static DEVICE_MEMBER float part(u32 v, u32 k) { return __uint_as_float(k ? v & 0xffff0000u : v << 16); }
};
typedef Float<X> XFloat;
typedef Float<GRID> GridFloat;
typedef XFloat::Stored XStored;
typedef GridFloat::Stored GridStored;

// A run of 4 columns: `of[k]` has word k of each.
struct Run {
    u32 of[WORDS][4];
};

// The first words of the 4 columns from `column`; the next ones are TILE / 4 further on.
DEVICE const uint4* words_of(const uint4* words, u32 column, const Info& info) {
    return words + (u64)(column / TILE) * info.word_rows * (TILE / 4) + column % TILE / 4;
}

// The words of a run; those from `n_words` on, which an incomplete last run lacks, repeat one.
DEVICE void load_run(Run& r, const uint4* words, u32 n_words = WORDS) {
#pragma unroll
    for (u32 k = 0; k < WORDS; k++) {
        uint4 v = load_once(words + min(k, n_words - 1) * (TILE / 4));
        r.of[k][0] = v.x, r.of[k][1] = v.y, r.of[k][2] = v.z, r.of[k][3] = v.w;
    }
}

// Bits from code k on, of column c of a run.
DEVICE u32 bits_from(const Run& r, u32 k, u32 c) {
    u32 word = k * BITS / 32, shift = k * BITS % 32;
    if (shift + BITS <= 32) return r.of[word][c] >> shift;
    return r.of[word][c] >> shift | r.of[word + 1 < WORDS ? word + 1 : word][c] << (32 - shift);
}

#if TABLE
// The level of code k (of column c), k known to the compiler; `center` is that of Info.
DEVICE float level(const Run& r, u32 k, u32 c, const float* table, float) {
    return table[bits_from(r, k, c) & MASK];
}
#else
// The bits of the code become those of the mantissa of a float, where they are if possible: a conversion of
// integers has a fraction of the throughput.
DEVICE float level(const Run& r, u32 k, u32 c, const float*, float center) {
    u32 word = k * BITS / 32, at = k * BITS % 32, bits;
    if (at + BITS <= 23) {
        bits = r.of[word][c];
    } else if (at + BITS <= 32) {
        bits = r.of[word][c] >> 16, at -= 16;
    } else {
        bits = bits_from(r, k, c), at = 0;
    }
    // 2^23 + code * 2^at; the rest is exact.
    float v = __uint_as_float((bits & MASK << at) | 0x4b000000u);
    return __fmaf_rn(v, 1.0f / (1 << at), -(float)(1u << 23 >> at) - center);
}
#endif

// Scales or zeros of 4 columns; those beyond d_out repeat others.
DEVICE void load_grid(float (&v)[4], const GridStored* grid, u32 group, u32 column, const Info& info) {
    const GridStored* row = grid + (u64)group * info.d_out;
#if ALIGNED
    row += min(column, info.d_out - 4);
#if GRID == F32
    uint4 u = load_16(row);
    v[0] = __uint_as_float(u.x), v[1] = __uint_as_float(u.y);
    v[2] = __uint_as_float(u.z), v[3] = __uint_as_float(u.w);
#else
    uint2 u = load_8(row);
    v[0] = GridFloat::part(u.x, 0), v[1] = GridFloat::part(u.x, 1);
    v[2] = GridFloat::part(u.y, 0), v[3] = GridFloat::part(u.y, 1);
#endif
#else
#pragma unroll
    for (u32 c = 0; c < 4; c++) v[c] = GridFloat::load(row[min(column + c, info.d_out - 1)]);
#endif
}

// Zeros of 4 columns; 0 if there are none.
DEVICE void load_zeros(float (&v)[4], const GridStored* zeros, u32 group, u32 column, const Info& info) {
#if ZEROS
    load_grid(v, zeros, group, column, info);
#else
    v[0] = v[1] = v[2] = v[3] = 0.0f;
#endif
}
