"""Splits a Windows command line as the programs themselves do.

Windows hands a program one string. What its arguments are, the program's C run-time library decides;
these are the rules that Microsoft documents under "Parsing C command-line arguments":

- Arguments are separated by spaces and tabs, and by nothing else.
- The first, the program's own path, is special: it ends at the next space, or, if it begins with a
  quotation mark, at the next one. Backslashes in it are backslashes.
- A quotation mark begins or ends a part in which spaces separate nothing.
- Backslashes count only before a quotation mark: 2n of them and the mark are n backslashes and a
  mark that begins or ends a part; 2n+1 of them and the mark are n backslashes and a literal mark.
- In a part between marks, two marks are one literal mark.
"""

from __future__ import annotations

SEPARATORS = " \t"


def split(command_line: str) -> list[str]:
    """The program and its arguments."""
    program, rest = split_program(command_line)
    return [program, *split_arguments(rest)]


def split_program(command_line: str) -> tuple[str, str]:
    """The program's path, and what follows it."""
    if command_line.startswith('"'):
        program, _, rest = command_line[1:].partition('"')
        return program, rest
    end = next((i for i, letter in enumerate(command_line) if letter in SEPARATORS), len(command_line))
    return command_line[:end], command_line[end:]


def split_arguments(rest: str) -> list[str]:
    arguments = []
    rest = rest.lstrip(SEPARATORS)
    while rest:
        argument, rest = split_argument(rest)
        arguments.append(argument)
        rest = rest.lstrip(SEPARATORS)
    return arguments


def split_argument(rest: str) -> tuple[str, str]:
    """The first argument, and what follows it."""
    argument, quoted = "", False
    while rest and (quoted or rest[0] not in SEPARATORS):
        text = rest.lstrip("\\")
        backslashes = len(rest) - len(text)
        if not text.startswith('"'):
            taken = backslashes or 1  # after backslashes the argument may end
            argument, rest = argument + rest[:taken], rest[taken:]
            continue
        argument += "\\" * (backslashes // 2)
        rest = text[1:]
        if backslashes % 2:
            argument += '"'
        elif quoted and rest.startswith('"'):
            argument, rest = argument + '"', rest[1:]
        else:
            quoted = not quoted
    return argument, rest
