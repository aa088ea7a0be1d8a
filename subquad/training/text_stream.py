"""Tokens as text that is certain: whole characters, and nothing that may turn out to begin a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from subquad.training.tokenizer import Tokenizer


class TextStream:
    """Turns tokens into text as soon as it is certain: a character that is cut in its bytes waits for the rest.

    Only the last few tokens are decoded again, with those before them as context, so long texts cost no more.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # context, then what is not written yet
        self._written = 0  # how many of them are context

    def add(self, token: int) -> str:
        """The text that has become certain."""
        self._tokens.append(token)
        piece = self._unwritten()
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._tokens = self._tokens[self._written :]
        self._written = len(self._tokens)
        return piece

    def rest(self) -> str:
        """What is left at the end."""
        return self._unwritten()

    def _unwritten(self) -> str:
        context = self._tokenizer.decode(self._tokens[: self._written])
        return self._tokenizer.decode(self._tokens)[len(context) :]


class StopText:
    """Ends a text before the first of its stop strings; what may be the beginning of one waits."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._waiting = ""
        self.reached = False

    def add(self, piece: str) -> str:
        """The text that has become certain; nothing more once a stop string is `reached`."""
        if self.reached:
            return ""
        text = self._waiting + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.reached, self._waiting = True, ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._waiting = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What waited for a stop string that did not come."""
        text, self._waiting = self._waiting, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text with which the stop string begins."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
