"""The `polyradix` command. Imports late: the engine process runs this file again, and has no use for a web server."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from polyradix import __version__
from polyradix.backend.registry import parse_option
from polyradix.cache.radix import EvictionPolicy
from polyradix.engine.config import EngineConfig
from polyradix.schedule.queue import Policy
from polyradix.serve.client import set_up_logging
from polyradix.serve.parsers import REASONING_NAMES, TOOL_NAMES


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, or a server stopped by a signal; 1 could not start or check found a reason; 2 wrong
    arguments; 130 interrupted before it was done."""
    args = _parser().parse_args(argv)
    level = getattr(args, "log_level", "warning")
    set_up_logging(level)
    logging.getLogger("uvicorn").setLevel(level.upper() if level != "info" else "WARNING")
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        return 0 if args.run is _serve else 130
    except Exception as error:
        if level == "debug":
            logging.exception("failed")
        print(f"polyradix: error: {error or type(error).__name__}", file=sys.stderr)
        return 1


def _serve(args: argparse.Namespace) -> int:
    from polyradix.serve.run import ServeOptions, serve

    given = {name: value for name, value in vars(args).items() if name in EngineConfig.__struct_fields__}
    given |= {"backend_options": dict(args.backend_options), "embeddings": args.pooling is not None}
    options = {f.name: getattr(args, f.name) for f in fields(ServeOptions)}
    options |= {name: tuple(options[name]) for name in ("api_keys", "cors_origins")}
    serve(EngineConfig(**given, progress=args.log_level in ("debug", "info")), ServeOptions(**options))
    return 0


def _check(args: argparse.Namespace) -> int:
    from polyradix.serve.check import Question, check, text

    report = check(Question(**{f.name: getattr(args, f.name) for f in fields(Question)}))
    print(json.dumps(report, indent=1) if args.json else "\n".join(text(report)))
    return 1 if report["reasons"] else 0


def _devices(args: argparse.Namespace) -> int:
    from polyradix.serve.check import devices

    print("\n".join(devices()))
    return 0


def _new_backend(args: argparse.Namespace) -> int:
    from polyradix.serve.new_backend import new_backend

    print("\n".join(map(str, new_backend(args.name, args.path))))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="polyradix", description="One LLM server core for any accelerator.")
    parser.add_argument("--version", action="version", version=f"polyradix {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve a model over HTTP", formatter_class=_Defaults)
    _model_options(serve)
    _engine_options(serve)
    _serve_options(serve)
    serve.set_defaults(run=_serve)
    _add_bench(commands.add_parser("bench", help="measure a server, or an engine in this process"))
    check = commands.add_parser(
        "check", help="say whether a model can run on a device, reading no weights", formatter_class=_Defaults
    )
    _model_options(check)
    _forecast_options(check)
    check.set_defaults(run=_check)
    devices = commands.add_parser("devices", help="list the backends found, and why others are not usable")
    devices.set_defaults(run=_devices)
    new = commands.add_parser("new-backend", help="write the package of a new backend, every method to be filled")
    new.add_argument("name", metavar="NAME", help="what --device will call it")
    new.add_argument("--path", type=Path, help="folder to write; ./polyradix-NAME if not given")
    new.set_defaults(run=_new_backend)
    return parser


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from polyradix.bench.cli import add_arguments

    def engine(p: argparse.ArgumentParser) -> None:
        _model_options(p)
        _engine_options(p)

    add_arguments(parser, engine)


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not the ones that mean "chosen for you"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, True) else super()._get_help_string(action)


def _model_options(p: argparse.ArgumentParser) -> None:
    add = p.add_argument
    add(
        "--model",
        "--model-path",
        required=True,
        help="OWNER/NAME or OWNER/NAME/FILE.gguf on the Hub, a folder, a .gguf file, or `demo`",
    )
    add("--revision", help="of a model on the Hub: a branch, tag or commit; its main branch if not given")
    add("--device", default="auto", help="a backend's name; `polyradix devices` lists them")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="of weights and activations")
    add("--kv-dtype", default="auto", choices=("auto", "float8_e4m3fn"), help="of the KV cache; auto: as activations")
    add("--load-format", default="auto", choices=("auto", "dummy"), help="dummy: random weights; only JSON is fetched")
    add(
        "--tp",
        "--tp-size",
        "--tensor-parallel-size",
        type=int,
        default=1,
        help="tensor-parallel ranks the model is split over",
    )
    add("--page-size", type=int, help="tokens per KV page; the backend's best if not given")
    add("--emulate", action="store_true", help="run a backend without its hardware, where it can")


def _forecast_options(p: argparse.ArgumentParser) -> None:
    add = p.add_argument
    add("--context", type=int, help="tokens that a sequence holds; 4096 or the model's if not given")
    add("--seqs", type=int, default=64, help="sequences of the larger decode")
    add("--peak-bandwidth", type=float, metavar="GB/s", help="of one device, for the least time of a step")
    add("--peak-flops", type=float, metavar="GFLOP/s", help="of one device")
    add("--ceilings", type=Path, metavar="FILE", help="what `conform perf -o` wrote, instead of these two")
    add("--json", action="store_true", help="print JSON")


