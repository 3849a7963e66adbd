"""Tenants under transformers' Trainer: a number in each row says whose it is; each has the loss that it has alone."""

from typing import Any

import torch
from torch import Tensor, nn

from unilora_core import ValuesError
from unilora_torch.tenants import Tenants

__all__ = ["TenantModel"]


class TenantModel(nn.Module):
    """A model for `transformers.Trainer` whose rows train the tenants that their ``tenant`` numbers name.

    ::

        tenants = bank.trainable(["fr", "de"])                           # of a bank on a transformers model
        optimizer = torch.optim.AdamW(tenants.parameter_groups(2e-4))
        arguments = TrainingArguments(..., remove_unused_columns=False)  # or the Trainer drops the column
        Trainer(TenantModel(tenants), arguments, train_dataset=rows, optimizers=(optimizer, None)).train()

    The loss is the sum of the tenants' own, so the gradient of each is the one that it would get alone; checkpoints
    hold the tenants' numbers and not the base.

    Attributes:
        tenants: what trains.
    """

    accepts_loss_kwargs = False  # the Trainer's count of all tokens is not that of a tenant

    def __init__(self, tenants: Tenants):
        super().__init__()
        self.tenants = tenants

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
            ValuesError: there is no such tenant, or the base's outputs have no logits.
        """
        output = self.tenants(tenant, **inputs)
        if labels is None:
            return output
        if getattr(output, "logits", None) is None:
            raise ValuesError(
                "TenantModel: the base's outputs have no logits, of which a loss for each tenant is made."
            )
        groups = [(tenant == each).nonzero().flatten() for each in tenant.unique()]
        output["loss"] = torch.stack([self._loss(output.logits[rows], labels[rows]) for rows in groups]).sum()
        return output

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of the model's class; that of classifiers names the logits otherwise."""
        model: Any = self.tenants.model
        given = {"logits": logits, "pooled_logits": logits, "labels": labels, "config": self.config}
        return model.loss_function(**given, vocab_size=getattr(self.config, "vocab_size", None))
