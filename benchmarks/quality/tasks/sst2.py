"""SST-2: is a phrase of a film review positive?"""

from quality.tasks import _glue, _minilm

TASK = _minilm.task("SST-2, MiniLM", lambda: _glue.read("sst2", (1, 0), header=True), examples=2560, epochs=1, batch=16)
