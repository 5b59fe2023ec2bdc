"""The game against a literal transcription, hand-derived values, and its own rules."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from dhbe.core.errors import DivergenceError
from dhbe.game import (
    Distillation,
    FaintTriggers,
    ImageGenerator,
    Noise,
    ScriptedNoise,
    SeededNoise,
    TriggerNetwork,
    add_patches,
)
from dhbe.game.generator import UpConv
from dhbe.game.statistics import statistics_gaps
from dhbe.methods.losses import imbalance, mean_prediction, total_variation_l1, total_variation_l2
from dhbe.training.parallel import Processes
from tests.support.game import BATCH, CPU, LATENT, STD, assert_same, make_game, play, players
from tests.support.literal import LiteralGame, literal_copy, upsample_then_convolve

MEAN = torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.float64).view(1, 3, 1, 1)


def script(seed: int, draws: int) -> tuple[list[Tensor], list[tuple[int, int]]]:
    rng = torch.Generator().manual_seed(seed)
    latents = [torch.randn(BATCH, LATENT, generator=rng).double() for _ in range(2 * draws)]
    places = [tuple(torch.randint(14, (2,), generator=rng).tolist()) for _ in range(draws)]
    return latents, places


def literal_game(network, generator, trigger, noise: Noise) -> LiteralGame:
    return literal_copy(
        network, generator, trigger, mean=MEAN, std=STD, noise=noise, batch_size=BATCH
    )


@pytest.mark.parametrize("channels_last", [False, True])
def test_two_iterations_equal_the_literal_loop(channels_last: bool) -> None:
    network, generator, trigger = players()
    latents, places = script(1, 50)
    noise = ScriptedNoise(latents, places)
    literal = literal_game(network, generator, trigger, noise)
    game = make_game(network, generator, trigger, ScriptedNoise(latents, places))
    if channels_last:
        game = game.to(memory_format=torch.channels_last)
    for _ in range(2):
        last = literal.iterate()
    trainer = play(game, iterations=2)
    assert_same(game.student, literal.student, 1e-10)
    assert_same(game.generator, literal.generator, 1e-10)
    assert_same(game.trigger_network, literal.trigger_network, 1e-10)
    assert_same(game.teacher, network, 0)
    assert last["trigger"] < 0
    assert {"student/distill", "generator/gap"} <= trainer.callback_metrics.keys()


def test_logged_losses_are_those_of_the_literal_loop() -> None:
    network, generator, trigger = players()
    latents, places = script(2, 10)
    noise = ScriptedNoise(latents, places)
    literal = literal_game(network, generator, trigger, noise)
    literal.student_moves = 1
    game = make_game(network, generator, trigger, ScriptedNoise(latents, places), moves=1)
    expected = literal.iterate()
    found = {k: float(v) for k, v in play(game, iterations=1).callback_metrics.items()}
    student = found["student/distill"] + 0.1 * found["student/patch"]
    assert student == pytest.approx(expected["student"], abs=1e-6)
    assert -found["trigger/change"] == pytest.approx(expected["trigger"], abs=1e-6)


@pytest.mark.parametrize(
    ("size", "parameters"), [(32, 2_329_091), (64, 2_476_931)], ids=["32", "64"]
)
def test_generator_has_the_published_size(size: int, parameters: int) -> None:
    generator = ImageGenerator(latent=256, width=64, channels=3, image_size=size)
    assert sum(p.numel() for p in generator.parameters()) == parameters
    assert generator(torch.randn(2, 256)).shape == (2, 3, size, size)


def test_trigger_network_has_the_published_size() -> None:
    network = TriggerNetwork(latent=256, width=64, channels=3, patch_size=5)
    assert sum(p.numel() for p in network.parameters()) == 413_059


@pytest.mark.parametrize("size", [5, 6, 7, 8, 28, 32, 40, 96, 224, 256])
def test_generator_sizes(size: int) -> None:
    generator = ImageGenerator(latent=4, width=2, channels=1, image_size=size)
    images = generator(torch.randn(8, 4))
    assert images.shape == (8, 1, size, size)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.var((0, 2, 3)), torch.ones(1), atol=0.05, rtol=0)


@pytest.mark.parametrize("size", [3, 4, 5, 6, 7, 8, 9, 10, 12, 18, 40])
def test_patch_sizes_and_range(size: int) -> None:
    network = TriggerNetwork(latent=4, width=2, channels=3, patch_size=size)
    patches = network(torch.randn(8, 4))
    assert patches.shape == (8, 3, size, size)
    assert patches.abs().max() < 1


@pytest.mark.parametrize("size", [30, 33, 100])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=str(size)):
        ImageGenerator(latent=4, width=2, channels=3, image_size=size)


def test_imbalance_sees_the_classes_that_a_sure_network_never_names() -> None:
    assert float(imbalance(mean_prediction(torch.zeros(4, 10)))) == pytest.approx(0, abs=1e-12)
    turns = 200.0 * torch.eye(3)
    assert float(imbalance(mean_prediction(turns))) == pytest.approx(0, abs=1e-12), (
        "sure, and each class once"
    )
    logits = torch.tensor([[60.0, 0.0], [90.0, 0.0]], requires_grad=True)
    loss = imbalance(mean_prediction(logits))
    share = (math.exp(-60) + math.exp(-90)) / 2
    assert loss.item() == pytest.approx(-(math.log(2) + math.log(2 * share)) / 2)
    loss.backward()
    assert logits.grad is not None
    assert float(logits.grad[0, 1]) == pytest.approx(-0.5), "the nearer image is pushed"
    assert float(logits.grad[1, 1]) == pytest.approx(-0.5 * math.exp(-30))


def test_total_variation_by_loops() -> None:
    x = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    l1 = l2 = 0.0
    for dy, dx in ((0, 1), (1, 0), (-1, 1), (1, 1)):
        differences = [
            float(x[b, 0, i, j] - x[b, 0, i + dy, j + dx])
            for b in range(2)
            for i in range(3)
            for j in range(4)
            if 0 <= i + dy < 3 and j + dx < 4
        ]
        l1 += sum(map(abs, differences)) / len(differences)
        l2 += sum(d * d for d in differences) ** 0.5
    assert float(total_variation_l1(x)) == pytest.approx(l1)
    assert float(total_variation_l2(x)) == pytest.approx(l2)
    assert float(total_variation_l1(x + 3)) == pytest.approx(l1)


def test_patches_change_only_their_place_by_pixel_units() -> None:
    x, patches = torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 3, 3)
    out = add_patches(x, patches, STD.float(), left=5, top=2)
    assert out[:, :, 2:5, 5:8].sub(1 / STD.float()).abs().max() < 1e-6
    out[:, :, 2:5, 5:8] = 0
    assert out.abs().max() == 0
    assert x.abs().max() == 0


def moved(game: Distillation, move: Callable[[], None]) -> dict[str, tuple[bool, bool]]:
    """Per player: (some weight changed, some buffer changed)."""
    names = ("student", "teacher", "generator", "trigger_network")
    before = {n: copy.deepcopy(getattr(game, n).state_dict()) for n in names}
    weights = {n: dict(getattr(game, n).named_parameters()).keys() for n in names}
    move()
    found = {}
    for n in names:
        after = getattr(game, n).state_dict()
        changed = {k for k in after if not torch.equal(after[k], before[n][k])}
        found[n] = (bool(changed & weights[n]), bool(changed - weights[n]))
    return found


class OneMove(pl.Callback):
    """Runs the three moves one by one inside a trainer and notes what each of them moved."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, tuple[bool, bool]]] = {}

    def on_train_batch_start(self, trainer, game, batch, batch_idx) -> None:
        student, generator, trigger = game.optimizers()
        self.found["student"] = moved(game, lambda: game._student_move(student))
        self.found["generator"] = moved(game, lambda: game._generator_move(generator))
        self.found["trigger"] = moved(game, lambda: game._trigger_move(trigger))


