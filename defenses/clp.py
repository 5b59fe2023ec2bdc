"""CLP: channel Lipschitzness pruning, data-free (Zheng et al., ECCV 2022, arXiv 2208.03111)."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn

from dhbe.contracts.defense import Defense
from dhbe.core.errors import ConfigError
from dhbe.data import DefenderData
from dhbe.methods.channels import prune_outliers
from dhbe.models import Normalized
from dhbe.models.dataflow import conv_bn_pairs
from dhbe.training.runtime import Runtime


class CLP(Defense):
    """Prune the channels whose upper Lipschitz bound stands out in their layer.

    For channel k of a convolution W followed by BatchNorm (gamma, var):
    U_k = sigma_max(reshape(W_k, C_in x K^2)) |gamma_k| / sqrt(var_k + eps); channels with
    U_k > mean + u std of their layer get gamma_k = beta_k = 0.

    Pairs are found by following the data, so that only BatchNorms that see a convolution's own
    output count: in pre-activation networks conv1 -> bn2 of each block, while the BatchNorms behind
    a sum, where several layers share a channel, are left alone.

    Args:
        u: threshold in standard deviations; the paper: 3 for CIFAR-10 and GTSRB, 5 for Tiny.
    """

    def __init__(self, *, u: Annotated[float, Gt(0)]) -> None:
        self.u = u

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        del data
        pairs = conv_bn_pairs(network, network.probe())
        if not pairs:
            raise ConfigError(
                "defense=clp: the network has no convolution followed by BatchNorm; "
                "use defense=dhbe, which needs neither"
            )
        with torch.no_grad():
            bounds = [channel_lipschitz(conv, norm) for conv, norm in pairs]
        pruned = prune_outliers([norm for _, norm in pairs], bounds, self.u)
        runtime.recorder.notes.append(f"clp pruned {pruned}")
        return network


def channel_lipschitz(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """Upper Lipschitz bound (C_out,) of each output channel of convolution and BatchNorm."""
    assert norm.running_var is not None
    largest = torch.linalg.matrix_norm(conv.weight.flatten(2), 2)  # (C_out, C_in, K^2) -> (C_out,)
    bound: Tensor = largest * norm.weight.abs() / (norm.running_var + norm.eps).sqrt()
    return bound
