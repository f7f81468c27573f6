"""DiT written down plainly in float64 from its parameters: one image at a time, no fused operators, no masks.

It knows dense blocks, conditional routing alone and ProMoE by token choice, all options of blocks, and text. Parameters
are a mapping of names to tensors, in which autograd finds the gradients. Images of a batch are computed separately;
text tokens that are masked out are left out.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megapromoe.config.model_options import ModelConfig

Parameters = Mapping[str, Tensor]


def plain_dit(
    p: Parameters,
    config: ModelConfig,
    x_BCHW: Tensor,
    t_B: Tensor,
    conditions: list,
    num_conditional: int,
) -> Tensor:
    """The raw prediction (B, c, H, W).

    Args:
        p: name -> parameter, float64.
        config: of the model.
        x_BCHW: images, float64.
        t_B: model times.
        conditions: of each image, its label, or its text: features (N, D_text) and which of them are valid (N,).
        num_conditional: how many images are not null.
    """
    images = []
    for b, x_CHW in enumerate(x_BCHW):
        images.append(_image(p, config, x_CHW, float(t_B[b]), conditions[b], b < num_conditional))
    return torch.stack(images)


def _image(p: Parameters, m: ModelConfig, x_CHW: Tensor, t: float, condition, conditional: bool) -> Tensor:
    size, side = m.patch_size, m.input_size // m.patch_size
    patches, places = [], []
    for row in range(side):
        for column in range(side):
            patches.append(x_CHW[:, row * size : (row + 1) * size, column * size : (column + 1) * size].flatten())
            places.append((row, column))
    x_SD = torch.stack(patches) @ p["x_embedder.proj.weight"].flatten(1).T + p["x_embedder.proj.bias"]
    if m.positions == "sincos":
        x_SD = x_SD + torch.stack([_sincos(column, m.hidden_size // 2, row) for row, column in places])
    angles = torch.stack([_image_angle(row, column, m.head_dim) for row, column in places])
    c_D, text_ND = _time(p, t), x_SD[:0]
    if isinstance(condition, int):
        c_D = c_D + p["y_embedder.embedding_table.weight"][condition]
    else:
        c_text_D, text_ND, text_angles = _text(p, m, *condition, conditional)
        c_D = c_D + c_text_D
        angles = torch.cat([text_angles, angles])
    for block in range(m.depth):
        text_ND, x_SD = _block(p, m, block, text_ND, x_SD, c_D, angles, conditional)
    shift, scale = _linear(p, "final_layer.adaLN_modulation.1", _silu(c_D)).chunk(2)
    x_SP = _linear(p, "final_layer.linear", _norm(m.norm, x_SD, 1e-6) * (1 + scale) + shift)
    out = torch.zeros(m.out_channels, m.input_size, m.input_size, dtype=torch.float64)
    for (row, column), patch in zip(places, x_SP, strict=True):
        pixels = patch.view(size, size, m.out_channels).permute(2, 0, 1)
        out[:, row * size : (row + 1) * size, column * size : (column + 1) * size] = pixels
    return out


def _block(p, m, block, text_ND, x_SD, c_D, angles, conditional) -> tuple[Tensor, Tensor]:
    name, N = f"blocks.{block}", len(text_ND)
    if m.modulation == "shared":
        modulation = _linear(p, "adaLN_modulation.1", _silu(c_D)) + p[f"{name}.modulation_table.weight"]
    else:
        modulation = _linear(p, f"{name}.adaLN_modulation.1", _silu(c_D))
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6)
    z_ND = torch.cat([text_ND, x_SD])
    z_ND = z_ND + gate1 * _attention(p, m, f"{name}.attn", _norm(m.norm, z_ND, 1e-6) * (1 + scale1) + shift1, angles)
    normalised_ND = _norm(m.norm, z_ND, m.mlp_norm_eps)
    h_ND = normalised_ND * (1 + scale2) + shift2
    text_ND, x_SD = z_ND[:N], z_ND[N:]
    if f"{name}.text_mlp.fc1.weight" in p:
        text_ND = text_ND + gate2 * _mlp(p, m, f"{name}.text_mlp", h_ND[:N])
    if block in m.moe_blocks:
        scored_ND = normalised_ND if m.router_input == "unmodulated" else h_ND
        return text_ND, x_SD + gate2 * _moe(p, m, f"{name}.mlp", h_ND[N:], scored_ND[N:], conditional)
    if block in m.conditional_blocks:
        which = "conditional" if conditional else "unconditional"
        y_SD = _summed(p, m, f"{name}.mlp.shared", m.shared_experts, h_ND[N:])
        y_SD = y_SD + _summed(p, m, f"{name}.mlp.{which}", 1 if conditional else m.unconditional_experts, h_ND[N:])
        return text_ND, x_SD + gate2 * y_SD
    return text_ND, x_SD + gate2 * _mlp(p, m, f"{name}.mlp", h_ND[N:])


def _summed(p, m: ModelConfig, name: str, count: int, x_SD: Tensor) -> Tensor:
    """The sum of `count` MLPs of the same tokens."""
    out = torch.zeros_like(x_SD)
    for number in range(count):
        out = out + _mlp(p, m, f"{name}.{number}" if count > 1 else name, x_SD)
    return out


def _attention(p, m: ModelConfig, name: str, x_SD: Tensor, angles: Tensor) -> Tensor:
    queries, keys, values = _linear(p, f"{name}.qkv", x_SD).chunk(3, dim=1)
    outputs = []
    for head in range(m.heads):
        channels = slice(head * m.head_dim, (head + 1) * m.head_dim)
        q, k, v = queries[:, channels], keys[:, channels], values[:, channels]
        if m.qk_norm != "none":
            q, k = _norm(m.qk_norm, q, _QK_EPS[m.qk_norm]), _norm(m.qk_norm, k, _QK_EPS[m.qk_norm])
            q, k = q * p[f"{name}.q_norm.weight"], k * p[f"{name}.k_norm.weight"]
        if m.qk_norm == "layer":
            q, k = q + p[f"{name}.q_norm.bias"], k + p[f"{name}.k_norm.bias"]
        if m.positions == "rope":
            q, k = _rotated(q, angles), _rotated(k, angles)
        scores = (q @ k.T / math.sqrt(m.head_dim)).exp()
        outputs.append(scores / scores.sum(1, keepdim=True) @ v)
    return _linear(p, f"{name}.proj", torch.cat(outputs, dim=1))


_QK_EPS = {"layer": 1e-5, "rms": 1e-6}


def _moe(p, m: ModelConfig, name: str, x_SD: Tensor, scored_SD: Tensor, conditional: bool) -> Tensor:
    out = _summed(p, m, f"{name}.shared", m.shared_experts, x_SD)
    if m.unconditional_experts and not conditional:
        return out + _summed(p, m, f"{name}.unconditional", m.unconditional_experts, x_SD)
    prototypes = p[f"{name}.router.prototypes"]
    rows = []
    for s, token in enumerate(x_SD):
        cosine_E = prototypes @ scored_SD[s] / (prototypes.norm(dim=1) * scored_SD[s].norm())
        weight_E = {"identity": cosine_E, "sigmoid": cosine_E.sigmoid(), "softmax": cosine_E.softmax(0)}
        y = out[s]
        for e in cosine_E.argsort(descending=True)[: m.top_k].tolist():
            names = {f"{k}.{w}": p[f"{name}.experts.{k}.{w}"][e] for k in ("fc1", "fc2") for w in ("weight", "bias")}
            y = y + weight_E[m.score_function][e] * _mlp({f"e.{n}": v for n, v in names.items()}, m, "e", token)
        rows.append(y)
    return torch.stack(rows)


def _mlp(p, m: ModelConfig, name: str, x: Tensor) -> Tensor:
    h = _linear(p, f"{name}.fc1", x)
    if m.activation == "swiglu":
        gate, up = h.chunk(2, dim=-1)
        h = _silu(gate) * up
    else:
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return _linear(p, f"{name}.fc2", h)


def _linear(p, name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def _silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def _norm(kind: str, x: Tensor, eps: float) -> Tensor:
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x / ((x * x).mean(-1, keepdim=True) + eps).sqrt()


def _time(p, t: float) -> Tensor:
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    features = torch.cat([(t * frequencies).cos(), (t * frequencies).sin()])
    return _linear(p, "t_embedder.mlp.2", _silu(_linear(p, "t_embedder.mlp.0", features)))


def _frequencies(count: int) -> Tensor:
    return torch.tensor([10000.0 ** (-i / count) for i in range(count)], dtype=torch.float64)


def _sincos(column: int, width: int, row: int | None = None) -> Tensor:
    """Of a place in a sequence, (width,); with a row, of a place in an image, (2·width,)."""
    angle = column * _frequencies(width // 2)
    first = torch.cat([angle.sin(), angle.cos()])
    return first if row is None else torch.cat([first, _sincos(row, width)])


def _image_angle(row: int, column: int, head_width: int) -> Tensor:
    frequencies = _frequencies(head_width // 4)
    return torch.cat([column * frequencies, row * frequencies])


def _rotated(x_Sd: Tensor, angle_S: Tensor) -> Tensor:
    """Each pair of channels as a complex number, times a number on the unit circle."""
    real, imaginary = x_Sd.chunk(2, dim=1)
    turned = torch.complex(real, imaginary) * torch.exp(1j * angle_S)
    return torch.cat([turned.real, turned.imag], dim=1)


def _text(p, m: ModelConfig, features_ND: Tensor, mask_N: Tensor, conditional: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A text's part of the condition (D,), its tokens and their angles; those that are masked out are left out."""
    kept = [n for n in range(len(features_ND)) if conditional and mask_N[n]]
    h_ND = _linear(p, "text_embedder.mlp.0", _norm(m.norm, features_ND[kept], 1e-6))
    h_ND = 0.5 * h_ND * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h_ND + 0.044715 * h_ND**3)))
    text_ND = _linear(p, "text_embedder.mlp.2", h_ND)
    c_D = text_ND.mean(0) if kept else p["text_embedder.null"]
    angles = torch.stack([n * _frequencies(m.head_dim // 2) for n in kept]) if kept else torch.empty(0, m.head_dim // 2)
    if m.positions == "sincos" and kept:
        text_ND = text_ND + torch.stack([_sincos(n, m.hidden_size) for n in kept])
    return c_D, text_ND, angles.double()
