"""Wears pages on the device that trains: bent, turned, thicker or thinner, blurred, gray, unevenly lit, grainy."""

import torch
import torch.nn.functional as F


def worn(images, share, hard):
    """Gray images (B, height, width), 0 to 255, a `share` of them worn; `hard`, 0 to 1, is how much at most."""
    size, height, width = images.shape
    device = images.device

    def uniform(low, high):
        return torch.empty(size, 1, 1, device=device).uniform_(low, high)

    ink = 1 - images[:, None] / 255
    much = hard * torch.rand(size, 1, 1, device=device)  # how much each page is worn
    # Turned, slanted, stretched and moved...
    angle, slant = uniform(-0.05, 0.05) * much, uniform(-0.3, 0.3) * much
    wide, high = 1 + uniform(-0.08, 0.12) * much, 1 + uniform(-0.08, 0.12) * much
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    y, x = (y - (height - 1) / 2)[None], (x - (width - 1) / 2)[None]
    from_x = wide * x + slant * y + angle * y + uniform(-2, 2) * much
    from_y = high * y - angle * x * min(1.0, 4 * height / width) + uniform(-2, 2) * much
    # ... and as if by hand: neighbouring letters move differently.
    waves = torch.randn(size, 2, max(height // 12, 2), max(width // 12, 2), device=device)
    waves = F.interpolate(waves, (height, width), mode="bicubic", align_corners=False) * (1.2 * much[:, None])
    from_x, from_y = from_x + waves[:, 0], from_y + waves[:, 1]
    grid = torch.stack([from_x / ((width - 1) / 2), from_y / ((height - 1) / 2)], -1)
    bent = F.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    # A thicker or a thinner pen, out of focus.
    thick = uniform(-0.4, 0.7)[..., None] * much[..., None]
    thicker, thinner = F.max_pool2d(bent, 3, 1, 1), -F.max_pool2d(-bent, 3, 1, 1)
    bent = torch.where(thick > 0, bent.lerp(thicker, thick.clamp(min=0)), bent.lerp(thinner, (-thick).clamp(min=0)))
    bent = bent.lerp(F.avg_pool2d(bent, 3, 1, 1, count_include_pad=False), uniform(0, 0.8)[..., None] * much[..., None])
    # Gray ink on gray paper, a shadow across, grain.
    paper, pen = 1 - uniform(0, 0.3) * much, uniform(0, 0.4) * much
    shade = 1 + uniform(-0.2, 0.2) * much * x / width + uniform(-0.1, 0.1) * much * y / height
    page = (paper + (pen - paper) * bent[:, 0]) * shade
    page = page + torch.randn_like(page) * uniform(0, 0.06) * much
    page = (page * 255).round().clamp(0, 255)
    return torch.where(torch.rand(size, 1, 1, device=device) < share, page, images)
