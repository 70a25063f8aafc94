// Runs the CUDA kernels' own text on a CPU: stands in for ptx.cuh, one fiber per CUDA thread, blocks of a cluster together.
//
// Asynchrony is made as nasty as it may be. Bulk copies land late and in random order. A warpgroup product reads its
// register operand and shared memory as late as the waits allow, so a buffer freed or overwritten too early shows as a
// wrong result. Warps fall behind at random. Shared memory starts poisoned, and a product sees a thread's plain stores only
// behind that thread's fence. Words that blocks hand each other in global memory become visible as late as the order of
// events allows: when a thread that knows of them, its own or through a barrier of its block, counts itself up.
// Where every thread waits and no copy is left, the launch ends with an error.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Dim { unsigned x; };
struct Words { unsigned x, y, z, w; };
struct Product { int* d; const unsigned* a; unsigned long long b; int accumulate, group; };
struct Part { unsigned* at; unsigned value; };  // a word for other blocks
struct Handed { int barrier; long meeting; Part part; };
struct Barrier { int count, pending; long bytes; unsigned phase; };
struct Copy { int block; unsigned target, bytes, barrier; const void* source; };

constexpr unsigned SHARED_AT = 1024;
constexpr int STACK = 1 << 16;

struct Warp { unsigned slots[2][32]; long arrived = 0; int stalled = 0; std::vector<Product> queue[32]; };
struct Block {
    std::vector<unsigned char> shared, seen_by_products;
    std::map<unsigned, Barrier> barriers;
    std::vector<Warp> warps;
    std::map<int, long> named, ahead;  // threads that came to a named barrier; arrivals minus waits there
    std::vector<Handed> handed;        // fenced words that threads brought to a barrier, and to which of its meetings
};
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    std::function<bool()> ready;
    bool done = false;
    int block = 0, thread = 0, committed = 0;
    long meetings = 0, cluster_meetings = 0;
    std::map<int, long> named;
    std::vector<unsigned> stores;  // addresses of words that products do not see yet
    std::vector<Part> parts, fenced, own;  // stored, of these fenced, that no other thread knows of; and all it stored
};

static std::vector<Block> blocks;
static std::vector<std::unique_ptr<Fiber>> fibers;
static std::vector<Copy> copies;
static Fiber* current;
static ucontext_t scheduler;
static std::function<void()> body;
static long cluster_arrived;
static unsigned first_block, grid_blocks, block_threads;
static std::vector<std::pair<const char*, long>> readable;
static const char* failure;

static void fail(const char* why) {
    if (!failure) failure = why;
    current->done = true;
    swapcontext(&current->context, &scheduler);
}
static void wait_until(std::function<bool()> ready) {
    if (ready()) return;
    current->ready = std::move(ready);
    swapcontext(&current->context, &scheduler);
}
static Block& block() { return blocks[current->block]; }
static Warp& my_warp() { return block().warps[current->thread / 32]; }
static unsigned char* shared_at(Block& b, unsigned address, unsigned bytes) {
    if (address < SHARED_AT || address - SHARED_AT + bytes > b.shared.size() || address % (bytes < 16 ? bytes : 16))
        fail("shared memory access out of bounds or unaligned");
    return b.shared.data() + (address - SHARED_AT);
}

#define threadIdx (Dim{(unsigned)current->thread})
#define blockIdx (Dim{first_block + (unsigned)current->block})
#define blockDim (Dim{block_threads})
#define gridDim (Dim{grid_blocks})

static const unsigned* exchange(unsigned value) {  // all 32 lanes bring a word and see everybody's
    Warp& warp = my_warp();
    const long meeting = current->meetings++;
    warp.slots[meeting % 2][current->thread % 32] = value;
    ++warp.arrived;
    wait_until([&warp, meeting] { return warp.arrived >= 32 * (meeting + 1); });
    return warp.slots[meeting % 2];
}
static void meet(int id, int threads) {
    const long meeting = ++current->named[id], goal = meeting * threads;
    for (const Part& part : current->fenced) block().handed.push_back({id, meeting, part});
    current->fenced.clear();
    ++block().named[id];
    Block& mine = block();
    wait_until([&mine, id, goal] { return mine.named[id] >= goal; });
}
static void __syncthreads() { meet(0, block_threads); }
template <int barrier, int threads> static void sync_some() { meet(barrier, threads); }
static void sync_pair(int id) {
    --block().ahead[id];
    meet(id, 256);
}
static void arrive_pair(int id) {
    if (++block().ahead[id] > 128) fail("a turn was passed that nobody took");
    ++block().named[id];
}
static unsigned __shfl_sync(unsigned, unsigned value, int lane) { return exchange(value)[lane]; }

