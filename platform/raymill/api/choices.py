"""One completion of a request as the two APIs write it: events in, the JSON of a choice out, whole or part by part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from raymill.api.logprobs import CompletionLogprobs, TokenNames, chat_logprobs
from raymill.inference.requests import TokenEvent


class Choice(Protocol):
    """What becomes of one stream of events."""

    WHOLE: ClassVar[str]
    """The answer's `object`."""
    PART: ClassVar[str]
    """That of a stream's parts."""

    def whole(self, events: Sequence[TokenEvent]) -> dict[str, Any]:
        """All of it."""
        ...

    def part(self, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        """What these events add; None where that is nothing to send."""
        ...


class TextChoice:
    """As /v1/completions writes it."""

    WHOLE: ClassVar[str] = "text_completion"
    PART: ClassVar[str] = "text_completion"

    def __init__(self, index: int, echo: str | None, logprobs: CompletionLogprobs | None) -> None:
        """echo: the prompt, which the text begins with."""
        self.index = index
        self._echo, self._logprobs = echo, logprobs
        self._begun = False

    def whole(self, events: Sequence[TokenEvent]) -> dict[str, Any]:
        text, logprobs = "".join(event.text for event in events), None
        tokens = [event.token for event in events if event.token is not None]
        if not self._begun and self._echo is not None:
            text = self._echo + text
            tokens = [*(events[0].prompt or ()), *tokens]
        self._begun = True
        if self._logprobs is not None:
            logprobs = self._logprobs.body(tokens)
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": events[-1].finish_reason}

    def part(self, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        begun = self._begun
        choice = self.whole(events)
        says = choice["text"] or choice["finish_reason"] or (choice["logprobs"] and choice["logprobs"]["tokens"])
        return choice if says or not begun else None


class ChatChoice:
    """As /v1/chat/completions writes it."""

    WHOLE: ClassVar[str] = "chat.completion"
    PART: ClassVar[str] = "chat.completion.chunk"

    def __init__(self, index: int, names: TokenNames | None) -> None:
        """names: of tokens, where log probabilities are asked for."""
        self.index = index
        self._names = names
        self._begun = False

    def whole(self, events: Sequence[TokenEvent]) -> dict[str, Any]:
        text, logprobs = self._read(events)
        message = {"role": "assistant", "content": text, "refusal": None}
        return self._choice({"message": message}, logprobs, events)

    def part(self, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        text, logprobs = self._read(events)
        delta: dict[str, Any] = {} if self._begun else {"role": "assistant", "content": text}
        if text:
            delta["content"] = text
        if self._begun and not text and logprobs is None and events[-1].finish_reason is None:
            return None
        self._begun = True
        return self._choice({"delta": delta}, logprobs, events)

    def _read(self, events: Sequence[TokenEvent]) -> tuple[str, dict[str, Any] | None]:
        text = "".join(event.text for event in events)
        if self._names is None:
            return text, None
        return text, chat_logprobs(self._names, [event.token for event in events if event.token is not None])

    def _choice(
        self, said: dict[str, Any], logprobs: dict[str, Any] | None, events: Sequence[TokenEvent]
    ) -> dict[str, Any]:
        return {"index": self.index, **said, "logprobs": logprobs, "finish_reason": events[-1].finish_reason}
