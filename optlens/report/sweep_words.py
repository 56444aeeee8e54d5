"""Say in sentences what a sweep did, what was measured, and how its numbers are to be read."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

AXIS_WORDS = {
    "pos": "position",
    "query": "query position",
    "key": "source position",
    "component": "site",
}

# {a} is the right answer, {w} the wrong one, {at} the place where the prediction is read
_MEANINGS = {
    "logit_diff": "The logit of {a} minus the logit of {w} after {at}, in nats: above 0 the model "
    "prefers {a}.",
    "logit": "The logit of {a} after {at}.",
    "prob": "The probability of {a} after {at}, 0 to 1.",
    "prob_diff": "The probability of {a} minus that of {w} after {at}, -1 to 1.",
    "log_prob": "The logarithm of the probability of {a} after {at}, in nats.",
    "rank": "How many tokens the model finds likelier than {a} after {at}; 0 is the top.",
    "kl": "How far the prediction after {at} has moved from the clean run's: KL divergence, in nats; "
    "0 is no change.",
    "entropy": "How undecided the model is after {at}: the entropy of its prediction, in nats.",
    "cross_entropy": "The mean next-token loss of a prompt, in nats; lower is better.",
    "custom": "A number that the caller's own function computes from the logits.",
}


@dataclass(frozen=True)
class Kind:
    """Hold what was done, in words.

    Attributes:
        name: What such an experiment is called.
        doing: One sentence about what each patch does.
        reading: How the shown numbers are to be read.
        from_clean: Whether patches start from the clean run, so that they can only be seen to
            change it; from the corrupt run otherwise.
        has_corrupt: Whether there is a corrupt run.
    """

    name: str
    doing: str
    reading: str
    from_clean: bool
    has_corrupt: bool


def kind_of(metadata: Mapping[str, Any], has_corrupt: bool) -> Kind:
    """Tell from a result's metadata what was done.

    Args:
        metadata: That of the `PatchResult`.
        has_corrupt: Whether it has the metric of a corrupt run.

    Example:
        >>> kind_of({"site": "z", "direction": "denoise"}, True).name
        'Activation patching'
    """
    if not has_corrupt:
        return _ablation(str(metadata.get("mode", "")))
    if "noise" in metadata:
        doing = "Noise on the subject's embeddings spoils the run; each patch restores one place."
        reading = "1: the clean answer is back in full; 0: as with the noise."
        return Kind("Causal tracing", doing, reading, False, True)
    noise = metadata.get("direction") == "noise"
    source, target = ("corrupt", "clean") if noise else ("clean", "corrupt")
    what = "along chosen paths alone" if "senders" in metadata else "one place at a time"
    doing = f"Values of the {source} run are written into the {target} run, {what}."
    reading = (
        "1: nothing is lost; 0: the answer is lost in full, as in the corrupt run."
        if noise
        else "1: the clean answer is back in full; 0: nothing came back."
    )
    name = "Path patching" if "senders" in metadata else "Activation patching"
    if "method" in metadata:
        name = "Attribution patching"
        doing += " What that would do is estimated from gradients, not run."
    return Kind(name, doing, reading, noise, True)


def _ablation(mode: str) -> Kind:
    written = {
        "zero": "Each patch overwrites one place with zeros.",
        "mean": "Each patch overwrites one place with its mean over the reference prompts.",
        "resample": "Each patch overwrites one place with its values in another prompt.",
        "knockout": "Each patch cuts edges of attention, and leaves the rest of the row to share.",
    }
    reading = "0: the run does as well without; below 0 the metric falls, above 0 it rises."
    name = "Attention knockout" if mode == "knockout" else "Ablation"
    return Kind(name, written.get(mode, "Each patch takes one place away."), reading, True, False)


def meaning(metric: str) -> str:
    r"""Say in one sentence what a metric, as `str(metric)` writes it, tells.

    Example:
        >>> meaning("prob(' Paris')")
        'The probability of “·Paris” after the last token, 0 to 1.'
        >>> meaning("custom(my_metric)")
        "A number that the caller's own function computes from the logits."
    """
    name, answers, pos = _parsed(metric)
    plural = ("the right answers", "the wrong ones")
    a, w = (
        other if answer is None else _quoted(answer)
        for answer, other in zip([*answers, None, None], plural, strict=False)
    )
    at = "the last token" if pos == -1 else f"token {pos}"
    return _MEANINGS.get(name, "What was measured of each run.").format(a=a, w=w, at=at)


def _quoted(answer: str | int) -> str:
    """Return an answer with its leading space made visible, as in the labels of tokens."""
    if not isinstance(answer, str):
        return f"token id {answer}"
    return f"“{'·' + answer[1:] if answer.startswith(' ') else answer}”"


def _parsed(metric: str) -> tuple[str, list[Any], int]:
    """Take a metric's text apart: name, answers, position; a shortened list of answers is None."""
    name = metric.partition("(")[0]
    try:
        call = ast.parse(metric, mode="eval").body
    except (SyntaxError, ValueError):  # "[' Mary', ..., 16 in all]"
        return name, [], -1
    if not isinstance(call, ast.Call):
        return name, [], -1
    answers = [node.value if isinstance(node, ast.Constant) else None for node in call.args]
    pos = next((ast.literal_eval(each.value) for each in call.keywords if each.arg == "pos"), -1)
    return name, answers, pos