static unsigned shared_base() { return SHARED_AT; }
static Words load_shared(unsigned address) { Words v; memcpy(&v, shared_at(block(), address, 16), 16); return v; }
static unsigned load_shared_word(unsigned address) { unsigned v; memcpy(&v, shared_at(block(), address, 4), 4); return v; }
static unsigned load_shared_byte(unsigned address) { return *shared_at(block(), address, 1); }
static void store_shared_word(unsigned address, unsigned v) {
    memcpy(shared_at(block(), address, 4), &v, 4);
    const unsigned neither = ~v;  // a product may see the old word, the new one, or parts of both
    memcpy(block().seen_by_products.data() + (address - SHARED_AT), &neither, 4);
    current->stores.push_back(address);
}
static void shared_writes_fence() {
    for (unsigned at : current->stores)
        memcpy(block().seen_by_products.data() + (at - SHARED_AT), shared_at(block(), at, 4), 4);
    current->stores.clear();
}

static void settle(Barrier& b) {
    if (b.pending == 0 && b.bytes == 0) { b.phase ^= 1; b.pending = b.count; }
}
static Barrier& barrier_at(unsigned address) {
    if (!block().barriers.count(address)) fail("this is no initialised barrier");
    return block().barriers[address];
}
static void barrier_init(unsigned address, unsigned arrivals) {
    shared_at(block(), address, 8);
    block().barriers[address] = Barrier{(int)arrivals, (int)arrivals, 0, 0};
}
static void barrier_init_fence() {}
static void barrier_arrive_expect(unsigned address, unsigned bytes) {
    Barrier& b = barrier_at(address);
    b.bytes += bytes;
    if (--b.pending < 0) fail("more arrivals than the barrier counts");
    settle(b);
}
static void barrier_arrive(unsigned address) { barrier_arrive_expect(address, 0); }
static void barrier_wait(unsigned address, unsigned parity) {
    Barrier& b = barrier_at(address);
    wait_until([&b, parity] { return b.phase != parity; });
}
static void copy_to_shared(unsigned target, const void* source, unsigned bytes, unsigned barrier) {
    if (target % 16 || (size_t)source % 16 || bytes % 16) fail("bulk copy not in units of 16 bytes");
    bool inside = false;
    for (auto& r : readable) inside |= (const char*)source >= r.first && (const char*)source + bytes <= r.first + r.second;
    if (!inside) fail("bulk copy reads outside the tensors");
    shared_at(block(), target, bytes);
    copies.push_back(Copy{current->block, target, bytes, barrier, source});
}

template <int parts> static void wgmma(int (&d)[parts], const unsigned (&a)[4], unsigned long long b, int accumulate) {
    my_warp().queue[current->thread % 32].push_back(Product{d, a, b, accumulate, current->committed});
}
static void products_fence() {}
static void products_commit() { ++current->committed; }
static int left(const Product& p, int byte) {
    const unsigned value = p.a[byte / 4] >> (8 * (byte % 4)) & 0xff;
    return FOLDED ? value : (signed char)value;  // the kind that `source.wgmma` asks for
}

