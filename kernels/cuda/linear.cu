// out[token, n] = a[token] * sum_k codes[token, k] * weight[n, k] * scale[n or group] + bias[n], int8 x int4, for Hopper.
//
// The product is computed transposed. Weights are the left operand, which wgmma takes from registers, so the unpacked
// nibbles never go back to shared memory; tokens are the right operand, so few tokens waste little of the tensor core.
//
//     producer warp                  consumer warpgroups (0-3, 4-7): 64 * BLOCKS weight rows each
//     bulk copies into a ring  --->  16-byte loads -> 3 logic operations per 8 weights -> wgmma m64nTOKENSk32
//     of STAGES k-blocks of 128      the unpack of one k-step runs while the product of the one before is under way
//
// A tile is 128 * BLOCKS rows x TOKENS tokens. With split = 1 the grid is persistent and walks over tiles. With split > 1
// a cluster of `split` blocks shares the k-blocks of one tile and sums its parts through distributed shared memory in
// rank order, so results are the same in every run and no workspace, flag or atomic operation exists.
//
// With SHARE > 0 tokens come as floats and the launch is the only one: each block quantizes its share of the inputs into
// shared memory, where it stays, while the ring fills with weights; a cluster agrees on the maxima of a token first.
//
// With PINGPONG each consumer warpgroup owns whole tiles of 128 rows, every other one of its block, and has a ring and a
// producer warp of its own. A tile begins when the one before it, the other warpgroup's, is half done:
//
//     warpgroup 0   | products of tile 0        | store | products of tile 2        | store | ...
//     warpgroup 1                 | products of tile 1        | store | products of tile 3        | ...
//
// so one stores, converts a group's sums, or unpacks, while the other's products keep the tensor core busy.
//
// With STREAM the k-blocks of all tiles, one after the other, are dealt out to the grid in equal contiguous shares. A block
// that has a part of a tile lays its sums into a workspace and counts itself in; the one that comes last adds all parts
// in ascending order of inputs. Nobody waits for anybody, and results are the same in every run.
//
// Compile-time numbers: TOKENS (8..256), BLOCKS (1, 2), STAGES (of a ring), GROUPED (a scale per row and k-group, applied
// in fp32), FP16 (else bfloat16), MIN_BLOCKS (resident blocks per multiprocessor), CHAINED (nibbles of the chained grid),
// SHARE (most k-blocks of a rank, or 0 for tokens that are quantized already), PINGPONG (with split, BLOCKS and MIN_BLOCKS
// 1 only), STREAM (with split 1, without SHARE and PINGPONG). The wrapper `wgmma` is generated for TOKENS.

constexpr bool LARGE = MIN_BLOCKS == 1;  // a block has the multiprocessor, and its registers, for itself
constexpr int CONSUMERS = 256, THREADS = CONSUMERS + (LARGE ? 128 : 32);
constexpr int RINGS = PINGPONG ? 2 : 1, ALL_STAGES = RINGS * STAGES;
constexpr int ROWS = 128 * BLOCKS, HEIGHT = ROWS / 128 * RINGS;  // HEIGHT: a warpgroup's share of a tile, in 64 rows
constexpr int PARTS = TOKENS / 2;                                // accumulators of a thread for 64 rows
constexpr int WEIGHT_BYTES = BLOCKS * 8192, TOKEN_BYTES = TOKENS * 128, SCALE_BYTES = GROUPED ? ROWS * 4 : 0;
constexpr int STAGE_BYTES = WEIGHT_BYTES + (SHARE ? 0 : TOKEN_BYTES), CODES_AT = ALL_STAGES * STAGE_BYTES;
constexpr int SCALES_AT = CODES_AT + SHARE * TOKEN_BYTES, BARRIERS_AT = SCALES_AT + ALL_STAGES * SCALE_BYTES;
constexpr int COUNT_AT = BARRIERS_AT + 16 * ALL_STAGES;  // only with STREAM
constexpr int MAXIMA_AT = BARRIERS_AT + 16 * ALL_STAGES, TOKEN_SCALES_AT = MAXIMA_AT + 4 * TOKENS;  // only with SHARE