def _engine_options(p: argparse.ArgumentParser) -> None:
    defaults = EngineConfig(model="")

    def add(flag: str | tuple[str, ...], field: str, text: str, **kwargs: Any) -> None:
        p.add_argument(
            *([flag] if isinstance(flag, str) else flag),
            dest=field,
            default=getattr(defaults, field),
            help=text,
            **kwargs,
        )

    text = "tokens of one request, prompt and output; the model's if not given"
    add(("--max-context", "--context-length", "--max-model-len"), "max_context", text, type=int)
    add(("--max-seqs", "--max-running-requests", "--max-num-seqs"), "max_seqs", "requests running at once", type=int)
    text = "token budget of a step; the backend's if not given"
    add(("--max-tokens-per-step", "--max-num-batched-tokens"), "max_tokens_per_step", text, type=int)
    add("--mem-fraction", "mem_fraction", "share of free memory for KV; the backend's if not given", type=float)
    add("--kv-pages", "kv_pages", "KV pages, instead of --mem-fraction", type=int)
    _queue_options(add)
    text = "do not reuse prefixes across requests"
    p.add_argument("--no-radix", "--disable-radix-cache", dest="radix", action="store_false", help=text)
    text = "sample tokens that a grammar forces one by one"
    p.add_argument("--no-jump-forward", dest="jump_forward", action="store_false", help=text)
    text = "an option of the backend, which its guide under docs/ names; may be repeated"
    option: dict[str, Any] = {"action": "append", "type": parse_option, "default": [], "metavar": "KEY=VALUE"}
    p.add_argument("--option", dest="backend_options", help=text, **option)


def _serve_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--seed", type=int, default=0, help="for requests that bring none, and for dummy weights")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on")
    p.add_argument("--port", type=int, default=30000, help="port to listen on; 0 takes a free one")
    p.add_argument(
        "--served-model-name", dest="name", help="the model's name in the API; as given to --model if not given"
    )
    p.add_argument("--embeddings", dest="pooling", choices=("last", "mean"), help="serve embeddings, pooled so")
    for what, names, writes in (("tool", TOOL_NAMES, "tool calls"), ("reasoning", REASONING_NAMES, "its reasoning")):
        flag = "--tool-call-parser" if what == "tool" else "--reasoning-parser"
        text = f"how the model writes {writes}; auto: as its chat template has it"
        p.add_argument(flag, dest=f"{what}_parser", default="auto", choices=names, help=text)
    _operator_options(p)
    levels = ("debug", "info", "warning", "error")
    p.add_argument("--log-level", default="info", choices=levels, help="debug also shows tracebacks and every request")


def _queue_options(add: Callable[..., None]) -> None:
    """What docs/scheduling.md is about."""
    text = "which waiting request goes first: longest cached prefix, first come, or the lowest `priority`"
    add(("--schedule-policy", "--policy"), "policy", text, choices=get_args(Policy))
    text = "let the tenant (API key, else `user`) that got the least service go first"
    add("--fair", "fair", text, action="store_true")
    text = "prefill tokens of a step; what the budget leaves if not given"
    add("--chunked-prefill-size", "chunked_prefill_size", text, type=int)
    text = "how fast more pages are kept for outputs to come once they ran out; 0: never"
    add("--schedule-conservativeness", "schedule_conservativeness", text, type=float)
    text = "requests that may wait; more are refused with 503; no limit if not given"
    add("--max-queued-requests", "max_queued_requests", text, type=int)
    text = "seconds a request may take, and the most its own `timeout` may be; no limit if not given"
    add("--request-timeout", "request_timeout", text, type=float)
    text = "which cached prefix is forgotten first"
    add(("--eviction-policy", "--radix-eviction-policy"), "eviction_policy", text, choices=get_args(EvictionPolicy))


def _operator_options(p: argparse.ArgumentParser) -> None:
    """What docs/operations.md is about."""
    add = p.add_argument
    add("--max-body", type=int, default=32 * 2**20, help="bytes of the largest request body")
    add("--max-prompt", type=_positive, help="tokens of the longest prompt; the context's if not given")
    text = "most output tokens that a request may ask for; the context's if not given"
    add("--max-tokens-limit", dest="max_tokens", type=_positive, help=text)
    add("--api-key", dest="api_keys", action="append", default=[], help="a key that clients must send; may be repeated")
    add("--api-key-file", type=Path, help="named keys with limits, TOML or JSON; see docs/operations.md")
    add("--admin-key", help="a key for the operator's routes, as /flush_cache")
    text = "a web page's origin that may call the API; may be repeated"
    add("--cors-origin", dest="cors_origins", action="append", default=[], help=text)
    add("--ssl-certfile", type=Path, help="PEM; serves HTTPS")
    add("--ssl-keyfile", type=Path, help="PEM, if it is not in --ssl-certfile")
    text = "how long running requests may go on after SIGTERM"
    add("--drain-timeout", dest="drain_seconds", type=float, default=30.0, metavar="SECONDS", help=text)
    add("--otlp-endpoint", metavar="URL", help="where OpenTelemetry spans go, as http://localhost:4318/v1/traces")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected an integer >= 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
