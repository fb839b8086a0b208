"""Options of a command as dataclasses: a field is an option, with typer's description in its annotation."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")


def expand(command: Callable[..., None]) -> Callable[..., None]:
    """`command` for typer: in the place of each parameter that is a dataclass stand that dataclass's fields.

    Fields may be such dataclasses themselves. The options appear in the order in which they are written.
    """
    hints = get_type_hints(command, include_extras=True)
    options = [
        option
        for parameter in inspect.signature(command).parameters.values()
        for option in _options(parameter.name, hints[parameter.name], parameter.default)
    ]

    def call(**given: Any) -> None:
        command(**{name: _collect(name, hints[name], given) for name in inspect.signature(command).parameters})

    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    call.__annotations__ = {option.name: option.annotation for option in options}
    return call


def options_from(kind: type[Options], arguments: object, **given: object) -> Options:
    """The dataclass `kind`: each field is `given`, or the attribute of `arguments` that has its name."""
    same = {field.name for field in fields(kind) if hasattr(arguments, field.name)} - set(given)
    return kind(**given, **{name: getattr(arguments, name) for name in same})


def _options(name: str, kind: Any, default: Any) -> list[inspect.Parameter]:
    if not _is_group(kind):
        return [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)]
    hints = get_type_hints(kind, include_extras=True)
    return [option for field in fields(kind) for option in _options(field.name, hints[field.name], _default(field))]


def _collect(name: str, kind: Any, given: dict[str, Any]) -> Any:
    """The value of a parameter or field: as given, or a dataclass of the fields that were given."""
    if not _is_group(kind):
        return given[name]
    hints = get_type_hints(kind, include_extras=True)
    return kind(**{field.name: _collect(field.name, hints[field.name], given) for field in fields(kind)})


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and is_dataclass(kind)


def _default(field: Field[Any]) -> Any:
    return inspect.Parameter.empty if field.default is MISSING else field.default
