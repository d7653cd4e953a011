"""The command line: `fusetune <command>` and `python -m fusetune <command>`."""

from __future__ import annotations

import sys


def main() -> int:
    if sys.argv[1:2] == ["info"]:
        from fusetune import info

        return info.main(sys.argv[2:])
    print("usage: fusetune info [--json]", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
