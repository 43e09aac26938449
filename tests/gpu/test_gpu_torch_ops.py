"""The operators ``torch.ops.ttt4as.*`` with the GPU backends behind them: opcheck, compile, export."""

from __future__ import annotations

import pytest
import torch

from ttt4as_fast import kernels

pytestmark = pytest.mark.usefixtures("cuda_source")


def samples(device: torch.device) -> dict[str, tuple]:
    kernels.dilate(torch.ones((2, 2), dtype=torch.bool), 1)  # the operators register on the first tensor
    generator = torch.Generator().manual_seed(3)
    maps = torch.rand((2, 12, 13), generator=generator).to(device)
    features = torch.rand((2, 3, 4, 5), generator=generator).to(device)
    last = features.contiguous(memory_format=torch.channels_last)
    pixels = torch.arange(5, device=device)
    options = (99.0, 1, 9, 1e-3, "squared_hinge", "grid", 0, 0.5, 1e-4, 1000, "gpu")
    return {
        "segment": (maps, features, None, *options),
        "segment-strided": (maps.transpose(1, 2), last.transpose(2, 3), maps.amax((1, 2)), *options),
        "bilinear_upsample": (features, 9, 8, "gpu"),
        "bilinear_upsample-channels_last": (last, 9, 8, "gpu"),
        "bilinear_upsample-strided": (last[1], 9, 8, "gpu"),
        "bilinear_sample": (last[0], 9, 8, pixels, pixels, "gpu"),
        "nearest_neighbors": (maps[0, :3], maps[1], 2, "gpu"),
        "k_center_greedy": (maps[0], 3, 1, "gpu"),
        "local_maxima": (maps.transpose(1, 2), 90.0, "gpu"),
        "dilate": (maps.transpose(1, 2) > 0.9, 2, "gpu"),
    }


NAMES = tuple(samples(torch.device("cpu")))


def operator(name: str):
    return getattr(torch.ops.ttt4as, name.partition("-")[0])


def test_none_joins_the_graphs_of_inductor():
    """Their first call makes tables that outlive it, some look at the host: ``reduce-overhead`` must leave them out."""
    names = {name.partition("-")[0] for name in NAMES} | {"segment_robust"}
    assert all(torch.Tag.cudagraph_unsafe in getattr(torch.ops.ttt4as, name).default.tags for name in names)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(device, name):
    """Shapes, dtypes and strides are those the fake promises; no argument is written to or aliased."""
    # Ahead-of-time dispatch adds several runs, which the interpreter makes long; compiling is tested below.
    checks = ("test_schema", "test_faketensor")
    all_checks = (*checks, "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        operator(name), samples(device)[name], test_utils=all_checks if device.type == "cuda" else checks
    )


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("name", ["segment", "bilinear_upsample-channels_last"])
def test_compiles_whole_and_exports(device, name):
    arguments = samples(device)[name]
    tensors = tuple(x for x in arguments if isinstance(x, torch.Tensor))
    rest = arguments[len(tensors) :]

    class Call(torch.nn.Module):
        def forward(self, *inputs):
            return operator(name)(*inputs, *rest)

    want = Call()(*tensors)
    compiled = torch.compile(Call(), fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    exported = torch.export.export(Call(), tensors)
    assert any(f"ttt4as.{name.partition('-')[0]}" in str(node.target) for node in exported.graph.nodes)
    for call in (compiled, exported.module()):
        torch.testing.assert_close(call(*tensors), want, rtol=0, atol=0)
