// From packed nibbles to the register operand of a product, on each of the three grids.
//
// 16 bytes of a thread hold two k-steps. On the plain and on the chained grid bytes are 16 times the code; with FOLDED they
// are 128 + code * multiple, unsigned, and 128 times a token's sum of codes is taken from each sum later (`recentre`).

#if FOLDED
// Of a thread's two rows: the multiple m, and 128 - 8 m in each byte. A nibble is code + 8, so that one multiply-add of a
// word, nibbles * m + offset modulo 2^32, is 128 + code * m four times: 0..248 for m of -15 to 16, so no byte lends to the next.
struct Fold { unsigned multiple[2], offset[2]; };

__device__ __forceinline__ Fold load_fold(unsigned address) {
    const unsigned upper = int((signed char)load_shared_byte(address)), lower = int((signed char)load_shared_byte(address + 8));
    return Fold{{upper, lower}, {0x80808080u - upper * 0x08080808u, 0x80808080u - lower * 0x08080808u}};
}
#else
struct Fold {};
__device__ __forceinline__ Fold load_fold(unsigned) { return Fold{}; }
#endif

// The register operand of one of the two k-steps: rows lane / 4 in a[0] and a[2], rows 8 further in a[1] and a[3].
__device__ __forceinline__ void unpack(const Words& w, int step, const Fold& fold, unsigned (&a)[4]) {
#if CHAINED
    // A high nibble with the low one under it is the weight itself, and so is the word shifted by one nibble: each
    // weight's grid was moved by the nibble below it when it was rounded. Step 0 costs nothing, step 1 a shift a word.
    a[0] = step ? w.x << 4 : w.x;
    a[1] = step ? w.y << 4 : w.y;
    a[2] = step ? w.z << 4 : w.z;
    a[3] = step ? w.w << 4 : w.w;
#else
    const unsigned word0 = step ? w.z : w.x, word1 = step ? w.w : w.y;
#if FOLDED
    const unsigned nibbles = 0x0f0f0f0fu;
    a[0] = (word0 >> 4 & nibbles) * fold.multiple[0] + fold.offset[0];
    a[1] = (word0 & nibbles) * fold.multiple[1] + fold.offset[1];
    a[2] = (word1 >> 4 & nibbles) * fold.multiple[0] + fold.offset[0];
    a[3] = (word1 & nibbles) * fold.multiple[1] + fold.offset[1];
#else
    // High nibbles become one register's bytes and low nibbles another's; a code's sign bit is then the byte's.
    a[0] = word0 & 0xf0f0f0f0u;
    a[1] = (word0 << 4) & 0xf0f0f0f0u;
    a[2] = word1 & 0xf0f0f0f0u;
    a[3] = (word1 << 4) & 0xf0f0f0f0u;
#endif
#endif
}
