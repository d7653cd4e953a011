"""The command line: `fusetune` or `python -m fusetune`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from fusetune.train.config import ALIASES, TrainConfig, UserError, load_config

COMMANDS = {
    "finetune": "fine-tune a model; without arguments, a small one on texts that are at hand",
    "predict": "classify texts with a trained model",
    "generate": "continue texts with a trained model",
    "merge": "merge a trained adapter into its model",
    "info": "show versions, instruction sets, devices and backends",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _wrong_arguments(self, message)


def _wrong_arguments(parser: argparse.ArgumentParser, message: str) -> UserError:
    _, _, command = parser.prog.partition(" ")
    return UserError(f"{command}: {message}" if command else message, exit_code=2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Mistakes of the user end in one line on stderr.

    Returns:
        The exit code: 0, 1 for something wrong with data, model or disk, 2 for wrong arguments, 130 for Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except UserError as error:
        print(f"fusetune: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fusetune: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a disk that fills up, or a file that is not for us to read or write
        print(f"fusetune: {error}", file=sys.stderr)
        return 1


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["info"]:
        from fusetune.info import main as info

        return int(info(arguments[1:]) or 0)
    parser = _Parser(
        "fusetune", allow_abbrev=False, description="Compiled kernels for fine-tuning Hugging Face models."
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    parsers = {
        name: commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        for name, text in COMMANDS.items()
    }
    _add_finetune_options(parsers["finetune"])
    for name, what in (("predict", "TEXT"), ("generate", "PROMPT")):
        parsers[name].add_argument("folder", help="output_dir of a training, or a folder with a model")
        parsers[name].add_argument("texts", nargs="*", metavar=what, help="without any, the lines of standard input")
    parsers["generate"].add_argument(
        "--max-new-tokens", type=int, default=50, metavar="N", help="length of a continuation in tokens [50]"
    )
    parsers["merge"].add_argument("folder", help="output_dir of a training, or a folder with an adapter")
    parsers["merge"].add_argument("output", help="folder to make")
    if arguments[:1] == ["finetune"]:
        arguments = [_with_dashes(argument) for argument in arguments]
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        asked = parsers.get(options.command, parser)
        close = difflib.get_close_matches(unknown[0].partition("=")[0], asked._option_string_actions, n=1)
        if options.command == "finetune" and not unknown[0].startswith("-"):
            close = [f"--dataset {unknown[0]}"]
        hint = f"; did you mean {close[0]}?" if close else ""
        raise _wrong_arguments(asked, f"unknown argument {unknown[0]}{hint}")
    if options.version:
        from fusetune import __version__

        print(__version__)
        return 0
    if options.command is None:
        parser.print_help()
        return 0
    _COMMANDS[options.command](options)
    return 0


def _with_dashes(argument: str) -> str:
    """`--batch_size=2` as `--batch-size=2`."""
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value if argument.startswith("--") else argument


def _add_finetune_options(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of TrainConfig and for its aliases."""
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with settings; flags come before it")
    for field in dataclasses.fields(TrainConfig):
        names = [field.name, *(alias for alias, name in ALIASES.items() if name == field.name)]
        flags = [f"--{name.replace('_', '-')}" for name in names]
        text = field.metadata["help"]
        if field.metadata["choices"]:
            text += f" ({', '.join(field.metadata['choices'])})"
        if field.default not in (None, False):
            text += f" [{field.default}]"
        switch: dict[str, Any] = {}
        if "bool" in str(field.type) or field.name == "resume_from_checkpoint":
            switch = {"nargs": "?", "const": True}
        parser.add_argument(
            *flags, dest=field.name, default=argparse.SUPPRESS, help=text.replace("%", "%%"), metavar="X", **switch
        )


def _finetune(options: argparse.Namespace) -> None:
    settings = {name: value for name, value in vars(options).items() if name not in ("command", "config", "version")}
    config = TrainConfig()
    if options.config:
        config.update_config(load_config(options.config))
    config.update_config(settings)
    from fusetune.train.run import main as finetune

    finetune(config)


def _texts(options: argparse.Namespace) -> list[str]:
    texts = options.texts or [line.rstrip("\n") for line in sys.stdin]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"{options.command}: give texts as arguments, or one per line on standard input")
    return texts


def _predict(options: argparse.Namespace) -> None:
    from fusetune.train.predict import predict

    texts = _texts(options)
    for text, (label, probability) in zip(texts, predict(options.folder, texts), strict=True):
        print(f"{label}\t{probability:.3f}\t{text}")


def _generate(options: argparse.Namespace) -> None:
    from fusetune.train.predict import generate

    if options.max_new_tokens < 1:
        raise UserError(f"generate: max_new_tokens must be > 0, got {options.max_new_tokens}", exit_code=2)
    for text in generate(options.folder, _texts(options), options.max_new_tokens):
        print(text)


def _merge(options: argparse.Namespace) -> None:
    from fusetune.train.predict import merge

    merge(options.folder, options.output)
    print(f"saved {options.output}")


_COMMANDS = {"finetune": _finetune, "predict": _predict, "generate": _generate, "merge": _merge}

if __name__ == "__main__":
    sys.exit(main())
