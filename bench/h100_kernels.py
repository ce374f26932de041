"""Kernels of the GPU backend on the shapes of Llama-3.1-8B: right, how fast, and the file of tiles for this GPU.

    python bench/h100_kernels.py --out FOLDER

Products of 1 to 16 rows: each way to cut one is checked against torch in float64 and timed beside torch with a cold L2
cache. FOLDER gets the GPU's file, to be put beside polyradix_torch/triton/skinny.py in tuned/, and all times.
"""

from __future__ import annotations

import sys

from polyradix_torch.triton.tune import main

if __name__ == "__main__":
    main(sys.argv[1:])
