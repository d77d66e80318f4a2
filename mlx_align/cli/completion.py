"""`mlx-align completion`: shell completion of commands, options and values."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from mlx_align.cli.main import COMPLETION
from mlx_align.cli.options import Command

# The control character \b keeps the lines of the paragraph.
HELP = """Print the completion script of a shell: commands, options, choices, loss names and paths.

\b
Install it with one of these lines, then open a new shell:
  bash  mlx-align completion bash >> ~/.bashrc
  zsh   mlx-align completion zsh >> ~/.zshrc
  fish  mlx-align completion fish > ~/.config/fish/completions/mlx-align.fish
"""


@click.command(cls=Command, help=HELP, short_help="Print the script for shell completion.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell."""
    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(context.find_root().command, {}, "mlx-align", COMPLETION).source())
