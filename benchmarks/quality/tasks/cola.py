"""CoLA: is a sentence grammatical?"""

from quality.tasks import _glue, _minilm

TASK = _minilm.task(
    "CoLA, MiniLM",
    lambda: _glue.read("cola", (1, 3), header=False),
    metric="mcc",
    examples=7000,
    epochs=1,
    batch=16,
)
