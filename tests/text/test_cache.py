"""Where the cache lies, and what it does where there is no such place."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from zs3fast.text.cache import cache_dir, cached


def test_without_a_home_the_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")  # what pathlib says

    monkeypatch.delenv("ZS3FAST_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(OSError, match="ZS3FAST_CACHE: expected a folder"):
        cache_dir()
    with caplog.at_level(logging.WARNING, "zs3fast"):
        assert torch.equal(cached({"a": 1}, lambda: torch.ones(2)), torch.ones(2))
    assert "ZS3FAST_CACHE" in caplog.text


@pytest.mark.parametrize("data", [b"", b"no tensors", b"\xff" * 100])
def test_a_damaged_file_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setenv("ZS3FAST_CACHE", str(tmp_path))
    cached({"a": 1}, lambda: torch.ones(2))
    (file,) = (tmp_path / "text").iterdir()
    file.write_bytes(data)
    assert torch.equal(cached({"a": 1}, lambda: torch.zeros(2)), torch.zeros(2))
    assert torch.equal(cached({"a": 1}, lambda: torch.ones(2)), torch.zeros(2))
