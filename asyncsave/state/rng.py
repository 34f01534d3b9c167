"""RngState: all random generators of a training process as one stateful object."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class RngState:
    """Python's, NumPy's, torch's and CUDA's global generators, to be put into the state.

    ``state_dict()`` reads the generators at the moment of the save and ``load_state_dict()`` sets
    them, so that a resumed run draws the same numbers as the run that was not interrupted.
    Generators that a program made itself (``torch.Generator``, ``numpy.random.default_rng``) are
    not included: save their own state beside this object.

    CUDA generators are saved once CUDA is in use by the process, one per visible device. When the
    number of devices differs on load, those that exist in both are set.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all generators: arrays, tensors and plain values only."""
        version, words, gauss = random.getstate()
        numpy_state = np.random.get_state(legacy=True)
        use_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        return {
            "python": {
                "version": version,
                "words": np.array(words, dtype=np.uint32),
                "gauss": gauss,
            },
            "numpy": tuple(numpy_state),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if use_cuda else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set all generators to a state that ``state_dict`` returned."""
        python = state["python"]
        words = tuple(int(word) for word in python["words"])
        random.setstate((python["version"], words, python["gauss"]))
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        for device, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(generator, device)
