// Every PTX instruction that the kernels use, as a named helper; nothing is included, so NVRTC needs no CUDA headers.
// "shared address" below is a 32-bit address in the shared window; a barrier is an mbarrier at such an address.

extern __shared__ __align__(1024) char dynamic_shared[];

struct Words { unsigned x, y, z, w; };

__device__ __forceinline__ unsigned shared_base() {
    return (unsigned)__cvta_generic_to_shared(dynamic_shared);
}

__device__ __forceinline__ Words load_shared(unsigned address) {  // 16 bytes
    Words v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ unsigned load_shared_word(unsigned address) {
    unsigned v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ unsigned load_shared_byte(unsigned address) {
    unsigned v;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ void store_shared_word(unsigned address, unsigned value) {
    asm volatile("st.shared.u32 [%0], %1;" :: "r"(address), "r"(value) : "memory");
}

// ---- mbarriers: phases alternate 0, 1, 0, ...; wait(b, p) returns once phase p has completed -------------------------

__device__ __forceinline__ void barrier_init(unsigned barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_init_fence() {  // the copy engine sees the initialised barriers
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(unsigned barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(unsigned barrier, unsigned parity) {
    unsigned done = 0;
    while (!done)
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
}

// One bulk copy of `bytes` (a multiple of 16) contiguous bytes; its arrival is counted on `barrier`.
__device__ __forceinline__ void copy_to_shared(unsigned target, const void* source, unsigned bytes, unsigned barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(target), "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(barrier) : "memory");
}

// ---- warpgroup products: registers of an issued product are in use until wait_products says it has ended -------------

__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int pending> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(pending) : "memory");
}

// Makes this thread's plain stores to shared memory visible to products and bulk copies, which read by another way.
__device__ __forceinline__ void shared_writes_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Transpose an 8x8 matrix of 16-bit values held by a warp: lane holds row lane/4, columns 2*(lane%4) and the next.
__device__ __forceinline__ unsigned transpose_8x8(unsigned value) {
    unsigned out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(value));
    return out;
}

// ---- blocks, clusters, grids -----------------------------------------------------------------------------------------

template <int barrier, int threads> __device__ __forceinline__ void sync_some() {
    __syncwarp();  // bar.sync is of whole warps
    asm volatile("bar.sync %0, %1;" :: "n"(barrier), "n"(threads) : "memory");
}

// Two warpgroups at barrier `id`: one waits until the other has come by, which does not wait itself.
__device__ __forceinline__ void sync_pair(int id) {
    __syncwarp();
    asm volatile("bar.sync %0, 256;" :: "r"(id) : "memory");
}
__device__ __forceinline__ void arrive_pair(int id) {
    __syncwarp();
    asm volatile("bar.arrive %0, 256;" :: "r"(id) : "memory");
}

template <int registers> __device__ __forceinline__ void registers_take() {  // by all four warps of a warpgroup
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(registers));
}

template <int registers> __device__ __forceinline__ void registers_give_back() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(registers));
}

__device__ __forceinline__ unsigned cluster_rank() {
    unsigned v;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(v));
    return v;
}

__device__ __forceinline__ void cluster_sync() {  // hardware counts warps here: a warp comes whole
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ unsigned load_peer_word(unsigned address, unsigned rank) {  // same address, other block
    unsigned peer, v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(peer) : "memory");
    return v;
}

// Programmatic dependent launch: a dependent grid may start early; it waits before it reads the first one's results.
__device__ __forceinline__ void let_dependents_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_previous_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- sums that blocks hand to each other through global memory -------------------------------------------------------

__device__ __forceinline__ void store_global_word(unsigned* at, unsigned value) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" :: "l"(__cvta_generic_to_global(at)), "r"(value) : "memory");
}

__device__ __forceinline__ unsigned load_global_word(const unsigned* at) {  // never from L1, which may be stale
    unsigned v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(at)) : "memory");
    return v;
}

// What this thread stored, other blocks see before anything that follows; and it sees what they stored so.
__device__ __forceinline__ void global_fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

__device__ __forceinline__ unsigned count_up(unsigned* at) {  // returns the count before
    unsigned v;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
                 : "=r"(v) : "l"(__cvta_generic_to_global(at)) : "memory");
    return v;
}

// ---- numbers ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ unsigned pack_pair(float low, float high, bool fp16) {  // two 16-bit floats, rounded to even
    unsigned v;
    if (fp16) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}

__device__ __forceinline__ float widen(unsigned bits16, bool fp16) {  // a 16-bit float in the low half of a word
    if (!fp16) return __uint_as_float(bits16 << 16);
    float v;
    asm("{\n.reg .b16 h;\ncvt.u16.u32 h, %1;\ncvt.f32.f16 %0, h;\n}" : "=f"(v) : "r"(bits16));
    return v;
}

__device__ __forceinline__ unsigned max_halves(unsigned a, unsigned b) {  // two unsigned 16-bit maxima
    unsigned v;
    asm("max.u16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
}

__device__ __forceinline__ unsigned max_over_warp(unsigned value) {
    unsigned v;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(v) : "r"(value));
    return v;
}

__device__ __forceinline__ int sum_over_warp(int value) {
    int v;
    asm volatile("redux.sync.add.s32 %0, %1, 0xffffffff;" : "=r"(v) : "r"(value));
    return v;
}

__device__ __forceinline__ int add_bytes(unsigned bytes, int sum) {  // four signed bytes
    int v;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(v) : "r"(bytes), "r"(0x01010101), "r"(sum));
    return v;
}

__device__ __forceinline__ int round_to_int(float x) {  // half to even
    int v;
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(v) : "f"(x));
    return v;
}

__device__ __forceinline__ float divide(float a, float b) {  // correctly rounded
    float v;
    asm("div.rn.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}
