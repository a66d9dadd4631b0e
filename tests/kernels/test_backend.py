"""Which implementation ops take on a device, and how a block of code chooses another."""

from __future__ import annotations

import pytest
import torch

from qandc_kernels import DeviceError, QandCError, quantize_per_tensor, select_backend, use_backend
from tests.conftest import in_a_thread


@pytest.fixture
def launched(monkeypatch):
    """The device of each call of an op that Triton ran."""
    calls = []
    from qandc_kernels.triton import quantize

    kernel = quantize._PER_TENSOR  # not its launcher: an op keeps that from its first call on

    def noted(operands, *rest):
        calls.append(operands[0].device.type)
        return kernel(operands, *rest)

    monkeypatch.setattr(quantize, "_PER_TENSOR", noted)
    return calls


def quantized(device="cpu"):
    x = torch.linspace(-3, 3, 48, device=device).view(3, 16)
    return quantize_per_tensor(x, torch.tensor(0.02, device=device))


@pytest.mark.interpret
def test_a_block_chooses(launched):
    expected = quantized()
    assert launched == []
    with use_backend("triton"):
        assert select_backend("cpu") == ("triton", "Triton's interpreter")
        assert torch.equal(quantized(), expected)
        assert launched == ["cpu"]
        with use_backend("reference"):
            assert select_backend("cpu").name == "reference"
            quantized()
        assert launched == ["cpu"]
        quantized()
        assert launched == ["cpu"] * 2
        assert in_a_thread(select_backend, "cpu").name == "reference"
    assert "the kernels need a CUDA device" in select_backend("cpu").reason
    quantized()
    assert launched == ["cpu"] * 2


def test_an_error_ends_the_block():
    with pytest.raises(QandCError), use_backend("reference"):
        select_backend("nowhere")
    assert "use_backend" not in select_backend("cpu").reason


def test_triton_or_an_error(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with use_backend("triton"):
        for call in (quantized, lambda: select_backend("cpu")):
            with pytest.raises(
                DeviceError, match=r"no Triton kernels run on cpu \(.*this is cpu\); .*TRITON_INTERPRET=1"
            ):
                call()
    quantized()


def test_an_unknown_name_is_refused_before_the_block():
    with pytest.raises(QandCError, match="name must be 'reference' or 'triton'; got 'cuda'"):
        use_backend("cuda")


@pytest.mark.gpu
def test_plain_torch_on_a_gpu(launched):
    expected = quantized("cuda")
    assert launched == ["cuda"]
    with use_backend("reference"):
        assert torch.equal(quantized("cuda"), expected)
    assert launched == ["cuda"]
