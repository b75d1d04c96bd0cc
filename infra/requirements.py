"""Take out of a list of requirements what has no hash that fits all indexes: torch, and what comes with its wheels.

python infra/requirements.py compiled.txt > infra/requirements.txt
"""

import re
import sys
from pathlib import Path

WITH_TORCH = re.compile(r"(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)==")
HEAD = "# What the image installs beside torch, with the hashes of all files: `make requirements` writes this file."

if __name__ == "__main__":
    entries = re.split(r"\n(?=[A-Za-z0-9])", "\n" + Path(sys.argv[1]).read_text())[1:]
    kept = [entry.partition("\n\n")[0].rstrip() for entry in entries if not WITH_TORCH.match(entry)]
    print("\n".join([HEAD, *kept]))
