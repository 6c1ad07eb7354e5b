"""Tiny models of the transformers library in local folders, with a tokenizer of words."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    BertConfig,
    BertModel,
    ClapAudioConfig,
    ClapAudioModelWithProjection,
    ClapFeatureExtractor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

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


def save_audio_model(folder: Path, kind: str) -> str:
    """A tiny ast, clap, clap-fused, wav2vec2 or wav2vec2-masked with its feature extractor; the folder's name."""
    torch.manual_seed(0)
    model, extractor = _audio_model(kind)
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return str(folder)


def _audio_model(kind: str) -> tuple[PreTrainedModel, object]:
    match kind:
        case "ast":
            sizes = ASTConfig(**SIZES, num_mel_bins=32, max_length=100)
            return ASTModel(sizes), ASTFeatureExtractor(num_mel_bins=32, max_length=100)
        case "clap" | "clap-fused":
            is_fused = kind == "clap-fused"
            sizes = ClapAudioConfig(
                spec_size=64, num_mel_bins=16, patch_embeds_hidden_size=8, depths=[1, 1], num_attention_heads=[2, 2],
                hidden_size=16, window_size=4, projection_dim=12, num_hidden_layers=2, enable_fusion=is_fused,
            )  # fmt: skip
            extractor = ClapFeatureExtractor(
                feature_size=16, sampling_rate=16000, hop_length=160, max_length_s=1, fft_window_size=512,
                frequency_max=8000, truncation="fusion" if is_fused else "rand_trunc",
            )  # fmt: skip
            return ClapAudioModelWithProjection(sizes), extractor
        case _:
            is_masked = kind == "wav2vec2-masked"
            sizes = Wav2Vec2Config(
                **SIZES, conv_dim=(8, 8), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
                feat_extract_norm="layer" if is_masked else "group", num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
            )  # fmt: skip
            return Wav2Vec2Model(sizes), Wav2Vec2FeatureExtractor(return_attention_mask=is_masked)
