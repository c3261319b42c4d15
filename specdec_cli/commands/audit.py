"""`specdec audit`: is this speculation lossless?"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from specdec_cli import options as opt
from specdec_cli import output
from specdec_cli.exits import ExitCode
from specdec_cli.startup import interruptible, quieten
from specdec_engine.core.cycle_types import Sampling
from specdec_engine.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from specdec_engine.audit.run import Audit
    from specdec_engine.audit.sources import Source
    from specdec_engine.models.options import LoadOptions
    from specdec_engine.pair import Pair

_WHAT = "What is looked at"
Peer = Annotated[
    Literal["transformers"] | None,
    typer.Option(
        rich_help_panel=_WHAT, help="Look at transformers' generate with the same pair, in place of our engine."
    ),
]
Plain = Annotated[
    str | None,
    typer.Option(rich_help_panel=_WHAT, metavar="URL", help="With --attach: the same server without speculation."),
]
Samples = Annotated[int, typer.Option(rich_help_panel=_WHAT, help="Answers to each of the four prompts.", min=40)]
Rule = Annotated[Literal["token", "block"], typer.Option(rich_help_panel=_WHAT, help="Our own rule to look at.")]
K = Annotated[int, typer.Option("-k", rich_help_panel=_WHAT, help="Drafted tokens a cycle.", min=1)]
Temperature = Annotated[float, typer.Option(rich_help_panel=_WHAT, help="Above 0: what is drawn is looked at.")]
Seed = Annotated[int, typer.Option(rich_help_panel=_WHAT, help="Of the answers.")]
Format = Annotated[Literal["text", "json"], typer.Option(rich_help_panel="Output", help="On stdout.")]
Attach = Annotated[
    str | None,
    typer.Option(rich_help_panel=_WHAT, metavar="URL", help="Look at a running server, at its second token."),
]


@opt.records
def audit(
    *,
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", rich_help_panel="Models", help="Whose distribution it is; builtin by default."),
    ] = None,
    draft: opt.Draft = None,
    peer: Peer = None,
    attach: Attach = None,
    plain: Plain = None,
    samples: Samples = 400,
    k: K = 3,
    temperature: Temperature = 1.0,
    top_k: opt.TopK = 0,
    top_p: opt.TopP = 1.0,
    rule: Rule = "token",
    seed: Seed = 0,
    where: opt.Placement,
    format: Format = "text",
) -> None:
    """Test whether speculation changes what a target says. Exits with 0, or with 6 on a bias.

    specdec audit

    specdec audit -t org/target -d org/draft --peer transformers

    specdec audit --attach http://localhost:8000 -t org/target
    """
    sampling = Sampling(temperature, top_k, top_p)
    if sampling.greedy:
        raise UsageError(
            "--temperature 0 draws nothing", "specdec bench compares greedy texts; for an audit 1 is usual"
        )
    if plain is not None and attach is None:
        raise UsageError("--plain belongs to --attach", "specdec audit --attach URL --plain URL")
    if attach is not None and (peer is not None or draft is not None):
        raise UsageError("--attach looks at what the server drafts with", "leave out --draft and --peer")
    quieten(where.offline, where.debug)
    try:
        with output.working() as say:
            if attach is not None:
                found = _of_server(attach, plain, target, sampling, samples, seed, where, say)
            else:
                with interruptible(), output.narrated() as report:
                    options = where.loading(512, report)
                    looked = (_of_peer if peer else _of_pair)(target or "builtin", draft, sampling, k, rule, options)
                found = looked(samples, seed, _counting(say, samples * 4))
    except KeyboardInterrupt:
        output.note("interrupted; there is no verdict")
        raise
    _tell(found, format)
    if found.verdict == "biased":
        raise typer.Exit(ExitCode.CHECK)


Looking = Callable[[int, int, Callable[[], None]], "Audit"]


def _counting(say: Callable[[str], None], total: int) -> Callable[[], None]:
    done = 0

    def one() -> None:
        nonlocal done
        done += 1
        if done % 20 == 0:
            say(f"asking, answer {done:,} of {total:,}")

    return one


def _prompts(pair: Pair) -> list[list[int]]:
    from specdec_engine.audit.run import PROMPTS

    return [pair.encode(text, chat=False) for text in PROMPTS]


def _against(pair: Pair, source: Source, sampling: Sampling) -> Looking:
    """The pair's target, which is exact."""
    from specdec_engine.audit.run import audit as looked
    from specdec_engine.audit.sources import distribution

    def exactly(prompt: Sequence[int], said: Sequence[int]) -> NDArray[Any]:
        return distribution(pair, prompt, said, sampling)

    return lambda samples, seed, done: looked(source, pair.target.name, exactly, _prompts(pair), samples, seed, done)


def _of_pair(target: str, draft: str | None, sampling: Sampling, k: int, rule: str, options: LoadOptions) -> Looking:
    from specdec_engine.audit.sources import OwnPair
    from specdec_engine.pair import load_pair

    pair = load_pair(target, draft, options)
    return _against(pair, OwnPair(pair, sampling, k, rule), sampling)


