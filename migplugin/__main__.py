"""`python -m migplugin`, the same as the `migplugin` command."""

from migplugin.cli import main

main()
