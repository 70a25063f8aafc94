"""The launch description that is handed to the driver, read back by C code built with NVIDIA's own header."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from qtoolkit.kernels.cuda import backend, driver, source

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


@pytest.mark.skipif(HEADERS is None or shutil.which("g++") is None, reason="needs cuda.h and g++")
def test_nvidias_header_reads_back_what_was_written(tmp_path: Path) -> None:
    text, library = tmp_path / "reader.cpp", tmp_path / "reader.so"
    text.write_text(READER)
    subprocess.run(["g++", "-shared", "-fPIC", f"-I{HEADERS}", "-o", str(library), str(text)], check=True)
    kernel = source.quantize(4096, False)
    config, _attributes = driver.launch_config(kernel, 77, 4, 0x1234, True)
    out = (ctypes.c_uint * 12)()
    ctypes.CDLL(str(library)).read_config(ctypes.byref(config), out)
    assert list(out[:8]) == [77, 1, kernel.threads, 1, kernel.shared_bytes, 0x1234, 2, 0]
    assert list(out[8:10]) == [4, 1]
    assert list(out[10:]) == [driver.MAX_DYNAMIC_SHARED, driver.SHARED_CARVEOUT]


def test_a_launch_without_a_cluster_asks_for_none() -> None:
    config, _attributes = driver.launch_config(source.quantize(8, False), 1, 1, 0, False)
    assert config.count == 0


def test_the_linear_kernels_argument_has_no_hidden_padding() -> None:
    """Six pointers and seven ints, as in ``struct Problem``; the compiler pads only the end."""
    assert backend.Arguments.split.offset == 6 * 8 + 6 * 4
    assert ctypes.sizeof(backend.Arguments) == 80