struct Problem {
    const char* weight;        // [n / 128][k / 128][8192 bytes], fragment order
    const float* scales;       // [n padded] already divided by 16, or [groups][n padded] likewise
    const char* codes;         // [k / 128][tokens8][128 bytes], swizzled; unused with SHARE
    const float* token_scales; // [tokens8]; unused with SHARE
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

// The position in a ring: stage, and the parity of the phase that the next wait on it refers to.
struct Ring {
    int first, stage;
    unsigned parity = 0;
    __device__ __forceinline__ explicit Ring(int number) : first(number * STAGES), stage(first) {}
    __device__ __forceinline__ void advance() {
        if (++stage == first + STAGES) { stage = first; parity ^= 1; }
    }
};

__device__ __forceinline__ unsigned full_barrier(unsigned base, int stage) { return base + BARRIERS_AT + 8 * stage; }
__device__ __forceinline__ unsigned empty_barrier(unsigned base, int stage) {
    return base + BARRIERS_AT + 8 * (ALL_STAGES + stage);
}

__device__ __forceinline__ void load_weights(const Problem& p, unsigned base, int stage, Tile tile, int k_block) {
    const int rows8 = p.tokens8 - tile.token < TOKENS ? p.tokens8 - tile.token : TOKENS;
    const unsigned full = full_barrier(base, stage);
    barrier_arrive_expect(full, WEIGHT_BYTES + SCALE_BYTES + (SHARE ? 0 : rows8 * 128));
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b)
        copy_to_shared(base + stage * STAGE_BYTES + b * 8192,
                       p.weight + ((long long)(tile.row / 128 + b) * p.k_blocks + k_block) * 8192, 8192, full);
    if (GROUPED)
        copy_to_shared(base + SCALES_AT + stage * SCALE_BYTES,
                       p.scales + (long long)(k_block / p.group_blocks) * p.n_padded + tile.row, SCALE_BYTES, full);
}

__device__ __forceinline__ void load_tokens(const Problem& p, unsigned base, int stage, Tile tile, int k_block) {
    const int rows8 = p.tokens8 - tile.token < TOKENS ? p.tokens8 - tile.token : TOKENS;
    copy_to_shared(base + stage * STAGE_BYTES + WEIGHT_BYTES,
                   p.codes + ((long long)k_block * p.tokens8 + tile.token) * 128, rows8 * 128,
                   full_barrier(base, stage));
}

// The register operand of one of the two k-steps that 16 bytes of a thread hold, 16 times the code in each byte.
__device__ __forceinline__ void unpack(const Words& w, int step, unsigned (&a)[4]) {
#if CHAINED
    // A high nibble with the low one under it is the weight itself, and so is the word shifted by one nibble: each
    // weight's grid was moved by the nibble below it when it was rounded. Step 0 costs nothing, step 1 a shift a word.
    a[0] = step ? w.x << 4 : w.x;
    a[1] = step ? w.y << 4 : w.y;
    a[2] = step ? w.z << 4 : w.z;
    a[3] = step ? w.w << 4 : w.w;
#else
    // High nibbles become one register's bytes and low nibbles another's; a code's sign bit is then the byte's.
    const unsigned word0 = step ? w.z : w.x, word1 = step ? w.w : w.y;
    a[0] = word0 & 0xf0f0f0f0u;
    a[1] = (word0 << 4) & 0xf0f0f0f0u;
    a[2] = word1 & 0xf0f0f0f0u;
    a[3] = (word1 << 4) & 0xf0f0f0f0u;
#endif
}

