"""Micro-batches: images of requests that arrive together go through the network together, in one thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 64  # images that go through the network at once
PATIENCE = 0.002  # seconds the first request waits for others


@dataclass(frozen=True)
class Answer:
    """What the network said about a request's images, and how long the batch took in which they went through it."""

    out: Tensor
    seconds: float


class Batches:
    """Takes images from many requests; ``run`` sees them as few large batches."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        self.run = run
        self.waiting: asyncio.Queue[tuple[Tensor, asyncio.Future[Answer]]] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None
        self.batches = self.images = 0

    async def __aenter__(self) -> Batches:
        self.task = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self.task is not None
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task

    async def submit(self, x: Tensor) -> Answer:
        """Return the network's answer for images x [n, ...]."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        await self.waiting.put((x, future))
        return await future

    async def _work(self) -> None:
        while True:
            taken = await self._collect()
            futures = [future for _, future in taken]
            try:
                out, seconds = await asyncio.to_thread(self._timed, torch.cat([x for x, _ in taken]))
            except Exception as error:  # every client of this batch is told, and the server lives on
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
                continue
            self.batches, self.images = self.batches + 1, self.images + len(out)
            for part, future in zip(out.split([len(x) for x, _ in taken]), futures, strict=True):
                if not future.done():  # a client may have gone away
                    future.set_result(Answer(part, seconds))

    def _timed(self, x: Tensor) -> tuple[Tensor, float]:
        began = time.perf_counter()
        return self.run(x), time.perf_counter() - began

    async def _collect(self) -> list[tuple[Tensor, asyncio.Future[Answer]]]:
        """Wait for a first request, then take what comes within the patience, up to about the largest batch."""
        taken = [await self.waiting.get()]
        until = asyncio.get_running_loop().time() + PATIENCE
        while sum(len(x) for x, _ in taken) < LARGEST:
            left = until - asyncio.get_running_loop().time()
            try:
                taken.append(await asyncio.wait_for(self.waiting.get(), max(left, 0)))
            except asyncio.TimeoutError:
                break
        return taken
