"""DHBE: data-free holistic backdoor erasing (arXiv 2306.08009), the adapter around the game."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Lt

from dhbe.contracts.defense import Defense
from dhbe.core.errors import got
from dhbe.core.rng import fork
from dhbe.core.types import DataSpec
from dhbe.data import DefenderData
from dhbe.data.natural import natural_inputs
from dhbe.data.splits import SIZES
from dhbe.game import (
    Distillation,
    FaintTriggers,
    ImageGenerator,
    LearningRates,
    LossWeights,
    SeededNoise,
    TriggerNetwork,
)
from dhbe.game.gallery import Gallery
from dhbe.game.statistics import with_statistics
from dhbe.models import Normalized
from dhbe.models.interface import channels_last
from dhbe.training.runtime import Runtime


class DHBE(Defense):
    """Play the game from a copy of the suspect; the student of the last epoch is the result.

    Args:
        epochs, iterations: length of the game, in epochs of that many iterations.
        batch_size: latents per move.
        student_moves: student steps per iteration.
        latent, width: noise length and width of the image generator.
        patch_latent, patch_width: of the trigger network.
        patch_size: pixels of the trigger network's patch; 0 plays without trigger network.
        warm_up: generator moves before the first student move. Ours, as what follows.
        averaging: decay per iteration of the student's average, which is the result then; 0 takes
            the last student.
        faint_triggers: how many universal changes of the whole image attack beside the patches,
            together with a second trigger network; 0 plays without both.
        faint_width: of that network.
        faint_amplitude: the largest change of a pixel that they make, of [0, 1].
    """

    def __init__(
        self,
        *,
        epochs: Annotated[int, Ge(1)],
        iterations: Annotated[int, Ge(1)],
        batch_size: Annotated[int, Ge(2)],
        student_moves: Annotated[int, Ge(1)],
        latent: Annotated[int, Ge(1)],
        width: Annotated[int, Ge(1)],
        patch_latent: Annotated[int, Ge(1)],
        patch_width: Annotated[int, Ge(1)],
        patch_size: Annotated[int, Ge(0)],
        warm_up: Annotated[int, Ge(0)],
        averaging: Annotated[float, Ge(0), Lt(1)],
        faint_triggers: Annotated[int, Ge(0)],
        faint_width: Annotated[int, Ge(1)],
        faint_amplitude: Annotated[float, Gt(0)],
        weights: LossWeights,
        rates: LearningRates,
    ) -> None:
        self.epochs, self.iterations = epochs, iterations
        self.batch_size, self.student_moves = batch_size, student_moves
        self.latent, self.width = latent, width
        self.patch_latent, self.patch_width, self.patch_size = patch_latent, patch_width, patch_size
        self.warm_up, self.averaging = warm_up, averaging
        self.faint_triggers, self.faint_width = faint_triggers, faint_width
        self.faint_amplitude = faint_amplitude
        self.weights, self.rates = weights, rates

    def fits(self, spec: DataSpec) -> None:
        if spec.image_size not in SIZES:
            raise got("data.image_size", spec.image_size, f"with defense=dhbe one of {SIZES}")
        if self.patch_size > spec.image_size:
            allowed = f"at most data.image_size={spec.image_size}"
            raise got("defense.patch_size", self.patch_size, allowed)

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        del data  # no image at all is looked at
        if self.weights.statistics and not with_statistics(network):
            runtime.recorder.notes.append(
                "the network has no BatchNorm statistics: weights.statistics has no effect"
            )
        game, iterations = self.game(network, runtime), range(self.iterations)
        gallery = Gallery(network, runtime)
        runtime.fit(
            game, iterations, epochs=self.epochs, callbacks=[gallery], networks=game.networks
        )
        if game.diverged_at is not None:
            runtime.recorder.notes.append(
                f"the game diverged in epoch {game.diverged_at}; the student before it is kept"
            )
        network.network = game.purified
        return network

    def game(self, network: Normalized, runtime: Runtime) -> Distillation:
        """The four players around a copy of ``network``, initialised from the run's seed."""
        channels = network.mean.shape[1]
        with fork(runtime.derive("players")):
            generator = ImageGenerator(
                latent=self.latent,
                width=self.width,
                channels=channels,
                image_size=network.spec.image_size,
                statistics=natural_inputs(network.spec),
            )
            trigger_network = faint_triggers = None
            if self.patch_size:
                trigger_network = TriggerNetwork(
                    latent=self.patch_latent,
                    width=self.patch_width,
                    channels=channels,
                    patch_size=self.patch_size,
                )
            if self.faint_triggers:
                faint_triggers = FaintTriggers(
                    count=self.faint_triggers,
                    latent=self.patch_latent,
                    width=self.faint_width,
                    channels=channels,
                    image_size=network.spec.image_size,
                    amplitude=self.faint_amplitude,
                )
        game = Distillation(
            network.network,
            std=network.std,
            generator=generator,
            trigger_network=trigger_network,
            faint_triggers=faint_triggers,
            noise=SeededNoise(runtime.derive("noise"), device=runtime.device, dtype=runtime.dtype),
            processes=runtime.processes,
            weights=self.weights,
            rates=self.rates,
            batch_size=self.batch_size,
            student_moves=self.student_moves,
            epochs=self.epochs,
            warm_up=self.warm_up,
            averaging=self.averaging,
        )
        return channels_last(game.to(runtime.device, runtime.dtype))
