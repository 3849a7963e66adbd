"""The list of all cases of a backend."""

from collections.abc import Callable
from dataclasses import dataclass

from unilora_core.testing import compiled, frozen, groups, maps, projection
from unilora_core.testing.backend import Backend, Subject

__all__ = ["Case", "cases"]


@dataclass(frozen=True)
class Case:
    """One check of one backend: ``case()`` runs it, ``str(case)`` is its name.

    Attributes:
        backend: the name of the backend.
        name: the check and what it is done with; it stays the same from one version of unilora to the next.
        check: what runs.
    """

    backend: str
    name: str
    check: Callable[[], None]

    def __str__(self) -> str:
        return f"{self.backend}-{self.name}"

    def __call__(self) -> None:
        """Run the check.

        Raises:
            AssertionError: the backend does not conform; the text says with which spec, at which position, what was
                expected and what was found.
        """
        self.check()


def cases(backend: Backend) -> tuple[Case, ...]:
    """Return every check that applies to a backend; one without ``compile`` or ``pullback`` has no cases of these."""
    subject = Subject(backend)
    return tuple(
        Case(backend.name, name, check)
        for module in (frozen, groups, projection, maps, compiled)
        for name, check in module.checks(subject)
    )
