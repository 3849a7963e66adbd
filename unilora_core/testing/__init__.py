"""The conformance suite: what a backend of unilora must do, as checks that any test runner can call.

::

    from unilora_core.testing import Backend, cases

    BACKEND = Backend(name="cupy", xp=cupy, asnumpy=cupy.asnumpy)

    @pytest.mark.parametrize("case", cases(BACKEND), ids=str)
    def test_conformance(case):
        case()

A walk through: ``docs/adding-a-backend.md``. Imported on request only: it needs hypothesis, ``unilora[testing]``.
"""

try:
    import hypothesis as _  # noqa: F401
except ImportError as error:
    raise ImportError('unilora_core.testing needs hypothesis: pip install "unilora[testing]"') from error

from unilora_core.testing.backend import Backend
from unilora_core.testing.suite import Case, cases

__all__ = ["Backend", "Case", "cases"]
