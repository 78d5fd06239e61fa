"""`python -m bridge` is `bridge`."""

import sys

from bridge.door import main

sys.exit(main())
