"""Writes a tiny random Llama as a GGUF file that a real llama.cpp can serve.

Its vocabulary is that of a byte tokenizer: the 256 bytes, and printable ASCII as tokens of their own, so that any text can
be read. There is no end token, so an answer runs to `max_tokens`. What it says is noise that depends on the seed.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

__all__ = ["write_tiny_gguf"]

_CONTEXT = 256
_WIDTH = 32
_HEADS = 2
_LAYERS = 2
_HIDDEN = 64


def write_tiny_gguf(path: Path, seed: int) -> None:
    """Write the model of this seed to `path`: some 200 KB, made in a few milliseconds."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(path.stem)
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_HIDDEN)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    size = _add_vocabulary(writer)

    def weights(name: str, *shape: int) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * 0.3).astype(np.float32))

    def ones(name: str) -> None:
        writer.add_tensor(name, np.ones(_WIDTH, np.float32))

    weights("token_embd.weight", size, _WIDTH)
    for layer in range(_LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            weights(f"blk.{layer}.{name}.weight", _WIDTH, _WIDTH)
        for name in ("ffn_gate", "ffn_up"):
            weights(f"blk.{layer}.{name}.weight", _HIDDEN, _WIDTH)
        weights(f"blk.{layer}.ffn_down.weight", _WIDTH, _HIDDEN)
        ones(f"blk.{layer}.attn_norm.weight")
        ones(f"blk.{layer}.ffn_norm.weight")
    ones("output_norm.weight")
    weights("output.weight", size, _WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter) -> int:
    """Add the tokens and return how many there are."""
    tokens = [(b"<unk>", gguf.TokenType.UNKNOWN), (b"<s>", gguf.TokenType.CONTROL)]
    tokens += [(f"<0x{byte:02X}>".encode(), gguf.TokenType.BYTE) for byte in range(256)]
    tokens += [(chr(code).encode(), gguf.TokenType.NORMAL) for code in range(33, 127)]
    tokens += [("▁".encode(), gguf.TokenType.NORMAL)]  # SentencePiece's blank
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(True)
    return len(tokens)
