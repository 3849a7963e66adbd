"""Check when an adapter is attached: the model runs once, to find out that no target is dead."""

import warnings
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from unilora_core import TargetError
from unilora_torch import Adapter
from unilora_torch.verifying import verify
from unilora_transformers.made_up import made_up_inputs, takes

__all__ = ["check"]


def check(model: PreTrainedModel, adapter: Adapter, example: Mapping[str, Any] | None = None) -> None:
    """Run the model on ``example``, or on made-up inputs; see `Adapter.verify`.

    A model that cannot run on made-up inputs is left unchecked, with a warning: its first forward pass still checks
    that the targets are reached.
    It is also left unchecked, without a warning, where DeepSpeed's ZeRO-3 has no values until its engine runs the
    model.

    Raises:
        TargetError: a target is bypassed, or no gradient flows through it.
    """
    if any(hasattr(parameter, "ds_shape") for parameter in model.parameters()):
        return
    if example is not None:
        adapter.verify(**{"use_cache": False} | dict(example) if takes(model, "use_cache") else dict(example))
        return
    failed: dict[type[Exception], str] = {}
    for inputs in made_up_inputs(model):
        seen = f"made-up inputs {sorted(inputs)}"
        try:
            asleep = verify(adapter, (), inputs, whole=TargetError in failed)  # a bypassed layer is reported once
        except TargetError as error:  # other inputs may show more: attention over one token has no gradient
            failed.setdefault(TargetError, f"{error} (Seen with {seen}; if the model needs others, ")
        except Exception as error:  # a model may raise anything on inputs that it was not made for
            failed.setdefault(
                Exception,
                f"unilora: {type(model).__name__} does not run on {seen} ({error!r:.200}), so its targets are "
                "unchecked; ",
            )
        else:
            if asleep:
                _warn_of(asleep, seen)
            return
    if TargetError in failed:
        raise TargetError(f"{failed[TargetError]}give attach a batch of them: example=…)")
    warnings.warn(f"{failed[Exception]}give attach a batch: example=…", stacklevel=3)


def _warn_of(asleep: list[str], seen: str) -> None:
    warnings.warn(
        f"unilora: {asleep[0]}: {seen} do not run this part of the model ({len(asleep)} such targets), so it is "
        "unchecked. If your data do not run it either, exclude it: θ_d would change it, trained by the other parts. If "
        "they do, give attach a batch: example=…",
        stacklevel=4,
    )
