"""Defenses that tune weights."""

from __future__ import annotations

import collections.abc
import contextlib
import copy
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor, nn

from benchmarks.fidelity.official import Official, compare
from benchmarks.fidelity.ours import (
    SPEC,
    apart,
    batches,
    defense,
    network,
    repaired,
    runtime,
    scattered,
    weights,
)
from defenses.cetf import fitness
from defenses.fip import Spectrum
from dhbe.methods.losses import total_variation_squared
from dhbe.models import Normalized
from dhbe.models.dataflow import classifier
from dhbe.models.hooks import capture, stages
from dhbe.models.shortcuts import blocks, scale_shortcut

CE, NO = nn.CrossEntropyLoss(), torch.zeros(1)
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


@compare("nad", "NAD/main.py: train_step", "NAD/at.py: AT", accuracy=lambda *_, **__: [NO, NO])
def nad(official: Official) -> float:
    """Weights after two steps beside the same fine-tuned teacher"""
    net, given = network((8, 12, 16)), batches(2, 8)
    method = defense("nad", epochs=1, learning_rate=1e-3)
    ours = repaired(method, net, given)
    theirs, teacher = copy.deepcopy(net), copy.deepcopy(net)
    runtime(given).train(teacher, None, method.teacher_schedule)

    def telling(model: Any) -> Any:
        places = stages(model.eval(), model.probe())[-3:]

        def call(x: Tensor) -> tuple[Tensor, ...]:
            with capture(places) as seen:
                logits = model(x)
            return *seen, logits

        call.train = model.train  # type: ignore[attr-defined]
        return call

    options = {f"beta{i}": beta for i, beta in enumerate(method.betas, start=1)}
    opt = SimpleNamespace(cuda=False, print_freq=9, **options)
    nets = {"snet": telling(theirs), "tnet": telling(teacher.eval())}
    losses = {"criterionCls": CE, "criterionAT": official.AT(method.power)}
    official.train_step(opt, given, nets, method.schedule.optimizer(theirs), losses, 1)
    return apart(weights(ours), weights(theirs))


@compare(
    "i_bau",
    "I-BAU/hypergrad.py: DifferentiableOptimizer, GradientDescent, gd_step, grad_unused_zero, "
    "get_outer_gradients, update_tensor_grads, fixed_point, cat_list_to_tensor",
    "I-BAU/defense.py: loss_inner, loss_outer",
    List=list,
    Callable=collections.abc.Callable,
    torch_grad=torch.autograd.grad,
    criterion=CE,
)
def i_bau(official: Official) -> float:
    """Weights after a round on one batch: perturbation, hypergradient of K = 5, step"""
    net, given = network((8,)), batches(1, 100)
    ((x, y),) = given
    method = defense("i_bau", epochs=1)
    ours = repaired(method, net, given)
    theirs = copy.deepcopy(net)
    marked = torch.randperm(100, generator=torch.Generator().manual_seed(1)).argmin()
    official.space["random"] = SimpleNamespace(sample=lambda *_: [int(marked)])
    official.space |= {"model": theirs, "images_list": [x], "labels_list": [y], "batchnum": 0}
    test_set = SimpleNamespace(tensors=[x])
    found = official.excerpt(
        "batch_pert = ", "for images, labels in unlloader", test_set=test_set, unlloader=given
    )
    optimizer = method.schedule.optimizer(theirs)
    optimizer.zero_grad()
    inner = official.GradientDescent(official.loss_inner, method.inner_rate)
    official.fixed_point(found.batch_pert, weights(theirs), 5, inner, official.loss_outer)
    optimizer.step()
    return apart(weights(ours), weights(theirs))


@compare(
    "ft_sam",
    "BackdoorBench/defense/ft-sam.py: _train_sam",
    "BackdoorBench/utils/defense_utils/sam/sam.py: SAM",
    "BackdoorBench/utils/defense_utils/sam/util.py: smooth_crossentropy, enable_running_stats, "
    "disable_running_stats",
    _BatchNorm=nn.modules.batchnorm._BatchNorm,
    ReduceOp=torch.distributed.ReduceOp,
    contextlib=contextlib,
)
def ft_sam(official: Official) -> float:
    """Weights and statistics after three steps with label smoothing"""
    net, given = network(), batches(3, 8)
    method = defense("ft_sam", epochs=1)
    ours = repaired(method, net, given)
    theirs = copy.deepcopy(net)
    rho = SimpleNamespace(step=lambda: method.rho)
    base = method.schedule.optimizer(theirs)
    optimizer = official.SAM(theirs.parameters(), base, theirs, 0.0, rho, adaptive=True)
    args = SimpleNamespace(device="cpu", label_smoothing=method.label_smoothing, print_freq=9)
    official._train_sam(None, args, given, theirs, optimizer, MagicMock(), CE, 1)
    return apart(floats(ours), floats(theirs))


