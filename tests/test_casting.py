"""Tensors in another dtype, in their own memory."""

import pytest
import torch

from secateur.tensor import casting
from secateur.tensor.casting import narrowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrowed_is_the_cast_in_the_same_memory(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(casting, "CHUNK", 7)  # the last chunk is not full
    tensor = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    wanted, place = tensor.to(dtype), tensor.data_ptr()
    found = narrowed(tensor, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, wanted)
    assert found.data_ptr() == place


def test_narrowed_turns_other_layouts_and_wider_dtypes_too() -> None:
    tensor = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(narrowed(tensor.clone().T, torch.bfloat16), tensor.T.to(torch.bfloat16))
    assert torch.equal(narrowed(tensor.bfloat16(), torch.float32), tensor.bfloat16().float())
