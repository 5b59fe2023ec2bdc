"""Peak memory and time of one training step: ``python -m benchmarks.memory NAME [--recompute]``.

NAME is resnet18 or preact_resnet18; 32-pixel images, float32, forward and backward pass, on a GPU
if there is one. The peak is above what the process held before; so each case takes a fresh process.
"""

from __future__ import annotations

import argparse

import torch

from dhbe.acceleration import recomputed
from dhbe.models.preact import PreActResNet18
from dhbe.models.resnet import resnet
from dhbe.results import Clock

SHAPE = {"classes": 10, "channels": 3, "image_size": 32}
NETWORKS = {
    "resnet18": lambda: resnet(depth=18, stem="cifar", **SHAPE),
    "preact_resnet18": lambda: PreActResNet18(**SHAPE),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("name", choices=NETWORKS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--recompute", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = NETWORKS[options.name]().to(device).to(memory_format=torch.channels_last)
    images = torch.randn(options.batch, 3, 32, 32, device=device)
    clock = Clock(device)
    with clock.stage("warm"):
        network(images[:2]).sum().backward()  # gradients and libraries are there before
    with clock.stage("before"):
        pass
    with clock.stage("step"), recomputed([network], options.recompute):
        network(images).sum().backward()
    peak = clock.peaks["step"] - clock.peaks["before"]
    print(f"{options}: {peak:.0f} MB, {clock.seconds['step']:.1f} s")


if __name__ == "__main__":
    main()
