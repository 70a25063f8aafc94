// out[token, n] = a[token] * sum_k codes[token, k] * weight[n, k] * scale[n or group] + bias[n], int8 x int4, for Hopper.
//
// The product is computed transposed. Weights are the left operand, which wgmma takes from registers, so the unpacked
// nibbles never go back to shared memory; tokens are the right operand, so few tokens waste little of the tensor core.
//
//     producer warp                  consumer warpgroups (0-3, 4-7): 64 * BLOCKS weight rows each
//     bulk copies into a ring  --->  16-byte loads -> 1 to 5 operations per 8 weights -> wgmma m64nTOKENSk32
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
// FOLDED (a group's multiple makes int8 of its codes, and one int32 sum runs over all groups; without GROUPED), SHARE
// (most k-blocks of a rank, or 0 for tokens that are quantized already), PINGPONG (with split, BLOCKS and MIN_BLOCKS 1
// only), STREAM (with split 1, without SHARE and PINGPONG). The wrapper `wgmma` is generated for TOKENS and FOLDED.
//
// Before this text stand problem.cuh (the constants, and who does what), unpack.cuh and finish.cuh (sums to outputs).

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
        copy_to_shared(base + WEIGHTS_AT + stage * WEIGHT_BYTES + b * CHUNK,
                       p.weight + ((long long)(tile.row / 128 + b) * p.k_blocks + k_block) * CHUNK, CHUNK, full);
    if (GROUPED)
        copy_to_shared(base + SCALES_AT + stage * SCALE_BYTES,
                       p.scales + (long long)(k_block / p.group_blocks) * p.n_padded + tile.row, SCALE_BYTES, full);
}

__device__ __forceinline__ void load_tokens(const Problem& p, unsigned base, int stage, Tile tile, int k_block) {
    const int rows8 = p.tokens8 - tile.token < TOKENS ? p.tokens8 - tile.token : TOKENS;
    copy_to_shared(base + stage * TOKEN_BYTES, p.codes + ((long long)k_block * p.tokens8 + tile.token) * 128,
                   rows8 * 128, full_barrier(base, stage));
}

// Shared-memory descriptor of the right operand: K-major, 128-byte swizzle, 1024 bytes from one group of 8 tokens to the next.
__device__ __forceinline__ unsigned long long descriptor(unsigned address) {
    return (unsigned long long)((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
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
// Quantize this rank's inputs of all tokens into shared memory: one warp a token, its floats in registers meanwhile.
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
        int sum = 0;
        if (lane == 0) store_shared_word(base + TOKEN_SCALES_AT + 4 * token, __float_as_uint(grid.scale));
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            const int at = (v * 32 + lane) * 8;
            if (at >= inputs) continue;
            const Codes codes = codes_of(values[t][v], grid);
            const unsigned line = base + at / 128 * TOKEN_BYTES + token * 128;
            store_shared_word(line + swizzled(place_of(at, 0), token), codes.first);
            store_shared_word(line + swizzled(place_of(at, 1), token), codes.second);
            if (FOLDED) sum = add_bytes(codes.first, add_bytes(codes.second, sum));
        }
        if (FOLDED) {
            sum = sum_over_warp(sum);
            if (lane == 0) store_shared_word(base + TOKEN_SUMS_AT + 4 * token, sum);
        }
    }
    shared_writes_fence();  // the products read shared memory through another proxy
    sync_some<1, CONSUMERS>();
}
#endif

// The turn to begin a tile, handed from warpgroup to warpgroup; barrier 2 + g means that it is g's.
__device__ __forceinline__ void turn_await(int group) { sync_pair(2 + group); }
__device__ __forceinline__ void turn_pass(int group) { arrive_pair(3 - group); }

// Multiply one tile's k-blocks; leaves the sums of this thread's rows in `sums`. `block` is the first of the warpgroup's
// HEIGHT blocks of 64 rows. With PINGPONG the turn passes to the other warpgroup at k-block `turn`, if there is such.
__device__ __forceinline__ void multiply(unsigned base, Ring& ring, int k_blocks, int group, int block, int turn,
                                         int warp, int lane, Sum (&sums)[HEIGHT][PARTS]) {
    const int thread = warp * 32 + lane;  // within the warpgroup
    const unsigned chunk = base + WEIGHTS_AT + block / 2 * CHUNK, half = block % 2;  // its rows: of one chunk of 128
    const unsigned mine = half * 4096 + thread * 16, fold_at = 8192 + half * 64 + warp * 16 + lane / 4;
#if GROUPED
    int part[PARTS];
#pragma unroll
    for (int b = 0; b < HEIGHT; ++b)
#pragma unroll
        for (int i = 0; i < PARTS; ++i) sums[b][i] = 0.0f;
    for (int k = 0; k < k_blocks; ++k) {
        if (PINGPONG && k == turn) turn_pass(group);
        const unsigned stage = chunk + ring.stage * WEIGHT_BYTES;
        const unsigned long long tokens = descriptor(base + (SHARE ? k : ring.stage) * TOKEN_BYTES);
        barrier_wait(full_barrier(base, ring.stage), ring.parity);
#pragma unroll
        for (int b = 0; b < HEIGHT; ++b) {
            const Words low = load_shared(stage + mine + b * 4096), high = load_shared(stage + mine + b * 4096 + 2048);
            const unsigned scale_at = base + SCALES_AT + ring.stage * SCALE_BYTES
                + ((block + b) * 64 + warp * 16 + lane / 4) * 4;
            const float scale0 = __uint_as_float(load_shared_word(scale_at));
            const float scale1 = __uint_as_float(load_shared_word(scale_at + 32));
            unsigned a[4][4];
            unpack(low, 0, Fold{}, a[0]);
            unpack(low, 1, Fold{}, a[1]);
            unpack(high, 0, Fold{}, a[2]);
            unpack(high, 1, Fold{}, a[3]);
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
        const unsigned stage = chunk + ring.stage * WEIGHT_BYTES;
        const unsigned long long tokens = descriptor(base + (SHARE ? k : ring.stage) * TOKEN_BYTES);
        Words words[HEIGHT][2];
        Fold folds[HEIGHT];
        barrier_wait(full_barrier(base, ring.stage), ring.parity);
#pragma unroll
        for (int b = 0; b < HEIGHT; ++b) {
            words[b][0] = load_shared(stage + mine + b * 4096);
            words[b][1] = load_shared(stage + mine + b * 4096 + 2048);
            folds[b] = load_fold(stage + fold_at + b * 64);
        }
#pragma unroll
        for (int s = 0; s < 4; ++s) {
#pragma unroll
            for (int b = 0; b < HEIGHT; ++b) unpack(words[b][s / 2], s % 2, folds[b], a[s % 2][b]);
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
            if (FOLDED && (SHARE || walk.first == 0)) recentre(p, base, place.token, lane, sums);
#if STREAM
            if (walk.last - walk.first < p.k_blocks && !complete(p, base, walk, tiles, sums)) continue;
#endif
            if (STREAM || p.split == 1) finish_alone(p, base, place, row, lane, sums);
            else finish_together(p, base, place, rank, row, lane, sums);
        }
    }
}
