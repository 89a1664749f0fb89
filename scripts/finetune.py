"""Fine-tune a language model: `accelerate launch finetune.py --optim diagonal_to ...` (see ../configs/recipes)."""

import sys

from to_finetune.finetune import main

if __name__ == "__main__":
    sys.exit(main())