def _of_peer(target: str, draft: str | None, sampling: Sampling, k: int, rule: str, options: LoadOptions) -> Looking:
    """transformers' own model of the target is the reference, too: what is looked at is its speculation, not its rounding."""
    from dataclasses import replace

    from specdec_engine.audit.sources import Transformers
    from specdec_engine.pair import load_pair

    generic = replace(options, runtime="generic", dtype="float32", quantize="none")
    pair = load_pair(target, "none", generic)
    model: Any = pair.target.runtime.model  # type: ignore[attr-defined]
    name = draft or "ngram"
    drafting = _Drafting({})
    if name == "ngram":
        drafting = _Drafting({"prompt_lookup_num_tokens": k})
    elif name != "none":
        drafting = _assisted(pair, name, k, generic)
    how = {"none": "plain", "ngram": "prompt lookup"}.get(name, f"assistant {name}")
    return _against(pair, Transformers(model, sampling, k, drafting.options, how, drafting.first_place), sampling)


class _Drafting(NamedTuple):
    """How `generate` drafts."""

    options: dict[str, Any]
    first_place: int = 0
    """The place of the first token that is drafted."""


def _assisted(pair: Pair, name: str, k: int, options: LoadOptions) -> _Drafting:
    """Have `generate` draft k tokens with this model."""
    from specdec_engine.models.assistant_files import load_assistant
    from specdec_engine.models.draft_files import found_draft, read_draft
    from specdec_engine.models.loading import find_model

    target: Any = pair.target.runtime.model  # type: ignore[attr-defined]
    made, tokenizer = read_draft(found_draft(name, options)), pair.tokenizer
    small: Any
    assistant = made is not None and made.kind == "assistant"
    if made is not None and assistant:
        small = load_assistant(made).to(target.device, target.dtype)
    else:
        loaded = find_model(name, options).load()
        small, tokenizer = loaded.runtime.model, loaded.tokenizer  # type: ignore[attr-defined]
    small.generation_config.num_assistant_tokens = k
    small.generation_config.num_assistant_tokens_schedule = "constant"
    small.generation_config.assistant_confidence_threshold = 0.0
    sizes = {m.config.get_text_config().vocab_size for m in (target, small)}
    other = len(sizes) > 1 or tokenizer.get_vocab() != pair.tokenizer.get_vocab()
    tokenizers = {"tokenizer": pair.tokenizer, "assistant_tokenizer": tokenizer} if other else {}
    return _Drafting({"assistant_model": small, **tokenizers}, first_place=int(assistant))


def _of_server(
    url: str,
    plain: str | None,
    target: str | None,
    sampling: Sampling,
    samples: int,
    seed: int,
    where: opt.Placement,
    say: Callable[[str], None],
) -> Audit:
    from specdec_engine.attach.asked import Asked
    from specdec_engine.attach.attached import attach
    from specdec_engine.audit.run import PROMPTS, audit_two
    from specdec_engine.audit.run import audit as looked
    from specdec_engine.audit.sources import ServedSource, distribution

    if plain is None and target is None:
        raise UsageError(
            "--attach needs something to hold the server against",
            "name its target with -t, or the same server without speculation with --plain URL",
        )
    server = attach(url)
    texts = {tuple(server.begin(Asked(text, chat=False)).prompt.ids): text for text in PROMPTS}
    prompts: Sequence[Sequence[int]] = list(texts)
    source = ServedSource(server, sampling, texts, _AT_ONCE)
    if plain is not None:
        other = ServedSource(attach(plain), sampling, texts, _AT_ONCE)
        return audit_two(source, other, prompts, samples, seed, _counting(say, 2 * samples * len(prompts)))
    from specdec_engine.pair import load_pair

    pair = load_pair(target or "builtin", "none", where.loading(512))
    return looked(
        source,
        pair.target.name,
        lambda p, said: distribution(pair, p, said, sampling),
        prompts,
        samples,
        seed,
        _counting(say, samples * len(prompts)),
    )


_AT_ONCE = 4
"""Answers of a server at a time: how many it decodes together must not matter, and it is quicker."""


def _tell(found: Audit, format: str) -> None:
    from specdec_engine.audit.run import PROMPTS, figures, sentence
    from specdec_engine.audit.sources import LOOKED_AT

    if format == "json":
        tests = [asdict(place) for place in found.places]
        typer.echo(jsonlib.dumps({"schema": "specdec.audit/1", **figures(found), "tests": tests}, indent=1))
        return
    for place in found.places:
        drafted = "" if place.drafted is None else f", {place.drafted:.0%} drafted"
        output.say(
            f"· prompt {place.prompt + 1}, token {place.place + 1}: {place.draws} draws{drafted}, {place.distance:.3f} from "
            f"the distribution, p {place.p_value:.2g}"
        )
    output.say(f"· that fault itself, on the same places: p {found.control:.1g}, as it should be small")
    mark = {"lossless": "✓", "biased": "×", "undecided": "?"}[found.verdict]
    output.say(f"{mark} {sentence(found)}")
    output.say(
        f"looked at: the first {LOOKED_AT} tokens after {len(PROMPTS)} short prompts. Not looked at: long contexts, other "
        "settings, and a bias that is smaller than chance makes these counts differ"
    )
