// The parts of a tile. The matrix products by groups of four warps exist on Hopper alone (sm_90a), for tiles
// of at least 64 columns; elsewhere each warp has a part.
//
// Macros: TILE_M, TILE_N, TILE_K, a block's part of C and the slab of k that it takes at once (powers of
// two); THREADS.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && TILE_N >= 64
#define BY_GROUPS
#define WARP_M 64
#define WARP_N TILE_N
#define BLOCKS (512 / THREADS)
#elif TILE_N >= 128
#define WARP_M (THREADS == 256 ? 64 : 32)
#define WARP_N (THREADS == 256 ? 32 : 64)
#define BLOCKS (THREADS == 256 ? 2 : 3)
#else
#define WARP_M 16
#define WARP_N 16
#define BLOCKS 5
#endif
