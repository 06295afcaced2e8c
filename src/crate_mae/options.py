"""How options are declared, named and checked. A dataclass of them is a command for Python and the command line.

Every layer may import this file: those that compute take the same dataclasses as the commands.
"""

import dataclasses
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from cyclopts import Parameter, Token

from crate_mae.errors import UserError


def _as_text(_type: Any, tokens: Sequence[Token]) -> str:
    return tokens[0].value


def _as_size(_type: Any, tokens: Sequence[Token]) -> int | tuple[int, int]:
    """Parse 224 or 128x192 on the command line, a number or a list of two in a file."""
    words = [word for token in tokens for word in token.value.lower().split("x")]
    if not 1 <= len(words) <= 2 or not all(word.isdigit() for word in words):
        raise ValueError("an image size is a number of pixels, or HEIGHTxWIDTH")
    return int(words[0]) if len(words) == 1 else (int(words[0]), int(words[1]))


# From Python, data may also be a torch.utils.data.Dataset: a type that only an import of torch could name.
Data = Annotated[Any, Parameter(converter=_as_text, n_tokens=1)]
OutputPath = Annotated[Path | str, Parameter(alias="-o")]
Pixels = Annotated[int | tuple[int, int], Parameter(converter=_as_size, n_tokens=1, negative=())]
Numbers = Annotated[tuple[float, ...], Parameter(consume_multiple=True, negative=())]


GIVEN = ""  # of an option: by the user
JSON_HELP = "Print one JSON object on standard output, and everything else on standard error."
PLAN_AS_JSON = (
    "With --dry-run, print the plan as one JSON object on standard output, and everything else on standard error."
)
JSON_NEEDS_DRY_RUN = "--json prints the plan of a dry run: add --dry-run, or leave out --json."
LARGEST = 2**63 - 1  # of whole numbers: what counts of steps and images fit into


class Range(NamedTuple):
    """The numbers that an option takes: `text` completes the sentence "--lr is -1, but must be ..."."""

    contains: Callable[[Any], bool]
    text: str


POSITIVE = Range(lambda x: x > 0, "more than 0")
AT_LEAST_0 = Range(lambda x: x >= 0, "at least 0")
AT_LEAST_1 = Range(lambda x: x >= 1, "at least 1")
BELOW_1 = Range(lambda x: 0 <= x < 1, "at least 0 and less than 1")
BETWEEN_0_AND_1 = Range(lambda x: 0 < x < 1, "between 0 and 1")
FROM_0_TO_1 = Range(lambda x: 0 <= x <= 1, "from 0 to 1")
SHARE = Range(lambda x: 0 < x <= 1, "more than 0 and at most 1")


def option(
    default: Any,
    explanation: str,
    numbers: Range | None = None,
    *,
    speed: bool = False,
    saved: bool = True,
    added_later: bool = False,
) -> Any:
    """A field for an option, with its help.

    Args:
        default: None leaves the option open; `MISSING` has it given.
        explanation: the help.
        numbers: that it takes.
        speed: whether it changes speed, safety and logging only, so that a resumed run may change it.
        saved: whether it belongs to the run, and is saved in `config.yaml`, rather than to one call.
        added_later: whether the `config.yaml` of early runs lacks it.
    """
    metadata = {"help": explanation, "numbers": numbers, "speed": speed, "saved": saved, "added_later": added_later}
    return field(default=default, metadata=metadata, compare=saved)


def same_as(options: type, name: str, explanation: str = "", *, default: Any = ...) -> Any:
    """A field like the one of that name in another class: with its range, and unless given, its help and default."""
    (found,) = (each for each in dataclasses.fields(options) if each.name == name)
    metadata = {**found.metadata, "help": explanation or found.metadata["help"]}
    return field(default=found.default if default is ... else default, metadata=metadata, compare=found.compare)


