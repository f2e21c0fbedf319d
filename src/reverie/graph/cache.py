"""Room for tensors that are computed once and read often: memory within a limit, then files, and in the end none.

A file's name is gone as soon as it is open, so that nothing of it is left behind, however the process ends; the operating
system keeps what is read often in memory anyway, as far as there is any.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


class CacheFull(Exception):
    """Neither memory nor the folder has room."""


class Cache:
    """Hands out room for tensors, and counts it.

    Args:
        limit: Bytes of memory (of a tensor's own device) to use; None for no limit.
        folder: Where to put what does not fit, made when it is needed; None means a folder for temporary files.
        warn: Told once, in a sentence, when the folder is full.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None, warn: Callable[[str], None] | None = None) -> None:
        self._limit, self._folder, self._warn = limit, folder, warn
        self._used: dict[int, int] = {}

    @property
    def used(self) -> int:
        """Bytes of memory in use."""
        return sum(self._used.values())

    def room(self, rows: int, like: Tensor) -> Tensor:
        """An uninitialized tensor with the shape of `like` but `rows` rows: on its device, or on the CPU where it is in a file.

        Raises:
            CacheFull: The limit is reached, and the folder cannot hold it.
        """
        size = like.element_size() * like[:1].numel() * rows
        # Convolutions are faster in the layout they chose.
        channels_last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
        shape = (rows, *like.shape[1:]) if not channels_last else (rows, *like.shape[2:], like.shape[1])
        if self._limit is None or self.used + size <= self._limit:
            whole = torch.empty(shape, dtype=like.dtype, device=like.device)
            self._used[whole.data_ptr()] = size
        else:
            whole = self._file(size, like.dtype).view(shape)
        return whole.permute(0, 3, 1, 2) if channels_last else whole

    def free(self, tensor: Tensor) -> None:
        """The room that `room` gave is no longer counted."""
        self._used.pop(tensor.data_ptr(), None)

    def _file(self, size: int, dtype: torch.dtype) -> Tensor:
        try:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix="cache-") as file:
                # Reserved first: a mapped file on a full disk kills the process at the first write.
                os.posix_fallocate(file.fileno(), 0, size)
                return torch.from_file(file.name, shared=True, size=size // dtype.itemsize, dtype=dtype)
        except OSError as error:
            if self._warn is not None:
                self._warn(
                    f"cache: {self._folder or tempfile.gettempdir()} must have room for {size / 2**20:.0f} MiB more, got "
                    f"{error.strerror!r}; what a unit reads is computed anew at each step, which is slower: free some space, or "
                    "raise --set reconstruction.cache_gib"
                )
                self._warn = None
            raise CacheFull from error
