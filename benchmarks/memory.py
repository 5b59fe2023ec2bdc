"""Peak memory and time of one training step with and without ``trainer.recompute``.

``python -m benchmarks.memory [--batch 32]``: ResNet-18 and PreActResNet-18, 32-pixel images,
float32, forward and backward pass. The peak is that of all tensors made in the step.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.profiler import ProfilerActivity, profile

from dhbe.models.preact import PreActResNet18
from dhbe.models.resnet import resnet
from dhbe.training.compile import recomputed

SHAPE = {"classes": 10, "channels": 3, "image_size": 32}
NETWORKS = {
    "resnet18": lambda: resnet(depth=18, stem="cifar", **SHAPE),
    "preact_resnet18": lambda: PreActResNet18(**SHAPE),
}


def peak_mb(events) -> float:
    """The most that allocations and releases, in order, add up to."""
    held = peak = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    batch = parser.parse_args().batch
    images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    for name, build in NETWORKS.items():
        network = build().to(memory_format=torch.channels_last)
        network(images).sum().backward()  # gradients and libraries are there before
        for switch in (False, True):
            with recomputed([network], switch):
                start = time.perf_counter()
                network(images).sum().backward()
                seconds = time.perf_counter() - start
                with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
                    network(images).sum().backward()
            peak = peak_mb(seen.profiler.kineto_results.events())
            print(f"{name} recompute={switch}: {peak:.0f} MB, {seconds:.2f} s")


if __name__ == "__main__":
    main()
