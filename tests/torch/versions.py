"""What older versions of PyTorch cannot do; the tests that need it say so."""

import pytest
import torch

VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
TRACES_CONTEXTS = pytest.mark.skipif(VERSION < (2, 14), reason="Dynamo before PyTorch 2.14 traces no ContextVar")
TRACES_ATTRIBUTES = pytest.mark.skipif(VERSION < (2, 13), reason="Dynamo before PyTorch 2.13 traces no module.__dict__")
