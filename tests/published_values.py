"""What the published OPT weights are known to give, and the checks that compare a model with it.

The numbers are those of transformers' own tests of OPT (`tests/models/opt/test_modeling_opt.py`) and
of its pull request 17785; the ones of opt-350m's logits agree there with metaseq, which trained it.
A check takes a model, however it was loaded, and returns what is wrong, nothing if all is right.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from optlens.checkpoints import CheckpointError
from optlens.checkpoints.layout import find_layout

# Where a folder with the weights may be named; else they are looked for in Hugging Face's cache.
VARIABLES = {"125m": "OPT_125M", "350m": "OPT_350M", "1.3b": "OPT_1_3B"}

HIDDEN_IDS = [0, 31414, 232, 328, 740, 1140, 12695, 69, 46078, 1588, 2]
HIDDEN = [
    [-0.28726277, -1.9241608, -0.3058734],
    [-1.2737825, -0.13332152, -0.18766522],
    [0.41159445, 0.1191957, -1.3107123],
]
PROMPT_IDS = [
    [5625, 16, 10, 2721, 183, 8, 38, 236, 7],  # Today is a beautiful day and I want to
    [1121, 5, 343, 9],  # In the city of
    [32826, 16, 5, 812, 9, 1470, 8],  # Paris is the capital of France and
    [14721, 43990, 8, 1830, 4247, 33, 551],  # Computers and mobile phones have taken
]
# The repeated numbers at the ends are those of padding: they depend on its position and its mask.
MEAN_LOGITS = [
    [1.3851, -13.8923, -10.5229, -10.7533, -0.2309, -10.2384, -0.5365, -9.0947, -5.1670],
    [-4.7073, -10.6276, -3.9415, -21.5242, -0.2822, -0.2822, -0.2822, -0.2822, -0.2822],
    [0.6247, -3.4229, -8.9179, -1.4297, -14.1650, 1.4146, -9.0218, -0.2703, -0.2703],
    [6.4783, -1.9913, -10.7926, -2.3336, 1.5092, -0.9974, -6.8213, 1.3477, 1.3477],
]
# Greedy, up to 10 tokens with the first `</s>`.
CONTINUED = {
    "125m": [
        ("Today is a beautiful day and I want", " to"),
        ("In the city of", " New York, the city"),
        ("Paris is the capital of France and", " the capital"),
        ("Computers and mobile phones have taken", " over the"),
    ],
    "350m": [
        ("Today is a beautiful day and I want", " to"),
        ("In the city of", " San Francisco, the city"),
        ("Paris is the capital of France and", " the capital"),
        ("Computers and mobile phones have taken", " over the"),
    ],
}
PADDED = [
    ("Hello, my dog is a little", " bit of a dork.\nI'm a little bit"),
    ("Today, I", " was in the middle of a conversation with a friend about the"),
]
CONSCIOUS = (
    "Hey, are you conscious? Can you talk to me?",
    "\nI'm not conscious. I'm just a little bit of a weirdo.",
)
NAME_IDS = [2, 31414, 127, 766, 16]  # </s>Hello my name is
NEXT_IDS = [100, 6, 766, 16, 1236]  # I , name is j
NEXT_PROBS = [0.2398, 0.2326, 0.3332, 0.9363, 0.0097]
NAME_LOSS = 4.051314830780029
LEFT_PADDED = ["Who are you?", "Joe Biden is the president of"]


def folder_of(size: str) -> Path | None:
    """Return a folder with the published weights of a size, if one is at hand; nothing is loaded.

    Raises:
        CheckpointError: If the variable names a folder that holds no checkpoint.
    """
    named = os.environ.get(VARIABLES[size])
    if named:
        find_layout(Path(named))
        return Path(named)
    config = try_to_load_from_cache(f"facebook/opt-{size}", "config.json")
    if not isinstance(config, str):
        return None
    try:
        find_layout(Path(config).parent)
    except CheckpointError:  # only its config was fetched
        return None
    return Path(config).parent


def differences(what: str, found: Tensor | list, expected: Tensor | list, atol: float) -> list[str]:
    """Say where numbers differ by more than `atol`; nothing where they do not."""
    found = torch.as_tensor(found).detach().cpu().double()
    expected = torch.as_tensor(expected).double()
    if found.shape != expected.shape:
        return [f"{what}: shape {list(found.shape)}, expected {list(expected.shape)}"]
    far = ~((found - expected).abs() <= atol)  # also what is not a number
    return [
        f"{what} at {at}: {found[tuple(at)]:.6g}, expected {expected[tuple(at)]:.6g}"
        for at in far.nonzero().tolist()
    ]


def continuation(model, prompt: str, new: int) -> str:
    """Return what a model writes on."""
    return model.generate(prompt, new)[len(prompt) :]


def _room(model, prompt: str, length: int) -> int:
    """Return how many tokens a text of `length` tokens has left; one, with another tokenizer."""
    return max(1, length - model.to_tokens(prompt).shape[1])


def check_hidden_state(model) -> list[str]:
    """350m: the last hidden state, 512 wide."""
    found = model(torch.tensor([HIDDEN_IDS]), output_hidden_states=True).hidden_states[-1]
    if tuple(found.shape) != (1, 11, 512):
        return [f"last hidden state: shape {list(found.shape)}, expected [1, 11, 512]"]
    return differences("last hidden state", found[0, :3, :3], HIDDEN, 5e-5)


def check_mean_logits(model) -> list[str]:
    """350m: the mean over the vocabulary, of prompts padded on the right, without `</s>`."""
    longest = max(map(len, PROMPT_IDS))
    ids = torch.tensor([row + [1] * (longest - len(row)) for row in PROMPT_IDS])
    logits = model(ids, attention_mask=(ids != 1).long()).logits
    return differences("mean logit", logits.float().mean(-1), MEAN_LOGITS, 1e-4)


def check_continuations(model, size: str) -> list[str]:
    """Greedy texts, one by one."""
    wrong = []
    for prompt, expected in CONTINUED[size]:
        found = continuation(model, prompt, _room(model, prompt, 10))
        wrong += [] if found == expected else [f"{prompt!r}: {found!r}, expected {expected!r}"]
    return wrong


def check_padded_batch(model) -> list[str]:
    """350m: texts of unequal lengths together, padded on the left, and each alone."""
    prompts, expected = zip(*PADDED, strict=True)
    together = model.generate(list(prompts), 13)
    wrong = []
    for prompt, text, after in zip(prompts, together, expected, strict=True):
        for how, found in (("padded", text), ("alone", model.generate(prompt, 13))):
            if found != prompt + after:
                wrong.append(f"{prompt!r} {how}: {found!r}, expected {prompt + after!r}")
    return wrong


def check_conscious(model) -> list[str]:
    """350m: the example of transformers' documentation."""
    prompt, expected = CONSCIOUS
    found = continuation(model, prompt, _room(model, prompt, 30))
    return [] if found == expected else [f"{found!r}, expected {expected!r}"]


