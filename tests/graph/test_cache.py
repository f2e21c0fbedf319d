"""Room in memory within a limit, then in files that leave nothing behind, and a warning when there is none."""

import errno
import os

import pytest
import torch

from reverie.graph.cache import Cache, CacheFull


def test_what_fits_is_in_memory_and_freed_room_counts_again(tmp_path):
    cache = Cache(limit=1000, folder=tmp_path / "cache")
    first = cache.room(10, torch.empty(3, 20))
    assert (tuple(first.shape), cache.used) == ((10, 20), 800)
    second = cache.room(10, torch.empty(3, 20))
    assert cache.used == 800
    cache.free(second)
    cache.free(first)
    assert cache.used == 0
    assert cache.room(10, torch.empty(3, 20)).shape == (10, 20)
    assert cache.used == 800


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("limit", [None, 0])
def test_room_has_the_layout_asked_for_and_keeps_what_is_written(tmp_path, limit, layout):
    like = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout)
    room = Cache(limit=limit, folder=tmp_path).room(6, like)
    assert room.is_contiguous(memory_format=layout)
    room.copy_(like.repeat(3, 1, 1, 1))
    assert torch.equal(room[2:4], like)


def test_a_file_has_no_name_while_it_is_used(tmp_path):
    room = Cache(limit=0, folder=tmp_path).room(8, torch.empty(1, 100))
    room.fill_(3.0)
    assert list(tmp_path.iterdir()) == []
    assert room.sum() == 2400


def test_a_full_folder_is_told_once_with_what_is_missing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    told = []
    cache = Cache(limit=0, folder=tmp_path, warn=told.append)
    for _ in range(2):
        with pytest.raises(CacheFull):
            cache.room(1024, torch.empty(1, 1024))
    assert told == [
        f"cache: {tmp_path} must have room for 4 MiB more, got 'No space left on device'; what a unit reads is computed anew at "
        "each step, which is slower: free some space, or raise --set reconstruction.cache_gib"
    ]
    assert list(tmp_path.iterdir()) == []
