"""The loss of a Qwen2-VL over gray images of one size: what `model(**inputs).loss` computes, many times faster.

The library takes its vision attention image by image and pads and masks the text. Here all images of a batch have one
size, so all samples have the same positions, none is masked, and a layer is one function of tensors that compiles.
"""

import functools
import math

import torch
import torch.nn.functional as F


def resized_to(height, width, shape):
    """The size that the processor gives an image: its own rule, without importing it in every process."""
    factor = 2 * shape.patch_size
    sides = [round(side / factor) * factor for side in (height, width)]
    if math.prod(sides) > shape.max_pixels:
        scale = math.sqrt(height * width / shape.max_pixels)
        sides = [max(factor, math.floor(side / scale / factor) * factor) for side in (height, width)]
    elif math.prod(sides) < shape.min_pixels:
        scale = math.sqrt(shape.min_pixels / (height * width))
        sides = [math.ceil(side * scale / factor) * factor for side in (height, width)]
    return tuple(sides)


def resize(images, size):
    """Gray images (B, height, width) of 0 to 255 at another size, as the processor resizes: widths first, in bytes."""
    for new in ((images.shape[1], size[1]), tuple(size)):
        if tuple(images.shape[1:]) != new:
            images = F.interpolate(images[:, None], new, mode="bicubic", antialias=True, align_corners=False)[:, 0]
            images = images.round().clamp(0, 255)
    return images


def to_patches(images, patch):
    """(B, height, width) to (B, patches, patch * patch), those of one image token side by side."""
    size, height, width = images.shape
    rows, columns = height // patch // 2, width // patch // 2
    blocks = images.view(size, rows, 2, patch, columns, 2, patch).permute(0, 1, 4, 2, 5, 3, 6)
    return blocks.reshape(size, rows * columns * 4, patch * patch)


