"""Tables and plots of the results alone."""

from pathlib import Path


def smoke(work: Path) -> None: ...
def write(folders) -> None: ...
