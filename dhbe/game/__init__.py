"""The method: restricted adversarial distillation of generator, trigger network, student, teacher.

Source: Yan et al., "DHBE: Data-free Holistic Backdoor Erasing in Deep Neural Networks via
Restricted Adversarial Distillation", AsiaCCS 2023, arXiv 2306.08009.
"""

from dhbe.game.distillation import Distillation
from dhbe.game.generator import ImageGenerator
from dhbe.game.noise import Noise, ScriptedNoise, SeededNoise
from dhbe.game.settings import LearningRates, LossWeights
from dhbe.game.trigger_network import Attacker, FaintTriggers, TriggerNetwork, add_patches

__all__ = [
    "Attacker",
    "Distillation",
    "FaintTriggers",
    "ImageGenerator",
    "LearningRates",
    "LossWeights",
    "Noise",
    "ScriptedNoise",
    "SeededNoise",
    "TriggerNetwork",
    "add_patches",
]
