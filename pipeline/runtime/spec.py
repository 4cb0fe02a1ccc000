"""Specs: how an object is named on the command line, `kind:argument,key=value`, for example "timm:resnet18"."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from compress_ssl.pipeline.runtime.errors import UserError

# A comma that begins the next option of a spec; other commas belong to the argument.
_NEXT_KEY = re.compile(r",(?=[A-Za-z_][\w-]*=)")


@dataclass(frozen=True)
class Spec:
    """A parsed spec: `timm:resnet18,pretrained=true` has the kind timm, the argument resnet18 and one option."""

    kind: str
    argument: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        head = f"{self.kind}:{self.argument}" if self.argument else self.kind
        pairs = [f"{key}={value}" for key, value in self.options.items()]
        if not pairs:
            return head
        return ",".join([head, *pairs]) if self.argument else f"{head}:{','.join(pairs)}"


def parse(text: str) -> Spec:
    """Split a spec. The argument may contain commas and colons; the options begin at the first `,key=`.

    Hyphens in keys become underscores. Raises UserError if a key is given twice.
    """
    kind, _, rest = text.partition(":")
    if re.match(r"[A-Za-z_][\w-]*=", rest):
        rest = "," + rest
    argument, *pairs = _NEXT_KEY.split(rest)
    options: dict[str, str] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        key = key.replace("-", "_")
        if key in options:
            raise UserError(f"{text!r} gives {key}= twice; keep one")
        options[key] = value
    return Spec(kind, argument, options)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'seed'?` for the known name most similar to `word`, or "" if none is similar enough."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
