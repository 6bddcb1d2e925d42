"""CLIP's text tower and its tokenizer, in open_clip's names; open_clip itself, which takes seconds to import, is not.

The tower is causal and its feature is the token at the end of the text, as in every CLIP of OpenAI's form; other towers
are open_clip's. The tokenizer is open_clip's own.
"""

from __future__ import annotations

import copyreg
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Tokenizer = Callable[[list[str]], Tensor]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """A residual attention block; x [n, length, width], mask [length, length] added to the scores."""

    def __init__(self, width: int, heads: int, hidden: int, activation: type[nn.Module]):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, hidden))
        self.mlp.add_module("gelu", activation())
        self.mlp.add_module("c_proj", nn.Linear(hidden, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask.to(y.dtype))[0]
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Transformer(nn.Module):
    """The blocks."""

    def __init__(self, width: int, heads: int, layers: int, hidden: int, activation: type[nn.Module]):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, hidden, activation) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class ClipTextTower(nn.Module):
    """Token ids [n, length] -> features [n, D].

    What lies behind the longest text is not computed: in a causal tower it reaches no feature.
    """

    def __init__(
        self,
        *,
        context_length: int,
        vocab_size: int,
        width: int,
        heads: int,
        layers: int,
        hidden: int,
        output_dim: int,
        activation: type[nn.Module] = QuickGELU,
    ):
        super().__init__()
        self.context_length, self.heads = context_length, heads
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.transformer = Transformer(width, heads, layers, hidden, activation)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, output_dim))
        self.attn_mask: Tensor
        self.register_buffer("attn_mask", self.build_causal_mask(), persistent=False)

    def build_causal_mask(self) -> Tensor:
        """What `attn_mask` holds: -inf above the diagonal. No state dict has it."""
        return torch.full((self.context_length, self.context_length), -torch.inf).triu_(1)

    def end_tokens(self, tokens: Tensor) -> Tensor:
        """The token at the end of each text after the last norm, before its projection: [n, width]."""
        ends = tokens.argmax(1)  # the end of text is the largest id
        length = int(ends.max()) + 1
        dtype = self.text_projection.dtype
        x = self.token_embedding(tokens[:, :length]).to(dtype) + self.positional_embedding[:length].to(dtype)
        x = self.ln_final(self.transformer(x, self.attn_mask[:length, :length]))
        out: Tensor = x[torch.arange(len(x), device=x.device), ends]
        return out

    def forward(self, tokens: Tensor) -> Tensor:
        return self.end_tokens(tokens) @ self.text_projection


def clip_tokenizer(context_length: int = 77) -> Tokenizer:
    """open_clip's tokenizer of CLIP. Where open_clip is not imported, the file of its tokenizers alone is."""
    made: Tokenizer = _tokenizers().SimpleTokenizer(context_length=context_length)
    return made


def is_clip_tokenizer(tokenizer: Tokenizer) -> bool:
    """Whether it is CLIP's own, whose `encode` shows a sentence's length before it is cut."""
    return type(tokenizer).__name__ == "SimpleTokenizer" and hasattr(tokenizer, "encode")


def _reduced(tokenizer: Any) -> tuple[Any, tuple[int]]:
    """How a tokenizer of the file alone is pickled: it is made again."""
    return clip_tokenizer, (tokenizer.context_length,)


_alone: Any = None


def _tokenizers() -> Any:
    global _alone
    if "open_clip" in sys.modules:
        return sys.modules["open_clip"]
    if _alone is None:
        package = importlib.util.find_spec("open_clip")
        folder = next(iter(package.submodule_search_locations or ()), "") if package is not None else ""
        spec = importlib.util.spec_from_file_location("zs3fast_open_clip_tokenizer", Path(folder) / "tokenizer.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (ImportError, OSError):  # a version whose tokenizers are laid out otherwise
            import open_clip as module  # type: ignore[no-redef]  # in place of the file alone
        else:  # its functions are of a module that no other process could import by name
            copyreg.pickle(module.SimpleTokenizer, _reduced)
        _alone = module
    return _alone
