// Per-token int8 quantization: one block per token. Compiled with VECTORS (16-byte loads a thread) and FP16.
//
// The codes are laid out so that the linear kernel copies a tile in one piece: [k / 128][tokens8][128 bytes], where the
// eight 16-byte chunks of a token's 128 bytes stand in the order chunk ^ (token % 8), the tensor core's 128-byte swizzle.

extern "C" __global__ void __launch_bounds__(1024, 1)
quantize_tokens(const unsigned short* x, char* codes, float* scales, int tokens8, int k, int k_padded) {
    let_dependents_start();
    const int token = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const unsigned maxima = shared_base();

    // Magnitudes of 16-bit floats order like their bit patterns, with Inf and then NaN on top: one integer maximum does.
    Words values[VECTORS];
    unsigned top = 0;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        const int at = (v * blockDim.x + threadIdx.x) * 8;
        values[v] = Words{0, 0, 0, 0};
        if (at < k) values[v] = *(const Words*)(x + (long long)token * k + at);
        top = max_halves(top, max_halves(max_halves(values[v].x & 0x7fff7fff, values[v].y & 0x7fff7fff),
                                         max_halves(values[v].z & 0x7fff7fff, values[v].w & 0x7fff7fff)));
    }
    top = max_over_warp(top >> 16 > (top & 0xffff) ? top >> 16 : top & 0xffff);
    if (lane == 0) store_shared_word(maxima + 4 * warp, top);
    __syncthreads();
    top = max_over_warp(lane < warps ? load_shared_word(maxima + 4 * lane) : 0);

    const float absmax = widen(top, FP16);
    const bool finite = top < (FP16 ? 0x7c00 : 0x7f80), zero = absmax < 7.888609052210118e-31f;  // 2^-100
    const float inverse = finite && !zero ? divide(127.0f, absmax) : 0.0f;
    if (threadIdx.x == 0)
        scales[token] = finite ? (zero ? 0.0f : divide(absmax, 127.0f)) : __uint_as_float(0x7fc00000);

#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        const int at = (v * blockDim.x + threadIdx.x) * 8;
        if (at >= k_padded) continue;
        const unsigned words[4] = {values[v].x, values[v].y, values[v].z, values[v].w};
        unsigned out[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float value = widen(words[i / 2] >> (16 * (i % 2)) & 0xffff, FP16);
            const int code = finite ? round_to_int(value * inverse) : 0;
            out[i / 4] |= (unsigned)(code & 0xff) << (8 * (i % 4));
        }
        const long long target =
            ((long long)(at / 128) * tokens8 + token) * 128 + ((at % 128 / 16) ^ (token % 8)) * 16 + at % 16;
        *(unsigned long long*)(codes + target) = (unsigned long long)out[1] << 32 | out[0];
    }
}
