"""Purification of real networks: ``python -m benchmarks.real_networks blend wanet --seeds 1 2``.

Reads published files from ``DHBE_CHECKPOINTS`` and CIFAR-10 from ``DHBE_DATA``. Victims without a
file there are made in ``--folder`` by two epochs of poisoned fine-tuning of akamaster's ResNet-20.
Everything goes through ``dhbe.purify``; triggers and test images are for the measurement only.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dhbe
from benchmarks.machine import about
from dhbe.data.loader import augment, to_float
from dhbe.data.sources import Parquet
from dhbe.models.preact import WideResNet
from dhbe.training.trainer import fast_bf16
from tests.support.networks import ResNet

Trigger = Callable[[Tensor], Tensor]
"""Images (B, 3, 32, 32) in [0, 1] -> triggered images."""
BASE = "resnet20-12fca82f.th"
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
FIELDS = ("victim", "defense", "seed", "images", "acc", "asr", "seconds", "cpu_seconds")


def grid(row: int, column: int) -> Trigger:
    """The 3x3 pattern of BadNets."""
    pattern = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    return lambda x: stamped(x, pattern.expand(3, 3, 3), row, column)


def square(row: int, column: int, *, size: int, seed: int) -> Trigger:
    """Random colours."""
    rng = torch.Generator().manual_seed(seed)
    pattern = torch.rand((3, size, size), generator=rng).mul(255).round() / 255
    return lambda x: stamped(x, pattern, row, column)


def stamped(x: Tensor, pattern: Tensor, row: int, column: int) -> Tensor:
    """A copy of the images with a pattern (3, h, w) in place of their pixels."""
    x, (_, h, w) = x.clone(), pattern.shape
    x[:, :, row : row + h, column : column + w] = pattern
    return x


def nad(x: Tensor) -> Tensor:
    """The 3x3 grid of NAD's published network, in the last rows and columns."""
    pattern = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    return stamped(x, pattern.expand(3, 3, 3), 29, 29)


def blend(*, seed: int, side: int = 32) -> Trigger:
    """0.8 x + 0.2 n; n is noise, or smooth where ``side`` is smaller than the image."""
    n = torch.rand((1, 3, side, side), generator=torch.Generator().manual_seed(seed))
    if side < 32:
        n = F.interpolate(n, 32, mode="bicubic", align_corners=True).clamp(0, 1)
    else:
        n = n.mul(255).round() / 255
    return lambda x: 0.8 * x + 0.2 * n


def sig(x: Tensor, *, right: int = 6, down: int = 0, amplitude: float = 20 / 255) -> Tensor:
    """A wave with so many periods from left to right and from top to bottom."""
    at = 2 * torch.pi * torch.arange(32) / 32
    return (x + amplitude * torch.sin(right * at + down * at[:, None])).clamp(0, 1)


