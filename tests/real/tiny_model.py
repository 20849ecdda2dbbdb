"""Makes a tiny random Llama that a real vLLM can serve, with a tokenizer and a chat template of its own.

Run by the vLLM environment's interpreter, which has torch and transformers: `python tiny_model.py FOLDER SEED LAYERS HIDDEN`.
`ensure_model` does that once a seed and keeps the result in the cache folder; it needs the standard library only.

What the model is made for:

- *It never stops early*: there is no end-of-sequence token, neither in the model's configuration nor in the tokenizer, so
  every answer runs to `max_tokens` (or to the context's end) and finishes with "length". Requests need no `ignore_eos`.
- *Its text can be told apart*: the weights are large enough for attention to matter, so the answer at temperature 0
  depends on the whole prompt and on the seed, and a gateway that mixes up two answers is found out.
- *It is not too fast*: a step takes a few milliseconds. With 2 layers it took 1, and on a busy machine vLLM's API server
  fell behind its engine: all chunks of a stream came at its end, when it was too late to do something in its middle.
- *Every token is text*: tokens that are no whole characters are never chosen at temperature 0, so each streamed chunk has
  a non-empty text. Some tokens are not ASCII, so that chunks with multi-byte characters occur.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["ModelBuildError", "ensure_model"]

_VOCABULARY = 512
_CONTEXT = 1024
_LAYERS = 12
_HIDDEN = 256
_SENTENCE = (
    "the quick brown fox jumps over the lazy dog while seven sleeping models share one warm graphics card, and the "
    "gateway wakes whichever of them a client asks for; nobody else notices. été café naïve größe über façade smørrebrød "
    "señor mañana привет мир спасибо 日本語 東京 眠る 起きる 모델 가속기 → ≤ ≥ ✓ 🦙 🚀"
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class ModelBuildError(RuntimeError):
    """The tiny model could not be made. The message quotes the end of the maker's output."""


def ensure_model(interpreter: Path, models: Path, seed: int, *, layers: int = _LAYERS, hidden: int = _HIDDEN) -> Path:
    """The folder, under `models`, of the tiny model of this seed; made by `interpreter` first if it is missing.

    More `layers` and a larger `hidden` size make a slower one.

    The folder's name holds a hash of this file, so a changed recipe makes new models. Safe to call from several
    processes at once: each makes its own copy and the first to finish is kept.

    Raises:
        ModelBuildError: the maker failed.
    """
    script = Path(__file__)
    recipe = hashlib.sha256(script.read_bytes()).hexdigest()[:12]
    folder = models / f"tiny-llama-{recipe}-{layers}x{hidden}-seed{seed}"
    if folder.exists():
        return folder
    models.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    result = subprocess.run(
        # Isolated, so that the modules beside this file do not shadow others of their names.
        [str(interpreter), "-I", str(script), str(unfinished), str(seed), str(layers), str(hidden)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if result.returncode:
        shutil.rmtree(unfinished, ignore_errors=True)
        output = result.stdout.decode(errors="replace")
        raise ModelBuildError(f"could not make the tiny model of seed {seed}. The end of the output:\n{output[-4000:]}")
    try:
        unfinished.rename(folder)
    except OSError:
        # Another process was quicker; its copy is as good.
        shutil.rmtree(unfinished, ignore_errors=True)
        if not folder.exists():
            raise
    return folder


def make_model(folder: Path, seed: int, layers: int, hidden: int) -> None:
    """Write the model and its tokenizer to `folder`. Needs torch, transformers and tokenizers."""
    # By name and not at the top: the test suite's own environment imports this file and has none of these.
    torch = importlib.import_module("torch")
    tokenizers = importlib.import_module("tokenizers")
    transformers = importlib.import_module("transformers")

    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<pad>", "<s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_SENTENCE] * 20, trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", chat_template=_CHAT_TEMPLATE
    ).save_pretrained(folder)

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        # Heads of 64: vLLM's CPU kernels crash with heads of 16.
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=_CONTEXT,
        # Some six times transformers' default: with that, the last token alone decides the next one.
        initializer_range=0.12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        tie_word_embeddings=False,
        dtype="float32",
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for token in range(_VOCABULARY):
            # The first two are <pad> and <s>; ids past the tokenizer's vocabulary decode to an empty text.
            text = tokenizer.decode([token]) if token > 1 else ""
            if not text.strip() or "\ufffd" in text or not text.isprintable():
                # A logit of 0 is never the largest of hundreds of random ones.
                model.lm_head.weight[token] = 0.0
    model.save_pretrained(folder, safe_serialization=True)


def main() -> int:
    """Make a model: `tiny_model.py FOLDER SEED LAYERS HIDDEN`."""
    folder, *numbers = sys.argv[1:]
    make_model(Path(folder), *map(int, numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
