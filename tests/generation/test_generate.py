"""Generation from the outside: what goes in and comes out, the cache, hooks, recording, forks, interrupts."""

from __future__ import annotations

import pytest
import torch
from conftest import VARIANTS, random_model, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from twins import assert_near, examples

import optlens
from optlens import Ablate, OPTTokenizer, Steer
from optlens import demo as demo_checkpoint
from optlens.checks import InputError
from optlens.generation import Generation
from optlens.generation.run import Job
from optlens.generation.stopping import StopStrings
from optlens.hooks import HookPoint

IDS = torch.randint(3, 101, (2, 7), generator=torch.manual_seed(5))
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
TOKENIZER = OPTTokenizer.from_folder(demo_checkpoint.path())
TEXT = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def demo():
    return optlens.load()


def tiny(**overrides):
    return random_model(tiny_config(**overrides), torch.float64)


def raising_at(step: int, error: type[BaseException]):
    """A hook that raises in one step, once."""
    left = [error]

    def stop(value: torch.Tensor, hook: HookPoint) -> None:
        if hook.now.step == step and left:
            raise left.pop()

    return [("blocks.1.hook_resid_pre", stop)]


# --- what comes out -----------------------------------------------------------------------------------------------------


def test_text_gives_text_and_tokens_give_tokens(demo):
    text = demo.generate(TEXT, 4)
    assert isinstance(text, str) and text.startswith(TEXT) and len(text) > len(TEXT)
    both = demo.generate([TEXT, "Once"], 4)
    assert both[0] == text and both[1].startswith("Once")
    tokens = demo.to_tokens(TEXT)
    ids = demo.generate(tokens[0], 4)
    assert ids.shape == (tokens.shape[1] + 4,) and demo.generate(tokens, 4)[0].equal(ids)
    assert demo.tokenizer.decode(ids, skip_special=True) == text
    several = demo.generate(TEXT, 3, num_beams=2, num_return_sequences=2)
    assert len(several) == 2 and several[0] != several[1]
    assert demo.generate(tokens[0], 3, num_beams=2, num_return_sequences=2).shape[0] == 2


def test_every_token_is_the_likeliest_of_a_whole_run(variant):
    """With padding and without, the cached run equals runs without a cache."""
    model = tiny(**variant)
    for mask in (None, LEFT):
        result = model.generate(IDS, 12, attention_mask=mask, stop_at_eos=False, output_logits=True)
        whole_mask = result.mask[:, :-1].long()
        whole = model(result.sequences[:, :-1], attention_mask=whole_mask).logits[:, 6:]
        assert_near(torch.stack(result.logits, 1), whole.float(), 1e-6)
        assert whole.argmax(-1).equal(result.sequences[:, 7:])
        assert result.finish_reasons == ["length"] * 2 and not result.partial


def test_a_prompt_is_continued_alike_alone_and_padded():
    model = tiny()
    padded = model.generate(IDS, 9, attention_mask=LEFT, repetition_penalty=1.4, min_length=10)
    alone = model.generate(IDS[0, 3:], 9, repetition_penalty=1.4, min_length=10)
    assert padded[0, 3:][: len(alone)].equal(alone)


def test_a_given_cache_is_continued_and_left_alone():
    model = tiny()
    expected = model.generate(IDS, 8, attention_mask=LEFT, return_dict=True)
    past = model(IDS[:, :5], attention_mask=LEFT[:, :5], use_cache=True).past_key_values
    before = [part.clone() for part in past[1]]
    for _ in range(2):
        again = model.generate(IDS, 8, attention_mask=LEFT, past_key_values=past)
        assert again.equal(expected.sequences)
    assert past.get_seq_length() == 5
    for part, kept in zip(past[1], before, strict=True):
        assert part.equal(kept)
    beams = model.generate(IDS, 8, attention_mask=LEFT, num_beams=3)
    assert model.generate(IDS, 8, attention_mask=LEFT, num_beams=3, past_key_values=past).equal(
        beams
    )
    with pytest.raises(InputError, match="holds 5 tokens, but the prompt has 5"):
        model.generate(IDS[:, :5], 8, attention_mask=LEFT[:, :5], past_key_values=past)


def test_memory_is_set_aside_once():
    model = tiny()
    seen = set()

    def look(value: torch.Tensor, hook: HookPoint) -> None:
        seen.add((hook.now.step, job.strategy.rows.cache[0][0].untyped_storage().data_ptr()))

    job = Job(model, IDS, 6, stop_at_eos=False)
    with model.hooks([("blocks.1.hook_resid_pre", look)]):
        job.run()
    assert len(seen) == 6 and len({memory for _, memory in seen}) == 1


