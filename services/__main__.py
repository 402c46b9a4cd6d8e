"""`python -m services` and the `dollhouse` command."""

from services.cli import app


def main() -> None:
    """Entry point of the installed command."""
    app()


if __name__ == "__main__":
    main()
