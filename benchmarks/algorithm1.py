"""The paper's Algorithm 1 in PyTorch: index_select, narrow matrix products and index_add, with a key/value cache.

The baseline of cpu_decode.py, prefill.py and gpu.py, for LLaMA checkpoints, on any device. Tested against
`dispc.reference.masked`.
Shapes in suffixes: B batch, S new tokens, T tokens in all, H heads, K key/value heads, D head size,
R read, M mid and W write widths, C width of the stream, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from dispc.masks import Block, Indices, Masks, NormScope, SubLayer
from dispc.model.checkpoint import Checkpoint

Weights = Callable[[str, Indices | None, Indices | None], Tensor]
"""weights(name, rows, columns): a slice of a checkpoint's matrix; None takes all."""


class Algorithm1(nn.Module):
    """A pruned LLaMA. Full sets need no index; a sub-layer with an empty set is left out.

    Raises:
        ValueError: for other families, and for biases.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, checkpoint: Checkpoint, masks: Masks, dtype: torch.dtype, device: str, *, last_logits: bool = False
    ) -> None:
        super().__init__()
        self.last_logits = last_logits
        config, raw = checkpoint.config, checkpoint.raw_config
        if config.family.model_type != "llama" or raw.get("attention_bias") or raw.get("mlp_bias"):
            raise ValueError(f"{checkpoint.directory}: Algorithm 1 is written for LLaMA models without biases")
        self.config, self.dtype, self.device = config, dtype, device

        def weights(name: str, rows: Indices | None = None, columns: Indices | None = None) -> Tensor:
            tensor = checkpoint.find(name).read()
            if rows is not None and len(rows) < len(tensor):
                tensor = tensor[torch.from_numpy(rows)]
            if columns is not None and len(columns) < tensor.shape[-1]:
                tensor = tensor[..., torch.from_numpy(columns)]
            return tensor.to(device, dtype)

        self.epsilon = checkpoint.pretrained_config.rms_norm_eps
        self.embedding = _fixed(weights("model.embed_tokens.weight"))
        self.norm = _fixed(weights("model.norm.weight"))
        self.head = self.embedding if config.tied else _fixed(weights("lm_head.weight"))
        self.parts = nn.ModuleList()
        for number, block in enumerate(masks.blocks):
            self.parts.extend(_block(block, f"model.layers.{number}", weights, masks.norm_scope, self))
        positions = torch.arange(config.max_positions, device=device)[None]
        rotary = LlamaRotaryEmbedding(config=checkpoint.pretrained_config).to(device)
        cos, sin = rotary(torch.zeros(1, dtype=dtype, device=device), positions)
        self.register_buffer("cos", cos[0])
        self.register_buffer("sin", sin[0])

    def forward(self, ids: Tensor, positions: Tensor, total: int) -> Tensor:
        """Logits [B,S,V] of the tokens [B,S] at `positions` [S]; `total` - S tokens are in the caches.

        With `last_logits` those of the last token only, [B,1,V].

        Either S = 1 or S = `total`. `allocate` comes first.
        """
        x_BSC = F.embedding(ids, self.embedding)
        turn = self.cos[positions][None], self.sin[positions][None]
        for part in self.parts:
            x_BSC = part(x_BSC, turn, positions, total)
        if self.last_logits:
            x_BSC = x_BSC[:, -1:]
        return F.linear(F.rms_norm(x_BSC, self.norm.shape, self.norm, self.epsilon), self.head)

    def allocate(self, batch: int, capacity: int) -> None:
        """New caches of `capacity` tokens, with random contents."""
        shape = (batch, self.config.num_key_value_heads, capacity, self.config.head_dim)
        for part in self.modules():
            if isinstance(part, Attention):
                part.keys = torch.randn(shape, dtype=self.dtype, device=self.device)
                part.values = torch.randn(shape, dtype=self.dtype, device=self.device)

    def bind(self, ids: npt.NDArray[np.int64], past: int, forward: Any = None) -> "TorchStep":
        """A forward pass of the tokens [B,S] with `past` tokens in the caches, which can be repeated.

        `forward` is this model itself unless a compiled one is given.
        """
        positions = torch.arange(past, past + ids.shape[1], device=self.device)
        return TorchStep(
            self if forward is None else forward, torch.from_numpy(ids).to(self.device), positions, past + ids.shape[1]
        )

    def bytes_read(self, batch: int, past: int) -> int:
        """Bytes that a decoding step reads: all weights once, an embedding row per sequence, and the caches."""
        weights = sum(parameter.nbytes for parameter in self.parameters())
        if not self.config.tied:
            weights -= self.embedding.nbytes
        attentions = sum(isinstance(part, Attention) for part in self.modules())
        cached = 2 * attentions * past * self.config.key_value_size
        return int(weights + batch * (self.config.hidden_size + cached) * self.embedding.itemsize)


class TorchStep:
    """One forward pass with all its arguments."""

    def __init__(self, forward: Any, ids: Tensor, positions: Tensor, total: int) -> None:
        self.forward, self.arguments = forward, (ids, positions, total)
        self.output: Tensor | None = None

    def run(self) -> None:
        with torch.no_grad():
            self.output = self.forward(*self.arguments)
        if self.output.is_cuda:
            torch.cuda.synchronize()

    def logits(self) -> npt.NDArray[np.float32]:
        """float32 logits [B,S,V] of the latest run."""
        assert self.output is not None
        found: npt.NDArray[np.float32] = self.output.float().cpu().numpy()
        return found


def _heads(x_BSP: Tensor, size: int) -> Tensor:
    """[B,S,H*D] -> [B,H,S,D]."""
    return x_BSP.view(*x_BSP.shape[:2], -1, size).transpose(1, 2)


class ReadWrite(nn.Module):
    """The part that both sub-layers share: norm and selection, and the addition into the stream."""

    read: Tensor | None
    write: Tensor | None

    def __init__(self, sets: SubLayer, norm: Tensor, norm_scope: NormScope, model: Algorithm1) -> None:
        super().__init__()
        width = model.config.hidden_size
        self.register_buffer("read", _indices(sets.read, width, model.device))
        self.register_buffer("write", _indices(sets.write, width, model.device))
        self.select_first, self.epsilon = norm_scope == "selected", model.epsilon
        if self.select_first:
            norm = norm[torch.from_numpy(sets.read).to(norm.device)]
        self.norm = _fixed(norm)

    def normalise(self, x_BSC: Tensor) -> Tensor:
        if self.read is None:
            return F.rms_norm(x_BSC, self.norm.shape, self.norm, self.epsilon)
        if self.select_first:
            return F.rms_norm(x_BSC.index_select(-1, self.read), self.norm.shape, self.norm, self.epsilon)
        return F.rms_norm(x_BSC, self.norm.shape, self.norm, self.epsilon).index_select(-1, self.read)

    def add(self, x_BSC: Tensor, y_BSW: Tensor) -> Tensor:
        return x_BSC.add_(y_BSW) if self.write is None else x_BSC.index_add_(-1, self.write, y_BSW)


class Attention(ReadWrite):
    keys: Tensor
    values: Tensor

    def __init__(
        self, sets: SubLayer, name: str, weights: Weights, norm: Tensor, norm_scope: NormScope, model: Algorithm1
    ) -> None:
        super().__init__(sets, norm, norm_scope, model)
        self.query, self.key, self.value = (
            _fixed(weights(f"{name}.{part}_proj.weight", None, sets.read)) for part in "qkv"
        )
        self.out = _fixed(weights(f"{name}.o_proj.weight", sets.write, None))
        self.head_dim = model.config.head_dim
        self.grouped = model.config.num_key_value_heads != model.config.num_attention_heads
        self.register_buffer("keys", None)
        self.register_buffer("values", None)

    def forward(self, x_BSC: Tensor, turn: tuple[Tensor, Tensor], positions: Tensor, total: int) -> Tensor:
        h_BSR = self.normalise(x_BSC)
        q_BHSD, k_BKSD, v_BKSD = (
            _heads(F.linear(h_BSR, weight), self.head_dim) for weight in (self.query, self.key, self.value)
        )
        q_BHSD, k_BKSD = apply_rotary_pos_emb(q_BHSD, k_BKSD, *turn)
        self.keys.index_copy_(2, positions, k_BKSD)
        self.values.index_copy_(2, positions, v_BKSD)
        k_BKTD, v_BKTD = self.keys[:, :, :total], self.values[:, :, :total]
        causal = q_BHSD.shape[2] > 1
        y_BHSD = F.scaled_dot_product_attention(q_BHSD, k_BKTD, v_BKTD, is_causal=causal, enable_gqa=self.grouped)
        return self.add(x_BSC, F.linear(y_BHSD.transpose(1, 2).flatten(2), self.out))


class Mlp(ReadWrite):
    def __init__(
        self, sets: SubLayer, name: str, weights: Weights, norm: Tensor, norm_scope: NormScope, model: Algorithm1
    ) -> None:
        super().__init__(sets, norm, norm_scope, model)
        self.gate, self.up = (
            _fixed(weights(f"{name}.{part}_proj.weight", sets.mid, sets.read)) for part in ("gate", "up")
        )
        self.down = _fixed(weights(f"{name}.down_proj.weight", sets.write, sets.mid))

    def forward(self, x_BSC: Tensor, turn: tuple[Tensor, Tensor], positions: Tensor, total: int) -> Tensor:
        h_BSR = self.normalise(x_BSC)
        h_BSM = F.silu(F.linear(h_BSR, self.gate)) * F.linear(h_BSR, self.up)
        return self.add(x_BSC, F.linear(h_BSM, self.down))


def _block(block: Block, name: str, weights: Weights, norm_scope: NormScope, model: Algorithm1) -> nn.ModuleList:
    """The living sub-layers of a block."""
    parts = nn.ModuleList()
    for kind, sets, inner, norm in (
        (Attention, block.attention, "self_attn", "input_layernorm"),
        (Mlp, block.mlp, "mlp", "post_attention_layernorm"),
    ):
        if sets.alive:
            norm_weight = weights(f"{name}.{norm}.weight", None, None)
            parts.append(kind(sets, f"{name}.{inner}", weights, norm_weight, norm_scope, model))
    return parts


def _indices(indices: Indices, width: int, device: str) -> Tensor | None:
    return None if len(indices) == width else torch.from_numpy(indices).to(device)


def _fixed(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
