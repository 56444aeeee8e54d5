"""Compare a model that is divided among pretended GPUs with the same one on the CPU, in values.

Run as a program, with the folder of a checkpoint of three blocks and the name of a division; it
prints what differs, and ends with 1 if anything does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from pretended_gpus import TYPE, Pretended, PretendedGpus, inner_of
from torch import Tensor, nn

import optlens
from optlens import Ablate, Knockout, OPTForCausalLM, Patch, Steer
from optlens.checkpoints.device_map import dispatch, units_of
from optlens.checkpoints.matching import places_of
from optlens.metrics import kl, logit_diff

TOKENS = torch.tensor([[2, 5, 9, 14, 23, 7, 8], [1, 1, 2, 5, 40, 41, 42]])
MASK = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
CLEAN, CORRUPT = TOKENS[:1], torch.tensor([[2, 5, 9, 15, 23, 7, 8]])
METRIC = logit_diff(5, 6)
# Other kernels than the CPU's fastest, and so other roundings, which blocks add to.
NEAR = 2e-5


def experiments(model: OPTForCausalLM) -> dict[str, Callable[[], Any]]:
    """Return what is run on a model."""
    edits = [
        Patch("resid_post", layer=0, pos=-1, value=torch.ones(32)),
        Ablate("z", layer=1, head=2, mode="mean", reference=CLEAN),
        Steer(layer=2, vector=torch.ones(32), scale=0.5),
        Knockout(layers=range(3), query=-1, key=1),
    ]

    def double(value: Tensor, hook: Any) -> None:
        value[:, 0] = value[:, 0] * 2

    names = [n for n in model.hook_dict if n.endswith(("hook_q", "resid_pre", "hook_result"))]
    masked = {"attention_mask": MASK}
    runs = {
        "logits": lambda: model(TOKENS, **masked).logits,
        "loss": lambda: model.loss(TOKENS, **masked),
        "hooks": lambda: dict(model.run_with_cache(TOKENS, list(model.hook_dict), **masked)[1]),
        "edits": lambda: model.run_with_hooks(TOKENS, [(n, double) for n in names], **masked),
        "recording": lambda: model.record(TOKENS, interventions=edits, **masked)._tensors,
        "greedy": lambda: model.generate(TOKENS, 6, **masked, interventions=edits),
        "beams": lambda: model.generate(TOKENS, 6, num_beams=3, **masked),
        "sampled": lambda: model.generate(CLEAN, 6, temperature=1.0, top_p=0.9, seed=3),
        "statistics": lambda: vars(optlens.neurons.statistics(model, TOKENS[0], progress=False)),
        "weights": lambda: [model.W_Q, model.W_U, model.b_out],
    }
    axes = ("layer", "head", "pos")
    swept = {"metric": METRIC, "progress": False}
    return runs | {
        "sweep": lambda: vars(optlens.patch_sweep(model, CLEAN, CORRUPT, "z", axes, **swept)),
        "windows": lambda: vars(
            optlens.patch_sweep(model, CLEAN, CORRUPT, window=2, interventions=edits, **swept)
        ),
        "embed": lambda: vars(
            optlens.patch_sweep(model, CLEAN, CORRUPT, "embed", ("pos",), kl(), progress=False)
        ),
        "ablations": lambda: vars(
            optlens.ablate_sweep(model, CLEAN, mode="mean", reference=CORRUPT, **swept)
        ),
        "knockouts": lambda: vars(optlens.knockout_sweep(model, CLEAN, METRIC, progress=False)),
        "trace": lambda: vars(optlens.causal_trace(model, CLEAN, (2, 3), METRIC, progress=False)),
    }


def tensors_in(found: Any, name: str) -> dict[str, Tensor]:
    """Return the tensors of a result by name, on the CPU."""
    if isinstance(found, Tensor):
        return {name: inner_of(found)}
    if isinstance(found, dict):
        found = found.items()
    else:
        found = enumerate(found) if isinstance(found, list | tuple) else ()
    return {k: t for key, value in found for k, t in tensors_in(value, f"{name}.{key}").items()}


def results(model: OPTForCausalLM) -> dict[str, Tensor]:
    """Run everything."""
    with torch.no_grad():
        found = {name: run() for name, run in experiments(model).items()}
    return tensors_in(found, "")


def divide(model: OPTForCausalLM, how: str) -> None:
    """Put a model's parts on pretended devices; "lent" blocks stay on the CPU between runs."""
    places = places_of(model)
    devices = dict.fromkeys(units_of(places), f"{TYPE}:0")
    for layer in (1, 2):
        devices[f"decoder.layers.{layer}"] = "cpu" if how == "lent" else f"{TYPE}:{layer}"
    if how == "apart" and not model.config.tie_word_embeddings:
        devices["lm_head"] = f"{TYPE}:2"
    for unit, names in units_of(places).items():
        for name in names:
            weight = getattr(*places[name][0]).detach()
            if devices[unit] != "cpu":
                weight = Pretended(weight, devices[unit])
            weight = nn.Parameter(weight, requires_grad=False)
            for module, attribute in places[name]:
                setattr(module, attribute, weight)
    model.placement = dispatch(model, devices, places, {}, None, torch.float32)


def main(folder: str, how: str) -> int:
    """Return how many results differ, at most 1."""
    import accelerate

    # all pretended tensors have the address 0 for it, by which it knows tied weights
    accelerate.big_modeling.find_tied_parameters = lambda model: []
    expected = results(optlens.load(folder, device="cpu"))
    model = optlens.load(folder, device="cpu")
    with PretendedGpus():
        divide(model, how)
        found = results(model)
    wrong = sorted(expected.keys() ^ found.keys())
    for name in expected.keys() & found.keys():
        a, b = (each[name].double().nan_to_num(neginf=0.0) for each in (expected, found))
        if a.shape != b.shape or (a - b).abs().max() > NEAR * max(1.0, float(a.abs().max())):
            wrong.append(name)
    print(len(expected), "results;", "different:", ", ".join(wrong) or "none")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
