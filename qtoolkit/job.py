"""A quantization run's folder: what is done, what may differ between two runs, and the one step that publishes it.

Everything is written beside the output, in ``<output>.partial``: one finished block is one file, moved into place
whole. The output appears by a single rename at the end, so a folder of that name is always a finished checkpoint.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from qtoolkit.checkpoint import MANIFEST, write_json
from qtoolkit.errors import QToolkitError, RequestError

FINGERPRINT, LOCK = "job.json", "lock"


class Job:
    """One run's state on disk; opened by ``Job.open``."""

    def __init__(self, output: Path, fingerprint: Mapping[str, Any]) -> None:
        self.output = output
        self.folder = output.with_name(output.name + ".partial")
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.published = False
        self.replace = False
        self._lock: IO[str] | None = None

    @classmethod
    def open(cls, output: Path, fingerprint: Mapping[str, Any], *, fresh: bool = False) -> Job:
        """Start a run, or go on with an interrupted one of the same ``fingerprint``.

        Raises:
            RequestError: the output exists, another run is at work, or what is there was started otherwise.
            QToolkitError: nothing can be written there.
        """
        output = Path(os.path.realpath(output.expanduser()))  # a rename would replace a link, not what it leads to
        if os.path.ismount(output):
            hint = f"Choose a folder in it, such as {output / 'model'}."
            raise RequestError(f"{output} is a mount point, which a finished folder cannot replace.", hint)
        job = cls(output, fingerprint)
        try:
            with disk_errors(output):
                job._begin(fresh)
        except BaseException:
            job.close()
            raise
        return job

    def _begin(self, fresh: bool) -> None:
        if fresh:
            self.replace = (self.output / MANIFEST).is_file()  # the old checkpoint stays until the new one is whole
        elif self.output.exists() and self._interrupted_after_publishing():
            self.published = True
            return
        if self.output.exists() and not self.replace:
            self._refuse_existing()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if fresh:
            self._forget()
        state = self.folder / FINGERPRINT
        if state.is_file():
            self._compare(json.loads(state.read_text("utf-8")))
        else:
            write_json(state, self.fingerprint)

    def has(self, part: str) -> bool:
        """Tell whether ``part`` is finished."""
        return self.file(part).is_file()

    def save(self, part: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> None:
        """Store a finished part: tensors, and JSON facts in the file's metadata. All of it appears at once."""
        from safetensors.torch import save_file

        file = self.file(part)
        temporary = file.with_name(file.name + ".tmp")
        with disk_errors(file):
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                temporary,
                metadata={"format": "pt", "facts": json.dumps(facts or {})},
            )
            flush(temporary)
            temporary.replace(file)

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Return a finished part's tensors."""
        from safetensors.torch import load_file

        return load_file(self.file(part))

    def drop(self, part: str) -> None:
        """Remove a part that nobody asks for any more."""
        with disk_errors(self.file(part)):
            self.file(part).unlink(missing_ok=True)

    def facts(self, part: str) -> dict[str, Any]:
        """Return a finished part's facts."""
        from safetensors import safe_open

        with safe_open(self.file(part), framework="pt") as handle:
            return json.loads(handle.metadata()["facts"])

    @property
    def staging(self) -> Path:
        """Return the folder in which the output is put together."""
        return self.folder / "output"

    def publish(self) -> None:
        """Make the staged folder the output, in one rename, and remove the run's own files."""
        with disk_errors(self.output):
            usual = stat.S_IMODE((self.staging / MANIFEST).stat().st_mode)
            for file in self.staging.iterdir():
                file.chmod(usual)  # safetensors writes files that only their owner may read
                flush(file)
            flush(self.staging)
            old = self.output.with_name(self.output.name + ".replaced")
            if self.replace:
                shutil.rmtree(old, ignore_errors=True)
                self.output.rename(old)
            os.replace(self.staging, self.output)
            flush(self.output.parent)
            shutil.rmtree(old, ignore_errors=True)
        self.published = True
        self.close()

    def close(self) -> None:
        """Let go of the run; an unpublished one can be resumed, if it got anywhere."""
        held = self._lock is not None
        if self.published or (held and not any(self.folder.glob("*.safetensors"))):
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:  # after the folder: whoever comes next makes one of his own
            self._lock.close()
            self._lock = None

    def file(self, part: str) -> Path:
        """Return where a part lies."""
        return self.folder / f"{part}.safetensors"

    def _interrupted_after_publishing(self) -> bool:
        """Tell whether the same run was killed between its last rename and its clean-up."""
        state = self.folder / FINGERPRINT
        if not (self.output / MANIFEST).is_file() or not self.folder.is_dir():
            return False
        return not state.is_file() or json.loads(state.read_text("utf-8")) == self.fingerprint

    def _refuse_existing(self) -> None:
        if self.output.is_dir() and not any(self.output.iterdir()):
            return  # an empty folder is replaced by the rename
        if (self.output / MANIFEST).is_file():
            raise RequestError(
                f"{self.output} already holds a finished checkpoint.", "Choose another folder, or give --fresh."
            )
        raise RequestError(f"{self.output} exists and is not a qtoolkit checkpoint.", "Choose another output folder.")

    def _compare(self, earlier: Mapping[str, Any]) -> None:
        changed = sorted(key for key in {*earlier, *self.fingerprint} if earlier.get(key) != self.fingerprint.get(key))
        if changed:
            was = ", ".join(f"{key} {earlier.get(key)!r}, now {self.fingerprint.get(key)!r}" for key in changed)
            raise RequestError(
                f"{self.folder} was started with another {was}.", "Give the same options, or start anew with --fresh."
            )

    def _forget(self) -> None:
        """Remove what an earlier run left, the word of its options last; the lock stays."""
        for left in sorted(self.folder.iterdir(), key=lambda left: left.name == FINGERPRINT):
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name != LOCK:
                left.unlink()

    def _take_lock(self) -> None:
        self._lock = (self.folder / LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            self._lock = None
            raise RequestError(f"Another run is writing {self.output}.", "Wait for it or stop it.") from None


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk, or a place that cannot hold files, into one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        free = shutil.disk_usage(next(p for p in path.parents if p.exists())).free
        said = getattr(error, "strerror", None) or str(error)
        what = "the disk is full" if full else " ".join(said.split())
        first = "Make room" if full else "Choose another folder, or make this one writable,"
        raise QToolkitError(
            f"{path} cannot be written: {what} ({free / 1e6:.0f} MB free).",
            f"{first} and run the same command again.",
        ) from None


def flush(path: Path) -> None:
    """Bring a file's or folder's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
