// The entry point that a test calls: argument i of the kernel stands at arguments[i], as for cuLaunchKernel.
extern "C" const char* emulate(unsigned grid, unsigned cluster, unsigned threads, unsigned shared, unsigned seed,
                               const void* const* pointers, const long* sizes, int count, void** arguments) {
    readable.clear();
    for (int i = 0; i < count; ++i) readable.push_back({(const char*)pointers[i], sizes[i]});
#if defined(STREAM) && STREAM
    cluster = grid;  // blocks that hand each other parts run at the same time
#endif
    return launch(grid, cluster, threads, shared, seed, [arguments] {
#ifdef STAGES
        w4a8_linear(*(const Problem*)arguments[0]);
#else
        quantize_tokens(*(const unsigned short**)arguments[0], *(char**)arguments[1], *(float**)arguments[2],
                        *(int*)arguments[3], *(int*)arguments[4], *(int*)arguments[5]);
#endif
    });
}
