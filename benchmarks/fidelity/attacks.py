"""Triggers, in levels of 255 unless said otherwise."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from attacks.advdoor import deepfool
from attacks.blind import balance
from attacks.composite import halves
from attacks.refool import GAMMA, ghost
from benchmarks.fidelity.official import Missing, Official, compare
from benchmarks.fidelity.ours import apart, attack, batches, network, scattered
from dhbe.methods.losses import contrastive


def images(count: int = 8) -> Tensor:
    """Random images (count, 3, 32, 32) of whole levels of 255."""
    ((x, _),) = batches(1, count)
    return x


def middling() -> Tensor:
    """Images without values near 0 and 255."""
    return (255 * (0.4 + 0.2 * images())).round() / 255


def shown(built: Any, x: Tensor) -> Tensor:
    """Triggered images, rounded and clipped as a victim gets them, in levels of 255."""
    y = torch.arange(len(x))
    out: Tensor = built.eval().apply(x, y=y, index=y) * 255
    return out


def arrays(x: Tensor) -> list[Any]:
    """Images as uint8 arrays (H, W, C)."""
    return [image.mul(255).round().byte().permute(1, 2, 0).numpy() for image in x]


def tensors(theirs: list[Any]) -> Tensor:
    """Arrays (H, W, C) in levels of 255 -> (B, C, H, W)."""
    return torch.from_numpy(np.stack(theirs).astype(float)).permute(0, 3, 1, 2)


def package(name: str) -> Any:
    """An installed package that is none of ours.

    Raises:
        Missing: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"needs the package {name}") from error


@compare("badnets", "ANP_backdoor/data/poison_cifar.py: generate_trigger")
def badnets(official: Official) -> float:
    """The 3x3 grid in the very corner"""
    x = images()
    pattern, mask = official.generate_trigger("checkerboard_1corner")
    theirs = [(1 - mask) * image + mask * pattern for image in arrays(x)]
    return apart([shown(attack("badnets", margin=0), x)], [tensors(theirs)])


@compare("badnets", "I-BAU/poi_util.py: patching")
def badnets_square(official: Official) -> float:
    """The white 4x4 square, one pixel from the border"""
    x = images()
    theirs = [official.patching(image / 255, "badnets") * 255 for image in arrays(x)]
    return apart([shown(attack("badnets_square", patch_size=4, margin=1), x)], [tensors(theirs)])


@compare("badnets", "DHBE/backdoor/trigger.py: mnist_triggers, cifar_triggers, Trigger")
def badnets_checkers(official: Official) -> float:
    """tri1 and tri2 of 3, 5 and 7 pixels"""
    x, found = images(), []
    for kind in ("tri1", "tri2"):
        for size in (3, 5, 7):
            name = f"{kind}_{size}x{size}"
            trigger = official.Trigger(name, official.cifar_triggers[name])
            theirs = [trigger.paste_to_np_img(image) for image in arrays(x)]
            ours = attack("badnets_tri1", pattern=kind, patch_size=size)
            found.append(apart([shown(ours, x)], [tensors(theirs)]))
    return max(found)


@compare("blend", "BackdoorBench/utils/bd_img_transform/blended.py: blendedImageAttack")
def blend(official: Official) -> float:
    """Mixture with noise, before it is rounded"""
    x, ours = images(), attack("blend")
    theirs = official.blendedImageAttack(ours.pattern, ours.alpha)
    return 255 * apart([ours.trigger(x)], [theirs(x)])


@compare("blend", "DHBE/backdoor/trigger.py: Trigger, WaterMarkTrigger")
def watermark(official: Official) -> float:
    """Watermark of a training image (theirs is truncated, ours rounded)"""
    x, ours = images(), attack("blend", pattern="train_image", alpha=0.1)
    ours.pattern.copy_(x[0])
    trigger = official.WaterMarkTrigger(arrays(x)[0], 0.1)
    return apart([shown(ours, x)], [tensors([trigger.paste_to_np_img(i) for i in arrays(x)])])


@compare("sig", "BackdoorBench/utils/bd_img_transform/sig.py: sigTriggerAttack", Union=Any)
def sig(official: Official) -> float:
    """Sine over the columns (theirs is truncated, ours rounded)"""
    x, wave = images(), official.sigTriggerAttack(40, 6)
    ours = attack("sig", delta=40, frequency=6)
    return apart([shown(ours, x)], [tensors([wave(image) for image in arrays(x)])])


