"""Reads the part of the Dockerfile language that docker/Dockerfile is written in, and refuses any other."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

KNOWN = {
    *("ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN"),
    *("USER", "VOLUME", "WORKDIR"),
}
_FLAG = re.compile(r"--([a-z-]+)=(\S+)\s*")
_PAIR = re.compile(r"""([A-Za-z_][\w.]*)=("(?:[^"\\]|\\.)*"|\S*)""")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass(frozen=True, kw_only=True)
class Instruction:
    name: str
    flags: tuple[tuple[str, str], ...]
    text: str

    def flag(self, name: str) -> str | None:
        return dict(self.flags).get(name)

    @property
    def argv(self) -> list[str] | None:
        """The exec form; None for the shell's."""
        return json.loads(self.text) if self.text.startswith("[") else None

    @property
    def pairs(self) -> dict[str, str]:
        """KEY=VALUE ... of ENV and LABEL."""
        found = {key: value.strip('"') for key, value in _PAIR.findall(self.text)}
        assert len(_PAIR.sub("", self.text).split()) == 0 and found, self.text
        return found


@dataclass(kw_only=True)
class Stage:
    base: str
    name: str
    steps: list[Instruction] = field(default_factory=list)

    def last(self, name: str) -> Instruction | None:
        return next((step for step in reversed(self.steps) if step.name == name), None)


@dataclass(kw_only=True)
class Dockerfile:
    args: dict[str, str]
    stages: list[Stage]

    def stage(self, name: str) -> Stage | None:
        return next((stage for stage in self.stages if stage.name == name), None)


def parse(text: str) -> Dockerfile:
    """Comments and continued lines are read as by Docker; parser directives, here-documents are refused."""
    file = Dockerfile(args={}, stages=[])
    for line in _lines(text):
        word, _, rest = line.partition(" ")
        if word not in KNOWN or "<<" in rest:
            raise ValueError(f"this reader does not know: {line}")
        rest, flags = rest.strip(), []
        while match := _FLAG.match(rest):
            flags.append((match[1], match[2]))
            rest = rest[match.end() :]
        step = Instruction(name=word, flags=tuple(flags), text=rest)
        if word == "FROM":
            base, *named = rest.split()
            if named[:1] not in ([], ["AS"]):
                raise ValueError(f"this reader does not know: {line}")
            name = named[1] if named else str(len(file.stages))
            file.stages.append(Stage(base=expand(base, file.args), name=name))
        elif file.stages:
            file.stages[-1].steps.append(step)
        else:
            key, _, value = rest.partition("=")
            file.args[key] = value
    return file


def expand(text: str, values: Mapping[str, str]) -> str:
    """``$NAME`` and ``${NAME}``; what is unset is empty."""
    if "${" in _VARIABLE.sub("", text):
        raise ValueError(f"this reader does not know: {text}")
    return _VARIABLE.sub(lambda match: values.get(match[1] or match[2], ""), text)


def _lines(text: str) -> list[str]:
    if re.match(r"#\s*(syntax|escape)\s*=", text):
        raise ValueError("this reader does not know parser directives")
    kept = "\n".join(line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    return [line.strip() for line in re.sub(r"\\\n", "", kept).splitlines()]
