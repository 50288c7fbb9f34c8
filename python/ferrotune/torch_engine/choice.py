"""Which engine computes a run, and why. PyTorch is imported only where there may be a GPU."""

import importlib.util
from dataclasses import dataclass

from .. import ranks
from ..options import SettingError

_NEEDED = ("torch", "transformers", "peft")


@dataclass(frozen=True, slots=True)
class Choice:
    """An engine's name, and in words why it was taken."""

    name: str
    why: str


def choose(asked: str, method: str) -> Choice:
    """The engine for the setting `engine`: "auto", "embedded" or "torch".

    Raises SettingError where the engine that is asked for cannot run here.
    """
    missing = _missing(method)
    processes = ranks.count()
    if asked == "torch":
        if missing is not None:
            raise SettingError(
                f"engine torch needs {missing}, which is not installed: pip install "
                "'ferrotune[torch]', or give engine embedded"
            )
        return Choice("torch", "the settings name it")
    if asked == "embedded":
        if processes > 1:
            raise SettingError(
                f"engine embedded runs in one process, and there are {processes} (WORLD_SIZE): "
                "start it without torchrun, or give engine torch"
            )
        return Choice("embedded", "the settings name it")
    if processes > 1:
        if missing is not None:
            return choose("torch", method)  # says what is missing
        return Choice("torch", f"torchrun started {processes} processes")
    if missing is not None:
        return Choice("embedded", f"{missing} is not installed")
    device, why_not = _gpu()
    if device is None:
        return Choice("embedded", why_not)
    return Choice("torch", f"PyTorch found a GPU, {device}")


def _missing(method: str) -> str | None:
    """The first package that the torch engine lacks here."""
    needed = (*_NEEDED, "bitsandbytes") if method == "qlora" else _NEEDED
    return next((name for name in needed if importlib.util.find_spec(name) is None), None)


def _gpu() -> tuple[str | None, str]:
    """The GPU that PyTorch uses, or why there is none."""
    from .. import _native

    if _native.has_cuda and _native.cuda_driver()[0] is None:
        return None, "no GPU was found (no NVIDIA driver)"
    import torch

    if torch.version.cuda is None:
        return None, "PyTorch was built without CUDA"
    if not torch.cuda.is_available():
        return None, "PyTorch found no GPU that it can use"
    return torch.cuda.get_device_name(), ""