@compare("lsb", "DHBE/backdoor/trigger.py: Trigger, SteganographyTrigger")
def lsb(official: Official) -> float:
    """A text in the lowest 1, 2 and 3 bits"""
    x, found = images(), []
    for bits in (1, 2, 3):
        ours = attack("lsb", bits=bits, text="Erase me")
        trigger = official.SteganographyTrigger("Erase me", bits)
        theirs = [trigger.paste_to_np_img(image) for image in arrays(x)]
        found.append(apart([shown(ours, x)], [tensors(theirs)]))
    return max(found)


@compare("wanet", "Warping-based_Backdoor_Attack-release/train.py: train")
def wanet(official: Official) -> float:
    """Warped images, before they are rounded, by the field of the same coarse noise"""
    x, drawn = images(), torch.rand(2, 4, 4)
    opt = SimpleNamespace(k=4, input_height=32, device="cpu", s=0.5, grid_rescale=1)
    with patch("torch.rand", return_value=drawn):
        ours = attack("wanet").eval()
    with patch("torch.rand", return_value=drawn[None]):
        made = official.excerpt("ins = torch.rand(1", "identity_grid = ", opt=opt)
    grids = {"noise_grid": made.noise_grid, "identity_grid": made.identity_grid}
    found = official.excerpt(
        "grid_temps = (identity_grid", "grid_temps = torch.clamp", opt=opt, **grids
    )
    grid = found.grid_temps.repeat(len(x), 1, 1, 1)
    return 255 * apart([ours.trigger(x)], [F.grid_sample(x, grid, align_corners=True)])


@compare("bpp", "BppAttack/bppattack.py: rnd1, floydDitherspeed, main")
def bpp(official: Official) -> float:
    """Eight levels, rounded, and dithered with the errors of the neighbours"""
    x, found = images(), []
    made = official.excerpt(
        "inputs_bd = torch.round(inputs_bd / 255.0",
        "inputs_bd = torch.round(inputs_bd / 255.0",
        inputs_bd=255 * x,
        squeeze_num=8,
    )
    found.append(apart([shown(attack("bpp"), x)], [made.inputs_bd.round()]))
    dithered = [official.floydDitherspeed((255 * image).numpy().copy(), 8.0) for image in x]
    theirs = torch.from_numpy(np.stack(dithered)).round().clamp(0, 255)
    found.append(apart([shown(attack("bpp", dither=True), x)], [theirs]))
    return max(found)


@compare(
    "adaptive_blend",
    "backdoor-toolbox/poison_tool_box/adaptive_blend.py: poison_transform, get_trigger_mask",
    sqrt=np.sqrt,
)
def adaptive_blend(official: Official) -> float:
    """Test images before they are rounded; shown pixels of a training mask (both 512 of 1024)"""
    x, ours = images(), attack("adaptive_blend")
    labels = torch.zeros(len(x), dtype=torch.long)
    theirs = official.poison_transform(32, ours.pattern, 0, ours.alpha).transform(x, labels)[0]
    half = official.get_trigger_mask(32, 16, 8)
    changed = ours.training_images(
        0 * x, y=labels, indicator=labels + 1, index=labels, rng=torch.Generator().manual_seed(0)
    )
    sizes = (changed.amax(1) > 0).sum((1, 2))
    return max(255 * apart([ours.trigger(x)], [theirs]), float((sizes - half.sum()).abs().max()))


@compare(
    "adaptive_k_way",
    "backdoor-toolbox/poison_tool_box/adaptive_k_way.py: k, pixel_locs, pixel_vals, "
    "poison_transform",
)
def adaptive_k_way(official: Official) -> float:
    """Test images"""
    x = images()
    kind = {"denormalizer": lambda v: v, "normalizer": lambda v: v}
    theirs = official.poison_transform(32, **kind).transform(x, torch.zeros(len(x)))[0]
    return apart([shown(attack("adaptive_k_way"), x)], [255 * theirs])


@compare("adaptive_patch", "backdoor-toolbox/poison_tool_box/adaptive_patch.py: poison_transform")
def adaptive_patch(official: Official) -> float:
    """Test images with our patches"""
    x, ours = images(), attack("adaptive_patch")
    made = official.poison_transform.__new__(official.poison_transform)
    made.denormalizer = made.normalizer = lambda v: v
    made.trigger_marks = [ours.patches[i] for i in ours.shown]
    made.trigger_masks = [ours.masks[i] for i in ours.shown]
    made.alphas, made.target_class = [1, 1], 0
    return apart([shown(ours, x)], [255 * made.transform(x, torch.zeros(len(x)))[0]])