def test_each_move_moves_one_player_and_the_right_statistics() -> None:
    game = make_game(*players(), SeededNoise(0, device=CPU, dtype=torch.float64))
    watcher = OneMove()
    play(game, iterations=1, callbacks=[watcher])
    # (weights, BatchNorm statistics): S, G and P train throughout, T never.
    assert watcher.found["student"] == {
        "student": (True, True),
        "teacher": (False, False),
        "generator": (False, True),
        "trigger_network": (False, True),
    }
    assert watcher.found["generator"] == {
        "student": (False, True),
        "teacher": (False, False),
        "generator": (True, True),
        "trigger_network": (False, False),
    }
    assert watcher.found["trigger"] == {
        "student": (False, True),
        "teacher": (False, False),
        "generator": (False, True),
        "trigger_network": (True, True),
    }


def test_thirteen_student_statistics_updates_per_iteration_and_no_stray_gradients() -> None:
    game = make_game(*players(), SeededNoise(0, device=CPU, dtype=torch.float64))
    play(game, iterations=1)
    counts = {int(b) for n, b in game.student.named_buffers() if n.endswith("num_batches_tracked")}
    assert counts == {13}
    assert all(p.grad is None for p in game.teacher.parameters())


def test_control_without_trigger_network() -> None:
    network, generator, _ = players()
    game = make_game(network, generator, None, SeededNoise(0, device=CPU, dtype=torch.float64))
    trainer = play(game, iterations=1)
    assert trainer.global_step == 6
    assert "trigger/change" not in trainer.callback_metrics


