"""Uni-LoRA for vLLM: a resolver of LoRA names that makes A and B on the server, of adapter files of kilobytes.

vLLM calls `register` in each of its processes. Without settings in the environment it does nothing, and loads nothing.
"""

import os

from unilora_vllm.settings import Settings

__all__ = ["Settings", "register"]


def register() -> None:
    """Register the resolver with vLLM, if the environment has `Settings` for it: the entry point
    ``unilora_resolver`` of ``vllm.general_plugins``.

    Raises:
        SpecError: a variable has a value that it cannot have.
        ImportError: vLLM is not installed, or lacks what the resolver builds on.
    """
    if (settings := Settings.read(os.environ)) is None:
        return
    try:
        import vllm  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("unilora_vllm needs vLLM, which is not installed: pip install vllm.") from error
    from unilora_vllm.resolver import install

    install(settings)
