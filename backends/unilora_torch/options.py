"""The keyword arguments that `attach` and `load` of all packages share, for editors and type checkers."""

from collections.abc import Mapping
from typing import Literal, TypedDict

from unilora_core.methods import MethodOptions, check_options

__all__ = ["AttachOptions", "Groups", "LoadOptions", "check_attach"]

Groups = Literal["cached", "computed"]
"""The choice whether the groups are kept as int32, or computed in each pass."""


class AttachOptions(MethodOptions, total=False):
    """The keyword arguments of `unilora_torch.attach`, which has their defaults."""

    rank: int | Mapping[str, int] | None
    d: int | Literal["auto"]
    seed: int
    grouping: str | None
    start: str | None
    bound: float | None
    name: str
    groups: Groups


class LoadOptions(TypedDict, total=False):
    """The keyword arguments of `unilora_torch.load`, which has their defaults."""

    name: str
    check_base: bool
    any_rank: bool
    groups: Groups


def check_attach(method: str, options: AttachOptions) -> None:
    """Refuse a keyword argument that neither `unilora_torch.attach` nor the method has, before the model is looked at.

    Raises:
        SpecError: there is such an argument; the error lists the nearest names.
    """
    own = set(AttachOptions.__annotations__) - set(MethodOptions.__annotations__)
    check_options(method, [name for name in options if name not in own], options.get("grouping"))
