"""Runs `quantize` in a forked child for every line of stdin; imports are paid once.

The child is killed after that many seconds, or as soon as there is a file of that name.

Prints the child's exit status (negative: the signal) and its duration. Before the fork nothing is computed, so that no
thread of an earlier computation is missing in the child.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import transformers.models.llama.modeling_llama  # noqa: F401  # imported once, for all children
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

import qtoolkit.calibration.compensation
import qtoolkit.calibration.smoothing  # noqa: F401
from qtoolkit.pipeline import quantize

model, output, changes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for line in sys.stdin:
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        quantize(model, "w4a8", output, changes=changes)
        os._exit(0)
    status = None
    while status is None:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
        elif os.path.exists(line.strip()) if "/" in line else time.monotonic() - began > float(line):
            os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        else:
            time.sleep(0.002)
    print(status, time.monotonic() - began, flush=True)
