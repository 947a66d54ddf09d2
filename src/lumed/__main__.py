"""`python -m lumed` is the `lume` command."""

import sys

from lumed.main import main

sys.exit(main())
