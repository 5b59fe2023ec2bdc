"""Compilation of trainings; results stay equal up to rounding.

It changes networks in place, without a wrapper, and only while a training lasts: names of weights,
checkpoints and copies stay what they are.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

log = logging.getLogger(__name__)
Compile = Literal["never", "default", "reduce-overhead"]
"""``reduce-overhead`` replays CUDA graphs on a GPU."""
GRAPHS = 16
"""Compiled graphs at most; the game has nine. Varying batch shapes fall back to eager mode."""


@contextmanager
def compiled(networks: Iterable[nn.Module], mode: Compile) -> Iterator[None]:
    """``torch.compile`` the networks while the block lasts, one graph per shape of their input.

    A network that cannot be compiled runs as it is, after a warning.
    """
    networks = list(networks)
    if mode == "never" or not networks:
        yield
        return
    for network in networks:
        fast = torch.compile(network._call_impl, mode=mode, dynamic=False, fullgraph=True)
        network._compiled_call_impl = partial(_call, network, fast)
    enough = torch._dynamo.config.patch(recompile_limit=GRAPHS)  # of all networks together
    early = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    try:
        with enough, early:
            yield
    finally:
        for network in networks:
            network._compiled_call_impl = None
        torch.compiler.reset()  # lets go of the graphs and their memory


def _call(network: nn.Module, fast: Callable[..., Any], *inputs: Any) -> Any:
    if is_in_torch_dispatch_mode():  # the work of a sampled batch is counted, operator by operator
        return network._call_impl(*inputs)
    refusals = torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit
    try:
        return fast(*inputs)
    except refusals as error:  # nothing has been computed yet
        name, said = type(network).__name__, " ".join(str(error).split())[:200]
        log.warning("trainer.compile: %s is not compiled but runs as it is (%s)", name, said)
        network._compiled_call_impl = None
        return network(*inputs)


def eager() -> AbstractContextManager[object]:
    """For passes beside the training: compiled networks run as they are, no graph is made."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and its import takes seconds
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def begin_step() -> None:
    """Say that outputs of compiled networks from before are done with: CUDA graphs reuse them."""
    if "torch._inductor.cudagraph_trees" in sys.modules:  # else there are none
        torch.compiler.cudagraph_mark_step_begin()
