"""Tokenizers of the three families that people's models have, trained on this repository's own documentation."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"


@cache
def text() -> tuple[str, ...]:
    """What they are trained on, and a page that they are tried with."""
    return tuple((DOCS / name).read_text("utf-8") for name in ("method.md", "generate.md", "losslessness.md"))


@cache
def byte_level(size: int = 700) -> Any:
    """As GPT-2's, Llama 3's and Qwen's: bytes by an alphabet of their own, words with the space before them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special, alphabet = ["<bos>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        text(),
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="<|im_end|>")


@cache
def byte_fallback(size: int = 700) -> Any:
    """As Llama 2's and Mistral's: a mark for spaces, and a token for each byte of what has none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pieces = [f"<0x{i:02X}>" for i in range(256)]
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    special = ["<unk>", "<s>", "</s>", *pieces]
    made.train_from_iterator(text(), trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False))
    content = json.loads(made.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in pieces]
    made = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def unigram(size: int = 700) -> Any:
    """As T5's and Gemma's forerunners: a mark for spaces, pieces by their likelihood."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<pad>", "<eos>", "<unk>"], unk_token="<unk>", show_progress=False,
        initial_alphabet=list("東京🙂ïéN—\n\tx[]=1234567890'IT"),
    )  # fmt: skip
    made.train_from_iterator(text(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token="<unk>")


FAMILIES = {"byte level": byte_level, "byte fallback": byte_fallback, "unigram": unigram}
