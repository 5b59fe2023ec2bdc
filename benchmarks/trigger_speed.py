"""Seconds per trigger on 512 images against a forward pass: ``python -m benchmarks.trigger_speed``.

Medians of interleaved runs; the yardstick is ResNet-18 on the same 32x32 images, in eval mode. The
attacks that consult a network of their own are listed too, below the parameter-free ones.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from benchmarks.fidelity.ours import CONF, attack
from dhbe.core.provenance import commit
from dhbe.models.resnet import resnet


def attacks():
    """Every attack config but ``none``, as (name, attack)."""
    for file in sorted((CONF / "attack").glob("*.yaml")):
        if file.stem != "none":
            picture = str(CONF.parent / "tests" / "trigger.png")
            yield file.stem, attack(file.stem, path=picture).eval()


def seconds(function) -> float:
    """Duration of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    x = torch.rand(options.batch, 3, 32, 32).to(memory_format=torch.channels_last)
    y, index = torch.arange(options.batch) % 10, torch.arange(options.batch)
    network = resnet(depth=18, stem="cifar", classes=10, channels=3, image_size=32).eval()
    network = network.to(memory_format=torch.channels_last)
    zoo = sorted(attacks(), key=lambda a: any(True for _ in a[1].parameters()))
    calls = {"resnet18 forward": lambda: network(x)}
    for name, built in zoo:
        calls[name] = lambda a=built: a.apply(x, y=y, index=index)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(options.rounds + 1):
        for name, call in calls.items():
            taken = seconds(call)
            if round_:
                times[name].append(taken)
    yardstick = statistics.median(times["resnet18 forward"])
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, batch "
        f"{options.batch}, medians of {options.rounds}, commit {commit()}\n"
    )
    print("| what | ms | share of a ResNet-18 forward |\n|---|---|---|")
    for name, found in times.items():
        median = statistics.median(found)
        print(f"| {name} | {1000 * median:.1f} | {100 * median / yardstick:.1f} % |")


if __name__ == "__main__":
    main()
