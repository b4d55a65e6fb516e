"""The command that generates text from a checkpoint."""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from service.cli.connection import DataDir, Token, Url
from service.cli.library import as_arguments, checkpoint_path, run_library
from service.cli.numbers import at_least
from service.cli.output import AsJson, print_json

# Run as a module in a process of its own: it imports torch.
_MODULE = "megatron_ray.inference.generate"


def register(app: typer.Typer) -> None:
    """Adds this command."""
    app.command("generate")(generate)


def generate(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Path or URI of a committed checkpoint, or a job id for its newest one.",
            show_default=False,
        ),
    ],
    prompt: Annotated[str, typer.Option(help="Prompt text.")] = "",
    special_tokens: Annotated[
        list[str] | None,
        typer.Option(
            help="Special tokens recognised in the prompt: all, none, or a name; repeatable. "
            "Default: those of the training data.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(parser=at_least(1), help="Maximum number of generated tokens."),
    ] = 100,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sampling temperature; 0 is greedy decoding.")
    ] = 0.8,
    top_k: Annotated[
        int | None,
        typer.Option(
            parser=at_least(1),
            help="Sample from the k most likely tokens. Default: all.",
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Sample from the most likely tokens with this total probability. Default: all.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(parser=at_least(0), help="Random seed of the sampling.")
    ] = 0,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Generate text from a checkpoint."""
    path = checkpoint_path(checkpoint, url, token, data_dir)
    options = {
        "--max-new-tokens": max_new_tokens,
        "--temperature": temperature,
        "--top-k": top_k,
        "--top-p": top_p,
        "--seed": seed,
        "--special-tokens": special_tokens,
    }
    if as_json:
        print_json(run_generation(path, prompt, options))
        return
    printed = _Printed(prompt)
    run_generation(path, prompt, options, printed.add)
    printed.add("\n")


class _Printed:
    """Prints a prompt and its continuation as it is generated."""

    def __init__(self, prompt: str) -> None:
        self._rest = prompt

    def add(self, text: str) -> None:
        """Prints the next text, after the prompt if it is the first."""
        # Not through rich, which would read brackets of the text as markup.
        sys.stdout.write(self._rest + text)
        sys.stdout.flush()
        self._rest = ""


def run_generation(
    checkpoint: str,
    prompt: str,
    options: dict[str, Any],
    on_text: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Returns {prompt, text, ...} from the library's command.

    `on_text` gets the text in pieces, as they are generated. Raises CommandError with
    the last line of the command's stderr.
    """
    # The answer may hold its own prompt; a prompt given here is the default.
    arguments = ["--checkpoint", checkpoint, "--prompt", prompt, *as_arguments(options)]
    answer = run_library(_MODULE, arguments, "text", on_text)
    return {"prompt": prompt, **answer, "text": str(answer["text"])}
