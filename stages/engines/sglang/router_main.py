"""Runs SGLang's router in its interpreter, with the API key from a file instead of the command line.

Imports only the standard library and `sglang_router`: this project need not be installed there.
"""

import argparse
import json
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", type=Path, help="a file of one line, `api-key: KEY`, as SGLang's servers take it")
    own, rest = parser.parse_known_args()
    try:
        # here: a missing package ends with a remedy
        from sglang_router.launch_router import launch_router, parse_router_args
    except ImportError as error:
        print(f"{error}. Install sglang-router beside sglang.", file=sys.stderr)
        sys.exit(2)  # argparse's code: another start would end the same way
    arguments = parse_router_args(rest)
    if own.config is not None:
        arguments.api_key = json.loads(own.config.read_text("utf-8").partition(": ")[2])
    launch_router(arguments)


main()
