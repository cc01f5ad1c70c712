"""Text to token ids and back, with the chat format that the model was tuned on.

The merging itself is done by Hugging Face's `tokenizers`; notebook 08 trains such a tokenizer from
scratch. What is here builds it from a model's own file, and decodes a stream without ever showing
half a character.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmcourse.errors import ModelError

Message = Mapping[str, str]
SPECIAL = 3  # GGUF's token type of control tokens such as <|im_end|>


class Tokenizer:
    """encode, decode and the chat template of one model.

    eos_ids   tokens that end an answer
    """

    def __init__(self, backend: Any, *, chat_template: str | None, eos_ids: Iterable[int] = ()) -> None:
        self.backend = backend
        self.chat_template = chat_template
        self.eos_ids = tuple(eos_ids)

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> Tokenizer:
        """From GGUF metadata: byte-level BPE (`gpt2`) in the flavour of SmolLM (digits one by one)."""
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend

        kind = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
        if kind != ("gpt2", "smollm"):
            raise ModelError(
                f"the GGUF's tokenizer is {kind[0]!r} with pre-tokenizer {kind[1]!r}.",
                "GGUF names the rule that cuts text into words but does not hold it; only smollm's is known.",
                "the safetensors folder of the same model, which has a complete tokenizer.json.",
            )
        tokens = fields["tokenizer.ggml.tokens"]
        merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
        backend = Backend(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        types = fields["tokenizer.ggml.token_type"]
        special = [t for t, k in zip(tokens, types, strict=True) if k == SPECIAL]
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
        eos = {
            fields["tokenizer.ggml.eos_token_id"],
            *(i for i, t in enumerate(tokens[:3]) if t == "<|endoftext|>"),
        }
        return cls(backend, chat_template=fields.get("tokenizer.chat_template"), eos_ids=sorted(eos))

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """From `tokenizer.json`; the chat format from `chat_template.jinja` or `tokenizer_config.json`."""
        from tokenizers import Tokenizer as Backend

        if not (folder / "tokenizer.json").is_file():
            raise ModelError(
                f"{folder} has no tokenizer.json.",
                "Without its own tokenizer a model reads and writes nonsense.",
                "saving the tokenizer beside the weights: tokenizer.save_pretrained(folder).",
            )
        config = _json(folder / "tokenizer_config.json")
        template = config.get("chat_template")
        if (file := folder / "chat_template.jinja").is_file():
            template = file.read_text()
        eos = _json(folder / "generation_config.json").get("eos_token_id")
        if eos is None:
            eos = _json(folder / "config.json").get("eos_token_id")
        ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
        return cls(Backend.from_file(str(folder / "tokenizer.json")), chat_template=template, eos_ids=ids)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Special tokens written out in the text (`<|im_end|>`) become their ids.

        A byte for which the vocabulary has no token is dropped, as in transformers: SmolLM2 lacks six
        control characters and the unassigned Unicode planes 4 to 11.
        """
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """The text of `ids`; `special=False` leaves control tokens out."""
        return self.backend.decode(list(ids), skip_special_tokens=not special)

    def token(self, token_id: int) -> str:
        """How one token prints, its leading space included."""
        return self.decode([token_id])

    def chat(self, messages: Sequence[Message] | str, *, answer: bool = True) -> str:
        """The text a chat model reads: messages `{"role": …, "content": …}` in the model's own format.

        A plain string is one user message. `answer` adds the opening of the assistant's turn.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if self.chat_template is None:
            raise ModelError(
                "this model has no chat template.",
                "It was not tuned on a chat format, so there is none to put the messages in.",
                "a plain prompt (`LLM.generate`), or an instruction-tuned model.",
            )
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        # A template comes with the weights and is a program: it runs in jinja's sandbox.
        template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        return template.from_string(self.chat_template).render(
            messages=list(messages), add_generation_prompt=answer
        )


class StreamDecoder:
    """Turns ids that come one by one into text, holding back bytes that are not yet a whole character.

    A character outside ASCII is several bytes, and byte-level BPE may split it across tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self.pending.append(token_id)
        text = self.tokenizer.decode(self.pending, special=False)
        # Four bytes are the longest UTF-8 character: beyond that, the replacement mark is the truth.
        if text.endswith("\ufffd") and len(self.pending) < 4:
            return ""
        self.pending.clear()
        return text

    def flush(self) -> str:
        """What is left at the end of the stream, complete or not."""
        text = self.tokenizer.decode(self.pending, special=False) if self.pending else ""
        self.pending.clear()
        return text


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