def floats(net: nn.Module) -> list[Tensor]:
    """Weights and statistics."""
    return [v for v in net.state_dict().values() if v.is_floating_point()]


@compare(
    "sau",
    "BackdoorBench/defense/sau.py: Shared_PGD, get_perturbed_image",
    normalization=lambda x: x,
    denormalization=lambda x: x,
)
def sau(official: Official) -> float:
    """Weights after two steps, each from its own shared perturbation (Adam, rate 1e-4)"""
    net, given = network(), batches(2, 8)
    method = defense("sau", epochs=1)
    ours = repaired(method, net, given)
    theirs = copy.deepcopy(net)
    args = {"lmd_1": method.clean, "lmd_2": method.robust, "lmd_3": method.shared}
    pgd = official.Shared_PGD(theirs, net, norm_bound=method.epsilon, step_size=method.step_size)
    optimizer = method.schedule.optimizer(theirs)
    for x, y in given:
        official.excerpt(
            "images = images.to(args.device)",
            "for _ in range(args.outer_steps)",
            args=SimpleNamespace(
                device="cpu", outer_steps=1, train_mode=False, num_classes=10, **args
            ),
            images=x,
            labels=y,
            Shared_PGD_Attacker=pgd,
            model=theirs,
            model_ref=net,
            outer_opt=optimizer,
        )
    return apart(weights(ours), weights(theirs))