def saved_values(options: Any) -> dict[str, Any]:
    """The options of a dataclass that belong to its result, not to one call, by name."""
    return {item.name: getattr(options, item.name) for item in dataclasses.fields(options) if item.metadata["saved"]}


def origin(options: Any, name: str) -> str:
    """Where an option comes from, to stand behind its name or value in a message; empty if the user gave it.

    An option that is named without that reads as if the user had given it.
    """
    origins = getattr(options, "origins", None)
    if origins is None or origins.get(name) == GIVEN:
        return ""
    return f" (from {origins[name]})" if name in origins else " (by default)"


def option_name(key: str) -> str:
    """The name of an option on the command line."""
    return f"--{key.replace('_', '-')}"


def as_words(values: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line."""
    words: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(option_name(name) if value else f"--no-{option_name(name)[2:]}")
        elif name == "image_size" and isinstance(value, (tuple, list)):
            words += [option_name(name), "x".join(map(str, value))]  # one word
        elif value == ():
            words.append(f"--no-{option_name(name)[2:]}")
        elif isinstance(value, dict):
            words += [word for key, each in value.items() for word in (f"{option_name(name)}.{key}", str(each))]
        else:
            words += [option_name(name), *map(str, value if isinstance(value, (tuple, list)) else [value])]
    return words


class Mistakes(list[str]):
    """Sentences about the mistakes found so far, to be reported together.

    Attributes:
        options: that are wrong by themselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.options: set[str] = set()

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Note a `UserError` of the block instead of raising it."""
        try:
            yield
        except UserError as error:
            self.append(str(error))

    def concern(self, *options: str) -> bool:
        """Whether one of these options is wrong by itself."""
        return not self.options.isdisjoint(options)

    def raise_if_any(self) -> None:
        """Raise one `UserError` with all messages."""
        if self:
            raise UserError("\n".join(dict.fromkeys(self)))


def check_ranges(options: Any) -> Mistakes:
    """Compare the value of each option of a dataclass with its choices and its range."""
    mistakes = Mistakes()
    for item in dataclasses.fields(options):
        name, value = item.name, getattr(options, item.name)
        if value is not None and (wrong := _mistake(value, item.type, item.metadata["numbers"])):
            mistakes.append(f"{option_name(name)}{origin(options, name)} is {wrong}.")
            mistakes.options.add(name)
    return mistakes


def _mistake(value: Any, hint: Any, numbers: Range | None) -> str | None:
    """Why an option cannot have a value, which completes a sentence that begins with "--lr is"; None if it can."""
    if get_origin(hint) is Literal and value not in get_args(hint):
        return f"{value}, but must be one of {', '.join(get_args(hint))}"
    if hint is not Data and not _is_finite(value):
        return f"{value}, but must be finite" if is_of_type(value, float) else f"{value}, but all must be finite"
    if numbers is None:
        return None
    if not is_of_type(value, float):
        return f"{value!r}, but must be a number"
    if not numbers.contains(value):
        return f"{value}, but must be {numbers.text}"
    return None if is_of_type(value, hint) else f"{value}, but must be a whole number"


def _is_finite(value: Any) -> bool:
    """Whether a number, or each one in a tuple or dictionary, is finite, and if whole not too large to be counted."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_finite, value))
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, int):
        return abs(value) <= LARGEST
    return not isinstance(value, float) or math.isfinite(value)


def is_of_type(value: Any, hint: Any) -> bool:
    """Whether a value is of an option's type; whole numbers pass for fractions, true and false do not."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Annotated:
        return is_of_type(value, inner[0])
    if origin is Literal:
        return value in inner
    if origin in (Union, types.UnionType):
        return any(is_of_type(value, part) for part in inner)
    if origin is dict:
        return isinstance(value, dict) and all(is_of_type(key, inner[0]) for key in value)
    if origin is tuple:
        parts = inner[:1] * len(value) if isinstance(value, tuple) and inner[1:] == (...,) else inner
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(is_of_type, value, parts))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)
