"""Options as dataclasses: a command gets them as they were given, in the order in which they are written."""

import inspect
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from dispc.cli.app import app
from dispc.cli.arguments import expand


@dataclass(frozen=True, kw_only=True)
class Inner:
    depth: Annotated[int, typer.Option(min=1)] = 3


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: Annotated[str, typer.Argument()]
    inner: Inner
    loud: Annotated[bool, typer.Option("--loud")] = False


def run(*arguments: str) -> tuple[int, list[object]]:
    seen: list[object] = []

    def command(context: typer.Context, outer: Outer, last: Annotated[int, typer.Option()] = 0) -> None:
        """Say it."""
        seen.extend([outer, last, context.info_name])

    probe = typer.Typer()
    probe.command("say")(expand(command))
    return CliRunner().invoke(probe, arguments).exit_code, seen


def test_fields_are_options_and_come_back_as_the_dataclass() -> None:
    code, seen = run("x", "--depth", "5", "--loud", "--last", "2")
    assert code == 0
    assert seen == [Outer(name="x", inner=Inner(depth=5), loud=True), 2, "say"]
    assert run("x")[1][:2] == [Outer(name="x", inner=Inner()), 0]


@pytest.mark.parametrize("arguments", [(), ("x", "--depth", "0"), ("x", "--inner", "1")])
def test_what_typer_refuses_never_reaches_the_command(arguments: tuple[str, ...]) -> None:
    code, seen = run(*arguments)
    assert code == 2 and not seen


def test_no_command_of_dispc_is_longer_than_sixty_lines() -> None:
    for info in app.registered_commands:
        assert info.callback is not None
        command = inspect.getclosurevars(info.callback).nonlocals["command"]
        assert len(inspect.getsource(command).splitlines()) <= 60, info.name