// Shared-memory descriptor of the right operand: K-major, 128-byte swizzle, 1024 bytes from one group of 8 tokens to the next.
__device__ __forceinline__ unsigned long long descriptor(unsigned address) {
    return (unsigned long long)((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

struct Pair { float x, y; };

// The scales of the thread's two tokens of the eight that start at `token`.
__device__ __forceinline__ Pair token_scales_at(const Problem& p, unsigned base, int token, int lane) {
    if (token >= p.tokens) return Pair{0.0f, 0.0f};
    if (!SHARE) return *(const Pair*)(p.token_scales + token + 2 * (lane % 4));
    const unsigned at = base + TOKEN_SCALES_AT + 4 * (token + 2 * (lane % 4));
    return Pair{__uint_as_float(load_shared_word(at)), __uint_as_float(load_shared_word(at + 4))};
}

// Scale, add bias, narrow, and store four accumulators of a thread: rows r and r + 8, tokens t and t + 1.
__device__ __forceinline__ void store_unit(const Problem& p, const float (&sum)[4], Pair a, int row, int token,
                                           int lane, float bias0, float bias1) {
    const unsigned upper = transpose_8x8(pack_pair(sum[0] * a.x + bias0, sum[1] * a.y + bias0, FP16));
    const unsigned lower = transpose_8x8(pack_pair(sum[2] * a.x + bias1, sum[3] * a.y + bias1, FP16));
    const int mine = token + lane / 4, n = row + 2 * (lane % 4);  // after the transposition: two neighbouring outputs
    if (mine >= p.tokens) return;
    unsigned short* at = p.out + (long long)mine * p.n + n;
    if (n < p.n) *(unsigned*)at = upper;
    if (n + 8 < p.n) *(unsigned*)(at + 8) = lower;
}

__device__ __forceinline__ float bias_at(const Problem& p, int n) {
    return p.bias != nullptr && n < p.n ? widen(p.bias[n], FP16) : 0.0f;
}

// Fill a ring with the first tile's weights, which do not wait for the tokens.
__device__ __forceinline__ void prefetch(const Problem& p, unsigned base, Ring ring, int first, int last, Tile start) {
    for (int i = 0; i < last - first && i < STAGES; ++i) load_weights(p, base, ring.first + i, start, first + i);
}

// Load what `prefetch` has left, stage after stage, for all tiles.
__device__ __forceinline__ void produce(const Problem& p, unsigned base, Ring ring, Walk walk, int row_tiles,
                                        int token_tiles) {
    const int first = walk.first, ahead = walk.last - first < STAGES ? walk.last - first : STAGES;
    const Tile start = tile_at(walk.tile, row_tiles, token_tiles);
    if (!SHARE) wait_for_previous_grid();
    for (int i = 0; i < ahead; ++i, ring.advance())
        if (!SHARE) load_tokens(p, base, ring.first + i, start, first + i);
    int k_block = first + ahead;
    bool refill = ahead == STAGES;  // from the second round on a stage must have been emptied
    for (; walk.more(); walk.next(), k_block = walk.first) {
        const Tile place = tile_at(walk.tile, row_tiles, token_tiles);
        for (; k_block < walk.last; ++k_block) {
            if (refill) barrier_wait(empty_barrier(base, ring.stage), ring.parity ^ 1);
            load_weights(p, base, ring.stage, place, k_block);
            if (!SHARE) load_tokens(p, base, ring.stage, place, k_block);
            ring.advance();
            refill = refill || ring.stage == ring.first;
        }
    }
}

#if SHARE
// Quantize this rank's inputs of all tokens into CODES_AT: one warp a token, its floats in registers meanwhile.
__device__ __forceinline__ void quantize_share(const Problem& p, unsigned base, int first, int last, int warp, int lane) {
    constexpr int VECTORS = (SHARE * 16 + 31) / 32, MINE = TOKENS / 8;  // 16-byte loads of a lane; tokens of a warp
    const int inputs = (last - first) * 128, left = p.k - first * 128, present = left < inputs ? left : inputs;
    Words values[MINE][VECTORS];
    unsigned top[MINE];
    wait_for_previous_grid();
#pragma unroll
    for (int t = 0; t < MINE; ++t) {
        const int token = warp + 8 * t;
        const unsigned short* row = p.x + (long long)token * p.k + first * 128;
        top[t] = 0;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            const int at = (v * 32 + lane) * 8;
            values[t][v] = token < p.tokens && at < present ? *(const Words*)(row + at) : Words{0, 0, 0, 0};
        }
    }
#pragma unroll
    for (int t = 0; t < MINE; ++t) {
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) top[t] = max_halves(top[t], largest_half(values[t][v]));
        top[t] = max_over_warp(larger_half(top[t]));
        if (lane == 0) store_shared_word(base + MAXIMA_AT + 4 * (warp + 8 * t), top[t]);
    }
    if (p.split > 1) {
        cluster_sync();  // all ranks have written theirs
#pragma unroll
        for (int t = 0; t < MINE; ++t)
            top[t] = max_over_warp(lane < p.split ? load_peer_word(base + MAXIMA_AT + 4 * (warp + 8 * t), lane) : 0);
    }
#pragma unroll
    for (int t = 0; t < MINE; ++t) {
        const int token = warp + 8 * t;
        const Grid grid = grid_of(top[t]);
        if (lane == 0) store_shared_word(base + TOKEN_SCALES_AT + 4 * token, __float_as_uint(grid.scale));
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            const int at = (v * 32 + lane) * 8;
            if (at >= inputs) continue;
            const Codes codes = codes_of(values[t][v], grid);
            const unsigned line = base + CODES_AT + at / 128 * TOKEN_BYTES + token * 128;
            store_shared_word(line + swizzled(place_of(at, 0), token), codes.first);
            store_shared_word(line + swizzled(place_of(at, 1), token), codes.second);
        }
    }
    shared_writes_fence();  // the products read shared memory through another proxy
    sync_some<1, CONSUMERS>();
}
#endif