def check_next_tokens(model) -> list[str]:
    """125m with its final LayerNorm, which early conversions lacked: likeliest tokens and loss."""
    ids = torch.tensor([NAME_IDS])
    probs, tokens = model(ids).logits[0].double().softmax(-1).max(-1)
    wrong = differences("likeliest token", tokens, NEXT_IDS, 0)
    wrong += differences("its probability", probs, NEXT_PROBS, 1e-4)
    return wrong + differences("loss", model.loss(ids), NAME_LOSS, 1e-4)


def check_half_is_finite(model) -> list[str]:
    """1.3b in float16, padded on the left: it was here that a fully masked row became NaN."""
    tokens, mask = model.to_tokens_and_mask(LEFT_PADDED)
    logits = model(tokens, attention_mask=mask).logits
    return [] if bool(logits.isfinite().all()) else ["logits are not finite"]


CHECKS: list[tuple[str, str, Callable]] = [
    ("125m", "float32", check_next_tokens),
    ("125m", "float32", lambda model: check_continuations(model, "125m")),
    ("350m", "float32", check_hidden_state),
    ("350m", "float32", check_mean_logits),
    ("350m", "float32", lambda model: check_continuations(model, "350m")),
    ("350m", "float32", check_padded_batch),
    ("350m", "float32", check_conscious),
    ("1.3b", "float16", check_half_is_finite),
]
NAMES = [
    "next tokens", "continuations", "hidden state", "mean logits", "continuations", "padded batch",
    "documentation", "finite",
]  # fmt: skip
