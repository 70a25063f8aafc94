// From a tile's sums to outputs: of one block, of a cluster that shared the inputs, and of a stream's parts.

#if GROUPED
using Sum = float;
__device__ __forceinline__ unsigned bits_of(Sum v) { return __float_as_uint(v); }
__device__ __forceinline__ Sum sum_of(unsigned v) { return __uint_as_float(v); }
#else
using Sum = int;
__device__ __forceinline__ unsigned bits_of(Sum v) { return v; }
__device__ __forceinline__ Sum sum_of(unsigned v) { return v; }
#endif

struct Pair { float x, y; };
struct Counts { int x, y; };

// The scales of the thread's two tokens of the eight that start at `token`.
__device__ __forceinline__ Pair token_scales_at(const Problem& p, unsigned base, int token, int lane) {
    if (token >= p.tokens) return Pair{0.0f, 0.0f};
    if (!SHARE) return *(const Pair*)(p.token_scales + token + 2 * (lane % 4));
    const unsigned at = base + TOKEN_SCALES_AT + 4 * (token + 2 * (lane % 4));
    return Pair{__uint_as_float(load_shared_word(at)), __uint_as_float(load_shared_word(at + 4))};
}

// Likewise the sums of their codes: of all inputs, or with SHARE of this rank's.
__device__ __forceinline__ Counts token_sums_at(const Problem& p, unsigned base, int token, int lane) {
    if (token >= p.tokens) return Counts{0, 0};
    if (!SHARE) return *(const Counts*)((const int*)p.token_scales + p.tokens8 + token + 2 * (lane % 4));
    const unsigned at = base + TOKEN_SUMS_AT + 4 * (token + 2 * (lane % 4));
    return Counts{(int)load_shared_word(at), (int)load_shared_word(at + 4)};
}

// FOLDED: operands were 128 more than the weights. Whoever has a tile's first inputs makes up for all of them, or with
// SHARE each rank for its own; sums stay exact, |128 + code * multiple| * 127 * 65536 being less than 2^31.
__device__ __forceinline__ void recentre(const Problem& p, unsigned base, int token, int lane,
                                         Sum (&sums)[HEIGHT][PARTS]) {
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j) {
        const Counts count = token_sums_at(p, base, token + 8 * j, lane);
#pragma unroll
        for (int b = 0; b < HEIGHT; ++b)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[b][4 * j + i] -= 128 * (i % 2 ? count.y : count.x);
    }
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

// Split > 1: every block lays its part over its own stages, [accumulator][thread]; after all have, the blocks take turns
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