#if GROUPED
using Sum = float;
__device__ __forceinline__ unsigned bits_of(Sum v) { return __float_as_uint(v); }
__device__ __forceinline__ Sum sum_of(unsigned v) { return __uint_as_float(v); }
#else
using Sum = int;
__device__ __forceinline__ unsigned bits_of(Sum v) { return v; }
__device__ __forceinline__ Sum sum_of(unsigned v) { return v; }
#endif

// The turn to begin a tile, handed from warpgroup to warpgroup; barrier 2 + g means that it is g's.
__device__ __forceinline__ void turn_await(int group) { sync_pair(2 + group); }
__device__ __forceinline__ void turn_pass(int group) { arrive_pair(3 - group); }

// Multiply one tile's k-blocks; leaves the sums of this thread's rows in `sums`. `block` is the first of the warpgroup's
// HEIGHT blocks of 64 rows. With PINGPONG the turn passes to the other warpgroup at k-block `turn`, if there is such.
__device__ __forceinline__ void multiply(unsigned base, Ring& ring, int k_blocks, int group, int block, int turn,
                                         int warp, int lane, Sum (&sums)[HEIGHT][PARTS]) {
    const int thread = warp * 32 + lane;  // within the warpgroup
    const unsigned mine = block * 4096 + thread * 16;
#if GROUPED
    int part[PARTS];
#pragma unroll
    for (int b = 0; b < HEIGHT; ++b)
#pragma unroll
        for (int i = 0; i < PARTS; ++i) sums[b][i] = 0.0f;
    for (int k = 0; k < k_blocks; ++k) {
        if (PINGPONG && k == turn) turn_pass(group);
        const unsigned stage = base + ring.stage * STAGE_BYTES;
        const unsigned long long tokens = descriptor(SHARE ? base + CODES_AT + k * TOKEN_BYTES : stage + WEIGHT_BYTES);
        barrier_wait(full_barrier(base, ring.stage), ring.parity);
#pragma unroll
        for (int b = 0; b < HEIGHT; ++b) {
            const Words low = load_shared(stage + mine + b * 4096), high = load_shared(stage + mine + b * 4096 + 2048);
            const unsigned scale_at = base + SCALES_AT + ring.stage * SCALE_BYTES
                + ((block + b) * 64 + warp * 16 + lane / 4) * 4;
            const float scale0 = __uint_as_float(load_shared_word(scale_at));
            const float scale1 = __uint_as_float(load_shared_word(scale_at + 32));
            unsigned a[4][4];
            unpack(low, 0, a[0]);
            unpack(low, 1, a[1]);
            unpack(high, 0, a[2]);
            unpack(high, 1, a[3]);
            products_fence();
#pragma unroll
            for (int s = 0; s < 4; ++s) wgmma(part, a[s], tokens + 2 * s, s > 0);
            products_commit();
            products_wait<0>();
            if (b == HEIGHT - 1 && lane == 0) barrier_arrive(empty_barrier(base, ring.stage));
#pragma unroll
            for (int i = 0; i < PARTS; ++i)
                sums[b][i] = fmaf((float)part[i], i / 2 % 2 ? scale1 : scale0, sums[b][i]);  // |part| < 2^21: exact
        }
        ring.advance();
    }
#else
    unsigned a[2][HEIGHT][4];  // two k-steps: one feeds the product under way while the other is unpacked
    int previous = -1;         // the stage whose last product may still be under way
    for (int k = 0; k < k_blocks; ++k) {
        if (PINGPONG && k == turn) turn_pass(group);
        const unsigned stage = base + ring.stage * STAGE_BYTES;
        const unsigned long long tokens = descriptor(SHARE ? base + CODES_AT + k * TOKEN_BYTES : stage + WEIGHT_BYTES);
        Words words[HEIGHT][2];
        barrier_wait(full_barrier(base, ring.stage), ring.parity);
#pragma unroll
        for (int b = 0; b < HEIGHT; ++b) {
            words[b][0] = load_shared(stage + mine + b * 4096);
            words[b][1] = load_shared(stage + mine + b * 4096 + 2048);
        }
#pragma unroll
        for (int s = 0; s < 4; ++s) {
#pragma unroll
            for (int b = 0; b < HEIGHT; ++b) unpack(words[b][s / 2], s % 2, a[s % 2][b]);
#pragma unroll
            for (int b = 0; b < HEIGHT; ++b) {
                products_fence();  // one a product, or the assembler inserts it and may wait after every product
                wgmma(sums[b], a[s % 2][b], tokens + 2 * s, k > 0 || s > 0);
                products_commit();
            }
            products_wait<HEIGHT>();  // the step before has ended: its registers, and at s = 0 its stage, are free
            if (s == 0 && previous >= 0 && lane == 0) barrier_arrive(empty_barrier(base, previous));
        }
        previous = ring.stage;
        ring.advance();
    }
    products_wait<0>();
    if (lane == 0) barrier_arrive(empty_barrier(base, previous));
#endif
}

