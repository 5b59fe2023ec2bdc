"""Writers of one network in every file that others write."""

from __future__ import annotations

import argparse
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import timm.utils
import torch
from pytorch_lightning.utilities.parsing import AttributeDict
from safetensors.torch import save_file
from torch import Tensor, nn

Weights = dict[str, Tensor]


def prefixed(weights: Weights, prefix: str) -> Weights:
    """The same behind a wrapper."""
    return {prefix + k: v for k, v in weights.items()}


def lightning(weights: Weights, *, classes: int, image_size: int) -> dict[str, Any]:
    """As ``Trainer.save_checkpoint`` writes it after training, with a loss that has weights."""
    del image_size
    return {
        "epoch": 4,
        "global_step": 1955,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": OrderedDict(prefixed(weights, "model."))
        | {"criterion.weight": torch.ones(classes)},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 5}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.9)}},
        "optimizer_states": [
            {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []}
        ],
        "lr_schedulers": [{"milestones": Counter([3, 5])}],
        "hparams_name": "kwargs",
        "hyper_parameters": AttributeDict(learning_rate=0.1, num_classes=classes),
    }


def backdoorbench(
    weights: Weights, *, classes: int, image_size: int, images: int = 20
) -> dict[str, Any]:
    """As ``save_attack_result`` of BackdoorBench writes it.

    Args:
        images: poisoned ones, each of which it lists (10,000 for a tenth of Tiny-ImageNet).
    """
    poisoned = {
        "bd_data_container": {
            "save_folder_path": "record/badnet/bd_train_dataset",
            "data_dict": {
                np.int64(i): {
                    "path": f"record/badnet/bd_train_dataset/3/{i}.png",
                    "other_info": [0, np.int64(3)],
                }
                for i in range(images)
            },
            "save_file_format": ".png",
        },
        "getitem_all": True,
        "getitem_all_switch": False,
        "original_index_array": np.arange(5 * images),
        "poison_indicator": np.arange(5 * images) % 5 == 0,
        "save_folder_path": None,
    }
    return {
        "model_name": "resnet_small",
        "num_classes": classes,
        "model": weights,
        "data_path": "../data",
        "img_size": [image_size, image_size, 3],
        "clean_data": "cifar10",
        "bd_train": poisoned,
        "bd_test": poisoned,
    }


def timm_script(weights: Weights, *, classes: int, image_size: int) -> dict[str, Any]:
    """As timm's ``train.py`` writes it, with averaged weights beside the last."""
    del image_size
    args = argparse.Namespace(model="resnet_small", num_classes=classes, mean=None, std=None)
    state = {"epoch": 9, "arch": "resnet_small", "version": 2, "args": args, "metric": 71.5}
    return state | {"state_dict": weights, "state_dict_ema": weights, "optimizer": {"state": {}}}


def one_storage(weights: Weights) -> Weights:
    """All numbers in one block of memory, as flattened optimizers leave them."""
    floats = {k: v for k, v in weights.items() if v.is_floating_point()}
    flat = torch.cat([v.flatten() for v in floats.values()])
    views = flat.split([v.numel() for v in floats.values()])
    joined = {k: p.view_as(v) for (k, v), p in zip(floats.items(), views, strict=True)}
    return {k: joined.get(k, v) for k, v in weights.items()}


WRAPPINGS: dict[str, Callable[..., Any]] = {
    "state dict (BackdoorBox)": lambda w, **_: dict(w),
    "{net: module.*} (pytorch-cifar, data parallel)": lambda w, **_: {
        "net": prefixed(w, "module."),
        "acc": 93.1,
        "epoch": 199,
    },
    "{model, optimizer, args} (torchvision's references)": lambda w, **_: {
        "model": w,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "lr_scheduler": {"last_epoch": 89},
        "epoch": 89,
        "args": argparse.Namespace(data_path="/data", lr=0.1, output_dir="."),
    },
    "compiled": lambda w, **_: prefixed(w, "_orig_mod."),
    "Lightning, with a loss that has weights": lightning,
    "BackdoorBench attack_result.pt": backdoorbench,
    "BackdoorBench before its image folders": lambda w, classes, image_size: {
        "model_name": "resnet_small",
        "num_classes": classes,
        "model": w,
        "data_path": "../data",
        "img_size": (image_size, image_size, 3),
        "clean_data": "cifar10",
        "bd_train": {"x": torch.zeros(4, 3, 8, 8), "y": torch.zeros(4, dtype=torch.long)},
        "bd_test": {"x": None, "y": None, "original_index": [3, 1]},
    },
    "timm, with averaged weights": timm_script,
    "parameters": lambda w, **_: {k: nn.Parameter(v, requires_grad=False) for k, v in w.items()},
    "views of one storage": lambda w, **_: one_storage(w),
    "normalisation in front": lambda w, **_: (
        prefixed(w, "1.")
        | {
            "0.mean": torch.tensor([0.4914, 0.4822, 0.4465]),
            "0.std": torch.tensor([0.2023, 0.1994, 0.201]),
        }
    ),
}
"""What people hand to ``torch.save``: weights, classes=, image_size= -> content."""


class Wrapped(pl.LightningModule):
    """A user's LightningModule around a network."""

    def __init__(self, network: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="network")
        self.network = network


def by_lightning(network: nn.Module, file: Path, classes: int) -> None:
    """Saved by a Trainer."""
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(Wrapped(network, classes))
    trainer.save_checkpoint(file)


def by_timm(network: nn.Module, file: Path, classes: int) -> None:
    """Saved by timm's own CheckpointSaver."""
    args = argparse.Namespace(model="resnet_small", num_classes=classes, lr=0.1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    saver = timm.utils.CheckpointSaver(network, optimizer, args, checkpoint_dir=str(file.parent))
    saver._save(str(file), epoch=3, metric=71.5)


def programs(image_size: int, channels: int) -> dict[str, Callable[[nn.Module, Path], object]]:
    """Writers of files that hold the network's code as well."""
    x = torch.zeros(2, channels, image_size, image_size)
    return {
        "TorchScript, scripted": lambda n, file: torch.jit.save(torch.jit.script(n), file),
        "TorchScript, traced": lambda n, file: torch.jit.save(torch.jit.trace(n, x), file),
        "torch.export": lambda n, file: torch.export.save(torch.export.export(n, (x,)), file),
    }


def save_all(
    network: nn.Module, folder: Path, *, classes: int, image_size: int, channels: int = 3
) -> dict[str, Path]:
    """Write the network in every format; description -> file."""
    weights, files = network.state_dict(), {}

    def new(description: str, suffix: str) -> Path:
        files[description] = folder / f"given{len(files)}{suffix}"
        return files[description]

    for name, wrap in WRAPPINGS.items():
        content = wrap(weights, classes=classes, image_size=image_size)
        torch.save(content, new(name, ".pt"))
    old = {"_use_new_zipfile_serialization": False}
    torch.save({"state_dict": prefixed(weights, "module.")}, new("before torch 1.6", ".pth"), **old)
    save_file(weights, new("safetensors", ".safetensors"))
    by_lightning(network, new("written by Lightning itself", ".ckpt"), classes)
    by_timm(network, new("written by timm itself", ".pth.tar"), classes)
    for name, write in programs(image_size, channels).items():
        write(network, new(name, ".pt2"))
    return files
