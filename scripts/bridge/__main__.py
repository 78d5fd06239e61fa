"""`python -m bridge` is `bridge`."""

import sys

from bridge.main import main

sys.exit(main())
