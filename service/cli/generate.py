"""The command that lets a checkpoint speak. Runs the library in a process of its own, because the service never imports torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.connection import DataDir, Token, Url, connect
from service.cli.failure import Failure
from service.cli.output import AsJson, print_json

_MODULE = "megatron_ray.inference.generate"


def register(app: typer.Typer) -> None:
    """Adds this command."""
    app.command("generate")(generate)


def generate(
    checkpoint: Annotated[
        str, typer.Argument(help="Path or URI of a committed checkpoint, or a job id for its newest.", show_default=False)
    ],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose among this many tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Choose among tokens that make up this probability.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same text.")] = 0,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Generate text from a checkpoint."""
    path = checkpoint
    if checkpoint.startswith("job-") and not Path(checkpoint).exists():
        with connect(url, token, data_dir) as client:
            found = client.checkpoints(checkpoint)["data"]
        if not found:
            raise Failure(f"{checkpoint} has no committed checkpoint yet", remedy=f"`megatron-ray show {checkpoint}` says where it is")
        path = str(max(found, key=lambda entry: (entry["step"], entry["attempt"]))["path"])
    options = {"--max-new-tokens": max_new_tokens, "--temperature": temperature, "--top-k": top_k, "--top-p": top_p, "--seed": seed}
    answer = run_generation(path, prompt, options)
    if as_json:
        print_json(answer)
    else:
        sys.stdout.write(f"{answer['prompt']}{answer['text']}\n")


def run_generation(checkpoint: str, prompt: str, options: dict[str, Any]) -> dict[str, Any]:
    """{prompt, text, ...} from the library's own command. Raises Failure with its last words."""
    arguments = [part for name, value in options.items() if value is not None for part in (name, str(value))]
    command = [sys.executable, "-m", _MODULE, "--checkpoint", checkpoint, "--prompt", prompt, *arguments, "--json"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise Failure(said[-1].removeprefix("error: ") if said else f"generation ended with exit code {done.returncode}")
    try:
        answer = json.loads(done.stdout)
        return {"prompt": prompt, **answer, "text": str(answer["text"])}
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(f"{_MODULE} did not answer with JSON that has `text`") from error
