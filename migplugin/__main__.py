"""`python -m migplugin`, the same as the `migplugin` command."""

import gc

# Imports make many objects and no garbage. Commands are short; `serve` turns it on again.
gc.disable()

from migplugin.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
