"""What pyproject.toml cannot say: the wheel holds one package, the zoos and configs inside it."""

from setuptools import find_namespace_packages, setup

PLACES = {
    "dhbe.attacks": "attacks",
    "dhbe.defenses": "defenses",
    "dhbe.conf": "conf",
    "dhbe.conf.sweep": "sweeps",
}
"""Package in the wheel -> folder in the checkout."""

setup(
    packages=[*find_namespace_packages(include=["dhbe", "dhbe.*"]), *PLACES],
    package_dir=PLACES,
)