@compare(
    "npd",
    "BackdoorBench/defense/npd.py: train_npd, get_perturbed_image, projection, input_feature_hook",
    Metric_Aggregator=MagicMock,
)
def npd(official: Official) -> float:
    """Logits behind a polarizer after an epoch of warm-up and one of training, two steps each"""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width in (3, 8):
        layers += [nn.Conv2d(width, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    net, given = scattered(Normalized(nn.Sequential(*layers), SPEC)), batches(2, 8)
    method = defense("npd", epochs=1)
    ours = repaired(method, net, given)
    theirs = copy.deepcopy(net).requires_grad_(False)
    mix = nn.Conv2d(8, 8, 1, bias=False)
    nn.init.dirac_(mix.weight)
    plug = nn.Sequential(mix, nn.BatchNorm2d(8))
    same = {"normalization": lambda x: x, "denormalization": lambda x: x}
    helper = SimpleNamespace(**same, projection=lambda p, a: official.projection(None, p, a))
    helper.get_perturbed_image = lambda x, p: official.get_perturbed_image(helper, x, p)
    helper.evaluation = lambda *_: (0,) * 6
    target = theirs.network[3]
    lambdas = (method.clean, method.kept, method.wrong, method.target)
    official.space["plug_layer"] = plug
    official.space["args"] = SimpleNamespace(
        **{f"lmd{i}": v for i, v in enumerate(lambdas, start=1)},
        epochs=1, warm_epochs=1, lr=method.schedule.learning_rate, model_name="convbn",
        target_layer=target, device="cpu", norm_type="L2", trigger_norm=method.epsilon,
        inner_steps=method.pgd_steps, max_init=False, input_channel=3, input_height=32,
        input_width=32, dataset="cifar10", use_residual="no", save_path="",
    )  # fmt: skip
    loader = [(x, y, y, y, y) for x, y in given]
    official.train_npd(helper, theirs, plug, loader, *[None] * 3, CE, *[None] * 9)
    target.register_forward_pre_hook(official.input_feature_hook)
    x = given[0][0]
    return apart([ours(x)], [theirs(x)])


@compare("tsbd", "TSBD/tsbd.py: train_finetuning_reg")
def tsbd(official: Official) -> float:
    """Weights after three steps of activeness-aware fine-tuning"""
    net, given = network(), batches(3, 8)
    method = defense("tsbd", epochs=1)
    with patch("defenses.tsbd.unlearn"), patch("defenses.tsbd.reinitialise"):
        ours = repaired(method, net, given)
    theirs = copy.deepcopy(net)
    optimizer, args = method.schedule.optimizer(theirs), SimpleNamespace(device="cpu")
    official.train_finetuning_reg(None, args, theirs, CE, optimizer, given, method.r, method.alpha)
    return apart(weights(ours), weights(theirs))


def trainer(net: nn.Module, optimizer: Any, **more: Any) -> SimpleNamespace:
    """What the steps of BackdoorBench's trainers find on themselves."""
    kind = {"non_blocking": False, "amp": False, "criterion": CE, "scaler": NO_SCALER}
    return SimpleNamespace(model=net, optimizer=optimizer, **kind, **more)


@compare("ulrl", "ULRL/utils/trainer_cls.py: one_forward_backward_unlearn")
def ulrl_unlearns(official: Official) -> float:
    """Change of the classifier's rows after three steps of unlearning with clipping"""
    net, given = network(), batches(3, 8)
    method = defense("ulrl", epochs=1)
    with patch("defenses.ulrl.outliers", return_value=[]) as judge:
        method.suspicious(net, MagicMock(clean=lambda: range(24)), runtime(given))
    theirs = copy.deepcopy(net)
    state = trainer(theirs, method.unlearn_schedule.optimizer(theirs))
    for x, y in given:
        official.one_forward_backward_unlearn(state, x, y, "cpu")
    change = (classifier(theirs).weight - classifier(net).weight).abs().sum(1)
    return apart([torch.from_numpy(judge.call_args.args[0])], [change])


@compare("ulrl", "ULRL/utils/trainer_cls.py: RelearningTrainer", BackdoorModelTrainer=object)
def ulrl(official: Official) -> float:
    """Weights after three steps of relearning, two rows held away"""
    net, given = network(), batches(3, 8)
    method = defense("ulrl", epochs=1)
    with (
        patch.object(type(method), "suspicious", return_value=[3, 5]),
        patch("defenses.ulrl.reset"),
    ):
        ours = repaired(method, net, given)
    theirs = copy.deepcopy(net)
    theirs.head = classifier(theirs)
    before = theirs.head.weight.detach().clone()[[3, 5]]
    more = {"linear_name": "head", "neuron_indices": [3, 5], "weight_mat_ori": before}
    state = trainer(theirs, method.relearn_schedule.optimizer(theirs), **more)
    state.relearn_alpha = method.alpha
    for x, y in given:
        official.RelearningTrainer.one_forward_backward(state, x, y, "cpu")
    del theirs.head
    return apart(weights(ours), weights(theirs))


class Same(nn.Module):
    """Stands for the authors' augmentation."""

    def __init__(self, _: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """A copy."""
        return x.clone()


@compare("aft, pbe", "BPE/aft_train.py: aft_train", PostTensorTransform=Same)
def pbe(official: Official) -> float:
    """Weights after two adversarial steps, PGD of seven"""
    net, given = network(), batches(2, 8)
    method = defense("aft", epochs=1, adversarial_epochs=1, pgd_steps=7)
    ours = repaired(method, net, given)
    theirs = copy.deepcopy(net)
    opt = SimpleNamespace(device="cpu", adversarial_maxiter=7)
    official.aft_train(theirs, method.schedule.optimizer(theirs), None, given, opt, adv=True)
    return apart(weights(ours), weights(theirs))


@compare("abl", "ABL/backdoor_isolation.py: train_step", accuracy=lambda *_, **__: [NO, NO])
def abl(official: Official) -> float:
    """Weights after three steps of isolation, by flooding and, on single images, by ascent"""
    differ = []
    for kind, ours_kind, size in (("Flooding", "flooding", 8), ("LGA", "local_ascent", 1)):
        net, given = network(), batches(3, size)
        method = defense("abl", trap=ours_kind, gamma=2.0, epochs=1)
        ours = copy.deepcopy(net)
        with (
            patch("defenses.abl.fresh", return_value=ours),
            patch("defenses.abl.isolated", side_effect=InterruptedError),  # the next step
            contextlib.suppress(InterruptedError),
        ):
            repaired(method, net, given)
        theirs = copy.deepcopy(net)
        opt = {"gradient_ascent_type": kind, "gamma": 2.0, "flooding": 2.0, "print_freq": 9}
        optimizer = method.isolation_schedule.optimizer(theirs)
        official.train_step(SimpleNamespace(cuda=False, **opt), given, theirs, optimizer, CE, 1)
        differ.append(apart(weights(ours), weights(theirs)))
    return max(differ)


@compare("fst", "Backdoor_Safety_Tuning/fine_tune/ft.py: main")
def fst(official: Official) -> float:
    """Weights after three steps from the same new classifier"""
    net, given = network(), batches(3, 8)
    method = defense("fst", epochs=1)
    with patch("defenses.fst.restart"):
        ours = repaired(method, net, given)
    theirs = copy.deepcopy(net).train()
    before = classifier(theirs).weight.detach().clone()
    official.excerpt(
        "for batch_idx, (x, labels",
        "for batch_idx, (x, labels",
        args=SimpleNamespace(
            lb_smooth=None, ft_mode="fst", alpha=method.alpha, linear_name="network.head"
        ),
        net=theirs,
        criterion=CE,
        optimizer=method.schedule.optimizer(theirs),
        train_data=given,
        weight_mat_ori=before,
        original_linear_norm=before.norm(),
        train_correct=0,
        train_tot=0,
        batch_loss_list=[],
    )
    return apart(weights(ours), weights(theirs))


@compare(
    "ssft",
    "Backdoor-Defense-Via-Suppressing-Model-Shortcuts/SSFT.py: forward_hook, "
    "register_forwardhook_for_resnet",
    "Backdoor-Defense-Via-Suppressing-Model-Shortcuts/core/models/resnet.py: BasicBlock, _ResNet",
)
def ssft(official: Official) -> float:
    """Logits of their ResNet-18 with each shortcut in turn times 0.3"""
    torch.manual_seed(0)
    net = scattered(Normalized(official._ResNet(official.BasicBlock, [2, 2, 2, 2]), SPEC))
    ((x, _),), found = batches(1, 2), []
    for place in range(8):
        ours, theirs = copy.deepcopy(net), copy.deepcopy(net)
        scale_shortcut(blocks(ours)[place], 0.3)
        loc = f"layer{place // 2 + 1}.{place % 2}.shortcut"
        official.register_forwardhook_for_resnet(theirs, "resnet18", 0.3, loc)
        found.append(apart([ours(x)], [theirs(x)]))
    return max(found)


@compare(
    "fip",
    "FIP-Fisher-Backdoor-Removal/src/networks/svd_layers.py: SVDConv2d",
    rearrange=lambda x, _, **to: x.view(-1, to["cin"], to["h"], to["w"]) if to else x.flatten(1),
)
def fip(official: Official) -> float:
    """Output of a convolution whose singular values are shifted (Fast-FIP)"""
    theirs = official.SVDConv2d(3, 8, 3)
    theirs.delta.data.normal_()
    ours = Spectrum(theirs.weight)
    ours.shift.data.copy_(theirs.delta.data)
    ((x, _),) = batches(1, 4)
    return apart([nn.functional.conv2d(x, ours(theirs.weight), theirs.bias)], [theirs(x)])


@compare("cetf", "2024ZhouCETF/problem.py: MyProblem", ea=SimpleNamespace(Problem=object))
def cetf(official: Official) -> float:
    """Fitness, up to 20,000, of 20 rectangles in an image of 160 pixels"""
    net = network()
    (((image, *scene), _),) = batches(1, 11)
    big = torch.nn.functional.interpolate(torch.stack([image, *scene]), 160)
    problem = official.MyProblem.__new__(official.MyProblem)
    problem.net, problem.img, problem.bk = net, big[0], [*big[1:]]
    label = net(big[:1]).argmax(1)
    problem.orilabel = label
    problem.color1, problem.color2, problem.color3 = big[0].mean(dim=(1, 2))
    drawn = torch.randint(4, 80, (20, 4)).numpy()
    where = torch.zeros(20, 160, 160, dtype=torch.bool)
    for mask, (left, top, width, height) in zip(where, drawn, strict=True):
        mask[top : top + height, left : left + width] = True
    with torch.no_grad():
        theirs = problem.evalVars(drawn)
        ours = fitness(net, big[0], int(label), big[1:], where, 0.8)
    return apart([ours], [torch.from_numpy(theirs)[:, 0]])


@compare(
    "trap_and_replace", "Trap-and-Replace-Backdoor-Defense/utils/utils.py: total_variation_loss"
)
def trap_and_replace(official: Official) -> float:
    """Total variation of the decoded pictures"""
    ((x, _),) = batches(1, 4)
    return apart([total_variation_squared(x)], [official.total_variation_loss(x)])
