"""The installed command: nothing is imported before Ctrl-C is looked after."""

import os


def run_main() -> None:
    """Run the command line and end the process with its exit code."""
    try:
        from mlx_llama_apps.main import run_main as run

        run()
    except KeyboardInterrupt:
        os._exit(130)
