"""Fine-tune a chat model on one GPU and know what it did: `mixed = toolkit.compile_mix("data_recipes/pocket.yaml")`."""

import logging
import os

__version__ = "0.1.0"

# Read once, when torch is imported. Spinning OpenMP threads collapse on shared cores: a training step of the pocket
# model took 3.4 s instead of 0.7 s (2 cores, 2026-11-21).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

# What they warn of at import (kernels of other cards, a call that torch will drop) nobody can act on
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def __getattr__(name: str):
    """compile_mix, evaluate_model and export_model of `toolkit.library`, imported when first used."""
    if name in ("compile_mix", "evaluate_model", "export_model"):
        from toolkit import library

        return getattr(library, name)
    raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
