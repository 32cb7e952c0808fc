"""Freed memory stays with the process: the second time costs no page faults."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from policy import allocator


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_what_was_freed_is_taken_again_without_page_faults() -> None:
    assert allocator.keep_freed_memory()

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(2**20) for _ in range(24)]  # 4 MiB each, 1,024 pages
        del tensors
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    first = faults()
    assert min(faults() for _ in range(3)) < 24 * 1024 / 20, f"the first time took {first}"


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not allocator.keep_freed_memory()
