import sys

from fastsd.cli import main

sys.exit(main())
