"""`ferrotune doctor`."""

import importlib.metadata
from dataclasses import dataclass

from ..registry import command
from ..results import Result
from ..tables import Table

# What each operation of `ferrotune.ops` is launched as, by the first word of its kernels' names.
_OPERATIONS = {
    "dequantize": "4-bit dequantisation",
    "quantize": "4-bit quantisation",
    "dropout": "dropout masks",
    "lora": "LoRA forward and backward",
}


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """A CUDA device, and how ferrotune runs on it.

    `native` says whether the kernels are used; `why` is the reason in words.
    """

    index: int
    name: str
    capability: str
    native: bool
    why: str
    operations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DoctorResult(Result):
    """What was found. Versions are None where a thing is missing."""

    version: str
    kernels_built: bool
    driver: str | None
    driver_needed: str
    problem: str | None
    torch: str | None
    torch_cuda: str | None
    devices: tuple[DeviceReport, ...]

    def table(self) -> Table:
        rows = [
            ("ferrotune", self.version),
            ("CUDA kernels", "built in" if self.kernels_built else "not built in"),
            ("NVIDIA driver", _driver_text(self.driver, self.driver_needed)),
            ("PyTorch", _torch_text(self.torch, self.torch_cuda)),
        ]
        if self.problem is not None:
            rows.append(("problem", self.problem))
        for device in self.devices:
            rows.append((f"device {device.index}", f"{device.name}, sm_{device.capability}"))
            rows.append(("", device.why))
            rows += [("", f"  {operation}") for operation in device.operations]
        if not any(device.native for device in self.devices):
            rows.append(("training", "on the CPU, and through PyTorch's own operations"))
        return Table("ferrotune doctor", tuple(rows))


def _driver_text(driver: str | None, needed: str) -> str:
    if driver is None:
        return f"not found; the kernels need one for CUDA {needed} (580 series) or newer"
    return f"for CUDA {driver}; the kernels need {needed} or newer"


def _torch_text(version: str | None, cuda: str | None) -> str:
    if version is None:
        return "not installed"
    return f"{version}, {'built without CUDA' if cuda is None else f'CUDA {cuda}'}"


@command("doctor", examples=("ferrotune doctor",))
def doctor() -> DoctorResult:
    """Show the CUDA device and driver, which kernels will be used, and why.

    Returns:
        A DoctorResult. Nothing that is missing is an error.
    """
    from .. import _native
    from ..version import version

    driver = needed = None
    problem = None
    devices: list[DeviceReport] = []
    if _native.has_cuda:
        found, least = _native.cuda_driver()
        driver, needed = _dotted(found), _dotted(least)
        try:
            devices = [_examine(index) for index in range(_native.cuda_devices())]
        except _native.CudaError as error:
            problem = str(error)
    torch, torch_cuda = _torch()
    return DoctorResult(
        version=version(),
        kernels_built=_native.has_cuda,
        driver=driver,
        driver_needed=needed or "13.0",
        problem=problem,
        torch=torch,
        torch_cuda=torch_cuda,
        devices=tuple(devices),
    )


def _dotted(version: int | None) -> str | None:
    """13.0 of 13000."""
    return None if version is None else f"{version // 1000}.{version % 1000 // 10}"


def _examine(index: int) -> DeviceReport:
    from .. import _native

    try:
        facts = _native.cuda_prepare(index)
    except _native.CudaError as error:
        return DeviceReport(index, "unknown", "unknown", False, f"not used: {error}", ())
    machine, source = facts["code"]
    if machine // 10 == facts["capability"][0] and source // 10 == machine // 10:
        why = f"native kernels: machine code for sm_{machine} is built in"
    else:
        why = f"native kernels: compiled by the driver from PTX for compute_{source}"
    kernels = facts["kernels"]
    operations = tuple(
        f"{title}: {count} kernels"
        for prefix, title in _OPERATIONS.items()
        if (count := sum(name.startswith(prefix) for name in kernels))
    )
    capability = "".join(map(str, facts["capability"]))
    name = f"{facts['name']}, {facts['multiprocessors']} multiprocessors"
    return DeviceReport(index, name, capability, True, why, operations)


def _torch() -> tuple[str | None, str | None]:
    """PyTorch's version and its CUDA's, without initialising a device."""
    try:
        importlib.metadata.version("torch")
        import torch
    except ImportError:
        return None, None
    return torch.__version__, torch.version.cuda
