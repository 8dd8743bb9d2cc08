"""Attention in the image encoder: images of one size go through one call, not each through its own.

`models` and `reader` have a model use it. transformers calls attention for each image (in Qwen2.5-VL, each window) in
each block, unless an implementation takes all at once, as FlashAttention does. This one stands where that would, and
needs no package. What comes out is the same; on a CPU, bit for bit.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "by_size_like_flash"  # "flash" in it has the encoders pass all images in one call
ENCODERS = ("Qwen2VisionTransformerPretrainedModel", "Qwen2_5_VisionTransformerPretrainedModel", "Qwen3VLVisionModel")


class Groups:
    """Images by their sizes, from `starts`, the numbers of their first patches and, last, of all patches.

    `sizes` are [(images, patches of each), ...], `order` sorts the patches by them, and `back` undoes that; both are
    None where the patches are sorted already.
    """

    def __init__(self, starts):
        lengths = starts.cpu().diff()
        sizes, counts = lengths.unique(return_counts=True)
        self.sizes = [*zip(counts.tolist(), sizes.tolist(), strict=True)]
        self.order = self.back = None
        if (lengths.diff() < 0).any():
            patches = torch.arange(int(lengths.sum())).split(lengths.tolist())
            self.order = torch.cat([patches[image] for image in lengths.argsort(stable=True)]).to(starts.device)
            self.back = self.order.argsort()


def by_size(module, query, key, value, attention_mask, scaling, dropout, cu_seq_lens_q, **others):
    """Attention within each image. Takes (1, heads, patches, size), returns (1, patches, heads, size) and None."""
    if not hasattr(cu_seq_lens_q, "groups"):  # all blocks get the same tensor
        cu_seq_lens_q.groups = Groups(cu_seq_lens_q)
    groups = cu_seq_lens_q.groups
    parts = [part[0] if groups.order is None else part[0].index_select(1, groups.order) for part in (query, key, value)]
    pieces = zip(*(part.split([images * size for images, size in groups.sizes], dim=1) for part in parts), strict=True)
    found = []
    for (images, size), piece in zip(groups.sizes, pieces, strict=True):
        heads = (part.unflatten(1, (images, size)).transpose(0, 1) for part in piece)  # (images, heads, patches, size)
        seen = scaled_dot_product_attention(*heads, scale=scaling, dropout_p=dropout)
        found.append(seen.transpose(1, 2).flatten(0, 1))
    found = torch.cat(found)
    return (found if groups.back is None else found.index_select(0, groups.back))[None], None


def install(model):
    """Has the image encoder of a model use it, if it is one of those that were tried, and has PyTorch's attention."""
    AttentionInterface.register(NAME, by_size)
    for part in model.modules():
        if type(part).__name__ in ENCODERS and part.config._attn_implementation == "sdpa":
            part.config._attn_implementation = NAME