# --- samples ------------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_texts_and_leaves_torch_alone(demo):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = demo.generate(TEXT, 12, temperature=1.5, return_dict=True)
    assert torch.rand(1).equal(expected)
    again = demo.generate(TEXT, 12, temperature=1.5, seed=first.seed, return_dict=True)
    assert again.texts == first.texts
    others = {demo.generate(TEXT, 12, temperature=1.5, seed=seed) for seed in range(5)}
    assert len(others) > 2
    assert demo.generate(TEXT, 12, return_dict=True).seed is None


def test_several_samples_share_a_prompt():
    model = tiny()
    lengths = []
    with model.hooks([("hook_embed", lambda value, hook: lengths.append(tuple(value.shape[:2])))]):
        out = model.generate(IDS, 3, seed=0, num_return_sequences=3, stop_at_eos=False)
    assert lengths == [(2, 7), (6, 1), (6, 1)]
    assert out.shape == (6, 10) and out[:3, :7].equal(IDS[:1].expand(3, 7))


def test_draws_follow_the_probabilities():
    model = tiny()
    result = model.generate(IDS[0], 1, seed=1, num_return_sequences=20000, output_logits=True)
    counts = torch.bincount(result.sequences[:, -1], minlength=101) / 20000
    shares = result.logits[0][0].softmax(-1)
    # a standard deviation of at most 0.0035, of which 5 are allowed
    torch.testing.assert_close(counts, shares, rtol=0, atol=0.018)
    assert shares.max() > 0.05


# --- the end of a text --------------------------------------------------------------------------------------------------


def test_a_row_that_ended_is_filled_with_padding():
    model = tiny()
    plain = model.generate(IDS, 10, stop_at_eos=False)
    end = int(plain[0, 9])
    result = model.generate(IDS, 10, eos_token_id=end, return_dict=True)
    length = int((plain[0, 7:] == end).nonzero()[0]) + 1
    assert result.finish_reasons[0] == "eos"
    assert result.sequences[0, 7 : 7 + length].equal(plain[0, 7 : 7 + length])
    assert (result.sequences[0, 7 + length :] == 1).all()
    assert not result.mask[0, 7 + length :].any()
    assert [len(new) for new in result.new_tokens][0] == length
    width = result.sequences.shape[1]
    assert result.sequences[1].equal(plain[1, :width])  # the other row is not disturbed


def test_stop_strings_cross_token_borders(demo):
    continuation = demo.generate(TEXT, 12)[len(TEXT) :]
    pieces = list(demo.stream(TEXT, 12))
    across = pieces[0][-2:] + pieces[1][:1]  # the end of one token and the beginning of the next
    result = demo.generate(TEXT, 12, stop_strings=[across, "nowhere"], return_dict=True)
    assert result.finish_reasons == ["stop_string"] and across in continuation
    assert result.texts[0] == TEXT + pieces[0] + pieces[1]
    # one that began in the prompt counts; one that ended there does not
    begun = TEXT[-2:] + pieces[0][:2]
    assert demo.generate(TEXT, 12, stop_strings=begun) == TEXT + pieces[0]
    before = [TEXT[-4:], "a longer one that is nowhere to be found"]
    assert demo.generate(TEXT, 12, stop_strings=before) == TEXT + continuation


@given(
    text=st.text(st.sampled_from("ab é木😀"), max_size=30),
    stop=st.text("ab é木😀", min_size=1, max_size=4),
)
@examples(60)
def test_stop_strings_are_found_exactly_when_they_are_complete(text, stop):
    tokenizer = TOKENIZER
    ids = tokenizer.encode(text)
    finder = StopStrings([stop], tokenizer)
    ends = [end for end in range(1, len(ids) + 1) if finder.completed_by(ids[:end])]
    spelt = [b"".join(tokenizer.bytes_of(i) for i in ids[:end]) for end in range(len(ids) + 1)]
    wanted = stop.encode()
    expected = [
        end
        for end in range(1, len(ids) + 1)
        if spelt[end].count(wanted)
        and (spelt[end].rfind(wanted) + len(wanted) > len(spelt[end - 1]))
    ]
    assert ends == expected


# --- hooks and interventions --------------------------------------------------------------------------------------------


def test_hooks_know_where_they_are():
    model = tiny()
    seen = []

    def look(value: torch.Tensor, hook: HookPoint) -> None:
        seen.append((hook.now.phase, hook.now.step, hook.now.positions.tolist(), hook.now.seen))

    with model.hooks([("blocks.1.attn.hook_z", look)]):
        model.generate(IDS, 3, attention_mask=LEFT, stop_at_eos=False)
        model(IDS[:, :2])
    assert seen == [
        ("prefill", 0, [[-1, -1, -1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]], 0),
        ("decode", 1, [[4], [7]], 7),
        ("decode", 2, [[5], [8]], 8),
        ("prefill", None, [[0, 1], [0, 1]], 0),
    ]
    assert model.now.step is None and model.hook_dict["hook_embed"].now is model.now