// Split = 1: the sums are complete; scale and store them from registers.
__device__ __forceinline__ void finish_alone(const Problem& p, unsigned base, Tile tile, int row, int lane,
                                             const Sum (&sums)[HEIGHT][PARTS]) {
    constexpr int AT_ONCE = TOKENS > 128 ? TOKENS / 16 : TOKENS / 8;
#pragma unroll
    for (int first = 0; first < TOKENS / 8; first += AT_ONCE) {
        Pair a[AT_ONCE];  // these loads go out before the first store, which the compiler must take for an alias
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) a[j] = token_scales_at(p, base, tile.token + 8 * (first + j), lane);
#pragma unroll
        for (int b = 0; b < HEIGHT; ++b) {
            const int r = tile.row + row + b * 64, mine = r + lane / 4;
            const float scale0 = GROUPED ? 1.0f : p.scales[mine], scale1 = GROUPED ? 1.0f : p.scales[mine + 8];
            const float bias0 = bias_at(p, mine), bias1 = bias_at(p, mine + 8);
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
                const int token = tile.token + 8 * (first + j);
                if (token >= p.tokens) break;
                const Sum(&s)[PARTS] = sums[b];
                const int i = 4 * (first + j);
                const float sum[4] = {s[i] * scale0, s[i + 1] * scale0, s[i + 2] * scale1, s[i + 3] * scale1};
                store_unit(p, sum, a[j], r, token, lane, bias0, bias1);
            }
        }
    }
}

