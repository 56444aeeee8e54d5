"""Results of sweeps for tests of how they are shown: made of numbers, without a model."""

import torch

from optlens.patching import PatchResult

HOSTILE = {
    2: "</s>",
    5: "<script>document.title = 'run'</script>",
    17: '"><img src=http://127.0.0.1:9/x onerror="document.title=\'run\'">',
    9: "\u202eevil\x1b[2J\x00" + "long" * 30,
    11: "\u0301",
}
SIZES = {"component": 2, "layer": 3, "head": 4, "pos": 5, "neuron": 300}
CLEAN, CORRUPT = [2, 5, 17, 9, 11], [2, 5, 9, 17, 11]


def make_result(
    *axes: str,
    direction: str = "denoise",
    prompts: int = 1,
    corrupt: float = -2.0,
    labels: dict[int, str] | None = None,
    **about,
) -> PatchResult:
    """Return a result whose values run from -2.5 to 2 over the cells, the same on every call.

    Args:
        axes: Of `SIZES`.
        direction: As in the metadata.
        prompts: How many, each a little different.
        corrupt: The metric of the corrupt run; NaN for an ablation. That of the clean one is 2.
        labels: The texts of tokens.
        **about: Further metadata.
    """
    shape = [SIZES[axis] for axis in axes]
    count = int(torch.tensor(shape).prod())
    values = torch.linspace(-2.5, 2.0, count).view(*shape, 1)
    spread = torch.linspace(-0.5, 0.5, prompts) if prompts > 1 else torch.zeros(1)
    tokens = {"clean": [CLEAN] * prompts, "corrupt": [CORRUPT] * prompts, "direction": direction}
    if corrupt != corrupt:
        tokens = {"prompts": [CLEAN] * prompts, "mode": "zero"}
    metadata = {
        "site": "z",
        "metric": "logit_diff(' Mary', ' John')",
        "model": "0123456789abcdef" * 4,
    }
    texts = {2: "</s>", 5: "·he", 17: "·cat", 9: "·dog", 11: "·sat"} if labels is None else labels
    return PatchResult(
        values + spread,
        2.0 + spread,
        corrupt + spread,
        axes,
        {axis: [str(n) for n in range(SIZES[axis])] for axis in axes},
        {a: ["z", "mlp_out"] if a == "component" else list(range(SIZES[a])) for a in axes},
        metadata | tokens | {"labels": {str(i): text for i, text in texts.items()}} | about,
    )
