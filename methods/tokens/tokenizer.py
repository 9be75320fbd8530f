"""Text to tokens and back: one token a character, or a pretrained tokenizer."""

from __future__ import annotations

from collections.abc import Iterable

from runner.errors import UserError, nearest


class Characters:
    """One token a character. Token 0 is padding (written "\\0"), the alphabet's characters are 1, 2, …

    `eos` is the character that ends a response, part of the alphabet; where none is given, padding ends it."""

    def __init__(self, alphabet: str, eos: str | None = None):
        twice = sorted({c for c in alphabet if alphabet.count(c) > 1})
        if twice or "\0" in alphabet:
            raise ValueError(f"an alphabet holds each character once, and no padding: {alphabet!r}")
        self.characters = "\0" + alphabet
        self._index = {c: i for i, c in enumerate(self.characters)}
        self.size, self.pad = len(self.characters), 0
        self.eos = 0 if eos is None else self.encode(eos)[0]

    def encode(self, text: str) -> list[int]:
        try:
            return [self._index[c] for c in text]
        except KeyError as e:
            c = e.args[0]
            near = nearest(c, self.characters[1:], 1) or [k for k in (c.lower(), c.upper()) if k in self._index]
            raise UserError(f"the character {c!r} of {text[:60]!r} is not in the alphabet\n"
                            + (f"did you mean: {near[0]!r}?\n" if near else "")
                            + f"the alphabet: {self.characters[1:]!r}; write the text with these") from None

    def encode_response(self, text: str) -> list[int]:
        """Tokens of a response; its end is one of its characters."""
        return self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The characters before the first padding; "\ufffd" for a token without one. `ids` on the host: a list, or a tensor."""
        out = []
        for i in map(int, ids):
            if i == self.pad:
                break
            out.append(self.characters[i] if i < self.size else "\ufffd")
        return "".join(out)


class Pretrained:
    """A transformers tokenizer with the members of Characters; `chat`: a prompt becomes a user's turn of its template."""

    def __init__(self, tokenizer, chat: bool = False):
        self.inner, self.chat = tokenizer, chat
        if tokenizer.eos_token_id is None:
            raise UserError("this tokenizer names no token that ends a text (eos_token)\n"
                            "add eos_token to its tokenizer_config.json")
        if chat and not getattr(tokenizer, "chat_template", None):
            raise UserError("this tokenizer has no chat template\nuse plain prompts, or a checkpoint that was trained to chat")
        self.size, self.eos = len(tokenizer), tokenizer.eos_token_id
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, through the chat template where there is one to use."""
        if self.chat:
            text = self.inner.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                                  add_generation_prompt=True)
        return self.inner.encode(text, add_special_tokens=not self.chat)

    def encode_response(self, text: str) -> list[int]:
        """Tokens of a response and of its end; nothing is put before it."""
        return [*self.inner.encode(text, add_special_tokens=False), self.eos]

    def decode(self, ids: Iterable[int]) -> str:
        """The text before the first padding (and without the end's token)."""
        out = []
        for i in map(int, ids):
            if i in (self.pad, self.eos):
                break
            out.append(i)
        return self.inner.decode(out, skip_special_tokens=True)