// Fragment maps of m64nNk32 (PTX ISA, "register fragments and shared memory matrix layouts"), for one warp's 16 rows.
static void run_product(Block& b, const Product* quad, int lane, int columns) {
    const Product& mine = quad[lane % 4];
    const unsigned start = (mine.b & 0x3fff) << 4, stride = ((mine.b >> 32) & 0x3fff) << 4;
    if (mine.b >> 62 != 1) fail("the descriptor does not ask for the 128-byte swizzle");
    for (int column = 0; column < columns; ++column) {
        if (column % 8 / 2 != lane % 4) continue;
        signed char right[32];
        for (int k = 0; k < 32; ++k) {
            unsigned at = start + column / 8 * stride + column % 8 * 128 + k;
            at ^= (at >> 7 & 7) << 4;  // the swizzle acts on address bits
            shared_at(b, at, 1);
            right[k] = b.seen_by_products[at - SHARED_AT];
        }
        for (int upper = 0; upper < 2; ++upper) {
            int sum = 0;
            for (int k = 0; k < 32; ++k)  // register r = upper + 2 * (k / 16), lane k % 16 / 4 of the quad, byte k % 4
                sum += left(quad[k % 16 / 4], (upper + 2 * (k / 16)) * 4 + k % 4) * right[k];
            int& out = mine.d[column / 8 * 4 + upper * 2 + column % 2];
            out = (mine.accumulate ? out : 0) + sum;
        }
    }
}
#ifndef TOKENS
#define TOKENS 8
#endif
template <int pending> static void products_wait() {
    exchange(0);
    Warp& warp = my_warp();
    const int lane = current->thread % 32;
    size_t due = 0;
    while (due < warp.queue[lane].size() && warp.queue[lane][due].group < current->committed - pending) ++due;
    for (size_t i = 0; i < due; ++i) {
        Product quad[4];
        for (int q = 0; q < 4; ++q) quad[q] = warp.queue[lane / 4 * 4 + q][i];
        run_product(block(), quad, lane, TOKENS);
    }
    exchange(0);
    warp.queue[lane].erase(warp.queue[lane].begin(), warp.queue[lane].begin() + due);
}
static unsigned transpose_8x8(unsigned value) {
    const unsigned* all = exchange(value);
    const int lane = current->thread % 32, row = lane / 4, column = lane % 4 * 2;
    auto element = [&](int r, int c) { return all[r * 4 + c / 2] >> (16 * (c % 2)) & 0xffff; };
    const unsigned out = element(column, row) | element(column + 1, row) << 16;
    return out;
}

template <int> static void registers_take() {}
template <int> static void registers_give_back() {}
static unsigned cluster_rank() { return current->block; }
static void cluster_sync() {
    exchange(0);  // a warp comes whole, or it waits for ever
    const long goal = ++current->cluster_meetings * (long)fibers.size();
    ++cluster_arrived;
    wait_until([goal] { return cluster_arrived >= goal; });
}
static unsigned load_peer_word(unsigned address, unsigned rank) {
    unsigned v;
    memcpy(&v, shared_at(blocks[rank], address, 4), 4);
    return v;
}
static void store_global_word(unsigned* at, unsigned v) {
    *at = ~v;  // another block may see anything but the new word
    current->parts.push_back({at, v}), current->own.push_back({at, v});
}
static unsigned load_global_word(const unsigned* at) {
    for (const Part& part : current->own)
        if (part.at == at) return part.value;
    return *at;
}
static void global_fence() {
    current->fenced.insert(current->fenced.end(), current->parts.begin(), current->parts.end());
    current->parts.clear();
}
static unsigned count_up(unsigned* at) {  // releases what this thread knows of, and nothing else
    for (const Part& part : current->fenced) *part.at = part.value;
    current->fenced.clear();
    auto known = [](const Handed& h) { return h.meeting <= current->named[h.barrier]; };
    for (const Handed& h : block().handed)
        if (known(h)) *h.part.at = h.part.value;
    auto& handed = block().handed;
    handed.erase(std::remove_if(handed.begin(), handed.end(), known), handed.end());
    return (*at)++;
}
static void let_dependents_start() {}
static void wait_for_previous_grid() {}