def test_milestones_are_fractions_of_the_epochs() -> None:
    noise = SeededNoise(0, device=CPU, dtype=torch.float64)
    game = make_game(*players(), noise, epochs=10, moves=1)
    rates: list[float] = []

    class Rate(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module) -> None:
            rates.append(pl_module.optimizers()[0].param_groups[0]["lr"])

    play(game, iterations=1, epochs=10, callbacks=[Rate()])
    assert rates == pytest.approx([0.1] * 6 + [0.01] * 2 + [0.001] * 2)


def test_bf16_moves_still_learn_with_fresh_weights() -> None:
    """Autocast's weight cache must not leak stale or gradient-free copies from move to move."""
    network, generator, trigger = players(torch.float32)
    latents, places = script(3, 20)
    latents = [z.float() for z in latents]
    results = []
    for precision in ("32-true", "bf16-mixed"):
        game = make_game(network, generator, trigger, ScriptedNoise(latents, places), student=0.01)
        play(game, iterations=2, precision=precision)
        results.append(game)
    full, half = results
    starts = zip(("student", "generator", "trigger_network"), players(torch.float32), strict=True)
    for name, start in starts:
        steps = []
        for game in (full, half):
            pairs = zip(getattr(game, name).parameters(), start.parameters(), strict=True)
            steps.append(torch.cat([(a - b).flatten() for a, b in pairs]))
        # A stale or gradient-free copy gives a zero or unrelated step; rounding alone leaves most.
        assert torch.nn.functional.cosine_similarity(*steps, dim=0) > 0.4, name


@pytest.mark.parametrize("player", ["student", "generator", "trigger_network"])
def test_divergence_keeps_the_last_good_student(player: str, caplog) -> None:
    game = make_game(*players(), SeededNoise(0, device=CPU, dtype=torch.float64), epochs=4, moves=1)

    class Poison(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module) -> None:
            if trainer.current_epoch == 2:
                next(getattr(pl_module, player).parameters()).data.fill_(float("nan"))

    play(game, iterations=1, epochs=4, callbacks=[Poison()])
    assert game.diverged_at == 2
    assert all(p.isfinite().all() for p in game.student.parameters())
    assert "diverged in epoch 2" in caplog.text


def test_divergence_at_once_is_an_error() -> None:
    game = make_game(*players(), SeededNoise(0, device=CPU, dtype=torch.float64), student=1e300)
    with pytest.raises(DivergenceError, match=r"lower defense\.rates\.student"):
        play(game, iterations=2)


