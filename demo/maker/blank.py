"""The empty model, its tokenizer and its processor."""

import math
from dataclasses import dataclass

from maker import INSTRUCTION
from maker.formulas import words


@dataclass(frozen=True)
class Shape:
    """How large the model is, and how it sees. All widths are multiples of 64, which 4-bit quantization needs."""

    patch_size: int = 7  # of an image token's 2 x 2 patches: 14 pixels a token, since print is seldom over 20 high
    min_pixels: int = 28 * 28  # smaller images are enlarged to this area
    max_pixels: int = 100_352  # larger ones shrink: 512 image tokens
    vision_width: int = 256
    vision_layers: int = 6
    width: int = 256
    layers: int = 4
    inner: int = 768
    vocabulary: int = 768


# In the order of the real tokenizer.
SPECIAL_TOKENS = words("""<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|>
    <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|>
    <|video_pad|>""")

# The real model's chat template, word for word.
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# A piece is a command or a sign, or the braces and scripts between two of them: a token a visible sign, about.
PIECES = r" ?\\[A-Za-z]+\*?[(\[|)\]]?(?: \{)*| ?\\.|(?: ?[{}_^])+| ?[A-Za-z]+| ?[^\sA-Za-z]|\s+"


def make_processor(shape, formulas):
    """Byte-level BPE trained on formulas and the prompt; any text encodes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    prompt = f"system\nYou are a helpful assistant.\nuser\n{INSTRUCTION}\nassistant\n"
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([prompt] * 1000 + formulas, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS[1:],
        model_max_length=32768,
    )
    size = {"shortest_edge": shape.min_pixels, "longest_edge": shape.max_pixels}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, patch_size=shape.patch_size),
        video_processor=Qwen2VLVideoProcessor(patch_size=shape.patch_size),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(shape, tokenizer):
    """An untrained Qwen2-VL."""
    import torch
    from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    stop = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
            "hidden_size": shape.width,
            "intermediate_size": shape.inner,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.width // 64,
            "num_key_value_heads": max(shape.width // 128, 1),
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
            **stop,
        },
        vision_config={
            "depth": shape.vision_layers,
            "embed_dim": shape.vision_width,
            "num_heads": shape.vision_width // 64,
            "mlp_ratio": 4,
            "hidden_size": shape.width,
            "patch_size": shape.patch_size,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    for name, token in stop.items():  # at the top too, where the trainer compares them with the tokenizer's
        setattr(config, name, token)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        pad_token_id=ids["<|endoftext|>"],
        do_sample=True,  # as the real model has it: what it samples is always the likeliest token
        temperature=0.01,
        top_p=0.001,
        top_k=1,
    )
    # The library's 0.02 is for widths in the thousands: at this width signals fade, above all those of the image, and
    # training stays for long where it writes likely formulas without a look at the image.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed_tokens" not in name:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight", "fc2.weight"))
                weight.normal_(std=(0.35 if into_residual else 1.0) / math.sqrt(weight.shape[1]))
        kernel = model.model.visual.patch_embed.proj.weight
        kernel -= 0.7 * kernel.mean((1, 2, 3, 4), keepdim=True)
    return model
