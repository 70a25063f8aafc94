// How a token's floats become int8 codes, shared by the quantizer and by the product that quantizes for itself.
//
// Compiled with FP16 (else bfloat16) and CHAINED (the order of inputs that chained weights want).

struct Grid { float inverse, scale; bool finite; };
struct Codes { unsigned first, second; };  // four codes each, see place_of

// Magnitudes of 16-bit floats order like their bit patterns, with Inf and then NaN on top: one integer maximum does.
__device__ __forceinline__ unsigned largest_half(const Words& v) {  // of the even and of the odd places
    const unsigned mask = 0x7fff7fff;
    return max_halves(max_halves(v.x & mask, v.y & mask), max_halves(v.z & mask, v.w & mask));
}

__device__ __forceinline__ unsigned larger_half(unsigned v) { return v >> 16 > (v & 0xffff) ? v >> 16 : v & 0xffff; }

// The scale of a token whose largest magnitude has the bits `top`, and what its floats are multiplied with.
__device__ __forceinline__ Grid grid_of(unsigned top) {
    const float absmax = widen(top, FP16);
    const bool finite = top < (FP16 ? 0x7c00 : 0x7f80), zero = absmax < 7.888609052210118e-31f;  // 2^-100
    return Grid{finite && !zero ? divide(127.0f, absmax) : 0.0f,
                finite ? (zero ? 0.0f : divide(absmax, 127.0f)) : __uint_as_float(0x7fc00000), finite};
}

// The codes of eight neighbouring inputs: the first and the last four, or with CHAINED the odd and the even ones.
__device__ __forceinline__ Codes codes_of(const Words& v, const Grid& grid) {
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
    unsigned out[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float value = widen(words[i / 2] >> (16 * (i % 2)) & 0xffff, FP16);
        const unsigned code = (grid.finite ? round_to_int(value * grid.inverse) : 0) & 0xff;
        if (CHAINED) out[1 - i % 2] |= code << (8 * (i / 2));
        else out[i / 4] |= code << (8 * (i % 4));
    }
    return Codes{out[0], out[1]};
}

// The byte of a token's 128 where the codes of inputs `at`.. go (at is a multiple of 8; `half` 0: first, 1: second).
// Chained weights take the 32 odd inputs of 64 in one k-step and the 32 even ones in the next.
__device__ __forceinline__ int place_of(int at, int half) {
    return CHAINED ? at % 128 / 64 * 64 + half * 32 + at % 64 / 2 : at % 128 + 4 * half;
}

__device__ __forceinline__ int swizzled(int byte, int token) { return ((byte / 16) ^ (token % 8)) * 16 + byte % 16; }
