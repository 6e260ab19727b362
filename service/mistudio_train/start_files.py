"""Names of the files in the folder of a trained SAE that training can go on from, for parent and child alike."""

from typing import Final

CFG: Final = "cfg.json"
WEIGHTS: Final = "sae_weights.safetensors"
GATES: Final = "gates.safetensors"
"""Ours, of the kind `gated`: what its losses ask for and a `jumprelu` of SAELens does not say."""
NAMES: Final = (CFG, WEIGHTS, GATES)
"""The last one is not always there."""
