"""The kinds of field that config models are made of."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

# A trial's value: the text as it was written, a boolean (a flag), or None (leave the argument out).
Value = str | bool | None

# Where something stands in a config: keys, and the numbers of list items.
KeyPath = tuple[str | int, ...]


class Boolean(str):
    """A YAML boolean as it was written, so that `true` in a list of words stays the word."""

    __slots__ = ()

    @property
    def value(self) -> bool:
        """What the word means."""
        return self.lower() == "true"


class Misfit(ValueError):
    """What a model's parts get wrong between them: complaints, each with the path of the part below the model."""

    def __init__(self, *complaints: tuple[KeyPath, str]) -> None:
        self.complaints = complaints
        super().__init__("; ".join(f"{key_text(path)}: {message}" for path, message in complaints))


class Spec(BaseModel):
    """A part of a config: frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)


def key_text(path: KeyPath) -> str:
    """Write a path as a person would: `sweep.trials[3].lr`."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            word = step if step.isprintable() and step else repr(step)
            text += f".{word}" if text else word
    return text


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known spelling that is closest to `word`, if any is close."""
    names = {name.lower(): name for name in known}
    wanted = word.lower()
    if found := difflib.get_close_matches(wanted, names, n=1, cutoff=0.6):
        return names[found[0]]
    # `gpus` for gpus_per_node, `maximize` for max: too unlike for difflib, plain to a person.
    started = [name for name in names if len(wanted) > 2 and len(name) > 2 and _one_starts_other(name, wanted)]
    return names[min(started, key=len)] if started else None


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)`, or an empty string where nothing is close."""
    found = nearest(word, known)
    return f" (did you mean '{found}'?)" if found and found != word else ""


def kind_of(value: object) -> str:
    """Say what a raw value is: `a list`, `a mapping`, `null`, or `the value 'x'`."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    return f"the value {shown(value)}"


def shown(value: object) -> str:
    """Return a value for a message: quoted, and cut where it is long."""
    text = repr(str(value))
    return text if len(text) <= 80 else f"{text[:60]}…{text[-1]} ({len(str(value))} characters)"


def flow_list(words: Iterable[str]) -> str:
    """Write words as a YAML list in one line, quoted where YAML would misread them."""
    return "[" + ", ".join(word if _PLAIN.fullmatch(word) else _double_quoted(word) for word in words) + "]"


def as_list(value: Any) -> Any:
    """Refuse what is not a list, and show the list that was probably meant."""
    return _listed(value, lambda text: [text])


def as_words(value: Any) -> Any:
    """Refuse what is not a list of arguments; one text is shown split as a shell would."""
    return _listed(value, _split)


def _one_starts_other(one: str, other: str) -> bool:
    return one.startswith(other) or other.startswith(one)


_PLAIN = re.compile(r"-{0,2}[A-Za-z0-9_./+@%][A-Za-z0-9_./+@%=-]*")


def _double_quoted(word: str) -> str:
    escaped = "".join(
        f"\\{letter}" if letter in '"\\' else letter if letter.isprintable() else f"\\u{ord(letter):04x}"
        for letter in word
    )
    return f'"{escaped}"'


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text) or [text]
    except ValueError:
        return [text]


def _listed(value: Any, split: Any) -> Any:
    if isinstance(value, str):
        remedy = flow_list(split(value))
        raise ValueError(f"a list is meant here, not one value: write {remedy if len(remedy) <= 200 else '[VALUE]'}")
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"a list is meant here, not {kind_of(value)}: write [first, second], or [] for none")
    return value


def _not_boolean(value: Any) -> Any:
    if isinstance(value, (bool, Boolean)):
        raise ValueError(f"a number is meant here, not the boolean {str(value).lower()}")
    return value


def _boolean(value: Any) -> Any:
    if isinstance(value, Boolean):
        return value.value
    if isinstance(value, bool):
        return value
    word = str(value).lower()
    if isinstance(value, str) and word in {"true", "false"}:
        raise ValueError(f"true or false is meant here, not a text in quotes: write {word}")
    meant = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}.get(word)
    told = f": write {meant}" if meant and isinstance(value, str) else ""
    given = shown(value) if isinstance(value, str) else kind_of(value)
    raise ValueError(f"true or false is meant here, not {given}{told}")


# C0, DEL, C1 and Unicode's own line ends: what breaks a line, or moves a terminal's cursor.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def one_line(text: str) -> str:
    """Refuse text with line ends or control characters."""
    if _CONTROL.search(text):
        raise ValueError(f"must be one line without control characters, not {shown(text)}")
    return text


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL character, which no program can be given")
    return text


def _value(value: Any) -> Value:
    if isinstance(value, Boolean):
        return value.value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (str, int, float, Decimal)):
        return _no_nul(str(value))
    instead = "put the whole of it in quotes to pass it as one text"
    if isinstance(value, (list, tuple)) and 0 < len(value) <= 16 and all(isinstance(part, str) for part in value):
        instead = f"write {_double_quoted(flow_list(value))} to pass it as one text"
    raise ValueError(f"a value is a word, a number, a boolean or null, not {kind_of(value)}: {instead}")


_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PARAMETER = re.compile(r"[^\s\x00-\x1f={}'\"`$\\-][^\s\x00-\x1f={}'\"`$\\]*")


def _variable(name: str) -> str:
    if not _VARIABLE.fullmatch(name):
        raise ValueError(
            f"{shown(name)} is no name for an environment variable: use letters, digits and _, the first no digit"
        )
    if name.startswith(("NEXA_", "SLURM_")):
        raise ValueError(f"{shown(name)} is set by the run itself: choose a name without NEXA_ or SLURM_ in front")
    return name


def _parameter(name: str) -> str:
    if not _PARAMETER.fullmatch(name):
        bare = name.lstrip("-")
        told = f": write {bare} without the dashes" if bare != name and _PARAMETER.fullmatch(bare) else ""
        raise ValueError(
            f"{shown(name)} is no name for a parameter{told or ': no spaces, quotes, =, $, braces or leading dash'}"
        )
    return name


Count = Annotated[int, BeforeValidator(_not_boolean), Field(ge=1)]
WholeNumber = Annotated[int, BeforeValidator(_not_boolean), Field(ge=0)]
Usd = Annotated[Decimal, BeforeValidator(_not_boolean), Field(ge=0)]
Truth = Annotated[bool, BeforeValidator(_boolean)]
Line = Annotated[str, Field(min_length=1), AfterValidator(one_line)]
Word = Annotated[str, AfterValidator(_no_nul)]
Words = Annotated[tuple[Word, ...], BeforeValidator(as_words)]
Lines = Annotated[tuple[Line, ...], BeforeValidator(as_list)]
ParameterName = Annotated[str, AfterValidator(_parameter)]
TrialValue = Annotated[Value, BeforeValidator(_value)]
Variables = dict[Annotated[str, AfterValidator(_variable)], Word]