// Split > 1: every block lays its part into its own stages, [accumulator][thread]; after all have, the blocks take turns
// over units of 8 tokens x 64 rows, add the parts of all ranks in rank order, scale and store.
__device__ __forceinline__ void finish_together(const Problem& p, unsigned base, Tile tile, int rank, int row, int lane,
                                                const Sum (&sums)[HEIGHT][PARTS]) {
    sync_some<1, CONSUMERS>();  // both warpgroups have read their last stage
#pragma unroll
    for (int b = 0; b < HEIGHT; ++b)
#pragma unroll
        for (int i = 0; i < PARTS; ++i)
            store_shared_word(base + ((b * PARTS + i) * CONSUMERS + threadIdx.x) * 4, bits_of(sums[b][i]));
    cluster_sync();
    for (int unit = rank; unit < HEIGHT * TOKENS / 8; unit += p.split) {
        const int b = unit / (TOKENS / 8), j = unit % (TOKENS / 8), r = tile.row + row + b * 64, mine = r + lane / 4;
        if (tile.token + 8 * j >= p.tokens) continue;
        const float scale0 = GROUPED ? 1.0f : p.scales[mine], scale1 = GROUPED ? 1.0f : p.scales[mine + 8];
        const float bias0 = bias_at(p, mine), bias1 = bias_at(p, mine + 8);
        const Pair a = token_scales_at(p, base, tile.token + 8 * j, lane);
        Sum total[4] = {0, 0, 0, 0};
        for (int peer = 0; peer < p.split; peer += 4) {  // the loads of four peers are under way at once
            Sum part[4][4];
#pragma unroll
            for (int q = 0; q < 4; ++q)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    part[q][i] = peer + q >= p.split ? Sum(0)
                        : sum_of(load_peer_word(base + ((unit * 4 + i) * CONSUMERS + threadIdx.x) * 4, peer + q));
#pragma unroll
            for (int q = 0; q < 4; ++q)
#pragma unroll
                for (int i = 0; i < 4; ++i) total[i] += part[q][i];
        }
        const float sum[4] = {total[0] * scale0, total[1] * scale0, total[2] * scale1, total[3] * scale1};
        store_unit(p, sum, a, r, tile.token + 8 * j, lane, bias0, bias1);
    }
    cluster_sync();  // a block's shared memory must outlive its peers' reads
}

