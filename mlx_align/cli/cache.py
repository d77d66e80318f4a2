"""`mlx-align cache`: the stored reference log-probs."""

from __future__ import annotations

import json as json_module
from pathlib import Path

import click


@click.command(short_help="Show or purge stored reference log-probs.")
@click.option("--reference-cache", metavar="PATH", help="Folder, if not the default one.")
@click.option("--purge", is_flag=True, help="Delete all of them.")
@click.option("--json", is_flag=True, help="Print as JSON.")
def cache(reference_cache: str | None, purge: bool, json: bool) -> None:
    """Show what the reference cache holds, or empty it."""
    from mlx_align.train.reference import default_cache_folder, stored_caches

    folder = Path(reference_cache).expanduser() if reference_cache else default_cache_folder()
    stores = stored_caches(folder)
    if purge:
        for file, _, _ in stores:
            file.unlink(missing_ok=True)
    total = sum(size for _, size, _ in stores)
    if json:
        entries = [
            {"file": str(file), "bytes": size, "completions": rows} for file, size, rows in stores
        ]
        click.echo(
            json_module.dumps(
                {"folder": str(folder), "bytes": total, "purged": purge, "stores": entries}
            )
        )
        return
    for file, size, rows in stores:
        click.echo(f"{file.stem}  {rows:>9,} completions  {size / 1e6:8.1f} MB")
    verb = "Deleted" if purge else "In all"
    click.echo(f"{verb} {len(stores)} references, {total / 1e6:.1f} MB, in {folder}")