@compare("tact", "backdoor-toolbox/poison_tool_box/TaCT.py: poison_transform")
def tact(official: Official) -> float:
    """Test images with our square"""
    x, ours = images(), attack("tact")
    mask, mark = torch.zeros(32, 32), torch.zeros(3, 32, 32)
    mask[-6:, -6:], mark[:, -6:, -6:] = 1, ours.patch
    theirs = official.poison_transform(32, mark, mask).transform(x, torch.zeros(len(x)))[0]
    return apart([shown(ours, x)], [255 * theirs])


@compare("label_consistent", "BackdoorBench/utils/bd_img_transform/lc.py: labelConsistentAttack")
def label_consistent(official: Official) -> float:
    """The four corners, overwritten and at amplitude 0.25 (theirs before it is a file)"""
    x, found = images(), []
    for amplitude in (1.0, 0.25):
        theirs = official.labelConsistentAttack("all-corners", amplitude)
        made = [theirs.poison_from_indices(image) for image in arrays(x)]
        ours = attack("label_consistent", amplitude=amplitude)
        found.append(apart([shown(ours, x)], [tensors(made)]))
    return max(found)


@compare(
    "ftrojan", "FTrojan/data.py: poison_frequency", "FTrojan/image.py: RGB2YUV, YUV2RGB, DCT, IDCT"
)
def ftrojan(official: Official) -> float:
    """Grey-ish images, whose values theirs does not wrap around"""
    official.space["cv2"] = package("cv2")
    x = middling()
    param = {"clean_label": False, "YUV": True, "window_size": 32, "channel_list": [1, 2]}
    param |= {"pos_list": [(15, 15), (31, 31)], "magnitude": 30}
    stack = np.stack(arrays(x)) / 255.0
    theirs = official.poison_frequency(stack.copy(), np.zeros(len(x)), param)
    return apart([shown(attack("ftrojan"), x)], [tensors(list(theirs * 255)).round()])


@compare(
    "ctrl",
    "BackdoorBench/utils/bd_img_transform/ctrl.py: dct_fft_impl, idct_irfft_impl, dct, idct, "
    "dct_2d, idct_2d, PoisonFre",
)
def ctrl(official: Official) -> float:
    """Grey-ish images, whose values theirs does not wrap around (it truncates, ours rounds)"""
    official.space["kornia"] = package("kornia")
    x = middling()
    made = official.PoisonFre.__new__(official.PoisonFre)
    made.channel_list, made.window_size, made.pos_list = [1, 2], 32, [(15, 15), (31, 31)]
    made.lindct, made.rgb2yuv = False, True
    theirs, _ = made.Poison_Frequency_Diff(x.clone(), None, 100.0)
    return apart([shown(attack("ctrl"), x)], [255 * theirs])


@compare(
    "refool",
    "BackdoorBench/attack/refool.py: blend_images",
    Union=Any,
    Image=SimpleNamespace(Image=Any),
)
def refool(official: Official) -> float:
    """A reflection shifted by (3, 5), mixed at 0.4 (theirs is truncated, ours rounded)"""
    official.space["cv2"] = package("cv2")
    x, reflected = images(2)
    arguments = {"max_image_size": 32, "ghost_rate": 1, "alpha_t": 0.4, "offset": (3, 5)}
    theirs = official.blend_images(
        *arrays(torch.stack([x, reflected])), **arguments, ghost_alpha=0.3
    )
    light = 0.4 * x**GAMMA + 0.6 * ghost(reflected**GAMMA, 3, 5, 0.3)
    ours = (light.clamp_min(0) ** (1 / GAMMA)).clamp(0, 1)
    return apart([255 * ours[None]], [tensors([theirs[0]])])


@compare(
    "input_aware",
    "input-aware-backdoor-attack-release/networks/models.py: threshold",
    "input-aware-backdoor-attack-release/train.py: create_bd",
    create_targets_bd=lambda y, _: y,
)
def input_aware(official: Official) -> float:
    """Triggered images by the same two networks, before they are rounded"""
    x, ours = images(), scattered(attack("input_aware"))

    class Theirs(SimpleNamespace):
        _EPSILON = 1e-7

        def __call__(self, inputs: Tensor) -> Tensor:
            made: Tensor = self.net(2 * inputs - 1).tanh() / (2 + self._EPSILON) + 0.5
            return made

        def normalize_pattern(self, made: Tensor) -> Tensor:
            return made

        def threshold(self, made: Tensor) -> Any:
            return official.threshold(self, made)

    pattern, mask = Theirs(net=ours.pattern_network), Theirs(net=ours.mask_network)
    return 255 * apart([ours.trigger(x)], [official.create_bd(x, None, pattern, mask, None)[0]])