#if STREAM
// Bring the part of a tile that `sums` is into the workspace. True for the block that came last: it has all parts' sums.
__device__ __forceinline__ bool complete(const Problem& p, unsigned base, const Walk& walk, int tiles,
                                         Sum (&sums)[HEIGHT][PARTS]) {
    const int all = tiles * p.k_blocks, head = share_of(all, walk.tile * p.k_blocks);
    const int tail = share_of(all, walk.tile * p.k_blocks + p.k_blocks - 1);
    constexpr int WORDS = HEIGHT * PARTS * CONSUMERS;  // of a block's two parts: a tile's end, and a tile's beginning
    unsigned* const mine = p.parts + (2ll * blockIdx.x + (walk.first == 0)) * WORDS + threadIdx.x;
#pragma unroll
    for (int b = 0; b < HEIGHT; ++b)
#pragma unroll
        for (int i = 0; i < PARTS; ++i) store_global_word(mine + (b * PARTS + i) * CONSUMERS, bits_of(sums[b][i]));
    global_fence();
    sync_some<1, CONSUMERS>();  // this block's part is written
    if (threadIdx.x == 0) store_shared_word(base + COUNT_AT, count_up(p.arrived + walk.tile));
    sync_some<1, CONSUMERS>();  // the count is known
    if (load_shared_word(base + COUNT_AT) != tail - head) return false;
    global_fence();
#pragma unroll
    for (int b = 0; b < HEIGHT; ++b)
#pragma unroll
        for (int i = 0; i < PARTS; ++i) sums[b][i] = 0;
    for (int block = head; block <= tail; ++block) {
        const unsigned* const part = p.parts + (2ll * block + (block == head)) * WORDS + threadIdx.x;
#pragma unroll
        for (int b = 0; b < HEIGHT; ++b)
#pragma unroll
            for (int i = 0; i < PARTS; ++i) sums[b][i] += sum_of(load_global_word(part + (b * PARTS + i) * CONSUMERS));
    }
    return true;
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) w4a8_linear(const Problem p) {
    const unsigned base = shared_base();
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);  // uniform, and known to be
    const int row_tiles = p.n_padded / ROWS, token_tiles = (p.tokens + TOKENS - 1) / TOKENS;
    const int tiles = row_tiles * token_tiles, blocks = gridDim.x / p.split, rank = p.split > 1 ? cluster_rank() : 0;
    const int first = p.k_blocks * rank / p.split, last = p.k_blocks * (rank + 1) / p.split;

    if (threadIdx.x == 0) {
        for (int s = 0; s < ALL_STAGES; ++s) {
            barrier_init(full_barrier(base, s), 1);
            barrier_init(empty_barrier(base, s), CONSUMERS / 32 / RINGS);
        }
        barrier_init_fence();
    }
    __syncthreads();

    if (warp >= CONSUMERS / 32) {
        const int number = PINGPONG ? warp - CONSUMERS / 32 : 0;
#if STREAM
        const Walk walk(p.k_blocks, tiles);
#else
        const Walk walk{(int)blockIdx.x / p.split + number * blocks, first, last, RINGS * blocks, tiles};
#endif
        const bool producer = warp < CONSUMERS / 32 + RINGS && lane == 0 && (!PINGPONG || walk.more());
        const Ring ring(number);
        if (LARGE) registers_give_back<40>();
        if (producer) prefetch(p, base, ring, walk.first, walk.last, tile_at(walk.tile, row_tiles, token_tiles));
        if (SHARE && p.split > 1) cluster_sync();  // the maxima's: all threads of a cluster meet, see quantize_share
        if (producer) produce(p, base, ring, walk, row_tiles, token_tiles);
        if (p.split > 1) {  // and twice in finish_together
            cluster_sync();
            cluster_sync();
        }
    } else {
        if (LARGE) registers_take<232>();
        const int group = warp / 4, block = PINGPONG ? 0 : group * HEIGHT;
        const int row = block * 64 + warp % 4 * 16;  // the warp's first row inside the tile
        const int number = PINGPONG ? group : 0;
        Ring ring(number);
#if SHARE
        quantize_share(p, base, first, last, warp, lane);
#endif
#if STREAM
        Walk walk(p.k_blocks, tiles);
#else
        Walk walk{(int)blockIdx.x / p.split + number * blocks, first, last, RINGS * blocks, tiles};
#endif
        for (; walk.more(); walk.next()) {
            Sum sums[HEIGHT][PARTS];
            if (PINGPONG && walk.tile >= blocks) turn_await(group);  // a block's first tile waits for none
            const int turn = walk.tile + blocks < tiles ? p.k_blocks / 2 : -1;  // and behind its last one none waits
            multiply(base, ring, walk.last - walk.first, group, block, turn, warp % 4, lane, sums);
            if (!SHARE) wait_for_previous_grid();  // the producer has waited; this makes token scales visible here
            const Tile place = tile_at(walk.tile, row_tiles, token_tiles);
#if STREAM
            if (walk.last - walk.first < p.k_blocks && !complete(p, base, walk, tiles, sums)) continue;
#endif
            if (STREAM || p.split == 1) finish_alone(p, base, place, row, lane, sums);
            else finish_together(p, base, place, rank, row, lane, sums);
        }
    }
}
