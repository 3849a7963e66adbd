"""MRPC: do two sentences say the same?"""

from quality.tasks import _glue, _minilm

TASK = _minilm.task(
    "MRPC, MiniLM",
    lambda: _glue.read("mrpc", (0, 3, 4), header=True, validation=400),
    examples=2400,
    epochs=1,
    batch=16,
)
