// What a launch multiplies, which part of it each worker does, and how a block's shared memory is divided.

constexpr bool LARGE = MIN_BLOCKS == 1;  // a block has the multiprocessor, and its registers, for itself
constexpr int CONSUMERS = 256, THREADS = CONSUMERS + (LARGE ? 128 : 32);
constexpr int RINGS = PINGPONG ? 2 : 1, ALL_STAGES = RINGS * STAGES;
constexpr int ROWS = 128 * BLOCKS, HEIGHT = ROWS / 128 * RINGS;  // HEIGHT: a warpgroup's share of a tile, in 64 rows
constexpr int PARTS = TOKENS / 2;                                // accumulators of a thread for 64 rows
constexpr int CHUNK = 8192 + (FOLDED ? 128 : 0);  // codes of 128 rows x 128 inputs, and with FOLDED a multiple a row

// Shared memory: tokens (of each stage, or with SHARE of all this rank's inputs), weights, scales of groups, barriers.
constexpr int TOKEN_BYTES = TOKENS * 128, WEIGHT_BYTES = BLOCKS * CHUNK, SCALE_BYTES = GROUPED ? ROWS * 4 : 0;
constexpr int WEIGHTS_AT = (SHARE ? SHARE : ALL_STAGES) * TOKEN_BYTES;  // tokens must begin at multiples of 1024
constexpr int SCALES_AT = WEIGHTS_AT + ALL_STAGES * WEIGHT_BYTES, BARRIERS_AT = SCALES_AT + ALL_STAGES * SCALE_BYTES;
constexpr int COUNT_AT = BARRIERS_AT + 16 * ALL_STAGES;  // only with STREAM
constexpr int MAXIMA_AT = BARRIERS_AT + 16 * ALL_STAGES, TOKEN_SCALES_AT = MAXIMA_AT + 4 * TOKENS;  // only with SHARE
constexpr int TOKEN_SUMS_AT = TOKEN_SCALES_AT + 4 * TOKENS;                                         // and FOLDED

struct Problem {
    const char* weight;        // [n / 128][k / 128][CHUNK], fragment order
    const float* scales;       // [n padded], or [groups][n padded]; already divided by 16, but not with FOLDED
    const char* codes;         // [k / 128][tokens8][128 bytes], swizzled; unused with SHARE
    const float* token_scales; // [tokens8], and with FOLDED int [tokens8], sums of codes; unused with SHARE
    const unsigned short* x;   // [tokens][k] with SHARE, else unused
    const unsigned short* bias;  // [n] in the dtype of out, or null
    unsigned short* out;       // [tokens][n]
    int tokens, tokens8;       // tokens8: rounded up to a multiple of 8
    int n, n_padded;           // n_padded: rounded up to a multiple of 128
    int k_blocks;              // blocks of 128 inputs
    int group_blocks;          // k-blocks that share a scale
    int split;                 // blocks of a cluster
    int k;                     // inputs before padding, a multiple of 8; only with SHARE
    unsigned* parts;           // only with STREAM: [blocks][2][accumulators][CONSUMERS]
    unsigned* arrived;         // only with STREAM: [tiles], zeros
};

struct Tile { int row, token; };

// Tiles of up to 16 neighbouring token tiles run together, so that a wave of blocks shares both operands in L2.
__device__ __forceinline__ Tile tile_at(int tile, int row_tiles, int token_tiles) {
    const int band = tile / (16 * row_tiles), first = band * 16;
    const int height = token_tiles - first < 16 ? token_tiles - first : 16, inside = tile - band * 16 * row_tiles;
    return Tile{inside / height * ROWS, (first + inside % height) * TOKENS};
}

// What a worker multiplies, piece by piece: k-blocks first..last-1 of a tile.
#if STREAM
__device__ __forceinline__ int share_begin(int all, int block) { return (long long)all * block / gridDim.x; }
__device__ __forceinline__ int share_of(int all, int k_block) { return ((k_block + 1ll) * gridDim.x - 1) / all; }

struct Walk {
    int tile, first, last, k_blocks, left;
    __device__ __forceinline__ Walk(int k_blocks, int tiles) : k_blocks(k_blocks) {
        const int begin = share_begin(tiles * k_blocks, blockIdx.x);
        left = share_begin(tiles * k_blocks, blockIdx.x + 1) - begin, tile = begin / k_blocks, first = begin % k_blocks;
        last = first + left < k_blocks ? first + left : k_blocks;
    }
    __device__ __forceinline__ bool more() const { return left > 0; }
    __device__ __forceinline__ void next() {
        left -= last - first, ++tile, first = 0, last = left < k_blocks ? left : k_blocks;
    }
};
#else
struct Walk {
    int tile, first, last, stride, tiles;
    __device__ __forceinline__ bool more() const { return tile < tiles; }
    __device__ __forceinline__ void next() { tile += stride; }
};
#endif

