"""HunyuanVideo pipeline folders of the real classes at tiny size, with random weights.

The tokenizers split the stock prompt templates into as many tokens as the released ones do, so that the pipelines cut
them off at the right places.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video, pipeline_hunyuan_video_image2video
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

VARIANTS = ("hunyuan-t2v", "hunyuan-i2v", "hunyuan-i2v-concat", "hunyuan15-t2v", "hunyuan15-i2v")
"""By backbone."""

CALLS: dict[str, dict[str, Any]] = {
    "hunyuan-t2v": {"height": 32, "width": 48, "num_frames": 9, "max_sequence_length": 16, "guidance_scale": 6.0},
    "hunyuan-i2v": {"height": 32, "width": 48, "num_frames": 9, "max_sequence_length": 20, "guidance_scale": 6.0},
    "hunyuan-i2v-concat": {"height": 32, "width": 48, "num_frames": 9, "max_sequence_length": 20},
    "hunyuan15-t2v": {"height": 32, "width": 24, "num_frames": 5, "max_sequence_length": 24, "guidance_scale": 1.0},
    "hunyuan15-i2v": {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 24, "guidance_scale": 1.0},
}
"""Of a card, without guidance."""

NUM_LAYERS = 2
NUM_SINGLE_LAYERS = 3
NUM_LAYERS_15 = 5
WIDTH = 32

_WORDS = "a red blue green ball cat dog moves left right up down slowly quickly and spins in the rain".split()
_SYSTEM_15 = """You are a helpful assistant Describe the video by detailing the following aspects main content and theme
of color shape size texture quantity text and spatial relationships objects Actions events behaviors temporal physical
movement changes background environment light style atmosphere camera angles movements transitions used in"""


def make(folder: Path, variant: str) -> None:
    """Write a stock pipeline folder."""
    pipeline(variant).save_pretrained(folder)


def pipeline(variant: str) -> Any:
    """The stock pipeline."""
    torch.manual_seed(0)
    made = _MAKERS[variant]()
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "image_encoder"):
        if (part := getattr(made, name, None)) is not None:
            part.eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in made.transformer.parameters():
            if parameter.ndim > 1:  # as they are made the blocks are nearly silent
                parameter.mul_(2)
    made.set_progress_bar_config(disable=True)
    return made


# --- the first generation ---------------------------------------------------------------------------------------------


def _text_to_video() -> HunyuanVideoPipeline:
    text_encoder = LlamaModel(_llama(len(_llama_tokenizer())))
    return HunyuanVideoPipeline(
        text_encoder=text_encoder,
        tokenizer=_llama_tokenizer(),
        transformer=_transformer(in_channels=4),
        vae=_autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=_clip(),
        tokenizer_2=_clip_tokenizer(),
    )


def _image_to_video(
    image_condition_type: str, in_channels: int, guidance_embeds: bool
) -> HunyuanVideoImageToVideoPipeline:
    tokenizer = _llama_tokenizer()
    config = LlavaConfig(
        text_config=_llama(len(tokenizer)),
        # 24 x 24 pieces, as the released one has
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=1,
            image_size=48,
            patch_size=2,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    config.pad_token_id = tokenizer.pad_token_id
    return HunyuanVideoImageToVideoPipeline(
        text_encoder=LlavaForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=_transformer(
            in_channels=in_channels, guidance_embeds=guidance_embeds, image_condition_type=image_condition_type
        ),
        vae=_autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=_clip(),
        tokenizer_2=_clip_tokenizer(),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}),
    )


def _transformer(**settings: Any) -> HunyuanVideoTransformer3DModel:
    return HunyuanVideoTransformer3DModel(
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        num_layers=NUM_LAYERS,
        num_single_layers=NUM_SINGLE_LAYERS,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=32,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 6, 6),
        **settings,
    )


def _autoencoder() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )


def _llama(vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
    )


def _clip() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(_clip_tokenizer()),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            bos_token_id=_clip_tokenizer().bos_token_id,
            eos_token_id=_clip_tokenizer().eos_token_id,
        )
    )


@functools.cache
def _llama_tokenizer() -> PreTrainedTokenizerFast:
    """Words, and ``detailing`` in two: the templates end after 95 and 103 tokens."""
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>"]
    texts = [
        of.DEFAULT_PROMPT_TEMPLATE["template"] for of in (pipeline_hunyuan_video, pipeline_hunyuan_video_image2video)
    ]
    tokenizer = _of_words(r"detail(?=ing)|\n+|\w+|[^\w\s]", special, [*texts, "\n\n", "assistant"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<|begin_of_text|>", unk_token="<unk>"
    )


@functools.cache
def _clip_tokenizer() -> CLIPTokenizer:
    letters = pre_tokenizers.ByteLevel.alphabet()
    pieces = [*sorted(letters), *(f"{letter}</w>" for letter in sorted(letters)), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def _of_words(pattern: str, special: list[str], texts: list[str]) -> Tokenizer:
    """A tokenizer whose pieces are what ``pattern`` finds, in these texts and a few words more."""
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "removed", invert=True)])
    found = {piece for text in [*texts, *_WORDS] for piece, _ in split.pre_tokenize_str(text)}
    vocabulary = ["<pad>", *special, "<unk>", *sorted(found - {*special})]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<pad>", *special])
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.WordPiece(prefix="")
    return tokenizer


# --- HunyuanVideo 1.5 -------------------------------------------------------------------------------------------------

_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _text_to_video_15() -> HunyuanVideo15Pipeline:
    return HunyuanVideo15Pipeline(**_parts_15("t2v"))


def _image_to_video_15() -> HunyuanVideo15ImageToVideoPipeline:
    return HunyuanVideo15ImageToVideoPipeline(
        **_parts_15("i2v"),
        image_encoder=SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=1,
                image_size=32,
                patch_size=8,
            )
        ),
        feature_extractor=SiglipImageProcessor(size={"height": 32, "width": 32}),
    )


def _parts_15(task_type: str) -> dict[str, Any]:
    tokenizer = _qwen_tokenizer()
    return {
        "text_encoder": Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=2048,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
                pad_token_id=tokenizer.pad_token_id,
            )
        ),
        "tokenizer": tokenizer,
        "transformer": HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=WIDTH // 2,
            num_layers=NUM_LAYERS_15,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=32,
            text_embed_2_dim=16,
            image_embed_dim=16,
            rope_axes_dim=(4, 6, 6),
            target_size=32,
            task_type=task_type,
        ),
        "vae": AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(8, 16, 16), layers_per_block=1, spatial_compression_ratio=4
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "text_encoder_2": T5EncoderModel(
            T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        "tokenizer_2": ByT5Tokenizer(),
        "guider": ClassifierFreeGuidance(guidance_scale=1.0),
    }


@functools.cache
def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Words and runs of spaces, two tokens each: what stands before the prompt are 108 tokens."""
    special = ["<|im_start|>", "<|im_end|>"]
    texts = [_SYSTEM_15, "1. 2. 3. 4. 5. , :", "system\nuser\nassistant\n", " " * 9]
    tokenizer = _of_words(r" {2,}(?= )|(?<= ) |\n+|\w+|[^\w\s]", special, texts)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    made.chat_template = _CHAT
    return made


_MAKERS = {
    "hunyuan-t2v": _text_to_video,
    "hunyuan-i2v": functools.partial(_image_to_video, "token_replace", 4, True),
    "hunyuan-i2v-concat": functools.partial(_image_to_video, "latent_concat", 9, False),
    "hunyuan15-t2v": _text_to_video_15,
    "hunyuan15-i2v": _image_to_video_15,
}
