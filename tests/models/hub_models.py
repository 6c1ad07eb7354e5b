"""Tiny models of the transformers library in local folders, with a tokenizer of words."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

WORDS = ["a", "dog", "barks", "rain", "falls", "on", "tin", "roof", "!", "Dog"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def save_text_model(folder: Path, kind: str, *, with_weights: bool = True) -> str:
    """A two-layer bert or roberta; the folder's name."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    sizes = {**SIZES, "vocab_size": len(vocabulary), "max_position_embeddings": 40, "pad_token_id": 1}
    config = BertConfig(**sizes) if kind == "bert" else RobertaConfig(**sizes)
    config.save_pretrained(folder)
    if with_weights:
        torch.manual_seed(0)
        (BertModel if kind == "bert" else RobertaModel)(config).save_pretrained(folder)
    return str(folder)
