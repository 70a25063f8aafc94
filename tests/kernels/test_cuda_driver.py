"""What the driver is called with, read back by C code that is built with NVIDIA's own header."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from qtoolkit.kernels.cuda import backend, compiler, driver, source

HEADERS = next((p for p in (Path("/usr/local/cuda/include"), Path("/usr/include")) if (p / "cuda.h").exists()), None)
READER = r"""
#include <cuda.h>
extern "C" void read_config(const CUlaunchConfig* c, unsigned* out) {
    const unsigned head[8] = {c->gridDimX, c->gridDimY, c->blockDimX, c->blockDimZ, c->sharedMemBytes,
                              (unsigned)(size_t)c->hStream, c->numAttrs, 0};
    for (int i = 0; i < 8; ++i) out[i] = head[i];
    for (unsigned i = 0; i < c->numAttrs; ++i) {
        if (c->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) out[8] = c->attrs[i].value.clusterDim.x;
        if (c->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
            out[9] = c->attrs[i].value.programmaticStreamSerializationAllowed;
    }
    out[10] = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    out[11] = CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
}
"""

DRIVER = r"""
#include <cuda.h>
#include <cstring>
// A driver of one thread that has no context at first; it copies what a kernel would be given.
static CUcontext current = 0;
static int launches = 0, refusals = 0;
static unsigned seen[4];
#undef cuCtxGetCurrent
extern "C" {
CUresult cuCtxGetCurrent(CUcontext* c) { *c = current; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) { current = c; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice d) { *c = (CUcontext)(size_t)(d + 77); return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule* m, const void* image) {
    *m = (CUmodule)11;
    return memcmp(image, "\x7f" "ELF", 4) ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* f, CUmodule m, const char* name) {
    *f = (CUfunction)22;
    return m == (CUmodule)11 && !strcmp(name, "quantize_tokens") ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult, const char** words) { *words = "words of the driver"; return CUDA_SUCCESS; }
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** arguments, void**) {
    if (!current) { ++refusals; return CUDA_ERROR_INVALID_CONTEXT; }
    if (c->gridDimX == 13) return CUDA_ERROR_LAUNCH_FAILED;
    seen[0] = ++launches, seen[1] = refusals, seen[2] = f == (CUfunction)22, seen[3] = *(int*)arguments[1];
    return CUDA_SUCCESS;
}
void forget_context() { current = 0; }
const unsigned* what_was_seen() { return seen; }
}
"""


def build(text: str, folder: Path) -> ctypes.CDLL:
    source_file, library = folder / "stub.cpp", folder / "stub.so"
    source_file.write_text(text)
    command = ["g++", "-shared", "-fPIC", "-w", f"-I{HEADERS}", "-o", str(library), str(source_file)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


@pytest.mark.skipif(HEADERS is None or shutil.which("g++") is None, reason="needs cuda.h and g++")
def test_a_kernel_is_loaded_and_launched_also_from_a_thread_without_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = build(DRIVER, tmp_path)
    cuda.what_was_seen.restype = ctypes.POINTER(ctypes.c_uint * 4)
    monkeypatch.setattr(driver, "library", lambda: cuda)
    monkeypatch.setattr(compiler, "cubin", lambda text: b"\x7fELF")
    driver.load.cache_clear()
    try:
        launch = driver.load(source.quantize(4096, False), 0)
        launch(5, 1, (ctypes.c_void_p(1), ctypes.c_int(42)), 0, False)
        cuda.forget_context()  # as in a new thread
        launch(5, 1, (ctypes.c_void_p(1), ctypes.c_int(43)), 0, False)
        assert list(cuda.what_was_seen().contents) == [2, 1, 1, 43]
        with pytest.raises(RuntimeError, match="words of the driver"):
            launch(13, 1, (ctypes.c_void_p(1), ctypes.c_int(1)), 0, False)
    finally:
        driver.load.cache_clear()


@pytest.mark.skipif(HEADERS is None or shutil.which("g++") is None, reason="needs cuda.h and g++")
def test_nvidias_header_reads_back_what_was_written(tmp_path: Path) -> None:
    kernel = source.quantize(4096, False)
    config, _attributes = driver.launch_config(kernel, 77, 4, 0x1234, True)
    out = (ctypes.c_uint * 12)()
    build(READER, tmp_path).read_config(ctypes.byref(config), out)
    assert list(out[:8]) == [77, 1, kernel.threads, 1, kernel.shared_bytes, 0x1234, 2, 0]
    assert list(out[8:10]) == [4, 1]
    assert list(out[10:]) == [driver.MAX_DYNAMIC_SHARED, driver.SHARED_CARVEOUT]


def test_a_launch_without_a_cluster_asks_for_none() -> None:
    config, _attributes = driver.launch_config(source.quantize(8, False), 1, 1, 0, False)
    assert config.count == 0


def test_the_linear_kernels_argument_has_no_hidden_padding() -> None:
    """Seven pointers and eight ints, as in ``struct Problem``."""
    assert backend.Arguments.k.offset == 7 * 8 + 7 * 4
    assert backend.Arguments.parts.offset == 7 * 8 + 8 * 4
    assert ctypes.sizeof(backend.Arguments) == 7 * 8 + 8 * 4 + 2 * 8
