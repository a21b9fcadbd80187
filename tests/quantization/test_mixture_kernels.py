"""Mixtures multiply part by part: the same product as the dequantized matrix."""

import pytest
import torch

from quantization.formats import FORMATS
from quantization.kernels import kernel_devices
from quantization.kernels.operator import kernel_for, packed_linear, reference
from quantization.quantizers import QUANTIZERS


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("owq-int4-g64@5%", "part-by-part"),
        ("owq-int4-g64@1%", "part-by-part"),  # 1267 columns, no whole groups
        ("mixllm-int4-g64-asym@10%", None),  # int8-g64 has no CPU kernel
        ("slim-int3-g64@20%", None),
    ],
)
@pytest.mark.parametrize("batch", [1, 5])
def test_products_agree_with_the_reference(name, kernel, batch):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 1280, generator=generator) * 0.05
    packed = QUANTIZERS["rtn"].quantize(weight, FORMATS[name]).pack()
    x, bias = torch.randn(batch, 1280, generator=generator), torch.randn(96, generator=generator)
    found = kernel_for(name, packed.shape, batch, x.dtype, x.device)
    assert (found.name if found else None) == kernel
    assert torch.allclose(packed_linear(x, packed, bias), reference(x, packed, bias), atol=2e-2)


@pytest.mark.parametrize(
    "kind",
    ["owq-int3-g64@5%", "atom-int3-g64@12%", "slim-int3-g64@20%", "mixllm-int3-g64-asym@10%"],
)
def test_splitting_is_exact_where_the_parts_are(kind):
    """With every part computed by the reference, only the order of the sums is another."""
    from quantization.kernels.parts import PartByPart
    from quantization.kernels.torch_cpu import Int8Channel

    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(96, 640, generator=generator)
    packed = QUANTIZERS["rtn"].quantize(weight, FORMATS[kind]).pack()
    x = torch.randn(3, 640, generator=generator, dtype=torch.float64)
    found = PartByPart((Int8Channel(),)).run(x, packed, None)
    assert torch.allclose(found, reference(x, packed), rtol=1e-10, atol=1e-9)


def test_gpus_have_kernels_for_mixtures_of_what_they_have_kernels_for():
    for name in (
        "owq-int3-g64@1%",
        "atom-int4-g64@6%",
        "slim-int4-g64@20%",
        "mixllm-int4-g128-asym@20%",
    ):
        assert kernel_devices(FORMATS[name], (1024, 1024))[0].startswith("cuda")
    assert kernel_devices(FORMATS["fgmp@30%"], (1024, 1024)) == []
