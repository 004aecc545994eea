"""The child process that renders chat templates; started by file name from `chat`, never imported by it.

A template is a program from whoever made the checkpoint. It runs here, in jinja2's immutable sandbox, in a
process that holds nothing worth stealing and whose memory and processor time are bounded by the kernel.

Wire: each message is a four-byte big-endian length and that many bytes of JSON. The process says `ready`
once. A request has `template`, `context` (the variables) and `max_chars`; the answer has `text`, or
`error`. The process ends at the end of its input.

Only the standard library and jinja2 are imported: the process is up in a tenth of a second.
"""

from __future__ import annotations

import datetime
import json
import math
import resource
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils


class _GenerationBlock(jinja2.ext.Extension):
    """Renders what is inside `{% generation %}…{% endgeneration %}`, which only marks text for training."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """A namespace whose attributes cannot be underscored names."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


class _Dict:
    """`dict(...)` as a function, so that a template cannot reach the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes for HTML, which is not what models were trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)  # noqa: DTZ005 - the server's local day, as transformers does


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox of jinja2, except that a forbidden attribute fails even where it is only printed."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        if attribute.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a template cannot reach {attribute!r}")
        return super().unsafe_undefined(obj, attribute)


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment that transformers renders chat templates in: same options, filters and globals."""
    env = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    env.globals["dict"] = _Dict()
    env.globals["namespace"] = _Namespace
    return env


@lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    return environment().from_string(template)


def render(template: str, context: dict[str, Any], max_chars: int) -> str:
    """The rendered text.

    Raises:
        jinja2.TemplateError: it is wrong, gave up by `raise_exception`, or reached for something forbidden.
        OverflowError: more than `max_chars` characters came out.
    """
    pieces: list[str] = []
    total = 0
    for piece in _compile(template).generate(**context):
        total += len(piece)
        if total > max_chars:
            raise OverflowError(f"the template writes more than {max_chars} characters")
        pieces.append(piece)
    return "".join(pieces)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"text": render(request["template"], request["context"], request["max_chars"])}
    except MemoryError:
        return {"error": "the template needs more memory than it may use", "fatal": True}
    except RecursionError:
        return {"error": "the template nests too deeply"}
    except Exception as error:  # noqa: BLE001 - whatever a template provokes is the template's fault
        line = getattr(error, "lineno", None)
        where = f" (line {line})" if line else ""
        return {"error": f"{str(error) or type(error).__name__}{where}"[:600]}


def _limit_process(memory_bytes: int) -> None:
    """What the kernel enforces for the rest of this process's life."""
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 16,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def _limit_cpu(seconds: float) -> None:
    """Allow this much more processor time, from now on."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    until = math.ceil(usage.ru_utime + usage.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def serve(source: BinaryIO, sink: BinaryIO, before: Callable[[], None]) -> None:
    """Answer requests until the input ends; `before` runs ahead of each."""
    while len(header := source.read(4)) == 4:
        body = source.read(int.from_bytes(header, "big"))
        before()
        answer = _answer(json.loads(body))
        _send(sink, answer)
        if answer.get("fatal"):
            return


def _send(sink: BinaryIO, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    sink.write(len(data).to_bytes(4, "big") + data)
    sink.flush()


def main() -> None:
    """Arguments: memory in bytes, processor seconds of one request."""
    memory_bytes, cpu_seconds = int(sys.argv[1]), float(sys.argv[2])
    # Compiling once now loads everything jinja2 imports late, before files are out of reach.
    render("{% for x in [1] %}{{ x | tojson }}{% endfor %}{{ strftime_now('%d') }}", {}, 100)
    _limit_process(memory_bytes)
    _send(sys.stdout.buffer, {"ready": True})
    serve(sys.stdin.buffer, sys.stdout.buffer, lambda: _limit_cpu(cpu_seconds))


if __name__ == "__main__":
    main()