def test_a_step_that_raises_leaves_no_step_behind():
    model = tiny()
    with pytest.raises(RuntimeError), model.hooks(raising_at(2, RuntimeError)):
        model.generate(IDS, 5, stop_at_eos=False)
    assert model.now.step is None


def test_interventions_act_as_in_runs_of_the_whole_text():
    model = tiny()
    vector = torch.randn(32, generator=torch.manual_seed(1), dtype=torch.float64)
    edits = [Steer(layer=0, vector=vector, scale=3.0, start=9), Ablate("z", layer=1, head=2)]
    plain = model.generate(IDS, 8, stop_at_eos=False)
    result = model.generate(IDS, 8, stop_at_eos=False, interventions=edits, output_logits=True)
    with model.intervene(edits):
        whole = model(result.sequences[:, :-1]).logits[:, 6:]
    assert_near(torch.stack(result.logits, 1), whole.float(), 1e-6)
    assert not result.sequences.equal(plain)
    steered = model.generate(IDS, 8, stop_at_eos=False, interventions=edits[0])
    assert steered[:, :10].equal(plain[:, :10]) and not steered.equal(plain)
    assert not any(point.listening for point in model.hook_dict.values())


# --- recording ----------------------------------------------------------------------------------------------------------

WHAT = ("attention", "residual", "attn_scores", "z", "ln_final.hook_scale", "hook_embed")


@pytest.mark.parametrize("name", ["pre_ln", "post_ln_350m"])
def test_a_recording_equals_that_of_the_finished_text(name):
    model = tiny(**VARIANTS[name])
    what = [w for w in WHAT if not (w.startswith("ln_final") and name != "pre_ln")]
    steer = Steer(layer=0, vector=torch.ones(32).double(), start=8)
    for mask in (None, LEFT):
        result = model.generate(IDS, 6, attention_mask=mask, record=what, interventions=steer)
        after = model.record(
            result.sequences, what=what, attention_mask=result.mask.long(), interventions=steer
        )
        rec = result.recording
        assert rec.what == after.what and rec.tokens.equal(after.tokens)
        assert rec.str_tokens == after.str_tokens and rec.columns == after.columns
        assert rec.metadata["interventions"] == after.metadata["interventions"]
        real = result.mask
        assert_near(rec.residual.transpose(1, 2)[real], after.residual.transpose(1, 2)[real])
        assert_near(rec["z"].transpose(1, 2)[real], after["z"].transpose(1, 2)[real])
        queries = rec.attention.permute(0, 3, 1, 2, 4)[real]
        assert_near(queries, after.attention.permute(0, 3, 1, 2, 4)[real])
        scores = [r["attn_scores"].permute(0, 3, 1, 2, 4)[real] for r in (rec, after)]
        assert scores[0].isfinite().equal(scores[1].isfinite())
        torch.testing.assert_close(*scores)
        assert_near(rec["hook_embed"][real], after["hook_embed"][real])
        assert_near(rec.logits[real], after.logits[real])


def test_a_recording_of_samples_chosen_parts_and_its_lens(demo):
    asked = {"what": ("residual", "logit_lens"), "layers": [1, -1], "dtype": torch.float64}
    result = demo.generate(TEXT, 5, seed=2, num_return_sequences=2, record=asked)
    after = demo.record(result.sequences, attention_mask=result.mask.long(), **asked)
    assert result.recording.layers == after.layers and result.recording.is_batch
    real = result.mask
    assert_near(
        result.recording.residual.transpose(1, 2)[real], after.residual.transpose(1, 2)[real], 1e-5
    )
    lens, other = result.recording.logit_lens(3), after.logit_lens(3)
    assert_near(lens.top_probs.transpose(1, 2)[real], other.top_probs.transpose(1, 2)[real], 1e-4)
    model = tiny()
    result = model.generate(IDS, 4, seed=2, num_return_sequences=2, record="z", stop_at_eos=False)
    assert_near(result.recording["z"], model.record(result.sequences, what="z")["z"])
    single = demo.generate(TEXT, 5, record="residual").recording
    assert single.tokens.ndim == 1 and single.prompt.endswith(demo.generate(TEXT, 5))


# --- forks --------------------------------------------------------------------------------------------------------------


