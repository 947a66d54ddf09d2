"""The `lume` command."""

import gc

# Nearly all that a command does is to import: hardly any garbage, and 7 of 150 ms to look for it.
# What goes on for long switches it on again.
gc.disable()
