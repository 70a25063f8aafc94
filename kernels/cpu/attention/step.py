"""One step of decoding: a few new tokens that every layer of a model writes into its cache, and their attention."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from qtoolkit.kernels.cpu.attention import library


class Step:
    """A batch of new tokens, looked at once; layers then give the tensors that are their own.

    For few sequences that saves most of the time of a layer's attention, which goes by in Python.
    """

    def __init__(self, table: Tensor, starts: Tensor, lengths: Tensor, slots: Tensor, scale: float) -> None:
        """Take what does not change between layers.

        Args:
            table: see ``library.attend``; so are ``starts``, ``lengths`` and ``scale``.
            slots: int64 [new tokens]: where in the cache each one belongs, page times tokens a page plus place, or
                negative: nowhere.

        Raises:
            ValueError: there are fewer slots than new tokens, or they are no dense int64.
        """
        self.tokens = int(starts[len(lengths)])
        if slots.dtype != torch.int64 or slots.dim() != 1 or slots.stride(0) != 1 or len(slots) < self.tokens:
            raise ValueError(f"slots {slots.dtype} {list(slots.shape)} are not int64 for {self.tokens} tokens")
        self.batch = (table, starts, lengths)  # which keeps them alive, too
        self.slots = slots
        self.scale = scale
        self.call = library.Call()
        self.reference = ctypes.byref(self.call)
        self.seen: tuple[object, ...] = ()  # sizes of tensors that were found right
        self.values_at = 0  # bytes from a page's keys to its values
        self.key_stride = self.value_stride = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, output: Tensor) -> None:
        """Write the tokens' keys and values into ``cache`` and their attention into ``output``.

        Args:
            query: bfloat16 [new tokens, heads, dim]; see ``library.attend``.
            key: bfloat16 [new tokens, key heads, dim]; tokens may lie any distance apart, heads and elements are dense.
            value: like ``key``.
            cache: see ``library.attend``; so is ``output``.

        Raises:
            ValueError: a shape, stride or dtype is not as said.
            MemoryError: there is none for intermediate values.
        """
        self._described(query, key, value, cache, output)
        if library.load().qta_step(
            self.reference, key.data_ptr(), self.key_stride, value.data_ptr(), self.value_stride, self.slots.data_ptr()
        ):
            raise MemoryError(f"no memory for attention of {query.shape[0]} tokens of {query.shape[1]} heads")

    def again(
        self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, output: Tensor, batch: library.Batch
    ) -> library.Again:
        """Return a call of ``attend`` that can be repeated, with whatever ``batch`` then says; see ``tell``.

        Raises:
            ValueError: as ``attend``.
        """
        call = self._described(query, key, value, cache, output)
        return library.Again(
            library.Call.from_buffer_copy(call), key.data_ptr(), self.key_stride, value.data_ptr(), self.value_stride,
            ctypes.pointer(batch),
        )  # fmt: skip

    def tell(self, batch: library.Batch) -> None:
        """Write into ``batch`` where this step's description lies."""
        table, starts, lengths = self.batch
        batch.table, batch.table_stride = table.data_ptr(), table.stride(0)
        batch.starts, batch.lengths, batch.slots = starts.data_ptr(), lengths.data_ptr(), self.slots.data_ptr()

    def _described(self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, output: Tensor) -> library.Call:
        """Return the call of one layer, see ``attend``."""
        sizes = (
            query.shape, key.shape, value.shape, output.shape, cache.shape,
            query.stride(), key.stride(), value.stride(), output.stride(), cache.stride(),
            query.dtype, key.dtype, value.dtype, output.dtype, cache.dtype,
        )  # fmt: skip
        if sizes != self.seen:
            self._look(query, key, value, cache, output)
            self.seen = sizes
        call, keys = self.call, cache.data_ptr()
        call.query, call.output = query.data_ptr(), output.data_ptr()
        call.keys, call.values = keys, keys + self.values_at
        return call

    def _look(self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, output: Tensor) -> None:
        """Check tensors of a layer and describe the call."""
        dim = query.shape[2]
        for new in (key, value):
            dense = new.shape[1:] == (cache.shape[1], dim) and new.stride()[1:] == (dim, 1)
            if not dense or new.dtype != torch.bfloat16 or min(len(new), len(query)) < self.tokens:
                raise ValueError(f"keys and values {new.dtype} {list(new.shape)} are not those of {self.tokens} tokens")
        self.call = library.described(query, cache, output, *self.batch, self.scale)
        self.reference = ctypes.byref(self.call)
        self.values_at = 2 * cache.shape[2] * dim
        self.key_stride, self.value_stride = key.stride(0), value.stride(0)