static float __uint_as_float(unsigned v) { float f; memcpy(&f, &v, 4); return f; }
static unsigned __float_as_uint(float f) { unsigned v; memcpy(&v, &f, 4); return v; }
static unsigned narrow(float v, bool fp16) {
    if (fp16) { _Float16 h = (_Float16)v; unsigned short bits; memcpy(&bits, &h, 2); return bits; }
    const unsigned bits = __float_as_uint(v);
    return v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static unsigned pack_pair(float low, float high, bool fp16) { return narrow(low, fp16) | narrow(high, fp16) << 16; }
static float widen(unsigned bits16, bool fp16) {
    if (!fp16) return __uint_as_float(bits16 << 16);
    const unsigned short bits = bits16;
    _Float16 h;
    memcpy(&h, &bits, 2);
    return h;
}
static unsigned max_halves(unsigned a, unsigned b) {
    return std::max(a >> 16, b >> 16) << 16 | std::max(a & 0xffff, b & 0xffff);
}
static unsigned max_over_warp(unsigned value) {
    const unsigned* all = exchange(value);
    unsigned top = 0;
    for (int i = 0; i < 32; ++i) top = std::max(top, all[i]);
    return top;
}
static int sum_over_warp(int value) {
    const unsigned* all = exchange(value);
    unsigned sum = 0;
    for (int i = 0; i < 32; ++i) sum += all[i];
    return sum;
}
static int add_bytes(unsigned bytes, int sum) {
    for (int i = 0; i < 4; ++i) sum += (signed char)(bytes >> (8 * i));
    return sum;
}
static int round_to_int(float x) { return (int)std::nearbyint(x); }
static float divide(float a, float b) { return a / b; }

static void enter() {
    body();
    current->done = true;
    swapcontext(&current->context, &scheduler);
}

// Run one launch; returns null or what went wrong.
static const char* launch(unsigned grid, unsigned cluster, unsigned threads, unsigned shared, unsigned seed,
                          std::function<void()> kernel) {
    std::mt19937 random(seed);
    body = std::move(kernel);
    grid_blocks = grid, block_threads = threads, failure = nullptr;
    for (first_block = 0; first_block < grid && !failure; first_block += cluster) {
        blocks.assign(cluster, Block());
        fibers.clear(), copies.clear(), cluster_arrived = 0;
        for (unsigned b = 0; b < cluster; ++b) {
            blocks[b].shared.resize(shared);
            blocks[b].seen_by_products.resize(shared);
            for (auto& byte : blocks[b].shared) byte = random();
            for (auto& byte : blocks[b].seen_by_products) byte = random();
            blocks[b].warps.resize(threads / 32);
            for (unsigned t = 0; t < threads; ++t) {
                auto fiber = std::make_unique<Fiber>();
                fiber->block = b, fiber->thread = t;
                getcontext(&fiber->context);
                fiber->context.uc_stack.ss_sp = fiber->stack.get();
                fiber->context.uc_stack.ss_size = STACK;
                makecontext(&fiber->context, enter, 0);
                fibers.push_back(std::move(fiber));
            }
        }
        for (bool alive = true, moved; alive && !failure;) {
            alive = moved = false;
            for (auto& b : blocks)
                for (auto& warp : b.warps)  // some warps fall behind the others for a while
                    warp.stalled = warp.stalled ? warp.stalled - 1 : random() % 16 ? 0 : random() % 32;
            for (auto& fiber : fibers) {
                if (fiber->done || failure) continue;
                alive = true;
                if (blocks[fiber->block].warps[fiber->thread / 32].stalled) { moved = true; continue; }
                if (fiber->ready && !fiber->ready()) continue;
                fiber->ready = nullptr, moved = true, current = fiber.get();
                swapcontext(&scheduler, &current->context);
            }
            if (!copies.empty() && (!moved || random() % 4 == 0)) {
                std::swap(copies[random() % copies.size()], copies.back());
                const Copy copy = copies.back();
                copies.pop_back();
                for (auto* seen : {&blocks[copy.block].shared, &blocks[copy.block].seen_by_products})
                    memcpy(seen->data() + (copy.target - SHARED_AT), copy.source, copy.bytes);
                Barrier& barrier = blocks[copy.block].barriers[copy.barrier];
                barrier.bytes -= copy.bytes;
                settle(barrier);
            } else if (alive && !moved) {
                failure = "every thread waits";
            }
        }
        if (!copies.empty() && !failure) failure = "the block ended before its copies";
    }
    return failure;
}
