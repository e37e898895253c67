"""Facts of one group, as JSON on the last line of stdout: what tests/tools/test_cuda_rig.py judges.

python -m tests.tools.cuda_rig probe
"""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_ALLOW_CPU": "1", "TRITON_INTERPRET": "1", "UNSLOTH_DISABLE_PINNED_MEMORY": "1",
               "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled"}  # fmt: skip

from tests.support.collector import pass_over_imports
from tests.tools.cuda_rig import shim

shim.enter()

from tests.tools.cuda_rig import groups  # noqa: E402 - unsloth looks for a card as it is imported

if __name__ == "__main__":
    # a folder that is named keeps what the facts are about
    kept = contextlib.nullcontext(sys.argv[2]) if len(sys.argv) > 2 else tempfile.TemporaryDirectory()
    with kept as folder:
        os.environ["TOOLKIT_OUTPUTS"] = folder
        groups.use_the_cuda_trainer()
        pass_over_imports()
        facts = groups.GROUPS[sys.argv[1]](Path(folder))
    print("\n" + json.dumps(facts), flush=True)
