"""Tenants under transformers' Trainer: a number in each row says whose it is; each has the loss that it has alone."""

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from unilora_core import ValuesError
from unilora_torch.tenants import Tenants
from unilora_transformers.checkpointing import enable_checkpointing, tracked_checkpoints

__all__ = ["TenantModel"]


class TenantModel(nn.Module):
    """A model for `transformers.Trainer` whose rows train the tenants that their ``tenant`` numbers name.

    ::

        tenants = bank.trainable(["fr", "de"])                           # of a bank on a transformers model
        optimizer = torch.optim.AdamW(tenants.parameter_groups(2e-4))
        arguments = TrainingArguments(
            ...,
            remove_unused_columns=False,  # or the Trainer drops the column
            max_grad_norm=0,  # or it scales down the gradients of all tenants by one norm
        )
        Trainer(TenantModel(tenants), arguments, train_dataset=rows, optimizers=(optimizer, None)).train()

    The loss is the sum of the tenants' own, so the gradient of each is the one that it would get alone; checkpoints
    hold the tenants' numbers and not the base. Of n accumulated batches each counts 1/n, also for a tenant without rows
    in the others.

    Attributes:
        tenants: what trains.
    """

    accepts_loss_kwargs = False  # the Trainer's count of all tokens is not that of a tenant

    def __init__(self, tenants: Tenants):
        super().__init__()
        self.tenants = tenants
        self._compared = False

    @property
    def config(self) -> Any:
        """The base's config."""
        return self.tenants.model.config

    def forward(self, tenant: Tensor, labels: Tensor | None = None, **inputs: Any) -> Any:
        """Compute the base's outputs; with labels, the ``loss`` is the sum over tenants of the model's own loss.

        Args:
            tenant: (rows,) integers, the places of their names in ``tenants.names``.
            labels: as the base takes them.
            **inputs: what the base takes beside.

        Raises:
            ValuesError: there is no such tenant, there are no labels in training, or the base's own loss is not one of
                its logits and labels, so that none can be made for a tenant.
        """
        if labels is None:
            output = self.tenants(tenant, **inputs)
            self._check_unlabelled(output)
            return output
        with tracked_checkpoints(self.tenants.model):
            output = self.tenants(tenant, **inputs, **self._labels_once(labels))
        if not self._compared:
            self._compare(output, labels)
        groups = [(tenant == each).nonzero().flatten() for each in tenant.unique()]
        output["loss"] = torch.stack([self._loss(output.logits[rows], labels[rows]) for rows in groups]).sum()
        return output

    def _check_unlabelled(self, output: Any) -> None:
        """Refuse a loss of all rows together, be it the base's own or one that is made elsewhere."""
        if self.training or getattr(output, "loss", None) is not None:
            raise ValuesError(
                "TenantModel: expected labels for a loss, got none. Labels of another name are not parted by tenant, "
                "and a label_smoothing_factor of the Trainer takes them away: leave it 0."
            )

    def _labels_once(self, labels: Tensor) -> dict[str, Tensor]:
        """Return the labels for the base itself, which is asked for its own loss in the first batch.

        Raises:
            ValuesError: it takes none.
        """
        if self._compared:
            return {}
        model = self.tenants.model
        if "labels" not in inspect.signature(model.forward).parameters:
            raise ValuesError(f"TenantModel: {type(model).__name__} takes no labels, so it has no loss to train by.")
        return {"labels": labels}

    def _compare(self, output: Any, labels: Tensor) -> None:
        """Refuse a base whose own loss is another than what is made for tenants, seen in the first batch."""
        made, own = None, output.loss
        with contextlib.suppress(RuntimeError, ValueError, TypeError, AttributeError):
            made = self._loss(output.logits, labels)
        if made is None or not torch.allclose(made.float(), own.float(), rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ValuesError(
                f"TenantModel: the loss of {type(self.tenants.model).__name__} is {own.item():.4g}, and one of its "
                f"logits and labels {'cannot be made' if made is None else f'is {made.item():.4g}'}, so no loss can be "
                "made for a tenant. Take Tenants.rows and Tenants.losses, with a loss of your own for each row."
            )
        self._compared = True

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Checkpoint the base's layers, as the Trainer asks for it."""
        enable_checkpointing(self.tenants.model, *args, **kwargs)

    gradient_checkpointing_enable = activation_checkpointing_enable

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the base's layers are checkpointed."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.tenants.model.modules())

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of the model's class; that of classifiers names the logits otherwise."""
        model: Any = self.tenants.model
        given = {"logits": logits, "pooled_logits": logits, "labels": labels, "config": self.config}
        return model.loss_function(**given, vocab_size=getattr(self.config, "vocab_size", None))
