"""`mlx-align cache`: the stored reference log-probs."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import click

from mlx_align.cli.options import Command, config_options, echo_json, given_options, json_option
from mlx_align.config import CacheConfig, make_config


@click.command(cls=Command, short_help="Show or delete cached reference log-probs.")
@config_options(CacheConfig)
@json_option("Print as JSON.")
def cache(json: bool, **options: Any) -> None:
    """Show the contents of the reference cache, or delete them."""
    from mlx_align.training.reference import default_cache_folder, stored_caches

    config = make_config(CacheConfig, given_options(options), None, "command line")
    if config.reference_cache is None:
        folder = default_cache_folder()
    else:
        folder = Path(config.reference_cache).expanduser()
    stores = stored_caches(folder)
    if config.purge:
        for store in stores:
            store.file.unlink(missing_ok=True)
    total = sum(store.bytes for store in stores)
    if json:
        entries = [
            {
                **store._asdict(),
                "file": str(store.file),
                "changed": datetime.fromtimestamp(store.changed).isoformat(timespec="seconds"),
            }
            for store in stores
        ]
        echo_json(
            {"folder": str(folder), "bytes": total, "purged": config.purge, "stores": entries}
        )
        return
    for store in stores:
        date = datetime.fromtimestamp(store.changed)
        reference = store.model or "unknown model"
        if store.adapter:
            reference += f" with {store.adapter}"
        click.echo(
            f"{date:%Y-%m-%d %H:%M}  {store.bytes / 1e6:8.1f} MB  {store.completions:>9,} "
            f"completions  {reference}"
        )
    verb = "Deleted" if config.purge else "Total:"
    click.echo(f"{verb} {len(stores)} references, {total / 1e6:.1f} MB, in {folder}")
