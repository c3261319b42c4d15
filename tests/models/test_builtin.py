"""The built-in target, for real: token for token what transformers' generate says, in float32."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.core.trees import first_path
from specdec_engine.drafters import build_drafter
from specdec_engine.models.draft_files import builtin_draft, read_draft
from specdec_engine.models.draft_folder import fingerprint
from specdec_engine.models.loading import load_model
from specdec_engine.models.options import LoadOptions
from specdec_engine.pair import load_pair
from specdec_engine.runtime.target import ModelTarget
from tests.fakes import cycles, emitted, host, run
from tests.prompts import PROMPTS

pytestmark = pytest.mark.builtin
TOKENS = 64


@pytest.fixture(scope="module")
def reference():
    """transformers' own forward and `generate`."""
    return load_model("builtin", LoadOptions(dtype="float32", runtime="generic"))


@pytest.fixture(scope="module", params=["generic", "lean"])
def loaded(builtin, reference, request):
    return reference if request.param == "generic" else load_model("builtin", LoadOptions(dtype="float32"))


@pytest.fixture(scope="module")
def noisy(reference, tmp_path_factory):
    """A checkpoint that is often right and often wrong: the target with 4 % noise on its weights, saved."""
    folder = tmp_path_factory.mktemp("perturbed")
    model = load_model("builtin", LoadOptions(dtype="float32", runtime="generic")).runtime.model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.04 * weight.std() * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    reference.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def perturbed(noisy, loaded):
    return load_model(str(noisy), LoadOptions(dtype="float32", runtime=loaded.runtime.name)).runtime


def test_the_pair_that_ships_has_one_tokenizer(reference):
    """A start does not compare them."""
    assert read_draft(builtin_draft()).tokenizer == fingerprint(reference.tokenizer)


def chat(loaded, prompt):
    return loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
    )["input_ids"]


def drafted_by(loaded, spec, runtime=None):
    return build_drafter(spec, host(loaded.runtime.vocab, lambda name: runtime))


# Every prompt on our forward; some on the generic runtime, which is slow, and is what the reference runs on.
RUNS = [("lean", i) for i in range(len(PROMPTS))] + [("generic", i) for i in range(0, len(PROMPTS), 5)]


@pytest.mark.parametrize(("loaded", "i"), RUNS, indirect=["loaded"])
def test_greedy_tokens_equal_transformers_generate(loaded, reference, perturbed, i):
    """Prompt i with k = 1 + i mod 8 and one of three drafts: together every k from 1 to 8, and each draft four times.

    What transformers itself would generate is read from one pass over the text: each token of it must be the likeliest after
    those before.
    """
    prompt, k = chat(loaded, PROMPTS[i]), 1 + i % 8
    spec = ("ngram", "model:perturbed", "ngram,model:perturbed")[i % 3]
    drafter, target = drafted_by(loaded, spec, perturbed), ModelTarget(loaded.runtime, "builtin")
    said = emitted(run(target, drafter, prompt, k=k, max_tokens=TOKENS, stop_ids=loaded.stop_ids))
    with torch.inference_mode():
        logits = reference.runtime.model(torch.tensor([prompt + said]), use_cache=False).logits[0]
    assert said == logits[len(prompt) - 1 : -1].argmax(-1).tolist(), f"{spec}, k {k}"
    assert len(said) == TOKENS or said[-1] in loaded.stop_ids


def test_the_perturbed_draft_is_neither_always_right_nor_always_wrong(loaded, perturbed):
    """Otherwise the test above would not exercise rejection and acceptance both."""
    drafter, target = drafted_by(loaded, "model:perturbed", perturbed), ModelTarget(loaded.runtime, "builtin")
    found = cycles(run(target, drafter, chat(loaded, PROMPTS[0]), k=4, max_tokens=48))
    kept = [c.accepted / len(c.drafted) for c in found if c.drafted]
    assert min(kept) < 1.0 == max(kept)


def test_sampling_repeats_under_a_seed(loaded, perturbed):
    def tokens(seed):
        drafter, target = drafted_by(loaded, "model:perturbed", perturbed), ModelTarget(loaded.runtime, "builtin")
        options = {"k": 3, "max_tokens": 24, "sampling": Sampling(0.8, top_p=0.95), "seed": seed}
        return emitted(run(target, drafter, chat(loaded, PROMPTS[1]), **options))

    assert tokens(1) == tokens(1) != tokens(2)


