"""``python -m puma_lightning`` is ``puma``."""

from puma_lightning.cli import main

if __name__ == "__main__":
    main()
