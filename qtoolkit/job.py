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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from qtoolkit.checkpoint import MANIFEST, write_json
from qtoolkit.errors import QToolkitError, RequestError, said

PARTIAL = ".partial"  # what the run's folder is called beyond the output
FINGERPRINT, LOCK = "job.json", "lock"
REPLACES, REPLACED = "replaces", "replaced"  # a run that takes a checkpoint's place; that checkpoint, at the end
NOTHING = "not given"  # of a key that one of two runs does not have
SHOWN = 4  # differences between two runs that are told, at most


class Job:
    """One run's state on disk; opened by ``Job.open``."""

    def __init__(self, output: Path, fingerprint: Mapping[str, Any]) -> None:
        self.output = output
        self.folder = output.with_name(output.name + PARTIAL)
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.published = False
        self.replace = False
        self._lock: IO[str] | None = None

    @classmethod
    def open(cls, output: Path, fingerprint: Mapping[str, Any], *, fresh: bool = False) -> Job:
        """Start a run, or go on with an interrupted one of the same ``fingerprint``.

        Raises:
            RequestError: the output exists, another run is at work, or what is there was started otherwise, or not by
                a run.
            QToolkitError: nothing can be written there, or what is there is damaged.
        """
        output = Path(os.path.realpath(output.expanduser()))  # a rename would replace a link, not what it leads to
        if output.name.endswith(PARTIAL):
            hint = f"Choose another name, such as {output.name.removesuffix(PARTIAL) or 'model'}."
            raise RequestError(f"{output} is what an unfinished run's folder is called.", hint)
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
        self._refuse_foreign()
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
            self._put_back()
            self._forget()
            if self.replace:
                (self.folder / REPLACES).touch()
        if (earlier := self._earlier()) is not None:
            self._compare(earlier)
        else:
            write_json(self.folder / FINGERPRINT, self.fingerprint)

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
        """Return a finished part's tensors.

        Raises:
            QToolkitError: the part is damaged.
        """
        from safetensors.torch import load_file

        with self._damage(self.file(part)):
            return load_file(self.file(part))

    def drop(self, part: str) -> None:
        """Remove a part that nobody asks for any more."""
        with disk_errors(self.file(part)):
            self.file(part).unlink(missing_ok=True)

    def facts(self, part: str) -> dict[str, Any]:
        """Return a finished part's facts.

        Raises:
            QToolkitError: the part is damaged.
        """
        from safetensors import safe_open

        with self._damage(self.file(part)), safe_open(self.file(part), framework="pt") as handle:
            return _mapping(json.loads(handle.metadata()["facts"]))

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
            if self.replace:
                self.output.rename(self.folder / REPLACED)
            os.replace(self.staging, self.output)
            flush(self.output.parent)
        self.published = True
        self.close()

    def close(self) -> None:
        """Let go of the run; an unpublished one can be resumed, if it got anywhere."""
        held = self._lock is not None
        if self.published or (held and not any(self.folder.glob("*.safetensors"))):
            self._remove()
        if self._lock is not None:  # after the folder: whoever comes next makes one of his own
            self._lock.close()
            self._lock = None

    def file(self, part: str) -> Path:
        """Return where a part lies."""
        return self.folder / f"{part}.safetensors"

    def _interrupted_after_publishing(self) -> bool:
        """Tell whether the same run was killed between its last rename and its clean-up."""
        if not (self.output / MANIFEST).is_file():
            return False
        if (self.folder / REPLACES).is_file() and not (self.folder / REPLACED).is_dir():
            return False  # what is there is still what the run was to replace
        try:
            return self._earlier() == self.fingerprint
        except QToolkitError:
            return False

    def _earlier(self) -> dict[str, Any] | None:
        """Return the fingerprint that the folder was started with; None: it was not."""
        state = self.folder / FINGERPRINT
        if not state.is_file():
            return None
        with self._damage(state):
            return _mapping(json.loads(state.read_text("utf-8")))

    def _refuse_foreign(self) -> None:
        """Refuse a folder of our name that no run made: what is in it would be removed."""
        if not self.folder.is_dir():
            return
        there = {path.name for path in self.folder.iterdir()}
        if there - {LOCK, FINGERPRINT + ".tmp"} and not {LOCK, FINGERPRINT} <= there:
            raise RequestError(
                f"{self.folder} exists and was not made by a run, which would remove it in the end.",
                "Choose another output folder, or move that one away.",
            )

    def _put_back(self) -> None:
        """Undo the first of the two renames of a run that was killed between them while it replaced a checkpoint."""
        if not self.output.exists() and (self.folder / REPLACED / MANIFEST).is_file():
            (self.folder / REPLACED).rename(self.output)
            self.replace = True

    @contextmanager
    def _damage(self, file: Path) -> Iterator[None]:
        """Turn what reading a damaged file of the run raises into one sentence."""
        from safetensors import SafetensorError

        try:
            yield
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise QToolkitError(
                f"{file} of an interrupted run is damaged: {said(error)}.", "Start anew with --fresh."
            ) from None

    def _refuse_existing(self) -> None:
        if self.output.is_dir() and not any(self.output.iterdir()):
            return  # an empty folder is replaced by the rename
        if (self.output / MANIFEST).is_file():
            raise RequestError(
                f"{self.output} already holds a finished checkpoint.", "Choose another folder, or give --fresh."
            )
        raise RequestError(f"{self.output} exists and is not a qtoolkit checkpoint.", "Choose another output folder.")

    def _compare(self, earlier: Mapping[str, Any]) -> None:
        was, now = _flat(earlier), _flat(self.fingerprint)
        changed = sorted(key for key in {*was, *now} if was.get(key, NOTHING) != now.get(key, NOTHING))
        if changed:
            before, after = ({key: repr(value) for key, value in each.items()} for each in (was, now))
            told = [f"{key} {before.get(key, NOTHING)}, now {after.get(key, NOTHING)}" for key in changed[:SHOWN]]
            told += [f"{len(changed) - SHOWN} more"] * (len(changed) > SHOWN)
            raise RequestError(
                f"{self.folder} was started with another {'; '.join(told)}.",
                "Give the same options, or start anew with --fresh.",
            )

    def _forget(self) -> None:
        """Remove what an earlier run left, the word of its options last; the lock stays."""
        for left in sorted(self.folder.iterdir(), key=lambda left: left.name == FINGERPRINT):
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name != LOCK:
                left.unlink()

    def _remove(self) -> None:
        """Remove the folder, as far as it can be; until it is empty one sees whose it is."""
        with suppress(OSError):
            self._forget()
            (self.folder / LOCK).unlink(missing_ok=True)
            self.folder.rmdir()

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


def _mapping(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise TypeError(f"{type(data).__name__} instead of an object")
    return data


def _flat(data: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found
