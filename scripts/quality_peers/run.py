"""Runs one peer in its own environment: `python -P -m quality_peers.run FOLDER`, with scripts/ on PYTHONPATH."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from quality_peers.contract import JOB, Job, Meter


def main() -> None:
    """Do the job that lies in the folder, and write what came out beside it."""
    folder = Path(sys.argv[1])
    job = Job.read(folder / JOB)
    meter = Meter()
    peer = import_module(f"quality_peers.{job.module}")
    peer.quantize(job, meter).write(folder, meter)


if __name__ == "__main__":
    main()