def rotated(x, cos, sin):
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def vision_layer(x, cos, sin, dtype, heads, weights):
    """A block of the vision tower; x (B, N, D) in float32, the products in `dtype`."""
    norm1, bias1, norm2, bias2, qkv, qkv_bias, out, out_bias, up, up_bias, down, down_bias = weights
    size, length, width = x.shape
    y = F.layer_norm(x, (width,), norm1, bias1, 1e-6).to(dtype)
    q, k, v = F.linear(y, qkv.to(dtype), qkv_bias.to(dtype)).view(size, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k = (rotated(part.float(), cos, sin).to(dtype) for part in (q, k))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(size, length, width)
    x = x + F.linear(y, out.to(dtype), out_bias.to(dtype))
    y = F.layer_norm(x, (width,), norm2, bias2, 1e-6).to(dtype)
    y = F.linear(y, up.to(dtype), up_bias.to(dtype))
    y = y * torch.sigmoid(1.702 * y)
    return x + F.linear(y, down.to(dtype), down_bias.to(dtype))


def rms_norm(x, weight):
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def text_layer(x, cos, sin, dtype, heads, weights):
    """A layer of the language model; no mask but the causal one, since padding is on the right."""
    norm1, norm2, q, q_bias, k, k_bias, v, v_bias, out, gate, up, down = weights
    size, length, width = x.shape
    y = rms_norm(x, norm1).to(dtype)
    q, k, v = (
        F.linear(y, weight.to(dtype), bias.to(dtype)).view(size, length, -1, width // heads).transpose(1, 2)
        for weight, bias in ((q, q_bias), (k, k_bias), (v, v_bias))
    )
    q, k = (rotated(part.float(), cos, sin).to(dtype) for part in (q, k))
    repeats = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(repeats, 1) for part in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(size, length, width)
    x = x + F.linear(y, out.to(dtype))
    y = rms_norm(x, norm2).to(dtype)
    return x + F.linear(F.silu(F.linear(y, gate.to(dtype))) * F.linear(y, up.to(dtype)), down.to(dtype))


class Forward:
    """The forward pass of `model` for batches of gray images of one size, its layers compiled if that works here."""

    def __init__(self, model, processor, instruction, dtype, compiled):
        self.model, self.dtype = model, dtype
        self.patch, self.heads = model.config.vision_config.patch_size, model.config.vision_config.num_heads
        self.text_heads = model.config.text_config.num_attention_heads
        self.mean, self.deviation = processor.image_processor.image_mean, processor.image_processor.image_std
        content = [{"type": "text", "text": instruction}, {"type": "image"}]
        chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        before, after = chat.split("<|image_pad|>")
        device = model.device
        self.before = torch.tensor(processor.tokenizer.encode(before), device=device)
        self.after = torch.tensor(processor.tokenizer.encode(after), device=device)
        self.compiled = compiled
        self.vision_layer, self.text_layer = vision_layer, text_layer
        if compiled:
            self.vision_layer = torch.compile(vision_layer)
            self.text_layer = torch.compile(text_layer)
        visual, text = model.model.visual, model.model.language_model
        self.vision_weights = [
            [
                *(block.norm1.weight, block.norm1.bias, block.norm2.weight, block.norm2.bias),
                *(block.attn.qkv.weight, block.attn.qkv.bias, block.attn.proj.weight, block.attn.proj.bias),
                *(block.mlp.fc1.weight, block.mlp.fc1.bias, block.mlp.fc2.weight, block.mlp.fc2.bias),
            ]
            for block in visual.blocks
        ]
        self.text_weights = [
            [
                *(layer.input_layernorm.weight, layer.post_attention_layernorm.weight),
                *(layer.self_attn.q_proj.weight, layer.self_attn.q_proj.bias),
                *(layer.self_attn.k_proj.weight, layer.self_attn.k_proj.bias),
                *(layer.self_attn.v_proj.weight, layer.self_attn.v_proj.bias, layer.self_attn.o_proj.weight),
                *(layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight),
            ]
            for layer in text.layers
        ]

    def uncompiled(self):
        self.compiled, self.vision_layer, self.text_layer = False, vision_layer, text_layer

    def flexible(self, x, cos, sin):
        """Says before compiling that these sizes change from batch to batch."""
        if self.compiled:
            for tensor, dims in ((x, (0, 1)), (cos, (0,)), (sin, (0,))):
                for dim in dims:
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)

    @functools.lru_cache(maxsize=4096)  # noqa: B019 (as long as the training)
    def vision_places(self, rows, columns):
        """cos and sin (N, D) of an image's patches, in the order of `to_patches`."""
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        places = [p.view(rows // 2, 2, columns // 2, 2).transpose(1, 2).reshape(-1) for p in (row, column)]
        visual = self.model.model.visual
        one = torch.zeros(1, device=self.model.device)
        cos, sin = visual.rotary_pos_emb(one, torch.stack(places, -1).to(self.model.device))
        return cos.float(), sin.float()

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def text_places(self, rows, columns, length):
        """cos and sin (T, D): the prompt counts on, the image is one moment with rows and columns, text counts on."""
        start = len(self.before)
        row, column = (p.reshape(-1) for p in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
        image = start + torch.stack([row * 0, row, column])
        rest = start + max(rows, columns) + torch.arange(length - start - rows * columns)
        places = torch.cat([torch.arange(start).expand(3, -1), image, rest.expand(3, -1)], 1)
        one = torch.zeros(1, device=self.model.device)
        cos, sin = self.model.model.language_model.rotary_emb(one, places[:, None].to(self.model.device))
        return cos[0].float(), sin[0].float()

    def see(self, images):
        """Image tokens (B, N, D) of gray images (B, height, width), 0 to 255."""
        visual, dtype = self.model.model.visual, self.dtype
        rows, columns = images.shape[1] // self.patch, images.shape[2] // self.patch
        # A gray image has one colour thrice and a still image two equal frames: the sum of the kernels does the same.
        kernel = visual.patch_embed.proj.weight
        mean, deviation = (kernel.new_tensor(value)[:, None, None] for value in (self.mean, self.deviation))
        kernel = kernel.sum(2)
        bias = (-kernel * mean / deviation).sum((1, 2, 3))
        kernel = (kernel / deviation).sum(1).flatten(1)
        # Ink is small next to what a white page adds up to, so this product stays in float32.
        x = F.linear(to_patches(images / 255, self.patch), kernel, bias)
        cos, sin = self.vision_places(rows, columns)
        self.flexible(x, cos, sin)
        for weights in self.vision_weights:
            x = self.vision_layer(x, cos, sin, dtype, self.heads, weights)
        merger = visual.merger
        x = F.layer_norm(x, (x.shape[-1],), merger.ln_q.weight, merger.ln_q.bias, 1e-6).to(dtype)
        x = x.view(len(images), rows * columns // 4, -1)
        x = F.gelu(F.linear(x, merger.mlp[0].weight.to(dtype), merger.mlp[0].bias.to(dtype)))
        return F.linear(x, merger.mlp[2].weight.to(dtype), merger.mlp[2].bias.to(dtype)).float()

    def __call__(self, images, answers, lengths, spotter=None):
        """Mean loss over the tokens of `answers` (B, L; padded after `lengths` tokens), and the spotter's loss.

        The spotter, a linear layer, has to name from the image tokens which tokens are in the answer, in any order.
        """
        text, dtype = self.model.model.language_model, self.dtype
        seen = self.see(images)
        size, length = answers.shape
        embed = text.embed_tokens.weight
        x = torch.cat(
            [
                F.embedding(self.before, embed).expand(size, -1, -1),
                seen,
                F.embedding(self.after, embed).expand(size, -1, -1),
                F.embedding(answers[:, :-1], embed),
            ],
            1,
        )
        rows, columns = images.shape[1] // self.patch // 2, images.shape[2] // self.patch // 2
        cos, sin = self.text_places(rows, columns, x.shape[1])
        self.flexible(x, cos, sin)
        for weights in self.text_weights:
            x = self.text_layer(x, cos, sin, dtype, self.text_heads, weights)
        x = rms_norm(x[:, -length:], text.norm.weight).to(dtype)
        logits = F.linear(x, embed.to(dtype)).float()
        real = torch.arange(length, device=answers.device) < lengths[:, None]
        loss = F.cross_entropy(logits.flatten(0, 1), answers.masked_fill(~real, -100).flatten())
        if spotter is None:
            return loss, loss.detach() * 0
        named = F.linear(seen.to(dtype), spotter.weight.to(dtype)).amax(1).float() + spotter.bias
        present = torch.zeros_like(named)
        present.scatter_(1, answers.masked_fill(~real, self.model.config.text_config.eos_token_id), 1)
        present[:, self.model.config.text_config.eos_token_id] = 0
        return loss, F.binary_cross_entropy_with_logits(named, present, reduction="sum") / present.sum()
