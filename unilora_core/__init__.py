"""unilora: one trainable vector θ_d adapts a whole model, θ_D = P θ_d (Uni-LoRA, arXiv 2506.00799).

It holds the specification and its reference, for any Array API namespace; it imports no framework.
"""

from unilora_core.analysis import analyze
from unilora_core.arithmetic import combine, combine_files
from unilora_core.errors import (
    AdapterFileError,
    CorruptFileError,
    MismatchError,
    SpecError,
    TargetError,
    UniLoraError,
    UnknownVersionError,
    ValuesError,
)
from unilora_core.layout import Layout
from unilora_core.projection import project, project_transpose
from unilora_core.serialisation import AdapterFile, load_adapter, read_adapter, save_adapter
from unilora_core.spec import ProjectionSpec

__all__ = [
    "AdapterFile",
    "AdapterFileError",
    "CorruptFileError",
    "Layout",
    "MismatchError",
    "ProjectionSpec",
    "SpecError",
    "TargetError",
    "UniLoraError",
    "UnknownVersionError",
    "ValuesError",
    "analyze",
    "combine",
    "combine_files",
    "load_adapter",
    "project",
    "project_transpose",
    "read_adapter",
    "save_adapter",
]

__version__ = "0.2.0"
