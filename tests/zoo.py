"""Tiny random models of the true architectures that people fine-tune, made of transformers' own classes.

Module names, special tokens, processors and the form of the chat templates are those of the real models; the sizes, the
weights and the words are not. Their tokenizer is that of `demo/model`.
"""

import copy
import dataclasses
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

TOKENIZER = Path(__file__).resolve().parents[1] / "demo/model/tokenizer.json"

# Of these, a config takes those that it knows, under the names that it has for them.
TEXT = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.1}
VISION = {"hidden_size": 32, "embed_dim": 32, "intermediate_size": 32, "mlp_ratio": 1, "out_hidden_size": 64}
VISION |= {"num_hidden_layers": 2, "depth": 2, "num_attention_heads": 2, "attention_heads": 2, "num_heads": 2}
VISION |= {"num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1, "image_size": 56, "patch_size": 14}


def template(turn, image, end, answer, *, first="", last="", closing=None, names=None, ordered=False):
    """A chat template. `turn` and `end` surround a message, with ROLE for its role, or for the name in `names`.

    `answer` asks for one, `first` begins the chat, `last` is before an answer that the chat has, and `closing` ends it
    where that is not as with other messages. If `ordered`, a message's images come first.
    """
    role = f"{{{{ {names or {}}.get(message['role'], message['role']) }}}}"
    parts = "message['content'] | sort(attribute='type')" if ordered else "message['content']"
    part = f"{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
    return (
        f"{first}{{% for message in messages %}}{turn.replace('ROLE', role)}"
        f"{{% set ours = message['role'] == 'assistant' %}}{{% if ours %}}{last}{{% endif %}}"
        f"{{% if message['content'] is string %}}{{{{ message['content'] }}}}"
        f"{{% else %}}{{% for part in {parts} %}}{part}{{% endfor %}}{{% endif %}}"
        f"{{% if ours %}}{end if closing is None else closing}{{% else %}}{end}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{answer}{{% endif %}}"
    )


def chatml(image, **how):
    """As most models have it."""
    return template("<|im_start|>ROLE\n", image, "<|im_end|>\n", "<|im_start|>assistant\n", **how)


QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def qwen(**changes):
    """What Qwen's models and their relatives have in common."""
    ids = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    ids |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    how = {"ids": ids, "tokens": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, "end": "<|im_end|>"}
    how |= {"template": chatml(QWEN_IMAGE)}
    how |= {"image": {"size": {"shortest_edge": 56**2, "longest_edge": 112**2}}}
    return how | changes


# As Qwen2-VL and Qwen2.5-VL have it, and no later model.
SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
)


def mrope(sections, theta=1_000_000.0, **more):
    """Positions of time, height and width, over so many of a head's dimensions each."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": sections, **more}}


PLACES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


def smolvlm(first):
    """SmolVLM and Idefics3, which cut large images into tiles, here of 64 pixels."""
    tokens = {"bos_token": first, "eos_token": "<end_of_utterance>", "pad_token": "<|endoftext|>"}
    names = {"user": "User", "assistant": "Assistant"}
    turn = "ROLE:{% if message['content'][0]['type'] != 'image' %} {% endif %}"
    return {
        "ids": {"image_token_id": "<image>"},
        "vision": {"image_size": 64, "patch_size": 16},
        "tokens": tokens,
        "special": ["<fake_token_around_image>", "<image>", "<global-img>", *PLACES],
        "end": "<end_of_utterance>",
        "image": {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 64}},
        "processor": {"image_seq_len": 4},
        "template": template(turn, "<image>", "<end_of_utterance>\n", "Assistant:", first=first, names=names),
    }


def mistral(**changes):
    """Mistral Small and Pixtral: images of any shape, a token at the end of each row of patches."""
    how = {"tokens": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "[IMG]"}}
    how["tokens"] |= {"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    how |= {"special": ["[INST]", "[/INST]"], "starts": True, "end": "</s>"}
    how |= {"image": {"patch_size": 14, "size": {"longest_edge": 112}}}
    names = {"user": "[INST]", "assistant": ""}
    how |= {"template": template("ROLE", "[IMG]", "[/INST]", "", first="{{ bos_token }}", closing="</s>", names=names)}
    return how | changes


def thinking(image, thinks):
    """Qwen3.5's template: an answer follows thoughts, if the model `thinks`, or else empty ones."""
    answer = "<|im_start|>assistant\n<think>\n"
    answer += f"{{% if not enable_thinking | default({thinks}) %}}{{{{ '\n</think>\n\n' }}}}{{% endif %}}"
    return template("<|im_start|>ROLE\n", image, "<|im_end|>\n", answer, last="<think>\n\n</think>\n\n")


