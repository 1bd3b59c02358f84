"""Weights of other projects, loaded without a file."""

from pathlib import Path

from torch import Tensor, nn

from segkit.core import untrusted
from segkit.models.pretrained import Report
from segkit.models.pretrained.loading import fit
from segkit.models.pretrained.reading import WRAPPER_PREFIXES
from segkit.models.pretrained.recognition import recognize


def load_state(model: nn.Module, state: dict[str, Tensor], *, source: str) -> Report:
    """Load weights in memory as ``load_file`` loads those of a file named ``source``."""
    untrusted.refuse_forged(state, Path(source))
    state = {WRAPPER_PREFIXES.sub("", name): value for name, value in state.items()}
    entries, report = fit(model, recognize(state, source=source), source=source)
    model.load_state_dict(entries, strict=False)
    return report
