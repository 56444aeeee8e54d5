"""The losses of the task heads, as transformers has them, and checks of what they compare with.

Computed in float32 or better; float64 logits give float64 losses. What PyTorch would answer with
NaN, or transformers by reading a wrong place, is an error that says so.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from optlens import checks
from optlens.labels import LabelFields

IGNORED = -100  # a class label that does not count


def problem_type_of(config: LabelFields, labels: Tensor) -> str:
    """Return what kind of loss labels are meant for: the config's, or what transformers infers.

    One output is a regression; whole-numbered labels of several are classes; others say of each
    class whether it is there.

    Args:
        config: The model's.
        labels: What the user gave.
    """
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    whole = labels.dtype in (torch.int64, torch.int32)
    return "single_label_classification" if whole else "multi_label_classification"


def class_targets(kind: str, labels: Tensor, batch: int, num_labels: int) -> Tensor:
    """Check the labels of a batch and bring them to one shape.

    Args:
        kind: One of `labels.PROBLEM_TYPES`.
        labels: `[batch]` or `[batch, 1]` for classes and for a regression of one value;
            `[batch, label]` otherwise.
        batch: Number of prompts.
        num_labels: Number of classes or of values.

    Returns:
        Classes `[batch]` int64, or values `[batch, label]`.

    Raises:
        InputError: If shape, dtype or values do not fit.
    """
    is_class = kind == "single_label_classification"
    width = 1 if is_class else num_labels
    if labels.numel() != batch * width or labels.shape[:1] != (batch,):
        raise checks.InputError(_misshapen(kind, labels, batch, width, num_labels))
    if not is_class:
        targets = labels.reshape(batch, width)
        return targets if targets.is_floating_point() else targets.float()
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise checks.InputError(
            f"labels of {kind} are whole numbers, got {labels.dtype}. For a value for each class "
            'set model.config.problem_type = "multi_label_classification".'
        )
    return labels.reshape(batch).long()


def _misshapen(kind: str, labels: Tensor, batch: int, width: int, num_labels: int) -> str:
    expected = (batch,) if width == 1 else (batch, width)
    hint = ""
    if kind == "single_label_classification" and tuple(labels.shape) == (batch, num_labels):
        hint = (
            " Ones and zeros for each class are labels of multi_label_classification: make them "
            "floating point, or set model.config.problem_type."
        )
    return (
        f"labels have shape {tuple(labels.shape)}; {kind} of {num_labels} labels expects "
        f"{expected}.{hint}"
    )


def check_class_values(kind: str, targets: Tensor, num_labels: int) -> None:
    """Check the values of what `class_targets` has returned.

    Raises:
        InputError: If a class does not exist, none counts, or a probability is none.
    """
    values = checks.on_host(targets)
    if values is None or kind == "regression":
        return
    if kind == "multi_label_classification":
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise checks.InputError(
                "labels of multi_label_classification say for each class whether it is there, 0 to "
                f"1; got values from {values.min().item()} to {values.max().item()}."
            )
        return
    bad = (values != IGNORED) & ((values < 0) | (values >= num_labels))
    if bool(bad.any()):
        raise checks.InputError(
            f"Label {int(values[bad][0])} of prompt {int(bad.nonzero()[0])} is no class; they are "
            f"0 to {num_labels - 1}, and {IGNORED} is ignored."
        )
    if bool((values == IGNORED).all()):
        raise checks.InputError(
            f"No label counts: all are {IGNORED}. Their mean loss would be 0/0; leave such a batch "
            "out."
        )


def class_loss(kind: str, logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of a batch.

    Args:
        kind: Mean squared error for "regression", cross-entropy in nats for
            "single_label_classification", and for "multi_label_classification" the mean over
            prompts and classes of the cross-entropy, in nats, of "is it there".
        logits: `[batch, label]`.
        targets: From `class_targets`.
    """
    wide, targets = _widened(logits), targets.to(logits.device)
    if kind == "single_label_classification":
        return F.cross_entropy(wide, targets, ignore_index=IGNORED)
    measure = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
    return measure(wide, targets.to(wide.dtype))


def span_targets(positions: Tensor, name: str, batch: int, pos: int) -> Tensor:
    """Check where answers start or end, and bring it to `[batch]`.

    Args:
        positions: `[batch]` or `[batch, 1]`, columns of the token tensor. What lies behind the
            prompt does not count (an answer that was cut off), and becomes `pos`.
        name: What to call them.
        batch: Number of prompts.
        pos: Number of columns.

    Raises:
        InputError: If the shape is another, one is negative, or none counts.
    """
    whole = not positions.is_floating_point() and positions.dtype != torch.bool
    if not whole or tuple(positions.shape) not in ((batch,), (batch, 1)):
        raise checks.InputError(
            f"{name} has shape {tuple(positions.shape)} and dtype {positions.dtype}; expected a "
            f"whole number for each prompt, {(batch,)}."
        )
    values = checks.on_host(positions)
    if values is not None and int(values.min()) < 0:
        raise checks.InputError(
            f"{name} holds {int(values.min())}; positions are columns of the tokens, 0 to "
            f"{pos - 1}. Give {pos} or more for an answer that does not count."
        )
    if values is not None and int(values.min()) >= pos:
        raise checks.InputError(
            f"{name}: no position counts, as all lie behind the last column, {pos - 1}. Their mean "
            "loss would be 0/0; leave such a batch out."
        )
    return positions.reshape(batch).long().clamp(max=pos)


def span_loss(start_logits: Tensor, end_logits: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Return the mean of the cross-entropies of start and end, in nats.

    Args:
        start_logits: `[batch, pos]`.
        end_logits: `[batch, pos]`.
        start: From `span_targets`, `[batch]`; `pos` does not count.
        end: Likewise.
    """
    ignored = start_logits.shape[1]
    losses = [
        F.cross_entropy(_widened(logits), targets.to(logits.device), ignore_index=ignored)
        for logits, targets in ((start_logits, start), (end_logits, end))
    ]
    return sum(losses) / 2


def _widened(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