GATED = {"num_hidden_layers": 4, "head_dim": 64, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
GATED |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
GATED |= mrope([3, 3, 2], 10_000_000.0, mrope_interleaved=True, partial_rotary_factor=0.25)
QWEN3_5 = qwen(
    model="qwen3_5",
    text=GATED,
    vision={"patch_size": 16, "num_position_embeddings": 16},
    image={"patch_size": 16, "size": {"shortest_edge": 64**2, "longest_edge": 128**2}},
    special=["<think>", "</think>"],
)
HEADLESS = {"vision_use_head": False}  # as the real ones: of SigLIP, they use the patches' features alone
TILES = [[56, 56], [56, 112], [112, 56], [112, 112]]
GRANITE = (
    "{% if messages[0]['role'] != 'system' %}<|system|>\nA chat between a curious user and an artificial intelligence "
    "assistant. The assistant gives helpful, detailed, and polite answers to the user's questions.\n{% endif %}"
)
HUNYUAN = "<｜hy_place▁holder▁no▁{}｜>"

# What is special about each. `ids` are options of its config, and their tokens; `text`, `vision` and `config` are other
# options of the config's parts and of the whole; `image` and `processor` those of the processor; `tokens` the named
# tokens of the tokenizer, `special` further ones, and `end` the one that ends a turn. Where it isn't that of the
# architecture's name, `model` is the model's type, `processors` the type whose processor it has, and `kinds` are the
# types of its parts.
TABLE = {
    "qwen2_vl": qwen(
        text=mrope([4, 6, 6]),
        vision={"hidden_size": 64},  # of what comes out
        template=chatml(QWEN_IMAGE, first=SYSTEM),
    ),
    "qwen2_5_vl": qwen(
        text=mrope([4, 6, 6]),
        vision={"fullatt_block_indexes": [1]},
        template=chatml(QWEN_IMAGE, first=SYSTEM),
    ),
    "qwen3_vl": qwen(
        text=mrope([6, 5, 5], 5_000_000.0, mrope_interleaved=True),
        vision={"patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        image={"patch_size": 16, "size": {"shortest_edge": 64**2, "longest_edge": 128**2}},
    ),
    "gemma3": {
        "ids": {"boi_token_index": "<start_of_image>", "eoi_token_index": "<end_of_image>"}
        | {"image_token_index": "<image_soft_token>"},
        "text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
        "vision": HEADLESS,
        "config": {"mm_tokens_per_image": 4},
        "tokens": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
        | {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        "special": ["<start_of_turn>", "<end_of_turn>"],
        "starts": True,
        "end": "<end_of_turn>",
        "image": {"size": {"height": 56, "width": 56}},
        "processor": {"image_seq_length": 4},
        "template": template(
            "<start_of_turn>ROLE\n",
            "<start_of_image>",
            "<end_of_turn>\n",
            "<start_of_turn>model\n",
            first="{{ bos_token }}",
            names={"assistant": "model"},
        ),
    },
    "smolvlm": smolvlm("<|im_start|>"),
    "idefics3": smolvlm("<|begin_of_text|>"),
    "qwen3_5": QWEN3_5 | {"template": thinking(QWEN_IMAGE, thinks=False)},  # the small ones
    "qwen3_5_thinking": QWEN3_5 | {"template": thinking(QWEN_IMAGE, thinks=True)},  # from 4B on
    "mllama": {
        "ids": {"image_token_index": "<|image|>"},
        "text": {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
        "vision": {"num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 64},
        "tokens": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        | {"pad_token": "<|finetune_right_pad_id|>"},
        "special": ["<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|image|>"],
        "starts": True,
        "end": "<|eot_id|>",
        "image": {"size": {"height": 56, "width": 56}},
        "template": template(
            "<|start_header_id|>ROLE<|end_header_id|>\n\n",
            "<|image|>",
            "<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            first="{{ bos_token }}",
        ),
    },
    "internvl": {
        "ids": {"image_token_id": "<IMG_CONTEXT>"},
        "vision": {"image_size": [56, 56], "patch_size": [14, 14]},
        "config": {"image_seq_length": 4},
        "tokens": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "start_image_token": "<img>"}
        | {"end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
        "end": "<|im_end|>",
        "image": {"size": {"height": 56, "width": 56}},
        "processor": {"image_seq_length": 4},
        "template": chatml("<IMG_CONTEXT>\n"),
    },
    "glm_ocr": {
        "processors": "glm46v",
        "ids": {"image_token_id": "<|image|>", "video_token_id": "<|video|>"}
        | {"image_start_token_id": "<|begin_of_image|>", "image_end_token_id": "<|end_of_image|>"}
        | {"video_start_token_id": "<|begin_of_video|>", "video_end_token_id": "<|end_of_video|>"},
        "text": mrope([4, 6, 6], 10_000.0),
        "tokens": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        "special": ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<think>", "</think>"],
        "end": "<|user|>",  # the next turn's beginning: none has an end
        "image": {"size": {"shortest_edge": 56**2, "longest_edge": 112**2}},
        "template": template(
            "<|ROLE|>\n",
            "<|begin_of_image|><|image|><|end_of_image|>",
            "",
            "<|assistant|>\n{% if enable_thinking is defined and not enable_thinking %}<think></think>\n{% endif %}",
            first="[gMASK]<sop>",
            last="<think></think>\n",
        ),
    },
    "paddleocr_vl": {
        "ids": {"image_token_id": "<|IMAGE_PLACEHOLDER|>", "video_token_id": "<|video_pad|>"}
        | {"vision_start_token_id": "<|IMAGE_START|>", "vision_end_token_id": "<|IMAGE_END|>"},
        "text": mrope([4, 6, 6], 500_000.0),
        "tokens": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "cls_token": "<|begin_of_sentence|>"}
        | {"image_token": "<|IMAGE_PLACEHOLDER|>"},
        "end": "</s>",
        "image": {"size": {"shortest_edge": 56**2, "longest_edge": 112**2}},
        "template": template(
            "ROLE",
            "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
            "{{ '\n' }}",
            "Assistant:\n",
            first="<|begin_of_sentence|>",
            closing="</s>",
            names={"user": "User: ", "assistant": "Assistant:\n", "system": ""},
            ordered=True,
        ),
    },
    "lighton_ocr": {
        "ids": {"image_token_id": "<|image_pad|>"},
        "tokens": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "image_token": "<|image_pad|>"}
        | {"image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"},
        "end": "<|im_end|>",
        "image": {"patch_size": 14, "size": {"longest_edge": 112}},
        "processor": {"patch_size": 14, "spatial_merge_size": 2},
        "template": chatml("<|image_pad|>", first="<|im_start|>system<|im_end|>\n"),
    },
    "gemma4": {
        "ids": {"boi_token_id": "<|image>", "eoi_token_id": "<image|>", "image_token_id": "<|image|>"}
        | {"video_token_id": "<|video|>", "boa_token_id": "<|audio>", "eoa_token_index": "<audio|>"}
        | {"audio_token_id": "<|audio|>"},
        "text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
        | {"sliding_window": 8, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "global_head_dim": 64}
        | {"final_logit_softcapping": 30.0},
        "vision": {"patch_size": 16, "position_embedding_size": 64, "use_clipped_linears": True},
        "tokens": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "image_token": "<|image|>"}
        | {"boi_token": "<|image>", "eoi_token": "<image|>", "audio_token": "<|audio|>", "boa_token": "<|audio>"}
        | {"eoa_token": "<audio|>"},
        "special": ["<|turn>", "<turn|>", "<|video|>", "<|channel>", "<channel|>"],
        "starts": True,
        "end": "<turn|>",
        "image": {"max_soft_tokens": 70},
        "processor": {"image_seq_length": 70},
        "template": template(
            "<|turn>ROLE\n",
            "<|image|>",
            "<turn|>\n",
            "<|turn>model\n",
            first="{{ bos_token }}",
            names={"assistant": "model"},
        ),
    },
    "mistral3": mistral(
        config={"spatial_merge_size": 2},
        ids={"image_token_index": "[IMG]"},
        processor={"patch_size": 14, "spatial_merge_size": 2},
    ),
    "pixtral": mistral(
        model="llava",
        kinds={"text": "mistral", "vision": "pixtral"},
        config={"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "image_seq_length": 1},
        ids={"image_token_index": "[IMG]"},
        processors="mistral3",
        processor={"patch_size": 14},
    ),
    "llava_onevision": {
        "ids": {"image_token_index": "<image>", "video_token_index": "<video>"},
        "vision": HEADLESS,
        "config": {"image_grid_pinpoints": TILES},
        "tokens": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "end": "<|im_end|>",
        "image": {"size": {"height": 56, "width": 56}, "image_grid_pinpoints": TILES},
        "processor": {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        "template": template(
            "<|im_start|>ROLE ",
            "<image>\n\n",
            "<|im_end|>",
            "<|im_start|>assistant\n",
            last="{{ '\n' }}",
            ordered=True,
        ),
    },
    "lfm2_vl": {
        "ids": {"image_token_id": "<image>"},
        "text": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
        "vision": {"patch_size": 16, "num_patches": 16} | HEADLESS,
        "config": {"projector_hidden_size": 64},
        "tokens": {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
        | {"image_token": "<image>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>"}
        | {"image_thumbnail_token": "<|img_thumbnail|>"},
        "special": ["<|im_start|>", *PLACES],
        "starts": True,
        "end": "<|im_end|>",
        "image": {"tile_size": 64, "min_image_tokens": 4, "max_image_tokens": 16},
        "template": chatml("<image>", first="{{ bos_token }}"),
    },
    "granite": {
        "model": "llava_next",
        "kinds": {"text": "granite", "vision": "siglip_vision_model"},
        "ids": {"image_token_index": "<image>"},
        "config": {"image_grid_pinpoints": TILES, "vision_feature_layer": [-2, -1]}
        | {"vision_feature_select_strategy": "full", "image_seq_length": 16},
        "tokens": {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|end_of_text|>"},
        "special": ["<|system|>", "<|user|>", "<|assistant|>"],
        "end": "<|end_of_text|>",
        "image": {"size": {"height": 56, "width": 56}, "crop_size": {"height": 56, "width": 56}}
        | {"image_grid_pinpoints": TILES},
        "processor": {"patch_size": 14, "vision_feature_select_strategy": "full"},
        "template": template(
            "<|ROLE|>\n", "<image>\n", "\n", "<|assistant|>\n", first=GRANITE, closing="<|end_of_text|>", ordered=True
        ),
    },
    "minicpmv4_6": qwen(
        ids={"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
        text=GATED,
        config={"insert_layer_id": 0, "image_size": 112},
        vision={"image_size": 112},
        tokens={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "image_token": "<|image_pad|>"}
        | {"video_token": "<|video_pad|>", "image_start_token": "<image>", "image_end_token": "</image>"}
        | {"slice_start_token": "<slice>", "slice_end_token": "</slice>"}
        | {"image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>"},
        special=["<think>", "</think>"],
        image={"scale_resolution": 112},
        template=thinking("<|image_pad|>", thinks=False),
    ),
    "hunyuan_vl": {
        "ids": {"image_token_id": HUNYUAN.format("102"), "im_start_id": HUNYUAN.format("100")}
        | {"im_end_id": HUNYUAN.format("101"), "im_newline_id": HUNYUAN.format("103")},
        "text": mrope([4, 4, 4, 4], 10_000.0),
        "vision": {"patch_size": 16, "img_max_token_num": 16, "max_image_size": 128, "min_image_size": 64},
        "tokens": {"bos_token": "<｜hy_begin▁of▁sentence｜>", "eos_token": HUNYUAN.format("2")}
        | {"pad_token": "<｜hy_▁pad▁｜>", "image_token": HUNYUAN.format("102")}
        | {"image_start_token": HUNYUAN.format("100"), "image_end_token": HUNYUAN.format("101")},
        "special": ["<｜hy_User｜>", "<｜hy_Assistant｜>"],
        "end": "<｜hy_Assistant｜>",
        "image": {"size": {"shortest_edge": 64**2, "longest_edge": 128**2}},
        "template": template(
            "",
            HUNYUAN.format("100") + HUNYUAN.format("102") + HUNYUAN.format("101"),
            "<｜hy_User｜>",
            "",
            first="{{ bos_token }}",
            closing="<｜hy_Assistant｜>",
        ),
    },
    "got_ocr2": {
        "ids": {"image_token_index": "<imgpad>"},
        # Its processor writes 256 tokens for an image, whatever its size.
        "vision": {
            "image_size": 256,
            "patch_size": 4,
            "global_attn_indexes": [1],
            "mlp_dim": 32,
            "output_channels": 16,
        },
        "config": {"image_seq_length": 256},
        "tokens": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "special": ["<img>", "</img>"],
        "end": "<|im_end|>",
        "image": {"size": {"height": 256, "width": 256}},
        "template": template(
            "<|im_start|>ROLE\n",
            "<img><imgpad></img>\n",
            "<|im_end|>",
            "<|im_start|>assistant\n",
            first="<|im_start|>system\nYou should follow the instructions carefully and explain your answers in detail."
            "<|im_end|>",
            ordered=True,
        ),
    },
    "deepseek_ocr2": {
        "ids": {"image_token_id": "<image>"},
        "text": {"num_key_value_heads": 2, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 32, "mlp_layer_types": ["dense", "sparse"], "n_group": 1, "topk_group": 1},
        "vision": {
            "sam_config": {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
            | {"global_attn_indexes": [1], "mlp_ratio": 1.0, "downsample_channels": [32, 64], "image_size": 768}
            | {"initializer_range": 0.1},
            "encoder_config": TEXT | {"vocab_size": 8},
        },
        "tokens": {"bos_token": "<｜begin▁of▁sentence｜>", "pad_token": "<｜▁pad▁｜>"}
        | {"eos_token": "<｜end▁of▁sentence｜>"},
        "starts": True,
        "end": "<｜end▁of▁sentence｜>",
        "image": {"size": {"height": 768, "width": 768}},  # the least for which the model has queries
        "template": template("", "<image>\n", "", "", first="{{ bos_token }}", ordered=True),
    },
    "kimi_k25": {
        "ids": {"image_token_id": "<|media_pad|>", "video_token_id": "<|kimi_k25_video_placeholder|>"}
        | {"vision_start_token_id": "<|media_begin|>", "vision_end_token_id": "<|media_end|>"},
        "text": {"num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
        | {"topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "kv_lora_rank": 16}
        | {"q_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
        "vision": {"pos_emb_height": 8, "pos_emb_width": 8},
        "config": {"projection_hidden_size": 32},
        "tokens": {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"},
        "special": ["<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>", "<|media_content|>"]
        + ["<think>", "</think>"],
        "end": "<|im_end|>",
        "image": {"max_patches": 64},
        "template": template(
            "<|im_ROLE|>ROLE<|im_middle|>",
            "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n",
            "<|im_end|>",
            "<|im_assistant|>assistant<|im_middle|><think>",
            last="<think></think>",
        ),
    },
}
ARCHITECTURES = tuple(TABLE)


def make_tokenizer(how):
    """That of the demo, with this model's special tokens; `starts` if it begins all texts itself."""
    special = [*how.get("special", []), *how["ids"].values(), how["end"]]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(TOKENIZER)),
        extra_special_tokens=[*dict.fromkeys(special)],
        model_max_length=32768,
        **how["tokens"],
    )
    if how.get("starts"):
        bos = tokenizer.bos_token, tokenizer.bos_token_id
        pair = f"{bos[0]}:0 $A:0 {bos[0]}:1 $B:1"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{bos[0]} $A", pair, special_tokens=[bos])
    return tokenizer


def make_config(architecture, how, tokenizer):
    """The architecture's default config, made small, with the tokenizer's numbers."""
    config_class = CONFIG_MAPPING[how.get("model", architecture)]
    kinds = how.get("kinds", {"vision": None})
    whole = config_class(**{f"{part}_config": {"model_type": kind} if kind else {} for part, kind in kinds.items()})
    size = len(tokenizer) + -len(tokenizer) % 64
    numbers = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    numbers |= {"eos_token_id": tokenizer.eos_token_id, "vocab_size": size, "vocab_size_per_layer_input": size}
    parts = {}
    for part, small in (("text", TEXT | numbers), ("vision", VISION)):
        part_class = type(getattr(whole, f"{part}_config"))
        known = {field.name for field in dataclasses.fields(part_class)}
        small = {name: value for name, value in small.items() if name in known} | how.get(part, {})
        parts[f"{part}_config"] = part_class(**small).to_dict()
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in how["ids"].items()}
    return config_class(**parts, **ids, **how.get("config", {}), pad_token_id=tokenizer.pad_token_id)


def make_processor(architecture, how, tokenizer):
    """The architecture's own processor, for small images."""
    config_class = CONFIG_MAPPING[how.get("processors", how.get("model", architecture))]
    processor_class = PROCESSOR_MAPPING[config_class]
    parts = {"tokenizer": tokenizer, "image_processor": IMAGE_PROCESSOR_MAPPING[config_class]["torchvision"]}
    parts["image_processor"] = parts["image_processor"](**how["image"])
    others = {"video_processor": VIDEO_PROCESSOR_MAPPING, "feature_extractor": FEATURE_EXTRACTOR_MAPPING}
    for name in {*others} & {*processor_class.get_attributes()}:
        parts[name] = others[name][config_class]()
    return processor_class(**parts, **how.get("processor", {}), chat_template=how["template"])


def make(architecture, folder, seed=0):
    """Saves a tiny random model of `architecture`, one of ARCHITECTURES, with its processor, to `folder`."""
    how = copy.deepcopy(TABLE[architecture])
    tokenizer = make_tokenizer(how)
    make_processor(architecture, how, tokenizer).save_pretrained(folder)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(make_config(architecture, how, tokenizer))
    for weights in model.parameters():
        if not weights.any():  # biases, but also gates and projections, which would let no image through
            torch.nn.init.normal_(weights, std=0.1)
    ends = [*dict.fromkeys([tokenizer.convert_tokens_to_ids(how["end"]), tokenizer.eos_token_id])]
    how = {"eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    model.generation_config = GenerationConfig(**how)
    model.save_pretrained(folder)
    return folder