@pytest.fixture(scope="module")
def packed(builtin):
    loaded = load_model("builtin", LoadOptions())
    if loaded.weights != "int4":
        pytest.skip(f"this machine keeps the weights as {loaded.weights}")
    return loaded


def test_packed_logits_are_those_of_the_dequantised_file(packed, reference):
    """Within bfloat16's rounding: logits spread by 3.7 here, differ by 0.1 in the mean square, and rank alike at the top."""
    ids = torch.tensor(chat(packed, PROMPTS[0]) + chat(packed, PROMPTS[1]))
    packed.runtime.rollback(0)
    reference.runtime.rollback(0)
    found, expected = (runtime.forward(ids, len(ids)).float() for runtime in (packed.runtime, reference.runtime))
    assert (found - expected).pow(2).mean().sqrt() < 0.05 * expected.std()
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.8


@pytest.mark.parametrize("i", range(0, len(PROMPTS), 3))
def test_packed_speculation_says_what_packed_plain_decoding_says(packed, i):
    """bfloat16 or not: the kernels give a row the same bits alone and among others, so that even near-ties fall alike."""
    target, prompt = ModelTarget(packed.runtime, "builtin"), chat(packed, PROMPTS[i])
    plain, looked_up = (
        emitted(run(target, drafted_by(packed, spec), prompt, k=1 + i % 8, max_tokens=TOKENS, stop_ids=packed.stop_ids))
        for spec in ("none", "ngram")
    )
    assert looked_up == plain


# -- the built-in pair ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["float32", "packed"])
def pair(builtin, request):
    """As it is when nothing is named."""
    options = LoadOptions(dtype="float32", quantize="none") if request.param == "float32" else LoadOptions()
    found = load_pair(options=options)
    assert found.drafter.name == "ngram,builtin"
    return found


@pytest.mark.parametrize("i", range(0, len(PROMPTS), 4))
def test_the_builtin_pair_says_what_its_target_says(pair, i):
    prompt = pair.encode(PROMPTS[i])
    texts = [emitted(list(pair.decode(prompt, k=k, max_tokens=TOKENS))) for k in (0, 4, "auto")]
    assert texts[1] == texts[0]
    assert texts[2] == texts[0]


@pytest.mark.parametrize("i", range(2))
def test_a_trees_second_candidates_win_and_the_text_stays_the_targets(builtin, i):
    pair = load_pair("builtin", "tree:ngram,builtin")
    prompt = pair.encode(PROMPTS[i])
    said = [cycles(pair.decode(prompt, k=k, max_tokens=80)) for k in (0, 4)]
    ids = [emitted(of_it) for of_it in said]
    assert ids[0] == ids[1]
    won = [cycle for cycle in said[1] if cycle.parents and set(cycle.path) - set(first_path(cycle.parents))]
    assert won


def test_the_builtin_draft_is_right_often_enough_to_pay(builtin):
    """Of its first tokens more than a quarter on each of these prompts together, none of which it was made from."""
    alone = load_pair(draft="builtin")
    found = [cycles(list(alone.decode(alone.encode(prompt), k=2, max_tokens=TOKENS))) for prompt in PROMPTS[:6]]
    tested, accepted = (sum(getattr(c, name) for run in found for c in run) for name in ("tested", "accepted"))
    assert accepted / tested > 0.25


def test_where_the_head_cannot_be_used_the_default_is_a_lookup(builtin):
    assert load_pair(options=LoadOptions(runtime="generic")).drafter.name == "ngram"


def test_the_readme_shows_the_library_as_it_works(builtin):
    """The README's Python block, run as it stands."""
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    code = re.search(r"<!-- tested: library -->\s*```python\n(.*?)```", readme, re.DOTALL)
    assert code, "README.md has no block marked `tested: library`"
    assert len(code[1].strip().splitlines()) <= 14
    done = subprocess.run([sys.executable, "-c", code[1]], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "light" in done.stdout.lower()  # which words exactly depends on how this machine rounds
