"""`python -m unilora_cli`, and so `torchrun --nproc-per-node 2 -m unilora_cli finetune vit …`."""

import sys

from unilora_cli.main import main

if __name__ == "__main__":
    sys.exit(main())
