"""What a command line says: which kind of server it starts, and what the gateway needs it to say."""

from __future__ import annotations

import re
import shlex
from pathlib import PurePosixPath
from typing import Literal, TypeAlias

from .errors import ConfigImportError

__all__ = ["Command", "Kind", "split_command", "without_comments"]

Kind: TypeAlias = Literal["vllm", "sglang", "llama.cpp", "ollama", "other"]

_IMAGE = re.compile(r"(?![-/.~])[\w.-]+(/[\w.-]+)*(:[\w.-]+)?(@sha256:[0-9a-f]+)?")
_MORE_FILES = ("-mm", "--mmproj", "-mu", "--model-url", "-md", "--model-draft", "-hf", "-hfr", "--hf-repo")
"""Options of llama-server by which a model is more than the file of `-m`."""
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def without_comments(text: str) -> str:
    """Return a command line without the lines that begin with #."""
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


def split_command(text: str, where: str) -> list[str]:
    """Return the words of a command line. Lines that begin with # are comments, a \\ at the end of a line joins it."""
    try:
        words = shlex.split(re.sub(r"\\\s*\n", "\n", without_comments(text)).removesuffix("\\"))
    except ValueError as exc:
        raise ConfigImportError(f"{where}: not a command line: {exc}") from None
    if not words:
        raise ConfigImportError(f"{where}: the command is empty")
    return words


class Command:
    """A command as a list of words, with questions and additions. `notes` says what was added, and what is still missing."""

    def __init__(self, words: list[str]) -> None:
        self.words = list(words)
        self.notes: list[str] = []
        self.container = PurePosixPath(words[0]).name in ("docker", "podman") and "run" in words
        self._image = self._find_image() if self.container else None
        self.kind = self._find_kind()
        self.sleeps = any("--enable-sleep-mode" in word for word in words)
        """Whether it asks for vLLM's sleep mode by itself."""

    def option(self, *names: str) -> list[str]:
        """Return the values of an option, by any of its names; empty if it is not given."""
        for index, word in enumerate(self.words):
            name, equals, value = word.partition("=")
            if name not in names:
                continue
            if equals:
                return [value]
            values = []
            for each in self.words[index + 1 :]:
                if each.startswith("-"):
                    break
                values.append(each)
            return values
        return []

    def has(self, *names: str) -> bool:
        """Say whether an option is given."""
        return any(word.partition("=")[0] in names for word in self.words)

    @property
    def vllm_names(self) -> list[str]:
        """The names that vLLM will know its model by, as far as the command says."""
        if names := self.option("--served-model-name"):
            return names
        if "serve" in self.words:
            follows = self.words[self.words.index("serve") + 1 :]
            if follows and not follows[0].startswith("-"):
                return follows[:1]
        return self.option("--model")[:1]

    def prepare(self) -> None:
        """Add what the gateway needs of this kind of server and the gateway does not add by itself."""
        if self.kind == "vllm":
            self._prepare_vllm()
        elif self.kind == "sglang" and not self.has("--enable-memory-saver"):
            self.words.append("--enable-memory-saver")
            self.notes.append("--enable-memory-saver was added: SGLang frees no memory without it")
        if self.has("--api-key"):
            self.notes.append("the server asks for a key: name where it stands in `api_key`, clients' keys do not reach it")
        if self.container:
            self.notes.append(
                "the container is ended by the SIGTERM that its client passes on: keep --rm, and --init if it ignores that"
            )

    def to_router(self) -> str | None:
        """Turn a llama-server that has one model into a router for that file's folder, and return the model's name in it.

        `None`, and nothing changed, where that name cannot be told from the command.
        Source: https://github.com/ggml-org/llama.cpp/tree/master/tools/server, README.md.
        """
        path = self.option("-m", "--model")[:1]
        if not path or not path[0].endswith(".gguf") or self.has(*_MORE_FILES):
            return None
        file = PurePosixPath(path[0])
        if _SHARD.search(file.stem):
            return None
        self._remove("-m", "--model")
        self._remove("-a", "--alias")
        self.words += ["--models-dir", str(file.parent), "--no-models-autoload"]
        self.notes.append(
            f"llama-server is started as a router (-m became --models-dir {file.parent}), so that it can unload its model; "
            "that needs a build of December 2025 or later"
        )
        return file.stem

    def _prepare_vllm(self) -> None:
        shell = any(" " in word and re.search(r"\bvllm\b", word) for word in self.words)
        bare = [PurePosixPath(self.words[0]).name, *self.words[1:2]] == ["vllm", "serve"]
        if self.container and not any("VLLM_SERVER_DEV_MODE" in word for word in self.words):
            run = self.words.index("run") + 1
            self.words[run:run] = ["-e", "VLLM_SERVER_DEV_MODE=1"]
            self.notes.append("VLLM_SERVER_DEV_MODE=1 was added: it opens vLLM's sleep routes")
        if self.sleeps:
            return
        if shell:
            self.notes.append("add --enable-sleep-mode to the vLLM command line in it")
        elif bare:
            self.notes.append("the gateway adds --enable-sleep-mode")
        else:
            self.words.append("--enable-sleep-mode")
            self.notes.append("--enable-sleep-mode was added")

    def _find_image(self) -> str | None:
        for word in self.words[self.words.index("run") + 1 :]:
            known = any(each in word for each in ("vllm", "llama.cpp", "sglang", "ollama"))
            if known and ("/" in word or ":" in word) and _IMAGE.fullmatch(word):
                return word
        return None

    def _find_kind(self) -> Kind:
        if self.container:
            image = self._image or ""
            kinds: tuple[Kind, ...] = ("llama.cpp", "sglang", "ollama", "vllm")
            return next((kind for kind in kinds if kind in image), "other")
        text = " ".join(self.words)
        programs = {PurePosixPath(word).name for word in self.words[:4]}
        if re.search(r"\bvllm(\.exe)? serve\b|\bvllm\.entrypoints\.", text):
            return "vllm"
        if re.search(r"\bsglang(\.launch_server| serve)\b", text):
            return "sglang"
        if any(re.match(r"llama-server\b", each) for each in programs):
            return "llama.cpp"
        if "ollama" in programs and "serve" in self.words:
            return "ollama"
        return "other"

    def _remove(self, *names: str) -> None:
        kept: list[str] = []
        skip = False
        for word in self.words:
            if skip:
                skip = False
            elif word in names:
                skip = True
            elif word.partition("=")[0] not in names:
                kept.append(word)
        self.words = kept