def test_upconv_equals_upsampling_then_convolution() -> None:
    """Values and all gradients, in double precision."""
    torch.manual_seed(0)
    layer = UpConv(3, 5, 3, padding=1).double()
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64, requires_grad=True)
    wanted = (x, layer.weight, layer.bias)
    ours, plain = layer(x), upsample_then_convolve(layer, x)
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=0)
    weights = torch.randn_like(ours)
    pairs = zip(
        *(torch.autograd.grad((o * weights).sum(), wanted) for o in (ours, plain)), strict=True
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def faint_triggers() -> FaintTriggers:
    return FaintTriggers(
        count=2, latent=LATENT, width=2, channels=3, image_size=16, amplitude=0.1
    ).double()


def test_faint_triggers_stay_in_their_amplitude_and_half_of_them_are_universal() -> None:
    attacker = faint_triggers()
    attacker.free.data.mul_(1000)
    x = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    noise = SeededNoise(0, device=CPU, dtype=torch.float64)
    moved = attacker.perturb(x, STD, lambda length: noise.latent(8, length), noise.place)
    change = ((moved - x) * STD).detach()
    torch.testing.assert_close(change[1:4:2], change[5::2])  # the images take turns
    for a, b in ((0, 4), (1, 3)):
        assert float((change[a] - change[b]).abs().max()) > 0.05
    for half in (change[::2], change[1::2]):
        assert 0.09 < float(half.abs().max()) <= 0.1 + 1e-12


def test_statistics_gap_by_hand() -> None:
    norm = nn.BatchNorm2d(2, eps=0.0).double().eval()
    x = torch.randn(64, 2, 4, 4, dtype=torch.float64)
    mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3), correction=0)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(std.square())
    with statistics_gaps(nn.Sequential(norm, nn.Identity()), Processes()) as gaps:
        norm(x)
        norm(2 * (x - mean.view(1, 2, 1, 1)) + (mean + 3 * std).view(1, 2, 1, 1))
    norm(x)
    same, moved = (float(gap) for gap in gaps)
    assert same == pytest.approx(0, abs=1e-12)
    assert moved == pytest.approx(3**2 + math.log(2**2) ** 2)


class AtFirstMove:
    """Remembers student and generator as they are when the student's first move begins."""

    def __init__(self, game: Distillation) -> None:
        self.student = self.generator = None
        first = game._student_move

        def remember(optimizer) -> None:
            if self.student is None:
                self.student = copy.deepcopy(game.student.state_dict())
                self.generator = copy.deepcopy(game.generator.state_dict())
            first(optimizer)

        game._student_move = remember


def test_warm_up_moves_the_generator_towards_the_statistics_and_leaves_the_student() -> None:
    network, generator, trigger = players()
    judge, gaps = copy.deepcopy(network).eval(), []
    for warm_up in (0, 30):
        noise = SeededNoise(0, device=CPU, dtype=torch.float64)
        game = make_game(network, generator, trigger, noise, statistics=1.0, warm_up=warm_up)
        seen = AtFirstMove(game)
        play(game, iterations=1)
        for key, value in network.state_dict().items():
            assert torch.equal(seen.student[key], value), key
        made = copy.deepcopy(generator)
        made.load_state_dict(seen.generator)
        with statistics_gaps(judge, Processes()) as found:
            judge(made.train()(torch.randn(64, LATENT, dtype=torch.float64)))
        gaps.append(torch.stack(found).mean().item())
    assert gaps[1] < 0.9 * gaps[0]


def test_faint_triggers_play_and_the_student_unlearns_them() -> None:
    noise = SeededNoise(0, device=CPU, dtype=torch.float64)
    start = faint_triggers()
    game = make_game(*players(), noise, faint=start)
    trainer = play(game, iterations=1)
    assert trainer.global_step == 8
    assert {"student/faint", "faint/change"} <= trainer.callback_metrics.keys()
    pairs = zip(game.faint_triggers.parameters(), start.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in pairs)
    counts = {int(b) for n, b in game.student.named_buffers() if n.endswith("num_batches_tracked")}
    assert counts == {13 + 5 + 2}


def test_the_average_follows_the_student_with_its_statistics() -> None:
    states = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, game, *_) -> None:
            states.append(copy.deepcopy(game.student.state_dict()))

    noise = SeededNoise(0, device=CPU, dtype=torch.float64)
    game = make_game(*players(), noise, averaging=0.75, moves=1)
    play(game, iterations=3, callbacks=[Keep()])
    found = game.purified.state_dict()
    assert game.purified is not game.student
    for key in found:
        if found[key].is_floating_point():
            a, b, c = (state[key] for state in states)
            torch.testing.assert_close(found[key], 0.75 * (0.75 * a + 0.25 * b) + 0.25 * c)