@compare("composite", "composite-attack/utils/mixer.py: Mixer, HalfMixer")
def composite(official: Official) -> float:
    """Mixtures of windows, both directions and orders, jitter -3 to 3"""
    a, b = images(2)
    mixer, found = official.HalfMixer(), []
    for swap in (0, 1):
        for vertical in (0, 1):
            for jitter in range(-3, 4):
                draws = iter([swap, vertical, jitter, 5, 2 - jitter])
                random = SimpleNamespace(randint=lambda *_, draws=draws: next(draws))
                official.space["np"] = SimpleNamespace(random=random, ndarray=np.ndarray)
                theirs = mixer.mix(a, b)
                first, second = (b, a) if swap else (a, b)
                side = torch.tensor([0 if vertical else 1])
                cut, starts = torch.tensor([16 + jitter]), torch.tensor([[5, 2]])
                ours = halves(first[None], second[None], side, cut, starts)
                found.append(255 * apart(ours, [theirs]))
    return max(found)


@compare("composite", "composite-attack/utils/trainer.py: ContrastiveLoss, CompositeLoss")
def composite_loss(official: Official) -> float:
    """Cross-entropy with the contrastive term (of the loss)"""
    logits, y = torch.randn(32, 10), torch.randint(10, (32,))
    theirs = official.CompositeLoss([(0, 1, 2)], 1.0, "contrastive")(logits, y)
    ours = F.cross_entropy(logits, y) + contrastive(logits, y, among=y < 3)
    return apart([ours], [theirs])


@compare(
    "blind",
    "backdoors101/synthesizers/pattern_synthesizer.py: PatternSynthesizer",
    "backdoors101/utils/min_norm_solvers.py: MGDASolver",
    Synthesizer=object,
    Task=Any,
)
def blind(official: Official) -> float:
    """Triggered images; balance of 50 pairs of gradients (of a weight)"""
    x, ours = images(), attack("blind")
    made = official.PatternSynthesizer.__new__(official.PatternSynthesizer)
    made.params = SimpleNamespace(
        input_shape=(3, 32, 32), device="cpu", backdoor_dynamic_position=False
    )
    made.task = SimpleNamespace(normalize=lambda v: v)
    made.make_pattern(made.pattern_tensor, made.x_top, made.y_top)
    batch = SimpleNamespace(inputs=x.clone())
    made.synthesize_inputs(batch)
    found = [apart([shown(ours, x)], [255 * batch.inputs])]
    for _ in range(50):
        pair = torch.randn(2, 20) * torch.rand(2, 1) + torch.randn(20)
        share = official.MGDASolver.find_min_norm_element([[v] for v in pair])[0][0]
        found.append(abs(float(share) - float(balance(*pair))))
    return max(found)


@compare("advdoor", "AdvDoor/src/attacks/Deepfool.py: deepfool")
def advdoor(official: Official) -> float:
    """Perturbations of 8 images by targeted DeepFool, at most 99 steps"""
    net, x, found = network(), images(), []
    for value in net.network.head.parameters():
        value.data.mul_(50)

    def iterate(given: list[Any]) -> list[Any]:
        image = torch.from_numpy(np.asarray(given[0])).requires_grad_(True)
        logits = net(image[None])[0]
        slopes = [
            torch.autograd.grad(logits[k], image, retain_graph=True)[0].numpy()
            for k in (source, target)
        ]
        values = logits.detach()
        return [*slopes, values.numpy()[None], values.softmax(0).numpy()[None]]

    for image in x:
        source = int(net(image[None]).argmax())
        target = (source + 3) % 10
        helper = SimpleNamespace(iterate=iterate)
        theirs, steps, _ = official.deepfool(helper, image.numpy(), source, target, max_iter=99)
        ours = deepfool(
            net, image, source=source, target=target, steps=100, overshoot=0.02, confidence=0.8
        )
        if steps < 98:
            found.append(255 * apart([ours], [torch.from_numpy(theirs)]))
    return max(found)
