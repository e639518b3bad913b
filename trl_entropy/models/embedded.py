"""The embedded model: a 0.46M-parameter Qwen2 and its tokenizer, both built from code, so that nothing is downloaded.

The tokenizer is a `Qwen2Tokenizer` with its own small vocabulary, on purpose: for `model_type: qwen2`, `AutoTokenizer`
puts Qwen2's normalizer and pre-tokenizer in the place of whatever the directory says, silently. A tokenizer that was
trained with the same two gives the same ids after a reload; any other gives different ones and a ruined policy.
"""

import json
from itertools import product
from typing import TYPE_CHECKING

from trl_entropy.tasks.r1_template import R1_INSTRUCTION, R1_TAGS
from trl_entropy.tasks.word_problems import ITEMS, KINDS, LEAD_WORDS, NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

PAD_TOKEN = "<|pad|>"
END_TOKEN = "<|endoftext|>"
VOCAB_SIZE = 512  # of the model; the tokenizer has a few entries less
MAX_POSITIONS = 256
# Twice Qwen2's 0.02, which is meant for wide layers: with it the warm start reached 50 % greedy instead of 93 %.
INITIALIZER_RANGE = 0.04


def build_tokenizer() -> "PreTrainedTokenizerBase":
    """Builds the byte-level BPE tokenizer of the embedded model, the same one on every call and machine.

    Any text encodes, and decodes to its NFC form (Qwen2's normalizer composes characters). Each word of the word
    problems is one token and each digit is one. The R1 tags and the whole instruction are added tokens with
    `special=False`: TRL decodes with `skip_special_tokens=True`, which would hide special tags from the reward.

    Returns:
        A tokenizer with the padding token 0, the end-of-text token 1, and padding on the left.
    """
    from transformers import AddedToken, Qwen2Tokenizer

    vocab, merges = _train_bpe()
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=END_TOKEN,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(text, special=False) for text in (*R1_TAGS, R1_INSTRUCTION)])
    return tokenizer


def build_model(tokenizer: "PreTrainedTokenizerBase", seed: int = 0) -> "Qwen2ForCausalLM":
    """Builds the untrained embedded model in float32; the caller's random state is left as it was.

    Args:
        tokenizer: The tokenizer of [`build_tokenizer`]; gives the ids of padding and end.
        seed: Of the initial weights.

    Returns:
        A `Qwen2ForCausalLM` of 459,904 parameters with tied embeddings.

    Raises:
        ValueError: If the tokenizer has more entries than the model has rows.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    if len(tokenizer) > VOCAB_SIZE:
        raise ValueError(
            f"the embedded model has {VOCAB_SIZE} token embeddings, the tokenizer {len(tokenizer)} entries"
        )
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def _train_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Trains the vocabulary with Qwen2's own normalizer and pre-tokenizer; returns it with its merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    qwen2 = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = qwen2.normalizer, qwen2.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(R1_TAGS) - 1,
        special_tokens=[PAD_TOKEN, END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_vocabulary_text(), trainer)
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _vocabulary_text() -> list[str]:
    """Sentences in which every word of the task occurs, so that each ends up as one token."""
    wordings = (
        kind.wording.format(*("" for _ in kind.ranges), name=name, item=item)
        for kind, name, item in product(KINDS.values(), NAMES, ITEMS)
    )
    template = "\nQuestion: How many\nResponse: guess"
    return [*(f" {wording}{template}" for wording in wordings), *(f" {word}" * 9 for word in LEAD_WORDS)]