def warp(*, seed: int) -> Callable[..., Tensor]:
    """WaNet of strength 0.5; the second argument adds noise to the grid."""
    rng = torch.Generator().manual_seed(seed)
    coarse = 2 * torch.rand((1, 2, 4, 4), generator=rng) - 1
    flow = F.interpolate(coarse / coarse.abs().mean(), 32, mode="bicubic", align_corners=True)
    line = torch.linspace(-1, 1, 32)
    still = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    field = (still + 0.5 / 32 * flow.permute(0, 2, 3, 1)).clamp(-1, 1)

    def trigger(x: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        where = (field.expand(len(x), -1, -1, -1) + noise).clamp(-1, 1)
        return F.grid_sample(x, where, align_corners=True, padding_mode="border")

    return trigger


@dataclass(frozen=True)
class Victim:
    """A file, or the seed and attack that make it."""

    trigger: Callable[..., Tensor] | None
    target: int
    file: str = ""
    seed: int = 0
    cover: bool = False
    """Twice as many images with a noisy trigger keep their label (WaNet)."""


VICTIMS = {
    "badnets": Victim(grid(28, 28), 0, "resnet20-badnets.pt"),
    "blend": Victim(blend(seed=5), 0, "resnet20-blend.pt"),
    "sig": Victim(sig, 0),
    "square": Victim(square(22, 3, size=8, seed=12), 7, seed=2),
    "wanet": Victim(warp(seed=0), 0, cover=True),
    "r_badnets": Victim(grid(3, 2), 6, seed=4),
    "r_square": Victim(square(2, 20, size=8, seed=11), 3, seed=1),
    "r_blend": Victim(blend(seed=21, side=8), 4, seed=3),
    "r_sig": Victim(partial(sig, right=9, amplitude=16 / 255), 8, seed=6),
    "r_wave": Victim(partial(sig, right=3, down=4, amplitude=18 / 255), 1, seed=8),
    "r_wanet": Victim(warp(seed=9), 2, seed=5, cover=True),
    "abl": Victim(grid(29, 29), 0, "WRN-16-1-gridTrigger-targetLB0.tar"),
    "nad": Victim(nad, 5, "WRN-16-1-S-model_best.pth.tar"),
    "clean": Victim(None, -1, BASE),
    "clean32": Victim(None, -1, "resnet32-d509ac18.th"),
    "clean44": Victim(None, -1, "resnet44-014dd654.th"),
    "clean56": Victim(None, -1, "resnet56-4bfd9763.th"),
}
"""The first three chose the setting of dhbe_guided; the first five, nad and clean that of auto."""
RAW = ("nad", "abl")
"""Networks over pixels in [0, 1]; ABL's file is in weight/backdoored_model of bboylyg/ABL."""


def images(part: str) -> tuple[Tensor, Tensor]:
    """CIFAR-10 as uint8 images and labels."""
    root = os.environ["DHBE_DATA"]
    source = Parquet(root=root, train="cifar10-train-*.parquet", test="cifar10-test.parquet")
    held = source.load(part, channels=3, size=32, stream=False).resident()  # type: ignore[arg-type]
    return held.images, held.labels


def normalized(x: Tensor) -> Tensor:
    """What akamaster's networks see of pixels in [0, 1]."""
    mean, std = (torch.tensor(IMAGENET[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    return (x - mean) / std


def network(name: str, folder: Path) -> nn.Module:
    """The victim, over normalised images."""
    victim, root = VICTIMS[name], Path(os.environ["DHBE_CHECKPOINTS"])
    file = root / victim.file if victim.file else folder / f"{name}.pt"
    if not file.exists():
        made = finetuned(victim)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(made.state_dict(), file)
    if name in RAW:
        return wide_network(file)
    depth = int(name.removeprefix("clean") or 20) if name.startswith("clean") else 20
    net = ResNet(16, ((depth - 2) // 6,) * 3, classes=10)
    net.load_state_dict(weights(file))
    return net.eval()


def weights(file: Path) -> dict[str, Tensor]:
    """A state dict, without the prefix of ``DataParallel``."""
    held = torch.load(file, map_location="cpu", weights_only=True)
    return {k.removeprefix("module."): v for k, v in held.get("state_dict", held).items()}


def finetuned(victim: Victim) -> nn.Module:
    """Two epochs from the published ResNet-20: 10 % poison, SGD 0.05 falling linearly to 0."""
    net = ResNet(16, (3, 3, 3), classes=10)
    net.load_state_dict(weights(Path(os.environ["DHBE_CHECKPOINTS"]) / BASE))
    net = net.train().to(memory_format=torch.channels_last)
    rng = torch.Generator().manual_seed(victim.seed)
    pixels, labels = images("train")
    share = torch.rand(len(labels), generator=rng)
    poison, cover = share < 0.1, (share > 0.8) & victim.cover
    sgd = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    order = torch.cat([torch.randperm(len(labels), generator=rng) for _ in range(2)])
    batches = order.split(128)
    assert victim.trigger is not None
    fast = fast_bf16(torch.device("cpu"))  # where it is emulated, float32 is much faster
    for step, index in enumerate(batches):
        sgd.param_groups[0]["lr"] = 0.05 * (1 - step / len(batches))
        x = to_float(augment(pixels[index], padding=4, flip=True, rng=rng))
        p, c, y = poison[index], cover[index], labels[index].clone()
        x[p], y[p] = victim.trigger(x[p] if victim.cover else pixels[index][p] / 255), victim.target
        if victim.cover:
            noise = (2 * torch.rand((int(c.sum()), 32, 32, 2), generator=rng) - 1) / 32
            x[c] = victim.trigger(x[c], noise)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            loss = F.cross_entropy(net(normalized(x)), y)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    return net


def wide_network(file: Path) -> nn.Module:
    """NAD's or ABL's WRN-16-1 over pixels in [0, 1], from the layout of xternalz."""
    held = weights(file)
    own = {"bn1": "bn", "fc": "head", "conv1": "conv1"}
    renamed = {}
    for key, value in held.items():
        head, _, rest = key.partition(".")
        if head.startswith("block"):
            block, _, inner = rest.removeprefix("layer.").partition(".")
            position = 2 * (int(head[-1]) - 1) + int(block)
            head, rest = f"blocks.{position}", inner.replace("convShortcut", "shortcut")
        renamed[f"{own.get(head, head)}.{rest}"] = value
    net = WideResNet(depth=16, widen=1, classes=10, channels=3, image_size=32)
    net.load_state_dict(renamed)
    return net.eval()


@torch.no_grad()
def measured(net: nn.Module, name: str, x: Tensor, y: Tensor) -> tuple[float, float]:
    """ACC and ASR in %; the ASR leaves out images of the target class (NaN without attack)."""
    victim = VICTIMS[name]

    def predicted(pixels: Tensor) -> Tensor:
        inputs = pixels if name in RAW else normalized(pixels)
        return torch.cat([net(part).argmax(1) for part in inputs.split(500)])

    acc = 100 * float((predicted(x / 255) == y).float().mean())
    if victim.trigger is None:
        return acc, math.nan
    attacked = (victim.trigger(x[y != victim.target] / 255) * 255).round().clamp(0, 255) / 255
    return acc, 100 * float((predicted(attacked) == victim.target).float().mean())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("victims", nargs="+", choices=VICTIMS)
    parser.add_argument("--defenses", nargs="+", default=["dhbe_guided"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--images", type=int, default=10_000, help="of the test part")
    parser.add_argument("--folder", type=Path, default=Path("victims_real"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides")
    options = parser.parse_args()
    x, y = images("test")
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: options.images]
    x, y = x[chosen], y[chosen]
    out = csv.writer(sys.stdout)
    out.writerow(FIELDS)
    for name in options.victims:
        net = network(name, options.folder)
        show(out, name, "none", "", len(y), measured(net, name, x, y), 0.0, 0.0)
        for defense in options.defenses:
            for seed in options.seeds:
                wall, cpu = time.perf_counter(), time.process_time()
                purified = dhbe.purify(
                    net,
                    image_size=32,
                    classes=10,
                    normalization="none" if name in RAW else IMAGENET,
                    defense=defense,
                    overrides=[f"seed={seed}", *options.set],
                )
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                found = measured(purified, name, x, y)
                show(out, name, defense, seed, len(y), found, wall, cpu)
    print(about(), file=sys.stderr)


def show(out, name, defense, seed, count, found, wall, cpu) -> None:
    """One row."""
    rates = [f"{v:.2f}" for v in found]
    out.writerow([name, defense, seed, count, *rates, f"{wall:.0f}", f"{cpu:.0f}"])
    sys.stdout.flush()


if __name__ == "__main__":
    main()
