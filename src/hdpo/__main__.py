import sys

from hdpo.cli import main

sys.exit(main())
