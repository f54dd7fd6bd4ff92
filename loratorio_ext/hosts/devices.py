"""Where a diffusers pipeline computes: on which device, in which precision, and with how much of it there at once.

Torch, which takes a second to import, is imported only by what needs it, so that names are checked before.
"""

from typing import TYPE_CHECKING, Any

from loratorio_ext.errors import SettingsError, shown

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")
OFFLOADS = ("none", "model")
DEVICES = ("cpu", "cuda", "mps", "xpu")


def available(kind: str) -> int:
    """How many devices of this kind there are."""
    import torch

    if kind == "cpu":
        return 1
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    backend = getattr(torch, kind, None)
    return backend.device_count() if backend is not None and backend.is_available() else 0


def devices_here() -> list[str]:
    """The names of all devices that can be had here."""
    counts = {kind: available(kind) for kind in DEVICES}
    return [
        name
        for kind, count in counts.items()
        if count
        for name in ([kind] if kind in ("cpu", "mps") else [kind, *(f"{kind}:{index}" for index in range(count))])
    ]


def check_choice(value: str, choices: tuple[str, ...], field: str) -> None:
    """Raises `SettingsError` for what is none of the choices."""
    if value not in choices:
        allowed = f"one of {', '.join(choices)}"
        raise SettingsError(
            f"LoRAtorio: {field} must be {allowed}, got {shown(value)}", field=field, value=value, allowed=allowed
        )


def where_to_compute(device: str | None, dtype: str | None) -> "tuple[str, torch.dtype]":
    """A torch device and dtype by name; by default CUDA's GPU where there is one, and half precision off the CPU.

    Raises `SettingsError` for a device that is not here, and for other names.
    """
    import torch

    here = devices_here()
    device = device or ("cuda" if "cuda" in here else "cpu")
    if device not in here:
        allowed = f"one of {', '.join(here)}"
        raise SettingsError(
            f"LoRAtorio: device must be {allowed} here, got {shown(device)}",
            field="device",
            value=device,
            allowed=allowed,
        )
    dtype = dtype or ("float32" if device == "cpu" else "float16")
    check_choice(dtype, DTYPES, "dtype")
    return device, getattr(torch, dtype)


def check_offload(offload: str, device: str) -> None:
    """Raises `SettingsError` for a way to offload that there is not, or not from this device."""
    check_choice(offload, OFFLOADS, "offload")
    if offload != "none" and device == "cpu":
        message = f"LoRAtorio: offload {offload} needs another device than the CPU to compute on"
        raise SettingsError(message, field="offload", value=offload, allowed="none on the CPU")


def place(pipe: Any, device: str, offload: str = "none") -> Any:
    """The pipeline, ready to compute on the device; ``offload`` "model": all but the model at work in main memory."""
    check_offload(offload, device)
    if offload == "none":
        return pipe.to(device)
    pipe.enable_model_cpu_offload(device=device)
    return pipe
