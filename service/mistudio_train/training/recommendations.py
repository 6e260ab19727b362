"""What the original service advised for a model of which nothing but the name is known; still reported with every job.

Pure; the memory plan counts bytes instead and overrides what it knows better.
"""

import re
from collections.abc import Sequence
from typing import Any, Final

_LARGE: Final = (("phi", "2"), ("phi", "4"), ("llama",), ("mistral",), ("gpt", "3"), ("gpt", "4"))
_MEDIUM: Final = (("phi", "1"), ("gpt", "2"), ("gpt2",), ("bert",), ("distilbert",))


def recommendations(model_name: str) -> dict[str, Any]:
    """The seed's recommendations, by whole parts of the name ('phi' is in 'dolphin')."""
    advice: dict[str, Any] = {
        "model_name": model_name,
        "is_large_model": False,
        "recommended_batch_size": 8,
        "recommended_sequence_length": 512,
        "use_quantization": False,
        "use_gradient_checkpointing": False,
        "min_gpu_memory_gb": 4.0,
    }
    parts = re.split(r"[^a-z0-9]+", model_name.lower())
    if _names(parts, _LARGE):
        return advice | {
            "is_large_model": True,
            "recommended_batch_size": 1,
            "recommended_sequence_length": 256,
            "use_quantization": True,
            "use_gradient_checkpointing": True,
            "min_gpu_memory_gb": 8.0,
        }
    if _names(parts, _MEDIUM):
        return advice | {"recommended_batch_size": 16, "min_gpu_memory_gb": 2.0}
    return advice


def _names(parts: Sequence[str], table: Sequence[tuple[str, ...]]) -> bool:
    return any(tuple(parts[i : i + len(row)]) == row for row in table for i in range(len(parts)))
