"""What sweeps ask of a model and of pairs of prompts before they run."""

import torch

from optlens.patching import patch_sweep
from tests.patching.test_sweep import METRIC, make_model, make_prompts


def test_recorders_are_no_reason_to_refuse_and_stay():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    alone = patch_sweep(model, clean, corrupt, metric=METRIC, progress=False)
    heard = []
    point = model.hook_dict["blocks.0.attn.hook_pattern"]
    with model.recorders([point], lambda value, hook: heard.append(value.shape)):
        result = patch_sweep(model, clean, corrupt, metric=METRIC, progress=False)
        assert point.listening
    torch.testing.assert_close(result.per_prompt, alone.per_prompt)
