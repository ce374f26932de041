"""How kernels are cut on a GPU that is not there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from polyradix_torch.triton import cuts
from polyradix_torch.triton.attention import Plan

GPU = torch.device("cuda", 0)


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """That of a GPU's architecture."""
    driver = SimpleNamespace(get_current_target=lambda: SimpleNamespace(backend="any", arch="a1"))
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
    monkeypatch.setattr(cuts, "CUTS", tmp_path)
    cuts.of.cache_clear()
    yield tmp_path / "any-a1.json"
    cuts.of.cache_clear()


def test_what_the_file_says_otherwise(file: Path) -> None:
    file.write_text(json.dumps({"about": "...", "decode": {"2 x 64": {"stages": 2}}}))
    usual = Plan(64, 4)
    assert cuts.cut(GPU, "decode", "2 x 64", usual) == Plan(64, 4, stages=2)
    for other in ((GPU, "decode", "2 x 128"), (GPU, "prefill", "2 x 64"), (torch.device("cpu"), "decode", "2 x 64")):
        assert cuts.cut(*other, usual) == usual


def test_a_field_that_is_not_there(file: Path) -> None:
    file.write_text(json.dumps({"decode": {"2 x 64": {"stagse": 2}}}))
    with pytest.raises(TypeError, match="stagse"):
        cuts.cut(GPU, "decode", "2 x 64", Plan(64, 4))


def test_without_a_file(file: Path) -> None:
    assert cuts.cut(GPU, "decode", "2 x 64", Plan(64, 4)) == Plan(64, 4)
