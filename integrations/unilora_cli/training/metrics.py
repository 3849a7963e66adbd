"""What is measured on held-out data, beside the loss. The figures are those of scikit-learn and SciPy."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from unilora_cli.console import CommandError

__all__ = ["CLASSES", "NUMBERS", "PERPLEXITY", "TOP_5", "Metric", "Outcome", "chosen"]


@dataclass(frozen=True)
class Outcome:
    """What one pass over the held-out data gave.

    Attributes:
        loss: the mean loss.
        predicted: (n,), classes or numbers; or (n, several), the first guesses, best first; empty for a language model.
        labels: (n,), the same.
    """

    model: nn.Module
    loss: float
    predicted: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Metric:
    """A figure with a name.

    Attributes:
        higher: whether a higher figure is better.
    """

    name: str
    of: Callable[[Outcome], float]
    higher: bool = True


def chosen(wanted: Sequence[str] | None, known: Iterable[str], usual: Sequence[str]) -> tuple[str, ...]:
    """The metrics of ``--metric``, or the usual ones, by name.

    Raises:
        CommandError: a metric that this task does not have; the message lists those that it has.
    """
    known = tuple(known)
    if unknown := [name for name in wanted or () if name not in known]:
        raise CommandError(f"--metric {unknown[0]}: this task has {', '.join(known)}.")
    return tuple(dict.fromkeys(wanted or usual))


def _accuracy(outcome: Outcome) -> float:
    first = outcome.predicted if outcome.predicted.ndim == 1 else outcome.predicted[:, 0]
    return float((first == outcome.labels).mean())


def _among_five(outcome: Outcome) -> float:
    return float((outcome.predicted[:, :5] == outcome.labels[:, None]).any(1).mean())


def _f1(outcome: Outcome) -> float:
    """Of the second class where there are two, as GLUE has it for MRPC; else the mean over classes."""
    from sklearn.metrics import f1_score

    two = max(outcome.labels.max(), outcome.predicted.max()) < 2
    average = "binary" if two else "macro"
    return float(f1_score(outcome.labels, outcome.predicted, average=average, zero_division=0.0))


def _mcc(outcome: Outcome) -> float:
    """Matthews' correlation coefficient; 0 where all predictions are alike."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(outcome.labels, outcome.predicted))


def _correlation(name: str) -> Callable[[Outcome], float]:
    """0 where one side is constant and no correlation is defined, as scikit-learn has it for Matthews'."""

    def measured(outcome: Outcome) -> float:
        import scipy.stats

        if np.ptp(outcome.predicted) == 0 or np.ptp(outcome.labels) == 0:
            return 0.0
        return float(getattr(scipy.stats, name)(outcome.predicted, outcome.labels).statistic)

    return measured


def _perplexity(outcome: Outcome) -> float:
    return math.exp(outcome.loss) if outcome.loss < 700 else math.inf


CLASSES = {"accuracy": Metric("accuracy", _accuracy), "f1": Metric("f1", _f1), "mcc": Metric("mcc", _mcc)}
NUMBERS = {name: Metric(name, _correlation(f"{name}r")) for name in ("pearson", "spearman")}
TOP_5 = Metric("top-5", _among_five)
PERPLEXITY = Metric("perplexity", _perplexity, higher=False)
