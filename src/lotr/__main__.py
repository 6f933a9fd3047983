"""`python -m lotr`, and so `torchrun --nproc-per-node 2 -m -- lotr train …`."""

from __future__ import annotations

from lotr_cli.app import main

if __name__ == "__main__":
    main()