def test_a_fork_goes_on_from_any_step():
    model = tiny()
    result = model.generate(IDS, 9, attention_mask=LEFT, stop_at_eos=False, return_dict=True)
    for step in (0, 4, 8):
        assert result.fork(step).sequences.equal(result.sequences)
        other = result.fork(step, token=50, max_new_tokens=3)
        given = torch.cat([result.sequences[:, : 7 + step], torch.full((2, 1), 50)], 1)
        mask = torch.cat([LEFT, torch.ones(2, step + 1).long()], 1)
        expected = model.generate(given, 3, attention_mask=mask, stop_at_eos=False)
        assert other.sequences.equal(expected) and other.prompt_length == 8 + step
    one = result.fork(2, token=[77], text=1)
    assert one.sequences.shape == (1, 16) and int(one.sequences[0, 9]) == 77
    assert one.fork(1, token=33).sequences.shape[1] == 16
    assert result.past_key_values.get_seq_length() == 15


def test_a_fork_keeps_the_past_as_it_was():
    """Keys and values made under an intervention stay; a new one acts from the fork on."""
    model = tiny()
    cut = Ablate("z", layer=0, head=1)
    result = model.generate(IDS, 6, stop_at_eos=False, interventions=cut, return_dict=True)
    fork = result.fork(3, output_logits=True)
    with model.intervene(cut):
        past = model(result.sequences[:, :9], use_cache=True).past_key_values
    expected = model(result.sequences[:, 9:10], past_key_values=past).logits[:, -1]
    assert_near(fork.logits[0], expected.float(), 1e-6)
    assert result.fork(3, interventions=cut).sequences.equal(result.sequences)


def test_forks_of_samples_and_beams():
    model = tiny()
    sample = model.generate(IDS, 6, seed=1, stop_at_eos=False, return_dict=True)
    fork = sample.fork(2)
    assert fork.seed is not None and fork.seed != 1
    assert sample.fork(0, seed=1).sequences.equal(sample.sequences)
    assert sample.fork(2, do_sample=False).seed is None
    beams = model.generate(IDS, 6, num_beams=3, stop_at_eos=False, return_dict=True)
    assert beams.past_key_values is None
    assert beams.fork(3).sequences[:, :10].equal(beams.sequences[:, :10])


def test_forks_that_cannot_be():
    model = tiny()
    plain = model.generate(IDS, 6, stop_at_eos=False)
    result = model.generate(IDS, 6, eos_token_id=int(plain[0, 7]), return_dict=True)
    with pytest.raises(InputError, match="no step 7 to fork at: steps go from 0 to 6"):
        result.fork(7)
    with pytest.raises(InputError, match="Text 0 had ended before step 3"):
        result.fork(3)
    assert result.fork(3, text=1).sequences.shape[0] == 1
    with pytest.raises(InputError, match="which the fork has already; give max_new_tokens="):
        result.fork(5, token=5, text=1)
    with pytest.raises(InputError, match="one for each of 2 texts"):
        result.fork(0, token=[1, 2, 3])


# --- interrupts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"seed": 1, "num_return_sequences": 2}])
@pytest.mark.parametrize("step", [0, 3])
def test_an_interrupt_returns_what_was_written(options, step):
    model = tiny()
    options = options | {"stop_at_eos": False}
    whole = model.generate(IDS, 9, **options)
    with (
        model.hooks(raising_at(step, KeyboardInterrupt)),
        pytest.warns(UserWarning, match=f"Interrupted after {step} of at most 9 new tokens"),
    ):
        result = model.generate(IDS, 9, return_dict=True, **options)
    assert isinstance(result, Generation) and result.partial
    assert set(result.finish_reasons) == {"interrupted"}
    assert result.sequences.shape == (len(whole), 7 + step)
    if "num_beams" not in options:
        assert result.sequences.equal(whole[:, : 7 + step])
    elif step:  # the best beams so far, as if so many tokens had been asked for
        asked = model.generate(IDS, step, return_dict=True, **options)
        assert result.sequences.equal(asked.sequences)
        torch.testing.assert_close(result.sequences_scores, asked.sequences_scores)
    with model.hooks(raising_at(step, KeyboardInterrupt)), pytest.warns(UserWarning):
        assert model.generate(IDS, 9, **options).equal(result.sequences)


def test_an_interrupted_recording_is_whole():
    model = tiny()
    with model.hooks(raising_at(3, KeyboardInterrupt)), pytest.warns(UserWarning):
        result = model.generate(IDS, 9, record="residual", stop_at_eos=False)
    after = model.record(result.sequences, what="residual")
    assert result.recording.tokens.shape[1] == 10
    assert_near(result.recording.residual, after.residual)
