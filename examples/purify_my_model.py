"""Purify a network of your own: ``python examples/purify_my_model.py WEIGHTS [--clean FOLDER]``.

Replace ``MyNetwork`` by your class. ``dhbe.purify`` takes any module from images to logits; nothing
is trained on your data unless you give ``--clean`` and a defense that uses it.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import dhbe


class MyNetwork(nn.Module):
    """A plain convolutional network for 32-pixel images."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        )
        self.classifier = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, 32, 32) -> logits (B, classes)."""
        logits: Tensor = self.classifier(self.features(x).mean(dim=(2, 3)))
        return logits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path, help="state dict: torch.save(model.state_dict(), …)")
    parser.add_argument("--defense", default="auto", help="needs no images (minutes on a CPU)")
    parser.add_argument("--clean", type=Path, help="folder CLEAN/<class>/<image>, for a defense")
    parser.add_argument("--report", type=Path, default=Path("purified"), help="new folder")
    given = parser.parse_args()

    model = MyNetwork()
    model.load_state_dict(torch.load(given.weights, weights_only=True))
    purified = dhbe.purify(
        model,
        image_size=32,
        normalization="cifar10",  # what stands before your network; None asks the network
        defense=given.defense,
        clean=given.clean,
        report=given.report,
    )
    target = given.weights.with_stem(f"{given.weights.stem}-purified")
    torch.save(purified.state_dict(), target)  # same keys, so it loads with strict=True
    print(f"{target}, and what changed: {given.report / 'report.html'}")
