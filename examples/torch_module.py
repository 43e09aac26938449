"""A PyTorch inspection model that ends in masks: compiled whole, exported, and the same bits each way.

python examples/torch_module.py
"""

from __future__ import annotations

import torch

from ttt4as_fast import nn


class Inspector(torch.nn.Module):
    """Features by a frozen convolution, the map by their distance to a nominal mean, the mask by test-time training."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("filters", torch.randn(16, 3, 8, 8, generator=generator))
        self.register_buffer("nominal", torch.zeros(16, 1, 1))
        self.ttt4as = nn.TTT4AS(neighbor_radius=3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] -> masks (B, H, W) bool."""
        features = torch.nn.functional.conv2d(images - 0.5, self.filters, stride=8)
        distance = (features - self.nominal).square().mean(1, keepdim=True).sqrt()
        size = images.shape[-2:]
        anomaly_map = torch.nn.functional.interpolate(distance, size, mode="bilinear", align_corners=False)
        return self.ttt4as(anomaly_map[:, 0], features)


def main() -> None:
    """Eager, compiled, exported: print that they agree."""
    generator = torch.Generator().manual_seed(1)
    images = 0.5 + 0.02 * torch.randn(2, 3, 128, 128, generator=generator)
    images[:, :, 40:64, 72:96] = torch.rand(3, 24, 24, generator=generator)
    model = Inspector().eval()
    with torch.no_grad():
        eager = model(images)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
        exported = torch.export.export(model, (images,)).module()(images)
    print(f"pixels marked: {eager.flatten(1).sum(1).tolist()} of {eager[0].numel()} in each image")
    print(f"compiled agrees: {torch.equal(eager, compiled)}, exported agrees: {torch.equal(eager, exported)}")


if __name__ == "__main__":
    main()
