"""The accelerator; here never one."""


def torch_gc() -> None:
    """Free what the accelerator holds in reserve."""
