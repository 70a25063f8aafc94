// Per-token int8 quantization: one block per token. Compiled with VECTORS (16-byte loads a thread), FP16, CHAINED
// and FOLDED, with which the sum of a token's codes is written too, behind the scales of all.
//
// The codes are laid out so that the linear kernel copies a tile in one piece: [k / 128][tokens8][128 bytes], where the
// eight 16-byte chunks of a token's 128 bytes stand in the order chunk ^ (token % 8), the tensor core's 128-byte swizzle.

extern "C" __global__ void __launch_bounds__(1024, 1)
quantize_tokens(const unsigned short* x, char* codes, float* scales, int tokens8, int k, int k_padded) {
    let_dependents_start();
    const int token = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const unsigned maxima = shared_base();

    Words values[VECTORS];
    unsigned top = 0;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        const int at = (v * blockDim.x + threadIdx.x) * 8;
        values[v] = Words{0, 0, 0, 0};
        if (at < k) values[v] = *(const Words*)(x + (long long)token * k + at);
        top = max_halves(top, largest_half(values[v]));
    }
    top = max_over_warp(larger_half(top));
    if (lane == 0) store_shared_word(maxima + 4 * warp, top);
    __syncthreads();
    top = max_over_warp(lane < warps ? load_shared_word(maxima + 4 * lane) : 0);

    const Grid grid = grid_of(top);
    if (threadIdx.x == 0) scales[token] = grid.scale;

    int sum = 0;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        const int at = (v * blockDim.x + threadIdx.x) * 8;
        if (at >= k_padded) continue;
        const Codes out = codes_of(values[v], grid);
        if (FOLDED) sum = add_bytes(out.first, add_bytes(out.second, sum));
        char* line = codes + ((long long)(at / 128) * tokens8 + token) * 128;
#if CHAINED
        *(unsigned*)(line + swizzled(place_of(at, 0), token)) = out.first;
        *(unsigned*)(line + swizzled(place_of(at, 1), token)) = out.second;
#else
        *(unsigned long long*)(line + swizzled(place_of(at, 0), token)) =
            (unsigned long long)out.second << 32 | out.first;
#endif
    }
#if FOLDED
    const unsigned sums = maxima + 128;
    sum = sum_over_warp(sum);
    if (lane == 0) store_shared_word(sums + 4 * warp, sum);
    __syncthreads();
    if (warp == 0) {
        sum = sum_over_warp(lane < warps ? load_shared_word(sums + 4 * lane) : 0);
        if (lane == 0) ((int*)scales)[tokens8 + token] = sum;
    }
#endif
}
