"""`python -m mlx_align` is the `mlx-align` command."""

from mlx_align.cli.main import main

if __name__ == "__main__":
    main()
